"""`uvit-fast train` as a script: `python train.py --config digits`, `deepspeed train.py --config h2_256`."""

import os
import sys

# The root holds the folder kernels/, which must not be importable under that name: transformers probes for a package
# of that name.
sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != os.path.dirname(os.path.realpath(__file__))]

from uvit_fast import cli  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    return cli.script("train.py", "train", argv)


if __name__ == "__main__":
    sys.exit(main())
