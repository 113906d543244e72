"""Weights that a run starts from: what fits is taken, the rest replaced on demand only, and that is said and kept."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.training import tiny
from tests.training.test_trainer import with_network
from uvit_fast.build import build_model, build_objective
from uvit_fast.config import dump_config
from uvit_fast.model.uvit import UViT
from uvit_fast.provenance import UNKNOWN, Provenance
from uvit_fast.runtime.errors import UserError
from uvit_fast.training import checkpoint
from uvit_fast.training.initial import read_start
from uvit_fast.training.loader import Order, batches
from uvit_fast.training.trainer import Trainer


def config(init, *, p_uncond=0.2, replace=(), **model):
    cfg = tiny.config(init=str(init), init_replace=replace, p_uncond=p_uncond)
    return cfg.model_copy(update={"model": cfg.model.model_copy(update=model)})


def network(**model) -> UViT:
    """Of other values than a run's own: 4 x 4 images of one channel, patches of 2, three classes and the null label."""
    torch.manual_seed(7)
    size = dict(img_size=4, in_chans=1, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=4)
    net = UViT(**{**size, **model})
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
    return net


@pytest.fixture
def published(tmp_path):
    """A file of weights, and these."""
    state = network().state_dict()
    torch.save(state, tmp_path / "x.pth")
    return tmp_path / "x.pth", state


def start(cfg):
    """What a run of this config begins with, and what it would without."""
    return read_start(cfg, build_model(cfg), UNKNOWN), build_model(cfg).state_dict()


def test_the_published_weights_are_taken_as_they_are(published):
    file, state = published
    found, _ = start(config(file))
    assert found.weights.keys() == state.keys() and all(torch.equal(found.weights[name], state[name]) for name in state)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.record == {"file": str(file), "sha256": digest, "replaced": []}
    assert found.line == f"starts from {file} (SHA-256 {digest[:12]})"


@pytest.mark.parametrize(
    "names, p_uncond, kept",
    [(["label_emb"], 0.2, True), (["label_emb", "null_label"], 0.2, False), (["label_emb"], 0.0, False)],
)
def test_a_label_table_of_another_size_keeps_its_null_row(names, p_uncond, kept, published):
    """Unless that is named too, or the run has no null label."""
    file, state = published
    found, own = start(config(file, replace=names, p_uncond=p_uncond, num_classes=6))
    table, fresh = found.weights["label_emb.weight"], own["label_emb.weight"]
    assert torch.equal(table[:-1], fresh[:-1])
    assert torch.equal(table[-1], state["label_emb.weight"][-1] if kept else fresh[-1])
    assert torch.equal(found.weights["mid_block.mlp.fc1.weight"], state["mid_block.mlp.fc1.weight"])
    assert ("but for the null label" in found.line) == kept


def test_a_table_that_would_fit_is_replaced_where_its_classes_are_others(published):
    file, state = published
    found, own = start(config(file, replace="label_emb"))
    assert torch.equal(found.weights["label_emb.weight"][:3], own["label_emb.weight"][:3])


def test_positions_are_interpolated_and_keep_their_tokens(published):
    """A plane stays a plane. Without classes the token of the label goes, with a label to come it stays new."""
    file, state = published
    state["pos_embed"][:, 2:] = torch.tensor([1.0, 2.0, 1.0, 2.0]).view(1, 4, 1)
    torch.save(state, file)
    found, _ = start(config(file, replace=["pos_embed"], img_size=8))
    positions = found.weights["pos_embed"]
    assert torch.equal(positions[:, :2], state["pos_embed"][:, :2])
    row = positions[0, 2:, 0].view(4, 4)
    torch.testing.assert_close(row, row[:1].expand(4, 4))
    assert row[0, 0] < row[0, 1] < row[0, 2] < row[0, 3] and "from 2x2 to 4x4" in found.line

    found, _ = start(config(file, replace=["pos_embed", "label_emb"], p_uncond=0.0, num_classes=0))
    assert torch.equal(found.weights["pos_embed"], state["pos_embed"][:, 1:]) and "label_emb is left out" in found.line
    plain = network(num_classes=0).state_dict()
    torch.save(plain, file)
    found, own = start(config(file, replace=["pos_embed", "label_emb"]))
    assert torch.equal(found.weights["pos_embed"][:, 1:], plain["pos_embed"])
    assert torch.equal(found.weights["pos_embed"][:, 0], own["pos_embed"][:, 0])


