"""The GEMM kernel of sm_90 in Gluon: persistent, two consumer warpgroups and a TMA producer.

A tile is transposed, 128 features x 256 tokens: each consumer holds 64 weight rows x 256 tokens in one accumulator
(wgmma n = 256), and both read the same stages. A consumer frees the stages it has read by itself, so the two drift
apart and the epilogue of one hides behind the main loop of the other.

Shared memory: 4 stages x (2 x 64 + 256) x 128 bytes + 2 x 16 KB of staging = 224 KB, and the barriers. Where such tiles
would leave multiprocessors idle, as with a single image, a tile has 64 tokens and eight stages; where even these are
few (HALVES), 64 features, of which each consumer takes half of K. Operands are of 16 bits, or e4m3 (`sm90_fp8`), of
which a stage holds twice as many.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_init

from uvit_fast.kernels.gemm.sm90_epilogues import (
    Epilogue,
    Memory,
    Place,
    Staging,
    gelu,
    gelu_backward,
    gelu_save,
    plain,
    residual,
)
from uvit_fast.kernels.gemm.sm90_fragments import halves, parts
from uvit_fast.kernels.gemm.sm90_ring import Ring, ring
from uvit_fast.kernels.gemm.sm90_shares import Shares
from uvit_fast.kernels.runtime.aggregate import aggregate
from uvit_fast.kernels.runtime.hopper import barriers, let_next_begin, mma, settled, wait_for_others

LATE_TOKENS = gl.constexpr(160)  # of a tile whose sums are held in registers during the main loop


@aggregate
class Gemm:
    """A launch: its operands, tiles and epilogue."""

    w: tma.tensor_descriptor  # (N, K) in boxes of [64, BK]; TRANSPOSED (K, N), [BK, 64]
    x: tma.tensor_descriptor  # (M, K1), boxes of [TOKENS, BK]
    x2: tma.tensor_descriptor  # (M, K - K1), read with TWO
    x_tail: tma.tensor_descriptor | gl.constexpr  # (M, K1), boxes of the tail's few tokens; None without one
    x2_tail: tma.tensor_descriptor | gl.constexpr
    ring: Ring  # weights for either consumer, and tokens
    met: gl.shared_memory_descriptor  # HALVES: (2) barriers: a consumer has left sums for the other
    epilogue: Epilogue
    tail: Epilogue | gl.constexpr
    shares: Shares
    across: gl.tensor  # tiles over the features
    steps1: gl.tensor  # of a tile's blocks of K, those from the first source
    turns: gl.shared_memory_descriptor | gl.constexpr  # (4) barriers: a consumer has seen its tile's last step; None
    how: gl.constexpr  # How


@gluon.jit
def _ask_weights(g, tile, k, s, bar):
    BK: gl.constexpr = g.x.block_type.shape[1]
    feature = (tile % g.across) * (64 if g.how.HALVES else 128)
    for c in gl.static_range(2):
        w = g.ring.a.index(s * 2 + c)
        if g.how.HALVES:
            tma.async_copy_global_to_shared(g.w, [feature, (k * 2 + c) * BK], bar, w)
        elif g.ring.A_TURNED:
            tma.async_copy_global_to_shared(g.w, [k * BK, feature + c * 64], bar, w)
        else:
            tma.async_copy_global_to_shared(g.w, [feature + c * 64, k * BK], bar, w)


@gluon.jit
def _ask_tokens(g, tile, k, s, bar):
    token = (tile // g.across) * g.shares.SPAN
    if g.how.HALVES:
        for c in gl.static_range(2):
            _ask_source(g, g.x, g.x2, token, k * 2 + c, g.ring.b.index(s * 2 + c), bar)
    else:
        _ask_source(g, g.x, g.x2, token, k, g.ring.b.index(s), bar)
    if g.x_tail is not None:
        _ask_source(g, g.x_tail, g.x2_tail, token + g.epilogue.TOKENS, k, g.ring.tail.index(s), bar)


@gluon.jit
def _ask_source(g, x, x2, token, k, buf, bar):
    """Ask for the tokens' block k of K, from the source that has it."""
    BK: gl.constexpr = x.block_type.shape[1]
    if g.how.TWO:
        tma.async_copy_global_to_shared(x, [token, k * BK], bar, buf, pred=k < g.steps1)
        tma.async_copy_global_to_shared(x2, [token, (k - g.steps1) * BK], bar, buf, pred=k >= g.steps1)
    else:
        tma.async_copy_global_to_shared(x, [token, k * BK], bar, buf)


