"""Draw docs/architecture.png: `python tools/architecture.py` (the extra plot)."""

from pathlib import Path
from typing import Any

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from uvit_fast.commands.drawing import INK, pyplot

OUT = Path(__file__).resolve().parents[1] / "docs" / "architecture.png"
TOKENS, BLOCK, OP, SKIP = "#e8e8e8", "#bfe3d7", "#cfe2f3", "#d55e00"


def box(ax: Any, x: float, y: float, width: float, text: str, colour: str, height: float = 0.62) -> None:
    """Draw a box around (x, y)."""
    corner = (x - width / 2, y - height / 2)
    ax.add_patch(FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=0.1", fc=colour, ec=INK, lw=0.8))
    ax.text(x, y, text, ha="center", va="center", fontsize=8)


def arrow(ax: Any, start: tuple[float, float], end: tuple[float, float], colour: str = INK, bend: str = "arc3") -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0, "lw": 1.1}
    ax.add_patch(FancyArrowPatch(start, end, color=colour, connectionstyle=bend, **style))


def network(ax: Any) -> None:
    """Draw the network from the noisy image to eps, with the long skips (Figure 1 of the paper)."""
    ax.set_title("the network: model/uvit.py", fontsize=9, loc="left")
    left, right, low, step = 1.6, 5.2, 2.35, 1.0
    rows = [low + step * i for i in range(3)]
    for i, y in enumerate(rows):
        box(ax, left, y, 2.0, ("in_blocks[0]", "...", "in_blocks[N]")[i], BLOCK)
        box(ax, right, y, 2.0, ("out_blocks[N]", "...", "out_blocks[0]")[i], BLOCK)
        arrow(ax, (left + 1.0, y), (right - 1.0, y), SKIP)
    ax.text((left + right) / 2, rows[1] + 0.12, "skip (B, L, D)", ha="center", color=SKIP, fontsize=8)
    top = rows[-1] + step
    box(ax, (left + right) / 2, top, 2.0, "mid_block", BLOCK)
    for a, b in zip(rows[:-1], rows[1:]):
        arrow(ax, (left, a + 0.31), (left, b - 0.31))
        arrow(ax, (right, b - 0.31), (right, a + 0.31))
    arrow(ax, (left, rows[-1] + 0.31), (2.4, top), bend="angle,angleA=90,angleB=180")
    arrow(ax, (4.4, top), (right, rows[-1] + 0.31), bend="angle,angleA=0,angleB=90")
    box(ax, left, 1.2, 2.9, "tokens (B, L, D) + pos_embed", TOKENS)
    arrow(ax, (left, 1.51), (left, rows[0] - 0.31))
    for x, text in ((0.5, "y or text"), (1.6, "t"), (2.7, "patches of x")):
        box(ax, x, 0.1, 0.98, text, "white", 0.5)
        arrow(ax, (x, 0.35), (x, 0.89))
    box(ax, right, 1.2, 2.9, "norm, decoder_pred", TOKENS)
    arrow(ax, (right, rows[0] - 0.31), (right, 1.51))
    box(ax, right, 0.1, 2.9, "patches to image, final_layer: eps", "white", 0.5)
    arrow(ax, (right, 0.89), (right, 0.35))
    ax.set(xlim=(0, 6.8), ylim=(-0.3, 6.1))


def block(ax: Any) -> None:
    """Draw what one block computes, and the ops that compute it."""
    ax.set_title("a block, and its fused ops: model/ops.py", fontsize=9, loc="left")
    ops = (
        ("Linear(concat(x, skip))", "skip_linear"),
        ("qkv = Linear(norm1(x))", "ln_linear"),
        ("softmax(q k$^T$) v", "attention"),
        ("x + Linear(a)", "linear_residual"),
        ("x + fc2(GELU(fc1(norm2(x))))", "ln_mlp"),
    )
    x, y = 1.9, 0.1
    for i, (formula, op) in enumerate(ops):
        box(ax, x, y + i * 1.15, 3.5, formula, OP)
        ax.text(x + 1.95, y + i * 1.15, op, va="center", fontsize=8, family="monospace")
        if i:
            arrow(ax, (x, y + (i - 1) * 1.15 + 0.31), (x, y + i * 1.15 - 0.31))
    ax.text(x + 1.95, y - 0.34, "(out_blocks only)", va="center", fontsize=7, color=SKIP)
    ax.set(xlim=(0, 5.6), ylim=(-0.5, 5.9))


def main() -> None:
    figure, axes = pyplot().subplots(1, 2, figsize=(9.4, 4.3), width_ratios=(6.8, 5.6), layout="constrained")
    for ax, draw in zip(axes, (network, block)):
        draw(ax)
        ax.axis("off")
    figure.savefig(OUT, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
