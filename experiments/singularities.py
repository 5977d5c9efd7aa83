#!/usr/bin/env python3
"""Section 4 of the paper: overlap singularities, and what channel ordering does to them.

    python experiments/singularities.py --data-dir DIR
    python experiments/singularities.py --data-dir DIR --checkpoints gunn15=FILE sunn15=FILE

Two neurons overlap when they compute the same thing and are read in the same way. Writes results.json and two plots,
parting.png and channels.png, to the folder given by --out:

    linear    two linear neurons that overlap at the start, trained by gradient descent
    segments  two segments of a real layer that do, trained on images of CIFAR-10
    channels  two channels of one segment that do, likewise
    trained   how much alike the channels of trained networks are (only with --checkpoints)

DIR has the folders train/CLASS and test/CLASS.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import matplotlib
import timm
import torch
import torch.nn.functional as F
from conversion import read_images
from torch import nn

import gunn_timm  # noqa: F401
from gunn_timm.layers import GunnLayer
from gunn_timm.zoo.files import load_checkpoint, write_file

matplotlib.use('Agg')
from matplotlib import pyplot  # noqa: E402

# Without and with channel ordering, each without and with residual learning.
NETWORKS = {
    'unordered, no residual': dict(ordered=False, residual=False),
    'unordered': dict(ordered=False, residual=True),
    'ordered, no residual': dict(ordered=True, residual=False),
    'ordered': dict(ordered=True, residual=True),
}


def linear_layer(x: torch.Tensor, weight: torch.Tensor, ordered: bool, residual: bool) -> torch.Tensor:
    """Two linear neurons, one a channel: y_i = w_i x, or x_i + w_i x; ordered, the second reads y_1 in place of x_1.

    Args:
        x: Inputs, shape (N, 2).
        weight: w_1 and w_2 in its rows, shape (2, 2).
        ordered: Whether the second neuron reads what the first one computed.
        residual: Whether the old value is added.

    Returns:
        y, shape (N, 2).
    """
    first = x @ weight[0] + residual * x[:, 0]
    state = torch.stack([first, x[:, 1]], dim=1) if ordered else x
    return torch.stack([first, state @ weight[1] + residual * x[:, 1]], dim=1)


def train_linear(ordered: bool, residual: bool, steps: int = 200, rate: float = 0.05) -> List[float]:
    """Train two linear neurons that overlap at the start, and a sum of them, to copy a linear function.

    Args:
        ordered: As of `linear_layer`.
        residual: As of `linear_layer`.
        steps: Steps of gradient descent on the mean squared error.
        rate: Learning rate.

    Returns:
        Before each step and at the end, the distance of w_1 from w_2.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, dtype=torch.float64, generator=generator)
    target = x @ torch.tensor([1., -0.5], dtype=torch.float64)
    weight = torch.tensor([[0.3, 0.2], [0.3, 0.2]], dtype=torch.float64, requires_grad=True)
    readout = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)
    distances = []
    for _ in range(steps):
        distances.append((weight[0] - weight[1]).norm().item())
        loss = F.mse_loss(linear_layer(x, weight, ordered, residual) @ readout, target)
        for parameter, gradient in zip((weight, readout), torch.autograd.grad(loss, (weight, readout))):
            parameter.data.sub_(gradient, alpha=rate)
    return [*distances, (weight[0] - weight[1]).norm().item()]


def _columns_alike(modules: Sequence[nn.Module], a: slice, b: slice) -> None:
    for module in modules:
        module.weight[:, b] = module.weight[:, a]


def overlap(model: nn.Module, a: slice, b: slice) -> None:
    """Make two segments of a model's first layer overlap, or two channels of one segment, in place.

    Afterwards they are computed by the same weights, and whatever reads the layer reads them by the same weights.

    Args:
        model: CIFAR network whose units have one block.
        a: Channels to copy from.
        b: Channels to copy to, as many.
    """
    layer: GunnLayer = model.stages[0].layer
    width = layer.channels // layer.num_segments
    with torch.no_grad():
        readers = [conv for unit in layer.units for conv in (unit.blocks[0].conv1.conv, unit.shortcut.conv)]
        _columns_alike([*readers, model.stages[1].downsample.conv.conv], a, b)
        first, second = layer.units[a.start // width], layer.units[b.start // width]
        if first is not second:
            second.load_state_dict(first.state_dict())
            return
        for part in (first.blocks[0].conv3, first.shortcut):
            for tensor in part.state_dict().values():
                if tensor.ndim:
                    tensor[b.start % width] = tensor[a.start % width]


def apart(model: nn.Module, images: torch.Tensor, a: slice, b: slice) -> float:
    """How far two sets of channels of the first layer are from computing the same.

    Args:
        model: Network in training mode.
        images: Shape (N, C, H, W).
        a: Channels.
        b: As many others.

    Returns:
        Norm of the difference of what the layer adds to them (of their new values, without residual learning), as a
        share of the norm of both.
    """
    layer: GunnLayer = model.stages[0].layer
    with torch.no_grad():
        x = model.stem(images)
        update = layer(x) - x if layer.residual else layer(x)
    both = update[:, a], update[:, b]
    return ((both[0] - both[1]).norm() / torch.cat(both).norm()).item()


def train_overlapping(
        batches: Sequence[Tuple[torch.Tensor, torch.Tensor]],
        what: str,
        kwargs: Dict[str, Any],
        rate: float = 0.05,
) -> List[float]:
    """Train a network of gunn15's kind of which two parts overlap at the start.

    Args:
        batches: Images (N, 3, H, W) and targets (N,) of each step.
        what: 'segments' for the first two segments of the first layer, 'channels' for the first two channels of it.
        kwargs: Arguments of the network.
        rate: Learning rate of SGD with Nesterov momentum 0.9.

    Returns:
        `apart`, on the first batch, before each step and at the end.
    """
    torch.manual_seed(0)
    # In float64, so that rounding errors are not taken for parting.
    model = timm.create_model('gunn15', num_classes=10, dtype=torch.float64, **kwargs)
    layer = model.stages[0].layer
    width = layer.channels // layer.num_segments if what == 'segments' else 1
    a, b = slice(0, width), slice(width, 2 * width)
    overlap(model, a, b)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True)
    distances = []
    for images, targets in batches:
        distances.append(apart(model, batches[0][0], a, b))
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
    return [*distances, apart(model, batches[0][0], a, b)]


