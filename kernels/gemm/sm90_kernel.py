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
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from uvit_fast.kernels.gemm.sm90_epilogues import (
    Epilogue,
    Place,
    gelu,
    gelu_backward,
    gelu_save,
    halves,
    parts,
    plain,
    residual,
)
from uvit_fast.kernels.gemm.sm90_ring import Ring, ring
from uvit_fast.kernels.gemm.sm90_shares import Shares
from uvit_fast.kernels.runtime.aggregate import aggregate
from uvit_fast.kernels.runtime.early import let_next_begin, wait_for_others

LATE_TOKENS = gl.constexpr(160)  # of a tile whose sums are held in registers during the main loop
AHEAD_OF_TOKENS = gl.constexpr(4)  # steps whose weights an early kernel asks for first: more keep its tokens waiting


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
    TWO: gl.constexpr  # whether there is a second source
    turns: gl.shared_memory_descriptor | gl.constexpr  # (4) barriers: a consumer has seen its tile's last step; None
    PAIRS: gl.constexpr  # of consumers, which take a program's tiles in turns
    HALVES: gl.constexpr  # whether each consumer takes half of a tile's K, not of its features
    EARLY: gl.constexpr  # whether the kernel may begin before the one before it has ended


@gluon.jit
def _ask_weights(g, tile, k, s, bar):
    BK: gl.constexpr = g.x.block_type.shape[1]
    feature = (tile % g.across) * (64 if g.HALVES else 128)
    for c in gl.static_range(2):
        w = g.ring.a.index(s * 2 + c)
        if g.HALVES:
            tma.async_copy_global_to_shared(g.w, [feature, (k * 2 + c) * BK], bar, w)
        elif g.ring.A_TURNED:
            tma.async_copy_global_to_shared(g.w, [k * BK, feature + c * 64], bar, w)
        else:
            tma.async_copy_global_to_shared(g.w, [feature + c * 64, k * BK], bar, w)


@gluon.jit
def _ask_tokens(g, tile, k, s, bar):
    token = (tile // g.across) * g.shares.SPAN
    if g.HALVES:
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
    if g.TWO:
        tma.async_copy_global_to_shared(x, [token, k * BK], bar, buf, pred=k < g.steps1)
        tma.async_copy_global_to_shared(x2, [token, (k - g.steps1) * BK], bar, buf, pred=k >= g.steps1)
    else:
        tma.async_copy_global_to_shared(x, [token, k * BK], bar, buf)


@gluon.jit
def _producer(g):
    TAIL: gl.constexpr = 0 if g.x_tail is None else g.x_tail.block_type.nbytes
    BYTES: gl.constexpr = 2 * g.w.block_type.nbytes + (2 if g.HALVES else 1) * g.x.block_type.nbytes + TAIL
    step = 0
    first, end, stride = g.shares.tiles_of_mine()
    ahead = 0  # steps whose weights are on their way
    if g.EARLY:
        start, stop = g.shares.steps_of(first)
        ahead = gl.minimum(stop - start, AHEAD_OF_TOKENS)
        for i in range(ahead):
            s, bar = g.ring.claim(i, BYTES)
            _ask_weights(g, first, start + i, s, bar)
        wait_for_others()
    for tile in range(first, end, stride):
        start, stop = g.shares.steps_of(tile)
        for k in range(start, stop):
            if g.EARLY:
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
def _product(ring, step, steps, turn, TOKENS: gl.constexpr, WHO: gl.constexpr):
    """Return a consumer's [64, TOKENS] of a tile; one wgmma stays in flight, its predecessor's stage is freed.

    `turn` is arrived at when all steps have been seen, where it is a barrier.
    """
    DEEP: gl.constexpr = 256 // ring.b.dtype.primitive_bitwidth  # K of an instruction
    acc = gl.zeros([64, TOKENS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, DEEP]))
    w, x = ring.operands(step, WHO)
    acc = warpgroup_mma(w, x, acc, use_acc=False, is_async=True)
    for i in range(step + 1, step + steps):
        w, x = ring.operands(i, WHO)
        acc = warpgroup_mma(w, x, acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
        ring.free(i - 1)
    if turn is not None:
        mbarrier.arrive(turn, count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    ring.free(step + steps - 1)
    return acc


@gluon.jit
def _product_tail(ring, step, steps, TOKENS: gl.constexpr, TAIL: gl.constexpr, WHO: gl.constexpr):
    """Return a consumer's [64, TOKENS] and [64, TAIL] of a tile, as `_product`."""
    acc = gl.zeros([64, TOKENS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16]))
    rest = gl.zeros([64, TAIL], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL, 16]))
    w, x = ring.operands(step, WHO)
    acc = warpgroup_mma(w, x, acc, use_acc=False, is_async=True)
    rest = warpgroup_mma(w, ring.operand_tail(step), rest, use_acc=False, is_async=True)
    for i in range(step + 1, step + steps):
        w, x = ring.operands(i, WHO)
        acc = warpgroup_mma(w, x, acc, is_async=True)
        rest = warpgroup_mma(w, ring.operand_tail(i), rest, is_async=True)
        acc, rest = warpgroup_mma_wait(2, deps=(acc, rest))
        acc = warpgroup_mma_init(acc)
        rest = warpgroup_mma_init(rest)
        ring.free(i - 1)
    acc, rest = warpgroup_mma_wait(0, deps=(acc, rest))
    ring.free(step + steps - 1)
    return acc, rest


