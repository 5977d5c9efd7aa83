"""Shapes and counts against a forward pass, receptive fields against gradients, depth against the network itself."""
import json
import sys

import pytest
import timm
import torch
from conftest import TINY, create_tiny, images
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from gunn_timm.commands.cli import main
from gunn_timm.commands.summary import format_summary, plot_depth, summarize
from gunn_timm.layers import set_backend

VARIANTS = [(name, {}) for name in TINY] + [
    ('gunn15', dict(output_stride=1)),
    ('gunn24', dict(output_stride=2)),
    ('gunn18', dict(output_stride=16)),
    ('gunn18', dict(output_stride=4)),
    ('gunn18', dict(num_blocks=2)),
    ('sunn18', dict(output_stride=8)),
]
variants = pytest.mark.parametrize('name, kwargs', VARIANTS, ids=lambda value: str(value))


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


def test_folded_network_reaches_as_far(tiny_name):
    model = create_tiny(tiny_name).eval()
    rows, folded = summarize(model), summarize(timm.utils.reparameterize_model(model))
    assert [row._replace(parameters=0) for row in folded] == [row._replace(parameters=0) for row in rows]
    assert sum(row.parameters for row in folded) < sum(row.parameters for row in rows)


@variants
def test_receptive_field_is_where_gradients_come_from(name, kwargs):
    model = create_tiny(name, **kwargs).double().eval()
    rows = summarize(model)
    # With nothing but positive numbers no two paths cancel and no ReLU cuts one off. A maximum would cut off all inputs
    # but one; the mean looks at as many.
    is_imagenet = 'pool' in dict(model.stem.named_children())
    if is_imagenet:
        pool = model.stem.pool
        model.stem.pool = nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
    # The gradients are taken segment by segment from one graph.
    set_backend(model, 'plain')
    # Wide enough for the widest, which the test sees by the columns at both ends.
    x = torch.ones(1, 3, 32, 1280 if is_imagenet else 160, dtype=torch.float64, requires_grad=True)
    for row, y in zip(rows[2:], stage_maps(model, x)):
        height, width = y.shape[2:]
        for field, segment in zip(row.receptive_field, y.chunk(row.segments, dim=1)):
            center = segment[..., height // 2, width // 2].sum()
            gradient, = torch.autograd.grad(center, x, retain_graph=True)
            columns = gradient.abs().sum((0, 1, 2)).nonzero()
            assert 0 < columns.min() and columns.max() < x.shape[3] - 1
            assert columns.max() - columns.min() + 1 == field


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
    for row, y in zip(summarize(model)[2:], maps):
        assert row.depth == tuple(int(segment.amax()) for segment in y.chunk(row.segments, dim=1))


@pytest.mark.parametrize('name, layers', [('gunn15', 15), ('gunn24', 24), ('gunn18', 18)])
def test_unordered_networks_are_as_deep_as_they_are_called(name, layers):
    assert summarize(create_tiny(name, ordered=False))[-1].depth == (layers,)


def test_table():
    # gunn15 of 2, 3 and 2 segments, three convolutions each; two before, one after each layer, and the classifier. The
    # field grows by 1 + 1 pixels of the layer's map a segment (3x3), and by one at each of two poolings (2x2).
    model = create_tiny('gunn15')
    lines = format_summary(summarize(model, 24)).splitlines()
    cells = [line.split() for line in lines]
    assert cells[0] == ['part', 'segments', 'output', 'parameters', 'MACs', 'receptive', 'field', 'depth']
    assert [row[:3] + row[5:] for row in cells[1:7]] == [
        ['image', '-', '3x24x24', '1', '0'],
        ['stem', '-', '8x24x24', '3', '2'],
        ['stages.0', '2', '8x24x24', '5..7', '5..8'],
        ['stages.1', '3', '12x12x12', '12..20', '12..18'],
        ['stages.2', '2', '12x6x6', 'image', '22..25'],
        ['head', '-', '7', 'image', '27'],
    ]
    assert cells[2][3] == f'{27 * 64 + 2 * 64 + 64 * 8 + 2 * 8:,}'
    assert cells[2][4] == f'{24 * 24 * (27 * 64 + 64 * 8):,}'
    total, _, depth = cells[7][1:]
    assert total == f'{sum(p.numel() for p in model.parameters()):,}' and depth == '27'
    assert "'image' is at most the whole image" in lines[-1]


def test_any_state_of_a_model_will_do_and_is_left_as_it_is():
    model = create_tiny('gunn18', drop_path_rate=0.5)
    expected = summarize(model.eval())
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    # Its last map has one pixel.
    assert summarize(model.train(), 32)[-1] == expected[-1]._replace(receptive_field=(295,))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    for other in (create_tiny('gunn18').half(), create_tiny('gunn18', device='meta')):
        assert summarize(other) == expected
    model.reset_classifier(0, '')
    # No pooling: the last layer's map and field.
    last, head = summarize(model, 512)[-2:]
    assert head.output_shape == last.output_shape == (16, 16, 16)
    assert head.receptive_field == (295,) and head.depth == last.depth[-1:]


def test_the_image_is_the_one_the_model_is_made_for():
    model = create_tiny('gunn15')
    assert summarize(model)[0].output_shape == (3, 32, 32)
    assert summarize(model, 20)[0].output_shape == (3, 20, 20)


def test_refusals():
    with pytest.raises(ValueError, match='must be a Gunn.*got ResNet'):
        summarize(timm.create_model('resnet18', device='meta'))
    model = create_tiny('gunn18')
    for size in (0, (32,), (32, 32, 32), (32, -1)):
        with pytest.raises(ValueError, match='height and width, or one number for both, at least 1; got'):
            summarize(model, size)
    with pytest.raises(RuntimeError, match='Output size is too small'):
        summarize(model, 8)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kw: (saved.append(self), savefig(self, *args, **kw)))
    return saved


