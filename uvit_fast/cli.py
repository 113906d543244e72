"""`uvit-fast <command>`: a user's mistake is one line and exit code 2, Ctrl-C one line and 130.

Nothing here imports torch, and no command does before its arguments are known to be valid: a typo is reported at once.
"""

import argparse
import os
import sys
from typing import Any

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
    front,
    gallery,
    info,
    profile,
    runs,
    sample,
    sweep,
    train,
    tune,
)
from uvit_fast.commands.arguments import Parser, sentence
from uvit_fast.runtime import notices
from uvit_fast.runtime.errors import UserError, words

COMMANDS = {
    "train": train,
    "sample": sample,
    "gallery": gallery,
    "evaluate": evaluate,
    "convert": convert,
    "extract": extract,
    "data": data,
    "runs": runs,
    "demo": demo,
    "info": info,
    "cost": cost,
    "calibrate": calibrate,
    "front": front,
    "sweep": sweep,
    "cka": cka,
    "profile": profile,
    "bench": bench,
    "tune": tune,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command, by default that of the command line, with which this process ends."""
    parser = Parser(
        prog="uvit-fast",
        description="U-ViT for diffusion: train, sample, measure.",
        example="uvit-fast sample --help",
    )
    parser.add_argument("--version", action="version", version=f"uvit-fast {uvit_fast.__version__}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher puts it before the command
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        _add(module, commands.add_parser(name, help=module.HELP, **_words(module)))
    return _run(parser.parse_args(argv), "uvit-fast", argv is None)


def script(name: str, command: str, argv: list[str] | None = None) -> int:
    """Run `main` for a script that is one of the commands."""
    words = _words(COMMANDS[command])
    words["example"] = words["example"].replace(f"uvit-fast {command}", f"python {name}")
    parser = Parser(prog=name, **words)
    _add(COMMANDS[command], parser)
    parser.set_defaults(command=command)
    return _run(parser.parse_args(argv), name, argv is None)


def _words(module: Any) -> dict[str, Any]:
    """Return what a command's help says beside its options."""
    return {"description": sentence(module.HELP), "example": module.EXAMPLE, "notes": getattr(module, "NOTES", "")}


def _add(module: Any, parser: Parser) -> None:
    parser.set_defaults(run=module.run, goes_on=None, whole=False)
    module.arguments(parser)


def _run(args: argparse.Namespace, name: str, whole: bool) -> int:
    """Run the command; return its exit code.

    Args:
        name: the prefix of error messages.
        whole: whether the process is the command's, and ends with it.
    """
    args.whole = whole
    if whole:
        notices.plain()
        # Read as torch is imported: threads that spin for another one would take the core that it waits for.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = args.run(args) or 0
    except BrokenPipeError:  # the reader of its output is gone
        code = 1
    except (UserError, ImportError, OSError) as error:
        print(f"{name}: {words(error)}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        goes_on = f"; the same command {args.goes_on}" if args.goes_on else ""
        print(f"{name}: {args.command} interrupted{goes_on}", file=sys.stderr)
        code = 130
    if whole and args.run is train.run:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # all is written; the interpreter might abort at exit over a gloo thread that is still in Python
    return code


if __name__ == "__main__":
    sys.exit(main())
