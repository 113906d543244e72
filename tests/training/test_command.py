"""`uvit-fast train` and train.py as users call them."""

import contextlib
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.training import tiny
from uvit_fast.runtime.claims import Claim
from uvit_fast.runtime.processes import World

ROOT = Path(__file__).parent.parent.parent
SMALL = ["train.iterations=4", "train.batch_size=8", "train.checkpoint_every=2", "train.log_every=1", "model.depth=2"]
SMALL += ["model.embed_dim=16", "model.num_heads=2"]


def arguments(run_dir: Path, *settings: str) -> list[str]:
    config = ["--config", str(ROOT / "configs" / "digits.yaml"), "--run-dir", str(run_dir)]
    return [*config, *(part for setting in [*SMALL, *settings] for part in ("--set", setting))]


def call(argv: list[str]) -> tuple[int, list[str]]:
    """main() of train.py; its exit code and the lines it wrote to stderr."""
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = module.main(argv)
    return code, err.getvalue().strip().splitlines()


def test_a_run_is_continued_finished_and_put_aside(tmp_path):
    """The same command three times, and --fresh."""
    run = tmp_path / "run"
    assert tiny.launch(call, arguments(run, "train.iterations=2"))[0] == 0
    assert "continuing from" in " ".join(tiny.launch(call, arguments(run))[1])
    before = (run / "config.yaml").read_text()
    code, lines = tiny.launch(call, arguments(run, "train.lr=0.5"))
    assert (code, len(lines)) == (0, 1) and "finished, 4 of 4 steps" in lines[0]
    assert (run / "config.yaml").read_text() == before  # of what ran, and nothing did
    assert tiny.launch(call, [*arguments(run), "--fresh"])[0] == 0
    assert (tmp_path / "run.1" / "config.yaml").exists() and (run / "checkpoints" / "step_00000004").exists()

    (run / "checkpoints" / "step_00000004" / "model.safetensors").write_bytes(b"short")
    code, lines = tiny.launch(call, arguments(run))
    assert code == 0 and "step_00000004 is damaged (model.safetensors: expected" in lines[0]
    assert "continuing from" in lines[1] and lines[1].endswith("step_00000002")

    (run / "checkpoints" / "step_00000004" / "ema.safetensors").write_bytes(b"short")
    _, lines = tiny.launch(call, arguments(run, "train.iterations=3", "train.lr=0.5", "data.flip=true"))
    names = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert names == ["damaged_step_00000004", "step_00000002", "step_00000003"]
    continued = next(line for line in lines if "continuing from" in line)
    assert "with train.lr" in continued and continued.endswith("there, 0.5 now, data.flip False there, True now")

    code, lines = tiny.launch(call, arguments(run, "model.embed_dim=32"))
    assert (code, len(lines)) == (2, 1) and "model.embed_dim 16 there, 32 now" in lines[0]


