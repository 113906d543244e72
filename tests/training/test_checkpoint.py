"""Checkpoints: complete or not there, verified when read, the newest intact one found."""

import multiprocessing
import resource
import shutil

import pytest
import torch

from uvit_fast.runtime.errors import UserError
from uvit_fast.training import checkpoint

PARTS = {"model": {"w": torch.arange(6.0).view(2, 3)}, "ema": {"w": torch.ones(2, 3)}}
STATE = {"config": {"model": {"embed_dim": 3}}}


@pytest.fixture
def folder(tmp_path):
    for step in (10, 20, 30):
        checkpoint.write(tmp_path, step, PARTS, STATE, keep=2)
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_keeps_the_newest_and_reads_back(folder):
    assert names(folder) == ["step_00000020", "step_00000030"]
    path, manifest = checkpoint.newest_intact(folder, pytest.fail)
    assert (path.name, manifest["step"]) == ("step_00000030", 30)
    assert torch.equal(checkpoint.read(path, "model")["w"], PARTS["model"]["w"])


def test_every_nth_is_kept_beside_the_newest(tmp_path):
    for step in (10, 20, 30, 40, 50):
        checkpoint.write(tmp_path, step, PARTS, STATE, keep=1, keep_every=20)
        if step == 10:
            shutil.copytree(tmp_path / "step_00000010", tmp_path / "step_00000010.mine")  # is not ours to remove
    assert names(tmp_path) == ["step_00000010.mine", "step_00000020", "step_00000040", "step_00000050"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda path: path.unlink()])
@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_passed_over(folder, damage, file):
    if file == "manifest.json" and damage is flip_a_bit:
        damage = lambda path: path.write_text("{")  # noqa: E731, any bit may be white space
    damage(folder / "step_00000030" / file)
    is_passed_over(folder, file)


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[]",
        '{"files": {}}',
        '{"step": 30, "config": {}, "files": {}}',
        '{"files": {"model.safetensors": null}}',
    ],
)
def test_a_manifest_of_something_else_is_damage(folder, text):
    (folder / "step_00000030" / "manifest.json").write_text(text)
    is_passed_over(folder, "manifest.json")


def is_passed_over(folder, file):
    said = []
    assert checkpoint.newest_intact(folder, said.append)[0].name == "step_00000020"
    assert len(said) == 1 and "step_00000030" in said[0] and file in said[0]


def test_none_intact_is_an_error(folder):
    for path in folder.iterdir():
        truncate(path / "ema.safetensors")
    with pytest.raises(UserError, match="none of the 2 checkpoints is intact"):
        checkpoint.newest_intact(folder, lambda text: None)


def test_no_checkpoints_is_no_error(tmp_path):
    assert checkpoint.newest_intact(tmp_path / "checkpoints", pytest.fail) is None


def test_a_full_disk_leaves_the_older_ones(folder, monkeypatch):
    """The disk fills up at the second file of the next checkpoint; the one after it is written again."""
    real, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    said = []
    writer = checkpoint.Writer(folder, 2, said.append)
    writer.submit(40, PARTS, STATE)
    assert not writer.finish()
    assert len(said) == 1 and "step 40" in said[0] and "No space left" in said[0]
    assert names(folder) == ["step_00000020", "step_00000030"]
    writer.submit(50, PARTS, STATE)
    assert writer.finish()
    assert names(folder) == ["step_00000030", "step_00000050"]


def test_a_killed_writer_leaves_no_checkpoint(folder):
    """Killed with a file half written, so that not even the clean-up runs; the next write clears the rest away."""
    large = {"model": {"w": torch.zeros(50_000_000)}, "ema": {"w": torch.ones(2, 3)}}
    writer = multiprocessing.get_context("fork").Process(target=checkpoint.write, args=(folder, 40, large, STATE, 2))
    writer.start()
    while not any(path.stat().st_size for path in folder.glob(".step_00000040.partial/*")):
        assert writer.is_alive(), "it was written before it could be killed"
    writer.kill()
    writer.join()
    assert names(folder) == [".step_00000040.partial", "step_00000020", "step_00000030"]
    assert checkpoint.newest_intact(folder, pytest.fail)[0].name == "step_00000030"
    checkpoint.write(folder, 40, PARTS, STATE, keep=2)
    assert names(folder) == ["step_00000030", "step_00000040"]


