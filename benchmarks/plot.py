"""The report's plots, from the CSV files: `python -m benchmarks.plot` (the extra plot)."""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, report_folder
from benchmarks.report import PLOTS
from benchmarks.results import MEMORY_A100, SAMPLING_A100, Results
from uvit_fast.commands.drawing import INK, pyplot
from uvit_fast.runtime.errors import UserError, in_one_line

COLOURS = {  # colour-blind safe (Okabe and Ito)
    "published": "#999999",
    "eager": "#56b4e9",
    "compiled": "#e69f00",
    "torchao-fp8": "#cc79a7",
    "ours": "#009e73",
    "ours-fp8": "#0072b2",
    "cublas": "#cc79a7",
    "cudnn": "#0072b2",
    "flash_attn": "#d55e00",
    "flash": "#f0e442",
}
MARK = {"Software": "uvit-fast"}  # of our pictures
COMMITTED = report_folder(RESULTS) / PLOTS
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # keeps lines from crossing out a number
MARKERS = {"ours": "o", "eager": "s", "compiled": "^", "torchao-fp8": "D"}
KEPT = {  # policy of activation checkpointing -> fill of a marker, and its label
    "none": ("full", "nothing computed again"),
    "selective": ("left", "selective"),
    "block": ("none", "block checkpointing"),
}


