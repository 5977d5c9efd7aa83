"""Damaged files: clear errors and no others. And threads, which do not mix up what they compute."""
import functools
import io
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List

import pytest
import safetensors.torch
import timm
import torch
from conftest import create_tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_properties import checked

from gunn_timm.commands.predict import read_image
from gunn_timm.zoo.files import load_checkpoint


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('robustness')


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with some replaced, inserted or left out, mostly near the start, where formats say what follows."""
    def splice(start: int, new: bytes, left_out: int) -> bytes:
        return content[:start] + new + content[start + (len(new) if left_out < 0 else left_out):]

    starts = st.one_of(st.integers(0, 64), st.integers(0, len(content)))
    return st.builds(splice, starts, st.binary(max_size=8), st.sampled_from([-1, -1, 0, 20, len(content)]))


SMALLEST = dict(channels=(2,), segments=(1,), num_classes=2)


@functools.lru_cache(maxsize=None)
def small_state() -> Dict[str, torch.Tensor]:
    return create_tiny('gunn15', **SMALLEST).state_dict()


def create_pretrained(file: Path) -> torch.nn.Module:
    """Let timm load a file of the user's."""
    overlay = dict(file=str(file), num_classes=SMALLEST['num_classes'])
    return timm.create_model('gunn15', pretrained=True, pretrained_cfg_overlay=overlay, **SMALLEST)


@pytest.mark.parametrize('name', ['weights.safetensors', 'weights.pth'])
@checked(max_examples=40)
@given(data=st.data())
def test_damaged_weights_are_loaded_or_refused(folder, name, data):
    buffer = io.BytesIO()
    torch.save({'epoch': 1, 'state_dict': small_state()}, buffer)
    content = buffer.getvalue() if name == 'weights.pth' else safetensors.torch.save(small_state())
    file = folder / name
    file.write_bytes(data.draw(damaged(content)))
    # Errors name the file, but for those of timm and PyTorch that name the tensors that do not fit.
    try:
        create_pretrained(file)
    except ValueError as e:
        assert str(file) in str(e)
    except RuntimeError as e:
        assert str(e).startswith(('Error(s) in loading state_dict for Gunn', 'Pretrained stem.conv1.conv weight shape'))
    model = timm.create_model('gunn15', **SMALLEST)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        load_checkpoint(model, file)
    except ValueError as e:
        assert str(file) in str(e)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings('ignore:Validating sparse tensor invariants')
@pytest.mark.parametrize('value', [
    None, 5, 'text', {'a': torch.zeros(2)}, torch.zeros(2).to_sparse(), torch.zeros(2, device='meta'),
], ids=['None', 'number', 'text', 'mapping', 'sparse', 'meta'])
def test_what_is_no_dense_tensor_is_refused(value, tmp_path):
    """A file of PyTorch's may hold anything."""
    file = tmp_path / 'other.pth'
    torch.save({**small_state(), 'fc.bias': value}, file)
    for load in (functools.partial(load_checkpoint, timm.create_model('gunn15', **SMALLEST), file),
                 functools.partial(create_pretrained, file)):
        with pytest.raises(ValueError, match="other.pth' is not a checkpoint of weights: 'fc.bias' is no dense tensor"):
            load()


@functools.lru_cache(maxsize=None)
def pictures() -> Dict[str, bytes]:
    """A picture in many formats, with what is difficult in them: palettes, transparency, frames, turns, 16 bits."""
    colours, exif = Image.effect_mandelbrot((9, 7), (-2, -1.5, 1, 1.5), 30).convert('RGB'), Image.Exif()
    exif[0x0112] = 6
    palette = colours.quantize(8)
    found = {}
    for name, image, kwargs in (
            ('palette.png', palette, dict(transparency=bytes(range(8)))),
            ('deep.png', colours.convert('L').convert('I;16'), dict()), ('turned.jpg', colours, dict(exif=exif)),
            ('moving.gif', palette, dict(transparency=2, save_all=True, append_images=[colours.rotate(90)])),
            ('see_through.webp', colours.convert('RGBA'), dict(lossless=True, exif=exif)),
            ('packed.tif', colours, dict(compression='tiff_lzw')),
    ):
        buffer = io.BytesIO()
        image.save(buffer, Image.registered_extensions()[Path(name).suffix], **kwargs)
        found[name] = buffer.getvalue()
    return found


@checked(max_examples=150)
@given(data=st.data())
def test_damaged_pictures_are_read_or_refused(folder, data):
    name = data.draw(st.sampled_from(sorted(pictures())))
    (folder / name).write_bytes(data.draw(damaged(pictures()[name])))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Where a damaged header may reach it.
        patch.setattr(Image, 'MAX_IMAGE_PIXELS', 5000)
        warnings.simplefilter('ignore', UserWarning)
        try:
            assert read_image(folder / name).mode == 'RGB'
        except ValueError as e:
            assert str(folder / name) in str(e)


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
