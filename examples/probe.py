#!/usr/bin/env python3
"""Evaluate the frozen embeddings of the pretrained gunn15 on new classes: a linear probe and nearest neighbours.

    pip install -e '.[examples]'
    python examples/probe.py --data-dir DIR

DIR is as for finetune.py. The same is measured of a network that was never trained.
"""
import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence, Tuple

import numpy as np
import timm
import torch
from finetune import MODEL, read_folders
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.data import create_transform, resolve_data_config
from timm.utils import reparameterize_model
from torch import nn
from torch.utils.data import DataLoader, Dataset


@torch.inference_mode()
def embed(model: nn.Module, dataset: Dataset) -> Tuple[np.ndarray, np.ndarray]:
    """Compute the embeddings of all images (images, num_features), and collect the targets (images).

    Args:
        model: Model without classifier, in eval mode.
        dataset: Images (3, H, W) and targets.
    """
    device = next(model.parameters()).device
    pairs = [(model(images.to(device, memory_format=torch.channels_last)).cpu(), target)
             for images, target in DataLoader(dataset, batch_size=64)]
    embeddings, targets = (torch.cat(parts).numpy() for parts in zip(*pairs))
    return embeddings, targets


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the example.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0, or 2 where the input is at fault, after one line on stderr.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data-dir', type=Path, required=True, metavar='DIR', help='folder of the images')
    parser.add_argument('--classes', type=int, default=10, metavar='N', help='first N classes (default: 10)')
    parser.add_argument('--images', type=int, default=100, metavar='N',
                        help='training images of each class at most (default: 100)')
    parser.add_argument('--image-size', type=int, default=32, metavar='N', help='image size (default: 32)')
    parser.add_argument('--neighbors', type=int, default=10, metavar='K', help='neighbours that vote (default: 10)')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='of the untrained network (default: 0)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME')
    args = parser.parse_args(argv)
    try:
        config = resolve_data_config(
            dict(img_size=args.image_size), pretrained_cfg=timm.get_pretrained_cfg(MODEL).to_dict())
        transform = create_transform(**config)
        train_set, test_set = read_folders(args.data_dir, args.classes, args.images, transform, transform)
        if not 1 <= args.neighbors <= len(train_set):
            raise ValueError(
                f'--neighbors must be from 1 to the number of training images, {len(train_set)}; got {args.neighbors}.')
        print(f'{args.classes} classes, {len(train_set)} training images, {len(test_set)} test images', flush=True)
        torch.manual_seed(args.seed)
        for pretrained in (True, False):
            model = timm.create_model(MODEL, pretrained=pretrained, num_classes=0).eval()
            model = reparameterize_model(model).to(args.device, memory_format=torch.channels_last)
            known, asked = embed(model, train_set), embed(model, test_set)
            # Regularised more than by default: there are more features than images of a class.
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)).fit(*known)
            neighbors = KNeighborsClassifier(args.neighbors, metric='cosine').fit(*known)
            print(f"{'pretrained' if pretrained else 'untrained':>10}: top-1 {100 * probe.score(*asked):.2f} linear "
                  f'probe, {100 * neighbors.score(*asked):.2f} of {args.neighbors} neighbours', flush=True)
    except (OSError, RuntimeError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
