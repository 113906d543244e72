"""`uvit-fast sweep`: train and measure variations of one config, and plot the metric against each factor (paper,
Appendix B).
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field

from uvit_fast.commands.arguments import positive, set_argument
from uvit_fast.commands.cost import count
from uvit_fast.config import CONFIGS, Config, Section, find_config, load_config
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import read_rows, read_table, write_table
from uvit_fast.runtime.text import cut, parse_yaml

HELP = "train and measure variations of one config, and plot them"
EXAMPLE = "uvit-fast sweep --config digits --only skip"
COLUMNS = ["factor", "value", "member", "parameters", "gmacs", "steps", "images", "loss", "metric", "figure"]
COLUMNS += ["data", "device"]
LOSSES = ["member", "step", "loss"]
AXES = {
    "depth": "depth (blocks: one more)",
    "width": "width D",
    "patch size": "patch size, pixels",
    "skip": "long skip",
}
SMOOTH = 0.05  # share of a run over which a point of the loss curve, and the table's loss, averages


class Sweep(Section):
    """A file of configs/ablations: each member differs from `base` with `set` in one factor."""

    base: str = Field(min_length=1, description="The config that everything varies: a path from this file, or a name.")
    set: list[str] = Field([], description="Overrides of the base for all members, as section.key=value.")
    factors: dict[str, dict[str, list[Any]]] = Field(
        description="Factor -> keys -> values; several keys of a factor change together, the first one names the value."
    )


class Member(NamedTuple):
    """One training: its name, its overrides, and the points (factor, value) of the plot that it provides."""

    name: str
    overrides: list[str]
    config: Config
    points: list[tuple[str, Any]]


def arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("config")
    group.add_argument(
        "--config", required=True, metavar="NAME", help="a sweep of the package, as digits, or a YAML file"
    )
    set_argument(group, "override for all members; again for more")
    group.add_argument("--only", default="", metavar="LIST", help="factors, such as skip,depth (default: all)")
    group = command.add_argument_group("how")
    group.add_argument("--jobs", type=positive, default=1, metavar="N", help="trainings at a time here (default 1)")
    group.add_argument("--num", type=positive, default=5000, metavar="N", help="samples of the metric (default 5000)")
    group.add_argument(
        "--features", choices=["inception", "digits-fid"], default="digits-fid", metavar="NAME", help="as of `evaluate`"
    )
    group = command.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR", help="runs, CSVs, plots (default runs/sweep_<name>)")
    group.add_argument("--draw", action="store_true", help="only redraw what the CSV files in --out hold")
    command.set_defaults(goes_on="continues")


def run(args: argparse.Namespace) -> int:
    """Train every unfinished member, measure it, and write sweep.csv, losses.csv and their pictures."""
    out = args.out or Path("runs") / f"sweep_{Path(args.config).stem}"
    if args.draw:
        _say_written(draw(out))
        return 0
    config = find_config(args.config, folder=CONFIGS / "ablations")
    members = read_members(config, args.set, [name for name in args.only.split(",") if name])
    out.mkdir(parents=True, exist_ok=True)
    work, lock = _Work(args, config, out), threading.Lock()
    done: dict[str, bool] = {}

    def finish(member: Member) -> None:
        error = work(member)
        with lock:
            done[member.name] = error is None
            print(f"{member.name}: {error or 'done'} ({len(done)} of {len(members)})", flush=True)
            write([m for m in members if done.get(m.name)], work, out)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(finish, members))
    if any(done.values()):
        _say_written([out / "sweep.csv", out / "losses.csv"])
        _say_written(draw(out))
    return 0 if all(done.values()) else 1


def _say_written(files: list[Path]) -> None:
    print(f"wrote {' and '.join(map(str, files))}", flush=True)


def read_members(path: Path, overrides: list[str], only: list[str]) -> list[Member]:
    """Return the trainings of a sweep, each once: factors share the one at the base.

    Raises:
        UserError: a file that is not a sweep, a factor that is not in it, or values that make no valid config.
    """
    try:
        sweep = Sweep.model_validate(parse_yaml(path.read_text("utf-8-sig")))
    except (OSError, ValueError) as error:  # ValidationError is one
        raise UserError(
            f"{cut(str(path))}: expected a sweep, with base, set and factors: {cut(' '.join(str(error).split()))}"
        ) from None
    if unknown := [name for name in only if name not in sweep.factors]:
        raise UserError(f"--only: expected some of {', '.join(sweep.factors)}, got {unknown[0]}")
    base, common = find_config(sweep.base, beside=path.parent), [*sweep.set, *overrides]
    members: list[Member] = [Member("base", common, load_config(base, common), [])]
    for factor, keys in sweep.factors.items():
        if only and factor not in only:
            continue
        if len({len(values) for values in keys.values()}) != 1:
            raise UserError(f"{path}: factors.{factor}: expected as many values for each of {', '.join(keys)}")
        for values in zip(*keys.values()):
            changes = [f"{key}={yaml.safe_dump(value).split()[0]}" for key, value in zip(keys, values)]
            config = load_config(base, [*common, *changes])
            same = next((member for member in members if member.config == config), None)
            if same is None:
                name = f"{factor.replace(' ', '-')}-{values[0]}"
                same = Member(name, [*common, *changes], config, [])
                members.append(same)
            same.points.append((factor, values[0]))
    return [member for member in members if member.points]


class _Work:
    """Trains and measures a member in separate processes; returns None, or what went wrong."""

    def __init__(self, args: argparse.Namespace, config: Path, out: Path):
        self.args, self.out = args, out
        self.base = find_config(yaml.safe_load(config.read_text())["base"], beside=config.parent)
        self.first, self.fitted = threading.Lock(), False
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        self.environment = {"OMP_NUM_THREADS": str(threads), **os.environ}

    def __call__(self, member: Member) -> str | None:
        folder, result = self.out / member.name, self.result(member)
        folder.mkdir(exist_ok=True)
        sets = [part for override in member.overrides for part in ("--set", override)]
        train = ["-m", "uvit_fast", "train", "--config", str(self.base), *sets, "--run-dir", str(folder)]
        if error := self._call(train, folder):
            return error
        if result.is_file():
            return None
        with self.first:  # the first one fits the classifier with which all are measured
            if not self.fitted:
                error = self._evaluate(folder, result)
                self.fitted = error is None
                return error
        return self._evaluate(folder, result)

    def result(self, member: Member) -> Path:
        """Return the file of a member's figures, for its number of steps and samples."""
        steps = member.config.train.iterations
        return self.out / member.name / f"evaluation_{self.args.features}_{steps}_{self.args.num}.json"

    def _evaluate(self, folder: Path, result: Path) -> str | None:
        config, features = str(folder / "config.yaml"), self.args.features
        what = ["--config", config, "--checkpoint", str(folder), "--reference", config, "--features", features]
        how = ["--num", str(self.args.num), "--batch", "1000", "--cache", str(self.out / "cache"), "--out", str(result)]
        return self._call(["-m", "uvit_fast", "evaluate", *what, *how], folder)

    def _call(self, command: list[str], folder: Path) -> str | None:
        with open(folder / "log.txt", "a") as log:
            done = subprocess.run([sys.executable, *command], stdout=log, stderr=log, env=self.environment)
        return None if done.returncode == 0 else f"failed, see {folder / 'log.txt'}"


