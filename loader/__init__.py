"""What fits where, and putting it there. Knows no web."""
