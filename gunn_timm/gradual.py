"""Algorithm 1 of the GUNN paper: a gradually updated layer that trains in the memory of an unordered one.

Each of the P update units reads the state left by the units before it. Autograd would keep that state P times. But the
states differ only in which segments are updated already, so the layer's input x and output y hold all of them: the last
`_Update` saves x and y, and in backward each `_Update` puts the old value of its segment back.

`_ReadOthers` and `_ReadOwn` are the pointwise convolutions of the state that a unit begins with. They save weights
only, and add the state's gradient to the layer's one buffer instead of returning it. Units are grouped in blocks: one
product for a block reads the channels that none of its units updates, and each unit adds its product of the others.

Autograd runs a node's backward after those of all nodes that use its output. So when a read's backward runs, all later
updates are undone, and the state is the one that was read. Everything else in a unit is plain autograd.
"""
from itertools import accumulate
from typing import Any, Callable, Optional, Sequence, Tuple

import torch

from ._torch import current_backward, is_batched

__all__ = ['gradual_update']


def _rows(x: torch.Tensor) -> torch.Tensor:
    """View (N, C, H, W) in channels_last format as (N * H * W, C)."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Concatenate, but return one tensor alone as it is; `torch.cat` would copy it."""
    return torch.cat(tensors, dim) if tensors[1:] else tensors[0]


class _Shared:
    """What the functions of one call of a layer share while backward runs: the state as it was, and its gradient."""
    nodes, backward = 0, None

    def register(self, ctx: Any) -> None:
        """Count a function that backward will come to."""
        ctx.shared = self
        self.nodes += any(ctx.needs_input_grad)

    def enter(self, grad: torch.Tensor, ends: Sequence[torch.Tensor] = ()) -> Tuple[torch.Tensor, ...]:
        """Return x, state, gradient, and the last two as rows; the first function, at the output, has both ends."""
        # Backward runs with gradients enabled under create_graph=True only.
        if torch.is_grad_enabled() or is_batched(grad) or not (ends or self.backward == current_backward()):
            raise RuntimeError(
                "Algorithm 1 is differentiable once, by one gradient at a time, and from a layer's output. For "
                'create_graph=True, is_grads_batched=True, or a loss that depends on nothing but tensors inside of a '
                "unit, run the layers by concatenation: gunn_timm.layers.set_backend(model, 'plain').")
        if ends:
            self.backward, self.left, (x, y) = current_backward(), self.nodes, ends
            state = y.clone(memory_format=torch.channels_last)
            # In the state's format, not in the one that the gradient comes in.
            state_grad = torch.empty_like(state).copy_(grad)
            self.tensors = x, state, state_grad, _rows(state), _rows(state_grad)
        self.left, tensors = self.left - 1, self.tensors
        if not self.left:
            del self.tensors, self.backward
        return tensors


class _Block:
    """The channels that a block of units updates, each unit's rows in their concatenated weights, and the gradient."""
    needs_weight_grad, weight_grad = False, None

    def __init__(self, first: int, last: int, channels: int, rows: Sequence[slice]):
        self.own, self.rows = slice(first, last), rows
        # A first product of no channels would fill its output with zeros.
        self.others = (slice(0, first), slice(last, channels))[::1 if first else -1]


