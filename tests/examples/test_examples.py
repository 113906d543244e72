"""The examples run, with small stand-ins for published weights, photographs and a trained run."""

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from sklearn.datasets import load_sample_images

from examples import diffusers_scheduler, finetune, own_dataset, own_sampler, published_weights
from tests import autoencoders
from tests.training import tiny
from uvit_fast import build_model, build_objective, load_config
from uvit_fast.config import dump_config
from uvit_fast.diffusion.schedules import SDSchedule
from uvit_fast.pipeline import UViTScheduler
from uvit_fast.training import checkpoint as checkpoints

ROOT = Path(__file__).parents[2]
SMALL = ("model.img_size=8", "model.embed_dim=32", "model.depth=2", "model.num_heads=2", "sample.steps=3", "device=cpu")
DIGITS = ["model.embed_dim=32", "model.depth=2", "model.num_heads=2"]


@pytest.fixture
def published(tmp_path):
    """A narrow `imagenet256_uvit_huge.pth`, the overrides that fit it, and an autoencoder of 2 x 2 pixels."""
    overrides = (*SMALL, f"latent.autoencoder={autoencoders.saved(autoencoders.kl(), tmp_path / 'vae')}")
    torch.save(build_model(load_config("h2_256", overrides)).state_dict(), tmp_path / "huge.pth")
    return str(tmp_path / "huge.pth"), overrides


@pytest.fixture
def digits_run(tmp_path, monkeypatch):
    """A `runs/digits` with random weights, in the current folder."""
    monkeypatch.chdir(tmp_path)
    cfg, run = load_config(ROOT / "configs" / "digits.yaml", DIGITS), Path("runs/digits")
    weights = build_model(cfg).state_dict()
    tensors = {"model": weights, "ema": weights}
    checkpoints.write(run / "checkpoints", 10, tensors, {"config": cfg.model_dump(mode="json")}, keep=1)
    (run / "config.yaml").write_text(dump_config(cfg))
    return run


def test_published_weights(published):
    checkpoint, overrides = published
    pipe = published_weights.load(checkpoint, overrides=overrides)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[207, 360], guidance_scale=1.4).images
    assert [image.size for image in images] == [(16, 16)] * 2


def test_a_scheduler_of_diffusers(published):
    """The ten lines are what the pipeline does with that scheduler."""
    checkpoint, overrides = published
    torch.manual_seed(0)
    latents = diffusers_scheduler.sample(load_config("h2_256", overrides), checkpoint, [207, 360], steps=3)
    pipe = published_weights.load(checkpoint, overrides=overrides)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers_scheduler.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    torch.manual_seed(0)
    x_T = torch.randn(2, 4, 8, 8)
    call = {"num_inference_steps": 3, "guidance_scale": 1, "output_type": "latent"}
    torch.testing.assert_close(latents, pipe([207, 360], latents=x_T, **call).images, rtol=1e-4, atol=1e-4)


def test_fine_tuning_on_photographs(published, tmp_path):
    """Two classes of two cuts each of scikit-learn's photographs; the label table is replaced, the rest is the
    published one.
    """
    checkpoint, overrides = published
    for name, photo in zip(("temple", "flower"), load_sample_images().images):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(photo[60 * i : 60 * i + 200, :200]).save(tmp_path / "photographs" / name / f"{i}.jpg")
    settings = ("train.iterations=1", "train.batch_size=2", "train.sample_every=1", "sample.steps=1")
    settings += ("evaluate.held_out=2", "evaluate.every=1", "data.num_workers=0")
    run = tmp_path / "run"
    photographs = str(tmp_path / "photographs")
    tuned = partial(finetune.finetune, overrides=(*overrides, *settings))
    assert tiny.launch(tuned, checkpoint, photographs, run)["step"] == 1
    assert (run / "best" / "ema.safetensors").is_file() and (run / "samples" / "step_00000001.png").is_file()
    assert json.loads((run / "init.json").read_text())["replaced"] == ["label_emb begins anew, but for the null label"]


