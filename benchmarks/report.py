"""Write benchmarks/REPORT.md from the CSV files: `python -m benchmarks.report`. Plots: `python -m benchmarks.plot`."""

import argparse
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import models
from benchmarks.common import RESULTS, report_folder
from benchmarks.results import (
    A100,
    MEMORY_A100,
    SAMPLING_A100,
    TRAINING_A100,
    Peer,
    Results,
    image_flops,
    parameters,
    sampling_flops,
)

REPORT, PLOTS = "REPORT.md", "plots"
ORDERED = [*models.CONFIGS, *models.OTHERS]  # sizes
MANY = ("eager", "compiled", "torchao-fp8")  # peers with many images
OURS = ("ours", "ours-fp8")
ORDER = (*OURS, "ours-uncaptured", *models.PEERS, "cublas")


def number(value: float | None, digits: int = 3) -> str:
    """Format three digits, or a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def percent(part: float | None, whole: float | None) -> str:
    return "–" if part is None or not whole else f"{part / whole:.0%}"


def times(a: float | None, b: float | None) -> str:
    """Format how many times faster: a over b."""
    return "–" if a is None or not b else f"{a / b:.2f}×"


def over(peer: Peer | None) -> str:
    """Format how many times better ours is than the best peer, and which that is."""
    return f"{peer.times:.2f}× {peer.name}" if peer and peer.times else "–"


def markdown(header: Sequence[str], rows: list[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def wrapped(text: str) -> list[str]:
    """Wrap a paragraph into lines of at most 120 characters."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def paragraph(text: str) -> list[str]:
    """Wrap a paragraph, with an empty line after it."""
    return [*wrapped(text), ""]


def measured_on(results: Results, question: str, command: str) -> Iterator[str]:
    """Yield the line under a table: where its rows come from, and that run's ceilings."""
    if question not in results.rows:
        yield from (f"Not measured: `{command}`.", "")
        return
    product, copy = (results.ceiling(question, which) for which in ("matmul", "copy"))
    limits = (
        f" Ceilings in the same run: {product / 1e12:.0f} TFLOP/s, {copy / 1e12:.2f} TB/s." if product and copy else ""
    )
    yield from paragraph(f"[`{question}.csv`](results/{question}.csv): {results.stack(question)}.{limits}")


def picture(name: str, says: str, folder: Path) -> Iterator[str]:
    if (folder / PLOTS / f"{name}.png").is_file():
        yield from (f"![{says}]({PLOTS}/{name}.png)", "")


def _times(results: Results, question: str, case: str) -> list[str]:
    """Format how many times faster ours is than the best peer, in bf16 and in FP8."""
    return [over(results.peer(question, case, "time", who)) for who in OURS]


