"""Arguments that several commands share. Nothing here imports torch."""

import argparse
import difflib
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any, NoReturn

from uvit_fast.commands.hints import hint
from uvit_fast.config import Config, ModelConfig, SampleConfig, config_from, is_config_name, load_config
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.text import cut, printable, shown

PIPELINE_FILES = ("model_index.json", "model/config.json", "scheduler/scheduler_config.json")
WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")  # what files of weights are called


class Parser(argparse.ArgumentParser):
    """A parser whose help fits a screen and ends with an example, and which reports a mistake in one line, an unknown
    option before anything else.

    Args:
        example: a working command line.
        notes: further text of the help, verbatim.
    """

    def __init__(self, *, example: str, notes: str = "", **options: Any):
        super().__init__(formatter_class=_Help, **options)
        self.example = example
        self.usage = None  # made for the help, once the arguments are known
        self._actions[0].help = argparse.SUPPRESS  # -h, which whoever reads the help knows
        words = textwrap.wrap(example, 74, break_long_words=False, break_on_hyphens=False)
        shown = "\n".join(["example:", "  " + " \\\n    ".join(words), *filter(None, [notes])])
        self.epilog = shown.replace("%", "%%")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known = list(self._option_string_actions)
        for text in sys.argv[1:] if args is None else args:
            name = text.partition("=")[0]
            if text == "--" or (self._subparsers and not text.startswith("-")):  # the rest is another parser's
                break
            if re.match(r"--?[a-zA-Z]", text) and not any(option.startswith(name) for option in known):
                otherwise = "expected a command first" if self._subparsers else ""
                meant = hint(name, known, self.get_default("goes_on")) or otherwise
                self.error("; ".join(filter(None, [f"{cut(name)}: no such option", meant])))
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"{cut(rest[0])}: not an option, nor the value of one")
        return found, rest

    def format_help(self) -> str:
        needed = [_as_typed(action) for action in self._actions if action.required]
        options = ["[options]"] * any(action.option_strings and not action.required for action in self._actions)
        optional = [f"[{_as_typed(a)} ...]" for a in self._actions if not a.option_strings and not a.required]
        further = ["..."] if self._subparsers else []
        self.usage = " ".join([self.prog, *needed, *optional, *further, *options]).replace("%", "%%")
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        script, _, command = self.prog.partition(" ")
        message = message.removeprefix("argument ").replace("expected one argument", "expected a value")
        message = re.sub(r"ignored explicit argument", "expected no value, got", message)
        message = message.replace("the following arguments are required:", "expected")
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and message == f"expected {action.dest}":
                message = f"expected one of {', '.join(action.choices)}"
        known = any(words in message for words in ("did you mean", ", got", "the same command"))
        line = ": ".join(filter(None, (script, command, printable(message[:400]))))
        self.exit(2, line + ("" if known else f"; example: {self.example}") + "\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        if isinstance(action, argparse._SubParsersAction):
            near = difflib.get_close_matches(value, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
            raise argparse.ArgumentError(None, f"{cut(value)}: no such {action.dest}; {hint}")
        raise argparse.ArgumentError(action, f"expected {' or '.join(names)}, got {shown(value)}")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Options beside what they do, on lines of at most 100 characters."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=24, width=min(shutil.get_terminal_size().columns, 102) - 2)

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):  # the commands alone, on a line each
            return "".join(map(self._format_action, action._get_subactions()))
        return super()._format_action(action)


def _as_typed(action: argparse.Action) -> str:
    """Format a required argument as in a usage line."""
    if action.nargs == 0:
        return action.option_strings[0]
    value = action.metavar or action.dest.upper()
    return f"{action.option_strings[0]} {value}" if action.option_strings else str(value)


def sentence(about: str) -> str:
    """Return a command's line in a list of commands as the first sentence of its own help."""
    return f"{about[0].upper()}{about[1:]}."


def config_arguments(command: argparse.ArgumentParser) -> None:
    """Add --config and --set, in a group of their own."""
    group = command.add_argument_group("config")
    group.add_argument("--config", required=True, metavar="NAME", help="one of the package, as h2_256, or a YAML file")
    set_argument(group)


def set_argument(group: Any, help: str = "override, as train.batch_size=512; again for more") -> None:
    group.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help)


