"""`uvit-fast extract`: encode images (and captions) as latents for training."""

import argparse
from pathlib import Path

from uvit_fast.commands.arguments import config_arguments, existing, positive
from uvit_fast.config import load_config
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.processes import follow_launcher

HELP = "encode images (and captions) as latents for training"
EXAMPLE = "uvit-fast extract --config h2_256 --images imagenet/train --out latents"


def arguments(command: argparse.ArgumentParser) -> None:
    config_arguments(command)
    group = command.add_argument_group("images")
    group.add_argument("--images", required=True, metavar="DIR", help="one folder per class, if the model has classes")
    group.add_argument("--captions", metavar="FILE", help="COCO's .json, or a table; default: in --images")
    group.add_argument("--no-mirror", action="store_true", help="leave out the mirror images")
    group.add_argument(
        "--unreadable",
        choices=["skip", "refuse"],
        default="skip",
        metavar="DO",
        help="skip (default) or refuse unreadable images",
    )
    group.add_argument(
        "--unusual", choices=["convert", "skip", "refuse"], default="convert", metavar="DO",
        help="convert (default), skip or refuse grey, CMYK, ...",
    )  # fmt: skip
    group = command.add_argument_group("encoders: a folder, or owner/repository on the hub")
    group.add_argument("--vae", metavar="NAME", help="of images, KL or DC; default: latent.autoencoder")
    group.add_argument("--clip", metavar="NAME", help="of text; default: latent.text_encoder, else CLIP L/14")
    group = command.add_argument_group("output, and how")
    group.add_argument("--out", required=True, metavar="DIR", help="of the shards; continues what is there")
    group.add_argument(
        "--dtype",
        choices=["float16", "float32"],
        default="float16",
        metavar="TYPE",
        help="float16 (default) or float32",
    )
    group.add_argument("--shard", type=positive, default=4096, metavar="N", help="images per shard (default 4096)")
    group.add_argument("--batch", type=positive, default=32, metavar="N", help="images at a time (default 32)")
    group.add_argument("--workers", type=positive, default=4, metavar="N", help="threads that decode (default 4)")
    command.set_defaults(goes_on="continues")


def run(args: argparse.Namespace) -> None:
    """Write the shards; the report is in their folder. `torchrun -m uvit_fast.cli extract ...` uses all GPUs."""
    follow_launcher()
    cfg = load_config(args.config, args.set)
    if cfg.latent is None:
        raise UserError(f"extract: {cfg.name} works on pixels; expected a config with a latent section")
    if args.captions and not cfg.model.context_dim:
        raise UserError(f"extract: {cfg.name} takes no --captions")
    existing("--images", args.images, "a folder of images")

    from uvit_fast.data import autoencoders, encoders
    from uvit_fast.data.captions import list_captioned
    from uvit_fast.data.datasets import require_folder
    from uvit_fast.data.encoders import text_encoder_name
    from uvit_fast.data.extract import Extraction, Policy, Text, summary
    from uvit_fast.data.reading import list_images
    from uvit_fast.data.transforms import CROPS
    from uvit_fast.provenance import UNKNOWN
    from uvit_fast.runtime.device import pick_device

    folder = require_folder(args.images, "images", key="--images")
    device = pick_device(cfg.device)
    name, text = args.vae or cfg.latent.autoencoder, None
    if cfg.model.context_dim:
        listing, captions = list_captioned(folder, Path(args.captions) if args.captions else None)
        clip = args.clip or text_encoder_name(cfg, UNKNOWN)
        tokenizer, model = encoders.load_clip(clip)
        identity = encoders.text_identity(model, clip)
        text = Text(captions, encoders.text_encoder(tokenizer, model.to(device)), identity)
    else:
        listing = list_images(folder, labelled=cfg.model.num_classes > 0)
    vae = autoencoders.load_autoencoder(name, channels=cfg.model.in_chans).to(device)
    extraction = Extraction(
        listing,
        Path(args.out),
        autoencoders.encoder(vae),
        crop=CROPS[cfg.data.crop],
        size=cfg.model.img_size * autoencoders.compression(vae),
        background=cfg.data.background,
        scaling=None if cfg.latent.scale_factor == "measured" else autoencoders.scaling_of(cfg, vae=vae),
        vae=autoencoders.vae_identity(vae, name),
        mirror=not (args.no_mirror or text),
        kind="latents" if autoencoders.is_deterministic(vae) else "moments",
        text=text,
        policy=Policy(args.unreadable, args.unusual),
        dtype=args.dtype,
        shard_images=args.shard,
        batch=args.batch,
        workers=args.workers,
    )
    report = extraction.run()
    print(summary(extraction.out, report) if report else f"{args.out}: this process is done; others are not")