def sampling(results: Results, folder: Path) -> Iterator[str]:
    yield from ("## Sampling: 500 images, 50 evaluations", "")
    yield from paragraph(
        "Seconds, for each provider at its fastest batch. Appendix: the paper's figures on an A100, doubled with "
        "guidance, as it says; it does not state batch, precision and decoding. Batch, GB (at the peak) and the "
        "columns after them are ours in bf16. In FP8: with e4m3 products, which change the samples slightly "
        "([`docs/fp8.md`](../docs/fp8.md)). MFU: FLOPs of the network's matrix products over the data sheet's dense "
        "bf16 peak; of ceiling: over the matrix product of the same run. A100, estimate: the same MFU of an A100's 312 "
        "TFLOP/s; it was not run on one."
    )
    yield from picture("sampling", "Seconds for 500 samples: the appendix, the peers, ours", folder)
    rows, shown = [], []
    for decoded in (False, True):
        for guided in (False, True):
            for size in ORDERED:
                appendix = SAMPLING_A100.get(size)
                found = {p: results.best(size, guided, decoded, p) for p in (*OURS, *models.PEERS)}
                if not any(found.values()):
                    continue
                loops = {says: case for case, says in results.sampling().items()}
                shown += [(loops[size, best[1], guided, decoded], p) for p, best in found.items() if best]
                seconds = {p: best[0] if best else None for p, best in found.items()}
                (ours, narrow), rate = (seconds.pop(p) for p in OURS), None
                name, best = min(
                    ((n, s) for n, s in seconds.items() if s), key=lambda pair: pair[1], default=("", None)
                )
                batch = found["ours"][1] if ours else None
                case = loops.get((size, batch, guided, decoded), "")
                if ours and not decoded:
                    rate = sampling_flops(size, guided) / ours
                peak = results.peak("sampling")
                estimate = sampling_flops(size, guided) / (rate / peak * A100) if rate and peak else None
                what = f"{size}, {'guided' if guided else 'no guidance'}, {'decoded' if decoded else 'latents'}"
                rows.append([
                    what, number(appendix and appendix * (2 if guided else 1)), *(number(seconds[p]) for p in MANY),
                    number(ours),
                    over(best and Peer(name, best, ours and best / ours)), number(narrow),
                    over(best and Peer(name, best, narrow and best / narrow)), str(batch or "–"),
                    number(results.value("sampling", case, "ours", "peak")), percent(rate, peak),
                    percent(rate, results.ceiling("sampling", "matmul")), number(estimate),
                ])  # fmt: skip
    if rows:
        header = "ours | over best peer | in FP8 | over best peer | batch | GB | MFU | of ceiling | A100, estimate"
        yield from markdown(["", "appendix, A100", *MANY, *header.split(" | ")], rows)
    few = {case: says for case, says in results.sampling().items() if says.batch <= 50}
    shown += [(case, p) for case in few for p in (*OURS, *models.PEERS)]
    if said := results.extrapolated(shown):
        yield from paragraph(said)
    order = sorted(
        few, key=lambda case: (few[case].batch, ORDERED.index(few[case].size), few[case].decoded, few[case].guided)
    )
    if order:
        yield from paragraph("Fewer images: milliseconds of a loop of 50 evaluations, for the batch.")
        rows = []
        for case in order:
            scale = 2 * few[case].batch  # from seconds of 500 images to milliseconds of a batch
            values = (results.value("sampling", case, p, "time") for p in (*OURS, *models.PEERS))
            rows.append([case, *(number(v and v * scale) for v in values), *_times(results, "sampling", case)])
        yield from markdown(["", *OURS, *models.PEERS, "over best peer", "in FP8"], rows)
    calls = [case for case in results.cases("sampling") if case.startswith("forward:")]
    if calls:
        yield from paragraph(
            "A plain call of the network, model(x, t, y=y), without gradients, as in a user's own loop, in "
            "milliseconds; ours replays a CUDA graph of it."
        )
        rows = []
        for case in sorted(calls, key=lambda case: (int(case.split(":")[2]), ORDERED.index(case.split(":")[1]))):
            values = (number(results.value("sampling", case, p, "time")) for p in (*OURS, *models.PEERS))
            rows.append([case, *values, *_times(results, "sampling", case)])
        yield from markdown(["", *OURS, *models.PEERS, "over best peer", "in FP8"], rows)
    yield from measured_on(results, "sampling", "python -m benchmarks.bench_sampling")


def training(results: Results, folder: Path) -> Iterator[str]:
    yield from ("## Training: a whole step", "")
    yield from paragraph(
        "Images per second, of forward, backward, AdamW and EMA; GB at the peak, ours. The peers keep no fp32 masters. "
        "MFU counts the matrix products of three forwards per image; recomputed activations do not count. `selective` "
        "keeps what fits the budget, everything if that fits. Published, A100: images/s from the published code's "
        "README."
    )
    yield from picture("training", "Images per second against peak memory", folder)
    rows = []
    for case in sorted(results.cases("training"), key=lambda case: "H L M S USiT".find(case.split(":")[0])):
        size, speed = case.split(":")[0], results.value("training", case, "ours", "img_per_s")
        rate = 3 * image_flops(size) * speed if speed and size in ORDERED else None
        peers = (number(results.value("training", case, p, "img_per_s")) for p in MANY)
        memory = (number(results.value("training", case, "ours", m)) for m in ("peak_gb", "activation_gb"))
        published = ", ".join(f"{number(v)} ({how})" for how, v in TRAINING_A100.get(case, {}).items())
        budget = results.value("training", case, "ours", "budget_gb")
        rows.append([
            f"{case}, {number(budget)} GB" if budget else case, *peers, number(speed),
            over(results.peer("training", case, "img_per_s")), *memory, over(results.peer("training", case, "peak_gb")),
            percent(rate, results.peak("training")), percent(rate, results.ceiling("training", "matmul")),
            published or "–",
        ])  # fmt: skip
    if rows:
        header = "ours | over best peer | peak, GB | activations, GB | less than best peer's peak | MFU | of ceiling"
        yield from markdown(["case", *MANY, *header.split(" | "), "published, A100"], rows)
    yield from uncaptured(results)
    yield from frozen(results)
    yield from measured_on(results, "training", "python -m benchmarks.bench_training")


