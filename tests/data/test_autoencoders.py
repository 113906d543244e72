"""Latents of KL and DC autoencoders: scaled and shifted alike wherever they are made, learned from or decoded."""

import json
import logging
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests import autoencoders as small
from tests.recorded import RecordedGraphs
from tests.training import tiny
from tests.training.test_command import call
from uvit_fast.build import build_dataset, build_sampler
from uvit_fast.cli import main
from uvit_fast.config import load_config
from uvit_fast.data import shards
from uvit_fast.data.autoencoders import (
    Scaling,
    decoder,
    import_alone,
    load_autoencoder,
    load_decoder,
    own_scaling,
    scaling_of,
)
from uvit_fast.data.latents import Latents
from uvit_fast.data.transforms import center_crop
from uvit_fast.diffusion.noise import Draws
from uvit_fast.provenance import UNKNOWN, Provenance
from uvit_fast.runtime.errors import UserError
from uvit_fast.sampling.captured import GraphSampler

NETWORK = ["model.img_size=8", "model.embed_dim=32", "model.depth=2", "model.num_heads=2", "sample.steps=2"]
DC = [*NETWORK, "model.in_chans=8", "model.num_classes=3", "device=cpu"]
SHORT = ["train.batch_size=4", "train.iterations=2", "train.warmup_steps=1", "data.num_workers=0"]
CONFIG = "configs/usit_h_512.yaml"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of three images of 40 x 48 pixels."""
    folder, values = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("ant", "bee"):
        (folder / name).mkdir()
        for i in range(3):
            coarse = Image.fromarray(values.integers(0, 256, (5, 6, 3), np.uint8))
            coarse.resize((40, 48), Image.Resampling.BICUBIC).save(folder / name / f"{i}.png")
    return folder


def sets(*values):
    return [part for value in values for part in ("--set", value)]


def extract(photos, config, out, *overrides):
    command = [
        "extract",
        "--config",
        config,
        "--images",
        str(photos),
        "--out",
        str(out),
        "--shard",
        "4",
        "--batch",
        "2",
    ]
    assert main([*command, *sets(*overrides)]) == 0
    return shards.read_manifest(out)


def finished(dataset):
    return dataset.finish(dataset.raw([(i, 0) for i in range(len(dataset))]), Draws(torch.Generator()))["x"]


def test_deep_compression_from_images_to_a_pipeline_and_back(photos, tmp_path):
    vae, out, run = small.saved(small.dc(), tmp_path / "vae"), tmp_path / "latents", tmp_path / "run"
    overrides = [*DC, f"latent.autoencoder={vae}", "latent.scale_factor=measured"]
    manifest = extract(photos, CONFIG, out, *overrides)
    assert manifest["arrays"]["latents"]["shape"] == [8, 8, 8] and "moments" not in manifest["arrays"]
    assert manifest["arrays"]["latents"]["count"] == 12 and manifest["image_size"] == 32
    dataset = build_dataset(load_config(CONFIG, [*overrides, f"data.path={out}"]))
    pixels = np.array(center_crop(Image.open(photos / "ant" / "2.png"), 32))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    expected = load_autoencoder(vae).encode(torch.cat([x, x.flip(-1)])).latent
    torch.testing.assert_close(torch.from_numpy(dataset.stored.take([4, 5])).float(), expected, rtol=2e-3, atol=2e-3)
    z = finished(dataset)
    assert torch.equal(z, finished(dataset))  # nothing is drawn
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(8))

    command = ["--config", CONFIG, "--run-dir", str(run)]
    command += sets(*overrides, *SHORT, f"data.path={out}", "train.sample_every=2")
    code, lines = tiny.launch(call, command)
    assert code == 0, lines
    assert Image.open(run / "samples" / "step_00000002.png").size[0] > 8 * 32
    scaling = dataset.scaling.as_json()
    assert json.loads((run / "data.json").read_text())["scaling"] == scaling

    command = ["--checkpoint", str(run), "--out"]
    assert main(["sample", *command, str(tmp_path / "a.npz"), "--num", "2", "--classes", "ant,bee"]) == 0
    images = np.load(tmp_path / "a.npz")["arr_0"]
    assert images.shape == (2, 32, 32, 3) and images.std() > 0
    assert main(["convert", *command, str(tmp_path / "pipe")]) == 0
    from uvit_fast.pipeline import UViTPipeline

    pipe = UViTPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.vae).__name__ == "AutoencoderDC" and pipe.image_size == 32 and pipe.scaling == dataset.scaling
    assert pipe(class_labels="bee", output_type="np").images.shape == (1, 32, 32, 3)
    command = ["--checkpoint", str(tmp_path / "pipe"), "--out"]
    assert main(["sample", *command, str(tmp_path / "b.npz"), "--num", "2", "--classes", "ant,bee"]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "b.npz")["arr_0"], images)
    assert main(["convert", *command, str(tmp_path / "b.pth")]) == 0
    assert json.loads((tmp_path / "b.data.json").read_text())["scaling"] == scaling

    # the same network as DC-AE's folders on the hub have it, beside an autoencoder, and back by the published names
    names, published = {"label_emb.weight": "label_emb.embedding_table.weight"}, torch.load(tmp_path / "b.pth")
    state = {f"diffusion_model.{names.get(key, key)}": value for key, value in published.items()}
    (tmp_path / "hub").mkdir()
    save_file(state | {"autoencoder.decoder.bias": torch.zeros(1)}, tmp_path / "hub" / "model.safetensors")
    command = ["convert", "--config", CONFIG, *sets(*DC), "--checkpoint", str(tmp_path / "hub"), "--out"]
    with pytest.warns(UserWarning, match="names begin with 'diffusion_model.', which is dropped; what else there is"):
        assert main([*command, str(tmp_path / "c.pth")]) == 0
    again = torch.load(tmp_path / "c.pth")
    assert again.keys() == published.keys() and all(torch.equal(again[key], published[key]) for key in again)


def test_a_posteriors_measured_channels_are_those_of_its_samples(photos, tmp_path):
    """With the posterior's own spread; of the data that KL's shift and factor would be applied to, neither is."""
    vae = small.kl(scaling_factor=0.36, shift_factor=0.12)
    vae.quant_conv.bias[4:] = torch.linspace(-6, 1, 4)  # log variances
    config = ["model.img_size=16", *NETWORK[1:], "model.num_classes=3", "device=cpu"]
    overrides = [*config, f"latent.autoencoder={small.saved(vae, tmp_path / 'vae')}", "latent.scale_factor=measured"]
    extract(photos, "configs/h2_256.yaml", tmp_path / "out", *overrides)
    dataset = Latents(str(tmp_path / "out"), "measured")
    z = torch.cat([finished(dataset) for _ in range(8)])  # the same draws; 12 images of 256 values are enough
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.06)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.06)


def test_an_autoencoders_own_shift_is_recorded_learned_and_undone(photos, tmp_path):
    """Where the config says nothing; what it says goes before, and another than the data's is warned of."""
    vae = small.kl(scaling_factor=0.36, shift_factor=0.12)
    name = small.saved(vae, tmp_path / "vae")
    config = ["model.img_size=16", *NETWORK[1:], "model.num_classes=3", "device=cpu", f"latent.autoencoder={name}"]
    manifest = extract(photos, "configs/h2_256.yaml", tmp_path / "out", *config, "latent.scale_factor=null")
    assert (manifest["scale_factor"], manifest["shift_factor"]) == (0.36, 0.12)
    dataset = Latents(str(tmp_path / "out"))
    assert dataset.scaling == Scaling(0.36, 0.12)
    latents = torch.randn(2, 4, 16, 16)
    z = dataset.scaling.applied(latents)
    torch.testing.assert_close(z, (latents - 0.12) * 0.36)
    cfg = load_config("configs/h2_256.yaml", [*config, "latent.scale_factor=null"])
    pixels = load_decoder(cfg, "cpu")(z)
    torch.testing.assert_close(pixels, vae.decode(latents).sample, rtol=1e-4, atol=1e-4)
    again = extract(photos, "configs/h2_256.yaml", tmp_path / "out", *config, "latent.scale_factor=measured")
    assert (
        again["arrays"] == manifest["arrays"] and again["scale_factor"] != manifest["scale_factor"]
    )  # nothing is encoded anew
    extract(photos, "configs/h2_256.yaml", tmp_path / "out", *config, "latent.scale_factor=null")
    with pytest.warns(UserWarning, match=r"extracted for shift_factor 0.12; latent.shift_factor 0.0 is used"):
        assert Latents(str(tmp_path / "out"), None, 0.0).scaling == Scaling(0.36, 0.0)