@gluon.jit
def _producer(g):
    TAIL: gl.constexpr = 0 if g.x_tail is None else g.x_tail.block_type.nbytes
    BYTES: gl.constexpr = 2 * g.w.block_type.nbytes + (2 if g.how.HALVES else 1) * g.x.block_type.nbytes + TAIL
    step = 0
    first, end, stride = g.shares.tiles_of_mine()
    ahead = 0  # steps whose weights are on their way
    if g.how.EARLY:
        start, stop = g.shares.steps_of(first)
        ahead = gl.minimum(stop - start, g.how.EARLY)
        for i in range(ahead):
            s, bar = g.ring.claim(i, BYTES)
            _ask_weights(g, first, start + i, s, bar)
        wait_for_others()
    for tile in range(first, end, stride):
        start, stop = g.shares.steps_of(tile)
        for k in range(start, stop):
            if g.how.EARLY:
                s = step % g.ring.STAGES
                if step >= ahead:
                    g.ring.claim(step, BYTES)
                    _ask_weights(g, tile, k, s, g.ring.full.index(s))
                _ask_tokens(g, tile, k, s, g.ring.full.index(s))
            else:
                s, bar = g.ring.claim(step, BYTES)
                _ask_tokens(g, tile, k, s, bar)
                _ask_weights(g, tile, k, s, bar)
            step += 1


@gluon.jit
def _multiply(ring, step, accs, WHO: gl.constexpr, use_acc: gl.constexpr = True):
    """Start adding a step's products to a consumer's sums, or the sums with them, and return them in flight."""
    w, x = ring.operands(step, WHO)
    found = (warpgroup_mma(w, x, accs[0], use_acc=use_acc, is_async=True),)
    if len(accs) > 1:
        found = found + (warpgroup_mma(w, ring.operand_tail(step), accs[1], use_acc=use_acc, is_async=True),)
    return found


@gluon.jit
def _product(ring, step, steps, turn, TOKENS: gl.constexpr, TAIL: gl.constexpr, WHO: gl.constexpr):
    """Return a consumer's [64, TOKENS] and with a tail [64, TAIL] of a tile, a tuple; a step's products stay in flight
    while the stage of the one before is freed.

    `turn` is arrived at when all steps have been seen, where it is a barrier.
    """
    DEEP: gl.constexpr = 256 // ring.b.dtype.primitive_bitwidth  # K of an instruction
    accs = (gl.zeros([64, TOKENS], gl.float32, mma(TOKENS, DEEP)),)
    if TAIL:
        accs = accs + (gl.zeros([64, TAIL], gl.float32, mma(TAIL, DEEP)),)
    accs = _multiply(ring, step, accs, WHO, False)
    for i in range(step + 1, step + steps):
        accs = settled(_multiply(ring, i, accs, WHO), len(accs))
        accs = [warpgroup_mma_init(acc) for acc in accs]
        ring.free(i - 1)
    if turn is not None:
        mbarrier.arrive(turn, count=1)
    accs = settled(accs)
    ring.free(step + steps - 1)
    return accs


@gluon.jit
def _product_half(g, step, steps, WHO: gl.constexpr):
    """Return half of a tile's tokens, [64, TOKENS]: each consumer has multiplied half of K, and finishes half of them.

    What it leaves the other stands where its own first tokens were. A program has one tile.
    """
    HALF: gl.constexpr = g.epilogue.TOKENS
    layout: gl.constexpr = gl.NVMMASharedLayout(min(128, HALF * 4), 32, 2)
    mine, other = halves(_product(g.ring, step, steps, None, 2 * HALF, 0, WHO)[0])
    if WHO == 1:
        mine, other = other, mine
    g.ring.b.index(WHO)._reinterpret(gl.float32, [64, HALF], layout).store(other)
    mbarrier.arrive(g.met.index(WHO), count=1)
    mbarrier.wait(g.met.index(1 - WHO), 0)
    return mine + g.ring.b.index(1 - WHO)._reinterpret(gl.float32, [64, HALF], layout).load(mine.type.layout)