def limited(folder) -> None:
    """The system refuses to let any file grow past 1 kB, as it does when the disk is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    said = []
    writer = checkpoint.Writer(folder, 2, said.append)
    writer.submit(40, {"model": {"w": torch.zeros(1000)}}, STATE)
    assert not writer.finish() and len(said) == 1 and "step 40 was not written" in said[0]


def test_what_the_system_refuses_to_write_leaves_the_older_ones(folder):
    writer = multiprocessing.get_context("fork").Process(target=limited, args=(folder,))
    writer.start()
    writer.join()
    assert writer.exitcode == 0
    assert names(folder) == ["step_00000020", "step_00000030"]


def test_damaged_ones_do_not_stay_in_the_place_of_intact_ones(folder):
    """A run that fell back leaves them under another name, whatever it keeps."""
    truncate(folder / "step_00000030" / "ema.safetensors")
    path, _ = checkpoint.newest_intact(folder, lambda text: None)
    for _ in range(2):  # it may happen again
        checkpoint.set_aside_newer(path)
        assert names(folder) == ["damaged_step_00000030", "step_00000020"]
    checkpoint.write(folder, 25, PARTS, STATE, keep=1)
    assert names(folder) == ["damaged_step_00000030", "step_00000025"]


def test_weights_of_another_meaning_are_refused_though_they_fit(folder):
    path, manifest = checkpoint.newest_intact(folder, pytest.fail)
    manifest["config"] = {"model": {"num_heads": 4, "kernels": "auto"}, "diffusion": {"schedule": "vp"}}
    now = {"model": {"num_heads": 2, "kernels": "fused"}, "diffusion": {"schedule": "sd"}}
    with pytest.raises(UserError) as error:
        checkpoint.check_model(path, {"w": (2, 3)}, now, manifest)
    assert "model.num_heads 4 there, 2 now; diffusion.schedule vp there, sd now" in str(error.value)
    assert "kernels" not in str(error.value)


def test_a_checkpoint_that_says_nothing_of_a_prediction_is_one_of_eps(folder):
    """As all were once. Other times and weights are another way to learn the same, and said."""
    path, manifest = checkpoint.newest_intact(folder, pytest.fail)
    manifest["config"] = {"diffusion": {"schedule": "vp", "time": "uniform"}}
    now = {"diffusion": {"schedule": "vp", "prediction": "eps", "time": "logit_normal"}}
    checkpoint.check_model(path, {"w": (2, 3)}, now, manifest)
    assert checkpoint.other_settings(now, manifest) == "diffusion.time uniform there, logit_normal now"
    now["diffusion"]["prediction"] = "v"
    with pytest.raises(UserError, match="diffusion.prediction eps there, v now; "):
        checkpoint.check_model(path, {"w": (2, 3)}, now, manifest)


def test_training_goes_on_from_whole_checkpoints_only(tmp_path):
    every = dict.fromkeys(("model", "ema", "exp_avg", "exp_avg_sq"), PARTS["model"])
    for step, parts, state, words in (
        (1, every, {"samples": 3, "adam_step": 3}, None),
        (
            2,
            {**every, "exp_avg": {"w": torch.zeros(2)}},
            {"samples": 3, "adam_step": 3},
            "exp_avg.safetensors with the tensors",
        ),
        (3, PARTS, {"samples": 3, "adam_step": 3}, "expected exp_avg.safetensors"),
        (4, every, {"samples": "3", "adam_step": 3}, "samples: expected a whole number, got '3'"),
        (5, every, {"samples": 3}, "adam_step: expected a whole number, got None"),
    ):
        checkpoint.write(tmp_path, step, parts, {**STATE, **state}, keep=9)
        found = checkpoint.newest_intact(tmp_path, pytest.fail)
        if words is None:
            checkpoint.check_whole(*found, {"w"}, ["all"])
        else:
            with pytest.raises(UserError, match=words):
                checkpoint.check_whole(*found, {"w"}, ["all"])


def test_another_architecture_names_the_keys(folder):
    path, manifest = checkpoint.newest_intact(folder, pytest.fail)
    checkpoint.check_model(path, {"w": (2, 3)}, STATE["config"], manifest)
    with pytest.raises(UserError, match=r"model.embed_dim 3 there, 4 now.*w is \(2, 3\) there, expected \(2, 4\)"):
        checkpoint.check_model(path, {"w": (2, 4)}, {"model": {"embed_dim": 4}}, manifest)
