"""The order of GUNN for a ResNeXt: its bottlenecks, computed path after path (paper section 5.1).

Section 5.1 asks two things of a layer that is to be updated gradually. Its parts can be computed one by one, and all
parts together cost no more multiplications than the whole. The grouped convolution of a ResNeXt's bottleneck makes such
parts, the paths of `y = act(x + BN3(T_1(x) + ... + T_G(x)))`. Each path has its own rows of the first convolution, its
own group of the second, its own columns of the third, and its own channels of the two norms between. In order, a path
reads what the paths before it have added.

Paper: `Gradually Updated Neural Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1711.09280
ResNeXt: `Aggregated Residual Transformations for Deep Neural Networks` - https://arxiv.org/abs/1611.05431
"""
from typing import Optional

import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck
from torch import nn

__all__ = ['GradualBottleneck', 'to_gradual']


def _normalize(bn: nn.BatchNorm2d, x: torch.Tensor, channels: slice) -> torch.Tensor:
    """Apply a norm to some of its channels, and update their statistics in training mode."""
    return F.batch_norm(
        x, bn.running_mean[channels], bn.running_var[channels], bn.weight[channels], bn.bias[channels], bn.training,
        bn.momentum, bn.eps)


def _part(size: int, index: int, count: int) -> slice:
    return slice(index * size // count, (index + 1) * size // count)


class GradualBottleneck(nn.Module):
    """A ResNeXt bottleneck whose paths run in order, with the modules of the one that it is made from.

    U_i is the sum of what the first i of P segments (paths, or groups of paths) computed. Segment i + 1 reads
    `x + BN3_i(U_i)`, and the block returns `act(x + BN3(U_P))`. BN3_i is BN3 by its running statistics, with i / P of
    its mean and of its bias. So a segment adds `weight * (its output - mean / P) / deviation + bias / P`.

    In eval mode BN3_P is BN3. In training mode the last step normalises by the batch, as BN3 always does. What segments
    read of each other is scaled by the running statistics there, which are constants for the gradient. With one segment
    the block is the bottleneck in both modes. Stochastic depth drops what all segments add to x together.

    Args:
        block: Bottleneck to take the modules from.
        num_segments: Segments, of as many paths each; must divide the groups of the block's 3x3 convolution.

    Raises:
        ValueError: `num_segments` does not divide the groups.
    """

    def __init__(self, block: Bottleneck, num_segments: int):
        super().__init__()
        groups = block.conv2.groups
        if num_segments < 1 or groups % num_segments:
            raise ValueError(
                f'The number of segments must be a divisor of the number of groups; got {groups} groups and '
                f'{num_segments} segments.')
        self.num_segments = num_segments
        for name in ('conv1', 'bn1', 'act1', 'conv2', 'bn2', 'act2', 'conv3', 'bn3', 'act3', 'drop_path'):
            setattr(self, name, getattr(block, name))
        self.training = block.training

    def _segment(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Map (N, C, H, W) to what one segment adds to the sum before BN3, (N, C, H, W)."""
        count, conv = self.num_segments, self.conv2
        inner = _part(conv.in_channels, index, count)
        hidden = _part(conv.out_channels, index, count)
        x = self.act1(_normalize(self.bn1, F.conv2d(x, self.conv1.weight[inner]), inner))
        x = F.conv2d(
            x, conv.weight[hidden], padding=conv.padding, dilation=conv.dilation, groups=conv.groups // count)
        x = self.act2(_normalize(self.bn2, x, hidden))
        return F.conv2d(x, self.conv3.weight[:, hidden])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        bn, count = self.bn3, self.num_segments
        # BN3 changes its own at the end, and backward needs it as it was.
        running_var = bn.running_var.clone()
        total = self._segment(x, 0)
        for i in range(1, count):
            share = i / count
            added = F.batch_norm(total, bn.running_mean * share, running_var, bn.weight, bn.bias * share, eps=bn.eps)
            total = total + self._segment(x + added, i)
        for norm in (self.bn1, self.bn2):
            if norm.training:
                norm.num_batches_tracked += 1
        out = bn(total)
        if self.drop_path is not None:
            out = self.drop_path(out)
        return self.act3(out + x)


def _is_convertible(block: nn.Module) -> bool:
    """Say whether a block has paths that can run in order, each adding to what the next one reads."""
    return (
        type(block) is Bottleneck and block.conv2.groups > 1 and block.stride == 1 and block.downsample is None
        and block.se is None and type(block.aa) is nn.Identity and type(block.drop_block) is nn.Identity
        and all(type(bn) is nn.BatchNorm2d for bn in (block.bn1, block.bn2, block.bn3))
        and all(type(act) is nn.ReLU for act in (block.act1, block.act2)))


def to_gradual(model: nn.Module, num_segments: Optional[int] = None) -> nn.Module:
    """Replace the bottlenecks of a ResNeXt in place by gradual ones, which have the same parameters by the same names.

    The network computes something else then, so a trained one must be trained on. Blocks that change the size or the
    number of channels stay as they are.

    Args:
        model: ResNeXt of timm's.
        num_segments: Segments a block, of as many paths each; None for one a path.

    Returns:
        The model.

    Raises:
        ValueError: No block can be converted, or `num_segments` does not divide the groups of one that can. The model
            is not changed then.
    """
    blocks = [
        (parent, name, block) for parent in model.modules() for name, block in parent.named_children()
        if _is_convertible(block)]
    if not blocks:
        raise ValueError(
            f'No block of {type(model).__name__} can be updated gradually; needed are bottlenecks of '
            f'timm.models.resnet with groups, stride 1, an identity shortcut, BatchNorm2d and ReLU, and without '
            f'attention, anti-aliasing and DropBlock.')
    converted = [
        GradualBottleneck(block, block.conv2.groups if num_segments is None else num_segments)
        for _, _, block in blocks]
    for (parent, name, _), block in zip(blocks, converted):
        setattr(parent, name, block)
    return model
