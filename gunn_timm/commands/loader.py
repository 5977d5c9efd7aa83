"""timm's training loader, with the augmentation of the paper's recipes and random numbers that survive a resume.

The launcher puts `create_loader` in the place of `timm.data.create_loader`, so that train.py takes the modes below for
its `--train-crop-mode`. Without the launcher timm refuses them.
"""
import functools
import inspect
from typing import Any, Callable, List, Sequence, Tuple, Union

import timm.data
import timm.utils
import torch
from torch.utils.data import get_worker_info
from torchvision import transforms

__all__ = ['CyclicRoll', 'Lighting', 'create_loader']

_timm_create_loader = timm.data.create_loader
_CROP_MODES = ('pad4', 'pad4+roll', 'rrc+lighting')


class CyclicRoll:
    """Roll an image along one axis by a random distance, as `Jigsaw` of the authors' code; not in the paper."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Map (C, H, W) to (C, H, W)."""
        if torch.rand(()) >= 2 / 3:
            return image
        dim = int(torch.randint(1, 3, ()))
        return image.roll(int(torch.randint(image.shape[dim], ())), dim)


class Lighting:
    """Add noise along the principal components of ImageNet's colours, before normalisation (Krizhevsky et al. 2012)."""
    eigenvalues = torch.tensor([0.2175, 0.0188, 0.0045])
    eigenvectors = torch.tensor([
        [-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Map (3, H, W) to (3, H, W)."""
        weights = torch.randn(3) * 0.1 * self.eigenvalues
        return image + (self.eigenvectors @ weights).view(3, 1, 1)


def _as_size(size: Union[int, Sequence[int]]) -> Tuple[int, ...]:
    return (3, size, size) if isinstance(size, int) else (3, *size)[-3:]


def _change_steps(steps: List[Callable], mode: str, size: Sequence[int], full_height: int) -> None:
    if mode == 'rrc+lighting':
        steps.insert(next(i for i, step in enumerate(steps) if isinstance(step, transforms.Normalize)), Lighting())
        return
    # After normalisation, so that the border is 0, the mean.
    steps.append(transforms.RandomCrop(size, padding=4 * size[0] // full_height))
    if mode == 'pad4+roll':
        steps.append(CyclicRoll())


class _EpochSeed:
    """Seeds the process at the start of each epoch and, as the first step of the transform, each persistent worker."""

    def __init__(self, others: List[Callable[[int], None]]):
        self.others, self.seed, self.seeded = others, torch.initial_seed(), None
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)
        self._apply(epoch, 0)
        for set_epoch in self.others:
            set_epoch(epoch)

    def _apply(self, epoch: int, stream: int) -> None:
        timm.utils.random_seed((self.seed + 1_000_003 * epoch + 10_007 * stream) % 2 ** 31)

    def __call__(self, image: Any) -> Any:
        worker, epoch = get_worker_info(), int(self.epoch)
        if worker is not None and epoch != self.seeded:
            self.seeded = epoch
            self._apply(epoch, worker.id + 1)
        return image


@functools.wraps(_timm_create_loader)
def create_loader(*args: Any, **kwargs: Any) -> Any:
    """`timm.data.create_loader` that knows more crop modes and makes random numbers a function of the epoch.

    At the start of each epoch the process and its workers are seeded with the seed it had and the epoch's number, so
    that a resumed run draws what an uninterrupted one would.

    Args:
        args, kwargs: timm's. `train_crop_mode` may also be 'pad4' (normalise, pad by 4 pixels of 0, crop at random,
            paper section 6.2; of smaller images with `input_size_choices` proportionately less), 'pad4+roll' (then
            `CyclicRoll`), or 'rrc+lighting' (timm's 'rrc', with `Lighting`).

    Raises:
        ValueError: One of these modes is asked for with the prefetcher, augmentation splits or `no_aug`, or
            'rrc+lighting' with other than three channels.
    """
    bound = inspect.signature(_timm_create_loader).bind(*args, **kwargs)
    bound.apply_defaults()
    kwargs = bound.arguments
    if not kwargs['is_training']:
        return _timm_create_loader(**kwargs)
    dataset, size, mode = kwargs['dataset'], kwargs['input_size'], kwargs['train_crop_mode']
    size, is_ours = _as_size(size), mode in _CROP_MODES
    if is_ours:
        if kwargs['use_prefetcher'] or kwargs['num_aug_splits'] or kwargs['no_aug']:
            raise ValueError(
                f"The crop mode '{mode}' needs --no-prefetcher, for it works on normalised images, and takes no "
                '--aug-splits or --no-aug.')
        if mode == 'rrc+lighting' and size[0] != 3:
            raise ValueError(f"The crop mode '{mode}' is for images of 3 channels; got {size[0]}.")
        kwargs['train_crop_mode'] = None
        if mode != 'rrc+lighting':
            kwargs.update(scale=(1., 1.), ratio=(size[2] / size[1],) * 2)
    kwargs['use_multi_epochs_loader'] = False  # it begins an epoch before that is seeded, and workers live on anyway
    loader = _timm_create_loader(**kwargs)
    if is_ours:
        choices = kwargs.get('input_size_choices')
        for transform, choice in zip(loader.dataset.transforms if choices else [dataset.transform], choices or [size]):
            _change_steps(transform.transforms, mode, _as_size(choice)[1:], size[1])
    # The sampler's as well: where a dataset has a set_epoch, some of timm's scripts call only that.
    parts = (dataset, loader.sampler, getattr(loader, 'batch_sampler', None))
    seed = _EpochSeed([part.set_epoch for part in parts if hasattr(part, 'set_epoch')])
    images = dataset.dataset if isinstance(dataset, timm.data.AugMixDataset) else dataset
    images.transform = transforms.Compose([step for step in (seed, images.transform) if step])
    dataset.set_epoch = seed.set_epoch
    # Starting workers, which a resumed run does again, then draws none of the process's random numbers.
    getattr(loader, 'loader', loader).generator = torch.Generator()
    return loader
