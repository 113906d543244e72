"""Train a U-ViT: `deepspeed train.py --config configs/h2_256.yaml`, or `python train.py ...` on one GPU or CPU.

The same command continues a run from its newest intact checkpoint.
"""

import os
import sys

# The root holds the folder kernels/, which must not be importable under that name: transformers probes for a package so called.
sys.path[:] = [p for p in sys.path if os.path.realpath(p or ".") != os.path.dirname(os.path.realpath(__file__))]

import argparse  # noqa: E402
from pathlib import Path  # noqa: E402

from uvit_fast.build import build_dataset, build_model, build_schedule  # noqa: E402
from uvit_fast.config import RankError, UserError, load_config  # noqa: E402
from uvit_fast.measuring import training_evaluation  # noqa: E402
from uvit_fast.provenance import Provenance  # noqa: E402
from uvit_fast.sampling import training_preview  # noqa: E402
from uvit_fast.training.engine import start  # noqa: E402
from uvit_fast.training.folder import summary  # noqa: E402
from uvit_fast.training.monitor import say  # noqa: E402
from uvit_fast.training.trainer import Trainer  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a U-ViT.")
    parser.add_argument("--config", required=True, help="a YAML file, such as configs/h2_256.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as train.lr=1e-4")
    parser.add_argument("--run-dir", type=Path, help="the run's folder; default: runs/<name>")
    parser.add_argument("--fresh", action="store_true", help="move an older run in that folder aside and start anew")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    args = parser.parse_args(argv)
    try:
        cfg = load_config(args.config, args.set)
        run_dir = args.run_dir or Path("runs") / cfg.name
        world = start(cfg)
        model, schedule, dataset = build_model(cfg), build_schedule(cfg), build_dataset(cfg)
        learned_from = Provenance.of(dataset, cfg.model.num_classes > 0)
        looks: list = []
        world.on_first(
            lambda: looks.extend((training_preview(cfg, learned_from), training_evaluation(cfg, learned_from)))
        )
        about = world.on_first(lambda: summary(cfg, model, dataset, world))
        trainer = Trainer(cfg, model, schedule, dataset, run_dir, *looks, fresh=args.fresh)
        if world.rank == 0 and trainer.step < cfg.train.iterations:
            say(about)
        trainer.train()
        world.leave()
    except (UserError, ImportError) as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
            print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: ended at once; the same command continues from the newest checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
