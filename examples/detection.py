#!/usr/bin/env python3
"""The pretrained gunn18 as the backbone of torchvision's detectors, with its norms and early stages frozen.

    python examples/detection.py --head fasterrcnn
    python examples/detection.py --head retinanet

Trains for some minutes on pictures with a cat in a known place (compositions.py), and prints the loss, and how well the
likeliest box agrees with the cat's own on pictures not trained on.
"""
import argparse
import sys
from collections import OrderedDict
from typing import Dict, List, Optional, Sequence

import timm
import torch
from compositions import Compositions
from timm.data import resolve_model_data_config
from timm.layers import freeze_batch_norm_2d
from timm.utils import freeze
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

import gunn_timm  # noqa: F401

MODEL = 'gunn18.mini_in100'
HELD_OUT = 8


class PyramidBackbone(nn.Module):
    """Maps of gunn18 brought to one width by a feature pyramid: what torchvision's detectors take as their backbone.

    The stem and the first stage do not train. Neither do the norms, in which a few pictures a step would be noise.

    Args:
        out_indices: Maps to use, from 0 with stride 2 to 4 with stride 32.
        out_channels: Channels of the pyramid.
        extra_blocks: What makes further, smaller maps.
    """

    def __init__(self, out_indices: Sequence[int], out_channels: int, extra_blocks: ExtraFPNBlock):
        super().__init__()
        body = timm.create_model(MODEL, pretrained=True, features_only=True, out_indices=out_indices)
        freeze(body, ['stem_conv1', 'stem_conv2', 'stages_0'])
        self.body = freeze_batch_norm_2d(body)
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels, extra_blocks)
        self.out_channels = out_channels

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Map images (N, 3, H, W) to maps (N, out_channels, H / stride, W / stride), by name, the largest first."""
        return self.fpn(OrderedDict((str(i), feature_map) for i, feature_map in enumerate(self.body(x))))


def create_detector(head: str, image_size: int) -> nn.Module:
    """Build a detector of one class, small enough for small pictures and a CPU.

    Args:
        head: 'fasterrcnn' or 'retinanet'.
        image_size: Height and width of the images.
    """
    channels = 128
    if head == 'fasterrcnn':
        backbone = PyramidBackbone((1, 2, 3, 4), channels, LastLevelMaxPool())
        kwargs = dict(
            # Half of torchvision's, which are for larger pictures.
            rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5),
            # With one cat a picture, fewer proposals do.
            rpn_post_nms_top_n_train=200, rpn_post_nms_top_n_test=100, box_batch_size_per_image=64)
    else:
        backbone, kwargs = PyramidBackbone((2, 3, 4), channels, LastLevelP6P7(channels, channels)), {}
    config = resolve_model_data_config(backbone.body)
    return {'fasterrcnn': FasterRCNN, 'retinanet': RetinaNet}[head](
        # Class 0 is the background.
        backbone, num_classes=2, min_size=image_size, max_size=image_size,
        image_mean=config['mean'], image_std=config['std'], **kwargs,
    ).to(memory_format=torch.channels_last)


def train(detector: nn.Module, batches: DataLoader, steps: int, lr: float) -> List[float]:
    """Train in place, and print the loss.

    Args:
        detector: Detector of torchvision's.
        batches: Batches of what `Compositions` yields.
        steps: Steps.
        lr: Largest learning rate.

    Returns:
        The loss of each step.
    """
    device = next(detector.parameters()).device
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    detector.train()
    losses = []
    for step, (images, _, boxes) in zip(range(1, steps + 1), batches):
        targets = [dict(boxes=box[None].to(device), labels=torch.ones(1, dtype=torch.int64, device=device))
                   for box in boxes]
        loss = sum(detector(list(images.to(device)), targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps:
            print(f'step {step:>4}  loss {losses[-1]:.4f}', flush=True)
    return losses


@torch.inference_mode()
def evaluate(detector: nn.Module, images: torch.Tensor, boxes: torch.Tensor) -> List[float]:
    """Compare the likeliest box found in each image with the true one.

    Args:
        detector: Detector of torchvision's.
        images: Images, shape (N, 3, H, W), in 0..1.
        boxes: True boxes, shape (N, 4).

    Returns:
        The intersection over union of each image, 0 where nothing was found.
    """
    device = next(detector.parameters()).device
    detector.eval()
    # The boxes found come in the order of their scores.
    return [box_iou(found['boxes'][:1].cpu(), box[None]).sum().item()
            for found, box in zip(detector(list(images.to(device))), boxes)]


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the example.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0, or 2 where the input is at fault, after one line on stderr.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--head', choices=('fasterrcnn', 'retinanet'), default='fasterrcnn',
                        help='detector (default: fasterrcnn)')
    parser.add_argument('--image-size', type=int, default=128, metavar='N', help='image size (default: 128)')
    parser.add_argument('--steps', type=int, default=150, metavar='N', help='training steps (default: 150)')
    parser.add_argument('--batch-size', '-b', type=int, default=4, metavar='N', help='pictures a step (default: 4)')
    parser.add_argument('--lr', type=float, default=5e-4, metavar='X', help='largest learning rate (default: 5e-4)')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='seed (default: 0)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME')
    args = parser.parse_args(argv)
    try:
        if min(args.steps, args.batch_size) < 1:
            raise ValueError(f'--steps and --batch-size must be at least 1; got {args.steps} and {args.batch_size}.')
        batches = DataLoader(Compositions(args.image_size, args.seed), args.batch_size)
        torch.manual_seed(args.seed)
        detector = create_detector(args.head, args.image_size).to(args.device)
        train(detector, batches, args.steps, args.lr)
        images, _, boxes = next(iter(DataLoader(Compositions(args.image_size, args.seed + 1), HELD_OUT)))
        ious = evaluate(detector, images, boxes)
    except (OSError, RuntimeError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    print(f"IoU of the best box on {HELD_OUT} held-out pictures: {', '.join(f'{iou:.2f}' for iou in ious)}; "
          f'mean {sum(ious) / HELD_OUT:.3f}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
