"""What is measured: our networks in their several forms, and peers from timm."""
import copy
from typing import Callable, Dict, Tuple

import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.fx.experimental.optimization import fuse

import gunn_timm  # noqa: F401
from gunn_timm.gunn import Gunn
from gunn_timm.layers import GunnConv, GunnLayer, set_backend

__all__ = ['TINY', 'create']

# Arguments that make our networks small enough to try the benchmark itself.
TINY = {
    'gunn15': dict(channels=(8, 12, 12), segments=(2, 3, 2)),
    'gunn24': dict(channels=(8, 12, 12), segments=(2, 3, 2)),
    'gunn18': dict(channels=(8, 12, 12, 16), segments=(2, 3, 2, 2)),
}


class GroupedLayer(nn.Module):
    """An unordered layer as one block of grouped convolutions, the way ResNeXt is written.

    The same mathematics, parameters and multiplications as a `GunnLayer` that is not ordered, in three convolutions
    instead of three a unit.

    Args:
        layer: Layer to take the sizes from.
    """

    def __init__(self, layer: GunnLayer):
        super().__init__()
        channels, groups = layer.channels, layer.num_segments
        hidden = layer.units[0].blocks[0].conv1.conv.out_channels * groups
        self.conv1 = GunnConv(channels, hidden, 1)
        self.conv2 = GunnConv(hidden, hidden, 3)
        self.conv3 = GunnConv(hidden, channels, 1, act=False)
        self.conv2.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups, bias=False)
        self.conv3.conv = nn.Conv2d(hidden, channels, 1, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        return x + self.conv3(self.conv2(self.conv1(x)))


def _grouped(model: Gunn) -> Gunn:
    for stage in model.stages:
        stage.layer = GroupedLayer(stage.layer)
    return model


def _plain(model: Gunn) -> Gunn:
    set_backend(model, 'plain')
    return model


def _fused(model: nn.Module) -> nn.Module:
    model = reparameterize_model(copy.deepcopy(model).eval())
    # timm's function leaves the norms of its own networks.
    return fuse(model) if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) else model


_FORMS: Dict[str, Callable[[Gunn], nn.Module]] = {'grouped': _grouped, 'plain': _plain, 'fused': _fused}


def create(name: str, tiny: bool = False) -> nn.Module:
    """Create a subject.

    Args:
        name: Model of timm's or ours, and maybe a form after a colon: 'resnet101:fused' (norms fused), for ours
            also 'gunn18:plain' (concatenation), 'sunn18:grouped' (grouped convolutions, no projection shortcut).
        tiny: Shrink our networks, and take timm's test_resnet for a peer.

    Returns:
        The network with random weights.
    """
    name, _, form = name.partition(':')
    kwargs: Dict[str, Tuple[int, ...]] = {}
    base = name.replace('sunn', 'gunn').replace('wide_', '')
    if base in TINY:
        # Without a tag the classes would depend on what weights there are.
        name += '.in1k' if base.endswith('18') else '.cifar10'
    if tiny:
        name, kwargs = (name, TINY[base]) if base in TINY else ('test_resnet', {})
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    return _FORMS[form](model) if form else model
