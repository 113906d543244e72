"""The GEMM core for sm_90 in Gluon: persistent, two consumer warpgroups and a TMA producer. Public functions as in `gemm_ampere`.

A tile is transposed, 128 features x 256 tokens: each consumer holds 64 weight rows x 256 tokens in one accumulator (wgmma n = 256),
and both read the same stages. A consumer frees the stages it has read by itself, so the two drift apart and the epilogue of one hides
behind the main loop of the other. The epilogue goes through the accumulator in parts of SN tokens; each leaves, and what it needs
beside (residual, GELU's h) arrives, by TMA through staging buffers of the consumer's own.

Shared memory: 4 stages x (2 x 64 + 256) x 64 values + 2 x 16 KB of staging = 224 KB, and the barriers. Where such tiles would leave
multiprocessors idle, as with a single image, a tile has 64 tokens and eight stages.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from uvit_fast.kernels.gemm import sm80 as gemm_ampere
from uvit_fast.kernels.gemm import sm90_weight_gradient as wgrad_hopper
from uvit_fast.kernels.gemm.sm80 import CASES, GELU, GELU_BACKWARD, GELU_SAVE, PLAIN, RESIDUAL
from uvit_fast.kernels.gemm.sm90_epilogues import (
    G0,
    G1,
    G2,
    fetch,
    gate,
    parts,
    read_rstd,
    rounded,
    send,
    send_two,
    touch,
    widened,
    write_moments,
)
from uvit_fast.kernels.layernorm import fold as layernorm
from uvit_fast.kernels.runtime import launch, tuning
from uvit_fast.kernels.runtime import reduce as sums
from uvit_fast.kernels.runtime.checks import ACCUMULATE
from uvit_fast.kernels.runtime.device import multiprocessors
from uvit_fast.kernels.runtime.launch import cdiv, descriptor

M_PLAIN: gl.constexpr = gl.constexpr(PLAIN)
M_RESIDUAL: gl.constexpr = gl.constexpr(RESIDUAL)
M_GELU: gl.constexpr = gl.constexpr(GELU)
M_GELU_SAVE: gl.constexpr = gl.constexpr(GELU_SAVE)
M_GELU_BACKWARD: gl.constexpr = gl.constexpr(GELU_BACKWARD)

ROWS, TOKENS, BK = 64, 256, 64  # features a consumer, tokens a tile, K a stage
assert TOKENS == layernorm.TILE, "statistics fill whole tiles"
assert ROWS == layernorm.CHUNK.value, "a consumer's features are those whose moments are taken together"
STAGES = {TOKENS: 4, 64: 8}
STAGING = 128  # tokens that a consumer's staging buffers hold together
SHORT = 12  # steps of K, up to which asking for a tile's statistics ahead measured faster
FEW = {"tokens": 64, "part": 32}  # a tile where tokens are few


@gluon.jit
def _producer(w_desc, x_desc, x2_desc, w_bufs, x_bufs, full, empty, tiles_n, tiles_m, KT, KT1, DUAL: gl.constexpr, WT: gl.constexpr, S: gl.constexpr):  # fmt: skip
    ROWS: gl.constexpr = w_desc.block_type.shape[1 if WT else 0]
    BK: gl.constexpr = x_desc.block_type.shape[1]
    TOKENS: gl.constexpr = x_desc.block_type.shape[0]
    step = 0
    for tile in range(gl.program_id(0), tiles_n * tiles_m, gl.num_programs(0)):
        feature = (tile % tiles_n) * 2 * ROWS
        token = (tile // tiles_n) * TOKENS
        for k in range(KT):
            s = step % S
            mbarrier.wait(empty.index(s), ((step // S) & 1) ^ 1)
            bar = full.index(s)
            mbarrier.expect(bar, 2 * w_desc.block_type.nbytes + x_desc.block_type.nbytes)
            if DUAL:
                tma.async_copy_global_to_shared(x_desc, [token, k * BK], bar, x_bufs.index(s), pred=k < KT1)
                tma.async_copy_global_to_shared(x2_desc, [token, (k - KT1) * BK], bar, x_bufs.index(s), pred=k >= KT1)
            else:
                tma.async_copy_global_to_shared(x_desc, [token, k * BK], bar, x_bufs.index(s))
            for c in gl.static_range(2):
                if WT:
                    tma.async_copy_global_to_shared(w_desc, [k * BK, feature + c * ROWS], bar, w_bufs.index(s * 2 + c))
                else:
                    tma.async_copy_global_to_shared(w_desc, [feature + c * ROWS, k * BK], bar, w_bufs.index(s * 2 + c))
            step += 1


@gluon.jit
def _weights(w_bufs, i, WT: gl.constexpr):
    if WT:
        buf = w_bufs.index(i).permute([1, 0])
    else:
        buf = w_bufs.index(i)
    return buf


@gluon.jit
def _main_loop(w_bufs, x_bufs, full, empty, step, KT, WHO: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, WT: gl.constexpr, S: gl.constexpr):  # fmt: skip
    """One tile's product [ROWS, TOKENS]; one wgmma stays in flight, its predecessor's stage is freed."""
    acc = gl.zeros([ROWS, TOKENS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16]))
    s = step % S
    mbarrier.wait(full.index(s), (step // S) & 1)
    w = _weights(w_bufs, s * 2 + WHO, WT)
    acc = warpgroup_mma(w, x_bufs.index(s).permute([1, 0]), acc, use_acc=False, is_async=True)
    for i in range(step + 1, step + KT):
        t = i % S
        mbarrier.wait(full.index(t), (i // S) & 1)
        w = _weights(w_bufs, t * 2 + WHO, WT)
        acc = warpgroup_mma(w, x_bufs.index(t).permute([1, 0]), acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
        mbarrier.arrive(empty.index((i - 1) % S), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + KT - 1) % S), count=1)
    return acc


@gluon.jit
def _consumer(out_desc, out2_desc, side_desc, bias, stats, partial, moments, w_bufs, x_bufs, bufs, bufs2, side_bufs, full, empty, side_bars, M, N, stride, tiles_n, tiles_m, KT, WHO: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, SN: gl.constexpr, S: gl.constexpr, NL: gl.constexpr, NO: gl.constexpr, MODE: gl.constexpr, FOLD: gl.constexpr, AHEAD: gl.constexpr, HAS_BIAS: gl.constexpr, WT: gl.constexpr, MOMENTS: gl.constexpr):  # fmt: skip
    NP: gl.constexpr = TOKENS // SN
    SIDE: gl.constexpr = MODE == M_RESIDUAL or MODE == M_GELU_BACKWARD
    FIRST: gl.constexpr = WHO * NO  # of the consumer's buffers in bufs, and in bufs2 where two results leave
    SIDE0: gl.constexpr = WHO * NL  # of those that the side input arrives in
    lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SN, 16])
    step = 0
    done = 0  # tiles
    for tile in range(gl.program_id(0), tiles_n * tiles_m, gl.num_programs(0)):
        feature = ((tile % tiles_n) * 2 + WHO) * ROWS
        token = (tile // tiles_n) * TOKENS
        row = feature + gl.arange(0, ROWS, layout=gl.SliceLayout(1, lay))
        # What the epilogue reads from global memory is on its way during the main loop.
        if MODE == M_RESIDUAL:
            tma.store_wait(0)
        if SIDE:
            for b in gl.static_range(NL):
                fetch(side_desc, token + b * SN, feature, side_bars.index(SIDE0 + b), side_bufs.index(SIDE0 + b))
        if HAS_BIAS:
            shift = gl.load(bias + row, mask=row < N, other=0.0).to(gl.float32)
        if FOLD:
            if AHEAD:
                touch(stats + stride + token, TOKENS)
            rstd = read_rstd(stats, token, stride, SN)
        acc = _main_loop(w_bufs, x_bufs, full, empty, step, KT, WHO, ROWS, TOKENS, WT, S)
        xs = parts(acc, ROWS, TOKENS, SN)
        if MODE == M_GELU_BACKWARD:
            total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, lay))
        for j in gl.static_range(NP):
            x = xs[j]
            at = token + j * SN
            if FOLD:
                x = x * gl.expand_dims(rstd, 0)
                if j + 1 < NP:
                    rstd = read_rstd(stats, at + SN, stride, SN)
            if HAS_BIAS:
                x = x + gl.expand_dims(shift, 1)
            if MODE == M_GELU_SAVE:
                # The backward sees h as rounded: round before the GELU.
                x = rounded(x, out_desc.dtype)
                t, w = gate(x)
                tma.store_wait(2 * (NO - 1))
                b = FIRST + j % NO
                send_two(x * t + x, out_desc, bufs.index(b), x, out2_desc, bufs2.index(b), at, feature)
            elif SIDE:
                buf = side_bufs.index(SIDE0 + j % NL)
                bar = side_bars.index(SIDE0 + j % NL)
                mbarrier.wait(bar, (done * (NP // NL) + j // NL) & 1)
                h = widened(buf.permute([1, 0]).load(lay))
                if MODE == M_RESIDUAL:
                    send(x + h, out_desc, at, feature, buf)
                    if MOMENTS:
                        write_moments(buf, moments, feature // ROWS, at, feature < N, M, ROWS, SN)
                    if j >= 1:
                        if j - 1 + NL < NP:  # the buffer sent before this one is free soonest
                            tma.store_wait(1)
                            before = SIDE0 + (j - 1) % NL
                            fetch(
                                side_desc, at + (NL - 1) * SN, feature, side_bars.index(before), side_bufs.index(before)
                            )
                else:
                    if j + NL < NP:  # h is in registers: its buffer is free
                        fetch(side_desc, at + NL * SN, feature, bar, buf)
                    t, w = gate(h)
                    y = h * t + h
                    slope = w * (w * (2.5 * G2) + 1.5 * G1) + 0.5 * G0  # of v, halved
                    x = x * ((y - y * t) * slope + (0.5 * t + 0.5))
                    total += gl.sum(x, axis=1)
                    tma.store_wait(2 * (NO - 1))
                    b = FIRST + j % NO
                    send_two(x, out_desc, bufs.index(b), y, out2_desc, bufs2.index(b), at, feature)
            else:
                if MODE == M_GELU:
                    t, w = gate(x)
                    x = x * t + x
                tma.store_wait(NO - 1)
                buf = bufs.index(FIRST + j % NO)
                send(x, out_desc, at, feature, buf)
                if MOMENTS:
                    write_moments(buf, moments, feature // ROWS, at, feature < N, M, ROWS, SN)
        if MODE == M_GELU_BACKWARD:
            gl.store(partial + (tile // tiles_n) * N + row, total, mask=row < N)
        step += KT
        done += 1
    tma.store_wait(0)


@gluon.jit
def gemm_kernel(
    w_desc,  # (N, K), tiles [ROWS, BK]; with WT (K, N), tiles [BK, ROWS]
    x_desc,  # (M, K1), tiles [TOKENS, BK]
    x2_desc,  # (M, K - K1), read with DUAL
    out_desc,  # (M, N), tiles [SN, ROWS]
    out2_desc,  # (M, N): GELU's h (GELU_SAVE), GELU's value (GELU_BACKWARD)
    side_desc,  # (M, N): the residual, or GELU's h
    bias,  # (N,)
    stats,  # (2, M, rounded up to whole tiles) fp32, whose second row, rstd, is read with FOLD
    partial,  # (ceil(M / TOKENS), N) fp32: column sums of out (GELU_BACKWARD)
    moments,  # (N / ROWS, 2, M) fp32, written with MOMENTS: see layernorm.new_moments
    M,
    N,
    stride_stats,
    tiles_n,
    tiles_m,
    KT,  # steps of K
    KT1,  # steps from the first source
    S: gl.constexpr,
    NL: gl.constexpr,
    NO: gl.constexpr,
    MODE: gl.constexpr,
    FOLD: gl.constexpr,
    AHEAD: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    DUAL: gl.constexpr,
    WT: gl.constexpr,
    MOMENTS: gl.constexpr,
):
    TOKENS: gl.constexpr = x_desc.block_type.shape[0]
    ROWS: gl.constexpr = out_desc.block_type.shape[1]
    SN: gl.constexpr = out_desc.block_type.shape[0]
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [2 * S] + w_desc.block_type.shape, w_desc.layout)
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [S] + x_desc.block_type.shape, x_desc.layout)
    # Allocations apart: the compiler puts a barrier between any two uses of one. A residual's result leaves from the residual's buffer.
    shape: gl.constexpr = out_desc.block_type.shape
    bufs = gl.allocate_shared_memory(out_desc.dtype, [2 * (NO if NO else NL)] + shape, out_desc.layout)
    bufs2 = bufs
    if MODE == M_GELU_SAVE or MODE == M_GELU_BACKWARD:
        bufs2 = gl.allocate_shared_memory(out_desc.dtype, [2 * NO] + shape, out_desc.layout)
    side_bufs = bufs
    if NL > 0 and NO > 0:
        side_bufs = gl.allocate_shared_memory(out_desc.dtype, [2 * NL] + shape, out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], mbarrier.MBarrierLayout())
    side_bars = gl.allocate_shared_memory(gl.int64, [2 * max(NL, 1), 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(S):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2 * NL):
        mbarrier.init(side_bars.index(i), count=1)
    gl.warp_specialize(
        [
            (_consumer, (out_desc, out2_desc, side_desc, bias, stats, partial, moments, w_bufs, x_bufs, bufs, bufs2, side_bufs, full, empty, side_bars, M, N, stride_stats, tiles_n, tiles_m, KT, 0, ROWS, TOKENS, SN, S, NL, NO, MODE, FOLD, AHEAD, HAS_BIAS, WT, MOMENTS)),
            (_consumer, (out_desc, out2_desc, side_desc, bias, stats, partial, moments, w_bufs, x_bufs, bufs, bufs2, side_bufs, full, empty, side_bars, M, N, stride_stats, tiles_n, tiles_m, KT, 1, ROWS, TOKENS, SN, S, NL, NO, MODE, FOLD, AHEAD, HAS_BIAS, WT, MOMENTS)),
            (_producer, (w_desc, x_desc, x2_desc, w_bufs, x_bufs, full, empty, tiles_n, tiles_m, KT, KT1, DUAL, WT, S)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def arguments(
    mode: int,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    x2: Tensor | None = None,
    stats: Tensor | None = None,
    side: Tensor | None = None,
    moments: Tensor | None = None,
    *,
    overwrite: bool = False,
    transposed: bool = False,
    tokens: int = TOKENS,
    part: int = 64,
) -> tuple[tuple, dict, int, tuple[Tensor, Tensor, Tensor]]:
    """The kernel's arguments, its launch options, the number of tiles, and the outputs (out, out2, partial)."""
    buffers = min(tokens, STAGING) // part
    arriving, leaving = {
        PLAIN: (0, buffers),
        GELU: (0, buffers),
        GELU_SAVE: (0, buffers // 2),  # of either output
        RESIDUAL: (buffers, 0),  # the result leaves from where the residual arrived
        GELU_BACKWARD: (2, 1),
    }[mode]
    (M, K), N = x.shape, w.shape[1 if transposed else 0]
    tiles_n, tiles_m = cdiv(N, 2 * ROWS), cdiv(M, tokens)
    out, out2 = gemm_ampere.outputs(mode, x, N, side, overwrite)
    partial = x.new_empty(tiles_m, N, dtype=ACCUMULATE) if mode == GELU_BACKWARD else out
    out_desc = descriptor(out, part, ROWS)
    steps = cdiv(K + (0 if x2 is None else x2.shape[1]), BK)
    args = (
        descriptor(w, BK, ROWS) if transposed else descriptor(w, ROWS, BK),
        x_desc := descriptor(x, tokens, BK),
        x_desc if x2 is None else descriptor(x2, tokens, BK),
        out_desc,
        out_desc if out2 is out else descriptor(out2, part, ROWS),
        out_desc if side is None else descriptor(side, part, ROWS),
        out if bias is None else bias,
        out if stats is None else stats,
        partial,
        partial if moments is None else moments,
        M,
        N,
        0 if stats is None else stats.stride(0),
        tiles_n,
        tiles_m,
        steps,
        K // BK,
        STAGES[tokens],
        arriving,
        leaving,
        mode,
        stats is not None,
        stats is not None and steps <= SHORT,
        bias is not None,
        x2 is not None,
        transposed,
        moments is not None,
    )
    return args, {"num_warps": 4, "maxnreg": 168}, tiles_n * tiles_m, (out, out2, partial)


def _run(mode: int, x: Tensor, w: Tensor, **sources) -> tuple[Tensor, Tensor, Tensor]:
    features, programs = w.shape[1 if sources.get("transposed") else 0], multiprocessors(x.device)
    tile = FEW
    if cdiv(features, 2 * ROWS) * cdiv(x.shape[0], TOKENS) >= programs:
        tile = {"part": tuning.choice(x.device, CASES[mode], x.shape[1])["part"]}
    args, options, tiles, outputs = arguments(mode, x, w, **sources, **tile)
    launch.run(x.device, gemm_kernel, (min(tiles, programs),), args, options)
    return outputs


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    stats: Tensor | None = None,
    residual: Tensor | None = None,
    overwrite: bool = False,
    moments: Tensor | None = None,
) -> Tensor:
    """x @ w.T + bias, with the sources and the epilogue that are given: see `gemm_ampere.linear`."""
    mode = PLAIN if residual is None else RESIDUAL
    return _run(mode, x, w, bias=bias, x2=x2, stats=stats, side=residual, overwrite=overwrite, moments=moments)[0]


