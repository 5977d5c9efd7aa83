import pytest
import torch
from torch import nn

from gunn_timm.layers import GunnLayer, UpdateUnit, set_backend


@pytest.mark.parametrize('channels, segments', [(12, 5), (12, 0), (0, 1), (12, 24)])
def test_segments_must_divide_channels(channels, segments):
    with pytest.raises(ValueError, match=f'divisor .* got {channels} channels and {segments} segments'):
        GunnLayer(channels, segments)


def test_drop_path_rates_are_one_or_one_a_segment():
    with pytest.raises(ValueError, match=r'for each of 3 segments; got \[0.1, 0.2\]'):
        GunnLayer(12, 3, drop_path=[0.1, 0.2])


def test_backend_names():
    with pytest.raises(ValueError, match="one of auto, plain, gradual; got 'fast'"):
        set_backend(GunnLayer(12, 3), 'fast')


def test_forced_backend_says_why_it_cannot_run():
    layer = GunnLayer(12, 3)
    x = torch.randn(2, 12, 4, 4)
    set_backend(layer, 'gradual')
    with pytest.raises(RuntimeError, match="'gradual' cannot run here: the layer is being traced"):
        torch.jit.trace(layer, x)
    # Evaluation and the unordered baseline run as they can.
    with torch.no_grad():
        torch.jit.trace(layer, x)
    unordered = GunnLayer(12, 3, ordered=False)
    set_backend(unordered, 'gradual')
    torch.jit.trace(unordered, x)


@pytest.mark.parametrize('shape', [(0, 12, 4, 4), (2, 12, 1, 1)])
def test_degenerate_sizes(shape):
    layer = GunnLayer(12, 3, shortcut=True).eval()
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


def test_every_module_is_called():
    layer = GunnLayer(12, 3, shortcut=True, num_blocks=2)
    called = []
    for name, module in layer.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: called.append((name, type(out))))
    layer(torch.randn(2, 12, 4, 4))
    calls = {name for name, _ in called}
    expected = {n for n, m in layer.named_modules() if not isinstance(m, nn.ModuleList)}
    assert calls == expected and len(called) == len(expected)
    assert all(kind is torch.Tensor for _, kind in called)


def test_unit_is_a_bottleneck_with_projection():
    unit = UpdateUnit(12, 4, expansion=3, num_blocks=2, shortcut=True)
    shapes = {n: tuple(m.weight.shape) for n, m in unit.named_modules() if isinstance(m, nn.Conv2d)}
    assert shapes == {
        'blocks.0.conv1.conv': (12, 12, 1, 1), 'blocks.0.conv2.conv': (12, 12, 3, 3),
        'blocks.0.conv3.conv': (4, 12, 1, 1), 'blocks.1.conv1.conv': (12, 4, 1, 1),
        'blocks.1.conv2.conv': (12, 12, 3, 3), 'blocks.1.conv3.conv': (4, 12, 1, 1),
        'shortcut.conv': (4, 12, 1, 1),
    }


def test_drop_path_without_residual_is_left_out():
    assert isinstance(GunnLayer(12, 3, drop_path=0.5, residual=False).units[0].drop_path, nn.Identity)
    assert GunnLayer(12, 3, drop_path=[0.1, 0.2, 0.3]).units[1].drop_path.drop_prob == 0.2
