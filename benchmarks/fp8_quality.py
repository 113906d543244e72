"""What FP8 costs in quality: `python -m benchmarks.fp8_quality S H runs/digits64 runs/s2_fashion`

Networks are S, M, L, H with random weights, or runs, whose EMA weights are used. For each, compared with the network in
fp32:

- its error by time, in bf16 and in FP8, on `--images` noisy images (a run's training images, else random latents);
- by layer: the error if the products of one kind alone, or of one block alone, have e4m3 operands and all else is fp32.
  Errors of different layers are nearly independent: each costs its share of the sum of squares.

For a run also `--samples` samples for each of `--seeds` seeds, with the same labels and noise in bf16 and in FP8: with
the default settings, with all parts in e4m3, and with what each `--keep` keeps in bf16. Measured are their digits-fid
(a distance in the features of a small classifier trained on the real images, not an FID), the share that the classifier
assigns to the requested class, and two distances from the bf16 samples: in those features, and pixel by pixel. FP8 is
as good as bf16 where it differs by less than another seed does. `--pictures` shows the first ones.

Rows go to fp8_quality.csv. On a machine without the kernels, their arithmetic in PyTorch replaces them, and the device
column says so. `--set` overrides the configs, as data.path=DIR or sample.steps=50. Without networks it writes
docs/fp8.md's tables and plot from the committed rows.
"""

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.common import RESULTS, Rows
from benchmarks.fp8_page import DOCS, KINDS, LAYER_TIMES, PAGE, PLOT, TIMES, draw, page, provider_of
from benchmarks.results import Results
from uvit_fast import build_model
from uvit_fast.build import build_dataset, build_schedule
from uvit_fast.commands.arguments import config_of
from uvit_fast.config import FP8_KEEP, Config
from uvit_fast.diffusion.noise import Draws
from uvit_fast.evaluation.classifier import ClassifierFeatures
from uvit_fast.evaluation.features import extract
from uvit_fast.evaluation.metrics import Statistics, frechet_distance
from uvit_fast.evaluation.reference import default_cache
from uvit_fast.evaluation.sources import Images
from uvit_fast.kernels.layers import Linear, Norm
from uvit_fast.kernels.ops import fp8_block
from uvit_fast.kernels.quantise import narrow, quantise
from uvit_fast.measuring import yardstick
from uvit_fast.model.fp8 import Fp8UViT
from uvit_fast.model.uvit import Block, UViT
from uvit_fast.model.weights import load_weights, read_weights
from uvit_fast.runtime.device import pick_device
from uvit_fast.runtime.errors import in_one_line
from uvit_fast.sampling.captured import GraphSampler
from uvit_fast.sampling.conditions import chosen_labels, spread_labels
from uvit_fast.sampling.images import save_grid, to_uint8
from uvit_fast.sampling.loop import check_finite, sample
from uvit_fast.sampling.rounding import calibrate
from uvit_fast.sampling.weights import find_weights, provenance_of

SHOWN = 10  # classes, or images per row, in the pictures


class Network(NamedTuple):
    """A network in fp32, its name, and noisy inputs at a time: net(x_t, t, y)."""

    name: str
    cfg: Config
    net: UViT
    inputs: Callable[[float], tuple[Tensor, Tensor, Tensor | None]]


def random_network(size: str, images: int, device: torch.device, overrides: list[str]) -> Network:
    cfg = models.config(size, "eager", overrides=overrides)
    torch.manual_seed(0)
    with torch.device(device):
        net = build_model(cfg).eval().requires_grad_(False)
    x, _, y = models.images(cfg, images, device)
    return Network(f"{size}/2, random weights", cfg, net, _noising(cfg, x, y))


