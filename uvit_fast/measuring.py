"""The two sides of a measurement: samples drawn while they are measured, a config's training images, and the features
of both.
"""

import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from uvit_fast.build import build_dataset
from uvit_fast.config import Config
from uvit_fast.data import reading
from uvit_fast.data.autoencoders import load_decoder
from uvit_fast.data.image_folder import ImageFolder
from uvit_fast.data.in_memory import TensorImages
from uvit_fast.diffusion.noise import Draws
from uvit_fast.evaluation import evaluate as figures
from uvit_fast.evaluation import reference
from uvit_fast.evaluation.classifier import ClassifierFeatures, cached_classifier
from uvit_fast.evaluation.features import Extractor, InceptionFeatures
from uvit_fast.evaluation.inception import load_inception
from uvit_fast.evaluation.sources import Images, hash_of, lossy_share, open_files, open_npz
from uvit_fast.provenance import UNKNOWN, Provenance, shown
from uvit_fast.runtime.ahead import ahead
from uvit_fast.runtime.device import pick_device
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import other_than
from uvit_fast.runtime.processes import ALONE, World
from uvit_fast.sampling.captured import GraphSampler, on_a_gpu
from uvit_fast.sampling.conditions import chosen_labels
from uvit_fast.sampling.images import to_uint8
from uvit_fast.sampling.loop import check_finite, sample
from uvit_fast.sampling.output import sample_names, save_pngs

GRID = "grid.png"  # the overview that `uvit-fast sample` adds to a folder of samples


def open_images(path: Path) -> Images:
    """Open a folder of images, at any depth, read as in training, or an .npz with `arr_0`, as ADM's samples.

    Raises:
        UserError: nothing there, or something else.
    """
    if os.path.isdir(path):  # False, too, where the name is none
        listing = reading.list_images(path, labelled=False)
        files = [name for name in listing.files if name.rsplit("/", 1)[-1] != GRID]
        grids = [name for name in listing.files if name.endswith(f"/{GRID}")]
        if not files:
            raise UserError(f"{reading.shown(str(path))}: no images but {GRID}, an overview")
        images = open_files(reading.shown(str(path)), path, files, _read_rgb)
        notes = [
            *listing.notes,
            *[f"left out {reading.shown(name)}: an overview, as uvit-fast sample adds" for name in grids],
        ]
        images.warnings = [f"{images.name}: {note}" for note in notes]
        return images
    if path.suffix == ".npz":
        return replace(open_npz(path), name=reading.shown(str(path)))
    wanted = "expected a folder of images, or an .npz with arr_0"
    raise UserError(f"{reading.shown(str(path))}: {wanted}, got {other_than(path)}")


def _read_rgb(file: Path) -> np.ndarray:
    """Read an image upright: (H, W, 3) uint8."""
    try:
        return np.asarray(reading.read_image(file)[0])
    except reading.BadImage as error:
        raise UserError(f"{reading.shown(str(file))}: not a readable image ({error})") from None


def real_images(cfg: Config, name: str) -> tuple[Images, np.ndarray | None, Provenance]:
    """Return a config's training images without flips, their labels, and the labels' names.

    Raises:
        UserError: its data are not images.
    """
    if cfg.data.name not in ("digits", "cifar10", "fashion_mnist", "images"):
        raise UserError(f"{name}: expected data of images, got {cfg.data.name}; name a folder of images or statistics")
    data = cfg.data.model_copy(update={"flip": False, "decoder": "pillow"})  # the same pixels everywhere
    dataset = build_dataset(cfg.model_copy(update={"data": data}))
    assert isinstance(dataset, TensorImages | ImageFolder)

    def read(parts: list[range]) -> Iterator[np.ndarray]:
        for raw in ahead(lambda part: dataset.raw([(i, 0) for i in part]), parts):
            yield to_uint8(dataset.finish(raw, Draws(torch.Generator()))["x"])

    files = [dataset.folder / file for file in dataset.files] if isinstance(dataset, ImageFolder) else []

    @functools.cache
    def identity() -> str:
        how = (cfg.data.name, cfg.data.crop, cfg.data.background, cfg.data.unreadable, dataset.shape)
        pixels = dataset.images.numpy().tobytes() if isinstance(dataset, TensorImages) else b""
        what = hashlib.sha256(pixels).hexdigest() if pixels else hash_of(files)
        return hashlib.sha256(repr((how, what)).encode()).hexdigest()

    labels = None if dataset.labels is None else np.asarray(dataset.labels)
    lossy = lossy_share(files, dataset.shape[-1]) if files else 0.0
    return Images(f"the data of {name}", len(dataset), read, identity, lossy), labels, Provenance.of(dataset)


def of_classes(images: Images, labels: np.ndarray, names: Provenance, only: list[int], known: Provenance) -> Images:
    """Select the real images of some of a model's classes: by name, or by label if either has no names.

    Raises:
        UserError: the images have no such class.
    """
    wanted = [names.label(known.name(label)) if names.classes and known.classes else label for label in only]
    rows: list[int] = np.flatnonzero(np.isin(labels, wanted)).tolist()
    identity = images.identity
    assert identity is not None
    if not rows:
        raise UserError(f"{images.name}: no image of the classes {shown(map(known.name, only))}")
    return replace(
        images,
        name=f"{images.name}, {shown(map(known.name, only))}",
        count=len(rows),
        read=lambda parts: images.read(
            cast(list[range], [rows[part.start : part.stop] for part in parts])
        ),  # any indices
        identity=lambda: f"{identity()} {rows}",  # labels may change while the images stay
    )


