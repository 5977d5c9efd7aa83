"""The building blocks of a GUNN: the update unit of one segment, and the layer that runs the units in order.

Paper: `Gradually Updated Neural Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1711.09280
"""
import functools
from typing import Any, List, Sequence, Union

import torch
from timm.layers import DropPath, LayerType, get_act_layer, get_norm_layer
from timm.models import checkpoint, register_notrace_module
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torchvision.ops import FrozenBatchNorm2d

from .folded import FoldedConv2d, FoldedUnit, update_folded
from .gradual import gradual_update, update_in_place

__all__ = ['ConvNormAct', 'Bottleneck', 'UpdateUnit', 'GunnLayer', 'compile_units', 'set_backend']

# Those that are one factor and one summand a channel, by their running statistics.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
BACKENDS = ('auto', 'plain', 'in_place', 'gradual')


class ConvNormAct(nn.Module):
    """Convolution without bias, norm, activation.

    The norm is a module of its own, not timm's fused BatchNormAct2d, so that tools that look for BatchNorm2d and
    replace it, SyncBatchNorm conversion among them, keep the activation.

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
        self.act = get_act_layer(act_layer)(inplace=True) if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, H / stride, W / stride)."""
        return self.act(self.bn(self.conv(x)))

    def reparameterize(self) -> None:
        """Fold the norm's running statistics into the convolution, for inference, whatever mode the module is in.

        `timm.utils.reparameterize_model` calls it. Norms that `timm.layers.freeze_batch_norm_2d` froze are folded too;
        one without running statistics is left as it is, and so is one behind another kind of convolution.
        """
        if type(self.conv) is not nn.Conv2d or not isinstance(self.bn, BATCH_NORMS) or self.bn.running_mean is None:
            return
        has_relu = type(self.act) is nn.ReLU
        self.conv = FoldedConv2d(self.conv, self.bn, has_relu)
        self.bn = nn.Identity()
        if has_relu:
            self.act = nn.Identity()


