"""The launcher's training loader: the paper's augmentation, and random numbers that survive a resume."""
import inspect
from collections import Counter

import numpy as np
import pytest
import timm.data
import torch
import torch.distributed as dist
from conftest import save_images
from PIL import Image
from torchvision import transforms

from gunn_timm.commands.loader import CyclicRoll, Lighting, create_loader

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture
def folder(tmp_path):
    """Two classes of images, each image of one colour but for one bright pixel."""
    pixels = np.full((16, 32, 32, 3), 10 * np.arange(16, dtype=np.uint8).reshape(-1, 1, 1, 1))
    pixels[:, 5, 7] = 255
    save_images(tmp_path / 'train', pixels)
    return tmp_path


def loader_of(folder, mode, **kwargs):
    dataset = timm.data.create_dataset('', str(folder), split='train', is_training=True)
    return create_loader(dataset, **{
        **dict(input_size=(3, 32, 32), batch_size=4, is_training=True, train_crop_mode=mode, mean=MEAN, std=STD,
               color_jitter=0., num_workers=0, use_prefetcher=False, device='cpu'), **kwargs})


def test_pad4_is_the_papers(folder):
    """Normalise, pad with zeros, crop: every output is a window of the padded, maybe flipped, normalised image."""
    torch.manual_seed(0)
    dataset = loader_of(folder, 'pad4').dataset
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    offsets = set()
    for i in range(len(dataset)):
        image = normalize(Image.open(dataset.reader.samples[i][0]))
        padded = [torch.nn.functional.pad(x, [4] * 4) for x in (image, image.flip(2))]
        for _ in range(20):
            out, _ = dataset[i]
            found = [(flip, y, x) for flip in (0, 1) for y in range(9) for x in range(9)
                     if torch.equal(out, padded[flip][:, y:y + 32, x:x + 32])]
            offsets.add(found[0])
    assert [set(seen) for seen in zip(*offsets)] == [{0, 1}, set(range(9)), set(range(9))]


def test_order_of_the_steps(folder):
    def steps(mode, **kwargs):
        return loader_of(folder, mode, **kwargs).dataset.transform.transforms[1].transforms
    names = {mode: [type(step).__name__ for step in steps(mode, color_jitter=0.4)] for mode in (
        'pad4', 'pad4+roll', 'rrc+lighting', 'rrc')}
    crop = ['RandomResizedCropAndInterpolation', 'RandomHorizontalFlip', 'ColorJitter', 'MaybeToTensor']
    assert names['pad4'] == [*crop, 'Normalize', 'RandomCrop']
    assert names['pad4+roll'] == [*names['pad4'], 'CyclicRoll']
    assert names['rrc+lighting'] == [*crop, 'Lighting', 'Normalize'] and names['rrc'] == [*crop, 'Normalize']
    assert steps('rrc+lighting', scale=(0.3, 0.9))[0].scale == (0.3, 0.9)


