#!/usr/bin/env python3
"""Feature maps and embeddings of a picture from the pretrained gunn18, in the ways that timm offers.

    python examples/features.py
    python examples/features.py --image assets/cat.jpg --image-size 97 131

Of n pixels of an image's height or width, a map of reduction r has ceil(n / 2) where r is 2, and ceil(n / 4) // (r / 4)
from 4 on: the strided convolution and the pool of the stem are padded and round up; the pools between the stages are
not, and round down. With gunn15 and gunn24, whose stem keeps the size, it is n // r.
"""
import argparse
import sys
from pathlib import Path
from typing import List, Optional, Sequence

import timm
import torch
from timm.data import create_transform, resolve_model_data_config

import gunn_timm  # noqa: F401
from gunn_timm.commands.predict import read_image

MODEL = 'gunn18.mini_in100'


def _print_maps(title: str, backbone: torch.nn.Module, maps: List[torch.Tensor]) -> None:
    print(title)
    for info, feature_map in zip(backbone.feature_info.get_dicts(), maps):
        print(f"  {info['module']:<10}  reduction {info['reduction']:>2}  {tuple(feature_map.shape)}")


@torch.inference_mode()
def show(path: Path, image_size: Sequence[int]) -> None:
    """Print the shapes and reductions of all maps, with every output stride, and what an embedding is.

    Args:
        path: Image file.
        image_size: Height and width to resize the image to.

    Raises:
        ValueError: The file is no image, or the size is too small for the deepest maps.
    """
    # The last of the pools that round down would leave nothing.
    if min(image_size) < 29:
        raise ValueError(f'The image must be at least 29 pixels high and wide; got {image_size[0]}x{image_size[1]}.')
    model = timm.create_model(MODEL, pretrained=True, num_classes=0).eval()
    config = resolve_model_data_config(model, dict(input_size=(3, *image_size)))
    x = create_transform(**config)(read_image(path)).unsqueeze(0)

    # Past its output stride, a backbone keeps the size, and dilates its convolutions instead.
    for output_stride in (32, 16, 8):
        backbone = timm.create_model(MODEL, pretrained=True, features_only=True, output_stride=output_stride).eval()
        _print_maps(f'features_only=True, output_stride={output_stride}', backbone, backbone(x))

    # The maps asked for and no others: what lies beyond the last is dropped.
    backbone = timm.create_model(MODEL, pretrained=True, features_only=True, out_indices=(2, 3)).eval()
    backbone = backbone.to(memory_format=torch.channels_last)
    maps = backbone(x.to(memory_format=torch.channels_last))
    kept = all(feature_map.is_contiguous(memory_format=torch.channels_last) for feature_map in maps)
    _print_maps(f'out_indices=(2, 3), in and out in channels_last: {kept}', backbone, maps)

    # From the classifier's own network, maps and all.
    features, maps = model.forward_intermediates(x, indices=[1, 4])
    print(f'forward_intermediates: features {tuple(features.shape)}, maps {[tuple(m.shape) for m in maps]}')

    embedding, mirrored = model(x), model(x.flip(3))
    similarity = torch.cosine_similarity(embedding, mirrored).item()
    print(f'num_classes=0: embedding {tuple(embedding.shape)}, cosine similarity with the mirrored: {similarity:.3f}')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the example.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0, or 2 where the input is at fault, after one line on stderr.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--image', type=Path, default=Path(__file__).parents[1] / 'assets' / 'cat.jpg', metavar='FILE',
                        help='image file (default: the cat)')
    parser.add_argument('--image-size', type=int, nargs=2, default=(224, 224), metavar=('HEIGHT', 'WIDTH'),
                        help='size to resize it to (default: 224 224)')
    args = parser.parse_args(argv)
    try:
        show(args.image, args.image_size)
    except (OSError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
