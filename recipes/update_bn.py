#!/usr/bin/env python3
"""Compute a trained network's BatchNorm statistics anew from training images without augmentation (precise BatchNorm).

    python recipes/update_bn.py --model gunn15 --checkpoint CHECKPOINT --data-dir DIR --out FILE

In training the statistics are running averages over the last few batches: augmented images of several sizes, and
weights that still change. These are the plain averages over --images training images, without augmentation, at the
size and by the transforms of evaluation, by the weights as they are: what Wu and Johnson (2021,
https://arxiv.org/abs/2105.07576) call precise statistics. No image of the test split is seen. The weights themselves
stay as they are.
"""
import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

import safetensors.torch
import timm
import torch
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Subset

import gunn_timm  # noqa: F401
from gunn_timm.zoo.files import load_checkpoint, write_file


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Read a checkpoint and write its weights with new statistics, as safetensors.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0, or 2 where the input is at fault, after one line on stderr.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', required=True, metavar='NAME', help="model or tag, for example 'gunn15'")
    parser.add_argument('--checkpoint', required=True, metavar='FILE', help='of train.py, or a safetensors file')
    parser.add_argument('--data-dir', type=Path, required=True, metavar='DIR', help='folder with train/CLASS')
    parser.add_argument('--dataset', default='', metavar='NAME', help="such as 'torch/image_folder'; else folders")
    parser.add_argument('--images', type=int, default=10000, metavar='N', help='images to take (default: 10000)')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='what images these are (default: 0)')
    parser.add_argument('--batch-size', '-b', type=int, default=250, metavar='N', help='batch size (default: 250)')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help='safetensors file to write')
    args = parser.parse_args(argv)
    try:
        if not args.dataset and not (args.data_dir / 'train').is_dir():
            raise FileNotFoundError(f"There is no '{args.data_dir}/train'.")
        if not args.out.parent.is_dir():
            raise FileNotFoundError(f"There is no folder '{args.out.parent}'.")
        dataset = create_dataset(args.dataset, args.data_dir, split='train')
        # Every batch counts as much as every other, so all must be whole.
        if not 1 < args.batch_size <= args.images <= len(dataset) or args.images % args.batch_size:
            raise ValueError(
                f"'{args.data_dir}' has {len(dataset)} images: --images takes up to that many, --batch-size 2 "
                f'to --images, of which it must be a divisor; got {args.images} and {args.batch_size}.')
        model = timm.create_model(args.model)
        load_checkpoint(model, args.checkpoint)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as e:  # timm asserts
        print(f'error: {e}', file=sys.stderr)
        return 2
    dataset.transform = create_transform(**resolve_model_data_config(model))
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed))[:args.images]
    loader = DataLoader(Subset(dataset, chosen.tolist()), args.batch_size)
    update_bn(loader, model.to(memory_format=torch.channels_last))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_file(args.out, safetensors.torch.save(tensors, metadata={'format': 'pt'}))
    return 0


if __name__ == '__main__':
    sys.exit(main())
