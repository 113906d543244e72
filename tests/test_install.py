"""A wheel is all that training and sampling need."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

import uvit_fast

ROOT = Path(__file__).parent.parent
SMALL = ["model.embed_dim=16", "model.num_heads=2", "model.depth=2", "train.iterations=2", "train.batch_size=8"]
SMALL += ["train.sample_every=0", "train.checkpoint_every=2", "sample.steps=1"]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Python of an environment outside the tree that holds the wheel;
    other packages are those of the one that tests.
    """
    folder = tmp_path_factory.mktemp("installed")
    tree = folder / "tree"  # a build leaves files where it is made
    for name in ("uvit_fast", "kernels", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, tree, cwd=folder)
    (wheel,) = folder.glob("uvit_fast-*.whl")
    shutil.rmtree(tree)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    run(*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", "--no-compile", wheel, cwd=folder)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]  # whose own .pth files this does not read
    (site / "others.pth").write_text("\n".join(others))
    return python


def test_the_version_is_the_newest_released_one():
    """Of the package, its metadata and the changelog."""
    (packaged,) = re.findall(r'^    version="(.+)",$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    released = re.findall(r"^## (\d\S+) \(\d{4}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert uvit_fast.__version__ == packaged == released[0]


def test_a_wheel_trains_two_steps_and_samples(python, tmp_path):
    """Of a config by its name, in a folder that holds nothing."""
    sets = [part for setting in SMALL for part in ("--set", setting)]
    run(python.parent / "uvit-fast", "train", "--config", "digits", *sets, cwd=tmp_path)
    assert (tmp_path / "runs" / "digits" / "checkpoints" / "step_00000002" / "ema.safetensors").is_file()
    what = ["--checkpoint", "runs/digits", "--num", "2", "--out", "two.png"]
    assert run(python, "-m", "uvit_fast", "sample", *what, cwd=tmp_path) == "wrote 2 images to two.png\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "two.png"]


def test_a_wheel_holds_what_the_tree_does(python, tmp_path):
    """Configs, sweeps, tuning tables; and no module of the tree is read in its place."""
    script = "import uvit_fast, uvit_fast.kernels as k; from uvit_fast.config import CONFIGS; "
    script += (
        "from uvit_fast.runtime.extras import install; print(CONFIGS, k.__path__[0], install('diffusers'), sep='\\n')"
    )
    configs, kernels, install = run(python, "-c", script, cwd=tmp_path).splitlines()
    site = str(python.parents[1])
    assert configs.startswith(site) and kernels.startswith(site)
    for there, here, pattern in ((configs, "configs", "**/*.yaml"), (kernels, "kernels", "**/*.json")):
        names = {path.relative_to(ROOT / here) for path in (ROOT / here).glob(pattern)}
        assert names == {path.relative_to(there) for path in Path(there).glob(pattern)} and names
    assert yaml.safe_load((Path(configs) / "digits.yaml").read_text())["name"] == "digits"
    assert install == "pip install 'diffusers>=0.42' 'transformers>=5' accelerate"  # no index has uvit-fast itself