def drawn_images(
    model: nn.Module,
    cfg: Config,
    num: int,
    name: str,
    decode: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    folder: Path | None = None,
    classes: list[int] | None = None,
    known: Provenance = UNKNOWN,
    graphs: GraphSampler | None = None,
) -> Images:
    """Return samples of a model, drawn while they are measured, with labels uniform at random.

    Args:
        model: on its device.
        decode: latents to pixels, for latent models.
        folder: keep the samples there as PNGs.
        classes: labels to draw; default: all of the model's. known: their names.
        graphs: of the model and `decode`, with the captures of other samples; default on a GPU: new ones.

    Raises:
        UserError: the model takes text; while drawing: NaN or infinity among the samples.
    """
    if cfg.model.context_dim:
        raise UserError(f"evaluate: {cfg.name} takes text features, which this command cannot make; sample first")
    labels: Tensor | None = None
    if cfg.model.num_classes:
        drawn = torch.tensor(classes or chosen_labels(None, cfg, known))
        labels = drawn[torch.randint(len(drawn), (num,), generator=torch.Generator().manual_seed(seed))]
    graphs = graphs or on_a_gpu(model, decode)
    options: dict[str, Any] = {"labels": labels, "seed": seed, "graphs": graphs}
    names = sample_names(None if labels is None else labels.tolist(), None, known)

    def read(parts: list[range]) -> Iterator[np.ndarray]:
        for part, x in zip(parts, sample(model, cfg, num, parts=parts, **options)):
            x = decode(x) if decode and graphs is None else x
            images = to_uint8(check_finite(x, f"{name}: samples {part.start} to {part.stop - 1}"))
            if folder:
                save_pngs(folder, [images], names, part.start)
            yield images

    return Images(f"{name}, seed {seed}", num, read)


def yardstick(
    kind: str,
    real: Config | str,
    name: str,
    inception: tuple[str | None, bool],
    device: torch.device | str,
    cache: Path,
    batch: int = 50,
    world: World = ALONE,
    only: list[int] | None = None,
    known: Provenance = UNKNOWN,
) -> tuple[Extractor, reference.Reference]:
    """Return the features with which samples are measured, and the real images' statistics in them.

    Args:
        kind: "inception", or "digits-fid": those of a small classifier, trained on the labelled data of `real`.
        real: a config whose data are the real images, or the path of statistics or images.
        name: of `real`, in messages.
        inception: its weight file (None: among torch.hub's downloads), and whether to download it if it is missing.
        world: its processes divide the real images; rank 0 alone downloads, trains and caches.
        only, known: the labels whose real images count if `real` is a config, see `of_classes`; default: all.

    Raises:
        UserError: digits-fid without labelled data, no weight file, or a reference that cannot be read.
    """
    images = labels = counted = None
    if isinstance(real, Config):
        images, labels, names = real_images(real, name)
        counted = images if only is None or labels is None else of_classes(images, labels, names, only, known)
    if kind == "digits-fid":
        if images is None or counted is None or labels is None:
            raise UserError(f"digits-fid: expected --reference to be a YAML whose data have labels, got {name}")
        model = world.in_turn(lambda: cached_classifier(images, labels, cache, device))
        extractor = ClassifierFeatures(model, device)
        return extractor, reference.reference_from_images(counted, extractor, cache, batch, world=world)
    network, sha = world.in_turn(lambda: load_inception(*inception))
    like = lambda preprocessing: InceptionFeatures(network, sha, device, preprocessing)  # noqa: E731
    if counted is not None:
        return like("tensorflow"), reference.reference_from_images(
            counted, like("tensorflow"), cache, batch, world=world
        )
    assert not isinstance(real, Config)
    statistics = reference.load_reference(real, like, open_images, cache, batch, world=world)
    statistics.name = name
    return like(statistics.like), statistics


def training_evaluation(cfg: Config, known: Provenance) -> Callable[[nn.Module, int], dict[str, float]] | None:
    """Return what the trainer calls every `evaluate.every` steps on rank 0, or None if the config draws no samples.

    Returns:
        measure(model with EMA weights, step) -> figures by name, the Fréchet distance first.

    Raises:
        UserError, ImportError: from `yardstick`, `drawn_images` and the decoder: before training, not after hours.
    """
    if cfg.evaluate is None or not cfg.evaluate.drawn:
        return None
    how, device = cfg.evaluate, pick_device(cfg.device)
    if cfg.model.context_dim:
        raise UserError(
            "evaluate: samples of a model of text cannot be measured while it trains; "
            "expected evaluate.held_out, or no "
            "such section"
        )
    decode = load_decoder(cfg, device, known) if cfg.latent else None
    real = how.reference or cfg
    name = how.reference or "this config"
    extractor, statistics = yardstick(
        how.features, real, name, (how.inception, False), device, reference.default_cache()
    )

    size = cfg.model.img_size
    if decode:
        with torch.inference_mode():  # 8 x 8 latents, to see how many pixels one stands for
            size *= decode(torch.zeros(1, cfg.model.in_chans, 8, 8, device=device)).shape[2] // 8
    figures.require_size((size, size), cfg.name, statistics)

    def measure(model: nn.Module, step: int) -> dict[str, float]:
        samples = drawn_images(model, cfg, how.drawn, f"step {step}", decode, known=known)
        result = figures.evaluate(samples, statistics, extractor, progress=False)
        assert result is not None
        for text in result["warnings"]:
            warnings.warn(text.replace(samples.name, "the samples"), stacklevel=1)  # the same at every step: said once
        return result["metrics"]

    return measure
