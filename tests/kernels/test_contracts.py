"""What the kernels of the linear ops take on sm_80 and sm_90, compiled here without a GPU, is what was promised.

`python -m tests.kernels.test_contracts` writes the contract anew; the diff shows what changed.
"""

import json
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor

from tests.kernels.interpreted import INTERPRETED
from uvit_fast.kernels.gemm import sm80 as gemm_ampere
from uvit_fast.kernels.layernorm import fold as layernorm
from uvit_fast.kernels.ops import adamw, assemble
from uvit_fast.kernels.runtime import reduce as sums
from uvit_fast.kernels.runtime import tuning
from uvit_fast.kernels.tools import aot

if not INTERPRETED:  # the interpreter knows no Gluon
    from uvit_fast.kernels.gemm import sm90 as gemm_hopper
    from uvit_fast.kernels.gemm import sm90_weight_gradient as wgrad_hopper

CONTRACT = Path(aot.__file__).parent / "contracts" / "linear.json"
M, D, H = 33024, 1152, 4608  # H/2 at batch 128
SLACK = {"registers": 8}  # compilers differ by a little; everything else is exact or a limit


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def fp32(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.float32)


def choice(table: dict, case: str, width: int) -> dict:
    """As tuning.choice, of a table."""
    return table["default"] | table.get(case, {}) | table.get(f"{case}:{width}", {})


