"""The gallery's functions, without a page: pictures as they are denoised, side by side, along walks, and from files."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import uvit_fast
from uvit_fast.build import build_sampler
from uvit_fast.config import Config
from uvit_fast.diffusion.noise import sample_generators, sample_noise
from uvit_fast.gallery.recipe import Recipe, checked, from_png, to_png
from uvit_fast.gallery.source import Choices, Source
from uvit_fast.gallery.watched import Watched
from uvit_fast.provenance import shown
from uvit_fast.runtime.device import as_device
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.graphs import CudaGraphs, Graphs
from uvit_fast.runtime.text import cut
from uvit_fast.sampling.captured import GraphSampler
from uvit_fast.sampling.conditions import check_guidance, check_labels
from uvit_fast.sampling.images import to_uint8
from uvit_fast.sampling.loop import check_finite, solve
from uvit_fast.sampling.weights import find_weights, load_found, provenance_of

FRAMES = 10  # shown states of a picture
MOST = 64  # pictures at a time


@dataclass(frozen=True)
class View:
    """Pictures while they are denoised.

    Attributes:
        images: (N, H, W, C) uint8.
        done, steps: network evaluations so far, and in total.
        milliseconds: of the loop, once it is done: without the decoder of latents, and a replay without its capture.
        replayed: whether it was a captured loop's replay.
    """

    images: np.ndarray
    done: int
    steps: int
    milliseconds: float | None = None
    replayed: bool = False


class Session:
    """Checkpoints to sample from. One draw runs at a time; others wait.

    Args:
        checkpoints: config and weights, see `find_weights`, by the name that recipes use.
        device: where they run; on a GPU through captured loops.
        clip: the text encoder of text models; default: the training data's.
        graphs: what records and replays; default: CUDA graphs, on a GPU.

    Raises:
        UserError: no such checkpoint, or of another diffusion than its config's. The weights are loaded at first use.
    """

    def __init__(
        self,
        checkpoints: Mapping[str, tuple[Config, str | Path]],
        device: torch.device | str,
        clip: str | None = None,
        graphs: Graphs | None = None,
    ):
        assert checkpoints
        self.device = device = as_device(device)
        self._sources: dict[str, Source] = {}
        for name, (cfg, checkpoint) in checkpoints.items():
            path = find_weights(checkpoint)
            self._sources[name] = Source(name, cfg, path, provenance_of(cfg, path), device, clip)
        self._graphs: Graphs | None = CudaGraphs() if graphs is None and device.type == "cuda" else graphs
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self._sources)

    def choices(self, checkpoint: str) -> Choices:
        """Return the possible settings of a checkpoint.

        Raises:
            UserError: the session has no such checkpoint.
        """
        return self._source(checkpoint).choices

    def recipes(self, base: Recipe, labels: list[int] | None = None, num: int | None = 1) -> list[Recipe]:
        """Return `num` recipes for each class, like `base` except for the seed, which counts up: classes share noise.

        Args:
            labels: for a class-conditional model; default: the label of `base`.

        Raises:
            UserError: more than MOST, or no class for a model that needs one.
        """
        wanted = [base.label] if labels is None else labels
        if base.label is not None and not wanted:
            raise UserError("classes: expected one or more, got none")
        if num is None or not 1 <= len(wanted) * num <= MOST:
            raise UserError(f"pictures: expected 1 to {MOST} at a time, got {num and len(wanted) * num}")
        return [checked(base, label=label, seed=base.seed + i) for label in wanted for i in range(num)]

    def draw(self, recipes: list[Recipe]) -> Iterator[View]:
        """Draw pictures of one loop as they are denoised; the last view shows the finished ones.

        On a CPU each view comes as soon as its evaluation is done. A captured loop is replayed whole, with its states.
        Closing the iterator ends the loop at its next view.

        Args:
            recipes: up to MOST, with equal `loop`.

        Raises:
            UserError: a class, prompt, sampler, precision or guidance that this checkpoint does not support; weights
                that cannot be loaded; samples that are not finite.
        """
        assert recipes and len({recipe.loop for recipe in recipes}) == 1
        views: queue.Queue[View | BaseException | None] = queue.Queue()
        stopped = threading.Event()

        def show(view: View) -> None:
            if stopped.is_set():
                raise _Stopped
            views.put(view)

        def work() -> None:
            try:
                with self._lock, torch.no_grad():
                    self._draw(recipes, show)
                views.put(None)
            except BaseException as error:
                views.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while (view := views.get()) is not None:
                if isinstance(view, BaseException):
                    raise view
                yield view
        finally:
            stopped.set()

    def side_by_side(self, left: list[Recipe], right: list[Recipe]) -> Iterator[tuple[View | None, View | None]]:
        """Draw two settings or two checkpoints from the same noise, the left one first.

        Raises:
            UserError: the noise differs, by seeds or shapes; or as `draw`.
        """
        shapes = [self._shape(side[0].checkpoint) for side in (left, right)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"side by side: expected checkpoints whose noise has one shape, got {shapes[0]} and {shapes[1]}"
            )
        if [r.seed for r in left] != [r.seed for r in right]:
            raise UserError("side by side: expected the same seeds on both sides")
        done = None
        for done in self.draw(left):
            yield done, None
        for view in self.draw(right):
            yield done, view

    def png(self, image: np.ndarray, recipe: Recipe) -> bytes:
        """Return a finished picture (H, W, C) uint8 as a PNG that records what made it."""
        source = self._source(recipe.checkpoint)
        return to_png(
            image,
            recipe,
            {
                "uvit_fast": uvit_fast.__version__,
                "weights": source.digest,
                "class": None if recipe.label is None else source.known.name(recipe.label),
                "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
                **source.fixed,
            },
        )

    def load(self, data: bytes) -> tuple[Recipe, list[str]]:
        """Return the recipe of a PNG from `png`, for this session's checkpoints, and notes on what differs here.

        Raises:
            UserError: it is not such a PNG, or no checkpoint here can follow its recipe.
        """
        recipe, said = from_png(data)
        same = [name for name, source in self._sources.items() if source.digest == said.get("weights")]
        name = recipe.checkpoint if recipe.checkpoint in same or not same else same[0]
        if name not in self._sources:
            raise UserError(f"picture: made by {cut(name)}, which is not here; expected one of {shown(self.names)}")
        source, notes = self._sources[name], []
        if not same:
            notes.append(f"other weights are called {name} here than those that made it")
        for key, now in source.fixed.items():
            if key in said and said[key] != now:
                notes.append(f"made with sample.{key} {cut(str(said[key]))}, here {now}")
        precision = recipe.precision
        if precision not in source.choices.precisions:
            precision = source.choices.precisions[0]
            notes.append(f"made in {recipe.precision}, drawn here in {precision}")
        recipe = checked(recipe, checkpoint=name, precision=precision)
        self._check(recipe)
        if recipe.label is not None and said.get("class") not in (None, here := source.known.name(recipe.label)):
            notes.append(f"its class was {cut(str(said['class']))}, here {here}")
        return recipe, notes

    def _source(self, checkpoint: str) -> Source:
        if checkpoint not in self._sources:
            raise UserError(f"checkpoint: expected one of {shown(self.names)}, got {cut(checkpoint)}")
        return self._sources[checkpoint]

    def _shape(self, checkpoint: str) -> tuple[int, int, int]:
        model = self._source(checkpoint).cfg.model
        return model.in_chans, model.img_size, model.img_size

    def _check(self, recipe: Recipe) -> None:
        """Refuse what its checkpoint does not support."""
        source = self._source(recipe.checkpoint)
        choices = source.choices
        for key, got, among in (
            ("sampler", recipe.sampler, choices.samplers),
            ("precision", recipe.precision, choices.precisions),
        ):
            if got not in among:
                raise UserError(f"{key}: {source.name} takes {shown(among)} here, got {cut(got)}")
        check_guidance(recipe.cfg_scale - 1, source.cfg)
        if (recipe.label is not None) != bool(choices.classes):
            raise UserError(f"class: {source.name} has {'classes: expected one' if choices.classes else 'none'}")
        if recipe.label is not None:
            check_labels([recipe.label], source.cfg)
        if (recipe.prompt is not None) != choices.text:
            raise UserError(f"prompt: {source.name} takes {'text: expected one' if choices.text else 'none'}")

    def _draw(self, recipes: list[Recipe], show: Callable[[View], None]) -> None:
        for recipe in recipes:
            self._check(recipe)
        first, source = recipes[0], self._source(recipes[0].checkpoint)
        cfg, steps = source.config(first.sampler, first.precision), first.steps
        if first.precision not in source.networks:
            source.networks[first.precision] = load_found(cfg, source.path, self.device)
        model, decode = source.networks[first.precision], source.decode
        x_T = torch.stack([self._noise(recipe) for recipe in recipes]).to(self.device)  # (N, C, H, W)
        keys = torch.cat([sample_generators(recipe.seed, [0], self.device) for recipe in recipes])  # (N,)
        condition, null = self._condition(source, recipes)
        scale, interval = first.cfg_scale - 1, cfg.sample.guidance_interval
        looking = 0.0  # seconds outside the loop

        def view(done: int, x: Tensor, milliseconds: float | None = None, replayed: bool = False) -> None:
            if done == steps:
                check_finite(x, "the pictures")
            show(View(to_uint8(decode(x)), done, steps, milliseconds, replayed))

        def live(done: int, x: Tensor) -> None:
            nonlocal looking
            begun = time.perf_counter()
            if done < steps:
                view(done, x)
            looking += time.perf_counter() - begun

        graphs = None if self._graphs is None else self._captured(self._graphs, source, first.precision, len(recipes))
        sampler = Watched(build_sampler(cfg, steps), FRAMES, live if graphs is None else None)
        replayed = graphs is not None and graphs.prepare(sampler, x_T, condition, null, scale, interval, keys)
        self._wait()
        begun = time.perf_counter()
        states = solve(model, sampler, x_T, condition, null, scale, interval, keys, graphs)  # (N, F, C, H, W)
        self._wait()
        milliseconds = 1000 * (time.perf_counter() - begun - looking)
        if graphs is not None:
            for done, x in zip(sampler.seen[:-1], states.unbind(1)):
                view(done, x)
        view(steps, states[:, -1], milliseconds, replayed)

    def _noise(self, recipe: Recipe) -> Tensor:
        """Return x_T (C, H, W) fp32 of a recipe."""
        shape = self._shape(recipe.checkpoint)
        start = sample_noise(recipe.seed, [0], shape)[0]
        if recipe.to_seed is None:
            return start
        return between(start, sample_noise(recipe.to_seed, [0], shape)[0], recipe.position)

    def _condition(self, source: Source, recipes: list[Recipe]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if source.choices.classes:
            labels = torch.tensor([recipe.label for recipe in recipes], device=self.device)
            return {"y": labels}, {"y": source.cfg.null_label}
        if source.choices.text:
            encode, null = source.text
            return {"context": encode([recipe.prompt or "" for recipe in recipes])}, {"context": null}
        return {}, {}

    def _captured(self, graphs: Graphs, source: Source, precision: str, num: int) -> GraphSampler:
        """Return the sampler with captured loops; a single picture is not padded to a batch captured before."""
        key = precision, num == 1
        if key not in source.graphs:
            share = graphs.budget(self.device) // (4 * len(self._sources))
            source.graphs[key] = GraphSampler(source.networks[precision], max_bytes=share, graphs=graphs)
        return source.graphs[key]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Stopped(Exception):
    """The viewer has gone."""


def between(a: Tensor, b: Tensor, position: float) -> Tensor:
    """Return noise on the great circle from a (0) to b (1), which keeps its norm (Shoemake 1985, slerp): shaped as a,
    fp32.

    Args:
        a, b: noise of one shape, fp32.
    """
    a64, b64 = a.double(), b.double()
    cosine = (a64 * b64).sum() / (a64.norm() * b64.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle < 1e-6:
        return a
    return ((torch.sin((1 - position) * angle) * a64 + torch.sin(position * angle) * b64) / torch.sin(angle)).float()
