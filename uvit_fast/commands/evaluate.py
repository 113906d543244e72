"""`uvit-fast evaluate`: FID, sFID, Inception score, precision, recall, KID of samples."""

import argparse
import sys
from pathlib import Path

from uvit_fast.commands.arguments import positive
from uvit_fast.config import UserError, load_config

HELP = "FID, sFID, Inception score, precision, recall, KID of samples"


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--samples", help="folder of PNG or JPEG, or an .npz with arr_0; or draw them, with:")
    command.add_argument("--config", help="the YAML file of the model to sample from")
    command.add_argument("--checkpoint", help="its weights: .pth, .safetensors, or a run folder")
    command.add_argument("--num", type=positive, default=50_000, help="samples to draw (default 50000)")
    command.add_argument("--seed", type=int, default=0, help="of the drawn samples and their labels (default 0)")
    command.add_argument("--save-images", metavar="DIR", help="keep the drawn samples as PNGs (default: not written)")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override, as data.path=/my/images; also of --reference YAML",
    )
    command.add_argument(
        "--reference",
        required=True,
        help="statistics (.npz of ADM or pytorch-fid), images (folder or .npz), or a YAML whose data are the real images",
    )
    command.add_argument(
        "--features",
        choices=["inception", "digits-fid"],
        default="inception",
        help="digits-fid: of a small classifier, trained on the labelled data of --reference YAML; no FID",
    )
    command.add_argument("--inception", metavar="FILE", help="the weight file; default: among torch.hub's downloads")
    command.add_argument("--download", action="store_true", help="fetch the weight file where it is missing")
    command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if any")
    command.add_argument("--batch", type=positive, default=50, help="images at a time (default 50)")
    command.add_argument("--cache", help="folder for statistics of real images (default ~/.cache/uvit-fast)")
    command.add_argument("--out", help="JSON of the figures; default: beside the samples, <samples>.evaluation.json")


def run(args: argparse.Namespace) -> None:
    """Measure samples, of a file or fresh ones, against real images; print the figures and write them."""
    import numpy as np

    from uvit_fast.evaluation import evaluate as figures
    from uvit_fast.evaluation import features, reference
    from uvit_fast.evaluation.classifier import ClassifierFeatures, cached_classifier
    from uvit_fast.evaluation.inception import load_inception
    from uvit_fast.sampling import pick_device

    drawn = bool(args.config and args.checkpoint)
    if drawn == bool(args.samples) or bool(args.config) != bool(args.checkpoint):
        raise UserError("evaluate: expected either --samples, or --config and --checkpoint")
    device = pick_device(args.device)
    cache = Path(args.cache) if args.cache else reference.default_cache()
    samples = _drawn_images(args, device) if drawn else features.open_images(args.samples)
    is_config = Path(args.reference).suffix in (".yaml", ".yml")
    real, labels = _real_images(args.reference, args.set) if is_config else (None, None)
    if args.features == "digits-fid":
        if labels is None:
            raise UserError(
                f"digits-fid: expected --reference to be a YAML whose data have labels, got {args.reference}"
            )
        pixels = np.concatenate(list(real.batches(1000)))
        extractor = ClassifierFeatures(cached_classifier(pixels, labels, real.identity(), cache, device), device)
        statistics = reference.reference_from_images(real, extractor, cache, args.batch)
    else:
        network = load_inception(args.inception, args.download)
        like = lambda name: features.InceptionFeatures(*network, device, name)  # noqa: E731
        if is_config:
            statistics = reference.reference_from_images(real, like("tensorflow"), cache, args.batch)
        else:
            statistics = reference.load_reference(args.reference, like, cache, args.batch)
        extractor = like(statistics.like)
    result = figures.evaluate(samples, statistics, extractor, args.batch)
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(figures.table(result))
    out = Path(args.out or f"{str(args.samples or args.checkpoint).rstrip('/')}.evaluation.json")
    figures.write(result, out)
    print(f"wrote {out}")


def _real_images(config: str, overrides: list[str]):
    """A config's training images as (features.Images, labels or None), without flips."""
    import hashlib

    import numpy as np
    import torch

    from uvit_fast.build import build_dataset
    from uvit_fast.evaluation.features import Images
    from uvit_fast.images import to_uint8

    cfg = load_config(config, [*overrides, "data.flip=false", "data.decoder=pillow"])  # the same pixels everywhere
    if cfg.data.name not in ("digits", "cifar10", "fashion_mnist", "images"):
        raise UserError(
            f"{config}: expected data of images, got {cfg.data.name}; name a folder of images or statistics"
        )
    dataset = build_dataset(cfg)

    def batches(size: int):
        for start in range(0, len(dataset), size):
            raw = dataset.__getitems__([(i, 0) for i in range(start, min(start + size, len(dataset)))])
            yield to_uint8(dataset.finish(raw, torch.Generator())["x"])

    def identity() -> str:
        digest = hashlib.sha256(repr((cfg.data.name, cfg.data.crop, dataset.shape)).encode())
        if hasattr(dataset, "files"):
            for name in dataset.files:
                file = dataset.folder / name
                digest.update(f"{file}\0{file.stat().st_size}\0{file.stat().st_mtime_ns}\n".encode())
        else:
            digest.update(dataset.images.numpy().tobytes())
        return digest.hexdigest()

    labels = None if dataset.labels is None else np.asarray(dataset.labels)
    return Images(f"the data of {config}", len(dataset), batches, identity), labels


def _drawn_images(args: argparse.Namespace, device):
    """Samples of a checkpoint as features.Images, drawn while they are measured; labels uniform at random."""
    import torch
    from PIL import Image

    from uvit_fast import sampling
    from uvit_fast.diffusion.cudagraph import GraphSampler
    from uvit_fast.evaluation.features import Images
    from uvit_fast.images import to_uint8

    cfg = load_config(args.config, args.set)
    if cfg.model.context_dim:
        raise UserError(f"evaluate: {cfg.name} takes text features, which this command cannot make; sample first")
    labels = None
    if cfg.model.num_classes:
        classes = cfg.model.num_classes - (cfg.null_label is not None)
        labels = torch.randint(classes, (args.num,), generator=torch.Generator().manual_seed(args.seed))
    model = sampling.load_for_sampling(cfg, args.checkpoint, device)
    decode = sampling.load_decoder(cfg, device) if cfg.latent else None
    graphs = GraphSampler(model, decode) if device.type == "cuda" else None
    folder = Path(args.save_images) if args.save_images else None

    def batches(size: int):
        number = 0
        for x in sampling.sample(model, cfg, args.num, labels=labels, seed=args.seed, batch=size, graphs=graphs):
            x = decode(x) if decode and not graphs else x
            if not torch.isfinite(x).all():
                raise UserError(f"{args.checkpoint}: samples {number} to {number + len(x) - 1} hold NaN or infinity")
            images = to_uint8(x)
            for i, image in enumerate(images if folder else (), number):
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.squeeze()).save(folder / f"{i:06d}.png")
            number += len(x)
            yield images

    return Images(f"{args.checkpoint}, seed {args.seed}", args.num, batches)