@gluon.jit
def _finish(e, xs, ahead, at, uses):
    """Write a tile."""
    if e.how.KIND == "plain":
        plain(e, xs, ahead, at)
    elif e.how.KIND == "gelu":
        gelu(e, xs, ahead, at)
    elif e.how.KIND == "gelu_save":
        gelu_save(e, xs, ahead, at)
    elif e.how.KIND == "residual":
        residual(e, xs, ahead, at, uses)
    else:
        gelu_backward(e, xs, ahead, at, uses)


@gluon.jit
def _consumer(g, WHO: gl.constexpr):
    e = g.epilogue
    es = (e,) if g.tail is None else (e, g.tail)  # of a tile and its tail, as all tuples here
    TAIL: gl.constexpr = 0 if g.tail is None else g.tail.TOKENS
    HALF: gl.constexpr = WHO % 2  # of a tile's features
    PAIR: gl.constexpr = WHO // 2
    step = PAIR * g.shares.steps
    tiles_done = 0
    uses = 0  # of a staging buffer in which something arrives
    uses_tail = 0
    if g.how.EARLY:
        wait_for_others()
    let_next_begin()
    first, end, stride = g.shares.tiles_of_mine()
    for tile in range(first + PAIR * stride, end, g.how.PAIRS * stride):
        start, stop = g.shares.steps_of(tile)
        down = tile // g.across
        at = Place(((tile % g.across) * 2 + HALF) * 64, down * g.shares.SPAN, down, tile, WHO)
        if g.how.HALVES:
            at = Place((tile % g.across) * 64, down * g.shares.SPAN + WHO * e.TOKENS, down, tile, WHO)
        places = (at, Place(at.feature, at.token + e.TOKENS, down, tile, WHO))
        taken = ()
        for i in gl.static_range(len(es)):
            taken = taken + (es[i].take_sums(places[i]),)
            if not e.LATE:
                es[i].measure(places[i], taken[i])
        ahead = ()
        for i in gl.static_range(len(es)):
            ahead = ahead + (es[i].ask(places[i]),)
        turn = None
        if g.how.PAIRS == 2:
            # The other pair's steps come first, and a barrier of the ring tells a step only from the one before.
            mbarrier.wait(g.turns.index((1 - PAIR) * 2 + HALF), (tiles_done + 1 - PAIR) & 1)
            turn = g.turns.index(WHO)
            tiles_done += 1
        if g.how.HALVES:
            accs = (_product_half(g, step, stop - start, WHO),)
        else:
            accs = _product(g.ring, step, stop - start, turn, e.TOKENS, TAIL, HALF)
        if e.LATE:
            for i in gl.static_range(len(es)):
                es[i].measure(places[i], taken[i])
        xs = ()
        for i in gl.static_range(len(es)):
            xs = xs + (parts(accs[i], es[i].PART),)
            if g.how.MOST > 1:
                es[i].shares.leave(xs[i], tile, WHO)
        used = (uses, uses_tail)
        if g.shares.hand_in(tile, WHO):
            if g.how.MOST > 1:
                xs = [each.shares.collected(tile, WHO, each.TOKENS, each.PART) for each in es]
            for i in gl.static_range(len(es)):
                _finish(es[i], xs[i], ahead[i], places[i], used[i])
            uses += e.TOKENS // e.PART // max(e.ARRIVING, 1)
        else:
            for i in gl.static_range(len(es)):
                es[i].pass_by(places[i], used[i])
            uses += 1
        uses_tail += 1
        step += g.how.PAIRS * (stop - start)
    tma.store_wait(0)


