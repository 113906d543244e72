"""The commands: what they write, and one clear line for each mistake."""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.clip import save_clip
from uvit_fast import build_model, cli, commands, load_config, sampling
from uvit_fast.commands.arguments import config_of
from uvit_fast.config import dump_config
from uvit_fast.data.encoders import load_text
from uvit_fast.provenance import Provenance, read
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.images import to_uint8
from uvit_fast.sampling.jobs import Job
from uvit_fast.sampling.output import save_npz
from uvit_fast.training import checkpoint as checkpoints

DIGITS = "configs/digits.yaml"
SMALL = ["--set", "model.embed_dim=32", "--set", "model.depth=2"]


def save_checkpoint(folder, step):
    """A checkpoint of the small digits model with random weights, as training writes it."""
    cfg = load_config(DIGITS, SMALL[1::2])
    weights, state = build_model(cfg).state_dict(), {"config": cfg.model_dump(mode="json")}
    checkpoints.write(folder, step, {"model": weights, "ema": weights, "exp_avg": weights}, state, keep=9)
    return folder / f"step_{step:08d}"


@pytest.fixture
def checkpoint(tmp_path):
    """The EMA weights of a run's only checkpoint."""
    path = tmp_path / "run" / "checkpoints" / "step_00000010" / "ema.safetensors"
    save_checkpoint(path.parents[1], 10)
    return path


def sample(checkpoint, out, *more):
    return cli.main(["sample", "--config", DIGITS, *SMALL, "--checkpoint", str(checkpoint), "--out", str(out), *more])


def test_sample_writes_pngs_and_a_grid(checkpoint, tmp_path):
    assert sample(checkpoint, tmp_path / "out", "--num", "4", "--classes", "3,7", "--steps", "2") == 0
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["000000_class3.png", "000001_class3.png", "000002_class7.png", "000003_class7.png", "grid.png"]
    assert Image.open(tmp_path / "out" / names[0]).size == (8, 8)
    assert Image.open(tmp_path / "out" / "grid.png").width > 4 * 40  # scaled up for a person


def test_rows_that_saw_no_class_are_not_sampled(checkpoint, tmp_path, capsys):
    """A model may have more labels than its data had classes."""
    Provenance(("ant", "bee")).write(checkpoint.parents[2] / "data.json")
    assert sample(checkpoint, tmp_path / "out", "--num", "2", "--steps", "1") == 0
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["000000_class0_ant.png", "000001_class1_bee.png", "grid.png"]
    assert sample(checkpoint, tmp_path / "no", "--classes", "bee,3") == 2
    assert "saw labels from 0 to 1 only, got 3" in capsys.readouterr().err


def test_a_format_may_be_named_and_grids_are_labelled(checkpoint, tmp_path):
    assert sample(checkpoint, tmp_path / "out", "--num", "2", "--steps", "1", "--format", "npz") == 0
    assert np.load(tmp_path / "out.npz")["arr_1"].tolist() == [0, 5]
    assert sample(checkpoint, tmp_path / "out", "--num", "2", "--steps", "1", "--format", "png") == 0
    grid = np.asarray(Image.open(tmp_path / "out" / "grid.png"))
    assert grid.shape[:2] == (4 + 48 + 14 + 4, 2 * (48 + 4) + 4)
    under = grid[4 + 48 : 4 + 48 + 14]  # the class stands under its image, not the same under both
    assert (under < 128).any() and not np.array_equal(under[:, 4:52], under[:, 56:104])


TEXT = ["--config", "configs/s2_cifar10.yaml", "--set", "model.embed_dim=32", "--set", "model.depth=2"]
TEXT += ["--set", "model.context_dim=16", "--set", "model.context_tokens=8", "--set", "train.p_uncond=0.1"]
TEXT += ["--set", "sample.sampler=dpm_fast", "--set", "sample.guidance_scale=1.0", "--set", "model.img_size=8"]


