"""Optional packages: imported at first use; if one is missing, the error names the command that installs it."""

import shlex
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path


def install(extra: str) -> str:
    """Return the command that installs an extra of setup.py: in a source tree at the tested versions, elsewhere its
    packages by their own names, since no index has this one."""
    if not (Path(__file__).parents[2] / "setup.py").is_file() and (packages := _packages(extra)):
        return shlex.join(["pip", "install", *packages])
    return f'pip install -e ".[{extra}]" -c constraints.txt'


def _packages(extra: str) -> list[str]:
    """Return the requirements of an extra, from the installed package's metadata; none if it is not installed."""
    try:
        lines = requires("uvit-fast") or []
    except PackageNotFoundError:
        return []
    split = (line.partition(";") for line in lines)
    return [name.strip() for name, _, marker in split if f'extra == "{extra}"' in marker.replace("'", '"')]


def missing(user: str, package: str, extra: str) -> ImportError:
    """Return the error for a feature or setting, `user`, that needs the missing `package`."""
    return ImportError(f"{user} needs {package}: {install(extra)}")
