"""Images a second and memory of a whole training step: `python -m benchmarks.bench_training`.

Cases `<S|M|L|H>:<batch>:<none|block>`; forward, backward, AdamW and EMA. Ours keeps bf16 weights with fp32 masters and moments, as
the ZeRO engine does on one GPU; the peers keep fp32 weights under autocast. static_gb: weights, gradients, optimizer and EMA.
"""

import argparse

import torch

from benchmarks import models
from benchmarks.common import RESULTS, Rows, measure
from uvit_fast.diffusion.schedules import noise_loss


def step_times(size: str, provider: str, batch: int, checkpointing: str) -> tuple[list[float], float, float]:
    """Milliseconds of steps, peak and static GB."""
    cfg = models.config(size, provider, checkpointing)
    net = models.model(cfg, provider).train()
    weights = list(net.parameters())
    master = [p.detach().float().clone() if provider == "ours" else p for p in weights]
    adamw = torch.optim.AdamW(master, lr=2e-4, betas=(0.99, 0.99), weight_decay=0.03, fused=True)
    ema = [p.detach().clone() for p in master]
    x, t, y = models.images(cfg, batch)
    noise = torch.randn_like(x)

    def step() -> None:
        with models.precision(provider):
            loss = noise_loss(net(x, t, y=y), noise)
        loss.backward()
        if provider == "ours":
            for p, m in zip(weights, master):
                m.grad = p.grad.float()
        adamw.step()
        torch._foreach_lerp_(ema, [m.detach() for m in master], 1e-4)
        if provider == "ours":
            torch._foreach_copy_([p.detach() for p in weights], [m.detach() for m in master])
        net.zero_grad(set_to_none=True)
        adamw.zero_grad(set_to_none=True)

    step()
    torch.cuda.synchronize()
    static = (
        torch.cuda.memory_allocated() / 1e9 + sum(p.nbytes for p in weights) / 1e9
    )  # between steps, and the gradients
    torch.cuda.reset_peak_memory_stats()
    times = measure(step, repeats=7, warmup=2)
    return times, torch.cuda.max_memory_allocated() / 1e9, static


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="S,M,L,H")
    parser.add_argument("--providers", default="ours,eager,compiled")
    parser.add_argument("--policies", default="none,block")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", default=RESULTS)
    args = parser.parse_args()
    rows = Rows("training", args.out)
    rows.ceilings()
    for size in args.sizes.split(","):
        for policy in args.policies.split(","):
            for provider in args.providers.split(","):
                torch.cuda.empty_cache()
                times, peak, static = step_times(size, provider, args.batch, policy)
                case, common = f"{size}:{args.batch}:{policy}", {"dtype": "bf16", "batch": args.batch}
                speeds = [args.batch / t * 1e3 for t in times]
                rows.add(case, provider, speeds, metric="img_per_s", unit="images/s", **common)
                rows.add(case, provider, [peak], metric="peak_gb", unit="GB", **common)
                rows.add(case, provider, [static], metric="static_gb", unit="GB", **common)
    print(rows.write())


if __name__ == "__main__":
    main()