class _ReadOthers(torch.autograd.Function):
    """Multiply the channels that the block leaves alone with its weights; outputs have shape (N * H * W, out)."""

    @staticmethod
    def forward(ctx: Any, state: torch.Tensor, shared: _Shared, block: _Block, bias: Optional[torch.Tensor],
                *weights: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        shared.register(ctx)
        ctx.save_for_backward(*weights)
        ctx.block, block.needs_weight_grad = block, any(ctx.needs_input_grad[4:])
        weight, rows = _cat(weights), _rows(state)
        first, second = ((rows[:, columns], weight[:, columns].t()) for columns in block.others)
        product = torch.mm(*first) if bias is None else torch.addmm(bias, *first)
        product.addmm_(*second)
        return tuple(product[:, columns] for columns in block.rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Tuple[Any, ...]:
        *_, rows, rows_grad = ctx.shared.enter(grads[0])
        block, weights, grad = ctx.block, ctx.saved_tensors, _cat(grads, 1)
        weight_grads: Sequence[Optional[torch.Tensor]] = [None] * len(weights)
        if ctx.needs_input_grad[0]:
            weight = _cat(weights)
            for columns in block.others:
                rows_grad[:, columns].addmm_(grad, weight[:, columns])
        if block.needs_weight_grad:
            for columns in block.others:
                torch.mm(grad.t(), rows[:, columns], out=block.weight_grad[:, columns])
            weight_grads = block.weight_grad.split([len(weight) for weight in weights])
        block.weight_grad = None
        return None, None, None, grad.sum(0) if ctx.needs_input_grad[3] else None, *weight_grads


class _ReadOwn(torch.autograd.Function):
    """Add a unit's product of the channels that the block updates, as they are now; outputs are (N, out, H, W)."""

    @staticmethod
    def forward(ctx: Any, state: torch.Tensor, shared: _Shared, block: _Block, rows: slice,
                weights: Sequence[torch.Tensor], part: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        shared.register(ctx)
        ctx.block, ctx.rows = block, rows
        ctx.save_for_backward(*weights)
        (n, _, h, w), own, like = state.shape, block.own, dict(dtype=state.dtype, device=state.device)
        product = torch.empty(n, part.shape[1], h, w, memory_format=torch.channels_last, **like)
        torch.addmm(part, _rows(state)[:, own], _cat([weight[:, own] for weight in weights]).t(), out=_rows(product))
        outs = product.split([len(weight) for weight in weights], dim=1)
        return tuple(out.clone(memory_format=torch.channels_last) for out in outs) if len(outs) > 1 else (product,)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Tuple[Any, ...]:
        *_, rows, rows_grad = ctx.shared.enter(grads[0])
        block, own = ctx.block, ctx.block.own
        # What comes behind may give its gradient another format.
        grad = _rows(_cat(grads, 1).contiguous(memory_format=torch.channels_last))
        if block.needs_weight_grad:
            if block.weight_grad is None:
                block.weight_grad = grad.new_empty(block.rows[-1].stop, rows.shape[1])
            torch.mm(grad.t(), rows[:, own], out=block.weight_grad[ctx.rows, own])
        if ctx.needs_input_grad[0]:
            rows_grad[:, own].addmm_(grad, _cat([weight[:, own] for weight in ctx.saved_tensors]))
        return None, None, None, None, None, grad


class _Update(torch.autograd.Function):
    """Add a unit's output to its segment of the state, or put it there.

    It takes what the unit read too, so that backward comes to it before the read, whatever the unit makes of that.
    """

    @staticmethod
    def forward(ctx: Any, state: torch.Tensor, out: torch.Tensor, read: torch.Tensor, shared: _Shared, segment: slice,
                residual: bool, x: Optional[torch.Tensor]) -> torch.Tensor:
        shared.register(ctx)
        ctx.segment, ctx.residual = segment, residual
        old = state[:, segment]
        if residual and old.is_cpu and old.element_size() == 2:  # adding to strided numbers is slow, copying is not
            residual, out = False, old.clone(memory_format=torch.channels_last).add_(out)
        (torch.Tensor.add_ if residual else torch.Tensor.copy_)(old, out)
        ctx.mark_dirty(state)
        if x is not None:
            ctx.save_for_backward(x, state)
        return state

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Any, ...]:
        segment, (x, state, state_grad, *_) = ctx.segment, ctx.shared.enter(grad, ctx.saved_tensors)
        state[:, segment].copy_(x[:, segment])
        out_grad = state_grad[:, segment].clone(memory_format=torch.channels_last)  # what is read of it adds to it
        if not ctx.residual:
            state_grad[:, segment].zero_()
        return state_grad, out_grad, None, None, None, None, None


def gradual_update(
        x: torch.Tensor,
        weights: Sequence[Sequence[torch.Tensor]],
        biases: Sequence[Sequence[torch.Tensor]],
        functions: Sequence[Callable[..., torch.Tensor]],
        residual: bool = True,
        block_size: int = 4,
) -> torch.Tensor:
    """Run update units one after another on one running state (Algorithm 1), keeping 2C channels for it in training.

    Args:
        x: Input of shape (N, C, H, W); it is not changed.
        weights: For each unit those of the pointwise convolutions that it begins with, of shape (out, C) and x's dtype.
        biases: For each unit theirs; all or none have one.
        functions: For each unit what maps their outputs, one argument each, to (N, C / len(functions), H, W).
        residual: Add a unit's output to its segment's old value instead of replacing it.
        block_size: Units to read for together.

    Returns:
        Output of shape (N, C, H, W), in channels_last format.
    """
    size = x.shape[1] // len(functions)
    state, shared = x.clone(memory_format=torch.channels_last), _Shared()
    for first in range(0, len(functions), block_size):
        units = range(first, min(first + block_size, len(functions)))
        weight, bias = ([tensor for index in units for tensor in tensors[index]] for tensors in (weights, biases))
        stops = list(accumulate((sum(map(len, weights[index])) for index in units), initial=0))
        block = _Block(size * first, size * units.stop, x.shape[1], [slice(*ends) for ends in zip(stops, stops[1:])])
        parts = _ReadOthers.apply(state, shared, block, torch.cat(bias) if bias else None, *weight)
        for index, rows, part in zip(units, block.rows, parts):
            reads = _ReadOwn.apply(state, shared, block, rows, weights[index], part)
            out = functions[index](*reads)
            segment, is_last = slice(size * index, size * (index + 1)), index == len(functions) - 1
            state = _Update.apply(state, out, reads[0], shared, segment, residual, x if is_last else None)
    return state
