"""Algorithm 1 of the GUNN paper: a gradually updated layer that trains in the memory of an unordered one.

A gradually updated layer feeds every update unit the state left by the units before it. Left to autograd, each of the
P units keeps its own copy of that state for backward, P times N channels in all. The states differ from each other only
in which segments are updated already, so the layer's input and output hold all of them: `gradual_update` saves those
two and puts the states back, last segment first, while it differentiates unit after unit. No unit is computed twice,
unless that is asked for (`recompute`) to do without what the units themselves keep.

The P gradients of the state are as large as the state itself. Pointwise convolutions of the state, which is how a unit
of the paper reads it, add theirs to one buffer inside their matrix product, so none of them is ever written out.

This file knows of tensors and modules only, of neither images nor models.
"""
import contextlib
from typing import Any, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

__all__ = ['gradual_update', 'update_in_place']

_View = Tuple[torch.Size, Tuple[int, ...], int]


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if _is_channels_last(x) else torch.contiguous_format


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Turn (N, C, H, W) into (N * H * W, C), without a copy if x is in channels_last order."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class _State:
    """The running state of one layer, which its units read, and in backward the gradient of that state."""

    def __init__(self, tensor: torch.Tensor):
        self.size, self.stride = tensor.size(), tensor.stride()
        self.grad: Optional[torch.Tensor] = None
        self.set(tensor)

    def set(self, tensor: Optional[torch.Tensor]) -> None:
        self.tensor = tensor
        if tensor is not None:
            self.storage_ptr = tensor.untyped_storage().data_ptr()

    def restore(self, saved: torch.Tensor, copy: bool) -> None:
        """Take up a saved tensor, in the layout of old: hooks of the user's may have saved it in another."""
        if copy or saved.stride() != self.stride:
            dense = torch.empty_strided(self.size, self.stride, dtype=saved.dtype, device=saved.device)
            saved = dense.copy_(saved)
        self.set(saved)

    # As saved-tensor hooks these two keep a view's place in the state instead of the state.
    def pack(self, saved: torch.Tensor) -> Union[_View, torch.Tensor]:
        if saved.untyped_storage().data_ptr() == self.storage_ptr:
            return saved.size(), saved.stride(), saved.storage_offset() - self.tensor.storage_offset()
        # Kept as it is, what a function saves of its own output would keep that function alive, and so itself.
        return saved.detach()

    def unpack(self, packed: Union[_View, torch.Tensor]) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        size, stride, offset = packed
        return self.tensor.as_strided(size, stride, self.tensor.storage_offset() + offset)


