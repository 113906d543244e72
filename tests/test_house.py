"""The shape of the house: who may import whom, and what an import may do."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEVELS = {
    "runtime": -1,
    "kernels": 0,
    "config": 0,
    "model": 1,
    "diffusion": 1,
    "evaluation": 1,
    "provenance": 1,
    "data": 2,
    "build": 2,
    "training": 2,
    "sampling": 2,
    "pipeline": 3,
    "profiling": 3,
    "commands": 3,
    "measuring": 3,
    "cli": 3,
    "__main__": 3,
    "demo": 3,
    "gallery": 3,
}


def imports_of(path: Path) -> set[str]:
    """Rooms of uvit_fast that a file imports, wherever in the file."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            if node.level == 1:  # within its own room
                continue
            assert node.level == 0, f"{path}: a relative import that leaves its folder"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("uvit_fast.")}
    return rooms & LEVELS.keys()


def files() -> list[tuple[str, Path]]:
    found = [("kernels", p) for p in (ROOT / "kernels").rglob("*.py")]
    for path in (ROOT / "uvit_fast").rglob("*.py"):
        room = path.relative_to(ROOT / "uvit_fast").parts[0].removesuffix(".py")
        if room != "__init__":
            assert room in LEVELS, f"{path}: {room} has no level; add it to the table"
            found.append((room, path))
    return found


def test_imports_go_downward_only():
    for room, path in files():
        for other in imports_of(path) - {room}:
            assert LEVELS[other] <= LEVELS[room], f"{path}: {room} may not import {other}"
            same_level_rooms = LEVELS[other] == LEVELS[room] and LEVELS[room] < 2
            assert not same_level_rooms, f"{path}: {room} and {other} may not know each other"


def test_only_the_doors_import_kernels():
    doors = {
        "model/ops.py",
        "model/attention.py",
        "model/fp8.py",
        "diffusion/stages.py",
        "training/optimizer.py",
    }
    for room, path in files():
        if room != "kernels" and LEVELS[room] < 3 and "kernels" in imports_of(path):
            assert path.relative_to(ROOT / "uvit_fast").as_posix() in doors


def test_nothing_is_importable_as_plain_kernels():
    """Hugging Face has a package of that name, which transformers probes for: from the root its imports must work."""
    code = (
        "import sys; sys.path.insert(0, '.'); import transformers, diffusers; "
        "from transformers import CLIPTextModel; from diffusers import AutoencoderKL, DiffusionPipeline; print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


def test_import_asks_cuda_nothing():
    code = (
        "import torch; torch.cuda.is_available = torch.cuda._lazy_init = None; "
        "import uvit_fast, uvit_fast.build, uvit_fast.training.trainer, uvit_fast.model.ops; print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


def test_moments_are_adamws():
    """LayerNorm has sums and statistics, FID statistics, the VAE a posterior, whose stored array keeps its name."""
    for room in ("kernels", "uvit_fast/evaluation", "uvit_fast/model", "uvit_fast/diffusion"):
        for file in (ROOT / room).rglob("*.py"):
            assert "moment" not in file.read_text().lower(), file


def attributes(function: ast.FunctionDef) -> set[str]:
    """What a method assigns to its `self`."""
    me = function.args.args[0].arg if function.args.args else None
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", None) == me
    }


def test_no_attribute_is_born_outside_init():
    """Or a reader, and a method that is called too early, cannot know what an object has."""
    sources = [path for room in ("uvit_fast", "kernels", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    classes = [
        (path, node)
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]

    def born(of: ast.ClassDef) -> set[str]:
        found = set()
        for item in of.body:
            if isinstance(item, ast.FunctionDef):
                setter = any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in item.decorator_list)
                found |= attributes(item) if item.name == "__init__" else {item.name} if setter else set()
            elif isinstance(item, ast.AnnAssign | ast.Assign):
                targets = [item.target] if isinstance(item, ast.AnnAssign) else item.targets
                found |= {t.id for t in targets if isinstance(t, ast.Name)}
        for base in of.bases:
            name = getattr(base, "id", getattr(base, "attr", None))
            found = found.union(*(born(node) for _, node in classes if node.name == name and node is not of))
        return found

    for path, node in classes:
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        methods = [
            m for m in methods if not {"staticmethod", "classmethod"} & {getattr(d, "id", "") for d in m.decorator_list}
        ]
        late = set().union(*map(attributes, methods)) - born(node)
        assert not late, f"{path}: {node.name}: {', '.join(sorted(late))} should be in __init__"


def test_only_the_adapter_touches_deepspeed():
    for path in [*(path for _, path in files()), *(ROOT / "benchmarks").glob("*.py")]:
        text = path.read_text()
        if path.name != "deepspeed_adapter.py":
            assert "import deepspeed" not in text and "from deepspeed" not in text, path


def test_benchmarks_run_the_trainers_loss():
    """`Objective.loss`, whole: one of their own would be timed in its place, and guarded."""
    uses = [path for path in (ROOT / "benchmarks").glob("*.py") if "objective.loss(" in path.read_text()]
    assert {path.name for path in uses} == {"guards.py", "models.py"}
    assert "self.objective.loss(" in (ROOT / "uvit_fast" / "training" / "trainer.py").read_text()
    assert not [path for path in (ROOT / "benchmarks").glob("*.py") if "mse_loss" in path.read_text()]


def test_functions_inside_kernels_take_at_most_eight_parameters():
    """A launch's arguments are pointers and numbers, one by one; inside a kernel they are structures."""
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.endswith("_kernel"):
                on_device = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                assert not on_device or len(node.args.args) <= 8, f"{path}: {node.name} takes {len(node.args.args)}"
