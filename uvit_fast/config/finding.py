"""Find configs: files, or, by name, those that come with the package."""

import difflib
from pathlib import Path

from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.text import cut

_PACKAGE = Path(__file__).resolve().parents[1]
# installed with the package; in the source tree at its root
CONFIGS = next((folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()), _PACKAGE)
SUFFIXES = (".yaml", ".yml")


class ConfigError(UserError):
    """A configuration that cannot be used. The message names the file, the key, what was expected and what came."""


def config_names(folder: Path = CONFIGS) -> list[str]:
    """Return the names of the configs in a folder, by default of those that come with the package."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def is_config_name(text: str, folder: Path = CONFIGS) -> bool:
    """Return whether `folder` has a config of that name, with or without `.yaml`."""
    return text.removesuffix(".yaml") in config_names(folder)


def find_config(config: str | Path, beside: Path | None = None, folder: Path = CONFIGS) -> Path:
    """Return the file of a config.

    Args:
        config: its path, or the name of one in `folder`; if both exist, the path.
        beside: the folder that a relative path is relative to; by default the working directory.
        folder: of the configs that have names.

    Raises:
        ConfigError: neither exists; the message lists similar names.
    """
    path = (beside or Path()) / config
    try:
        if path.is_file():
            return path
        own = path / "config.yaml"
        if own.is_file():  # a run's folder
            raise ConfigError(f"{cut(str(config))}: a folder; expected a config file; did you mean {own}?")
    except OSError as error:
        raise ConfigError(f"{cut(str(config))}: expected a config file ({error.strerror})") from None
    if is_config_name(str(config), folder):
        return folder / f"{path.name.removesuffix('.yaml')}.yaml"
    wanted = path.name.removesuffix(path.suffix if path.suffix in SUFFIXES else "")
    near = [str(path.parent / name) for name in _near(wanted, config_names(path.parent), 1)]
    near = [f"{name}.yaml" for name in near] or _near(wanted, config_names(folder), 3)
    if near:
        hint = f"did you mean {' or '.join(filter(None, (', '.join(near[:-1]), near[-1])))}?"
    else:
        hint = f"expected a YAML file, or one of {', '.join(config_names(folder))}"
    raise ConfigError(f"{cut(str(config))}: no such config file; {hint}")


def _near(wanted: str, names: list[str], most: int) -> list[str]:
    """Return at most `most` names: first those that contain `wanted`, then those spelt similarly."""
    parts = [name for name in names if len(wanted) > 1 and wanted.lower() in name.lower()]
    alike = difflib.get_close_matches(wanted.lower(), names, n=most)
    return list(dict.fromkeys([*parts, *alike]))[:most]
