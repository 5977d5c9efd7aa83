"""Class activation maps: which parts of an image speak for a class."""
import io
from pathlib import Path
from typing import Sequence, Union

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision.transforms.functional import center_crop

from .gunn import Gunn
from .weights import write_file

__all__ = ['overlay_cam', 'save_cams']


# A gradient is needed whatever the caller has switched off.
@torch.inference_mode(False)
def overlay_cam(model: nn.Module, image: Image.Image, index: int) -> Image.Image:
    """Lay the Grad-CAM of a class over an image: red where the image speaks for the class, blue where it does not.

    The map is that of the last feature map, (H / output_stride, W / output_stride) for an input of (H, W), and is as
    coarse; its colours are relative to its own least and largest value. What the network was not shown, for the
    transform crops, stays as it is.

    Args:
        model: A Gunn with a classifier, in eval mode, on the CPU. Its parameters may be frozen and get no gradients.
        image: Image in mode RGB, of any size.
        index: Index of the class.

    Returns:
        Image in mode RGB, of the same size.

    Raises:
        ValueError: The model is no Gunn, or has no such class.
        RuntimeError: torchcam is not installed.
    """
    if not isinstance(model, Gunn):
        raise ValueError(f'Class activation maps are drawn for a Gunn; got {type(model).__name__}.')
    if not 0 <= index < model.num_classes:
        raise ValueError(f'index must be that of one of {model.num_classes} classes, counted from 0; got {index}.')
    try:
        from torchcam.methods import GradCAM
        from torchcam.utils import overlay_mask
    except ImportError as e:
        raise RuntimeError(f"Class activation maps need torchcam: pip install 'torchcam>=0.5' ({e}).") from e
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    # If the parameters are frozen, only the input makes the feature map need a gradient.
    x = transform(image).unsqueeze(0).requires_grad_()
    # Not a module of a unit: its hook would have the layers concatenate.
    with GradCAM(model, 'final_conv') as cam:
        activation, = cam(index, model(x))
    size = x.shape[-2:]
    activation = F.interpolate(activation[None], size, mode='bilinear').flatten()

    # Back to where the crop was cut from: the number of each of its pixels, 0 for what it had to pad.
    resize = transform.transforms[0]
    width, height = resize(image).size
    pixels = center_crop(torch.arange(1, height * width + 1).view(1, height, width), list(size)).flatten()
    canvas, shown = torch.zeros(1 + height * width), torch.zeros(1 + height * width, dtype=torch.uint8)
    canvas[pixels], shown[pixels] = activation, 255
    canvas, shown = (Image.fromarray(tensor[1:].view(height, width).numpy()) for tensor in (canvas, shown))
    return Image.composite(overlay_mask(image, canvas), image, shown.resize(image.size, Image.Resampling.NEAREST))


def save_cams(
        model: nn.Module,
        images: Sequence[Image.Image],
        indices: Sequence[int],
        paths: Sequence[Union[str, Path]],
) -> None:
    """Write `overlay_cam` of images as PNG files, none before all are drawn.

    Args:
        model: A Gunn with a classifier, in eval mode, on the CPU.
        images: Images in mode RGB.
        indices: Index of a class for each image.
        paths: File for each image, ending with .png; what was there is replaced.

    Raises:
        ValueError: The files are not one for each image or do not end with .png, or what `overlay_cam` says.
        RuntimeError: torchcam is not installed.
        OSError: A file cannot be written.
    """
    names = [str(path) for path in paths]
    if not len(images) == len(names) == len(set(names)) or not all(name.lower().endswith('.png') for name in names):
        raise ValueError(
            'Class activation maps go to files that end with .png, one for each image; '
            f"got {', '.join(names)} for {len(images)} image(s).")
    overlays = [overlay_cam(model, image, index) for image, index in zip(images, indices)]
    for path, overlay in zip(paths, overlays):
        png = io.BytesIO()
        overlay.save(png, 'PNG')
        write_file(path, png.getvalue())