class Bottleneck(nn.Module):
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
        self.conv1 = ConvNormAct(in_chs, mid_chs, 1, **kwargs)
        self.conv2 = ConvNormAct(mid_chs, mid_chs, 3, dilation=dilation, **kwargs)
        self.conv3 = ConvNormAct(mid_chs, out_chs, 1, act=False, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, H, W)."""
        return self.conv3(self.conv2(self.conv1(x)))


class UpdateUnit(nn.Module):
    """What one segment's channels are computed with, from all channels of the layer (paper section 5.1).

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
            Bottleneck(in_chs if i == 0 else out_chs, out_chs, expansion, dilation, **kwargs)
            for i in range(num_blocks)
        ])
        self.shortcut = ConvNormAct(in_chs, out_chs, 1, act=False, **kwargs) if shortcut else None
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, H, W); the input is not changed."""
        out = x
        for i, block in enumerate(self.blocks):
            if i == 0:
                out = block(x)
                if self.shortcut is not None:
                    out = out + self.shortcut(x)
            else:
                out = out + block(out)
        return self.drop_path(out)

    def fuse(self) -> nn.Module:
        """Fold the norms, and return what is to stand in the unit's place, as `timm.utils.reparameterize_model` asks.

        Returns:
            A `FoldedUnit`, or this unit where that does not do what it does: of several blocks, with hooks, or with
            another activation than ReLU.
        """
        parts = [module for module in self.modules() if isinstance(module, ConvNormAct)]
        for part in parts:
            part.reparameterize()
        convs = [part.conv for part in parts]
        if (
                len(self.blocks) > 1 or _has_forward_hooks(self)
                or not all(type(part.conv) is FoldedConv2d and type(part.act) is nn.Identity for part in parts)
                or [conv.relu for conv in convs] != [True, True, False, False][:len(convs)]
        ):
            return self
        conv1, conv2, conv3, *shortcut = convs
        unit = FoldedUnit(conv1, conv2, conv3, shortcut[0] if shortcut else None, self.drop_path)
        return unit.train(self.training)


def _keep_all_but_concatenations(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_cat = op is torch.ops.aten.cat.default
    return CheckpointPolicy.MUST_RECOMPUTE if is_cat else CheckpointPolicy.PREFER_SAVE


# What is compiled concatenates before every unit. Kept for backward, that is the P-fold memory which Algorithm 1 saves;
# the segments are kept anyway, and putting them together again is cheap.
_recompute_concatenations = functools.partial(create_selective_checkpoint_contexts, _keep_all_but_concatenations)
# Before PyTorch 2.7 there is no telling, and the concatenations are kept.
_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: True)


def _modules(root: nn.Module) -> List[nn.Module]:
    # What `root.modules()` gives, in a fifth of the time, which shows at batch 1: a layer has hundreds of them.
    found = [root]
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
    return found


def _has_forward_hooks(root: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in _modules(root))


@register_notrace_module
class GunnLayer(nn.Module):
    """A convolutional layer whose channels are updated segment by segment (paper Algorithm 1).

    The channels are cut into segments of one size. Segment i becomes `y_i = x_i + G_i([y_1 .. y_(i-1), x_i .. x_P])`.
    There are three ways to run that, all with the same result: concatenating before every unit (what tracing,
    scripting, exporting, compiling and hooks see), updating one state in place (no gradient wanted), and Algorithm 1.

    Args:
        channels: Channels of the layer, N of the paper.
        num_segments: Segments, P of the paper; must divide `channels`.
        expansion: K of the paper.
        num_blocks: M of the paper.
        shortcut: Give each unit a projection shortcut.
        residual: Add a unit's output to its segment's old value instead of replacing it.
        ordered: With False every unit reads the layer's input: the unordered baseline, SUNN, of the paper.
        dilation: Dilation of the 3x3 convolutions.
        drop_path: Stochastic depth rate, one for all units or one a unit.
        act_layer: Activation.
        norm_layer: Normalisation.

    Raises:
        ValueError: `num_segments` does not divide `channels`, either is below 1, or there are not as many rates.
    """
    ordered: torch.jit.Final[bool]
    residual: torch.jit.Final[bool]

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
        self.units = nn.ModuleList([
            UpdateUnit(
                channels,
                channels // num_segments,
                expansion,
                num_blocks,
                shortcut,
                dilation,
                # Without the residual a dropped unit would blank its channels.
                drop_path=rate if residual else 0.,
                act_layer=act_layer,
                norm_layer=norm_layer,
                device=device,
                dtype=dtype,
            )
            for rate in rates
        ])

    def extra_repr(self) -> str:
        return f'{self.channels}, num_segments={self.num_segments}, residual={self.residual}, ordered={self.ordered}'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, channels, H, W) to (N, channels, H, W); the input is not changed.

        Raises:
            RuntimeError: A backend forced by `set_backend` cannot run here.
        """
        if not torch.jit.is_scripting():
            device_type = x.device.type
            if (
                    x.dtype == torch.float32
                    # PyTorch 2.6 cannot compile that question; what is compiled is on a device that has autocast.
                    and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type))
                    and torch.is_autocast_enabled(device_type)
            ):
                # Else each unit would keep its own low-precision copy of the whole state.
                x = x.to(torch.get_autocast_dtype(device_type))
            backend = self._choose_backend(x)
            if backend == 'gradual':
                return gradual_update(x, self.units, self.residual, self.ordered, self.grad_checkpointing)
            if backend == 'in_place':
                if self._can_run_folded(x):
                    return update_folded(x, self.units, self.ordered)
                return update_in_place(x, self.units, self.residual, self.ordered)
            if torch.compiler.is_compiling() and torch.is_grad_enabled() and not _is_exporting():
                if self.grad_checkpointing:
                    return checkpoint(self._forward_plain, x)
                return checkpoint(self._forward_plain, x, use_reentrant=False, context_fn=_recompute_concatenations)
        return self._forward_plain(x)

    @torch.jit.unused
    def _can_run_folded(self, x: torch.Tensor) -> bool:
        return (
            self.residual
            and x.is_contiguous(memory_format=torch.channels_last)
            and not torch.is_autocast_enabled(x.device.type)
            and all(type(unit) is FoldedUnit and unit.can_be_added() for unit in self.units)
        )

    def _forward_plain(self, x: torch.Tensor) -> torch.Tensor:
        segments = list(x.chunk(self.num_segments, dim=1))
        outs = list(segments)
        for i, unit in enumerate(self.units):
            state = torch.cat(outs, dim=1) if self.ordered and i > 0 else x
            out = unit(state)
            outs[i] = segments[i] + out if self.residual else out
        return torch.cat(outs, dim=1)

    @torch.jit.unused
    def _choose_backend(self, x: torch.Tensor) -> str:
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            best, reason = 'plain', 'the layer is being traced, exported or compiled'
        elif x.device.type == 'meta' or not x.numel():
            best, reason = 'plain', 'the input has no memory'
        elif type(x) not in (torch.Tensor, nn.Parameter) or torch._C._are_functorch_transforms_active():
            best, reason = 'plain', 'the input is no ordinary tensor'
        elif getattr(self, '_is_replica', False):
            # Of nn.DataParallel: what it computes with are no parameters of its own.
            best, reason = 'plain', 'the layer is a replica'
        elif nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks or _has_forward_hooks(self.units):
            # The inputs that a hook may keep are the running state, which goes on changing.
            best, reason = 'plain', 'a module of a unit has hooks'
        elif torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
            best, reason = 'gradual', 'a gradient is wanted'
            # Differentiating unit by unit hands a parameter's hooks its gradient once more than the engine does.
            if any(p is not None and p._backward_hooks for m in _modules(self.units) for p in m._parameters.values()):
                best, reason = 'plain', 'a parameter has gradient hooks'
        else:
            best, reason = 'in_place', 'no gradient is wanted'
        if self.backend not in ('auto', 'plain', best):
            raise RuntimeError(f"Backend '{self.backend}' cannot run here: {reason}. Use 'plain' or 'auto'.")
        return best if self.backend == 'auto' else self.backend


