"""Fused attention is the reference, forward and gradient, and takes no more of a GPU than it promised.

The kernels run in triton's interpreter, which has to be chosen before triton is imported: in a process of its own.
`python -m tests.kernels.test_attention` writes the resource contract anew.
"""

import json
from pathlib import Path

import pytest
import torch
import triton

from uvit_fast.kernels.ops import attention
from uvit_fast.kernels.runtime import device
from uvit_fast.kernels.tools import aot

CONTRACT = Path(aot.__file__).parent / "contracts" / "attention.json"


def gradients(op, qkv: torch.Tensor, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = op(qkv)
    return out.detach(), torch.autograd.grad(out, qkv, dout.to(out.dtype))[0]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "B, L, H, D",
    [
        (1, 257, 1, 64),  # one token past four blocks: CIFAR-10
        (3, 258, 1, 72),  # the H models, an odd batch, a head dim in two pieces
        (1, 334, 2, 64),  # text; heads are told apart
        (1, 64, 1, 72),  # one whole block, no padding
        (1, 20, 2, 8),  # less than a block, the narrowest head
        (1, 40, 1, 128),  # the widest
    ],
)
def test_fused_is_the_reference(B, L, H, D, dtype):
    torch.manual_seed(0)
    qkv, dout = torch.randn(B, L, 3, H, D).to(dtype), torch.randn(B, L, H * D)
    expected = gradients(attention.reference, qkv.float(), dout)
    got = gradients(attention.attention, qkv, dout)
    peer = gradients(attention.reference, qkv, dout)
    for ours, theirs, exact in zip(got, peer, expected):
        assert ours.dtype == dtype
        floor = 1e-6 * exact.norm()
        assert (ours.float() - exact).norm() <= 2 * (theirs.float() - exact).norm() + floor


@pytest.mark.interpreter
def test_very_negative_scores_leave_no_nan():
    """Every score is near -1000: 2 to the minus log-sum-exp overflows on a padded key unless it is masked."""
    torch.manual_seed(0)
    qkv, dout = torch.randn(1, 70, 3, 1, 64), torch.randn(1, 70, 64)
    qkv[:, :, 0], qkv[:, :, 1] = 12 + 0.1 * qkv[:, :, 0], -12 + 0.1 * qkv[:, :, 1]
    got, peer = gradients(attention.attention, qkv, dout), gradients(attention.reference, qkv, dout)
    for ours, theirs, exact in zip(got, peer, gradients(attention.reference, qkv.double(), dout.double())):
        floor = 1e-5 * exact.norm()  # fp32 rounds such scores by 6e-5, in the peer too
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + floor


@pytest.mark.interpreter
def test_the_op_is_registered_as_torch_expects():
    """Schema, fake kernel and autograd registration, as torch.compile and checkpoint use them."""
    qkv = torch.randn(1, 20, 3, 1, 16, requires_grad=True)
    torch.library.opcheck(torch.ops.uvit_fast.attention.default, (qkv,))


