"""Damaged files, many lives, and threads: clear errors and no others, nothing left behind, and no mixing up."""
import contextlib
import copy
import dataclasses
import functools
import gc
import io
import mmap
import sys
import threading
import warnings
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
import safetensors.torch
import timm
import torch
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_properties import checked, create_network
from timm.utils import reparameterize_model
from torch import nn

from gunn_timm.commands import cli, weights
from gunn_timm.zoo.files import load_checkpoint
from gunn_timm.zoo.records import model_infos, weights_records


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('robustness')


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with some changed, most of them near the start where formats say what follows, some missing, or more."""
    positions = st.one_of(st.integers(0, min(64, len(content)) - 1), st.integers(0, len(content) - 1))

    def changed(changes: List[Tuple[int, int]]) -> bytes:
        result = bytearray(content)
        for position, byte in changes:
            result[position] = byte
        return bytes(result)

    return st.one_of(
        st.lists(st.tuples(positions, st.integers(0, 255)), min_size=1, max_size=8).map(changed),
        positions.map(lambda end: content[:end]),
        st.tuples(positions, st.integers(1, 40)).map(lambda cut: content[:cut[0]] + content[sum(cut):]),
        st.binary(min_size=1, max_size=40).map(lambda more: content + more))


SMALLEST = dict(channels=(2,), segments=(1,), num_classes=2)


@functools.lru_cache(maxsize=None)
def small_state() -> Dict[str, torch.Tensor]:
    return create_network(SMALLEST).state_dict()


@functools.lru_cache(maxsize=None)
def weights_content(name: str) -> bytes:
    if name == 'weights.safetensors':
        return safetensors.torch.save(small_state())
    buffer = io.BytesIO()
    torch.save({'epoch': 1, 'state_dict': small_state()}, buffer)
    return buffer.getvalue()


def assert_loads_or_refuses(file: Path) -> None:
    """Errors name the file, but for those of timm and PyTorch that name the tensors that do not fit."""
    overlay = dict(file=str(file), num_classes=SMALLEST['num_classes'])
    try:
        timm.create_model('gunn15', pretrained=True, pretrained_cfg_overlay=overlay, **SMALLEST)
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


@pytest.mark.parametrize('name', ['weights.safetensors', 'weights.pth'])
@checked(max_examples=70)
@given(data=st.data())
def test_damaged_weights_are_loaded_or_refused(folder, name, data):
    (folder / name).write_bytes(data.draw(damaged(weights_content(name))))
    assert_loads_or_refuses(folder / name)


TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype), st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([torch.float, torch.half, torch.double, torch.int64, torch.bool, torch.uint8]))
KEYS = st.one_of(
    st.sampled_from(['stem.conv1.conv.weight', 'fc.weight', 'fc.bias', 'final_conv.bn.running_mean']),
    st.sampled_from(['state_dict', 'model', 'module.fc.bias', '']))


@checked(max_examples=80)
@given(missing=st.sets(KEYS), other=st.dictionaries(KEYS, TENSORS))
def test_other_tensors_are_loaded_or_refused(folder, missing, other):
    state = {key: value for key, value in small_state().items() if key not in missing}
    safetensors.torch.save_file({**state, **other}, folder / 'other.safetensors')
    assert_loads_or_refuses(folder / 'other.safetensors')


@pytest.mark.filterwarnings('ignore:Validating sparse tensor invariants')
@checked(max_examples=60)
@given(other=st.dictionaries(
    st.one_of(KEYS, st.integers()),
    st.one_of(TENSORS, TENSORS.map(torch.Tensor.to_sparse), TENSORS.map(lambda t: t.to('meta')), st.none(),
              st.integers(), st.text(max_size=3), st.dictionaries(KEYS, TENSORS)), min_size=1))
def test_what_is_no_tensor_is_refused(folder, other):
    """A file of PyTorch's may hold anything."""
    torch.save({**small_state(), **other}, folder / 'other.pth')
    assert_loads_or_refuses(folder / 'other.pth')


RECORD = 'gunn15.cifar10'
READERS = {'models.yaml': model_infos, f'{RECORD}.yaml': weights_records}


@functools.lru_cache(maxsize=None)
def document(name: str) -> Dict[str, Any]:
    """What a record file of the package says, cut down to one tag, with all that may be said."""
    content = yaml.safe_load((ROOT / 'weights' / name).read_text(encoding='utf-8'))
    if name == 'models.yaml':
        return {RECORD: content[RECORD]}
    return {**content, 'hub': {'repo_id': 'org/name', 'revision': 'f' * 40}, 'url': 'https://example.org/x.safetensors'}


