"""What convolutions and their norms become for inference: convolutions alone, which CPUs run packed, ReLU included."""
from typing import Any, Callable, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .gradual import as_rows

__all__ = ['FoldedConv2d', 'FoldedUnit', 'update_folded']


def _can_run_packed(x: torch.Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        # Who records, counts or transforms operations knows the public ones.
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not is_in_torch_dispatch_mode()
        # Neither symbolic nor fake.
        and type(x) is torch.Tensor
        and x.is_cpu
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
        and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled('cpu')
    )


class _PackedConv:
    """A convolution and its ReLU as one operator of oneDNN, on the weight in the order in which that computes."""
    __slots__ = ('source', 'version', 'weight', 'bias', 'settings')

    def __init__(self):
        self.source: Optional[torch.Tensor] = None

    def update(self, conv: 'FoldedConv2d', x: torch.Tensor) -> bool:
        """Take up what the convolution has now, and return whether it can be run so on images like these."""
        weight = conv.weight
        # Some subclasses of tensors hold their values in other ways.
        if type(weight) is not nn.Parameter or not weight.is_cpu or weight.dtype != x.dtype:
            return False
        if conv.padding_mode != 'zeros' or isinstance(conv.padding, str):
            return False
        geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        if self.source is None or self.source.data_ptr() != weight.data_ptr() or self.version != weight._version:
            # Writes to what was made in inference mode are not counted.
            if weight.is_inference():
                return False
            if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return False
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(
                weight, *geometry, (len(x), conv.in_channels, *x.shape[2:]))
            self.version = weight._version
            # The values themselves, so that their address is not given to other ones meanwhile. Last, for other threads
            # take what they find here to be complete.
            self.source = weight.detach()
        self.bias = conv.bias
        self.settings = (*geometry, 'relu' if conv.relu else 'none', [], '')
        return True

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.settings)

    def __reduce__(self) -> Tuple[type, Tuple[()]]:
        # What is packed can be neither copied nor saved.
        return _PackedConv, ()


class FoldedConv2d(nn.Conv2d):
    """Convolution with a norm's running statistics folded into its weight and bias, maybe with ReLU behind it.

    PyTorch's convolution brings its weight into the order that oneDNN computes in at every call, which for small maps
    takes as long as computing does. On a CPU, in float32 or bfloat16 and the channels_last format, where no gradient is
    wanted, this one does so once, keeps what it gets beside the weight, and leaves ReLU to the same operator. A weight
    that has changed is packed again; like autograd, this does not see what is written through `weight.data`.

    Args:
        conv: Convolution to take up.
        norm: Norm behind it, one with `running_mean`, `running_var`, `weight`, `bias` and `eps`.
        relu: Whether ReLU follows.
    """

    # TorchScript compiles the classes of attributes, used or not.
    __jit_ignored_attributes__ = ['_packed']

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, relu: bool):
        # On the meta device, for the parameters are replaced at once.
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride, padding=conv.padding,
            dilation=conv.dilation, groups=conv.groups, padding_mode=conv.padding_mode, device='meta')
        self.weight, self.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        self.relu = relu
        self.train(conv.training)
        self._packed = _PackedConv()

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, relu={self.relu}'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        if not torch.jit.is_scripting():
            if _can_run_packed(x):
                return self._choose(x)(x)
        return self._forward_unpacked(x)

    def _forward_unpacked(self, x: torch.Tensor) -> torch.Tensor:
        out = self._conv_forward(x, self.weight, self.bias)
        return F.relu(out, inplace=True) if self.relu else out

    @torch.jit.unused
    def _choose(self, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return self._packed if self._packed.update(self, x) else self._forward_unpacked

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # What `to` and its like leave behind is of no use any more.
        self._packed = _PackedConv()
        return super()._apply(fn, recurse)


class FoldedUnit(nn.Module):
    """An update unit of one block, its norms folded and its activation ReLU.

    Args:
        conv1: Convolution of the layer's channels.
        conv2: Convolution of the block's own channels.
        conv3: Pointwise convolution to the segment's channels.
        shortcut: Convolution of the layer's channels whose output is added.
        drop_path: Module that the output goes through.
    """

    def __init__(
            self,
            conv1: FoldedConv2d,
            conv2: FoldedConv2d,
            conv3: FoldedConv2d,
            shortcut: Optional[FoldedConv2d],
            drop_path: nn.Module,
    ):
        super().__init__()
        self.conv1 = conv1
        self.conv2 = conv2
        self.conv3 = conv3
        self.shortcut = shortcut
        self.drop_path = drop_path

    def can_be_added(self) -> bool:
        """Whether `update_folded` does what calling the unit does; hooks are not looked for."""
        kinds = (FoldedConv2d, nn.Identity) if self.training else (FoldedConv2d, nn.Identity, DropPath)
        return self._compiled_call_impl is None and all(type(module) in kinds for module in self._modules.values())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, in_chs, H, W) to (N, out_chs, H, W); the input is not changed."""
        out = self.conv3(self.conv2(self.conv1(x)))
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return self.drop_path(out)


@torch.no_grad()
def update_folded(x: torch.Tensor, units: Sequence[FoldedUnit], ordered: bool = True) -> torch.Tensor:
    """Run folded units one after another on one running state, each added to it within its last matrix product.

    Args:
        x: Input of shape (N, C, H, W), in channels_last format; it is not changed.
        units: One unit a segment, each mapping (N, C, H, W) to (N, C / len(units), H, W), that `can_be_added` and has
            no hooks, for its forward is not called.
        ordered: Let each unit read what the units before it updated; with False all of them read x.

    Returns:
        Output of shape (N, C, H, W).
    """
    y = x.clone(memory_format=torch.channels_last)
    state = y if ordered else x
    runs_packed = _can_run_packed(x)
    # All before the first is run: between products the processor's caches hold products, and looking up takes longer.
    parts = []
    for unit in units:
        convs = [unit.conv1, unit.conv2] + ([] if unit.shortcut is None else [unit.shortcut])
        calls = [conv._choose(x) if runs_packed else conv._forward_unpacked for conv in convs]
        parts.append((calls, unit.conv3.weight.flatten(1).t(), unit.conv3.bias))
    for ((conv1, conv2, *shortcut), weight, bias), segment in zip(parts, as_rows(y).chunk(len(units), dim=1)):
        hidden = conv2(conv1(state))
        # Before the segment, which may be part of the state, changes.
        addend = as_rows(shortcut[0](state)).add_(bias) if shortcut else bias
        segment.addmm_(as_rows(hidden), weight).add_(addend)
    return y
