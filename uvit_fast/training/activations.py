"""How much each block may keep for its backward within a memory budget, from measured sizes.

Activation memory is what a forward and its backward hold beside weights, gradients, optimizer state and EMA. The blocks
that run last in the forward keep the most: the backward begins with them, so that their memory is free again when other
blocks recompute theirs.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uvit_fast.config import Config, ModelConfig, UNetConfig
from uvit_fast.model.uvit import Block, UViT
from uvit_fast.runtime.errors import UserError
from uvit_fast.runtime.processes import World
from uvit_fast.training.engine import batch_plan, computes_in_bf16

LADDER = (
    "block",
    "selective",
    "none",
)  # what a block keeps; ordered by computation saved per byte of the step up
Plan = list[str]  # a policy for each block, in execution order


class Cost(NamedTuple):
    """Bytes of a block: left behind by its forward, output included, and taken by its backward on top."""

    kept: int
    working: int


class Network(NamedTuple):
    """The activation memory of a network.

    Attributes:
        costs: for each block in execution order, policy -> cost.
        returned: bytes of the gradient that a block passes to the block across its long skip, and whether it does.
        rest: bytes of everything outside the blocks.
    """

    costs: list[dict[str, Cost]]
    returned: list[int]
    rest: int = 0

    def peak(self, plan: Plan) -> int:
        """Return the peak in bytes; the backward visits the blocks from the last to the first."""
        live = sum(cost[policy].kept for cost, policy in zip(self.costs, plan))
        most = 0
        for cost, policy, returned in reversed(list(zip(self.costs, plan, self.returned))):
            most = max(most, live + cost[policy].working)
            live += returned - cost[policy].kept
        return self.rest + most


def plan_within(budget: float, network: Network) -> Plan:
    """Return the plan that recomputes least within `budget` bytes.

    Raises:
        UserError: even blocks that keep only their inputs take more.
    """
    blocks = len(network.costs)
    best = [LADDER[0]] * blocks
    if network.peak(best) > budget:
        raise UserError(
            f"train.activation_memory_gb: expected at least {network.peak(best) / 1e9:.3g}, "
            f"what blocks take that keep their inputs alone, got {budget / 1e9:.3g}; "
            "a smaller train.micro_batch_size takes less"
        )
    for low, high in zip(LADDER, LADDER[1:]):
        for number in range(1, blocks + 1):
            plan = [low] * (blocks - number) + [high] * number
            if network.peak(plan) > budget:
                return best
            best = plan
    return best


def share_out(budget: float, model: nn.Module, config: Config, world: World, say: Callable[[str], None]) -> None:
    """Set what each block of `model` keeps for the backward, within `budget` bytes on each rank and the same on all
    ranks.

    Raises:
        UserError: the budget is too small for any plan.
    """
    micro_batch, _ = batch_plan(config.train, world.size)
    dtype = torch.bfloat16 if computes_in_bf16(config.train, world.device) else torch.float32

    net = config.model
    assert isinstance(net, ModelConfig) and isinstance(model, UViT), (
        "a budget is for selective checkpointing, which is U-ViT's"
    )

    def plan() -> Plan:
        network = inspect(model, net, micro_batch, world.device, dtype)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()  # of the copy that was measured
        chosen = plan_within(budget, network)
        say(describe(chosen, network, budget))
        return chosen

    for block, policy in zip(model.blocks, world.on_first(plan)):
        block.checkpointing = policy


def describe(plan: Plan, network: Network, budget: float) -> str:
    """Return a line for the user about a plan."""
    counts = Counter(plan)
    kinds = {"none": "everything", "selective": "attention's output and fc1's", "block": "their input"}
    parts = [f"{counts[policy]} keep {text}" for policy, text in kinds.items() if counts[policy]]
    sizes = f"{network.peak(plan) / 1e9:.3g} GB expected of {budget / 1e9:g} GB"
    return f"activations: of {len(plan)} blocks {', '.join(parts)}; {sizes}"


def inspect(model: UViT, config: ModelConfig, batch: int, device: torch.device | str, dtype: torch.dtype) -> Network:
    """Run a copy of the network, and of each kind of block with each policy, forward and backward, and measure their
    memory.

    Args:
        model: the network, with `blocks`; not changed.
        batch: images per forward pass.
        device, dtype: of training.
    """
    model = copy.deepcopy(model).to(device, dtype).train().requires_grad_()  # frozen weights take no more
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(_discard)
    inputs, conditions = example(config, batch, device)
    shape = (batch, model.pos_embed.shape[1], config.embed_dim)
    blocks, skipping = model.blocks, [*model.out_blocks] if config.skip != "none" else []
    first, last = cast(Block, model.in_blocks[0]), cast(Block, model.out_blocks[-1])
    kinds = {False: _block_costs(first, shape, 1), True: _block_costs(last, shape, 1 + bool(skipping))}
    deep = [block in model.out_blocks for block in blocks]
    token_bytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
    network = Network([kinds[d] for d in deep], [token_bytes * (d and bool(skipping)) for d in deep])
    for block in blocks:
        block.checkpointing = LADDER[0]
    whole = _run(lambda: model(*inputs, **conditions).float().square().mean(), torch.device(device))
    return network._replace(rest=sum(whole) - network.peak([LADDER[0]] * len(blocks)))


def example(
    config: ModelConfig | UNetConfig, batch: int, device: torch.device | str
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Return inputs of the network's shapes: (x, t) and its condition."""
    conditions = {}
    if config.num_classes:
        conditions["y"] = torch.zeros(batch, dtype=torch.long, device=device)
    if config.context_dim:
        conditions["context"] = torch.zeros(batch, config.context_tokens, config.context_dim, device=device)
    x = torch.zeros(batch, config.in_chans, config.img_size, config.img_size, device=device)
    return (x, torch.zeros(batch, device=device)), conditions


