"""A small checkpoint of the digits, and the command that samples from it."""

from uvit_fast import build_model, cli, load_config
from uvit_fast.training import checkpoint as checkpoints

DIGITS = "configs/digits_eps.yaml"
SMALL = ["--set", "model.embed_dim=32", "--set", "model.depth=2"]


def save_checkpoint(folder, step):
    """A checkpoint of the small digits model with random weights, as training writes it."""
    cfg = load_config(DIGITS, SMALL[1::2])
    weights, state = build_model(cfg).state_dict(), {"config": cfg.model_dump(mode="json")}
    checkpoints.write(folder, step, {"model": weights, "ema": weights, "exp_avg": weights}, state, keep=9)
    return folder / f"step_{step:08d}"


def sample(checkpoint, out, *more):
    return cli.main(["sample", "--config", DIGITS, *SMALL, "--checkpoint", str(checkpoint), "--out", str(out), *more])