@gluon.jit
def _product_half(g, step, steps, WHO: gl.constexpr):
    """Return half of a tile's tokens, [64, TOKENS]: each consumer has multiplied half of K, and finishes half of them.

    What it leaves the other stands where its own first tokens were. A program has one tile.
    """
    HALF: gl.constexpr = g.epilogue.TOKENS
    layout: gl.constexpr = gl.NVMMASharedLayout(min(128, HALF * 4), 32, 2)
    mine, other = halves(_product(g.ring, step, steps, None, 2 * HALF, WHO), 64, 2 * HALF)
    if WHO == 1:
        mine, other = other, mine
    g.ring.b.index(WHO)._reinterpret(gl.float32, [64, HALF], layout).store(other)
    mbarrier.arrive(g.met.index(WHO), count=1)
    mbarrier.wait(g.met.index(1 - WHO), 0)
    return mine + g.ring.b.index(1 - WHO)._reinterpret(gl.float32, [64, HALF], layout).load(mine.type.layout)


@gluon.jit
def _finish(e, xs, ahead, at, uses):
    """Write a tile."""
    if e.KIND == "plain":
        plain(e, xs, ahead, at)
    elif e.KIND == "gelu":
        gelu(e, xs, ahead, at)
    elif e.KIND == "gelu_save":
        gelu_save(e, xs, ahead, at)
    elif e.KIND == "residual":
        residual(e, xs, ahead, at, uses)
    else:
        gelu_backward(e, xs, ahead, at, uses)


