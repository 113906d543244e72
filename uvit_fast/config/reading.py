"""Read config files: merge them with their base and with overrides, and check them against the schema, with errors of
one line each.

A file may name another config as `base:`, which may have a base itself; its own keys then override the base's.
`--set train.batch_size=512` overrides all.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import ValidationError

from uvit_fast.config.finding import ConfigError, find_config
from uvit_fast.config.networks import NETWORKS, ModelConfig
from uvit_fast.config.schema import Config
from uvit_fast.config.section import Section, wrong_value
from uvit_fast.runtime.text import cut, parse_yaml, shown

# names that people bring from elsewhere -> keys
CALLED_HERE = {
    "ckpt": "train.init",
    "weights": "train.init",
    "pretrained": "train.init",
    "checkpoint": "train.init",
    "finetune": "train.init",
    "model_path": "train.init",
    "bs": "train.batch_size",
    "guidance": "sample.guidance_scale",
    "scale": "sample.guidance_scale",
    "num_inference_steps": "sample.steps",
    "num_steps": "train.iterations",
    "nfe": "sample.steps",
    "steps": "train.iterations",
    "max_steps": "train.iterations",
    "iters": "train.iterations",
    "epochs": "train.iterations",
    "num_epochs": "train.iterations",
    "learning_rate": "train.lr",
    "ema": "train.ema_decay",
    "samplers": "sample.sampler",
    "vae": "latent.autoencoder",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "fp32": "train.precision",
    "amp": "train.precision",
    "gpu": "device",
    "data": "data.path",
    "data_dir": "data.path",
    "data_path": "data.path",
    "dataset": "data.name",
    "image_size": "model.img_size",
    "resolution": "model.img_size",
    "workers": "data.num_workers",
}


Layer = tuple[str | Path, dict[str, Any]]  # a place's name in messages, and what it sets


def load_config(config: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """Read a YAML config.

    Args:
        config: the file, or the name of one that comes with the package, such as h2_256.
        overrides: `section.key=value` strings, as after `--set`, with values in YAML; or a mapping from `section.key`
            to values.

    Raises:
        ConfigError: the file is missing, not YAML, or a sweep; a key is unknown or has a wrong value; or a file is a
            base of itself.
    """
    path = find_config(config)
    try:
        *bases, (_, own) = _with_bases(path, [])
    except RecursionError:  # aliases that contain themselves
        raise ConfigError(f"{path}: nested too deeply; expected sections with keys") from None
    return _checked([*bases, (config, own)], overrides)


def _with_bases(path: Path, above: list[Path]) -> list[Layer]:
    """Return what a file and its bases hold, the last base first.

    Args:
        above: the files that lead to it by their `base`.
    """
    above = [*above, path.resolve()]
    tree = _read(path)
    if "factors" in tree:
        raise ConfigError(f"{path}: a sweep, not one config; expected uvit-fast sweep --config {path}")
    if "base" not in tree:
        return [(path, _by_names_of_today(tree))]
    name = tree.pop("base")
    if not (isinstance(name, str) and name.strip()):
        raise ConfigError(f"{path}: base: expected a name or path, got {shown(name)}")
    try:
        base = find_config(name, beside=path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: base: {error}") from None
    if base.resolve() in above:
        way = " -> ".join(file.name for file in [*above[above.index(base.resolve()) :], base])
        raise ConfigError(f"{path}: base: {way} leads back to itself; expected a base that ends")
    return [*_with_bases(base, above), (path, _by_names_of_today(tree))]


def config_from(tree: dict[str, Any], source: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """Do `load_config` on the content of a YAML file.

    Args:
        source: its name in messages.
    """
    return _checked([(source, tree)], overrides)


def _checked(files: list[Layer], overrides: Iterable[str] | Mapping[str, Any]) -> Config:
    """Return the config of files, bases first, and overrides. An error is said of the place that made it."""
    overrides = [overrides] if isinstance(overrides, str) else overrides
    set_by, (source, _) = "overrides" if isinstance(overrides, Mapping) else "--set", files[-1]
    try:
        stages = [*accumulate((_by_names_of_today(tree) for _, tree in files), _merge)]
        tree, changes = stages[-1], dict[str, Any]()
        for key, value in overrides.items() if isinstance(overrides, Mapping) else map(_override, overrides):
            change = _by_names_of_today(_nested(tree, key, value))
            tree, changes = _merge(tree, change), _merge(changes, change)
        return Config.model_validate(tree)
    except ValidationError as error:
        layers, stages = [*files, (set_by, changes)], [*stages, tree]
        lines = [_explain(_made_by(item, layers, stages), item) for item in error.errors()]
        more = [f"{source}: and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise ConfigError("\n".join(lines[:10] + more)) from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply; expected sections with keys") from None


def _made_by(error: Any, layers: list[Layer], stages: list[dict[str, Any]]) -> str | Path:
    """Return the name of the layer that one of pydantic's errors comes from: of a value, the last that sets it; of a
    combination or a missing key, the first with which it is there, where a base may leave to others what it lacks.

    Args:
        layers: the files, bases first, and the overrides.
        stages: the same, each merged with those before it.
    """
    setting = [i for i, (_, tree) in enumerate(layers) if _sets(tree, error["loc"])]
    if error["type"] == "missing" or not setting or isinstance(error["input"], dict | Section):
        first = len(layers) - 2 if error["type"] == "missing" else 0
        setting = [next(i for i in range(first, len(layers)) if _is_in(stages[i], error))]
    return layers[setting[-1]][0]


def _sets(tree: Any, loc: tuple) -> bool:
    """Return whether a tree has something at a place, or, in its stead, a value that holds it."""
    for part in loc:
        if not isinstance(tree, dict):
            return True
        if part in tree:
            tree = tree[part]
        elif part not in NETWORKS:
            return False
    return True


def _is_in(tree: dict[str, Any], error: Any) -> bool:
    """Return whether a tree has this error, too, or lacks the section of a key that is missing."""
    try:
        Config.model_validate(tree)
    except ValidationError as found:
        loc, what = error["loc"], [(item["loc"], item["type"], item["msg"]) for item in found.errors()]
        above = [key for key, kind, _ in what if kind == error["type"] == "missing" and key == loc[: len(key)]]
        return bool(above) or (loc, error["type"], error["msg"]) in what
    return False


def dump_config(config: Config) -> str:
    """Return the whole configuration as YAML, defaults included; `load_config` reads it back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def keys_named(name: str) -> list[str]:
    """Return the keys whose last part is `name`, or that do what it does elsewhere: lr, learning_rate -> train.lr."""
    kinds = {key: field.annotation for key, field in Config.model_fields.items()}
    values = [key for key, kind in kinds.items() if kind is str or get_origin(kind) is Literal]
    sections = {key: _section_at((key,)) for key in kinds if key not in values}
    found = [f"{key}.{name}" for key, section in sections.items() if name in section.model_fields]
    return [*[name] * (name in values), *found, *[CALLED_HERE.get(name, "")] * (name in CALLED_HERE)]