def test_prompts_become_images_in_equal_shares(tmp_path):
    """From the command line or a file: the same images, which are those of the Python API with CLIP's features."""
    cfg = load_config(TEXT[1], TEXT[3::2])
    clip, weights = save_clip(tmp_path / "clip"), tmp_path / "text.safetensors"
    model = build_model(cfg).eval()
    save_file(model.state_dict(), weights)
    (tmp_path / "prompts.txt").write_bytes("\ufeffa b\r\n\r\n火车 ü".encode())  # as Windows writes it
    common = [
        "sample",
        *TEXT,
        "--checkpoint",
        str(weights),
        "--clip",
        clip,
        "--num",
        "4",
        "--steps",
        "2",
        "--batch",
        "3",
    ]
    given = ["--prompt", "a b", "--prompt", "火车 ü", "--format", "npz"]
    assert cli.main([*common, "--out", str(tmp_path / "one.npz"), *given]) == 0
    assert cli.main([*common, "--out", str(tmp_path / "two"), "--prompts", str(tmp_path / "prompts.txt")]) == 0
    images = np.load(tmp_path / "one.npz")
    assert (
        images.files == ["arr_0"]
        and (tmp_path / "two" / "prompts.txt").read_text("utf-8") == "a b\na b\n火车 ü\n火车 ü\n"
    )
    assert (tmp_path / "two" / "000001_a-b.png").is_file() and (tmp_path / "two" / "000002_火车-ü.png").is_file()
    drawn = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "two").glob("0*.png"))]
    assert np.array_equal(images["arr_0"], np.stack(drawn))
    encode, null = load_text(cfg, clip, torch.device("cpu"))
    context = encode(["a b", "a b", "火车 ü", "火车 ü"])
    (expected,) = sampling.sample(model, cfg, 4, context=context, null_context=null, steps=2, batch=4)
    assert np.abs(to_uint8(expected).astype(int) - images["arr_0"]).max() <= 1
    (other,) = sampling.sample(model, cfg, 4, context=context.flip(0), null_context=null, steps=2, batch=4)
    assert not torch.allclose(expected, other, atol=1e-3)


def test_a_prompts_file_has_a_prompt_on_every_line_that_is_not_blank(tmp_path):
    """Whatever else Unicode breaks lines at belongs to the prompt."""
    file, cfg = tmp_path / "prompts.txt", load_config(TEXT[1], TEXT[3::2])
    file.write_bytes("\ufeffa\u2028b\n\n \t\nc\x85d\x0be\r\nü 火车".encode())
    args = argparse.Namespace(prompt=None, prompts=str(file))
    assert commands.sample._prompts(args, cfg) == ["a\u2028b", "c\x85d\x0be", "ü 火车"]


def test_a_prompt_that_is_cut_is_said_once_with_what_is_left_out(tmp_path):
    cfg = load_config(TEXT[1], TEXT[3::2])
    encode, _ = load_text(cfg, save_clip(tmp_path / "clip"), torch.device("cpu"))
    with pytest.warns(
        UserWarning, match="'a b a b a b a b a': 11 tokens, of which the text encoder reads 8; left out: 'a b a'"
    ) as said:
        for _ in range(2):
            encode(["a b a b a b a b a", "a b"])
    assert len(said) == 1


def test_an_encoder_of_another_width_is_refused(tmp_path):
    clip = save_clip(tmp_path / "clip", tokens=6)
    with pytest.raises(UserError, match=r"expected features \(8, 16\), got \(6, 16\)"):
        load_text(load_config(TEXT[1], TEXT[3::2]), clip, torch.device("cpu"))


def test_guidance_keeps_to_the_configs_interval(checkpoint):
    """t = 1, ... 0: an interval that holds no evaluation is no guidance; the whole one is what there was."""
    cfg = load_config(DIGITS, SMALL[1::2])
    model, y = sampling.load_for_sampling(cfg, checkpoint, torch.device("cpu")), torch.tensor([3, 7])

    def draw(*overrides, **options):
        cfg = load_config(DIGITS, [*SMALL[1::2], *overrides])
        return torch.cat(list(sampling.sample(model, cfg, 2, labels=y, steps=5, **options)))

    none, whole = draw(guidance_scale=0.0), draw()
    assert torch.equal(draw("sample.guidance_interval=[0.0, 0.0]"), none)
    part = draw("sample.guidance_interval=[0.0, 0.5]")
    assert not torch.equal(part, whole) and not torch.equal(part, none)
    assert torch.equal(draw(guidance_interval=(0.0, 0.5)), part)


