"""Fine-tune published weights on a folder of photographs, one folder per class:
`python examples/finetune.py imagenet256_uvit_huge.pth /my/photographs`.

The same from the command line, and what each setting does: docs/finetuning.md.
"""

import sys
from pathlib import Path

from uvit_fast import build_dataset, build_model, build_objective, cli, load_config
from uvit_fast.build import hold_out
from uvit_fast.provenance import Provenance
from uvit_fast.runtime.errors import in_one_line
from uvit_fast.sampling.previews import training_preview
from uvit_fast.training.trainer import Trainer


def finetune(
    weights: str,
    photographs: str,
    run: Path,
    config: str = "finetune_256",
    overrides: tuple[str, ...] = (),
) -> dict[str, float]:
    """Encode the photographs, then train; the weights with the lowest held-out loss are in `run / "best"`.

    Calling it again continues both.
    """
    classes = sum(folder.is_dir() for folder in Path(photographs).iterdir())
    latents = f"{run}_latents"
    overrides = (
        f"train.init={weights}",
        f"model.num_classes={classes + 1}",  # and the null label, which guidance needs
        f"data.path={latents}",
        *overrides,
    )
    options = [part for override in overrides for part in ("--set", override)]
    if cli.main(["extract", "--config", config, *options, "--images", photographs, "--out", latents]):
        raise SystemExit(2)  # the reason was printed
    cfg = load_config(config, overrides)
    dataset, held_out = hold_out(cfg, build_dataset(cfg))
    preview = training_preview(cfg, Provenance.of(dataset))  # a grid of samples every train.sample_every steps
    trainer = Trainer(cfg, build_model(cfg), build_objective(cfg), dataset, run, preview, held_out=held_out)
    return trainer.train()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with in_one_line():
        print(finetune(sys.argv[1], sys.argv[2], Path("runs/photographs")))
