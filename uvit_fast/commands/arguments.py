"""Arguments that several commands take."""

import argparse

from uvit_fast.config import UserError

CLIP = "openai/clip-vit-large-patch14"  # whose text features the published text models were trained on


def config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, help="a YAML file, such as configs/h2_256.yaml")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, as train.batch_size=512"
    )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--classes: expected whole numbers with commas, such as 207,360, got {text!r}") from None
