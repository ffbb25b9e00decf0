"""`python -m service` is `snugfit`, for a place where the command is not on the path."""

import sys

from service.cli import main

if __name__ == "__main__":
    sys.exit(main())
