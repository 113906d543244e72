"""`uvit-fast <command>`: each command is a function of parsed arguments; a user's mistake is one line and exit code 2."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from uvit_fast.config import UserError, load_config


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="uvit-fast", description="U-ViT: sample, inspect, measure.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    command = _add(commands, "info", info, "versions, devices, and which kernels and attention would run, and why")
    command.add_argument("--config", help="report for this config's model only")

    command = _add(commands, "sample", sample, "draw images from a checkpoint")
    _config_arguments(command)
    command.add_argument(
        "--checkpoint", required=True, help=".pth, .safetensors, or a run folder (its newest EMA weights)"
    )
    command.add_argument("--out", required=True, help="folder for the images, or a .npz file in ADM's format")
    command.add_argument("--num", type=_positive, default=16, help="images to draw (default 16)")
    command.add_argument("--classes", help="labels, as 207,360; default: all of the model's classes in equal shares")
    command.add_argument("--seed", type=int, default=0, help="sample i depends on the seed and i only (default 0)")
    command.add_argument("--steps", type=_positive, help="network evaluations a sample; default: the config's")
    command.add_argument(
        "--cfg-scale", type=float, help="guidance in diffusers' convention, 1 + s; 1: none; default: the config's"
    )
    command.add_argument("--batch", type=_positive, default=50, help="images at a time (default 50)")
    command.add_argument("--resume", action="store_true", help="continue an interrupted job with the same settings")

    command = _add(commands, "convert", convert, "a checkpoint as a diffusers pipeline folder, or back as a .pth")
    _config_arguments(command)
    command.add_argument("--checkpoint", required=True, help=".pth, .safetensors, a run folder, or a pipeline folder")
    command.add_argument("--out", required=True, help="a new folder for the pipeline, or a .pth file")
    command.add_argument("--vae", help="the pipeline's autoencoder, or none; default: the config's decoder")

    command = _add(commands, "evaluate", evaluate, "FID, sFID, Inception score, precision, recall, KID of samples")
    command.add_argument("--samples", help="folder of PNG or JPEG, or an .npz with arr_0; or draw them, with:")
    command.add_argument("--config", help="the YAML file of the model to sample from")
    command.add_argument("--checkpoint", help="its weights: .pth, .safetensors, or a run folder")
    command.add_argument("--num", type=_positive, default=50_000, help="samples to draw (default 50000)")
    command.add_argument("--seed", type=int, default=0, help="of the drawn samples and their labels (default 0)")
    command.add_argument("--save-images", metavar="DIR", help="keep the drawn samples as PNGs (default: not written)")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, as sample.guidance_scale=0.4"
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
    command.add_argument("--batch", type=_positive, default=50, help="images at a time (default 50)")
    command.add_argument("--cache", help="folder for statistics of real images (default ~/.cache/uvit-fast)")
    command.add_argument("--out", help="JSON of the figures; default: beside the samples, <samples>.evaluation.json")

    command = _add(commands, "extract", extract, "images (and captions) as latents that training reads")
    _config_arguments(command)
    command.add_argument(
        "--images", required=True, metavar="DIR", help="one folder a class where the model has classes"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="of the shards; continues what is there")
    command.add_argument(
        "--vae", help="AutoencoderKL: a folder, or owner/repository on the hub; default: the decoder's"
    )
    command.add_argument("--captions", metavar="JSON", help="of the images, in COCO's format, for models of text")
    command.add_argument(
        "--clip", default="openai/clip-vit-large-patch14", help="text encoder: a folder, or a hub name"
    )
    command.add_argument("--no-mirror", action="store_true", help="leave out the mirror images")
    command.add_argument("--unreadable", choices=["skip", "refuse"], default="skip", help="files that are no images")
    command.add_argument(
        "--unusual",
        choices=["convert", "skip", "refuse"],
        default="convert",
        help="greyscale, CMYK, 16-bit and EXIF-rotated images (default: converted to upright RGB)",
    )
    command.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="stored (default float16)")
    command.add_argument("--shard", type=_positive, default=4096, help="images a shard (default 4096)")
    command.add_argument("--batch", type=_positive, default=32, help="images at a time (default 32)")
    command.add_argument("--workers", type=_positive, default=4, help="threads that decode images (default 4)")

    command = _add(commands, "data", data, "fetch a dataset, or check one before a long run")
    actions = command.add_subparsers(dest="action", required=True, metavar="action")
    action = actions.add_parser("cifar10", help="CIFAR-10's python batches")
    action.add_argument("--download", action="store_true", required=True, help="fetch 170 MB from its authors' site")
    action.add_argument("--out", default="data", metavar="DIR", help="gets cifar-10-batches-py (default data)")
    action = actions.add_parser("check", help="read everything; name each damaged shard, unreadable or unusual image")
    action.add_argument("folder", help="of latents, or of images")

    command = _add(commands, "demo", demo, "sample the digits run, and measure whether the samples are good")
    command.add_argument("--run-dir", default="runs/digits", help="the run's folder (default runs/digits)")

    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except (UserError, ImportError) as error:
        print(f"uvit-fast: {error}", file=sys.stderr)
        return 2


def _add(commands, name: str, run: Callable, help: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=help)
    command.set_defaults(run=run)
    return command


def _config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", required=True, help="a YAML file, such as configs/h2_256.yaml")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, as train.batch_size=512"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def info(args: argparse.Namespace) -> None:
    """Print what is installed and what would run."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import uvit_fast
    from uvit_fast.model import ops

    print(f"uvit-fast {uvit_fast.__version__}, Python {sys.version.split()[0]}")
    for package in ("torch", "triton", "deepspeed", "diffusers", "transformers", "flash-attn", "xformers"):
        try:
            print(f"  {package:14s}{version(package)}")
        except PackageNotFoundError:
            print(f"  {package:14s}not installed")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for i, gpu in enumerate(gpus):
        print(f"  cuda:{i}        {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    if not gpus:
        print(f"  cpu           {torch.get_num_threads()} threads; no CUDA device")

    device = "cuda" if gpus else "cpu"
    names = [args.config] if args.config else sorted(map(str, Path("configs").glob("*.yaml")))
    shapes = {}  # (D, heads) -> the configs that have it
    for name in names:
        model = load_config(name).model
        shapes.setdefault((model.embed_dim, model.num_heads), []).append(Path(name).stem)
    for (dim, heads), configs in sorted(shapes.items()):
        print(f"\nD = {dim}, {heads} heads of {dim // heads} ({', '.join(configs)}) on {device}")
        for op, choice in ops.describe(dim, heads, "auto", "auto", device).items():
            print(f"  {op:16s}{choice}")


def sample(args: argparse.Namespace) -> None:
    """Draw images; write PNGs and a grid into a folder, or an .npz."""
    import numpy as np

    from uvit_fast import jobs, sampling
    from uvit_fast.diffusion.cudagraph import GraphSampler
    from uvit_fast.images import save_grid, to_uint8

    cfg = load_config(args.config, args.set)
    if cfg.model.context_dim:
        raise UserError(f"sample: {cfg.name} takes text features, which this command cannot make; use the Python API")
    scale = None if args.cfg_scale is None else args.cfg_scale - 1  # the paper's s
    if scale is not None and scale < 0:
        raise UserError(f"--cfg-scale: expected at least 1 (no guidance), got {args.cfg_scale}")
    device = sampling.pick_device(cfg.device)
    labels = None
    if cfg.model.num_classes:
        every = range(cfg.model.num_classes - (cfg.null_label is not None))
        classes = sampling.check_labels(_numbers(args.classes) if args.classes else list(every), cfg)
        labels = sampling.spread_labels(args.num, classes)
    elif args.classes:
        sampling.check_labels(_numbers(args.classes), cfg)
    model = sampling.load_for_sampling(cfg, args.checkpoint, device)
    decode = sampling.load_decoder(cfg, device) if cfg.latent else None

    options = {"steps": args.steps, "guidance_scale": scale, "seed": args.seed, "labels": labels}
    graphs = GraphSampler(model, decode) if device.type == "cuda" else None
    decode = decode if decode and not graphs else lambda x: x

    def draw(first: int, last: int) -> np.ndarray:
        batches = sampling.sample(model, cfg, last, first=first, batch=args.batch, graphs=graphs, **options)
        return np.concatenate([to_uint8(decode(x)) for x in batches])

    out = Path(args.out)
    settings = {
        name: getattr(args, name)
        for name in ("config", "set", "checkpoint", "num", "classes", "seed", "steps", "cfg_scale")
    }
    job = jobs.Job(out.with_name(out.name + ".parts"), settings, args.num, args.batch, resume=args.resume)
    images = job.run(draw)
    if images is None:  # another rank writes
        return
    names = None if labels is None else labels.numpy()
    if out.suffix == ".npz":
        sampling.save_npz(out, images, names)
    else:
        sampling.save_pngs(out, images, names)
        save_grid(images[:100], out / "grid.png", columns=min(10, args.num))
    job.close()
    print(f"wrote {args.num} images to {out}")


def convert(args: argparse.Namespace) -> None:
    """Write weights as a pipeline folder (safetensors), or as a .pth with the published names."""
    import torch

    from uvit_fast import build_model, sampling
    from uvit_fast.model.weights import load_weights, read_weights

    cfg, out = load_config(args.config, args.set), Path(args.out)
    if out.exists():
        raise UserError(f"{out}: there already; expected a new name")
    source = sampling.find_weights(args.checkpoint)
    state = read_weights(source)
    if out.suffix == ".pth":
        load_weights(build_model(cfg), state, source=str(source))  # refuses what does not fit
        torch.save(state, out)
    else:
        from uvit_fast.pipeline import make_pipeline

        vae = args.vae or (cfg.latent.decoder if cfg.latent else "none")
        components = {} if vae == "none" else {"vae": sampling.load_autoencoder(vae)}
        make_pipeline(cfg, state, **components).save_pretrained(out)
    print(f"wrote {out}")


def evaluate(args: argparse.Namespace) -> None:
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
    real, labels = _real_images(args.reference) if is_config else (None, None)
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


def _real_images(config: str):
    """A config's training images as (features.Images, labels or None), without flips."""
    import hashlib

    import numpy as np
    import torch

    from uvit_fast.build import build_dataset
    from uvit_fast.evaluation.features import Images
    from uvit_fast.images import to_uint8

    cfg = load_config(config, ["data.flip=false"])
    if cfg.data.name not in ("digits", "cifar10", "images"):
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
            for file in dataset.files:
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


def extract(args: argparse.Namespace) -> None:
    """Write the shards; the report on the way to them is in their folder. `torchrun -m uvit_fast.cli extract ...` uses all GPUs."""
    from uvit_fast import sampling
    from uvit_fast.data import encoders
    from uvit_fast.data.datasets import CROPS, require_folder
    from uvit_fast.data.extract import Extraction, Policy, Text, list_captioned, summary
    from uvit_fast.data.reading import list_images

    cfg = load_config(args.config, args.set)
    if cfg.latent is None:
        raise UserError(f"extract: {cfg.name} works on pixels; expected a config with a latent section")
    if bool(args.captions) != bool(cfg.model.context_dim):
        raise UserError(f"extract: {cfg.name} {'needs' if cfg.model.context_dim else 'takes no'} --captions")
    folder = require_folder(args.images, "images", key="--images")
    device = sampling.pick_device(cfg.device)
    name = args.vae or cfg.latent.decoder
    vae, text = sampling.load_autoencoder(name).to(device), None
    if args.captions:
        listing, captions = list_captioned(folder, Path(args.captions))
        text = Text(captions, *encoders.load_text_encoder(args.clip, device))
    else:
        listing = list_images(folder, labelled=cfg.model.num_classes > 0)
    extraction = Extraction(
        listing,
        Path(args.out),
        encoders.vae_encoder(vae),
        crop=CROPS[cfg.data.crop],
        size=cfg.model.img_size * 2 ** (len(vae.config.block_out_channels) - 1),
        scale_factor=cfg.latent.scale_factor,
        vae=encoders.vae_identity(vae, name),
        mirror=not (args.no_mirror or args.captions),
        text=text,
        policy=Policy(args.unreadable, args.unusual),
        dtype=args.dtype,
        shard_images=args.shard,
        batch=args.batch,
        workers=args.workers,
    )
    report = extraction.run()
    print(summary(extraction.out, report) if report else f"{args.out}: this process is done; others are not")


def data(args: argparse.Namespace) -> int:
    """Fetch CIFAR-10, or read a whole folder and name what is wrong: exit code 1 then."""
    from uvit_fast.data import check, download

    if args.action == "cifar10":
        print(f"data.path={download.download_cifar10(Path(args.out))}")
        return 0
    return 1 if check.check_folder(args.folder) else 0


def demo(args: argparse.Namespace) -> int:
    """Sample and measure the digits; see uvit_fast/demo.py."""
    from uvit_fast.demo import run

    return run(Path(args.run_dir))


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--classes: expected whole numbers with commas, such as 207,360, got {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