def uncaptured(results: Results) -> Iterator[str]:
    """Yield the table of steps that Python launches, as it does the peers'."""
    rows, peers = [], ("eager", "compiled")
    for case in results.cases("training"):
        found = {who: results.value("training", case, who, "img_per_s") for who in ("ours-uncaptured", *peers, "ours")}
        if ours := found["ours-uncaptured"]:
            rows.append([case, *map(number, found.values()), *(times(ours, found[peer]) for peer in peers)])
    if rows:
        yield from paragraph("Steps without CUDA graphs, which wait for Python where the batch is small: images/s.")
        header = ["case", "ours, uncaptured", *peers, "ours, captured", *(f"uncaptured over {peer}" for peer in peers)]
        yield from markdown(header, rows)


def frozen(results: Results) -> Iterator[str]:
    """Yield the table of fine-tunings beside the training of all weights."""
    rows = []
    for case in results.cases("training"):
        speed = results.value("training", case, "ours", "img_per_s")
        for who, names in models.FROZEN.items():
            values = [results.value("training", case, who, m) for m in ("img_per_s", "static_gb", "peak_gb")]
            if speed and values[0]:
                rows.append([case, names, number(values[0]), f"{values[0] / speed:.2f}", *map(number, values[1:])])
    if rows:
        yield from paragraph("Fine-tuning, the rest frozen. Static: weights, optimizer and EMA.")
        yield from markdown(["case", "trainable", "images/s", "over all weights", "static, GB", "peak, GB"], rows)


def memory(results: Results, folder: Path) -> Iterator[str]:
    yield from ("## Memory of a training step", "")
    yield from paragraph(
        "Peaks in GB, batch 128. As published: fp32 weights, fp16 autocast, attention as products and a softmax, or "
        "memory-efficient attention; both were measured here to see what the published figures count. The best peer is "
        "that of the training table."
    )
    yield from picture("memory", "Memory of a training step, and the published figures", folder)
    rows = []
    for case in results.cases("memory"):
        published = [v for (c, _), v in MEMORY_A100.items() if c == case]
        measured = (results.value("memory", case, p, "peak") for p in ("paper", "paper-efficient", "ours"))
        best, ours = results.peer("training", case, "peak_gb"), results.value("memory", case, "ours", "peak")
        rows.append([
            case, " / ".join(map(number, published)) or "–", *map(number, measured), number(best and best.value),
            over(best and best._replace(times=ours and best.value / ours)),
        ])  # fmt: skip
    if rows:
        header = (
            "case | published | as published | with memory-efficient attention | ours | best peer | less than best peer"
        )
        yield from markdown(header.split(" | "), rows)
    yield from measured_on(results, "memory", "python -m benchmarks.bench_memory")


def ops(results: Results, folder: Path) -> Iterator[str]:
    yield from ("## The fused ops", "")
    yield from paragraph(
        "Milliseconds at batch 128: 33,024 tokens, width D. cuBLAS: its matrix products alone, without what is fused "
        "with them. Of cuBLAS: that time over ours. In a loop: ours with the weights folded beforehand, as in "
        "sampling. In FP8: the same from e4m3 operands to what the next op reads. FP8 over bf16: the loop's time over "
        "that. An A100's: ours by the kernels for sm_80, on this card."
    )
    yield from picture("ops", "Time of the fused ops at D = 1152 over eager", folder)
    rows = []
    cases = [case for case in results.cases("ops") if re.fullmatch(r"[^:]+:[^:]+:\d+", case)]
    for case in sorted(cases, key=lambda case: -int(case.split(":")[2])):
        op, part, width = case.split(":")
        found = {p: results.value("ops", case, p, "time") for p in ("ours", "eager", "compiled", "cublas")}
        loop, narrow, older = (results.value("ops", case, p, "time") for p in ("ours-loop", "ours-fp8", "ours-sm80"))
        rows.append([
            f"{op} {part}, D = {width}", *map(number, found.values()), over(results.peer("ops", case, "time")),
            percent(found["cublas"], found["ours"]), number(loop), number(narrow), times(loop, narrow),
            number(older),
        ])  # fmt: skip
    if rows:
        header = ["op", "ours", "eager", "compiled", "cuBLAS", "over best peer", "of cuBLAS"]
        header += ["in a loop", "in FP8", "FP8 over bf16", "an A100's"]
        yield from markdown(header, rows)
    yield from measured_on(results, "ops", "python -m benchmarks.bench_ops")


