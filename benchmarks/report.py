"""benchmarks/REPORT.md from the CSV files: `python -m benchmarks.report`. The plots beside it: `python -m benchmarks.plot`."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.results import (
    A100,
    MEMORY_A100,
    SAMPLING_A100,
    TRAINING_A100,
    Results,
    image_flops,
    sampling_flops,
)

HERE = Path(__file__).parent
REPORT, PLOTS = "REPORT.md", "plots"
PEERS = ("ours", "ours-uncaptured", "eager", "compiled", "cublas")


def number(value: float | None, digits: int = 3) -> str:
    """Three digits, or a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def percent(part: float | None, whole: float | None) -> str:
    return "–" if part is None or not whole else f"{part / whole:.0%}"


def times(a: float | None, b: float | None) -> str:
    """How many times faster: a over b."""
    return "–" if a is None or not b else f"{a / b:.2f}×"


def markdown(header: Sequence[str], rows: list[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def measured_on(results: Results, question: str, command: str) -> Iterator[str]:
    """The line under a table: where its rows come from, and that run's ceilings."""
    if question not in results.rows:
        yield from (f"Not measured: `{command}`.", "")
        return
    product, copy = (results.ceiling(question, which) for which in ("matmul", "copy"))
    limits = (
        f" Ceilings in the same run: {product / 1e12:.0f} TFLOP/s, {copy / 1e12:.2f} TB/s." if product and copy else ""
    )
    yield from (f"[`{question}.csv`](results/{question}.csv): {results.stack(question)}.{limits}", "")


def picture(name: str, says: str, folder: Path) -> Iterator[str]:
    if (folder / PLOTS / f"{name}.png").is_file():
        yield from (f"![{says}]({PLOTS}/{name}.png)", "")


def sampling(results: Results, folder: Path) -> Iterator[str]:
    yield from ("## Sampling: 500 images, 50 evaluations", "")
    yield from (
        "Seconds, each at the batch that was fastest for it. Appendix: the paper's figures on an A100, with guidance twice those "
        "without, as it says; batch, precision and decoding are unstated there. Batch, GB (at the peak) and what follows are ours. MFU: FLOPs of the "
        "network's products over the data sheet's dense bf16 peak; of ceiling: over the matrix product of the same run. A100, "
        "estimate: the same MFU of an A100's 312 TFLOP/s; it was not run on one.",
        "",
    )
    yield from picture("sampling", "Seconds for 500 samples: the appendix, the published network, ours", folder)
    rows = []
    for decoded in (False, True):
        for guided in (False, True):
            for size, appendix in SAMPLING_A100.items():
                found = {p: results.best(size, guided, decoded, p) for p in ("ours", "eager", "compiled")}
                if not any(found.values()):
                    continue
                seconds = {p: best[0] if best else None for p, best in found.items()}
                ours, rate = seconds["ours"], None
                batch = found["ours"][1] if ours else None
                case = next((c for c, s in results.sampling().items() if s == (size, batch, guided, decoded)), "")
                if ours and not decoded:
                    rate = sampling_flops(size, guided) / ours
                peak = results.peak("sampling")
                estimate = sampling_flops(size, guided) / (rate / peak * A100) if rate and peak else None
                what = f"{size}, {'guided' if guided else 'no guidance'}, {'decoded' if decoded else 'latents'}"
                rows.append([
                    what, number(appendix * (2 if guided else 1)), number(seconds["eager"]), number(seconds["compiled"]),
                    number(ours), str(batch or "–"), number(results.value("sampling", case, "ours", "peak")),
                    times(seconds["eager"], ours), times(seconds["compiled"], ours), percent(rate, peak),
                    percent(rate, results.ceiling("sampling", "matmul")), number(estimate),
                ])  # fmt: skip
    if rows:
        header = "appendix, A100 | published, eager | published, compiled | ours | batch | GB | over eager | over compiled | MFU | of ceiling | A100, estimate"
        yield from markdown(["", *header.split(" | ")], rows)
    if results.extrapolated():
        yield from (results.extrapolated(), "")
    single = {case: says for case, says in results.sampling().items() if says.batch == 1}
    alone = sorted(
        single, key=lambda case: ("SMLH".index(single[case].size), single[case].decoded, single[case].guided)
    )
    if alone:
        yield from ("One image at a time, ms an image of 50 evaluations:", "")
        providers = [p for p in PEERS if p in results.providers("sampling")]
        rows = [
            [case, *(number(t and t * 2) for t in (results.value("sampling", case, p, "time") for p in providers))]
            for case in alone  # s for 500 images is 2 ms for one
        ]
        yield from markdown(["", *providers], rows)
    yield from measured_on(results, "sampling", "python -m benchmarks.bench_sampling")


def training(results: Results, folder: Path) -> Iterator[str]:
    yield from ("## Training: a whole step", "")
    yield from (
        "Images a second of forward, backward, AdamW and EMA; GB at the peak. MFU counts three forwards' products an image: recomputed "
        "activations are no work. `selective` keeps what fits the budget that is named, all of it where that is enough. Published, A100: images/s of the published code's README.",
        "",
    )
    yield from picture("training", "Images a second against peak memory", folder)
    rows = []
    for case in sorted(results.cases("training"), key=lambda case: "HLMS".find(case[0])):
        for provider in results.providers("training", PEERS):
            speed = results.value("training", case, provider, "img_per_s")
            if speed is None:
                continue
            size, eager = case.split(":")[0], results.value("training", case, "eager", "img_per_s")
            rate = 3 * image_flops(size) * speed if size in SAMPLING_A100 else None
            memory = [number(results.value("training", case, provider, m)) for m in ("peak_gb", "activation_gb")]
            published = ", ".join(f"{number(v)} ({how})" for how, v in TRAINING_A100.get(case, {}).items())
            budget = results.value("training", case, provider, "budget_gb")
            rows.append([
                f"{case}, {number(budget)} GB" if budget else case, provider, number(speed), times(speed, eager), *memory,
                percent(rate, results.peak("training")), percent(rate, results.ceiling("training", "matmul")), published or "–",
            ])  # fmt: skip
    if rows:
        header = (
            "case | provider | images/s | over eager | peak, GB | activations, GB | MFU | of ceiling | published, A100"
        )
        yield from markdown(header.split(" | "), rows)
    yield from measured_on(results, "training", "python -m benchmarks.bench_training")


def memory(results: Results, folder: Path) -> Iterator[str]:
    yield from ("## Memory of a training step", "")
    yield from (
        "GB, batch 128. `paper` is the published code's way (fp32 weights, fp16 autocast, attention as products and a softmax), "
        "`paper-efficient` the same with memory-efficient attention. Peak: allocated; reserved: what the allocator took for it; "
        "static: weights, optimizer, EMA; saved: what waits for the backward. The published figures do not say what they count.",
        "",
    )
    yield from picture("memory", "Memory of a training step, and the published figures", folder)
    rows = []
    for case in results.cases("memory"):
        for provider in results.providers("memory", ("paper", "paper-efficient", "ours")):
            found = [results.value("memory", case, provider, m) for m in ("peak", "reserved", "static", "saved")]
            if any(found):
                rows.append([case, provider, number(MEMORY_A100.get((case, provider))), *map(number, found)])
    if rows:
        yield from markdown("case | provider | published | peak | reserved | static | saved".split(" | "), rows)
    yield from measured_on(results, "memory", "python -m benchmarks.bench_memory")


def ops(results: Results, folder: Path) -> Iterator[str]:
    yield from ("## The fused ops", "")
    yield from (
        "Milliseconds at batch 128: 33,024 tokens, width D. cuBLAS: its matrix products alone, without what is fused with them. Of "
        "cuBLAS: that time over ours.",
        "",
    )
    yield from picture("ops", "Time of the fused ops at D = 1152 over eager", folder)
    rows = []
    for case in sorted(results.cases("ops"), key=lambda case: -int(case.split(":")[2])):
        op, part, width = case.split(":")
        found = {p: results.value("ops", case, p, "time") for p in ("ours", "eager", "compiled", "cublas")}
        rows.append([
            f"{op} {part}, D = {width}", *map(number, found.values()), times(found["eager"], found["ours"]),
            times(found["compiled"], found["ours"]), percent(found["cublas"], found["ours"]),
        ])  # fmt: skip
    if rows:
        header = "op | ours | eager | compiled | cuBLAS | over eager | over compiled | of cuBLAS"
        yield from markdown(header.split(" | "), rows)
    yield from measured_on(results, "ops", "python -m benchmarks.bench_ops")


def generic(results: Results, folder: Path, question: str, says: str) -> Iterator[str]:
    """A row a case and metric, a column a provider."""
    yield from (f"## {question.capitalize()}", "", says, "")
    yield from picture(question, question.capitalize(), folder)
    providers, rows = results.providers(question, PEERS), []
    for case in results.cases(question):
        kinds = dict.fromkeys((r["metric"], r["unit"]) for r in results.rows[question] if r["case"] == case)
        for metric, unit in kinds:
            values = (number(results.value(question, case, provider, metric)) for provider in providers)
            rows.append([case, f"{metric}, {unit}", *values])
    if rows:
        yield from markdown(["case", "what", *providers], rows)
    yield from measured_on(results, question, f"python -m benchmarks.bench_{question}")


def text(results: Results, folder: Path) -> str:
    """The whole report.

    Args:
        folder: where it will lie; pictures are shown that are in its plots/.
    """
    lines = [
        "# Benchmarks",
        "",
        "Generated by `python -m benchmarks.report` from `results/*.csv`; `make bench` measures and generates all of it. Medians. A dash: "
        "not measured. `eager` is the published network's plain PyTorch ops under autocast with PyTorch's own attention, `compiled` the "
        "same under `torch.compile`.",
        "",
        *sampling(results, folder),
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
    """REPORT.md beside the folder of the CSV files."""
    folder = Path(results).parent
    path = folder / REPORT
    path.write_text(text(Results(results), folder))
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    print(write(parser.parse_args().results))