def test_what_scales_latents_is_the_configs_else_the_datas_else_the_autoencoders():
    vae = small.kl(scaling_factor=0.36, shift_factor=0.12)
    learned = Provenance(scaling={"scale_factor": [1.0, 2.0, 3.0, 4.0], "shift_factor": [0.0, 0.1, 0.2, 0.3]})
    before_shifts = Provenance(encoders={"vae": {"name": "sd"}})

    def scaling(known, *overrides, vae=vae):
        return scaling_of(load_config("configs/h2_256.yaml", [f"latent.{each}" for each in overrides]), known, vae)

    assert scaling(UNKNOWN) == Scaling(0.18215, 0.12)
    assert scaling(UNKNOWN, "scale_factor=null") == own_scaling(vae) == Scaling(0.36, 0.12)
    assert scaling(UNKNOWN, "shift_factor=0") == Scaling(0.18215, 0.0)
    assert scaling(before_shifts) == Scaling(0.18215, 0.0)  # as it was trained
    assert scaling(learned, "scale_factor=measured") == Scaling((1.0, 2.0, 3.0, 4.0), (0.0, 0.1, 0.2, 0.3))
    for how in ("measured", "null"):
        with pytest.raises(UserError, match="latent.scale_factor: expected a number"):
            scaling(UNKNOWN, f"scale_factor={how}", vae=None)
    channels = small.kl(scaling_factor=0.5, latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    assert own_scaling(channels) == Scaling((0.25,) * 4, (1.0,) * 4)


def test_a_shift_beside_a_dc_autoencoder_is_used_and_not_said_to_be_ignored(tmp_path):
    """DC's class in diffusers takes none; any other setting that it ignores is still named."""
    name = small.saved(small.dc(scaling_factor=0.3), tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("diffusers.configuration_utils")
    logger.addHandler(handler)
    try:
        for more, heard in (({}, False), ({"shift_facto": 1.0}, True)):
            (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "shift_factor": 0.05, **more}))
            assert own_scaling(load_autoencoder(name)) == Scaling(0.3, 0.05)
            assert any("'shift_facto': 1.0" in line for line in said) == bool(said) == heard
    finally:
        logger.removeHandler(handler)


