"""Packages that not everybody needs: imported at first use, and named with what installs them where they are missing."""

from pathlib import Path


def install(extra: str) -> str:
    """The command that installs an extra of setup.py; of a source tree, at the versions that are tested."""
    if not (Path(__file__).parents[2] / "setup.py").is_file():
        return f'pip install "uvit-fast[{extra}]"'
    return f'pip install -e ".[{extra}]" -c constraints.txt'


def missing(user: str, package: str, extra: str) -> ImportError:
    """What to raise where `user`, a feature or a setting, meets no `package`."""
    return ImportError(f"{user} needs {package}: {install(extra)}")
