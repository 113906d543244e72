"""What the kernels of the linear ops take on sm_80 and sm_90, compiled here without a GPU, is what was promised.

`python -m tests.kernels.test_contracts` writes the contract anew; the diff shows what changed.
"""

import json
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor

from uvit_fast.kernels.gemm import fp8, sm80, sm90, sm90_fp8, sm90_weight_gradient
from uvit_fast.kernels.gemm.contract import CASES, Call
from uvit_fast.kernels.layernorm import added, fold, refold
from uvit_fast.kernels.layernorm import backward as ln_backward
from uvit_fast.kernels.layernorm.sums import Summed
from uvit_fast.kernels.layers import Linear, Quantised
from uvit_fast.kernels.ops import adamw, assemble
from uvit_fast.kernels.quantise import E4M3
from uvit_fast.kernels.runtime import reduce as sums
from uvit_fast.kernels.runtime import tuning
from uvit_fast.kernels.tools import aot

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
    stats, x, sums = fp32(2, M), meta(M, D), fp32(D // 64, 2, M)
    qkv, up, down = Linear(meta(3 * D, D), fp32(3 * D)), Linear(meta(H, D), fp32(H)), Linear(meta(D, H), meta(D))
    short, hidden, side = Linear(meta(H, 768), fp32(H)), meta(M, H), meta(M, D)
    cases = {
        "gemm": ("plain", x, qkv, {"stats": stats}),
        "gemm_two_sources": ("plain", x, Linear(meta(D, 2 * D), meta(D)), {"x2": x, "sums": sums}),
        "gemm_input_gradient": ("plain", hidden, Linear(meta(H, D)), {"transposed": True}),
        "gemm_residual": ("residual", hidden, down, {"side": side}),
        "gemm_residual_sums": ("residual", hidden, down, {"side": side, "sums": sums}),
        "gemm_gelu": ("gelu", x, up, {"stats": stats}),
        "gemm_gelu_save": ("gelu_save", x, up, {"stats": stats}),
        "gemm_gelu_short": ("gelu", meta(M, 768), short, {"stats": stats}),
        "gemm_gelu_backward": ("gelu_backward", x, Linear(meta(D, H)), {"side": hidden, "transposed": True}),
    }
    table = tuning.table(90)

    def gemm(epilogue, x, linear, sources):
        tuned = choice(table, CASES[epilogue], x.shape[1])
        args, options, *_ = sm90.arguments(Call(epilogue, x, linear, **sources), part=tuned["part"])
        return sm90.gemm_kernel, args, options

    def wgrad(bias):
        args, options, _ = sm90_weight_gradient.arguments(meta(M, D), x, meta(D, D), bias, 132)
        return sm90_weight_gradient.weight_gradient_kernel, args, options

    def few(epilogue, x, linear, sources):
        args, options, *_ = sm90.arguments(Call(epilogue, x, linear, **sources), **sm90.FEW)
        return sm90.gemm_kernel, args, options

    def shared(epilogue, K, linear, sources, **tile):
        args, options, *_ = sm90.arguments(Call(epilogue, meta(258, K), linear, **sources), part=32, **tile)
        return sm90.gemm_kernel, args, options

    def narrow(epilogue, K, N, few=None, tokens=M, **sources):
        layer = Quantised(meta(N, K + (D if "x2" in sources else 0), dtype=E4M3), fp32(2, N))
        case = fp8.CASES["two_sources" if "x2" in sources else epilogue]
        tile = few or {name: choice(table, case, K)[name] for name in sm90_fp8.TILE}
        asked = fp8.Asked(epilogue, meta(tokens, K, dtype=E4M3), layer, **sources)
        args, options, *_ = sm90_fp8.arguments(asked, **tile)
        return sm90.gemm_kernel, args, options

    x8, both = meta(M, D, dtype=E4M3), {"narrow": True, "sums": True}
    narrow_cases = {
        "fp8": ("plain", D, 3 * D, {"stats": stats}),
        "fp8_two_sources": ("plain", D, D, {"x2": x8, **both}),
        "fp8_gelu": ("gelu", D, H, {"stats": stats, "wide": False}),
        "fp8_residual": ("residual", H, D, {"side": side, **both}),
        "fp8_residual_short": ("residual", D, D, {"side": side, **both}),
        "fp8_residual_few": ("residual", H, D, {"side": side, **both, "few": sm90.FEW}),
        "fp8_residual_narrow": ("residual", H, D, {"side": side, "narrow": True, "wide": False}),
    }
    taken, one8 = Summed(fp32(D // 64, 2, 258), 1e-5), {"side": meta(258, D), **both}
    few_cases = {  # of one image, by the table
        "fp8_few": ("plain", D, 3 * D, {"stats": taken}),
        "fp8_few_two_sources": ("plain", D, D, {"x2": meta(258, D, dtype=E4M3), **both}),
        "fp8_few_gelu": ("gelu", D, H, {"stats": taken, "wide": False}),
        "fp8_few_residual": ("residual", H, D, one8),
        "fp8_few_residual_short": ("residual", D, D, one8),
    }
    for name, (epilogue, K, N, sources) in few_cases.items():
        chosen = dict(table[f"fp8_few:{N}x{K * (1 + ('x2' in sources))}:258"])
        assert chosen.pop("sums", False) == ("stats" in sources)
        narrow_cases[name] = epilogue, K, N, {**sources, "tokens": 258, "few": chosen}
    shares = {"tokens": 64, "tail": 8, "part": 32, "stages": 7, "shares": 3}
    narrow_cases["fp8_residual_shared"] = "residual", H, D, {**one8, "tokens": 258, "few": shares}

    found = {name: lambda case=case: gemm(*case) for name, case in cases.items()}
    found |= {name: lambda c=case: narrow(*c[:3], **c[3]) for name, case in narrow_cases.items()}
    found |= {f"{name}_few": lambda case=case: few(*case) for name, case in cases.items()}
    proj, one = Linear(meta(D, D), meta(D)), {"side": meta(258, D), "sums": fp32(D // 64, 2, 258)}
    found["gemm_residual_shared"] = lambda: shared("residual", H, down, one, tokens=64, tail=8, stages=7, shares=3)
    found["gemm_residual_halves"] = lambda: shared("residual", D, proj, one, tokens=64, stages=6, halves=True, early=4)
    summed = {"stats": Summed(fp32(D // 64, 2, 258), 1e-5)}
    found["gemm_gelu_tail"] = lambda: shared("gelu", D, up, summed, tokens=128, tail=32, stages=4)
    found["gemm_gelu_tail_early"] = lambda: shared("gelu", D, up, summed, tokens=64, tail=8, stages=7, early=8)
    found["gemm_sums_early"] = lambda: shared("plain", D, qkv, summed, tokens=64, stages=8, early=8)
    found["gemm_residual_shared_early"] = lambda: shared(
        "residual", H, down, one, tokens=64, tail=8, stages=7, shares=2, early=4
    )
    return found | {"wgrad": lambda: wgrad(False), "wgrad_bias": lambda: wgrad(True)}


def plain(arch: int) -> dict:
    """The kernels in plain Triton that an architecture runs."""
    table = tuning.table(arch)
    _, low, high = fold.split(D).values()
    x, v, w, stats = meta(M, D), meta(D), meta(H, D), fp32(2, M)

    def prepare(sums, narrow=False):
        args = (x, v, v, w, meta(H), stats, w, fp32(H), fp32(D // 64, 2, M))
        args += (meta(M, D, dtype=E4M3) if narrow else stats,)
        args += (M, H, M, 1.0, 1e-5, D, low, high, True)
        tuned = choice(table, "prepare", D)
        last = (sums, narrow, tuned["rows"], fold.MERGED)
        return fold._prepare_kernel, (*args, *last), {"num_warps": tuned["warps"], "enable_fp_fusion": False}

    def add():
        tuned = choice(table, "prepare", D)
        args = (x, x, x, x, meta(M, D, dtype=E4M3), stats, M, M, 1e-5, D, low, high, True, True, tuned["rows"])
        return added._kernel, args, {"num_warps": tuned["warps"]}

    table_of = meta(59, refold.FIELDS, dtype=torch.int64)
    marks = meta(144, 4, dtype=torch.int64)

    def look():
        return refold._look_kernel, (table_of, meta(H, D // 2, dtype=torch.int32), w, marks), refold.look_options(D, 2)

    def again():
        tuned = choice(table, "prepare", D)
        return refold._refold_kernel, (table_of, w, fp32(H), marks), refold.options(D, tuned)

    def backward():
        tuned = choice(table, "ln_backward", D)
        args = (x, x, x, stats, v, v, x, x, fp32(tuned["programs"], 3, D), M, M, D, low, high, True)
        return ln_backward._backward_kernel, args, {"num_warps": tuned["warps"]}

    def bias_sums():
        tuned = choice(table, "column_sums", D)
        args = (x, fp32(tuned["programs"], D), M, D, tuned["rows"], tuned["block"])
        return sums._column_sums_kernel, args, {"num_warps": tuned["warps"]}

    def split_sum():
        args = (fp32(123, 128, 256), meta(D, D), D, D, D, 0, 41, 3, 9, 36, 1024)
        return sm90_weight_gradient.sum_kernel, (*args, 16), {}

    def totals():
        args = (fp32(528, 3, D), meta(D), meta(D), meta(D), 528, 3 * D, D, 128, 32)
        return sums._totals_kernel, args, {"num_warps": 4}

    def tokens(C, side, p):
        image, weight, K = fp32(128, C, side, side), meta(D, C, p, p), C * p * p
        args = (image, weight, v, *[meta(128, 1, D)] * 2, meta(1, 258, D), x, C * side**2, M, 258, 1, 1, D, side, side)
        return assemble._assemble_kernel, args, {"K": K, "P": p, "PADDED": K, **assemble._TILE}

    def optimizer():
        args = (*[fp32(M * D)] * 4, meta(M * D), meta(M * D), fp32(4), M * D, 2e-4, 0.99, 0.999, 1e-8, 0.03, 0.9999)
        return adamw._adamw_kernel, args, {"BLOCK": 1024, "num_warps": 4}

    found = {
        "adamw": optimizer,
        "assemble": lambda: tokens(4, 32, 2),
        "assemble_deep": lambda: tokens(32, 16, 1),  # DC-AE's latents
        "prepare": lambda: prepare(0),
        "prepare_sums": lambda: prepare(32),
        "look": look,
        "refold": again,
        "ln_backward": backward,
        "column_sums": bias_sums,
        "totals": totals,
    }
    hopper = {"wgrad_sum": split_sum, "prepare_narrow": lambda: prepare(0, True), "added": add}
    return found | (hopper if arch == 90 else {})


def ampere() -> dict:
    table = tuning.table(80)
    x, h, sums, stats = meta(M, D), meta(M, H), fp32(D // 64, 2, M), fp32(2, M)
    qkv, up, down = Linear(meta(3 * D, D), meta(3 * D)), Linear(meta(H, D), meta(H)), Linear(meta(D, H), meta(D))

    def gemm(epilogue, x, linear, **sources):
        tuned = choice(table, CASES[epilogue], x.shape[1])
        args, options, *_ = sm80.arguments(Call(epilogue, x, linear, **sources), tuned)
        return sm80.gemm_kernel, args, options

    return {
        "gemm": lambda: gemm("plain", x, qkv, stats=stats),
        "gemm_two_sources": lambda: gemm("plain", x, Linear(meta(D, 2 * D), meta(D)), x2=x, sums=sums),
        "gemm_residual": lambda: gemm("residual", h, down, side=x),
        "gemm_residual_sums": lambda: gemm("residual", h, down, side=x, sums=sums),
        "gemm_gelu": lambda: gemm("gelu", x, up, stats=stats),
        "gemm_gelu_save": lambda: gemm("gelu_save", x, up, stats=stats),
        "gemm_gelu_backward": lambda: gemm("gelu_backward", x, Linear(meta(D, H)), side=h, transposed=True),
    }


def kernels(arch: int) -> dict:
    return plain(arch) | (hopper() if arch == 90 else ampere())


def measure(arch: int) -> dict[str, dict[str, int]]:
    found = {}
    for name, make in kernels(arch).items():
        kernel, args, options = make()
        found[name] = aot.compile(kernel, *args, arch=arch, **options)
    return found


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
    p = sm90_weight_gradient.plan(M, N, K, programs=132)
    covered = torch.zeros(N, K, dtype=torch.int32)
    steps: dict[int, list[int]] = {}
    for unit in range(p["units"]):
        v, parts = unit - p["whole"], p["splits"]
        tile, split, parts = (unit, 0, 1) if v < 0 else (p["whole"] + v % p["ragged"], v // p["ragged"], parts)
        steps.setdefault(tile, []).extend(range(split * p["steps"] // parts, (split + 1) * p["steps"] // parts))
    for tile, passed in steps.items():
        assert passed == list(range(p["steps"]))
        if tile < p["plain"]:
            n, k = tile % p["down"] * 128, tile // p["down"] * 256
            covered[n : n + 128, k : k + 256] += 1
        else:
            n, k = (tile - p["plain"]) * 256, p["strip"]
            covered[n : n + 256, k : k + 128] += 1
    assert (covered == 1).all()
    assert p["plain"] >= p["down"]  # the bias sums ride on the first tile of each row
    assert p["steps"] * 64 >= M


if __name__ == "__main__":
    found = {f"sm_{arch}": measure(arch) for arch in (80, 90)}
    CONTRACT.write_text(json.dumps({"triton": triton.__version__} | found, indent=1) + "\n")
