"""The order of GUNN for networks that exist: a ResNeXt's bottlenecks, computed path after path (paper section 5.1).

Section 5.1 asks two things of a layer that is to be updated gradually: that it can be taken apart, so that a part can
be computed by itself, and that all parts, one after another, cost no more multiplications than all at once. The grouped
convolution of a ResNeXt's bottleneck takes it apart into paths, `y = act(x + BN3(T_1(x) + ... + T_G(x)))`: each path
has its own rows of the first convolution, its own group of the second, its own columns of the third, and its own
channels of the two norms between. In order, a path reads what the paths before it have added.

Paper: `Gradually Updated Neural Networks for Large-Scale Image Recognition` - https://arxiv.org/abs/1711.09280
ResNeXt: `Aggregated Residual Transformations for Deep Neural Networks` - https://arxiv.org/abs/1611.05431
"""
from typing import Dict, List, Optional

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.func import functional_call

from .layers import BATCH_NORMS

__all__ = ['GradualBottleneck', 'conversion_report', 'to_gradual']

# Functions of one value each, so that a path's channels can be activated without the others'.
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity)


def _normalize_segment(bn: nn.Module, x: torch.Tensor, index: int, count: int) -> torch.Tensor:
    """Apply a norm to one segment's channels, with that segment's share of its parameters and statistics."""
    size = x.shape[1]
    segment = slice(index * size, (index + 1) * size)
    if not bn.training:
        # Without `functional_call`, which changes the module for a while: other threads may be using it.
        statistics = bn.running_mean[segment], bn.running_var[segment]
        return F.batch_norm(x, *statistics, bn.weight[segment], bn.bias[segment], eps=bn.eps)
    tensors = {}
    # Not as parameters and buffers: replicas of DataParallel have theirs as plain attributes.
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        tensors[name] = getattr(bn, name)[segment]
    batches = getattr(bn, 'num_batches_tracked', None)
    if batches is not None:
        # All segments together are to add one to it.
        tensors['num_batches_tracked'] = batches if index == count - 1 else batches.clone()
    return functional_call(bn, tensors, (x,))


def _objection_to_parts(block: nn.Module) -> Optional[str]:
    """Say why a bottleneck's modules cannot be applied a segment at a time; None if they can."""
    for conv in (block.conv1, block.conv2, block.conv3):
        pointwise = conv is block.conv2 or getattr(conv, 'kernel_size', None) == (1, 1) and conv.groups == 1
        if type(conv) is not nn.Conv2d or conv.bias is not None or conv.padding_mode != 'zeros' or not pointwise:
            return (
                f'{" ".join(str(conv).split())} is not a plain convolution (accepted: Conv2d without bias, padded with '
                'zeros; 1x1 and dense before and after the grouped one)')
        if conv._forward_pre_hooks:
            return 'a convolution has hooks that run before it (pruning or spectral_norm say), and it is not called'
    for bn in (block.bn1, block.bn2, block.bn3):
        if type(bn) not in BATCH_NORMS or bn.running_var is None or bn.weight is None:
            return (
                f'{type(bn).__name__} as a norm (accepted: {", ".join(norm.__name__ for norm in BATCH_NORMS)}, with '
                'weights and running statistics)')
    for act in (block.act1, block.act2):
        if type(act) not in _ACTIVATIONS:
            return f'{type(act).__name__} as an activation (accepted: {", ".join(a.__name__ for a in _ACTIVATIONS)})'
    return None


