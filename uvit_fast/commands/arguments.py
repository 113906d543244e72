"""Arguments that several commands take."""

import argparse
from pathlib import Path

from uvit_fast.config import Config, UserError, load_config

CLIP = "openai/clip-vit-large-patch14"  # whose text features the published text models were trained on


def config_arguments(command: argparse.ArgumentParser, required: bool = True) -> None:
    without = "" if required else "; a run folder has its own"
    command.add_argument("--config", required=required, help=f"a YAML file, such as configs/h2_256.yaml{without}")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, as train.batch_size=512"
    )


def checkpoint_arguments(command: argparse.ArgumentParser) -> None:
    """--config, --set and --checkpoint, of which a run folder brings its config."""
    config_arguments(command, required=False)
    command.add_argument(
        "--checkpoint",
        required=True,
        help=".pth, .safetensors, a pipeline folder, or a run folder (its newest EMA weights)",
    )


def config_of(config: str | None, checkpoint: str, overrides: list[str]) -> Config:
    """The config of a checkpoint: the one that is named, else config.yaml of the run folder that the checkpoint is.

    Raises:
        UserError: none is named, and the checkpoint is no run folder.
    """
    own = Path(checkpoint) / "config.yaml"
    if config is None and not Path(checkpoint).exists():
        raise UserError(
            f"--checkpoint {checkpoint}: no such file or folder; expected weights, or a run's or pipeline's folder"
        )
    if config is None and not own.is_file():
        raise UserError(
            f"--config: expected the YAML file of {checkpoint}; only a run folder, with its config.yaml, goes without"
        )
    return load_config(config or own, overrides)


def positive(text: str) -> int:
    return _whole(text, range(1, 2**63), "of at least 1")


def seed(text: str) -> int:
    return _whole(text, range(2**63), "from 0 to 2^63 - 1")


def _whole(text: str, allowed: range, which: str) -> int:
    if not text.isdecimal() or int(text) not in allowed:
        raise argparse.ArgumentTypeError(f"expected a whole number {which}, got {text!r}")
    return int(text)
