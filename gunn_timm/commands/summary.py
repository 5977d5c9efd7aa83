"""What a GUNN is made of, part by part: shapes, parameters, multiply-accumulates, receptive field and depth.

Depth is what the paper is about: a segment reads those before it, already updated, and so lies deeper than they do.
"""
import io
from pathlib import Path
from typing import List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from timm.data import resolve_model_data_config
from timm.layers import to_2tuple
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ..gunn import Gunn, GunnStage
from ..layers import GunnLayer, UpdateUnit
from ..zoo.files import write_file

__all__ = ['SummaryRow', 'format_summary', 'plot_depth', 'summarize']


class SummaryRow(NamedTuple):
    """One part of a network: the image itself, the stem, a stage, or the head.

    Attributes:
        name: 'image', 'stem', 'stages.0' and so on, 'head'.
        segments: Segments of a stage's layer; None for what is no stage.
        output_shape: Shape of the output for one image, (C, H, W), or (C,) behind global pooling.
        parameters: Number of parameters.
        macs: Multiply-accumulates of convolutions and matrix products for one image.
        receptive_field: For each segment of the output, the height and width, in pixels of the image, of what one of
            its pixels depends on, as if the image had no border; behind global pooling, the whole image at least. One
            entry for what has no segments. Norms are taken to look at no other pixel, as BatchNorm in eval mode.
        depth: For each segment of the output, the layers on the longest path from the image: convolutions and, in the
            head, the classifier. One entry for what has no segments.
    """
    name: str
    segments: Optional[int]
    output_shape: Tuple[int, ...]
    parameters: int
    macs: int
    receptive_field: Tuple[int, ...]
    depth: Tuple[int, ...]


class _Reach(NamedTuple):
    """How far back a feature map reaches; `step` is the distance of two of its pixels, in pixels of the image."""
    depth: int
    field: int
    step: int


def _joined(reaches: Sequence[_Reach]) -> _Reach:
    # Of what is added up or concatenated: all parts lie around the same point, the widest holds the others.
    return _Reach(*map(max, zip(*reaches)))


def _through(module: nn.Module, reach: _Reach) -> _Reach:
    """Follow a chain of modules: a convolution, norm and activation, a bottleneck, a stem or a transition."""
    if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
        kernel_size, stride, dilation = (
            to_2tuple(size)[0] for size in (module.kernel_size, module.stride, getattr(module, 'dilation', 1)))
        reach = reach._replace(
            field=reach.field + (kernel_size - 1) * dilation * reach.step, step=reach.step * stride)
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        reach = reach._replace(depth=reach.depth + 1)
    for child in module.children():
        reach = _through(child, reach)
    return reach


def _through_unit(unit: UpdateUnit, reach: _Reach) -> _Reach:
    first, *others = unit.blocks
    out = _through(first, reach)
    if unit.shortcut is not None:
        out = _joined([out, _through(unit.shortcut, reach)])
    for block in others:
        out = _joined([out, _through(block, out)])
    return out


def _through_layer(layer: GunnLayer, reach: _Reach) -> List[_Reach]:
    segments = [reach] * layer.num_segments
    for i, unit in enumerate(layer.units):
        out = _through_unit(unit, _joined(segments) if layer.ordered else reach)
        segments[i] = _joined([segments[i], out]) if layer.residual else out
    return segments


def _reaches(model: nn.Module) -> List[List[_Reach]]:
    """Follow the stem, each segment of each stage, and the head, in which pooling counts for nothing here."""
    if not isinstance(model, Gunn):
        raise ValueError(f'The model must be a Gunn, for its layers are what is looked at; got {type(model).__name__}.')
    reaches = [[_through(model.stem, _Reach(depth=0, field=1, step=1))]]
    for stage in model.stages:
        reaches.append(_through_layer(stage.layer, _through(stage.downsample, _joined(reaches[-1]))))
    reaches.append([_through(model.fc, _through(model.final_conv, _joined(reaches[-1])))])
    return reaches


