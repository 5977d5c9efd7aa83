"""Shapes and counts against a forward pass, depth against what the networks are called."""
import pytest
import torch
from conftest import TINY, create_tiny, images
from torch.utils.flop_counter import FlopCounterMode

from gunn_timm.commands.cli import main
from gunn_timm.commands.summary import summarize


@pytest.mark.parametrize('name, kwargs', [
    ('gunn15', {}), ('gunn24', {}), ('gunn18', dict(output_stride=16)), ('sunn18', {})], ids=str)
@torch.no_grad()
def test_shapes_and_counts_are_those_of_a_forward_pass(name, kwargs):
    model = create_tiny(name, **kwargs).eval()
    x = images(model, batch=1, size=(64, 96))
    with FlopCounterMode(display=False) as counter:
        logits = model(x)
    rows = summarize(model, (64, 96))
    assert [row.name for row in rows] == ['image', 'stem', *(f'stages.{i}' for i in range(len(model.stages))), 'head']
    stage_maps = model.forward_intermediates(x, intermediates_only=True)[-len(model.stages):]
    maps = [x, model.stem(x), *stage_maps, logits]
    assert [row.output_shape for row in rows] == [tuple(m.shape[1:]) for m in maps]
    assert [row.segments for row in rows] == [None, None, *TINY[name]['segments'], None]
    assert [row.parameters for row in rows[2:-1]] == [sum(p.numel() for p in s.parameters()) for s in model.stages]
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert 2 * sum(row.macs for row in rows) == counter.get_total_flops()


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
