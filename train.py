"""Train a U-ViT: `deepspeed train.py --config configs/h2_256.yaml`, or `python train.py ...` on one GPU or CPU.

The same command continues a run from its newest intact checkpoint.
"""

import os
import sys

# The root holds the folder kernels/, which must not be importable under that name: transformers probes for a package so called.
sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != os.path.dirname(os.path.realpath(__file__))]

import argparse  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from uvit_fast.commands.arguments import Parser  # noqa: E402
from uvit_fast.config import Config, load_config  # noqa: E402
from uvit_fast.runtime import notices  # noqa: E402
from uvit_fast.runtime.errors import RankError, UserError  # noqa: E402
from uvit_fast.runtime.processes import follow_launcher, start  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    example = "python train.py --config configs/digits.yaml --set train.iterations=1000"
    parser = Parser(description="Train a U-ViT.", example=example)
    parser.add_argument("--config", required=True, help="a YAML file, such as configs/h2_256.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as train.lr=1e-4")
    parser.add_argument("--run-dir", type=Path, help="the run's folder; default: runs/<name>")
    parser.add_argument("--fresh", action="store_true", help="move an older run in that folder aside and start anew")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    args = parser.parse_args(argv)
    follow_launcher()
    try:
        cfg = load_config(args.config, args.set)
        train(cfg, args.run_dir or Path("runs") / cfg.name, args.fresh)
    except (UserError, ImportError) as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            print(f"train.py: {error}", file=sys.stderr, flush=True)
        else:  # a launcher ends all at the first exit, which is to be that of the rank that speaks
            time.sleep(30)
        return 2
    except KeyboardInterrupt:
        print("train.py: ended at once; the same command continues from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


def train(cfg: Config, run_dir: Path, fresh: bool) -> None:
    """Build what the config says and train it; torch is imported once the config is known to make sense."""
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
        if world.rank > 0:  # what all meet, rank 0 says
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


if __name__ == "__main__":
    notices.plain()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is written; an interpreter that ends may abort over a thread of gloo's that is still in Python
