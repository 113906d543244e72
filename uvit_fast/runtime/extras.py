"""Optional packages: imported at first use; if one is missing, the error names the command that installs it."""

from pathlib import Path


def install(extra: str) -> str:
    """Return the command that installs an extra of setup.py; in a source tree, at the tested versions."""
    if not (Path(__file__).parents[2] / "setup.py").is_file():
        return f'pip install "uvit-fast[{extra}]"'
    return f'pip install -e ".[{extra}]" -c constraints.txt'


def missing(user: str, package: str, extra: str) -> ImportError:
    """Return the error for a feature or setting, `user`, that needs the missing `package`."""
    return ImportError(f"{user} needs {package}: {install(extra)}")
