#!/usr/bin/env python3
"""What channel ordering alone does to a ResNeXt: the same network trained as it is and with its paths in order.

    python experiments/conversion.py --data-dir DIR
    python experiments/conversion.py --data-dir DIR --seeds 0 1 2 --images 50000 --test-images 10000 --img-size 32 \
        --epochs 40

Trains a small ResNeXt on CIFAR-10 from the same weights, by the same recipe, on the same batches: as timm has it, with
its 8 paths in 2 segments, and in 8. A block of one segment is timm's own, so the first is also what the others are
without ordering. Then the first is converted, trained as it is, and trained on. Writes results.json, table.md and
curves.png to the folder given by --out. DIR has the folders train/CLASS and test/CLASS. Runs on the CPU; the defaults
are for a laptop.
"""
import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F
from curves import Curve, draw_curves, spread
from gradual_resnext import GradualBottleneck, to_gradual
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.models.resnet import Bottleneck, ResNet
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from gunn_timm.zoo.files import write_file

PATHS = 8
# By what the tables call them; None is the network as timm has it.
NETWORKS: Dict[str, Optional[int]] = {'ResNeXt': None, 'ordered, 2 segments': 2, f'ordered, {PATHS} segments': PATHS}
BATCH_SIZE = 64
RATE, TUNING_RATE = 0.1, 0.01

_Images = Tuple[torch.Tensor, torch.Tensor]


def create_network(num_segments: Optional[int] = None) -> ResNet:
    """Make a ResNeXt of 6 bottlenecks for small images, 4 of which have stride 1 and an identity shortcut.

    Args:
        num_segments: Segments in order; None for the network as timm has it.
    """
    model = ResNet(
        Bottleneck, layers=(2, 2, 2, 0), channels=(16, 32, 64, 64), cardinality=PATHS, base_width=16, num_classes=10)
    # timm's own stem would make 4 x 4 pixels of a small image before the first block.
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode='fan_out', nonlinearity='relu')
    model.maxpool = nn.Identity()
    model = model.to(memory_format=torch.channels_last)
    return model if num_segments is None else to_gradual(model, num_segments)


def read_images(data_dir: Path, split: str, count: int, size: int) -> _Images:
    """Read images, drawn at random once for all, into memory.

    Args:
        data_dir: Folder with train/CLASS and test/CLASS.
        split: 'train' or 'test'.
        count: Images.
        size: Height and width to scale them to.

    Returns:
        Normalised images (N, 3, H, W) and targets (N,).

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It has fewer images.
    """
    if not (data_dir / split).is_dir():
        raise FileNotFoundError(f"There is no '{data_dir}/{split}'.")
    dataset = create_dataset('', data_dir, split=split)
    if len(dataset) < count:
        raise ValueError(f"'{data_dir}/{split}' has {len(dataset)} images, fewer than the {count} asked for.")
    config = resolve_data_config(
        dict(img_size=size), pretrained_cfg=timm.get_pretrained_cfg('gunn15.cifar10').to_dict())
    dataset.transform = create_transform(**config)
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count]
    images, targets = zip(*DataLoader(Subset(dataset, chosen.tolist()), BATCH_SIZE))
    return torch.cat(images).contiguous(memory_format=torch.channels_last), torch.cat(targets)


@torch.inference_mode()
def test_error(model: nn.Module, test_set: _Images) -> float:
    """Return the top-1 error in %, in eval mode, in which the model is left.

    Args:
        model: Classifier.
        test_set: Images (N, 3, H, W) and targets (N,).
    """
    model.eval()
    wrong = sum((model(images).argmax(dim=1) != targets).sum().item()
                for images, targets in zip(*(part.split(4 * BATCH_SIZE) for part in test_set)))
    return 100 * wrong / len(test_set[0])


