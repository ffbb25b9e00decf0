"""What `make image` and `make play` build and run with."""
