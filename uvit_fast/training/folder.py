"""A run's folder: what ran in it, which process owns it now, and in which state it was left."""

import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import yaml

from uvit_fast.config import Config, ModelConfig, dump_config
from uvit_fast.data.datasets import Dataset
from uvit_fast.model import ops
from uvit_fast.provenance import RUN_FILE, Provenance, shown
from uvit_fast.runtime.claims import Claim, Taken, holder
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import read_rows, write_whole
from uvit_fast.runtime.processes import World
from uvit_fast.training import checkpoint
from uvit_fast.training.monitor import say


def claim(run_dir: Path) -> Claim:
    """Claim the folder for this process, which trains in it.

    Raises:
        UserError: another process has claimed it, or it cannot be written to.
    """
    try:
        return Claim(run_dir)
    except Taken as taken:
        raise UserError(_taken(run_dir, taken)) from None
    except OSError as error:
        raise unwritable(run_dir, error) from None


def unwritable(run_dir: Path, error: OSError) -> UserError:
    """Return the error of a folder to which a run cannot be written."""
    return UserError(f"{run_dir}: expected a folder for the run ({error.strerror or error})")


def check_free(run_dir: Path) -> None:
    """Refuse a folder in which another process trains, before the ranks meet: that run's ranks may occupy the port on
    which these would meet.

    Raises:
        UserError: another process has claimed it.
    """
    if found := holder(run_dir):
        raise UserError(_taken(run_dir, found))


def _taken(run_dir: Path, by: object) -> str:
    return f"{run_dir}: another process trains here, {by}; --run-dir takes another folder"


class RunState(NamedTuple):
    """A run as its folder shows it.

    Attributes:
        state: "running", "finished", "stopped" (the same command continues it), "no checkpoint", or "unreadable" if its
            files are.
        step, steps: of the last row of scalars, and where the run ends.
        loss, images_per_second: of that row; None before the first.
        checkpoint: step of the newest checkpoint; None without one.
        commit: of the source that ran; None where unknown.
        changed: seconds since the last row or, before the first, since the start.
    """

    name: str
    state: str
    step: int
    steps: int
    loss: float | None
    images_per_second: float | None
    checkpoint: int | None
    commit: str | None
    changed: float


def find_runs(*folders: Path) -> list[Path]:
    """Return the runs in folders, each of which is a run or holds runs, in the folders' order and by name."""
    runs = []
    for folder in folders:
        runs += [folder] if _is_run(folder) else sorted(filter(_is_run, folder.iterdir() if folder.is_dir() else []))
    return list({run.resolve(): run for run in runs}.values())


def run_states(*folders: Path) -> list[RunState]:
    """Return the state of each run in the folders, the most recently changed first."""
    unknown = (0, 0, None, None, None, None, math.inf)
    states = [_state(path) or RunState(_name(path), "unreadable", *unknown) for path in find_runs(*folders)]
    return sorted(states, key=lambda run: run.changed)


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.yaml", "environment.json"))


def _name(run_dir: Path) -> str:
    return run_dir.absolute().name  # also of "."


def summary(config: Config, model: nn.Module, dataset: Dataset, world: World) -> str:
    """Return, for the user to read as a run begins, what is trained on what and where, and which kernels run and why.

    Raises:
        UserError: kernels or attention were requested that cannot run here.
    """
    net, device = config.model, world.device
    cuda = device.type == "cuda"
    threads = torch.get_num_threads()
    where = torch.cuda.get_device_name(device) if cuda else f"CPU, {threads} thread{'s' * (threads > 1)}"
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    about = {}
    if isinstance(net, ModelConfig):  # U-Nets have other ops
        about = ops.describe(net.embed_dim, net.num_heads, net.attention, net.kernels, device)
        about = about if cuda else {}  # on a CPU there is no choice
    if dataset.decoder:
        about["images"] = dataset.decoder
    names = Provenance.of(dataset, net.num_classes > 0).classes or ()
    if any(name != str(label) for label, name in enumerate(names)):  # digits are called what they are
        about["labels"] = shown((f"{label} {name}" for label, name in enumerate(names)), kind="classes")
    if dataset.unused_classes > 1:
        count = dataset.unused_classes
        about["labels"] = f"none; model.num_classes={count} would take the {count} folders as classes"
    lines = [f"{config.name}: {millions:,.1f} M parameters, {_images(config, dataset)}, {world.size} x {where}"]
    return "\n".join([*lines, *(f"{name:16s}{what}" for name, what in about.items())])


