"""Deterministic guards of speed and memory, for a machine without a GPU: launches, bytes kept for the backward, waits
of the host.

    python -m benchmarks.guards            # the current figures, beside the baseline
    python -m benchmarks.guards --write    # make them the baseline; the diff shows what changed

The networks are those of the configs at batch 128, on the meta device, taking an H100's paths (see counting.py). The
training step is the real trainer's with its DeepSpeed engine, on the CPU, in bf16.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.counting import Counts, hopper
from uvit_fast import build_model, build_sampler, load_config
from uvit_fast.build import build_objective
from uvit_fast.config import Config
from uvit_fast.diffusion.guidance import Guidance

BASELINE = Path(__file__).parent / "baselines" / "guards.json"
BATCH, EVALUATIONS, STEPS = 128, 5, 3
CONFIGS = ["h2_256", "s2_coco"]  # labels and guidance, heads of 72; text, 334 tokens, a final convolution
SAMPLED = [*CONFIGS, "usit_h_512"]  # patches of one latent pixel, Heun's steps on a flow
Figures = dict[str, Any]  # figure -> number, or kernel -> number


def network(name: str, checkpointing: str = "none") -> tuple[Config, torch.nn.Module, tuple[Tensor, Tensor], dict]:
    """Return a config, its network in bf16 without memory, its inputs (x, t), and its condition."""
    cfg = load_config(name, [f"model.activation_checkpointing={checkpointing}"])
    m = cfg.model
    with torch.device("meta"):
        net = build_model(cfg).to(torch.bfloat16)
        inputs = torch.empty(BATCH, m.in_chans, m.img_size, m.img_size), torch.empty(BATCH)
        if m.context_dim:
            return cfg, net, inputs, {"context": torch.empty(BATCH, m.context_tokens, m.context_dim)}
        return cfg, net, inputs, {"y": torch.empty(BATCH, dtype=torch.long)}


def forward(name: str) -> Figures:
    """Count one evaluation of the network, as in sampling."""
    _, net, inputs, condition = network(name)
    with Counts() as counts, hopper(counts), torch.no_grad():
        net(*inputs, **condition)
    return _figures(counts)


def forward_backward(name: str, checkpointing: str) -> Figures:
    """Count the loss of a training step and its gradients, and the bytes that wait for the backward."""
    cfg, net, (x, u), condition = network(name, checkpointing)
    objective, noise = build_objective(cfg), torch.empty_like(x)
    objective(x, noise, u)  # makes its tables, once, before the first step
    with Counts() as counts, hopper(counts):
        loss = objective.loss(net, x, noise, u, **condition)
        saved = counts.alive()
        loss.backward()
    return _figures(counts) | {"saved_bytes": saved}


def sampling(name: str) -> Figures:
    """Count the guided sampling loop."""
    cfg, net, (x, _), condition = network(name)
    null = {name: torch.empty(value.shape[1:], dtype=value.dtype, device="meta") for name, value in condition.items()}
    with hopper():
        sampler, guidance = build_sampler(cfg, EVALUATIONS), Guidance(net, condition, null, 0.4)
        sampler.tables(x.device)  # made once, before the loop
    with Counts() as counts, hopper(counts), torch.no_grad():
        sampler(guidance, x)
    return _figures(counts)


def training_step(plant: Callable[[ExitStack], None] | None = None) -> Figures:
    """Count the third step of the digits' trainer, in a process of its own: the engine and its process group are
    global.

    Args:
        plant: called in that process before the step, to introduce a fault.
    """
    context = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_training_step, plant).result()


def _training_step(plant: Callable[[ExitStack], None] | None) -> Figures:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)

    from uvit_fast.build import build_dataset
    from uvit_fast.training.deepspeed_adapter import accelerator
    from uvit_fast.training.trainer import Trainer

    overrides = ["device=cpu", "train.precision=bf16", "data.name=synthetic", f"train.iterations={STEPS}"]
    cfg = load_config("digits_eps", [*overrides, "train.log_every=1000", "train.batch_size=4"])
    seen: list[Counts] = []
    plain_step = Trainer._step

    def step(trainer: Trainer, stream: Any) -> None:
        batch = next(stream)  # reading data is the host's own work
        with Counts() as counts, ExitStack() as stack:
            device = type(accelerator())
            stack.enter_context(mock.patch.object(device, "synchronize", lambda *_: counts.wait("synchronize")))
            plain_step(trainer, iter([batch]))
        seen.append(counts)

    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        stack.enter_context(mock.patch.object(Trainer, "_step", step))
        stack.enter_context(mock.patch.object(Trainer, "_save", lambda self: None))
        if plant:
            plant(stack)
        Trainer(cfg, build_model(cfg), build_objective(cfg), build_dataset(cfg), Path(folder)).train()
    return _figures(seen[-1])


CASES: dict[str, Callable[[], Figures]] = {
    **{f"{name} forward": lambda name=name: forward(name) for name in SAMPLED},
    **{
        f"{name} forward and backward, checkpointing {policy}": lambda name=name, policy=policy: forward_backward(
            name, policy
        )
        for name in CONFIGS
        for policy in ("none", "selective", "block")
    },
    **{f"{name} sampling, {EVALUATIONS} guided evaluations": lambda name=name: sampling(name) for name in SAMPLED},
    "digits training step": training_step,
}


def complaints(case: str, was: Figures, now: Figures, same_versions: bool = True) -> list[str]:
    """Return what got worse, one sentence each; nothing if a case is as good as its baseline or better.

    Args:
        same_versions: of PyTorch and everything else that counts; if they differ, launches may too, and only the limits
            hold.
    """
    found = []
    if now["waits"]:
        places = "; ".join(f"{place} ({number} times)" for place, number in now["waits"].items())
        found.append(f"{case}: the host waits for the device at {places}")
    if now.get("saved_bytes", 0) > was.get("saved_bytes", 0):
        sizes = f"{was['saved_bytes']:,}, now {now['saved_bytes']:,}"
        found.append(f"{case}: bytes kept for the backward: was {sizes}")
    if same_versions and now["launches"] > was["launches"]:
        names = sorted(was["kernels"].keys() | now["kernels"].keys())
        pairs = {name: (was["kernels"].get(name, 0), now["kernels"].get(name, 0)) for name in names}
        changed = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in pairs.items() if a != b)
        found.append(f"{case}: launches: was {was['launches']}, now {now['launches']} ({changed})")
    return found


def read_baseline() -> Figures:
    return json.loads(BASELINE.read_text())


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("torch", "triton", "deepspeed")}


def _figures(counts: Counts) -> Figures:
    kernels: Counter[str] = counts.launches
    figures = {"launches": kernels.total(), "kernels": dict(sorted(kernels.items())), "waits": dict(counts.waits)}
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {BASELINE.name} instead of comparing with it")
    args = parser.parse_args()
    baseline = {} if args.write else read_baseline()
    found, bad = {"versions": versions()}, []
    for case, count in CASES.items():
        found[case] = now = count()
        kept = f", {now['saved_bytes'] / 1e9:.2f} GB kept" if "saved_bytes" in now else ""
        print(f"{case:56s} {now['launches']:5d} launches{kept}, {sum(now['waits'].values())} waits", flush=True)
        if not args.write:
            bad += complaints(case, baseline[case], now, baseline["versions"] == versions())
    if args.write:
        BASELINE.parent.mkdir(exist_ok=True)
        BASELINE.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(bad))
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
