"""Every fused op once, forward and backward, at small awkward sizes: what a sanitizer watches.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.gpu.small

Caching is off so that each tensor is an allocation of its own, whose ends are guarded. Compiled kernels come from the cache of a run
without the sanitizer.
"""

import sys

import torch

from tests.kernels.op_cases import OPS, arguments, result, results_and_gradients
from uvit_fast.kernels.ops.attention import attention


def main(names: list[str]) -> None:
    for name in names or [*OPS, "attention"]:
        if name == "attention":
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