def axes(width: float = 7.0, height: float = 3.4) -> tuple[Any, Any]:
    """Return a figure and its axes in the house style.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    figure, ax = pyplot().subplots(figsize=(width, height), layout="constrained")
    ax.grid(True)
    return figure, ax


def bars(ax: Any, groups: list[str], series: dict[str, list[float | None]], colours: dict[str, str], form: str) -> None:
    """Draw grouped bars with their values on top; a value that was not measured has no bar."""
    width = 0.8 / max(1, len(series))
    for j, (label, values) in enumerate(series.items()):
        at = [i + (j - (len(series) - 1) / 2) * width for i in range(len(groups))]
        shown = [(x, v) for x, v in zip(at, values) if v is not None]
        drawn = ax.bar([x for x, _ in shown], [v for _, v in shown], width * 0.92, label=label, color=colours[label])
        ax.bar_label(drawn, [form.format(v) for _, v in shown], fontsize=7, padding=2, bbox=LABEL)
    ax.set_xticks(range(len(groups)), groups)


def sampling(results: Results) -> Any | None:
    """Plot seconds for 500 samples without guidance, as latents."""
    providers = {"eager": "eager", "compiled": "compiled", "torchao float8, compiled": "torchao-fp8", "ours": "ours"}
    providers["ours, FP8"] = "ours-fp8"
    series: dict[str, list[float | None]] = {"appendix, A100": list(SAMPLING_A100.values())}
    cases = set()
    for label, provider in providers.items():
        best = [results.best(size, False, False, provider) for size in SAMPLING_A100]
        if any(best):
            series[label] = [b[0] if b else None for b in best]
        cases |= {f"{size}:{b[1]}:nocfg:latent" for size, b in zip(SAMPLING_A100, best) if b}
    if not cases:
        return None
    figure, ax = axes(width=9.0)
    ax.set_yscale("log")
    colours = {"appendix, A100": COLOURS["published"], **{label: COLOURS[p] for label, p in providers.items()}}
    bars(ax, [f"U-ViT-{size}" for size in SAMPLING_A100], series, colours, "{:.3g}")
    ax.set_ylim(bottom=0.5)
    ax.set_yticks([1, 10, 100], ["1", "10", "100"])
    ax.set_ylabel("seconds")
    ax.set_title(f"500 samples of 50 evaluations, latents; {results.devices('sampling', cases)}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(series), frameon=False, fontsize=8)
    return figure


def training(results: Results) -> Any | None:
    """Plot images per second against peak memory, one panel per size: provider by colour, what blocks keep by fill."""
    providers = {"ours": "ours", "eager": "eager", "compiled": "compiled", "torchao-fp8": "torchao float8, compiled"}
    points: dict[str, dict[str, list]] = {}  # size -> provider -> (GB, images/s, what blocks keep)
    for case in results.cases("training"):
        size, batch, policy = (case.split(":") + ["", ""])[:3]
        for provider in providers:
            peak, speed = (results.value("training", case, provider, metric) for metric in ("peak_gb", "img_per_s"))
            if speed and peak and batch == "128" and policy in KEPT:
                points.setdefault(size, {}).setdefault(provider, []).append((peak, speed, policy))
    if not points:
        return None
    sizes = [size for size in SAMPLING_A100 if size in points]
    figure, panels = pyplot().subplots(
        1, len(sizes), figsize=(2.9 * len(sizes), 3.4), layout="constrained", squeeze=False
    )
    for ax, size in zip(panels[0], sizes):
        ax.grid(True)
        for provider, found in points[size].items():
            colour = COLOURS[provider]
            ax.plot(*zip(*[p[:2] for p in sorted(found)]), color=colour, linewidth=1)
            for peak, speed, policy in found:
                look = {"fillstyle": KEPT[policy][0], "markerfacecoloralt": "white", "markersize": 8}
                ax.plot(peak, speed, MARKERS[provider], color=colour, **look)
        ax.set_xlim(0, ax.get_xlim()[1])
        ax.set_ylim(0, ax.get_ylim()[1] * 1.05)
        ax.set_xlabel("peak memory, GB")
        ax.set_title(f"{size}/2", fontsize=9)
    panels[0][0].set_ylabel("images/s")
    figure.suptitle(f"A training step, batch 128; {results.devices('training', results.cases('training'))}", fontsize=9)
    drawn = dict.fromkeys(provider for size in sizes for provider in points[size])
    looks = [{"color": COLOURS[p], "marker": MARKERS[p], "label": providers[p]} for p in drawn]
    looks += [{"color": INK, "marker": "o", "fillstyle": fill, "label": label} for fill, label in KEPT.values()]
    handles = [pyplot().Line2D([], [], linestyle="", markerfacecoloralt="white", **look) for look in looks]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


def memory(results: Results) -> Any | None:
    """Plot peaks: what stays between the steps, and the rest on top; the published figure as a line."""
    found = []
    for case in results.cases("memory"):
        for provider in results.providers("memory", ("paper", "paper-efficient", "ours")):
            peak, static = (results.value("memory", case, provider, metric) for metric in ("peak", "static"))
            if peak and static:
                found.append((case, provider, peak, static))
    if not found:
        return None
    figure, ax = axes(width=8.5, height=3.8)
    names = {"none": "", "block": "\ncheckpointed"}
    labels = [f"{case.split(':')[0]}/2\n{provider}{names.get(case.split(':')[2], '')}" for case, provider, *_ in found]
    colours = [COLOURS["ours" if provider == "ours" else "eager"] for _, provider, *_ in found]
    at = range(len(found))
    ax.bar(at, [static for *_, static in found], 0.7, color=colours, alpha=0.45)
    ax.bar(at, [p - s for *_, p, s in found], 0.7, bottom=[s for *_, s in found], color=colours)
    for i, (case, provider, peak, _) in enumerate(found):
        published = MEMORY_A100.get((case, provider))
        inside = published is not None and peak < published  # its line would cross the number
        place = {"textcoords": "offset points", "ha": "center", "va": "top" if inside else "bottom", "fontsize": 8}
        ax.annotate(f"{peak:.3g}", (i, peak), (0, -2 if inside else 1), **place)
        if published:
            ax.plot([i - 0.42, i + 0.42], [published] * 2, color=INK, linewidth=1.2, linestyle=(0, (3, 2)))
            ax.annotate(f"{published:g}", (i + 0.42, published), (1, -2), textcoords="offset points", fontsize=7)
    ax.plot([], [], color=INK, linestyle=(0, (3, 2)), label="published, A100")
    ax.bar([0], [0], color="#888888", alpha=0.45, label="weights, optimizer, EMA")
    ax.bar([0], [0], color="#888888", label="the rest of the peak")
    ax.set_xticks(at, labels, fontsize=7)
    ax.set_ylabel("GB")
    ax.legend(frameon=False, fontsize=8)
    ax.set_title(
        f"Memory of a training step, batch 128; {results.devices('memory', results.cases('memory'))}", fontsize=9
    )
    return figure


def compared(results: Results, question: str, cases: dict[str, str], providers: list[str], title: str) -> Any | None:
    """Plot milliseconds of some cases, relative to ours."""
    cases = {case: label for case, label in cases.items() if results.value(question, case, "ours", "time")}
    series: dict[str, list[float | None]] = {}
    for provider in providers:
        pairs = [[results.value(question, case, who, "time") for who in (provider, "ours")] for case in cases]
        if any(theirs and ours for theirs, ours in pairs):
            series[provider] = [theirs / ours if theirs and ours else None for theirs, ours in pairs]
    if not series:
        return None
    figure, ax = axes(width=max(7.0, 1.1 * len(cases)))
    bars(ax, list(cases.values()), series, COLOURS, "{:.2f}")
    ax.axhline(1, color=COLOURS["ours"], linewidth=1.4, label="ours")
    ax.set_ylabel("time over ours")
    ax.legend(frameon=False, fontsize=8, ncols=4)
    ax.set_ylim(top=ax.get_ylim()[1] * 1.15)
    ax.set_title(f"{title}; {results.devices(question, cases)}", fontsize=9)
    return figure


def ops(results: Results) -> Any | None:
    names = ("ln_linear", "ln_mlp", "skip_linear", "linear_residual", "block")
    parts = {"fwd": "forward", "bwd": "backward", "fwdbwd": "both"}
    cases = {
        f"{name}:{part}:1152": name.replace("_", "\n") + f"\n{label}" for part, label in parts.items() for name in names
    }
    title = "Fused ops and a whole block, D = 1152, 33,024 tokens (cublas: products alone)"
    return compared(results, "ops", cases, ["eager", "compiled", "cublas"], title)


def attention(results: Results) -> Any | None:
    shapes = {
        ("attention", 1152): "258 tokens, 72",
        ("attention", 1024): "258 tokens, 64",
        ("attention_l334", 512): "334 tokens, 64",
    }
    cases = {
        f"{name}:{part}:{width}": f"{label}\n{'forward' if part == 'fwd' else 'both'}"
        for (name, width), label in shapes.items()
        for part in ("fwd", "fwdbwd")
    }
    return compared(
        results,
        "attention",
        cases,
        ["cudnn", "flash_attn", "flash"],
        "Attention: tokens, head dim; both: with backward",
    )


def scaling(results: Results) -> Any | None:
    """Plot images/s over those of one GPU, against the number of GPUs; hollow: calculated."""
    rows = [r for r in results.rows.get("scaling", []) if r["metric"] == "speedup" and r["case"].endswith(":block")]
    if not rows:
        return None
    figure, ax = axes(5.0, 3.4)
    points = [  # ZeRO stage, GPUs, speed-up, provider
        (*re.fullmatch(r"[^:]+:[^:]+:zero(.):(\d+)gpu:block", row["case"]).groups(), row["p50"], row["provider"])
        for row in rows
    ]
    counts = sorted({1, *(int(gpus) for _, gpus, *_ in points)})
    ax.plot([1, counts[-1]], [1, counts[-1]], color="#999999", linewidth=0.8, linestyle="--", label="linear")
    stages = sorted({p[0] for p in points})
    for width, stage, name in zip((4, 2, 1), stages, ("ours", "compiled", "cudnn")):  # curves may lie on each other
        mine = sorted([(1, 1.0, "ours"), *((int(n), float(x), who) for s, n, x, who in points if s == stage)])
        look = {"color": COLOURS[name], "linewidth": width, "label": f"ZeRO {stage}"}
        ax.plot([p[0] for p in mine], [p[1] for p in mine], **look)
        for gpus, value, who in mine:
            face = "white" if who == "calculated" else COLOURS[name]
            ax.plot(gpus, value, "o", color=COLOURS[name], markerfacecolor=face, markersize=4 + 2 * width)
    ax.set_xticks(counts)
    ax.set_xlabel("GPUs of one host")
    ax.set_ylabel("images/s over one GPU's")
    device = rows[0]["device"]
    ax.set_title(f"H/2 training, block checkpointing; hollow: calculated, not measured\n{device}", fontsize=9)
    ax.legend(frameon=False, fontsize=8)
    return figure


FIGURES = {
    "sampling": sampling,
    "training": training,
    "memory": memory,
    "ops": ops,
    "attention": attention,
    "scaling": scaling,
}


def check(results: Path, names: Iterable[str]) -> None:
    """Raise if a picture would replace another program's.

    Args:
        results: the folder of the rows.
        names: of the pictures; those that are not in FIGURES do not count.

    Raises:
        UserError: it would.
        OSError: what is there cannot be read.
    """
    folder = report_folder(results) / PLOTS
    paths = [folder / f"{name}.png" for name in names if name in FIGURES]
    there = {*folder.iterdir()} if paths and folder.exists() else set()
    for path in there.intersection(paths):
        if folder != COMMITTED and MARK["Software"].encode() not in path.read_bytes()[:1000]:
            raise UserError(f"{path}: expected a plot of the benchmarks, or none, got another; give another folder")


def write(results: Path = RESULTS) -> list[Path]:
    """Write plots/<name>.png beside the report (`report_folder`), for whatever was measured; of the committed pictures,
    remove those of what is measured no more.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
        UserError, OSError: as `check`.
    """
    close = pyplot().close
    folder, found = report_folder(results) / PLOTS, Results(results)
    figures = {name: draw(found) for name, draw in FIGURES.items()}
    check(results, [name for name, figure in figures.items() if figure is not None])
    written = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150, metadata=MARK)
            close(figure)
            written.append(path)
        elif folder == COMMITTED:
            path.unlink(missing_ok=True)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    with in_one_line():
        for path in write(parser.parse_args().results):
            print(path)
