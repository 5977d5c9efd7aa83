"""GUNN once more, as literally as the paper and its authors' code describe it, to hold the package to.

Shares no code with the package: plain functions over a dictionary of tensors, whose names are those of a state_dict.
"""
from typing import Any, Dict, List

import torch
import torch.nn.functional as F

Tensors = Dict[str, torch.Tensor]


def conv_bn(t: Tensors, name: str, x: torch.Tensor, training: bool, relu: bool, stride: int = 1) -> torch.Tensor:
    weight = t[f'{name}.conv.weight']
    x = F.conv2d(x, weight, None, stride=stride, padding=weight.shape[-1] // 2)
    if training:
        t[f'{name}.bn.num_batches_tracked'] += 1
    x = F.batch_norm(
        x, t[f'{name}.bn.running_mean'], t[f'{name}.bn.running_var'], t[f'{name}.bn.weight'], t[f'{name}.bn.bias'],
        training=training, momentum=0.1, eps=1e-5)
    return F.relu(x) if relu else x


def bottleneck(t: Tensors, name: str, x: torch.Tensor, training: bool) -> torch.Tensor:
    x = conv_bn(t, f'{name}.conv1', x, training, relu=True)
    x = conv_bn(t, f'{name}.conv2', x, training, relu=True)
    return conv_bn(t, f'{name}.conv3', x, training, relu=False)


def unit(t: Tensors, name: str, x: torch.Tensor, training: bool, cifar: bool, m: int) -> torch.Tensor:
    out = bottleneck(t, f'{name}.blocks.0', x, training)
    if cifar:
        out = conv_bn(t, f'{name}.shortcut', x, training, relu=False) + out
    if m == 2:
        out = out + bottleneck(t, f'{name}.blocks.1', out, training)
    return out


def layer(
        t: Tensors, name: str, x: torch.Tensor, p: int, training: bool, cifar: bool, m: int, ordered: bool,
        residual: bool,
) -> torch.Tensor:
    n = x.shape[1] // p
    old: List[torch.Tensor] = list(torch.split(x, n, dim=1))
    new: List[torch.Tensor] = []
    for i in range(p):
        state = torch.cat(new + old[i:], dim=1) if ordered else x
        g = unit(t, f'{name}.units.{i}', state, training, cifar, m)
        new.append(old[i] + g if residual else g)
    return torch.cat(new, dim=1)


def forward(t: Tensors, x: torch.Tensor, config: Dict[str, Any], training: bool) -> torch.Tensor:
    cifar = config['layout'] == 'cifar'
    m = config.get('num_blocks', 1)
    ordered, residual = config.get('ordered', True), config.get('residual', True)
    if cifar:
        x = conv_bn(t, 'stem.conv1', x, training, relu=True)
    else:
        x = conv_bn(t, 'stem.conv1', x, training, relu=True, stride=2)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    x = conv_bn(t, 'stem.conv2', x, training, relu=True)
    for i, p in enumerate(config['segments']):
        if i > 0 and cifar:
            x = F.avg_pool2d(conv_bn(t, f'stages.{i}.downsample.conv', x, training, relu=True), 2)
        elif i > 0:
            x = conv_bn(t, f'stages.{i}.downsample.conv', F.avg_pool2d(x, 2), training, relu=True)
        x = layer(t, f'stages.{i}.layer', x, p, training, cifar, m, ordered, residual)
    if cifar:
        x = conv_bn(t, 'final_conv', x, training, relu=True)
    return F.linear(x.mean(dim=(2, 3)), t['fc.weight'], t['fc.bias'])