def _images(config: Config, dataset: Dataset) -> str:
    """Return how many images are trained on: a mirror image that the data hold counts with its image."""
    held_out = config.evaluate.held_out if config.evaluate else None
    mirrored = " and their mirror images" if dataset.views == 2 else ""
    apart = f" ({held_out:,} more held out)" if held_out and not isinstance(held_out, str) else ""
    return f"{len(dataset) // dataset.views:,} images{mirrored}{apart}"


def describe_run(
    run_dir: Path, config: Config, world: World, provenance: Provenance, start: dict[str, object] | None = None
) -> None:
    """Write config.yaml, resolved; data.json, what its labels and latents mean; environment.json, with versions,
    device, ranks, command and git commit; and, for a run from given weights, init.json, which weights those are.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    _write(run_dir / "config.yaml", dump_config(config))
    provenance.write(run_dir / RUN_FILE)
    if start is not None:
        _write(run_dir / "init.json", json.dumps(start, indent=1))
    versions: dict[str, str | None] = {}
    for package in ("uvit-fast", "torch", "triton", "deepspeed", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    cuda = world.device.type == "cuda"
    environment = {
        "python": platform.python_version(),
        **versions,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(world.device) if cuda else platform.processor() or platform.machine(),
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
        "host": platform.node(),
        "pid": os.getpid(),
        "commit": _commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    _write(run_dir / "environment.json", json.dumps(environment, indent=1))


def _write(path: Path, text: str) -> None:
    """Write a file whole: on a full disk, a continued run keeps its old one."""
    write_whole(path, lambda file: file.write_text(text, "utf-8"))


def _commit() -> str | None:
    """Return the git commit of the running source tree, with "+" if files differ from it; None outside a checkout."""

    def git(*args: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def set_aside(run_dir: Path) -> None:
    """Rename an existing run folder to `<run_dir>.1`, or the first free number.

    Raises:
        UserError: another process trains in it.
    """
    if not run_dir.exists():
        return
    claim(run_dir).release()
    number = next(n for n in itertools.count(1) if not run_dir.with_name(f"{run_dir.name}.{n}").exists())
    aside = run_dir.rename(run_dir.with_name(f"{run_dir.name}.{number}"))
    say(f"{run_dir}: the older run is now {aside}")


def _state(run_dir: Path) -> RunState | None:
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text("utf-8"))  # whatever keys it had at the time
        steps = int(config["train"]["iterations"])
        commit = json.loads((run_dir / "environment.json").read_text("utf-8")).get("commit")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None
    found = checkpoint.steps(run_dir / "checkpoints")
    newest = checkpoint.step_of(found[-1]) if found else None
    rows = run_dir / "metrics.jsonl"
    last = {key: value for key, value in (read_rows(rows) or [{}])[-1].items() if isinstance(value, int | float)}
    touched = (rows if rows.exists() else run_dir / "environment.json").stat().st_mtime
    state = "no checkpoint" if newest is None else "finished" if newest >= steps else "stopped"
    state = "running" if holder(run_dir) else state
    return RunState(
        _name(run_dir), state, step if isinstance(step := last.get("step"), int) else 0, steps, last.get("loss"),
        last.get("images_per_second"), newest, commit if isinstance(commit, str) else None, time.time() - touched,
    )  # fmt: skip
