"""How fast is fused attention? Against cuDNN, PyTorch's flash attention, flash_attn and the compiled reference.

    python -m benchmarks.bench_attention --out benchmarks/results

Milliseconds of one forward, one backward and both, for 128 images in bf16, from packed qkv to its packed gradient:
permuting is part of the others' cost. `cudnn-split` is cuDNN with q, k and v given apart and their gradients left so,
which no model does.
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import RESULTS, Rows, need_gpu
from uvit_fast.kernels.attention import sm80 as attention_ampere
from uvit_fast.kernels.ops.attention import attention, reference
from uvit_fast.kernels.tools.tune import times
from uvit_fast.runtime.errors import in_one_line

BATCH = 128
SHAPES = [  # tokens, heads, head dim
    (258, 16, 72),  # H/2
    (258, 16, 64),  # L/2
    (257, 8, 64),  # S/2, unconditional
    (334, 8, 64),  # S/2 with text
    (257, 16, 72),
    (334, 16, 72),
]


def sdpa(backend: SDPBackend, qkv: Tensor) -> Tensor:
    """Attend with one of PyTorch's backends: qkv (B, L, 3, H, D) -> (B, L, H*D)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, D) each
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def flash_attn(qkv: Tensor) -> Tensor:
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(qkv).flatten(2)


def providers() -> dict[str, Callable[[Tensor], Tensor]]:
    torch._dynamo.reset()  # otherwise the shapes together exceed the recompile limit, and the rest runs eagerly
    found = {
        "ours": attention,
        "cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "compiled": torch.compile(reference, dynamic=False),
    }
    if find_spec("flash_attn"):
        found["flash_attn"] = flash_attn
    return found


def measured(op: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor) -> dict[str, list[float]]:
    """Return milliseconds of the forward as in inference, of the backward, and of both."""
    with torch.no_grad():
        forward = times(lambda: op(*inputs))
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = op(*leaves)
    dout = dout.view(out.shape)
    return {
        "fwd": forward,
        "bwd": times(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)),
        "fwdbwd": times(lambda: torch.autograd.grad(op(*leaves), leaves, dout)),
    }


def plain_triton(qkv: Tensor, dout: Tensor) -> dict[str, list[float]]:
    """Time the kernels of sm_80 on this device."""
    out, lse = attention_ampere.forward(qkv)
    return {
        "fwd": times(lambda: attention_ampere.forward(qkv)),
        "bwd": times(lambda: attention_ampere.backward(qkv, out, lse, dout)),
    }


@in_one_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=RESULTS, help="folder of the CSV file")
    parser.add_argument("--without", nargs="*", default=[], help="providers to leave out")
    args = parser.parse_args()
    need_gpu(parser)

    rows = Rows("attention", args.out)
    rows.ceilings()
    for L, H, D in SHAPES:
        name = "attention" if L == 258 else f"attention_l{L}"
        qkv = torch.randn(BATCH, L, 3, H, D, device="cuda", dtype=torch.bfloat16)
        dout = torch.randn(BATCH, L, H * D, device="cuda", dtype=torch.bfloat16)
        results = {}
        for provider, op in providers().items():
            if provider not in args.without:
                results[provider] = measured(op, (qkv,), dout)
        split = tuple(t.contiguous() for t in qkv.permute(2, 0, 3, 1, 4))  # (B, H, L, D) each
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            results["cudnn-split"] = measured(F.scaled_dot_product_attention, split, dout)
        results["ours-sm_80"] = plain_triton(qkv, dout)
        for provider, parts in results.items():
            for part, values in parts.items():
                rows.add(
                    f"{name}:{part}:{H * D}", provider, values, metric="time", unit="ms", dtype="bf16", batch=BATCH
                )
        rows.write()


if __name__ == "__main__":
    main()