@torch.no_grad()
def summarize(model: nn.Module, image_size: Union[int, Sequence[int], None] = None) -> List[SummaryRow]:
    """Take a Gunn apart: image, stem, stages and head (last convolution, pooling, classifier), a row each.

    Nothing is computed: shapes and multiply-accumulates are those of tensors without values, depth and receptive field
    are read off the modules.

    Args:
        model: Model, on any device, 'meta' too; it is not changed.
        image_size: Height and width of the image, or one number for both; None for what the model is made for.

    Raises:
        ValueError: The model is no Gunn, or `image_size` is not one or two positive numbers.
        RuntimeError: The image is too small for the network's poolings.
    """
    reaches = _reaches(model)
    if image_size is None:
        image_size = resolve_model_data_config(model)['input_size'][1:]
    sizes = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f'image_size must be height and width, or one number for both, at least 1; got {image_size}.')
    head = nn.Sequential(model.final_conv, model.global_pool, model.head_drop, model.fc)
    if not model.global_pool.is_identity():
        reaches[-1] = [reach._replace(field=max(reach.field, *sizes)) for reach in reaches[-1]]
    parts = {'stem': model.stem, **{f'stages.{i}': stage for i, stage in enumerate(model.stages)}, 'head': head}
    # Two images, for in training mode norms want more than one value a channel.
    x = torch.empty(2, model.in_chans, *sizes, device='meta', dtype=next(model.parameters()).dtype)
    rows = [SummaryRow('image', None, tuple(x.shape[1:]), 0, 0, (1,), (0,))]
    for (name, part), made in zip(parts.items(), reaches):
        tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
        with FlopCounterMode(display=False) as counter:
            x = functional_call(part, {key: tensor.to('meta') for key, tensor in tensors.items()}, (x,))
        rows.append(SummaryRow(
            name,
            len(made) if isinstance(part, GunnStage) else None,
            tuple(x.shape[1:]),
            sum(p.numel() for p in part.parameters()),
            counter.get_total_flops() // 2 // len(x),
            tuple(reach.field for reach in made),
            tuple(reach.depth for reach in made),
        ))
    return rows


def format_summary(rows: Sequence[SummaryRow]) -> str:
    """Format what `summarize` returns as a table, with the totals below it."""
    whole = max(rows[0].output_shape[1:])

    def text(field: int) -> str:
        return 'image' if field >= whole else str(field)

    def span(first: str, last: str) -> str:
        return first if first == last else f'{first}..{last}'

    cells = [['part', 'segments', 'output', 'parameters', 'MACs', 'receptive field', 'depth']]
    for row in rows:
        cells.append([
            row.name,
            str(row.segments or '-'),
            'x'.join(map(str, row.output_shape)),
            f'{row.parameters:,}',
            f'{row.macs:,}',
            span(text(row.receptive_field[0]), text(row.receptive_field[-1])),
            span(str(row.depth[0]), str(row.depth[-1])),
        ])
    cells.append(
        ['total', '', '', f'{sum(r.parameters for r in rows):,}', f'{sum(r.macs for r in rows):,}', '',
         str(rows[-1].depth[-1])])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    return '\n'.join([
        *lines, '',
        'Depth (layers on the longest path from the image) and receptive field (pixels across) are those of the first',
        "and the last segment; 'image' is at most the whole image.",
    ])


def plot_depth(models: Mapping[str, nn.Module], path: Union[str, Path]) -> None:
    """Draw how depth grows along the channels of each layer.

    Args:
        models: Gunns to compare, by what the legend calls them: a network in order, say, and the same with all segments
            updated at once (`ordered=False`). Without values, on device 'meta', will do.
        path: File, of a kind that matplotlib writes and its name ends with: .png, .svg, .pdf and others.

    Raises:
        ValueError: A model is no Gunn, or the file is of no such kind.
        RuntimeError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise RuntimeError(f'The plot needs matplotlib: pip install matplotlib ({e}).') from e
    stages = {label: _reaches(model)[1:-1] for label, model in models.items()}
    num_stages = max(map(len, stages.values()))
    figure = Figure(figsize=(2 + 2.5 * num_stages, 4), layout='constrained')
    all_axes = figure.subplots(1, num_stages, sharey=True, squeeze=False)[0]
    for label, model in models.items():
        for i, (axes, segments) in enumerate(zip(all_axes, stages[label])):
            channels = model.stages[i].layer.channels
            axes.stairs(
                [reach.depth for reach in segments], range(0, channels + 1, channels // len(segments)), baseline=None,
                label=label)
            axes.set(title=f'stages.{i}', xlabel='channel')
    all_axes[0].set(ylabel='depth (layers)', ylim=(0, None))
    all_axes[0].legend()
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:])
    write_file(path, content.getvalue())
