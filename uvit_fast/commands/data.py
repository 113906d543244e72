"""`uvit-fast data`: download a dataset, or check one before a long run."""

import argparse
from pathlib import Path

from uvit_fast.commands.arguments import existing, sentence

HELP = "download a dataset, or check one before a long run"
EXAMPLE = "uvit-fast data check pictures"


def arguments(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(title="actions", dest="action", required=True, metavar="action")
    about = "fetch CIFAR-10's python batches"
    action = actions.add_parser(
        "cifar10", help=about, description=sentence(about), example="uvit-fast data cifar10 --download"
    )
    group = action.add_argument_group("files")
    group.add_argument("--download", action="store_true", required=True, help="download 170 MB from its authors' site")
    group.add_argument("--out", default="data", metavar="DIR", help="gets cifar-10-batches-py (default data)")
    about = "read all of a folder; name each damaged shard, unreadable or unusual image"
    action = actions.add_parser("check", help=about, description=sentence(about), example=EXAMPLE)
    action.add_argument("folder", help="of latents, or of images")


def run(args: argparse.Namespace) -> int:
    """Download CIFAR-10, or read a whole folder and list what is wrong: exit code 1 then."""
    if args.action == "check":
        existing("data check", args.folder, "a folder of latents or of images")
    from uvit_fast.data import check, download

    if args.action == "cifar10":
        print(f"data.path={download.download_cifar10(Path(args.out))}")
        return 0
    return 1 if check.check_folder(args.folder) else 0