@gluon.jit
def _consumer(g, WHO: gl.constexpr):
    e = g.epilogue
    t = g.tail
    SHARED: gl.constexpr = g.shares.MOST > 1
    HALF: gl.constexpr = WHO % 2  # of a tile's features
    PAIR: gl.constexpr = WHO // 2
    step = PAIR * g.shares.steps
    tiles_done = 0
    uses = 0  # of a staging buffer in which something arrives
    uses_tail = 0
    if g.EARLY:
        wait_for_others()
    let_next_begin()
    first, end, stride = g.shares.tiles_of_mine()
    for tile in range(first + PAIR * stride, end, g.PAIRS * stride):
        start, stop = g.shares.steps_of(tile)
        down = tile // g.across
        at = Place(((tile % g.across) * 2 + HALF) * 64, down * g.shares.SPAN, down, tile, WHO)
        if g.HALVES:
            at = Place((tile % g.across) * 64, down * g.shares.SPAN + WHO * e.TOKENS, down, tile, WHO)
        taken = e.take_sums(at)
        if not e.LATE:
            e.measure(at, taken)
        if t is None:
            ahead = e.ask(at)
            turn = None
            if g.PAIRS == 2:
                # The other pair's steps come first, and a barrier of the ring tells a step only from the one before.
                mbarrier.wait(g.turns.index((1 - PAIR) * 2 + HALF), (tiles_done + 1 - PAIR) & 1)
                turn = g.turns.index(WHO)
                tiles_done += 1
            if g.HALVES:
                acc = _product_half(g, step, stop - start, WHO)
            else:
                acc = _product(g.ring, step, stop - start, turn, e.TOKENS, HALF)
            xs = parts(acc, 64, e.TOKENS, e.PART)
            if e.LATE:
                e.measure(at, taken)
            if SHARED:
                g.shares.leave(xs, tile, WHO, e.TOKENS, e.PART)
            if g.shares.hand_in(tile, WHO):
                if SHARED:
                    xs = g.shares.collected(tile, WHO, e.TOKENS, e.PART)
                _finish(e, xs, ahead, at, uses)
                uses += e.ROUNDS
            else:
                e.pass_by(at, uses)
                uses += 1
        else:
            beside = Place(at.feature, at.token + e.TOKENS, down, tile, WHO)
            taken_tail = t.take_sums(beside)
            if not e.LATE:
                t.measure(beside, taken_tail)
            ahead = e.ask(at)
            ahead_tail = t.ask(beside)
            acc, rest = _product_tail(g.ring, step, stop - start, e.TOKENS, t.TOKENS, WHO)
            if e.LATE:
                e.measure(at, taken)
                t.measure(beside, taken_tail)
            xs = parts(acc, 64, e.TOKENS, e.PART)
            xs_tail = (rest,)
            if SHARED:
                g.shares.leave(xs, tile, WHO, e.TOKENS, e.PART)
                t.shares.leave(xs_tail, tile, WHO, t.TOKENS, t.PART)
            if g.shares.hand_in(tile, WHO):
                if SHARED:
                    xs = g.shares.collected(tile, WHO, e.TOKENS, e.PART)
                    xs_tail = t.shares.collected(tile, WHO, t.TOKENS, t.PART)
                _finish(e, xs, ahead, at, uses)
                _finish(t, xs_tail, ahead_tail, beside, uses_tail)
                uses += e.ROUNDS
            else:
                e.pass_by(at, uses)
                t.pass_by(beside, uses_tail)
                uses += 1
            uses_tail += 1
        step += g.PAIRS * (stop - start)
    tma.store_wait(0)