def read_records(folder: Path, name: str, content: bytes) -> None:
    """Read the records of a folder in which one file has this content."""
    for file in READERS:
        (folder / file).write_bytes(content if file == name else yaml.safe_dump(document(file)).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, '_weights_dir', lambda: folder)
        for reader in READERS.values():
            reader.cache_clear()
        try:
            READERS[name]()
        finally:
            for reader in READERS.values():
                reader.cache_clear()


@pytest.mark.parametrize('name, cls', [('models.yaml', records.ModelInfo), (f'{RECORD}.yaml', records.WeightsRecord)])
@checked(max_examples=60)
@given(data=st.data())
def test_records_with_other_fields_are_refused(folder, name, cls, data):
    whole = copy.deepcopy(document(name))
    fields = whole.get(RECORD, whole)
    known = [field for field in dataclasses.fields(cls) if field.name != 'name']
    change = data.draw(st.sampled_from(['missing', 'unknown', 'of another type']))
    if change == 'missing':
        key = data.draw(st.sampled_from([f.name for f in known if f.default is dataclasses.MISSING]))
        del fields[key]
    elif change == 'unknown':
        key = data.draw(st.from_regex('[a-z0-9_]{1,8}', fullmatch=True).filter(lambda key: key not in fields))
        fields[key] = 1
    else:
        field = data.draw(st.sampled_from(known))
        key, kind = field.name, type(fields[field.name])
        values = [True, 5, 0.5, 'x', ['x'], {'x': 1}, *([None] if field.default is dataclasses.MISSING else [])]
        fields[key] = data.draw(st.sampled_from([
            # A whole number is as good as any.
            v for v in values if type(v) is not kind and not (kind is float and type(v) is int)]))
    read_records(folder, name, yaml.safe_dump(document(name)).encode())
    with pytest.raises(ValueError) as error:
        read_records(folder, name, yaml.safe_dump(whole).encode())
    assert str(folder / name) in str(error.value) and f"'{key}'" in str(error.value)


@pytest.mark.parametrize('name', READERS)
@checked(max_examples=70)
@given(data=st.data())
def test_damaged_records_are_read_or_refused(folder, name, data):
    content = data.draw(st.one_of(
        damaged(yaml.safe_dump(document(name)).encode()),
        # Whole and no record, and what PyYAML itself trips over.
        st.sampled_from([b'', b'5', b'[a]', b'a: 1', b'a: [', b'!!bool x', b'!!timestamp x', b'2001-99-99', b'\xff'])))
    try:
        read_records(folder, name, content)
    except ValueError as e:
        assert str(folder / name) in str(e)


@functools.lru_cache(maxsize=None)
def pictures() -> Dict[str, bytes]:
    """A picture in many formats, with what is difficult in them: palettes, transparency, frames, turns, 16 bits."""
    colours = Image.effect_mandelbrot((9, 7), (-2, -1.5, 1, 1.5), 30).convert('RGB')
    palette, see_through = colours.quantize(8), colours.copy()
    see_through.putalpha(100)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {}
    for name, image, kwargs in (
            ('colours.png', colours, dict()), ('palette.png', palette, dict(transparency=bytes(range(8)))),
            ('deep.png', colours.convert('L').convert('I;16'), dict()), ('turned.jpg', colours, dict(exif=exif)),
            ('moving.gif', palette, dict(transparency=2, save_all=True, append_images=[colours.rotate(90)])),
            ('see_through.webp', see_through, dict(lossless=True, exif=exif)),
            ('plain.tif', colours, dict()), ('packed.tif', colours, dict(compression='tiff_lzw')),
    ):
        buffer = io.BytesIO()
        image.save(buffer, Image.registered_extensions()[Path(name).suffix], **kwargs)
        found[name] = buffer.getvalue()
    return found


def with_checksums(content: bytes) -> bytes:
    """Make the checksums of a damaged PNG right again, so that it is read further than to the first."""
    result, position = content[:8], 8
    while position + 12 <= len(content):
        end = position + 8 + int.from_bytes(content[position:position + 4], 'big')
        chunk = content[position:end]
        result += chunk + zlib.crc32(chunk[4:]).to_bytes(4, 'big')
        position = end + 4
    return result


