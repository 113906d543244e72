"""`python -m uvit_fast` is `uvit-fast`, for launchers: `torchrun -m uvit_fast train ...`."""

import sys

from uvit_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
