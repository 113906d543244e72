"""What is counted without a GPU is what a GPU launches: our kernels, one by one."""

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.counting import Counts, hopper
from uvit_fast import build_model, load_config
from uvit_fast.build import build_objective

pytestmark = pytest.mark.gpu

OURS = ("gemm_kernel", "prepare_kernel", "attention_forward_kernel", "weight_gradient_kernel")


def step(device):
    """Forward and backward of a U-ViT of 13 blocks, of a width at which the table takes our weight gradients; ready to
    be called.
    """
    cfg = load_config("configs/s2_coco.yaml", ["model.embed_dim=768", "model.num_heads=12"])
    with torch.device(device):
        net = build_model(cfg).to(torch.bfloat16)
        x, noise, u, context = *torch.randn(2, 8, 4, 32, 32), torch.rand(8), torch.randn(8, 77, 768)
    objective = build_objective(cfg)
    return lambda: objective.loss(net, x, noise, u, context=context).backward()


def test_our_kernels_are_launched_as_often_as_counted():
    if torch.cuda.get_device_properties(0).major != 9:
        pytest.skip("the count takes the paths of compute capability 9")
    on_meta, on_gpu = step("meta"), step("cuda")
    with Counts() as counts, hopper(counts):
        on_meta()
    on_gpu()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        on_gpu()
        torch.cuda.synchronize()
    seen = Counter(e.name.strip("_") for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    counted = {name: counts.launches[f"triton:{name}"] for name in OURS}
    assert counted == {name: seen[name] for name in OURS} and all(counted.values())