def linear_gelu(x: Tensor, w: Tensor, bias: Tensor, *, stats: Tensor, save: bool) -> tuple[Tensor, Tensor | None]:
    """GELU(2 h), h = LN(x) @ w.T + bias, and h where `save` asks for it: see `gemm_ampere.linear_gelu`."""
    act, pre, _ = _run(GELU_SAVE if save else GELU, x, w, bias=bias, stats=stats)
    return act, pre if save else None


def linear_gelu_backward(dy: Tensor, w: Tensor, h: Tensor, *, overwrite: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """GELU's argument's gradient, its value and the column sums of the first: see `gemm_ampere.linear_gelu_backward`."""
    gradient, act, partial = _run(GELU_BACKWARD, dy, w, side=h, overwrite=overwrite, transposed=True)
    return gradient, act, *sums.totals(partial, 1, dy.dtype)


def input_gradient(dy: Tensor, w: Tensor) -> Tensor:
    """dy @ w: (M, N), (N, K) -> (M, K); w's rows may be any distance apart."""
    if tuning.choice(dy.device, "input_gradient", f"{w.shape[0]}x{w.shape[1]}")["ours"]:
        return _run(PLAIN, dy, w, transposed=True)[0]
    return gemm_ampere.input_gradient(dy, w)


def weight_gradient(dy: Tensor, x: Tensor, *, bias: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """dy.T @ x and the column sums of dy: see `gemm_ampere.weight_gradient`. The table says whose kernel."""
    if not tuning.choice(dy.device, "weight_gradient", f"{dy.shape[1]}x{x.shape[1]}")["ours"]:
        return gemm_ampere.weight_gradient(dy, x, bias=bias, out=out)
    out = dy.new_empty(dy.shape[1], x.shape[1]) if out is None else out
    return out, wgrad_hopper.weight_gradient(dy, x, out, bias)