def test_autoencoders_of_other_kinds_or_channels_are_one_line(tmp_path):
    vae = small.saved(small.dc(), tmp_path / "vae")
    with pytest.raises(UserError, match=r"makes latents of 8 channels; expected 32, as model.in_chans says"):
        load_autoencoder(vae, channels=32)
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "VQModel"}))
    with pytest.raises(UserError, match=r"vae: expected AutoencoderKL or AutoencoderDC, got 'VQModel'"):
        load_autoencoder(vae)
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match="vae: the folder cannot be loaded"):
        load_autoencoder(vae)


def test_a_library_that_needs_what_is_left_out_is_left_to_be_imported_whole(tmp_path, monkeypatch):
    (tmp_path / "modelopt.py").write_text("")
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "__init__.py").write_text("from . import part\nAutoencoderKL = AutoencoderDC = None\n")
    (tmp_path / "diffusers" / "part.py").write_text("import modelopt\n")
    monkeypatch.syspath_prepend(tmp_path)
    compiler = torch.compiler.disable
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
            del sys.modules[name]
        import_alone()
        assert "diffusers" not in sys.modules and "diffusers.part" not in sys.modules
        assert torch.compiler.disable is compiler
        import diffusers

        assert diffusers.__file__.startswith(str(tmp_path))


def test_a_channel_that_does_not_vary_and_data_that_was_not_measured_are_named(tmp_path):
    flat = {"channel_mean": [0.0, 1.0], "channel_std": [1.0, 0.0], "scale_factor": 1.0}
    for name, about in (("flat", flat), ("older", {"scale_factor": 1.0}), ("silent", {})):
        shards.pack(tmp_path / name, {"latents": np.zeros((2, 2, 4, 4), np.float16)}, **about)
    with pytest.raises(UserError, match="flat: latent.scale_factor measured: channel 1 is the same everywhere"):
        Latents(str(tmp_path / "flat"), "measured")
    with pytest.raises(UserError, match="older: latent.scale_factor measured: no channel was measured; extract again"):
        Latents(str(tmp_path / "older"), "measured")
    with pytest.raises(UserError, match="latent.scale_factor: expected a number, since .*silent says none"):
        Latents(str(tmp_path / "silent"))


@torch.no_grad()
@pytest.mark.parametrize("make", [small.kl, small.dc])
def test_the_captured_loop_decodes_with_either(make):
    vae = make()
    channels = vae.config.latent_channels
    decode = decoder(vae, Scaling(tuple(0.3 + 0.1 * i for i in range(channels)), 0.2), chunk=2)
    sampler = build_sampler(load_config("configs/h2_256.yaml", ["sample.steps=3"]))

    def network(x, t, y):
        return 0.1 * x + y.view(-1, 1, 1, 1)

    graphs, recorded = GraphSampler(network, decode, graphs=RecordedGraphs()), []
    for seed in range(2):
        x_T, y = torch.randn(3, channels, 8, 8), torch.arange(3) + seed
        recorded.append(graphs(sampler, x_T, {"y": y}))
        assert torch.equal(recorded[-1], decode(sampler(lambda x, t, y=y: network(x, t, y), x_T)))
    assert graphs.captures == 1 and not torch.equal(*recorded)
