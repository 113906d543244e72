"""Every fused op once, forward and backward, at small awkward sizes: what a sanitizer watches.

    sh tests/gpu/sanitize.sh

PyTorch's caching is off there, so that each tensor is an allocation of its own, whose ends are guarded. Compiled
kernels come from the cache of a run without the sanitizer.
"""

import sys

import torch

from tests.kernels import fp8_cases
from tests.kernels.op_cases import OPS, arguments, result, results_and_gradients
from uvit_fast.kernels.attention import sm90_forward
from uvit_fast.kernels.gemm import sm90_fp8
from uvit_fast.kernels.layernorm import added, fold
from uvit_fast.kernels.ops.attention import attention
from uvit_fast.kernels.quantise import E4M3


def main(names: list[str]) -> None:
    for name in names or [*OPS, "attention", *fp8_cases.NAMES, "fp8_attention", "fp8_statistics"]:
        if name in fp8_cases.NAMES:  # few tokens, and many
            for M in (258, 20000):
                epilogue, x, layer, rest = fp8_cases.arguments(name, M, 192, "cuda")
                sm90_fp8.product(epilogue, x, layer, **rest)
                if "side" in rest:
                    sm90_fp8.product(epilogue, x, layer, **rest, overwrite=False)
        elif name == "fp8_statistics":
            x = torch.randn(258, 192, device="cuda", dtype=torch.bfloat16)
            fold.statistics(x, None, x8 := torch.empty(258, 192, device="cuda", dtype=E4M3))
            added.add(x, (x.clone(), x.clone()), x, x8)
        elif name == "fp8_attention":
            for D in (64, 72):
                sm90_forward.forward(torch.randn(1, 258, 3, 2, D, device="cuda", dtype=torch.bfloat16), E4M3)
        elif name == "attention":
            for D in (64, 72):
                qkv = torch.randn(1, 258, 3, 2, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                attention(qkv).sum().backward()
        else:
            args = arguments(name, (1, 258, 128), torch.bfloat16, device="cuda", grad=True)
            results_and_gradients(OPS[name][0], args, torch.ones_like(result(OPS[name][1](*args))))
        torch.cuda.synchronize()
        print(name, "ran", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