def test_roll():
    torch.manual_seed(0)
    image = torch.arange(3 * 4 * 5.).view(3, 4, 5)
    # A third is never rolled; of each other third, 1 in 4 (rows) or 1 in 5 (columns) is rolled by a whole turn.
    shares = {(d, 1): 1 / 4 / 3 for d in range(1, 4)} | {(d, 2): 1 / 5 / 3 for d in range(1, 5)}
    shares[0, 1] = 1 - sum(shares.values())
    counts = Counter(outcome for out in (CyclicRoll()(image) for _ in range(3000))
                     for outcome in shares if torch.equal(out, image.roll(*outcome)))
    assert sum(counts.values()) == 3000
    for outcome, share in shares.items():
        # Four standard deviations of a count of 3000.
        assert abs(counts[outcome] / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5


def test_lighting():
    torch.manual_seed(0)
    image = torch.rand(3, 2, 2)
    shifts = torch.stack([Lighting()(image) - image for _ in range(4000)])
    assert torch.allclose(shifts, shifts[:, :, :1, :1].expand_as(shifts), atol=1e-6)  # rounding of the addition
    found = shifts[:, :, 0, 0].T.cov()
    vectors, values = Lighting.eigenvectors, Lighting.eigenvalues
    expected = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
    # The standard deviation of a variance from 4000 samples is 2.2 % of it.
    assert torch.allclose(found, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    # The published figures are rounded to four places, and orthonormal within that.
    assert torch.allclose(vectors.T @ vectors, torch.eye(3), atol=1e-3)


@pytest.mark.parametrize('mode, kwargs, message', [
    ('pad4', dict(use_prefetcher=True), 'needs --no-prefetcher'),
    ('pad4+roll', dict(num_aug_splits=3), 'takes no .*--aug-splits'),
    ('pad4', dict(no_aug=True), 'takes no .*--no-aug'),
    ('rrc+lighting', dict(input_size=(1, 32, 32)), "The crop mode 'rrc.lighting' is for images of 3 channels; got 1."),
])
def test_modes_that_cannot_be(mode, kwargs, message, folder):
    with pytest.raises(ValueError, match=message):
        loader_of(folder, mode, **kwargs)


@pytest.mark.parametrize('mode', ['pad4', 'pad4+roll', 'rrc+lighting', 'rrc'])
@pytest.mark.parametrize('size', [(3, 32, 16), (3, 16, 32), (1, 32, 32)])
def test_sizes_that_are_not_square_and_grey_images(mode, size, folder):
    if mode == 'rrc+lighting' and size[0] == 1:
        return
    dataset = timm.data.create_dataset('', str(folder), split='train', input_img_mode='L' if size[0] == 1 else 'RGB')
    # By position, as timm's own function takes them.
    loader = create_loader(dataset, size, 4, True, train_crop_mode=mode, mean=MEAN[:size[0]], std=STD[:size[0]],
                           num_workers=0, use_prefetcher=False, device='cpu')
    assert next(iter(loader))[0].shape == (4, *size)
    assert inspect.signature(create_loader) == inspect.signature(timm.data.create_loader)


@pytest.mark.parametrize('size, sizes', [((3, 32, 32), (16, 24, 32)), ((3, 32, 16), ((16, 8), (3, 32, 16)))])
def test_scheduled_sizes_are_padded_in_proportion(size, sizes, folder):
    loader = loader_of(folder, 'pad4', input_size=size, input_size_choices=sizes)
    shapes = [(s, s) if isinstance(s, int) else tuple(s)[-2:] for s in sizes]
    crops = [transform.transforms[-1] for transform in loader.dataset.transforms]
    assert [(crop.size, crop.padding) for crop in crops] == [(shape, shape[0] // 8) for shape in shapes]
    assert {tuple(images.shape[2:]) for _ in range(9) for images, _ in loader} == set(shapes)


@pytest.mark.parametrize('kwargs', [
    dict(num_workers=0), dict(num_workers=2), dict(num_workers=1, input_size_choices=[16, 32])])
def test_epochs_are_what_they_are_wherever_one_starts(folder, kwargs):
    def epoch(loader, number):
        loader.dataset.set_epoch(number)
        return [torch.cat([images.flatten() for images, _ in loader]), torch.rand(3), np.random.rand(3)]

    def start(seed):
        torch.manual_seed(seed)
        return loader_of(folder, 'pad4', **kwargs)

    loader = start(7)
    assert loader.persistent_workers is bool(kwargs['num_workers'])
    _, second, third = (epoch(loader, i) for i in range(3))
    assert all(np.array_equal(a, b) for a, b in zip(third, epoch(start(7), 2)))
    assert not torch.equal(second[0], third[0]) and not torch.equal(epoch(start(8), 2)[0], third[0])


def test_distributed_order_changes_with_the_epoch(folder):
    """Also where a script calls the dataset's set_epoch and, as there is one, not the sampler's."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        loader = loader_of(folder, 'pad4', distributed=True)
        orders = [loader.dataset.set_epoch(epoch) or list(loader.sampler) for epoch in (0, 1, 0)]
    finally:
        dist.destroy_process_group()
    assert orders[0] == orders[2] != orders[1]
