"""Shapes and counts against a forward pass, depth against the network itself."""
import pytest
import torch
from conftest import TINY, create_tiny, images
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from gunn_timm.commands.cli import main
from gunn_timm.commands.summary import summarize
from gunn_timm.layers import set_backend

variants = pytest.mark.parametrize('name, kwargs', [
    *((name, {}) for name in TINY), ('gunn18', dict(output_stride=16)), ('gunn18', dict(num_blocks=2)),
], ids=str)


def stage_maps(model, x):
    return model.forward_intermediates(x, intermediates_only=True)[-len(model.stages):]


@variants
@torch.no_grad()
def test_shapes_and_counts_are_those_of_a_forward_pass(name, kwargs):
    model = create_tiny(name, **kwargs).eval()
    x = images(model, batch=1, size=(64, 96))
    with FlopCounterMode(display=False) as counter:
        logits = model(x)
    rows = summarize(model, (64, 96))
    assert [row.name for row in rows] == ['image', 'stem', *(f'stages.{i}' for i in range(len(model.stages))), 'head']
    maps = [x, model.stem(x), *stage_maps(model, x), logits]
    assert [row.output_shape for row in rows] == [tuple(m.shape[1:]) for m in maps]
    assert [row.segments for row in rows] == [None, None, *TINY[name]['segments'], None]
    assert [row.parameters for row in rows[2:-1]] == [sum(p.numel() for p in s.parameters()) for s in model.stages]
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert 2 * sum(row.macs for row in rows) == counter.get_total_flops()


class LongestPath(TorchFunctionMode):
    """Runs a network on numbers of layers: a sum is as deep as the deeper of two, a convolution deeper by one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ == 'batch_norm':
            return args[0]
        if func.__name__ == 'add':
            return torch.maximum(*args)
        if func.__name__ == 'conv2d':
            x, weight, _, stride = args[:4]
            return 1 + x.amax(1, keepdim=True)[..., ::stride[0], ::stride[1]].expand(-1, len(weight), -1, -1)
        return func(*args, **(kwargs or {}))


@variants
@torch.no_grad()
def test_depth_is_that_of_the_longest_path(name, kwargs):
    model = create_tiny(name, **kwargs).eval()
    set_backend(model, 'plain')
    with LongestPath():
        maps = stage_maps(model, torch.zeros(1, 3, 64, 64))
    rows = summarize(model)
    for row, y in zip(rows[2:], maps):
        assert row.depth == tuple(int(segment.amax()) for segment in y.chunk(row.segments, dim=1))
    assert rows[-1].depth == (rows[-2].depth[-1] + (2 if name.endswith(('15', '24', 'nores')) else 1),)


@pytest.mark.parametrize('name, layers', [('gunn15', 15), ('gunn24', 24), ('gunn18', 18)])
def test_unordered_networks_are_as_deep_as_they_are_called(name, layers):
    assert summarize(create_tiny(name, ordered=False))[-1].depth == (layers,)


def test_table(capsys):
    # gunn15: two convolutions, 20 segments of three, one, 25 segments, one, 30 segments, one and the classifier.
    assert main(['summary', 'gunn15', '--image-size', '24', '24']) == 0
    cells = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] + row[5:] for row in cells[:7]] == [
        ['part', 'segments', 'output', 'depth'],
        ['image', '-', '3x24x24', '0'],
        ['stem', '-', '240x24x24', '2'],
        ['stages.0', '20', '240x24x24', '5..62'],
        ['stages.1', '25', '300x12x12', '66..138'],
        ['stages.2', '30', '360x6x6', '142..229'],
        ['head', '-', '10', '231'],
    ]
    assert cells[2][3:5] == [f'{27 * 64 + 128 + 64 * 240 + 480:,}', f'{24 * 24 * (27 * 64 + 64 * 240):,}']
    assert cells[7] == ['total', '1,585,746', f'{sum(int(row[4].replace(",", "")) for row in cells[1:7]):,}', '231']


def test_any_state_of_a_model_will_do_and_is_left_as_it_is():
    model = create_tiny('gunn18', drop_path_rate=0.5).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = summarize(create_tiny('gunn18', device='meta').eval())
    assert summarize(model) == expected == summarize(create_tiny('gunn18').half())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
