"""The order for a ResNeXt, as the experiment has it: what a block computes, and the command."""
import copy
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_same_gradients, randomize
from PIL import Image
from timm.models.resnet import Bottleneck

sys.path.insert(0, str(ROOT / 'experiments'))
import conversion as experiment  # noqa: E402


def literal(block, x, num_segments):
    """The formula, by whole convolutions, of which each segment keeps its own channels."""
    bn, total, state = block.bn3, 0, x
    mean, var = (statistic.clone().view(-1, 1, 1) for statistic in (bn.running_mean, bn.running_var))
    weight, bias = (parameter.view(-1, 1, 1) for parameter in (bn.weight, bn.bias))
    for i in range(num_segments):
        hidden = block.act2(block.bn2(block.conv2(block.act1(block.bn1(block.conv1(state))))))
        own = torch.arange(hidden.shape[1]) * num_segments // hidden.shape[1] == i
        total, share = total + block.conv3(hidden * own.view(-1, 1, 1)), (i + 1) / num_segments
        state = x + weight * (total - share * mean) / (var + bn.eps).sqrt() + share * bias
    return F.relu(bn(total) + x)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('num_segments', [1, 2, 4])
def test_is_the_formula_and_with_one_segment_timms_own_block(num_segments, training):
    torch.manual_seed(0)
    block = randomize(Bottleneck(16, 4, cardinality=4, base_width=32)).double().train(training)
    gradual = experiment.GradualBottleneck(copy.deepcopy(block), num_segments).train(training)
    x = torch.randn(3, 16, 5, 5).double().requires_grad_()
    x_block = x.detach().clone().requires_grad_()
    y, expected = gradual(x), block(x_block) if num_segments == 1 else literal(block, x_block, num_segments)
    for out in (y, expected):
        out.square().sum().backward()
    torch.testing.assert_close((y, x.grad), (expected, x_block.grad))
    assert_same_gradients(gradual, block, 1e-10)  # rounding errors of float64
    if num_segments == 1:
        torch.testing.assert_close(gradual.state_dict(), block.state_dict())


def test_command(tmp_path, capsys):
    for i in range(80):
        path = tmp_path / ('train' if i < 70 else 'test') / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    arguments = f'--data-dir {tmp_path} --images 70 --test-images 10 --img-size 8 --epochs 1 --seeds 4 --out {tmp_path}'
    assert experiment.main(arguments.split()) == 0
    results = json.loads((tmp_path / 'results.json').read_text())
    plain, *ordered = (results['networks'][name] for name in experiment.NETWORKS)
    assert ordered == [{**plain, 'ordered': ['layer1.0', 'layer1.1', 'layer2.1', 'layer3.1']}] * 2
    # The residual branches start as nothing, so in the first step the order has nothing to act on.
    first, *others = (run['curve'][0]['train_loss'] for run in results['runs'])
    assert others == pytest.approx([first] * 2, rel=1e-6)
    assert (tmp_path / 'table.md').read_text().endswith(capsys.readouterr().out) and (tmp_path / 'curves.png').is_file()