def test_a_sample_depends_on_seed_and_index_only(checkpoint, tmp_path):
    """Another batch size, or a run folder in place of a file, changes nothing; another seed changes everything."""
    files = [tmp_path / f"{i}.npz" for i in range(3)]
    common = ("--num", "5", "--classes", "1", "--steps", "3")
    assert sample(checkpoint, files[0], *common, "--batch", "5") == 0
    assert sample(checkpoint.parents[2], files[1], *common, "--batch", "2") == 0
    assert sample(checkpoint, files[2], *common, "--seed", "1") == 0
    a, b, c = (np.load(file) for file in files)
    assert a["arr_0"].shape == (5, 8, 8, 1) and a["arr_0"].dtype == np.uint8 and a["arr_1"].tolist() == [1] * 5
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1  # batched matrix products may round differently
    assert (a["arr_0"] != c["arr_0"]).any(axis=(1, 2, 3)).all()


def test_an_interrupted_job_continues_without_repeating_or_losing_a_sample(checkpoint, tmp_path, monkeypatch, capsys):
    whole, resumed, common = (
        tmp_path / "whole.npz",
        tmp_path / "resumed.npz",
        ("--num", "10", "--batch", "3", "--steps", "2"),
    )
    assert sample(checkpoint, whole, *common) == 0
    draw, drawn = sampling.sample, []

    def dies_at_the_third(*args, **options):
        drawn.append(options["first"])
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(*args, **options)

    monkeypatch.setattr("uvit_fast.sampling.loop.sample", dies_at_the_third)
    assert sample(checkpoint, resumed, *common) == 130
    assert "sample interrupted; the same command with --resume continues\n" in capsys.readouterr().err
    assert not resumed.exists()
    assert sample(checkpoint, resumed, *common) == 2  # what is there is not thrown away unasked
    assert "continue it with --resume" in capsys.readouterr().err
    assert sample(checkpoint, resumed, *common, "--seed", "1", "--resume") == 2
    assert "--resume expected seed 0, got 1" in capsys.readouterr().err
    note = tmp_path / "resumed.npz.parts" / "job.json"
    settings = note.read_text()
    for damaged in ("{", "[1]", "[" * 100_000):
        note.write_text(damaged)
        assert sample(checkpoint, resumed, *common, "--resume") == 2
        assert "job.json: damaged" in capsys.readouterr().err
    note.write_text(settings)
    cut = tmp_path / "resumed.npz.parts" / "0000003_0000006.npy"
    os.truncate(cut, cut.stat().st_size - 10)  # as a full disk leaves it
    assert sample(os.path.relpath(checkpoint), resumed, *common, "--resume") == 0
    assert drawn == [0, 3, 6, 3, 6, 9]  # what was under way or is not whole is drawn again, the rest is not
    assert np.array_equal(np.load(whole)["arr_0"], np.load(resumed)["arr_0"])
    assert not (tmp_path / "resumed.npz.parts").exists()


@pytest.mark.parametrize("name", ["out.npz", "out"])
def test_samples_that_are_there_are_neither_mixed_with_others_nor_replaced(checkpoint, tmp_path, name, capsys):
    out, common = tmp_path / name, ("--num", "1", "--steps", "1")
    assert sample(checkpoint, out, *common) == 0
    before = {path: path.read_bytes() for path in (out.iterdir() if out.is_dir() else [out])}
    for more in ([], ["--resume"], ["--seed", "1"]):
        assert sample(checkpoint, out, *common, *more) == 2
        assert f"{out}: there already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (out.iterdir() if out.is_dir() else [out])} == before