def train(
        model: nn.Module,
        train_set: _Images,
        test_set: _Images,
        epochs: int,
        rate: float,
        seed: int,
) -> List[Dict[str, float]]:
    """Train in place: SGD as in the paper, the rate falling to 0 by a cosine, images flipped at random.

    Args:
        model: Classifier.
        train_set: Images (N, 3, H, W) and targets (N,); the last ones that make no whole batch are left out.
        test_set: The same for the test error after each epoch.
        epochs: Epochs.
        rate: First learning rate.
        seed: What the order of the images and the flips follow from.

    Returns:
        A row an epoch: mean training loss, test error in %, processor time of the training in seconds.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = create_optimizer_v2(
        model, 'nesterov', lr=rate, momentum=0.9, weight_decay=1e-4, filter_bias_and_bn=False)
    steps = len(train_set[0]) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    curve = []
    for epoch in range(epochs):
        model.train()
        start, losses = time.process_time(), []
        order = torch.randperm(len(train_set[0]), generator=generator)[:steps * BATCH_SIZE]
        for batch in order.split(BATCH_SIZE):
            flipped = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
            images = train_set[0][batch]
            images = torch.where(flipped, images.flip(-1), images)
            loss = F.cross_entropy(model(images), train_set[1][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        seconds = time.process_time() - start
        curve.append(dict(
            epoch=epoch + 1, train_loss=statistics.mean(losses), test_error=test_error(model, test_set),
            seconds=seconds))
    return curve


def convert_trained(
        trained: nn.Module,
        train_set: _Images,
        test_set: _Images,
        seed: int,
) -> Dict[str, float]:
    """Convert a trained ResNeXt, and train it on for an epoch.

    Args:
        trained: The network, which is not changed.
        train_set: Images (N, 3, H, W) and targets (N,).
        test_set: The same for the test error.
        seed: As of `train`.

    Returns:
        Test errors in %: before, converted, with the norms' statistics taken anew from the training images, after an
        epoch of training, and after the same epoch without conversion.
    """
    errors = dict(before=test_error(trained, test_set))
    model = to_gradual(copy.deepcopy(trained))
    errors['converted'] = test_error(model, test_set)
    renewed = copy.deepcopy(model).train()
    with torch.no_grad():
        for images in train_set[0].split(BATCH_SIZE):
            renewed(images)
    errors['statistics renewed'] = test_error(renewed, test_set)
    for name, network in (('trained on', model), ('trained on, not converted', copy.deepcopy(trained))):
        errors[name] = train(network, train_set, test_set, 1, TUNING_RATE, seed)[-1]['test_error']
    return errors


def tables(results: Dict[str, Any]) -> str:
    """Write the last epoch's test errors, in %, as Markdown, and those around the conversion of a trained network.

    Args:
        results: What results.json has.
    """
    head = 'test error, mean ± standard deviation'
    lines = [
        f'| network | parameters | MACs | {head} | training loss | processor seconds an epoch |',
        '| --- | --- | --- | --- | --- | --- |']
    for network in NETWORKS:
        curves = [run['curve'] for run in results['runs'] if run['network'] == network]
        size = results['networks'][network]
        lines.append(
            f"| {network} | {size['parameters']:,} | {size['macs']:,} "
            f"| {spread([curve[-1]['test_error'] for curve in curves])} "
            f"| {spread([curve[-1]['train_loss'] for curve in curves])} "
            f"| {statistics.mean(row['seconds'] for curve in curves for row in curve):.1f} |")
    lines += ['', f'| trained ResNeXt, converted to {PATHS} segments | {head} |', '| --- | --- |']
    conversions = [run['conversion'] for run in results['runs'] if 'conversion' in run]
    for name in conversions[0]:
        lines.append(f'| {name} | {spread([errors[name] for errors in conversions])} |')
    return '\n'.join(lines)


def plot(results: Dict[str, Any], path: Path) -> None:
    """Draw the test error and the training loss against the epoch; a line a run.

    Args:
        results: What results.json has.
        path: PNG file to write.
    """
    figure = draw_curves({
        network: [
            Curve([row['epoch'] for row in run['curve']], [row['test_error'] for row in run['curve']],
                  [row['train_loss'] for row in run['curve']])
            for run in results['runs'] if run['network'] == network]
        for network in NETWORKS})
    figure.suptitle(results['what'], fontsize='small')
    figure.savefig(path, dpi=110)


def _run(network: str, seed: int, train_set: _Images, test_set: _Images, epochs: int) -> Dict[str, Any]:
    torch.manual_seed(seed)
    model = create_network(NETWORKS[network])
    print(f'training {network}, seed {seed}', file=sys.stderr)
    run = dict(network=network, seed=seed, curve=train(model, train_set, test_set, epochs, RATE, seed))
    if NETWORKS[network] is None:
        run['conversion'] = convert_trained(model, train_set, test_set, seed)
    return run


def _size(network: str, image: torch.Tensor) -> Dict[str, Any]:
    model = create_network(NETWORKS[network]).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return dict(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // 2,
        ordered=[name for name, block in model.named_modules() if isinstance(block, GradualBottleneck)])


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the experiment.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0, or 2 where the input is at fault, after one line on stderr.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data-dir', type=Path, required=True, metavar='DIR', help='CIFAR-10 as folders')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1], metavar='N', help='seeds (default: 0 1)')
    parser.add_argument('--images', type=int, default=2560, metavar='N', help='training images (default: 2560)')
    parser.add_argument('--test-images', type=int, default=2000, metavar='N', help='test images (default: 2000)')
    parser.add_argument('--img-size', type=int, default=16, metavar='N', help='size of the images (default: 16)')
    parser.add_argument('--epochs', type=int, default=5, metavar='N', help='epochs (default: 5)')
    parser.add_argument('--out', type=Path, default=Path('output/conversion'), metavar='DIR', help='folder to write to')
    args = parser.parse_args(argv)
    try:
        if args.images < BATCH_SIZE or min(args.test_images, args.img_size, args.epochs) < 1:
            raise ValueError(
                f'There must be at least {BATCH_SIZE} training images, and 1 test image, pixel and epoch; got '
                f'{args.images}, {args.test_images}, {args.img_size} and {args.epochs}.')
        train_set = read_images(args.data_dir, 'train', args.images, args.img_size)
        test_set = read_images(args.data_dir, 'test', args.test_images, args.img_size)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    # A copy of compressed images is not quite the data set that others measure on.
    kind = next((args.data_dir / 'train').glob('*/*')).suffix
    results = dict(
        what=f'{args.epochs} epochs of {args.images} images of CIFAR-10 ({kind} files) at '
             f'{args.img_size}x{args.img_size}, tested on {args.test_images}; '
             f"seeds {', '.join(map(str, args.seeds))}; last epoch",
        networks={network: _size(network, test_set[0][:1]) for network in NETWORKS},
        # All networks of a seed before the next seed, so that they share what else the machine does.
        runs=[_run(network, seed, train_set, test_set, args.epochs) for seed in args.seeds for network in NETWORKS])
    write_file(args.out / 'results.json', (json.dumps(results, indent=1) + '\n').encode())
    write_file(args.out / 'table.md', f"{results['what']}\n\n{tables(results)}\n".encode())
    plot(results, args.out / 'curves.png')
    print(tables(results))
    return 0


if __name__ == '__main__':
    sys.exit(main())
