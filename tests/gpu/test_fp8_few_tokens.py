"""Products of few tokens with e4m3 operands, in every form of tile: against the same arithmetic in PyTorch, the same
bits each time, counters left at zero.
"""

import pytest
import torch

from tests.kernels import fp8_cases as cases
from uvit_fast.kernels.gemm import fp8, sm90_fp8
from uvit_fast.kernels.layernorm.sums import Summed
from uvit_fast.kernels.runtime import once, tuning
from uvit_fast.kernels.runtime.device import architecture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available() or architecture(torch.device("cuda")) != 90, reason="FP8 is of sm_90"
)]  # fmt: skip
FORMS = {
    "64+8": {"tokens": 64, "tail": 8, "stages": 7},
    "64+8, shares": {"tokens": 64, "tail": 8, "stages": 7, "shares": 3},
    "128+32": {"tokens": 128, "tail": 32, "stages": 4},
    "128+64": {"tokens": 128, "tail": 64, "stages": 4, "staging": 64},
    "256": {"tokens": 256, "stages": 4},
    "pairs": {"tokens": 128, "stages": 5, "pairs": 2},
    "halves of 64": {"tokens": 64, "stages": 6, "halves": True},
    "halves of 32": {"tokens": 32, "part": 16, "stages": 8, "halves": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["qkv", "proj", "fc1", "fc2_narrow", "skip"])
def test_products_in_tiles_and_shares(name, form, monkeypatch):
    """Nine blocks of K, of which halves have five and four; rstd from sums."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    M, D = 258 * (1 if FORMS[form]["tokens"] <= 64 else 4), 1152
    monkeypatch.setattr(tuning, "few", lambda *of: {"part": 32, **FORMS[form]})
    epilogue, x, layer, rest = cases.arguments(name, M, D, "cuda")
    if "stats" in rest:
        rest["stats"] = Summed(64 * torch.rand(D // 64, 2, M, device="cuda"), 1e-5)
    with once.stretch({}):
        made = [sm90_fp8.product(epilogue, x, layer, overwrite=False, **rest) for _ in range(5)]
        assert not once.counters(x.device, 1).any()
    cases.check(made[0], fp8.reference(epilogue, x, layer, overwrite=False, **rest))
    for first, *others in zip(*made):
        assert first is None or all(torch.equal(t.view(torch.uint8), first.view(torch.uint8)) for t in others)