def test_where_nothing_can_be_written_is_one_line(checkpoint, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert sample(checkpoint, tmp_path / "file" / "out", "--num", "1", "--steps", "1") == 2
    assert "expected a place that can be written to" in capsys.readouterr().err


def test_labels_are_checked_before_the_network_sees_them(checkpoint):
    cfg = load_config(DIGITS, SMALL[1::2])
    model = sampling.load_for_sampling(cfg, checkpoint, torch.device("cpu"))
    for labels, words in (
        (torch.full((4,), 12), "expected labels from 0 to 9, got 12"),
        (torch.arange(3), "4 samples, got 3"),
    ):
        with pytest.raises(UserError, match=words):
            next(sampling.sample(model, cfg, 4, labels=labels))


def test_a_run_folder_brings_its_config(checkpoint, tmp_path, capsys):
    run = checkpoint.parents[2]
    assert cli.main(["sample", "--checkpoint", str(run), "--out", str(tmp_path / "out")]) == 2
    assert f"expected the YAML file of {run}" in capsys.readouterr().err
    (run / "config.yaml").write_text(dump_config(load_config(DIGITS, SMALL[1::2])))
    assert (
        cli.main(["sample", "--checkpoint", str(run), "--out", str(tmp_path / "own.npz"), "--num", "1", "--steps", "1"])
        == 0
    )
    assert sample(run, tmp_path / "named.npz", "--num", "1", "--steps", "1") == 0
    own, named = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("own", "named"))
    assert np.array_equal(own, named)


def test_a_checkpoint_brings_its_runs_config_and_alone_its_own(checkpoint, tmp_path):
    run, outs = checkpoint.parents[2], []
    (run / "config.yaml").write_text(dump_config(load_config(DIGITS, SMALL[1::2])))
    shutil.copytree(checkpoint.parent, run / "best")
    alone = shutil.copytree(checkpoint.parent, tmp_path / "elsewhere" / "step_00000010")
    for i, where in enumerate((run, checkpoint.parent, checkpoint, run / "best", alone, alone / "ema.safetensors")):
        outs.append(tmp_path / f"{i}.npz")
        assert (
            cli.main(["sample", "--checkpoint", str(where), "--out", str(outs[-1]), "--num", "1", "--steps", "1"]) == 0
        )
    images = [np.load(out)["arr_0"] for out in outs]
    assert all(np.array_equal(images[0], other) for other in images)


def test_a_png_is_one_picture(checkpoint, tmp_path, capsys):
    assert sample(checkpoint, tmp_path / "one.png", "--num", "1", "--steps", "1") == 0
    assert Image.open(tmp_path / "one.png").size == (8, 8)
    assert sample(checkpoint, tmp_path / "grid.PNG", "--num", "3", "--steps", "1") == 0
    assert Image.open(tmp_path / "grid.PNG").width == 3 * (48 + 4) + 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.PNG", "one.png", "run"]
    for name, more, words in (
        ("one.png", (), "there already"),
        ("x.png", ("--num", "101"), "a picture shows up to 100 images; expected a folder for 101"),
        ("x.png", ("--format", "npz"), "expected --out to name a folder or a .npz"),
        ("x.jpg", (), "expected a new folder, or a name that ends in .npz or .png"),
    ):
        assert sample(checkpoint, tmp_path / name, "--steps", "1", *more) == 2
        assert words in capsys.readouterr().err


