"""What was probably meant by an option that a command does not have."""

import difflib

from uvit_fast.config import keys_named

# Names that people bring from elsewhere -> options of ours, the first that the command has. Keys: config.reading.
CALLED_HERE: dict[str, tuple[str, ...]] = {
    "c": ("--config",),
    "v": ("--version",),
    "o": ("--out", "--run-dir"),
    "n": ("--num",),
    "ckpt": ("--checkpoint",),
    "weights": ("--checkpoint",),
    "pretrained": ("--checkpoint",),
    "model": ("--checkpoint", "--config"),
    "model-path": ("--checkpoint",),
    "output": ("--out", "--run-dir"),
    "output-dir": ("--out", "--run-dir"),
    "outdir": ("--out", "--run-dir"),
    "save-dir": ("--out", "--run-dir"),
    "logdir": ("--run-dir",),
    "workdir": ("--run-dir",),
    "num-images": ("--num", "--samples"),
    "num-samples": ("--num", "--samples"),
    "batch-size": ("--batch",),
    "bs": ("--batch",),
    "cfg": ("--cfg-scale", "--config"),
    "guidance": ("--cfg-scale",),
    "guidance-scale": ("--cfg-scale",),
    "scale": ("--cfg-scale",),
    "num-inference-steps": ("--steps",),
    "num-steps": ("--steps",),
    "nfe": ("--steps",),
    "labels": ("--classes",),
    "class-labels": ("--classes",),
    "text": ("--prompt",),
    "clip-model": ("--clip",),
    "autoencoder": ("--vae",),
    "fp8": ("--precision",),
    "bf16": ("--precision",),
    "gpu": ("--device",),
    "data": ("--images",),
    "data-dir": ("--images",),
    "data-path": ("--images",),
    "continue": ("--resume",),
}
GOES_ON = ("resume", "continue")
NOT_BY_LIKENESS = ("--help", "--fresh", "--local_rank")  # not what was meant; destructive; a launcher's


def hint(given: str, known: list[str], goes_on: str | None) -> str:
    """Return what does here what an unknown option probably means, as a question or a sentence; "" if nothing does.

    Args:
        given: the option, without a value.
        known: the command's options.
        goes_on: what the same command does after an interruption, if it goes on.
    """
    name = given.lstrip("-").replace("_", "-").lower()
    if f"--{name}" in known:
        return f"did you mean --{name}?"
    for meant in CALLED_HERE.get(name, ()):
        if meant in known:
            return f"did you mean {meant}?"
    if name in GOES_ON and goes_on:
        return f"expected none: the same command {goes_on}"
    unused = ("train.", "data.", "evaluate.") if "--checkpoint" in known else ()  # where nothing is trained
    keys = [key for key in keys_named(name.replace("-", "_")) if not key.startswith(unused)]
    if keys and "--set" in known:
        return f"did you mean {' or '.join(f'--set {key}=...' for key in keys)}?"
    options = {option.lstrip("-"): option for option in known if option not in NOT_BY_LIKENESS}
    # without the dashes, which make all options alike
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.65)
    return f"did you mean {options[near[0]]}?" if near else ""