class _PointwiseConv(torch.autograd.Function):
    """1x1 convolution of the state that adds the state's gradient to the layer's buffer, not to its input's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, state: _State) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.state = state
        return F.conv2d(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> Tuple[None, Optional[torch.Tensor], None]:
        weight, = ctx.saved_tensors
        x, grad_x = ctx.state.tensor, ctx.state.grad
        # Under autocast the convolution's dtype may be another than the state's.
        grad_out, matrix = grad_out.to(x.dtype), weight.flatten(1).to(x.dtype)
        # DDP wants a gradient strided like its parameter.
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if _is_channels_last(x):
            rows = as_rows(grad_out)
            if ctx.needs_input_grad[0]:
                grad_x.permute(0, 2, 3, 1).view(-1, grad_x.shape[1]).addmm_(rows, matrix)
            if grad_weight is not None:
                grad_matrix = grad_weight.view(matrix.shape)
                if weight.dtype == x.dtype:
                    torch.mm(rows.t(), as_rows(x), out=grad_matrix)
                else:
                    grad_matrix.copy_(rows.t() @ as_rows(x))
        else:
            columns = grad_out.flatten(2)
            if ctx.needs_input_grad[0]:
                grad_x.view(*grad_x.shape[:2], -1).baddbmm_(matrix.t().expand(len(x), -1, -1), columns)
            if grad_weight is not None:
                grad_matrix = torch.bmm(columns, x.flatten(2).transpose(1, 2)).sum(0)
                grad_weight.copy_(grad_matrix.view_as(weight))
        return None, grad_weight, None


class _StateView(torch.Tensor):
    """What a unit is given as its input: a tensor like any other, whose pointwise convolutions are `_PointwiseConv`."""
    leaf: torch.Tensor
    state: _State

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.conv2d and len(args) == 7 and not kwargs and set(types) == {cls} and isinstance(args[0], cls):
            x, weight, bias, stride, padding, _, groups = args
            if bias is None and stride == (1, 1) and padding == (0, 0) and groups == 1 and weight.shape[2:] == (1, 1):
                return _PointwiseConv.apply(x.leaf, weight, x.state)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _call_unit(
        unit: nn.Module,
        index: int,
        x: torch.Tensor,
        state: torch.Tensor,
        segment: torch.Tensor,
) -> torch.Tensor:
    version = None if state.is_inference() else state._version
    try:
        out = unit(x)
    except RuntimeError as e:
        if 'in-place operation' not in str(e):
            raise
        raise ValueError(f'The unit of segment {index} changed its input in place; it may only read it.') from e
    if out.shape != segment.shape:
        raise ValueError(
            f'The unit of segment {index} returned shape {tuple(out.shape)}; '
            f'the segment it updates has shape {tuple(segment.shape)}.')
    if version is not None and state._version != version:
        raise ValueError(f'The unit of segment {index} changed its input in place; it may only read it.')
    return out


def _segments(x: torch.Tensor, count: int) -> Tuple[torch.Tensor, ...]:
    if x.shape[1] % count:
        raise ValueError(f'{x.shape[1]} channels cannot be cut into {count} segments of one size.')
    return x.chunk(count, dim=1)


def _update_segment(segment: torch.Tensor, out: torch.Tensor, residual: bool) -> None:
    if residual:
        segment.add_(out)
    else:
        segment.copy_(out)


@torch.no_grad()
def update_in_place(
        x: torch.Tensor,
        units: Sequence[nn.Module],
        residual: bool = True,
        ordered: bool = True,
) -> torch.Tensor:
    """Run the units one after another on one running state, for use where no gradient is wanted.

    Args:
        x: Input of shape (N, C, H, W); it is not changed.
        units: One module a segment, each mapping (N, C, H, W) to (N, C / len(units), H, W).
        residual: Add a unit's output to its segment's old value instead of replacing it.
        ordered: Let each unit read what the units before it updated; with False all of them read x.

    Returns:
        Output of shape (N, C, H, W).

    Raises:
        ValueError: C is not a multiple of the number of units, a unit returns another shape than its segment's, or a
            unit changes its input in place.
    """
    y = x.clone(memory_format=_memory_format(x))
    state = y if ordered else x
    for index, (unit, segment) in enumerate(zip(units, _segments(y, len(units)))):
        _update_segment(segment, _call_unit(unit, index, state, state, segment), residual)
    return y


def _record_unit(
        unit: nn.Module,
        index: int,
        state: _State,
        segment: torch.Tensor,
        needs_grad: bool,
) -> Tuple[torch.Tensor, torch.Tensor, Optional[GradientEdge]]:
    """Call a unit on the state and return its output, the leaf its gradient of the state goes to, and its graph."""
    leaf = state.tensor.detach().requires_grad_(needs_grad)
    pack, unpack = state.pack, state.unpack
    is_compiled = unit._compiled_call_impl is not None
    if is_compiled:
        # Else they would be compiled too.
        pack, unpack = torch.compiler.disable(pack), torch.compiler.disable(unpack)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        seen = leaf
        # What is compiled knows no subclasses.
        if not is_compiled:
            seen = leaf.as_subclass(_StateView)
            seen.leaf, seen.state = leaf, state
        out = _call_unit(unit, index, seen, state.tensor, segment)
        # A view's edge keeps the graph alive even where the output comes from an autograd.Function; in PyTorch 2.6 the
        # output's own does not.
        edge = get_gradient_edge(out.view_as(out)) if out.requires_grad else None
    # The edge stands for the output, whose values are not needed any more: they go into the state.
    return out.detach(), leaf, edge


class _Surroundings:
    """What a call of a unit depends on beside its input: random numbers, autocast, parameters, mode."""

    def __init__(self, x: torch.Tensor, unit: nn.Module, params: Sequence[torch.Tensor]):
        self.unit, self.params, self.training = unit, params, [m.training for m in unit.modules()]
        self.device = x.device
        self.autocast = (torch.get_autocast_dtype(x.device.type), torch.is_autocast_enabled(x.device.type))
        self.cpu_rng = torch.get_rng_state()
        self.device_rng = None
        if self.device.type != 'cpu':
            self.device_rng = torch.get_device_module(self.device).get_rng_state(self.device)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        modes = [m.training for m in self.unit.modules()]
        if modes != self.training or any(p is not q for p, q in zip(self.unit.parameters(), self.params)):
            raise RuntimeError(
                'Gradient checkpointing calls the units again in backward; their mode and parameters must be what they '
                'were in forward.')
        dtype, enabled = self.autocast
        devices = [] if self.device_rng is None else [self.device]
        # No cache: forward filled it, without gradients, with the casts of the very parameters that now want theirs.
        with torch.random.fork_rng(devices, device_type=self.device.type if devices else 'cuda'), \
                torch.autocast(self.device.type, dtype, enabled=enabled, cache_enabled=False):
            torch.set_rng_state(self.cpu_rng)
            if devices:
                torch.get_device_module(self.device).set_rng_state(self.device_rng, self.device)
            yield


@contextlib.contextmanager
def _buffers_kept(unit: nn.Module) -> Iterator[None]:
    """Give the buffers that a call in training mode may change, BatchNorm's statistics, the values back they have now.

    Others are not written to, were it what they hold: graphs of other threads may watch them for writes.
    """
    kept = [(b, b.clone()) for m in unit.modules() if m.training for b in m.buffers(recurse=False)]
    try:
        yield
    finally:
        for buffer, values in kept:
            buffer.copy_(values)


class _GradualUpdate(torch.autograd.Function):

    @staticmethod
    def forward(
            ctx: Any,
            x: torch.Tensor,
            units: Sequence[nn.Module],
            # Kept, for in backward a module may hold others: `torch.func.functional_call` lends it some for forward.
            unit_params: Sequence[Sequence[torch.Tensor]],
            residual: bool,
            ordered: bool,
            recompute: bool,
            # Inputs of this function so that the engine, and with it DDP, sees their gradients arrive.
            *params: torch.Tensor,
    ) -> torch.Tensor:
        y = x.clone(memory_format=_memory_format(x))
        state = _State(y if ordered else x)
        needs_grad = ctx.needs_input_grad[0]
        recorded: List[Any] = []
        for index, (unit, own, segment) in enumerate(zip(units, unit_params, _segments(y, len(units)))):
            if recompute:
                recorded.append((own, needs_grad, _Surroundings(x, unit, own)))
                out = _call_unit(unit, index, state.tensor, state.tensor, segment)
            else:
                out, leaf, edge = _record_unit(unit, index, state, segment, needs_grad)
                recorded.append((own, leaf, edge))
            _update_segment(segment, out, residual)
            needs_grad = needs_grad or ordered and any(p.requires_grad for p in own)
        # The state is x and y from here on: these are watched for changes by the engine and freed by it.
        state.set(None)
        ctx.save_for_backward(x, y if ordered else None)
        ctx.state, ctx.units, ctx.residual, ctx.recompute, ctx.recorded = state, units, residual, recompute, recorded
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        x, y = ctx.saved_tensors
        ordered = y is not None
        state, count = ctx.state, len(ctx.units)
        state.restore(y if ordered else x, copy=ordered)
        # Laid out as the state is, which what adds to it relies on, not as the gradient happens to come.
        memory_format = _memory_format(state.tensor)
        grad = torch.empty_like(state.tensor, memory_format=memory_format).copy_(grad_y)
        # Unordered units all read x, so what they add must not reach the output's gradient of an earlier unit.
        out_grads = _segments(grad if ordered else grad.clone(), count)
        old, restored = _segments(x, count), _segments(state.tensor, count)
        state.grad = grad
        if not ctx.residual and not ordered:
            grad.zero_()
        retain_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        param_grads: List[Optional[torch.Tensor]] = []
        for index in reversed(range(count)):
            if ordered:
                restored[index].copy_(old[index])
            # A copy: it must outlive what is added below, and kernels would each make their own of a strided slice.
            out_grad = out_grads[index].clone(memory_format=memory_format)
            if not ctx.residual and ordered:
                out_grads[index].zero_()
            with contextlib.ExitStack() as stack:
                if ctx.recompute:
                    params, needs_grad, surroundings = ctx.recorded[index]
                    unit = ctx.units[index]
                    # A second call in training mode would count the batch twice in BatchNorm's statistics. Until the
                    # end, for the graph watches its buffers for changes.
                    stack.enter_context(_buffers_kept(unit))
                    with surroundings.restored():
                        _, leaf, edge = _record_unit(unit, index, state, restored[index], needs_grad)
                else:
                    params, leaf, edge = ctx.recorded[index]
                found = {}
                wanted = [t for t in (leaf, *params) if t.requires_grad]
                if edge is not None and wanted:
                    grads = torch.autograd.grad(edge, wanted, out_grad, retain_graph=retain_graph, allow_unused=True)
                    found = dict(zip(map(id, wanted), grads))
            if found.get(id(leaf)) is not None:
                grad.add_(found[id(leaf)])
            param_grads[:0] = [found.get(id(p)) for p in params]
        state.set(None)
        state.grad = None
        return grad if ctx.needs_input_grad[0] else None, None, None, None, None, None, *param_grads


def gradual_update(
        x: torch.Tensor,
        units: Sequence[nn.Module],
        residual: bool = True,
        ordered: bool = True,
        recompute: bool = False,
) -> torch.Tensor:
    """Run the units one after another on one running state, differentiably, keeping 2C channels beside the units' own.

    Gradients, BatchNorm statistics and outputs are those of concatenating the updated and the old segments before every
    unit (Algorithm 1 of the paper). Differentiable once; a second derivative raises PyTorch's error.

    Args:
        x: Input of shape (N, C, H, W); it is not changed.
        units: One module a segment, each mapping (N, C, H, W) to (N, C / len(units), H, W).
        residual: Add a unit's output to its segment's old value instead of replacing it.
        ordered: Let each unit read what the units before it updated; with False all of them read x.
        recompute: Keep nothing but 2C channels, and call each unit once more in backward. Random numbers are drawn, and
            BatchNorm statistics updated, as if it had been called once.

    Returns:
        Output of shape (N, C, H, W).

    Raises:
        ValueError: C is not a multiple of the number of units, a unit returns another shape than its segment's, or a
            unit changes its input in place.
    """
    unit_params = [list(unit.parameters()) for unit in units]
    params = [p for own in unit_params for p in own]
    return _GradualUpdate.apply(x, units, unit_params, residual, ordered, recompute, *params)