@register_notrace_module
class GradualBottleneck(nn.Module):
    """A ResNeXt bottleneck whose paths run in order (paper section 5.1), with the modules of the one it is made from.

    With the sum U_i of what the first i of P segments (paths, or groups of paths) computed, segment i + 1 reads
    `x + BN3_i(U_i)`, and the block returns `act(x + BN3(U_P))`. BN3_i is BN3 by its running statistics, with i / P of
    its mean and of its bias, so that a segment adds `weight * (its output - mean / P) / deviation + bias / P`.

    In eval mode BN3_P is BN3, and that is all. In training mode the last step normalises by the batch, as it always
    does, through BN3 itself: only what segments read of each other, which their own first norm normalises again, is
    scaled by the running statistics. They are constants there; no gradient goes through them. With one segment the
    block is the bottleneck in both modes, so the network that it was made from is the control of an experiment.

    Stochastic depth drops what the segments add to x together; what they read of each other it leaves alone. Training
    keeps what each segment read and the sum it was made from, about 2 P times C channels. The convolutions are not
    called, only their weights are used, and in eval mode so it is with the first two norms: hooks on these do not run.
    Gradient checkpointing keeps less, and as in any network with
    BatchNorm its second call updates the statistics once more; here what segments read is then scaled by those that the
    first call left. torch.compile and torch.export take the block, torch.jit.script does not.

    Args:
        block: Bottleneck that `conversion_report` has nothing against, or another of this class. Its modules are used,
            not copied.
        num_segments: Segments, of as many paths each; must divide the groups of the block's 3x3 convolution.

    Raises:
        ValueError: `num_segments` does not divide the groups.
    """

    def __init__(self, block: nn.Module, num_segments: int):
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

    def extra_repr(self) -> str:
        """Name the number of segments where the module is printed."""
        return f'num_segments={self.num_segments}'

    def zero_init_last(self) -> None:
        """Start as the identity, as timm's bottleneck does; its `init_weights` calls this."""
        nn.init.zeros_(self.bn3.weight)

    def _segment(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Map (N, C, H, W) to what one segment adds to the sum before BN3, (N, C, H, W)."""
        count = self.num_segments
        weights = []
        for conv in (self.conv1, self.conv2, self.conv3):
            dim = 1 if conv is self.conv3 else 0
            size = conv.weight.shape[dim] // count
            weights.append(conv.weight.narrow(dim, index * size, size))
        x = self.act1(_normalize_segment(self.bn1, F.conv2d(x, weights[0]), index, count))
        conv = self.conv2
        x = F.conv2d(
            x, weights[1], stride=1, padding=conv.padding, dilation=conv.dilation, groups=conv.groups // count)
        x = self.act2(_normalize_segment(self.bn2, x, index, count))
        return F.conv2d(x, weights[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to (N, C, H, W); the input is not changed.

        Raises:
            RuntimeError: A module was replaced by one that cannot be applied a segment at a time.
        """
        objection = _objection_to_parts(self)
        if objection is not None:
            raise RuntimeError(f'A GradualBottleneck applies parts of its modules, which it cannot here: {objection}.')
        bn, count = self.bn3, self.num_segments
        # Of what it was before this batch: bn changes its own at the end, which autograd would see.
        running_var = bn.running_var.clone()
        total = self._segment(x, 0)
        for i in range(1, count):
            share = i / count
            added = F.batch_norm(
                total, bn.running_mean * share, running_var, bn.weight, bn.bias * share, eps=bn.eps)
            total = total + self._segment(x + added, i)
        out = bn(total)
        if self.drop_path is not None:
            out = self.drop_path(out)
        return self.act3(out + x)


def _objection(block: nn.Module) -> Optional[str]:
    """Say why a residual block cannot be updated gradually; None if it can."""
    if type(block) is GradualBottleneck:
        return _objection_to_parts(block)
    if isinstance(block, BasicBlock):
        return 'its 3x3 convolutions are dense: each output channel reads all others (needed: a grouped bottleneck)'
    if type(block) is not Bottleneck:
        return f'{type(block).__name__} is not a Bottleneck of timm.models.resnet, and may compute something else'
    if getattr(block.conv2, 'groups', None) == 1:
        return 'its 3x3 convolution is dense (groups=1): it cannot be taken apart into paths'
    if block.stride != 1:
        return f'stride {block.stride}: what paths add has another shape than what they read'
    if block.downsample is not None:
        return 'its shortcut is a projection (downsample): what paths add is not added to what they read'
    if block.se is not None:
        return f'its attention ({type(block.se).__name__}) reads the channels of all paths'
    if type(block.aa) is not nn.Identity or type(block.drop_block) is not nn.Identity:
        return 'anti-aliasing or DropBlock stands between its convolutions (accepted: neither)'
    return _objection_to_parts(block)


def conversion_report(model: nn.Module) -> Dict[str, Optional[str]]:
    """Say of each residual block of a network whether it meets the assumptions of the paper's section 5.1.

    Args:
        model: Network; looked at are the blocks of timm.models.resnet in it.

    Returns:
        By name of the block, None if it can be updated gradually (or is already), or else why not.
    """
    return {name: _objection(block) for name, block in model.named_modules(remove_duplicate=False)
            if isinstance(block, (BasicBlock, Bottleneck, GradualBottleneck))}


def to_gradual(model: nn.Module, num_segments: Optional[int] = None) -> nn.Module:
    """Let a ResNeXt's bottlenecks run path after path, each path reading what those before it added.

    Every bottleneck of timm's ResNet that has groups, stride 1 and an identity shortcut becomes a `GradualBottleneck`;
    `conversion_report` says which these are, and what the others lack. Parameters, their names and multiplications stay
    as they are, so checkpoints of one network load into the other. What is computed does not stay: a trained network
    must be trained on. The model is changed in place; hooks on blocks that are replaced are lost, and those
    on their convolutions run no more.

    Args:
        model: ResNeXt of timm's, or a network with one inside.
        num_segments: Segments a block, of as many paths each; None for one a path. Of blocks that are gradual already
            it changes the number.

    Returns:
        The model; if it is itself a bottleneck, what takes its place.

    Raises:
        ValueError: No block can be converted, or `num_segments` does not divide the groups of one that can. The model
            is not changed then.
    """
    report = conversion_report(model)
    names = [name for name, objection in report.items() if objection is None]
    if not names:
        by_objection: Dict[str, List[str]] = {}
        for name, objection in report.items():
            by_objection.setdefault(objection, []).append(name)
        reasons = '; '.join(f"{', '.join(blocks)}: {objection}" for objection, blocks in by_objection.items())
        raise ValueError(
            f'No block of {type(model).__name__} can be updated gradually; needed are bottlenecks of '
            f'timm.models.resnet with groups, stride 1 and an identity shortcut. Found: '
            f'{reasons or "no residual block of timm.models.resnet"}.')
    blocks = {name: model.get_submodule(name) for name in names}
    # One for each, also of those that have several names.
    converted = {
        block: GradualBottleneck(block, block.conv2.groups if num_segments is None else num_segments)
        for block in blocks.values()}
    for name, block in blocks.items():
        if name == '':
            return converted[block]
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, converted[block])
    return model
