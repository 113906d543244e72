"""What a block keeps for its backward, counted without a GPU: meta tensors on an H100's paths."""

import pytest
import torch

from benchmarks.counting import Counts, hopper
from uvit_fast.model.uvit import Block

B, L, D = 128, 258, 1152  # H/2


@pytest.mark.parametrize("concat_skip", [False, True], ids=["block", "block with a skip"])
def test_a_block_keeps_ten_values_times_d_a_token(concat_skip):
    """Its input, qkv (3), the attention's output, the MLP's input and the GELU's argument (4); with a skip, which the
    shallow block after it keeps anyhow, the skip's linear layer has the place of the MLP's input, computed again in the
    backward."""
    kept = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage()._cdata] = t
        return t

    with torch.device("meta"):
        block = Block(D, 16, 4.0, concat_skip, "auto", "auto").to(torch.bfloat16)
        x, skip = (torch.empty(B, L, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    with Counts() as counts, hopper(counts), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block(x, skip if concat_skip else None)
    others = {t.untyped_storage()._cdata for t in (skip, *block.parameters())}
    values = sum(t.untyped_storage().nbytes() / 2 for key, t in kept.items() if key not in others)
    assert counts.launches["triton:gemm_kernel"] == 4 + concat_skip  # the fused ops ran
    assert 10 * D <= values / (B * L) <= 10.1 * D  # and the fp32 statistics and log-sum-exps