def checkpoint_arguments(command: argparse.ArgumentParser) -> None:
    """Add --checkpoint, --config and --set; a run folder brings its own config."""
    group = command.add_argument_group("weights")
    group.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="a run, a pipeline folder, or .pth, .safetensors"
    )
    group.add_argument("--config", metavar="NAME", help="by name, as h2_256, or file; a run has its own")
    set_argument(group, "override, as model.attention=math; again for more")


def precision_argument(group: Any) -> None:
    choices = ["bf16", "fp8"]
    group.add_argument(
        "--precision", choices=choices, metavar="TYPE", help="on a GPU: bf16, fp8 (H100); default: the config's"
    )


def with_precision(overrides: list[str], precision: str | None) -> list[str]:
    """Return the overrides of a config, with what --precision requests."""
    return overrides if precision is None else [*overrides, f"sample.precision={precision}"]


def existing(option: str, path: str, expected: str) -> None:
    """Refuse a mistyped path before anything slow begins.

    Raises:
        UserError: there is no such file or folder.
    """
    try:
        there = Path(path).exists()
    except OSError:  # too long for a name
        there = False
    if not there:
        raise UserError(f"{option} {cut(path)}: no such file or folder; expected {expected}")


def reference_arguments(group: Any) -> None:
    """Add --reference, and with which features it is compared."""
    group.add_argument(
        "--reference", required=True, metavar="PATH", help="statistics (.npz), images, or a config: its data"
    )
    group.add_argument(
        "--features", choices=["inception", "digits-fid"], default="inception", metavar="NAME",
        help="inception (default), or digits-fid, which is not an FID",
    )  # fmt: skip
    group.add_argument("--inception", metavar="FILE", help="its weights; default: torch.hub's download")
    group.add_argument("--download", action="store_true", help="download these weights if they are missing")
    group.add_argument("--cache", metavar="DIR", help="of statistics (default ~/.cache/uvit-fast)")


def reference_is_config(reference: str, features: str) -> bool:
    """Return whether --reference is a config. An existing file or folder of that name, such as samples, comes first,
    but for digits-fid, which is of a config's data only.
    """
    if Path(reference).suffix in (".yaml", ".yml"):
        return True
    return is_config_name(reference) and (features == "digits-fid" or not Path(reference).exists())


def config_of(config: str | None, checkpoint: str, overrides: list[str]) -> Config:
    """Return the config of a checkpoint: the one that is named, else the checkpoint's own.

    A run folder has its config.yaml, which is that of its checkpoints, too; a pipeline's folder describes its model.

    Raises:
        UserError: there is no such checkpoint; or none is named, and the checkpoint belongs to no run or pipeline.
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
    if path.is_dir():
        said = "has no config.yaml or model_index.json; expected a run's or a pipeline's folder, or --config too"
    elif path.suffix.lower() not in WEIGHTS:
        said = f"expected weights ({', '.join(WEIGHTS)}), or a run's or a pipeline's folder, got another kind of file"
    else:
        said = "weights alone do not say what they are; expected --config too: a name, as h2_256, or a YAML file"
    raise UserError(f"--checkpoint {checkpoint}: {said}")


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file that describes a checkpoint.

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
    """Return what a pipeline's folder says about its model and its published way of sampling; it says nothing about
    training.
    """

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


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {shown(text)}") from None


def positive(text: str) -> int:
    return _whole(text, range(1, 2**63), "of at least 1")


def seed(text: str) -> int:
    return _whole(text, range(2**63), "from 0 to 2^63 - 1")


def _whole(text: str, allowed: range, which: str) -> int:
    if not text.isdecimal() or len(text) > 20 or int(text) not in allowed:
        raise argparse.ArgumentTypeError(f"expected a whole number {which}, got {shown(text)}")
    return int(text)
