"""`uvit-fast gallery`: sample from checkpoints in the browser."""

import argparse
import sys
from pathlib import Path

from uvit_fast.commands.arguments import config_of, set_argument
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.importing import preload

HELP = "sample from checkpoints in the browser"
EXAMPLE = "uvit-fast gallery --checkpoint runs/s2_fashion"


def arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("weights")
    group.add_argument(
        "--checkpoint",
        nargs="+",
        required=True,
        metavar="PATH",
        help="runs, pipeline folders, .pth, .safetensors; to compare",
    )
    group.add_argument("--config", metavar="NAME", help="by name, as h2_256, or file; a run has its own")
    set_argument(group, "override, as sample.spacing=karras; again for more")
    group.add_argument("--clip", metavar="NAME", help="text encoder, folder or hub name; default: the data's")
    group = command.add_argument_group("page")
    group.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1: this machine only)")
    group.add_argument("--port", type=_port, default=7860, metavar="N", help="default 7860; 0: a free one")


def run(args: argparse.Namespace) -> None:
    """Serve the gallery until Ctrl-C."""
    names = short_names(args.checkpoint)
    configs = [config_of(args.config, checkpoint, args.set) for checkpoint in args.checkpoint]
    if len({cfg.device for cfg in configs}) > 1:
        raise UserError("gallery: expected checkpoints of one device; --set device=cpu or cuda says which")
    preload("uvit_fast.gallery.page")
    from uvit_fast.data.autoencoders import import_alone
    from uvit_fast.gallery.page import LOOPBACK, serve
    from uvit_fast.gallery.session import Session
    from uvit_fast.runtime.device import pick_device

    if args.whole and any(cfg.latent for cfg in configs):
        import_alone()
    checkpoints = dict(zip(names, zip(configs, args.checkpoint)))
    session = Session(checkpoints, pick_device(configs[0].device), args.clip)
    if args.host not in LOOPBACK:
        print(
            f"gallery: --host {args.host}: whoever reaches this address can draw, without a password", file=sys.stderr
        )
    serve(session, args.host, args.port)


def short_names(checkpoints: list[str]) -> list[str]:
    """Return the names of checkpoints on the page: the ends of their paths, as short as they are unique.

    Raises:
        UserError: one is given twice.
    """
    parts = [Path(checkpoint).absolute().parts for checkpoint in checkpoints]
    if len(set(parts)) < len(parts):
        raise UserError(f"--checkpoint: expected each once, got {', '.join(checkpoints)}")
    for length in range(1, 1 + max(map(len, parts))):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _port(text: str) -> int:
    if not text.isdecimal() or not int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r:.40}")
    return int(text)
