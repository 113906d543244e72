"""Published checkpoints load unchanged, and what does not fit is named."""

import argparse
import contextlib
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.model.test_uvit import tiny
from uvit_fast import build_model, load_config
from uvit_fast.model.weights import load_weights, read_weights
from uvit_fast.runtime.errors import UserError


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_round_trip(tmp_path, suffix):
    state, path = tiny(num_classes=3).state_dict(), tmp_path / f"model{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    model = tiny(num_classes=3)
    torch.nn.init.zeros_(model.pos_embed)
    load_weights(model, read_weights(path))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_network_without_initial_values_takes_the_files(tmp_path):
    """Copies, which outlive the file; in the network's dtype."""
    cfg = load_config("configs/digits.yaml", ["model.embed_dim=32", "model.depth=2", "model.num_heads=1"])
    wanted, path = build_model(cfg), tmp_path / "model.safetensors"
    save_file({key: value.half().clone() for key, value in wanted.state_dict().items()}, path)
    with torch.device("meta"):
        model = build_model(cfg)
    assert all(p.is_meta for p in model.parameters()) and model.state_dict().keys() == wanted.state_dict().keys()
    load_weights(model, read_weights(path))
    path.write_bytes(bytes(path.stat().st_size))
    for key, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, wanted.state_dict()[key].half().float())
    assert all(p.requires_grad for p in model.parameters())


def test_missing_extra_and_misshapen_keys_are_all_named():
    state = tiny(num_classes=3).state_dict()
    del state["norm.weight"]
    state["surplus"] = torch.zeros(1)
    state["mid_block.mlp.fc1.weight"] = torch.zeros(2, 2)
    with pytest.raises(UserError) as error:
        load_weights(tiny(num_classes=3), state, source="x.pth")
    for words in (
        "x.pth",
        "1 missing (norm.weight)",
        "1 extra (surplus)",
        "fc1.weight: expected (128, 32), got (2, 2)",
    ):
        assert words in str(error.value)


def test_another_image_size_interpolates_the_patches_and_says_so():
    """A plane in the position embedding stays a plane; the extra tokens stay as they are."""
    old, new = tiny(img_size=16, num_classes=3), tiny(img_size=32, num_classes=3)
    state = old.state_dict()
    ramp = torch.arange(8.0).repeat(8, 1).reshape(1, 64, 1).expand(1, 64, 32)
    state["pos_embed"] = torch.cat([torch.full((1, 2, 32), 7.0), ramp], 1)
    with pytest.warns(UserWarning, match="interpolated from 8x8 to 16x16"):
        load_weights(new, state)
    assert torch.equal(new.pos_embed[:, :2], torch.full((1, 2, 32), 7.0))
    row = new.pos_embed[0, 2:, 0].view(16, 16)
    torch.testing.assert_close(row, row[:1].expand(16, 16))  # still constant down a column
    torch.testing.assert_close(row[0, 7:9].mean(), torch.tensor(3.5))  # and centred where it was


@pytest.mark.parametrize("context", [8, 100])
def test_a_checkpoint_of_another_condition_is_named_so(context):
    """More extra tokens than the checkpoint has tokens, or as many as leave no square."""
    state = tiny(num_classes=3).state_dict()
    with pytest.raises(UserError, match=r"another architecture.*context_embed"):
        load_weights(tiny(context_dim=4, context_tokens=context), state)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04truncated"])
def test_unreadable_files_are_one_line(tmp_path, content):
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="not a readable checkpoint") as error:
            read_weights(tmp_path / name)
        assert "\n" not in str(error.value)


def test_missing_file_and_foreign_content_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        read_weights(tmp_path / "nothing.pth")
    torch.save({"step": 3}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="expected a state dict of tensors"):
        read_weights(tmp_path / "x.pth")


class RunsCode:
    def __reduce__(self):
        return os.mkdir, (os.environ["PROOF"],)


def numbered(value: float, **also) -> dict:
    """A network's state dict that can be told from others by its `norm.bias`."""
    state = tiny(num_classes=3).state_dict()
    return {**state, "norm.bias": torch.full_like(state["norm.bias"], value), **also}


