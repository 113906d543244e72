"""Checkpoints that survive a crash, a full disk or a truncated file.

`checkpoints/step_00001000/` holds one safetensors file per part, each with whole fp32 tensors under the model's names,
independent of ranks and ZeRO stage: `model` (master weights), `exp_avg`, `exp_avg_sq`, `ema`. `manifest.json` lists the
files' sizes and SHA-256; it is written last, into a folder with a temporary name that is then renamed, so a folder with
the final name is complete. Reading still verifies everything, since disks and copies fail too.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from uvit_fast import provenance
from uvit_fast.provenance import Provenance
from uvit_fast.runtime.ahead import ahead
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.text import shown

Tensors = dict[str, Tensor]
LEARNING = {  # section -> keys that may differ in a continued run, and affect what it learns
    "train": {
        "batch_size", "lr", "warmup_steps", "betas", "weight_decay", "ema_decay", "p_uncond", "grad_clip", "precision",
        "seed",
    },
    "data": {"name", "path", "crop", "flip"},
    "diffusion": {"time", "time_mean", "time_std", "time_shift", "weighting", "min_snr_gamma"},
    "evaluate": {"held_out"},
}  # fmt: skip
BEFORE = {"diffusion": {"prediction": "eps"}}  # values of checkpoints that do not state them
MEANING = ("model", "diffusion", "latent")  # sections that decide what the weights mean, except for
HOW_NOT_WHAT = {
    "attention",
    "kernels",
    "activation_checkpointing",
    "autoencoder",
    "text_encoder",
}  # other ways to compute the same


class Writer:
    """Write checkpoints in a thread, beside training, one at a time.

    A checkpoint that cannot be written (a full disk) is reported by `finish` or the next `submit`; training goes on.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None], keep_every: int = 0):
        self.folder, self.keep, self.say, self.keep_every = folder, keep, say, keep_every
        self._thread: threading.Thread | None = None
        self._error: tuple[int, Exception] | None = None

    def submit(self, step: int, parts: dict[str, Tensors], state: dict[str, Any]) -> None:
        """Start writing, after the checkpoint before it. `parts` must no longer change."""
        self.finish()
        self._thread = threading.Thread(target=self._write, args=(step, parts, state), name="checkpoint writer")
        self._thread.start()

    def finish(self) -> bool:
        """Wait for the checkpoint in progress; return whether it was written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            self.say(f"checkpoint of step {error[0]} was not written: {error[1]}; the older ones are unharmed")
        return error is None

    def _write(self, step: int, parts: dict[str, Tensors], state: dict[str, Any]) -> None:
        try:
            write(self.folder, step, parts, state, self.keep, self.keep_every)
        except (OSError, SafetensorError) as error:
            self._error = (step, error)


def write(
    folder: Path, step: int, parts: dict[str, Tensors], state: dict[str, Any], keep: int, keep_every: int = 0
) -> None:
    """Write the checkpoint of `step` below `folder`, then remove older ones.

    Args:
        parts: the tensors of each file, by its name without suffix.
        state: whatever else belongs to the checkpoint, as JSON values.
        keep, keep_every: keep the newest `keep`, and those at multiples of `keep_every` steps (0: none).

    Raises:
        OSError, SafetensorError: it could not be written; all older checkpoints are still there.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f".step_{step:08d}.partial"
    try:
        for left_over in folder.glob(".step_*.partial"):  # of a killed writer
            _remove(left_over)
        partial.mkdir(parents=True)
        for name, tensors in parts.items():
            save_file(tensors, partial / f"{name}.safetensors")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(partial.iterdir())
        }
        (partial / "manifest.json").write_text(json.dumps({"step": step, **state, "files": files}, indent=1))
        for path in partial.iterdir():
            _sync(path)
        _remove(final)  # of an earlier run that went back behind it
        partial.rename(final)
        _sync(folder)
    finally:
        _remove(partial)
    for old in steps(folder)[:-keep]:
        if not keep_every or _step(old) % keep_every:
            _remove(old)


