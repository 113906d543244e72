"""`uvit-fast train`: train a network, alone or as one rank of many."""

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import Any

from uvit_fast.commands.arguments import config_arguments
from uvit_fast.config import Config, load_config
from uvit_fast.runtime.errors import RankError, UserError
from uvit_fast.runtime.importing import preload
from uvit_fast.runtime.processes import follow_launcher, start

HELP = "train a network, or go on with its run"
EXAMPLE = "uvit-fast train --config digits --set train.iterations=1000"
NOTES = """  deepspeed --module uvit_fast.cli train --config h2_256    # all GPUs of a host
  torchrun --nproc-per-node 8 -m uvit_fast train --config h2_256

The same command continues a run; Ctrl-C saves and ends it."""


def arguments(command: argparse.ArgumentParser) -> None:
    config_arguments(command)
    group = command.add_argument_group("run")
    group.add_argument("--run-dir", type=Path, metavar="DIR", help="its folder (default runs/<name of the config>)")
    group.add_argument("--fresh", action="store_true", help="rename an older run in that folder and start anew")
    command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it to a script
    command.set_defaults(goes_on="continues from the newest checkpoint")


def run(args: argparse.Namespace) -> int:
    """Train to the end of the run. Of a launcher's ranks, one prints errors."""
    follow_launcher()
    try:
        cfg = load_config(args.config, args.set)
        train(cfg, args.run_dir or Path("runs") / cfg.name, args.fresh)
    except (UserError, ImportError) as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            raise
        time.sleep(30)  # a launcher ends all at the first exit, which is to be that of the rank that prints
        return 2
    return 0


def train(cfg: Config, run_dir: Path, fresh: bool) -> None:
    """Build what the config says and train it; torch is imported once the config is known to be valid."""
    preload("uvit_fast.measuring", "uvit_fast.training.trainer")
    from uvit_fast.build import build_dataset, build_model, build_objective, hold_out
    from uvit_fast.measuring import training_evaluation
    from uvit_fast.provenance import Provenance
    from uvit_fast.sampling.previews import training_preview
    from uvit_fast.training.folder import check_free, summary
    from uvit_fast.training.monitor import say
    from uvit_fast.training.trainer import Trainer

    check_free(run_dir)
    world = start(cfg.device)
    with warnings.catch_warnings():
        if world.rank > 0:  # an error on every rank, which rank 0 prints
            warnings.simplefilter("ignore")
        model, objective = build_model(cfg), build_objective(cfg)
        dataset, held_out = hold_out(cfg, build_dataset(cfg))
    learned_from = Provenance.of(dataset, cfg.model.num_classes > 0)
    looks: dict[str, Any] = {}  # rank 0's
    world.on_first(
        lambda: looks.update(
            preview=training_preview(cfg, learned_from), measure=training_evaluation(cfg, learned_from)
        )
    )
    about = world.on_first(lambda: summary(cfg, model, dataset, world))
    trainer = Trainer(cfg, model, objective, dataset, run_dir, **looks, fresh=fresh, held_out=held_out)
    if world.rank == 0 and trainer.step < cfg.train.iterations:
        say(about)
    trainer.train()
    world.leave()
