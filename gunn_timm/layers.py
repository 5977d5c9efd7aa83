"""The building blocks of a GUNN: the update unit of one segment, and the layer that runs the units in order.

Paper: `Gradually Updated Neural Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1711.09280
"""
import contextlib
import copy
import functools
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerType, create_act_layer, get_norm_layer
from timm.models import checkpoint, register_notrace_module
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torchvision.ops import FrozenBatchNorm2d

from . import _torch
from .gradual import gradual_update

__all__ = ['GunnConv', 'GunnBottleneck', 'UpdateUnit', 'GunnLayer', 'compile_units', 'set_backend']

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
BACKENDS = ('auto', 'plain', 'gradual')


def _as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """View a pointwise weight as (out, in), in a way that gives its gradient its strides, which DDP wants."""
    return weight.flatten(1) if weight.stride(3) == 1 else weight.permute(0, 2, 3, 1).flatten(1)


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """Compute a pointwise convolution as a matrix product; the output is in channels_last format."""
    return F.linear(x.permute(0, 2, 3, 1), _as_matrix(weight), bias).permute(0, 3, 1, 2)


def _biases(convs: List[List[nn.Conv2d]]) -> List[List[torch.Tensor]]:
    """Return all biases, zeros where only others have one (fusing skips norms with hooks), or none at all."""
    if all(conv.bias is None for read in convs for conv in read):
        return [[] for _ in convs]
    return [[c.weight.new_zeros(len(c.weight)) if c.bias is None else c.bias for c in read] for read in convs]


class GunnConv(nn.Module):
    """Convolution without bias, norm, activation, each a module of its own for tools that replace norms.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        kernel_size: Kernel size; the padding keeps the spatial size at stride 1.
        stride: Stride.
        dilation: Dilation.
        act: Whether the activation follows.
        act_layer: Activation.
        norm_layer: Normalisation.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            kernel_size: int = 1,
            stride: int = 1,
            dilation: int = 1,
            act: bool = True,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv = nn.Conv2d(
            in_chs, out_chs, kernel_size, stride=stride, padding=dilation * (kernel_size // 2), dilation=dilation,
            bias=False, **dd)
        self.bn = get_norm_layer(norm_layer)(out_chs, **dd)
        self.act = create_act_layer(act_layer, inplace=True) if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, H / stride, W / stride)."""
        if not torch.jit.is_scripting():
            return self.norm_act(self._convolve(x))
        return self.norm_act(self.conv(x))

    @torch.jit.unused
    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        if (
                _torch.is_plain_pointwise(self.conv)
                and not (_torch.is_recorded() or _torch.is_transformed() or _torch.is_watched())
                and type(x) is torch.Tensor and x.is_cpu and x.is_contiguous(memory_format=torch.channels_last)
        ):
            # oneDNN brings a convolution's weights into its own order at every call, a matrix product does not.
            return _multiply(x, self.conv.weight, self.conv.bias)
        return self.conv(x)

    def norm_act(self, x: torch.Tensor) -> torch.Tensor:
        """Apply norm and activation to the convolution's output."""
        return self.act(self.bn(x))

    def reparameterize(self) -> None:
        """Fuse the norm's running statistics into the convolution, for inference, whatever mode the module is in.

        `timm.utils.reparameterize_model` calls it. Norms that `timm.layers.freeze_batch_norm_2d` froze are fused too.
        Left as they are: norms without running statistics, and whatever has hooks, parametrizations, a class or a
        forward of its own.
        """
        conv, norm = self.conv, self.bn
        if (
                type(norm) not in BATCH_NORMS or norm.running_mean is None
                or not _torch.runs_forward_only(conv, nn.Conv2d) or not _torch.runs_forward_only(norm, type(norm))
        ):
            return
        fused = copy.deepcopy(conv)
        fused.weight, fused.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        self.conv, self.bn = fused, nn.Identity()


class GunnBottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, each with a norm, the first two with an activation (paper section 5.1).

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        expansion: K of the paper; the 3x3 convolution has K * out_chs channels.
        dilation: Dilation of the 3x3 convolution.
        act_layer: Activation.
        norm_layer: Normalisation.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            expansion: int = 2,
            dilation: int = 1,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        super().__init__()
        kwargs = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        mid_chs = expansion * out_chs
        self.conv1 = GunnConv(in_chs, mid_chs, 1, **kwargs)
        self.conv2 = GunnConv(mid_chs, mid_chs, 3, dilation=dilation, **kwargs)
        self.conv3 = GunnConv(mid_chs, out_chs, 1, act=False, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, H, W)."""
        return self.conv3(self.conv2(self.conv1(x)))


class UpdateUnit(nn.Module):
    """Compute one segment's channels from all channels of the layer (paper section 5.1).

    Args:
        in_chs: Channels of the layer, N of the paper.
        out_chs: Channels of the segment, N / P.
        expansion: K of the paper.
        num_blocks: M of the paper; blocks after the first have an identity shortcut and no activation between.
        shortcut: Add a projection (1x1 convolution, norm) of the input to the first block's output.
        dilation: Dilation of the 3x3 convolutions.
        drop_path: Probability of dropping the unit's output for a sample.
        act_layer: Activation.
        norm_layer: Normalisation.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            expansion: int = 2,
            num_blocks: int = 1,
            shortcut: bool = False,
            dilation: int = 1,
            drop_path: float = 0.,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        super().__init__()
        kwargs = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        self.blocks = nn.ModuleList([
            GunnBottleneck(in_chs if i == 0 else out_chs, out_chs, expansion, dilation, **kwargs)
            for i in range(num_blocks)
        ])
        self.shortcut = GunnConv(in_chs, out_chs, 1, act=False, **kwargs) if shortcut else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, H, W)."""
        out = self.blocks[0](x)
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return self._finish(out)

    @torch.jit.unused
    def from_reads(self, hidden: torch.Tensor, shortcut: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Compute what `forward` does from the outputs of `reading_convs`: the first block's and the shortcut's."""
        block = self.blocks[0]
        out = block.conv3(block.conv2(block.conv1.norm_act(hidden)))
        if shortcut is not None:
            out = out + self.shortcut.norm_act(shortcut)
        return self._finish(out)

    def _finish(self, out: torch.Tensor) -> torch.Tensor:
        # TorchScript takes no slice of the list.
        for i, block in enumerate(self.blocks):
            if i > 0:
                out = out + block(out)
        return self.drop_path(out)

    @torch.jit.unused
    def reading_convs(self) -> Optional[List[nn.Conv2d]]:
        """Return the pointwise convolutions that read the unit's input, or None where a call does more than these.

        Their modules and those around them must be as they were made. The rest of the unit may be anything.
        """
        # By the dictionaries of the modules: as attributes they take several times as long.
        own = self._modules
        block, shortcut = own['blocks']._modules['0'], own.get('shortcut')
        if not _torch.runs_forward_only(self, UpdateUnit) or not _torch.runs_forward_only(block, GunnBottleneck):
            return None
        convs = []
        for part in (block._modules['conv1'], shortcut) if shortcut else (block._modules['conv1'],):
            if not _torch.runs_forward_only(part, GunnConv) or not _torch.is_plain_pointwise(part._modules['conv']):
                return None
            convs.append(part._modules['conv'])
        return convs


def _keep_all_but_concatenations(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_cat = op is torch.ops.aten.cat.default
    return CheckpointPolicy.MUST_RECOMPUTE if is_cat else CheckpointPolicy.PREFER_SAVE


# What is compiled concatenates before every unit. Kept for backward, that is the P-fold memory which Algorithm 1 saves;
# the segments are kept anyway, and putting them together again is cheap.
_recompute_concatenations = functools.partial(create_selective_checkpoint_contexts, _keep_all_but_concatenations)
# Before PyTorch 2.7 exporting cannot be told from compiling, and the concatenations are kept.
_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: True)


