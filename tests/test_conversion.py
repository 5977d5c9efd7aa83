"""The order for a ResNeXt, as the experiment has it: what a block computes, and the command."""
import copy
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same_gradients, randomize
from PIL import Image
from timm.models.resnet import Bottleneck

sys.path.insert(0, str(ROOT / 'experiments'))
import conversion as experiment  # noqa: E402


@pytest.mark.parametrize('training', [True, False])
def test_with_one_segment_it_is_timms_own_block(training):
    torch.manual_seed(0)
    block = randomize(Bottleneck(16, 4, cardinality=4, base_width=32)).double().train(training)
    gradual = experiment.GradualBottleneck(copy.deepcopy(block), 1).train(training)
    x = torch.randn(3, 16, 5, 5).double()
    y, expected = gradual(x), block(x)
    for out in (y, expected):
        out.square().sum().backward()
    torch.testing.assert_close(y, expected)
    assert_same_gradients(gradual, block, 1e-10)  # rounding errors of float64
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
