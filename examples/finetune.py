#!/usr/bin/env python3
"""The pretrained gunn15 on new classes of small images, against the same network from scratch.

    python examples/finetune.py --data-dir DIR
    python examples/finetune.py --data-dir DIR --classes 20 --images 200 --epochs 8 --freeze-bn --amp --seeds 0 1 2

DIR has the folders train/CLASS and val/CLASS (or test/CLASS) of image files. Both networks see the same images equally
often; the pretrained one trains with rates that fall layer by layer towards its input. What is measured is the moving
average of the weights. --amp is for hardware with bfloat16, and faster there.
"""
import argparse
import itertools
import operator
import statistics
import sys
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.layers import freeze_batch_norm_2d
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, random_seed
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import gunn_timm  # noqa: F401

MODEL = 'gunn15.cifar10'


class FirstClasses(ImageFolder):
    """The first classes of a folder, in sorted order, and the first images of each.

    Args:
        root: Folder with a folder for each class.
        num_classes: Classes.
        num_images: Images of each class at most; None for all.
        transform: What makes a tensor of an image.

    Raises:
        FileNotFoundError: The folder has no classes, or one of them no images.
        ValueError: It has fewer classes.
    """

    def __init__(
            self,
            root: Path,
            num_classes: int,
            num_images: Optional[int] = None,
            transform: Optional[Callable] = None,
    ):
        self.num_classes = num_classes
        super().__init__(root, transform)
        by_class = itertools.groupby(self.samples, key=operator.itemgetter(1))
        self.samples = self.imgs = [sample for _, own in by_class for sample in itertools.islice(own, num_images)]
        self.targets = [target for _, target in self.samples]

    def find_classes(self, directory: str) -> Tuple[List[str], Dict[str, int]]:
        """Find the names of the classes, and their numbers; ImageFolder calls it."""
        classes, _ = super().find_classes(directory)
        if len(classes) < self.num_classes:
            raise ValueError(f"'{directory}' has {len(classes)} classes, fewer than the {self.num_classes} asked for.")
        return classes[:self.num_classes], {name: i for i, name in enumerate(classes[:self.num_classes])}


def read_folders(
        data_dir: Path,
        num_classes: int,
        num_images: int,
        train_transform: Callable,
        test_transform: Callable,
) -> Tuple[FirstClasses, FirstClasses]:
    """Return the training images and the images to measure with.

    Args:
        data_dir: Folder with train/CLASS, and val/CLASS or test/CLASS.
        num_classes: Classes, the first in sorted order.
        num_images: Training images of each class at most.
        train_transform: What makes tensors of training images.
        test_transform: What makes tensors of the others.

    Raises:
        FileNotFoundError: A folder is missing, or has no images.
        ValueError: There are fewer classes, the folders have different ones, or a number is too small.
    """
    if num_classes < 2 or num_images < 1:
        raise ValueError(f'There must be at least 2 classes of 1 image; got {num_classes} of {num_images}.')
    found = [data_dir / name for name in ('train', 'val', 'test') if (data_dir / name).is_dir()]
    if len(found) < 2 or found[0].name != 'train':
        raise FileNotFoundError(f"'{data_dir}' must have the folders train/CLASS, and val/CLASS or test/CLASS.")
    train_set = FirstClasses(found[0], num_classes, num_images, train_transform)
    test_set = FirstClasses(found[1], num_classes, transform=test_transform)
    if train_set.classes != test_set.classes:
        raise ValueError(f"The first {num_classes} classes in '{found[0]}' and '{found[1]}' are not the same.")
    return train_set, test_set


