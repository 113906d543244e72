"""KL's decoder without diffusers: the same pixels from the same files; what it does not know is left to diffusers."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import autoencoders as small
from uvit_fast.config import load_config
from uvit_fast.data import kl_decoder
from uvit_fast.data.autoencoders import load_autoencoder, load_decoder, vae_identity
from uvit_fast.provenance import Provenance
from uvit_fast.runtime.errors import UserError

CPU = torch.device("cpu")
LEVELS = {"block_out_channels": (4, 8, 8), "layers_per_block": 2}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
LIKE_FLUX = {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
}


def config_of(name, *overrides):
    size = ["model.img_size=8", "latent.scale_factor=null"]
    return load_config("configs/h2_256.yaml", [*size, f"latent.autoencoder={name}", *overrides])


def rewrite(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "options", [{}, LEVELS | BLOCKS, LIKE_FLUX | {"latent_channels": 16}], ids=["sd", "deep", "flux"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_pixels_are_diffusers_own(options, dtype, tmp_path):
    small.saved(small.kl(**options), tmp_path)
    config, file = kl_decoder.find(str(tmp_path))
    ours = kl_decoder.load(config, kl_decoder.read(file), "it", CPU, dtype)
    theirs = load_autoencoder(str(tmp_path)).to(dtype)
    z = torch.randn(3, config["latent_channels"], 6, 4).to(dtype)
    with torch.inference_mode():
        assert torch.equal(ours(z), theirs.decode(z).sample)


def test_the_oldest_files_have_other_names_and_the_same_identity(tmp_path):
    vae = small.kl()
    small.saved(vae, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    pairs = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    old = {key: value.clone() for key, value in state.items()}
    for now, then in pairs.items():
        old = {key.replace(f".{now}.", f".{then}."): value for key, value in old.items()}
    assert old.keys() != state.keys()
    save_file(old, file, {"format": "pt"})
    decode = load_decoder(config_of(tmp_path), CPU, Provenance(encoders={"vae": vae_identity(vae, "it")}))
    z = torch.randn(2, 4, 8, 8)
    pixels = vae.decode(z / vae.config.scaling_factor).sample
    torch.testing.assert_close(decode(z), pixels, rtol=1e-4, atol=1e-4)


def test_no_other_latents_and_no_damaged_weights_are_decoded(tmp_path):
    known = Provenance(encoders={"vae": vae_identity(small.kl(), "one")})
    another = small.kl()
    another.encoder.conv_in.bias += 1
    name = small.saved(another, tmp_path / "vae")
    with pytest.raises(UserError, match="not the one that made the latents"):
        load_decoder(config_of(name), CPU, known)
    with pytest.raises(UserError, match="makes latents of 4 channels; expected 8, as model.in_chans says"):
        load_decoder(config_of(name, "model.in_chans=8"), CPU)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = {key: value.clone() for key, value in load_file(file).items()}
    bias = state.pop("decoder.conv_out.bias")
    save_file(state, file)
    with pytest.raises(UserError, match=r"1 missing \(decoder.conv_out.bias\)"):
        load_decoder(config_of(name), CPU)
    save_file(state | {"decoder.conv_out.bias": bias * torch.nan}, file)
    with pytest.raises(UserError, match="NaN or infinity"):
        load_decoder(config_of(name), CPU)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="^autoencoder .*: the folder cannot be loaded"):
        load_decoder(config_of(name), CPU)


@pytest.mark.parametrize(
    "values",
    [
        {"act_fn": "gelu"},
        {"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]},
        {"a_later_setting": True},
        {"_class_name": "AutoencoderDC"},
        {"norm_num_groups": 3},
        {"norm_num_groups": 0},
        {"block_out_channels": None},
        {"block_out_channels": [], "up_block_types": []},
        {"up_block_types": None},
        {"layers_per_block": "1"},
    ],
    ids=str,
)
def test_what_it_does_not_know_is_left_to_diffusers(values, tmp_path):
    small.saved(small.kl(), tmp_path)
    assert kl_decoder.find(str(tmp_path)) is not None
    rewrite(tmp_path, **values)
    assert kl_decoder.find(str(tmp_path)) is None


def test_what_was_fetched_from_the_hub_or_is_a_pipelines_is_found(tmp_path, monkeypatch):
    fetched = tmp_path / "models--owner--name" / "snapshots" / "1"
    small.saved(small.kl(), fetched / "vae")
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert kl_decoder.find("owner/name//vae/") == kl_decoder.find("owner/name/vae")
    assert kl_decoder.find("owner/name/vae")[1].parent == fetched / "vae" == kl_decoder.find(str(fetched))[1].parent
    for name in (
        "owner/name",
        "owner/name/../vae",
        "/",
        "owner/another/vae",
        "name",
        "no such/folder/of a/name",
        "/nowhere/vae",
    ):
        assert kl_decoder.find(name) is None


def test_nothing_of_diffusers_is_imported(tmp_path, pytestconfig):
    """It brings torch's compiler, transformers and scipy, which take longer than the first image."""
    name = small.saved(small.kl(), tmp_path)
    program = f"""
import sys, torch
from uvit_fast.config import load_config
from uvit_fast.data.autoencoders import load_decoder
from uvit_fast.sampling import captured, jobs, loop, output, weights
load_decoder(load_config("h2_256", ["latent.autoencoder={name}"]), torch.device("cpu"))
print(sorted({{"diffusers", "transformers", "scipy", "torch._dynamo", "sympy"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=pytestconfig.rootpath)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