def _block_costs(block: Block, shape: tuple[int, ...], inputs: int) -> dict[str, Cost]:
    weight = next(block.parameters())
    tensors = [torch.zeros(shape, dtype=weight.dtype, device=weight.device, requires_grad=True) for _ in range(inputs)]
    gradient = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    costs = {}
    for policy in LADDER:
        block.checkpointing = policy
        for _ in range(3 if weight.device.type == "cuda" else 1):  # the first compiles, the second caches op lookups
            costs[policy] = _run(lambda: block(*tensors), weight.device, gradient)
            for tensor in tensors:
                tensor.grad = None
    return costs


def _run(forward: Callable[[], Tensor], device: torch.device, gradient: Tensor | None = None) -> Cost:
    """Return what a forward keeps and its backward takes."""
    with _Allocator(device) if device.type == "cuda" else LiveBytes() as memory:
        output = forward()
        kept = memory.now()
        output.backward(gradient)
        return Cost(kept, memory.most() - kept)


def _discard(parameter: Tensor) -> None:
    parameter.grad = None  # gradients are not activations


class _Allocator:
    """Bytes beyond those at the start, by the GPU's allocator."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, 0

    def __enter__(self) -> "_Allocator":
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device) - self.before

    def most(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.before


class LiveBytes(TorchDispatchMode):
    """Bytes of live tensors made by ops: for devices whose allocator cannot be queried."""

    def __init__(self):
        super().__init__()
        self._sizes: dict[int, int] = {}  # storage -> bytes; 0 for those that existed before
        self._storages: dict[int, weakref.ref] = {}  # of the others
        self._now = self._most = 0

    def now(self) -> int:
        return self._now

    def most(self) -> int:
        return self._most

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, counts=False)
        self._look_again()
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._note(tensor, counts=True)
        return result

    def _look_again(self) -> None:
        """Refresh the sizes: a storage may have given up its bytes and still exist, and no op reports it."""
        for key, reference in list(self._storages.items()):
            if (storage := reference()) is not None and storage.nbytes() != self._sizes[key]:
                self._now += storage.nbytes() - self._sizes[key]
                self._sizes[key] = storage.nbytes()

    def _note(self, tensor: object, counts: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        size = self._sizes[storage._cdata] = storage.nbytes() if counts else 0
        if counts:
            self._storages[storage._cdata] = weakref.ref(storage)
        self._now += size
        self._most = max(self._most, self._now)
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, storage: int) -> None:
        self._now -= self._sizes.pop(storage)
        self._storages.pop(storage, None)
