"""What does a training step hold? The appendix's figures, 53 GB without and 10 GB with checkpointing, and ours.

    python -m benchmarks.bench_memory --out benchmarks/results

Cases `<L|H>:<batch>:<none|block>`, forward, backward, AdamW and EMA on 32 x 32 x 4 latents. `paper`: the published code's way, fp32
weights under fp16 autocast, attention as two products and a softmax; `paper-efficient`: the same with PyTorch's memory-efficient
attention, as its later README has it; `ours`: as the training engine has it on one GPU, bf16 weights with fp32 masters.

Metrics in GB (10^9): `peak`, the most that was allocated; `reserved`, what the allocator took from the device for that; `static`,
weights, optimizer and EMA between two steps; `saved`, what waits for the backward, each storage once. On a CPU only `saved`.
"""

import argparse
import contextlib
import gc

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import models
from benchmarks.common import RESULTS, Rows
from uvit_fast import build_model, load_config
from uvit_fast.diffusion.schedules import noise_loss

HOW = {  # provider -> model.kernels, model.attention
    "paper": ("reference", "math"),
    "paper-efficient": ("reference", "sdpa"),
    "ours": ("auto", "auto"),
}
CASES = [  # size, provider, checkpointing: those of the appendix and of the published README, and ours
    *[("L", provider, policy) for provider in ("paper", "ours") for policy in ("none", "block")],
    ("H", "paper", "none"),
    ("H", "paper-efficient", "none"),
    ("H", "paper-efficient", "block"),
    ("H", "ours", "none"),
    ("H", "ours", "block"),
]


class Step:
    """A training step of one case, whose memory is looked at.

    Args:
        overrides: of the config, such as a smaller network.
    """

    def __init__(self, size: str, provider: str, checkpointing: str, batch: int, device: str, overrides: tuple = ()):
        kernels, attention = HOW[provider]
        how = [f"model.kernels={kernels}", f"model.attention={attention}"]
        how.append(f"model.activation_checkpointing={checkpointing}")
        cfg = load_config(f"configs/{models.CONFIGS[size]}.yaml", [*models.LATENT, *how, *overrides])
        self.ours, self.device, half = provider == "ours", device, torch.device(device).type == "cuda"
        with torch.device(device):  # initialised there: minutes less
            self.net = build_model(cfg).train()
            self.x = torch.randn(batch, cfg.model.in_chans, cfg.model.img_size, cfg.model.img_size)
            self.t, self.y = torch.rand(batch) * 999, torch.randint(1000, (batch,))
        if self.ours and half:
            self.net.to(torch.bfloat16)
        self.efficient = provider == "paper-efficient" and half
        self.weights = list(self.net.parameters())
        self.masters = [p.detach().float().clone() if self.ours else p for p in self.weights]
        self.adamw = torch.optim.AdamW(self.masters, lr=2e-4, betas=(0.99, 0.99), weight_decay=0.03, fused=True)
        self.ema = [p.detach().clone() for p in self.masters]

    def __call__(self) -> None:
        with self._attention(), self._autocast():
            loss = noise_loss(self.net(self.x, self.t, y=self.y), self.x)
        with self._attention():
            loss.backward()
        if self.ours:
            for p, master in zip(self.weights, self.masters):
                master.grad = p.grad.float()
        self.adamw.step()
        torch._foreach_lerp_(self.ema, [m.detach() for m in self.masters], 1e-4)
        if self.ours:
            torch._foreach_copy_([p.detach() for p in self.weights], [m.detach() for m in self.masters])
        self.net.zero_grad(set_to_none=True)
        self.adamw.zero_grad(set_to_none=True)

    def saved(self) -> int:
        """Bytes that a forward leaves for the backward, without the weights."""
        weights = {p.untyped_storage().data_ptr() for p in self.weights}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with self._attention(), self._autocast(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = noise_loss(self.net(self.x, self.t, y=self.y), self.x)
            found = sum(kept.values())
        del loss
        return found

    def _autocast(self) -> contextlib.AbstractContextManager:
        cuda = torch.device(self.device).type == "cuda"
        return torch.autocast("cuda", torch.float16) if cuda and not self.ours else contextlib.nullcontext()

    def _attention(self) -> contextlib.AbstractContextManager:
        return sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if self.efficient else contextlib.nullcontext()


def measure(
    rows: Rows, size: str, provider: str, checkpointing: str, batch: int, device: str, overrides: tuple
) -> None:
    case = f"{size}:{batch}:{checkpointing}"
    dtype = "fp32" if device == "cpu" else "bf16" if provider == "ours" else "fp16"

    def add(metric: str, size_in_bytes: float) -> None:
        rows.add(case, provider, [size_in_bytes / 1e9], metric=metric, unit="GB", dtype=dtype, batch=batch)

    try:
        step = Step(size, provider, checkpointing, batch, device, overrides)
        add("saved", step.saved())
        if device == "cpu":
            return
        step()  # makes the optimizer's state, and tunes what is tuned
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        static = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        step()
        torch.cuda.synchronize()
        add("static", static)
        add("peak", torch.cuda.max_memory_allocated())
        add("reserved", torch.cuda.max_memory_reserved())
    except torch.OutOfMemoryError:  # a result too: there is no row of its peak
        print(f"{case} {provider}: out of memory with {torch.cuda.get_device_properties(0).total_memory / 1e9:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="L,H")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of the configs")
    parser.add_argument("--out", default=RESULTS, help="folder of memory.csv")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = Rows("memory", args.out)
    for size, provider, checkpointing in CASES:
        if size in args.sizes.split(","):
            measure(rows, size, provider, checkpointing, args.batch, device, tuple(args.set))
            gc.collect()  # of the case before, an exception's frames included
            torch.cuda.empty_cache()
    print(rows.write())


if __name__ == "__main__":
    main()