def test_an_own_dataset(tmp_path):
    rings = own_dataset.Rings()
    item = rings[13]
    assert item["x"].shape == (1, 16, 16) and item["y"] == 3 and -1 <= item["x"].min() < item["x"].max() <= 1
    areas = [int((rings[k]["x"] > -1).sum()) for k in range(10)]
    assert areas == sorted(areas) and areas[0] < areas[9]
    short = (*DIGITS, "train.iterations=2", "train.batch_size=4", "train.sample_every=2", "sample.steps=1")
    assert tiny.launch(own_dataset.train, tmp_path / "run", *short)["step"] == 2
    assert (tmp_path / "run" / "samples" / "step_00000002.png").is_file()


def test_an_own_sampler(digits_run):
    own_sampler.main("runs/digits", "ddim.png", steps=2)
    assert Image.open("ddim.png").width > 10 * 48


@pytest.mark.parametrize("name", ["own_sampler", "published_weights", "diffusers_scheduler", "finetune"])
def test_a_wrong_path_is_one_line(name, monkeypatch, capsys):
    program = str(ROOT / "examples" / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [program, "nowhere", *["nothing"] * (name == "finetune")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(program, run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"{program}: no") and error.count("\n") == 1


def test_published_weights_that_cannot_be_sampled_or_saved_are_one_line(published, tmp_path, monkeypatch, capsys):
    checkpoint, overrides = published
    program, read = str(ROOT / "examples" / "published_weights.py"), load_config
    monkeypatch.setattr(sys, "argv", [program, checkpoint])
    monkeypatch.setattr("uvit_fast.load_config", lambda config, more: read(config, [*overrides, *more]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "golden_retriever.png").mkdir()
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(program, run_name="__main__")
    error = capsys.readouterr().err.splitlines()[-1]  # after the progress bar
    assert stop.value.code == 2 and error == f"{program}: golden_retriever.png: Is a directory"


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_own_sampler_is_ddim(eta):
    """As diffusers has it, on the same times and noise, but for the last step's, which ours does not add."""
    theirs, ours = DDIMScheduler.from_config(UViTScheduler("sd").config), own_sampler.DDIM(SDSchedule(), 9, eta)
    theirs.set_timesteps(9)  # it goes on by 1000 // 9 = 111, as ours from 1000 to 1
    draw, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    x, eps = torch.randn(2, 1, 2, 2, generator=draw), torch.randn(9, 2, 1, 2, 2, generator=draw)
    states, outputs = [], iter(eps)
    ours(lambda x, t: next(outputs), x, noise, change=lambda i, x: states.append(x) or x)
    noise.manual_seed(1)
    for stage, output, state in [*zip(ours.stages, eps, states)][: 8 if eta else 9]:
        x = theirs.step(output, round(stage.time) - 1, x, eta=eta, generator=noise).prev_sample
        torch.testing.assert_close(state, x, rtol=1e-4, atol=1e-4)


def test_the_own_sampler_takes_a_flow():
    """Of a network that knows the one image there is, with DDPM's noise, it makes that image: noise of t_min stays."""
    flow, image = build_objective(load_config("digits")), torch.linspace(-1, 1, 4).view(1, 1, 2, 2)

    def velocity(x, time):
        t = time.view(-1, 1, 1, 1) / 1000
        return (x - (1 - t) * image) / t - image

    x_T = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    sampler = own_sampler.DDIM(flow.schedule, 9, eta=1.0, prediction=flow.prediction)
    x = sampler(velocity, x_T, torch.Generator().manual_seed(1))
    torch.testing.assert_close(x, image.expand(3, 1, 2, 2), rtol=0, atol=5e-3)


def test_the_notebook(digits_run):
    """Its cells in order, without outputs in the file; each picture is what the text says of it."""
    cells = json.loads((ROOT / "examples" / "digits.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    names: dict = {}
    for cell in code:
        exec(compile("".join(cell["source"]), "digits.ipynb", "exec"), names)
    rows = {name: names[name].height // 60 for name in ("steps", "evaluations", "guidance")}
    assert rows == {"steps": 8, "evaluations": 4, "guidance": 4} and names["steps"].width == 10 * 60


def test_the_list_of_examples_is_whole():
    text = (ROOT / "examples" / "README.md").read_text()
    for file in (ROOT / "examples").iterdir():
        assert file.name in ("README.md", "__pycache__") or f"]({file.name})" in text
