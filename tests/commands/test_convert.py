"""`uvit-fast convert`: to a pipeline and back."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.clip import save_clip
from tests.test_config import CONFIGS, PARAMETERS
from uvit_fast import build_model, cli, load_config
from uvit_fast.commands.arguments import config_of
from uvit_fast.config import Config
from uvit_fast.pipeline import UViTModel, UViTPipeline
from uvit_fast.provenance import Provenance, read

from .small import DIGITS, SMALL, sample


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


def test_without_its_extra_the_pipeline_names_what_installs_it(checkpoint, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("uvit_fast.pipeline")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    command = ["convert", "--config", DIGITS, *SMALL, "--checkpoint", str(checkpoint)]
    assert cli.main([*command, "--out", str(tmp_path / "pipe")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("uvit-fast: a pipeline needs diffusers: pip install ") and error.count("\n") == 1
    assert cli.main([*command, "--out", str(tmp_path / "back.pth")]) == 0  # needs none


def test_a_checkpoint_of_another_architecture_names_the_keys(checkpoint, tmp_path, capsys):
    code = cli.main(["sample", "--config", DIGITS, "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")])
    assert code == 2
    error = capsys.readouterr().err
    assert "another architecture" in error and "missing (in_blocks.1" in error and "of the wrong shape" in error


def published_parameters(cfg: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a published checkpoint, written from the architecture alone."""
    m = cfg.model
    D, blocks = m.embed_dim, m.depth // 2
    shapes = {"patch_embed.proj.weight": (D, m.in_chans, m.patch_size, m.patch_size), "patch_embed.proj.bias": (D,)}
    tokens = 1 + (m.img_size // m.patch_size) ** 2
    if m.num_classes:
        shapes["label_emb.weight"], tokens = (m.num_classes, D), tokens + 1
    if m.context_dim:
        shapes |= {"context_embed.weight": (D, m.context_dim), "context_embed.bias": (D,)}
        tokens += m.context_tokens
    shapes["pos_embed"] = (1, tokens, D)
    linear = {"attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
    prefixes = [f"in_blocks.{i}" for i in range(blocks)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(blocks)]
    for prefix in prefixes:
        shapes |= {f"{prefix}.norm{i}.{part}": (D,) for i in (1, 2) for part in ("weight", "bias")}
        shapes[f"{prefix}.attn.qkv.weight"] = (3 * D, D)
        here = linear | ({"skip_linear": (D, 2 * D)} if prefix.startswith("out") else {})
        for name, (out, inputs) in here.items():
            shapes |= {f"{prefix}.{name}.weight": (out, inputs), f"{prefix}.{name}.bias": (out,)}
    pixels = m.patch_size**2 * m.in_chans
    shapes |= {"norm.weight": (D,), "norm.bias": (D,)}
    shapes |= {"decoder_pred.weight": (pixels, D), "decoder_pred.bias": (pixels,)}
    if m.conv:
        shapes |= {"final_layer.weight": (m.in_chans, m.in_chans, 3, 3), "final_layer.bias": (m.in_chans,)}
    return shapes


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_published_checkpoint_becomes_a_folder_and_comes_back(name, tmp_path, capsys):
    """Names and shapes at full size; every value, narrow: .pth -> folder -> .pth,
    and the folder knows how to sample.
    """
    cfg = load_config(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        full = UViTModel(**cfg.model.model_dump()).state_dict()
    assert {k: tuple(v.shape) for k, v in full.items()} == published_parameters(cfg)

    overrides = ["model.embed_dim=64", "model.num_heads=1"]
    narrow = load_config(CONFIGS / f"{name}.yaml", overrides)
    g = torch.Generator().manual_seed(0)
    state = {k: torch.randn(shape, generator=g) for k, shape in published_parameters(narrow).items()}
    torch.save(state, tmp_path / "published.pth")
    convert = ["convert", "--config", str(CONFIGS / f"{name}.yaml"), "--set", overrides[0], "--set", overrides[1]]
    convert += ["--vae", "none", "--clip", "none"]
    assert cli.main([*convert, "--checkpoint", str(tmp_path / "published.pth"), "--out", str(tmp_path / "pipe")]) == 0
    assert cli.main([*convert, "--checkpoint", str(tmp_path / "pipe"), "--out", str(tmp_path / "back.pth")]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)

    pipe, sample = UViTPipeline.from_pretrained(tmp_path / "pipe"), cfg.sample
    assert (pipe.scheduler.config.schedule, pipe.scheduler.config.sampler) == (cfg.diffusion.schedule, sample.sampler)
    assert pipe.config.scale_factor == (cfg.latent.scale_factor if cfg.latent else 1)
    assert (pipe.config.null_label, pipe.config.guidance_scale) == (cfg.null_label, 1 + sample.guidance_scale)


def test_convert_takes_a_text_models_encoder(tmp_path, capsys):
    small = ["model.embed_dim=32", "model.depth=2", "model.num_heads=2", "model.img_size=8", "sample.steps=4"]
    small += ["model.context_dim=16", "model.context_tokens=8"]
    cfg, clip = load_config("configs/s2_coco.yaml", small), save_clip(tmp_path / "clip")
    torch.save(build_model(cfg).state_dict(), tmp_path / "x.pth")
    sets = [part for override in small for part in ("--set", override)]
    convert = ["convert", "--checkpoint", str(tmp_path / "x.pth"), "--vae", "none", "--clip", clip]
    assert cli.main([*convert, "--config", "configs/s2_coco.yaml", *sets, "--out", str(tmp_path / "pipe")]) == 0
    pipe = UViTPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(prompt="a b", output_type="latent").images.shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="the pipeline has no vae to decode with; expected 'latent'"):
        pipe(prompt="a b")
    assert cli.main([*convert, "--config", "configs/s2_cifar10.yaml", "--out", str(tmp_path / "no")]) == 2
    assert "--clip: s2_cifar10 takes no text" in capsys.readouterr().err