def write(members: list[Member], work: _Work, out: Path) -> None:
    """Write sweep.csv, one row per point of the plots, and losses.csv, the training losses of every member."""
    points: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    for member in members:
        rows = list(_losses(out / member.name / "metrics.jsonl"))
        losses += [{"member": member.name, "step": step, "loss": f"{loss:.6g}"} for step, loss in rows]
        tail = [loss for _, loss in rows[-max(1, round(SMOOTH * len(rows))) :]]
        metrics = json.loads(work.result(member).read_text())["metrics"]
        metric = next(name for name in metrics if name.endswith("fid"))
        parameters, macs = count(member.config)
        environment = json.loads((out / member.name / "environment.json").read_text())
        device = environment["device"] if environment["cuda"] else "CPU"
        for factor, value in member.points:
            row = (factor, value, member.name, parameters, f"{macs / 1e9:.5g}", member.config.train.iterations)
            figures = (
                work.args.num,
                f"{sum(tail) / len(tail):.6g}",
                metric,
                f"{metrics[metric]:.6g}",
                member.config.data.name,
                device,
            )
            points.append(dict(zip(COLUMNS, (*row, *figures))))
    for name, columns, table in (("sweep", COLUMNS, points), ("losses", LOSSES, losses)):
        write_table(out / f"{name}.csv", columns, table)