@contextlib.contextmanager
def _buffers_kept(unit: nn.Module) -> Iterator[None]:
    """Restore BatchNorm's statistics on exit.

    Those of modules in eval mode are not written at all: graphs of other threads may check their versions.
    """
    kept = [(b, b.clone()) for m in unit.modules() if m.training for b in m.buffers(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in kept:
                buffer.copy_(values)


def _checkpoint(function: Callable[..., torch.Tensor], unit: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """Call a function of a unit's, and once more in backward, which leaves the unit's BatchNorm statistics alone."""
    return checkpoint(
        function, unit, *inputs, use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _buffers_kept(unit)))


@register_notrace_module
class GunnLayer(nn.Module):
    """A convolutional layer whose channels are updated segment by segment (paper Algorithm 1).

    The channels are cut into segments of one size. Segment i becomes `y_i = x_i + G_i([y_1 .. y_(i-1), x_i .. x_P])`.
    It runs by Algorithm 1 on one running state, or, where that cannot be (tracing, compiling, hooks, adapters), by
    concatenation before every unit, with the same result. Second derivatives need `set_backend(model, 'plain')`.

    Args:
        channels: Channels of the layer, N of the paper.
        num_segments: Segments, P of the paper; must divide `channels`.
        expansion: K of the paper.
        num_blocks: M of the paper.
        shortcut: Give each unit a projection shortcut.
        residual: Add a unit's output to its segment's old value instead of replacing it.
        ordered: With False every unit reads the layer's input: the unordered baseline, SUNN, of the paper.
        dilation: Dilation of the 3x3 convolutions.
        drop_path: Stochastic depth rate, one for all units or one a unit; none without `residual`.
        act_layer: Activation.
        norm_layer: Normalisation.

    Raises:
        ValueError: `num_segments` does not divide `channels`, either is below 1, or there are not as many rates.
    """
    ordered: torch.jit.Final[bool]
    residual: torch.jit.Final[bool]
    # Units to read for together: more make larger and fewer matrix products, and larger ones of each unit by itself.
    block_size = 4
    # `compile_units` sets a compiled one, which is for neither pickle nor TorchScript.
    from_reads = staticmethod(UpdateUnit.from_reads)
    __jit_ignored_attributes__ = ['from_reads']

    def __init__(
            self,
            channels: int,
            num_segments: int,
            expansion: int = 2,
            num_blocks: int = 1,
            shortcut: bool = False,
            residual: bool = True,
            ordered: bool = True,
            dilation: int = 1,
            drop_path: Union[float, Sequence[float]] = 0.,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if channels < 1 or num_segments < 1 or channels % num_segments:
            raise ValueError(
                f'The number of segments must be a divisor of the number of channels; got {channels} channels '
                f'and {num_segments} segments.')
        self.channels = channels
        self.num_segments = num_segments
        self.ordered = ordered
        self.residual = residual
        self.backend = 'auto'
        self.grad_checkpointing = False
        rates = [drop_path] * num_segments if isinstance(drop_path, (int, float)) else list(drop_path)
        if len(rates) != num_segments:
            raise ValueError(f'drop_path must be one rate, or one for each of {num_segments} segments; got {rates}.')
        size = channels // num_segments
        kwargs = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        # Without the residual a dropped unit would blank its channels.
        self.units = nn.ModuleList([
            UpdateUnit(channels, size, expansion, num_blocks, shortcut, dilation, rate if residual else 0., **kwargs)
            for rate in rates])

    def extra_repr(self) -> str:
        return f'{self.channels}, num_segments={self.num_segments}, residual={self.residual}, ordered={self.ordered}'

    def __getstate__(self) -> Dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != 'from_reads'}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, channels, H, W) to (N, channels, H, W); the input is not changed.

        Raises:
            RuntimeError: `set_backend` asks for Algorithm 1 in training, and it cannot run.
        """
        if torch.jit.is_scripting():
            return self._concatenate(x)
        return self._forward(x)

    @torch.jit.unused
    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        # Else each unit would keep its own low-precision copy of the whole state.
        if isinstance(x, torch.Tensor) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
            device = x.device.type
            # PyTorch 2.6 cannot compile the first question; what is compiled is on a device that has autocast.
            if (_torch.is_recorded() or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device):
                x = x.to(torch.get_autocast_dtype(device))
        reason, convs = self._choose(x)
        if not reason:
            y = self._gradual(x, convs) if self.ordered else self._unordered(x, convs)
            return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()
        if (
                self.backend == 'gradual' and self.ordered and torch.is_grad_enabled()
                and any(t.requires_grad for t in (x, *self.parameters()))
        ):
            raise RuntimeError(f"Backend 'gradual' cannot run here: {reason}. Use 'plain' or 'auto'.")
        if torch.compiler.is_compiling() and torch.is_grad_enabled() and not _is_exporting():
            if self.grad_checkpointing:
                return checkpoint(self._concatenate, x)
            return checkpoint(self._concatenate, x, use_reentrant=False, context_fn=_recompute_concatenations)
        return self._concatenate(x)

    def _choose(self, x: torch.Tensor) -> Tuple[str, List[List[nn.Conv2d]]]:
        """Return why the layer must call its units on concatenated channels, or '' and their reading convolutions."""
        if self.backend == 'plain':
            return "the backend is 'plain'", []
        if _torch.is_recorded():
            return 'the layer is being traced, exported or compiled', []
        if type(x) not in (torch.Tensor, nn.Parameter):
            return 'the input is no ordinary tensor', []
        if x.device.type == 'meta' or not x.numel():
            return 'the input has no memory', []
        if _torch.is_transformed():
            return 'torch.func or forward-mode differentiation is at work', []
        if _torch.is_watched():
            return 'hooks of all modules or a TorchFunctionMode are at work', []
        convs = []
        for index, unit in enumerate(self.units._modules.values()):
            read = unit.reading_convs() if type(unit) is UpdateUnit else None
            if not read:
                return f'unit {index} or its first convolutions have hooks, adapters or a forward of their own', []
            convs.append(read)
        return '', convs

    def _gradual(self, x: torch.Tensor, convs: List[List[nn.Conv2d]]) -> torch.Tensor:
        weights = [[_as_matrix(conv.weight) for conv in read] for read in convs]
        biases = _biases(convs)
        if torch.is_autocast_enabled(x.device.type):
            weights, biases = ([[p.to(x.dtype) for p in unit] for unit in params] for params in (weights, biases))
        return gradual_update(x, weights, biases, self._functions(), self.residual, self.block_size)

    def _unordered(self, x: torch.Tensor, convs: List[List[nn.Conv2d]]) -> torch.Tensor:
        read = [conv for unit in convs for conv in unit]
        biases = sum(_biases(convs), [])
        product = _multiply(x, torch.cat([conv.weight for conv in read]), torch.cat(biases) if biases else None)
        parts = iter(product.split([conv.out_channels for conv in read], dim=1))
        y = torch.cat([
            function(*(next(parts).clone(memory_format=torch.channels_last) for _ in unit))
            for function, unit in zip(self._functions(), convs)], dim=1)
        return y + x if self.residual else y

    def _functions(self) -> List[Callable[..., torch.Tensor]]:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return [functools.partial(_checkpoint, self.from_reads, unit) for unit in self.units]
        return [functools.partial(self.from_reads, unit) for unit in self.units]

    def _concatenate(self, x: torch.Tensor) -> torch.Tensor:
        size = self.channels // self.num_segments
        outs = [x[:, i * size:(i + 1) * size] for i in range(self.num_segments)]
        for i, unit in enumerate(self.units):
            out = unit(torch.cat(outs, dim=1) if self.ordered and i > 0 else x)
            outs[i] = outs[i] + out if self.residual else out
        return torch.cat(outs, dim=1)


def set_backend(model: nn.Module, backend: str) -> None:
    """Choose how every GunnLayer of a model runs; the result is the same each way, time and memory are not.

    Args:
        model: Module to search for layers.
        backend: 'auto' (Algorithm 1 wherever it can run), 'plain' (concatenation, which has second derivatives) or
            'gradual' (as 'auto', but training raises an error where Algorithm 1 cannot run).

    Raises:
        ValueError: `backend` is none of these.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got '{backend}'.")
    for module in model.modules():
        if isinstance(module, GunnLayer):
            module.backend = backend


def compile_units(model: nn.Module, **kwargs: Any) -> None:
    """Compile a model's update units, but for their first convolutions, in place: regional compilation.

    This takes seconds where compiling the whole takes minutes, and leaves Algorithm 1 around the units. Units of one
    shape share what is compiled. PyTorch's limit of recompilations, which counts all shapes together, is raised.

    Args:
        model: Module to search for layers.
        kwargs: Arguments of `torch.compile`; `dynamic` is False unless given.

    Raises:
        ValueError: The model has no update units.
    """
    layers = [module for module in model.modules() if isinstance(module, GunnLayer)]
    if not layers:
        raise ValueError(f'{type(model).__name__} has no update units to compile.')
    # A kind of unit may be compiled for training and inference, and for several image sizes.
    _torch.raise_recompile_limit(32 * len({repr(unit) for layer in layers for unit in layer.units}))
    compiled = torch.compile(UpdateUnit.from_reads, **{'dynamic': False, **kwargs})
    for layer in layers:
        layer.from_reads = compiled
