"""The launcher's training loader: the paper's augmentation, and random numbers that survive a resume."""
import numpy as np
import pytest
import timm.data
import torch
import torch.distributed as dist
from PIL import Image
from torchvision import transforms

from gunn_timm.commands.loader import CyclicRoll, Lighting, create_loader

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture
def folder(tmp_path):
    """Two classes of images, each image of one colour but for one bright pixel."""
    for i in range(16):
        pixels = np.full((32, 32, 3), 10 * i, np.uint8)
        pixels[5, 7] = 255
        path = tmp_path / 'train' / 'ab'[i % 2]
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path / f'{i}.png')
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
        path = dataset.reader.samples[i][0]
        image = normalize(Image.open(path))
        padded = [torch.nn.functional.pad(x, [4] * 4) for x in (image, image.flip(2))]
        for _ in range(20):
            out, _ = dataset[i]
            found = [(flip, y, x) for flip in (0, 1) for y in range(9) for x in range(9)
                     if torch.equal(out, padded[flip][:, y:y + 32, x:x + 32])]
            assert found
            offsets.add(found[0])
    assert {f for f, _, _ in offsets} == {0, 1}
    assert {y for _, y, _ in offsets} == {x for _, _, x in offsets} == set(range(9))


def test_order_of_the_steps(folder):
    def names(mode, **kwargs):
        return [type(step).__name__ for step in loader_of(folder, mode, **kwargs).dataset.transform.transforms]
    crop = ['RandomResizedCropAndInterpolation', 'RandomHorizontalFlip']
    assert names('pad4') == [*crop, 'ColorJitter', 'MaybeToTensor', 'Normalize', 'RandomCrop']
    assert names('pad4+roll')[-3:] == ['Normalize', 'RandomCrop', 'CyclicRoll']
    assert names('rrc+lighting', color_jitter=0.4) == [
        *crop, 'ColorJitter', 'MaybeToTensor', 'Lighting', 'Normalize']
    assert names('rrc') == names(None) == [*crop, 'ColorJitter', 'MaybeToTensor', 'Normalize']
    dataset = loader_of(folder, 'rrc+lighting', scale=(0.3, 0.9)).dataset
    assert dataset.transform.transforms[0].scale == (0.3, 0.9)


def test_roll():
    torch.manual_seed(0)
    image = torch.arange(3 * 4 * 5.).view(3, 4, 5)
    rolled = {'none': 0, 'rows': 0, 'columns': 0}
    seen = set()
    for _ in range(3000):
        out = CyclicRoll()(image)
        rows = [d for d in range(1, 4) if torch.equal(out, image.roll(d, 1))]
        columns = [d for d in range(1, 5) if torch.equal(out, image.roll(d, 2))]
        assert torch.equal(out, image) or rows or columns
        rolled['rows' if rows else 'columns' if columns else 'none'] += 1
        seen.update([('rows', *rows)] if rows else [('columns', *columns)] if columns else [])
    assert len(seen) == 3 + 4
    # A third is never rolled; of each other third, 1 in 4 (rows) or 1 in 5 (columns) is rolled by a whole turn. The
    # bounds are four standard deviations of a count of 3000.
    for kind, share in (('rows', 3 / 4 / 3), ('columns', 4 / 5 / 3)):
        assert abs(rolled[kind] / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5


def test_lighting():
    torch.manual_seed(0)
    image = torch.rand(3, 2, 2)
    shifts = []
    for _ in range(4000):
        shift = Lighting(0.1)(image) - image
        assert torch.allclose(shift, shift[:, :1, :1].expand_as(shift), atol=1e-6)  # rounding of the addition
        shifts.append(shift[:, 0, 0])
    found = torch.stack(shifts).T.cov()
    vectors, values = Lighting.eigenvectors, Lighting.eigenvalues
    expected = vectors @ torch.diag((0.1 * values) ** 2) @ vectors.T
    # The standard deviation of a variance from 4000 samples is 2.2 % of it.
    assert torch.allclose(found, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    # The published figures are rounded to four places, and orthonormal within that.
    assert torch.allclose(vectors.T @ vectors, torch.eye(3), atol=1e-3)


@pytest.mark.parametrize('kwargs', [dict(use_prefetcher=True), dict(input_size_choices=[16, 32])])
def test_modes_that_cannot_be(folder, kwargs):
    with pytest.raises(ValueError, match=r"The crop mode 'pad4' needs --no-prefetcher.*takes no --train-img-sizes"):
        loader_of(folder, 'pad4', **kwargs)


def test_timm_refuses_the_modes_without_us(folder):
    dataset = timm.data.create_dataset('', str(folder), split='train', is_training=True)
    with pytest.raises(AssertionError):
        timm.data.create_loader(dataset, input_size=32, batch_size=4, is_training=True, train_crop_mode='pad4')


@pytest.mark.parametrize('workers', [0, 2])
def test_epochs_are_what_they_are_wherever_one_starts(folder, workers):
    def epoch(loader, number):
        loader.dataset.set_epoch(number)
        return torch.cat([images for images, _ in loader]), torch.rand(3), np.random.rand(3)

    torch.manual_seed(7)
    loader = loader_of(folder, 'pad4', num_workers=workers)
    uncut = [epoch(loader, i) for i in range(3)]
    torch.manual_seed(7)
    resumed = epoch(loader_of(folder, 'pad4', num_workers=workers), 2)
    for a, b in zip(uncut[2], resumed):
        assert np.array_equal(a, b)
    assert not torch.equal(uncut[1][0], uncut[2][0])
    torch.manual_seed(8)
    assert not torch.equal(epoch(loader_of(folder, 'pad4', num_workers=workers), 2)[0], uncut[2][0])


def test_distributed_order_changes_with_the_epoch(folder):
    """Also where a script calls the dataset's set_epoch and, as there is one, not the sampler's."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        loader = loader_of(folder, 'pad4', distributed=True)
        orders = []
        for epoch in (0, 1, 0):
            loader.dataset.set_epoch(epoch)
            orders.append(list(loader.sampler))
    finally:
        dist.destroy_process_group()
    assert orders[0] == orders[2] != orders[1]


def test_validation_is_timms_own(folder):
    dataset = timm.data.create_dataset('', str(folder), split='train', is_training=False)
    create_loader(dataset, input_size=(3, 32, 32), batch_size=4, use_prefetcher=False, device='cpu')
    assert not hasattr(dataset, 'set_epoch')