def generic(results: Results, folder: Path, question: str, says: str) -> Iterator[str]:
    """Yield a table with a row per case and metric, a column per provider."""
    yield from (f"## {question.capitalize()}", "", says, "")
    yield from picture(question, question.capitalize(), folder)
    providers, rows = results.providers(question, ORDER), []
    for case in results.cases(question):
        kinds = dict.fromkeys((r["metric"], r["unit"]) for r in results.rows[question] if r["case"] == case)
        for metric, unit in kinds:
            values = (number(results.value(question, case, provider, metric)) for provider in providers)
            rows.append([case, f"{metric}, {unit}", *values, over(results.peer(question, case, metric))])
    compared = any(row[-1] != "–" for row in rows)
    header = ["case", "what", *providers, "over best peer"]
    yield from markdown(header if compared else header[:-1], rows if compared else [row[:-1] for row in rows])
    yield from measured_on(results, question, f"python -m benchmarks.bench_{question}")


def text(results: Results, folder: Path) -> str:
    """Return the whole report.

    Args:
        folder: where it will be; pictures in its plots/ are shown.
    """
    counts = ", ".join(f"{size} {parameters(size) / 1e6:.0f}" for size in ORDERED)
    lines = [
        "# Benchmarks",
        "",
        *paragraph(
            "Generated by `python -m benchmarks.report` from `results/*.csv`; `make bench` measures and generates all "
            "of it. Medians. A dash: not measured. The peers are the published network with bf16 weights, with cuDNN's "
            "attention where it is faster than PyTorch's own choice: `eager`; `compiled`, `torch.compile` block by "
            'block; `compiled-graphs`, `torch.compile(mode="reduce-overhead")` of the whole network, up to 16 images; '
            "`torchao-fp8`, the blocks' linear layers in float8 by torchao (inference: one scale per row; training: "
            "one per tensor), compiled block by block. Over best peer: how many times better ours, in bf16, is than "
            "the best of them."
        ),
        *paragraph(
            f"Networks, in millions of parameters: {counts}; S to H are the paper's, in patches of 2 x 2 of 32 x 32 x "
            "4 latents (256 x 256 pixels), USiT is DC-AE's, of 16 x 16 x 32 latents (512 x 512 pixels): 258 tokens."
        ),
        *sampling(results, folder),
        *generic(
            results,
            folder,
            "cached",
            "Seconds for 500 samples of 50 evaluations (2M), latents, random weights, with cached layers.",
        ),
        *generic(
            results,
            folder,
            "latency",
            "One decoded image, weights in memory (latency); `uvit-fast sample --num 1` as a process (start), by part.",
        ),
        *training(results, folder),
        *memory(results, folder),
        *ops(results, folder),
        *generic(results, folder, "attention", "Batch 128, from packed qkv to its packed gradient."),
        *generic(results, folder, "scaling", "GPUs of one host. `calculated`: not measured, see `bench_scaling.py`."),
        *generic(results, folder, "data", "Reading and decoding, on a CPU."),
        *generic(results, folder, "evaluation", "Features and distances."),
    ]
    return "\n".join(lines).rstrip() + "\n"


def write(results: Path = RESULTS) -> Path:
    """Write REPORT.md among the CSV files, or, on the committed ones, into benchmarks/."""
    folder = report_folder(results)
    path = folder / REPORT
    path.write_text(text(Results(results), folder))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    print(write(parser.parse_args().results))
