"""`uvit-fast <command>`: a user's mistake is one line and exit code 2, Ctrl-C one line and 130.

Nothing here imports torch, nor does a command before it knows that its arguments make sense: a typo is answered at once.
"""

import argparse
import sys

import uvit_fast
from uvit_fast.commands import (
    bench,
    calibrate,
    cka,
    convert,
    cost,
    data,
    demo,
    evaluate,
    extract,
    gallery,
    info,
    profile,
    runs,
    sample,
    sweep,
    tune,
)
from uvit_fast.commands.arguments import Parser
from uvit_fast.runtime import notices
from uvit_fast.runtime.errors import UserError

COMMANDS = {
    "info": info,
    "sample": sample,
    "gallery": gallery,
    "convert": convert,
    "evaluate": evaluate,
    "extract": extract,
    "data": data,
    "demo": demo,
    "calibrate": calibrate,
    "tune": tune,
    "bench": bench,
    "profile": profile,
    "runs": runs,
    "cost": cost,
    "cka": cka,
    "sweep": sweep,
}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="uvit-fast", description="U-ViT: sample, inspect, measure.", example="uvit-fast sample --help")
    parser.add_argument("--version", action="version", version=f"uvit-fast {uvit_fast.__version__}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher says it before the command
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP, example=module.EXAMPLE)
        command.set_defaults(run=module.run)
        module.arguments(command)

    args = parser.parse_args(argv)
    if argv is None:  # as a process of its own
        notices.plain()
    try:
        return args.run(args) or 0
    except (UserError, ImportError) as error:
        print(f"uvit-fast: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of whom it printed to
        return 1
    except OSError as error:
        print(f"uvit-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "; the same command with --resume continues" if hasattr(args, "resume") else ""
        print(f"uvit-fast: {args.command} interrupted{goes_on}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