@pytest.mark.interpreter
def test_torch_compile_takes_it_whole():
    qkv, dout = torch.randn(1, 20, 3, 1, 16), torch.randn(1, 20, 16)
    compiled = torch.compile(attention.attention, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(gradients(compiled, qkv, dout), gradients(attention.attention, qkv, dout)):
        assert torch.equal(ours, eager)


@pytest.mark.interpreter
def test_vmap_calls_it_for_each_input():
    qkv = torch.randn(2, 1, 20, 3, 1, 16, requires_grad=True)
    wanted = [attention.attention(each) for each in qkv]
    assert torch.equal(torch.vmap(attention.attention)(qkv), torch.stack(wanted))


@pytest.mark.interpreter
def test_a_strided_input_is_taken():
    qkv = torch.randn(20, 2, 3, 1, 16).transpose(0, 1)
    torch.testing.assert_close(attention.attention(qkv), attention.reference(qkv), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "shape, dtype, words",
    [
        ((2, 8, 2, 1, 64), torch.bfloat16, r"\(B, L, 3, H, D\), got \(2, 8, 2, 1, 64\)"),
        ((2, 8, 3, 1, 64), torch.float64, "bfloat16 and float16, got torch.float64"),
        ((2, 8, 3, 1, 60), torch.bfloat16, "multiple of 8 up to 128, got 60"),
        ((2, 8, 3, 1, 136), torch.bfloat16, "multiple of 8 up to 128, got 136"),
        ((1, 513, 3, 1, 64), torch.bfloat16, "at most 512 tokens, got 513"),
        ((0, 8, 3, 1, 64), torch.bfloat16, "empty"),
    ],
)
def test_what_it_cannot_take_is_refused_in_a_sentence(shape, dtype, words, monkeypatch):
    qkv = torch.empty(shape, dtype=dtype)
    assert attention.why_not(torch.empty(1, 8, 3, 1, 64)) == "it runs on CUDA, got a tensor on cpu"
    monkeypatch.setattr(device, "_INTERPRETING", True)
    with pytest.raises(ValueError, match=words):
        attention.attention(qkv)


def kernels() -> dict[str, tuple]:
    """What is compiled for the contract: name -> (kernel, arguments, options, architecture)."""
    from uvit_fast.kernels.attention import sm80 as ampere
    from uvit_fast.kernels.attention import sm90_forward as hopper

    found = {}
    for arch, module, shapes in ((80, ampere, ((258, 64), (258, 72), (258, 128))), (90, hopper, HOPPER)):
        for L, D in shapes:
            qkv = torch.empty(2, L, 3, 16, D, dtype=torch.bfloat16, device="meta")
            out, lse = qkv.new_empty(2, L, 16 * D), qkv.new_empty(2, 16, L, dtype=torch.float32)
            backward = module.backward_launches(qkv, out, lse, out, lse, qkv)
            for kernel, arguments, options in (module.forward_launch(qkv, out, lse), *backward):
                found[f"sm_{arch} {kernel.__name__} L={L} D={D}"] = (kernel, arguments, options, arch)
            if arch == 90 and L == 258:
                kernel, arguments, options = hopper.forward_launch(qkv, out, lse, 5, early=True)
                found[f"sm_90 {kernel.__name__} early L={L} D={D}"] = (kernel, arguments, options, arch)
    return found


HOPPER = ((258, 64), (258, 72), (334, 64))  # 257 tokens run the code of 258


def measured() -> dict[str, dict[str, int]]:
    return {
        case: aot.compile(kernel, *arguments, arch=arch, **options)
        for case, (kernel, arguments, options, arch) in kernels().items()
    }


def test_the_kernels_keep_their_resource_contract():
    """No spill, no serialised wgmma, two CTAs an SM, one if it is early; and no worse than committed, where this is the
    triton that wrote it.
    """
    contract = json.loads(CONTRACT.read_text())
    now = measured()
    assert now.keys() == contract["kernels"].keys()
    for case, found in now.items():
        arch = int(case[3:5])
        assert found["spilled"] == 0, f"{case}: {found['spilled']} bytes spilled"
        assert found["serialized_wgmma"] == 0, f"{case}: wgmma is serialised"
        assert found["shared"] <= aot.SHARED_LIMIT[arch], f"{case}: {found['shared']} bytes of shared memory"
        if arch == 90:
            assert found["wgmma"] and found["tma_loads"] and found["tma_stores"], f"{case}: off the fast path"
            alone = found["shared"] > 113 * 1024  # one CTA an SM
            assert alone == ("early" in case), f"{case}: {found['shared']} bytes"
        if triton.__version__ == contract["triton"]:
            was = contract["kernels"][case]
            for field in ("registers", "shared", "wgmma", "wgmma_waits", "mma", "tma_loads", "cp_async"):
                exact = field not in ("registers", "shared")
                good = found[field] == was[field] if exact else found[field] <= was[field]
                assert good, f"{case}: {field} was {was[field]}, is {found[field]}"


if __name__ == "__main__":
    CONTRACT.write_text(json.dumps({"triton": triton.__version__, "kernels": measured()}, indent=1) + "\n")