def train(
        model: nn.Module,
        loader: DataLoader,
        epochs: int,
        lr: float,
        layer_decay: Optional[float],
        amp: bool,
) -> nn.Module:
    """Train in place.

    Args:
        model: Model of timm's, with a classifier.
        loader: Batches of images (N, 3, H, W) and targets (N,).
        epochs: Epochs.
        lr: Largest learning rate, that of the classifier.
        layer_decay: Factor by which the rate falls from one layer to the one before it; None for one rate.
        amp: Autocast to bfloat16.

    Returns:
        The moving average of the model.
    """
    device = next(model.parameters()).device
    steps = epochs * len(loader)
    optimizer = create_optimizer_v2(model, 'adamw', lr=lr, weight_decay=0.05, layer_decay=layer_decay)
    # Of timm's, which scale the rates as the layers' groups say; those of torch would not.
    scheduler = CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=steps // 10, warmup_lr_init=lr / 10, t_in_epochs=False)
    # Without warmup the average of a short training would be mostly its start.
    ema = ModelEmaV3(model, decay=0.999, use_warmup=True)
    model.train()
    step = 0
    for _ in range(epochs):
        for images, target in loader:
            images = images.to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = nn.functional.cross_entropy(model(images), target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            scheduler.step_update(step)
            ema.update(model, step)
    return ema.module


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, amp: bool) -> float:
    """Return the top-1 accuracy in %.

    Args:
        model: Model with a classifier.
        loader: Batches of images (N, 3, H, W) and targets (N,).
        amp: Autocast to bfloat16.
    """
    device = next(model.parameters()).device
    model.eval()
    correct = 0
    for images, target in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(images.to(device, memory_format=torch.channels_last))
        correct += (logits.argmax(dim=1).cpu() == target).sum().item()
    return 100 * correct / len(loader.dataset)


def _train_and_evaluate(pretrained: bool, seed: int, loaders: Sequence[DataLoader], args: argparse.Namespace) -> float:
    random_seed(seed)
    model = timm.create_model(MODEL, pretrained=pretrained)
    # With as many classes as it was trained on, num_classes=N would keep the classifier of the old ones.
    model.reset_classifier(args.classes)
    model = model.to(args.device, memory_format=torch.channels_last)
    if pretrained and args.freeze_bn:
        model = freeze_batch_norm_2d(model)
    layer_decay = args.layer_decay if pretrained else None
    average = train(model, loaders[0], args.epochs, args.lr, layer_decay, args.amp)
    return evaluate(average, loaders[1], args.amp)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data-dir', type=Path, required=True, metavar='DIR', help='folder of the images')
    parser.add_argument('--classes', type=int, default=10, metavar='N', help='first N classes (default: 10)')
    parser.add_argument('--images', type=int, default=50, metavar='N',
                        help='training images of each class at most (default: 50)')
    parser.add_argument('--image-size', type=int, default=32, metavar='N', help='image size (default: 32)')
    parser.add_argument('--epochs', type=int, default=4, metavar='N', help='epochs (default: 4)')
    parser.add_argument('--batch-size', '-b', type=int, default=32, metavar='N', help='batch size (default: 32)')
    parser.add_argument('--lr', type=float, default=1e-3, metavar='X', help='learning rate (default: 1e-3)')
    parser.add_argument('--layer-decay', type=float, default=0.75, metavar='X',
                        help='factor of the rate from one layer to the one before it (default: 0.75)')
    parser.add_argument('--freeze-bn', action='store_true', help='keep the norms as they were pretrained')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], metavar='N', help='seeds (default: 0)')
    parser.add_argument('--amp', action='store_true', help='autocast to bfloat16')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the example.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0, or 2 where the input is at fault, after one line on stderr.
    """
    args = _parser().parse_args(argv)
    try:
        if min(args.epochs, args.batch_size) < 1:
            raise ValueError(f'--epochs and --batch-size must be at least 1; got {args.epochs} and {args.batch_size}.')
        config = resolve_data_config(
            dict(img_size=args.image_size), pretrained_cfg=timm.get_pretrained_cfg(MODEL).to_dict())
        train_set, test_set = read_folders(
            args.data_dir, args.classes, args.images,
            create_transform(**config, is_training=True, scale=(0.35, 1.)),
            create_transform(**config))
        loaders = (DataLoader(train_set, args.batch_size, shuffle=True), DataLoader(test_set, args.batch_size))
        print(f'{args.classes} classes, {len(train_set)} training images, {len(test_set)} test images, {args.epochs} '
              'epochs', flush=True)
        margins = []
        for seed in args.seeds:
            tuned, scratch = (_train_and_evaluate(pretrained, seed, loaders, args) for pretrained in (True, False))
            margins.append(tuned - scratch)
            print(f'seed {seed}: top-1 {tuned:.2f} fine-tuned, {scratch:.2f} from scratch, margin {margins[-1]:.2f}',
                  flush=True)
    except (OSError, RuntimeError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    if len(margins) > 1:
        print(f'margin over {len(margins)} seeds: {statistics.mean(margins):.2f} ± {statistics.stdev(margins):.2f}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
