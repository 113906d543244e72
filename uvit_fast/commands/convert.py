"""`uvit-fast convert`: convert a checkpoint to a diffusers pipeline folder, or back to a .pth."""

import argparse
import re
from functools import partial
from pathlib import Path

from uvit_fast.commands.arguments import checkpoint_arguments, config_of
from uvit_fast.provenance import RUN_FILE, Provenance
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.files import write_whole

HELP = "convert a checkpoint to a diffusers folder, or back to a .pth"
EXAMPLE = "uvit-fast convert --checkpoint runs/digits --out digits.pth"


def arguments(command: argparse.ArgumentParser) -> None:
    checkpoint_arguments(command)
    group = command.add_argument_group("output")
    group.add_argument("--out", required=True, metavar="PATH", help="a new folder for the pipeline, or a .pth file")
    group.add_argument("--vae", metavar="NAME", help="its autoencoder, or none; default: the config's")
    group.add_argument("--clip", metavar="NAME", help="a text model's encoder, or none; default: the data's")
    group.add_argument("--license", metavar="NAME", help="of the weights, for the card: mit, apache-2.0, ...")


def run(args: argparse.Namespace) -> None:
    """Write weights as a pipeline folder (safetensors), or as a .pth with the published names and, beside it, the
    meaning of its labels and outputs.
    """
    cfg, out = config_of(args.config, args.checkpoint, args.set), Path(args.out)
    if out.exists():
        raise UserError(f"{out}: there already; expected a new name")
    if args.license and (out.suffix == ".pth" or not re.fullmatch(r"[\w.+-]+", args.license)):
        expected = "a pipeline's folder, whose card names it" if out.suffix == ".pth" else "a name, such as apache-2.0"
        raise UserError(f"--license {args.license}: expected {expected}")
    if out.suffix in (".pt", ".ckpt", ".bin", ".safetensors"):
        raise UserError(f"--out {out}: expected a .pth file, or a name for the pipeline's folder")
    import torch

    from uvit_fast import build_model
    from uvit_fast.data.autoencoders import load_autoencoder
    from uvit_fast.data.encoders import load_clip, load_text, text_encoder_name
    from uvit_fast.model.weights import load_weights, published_names, read_weights
    from uvit_fast.sampling.weights import find_weights, provenance_of

    source = find_weights(args.checkpoint)
    known = provenance_of(cfg, source).joined(Provenance(diffusion=cfg.diffusion.meaning))
    state = read_weights(source)
    if out.suffix == ".pth":
        with torch.device("meta"):
            model = build_model(cfg)
        state = published_names(state, model.state_dict(), str(source))
        load_weights(model, state, str(source))  # refuses what does not fit
        write = partial(torch.save, state)
    else:
        from uvit_fast.pipeline import make_pipeline

        vae = args.vae or (cfg.latent.autoencoder if cfg.latent else "none")
        clip = args.clip or (text_encoder_name(cfg, known) if cfg.model.context_dim else "none")
        if clip != "none" and not cfg.model.context_dim:
            raise UserError(f"--clip: {cfg.name} takes no text; expected none")
        components = {} if vae == "none" else {"vae": load_autoencoder(vae, known, cfg.model.in_chans)}
        if clip != "none":
            load_text(cfg, clip, torch.device("cpu"), known)  # refuses what does not fit
            components["tokenizer"], components["text_encoder"] = load_clip(clip)
        write = make_pipeline(cfg, state, known, args.license, **components).save_pretrained
    try:
        write_whole(out, write)
        if out.suffix == ".pth":  # what the tensors alone cannot hold
            known.write(out.with_suffix(f".{RUN_FILE}"))
    except (OSError, RuntimeError) as error:  # the latter is torch's, for a full disk
        raise UserError(f"--out {out}: expected a place that can be written to ({error})") from None
    print(f"wrote {out}")
