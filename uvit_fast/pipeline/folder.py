"""A pipeline's folder: its index, and the code by which diffusers' own `DiffusionPipeline` loads it."""

import json
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

LIBRARY = __package__
LOADER_NAME = "uvit_pipeline"  # a folder's Python files, which diffusers runs where it is trusted to
LOADER = '''"""For `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`; needs the package uvit-fast."""

from uvit_fast.pipeline import UViTModel, UViTPipeline, UViTScheduler
'''
LOADABLE_CLASSES[LIBRARY] = LOADABLE_CLASSES["diffusers"]  # lets a repository's components be from this package


def without_code(index: dict[str, Any]) -> dict[str, Any]:
    """Return a folder's index with this package's classes in place of the folder's code, which is therefore not run."""
    return index | {name: [LIBRARY, part[1]] for name, part in _parts(index).items() if part[0] == LOADER_NAME}


def add_code(folder: Path, index_name: str, class_name: str) -> None:
    """Write the code into a saved folder, and its mention into the index."""
    index = json.loads((folder / index_name).read_text("utf-8"))
    index["_class_name"] = [LOADER_NAME, class_name]
    (folder / f"{LOADER_NAME}.py").write_text(LOADER, "utf-8")
    for name, (library, kind) in _parts(index).items():
        if library == LIBRARY:  # diffusers accepts it from a folder on disk, but not from a repository
            index[name] = [LOADER_NAME, kind]
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{LOADER_NAME}.py").write_text(LOADER, "utf-8")
    (folder / index_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _parts(index: dict[str, Any]) -> dict[str, list[str]]:
    """Return the components in a folder's index: library and class by name."""
    lists = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    # other lists are scalings, one number per channel
    return {name: value for name, value in lists.items() if all(isinstance(part, str | None) for part in value)}
