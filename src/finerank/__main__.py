"""`python -m finerank`, for `torchrun -m finerank`."""

import sys

from finerank.cli import main

if __name__ == "__main__":
    sys.exit(main())
