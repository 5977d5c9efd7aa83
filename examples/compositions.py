"""Pictures with a cat in a known place, to try detection and segmentation on without a data set.

Each has an oval cut from assets/cat.jpg, of a random size and shape, at a random place, on a background of random
colours. The cat is always the same one: what is learnt from these pictures is to find it, not to know cats.
"""
from pathlib import Path
from typing import Iterator, Tuple

import torch
import torch.nn.functional as F
from torch.utils.data import IterableDataset
from torchvision.transforms.functional import pil_to_tensor, resize

from gunn_timm.commands.predict import read_image

CAT = Path(__file__).parents[1] / 'assets' / 'cat.jpg'


class Compositions(IterableDataset):
    """Pictures without end, the same ones for the same seed.

    Args:
        image_size: Height and width, at least 32.
        seed: Seed.

    Raises:
        ValueError: `image_size` is too small.
    """

    def __init__(self, image_size: int, seed: int):
        if image_size < 32:
            raise ValueError(f'The image size must be at least 32; got {image_size}.')
        self.image_size = image_size
        self.seed = seed
        self.cat = pil_to_tensor(read_image(CAT)) / 255

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield pictures (3, size, size) in 0..1, masks (size, size), 1 where the cat is, and boxes (4,), around it.

        A box is the left, upper, right and lower edge of the mask, in pixels.
        """
        size = self.image_size
        generator = torch.Generator().manual_seed(self.seed)

        def random_int(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        while True:
            height, width = random_int(size // 4, size * 3 // 4), random_int(size // 4, size * 3 // 4)
            top, left = random_int(0, size - height), random_int(0, size - width)
            colours = torch.rand(1, 3, 5, 5, generator=generator)
            picture = F.interpolate(colours, size=(size, size), mode='bilinear', align_corners=True)[0]
            mask = torch.zeros(size, size)

            y = torch.linspace(-1, 1, 2 * height + 1)[1::2, None]
            x = torch.linspace(-1, 1, 2 * width + 1)[None, 1::2]
            oval = y ** 2 + x ** 2 <= 1
            place = (..., slice(top, top + height), slice(left, left + width))
            picture[place] = torch.where(oval, resize(self.cat, [height, width]), picture[place])
            mask[place] = oval.float()
            yield picture, mask, torch.tensor([left, top, left + width, top + height], dtype=torch.float32)