@pytest.fixture(scope='module')
def small_predictor() -> Iterator[None]:
    """`predict` with a network that takes no time, and with Pillow's limit of pixels where a test may reach it."""
    model = create_network(SMALLEST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, 'create_model', lambda *args, **kwargs: model)
        patch.setattr(Image, 'MAX_IMAGE_PIXELS', 5000)
        yield


@checked(max_examples=150)
@given(data=st.data())
def test_damaged_pictures_are_read_or_refused(folder, small_predictor, data):
    name = data.draw(st.sampled_from(sorted(pictures())))
    content = data.draw(damaged(pictures()[name]))
    if name.endswith('.png') and data.draw(st.booleans()):
        content = with_checksums(content)
    file = folder / name
    file.write_bytes(content)
    out, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        # Of Pillow's.
        warnings.simplefilter('ignore', UserWarning)
        code = cli.main(['predict', str(file), '--topk', '1'])
    if code == 0:
        assert out.getvalue().startswith(str(file)) and not err.getvalue()
    else:
        assert code == 2 and not out.getvalue()
        assert err.getvalue().startswith('error: ') and str(file) in err.getvalue() and err.getvalue().count('\n') == 1


def live_and_die(i: int, backward: bool) -> List[weakref.ref]:
    """Create a network, use it in one way of several, drop it; return references to what was alive."""
    model = timm.create_model('gunn15', **SMALLEST)
    model.set_grad_checkpointing(bool(i & 1))
    x = torch.randn(1, 3, 64, 64, requires_grad=bool(i & 2))
    y = model(x)
    if backward:
        y.sum().backward()
    folded = reparameterize_model(model.eval())
    with torch.no_grad():
        folded(x.contiguous(memory_format=torch.channels_last))
    return [weakref.ref(thing) for thing in (x, y, model, folded, next(model.parameters()))]


def held() -> Tuple[int, int]:
    """Count the tensors and modules there are, and the bytes of memory that the process has (0 if not on Linux)."""
    gc.collect()
    # By their types: to ask an object for its class makes some of PyTorch's warn.
    things = sum(issubclass(type(thing), (torch.Tensor, nn.Module)) for thing in gc.get_objects())
    statm = Path('/proc/self/statm')
    return things, int(statm.read_text().split()[1]) * mmap.PAGESIZE if statm.exists() else 0


@pytest.mark.parametrize('backward', [True, False])
def test_500_lives_leave_nothing(backward):
    for i in range(20):  # PyTorch and timm keep what they make at first
        live_and_die(i, backward)
    things, memory = held()
    references = [reference for i in range(500) for reference in live_and_die(i, backward)]
    things_after, memory_after = held()
    assert things_after == things and not any(reference() is not None for reference in references)
    # The images alone have 50 kB each: 25 MB, if they were kept. What the allocator keeps of its own is less than that.
    assert memory_after - memory < 10e6


def together(*functions: Callable[[], Any]) -> List[Any]:
    """Call functions at the same time, each in a thread of its own, changing between these as often as Python can."""
    barrier = threading.Barrier(len(functions))

    def call(function: Callable[[], Any]) -> Any:
        barrier.wait()
        return function()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(functions)) as pool:
            return list(pool.map(call, functions))
    finally:
        sys.setswitchinterval(interval)


def batches(seed: int) -> List[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 6, 6, generator=generator) for _ in range(8)]


def infer(model: nn.Module, seed: int) -> List[torch.Tensor]:
    with torch.inference_mode():
        return [model(x) for x in batches(seed)]


def differentiate(model: nn.Module, seed: int) -> List[torch.Tensor]:
    """Gradients of the images, which leave the model as it is."""
    inputs = [x.requires_grad_() for x in batches(seed)]
    return [torch.autograd.grad(model(x).square().sum(), x)[0] for x in inputs]


@pytest.mark.parametrize('kind', ['ordinary', 'grad_checkpointing', 'folded'])
@pytest.mark.parametrize('first, second', [(infer, infer), (differentiate, infer), (differentiate, differentiate)])
def test_two_threads_are_as_good_as_one(first, second, kind):
    """To the last bit: they do the same operations on the same values."""
    model = create_network(dict(channels=(4, 4), segments=(2, 2), num_classes=3))
    model.set_grad_checkpointing(kind == 'grad_checkpointing')
    if kind == 'folded':
        model = reparameterize_model(model).to(memory_format=torch.channels_last)
    jobs = [functools.partial(do, model, seed) for do, seed in ((first, 1), (second, 2))]
    # First, for what is folded is packed when it is first run.
    results = together(*jobs)
    for found, wanted in zip(results, [job() for job in jobs]):
        assert len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted))