def _losses(path: Path) -> Iterator[tuple[int, float]]:
    """Yield (step, mean loss since the previous row)."""
    for row in read_rows(path):
        yield row["step"], row["loss"]


def draw(out: Path) -> list[Path]:
    """Draw factors.png, the metric against each factor, and losses.png, the training loss of each skip mode, from the
    CSV files; return the pictures.

    Raises:
        UserError: no such files. ImportError: matplotlib is not installed.
    """
    from uvit_fast.commands.drawing import COLOURS, pyplot, save

    if not (out / "sweep.csv").is_file():
        raise UserError(f"{out}: no sweep.csv; expected a folder that `uvit-fast sweep` wrote")
    told = "uvit-fast sweep"
    points = read_table(out / "sweep.csv", COLUMNS, told, lambda row: [float(row[n]) for n in ("figure", "steps")])
    losses = read_table(out / "losses.csv", LOSSES, told, lambda row: [float(row[n]) for n in ("loss", "step")])
    plt = pyplot()
    from matplotlib.ticker import LogLocator, NullFormatter

    factors = list(dict.fromkeys(point["factor"] for point in points))
    figure, axes = plt.subplots(
        1,
        len(factors),
        figsize=(max(5.6, 2.6 * len(factors) + 0.6), 3.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, factor, colour in zip(axes[0], factors, COLOURS):
        mine = [point for point in points if point["factor"] == factor]
        order = [point["value"] for point in mine]
        order.sort(key=lambda value: int(value) if value.isdecimal() else 0)
        mine.sort(key=lambda point: order.index(point["value"]))
        figures = [float(point["figure"]) for point in mine]
        numeric = all(point["value"].isdecimal() for point in mine)
        ax.plot(range(len(mine)), figures, "o-" if numeric else "o", color=colour)
        for i, value in enumerate(figures):
            label = ax.annotate(f"{value:.3g}", (i, value), (0, 6), textcoords="offset points", ha="center", fontsize=8)
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # a line may pass behind it
        ax.set_xticks(range(len(mine)), [point["value"] for point in mine])
        ax.set_xlim(-0.5, len(mine) - 0.5)
        ax.set_xlabel(AXES.get(factor, factor))
        ax.grid(axis="y")
    axes[0][0].set_ylim(bottom=0, top=axes[0][0].get_ylim()[1] * 1.08)
    axes[0][0].set_ylabel(f"{points[0]['metric']} (lower is better)")
    first = points[0]
    where = f"{first['data']}, {first['device']}"
    about = f"{int(first['steps']):,} steps each, {int(first['images']):,} samples of the EMA weights; {where}"
    figure.suptitle(f"One factor at a time (the paper's appendix B, Figure 1)\n{about}", fontsize=9)
    save(figure, out / "factors.png")

    skips = {point["value"]: point["member"] for point in points if point["factor"] == "skip"}
    if not skips:
        return [out / "factors.png"]
    figure, (ax, beside) = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    base: tuple[str, list[float]] | None = None
    for (skip, member), colour in zip(skips.items(), COLOURS):
        curve = [(int(row["step"]), float(row["loss"])) for row in losses if row["member"] == member]
        window = max(1, round(SMOOTH * len(curve)))
        means = [sum(loss for _, loss in curve[i : i + window]) / window for i in range(len(curve) - window + 1)]
        steps = [step for step, _ in curve[window - 1 :]]
        base = base or (skip, means)
        ax.plot(steps, means, color=colour, label=f"{skip}: {means[-1]:.4f} at the end")
        beside.plot(steps, [100 * (mine / other - 1) for mine, other in zip(means, base[1])], color=colour, label=skip)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter("{x:.3g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="y")
    ax.set_ylabel("training loss, mean of (ε − ε̂)²")
    ax.legend(frameon=False, title=f"long skip (mean over {SMOOTH:.0%} of the run)")
    assert base is not None
    beside.set_ylabel(f"difference from {base[0]}, %")
    beside.grid(axis="y")
    beside.legend(frameon=False)
    for each in (ax, beside):
        each.set_xlabel("optimizer steps")
    title = "Training loss by skip mode, same data and noise (compare the paper's Figure 2a)"
    figure.suptitle(f"{title}\n{where}", fontsize=9)
    save(figure, out / "losses.png")
    return [out / "factors.png", out / "losses.png"]