@gluon.jit
def _epilogue(boxes, memory, shares, LEAVING: gl.constexpr, ARRIVING: gl.constexpr, TOKENS: gl.constexpr, how):
    """Return an epilogue with new staging buffers, of which a residual's are for what arrives and what leaves.

    Allocations apart: the compiler puts a barrier between any two uses of one.
    """
    out, second, side = boxes
    CONSUMERS: gl.constexpr = 2 * how.PAIRS
    shape: gl.constexpr = out.block_type.shape
    leaving = gl.allocate_shared_memory(out.dtype, [CONSUMERS * (LEAVING if LEAVING else ARRIVING)] + shape, out.layout)
    leaving2 = leaving
    if how.KIND == "gelu_save" or how.KIND == "gelu_backward":
        leaving2 = gl.allocate_shared_memory(out.dtype, [CONSUMERS * LEAVING] + shape, out.layout)
    arriving = leaving
    if ARRIVING > 0 and LEAVING > 0:
        arriving = gl.allocate_shared_memory(out.dtype, [CONSUMERS * ARRIVING] + shape, out.layout)
    arrived = barriers(CONSUMERS * ARRIVING) if ARRIVING else leaving
    rstds = leaving
    if how.FOLD == "sums":
        rstds = gl.allocate_shared_memory(gl.float32, [CONSUMERS, TOKENS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    staging = Staging(leaving, leaving2, arriving, arrived, rstds)
    LATE: gl.constexpr = how.FOLD == "sums" and how.PAIRS == 1 and shares.SPAN <= LATE_TOKENS
    return Epilogue(out, second, side, memory, staging, shares, LEAVING, ARRIVING, TOKENS, shape[0], LATE, how)


@gluon.jit
def gemm_kernel(
    w,  # (N, K), boxes of [64, BK]; with TRANSPOSED (K, N), boxes of [BK, 64]
    x,  # (M, K1), boxes of [TOKENS, BK]
    x2,  # (M, K - K1), read with TWO
    out,  # (M, N), boxes of [PART, 64]; with PAIRED (M, N / 2) int16, boxes of [PART, 32]
    second,  # (M, N): GELU's h (gelu_save), GELU's value (gelu_backward)
    side,  # (M, N): the residual, or GELU's h
    x_tail,  # this and the next three are as x, x2, out and side, in boxes of the tail's few tokens; None without one
    x2_tail,
    out_tail,
    side_tail,
    bias,  # (N,); with SCALED (2, N) fp32: bias, scale
    stats,  # FOLD "stats": (2, M and a tile more) fp32, whose second row, rstd, is read
    # FOLD "sums": (CHUNKS, 2, M) fp32, see layernorm.sums, from which rstd is taken here
    narrow,  # (M, N) e4m3, written with NARROW
    partial,  # (ceil(M / TOKENS), N) fp32: column sums of out (gelu_backward)
    sums,  # (N / 64, 2, M) fp32, written with SUMS
    shared,  # see Shares.parts, used where MOST is more than 1, as `arrivals` is
    arrivals,
    M,
    N,
    stride_stats,
    across,  # tiles over the features
    tiles,
    steps,  # of K
    steps1,  # blocks of K from the first source
    eps,  # of the LayerNorm that is folded in
    HOW: gl.constexpr,  # How
):
    TOKENS: gl.constexpr = x.block_type.shape[0]
    TAIL: gl.constexpr = 0 if x_tail is None else x_tail.block_type.shape[0]
    shares = Shares(tiles, steps, shared, arrivals, TOKENS + TAIL, HOW.MOST)
    memory = Memory(bias, stats + stride_stats, eps, partial, sums, narrow, M, N)
    own: gl.constexpr = TOKENS // (2 if HOW.HALVES else 1)
    epilogue = _epilogue((out, second, side), memory, shares, HOW.LEAVING, HOW.ARRIVING, own, HOW)
    tail = None
    if TAIL:
        rest = Shares(tiles, steps, shared + 64 * TOKENS, arrivals, TOKENS + TAIL, HOW.MOST)
        boxes = (out_tail, out_tail, side_tail)
        tail = _epilogue(boxes, memory, rest, 1 if HOW.LEAVING else 0, 1 if HOW.ARRIVING else 0, TAIL, HOW)
    turns = barriers(4) if HOW.PAIRS == 2 else None
    stages = ring(w, x, HOW.STAGES, HOW.TRANSPOSED, True, x_tail, HOW.HALVES)
    met = barriers(2) if HOW.HALVES else stages.full
    g = Gemm(w, x, x2, x_tail, x2_tail, stages, met, epilogue, tail, shares, across, steps1, turns, HOW)
    if HOW.PAIRS == 1:
        gl.warp_specialize([(_consumer, (g, 0)), (_consumer, (g, 1)), (_producer, (g,))], [4, 1], [240, 24])
    else:
        gl.warp_specialize(
            [(_consumer, (g, 0)), (_consumer, (g, 1)), (_consumer, (g, 2)), (_consumer, (g, 3)), (_producer, (g,))],
            [4, 4, 4, 1],
            [112, 112, 112, 24],
        )
