"""Damaged files: clear errors. And threads, which do not mix up what they compute."""
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import List

import pytest
import timm
import torch
from conftest import ROOT, create_tiny

from gunn_timm.commands.predict import read_image
from gunn_timm.zoo.files import load_checkpoint

SMALLEST = dict(channels=(2,), segments=(1,), num_classes=2)


@pytest.mark.filterwarnings('ignore:Validating sparse tensor invariants')
@pytest.mark.parametrize('value', [
    {'a': torch.zeros(2)}, torch.zeros(2).to_sparse(), torch.zeros(2, device='meta'),
], ids=['mapping', 'sparse', 'meta'])
def test_what_is_no_dense_tensor_is_refused(value, tmp_path):
    """Whether this package or timm loads the file, which, as one of PyTorch's, may hold anything."""
    file, model = tmp_path / 'other.pth', timm.create_model('gunn15', **SMALLEST)
    torch.save({**model.state_dict(), 'fc.bias': value}, file)
    overlay = dict(file=str(file), num_classes=2)
    for load in (
            lambda: load_checkpoint(model, file),
            lambda: timm.create_model('gunn15', pretrained=True, pretrained_cfg_overlay=overlay, **SMALLEST)):
        with pytest.raises(ValueError, match="other.pth' is not a checkpoint of weights: 'fc.bias' is no dense tensor"):
            load()


def test_cut_pictures_are_refused(tmp_path):
    file = tmp_path / 'cut.jpg'
    file.write_bytes((ROOT / 'assets' / 'cat.jpg').read_bytes()[:-500])
    with pytest.raises(ValueError, match="cut.jpg' is not an image that can be read"):
        read_image(file)


@pytest.mark.parametrize('grad_checkpointing', [True, False])
def test_threads_are_as_good_as_one(grad_checkpointing):
    """To the last bit: they do the same operations on the same values."""
    model = create_tiny('gunn15', channels=(4, 4), segments=(2, 2)).eval()
    model.set_grad_checkpointing(grad_checkpointing)
    inputs = [torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]

    def infer() -> List[torch.Tensor]:
        with torch.inference_mode():
            return [model(x) for x in inputs]

    def differentiate() -> List[torch.Tensor]:
        xs = [x.clone().requires_grad_() for x in inputs]
        return [torch.autograd.grad(model(x).square().sum(), x)[0] for x in xs]

    jobs = [infer, differentiate, infer, differentiate]
    interval = sys.getswitchinterval()
    # Change between threads as often as Python can.
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(jobs)) as pool:
            results = list(pool.map(lambda job: job(), jobs))
    finally:
        sys.setswitchinterval(interval)
    for found, job in zip(results, jobs):
        assert all(torch.equal(a, b) for a, b in zip(found, job()))
