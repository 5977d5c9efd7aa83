"""The order for a ResNeXt, as the experiment has it: what a block computes, and the command."""
import copy
import sys

import pytest
import torch
from conftest import ROOT, assert_same_gradients, randomize
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
