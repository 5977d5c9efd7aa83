"""What a GUNN is made of, part by part: shapes, parameters, multiply-accumulates and depth.

Depth is what the paper is about: a segment reads the updated segments before it, and is therefore deeper than they are.
"""
import copy
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..gunn import Gunn, GunnStage

__all__ = ['SummaryRow', 'format_summary', 'summarize']


class SummaryRow(NamedTuple):
    """One part of a network: the image itself, the stem, a stage, or the head."""
    name: str
    segments: Optional[int]  # of a stage's layer
    output_shape: Tuple[int, ...]  # (C, H, W) for one image, or (C,) behind global pooling
    parameters: int
    macs: int  # multiply-accumulates of convolutions and matrix products for one image
    depth: Tuple[int, ...]  # layers on the longest path from the image to each segment of the output


def _count_layers(module: nn.Module) -> int:
    return sum(isinstance(part, (nn.Conv2d, nn.Linear)) for part in module.modules())


def _depths(part: nn.Module, depth: int) -> Tuple[int, ...]:
    """Return how deep each segment of a part's output lies, where its input is as deep as `depth`."""
    if not isinstance(part, GunnStage):
        return (depth + _count_layers(part),)
    depth += _count_layers(part.downsample)
    depths: List[int] = []
    for unit in part.layer.units:
        deepest_read = depths[-1] if part.layer.ordered and depths else depth
        # Not the unit's shortcut, which is one convolution beside the three of a block.
        depths.append(deepest_read + _count_layers(unit.blocks))
    return tuple(depths)


@torch.no_grad()
def summarize(model: Gunn, image_size: Optional[Sequence[int]] = None) -> List[SummaryRow]:
    """Summarise a Gunn: image, stem, stages and head (last convolution, pooling, classifier), a row each.

    Nothing is computed: shapes and multiply-accumulates are those of tensors without values.

    Args:
        model: Model, on any device, 'meta' too; it is not changed.
        image_size: Height and width of the image; None for what the model is made for.

    Raises:
        ValueError: The model is no Gunn.
        RuntimeError: The image is too small for the network's poolings.
    """
    if not isinstance(model, Gunn):
        raise ValueError(f'The model must be a Gunn, for its layers are what is looked at; got {type(model).__name__}.')
    model = copy.deepcopy(model).to('meta').eval()
    head = nn.Sequential(model.final_conv, model.global_pool, model.head_drop, model.fc)
    size = image_size or resolve_model_data_config(model)['input_size'][1:]
    x = torch.empty(1, model.in_chans, *size, device='meta', dtype=next(model.parameters()).dtype)
    rows = [SummaryRow('image', None, tuple(x.shape[1:]), 0, 0, (0,))]
    for name, part in [('stem', model.stem), *model.stages.named_children(), ('head', head)]:
        with FlopCounterMode(display=False) as counter:
            x = part(x)
        is_stage = isinstance(part, GunnStage)
        rows.append(SummaryRow(
            f'stages.{name}' if is_stage else name, part.layer.num_segments if is_stage else None, tuple(x.shape[1:]),
            sum(p.numel() for p in part.parameters()), counter.get_total_flops() // 2,
            _depths(part, rows[-1].depth[-1])))
    return rows


def format_summary(rows: Sequence[SummaryRow]) -> str:
    """Format what `summarize` returns as a table, with the totals below it."""
    cells = [('part', 'segments', 'output', 'parameters', 'MACs', 'depth')]
    for row in rows:
        depth = '..'.join(map(str, dict.fromkeys([row.depth[0], row.depth[-1]])))
        shape = 'x'.join(map(str, row.output_shape))
        cells.append((row.name, str(row.segments or '-'), shape, f'{row.parameters:,}', f'{row.macs:,}', depth))
    parameters, macs = sum(row.parameters for row in rows), sum(row.macs for row in rows)
    cells.append(('total', '', '', f'{parameters:,}', f'{macs:,}', str(rows[-1].depth[-1])))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ['  '.join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return '\n'.join([*lines, '', 'Depth: layers on the longest path from the image, to the first and last segment.'])