def step_of(path: Path) -> int | None:
    """Return the step in the name of a checkpoint's folder; None if training does not write such names."""
    step = int(path.name[5:]) if re.fullmatch(r"step_[0-9]{8,18}", path.name) else None
    return step if step is not None and path.name == f"step_{step:08d}" else None


def _step(path: Path) -> int:
    return cast(int, step_of(path))


def steps(folder: Path) -> list[Path]:
    """Return the checkpoints below `folder`, oldest first. Folders that users renamed are ignored."""
    return sorted((path for path in folder.glob("step_*") if step_of(path) is not None), key=_step)


def newest_intact(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint whose files match its manifest, and the manifest; None if there is no checkpoint.
    Training, sampling, evaluation and conversion all choose by it.

    Args:
        say: gets one line for each damaged checkpoint that is skipped.

    Raises:
        UserError: there are checkpoints, but none is intact.
    """
    found = steps(folder)
    for path in reversed(found):
        wrong = next(faults(path), None)
        if wrong is None:
            return path, cast(dict[str, Any], _manifest(path))
        say(f"checkpoint {path} is damaged ({': '.join(wrong)}); trying the one before")
    if found:
        raise UserError(
            f"{folder}: none of the {len(found)} checkpoints is intact; train.py --fresh starts the run anew, and "
            "`--checkpoint .../ema.safetensors` takes a file that is"
        )
    return None


def set_aside_newer(path: Path) -> None:
    """Rename the checkpoints after `path`, which a continued run found damaged, to `damaged_step_...`: otherwise they
    would still be the newest for sampling, and would stay while intact ones are removed.
    """
    for newer in steps(path.parent):
        if _step(newer) > _step(path):
            aside = newer.with_name(f"damaged_{newer.name}")
            _remove(aside)
            newer.rename(aside)


def read(path: Path, name: str) -> Tensors:
    """Return one part of a checkpoint, on the CPU."""
    return load_file(path / f"{name}.safetensors")


def check_model(path: Path, shapes: dict[str, tuple[int, ...]], config: dict, manifest: dict[str, Any]) -> None:
    """Refuse a checkpoint of another network or another diffusion.

    Raises:
        UserError: names or shapes of parameters differ, or config keys that decide what the weights mean; the message
            names them.
    """
    keys = other_meaning(config, manifest["config"])
    theirs = _shapes(path / "model.safetensors")
    differing = [name for name in sorted(shapes.keys() | theirs.keys()) if shapes.get(name) != theirs.get(name)]
    if not differing and not keys:
        return
    example = ""
    if differing:
        name = differing[0]
        example = f"{name} is {theirs.get(name, 'missing')} there, expected {shapes.get(name, 'no such parameter')}"
        example = f"; {len(differing)} parameters differ ({example})"
    raise UserError(
        f"{path}: a checkpoint of another model: {'; '.join(keys) or 'same model section'}{example}; "
        "--run-dir takes another folder, --fresh starts the run anew"
    )


def check_whole(path: Path, manifest: dict[str, Any], learning: Collection[str], trainable: Collection[str]) -> None:
    """Refuse a checkpoint without everything that training needs to continue, such as one assembled by other programs.

    Args:
        learning: names of the trainable parameters; trainable: the patterns that the user gave.

    Raises:
        UserError: a part is missing or does not have the model's tensors, a count is invalid, or other parameters were
            trained.
    """
    before = tuple(manifest["config"].get("train", {}).get("trainable", ["all"]))
    whole = _shapes(path / "model.safetensors")
    learned = {name: shape for name, shape in whole.items() if name in learning}
    for name, shapes in (("ema", whole), ("exp_avg", learned), ("exp_avg_sq", learned)):
        name = f"{name}.safetensors"
        found = _shapes(path / name) if name in manifest["files"] else {}
        if found and found != shapes and before != tuple(trainable):
            raise UserError(
                f"{path}: train.trainable {shown(list(before))} there, {shown(list(trainable))} now; "
                f"expected the same, or another --run-dir with train.init={path.parent.parent}"
            )
        if found != shapes:
            raise UserError(f"{path}: expected {name} with the tensors of model.safetensors, to go on training from")
    for key in ("samples", "adam_step"):
        if type(manifest.get(key)) is not int:
            raise UserError(f"{path}/manifest.json: {key}: expected a whole number, got {shown(manifest.get(key))}")


def check_data(path: Path, now: Provenance) -> Provenance:
    """Return the provenance of a run continued from a checkpoint: the checkpoint's, completed from the data's.

    Raises:
        UserError: the data's labels or latents have another meaning; the message names the difference.
    """
    before = provenance.read(path / "model.safetensors")
    if difference := before.difference(now):
        raise UserError(
            f"{path}: the run cannot continue on other data: {difference}; "
            "expected the classes and encoders that it began with, "
            "--run-dir to name another folder, or --fresh to start it anew"
        )
    return before.joined(now)


def other_settings(config: dict, manifest: dict[str, Any]) -> str:
    """Return, for the log, which settings differ from those of the checkpoint; "" if none do."""
    return ", ".join(_differing(config, manifest["config"], lambda section, key: key in LEARNING.get(section, ())))


def held_out_but_seen(config: dict, manifest: dict[str, Any]) -> int:
    """Return how many held-out images the run was trained on before: of two numbers of held-out images, the smaller set
    is part of the larger.
    """
    now, then = ((each.get("evaluate") or {}).get("held_out") for each in (config, manifest["config"]))
    return max(now - (then if isinstance(then, int) else 0), 0) if isinstance(now, int) else 0


def other_meaning(config: dict, before: dict, apart: Collection[str] = ()) -> list[str]:
    """Return the keys that decide what weights mean, except those in `apart`, whose values differ from the config
    `before`.
    """
    how = HOW_NOT_WHAT.union(apart)
    known = {section: config[section] for section in MEANING if before.get(section)}
    return _differing(known, before, lambda section, key: key not in how and key not in LEARNING.get(section, ()))


def _differing(config: dict, before: dict, asked: Callable[[str, str], bool]) -> list[str]:
    """Return the keys, of those selected by section and name and known to both, whose values differ in `before`."""
    return [
        f"{name}.{key} {then} there, {section[key]} now"
        for name, section in config.items()
        if isinstance(section, dict)
        for key, then in {**BEFORE.get(name, {}), **(before.get(name) or {})}.items()
        if asked(name, key) and key in section and section[key] != then
    ]


def faults(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, fault) for each file of a checkpoint that does not match its manifest, the manifest included."""
    manifest = _manifest(path)
    if isinstance(manifest, str):
        yield "manifest.json", manifest
        return
    files: dict[str, tuple[int, str]] = manifest["files"]
    found = ahead(lambda name: _fault(path / name, *files[name]), files)  # hashing gigabytes takes seconds for each
    yield from ((name, fault) for name, fault in zip(files, found) if fault)


def _fault(file: Path, size: int, digest: str) -> str | None:
    if not file.is_file():
        return "missing"
    if file.stat().st_size != size:
        return f"expected {size} bytes, got {file.stat().st_size}"
    if sha256(file) != digest:
        return "its SHA-256 is not the manifest's"
    try:
        _shapes(file)
    except SafetensorError as error:  # even where the manifest agrees
        return f"no safetensors file ({error})"
    return None


def _manifest(path: Path) -> dict[str, Any] | str:
    """Return the manifest, with "files" as name -> (bytes, SHA-256), or what is wrong with it."""
    if not (path / "manifest.json").is_file():
        return "missing"
    try:
        manifest = json.loads((path / "manifest.json").read_text("utf-8"))
        files = {name: (each["bytes"], each["sha256"]) for name, each in manifest["files"].items()}
        Provenance.from_json(manifest.get("data") or {})
        ours = isinstance(manifest["step"], int) and "config" in manifest and "model.safetensors" in files
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return type(error).__name__
    if not ours or any(Path(name).name != name for name in files):
        return "not of a checkpoint"
    if step_of(path) not in (None, manifest["step"]):
        return f"of step {manifest['step']}, so this is a copy"
    return {**manifest, "files": files}


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors by its header, which must account for the whole file."""
    with safe_open(file, framework="pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118, no mapping


def sha256(path: Path) -> str:
    """Return the digest of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
