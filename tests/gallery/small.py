"""A session of a small digits model with random weights, in a run's folder."""

import torch

from uvit_fast import build_model, load_config
from uvit_fast.config import dump_config
from uvit_fast.gallery.session import Session
from uvit_fast.training import checkpoint as checkpoints

SMALL = ["model.embed_dim=32", "model.depth=2", "sample.steps=12"]
CPU = "cpu"


def save_run(folder, *more):
    """What training leaves of a model whose layers at the end, which begin at zero, are random too."""
    cfg = load_config("configs/digits_eps.yaml", [*SMALL, *more])
    torch.manual_seed(len(folder.name))
    weights = {k: v + 0.05 * torch.randn_like(v) for k, v in build_model(cfg).state_dict().items()}
    state = {"config": cfg.model_dump(mode="json")}
    checkpoints.write(folder / "checkpoints", 10, {"model": weights, "ema": weights, "exp_avg": weights}, state, keep=9)
    (folder / "config.yaml").write_text(dump_config(cfg))
    return cfg, folder


def session(tmp_path, **options):
    """Of the checkpoints "a" and "other", of the same shapes, other weights and a config of 9 steps."""
    other = save_run(tmp_path / "other", "sample.steps=9")
    return Session({"a": save_run(tmp_path / "a"), "other": other}, CPU, **options)