@pytest.mark.parametrize(
    "model, names",
    [
        ({"num_classes": 6}, ["label_emb"]),
        ({"img_size": 8}, ["pos_embed"]),
        ({"in_chans": 3}, ["decoder_pred", "final_layer", "patch_embed"]),
        ({"conv": False}, ["final_layer"]),
        ({"mlp_time_embed": True}, ["time_embed"]),
        ({"img_size": 8, "num_classes": 9}, ["label_emb", "pos_embed"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_an_error_whose_key_allows_it(model, names, published):
    file, state = published
    cfg = config(file, **model)
    with pytest.raises(UserError, match="is of another architecture than the config") as error:
        start(cfg)
    hint = f"train.init_replace=[{','.join(names)}] would"
    assert hint in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=rf"train.init_replace=\[norm,{','.join(names)}\] would"):  # what is named stays
        start(config(file, replace=["norm"], **model))
    found, own = start(config(file, replace=names, **model))
    for name, value in found.weights.items():
        whole = name.partition(".")[0] in names
        expected = own[name] if whole else state[name]
        if name not in ("label_emb.weight", "pos_embed"):  # of which something is kept
            assert torch.equal(value, expected), name


@pytest.mark.parametrize("model", [{"embed_dim": 32}, {"depth": 4}], ids=str)
def test_another_network_is_no_matter_of_replacing(model, published):
    with pytest.raises(UserError, match="another architecture") as error:
        start(config(published[0], **model))
    assert "init_replace" not in str(error.value)


def test_mistakes_are_one_line(published, tmp_path):
    file, _ = published
    for cfg, words in (
        (config(tmp_path / "nothing.pth"), "train.init: .*nothing.pth: no such checkpoint file"),
        (config(tmp_path), "train.init: .*no EMA weights"),
        (config(file, replace=["lable_emb"]), "train.init_replace: expected some of decoder_pred, .*got lable_emb"),
        (config(file, replace=["null_label"], p_uncond=0.0), "train.init_replace: .*got null_label"),
    ):
        with pytest.raises(UserError, match=words) as error:
            start(cfg)
        assert "\n" not in str(error.value)


def test_what_was_otherwise_is_said(tmp_path):
    """Beside a run's weights stands how they were trained: heads are in no shape,
    and a label may mean another thing.
    """
    cfg = tiny.config()
    folder = tmp_path / "run" / "checkpoints"
    known = Provenance(("ant", "bee", "cat"))
    state = {"config": cfg.model_dump(mode="json"), "data": known.as_json()}
    checkpoint.write(folder, 3, {"model": {}, "ema": network().state_dict()}, state, keep=1)
    (tmp_path / "run" / "config.yaml").write_text(dump_config(cfg))
    new = config(tmp_path / "run", num_heads=4)
    found = read_start(new, build_model(new), Provenance(("bee", "cow")))
    assert "model.num_heads 2 there, 4 now" in found.line and "label 0 was ant, now bee" in found.line
    assert found.record["file"].endswith("step_00000003/ema.safetensors")
    new = config(tmp_path / "run", replace=["label_emb"], num_classes=3)
    assert "unlike" not in read_start(new, build_model(new), Provenance(("bee", "cow"))).line


def test_a_pipelines_folder_is_taken(tmp_path):
    """Of half precision, as such folders may be, and with what else it says of its network."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"num_heads": 8, "conv": True}))
    state = {name: value.half() for name, value in network().state_dict().items()}
    save_file(state, tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    found, _ = start(config(tmp_path))
    assert all(torch.equal(found.weights[name], value.float()) for name, value in state.items())
    assert "model.num_heads 8 there, 2 now" in found.line
    (tmp_path / "model" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, tmp_path / "model" / "diffusion_pytorch_model.bin")  # as of safe_serialization=False
    for folder in (tmp_path, tmp_path / "model"):
        assert torch.equal(start(config(folder))[0].weights["norm.weight"], state["norm.weight"].float())


def trained(run_dir, cfg, fresh=False):
    """Weights and averages at the beginning and at the end, the first step, what Adam has counted,
    and the first loss.
    """
    run = Trainer(cfg, build_model(cfg), build_objective(cfg), tiny.Points(), run_dir, fresh=fresh)
    first = [run.engine.weights(flat) for flat in (run.engine.partition, run.engine.ema.values)]
    begin = run.step, run.samples, run.engine.adam_step
    run.train()
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    return begin, *first, run.engine.weights(run.engine.partition), row["loss"]


def first_loss(cfg, state):
    """Of a plain network with these weights, on the whole of the first batch."""
    net = build_model(cfg)
    net.load_state_dict(state)
    net.micro_batch, data = cfg.train.batch_size, tiny.Points()
    raw = next(batches(data, Order(len(data), 0, net.micro_batch, 1, 0, 1, 0, 1), 0, torch.device("cpu")))
    plain = with_network(cfg, net, data)
    plain.objective = build_objective(cfg)
    return Trainer.loss(plain, raw, 0, 0).item()


WAYS = [(1, {"precision": "bf16"}), (2, {"zero_stage": 3}), (2, {"zero_stage": 3, "trainable": ["pos_embed"]})]


@pytest.mark.parametrize("ranks, settings", WAYS, ids=str)
def test_a_run_and_its_average_start_there_and_then_go_on_by_themselves(ranks, settings, published, tmp_path):
    """To the bit in the fp32 masters; continued, the run has weights of its own; `--fresh` starts from the file."""
    file, state = published
    cfg = tiny.config(iterations=2, warmup_steps=0, init=str(file), **settings)
    begin, weights, ema, after, loss = tiny.launch(trained, tmp_path / "run", cfg, ranks=ranks)
    assert begin == (0, 0, 0)
    assert loss == pytest.approx(first_loss(cfg, state), rel=1e-5 if ranks > 1 else 0.02)  # with the same weights
    for name, value in state.items():
        assert torch.equal(weights[name], value) and torch.equal(ema[name], value)
    assert not torch.equal(after["pos_embed"], state["pos_embed"])
    record = json.loads((tmp_path / "run" / "init.json").read_text())
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    if ranks > 1:
        return
    elsewhere = file.rename(tmp_path / "moved.pth")  # a run that continues does not look for it
    begin, weights, *_ = tiny.launch(trained, tmp_path / "run", cfg)
    assert begin[0] == 2 and torch.equal(weights["pos_embed"], after["pos_embed"])
    elsewhere.rename(file)
    begin, weights, *_ = tiny.launch(trained, tmp_path / "run", cfg, True)
    assert begin == (0, 0, 0) and torch.equal(weights["pos_embed"], state["pos_embed"])


@pytest.mark.parametrize(
    ("init", "words"),
    [
        (None, "90% of the initial weights: for samples, train longer"),
        ("x.pth", "90% of train.init's weights: for samples of these data, train longer"),  # which are good ones
    ],
)
def test_a_short_run_says_whose_weights_its_average_still_holds(init, words):
    said, config = [], tiny.config(iterations=10, ema_decay=0.99, init=init)
    engine, dataset = SimpleNamespace(bf16=False), SimpleNamespace(synthetic=False)
    run = SimpleNamespace(config=config, engine=engine, dataset=dataset, beginning=None, step=0, _say=said.append)
    Trainer._say_what_to_expect(run)
    assert len(said) == 1 and words in said[0]