def test_a_large_job_holds_a_part_at_a_time(tmp_path):
    """Two hundred parts of 1 MB: the file is written with the memory of a few of them."""
    job = Job(tmp_path / "out.npz", {}, 400, 2, resume=False)
    assert job.run(lambda first, last: np.full((last - first, 512, 1024, 1), first % 256, np.uint8))
    tracemalloc.start()
    save_npz(tmp_path / "out.npz", job.images(), 400, np.arange(400))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20
    with np.load(tmp_path / "out.npz") as file:
        assert file["arr_1"].tolist() == [*range(400)] and file["arr_0"].shape == (400, 512, 1024, 1)
        assert (file["arr_0"][:, 7, 7, 0] == np.arange(400) // 2 * 2 % 256).all()


def test_a_newer_checkpoint_does_not_slip_into_an_interrupted_job(checkpoint, tmp_path, capsys, monkeypatch):
    run, out = checkpoint.parents[2], tmp_path / "out.npz"
    monkeypatch.setattr(Job, "close", lambda self: None)  # the parts stay, as after an interruption
    assert sample(run, out, "--num", "2", "--steps", "1") == 0
    save_checkpoint(run / "checkpoints", 20)
    assert sample(run, out, "--num", "2", "--steps", "1", "--resume") == 2
    assert "--resume expected checkpoint" in capsys.readouterr().err
    assert sample(checkpoint.parent, out, "--num", "2", "--steps", "1", "--resume") == 0


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def link_to_nothing(file):
    file.unlink()
    file.symlink_to("nowhere")


def empty_the_folder(file):
    shutil.rmtree(file.parent)
    file.parent.mkdir()


@pytest.mark.parametrize("damage", [flip_a_bit, lambda file: file.unlink(), link_to_nothing, empty_the_folder])
@pytest.mark.parametrize("part", ["ema", "exp_avg"])
def test_the_newest_intact_checkpoint_is_the_one_that_training_continues_from(checkpoint, damage, part):
    """Whichever file is damaged, the whole checkpoint is passed over, by all and aloud."""
    folder, said = checkpoint.parents[1], []
    damage(save_checkpoint(folder, 20) / f"{part}.safetensors")
    with pytest.warns(UserWarning, match="step_00000020 is damaged"):
        found = sampling.find_weights(folder.parent)
    assert found == checkpoint == checkpoints.newest_intact(folder, said.append)[0] / "ema.safetensors"
    assert len(said) == 1 and sampling.find_weights(checkpoint.parent) == checkpoint


def test_a_copy_beside_the_checkpoints_is_nobodys_newest(checkpoint, recwarn):
    folder = checkpoint.parents[1]
    for name in ("step_best", "step_00000010.older", "step_99", "step_٠٠٠٠٠٠٩٩", "step_00000099_copy"):
        shutil.copytree(checkpoint.parent, folder / name)
    assert sampling.find_weights(folder.parent) == sampling.find_weights(folder) == checkpoint
    assert sampling.find_weights(folder / "step_best").parent.name == "step_best" and not recwarn.list
    for name in ("step_00000099", "step_00000098"):  # as training calls them
        shutil.copytree(checkpoint.parent, folder / name)
    with pytest.warns(UserWarning, match="manifest.json: of step 10, so this is a copy"):
        assert sampling.find_weights(folder.parent) == checkpoint
    assert checkpoints.newest_intact(folder, lambda text: None)[0] == checkpoint.parent


def test_a_checkpoint_that_was_named_is_taken_or_refused_not_replaced(checkpoint, tmp_path, capsys):
    """Other files' damage is said; the weights' own is an error, though there is an older checkpoint."""
    newer = save_checkpoint(checkpoint.parents[1], 20)
    flip_a_bit(newer / "exp_avg.safetensors")
    for name in (newer, newer / "ema.safetensors"):
        with pytest.warns(
            UserWarning, match=r"damaged \(exp_avg.safetensors: its SHA-256 .*ema.safetensors, which was asked"
        ):
            assert sampling.find_weights(name) == newer / "ema.safetensors"
    flip_a_bit(newer / "ema.safetensors")
    assert sample(newer, tmp_path / "out.npz", "--num", "1", "--steps", "1") == 2
    assert "ema.safetensors: damaged (its SHA-256" in capsys.readouterr().err
    link_to_nothing(newer / "ema.safetensors")
    assert sample(newer, tmp_path / "out.npz", "--num", "1", "--steps", "1") == 2
    assert "ema.safetensors: a link to nothing" in capsys.readouterr().err
    with pytest.raises(UserError, match="these are AdamW's moments"):
        sampling.find_weights(newer / "exp_avg.safetensors")


def test_a_manifest_can_neither_lie_about_a_file_nor_leave_its_folder(checkpoint, tmp_path):
    """A file that its own maker's manifest calls right, and a name that leads elsewhere."""
    manifest = checkpoint.with_name("manifest.json")
    whole, content = manifest.read_text(), json.loads(manifest.read_text())
    (tmp_path / "secret").write_bytes(b"secret")
    data = bytearray(checkpoint.read_bytes())
    data[:8] = (2**40).to_bytes(8, "little")  # the header's length
    checkpoint.write_bytes(data)
    content["files"]["ema.safetensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    manifest.write_text(json.dumps(content))
    assert dict(checkpoints.faults(checkpoint.parent)).keys() == {"ema.safetensors"}
    for text in (
        whole.replace('"ema.safetensors"', '"../../../secret"'),
        whole.replace('"ema.safetensors"', f'"{tmp_path}/secret"'),
        "[" * 100_000,
        "9" * 100_000,
    ):
        manifest.write_text(text)
        assert dict(checkpoints.faults(checkpoint.parent)).keys() == {"manifest.json"}


def test_weights_that_have_diverged_are_not_sampled_as_black_images(checkpoint, tmp_path, capsys):
    weights = {name: value.clone() for name, value in load_file(checkpoint).items()}
    weights["norm.weight"][0] = float("nan")
    save_file(weights, tmp_path / "x.safetensors")
    assert sample(tmp_path / "x.safetensors", tmp_path / "out.npz", "--num", "1", "--steps", "1") == 2
    assert "tensors are with NaN or infinity (norm.weight)" in capsys.readouterr().err
    huge = {name: value * 1e30 for name, value in load_file(checkpoint).items()}
    save_file(huge, tmp_path / "huge.safetensors")
    assert sample(tmp_path / "huge.safetensors", tmp_path / "out.npz", "--num", "1", "--steps", "1") == 2
    assert "samples 0 to 0 hold NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()


def test_two_processes_finish_what_one_began(checkpoint, tmp_path, monkeypatch):
    """--resume with another number of processes: the same images, and the first part is not drawn again."""
    alone, together = tmp_path / "alone.npz", tmp_path / "together.npz"
    common = ("--num", "7", "--batch", "2", "--steps", "2")
    assert sample(checkpoint, alone, *common) == 0
    draw = sampling.sample

    def dies_at_the_second(*args, **options):
        if options["first"] == 2:
            raise KeyboardInterrupt
        return draw(*args, **options)

    monkeypatch.setattr("uvit_fast.sampling.loop.sample", dies_at_the_second)
    assert sample(checkpoint, together, *common) == 130
    part = tmp_path / "together.npz.parts" / "0000000_0000002.npy"
    kept = 255 - np.load(part)  # marked, so that a part drawn again shows
    np.save(part, kept)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "--", "uvit_fast.cli", "--local_rank=0", "sample", "--config", DIGITS, *SMALL, "--resume"]
    command += ["--checkpoint", str(checkpoint), "--out", str(together), *common]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    images = np.load(together)["arr_0"]
    assert np.array_equal(images[:2], kept)
    assert np.abs(np.load(alone)["arr_0"][2:].astype(int) - images[2:]).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "--config", "configs/digit.yaml"], "did you mean configs/digits.yaml?"),
        (["sample", "--config", DIGITS, "--set", "model.dept=3"], "did you mean 'depth'?"),
        (
            ["sample", "--config", DIGITS, "--classes", "3,10"],
            "expected labels from 0 to 9, got 10",
        ),  # 10 is the null label
        (["sample", "--config", DIGITS, "--classes", "three"], "expected whole numbers"),
        (["sample", "--config", DIGITS, "--classes", ""], "expected whole numbers"),
        (["sample", "--config", DIGITS, "--cfg-scale", "nan"], "expected at least 1"),
        (["convert", "--config", DIGITS, "--checkpoint", DIGITS, "--out", "x.safetensors"], "expected a .pth file"),
        (["sample", "--config", "configs/s2_cifar10.yaml", "--classes", "3"], "not class-conditional"),
        (["sample", "--config", DIGITS, "--cfg-scale", "0.4"], "expected at least 1"),
        (["sample", "--config", DIGITS, "--set", "sample.guidance_interval=[0.7, 0.2]"], "0 <= first <= last <= 1"),
        (["sample", "--config", "configs/l4_64.yaml", "--cfg-scale", "1.4"], "without dropping its condition"),
        (["sample", "--config", DIGITS, "--prompt", "a cat"], "takes classes, not text; expected no prompt"),
        (["sample", "--config", "configs/s2_cifar10.yaml", "--prompt", "a cat"], "takes no condition, not text"),
        (["sample", "--config", "configs/s2_coco.yaml"], "takes text; expected --prompt or --prompts"),
        (["sample", "--config", "configs/s2_coco.yaml", "--prompt", "a", "--prompts", "b"], "expected one of them"),
        (["sample", "--config", "configs/s2_coco.yaml", "--prompts", "no.txt"], "expected a text file"),
        (["sample", "--config", "configs/s2_coco.yaml", "--prompts", os.devnull], "got an empty file"),
        (["sample", "--config", "configs/s2_coco.yaml", "--prompt", "a", "--classes", "3"], "not class-conditional"),
        (
            ["sample", "--config", DIGITS, "--format", "png", "--out", "x.npz"],
            "expected --out to name a folder or a .png",
        ),
        (["sample", "--config", DIGITS, "--set", "device=cuda"], "no CUDA device was found"),
        (
            ["sample", "--config", DIGITS, "--precision", "fp8"],
            "sample.precision=fp8: its kernels are for compute capability 9.0 (H100, H200); expected bf16",
        ),
        (
            ["sample", "--config", "configs/unet_adm_256.yaml", "--precision", "fp8"],
            "sample.precision=fp8: its kernels are U-ViT's, unet_adm_256 is a U-Net; expected bf16",
        ),
        (["sample", "--config", DIGITS, "--checkpoint", "x.pth"], "--checkpoint x.pth: no such file or folder"),
        (["sample", "--config", DIGITS, "--checkpoint", "x" * 5000], "xxx…: no such file or folder"),
        (["sample", "--config", "x" * 5000], "expected a config file (File name too long)"),
        (["evaluate", "--samples", "x.npz", "--reference", DIGITS], "--samples x.npz: no such file or folder"),
        (["evaluate", "--samples", DIGITS, "--reference", "x.npz"], "--reference x.npz: no such file or folder"),
        (
            ["sample", "--config", DIGITS, "--checkpoint", "configs"],
            "configs: no EMA weights, but ablations, custom.yaml, ",
        ),
        (["demo", "--run-dir", "configs"], "configs: no run"),
        (
            ["cka", "--config", "configs/unet_adm_256.yaml", "--checkpoint", DIGITS, "--out", "x"],
            "expected a U-ViT, whose",
        ),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if arguments[0] == "sample":
        arguments = [
            *arguments,
            *([] if "--checkpoint" in arguments else ["--checkpoint", DIGITS]),
            *([] if "--out" in arguments else ["--out", str(tmp_path)]),
        ]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("uvit-fast: ") and error.count("\n") == 1


