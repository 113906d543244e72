"""Settings for sampling from one checkpoint, their measurements, and the Pareto front among them."""

import itertools
import json
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from uvit_fast.config import Config
from uvit_fast.runtime.claims import Claim, Taken
from uvit_fast.runtime.files import read_table, write_table, write_whole
from uvit_fast.runtime.text import parse_yaml, shown

COLUMNS = ["sampler", "steps", "guidance_scale", "guidance_interval", "precision", "cache", "plan", "seed", "images"]
COLUMNS += ["metric", "figure", "seconds", "batch", "device"]  # seconds: per 1,000 images on one device
NO_WORDS = {  # settings that nobody can read -> what it means that they differ
    "config": "are of another model, diffusion, latent, sample.spacing or sample.shift",
    "bytes": "are of what this checkpoint was before it changed",
}


class Point(NamedTuple):
    """One setting for sampling."""

    sampler: str
    steps: int
    scale: float  # the paper's s
    interval: tuple[float, float]
    precision: str
    cache: str

    def settings(self) -> dict[str, Any]:
        """Return the values of the section `sample`."""
        guided = {"guidance_scale": self.scale, "guidance_interval": list(self.interval)}
        return {
            "sampler": self.sampler,
            "steps": self.steps,
            **guided,
            "precision": self.precision,
            "cache": self.cache,
        }

    def lines(self, base: Config) -> str:
        """Return the --set options that turn a config into this setting."""
        before = base.sample.model_dump(mode="json")
        changed = {key: value for key, value in self.settings().items() if value != before[key]}
        options = [f"--set {shlex.quote(f'sample.{key}={_as_yaml(value)}')}" for key, value in changed.items()]
        return " ".join(options) or "(the config as it is)"

    def __str__(self) -> str:
        guided = f"s {self.scale:g}" if self.scale else "unguided"
        inside = "" if self.interval == (0.0, 1.0) else f" in {self.interval[0]:g} to {self.interval[1]:g}"
        others = [self.precision] * (self.precision != "bf16") + [Path(self.cache).name] * (self.cache != "none")
        return ", ".join([f"{self.sampler} {self.steps}", guided + inside, *others])


def _as_yaml(value: Any) -> str:
    if isinstance(value, str) and parse_yaml(value) == value:
        return value  # needs no quotes
    return json.dumps(value, ensure_ascii=False).replace(", ", ",")


class Measured(NamedTuple):
    """A setting's figures over its seeds."""

    point: Point
    figures: list[float]
    seconds: float  # per 1,000 images

    @property
    def figure(self) -> float:
        return sum(self.figures) / len(self.figures)


class Table:
    """points.csv, written whole after each setting, and what all its rows have in common."""

    def __init__(self, out: Path):
        self.out, self.file = out, out / "points.csv"
        self._held: Claim | None = None

    def claim(self, settings: dict[str, Any]) -> str | None:
        """Keep other processes out; return why new rows cannot join those of the table, or None."""
        note = self.out / "settings.json"
        others = self.out.exists() and (not self.out.is_dir() or any(p.name[0] != "." for p in self.out.iterdir()))
        if others and not note.is_file():
            return f"--out {self.out}: expected a new folder, or one that `uvit-fast front` wrote"
        try:
            self._held = Claim(self.out)
        except Taken as taken:
            return f"--out {self.out}: another process writes it, {taken}; expected another folder"
        except OSError as error:
            return f"--out {self.out}: expected a place that can be written to ({error.strerror})"
        try:
            before = json.loads(note.read_text("utf-8")) if note.is_file() else settings
        except ValueError:
            before = None
        if not isinstance(before, dict):
            return f"{note}: damaged; expected another --out"
        for name, value in settings.items():
            if before.get(name) != value:
                differs = f"have {name} {shown(before.get(name))}, got {shown(value)}"
                differs = NO_WORDS.get(name, differs)
                return f"--out {self.out}: its points {differs}; expected another folder"
        write_whole(note, lambda file: file.write_text(json.dumps(settings, indent=1), "utf-8"))
        return None

    def rows(self) -> list[dict]:
        """Return the measured rows.

        Raises:
            UserError: the file is another table, or one of its rows was changed.
        """
        if not self.file.is_file():
            return []
        return read_table(self.file, COLUMNS, "uvit-fast front", lambda row: summarised([row]))

    def write(self, rows: list[dict]) -> None:
        write_table(self.file, COLUMNS, rows)


def row_of(point: Point, changed: Config, contents: str, of: int) -> dict[str, Any]:
    guided = {"guidance_scale": f"{point.scale:g}", "guidance_interval": "{:g}:{:g}".format(*point.interval)}
    return {
        "sampler": point.sampler,
        "steps": str(point.steps),
        **guided,
        "precision": point.precision,
        "cache": point.cache,
        "plan": contents,
        "seed": str(of),
    }


def key_of(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in COLUMNS[: COLUMNS.index("seed") + 1])


