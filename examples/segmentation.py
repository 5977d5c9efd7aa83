#!/usr/bin/env python3
"""The pretrained gunn18 as the encoder of segmentation-models-pytorch.

    pip install -e '.[examples]'
    python examples/segmentation.py --decoder unet
    python examples/segmentation.py --decoder deeplabv3plus --no-pretrained

Trains for some minutes on pictures with a cat in a known place (compositions.py), and prints the loss, and how well the
mask agrees with the cat's own on pictures not trained on.
"""
import argparse
import sys
from typing import Optional, Sequence

import segmentation_models_pytorch as smp
import torch
from compositions import Compositions
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import normalize

import gunn_timm  # noqa: F401

# smp's name for timm's models. It looks the mean and the deviation up by the tag, so the name has one.
ENCODER = 'tu-gunn18.mini_in100'
HELD_OUT = 16


def create_segmenter(decoder: str, pretrained: bool) -> nn.Module:
    """Build a network that maps images (N, 3, H, W) to logits (N, 1, H, W), H and W being multiples of 32.

    Args:
        decoder: 'unet', 'fpn' or 'deeplabv3plus'; the last takes the encoder with an output stride of 16.
        pretrained: Whether the encoder has its weights.
    """
    # Anything but None, False too, means pretrained to smp.
    model = smp.create_model(decoder, encoder_name=ENCODER, encoder_weights=True if pretrained else None, classes=1)
    return model.to(memory_format=torch.channels_last)


def prepare(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Normalise images (N, 3, H, W) in 0..1 as the encoder's weights want it."""
    params = smp.encoders.get_preprocessing_params(ENCODER)
    images = normalize(images.to(device), params['mean'], params['std'])
    return images.contiguous(memory_format=torch.channels_last)


def train(model: nn.Module, batches: DataLoader, steps: int, lr: float) -> None:
    """Train in place, and print the loss.

    Args:
        model: What `create_segmenter` makes.
        batches: Batches of what `Compositions` yields.
        steps: Steps.
        lr: Largest learning rate.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    overlap, pixels = smp.losses.DiceLoss('binary'), nn.BCEWithLogitsLoss()
    model.train()
    for step, (images, masks, _) in zip(range(1, steps + 1), batches):
        logits, masks = model(prepare(images, device)), masks[:, None].to(device)
        loss = overlap(logits, masks) + pixels(logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 10 == 0 or step == steps:
            print(f'step {step:>4}  loss {loss.item():.4f}', flush=True)


@torch.inference_mode()
def evaluate(model: nn.Module, images: torch.Tensor, masks: torch.Tensor) -> float:
    """Return the mean over the images of the intersection over union of the masks.

    Args:
        model: What `create_segmenter` makes.
        images: Images, shape (N, 3, H, W), in 0..1.
        masks: True masks, shape (N, H, W).
    """
    device = next(model.parameters()).device
    probabilities = model.eval()(prepare(images, device)).sigmoid().cpu()
    counts = smp.metrics.get_stats(probabilities, masks[:, None].long(), mode='binary', threshold=0.5)
    return smp.metrics.iou_score(*counts, reduction='micro-imagewise').item()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the example.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0, or 2 where the input is at fault, after one line on stderr.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--decoder', choices=('unet', 'fpn', 'deeplabv3plus'), default='unet',
                        help='decoder (default: unet)')
    parser.add_argument('--pretrained', action=argparse.BooleanOptionalAction, default=True,
                        help="start from the encoder's weights (default: yes)")
    parser.add_argument('--image-size', type=int, default=128, metavar='N',
                        help='image size, a multiple of 32 (default: 128)')
    parser.add_argument('--steps', type=int, default=100, metavar='N', help='training steps (default: 100)')
    parser.add_argument('--batch-size', '-b', type=int, default=4, metavar='N', help='pictures a step (default: 4)')
    parser.add_argument('--lr', type=float, default=5e-4, metavar='X', help='largest learning rate (default: 5e-4)')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='seed (default: 0)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME')
    args = parser.parse_args(argv)
    try:
        # The norms of a map of one pixel need more than one picture.
        if args.steps < 1 or args.batch_size < 2:
            raise ValueError(
                f'--steps must be at least 1 and --batch-size at least 2; got {args.steps} and {args.batch_size}.')
        if args.image_size % 32:
            raise ValueError(f'--image-size must be a multiple of 32; got {args.image_size}.')
        batches = DataLoader(Compositions(args.image_size, args.seed), args.batch_size)
        torch.manual_seed(args.seed)
        model = create_segmenter(args.decoder, args.pretrained).to(args.device)
        train(model, batches, args.steps, args.lr)
        images, masks, _ = next(iter(DataLoader(Compositions(args.image_size, args.seed + 1), HELD_OUT)))
        iou = evaluate(model, images, masks)
    except (OSError, RuntimeError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    print(f'mean IoU of the mask on {HELD_OUT} held-out pictures: {iou:.3f}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