def test_convert_to_a_pipeline_and_back_keeps_every_weight(checkpoint, tmp_path, capsys):
    common, run = ["convert", "--config", DIGITS, *SMALL], checkpoint.parents[2]
    Provenance(("zero", "one")).write(run / "data.json")
    assert cli.main([*common, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "pipe")]) == 0
    back = tmp_path / "new" / "back.pth"
    assert cli.main([*common, "--checkpoint", str(tmp_path / "pipe"), "--out", str(back)]) == 0
    before, after = load_file(checkpoint), torch.load(back, weights_only=True)
    assert sorted(path.name for path in back.parent.iterdir()) == ["back.data.json", "back.pth"]
    diffusion = {"schedule": "vp", "prediction": "eps"}
    assert read(back) == read(checkpoint).joined(
        Provenance(diffusion=diffusion)
    )  # the names of its classes come back too
    assert read(back).classes == ("zero", "one")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert sample(tmp_path / "pipe", tmp_path / "out.npz", "--num", "1", "--steps", "1") == 0
    own = ["sample", "--checkpoint", str(tmp_path / "pipe"), "--out", str(tmp_path / "own.npz"), "--num", "1"]
    assert cli.main([*own, "--steps", "1"]) == 0  # a pipeline's folder says what it is
    assert np.array_equal(*(np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("out", "own")))
    cfg, told = load_config(DIGITS, SMALL[1::2]), config_of(None, str(tmp_path / "pipe"), [])
    assert (told.model, told.diffusion, told.null_label) == (cfg.model, cfg.diffusion, cfg.null_label)
    assert (told.sample.sampler, told.sample.steps) == (cfg.sample.sampler, cfg.sample.steps)
    assert told.sample.guidance_scale == pytest.approx(cfg.sample.guidance_scale)
    assert cli.main([*common, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "pipe")]) == 2
    assert "there already" in capsys.readouterr().err