def summarised(rows: Iterable[dict[str, str]]) -> list[Measured]:
    """Return the settings of a table, by their seconds; if a plan's file was changed, the rows of its last version."""
    figures: dict[Point, list[float]] = {}
    seconds: dict[Point, list[float]] = {}
    contents: dict[Point, str] = {}
    for row in rows:
        first, last = map(float, row["guidance_interval"].split(":"))
        point = Point(
            row["sampler"],
            int(row["steps"]),
            float(row["guidance_scale"]),
            (first, last),
            row["precision"],
            row["cache"],
        )
        if contents.setdefault(point, row["plan"]) != row["plan"]:
            contents[point] = row["plan"]
            del figures[point], seconds[point]
        figures.setdefault(point, []).append(float(row["figure"]))
        seconds.setdefault(point, []).append(float(row["seconds"]))
    found = [Measured(point, figures[point], min(seconds[point])) for point in figures]
    return sorted(found, key=lambda each: (each.seconds, each.figure))


def pareto(points: Sequence[Measured]) -> list[Measured]:
    """Return those that no other beats in both seconds and figure, the fastest first."""
    best, front = math.inf, []
    for each in sorted(points, key=lambda each: (each.seconds, each.figure)):
        if each.figure < best:
            front.append(each)
            best = each.figure
    return front


def as_good(points: Sequence[Measured]) -> list[str]:
    """Return, in sentences, the settings as good as the most uncached evaluations in bf16, worse by no more than their
    seeds differ, how much faster they are, and whether cached layers are on the front.
    """
    whole = [each for each in points if each.point.cache == "none" and each.point.precision == "bf16"]
    if not whole:
        return []
    most = min(whole, key=lambda each: (-each.point.steps, each.figure))
    if len(most.figures) < 2:
        return ["with --seeds of at least 2 it is said here what is as good as the most evaluations"]
    differ = max(most.figures) - min(most.figures)
    good = [each for each in points if each.figure <= most.figure + differ]
    sentences = [f"{most.point}: {most.figure:.4g}; as good, worse by at most the {differ:.2g} that its seeds differ:"]
    for what, these in (("without cached layers, in bf16", [each for each in good if each in whole]), ("of all", good)):
        fastest = min(these, key=lambda each: each.seconds)
        sentences.append(
            f"  {what}: {fastest.point}, {most.seconds / fastest.seconds:.2f} times as fast, {fastest.figure:.4g}"
        )
    if any(each.point.cache != "none" for each in points):
        best = [str(each.point) for each in pareto(points) if each.point.cache != "none"]
        sentences.append(f"with cached layers on the front: {'; '.join(best) or 'none'}")
    return sentences


def _way(point: Point) -> tuple[str, ...]:
    """Return what a line of the picture has in common: everything but the number of evaluations."""
    guided = f"s {point.scale:g}" if point.scale else "unguided"
    inside = "" if point.interval == (0.0, 1.0) else f"in {point.interval[0]:g} to {point.interval[1]:g}"
    whole = point.cache if point.cache.startswith("outer:") else "plan"
    others = "" if point.precision == "bf16" else point.precision, "" if point.cache == "none" else whole
    return point.sampler, guided, inside, *others


def draw(points: Sequence[Measured], front: Sequence[Measured], about: dict[str, str], path: Path) -> None:
    """Draw the figure against the seconds per 1,000 images: a line per way to sample, its points labelled by their
    number of evaluations, with the range over the seeds; a ring around those on the front.
    """
    from uvit_fast.commands.drawing import COLOURS, INK, pyplot, save

    plt = pyplot()
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, ax = plt.subplots(figsize=(8.0, 5.0), layout="constrained")
    lines: dict[tuple[str, ...], list[Measured]] = {}
    for each in sorted(points, key=lambda each: each.point):
        lines.setdefault(_way(each.point), []).append(each)
    shared = [part for part, *others in zip(*lines) if all(part == other for other in others)]
    looks = itertools.product("os^Dv", COLOURS) if len(lines) > len(COLOURS) else zip("os^Dv", COLOURS)
    for (way, mine), (marker, colour) in zip(lines.items(), looks):
        seconds, figures = [each.seconds for each in mine], [each.figure for each in mine]
        range_ = [
            [each.figure - min(each.figures) for each in mine],
            [max(each.figures) - each.figure for each in mine],
        ]
        name = ", ".join(part for part in way if part and part not in shared) or ", ".join(filter(None, way))
        look: dict[str, Any] = {"color": colour, "linewidth": 0.8, "elinewidth": 1.2, "markersize": 4, "label": name}
        ax.errorbar(seconds, figures, range_, marker=marker, **look)
        for each in mine:
            at, text = (each.seconds, each.figure), str(each.point.steps)
            ax.annotate(text, at, (4, 4), textcoords="offset points", fontsize=7, color=colour)
    ax.step(
        [e.seconds for e in front],
        [e.figure for e in front],
        "o",
        where="post",
        linestyle=":",
        color=INK,
        linewidth=0.8,
        markersize=9,
        markerfacecolor="none",
        label="Pareto front",
        zorder=0,
    )
    ax.set_title(", ".join(["Numbers are evaluations", *filter(None, shared)]), fontsize=9, loc="left")
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(f"seconds of 1,000 images, {about['batch']} at a time, {about['device']}")
    ax.set_ylabel(f"{about['metric']} of {int(about['images']):,} samples (lower is better)")
    ax.grid(axis="both")
    ax.legend(frameon=False)
    save(figure, path)
