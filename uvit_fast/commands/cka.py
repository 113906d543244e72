"""`uvit-fast cka`: the similarity of representations after the blocks of a network (paper, Appendix E)."""

import argparse
import math
from collections import Counter
from pathlib import Path

from uvit_fast.commands.arguments import config_of, number, positive, set_argument, with_precision
from uvit_fast.commands.drawing import pyplot, save
from uvit_fast.config import Config, ModelConfig
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import read_table, write_table

HELP = "compare the representations after the blocks (CKA)"
EXAMPLE = "uvit-fast cka --checkpoint runs/sweep_digits/base runs/sweep_digits/skip-add --out digits_cka"
COLUMNS = ["checkpoint", "data", "skip", "block", "other_block", "cka"]


def arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("networks")
    group.add_argument("--checkpoint", nargs="+", metavar="PATH", help="run folders or weight files, one per matrix")
    group.add_argument("--config", metavar="NAME", help="of weight files, by name or file; run folders have their own")
    set_argument(group, "override, as data.path=data/fashion")
    group = command.add_argument_group("what they see")
    group.add_argument("--time", type=number, default=0.5, metavar="T", help="of the noise, from 0 to 1 (default 0.5)")
    group.add_argument("--images", type=positive, default=1024, metavar="N", help="as in training (default 1024)")
    group.add_argument("--batch", type=positive, default=128, metavar="N", help="images per minibatch (default 128)")
    group = command.add_argument_group("output")
    group.add_argument("--out", type=Path, required=True, metavar="NAME", help="writes <NAME>.csv and <NAME>.png")
    group.add_argument("--draw", action="store_true", help="only redraw what <NAME>.csv holds")


def run(args: argparse.Namespace) -> None:
    """Compute the matrices for the EMA weights on the config's training data, and draw them side by side."""
    table, picture = args.out.with_suffix(".csv"), args.out.with_suffix(".png")
    if not args.draw:
        if not args.checkpoint:
            raise UserError("cka: expected --checkpoint, or --draw and an <out>.csv")
        if not 0 < args.time <= 1:
            raise UserError(f"--time: expected a number above 0, up to 1, got {args.time}")
        if args.batch < 4 or args.images < args.batch:
            raise UserError(f"--batch: expected 4 to {args.images}, the --images, got {args.batch}")
        overrides = with_precision(args.set, "bf16")  # its blocks' outputs are read
        configs = [config_of(args.config, checkpoint, overrides) for checkpoint in args.checkpoint]
        pyplot()  # fails before the matrices, rather than after, if matplotlib is missing
        table.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for pair in zip(args.checkpoint, configs) for row in _matrix(args, *pair)]
        write_table(table, COLUMNS, rows)
    if not table.is_file():
        raise UserError(f"{table}: no such file; expected what `uvit-fast cka` without --draw writes")
    rows = read_table(table, COLUMNS, "uvit-fast cka", lambda row: float(row["cka"]))
    sizes = Counter((row["checkpoint"], row["skip"]) for row in rows)
    if wrong := [name for (name, _), size in sizes.items() if math.isqrt(size) ** 2 != size]:
        raise UserError(f"{table}: expected every block beside every other, got some only of {wrong[0]}")
    draw(rows, picture, args.time)
    print(f"wrote {table} and {picture}")


def _matrix(args: argparse.Namespace, checkpoint: str, cfg: Config) -> list[dict]:
    """Return the rows of one checkpoint. A representation is all tokens after a block, one vector per image."""
    import torch

    from uvit_fast.build import build_dataset, build_schedule
    from uvit_fast.diffusion.noise import Draws
    from uvit_fast.evaluation.cka import linear_cka
    from uvit_fast.model.uvit import UViT
    from uvit_fast.runtime.device import pick_device
    from uvit_fast.sampling.weights import load_for_sampling

    if not isinstance(cfg.model, ModelConfig):
        raise UserError(f"cka: expected a U-ViT, whose blocks are compared, got {cfg.name}, a U-Net")
    device = pick_device(cfg.device)
    model = load_for_sampling(cfg, checkpoint, device)
    dataset, schedule = build_dataset(cfg), build_schedule(cfg)
    if len(dataset) < args.images:
        raise UserError(f"--images: expected at most the {len(dataset)} of the data, got {args.images}")
    after: list[torch.Tensor] = []
    assert isinstance(model, UViT)
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: after.append(output))
    draws = Draws(torch.Generator(device).manual_seed(0))  # the same images and noise for every checkpoint
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: args.images]

    @torch.inference_mode()
    def minibatches():
        for indices in order.split(args.batch)[: args.images // args.batch]:
            raw = dataset.__getitems__([(int(i), 0) for i in indices])
            batch = dataset.finish({name: value.to(device) for name, value in raw.items()}, draws)
            noise = draws.randn(*batch["x"].shape)
            x_t, t = schedule.add_noise(batch["x"], noise, torch.full((len(indices),), args.time, device=device))
            names = [
                name for name, wanted in (("y", cfg.model.num_classes), ("context", cfg.model.context_dim)) if wanted
            ]
            after.clear()
            model(x_t, t, **{name: batch[name] for name in names})
            yield list(after)

    matrix = linear_cka(minibatches())
    name, skip = Path(checkpoint).name, cfg.model.skip
    print(f"{name}: neighbouring blocks {matrix.diagonal(1).mean():.3f} on average, least {matrix.min():.3f}")
    return [
        dict(zip(COLUMNS, (name, cfg.data.name, skip, i + 1, j + 1, f"{value:.6f}")))
        for i, row in enumerate(matrix.tolist())
        for j, value in enumerate(row)
    ]


def draw(rows: list[dict[str, str]], path: Path, time: float) -> None:
    """Draw the matrices side by side, with block numbers, on one colour scale."""
    import numpy as np

    names = list(dict.fromkeys((row["checkpoint"], row["skip"]) for row in rows))
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.3 * len(names) + 0.8, 4.0), layout="constrained", squeeze=False
    )
    for ax, (name, skip) in zip(axes[0], names):
        values = [float(row["cka"]) for row in rows if row["checkpoint"] == name]
        n = int(len(values) ** 0.5)
        matrix = np.reshape(values, (n, n))
        image = ax.imshow(matrix, vmin=0, vmax=1, cmap="magma", origin="lower", extent=(0.5, n + 0.5, 0.5, n + 0.5))
        ticks = range(1, n + 1, 1 if n < 14 else 2)
        ax.set_xticks(ticks, ticks)
        ax.set_yticks(ticks, ticks)
        ax.set_xlabel("block")
        neighbours = np.diagonal(matrix, 1).mean()
        ax.set_title(f"skip: {skip}\nneighbouring blocks: {neighbours:.2f} on average", fontsize=9)
    axes[0][0].set_ylabel("block")
    figure.colorbar(image, ax=axes[0].tolist(), label="linear CKA (1: alike)", shrink=0.8)
    title = (
        f"Similarity of the representations after each block, t = {time:g}, {rows[0]['data']} (the paper's appendix E)"
    )
    figure.suptitle(title, fontsize=10)
    save(figure, path)