def trained_network(run: str, images: int, device: torch.device, overrides: list[str]) -> Network:
    """Return the EMA weights of a run's newest checkpoint, and its training images."""
    how = ["model.kernels=reference", "model.attention=sdpa", "sample.precision=bf16"]
    cfg = config_of(None, run, [*how, *overrides])
    weights = find_weights(run)
    provenance_of(cfg, weights)
    net = load_weights(build_model(cfg), read_weights(weights), source=str(weights))
    dataset, draws = build_dataset(cfg), Draws(torch.Generator(device).manual_seed(0))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:images]
    raw = dataset.__getitems__([(int(i), 0) for i in order])
    batch = dataset.finish({name: value.to(device) for name, value in raw.items()}, draws)
    steps = re.search(r"step_0*(\d+)", str(weights))
    name = f"{cfg.name}, {int(steps[1]):,} steps" if steps else cfg.name
    net = net.to(device).eval().requires_grad_(False)
    return Network(name, cfg, net, _noising(cfg, batch["x"], batch.get("y")))


def _noising(cfg: Config, x: Tensor, y: Tensor | None) -> Callable[[float], tuple[Tensor, Tensor, Tensor | None]]:
    schedule, noise = build_schedule(cfg), torch.randn_like(x)
    return lambda time: (*schedule.add_noise(x, noise, torch.full((len(x),), time, device=x.device)), y)


def in_bf16(cfg: Config, exact: UViT) -> UViT:
    """Return the network as it samples: in bf16, with the fused kernels if they run."""
    how = {"kernels": "auto", "attention": "auto"}
    with torch.device(exact.pos_embed.device):
        net = build_model(cfg.model_copy(update={"model": cfg.model.model_copy(update=how)}))
    net.load_state_dict(exact.state_dict())
    return net.to(torch.bfloat16).eval().requires_grad_(False)


def in_fp8(cfg: Config, net: UViT, keep: tuple[str, ...] = ()) -> Fp8UViT:
    """Return the same in FP8, except for what is kept: with its kernels, or, on other devices, their arithmetic."""
    elsewhere = fp8_block.why_not(1152, 16, 4608, net.pos_embed.device)
    found = Fp8UViT(net, fp8_block.REFERENCE if elsewhere else fp8_block.KERNELS, keep)
    calibrate(found, cfg.diffusion.schedule, cfg.diffusion.prediction)
    return found


class _Narrow(nn.Module):
    """Round x to e4m3."""

    def forward(self, x: Tensor) -> Tensor:
        return narrow(x).to(x.dtype)


class _NarrowNorm(nn.Module):
    """LayerNorm without gamma and beta, of x in e4m3, with the statistics of x itself."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (narrow(x).to(x.dtype) - mean) * (variance + self.eps).rsqrt()


def _quantised(layer: nn.Linear, norm: nn.LayerNorm | None = None) -> nn.Linear:
    """Return a layer with the values that its e4m3 weights represent, each rounded by itself, the norm folded in."""
    given = None if norm is None else Norm(norm.weight, norm.bias)
    values, (bias, step) = quantise(Linear(layer.weight, layer.bias), given)
    made = nn.Linear(layer.in_features, layer.out_features, device="meta")
    made.weight = nn.Parameter(values.float() * step[:, None], requires_grad=False)
    made.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return made


@contextlib.contextmanager
def narrowed(blocks: list[Block], kinds: set[str]) -> Iterator[None]:
    """While open, give some products of an fp32 network's blocks e4m3 operands."""
    before = []

    def put(parent: nn.Module, name: str, module: nn.Module) -> None:
        before.append((parent, name, getattr(parent, name)))
        setattr(parent, name, module)

    for block in blocks:
        for kind, norm, parent, name in (("qkv", "norm1", block.attn, "qkv"), ("fc1", "norm2", block.mlp, "fc1")):
            if kind in kinds:
                put(parent, name, _quantised(getattr(parent, name), getattr(block, norm)))
                put(block, norm, _NarrowNorm(getattr(block, norm).eps))
        for kind, parent, name in (
            ("proj", block.attn, "proj"), ("fc2", block.mlp, "fc2"), ("skip", block, "skip_linear"),
        ):  # fmt: skip
            if kind in kinds and getattr(parent, name) is not None:
                put(parent, name, nn.Sequential(_Narrow(), _quantised(getattr(parent, name))))
    try:
        yield
    finally:
        for parent, name, module in reversed(before):
            setattr(parent, name, module)


