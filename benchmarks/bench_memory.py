"""How much memory does a training step hold? The appendix's figures, 53 GB without and 10 GB with checkpointing, and
ours.

    python -m benchmarks.bench_memory --out benchmarks/results

Cases `<L|H>:<batch>:<none|block>`, forward, backward, AdamW and EMA on 32 x 32 x 4 latents. `paper`: the published
code's way, fp32 weights under fp16 autocast, attention as two products and a softmax; `paper-efficient`: the same with
PyTorch's memory-efficient attention, as in its later README; `ours`: the trainer's own step with its engine.

Metrics in GB (10^9): `peak`, the most that was allocated; `reserved`, what the allocator took from the device for that;
`static`, weights, optimizer and EMA; `saved`, what waits for the backward, each storage once. On a CPU only `saved`.
"""

import argparse
import contextlib
import gc
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import models
from benchmarks.bench_training import Ours, config
from benchmarks.common import RESULTS, Rows, known
from uvit_fast import build_model, load_config
from uvit_fast.runtime.errors import in_one_line
from uvit_fast.training.captured import Captured

ATTENTION = {"paper": "math", "paper-efficient": "sdpa"}
CASES = {  # (size, provider) -> checkpointing: those of the appendix and of the published README, and ours
    ("L", "paper"): ("none", "block"),
    ("L", "ours"): ("none", "block"),
    ("H", "paper"): ("none",),
    ("H", "paper-efficient"): ("none", "block"),
    ("H", "ours"): ("none", "block"),
}


class Paper:
    """The published code's training step.

    Args:
        overrides: of the config, such as a smaller network.
    """

    def __init__(self, size: str, provider: str, batch: int, device: str, overrides: list[str]):
        how = ["model.kernels=reference", f"model.attention={ATTENTION[provider]}"]
        cfg = load_config(models.CONFIGS[size], [*models.LATENT, *how, *overrides])
        self.cuda = torch.device(device).type == "cuda"
        self.efficient = provider == "paper-efficient" and self.cuda
        with torch.device(device):  # initialised there, which saves minutes
            self.net = build_model(cfg).train()
        self.loss_of = models.loss(cfg, batch, device)
        self.weights = list(self.net.parameters())
        self.adamw = torch.optim.AdamW(self.weights, lr=2e-4, betas=(0.99, 0.99), weight_decay=0.03, fused=True)
        self.ema = [p.detach().clone() for p in self.weights]

    def keep(self, policy: str) -> None:
        for block in self.net.blocks:
            block.checkpointing = policy

    def loss(self) -> Tensor:
        autocast = torch.autocast("cuda", torch.float16) if self.cuda else contextlib.nullcontext()
        with self._attention(), autocast:
            return self.loss_of(self.net)

    def settle(self) -> None:
        """Create the optimizer's state."""
        self.step()

    def step(self) -> None:
        with self._attention():  # also in the backward of a checkpoint
            self.loss().backward()
        self.adamw.step()
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.weights], 1e-4)
        self.adamw.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Do nothing: nothing outlives it."""

    def _attention(self) -> contextlib.AbstractContextManager:
        return sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if self.efficient else contextlib.nullcontext()


def saved_bytes(forward: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Return the bytes that a forward leaves for the backward, without the weights."""
    known = {p.untyped_storage().data_ptr() for p in weights}
    kept = {}  # the storages themselves: freed memory would be allocated again and counted once

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def measure(rows: Rows, size: str, provider: str, policies: tuple[str, ...], args: argparse.Namespace) -> None:
    """Add the rows of one network, with one engine or optimizer for all policies."""
    cuda = args.device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    if provider == "ours":
        cfg = config(size, "ours", args.batch, args.device, args.set)
        subject, loss = Ours(cfg, torch.device(args.device)), models.loss(cfg, args.batch, args.device)
        captured = subject.net.forward
        plain = (
            captured.forward if isinstance(captured, Captured) else subject.net
        )  # a graph shows nothing of what it saves
        forward, keep = lambda: loss(plain), lambda policy: subject.keep(policy, 0.0)
    else:
        subject = Paper(size, provider, args.batch, args.device, args.set)
        forward, keep = subject.loss, subject.keep
    with contextlib.closing(subject):
        for policy in policies:
            keep(policy)

            def add(metric: str, size_in_bytes: float, policy: str = policy) -> None:
                dtype = "fp32" if not cuda else "bf16" if provider == "ours" else "fp16"
                case, common = f"{size}:{args.batch}:{policy}", {"unit": "GB", "dtype": dtype, "batch": args.batch}
                rows.add(case, provider, [size_in_bytes / 1e9], metric=metric, **common)

            add("saved", saved_bytes(forward, subject.net.parameters()))
            if not cuda:
                continue
            subject.settle()
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
            static, others = torch.cuda.memory_allocated() - before, torch.cuda.memory_reserved()
            torch.cuda.reset_peak_memory_stats()
            subject.step()
            subject.step()
            torch.cuda.synchronize()
            add("static", static)
            add("peak", torch.cuda.max_memory_allocated() - before)
            add("reserved", torch.cuda.max_memory_reserved() - others + static)


@in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="L,H")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the configs")
    parser.add_argument("--out", default=RESULTS, help="folder of memory.csv")
    args = parser.parse_args()
    sizes = known(parser, "--sizes", args.sizes, dict.fromkeys(size for size, _ in CASES))
    rows = Rows("memory", args.out)
    for (size, provider), policies in CASES.items():
        if size in sizes:
            try:
                measure(rows, size, provider, policies, args)
            except torch.OutOfMemoryError:  # also a result: there is no row of its peak
                total = torch.cuda.get_device_properties(0).total_memory / 1e9
                print(f"{size} {provider}: out of memory of {total:.1f} GB")
            rows.write()
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print(rows.path)


if __name__ == "__main__":
    main()