def curves(figure):
    """For each axes and label of a figure: its steps, and their edges."""
    return [
        {patch.get_label(): (patch.get_data().values.tolist(), patch.get_data().edges.tolist()) for patch in a.patches}
        for a in figure.axes]


def test_plot(figures, tmp_path):
    models = dict(gunn=create_tiny('gunn18', device='meta'), sunn=create_tiny('sunn18', device='meta'))
    plot_depth(models, tmp_path / 'depth.png')
    with Image.open(tmp_path / 'depth.png') as image:
        assert image.format == 'PNG'
        image.load()
    drawn = curves(figures[0])
    stages = {label: summarize(model)[2:-1] for label, model in models.items()}
    edges = [[0, 4, 8], [0, 4, 8, 12], [0, 6, 12], [0, 8, 16]]
    assert drawn == [
        {label: (list(rows[i].depth), edges[i]) for label, rows in stages.items()} for i in range(len(edges))]
    assert all(patch.get_path().vertices.size for axes in figures[0].axes for patch in axes.patches)
    assert [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()] == ['gunn', 'sunn']
    assert list(tmp_path.iterdir()) == [tmp_path / 'depth.png']


def test_plot_refusals(monkeypatch, tmp_path):
    models = {'gunn': create_tiny('gunn15', device='meta')}
    (tmp_path / 'depth.foo').write_text('old')
    with pytest.raises(ValueError, match="Format 'foo' is not supported"):
        plot_depth(models, tmp_path / 'depth.foo')
    assert [path.read_text() for path in tmp_path.iterdir()] == ['old']
    with pytest.raises(ValueError, match='must be a Gunn.*got Linear'):
        plot_depth({'linear': nn.Linear(1, 1)}, tmp_path / 'depth.png')
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(RuntimeError, match='pip install matplotlib'):
        plot_depth(models, tmp_path / 'depth.png')


@pytest.fixture
def tiny_folder(tmp_path):
    """What 'local-dir:' takes: a tiny network of which there is only the description."""
    pretrained_cfg = dict(input_size=[3, 32, 32])
    config = dict(architecture='gunn15', num_classes=7, model_args=TINY['gunn15'], pretrained_cfg=pretrained_cfg)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    return tmp_path


def test_command_line(tiny_folder, figures, capsys):
    name, plot = f'local-dir:{tiny_folder}', tiny_folder / 'depth.svg'
    assert main(['summary', name, '--image-size', '20', '--plot', str(plot)]) == 0
    model = create_tiny('gunn15')
    assert capsys.readouterr().out == format_summary(summarize(model, 20)) + '\n'
    assert plot.read_text().startswith('<?xml')
    for axes, row in zip(curves(figures[0]), summarize(model)[2:]):
        assert axes['in order'][0] == list(row.depth)
        assert set(axes['all at once'][0]) == {min(axes['all at once'][0])}
    assert main(['summary', name, '--image-size', '20', '28']) == 0
    assert '3x20x28' in capsys.readouterr().out


@pytest.mark.parametrize('argv, message', [
    (['gunn51'], "No model 'gunn51'; nearest: gunn"),
    (['resnet18'], 'must be a Gunn'),
    (['gunn15', '--image-size', '1', '2', '3'], 'one number for both, at least 1; got [1, 2, 3].'),
])
def test_command_line_refuses_in_one_line(argv, message, capsys):
    assert main(['summary', *argv]) == 2
    out, err = capsys.readouterr()
    assert out == '' and message in err
    assert err.startswith('error: ') and err.count('\n') == 1