@torch.no_grad()
def errors(rows: Rows, given: Network) -> None:
    """Add rows of a network's error by time, by kind of product and by block."""
    name, cfg, net, inputs = given
    net.cuda_graphs = False  # its layers change from call to call
    exact = {time: net(*inputs(time)) for time in {*TIMES, *LAYER_TIMES}}
    wide = in_bf16(cfg, net)
    images = len(next(iter(exact.values())))
    kept = {provider_of(keep): in_fp8(cfg, wide, keep) for keep in ((), FP8_KEEP)}
    for provider, network in {"ours": wide, **kept}.items():
        common = {
            "metric": "error",
            "unit": "of_eps",
            "dtype": "bf16" if provider == "ours" else "fp8",
            "batch": images,
        }
        for time in TIMES:
            error = models.difference(network(*inputs(time)), exact[time])
            rows.add(f"{name}: t = {time:g}", provider, [error], **common)
    for block in net.blocks:
        block.__class__ = models.PublishedBlock  # it calls its layers
    kinds = [kind for kind in KINDS if kind != "skip" or any(block.skip_linear is not None for block in net.blocks)]
    parts = {f"{name}: {kind} alone": (net.blocks, {kind}) for kind in kinds}
    parts[f"{name}: first MLP alone"] = net.blocks[:1], {"fc1", "fc2"}
    parts |= {f"{name}: block {i + 1} alone": ([block], set(KINDS)) for i, block in enumerate(net.blocks)}
    for case, part in {**parts, f"{name}: all": (net.blocks, set(KINDS))}.items():
        with narrowed(*part):
            found = [models.difference(net(*inputs(time)), exact[time]) for time in LAYER_TIMES]
        mean = sum(found) / len(found)
        rows.add(case, "e4m3 in fp32", [mean], metric="error", unit="of_eps", dtype="fp8", batch=images)


class Samples(NamedTuple):
    """Images (N, H, W, C) uint8, their labels (N,), and their features."""

    images: np.ndarray
    statistics: Statistics
    accuracy: float  # by the classifier


class Drawing:
    """Draw one network's samples, with a captured loop if that runs."""

    def __init__(self, net: nn.Module, cfg: Config, labels: Tensor, batch: int, features: ClassifierFeatures):
        self.net, self.cfg, self.labels, self.batch, self.features = net, cfg, labels, batch, features
        self.graphs = GraphSampler(net) if next(net.parameters()).is_cuda else None

    def samples(self, seed: int) -> Samples:
        how = {"labels": self.labels, "seed": seed, "batch": self.batch, "graphs": self.graphs}
        batches = sample(self.net, self.cfg, len(self.labels), **how)
        images = np.concatenate([to_uint8(check_finite(x, f"samples of seed {seed}")) for x in batches])
        source = Images(f"seed {seed}", len(images), lambda parts: (images[part.start : part.stop] for part in parts))
        found = extract(source, self.features, self.batch, progress=False)
        seen = torch.cat([self.features.probabilities(rows).argmax(1).cpu() for rows in found.pool.split(1000)])
        return Samples(images, found.pool_statistics, (seen == self.labels).double().mean().item())