def hopper() -> dict:
    """name -> what compiles it: every epilogue with the table's choices at D = 1152."""
    g, stats, x, moments = gemm_hopper, fp32(2, M), meta(M, D), fp32(D // 64, 2, M)
    cases = {
        "gemm": (g.PLAIN, x, meta(3 * D, D), {"bias": fp32(3 * D), "stats": stats}),
        "gemm_two_sources": (g.PLAIN, x, meta(D, 2 * D), {"bias": meta(D), "x2": meta(M, D), "moments": moments}),
        "gemm_input_gradient": (g.PLAIN, meta(M, H), meta(H, D), {"transposed": True}),
        "gemm_residual": (g.RESIDUAL, meta(M, H), meta(D, H), {"bias": meta(D), "side": meta(M, D)}),
        "gemm_residual_moments": (
            g.RESIDUAL,
            meta(M, H),
            meta(D, H),
            {"bias": meta(D), "side": meta(M, D), "moments": moments},
        ),
        "gemm_gelu": (g.GELU, x, meta(H, D), {"bias": fp32(H), "stats": stats}),
        "gemm_gelu_save": (g.GELU_SAVE, x, meta(H, D), {"bias": fp32(H), "stats": stats}),
        "gemm_gelu_short": (g.GELU, meta(M, 768), meta(H, 768), {"bias": fp32(H), "stats": stats}),
        "gemm_gelu_backward": (g.GELU_BACKWARD, x, meta(D, H), {"side": meta(M, H), "transposed": True}),
    }
    table = tuning.table(90)

    def gemm(mode, x, w, sources):
        tuned = choice(table, gemm_ampere.CASES[mode], x.shape[1])
        args, options, *_ = g.arguments(mode, x, w, part=tuned["part"], **sources)
        return g.gemm_kernel, args, options

    def wgrad(bias):
        args, options, _ = wgrad_hopper.arguments(meta(M, D), x, meta(D, D), bias, 132)
        return wgrad_hopper.wgrad_kernel, args, options

    def few(mode, x, w, sources):
        args, options, *_ = g.arguments(mode, x, w, **sources, **g.FEW)
        return g.gemm_kernel, args, options

    found = {name: lambda case=case: gemm(*case) for name, case in cases.items()}
    found |= {f"{name}_few": lambda case=case: few(*case) for name, case in cases.items()}
    return found | {"wgrad": lambda: wgrad(False), "wgrad_bias": lambda: wgrad(True)}


def plain(arch: int) -> dict:
    """The kernels in plain Triton that an architecture runs."""
    table = tuning.table(arch)
    low, high = layernorm._split(D)
    x, v, w, stats = meta(M, D), meta(D), meta(H, D), fp32(2, M)

    def prepare(moments):
        args = (x, v, v, w, meta(H), stats, w, fp32(H), fp32(D // 64, 2, M))
        args += (M, H, M, 1.0, 1e-5, D, low, high, True)
        tuned = choice(table, "prepare", D)
        last = (moments, tuned["rows"], layernorm.MERGED)
        return layernorm._prepare_kernel, (*args, *last), {"num_warps": tuned["warps"]}

    def backward():
        tuned = choice(table, "ln_backward", D)
        args = (x, x, x, stats, v, v, x, x, fp32(tuned["programs"], 3, D), M, M, D, low, high, True)
        return layernorm._backward_kernel, args, {"num_warps": tuned["warps"]}

    def bias_sums():
        tuned = choice(table, "column_sums", D)
        args = (x, fp32(tuned["programs"], D), M, D, tuned["rows"], tuned["block"])
        return sums._column_sums_kernel, args, {"num_warps": tuned["warps"]}

    def split_sum():
        args = (fp32(123, 128, 256), meta(D, D), D, D, D, 0, 41, 3, 9, 36, 1024)
        return wgrad_hopper.sum_kernel, (*args, 16), {}

    def totals():
        args = (fp32(528, 3, D), meta(D), meta(D), meta(D), 528, 3 * D, D, 128, 32)
        return sums._totals_kernel, args, {"num_warps": 4}

    def tokens():
        args = (meta(128, 4, 32, 32), meta(D, 4, 2, 2), v, meta(128, 2, D), meta(1, 258, D), x, M, 258, 2, D, 32, 32)
        return assemble._assemble_kernel, args, {"K": 16, "P": 2, "PADDED": 16, **assemble._TILE}

    def optimizer():
        args = (*[fp32(M * D)] * 4, meta(M * D), meta(M * D), fp32(4), M * D, 2e-4, 0.99, 0.999, 1e-8, 0.03, 0.9999)
        return adamw._adamw_kernel, args, {"BLOCK": 1024, "num_warps": 4}

    found = {
        "adamw": optimizer,
        "assemble": tokens,
        "prepare": lambda: prepare(0),
        "prepare_moments": lambda: prepare(32),
        "ln_backward": backward,
        "column_sums": bias_sums,
        "totals": totals,
    }
    return found | ({"wgrad_sum": split_sum} if arch == 90 else {})


def ampere() -> dict:
    table = tuning.table(80)
    x, h, partial = meta(M, D), meta(M, H), fp32(258, H)

    def gemm(mode, x, w, N, K, K2=0, fold=False, strides=None, moments=False):
        strides = strides or (K + K2, 1)
        tuned = choice(table, gemm_ampere.CASES[mode], K)
        out = meta(M, N)
        args = (x, x, w, meta(N), fp32(2, M), out, out, out, partial, fp32(N // 64, 2, M))
        args += (M, N, K, K2, *strides, M)
        flags = (fold, mode != gemm_ampere.GELU_BACKWARD, K2 > 0, mode, moments, *tuned["tile"], tuned["group"])
        return gemm_ampere.gemm_kernel, (*args, *flags), {"num_warps": tuned["warps"], "num_stages": tuned["stages"]}

    a = gemm_ampere
    return {
        "gemm": lambda: gemm(a.PLAIN, x, meta(3 * D, D), 3 * D, D, fold=True),
        "gemm_two_sources": lambda: gemm(a.PLAIN, x, meta(D, 2 * D), D, D, K2=D, moments=True),
        "gemm_residual": lambda: gemm(a.RESIDUAL, h, meta(D, H), D, H),
        "gemm_residual_moments": lambda: gemm(a.RESIDUAL, h, meta(D, H), D, H, moments=True),
        "gemm_gelu": lambda: gemm(a.GELU, x, meta(H, D), H, D, fold=True),
        "gemm_gelu_save": lambda: gemm(a.GELU_SAVE, x, meta(H, D), H, D, fold=True),
        "gemm_gelu_backward": lambda: gemm(a.GELU_BACKWARD, x, meta(D, H), H, D, strides=(1, H)),
    }


def kernels(arch: int) -> dict:
    return plain(arch) | (hopper() if arch == 90 else ampere())


def measure(arch: int) -> dict[str, dict[str, int]]:
    found = {}
    for name, make in kernels(arch).items():
        kernel, args, options = make()
        found[name] = aot.compile(kernel, *args, arch=arch, **options)
    return found


@pytest.mark.skipif(INTERPRETED, reason="compiles, which the interpreter replaces")
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_takes_what_its_contract_says(arch):
    contract = json.loads(CONTRACT.read_text())
    promised, found = contract[f"sm_{arch}"], measure(arch)
    assert promised.keys() == found.keys()
    for name, now in found.items():
        assert now["shared"] <= aot.SHARED_LIMIT[arch], f"{name} on sm_{arch}: {now['shared']} bytes of shared memory"
        assert not now["spilled"] and not now["local_accesses"], f"{name} on sm_{arch} spills: {now}"
        assert not now["serialized_wgmma"], f"{name} on sm_{arch}: ptxas serialised its wgmma"
        if contract["triton"] != triton.__version__:
            continue  # another compiler: the limits above hold, the counts may differ
        for field, was in promised[name].items():
            assert abs(now[field] - was) <= SLACK.get(field, 0), (
                f"{name} on sm_{arch}: {field} was {was}, is {now[field]}"
            )


@pytest.mark.skipif(INTERPRETED, reason="needs Gluon")
@pytest.mark.parametrize(
    "M, N, K",
    [
        (33024, 4608, 1152),  # a whole wave, split tiles, and a strip with the roles swapped
        (33024, 1152, 1152),  # split tiles and a strip
        (33024, 1536, 512),  # few tiles, many splits
        (1, 64, 64),  # one tile, narrower than a strip
    ],
)
def test_the_weight_gradients_plan_covers_every_tile_and_every_token_once(M, N, K):
    p = wgrad_hopper.plan(M, N, K, programs=132)
    covered = torch.zeros(N, K, dtype=torch.int32)
    steps: dict[int, list[int]] = {}
    for unit in range(p["units"]):
        v, parts = unit - p["whole"], p["splits"]
        tile, split, parts = (unit, 0, 1) if v < 0 else (p["whole"] + v % p["ragged"], v // p["ragged"], parts)
        steps.setdefault(tile, []).extend(range(split * p["KT"] // parts, (split + 1) * p["KT"] // parts))
    for tile, passed in steps.items():
        assert passed == list(range(p["KT"]))
        if tile < p["plain"]:
            n, k = tile % p["tiles_n"] * 128, tile // p["tiles_n"] * 256
            covered[n : n + 128, k : k + 256] += 1
        else:
            n, k = (tile - p["plain"]) * 256, p["strip_at"]
            covered[n : n + 256, k : k + 128] += 1
    assert (covered == 1).all()
    assert p["plain"] >= p["tiles_n"]  # the bias sums ride on the first tile of each row
    assert p["KT"] * 64 >= M


if __name__ == "__main__":
    found = {f"sm_{arch}": measure(arch) for arch in (80, 90)}
    CONTRACT.write_text(json.dumps({"triton": triton.__version__} | found, indent=1) + "\n")
