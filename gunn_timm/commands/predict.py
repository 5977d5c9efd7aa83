"""From the name of a model and the paths of images to class names with probabilities."""
import contextlib
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Union

import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config

__all__ = ['predict', 'read_image']


def read_image(path: Union[str, Path]) -> Image.Image:
    """Read an image file as RGB, upright, transparency on white.

    Args:
        path: File in any format that Pillow reads, of 8 or 16 bits a channel; 16-bit greyscale keeps its whole range.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no image, or only part of one, or one of 32 bits, whose range is not known.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No image '{path}'.")
    try:
        with Image.open(path) as opened:
            opened.load()
            image, is_png = opened.copy(), opened.format == 'PNG'
            with contextlib.suppress(Exception):  # a picture is whole though its EXIF block is not
                image = ImageOps.exif_transpose(opened)
    except Exception as e:  # Pillow's decoders raise what they like
        raise ValueError(f"'{path}' is not an image that can be read ({e}).") from e
    if image.mode.startswith('I;16') or (image.mode == 'I' and is_png):
        # Pillow would clip 16 bits to 8 instead of scaling.
        image = image.convert('I').point(lambda value: value / 257).convert('L')
    if image.mode in ('I', 'F'):
        raise ValueError(f"'{path}' is an image of 32 bits; accepted are 8 and 16 bits a channel.")
    if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


@torch.inference_mode()
def predict(model: torch.nn.Module, images: Sequence[Image.Image], topk: Optional[int] = None) -> List[List[Dict]]:
    """Classify images.

    Args:
        model: Model in eval mode, from timm.
        images: Images in mode RGB, of any sizes.
        topk: Classes to return for each; None for 5, or all if there are fewer.

    Returns:
        For each image the index, label and probability of the likeliest classes, first the likeliest.

    Raises:
        ValueError: The model has no classifier, or `topk` is below 1 or above the number of classes.
    """
    topk = min(5, model.num_classes) if topk is None else topk
    if not 1 <= topk <= model.num_classes:
        raise ValueError(f'topk must be from 1 to the number of classes, {model.num_classes}; got {topk}.')
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    labels = model.pretrained_cfg.get('label_names') or ()
    if len(labels) != model.num_classes:  # as after fine-tuning on other classes
        labels = [f'class {i}' for i in range(model.num_classes)]
    results = []
    for image in images:
        top = model(transform(image).unsqueeze(0))[0].softmax(dim=0).topk(topk)
        results.append([
            dict(index=i, label=labels[i], probability=p) for p, i in zip(top.values.tolist(), top.indices.tolist())])
    return results