def _parse(text: str, what: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{cut(str(path))}: expected a config file ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML: {error.reason} at byte {error.start}") from None
    tree = _parse(text, f"{path}: not YAML")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(tree).__name__}")
    return tree


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _by_names_of_today(tree: dict[str, Any]) -> dict[str, Any]:
    """Rename keys of older runs' configs: `latent.autoencoder` was `latent.decoder`."""
    latent = tree.get("latent")
    if not isinstance(latent, dict) or "decoder" not in latent or "autoencoder" in latent:
        return tree
    return tree | {"latent": {"autoencoder" if key == "decoder" else key: value for key, value in latent.items()}}


def _override(text: Any) -> tuple[str, Any]:
    """Split `section.key=value` into the key and the value."""
    key, equals, value = text.partition("=") if isinstance(text, str) else ("", "", "")
    if not equals:
        raise ConfigError(f"override {cut(str(text))}: expected section.key=value, as in --set train.batch_size=512")
    return key.strip(), _parse(value, f"override {cut(text)}: not a YAML value")


def _nested(tree: dict[str, Any], key: Any, value: Any) -> dict[str, Any]:
    """Return {section: {key: value}} for `section.key`, which must lead through sections of the tree."""
    *sections, leaf = key.split(".") if isinstance(key, str) else [""]
    if not all([*sections, leaf]):
        raise ConfigError(f"override {shown(key)}: expected section.key, such as train.batch_size")
    for name in sections:
        tree = tree.get(name, {})
        if not isinstance(tree, dict | None):
            raise ConfigError(f"override {cut(key)}: {cut(name)} is a value, not a section")
        tree = tree or {}
    nested = {leaf: value}
    for name in reversed(sections):
        nested = {name: nested}
    return nested


def _explain(source: str | Path, error: Any) -> str:
    """Format one pydantic error as one line: file, key, what was expected, what was given, the nearest key."""
    key = cut(".".join(str(part) for part in error["loc"] if part not in NETWORKS))
    if error["type"] == "extra_forbidden":
        valid, name = _fields_at(error["loc"][:-1]), str(error["loc"][-1])
        elsewhere = [] if "." in name else keys_named(name)
        if elsewhere:  # the very name, in another section
            hint = f"did you mean {' or '.join(elsewhere)}?"
        elif near := difflib.get_close_matches(name, valid, n=1):
            hint = f"did you mean {near[0]!r}?"
        else:
            hint = f"expected one of {', '.join(valid[:24])}{', ...' * (len(valid) > 24)}"
        return f"{source}: {key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{source}: {key}: missing; expected {_description(error['loc'])}"
    return f"{source}: {key + ': ' if key else ''}{wrong_value(error)}"


def _section_at(loc: tuple) -> type[Section]:
    section: type[Section] = Config
    for part in loc:
        if part in NETWORKS:
            section = NETWORKS[part]
            continue
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ()), ModelConfig]  # the last: a union's usual member
        section = next(o for o in options if isinstance(o, type) and issubclass(o, Section))
    return section


def _fields_at(loc: tuple) -> list[str]:
    return list(_section_at(loc).model_fields)


def _description(loc: tuple) -> str:
    while isinstance(loc[-1], int):  # an item of a list
        loc = loc[:-1]
    field = _section_at(loc[:-1]).model_fields[loc[-1]]
    return (field.description or f"a section with {', '.join(_fields_at(loc))}").rstrip(".")