def before(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


MOMENTS = {"state": {0: {"exp_avg": torch.zeros(2), "step": torch.zeros(())}}, "param_groups": [{"lr": 1.0}]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": numbered(7)}, "holds model; the weights taken are model"),
        ({"state_dict": numbered(1), "ema": numbered(7), "step": 3}, "holds state_dict; ema; step; .* taken are ema"),
        (  # DiT's
            {"args": argparse.Namespace(lr=1), "opt": MOMENTS, "model": numbered(1), "ema": numbered(7)},
            "holds args; opt; model; ema; the weights taken are ema",
        ),
        (  # of DC-AE's trainer, several averages
            {"ema": {0.999: before("uvit.", numbered(1)), 0.9999: before("uvit.", numbered(7))}},
            "the weights taken are ema.0.9999",
        ),
        ({"ema_0.99": numbered(1), "ema_0.9999": numbered(7)}, "the weights taken are ema_0.9999"),
        ({"model": {"net": numbered(1), "ema_net": before("module.", numbered(7)), "n": 3}}, "are model.ema_net"),
        (
            {"model": numbered(7), "fid": np.float64(2.5), "rng": np.random.get_state(), "args": {"out": Path("runs")}},
            "holds model; fid; rng; args; the weights taken are model",
        ),
        ({"optimizer": {"exp_avg": numbered(1)}, "weights": numbered(7)}, "holds optimizer; weights; .* are weights"),
        ({**numbered(7), "epoch": 3}, "the weights taken are what is not within another"),
    ],
)
def test_checkpoints_as_others_save_them_are_taken_and_described(tmp_path, content, said):
    torch.save(content, tmp_path / "x.pt")
    with pytest.warns(UserWarning, match=said):
        state = read_weights(tmp_path / "x.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prefixes, the next test's
        assert load_weights(tiny(num_classes=3), state).norm.bias[0] == 7


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (before("module.", numbered(7)), "x.pth: names begin with 'module.', which is dropped$"),
        (before("_orig_mod.", numbered(7)), None),
        (before("0.", numbered(7)), "names begin with '0.'"),
        (
            before("module._orig_mod.", numbered(7)) | {"n_averaged": torch.ones(1)},
            "what else there is .n_averaged. is left out",
        ),
        (before("model.", numbered(1)) | before("model_ema.", numbered(7)), "begin with 'model_ema.'.*model.pos_embed"),
        (  # latent diffusion's, whose EMA keeps names without dots
            before("model.diffusion_model.", numbered(1))
            | {"model_ema." + f"diffusion_model{k}".replace(".", ""): v for k, v in numbered(7).items()}
            | {"model_ema.decay": torch.ones(()), "betas": torch.ones(3)},
            "begin with 'model_ema.diffusion_model.'",
        ),
        (numbered(7) | before("teacher.", numbered(1)), None),
        ({key.replace("in_blocks.0.", "in_blocks.0._orig_mod."): value for key, value in numbered(7).items()}, None),
    ],
)
def test_prefixes_that_wrappers_leave_are_dropped_and_named(state, said):
    model = tiny(num_classes=3)
    if "teacher.norm.bias" in state:  # nothing says which was meant, but that the names alone are ours
        with pytest.raises(UserError, match="extra .teacher"):
            load_weights(model, state)
        return
    with pytest.warns(UserWarning, match=said) if said else contextlib.nullcontext():
        assert load_weights(model, state, "x.pth").norm.bias[0] == 7


def test_dc_aes_checkpoint_beside_its_autoencoder_loads(tmp_path):
    """DCAE_Diffusion_HF: one file of `autoencoder.` and `diffusion_model.`, whose label table is a module's."""
    state = before("diffusion_model.", numbered(7))
    state["diffusion_model.label_emb.embedding_table.weight"] = state.pop("diffusion_model.label_emb.weight")
    save_file(state | {"autoencoder.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    model = tiny(num_classes=3)
    with pytest.warns(UserWarning, match="'diffusion_model.', .*what else there is .autoencoder.norm.weight. is left"):
        load_weights(model, read_weights(tmp_path / "model.safetensors"))
    assert model.norm.bias[0] == 7
    assert torch.equal(model.label_emb.weight, state["diffusion_model.label_emb.embedding_table.weight"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: {"optimizer": MOMENTS, "step": 1}, "expected a state dict of tensors, got a dict of optimizer; step"),
        (dict, "expected a state dict of tensors, got a dict of nothing"),
        (lambda: [torch.zeros(1)], "expected a state dict of tensors, got list"),
        (tiny, "holds uvit_fast.model.uvit.UViT, a Python object that is not loaded since it could run code"),
        (lambda: {"model": numbered(7), "more": RunsCode()}, "holds posix.mkdir, a Python object"),
    ],
)
def test_what_holds_no_weights_or_could_run_code_is_refused(tmp_path, content, words, monkeypatch):
    """What the file holds and what to do; nothing in it is run, whichever way it was written."""
    monkeypatch.setenv("PROOF", str(tmp_path / "ran"))
    for zipped in (True, False):
        torch.save(content(), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=words) as error:
            read_weights(tmp_path / "x.pt")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PROOF", str(tmp_path / "ran"))
    (tmp_path / "x.pth").write_bytes(pickle.dumps(RunsCode()))
    with pytest.raises(UserError, match="expected a state dict"):
        read_weights(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(value):
    state = tiny().state_dict()
    state["norm.weight"] = state["norm.weight"].clone()
    state["norm.weight"][3] = value
    with pytest.raises(UserError, match=r"1 of \d+ tensors are with NaN or infinity \(norm.weight\)"):
        load_weights(tiny(), state)
    load_weights(tiny(), {**state, "norm.weight": torch.ones(32).to(torch.float8_e5m2)})  # has no extremes of its own
    for odd, what in (
        (torch.ones(32, dtype=torch.int8), "of whole or complex numbers"),
        (torch.ones(32, dtype=torch.complex64), "of whole or complex numbers"),
        (torch.ones(32).to_sparse(), "without values"),
        (torch.ones(32, device="meta"), "without values"),
    ):
        with pytest.raises(UserError, match=f"1 of .* tensors are {what}"):
            load_weights(tiny(), {**state, "norm.weight": odd})
