"""Arguments that several commands take. Nothing here imports torch."""

import argparse
import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from uvit_fast.config import Config, ModelConfig, SampleConfig, config_from, load_config
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.text import cut, shown

PIPELINE_FILES = ("model_index.json", "model/config.json", "scheduler/scheduler_config.json")


class Parser(argparse.ArgumentParser):
    """One that answers a mistake with the command's own usage and an example, an unknown option before anything else.

    Args:
        example: a command line that works.
    """

    def __init__(self, *, example: str, **options: Any):
        super().__init__(epilog=f"example: {example}", **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known = list(self._option_string_actions)
        for text in sys.argv[1:] if args is None else args:
            name = text.partition("=")[0]
            if text == "--" or (self._subparsers and not text.startswith("-")):  # what follows is not this parser's
                break
            if re.match(r"--?[a-zA-Z]", text) and not any(option.startswith(name) for option in known):
                near = difflib.get_close_matches(name, known, n=1)
                self.error(f"{cut(name)}: no such option" + (f"; did you mean {near[0]}?" if near else ""))
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"{cut(rest[0])}: expected no such argument")
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message[:400]}\n{self.epilog}\n")


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


def precision_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--precision",
        choices=["bf16", "fp8"],
        help="of the blocks' products on a GPU: fp8 is e4m3, of compute capability 9.0; default: the config's",
    )


def with_precision(overrides: list[str], precision: str | None) -> list[str]:
    """The overrides of a config, and what --precision asks for."""
    return overrides if precision is None else [*overrides, f"sample.precision={precision}"]


def existing(option: str, path: str, expected: str) -> None:
    """Refuse a path that is mistyped before anything slow begins.

    Raises:
        UserError: there is no such file or folder.
    """
    try:
        there = Path(path).exists()
    except OSError:  # too long for a name
        there = False
    if not there:
        raise UserError(f"{option} {cut(path)}: no such file or folder; expected {expected}")


def config_of(config: str | None, checkpoint: str, overrides: list[str]) -> Config:
    """The config of a checkpoint: the one that is named, else the checkpoint's own.

    A run folder has its config.yaml, and so have the checkpoints in it; a pipeline's folder says what it is made of.

    Raises:
        UserError: there is no such checkpoint; or none is named, and the checkpoint is of no run or pipeline.
    """
    existing("--checkpoint", checkpoint, "weights, or a run's or pipeline's folder")
    if config is not None:
        return load_config(config, overrides)
    path = Path(checkpoint)
    for folder in [path, *path.absolute().parents[:3]]:  # run/checkpoints/step_00001000/ema.safetensors
        if (folder / "config.yaml").is_file():
            return load_config(folder / "config.yaml", overrides)
        if (folder / "model_index.json").is_file():
            return _config_of_pipeline(folder, overrides)
    for folder in (path, path.parent):  # a checkpoint that was copied out of its run
        if (folder / "manifest.json").is_file():
            config = read_json(folder / "manifest.json").get("config")
            if isinstance(config, dict):
                return config_from(config, folder / "manifest.json", overrides)
    raise UserError(
        f"--config: expected the YAML file of {checkpoint}; only runs, their checkpoints and pipelines' folders have their own"
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file that says what a checkpoint is.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(
            f"{file}: expected what training or `uvit-fast convert` writes, or --config to say what the checkpoint is"
        )
    return values


def _config_of_pipeline(folder: Path, overrides: list[str]) -> Config:
    """What a pipeline's folder says of its model, and how it was published to be sampled. Of the training it says nothing."""

    pipeline, model, scheduler = (read_json(folder / name) for name in PIPELINE_FILES)
    model = {key: value for key, value in model.items() if key in ModelConfig.model_fields}
    droppable = pipeline.get("null_label") is not None or bool(model.get("context_dim"))
    tree: dict[str, Any] = {
        "name": folder.absolute().name,
        "model": model,
        "diffusion": {
            key: said
            for key in ("schedule", "prediction")
            if (said := pipeline.get(key) or scheduler.get(key)) or key == "schedule"
        },
        "train": {"iterations": 1, "batch_size": 1, "p_uncond": 0.1 if droppable else 0.0},
        "sample": {key: value for key, value in scheduler.items() if key in SampleConfig.model_fields},
        "data": {"name": "synthetic"},
    }
    scale = pipeline.get("guidance_scale", 1.0)
    tree["sample"]["guidance_scale"] = scale - 1 if isinstance(scale, int | float) else scale  # the paper's
    if (folder / "vae").is_dir():
        factors = {name: pipeline.get(name) for name in ("scale_factor", "shift_factor")}
        tree["latent"] = {**factors, "autoencoder": str(folder / "vae")}
        if (folder / "text_encoder").is_dir():
            tree["latent"]["text_encoder"] = str(folder)
    return config_from(tree, folder / PIPELINE_FILES[0], overrides)


def positive(text: str) -> int:
    return _whole(text, range(1, 2**63), "of at least 1")


def seed(text: str) -> int:
    return _whole(text, range(2**63), "from 0 to 2^63 - 1")


def _whole(text: str, allowed: range, which: str) -> int:
    if not text.isdecimal() or len(text) > 20 or int(text) not in allowed:
        raise argparse.ArgumentTypeError(f"expected a whole number {which}, got {shown(text)}")
    return int(text)