@gluon.jit
def _epilogue(
    out,
    second,
    side,
    of,
    shares,
    LEAVING: gl.constexpr,
    ARRIVING: gl.constexpr,
    TOKENS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    how: gl.constexpr,
):
    """Return an epilogue with new staging buffers.

    Allocations apart: the compiler puts a barrier between any two uses of one. A residual's result leaves from the
    residual's buffer.
    """
    bias, rstd, eps, partial, sums, narrow, M, N = of
    KIND: gl.constexpr = how[0]
    FOLD: gl.constexpr = how[2]
    shape: gl.constexpr = out.block_type.shape
    leaving = gl.allocate_shared_memory(out.dtype, [CONSUMERS * (LEAVING if LEAVING else ARRIVING)] + shape, out.layout)
    leaving2 = leaving
    if KIND == "gelu_save" or KIND == "gelu_backward":
        leaving2 = gl.allocate_shared_memory(out.dtype, [CONSUMERS * LEAVING] + shape, out.layout)
    arriving = leaving
    if ARRIVING > 0 and LEAVING > 0:
        arriving = gl.allocate_shared_memory(out.dtype, [CONSUMERS * ARRIVING] + shape, out.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [CONSUMERS * max(ARRIVING, 1), 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS * ARRIVING):
        mbarrier.init(arrived.index(i), count=1)
    rstds = arrived
    if FOLD == "sums":
        rstds = gl.allocate_shared_memory(gl.float32, [CONSUMERS, TOKENS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return Epilogue(
        out=out,
        second=second,
        side=side,
        bias=bias,
        rstd=rstd,
        eps=eps,
        partial=partial,
        sums=sums,
        narrow=narrow,
        M=M,
        N=N,
        leaving=leaving,
        leaving2=leaving2,
        arriving=arriving,
        arrived=arrived,
        rstds=rstds,
        shares=shares,
        KIND=KIND,
        LEAVING=LEAVING,
        ARRIVING=ARRIVING,
        TOKENS=TOKENS,
        PART=shape[0],
        ROUNDS=TOKENS // shape[0] // max(ARRIVING, 1),
        HAS_BIAS=how[1],
        FOLD=FOLD,
        AHEAD=how[3],
        SUMS=how[4],
        CHUNKS=how[5],
        SCALED=how[6],
        PAIRED=how[7],
        WIDE=how[8],
        NARROW=how[9],
        LATE=FOLD == "sums" and shares.SPAN <= LATE_TOKENS,
    )


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
    STAGES: gl.constexpr,
    ARRIVING: gl.constexpr,
    LEAVING: gl.constexpr,
    KIND: gl.constexpr,
    FOLD: gl.constexpr,
    AHEAD: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    TWO: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    SUMS: gl.constexpr,
    SCALED: gl.constexpr,
    PAIRED: gl.constexpr,
    WIDE: gl.constexpr,
    NARROW: gl.constexpr,
    CHUNKS: gl.constexpr,
    MOST: gl.constexpr,
    PAIRS: gl.constexpr,
    HALVES: gl.constexpr,
    EARLY: gl.constexpr,
):
    shares = Shares(
        tiles=gl.to_tensor(tiles),
        steps=gl.to_tensor(steps),
        parts=shared,
        arrivals=arrivals,
        SPAN=x.block_type.shape[0] + (0 if x_tail is None else x_tail.block_type.shape[0]),
        MOST=MOST,
    )
    rstd = stats + stride_stats
    of = (bias, rstd, gl.to_tensor(eps), partial, sums, narrow, gl.to_tensor(M), gl.to_tensor(N))
    how: gl.constexpr = (KIND, HAS_BIAS, FOLD, AHEAD, SUMS, CHUNKS, SCALED, PAIRED, WIDE, NARROW)
    own: gl.constexpr = x.block_type.shape[0] // (2 if HALVES else 1)
    epilogue = _epilogue(out, second, side, of, shares, LEAVING, ARRIVING, own, 2 * PAIRS, how)
    tail = None
    if x_tail is not None:
        rest = Shares(shares.tiles, shares.steps, shared + 64 * x.block_type.shape[0], arrivals, shares.SPAN, MOST)
        buffers: gl.constexpr = (1 if LEAVING else 0, 1 if ARRIVING else 0)
        tail = _epilogue(
            out_tail, out_tail, side_tail, of, rest, buffers[0], buffers[1], x_tail.block_type.shape[0], 2, how
        )
    turns = None
    if PAIRS == 2:
        turns = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(4):
            mbarrier.init(turns.index(i), count=1)
    stages = ring(w, x, STAGES, TRANSPOSED, True, x_tail, HALVES)
    met = stages.full
    if HALVES:
        met = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(met.index(i), count=1)
    g = Gemm(
        w=w,
        x=x,
        x2=x2,
        x_tail=x_tail,
        x2_tail=x2_tail,
        ring=stages,
        met=met,
        epilogue=epilogue,
        tail=tail,
        shares=shares,
        across=gl.to_tensor(across),
        steps1=gl.to_tensor(steps1),
        TWO=TWO,
        turns=turns,
        PAIRS=PAIRS,
        HALVES=HALVES,
        EARLY=EARLY,
    )
    if PAIRS == 1:
        gl.warp_specialize([(_consumer, (g, 0)), (_consumer, (g, 1)), (_producer, (g,))], [4, 1], [240, 24])
    else:
        gl.warp_specialize(
            [(_consumer, (g, 0)), (_consumer, (g, 1)), (_consumer, (g, 2)), (_consumer, (g, 3)), (_producer, (g,))],
            [4, 4, 4, 1],
            [112, 112, 112, 24],
        )