def test_a_fresh_start_takes_nothing_from_a_run_that_goes_on_nor_from_one_it_cannot_replace(tmp_path):
    run = tmp_path / "run"
    claim = Claim(run)
    code, lines = tiny.launch(call, [*arguments(run), "--fresh"])
    claim.release()
    assert (code, len(lines)) == (2, 1) and "another process trains here" in lines[0]
    for mistake, message in (
        ("data.name=cifar10", "expected a folder"),
        ("train.micro_batch_size=3", "micro_batch_size 3"),
        ("model.kernels=fused", "cannot run"),
        ("train.wandb=true", "train.wandb needs wandb"),
    ):
        code, lines = tiny.launch(call, [*arguments(run, mistake), "--fresh"])
        assert (code, len(lines)) == (2, 1) and message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "setting, message",
    [
        ("device=cuda", "expected a GPU"),
        ("train.micro_batch_size=3", "batch_size 8, micro_batch_size 3, GPUs 1"),
        ("train.itrations=3", "did you mean 'iterations'"),
        ("train.betas=[1.0,0.9]", "train.betas.0: expected"),
        ("data.name=cifar10", "expected a folder"),
        ("data.name=latents", "data.name latents needs the section latent"),
        ("model.attention=cudnn", "model.attention=cudnn cannot run"),
        ("model.kernels=fused", "model.kernels=fused: ln_linear cannot run"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(setting, message, tmp_path):
    code, lines = tiny.launch(call, arguments(tmp_path / "run", setting))
    assert (code, len(lines)) == (2, 1) and message in lines[0]


def test_a_run_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    code, lines = tiny.launch(call, arguments(tmp_path / "file" / "run"))
    assert (code, len(lines)) == (2, 1) and "expected a folder for the run" in lines[0]


def on_a_host_with_one_gpu(argv):
    os.environ.update(RANK="1", LOCAL_RANK="1")
    with mock.patch("torch.cuda.is_available", lambda: True), mock.patch("torch.cuda.device_count", lambda: 1):
        return call(argv)


def test_a_rank_without_a_gpu_says_so_itself(tmp_path):
    code, lines = tiny.launch(on_a_host_with_one_gpu, arguments(tmp_path, "device=auto"))
    assert (code, lines) == (2, ["train.py: launcher: expected a GPU for local rank 1, got 1 GPUs"])


def as_rank_1(argv):
    os.environ.update(RANK="1", WORLD_SIZE="2")
    with mock.patch("time.sleep") as slept:
        return *call(argv), [wait.args[0] for wait in slept.call_args_list]


def test_in_a_folder_that_is_taken_the_rank_that_speaks_ends_first(tmp_path):
    """Before the ranks meet: those of the run that goes on may hold the port. A launcher would end the speaker with a
    silent rank.
    """
    claim = Claim(tmp_path / "run")
    code, lines, waits = tiny.launch(as_rank_1, arguments(tmp_path / "run"))
    claim.release()
    assert (code, lines) == (2, []) and 30 in waits


def where_others_meet(argv, number):
    with socket.socket() as others:
        others.bind(("127.0.0.1", 0))
        others.listen()
        os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_PORT=str(others.getsockname()[1]))
        if number == 0:
            return call(argv)
        with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as end, World():
            pass
        return end.value.code, err.getvalue().strip().splitlines()


@pytest.mark.parametrize("number", [0, 1], ids=["training", "other commands"])
def test_a_port_that_another_job_has_is_one_line(number, tmp_path):
    """deepspeed's is the same for all jobs of a host unless it is told another."""
    code, lines = tiny.launch(where_others_meet, arguments(tmp_path), number)
    assert (code, len(lines)) == (2, 1) and "where another job's ranks meet; --master_port takes another" in lines[0]


def test_synthetic_data_says_so(tmp_path):
    code, lines = tiny.launch(call, arguments(tmp_path / "run", "data.name=synthetic"))
    assert code == 0 and "synthetic data: measures speed and memory, learns nothing" in lines


LAUNCHERS = {
    "deepspeed": ["--num_accelerators", "2", "--master_port", "PORT", "--module", "uvit_fast.cli"],
    "torchrun": ["--nproc-per-node", "2", "--master-port", "PORT", "-m", "uvit_fast"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_trains_a_config_of_the_package_on_two_ranks_from_any_folder(launcher, tmp_path):
    """As `--help` and docs/multi_node.md say; the other test of two launchers starts train.py."""
    folder, port = Path(sys.executable).parent, str(tiny.free_port())
    command = [str(folder / launcher), *(port if word == "PORT" else word for word in LAUNCHERS[launcher]), "train"]
    what = ["--config", "digits", *arguments(tmp_path)[2:]]
    done = subprocess.run(
        [*command, *what], cwd=tmp_path, capture_output=True, text=True,
        env={
            **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "deprecated" not in done.stderr
    manifest = json.loads((tmp_path / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert done.stderr.count("4 steps, ") == 1, done.stderr  # one rank speaks
