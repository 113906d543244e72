"""`uvit-fast sample`: what it writes, jobs that continue, and what it refuses."""

import argparse
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import autoencoders
from tests.clip import save_clip
from tests.recorded import RecordedGraphs
from uvit_fast import build_model, cli, commands, load_config, sampling
from uvit_fast.data.encoders import load_text
from uvit_fast.provenance import Provenance
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling import captured
from uvit_fast.sampling.images import to_uint8
from uvit_fast.sampling.jobs import Job
from uvit_fast.sampling.output import save_npz

from .small import DIGITS, SMALL, sample, save_checkpoint


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
    encode, null = load_text(cfg, clip, "cpu")
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


@pytest.fixture
def latent(tmp_path):
    """The command for a small latent model, without --num and --out."""
    pytest.importorskip("diffusers")
    vae = {"latent.autoencoder": autoencoders.saved(autoencoders.kl(), tmp_path / "vae"), "latent.scale_factor": "0.2"}
    how = {"data.name": "synthetic", "model.in_chans": "4", "model.img_size": "8", "model.embed_dim": "32"}
    changed = [f"{key}={value}" for key, value in {**how, "model.depth": "2", **vae}.items()]
    torch.manual_seed(0)
    save_file(build_model(load_config("s2_cifar10", changed)).state_dict(), tmp_path / "weights.safetensors")
    settings = [word for each in [*changed, "sample.sampler=dpm_fast"] for word in ("--set", each)]
    return ["sample", "--config", "s2_cifar10", "--checkpoint", f"{tmp_path}/weights.safetensors", *settings]


def drawn(command: list[str], out, *more: str) -> np.ndarray:
    assert cli.main([*command, "--steps", "2", "--out", str(out), *more]) == 0
    return np.load(out)["arr_0"]


def test_latents_are_decoded_once_whether_or_not_the_loop_is_captured(latent, tmp_path, monkeypatch):
    """A captured loop decodes; its first batch comes before it holds a capture. A few images are not worth one."""
    written, made = drawn(latent, tmp_path / "written.npz", "--num", "3", "--batch", "2"), []
    monkeypatch.setattr(captured, "CudaGraphs", RecordedGraphs)
    monkeypatch.setattr(captured, "on_a_gpu", lambda *of: made.append(captured.GraphSampler(*of)) or made[-1])
    assert np.array_equal(drawn(latent, tmp_path / "captured.npz", "--num", "3", "--batch", "2"), written)
    assert made[0].captures and written.shape == (3, 16, 16, 3)
    assert np.array_equal(drawn(latent, tmp_path / "few.npz", "--num", "2"), written[:2]) and len(made) == 1


def test_a_process_imports_of_diffusers_what_decodes_and_draws_the_same(latent, tmp_path):
    """The rest, where it is installed, takes longer than all else; what comes later in the process finds it."""
    expected, rest = drawn(latent, tmp_path / "here.npz", "--num", "1"), "torch._dynamo transformers scipy peft"
    script = f"""
import sys, torch
from uvit_fast import cli
compiler = torch.compiler.disable
assert cli.main() == 0
print([name for name in "{rest}".split() if name in sys.modules], torch.compiler.disable is compiler)
import torch._dynamo, transformers
"""
    command = [sys.executable, "-c", script, *latent, "--num", "1", "--steps", "2", "--out", f"{tmp_path}/there.npz"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[] True" and "warning" not in done.stderr.lower()
    assert np.array_equal(np.load(tmp_path / "there.npz")["arr_0"], expected)


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
    assert not list(tmp_path.glob("out*"))  # nor does a folder of parts stand in the way of the next command
    assert sample(checkpoint, tmp_path / "out.npz", "--num", "1", "--steps", "1") == 0


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