def quality(rows: Rows, given: Network, run: str, args: argparse.Namespace) -> None:
    """Add rows of a run's samples, and draw the picture of the first ones."""
    name, cfg, net, _ = given
    device = net.pos_embed.device
    features, real = yardstick("digits-fid", cfg, cfg.name, (None, False), device, Path(args.cache))
    classes = chosen_labels(None, cfg, provenance_of(cfg, find_weights(run)))
    labels = spread_labels(args.samples, classes)[
        torch.randperm(args.samples, generator=torch.Generator().manual_seed(0))
    ]
    wide = in_bf16(cfg, net)
    networks = {"ours": wide} | {provider_of(keep): in_fp8(cfg, wide, keep) for keep in args.keep}
    found: dict[tuple[str, int], Samples] = {}
    for provider, network in networks.items():
        drawing = Drawing(network, cfg, labels, args.batch, features)
        for seed in range(args.seeds):
            mine = drawing.samples(seed)
            first = found.get(("ours", seed if provider != "ours" else 0))
            figures = {
                "digits-fid": frechet_distance(mine.statistics, real.pool_statistics),
                "class_accuracy": mine.accuracy,
            }
            if first is not None:
                pixels = (mine.images.astype(np.float32) - first.images) / 127.5
                figures["digits-fid to bf16"] = frechet_distance(mine.statistics, first.statistics)
                figures["pixels from bf16"] = float(np.sqrt(np.square(pixels).mean()))
            if provider == "ours" or seed == 0:
                found[provider, seed] = mine
            for metric, value in figures.items():
                common = {
                    "metric": metric,
                    "unit": "-",
                    "batch": args.samples,
                    "dtype": "fp8" if provider != "ours" else "bf16",
                }
                rows.add(f"{name}: samples, seed {seed}", provider, [value], **common)
        rows.write()
    picture(args.pictures / f"fp8_{cfg.name}.png", labels, found)


def picture(path: Path, labels: Tensor, found: dict[tuple[str, int], Samples]) -> None:
    """Draw the first samples of each class: a row of bf16, below it FP8 of the same noise, then another seed."""
    shown = {"bf16": ("ours", 0), "FP8": (provider_of(FP8_KEEP), 0), "seed 1": ("ours", 1)}
    shown = {says: key for says, key in shown.items() if key in found}
    columns = [int(i) for label in labels.unique()[:SHOWN] for i in torch.nonzero(labels == label)[:2, 0]]
    images = np.concatenate([found[key].images[columns] for key in shown.values()])
    save_grid(images, path, len(columns), [*shown])
    print(f"wrote {path}", flush=True)


@in_one_line()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="S, M, L, H, or run folders; none: write docs/fp8.md anew")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the configs")
    parser.add_argument("--images", type=int, default=32, help="noisy images on which errors are measured")
    parser.add_argument("--samples", type=int, default=10_000, help="of a run; 0: errors only")
    parser.add_argument("--seeds", type=int, default=3, help="of the samples")
    parser.add_argument(
        "--keep",
        action="append",
        metavar="LIST",
        help="FP8 that keeps these in bf16, comma-separated; repeat for another",
    )
    parser.add_argument("--batch", type=int, default=500, help="samples at a time")
    parser.add_argument("--cache", default=default_cache(), help="folder of the classifiers and statistics")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", default=RESULTS, help="folder of fp8_quality.csv")
    parser.add_argument("--pictures", type=Path, default=DOCS, help="folder of fp8_<run>.png")
    args = parser.parse_args(argv)
    lists = [tuple(filter(None, names.split(","))) for names in args.keep or []]
    args.keep = list(dict.fromkeys([FP8_KEEP, (), *lists]))
    if not args.networks:
        PAGE.write_text(page())
        if (results := Results(RESULTS)).rows.get("fp8_quality"):
            draw(results, PLOT)
        return
    device, rows = pick_device(args.device), Rows("fp8_quality", args.out)
    for name in args.networks:
        made = random_network if name in models.CONFIGS else trained_network
        given = made(name, args.images, device, args.set)
        if made is trained_network and args.samples:
            quality(rows, given, name, args)
        errors(rows, given)
        print(rows.write(), flush=True)


if __name__ == "__main__":
    main()
