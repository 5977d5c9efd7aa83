"""Reading images, finding models by name, and classifying."""
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, create_tiny
from PIL import Image

from gunn_timm.commands.predict import predict, read_image

PHOTO = ROOT / 'assets' / 'cat.jpg'


@pytest.fixture
def ramp() -> np.ndarray:
    """Greyscale picture, dark to bright from left to right."""
    return np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (30, 1))


def test_photo():
    image = read_image(PHOTO)
    assert image.mode == 'RGB' and image.size == (300, 300)


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'LA', 'P', '1', 'CMYK'])
def test_modes_show_the_same_picture(mode, ramp, tmp_path):
    file = tmp_path / ('image.tif' if mode == 'CMYK' else 'image.png')
    Image.fromarray(ramp).convert('RGB').convert(mode).save(file)
    pixels = np.asarray(read_image(file)).astype(int)
    assert pixels.shape == (30, 40, 3)
    # Palettes and 1-bit pictures have few levels; on the average of the halves they show the same.
    for half in (slice(0, 20), slice(20, 40)):
        assert abs(pixels[:, half].mean() - ramp[:, half].mean()) < 5


def test_16_bits_keep_their_range(ramp, tmp_path):
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / 'image.png')
    pixels = np.asarray(read_image(tmp_path / 'image.png'))
    assert np.array_equal(pixels[..., 0], ramp)


@pytest.mark.parametrize('dtype', [np.int32, np.float32])
def test_32_bits_are_refused(dtype, ramp, tmp_path):
    Image.fromarray(ramp.astype(dtype)).save(tmp_path / 'image.tif')
    with pytest.raises(ValueError, match='image of 32 bits; accepted are 8 and 16 bits'):
        read_image(tmp_path / 'image.tif')


def test_transparency_is_white(ramp, tmp_path):
    image = Image.fromarray(ramp).convert('RGBA')
    image.putalpha(0)
    image.save(tmp_path / 'image.png')
    assert (np.asarray(read_image(tmp_path / 'image.png')) == 255).all()
    palette = Image.new('P', (4, 4), 0)
    palette.putpalette([255, 0, 0])
    palette.save(tmp_path / 'palette.gif', transparency=0)
    assert (np.asarray(read_image(tmp_path / 'palette.gif')) == 255).all()


def test_orientation_is_followed(ramp, tmp_path):
    image = Image.fromarray(ramp)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / 'image.jpg', exif=exif)
    assert read_image(tmp_path / 'image.jpg').size == (30, 40)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
def test_a_damaged_exif_block_does_not_cost_the_picture(kind, ramp, tmp_path):
    file = tmp_path / 'image'
    Image.fromarray(ramp).save(file, kind, exif=b'Exif\0\0garbage', lossless=True)
    # JPEG is lossy, by a few levels of 255.
    assert np.abs(np.asarray(read_image(file))[..., 0].astype(int) - ramp).max() <= 4


@pytest.mark.parametrize('encoding', ['cp1252', 'ascii'])
def test_names_that_the_terminal_cannot_show(encoding, run, tmp_path):
    file = tmp_path / '\u732b.jpg'
    file.write_bytes(PHOTO.read_bytes())
    result = run('-m', 'gunn_timm', 'predict', file, '--topk', 1, env={'PYTHONIOENCODING': encoding})
    assert result.returncode == 0 and '\\u732b.jpg' in result.stdout and result.stdout.endswith('cat\n')


def test_bad_images(tmp_path):
    with pytest.raises(FileNotFoundError, match='No image .*missing.jpg'):
        read_image(tmp_path / 'missing.jpg')
    (tmp_path / 'text.jpg').write_text('not an image')
    with pytest.raises(ValueError, match='text.jpg.* is not an image that can be read'):
        read_image(tmp_path / 'text.jpg')
    whole = PHOTO.read_bytes()
    for length in (0, 100, len(whole) // 2):
        (tmp_path / 'part.jpg').write_bytes(whole[:length])
        with pytest.raises(ValueError, match='part.jpg.* is not an image that can be read'):
            read_image(tmp_path / 'part.jpg')


def test_predict_is_softmax_of_the_transformed_image():
    model = create_tiny('gunn15').eval()
    image = read_image(PHOTO)
    first, second = predict(model, [image, image.rotate(90)], topk=7)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        expected = model(transform(image)[None]).softmax(1)[0]
    assert [e['probability'] for e in first] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-6)
    assert first[0]['index'] == expected.argmax()
    assert first != second
    model.pretrained_cfg['label_names'] = list('abc')
    assert predict(model, [image], topk=1)[0][0]['label'] == f'class {expected.argmax()}'
    model.pretrained_cfg['label_names'] = list('abcdefg')
    assert predict(model, [image], topk=1)[0][0]['label'] == 'abcdefg'[expected.argmax()]
    few = create_tiny('gunn15', num_classes=3).eval()
    assert [len(predict(m, [image])[0]) for m in (model, few)] == [5, 3]
    for topk in (0, 8):
        with pytest.raises(ValueError, match=f'from 1 to the number of classes, 7; got {topk}'):
            predict(model, [image], topk=topk)