def alikeness(features: torch.Tensor) -> Dict[str, float]:
    """How much alike the channels of a layer are.

    Args:
        features: Its output, shape (N, C, H, W).

    Returns:
        The mean absolute correlation of two channels, the share of pairs above 0.9, and the effective rank (the
        exponential of the entropy of the spectrum of the channels' correlations) as a share of the channels.
    """
    correlation = torch.corrcoef(features.transpose(0, 1).flatten(1).double())
    channels = len(correlation)
    pairs = correlation[torch.triu_indices(channels, channels, offset=1).unbind()].abs()
    spectrum = torch.linalg.eigvalsh(correlation).clamp(min=0)
    spectrum = spectrum / spectrum.sum()
    return dict(
        mean_correlation=pairs.mean().item(),
        above_0_9=(pairs > 0.9).double().mean().item(),
        effective_rank=torch.special.entr(spectrum).sum().exp().item() / channels)


def _alikeness_of(checkpoint: str, images: torch.Tensor) -> List[Dict[str, float]]:
    name, _, path = checkpoint.partition('=')
    if not timm.is_model(name) or not path:
        raise ValueError(f"--checkpoints takes MODEL=FILE, as in 'gunn15=model_best.pth.tar'; got '{checkpoint}'.")
    model = timm.create_model(name, num_classes=10).eval()
    load_checkpoint(model, path)
    with torch.inference_mode():
        maps = model.forward_intermediates(images.float(), intermediates_only=True)
    return [alikeness(features) for features in maps]


def plot(results: Dict[str, Any], folder: Path) -> None:
    """Draw how what overlapped at the start parts, and how much alike trained channels are.

    Args:
        results: What results.json has.
        folder: Where parting.png and, with trained networks, channels.png go.
    """
    titles = dict(linear='two linear neurons', segments='two segments of a layer', channels='two channels of a segment')
    figure, axes = pyplot.subplots(1, len(titles), figsize=(13, 4), layout='constrained')
    for axis, (part, title) in zip(axes, titles.items()):
        for network, distances in results[part].items():
            axis.plot(distances, label=network)
        axis.set(title=title, xlabel='step')
        axis.set_yscale('symlog', linthresh=1e-6)
    axes[0].set_ylabel('distance of the two')
    axes[0].legend()
    figure.suptitle(results['what'])
    figure.savefig(folder / 'parting.png', dpi=110)
    pyplot.close(figure)
    if not results['trained']:
        return
    measures = list(next(iter(results['trained'].values()))[0])
    figure, axes = pyplot.subplots(1, len(measures), figsize=(13, 4), layout='constrained')
    for axis, measure in zip(axes, measures):
        for checkpoint, stages in results['trained'].items():
            axis.plot([stage[measure] for stage in stages], 'o-', label=checkpoint.partition('=')[0])
        axis.set(title=measure.replace('_', ' '), xlabel='layer', xticks=range(len(stages)))
    axes[0].legend()
    figure.savefig(folder / 'channels.png', dpi=110)
    pyplot.close(figure)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the experiment.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0, or 2 where the input is at fault, after one line on stderr.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data-dir', type=Path, required=True, metavar='DIR', help='CIFAR-10 as folders')
    parser.add_argument('--checkpoints', nargs='+', default=[], metavar='MODEL=FILE', help='trained networks')
    parser.add_argument('--steps', type=int, default=60, metavar='N', help='steps of training (default: 60)')
    parser.add_argument('--batch-size', type=int, default=16, metavar='N', help='images a step (default: 16)')
    parser.add_argument('--img-size', type=int, default=16, metavar='N', help='size of the images (default: 16)')
    parser.add_argument('--out', type=Path, default=Path('output/singularities'), metavar='DIR')
    args = parser.parse_args(argv)
    try:
        images, targets = read_images(args.data_dir, 'train', args.steps * args.batch_size, args.img_size)
        images = images.double().contiguous()
        batches = list(zip(images.split(args.batch_size), targets.split(args.batch_size)))
        trained = {checkpoint: _alikeness_of(checkpoint, images[:8 * args.batch_size])
                   for checkpoint in args.checkpoints}
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    results = dict(
        what=f'{args.steps} steps of {args.batch_size} images of CIFAR-10 at {args.img_size}x{args.img_size}, seed 0',
        linear={name: train_linear(**kwargs) for name, kwargs in NETWORKS.items()},
        **{what: {name: train_overlapping(batches, what, kwargs) for name, kwargs in NETWORKS.items()}
           for what in ('segments', 'channels')},
        trained=trained)
    plot(results, args.out)
    write_file(args.out / 'results.json', (json.dumps(results, indent=1) + '\n').encode())
    return 0


if __name__ == '__main__':
    sys.exit(main())