def set_backend(model: nn.Module, backend: str) -> None:
    """Fix how every GunnLayer of a model runs; the result is the same each way, time and memory are not.

    Args:
        model: Module to search for layers.
        backend: 'auto' (the best that can run), 'plain', 'in_place' or 'gradual'.

    Raises:
        ValueError: `backend` is none of these.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got '{backend}'.")
    for module in model.modules():
        if isinstance(module, GunnLayer):
            module.backend = backend


def compile_units(model: nn.Module, **kwargs: Any) -> None:
    """Compile a model's update units, in place, instead of the whole: in seconds, and with Algorithm 1 around them.

    Units of one shape share what is compiled; with stochastic depth each has a rate of its own, and is compiled for
    itself. Meant for the channels_last format, to which Inductor may otherwise change the input of every unit, and keep
    that. Where the model has many shapes, PyTorch's limit of recompilations, which counts all together, is raised.

    Args:
        model: Module to search for layers.
        kwargs: Arguments of `torch.compile`.

    Raises:
        ValueError: The model has no update units.
    """
    units = [module for module in model.modules() if isinstance(module, (UpdateUnit, FoldedUnit))]
    if not units:
        raise ValueError(f'{type(model).__name__} has no update units to compile.')
    # A kind of unit may be compiled for training and inference, and for several image sizes.
    needed = 8 * len({repr(unit) for unit in units})
    config = torch._dynamo.config
    # As PyTorch 2.6 calls it.
    limit = 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit'
    for name in (limit, f'accumulated_{limit}'):
        setattr(config, name, max(getattr(config, name), needed))
    for unit in units:
        unit.compile(**kwargs)