def test_a_checkpoint_of_another_architecture_names_the_keys(checkpoint, tmp_path, capsys):
    code = cli.main(["sample", "--config", DIGITS, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")])
    assert code == 2
    error = capsys.readouterr().err
    assert "another architecture" in error and "missing (in_blocks.1" in error and "of the wrong shape" in error


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--version"], 0, ["uvit-fast 0.1.0"]),
        (["smaple"], 2, ["uvit-fast: smaple: no such command; did you mean sample?"]),
        ([], 2, ["uvit-fast: expected one of train, sample, ", "; example: uvit-fast sample --help"]),
        (["sample", "--out", "x", "--nme", "3"], 2, ["uvit-fast: sample: --nme: no such option; did you mean --num?"]),
        (["sample", "--out", "x"], 2, ["uvit-fast: sample: expected --checkpoint; example: uvit-fast sample --check"]),
        (["info", "x"], 2, ["uvit-fast: info: x: expected no such argument; example: uvit-fast info"]),
        (["data", "check", "--folder", "x"], 2, ["uvit-fast: data check: --folder: no such option"]),
        (
            ["train", "--config", "h2_255"],
            2,
            ["uvit-fast: h2_255: no such config file; did you mean h2_256 or l2_256?"],
        ),
        (["sample", "--checkpoint", "x.pth", "--out", "x"], 2, ["x.pth: no such file or folder"]),
        (["sample", "--checkpoint", DIGITS, "--out", "x", "--config", DIGITS, "--set", "trian.lr=1"], 2, ["'train'"]),
        (["sample", "--checkpoint", DIGITS, "--out", "x", "--config", DIGITS, "--prompt", "x"], 2, ["takes classes"]),
        (["evaluate", "--samples", "x.npz", "--reference", DIGITS], 2, ["x.npz: no such file or folder"]),
        (["info", "--config", "configs/digit.yaml"], 2, ["did you mean configs/digits.yaml?"]),
    ],
)
def test_typos_are_answered_before_torch_is_imported(arguments, code, words):
    """In one line; an unknown option before a missing one."""
    script = "import sys; sys.modules['torch'] = None; from uvit_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert (done.stdout + done.stderr).count("\n") == 1
    for word in words:
        assert word in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num", "0"], "uvit-fast: sample: --num: expected a whole number of at least 1, got '0'\n"),
        (["--seed=-1"], "uvit-fast: sample: --seed: expected a whole number from 0 to 2^63 - 1, got '-1'\n"),
        (["--cfg-scale", "x\ny"], "uvit-fast: sample: --cfg-scale: expected a number, got 'x\\ny'\n"),
        (["--precision", "fp9"], "uvit-fast: sample: --precision: expected bf16 or fp8, got 'fp9'\n"),
        (["--resume=3"], "uvit-fast: sample: --resume: expected no value, got '3'\n"),
    ],
)
def test_a_value_that_an_option_does_not_take_is_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "--checkpoint", "x", "--out", "x", *arguments])
    assert stop.value.code == 2 and capsys.readouterr().err == words


HELP = [[name] for name in cli.COMMANDS if name != "data"] + [[], ["data"], ["data", "check"], ["data", "cifar10"]]


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help_fits_a_screen_and_shows_an_example_that_the_parser_takes(command, capsys, monkeypatch):
    """Of 80 columns and 36 lines; options stand in groups that say what they are of."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) <= 36 and max(map(len, lines)) <= 80
    assert not command or "options:" not in lines
    example = re.sub(r" \\\n +", " ", text.split("example:\n")[1]).splitlines()[0].removeprefix("  uvit-fast ")
    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):  # the first one's example is a --help
        patch.setattr(cli, "_run", lambda args, *_: args.command)
        assert cli.main(shlex.split(example)) == (command or ["sample"])[0]
    assert not capsys.readouterr().err


def test_info_says_what_would_run_and_why(capsys):
    assert cli.main(["info", "--config", "configs/h2_256.yaml"]) == 0
    out = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in out
    for line in ("16 heads of 72", "attention", "ln_mlp", "skip_linear"):
        assert line in out
