"""Overlays against maps computed from features and classifier, and against pictures of which the answer is known."""
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, create_tiny
from matplotlib import colormaps
from PIL import Image
from torch import nn

from gunn_timm.cam import overlay_cam, save_cams
from gunn_timm.cli import main
from gunn_timm.inference import read_image

pytest.importorskip('torchcam', reason='needs torchcam, which needs Python 3.11')

PHOTO = ROOT / 'assets' / 'cat.jpg'


@pytest.fixture
def photo():
    return read_image(PHOTO)


def brightness_model(**cfg):
    """A tiny gunn15 of seven classes: that of index 3 is as likely as the image is bright, whatever the others are."""
    model = create_tiny('gunn15').eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.weight.fill_(0 if 'units' in name else 1 / module.weight[0].numel())
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.weight.fill_(1)
                module.bias.zero_()
        model.fc.weight.zero_()
        model.fc.weight[3] = 1
    model.pretrained_cfg.update(cfg)
    return model


def heat(overlay, image):
    """How much more red than blue was laid over a greyscale image, shape (H, W)."""
    assert (overlay.mode, overlay.size) == ('RGB', image.size)
    red, _, blue = (np.asarray(channel).astype(int) for channel in overlay.split())
    return red - blue


@torch.no_grad()
def test_overlay_is_the_classifier_applied_to_each_pixel(tiny_name, photo):
    model = create_tiny(tiny_name).eval()
    model.pretrained_cfg.update(input_size=(3, 128, 128), crop_pct=1.0)
    # Of this size nothing is resized or cut off.
    image = photo.resize((128, 128))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    features = model.forward_features(transform(image)[None])
    largest = []
    for index, weight in enumerate(model.fc.weight):
        # With average pooling, the gradient of a class is its row of the classifier, the same at every pixel.
        cam = F.relu(F.conv2d(features, weight[None, :, None, None]))
        cam = cam - cam.min()
        largest.append(cam.max())
        # Where nothing speaks for a class, nothing is red.
        cam = F.interpolate(cam / (largest[-1] or 1), (128, 128), mode='bilinear')[0, 0].numpy()
        expected = 0.7 * np.asarray(image) + 0.3 * 255 * colormaps['jet'](cam ** 2)[..., :3]
        # The library rounds the colours, of which there are 256, and the sum.
        assert np.abs(np.asarray(overlay_cam(model, image, index)) - expected).max() < 3
    assert any(largest)


@pytest.mark.parametrize('left', [50, 150])
@pytest.mark.parametrize('top', [0, 100])
def test_the_quadrant_that_matters_is_red(left, top):
    # The network is shown the 200 x 200 pixels in the middle; one of their quadrants is white.
    image = Image.new('RGB', (300, 200))
    image.paste('white', (left, top, left + 100, top + 100))
    overlay = overlay_cam(brightness_model(), image, 3)
    values = heat(overlay, image)
    # A pixel of the map is 25 of the image, and between two the map goes from one to the other.
    inside = np.zeros((200, 300), dtype=bool)
    inside[top + 25:top + 75, left + 25:left + 75] = True
    around = np.ones((200, 300), dtype=bool)
    around[max(top - 25, 0):top + 125, left - 25:left + 125] = False
    around[:, :50] = around[:, 250:] = False
    assert (values[inside] > 0).all() and (values[around] < 0).all()
    # What the network is not shown is left as it is.
    for box in ((0, 0, 49, 200), (251, 0, 300, 200)):
        assert overlay.crop(box).tobytes() == image.crop(box).tobytes()
    assert values[:, 51:249].any(axis=0).all()


@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('crop_pct', [1.0, 0.8])
@pytest.mark.parametrize('size, box', [((300, 200), (190, 40, 230, 80)), ((200, 300), (40, 190, 80, 230))])
def test_the_map_lies_where_the_network_looked(crop_mode, crop_pct, size, box):
    image = Image.new('RGB', size)
    image.paste('white', box)
    model = brightness_model(crop_mode=crop_mode, crop_pct=crop_pct, input_size=(3, 128, 128))
    values = heat(overlay_cam(model, image, 3), image).clip(0)
    rows, columns = np.indices(values.shape)
    center = (values * columns).sum() / values.sum(), (values * rows).sum() / values.sum()
    # Half of the largest that a pixel of the 32 x 32 map can be, where the longer side, 300, is shown whole.
    assert center == pytest.approx(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), abs=300 / 32 / 2)


def test_frozen_models_and_switched_off_gradients(photo):
    model = create_tiny('gunn18').eval()
    expected = overlay_cam(model, photo, 1).tobytes()
    assert overlay_cam(model, photo, 2).tobytes() != expected
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert overlay_cam(model, photo, 1).tobytes() == expected
    model.requires_grad_(False)
    assert overlay_cam(model, photo, 1).tobytes() == expected
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_files(photo, tmp_path):
    model, paths = create_tiny('gunn15').eval(), [tmp_path / 'a.png', tmp_path / 'b.PNG']
    paths[0].write_text('old')
    images = [photo, photo.crop((0, 0, 200, 100))]
    save_cams(model, images, [1, 2], paths)
    for path, image, index in zip(paths, images, [1, 2]):
        with Image.open(path) as overlay:
            assert overlay.format == 'PNG'
            assert overlay.tobytes() == overlay_cam(model, image, index).tobytes()
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize('names', [[], ['a.png'], ['a.png', 'a.png'], ['a.png', 'b.jpg'], ['a.png', 'b.png', 'c.png']])
def test_files_that_do_not_fit_the_images(names, photo, tmp_path):
    with pytest.raises(ValueError, match=r'end with \.png, one for each image; got .* for 2 image'):
        save_cams(create_tiny('gunn15').eval(), [photo, photo], [0, 0], [tmp_path / name for name in names])
    assert not list(tmp_path.iterdir())


def test_refusals(monkeypatch, photo, tmp_path):
    model = create_tiny('gunn15').eval()
    with pytest.raises(ValueError, match='drawn for a Gunn; got ResNet'):
        overlay_cam(timm.create_model('resnet18', device='meta'), photo, 0)
    for index in (-1, 7):
        with pytest.raises(ValueError, match=f'one of 7 classes, counted from 0; got {index}'):
            overlay_cam(model, photo, index)
    # Nothing is written before all are drawn.
    with pytest.raises(ValueError, match='got 7'):
        save_cams(model, [photo, photo], [0, 7], [tmp_path / 'a.png', tmp_path / 'b.png'])
    monkeypatch.setitem(sys.modules, 'torchcam.methods', None)
    with pytest.raises(RuntimeError, match='need torchcam: pip install'):
        save_cams(model, [photo], [0], [tmp_path / 'a.png'])
    assert not list(tmp_path.iterdir())


def test_command_line(photo, tmp_path, capsys):
    out = tmp_path / 'cat.png'
    assert main(['predict', str(PHOTO), '--topk', '1', '--cam', str(out)]) == 0
    assert capsys.readouterr().out.endswith('%  cat\n')
    model = timm.create_model('gunn15', pretrained=True).eval()
    cat = model.pretrained_cfg['label_names'].index('cat')
    with Image.open(out) as overlay:
        assert overlay.tobytes() == overlay_cam(model, photo, cat).tobytes()


@pytest.mark.parametrize('names', [['a.jpg'], ['a.png', 'b.png']])
def test_command_line_refuses_in_one_line(names, tmp_path, capsys):
    assert main(['predict', str(PHOTO), '--cam', *(str(tmp_path / name) for name in names)]) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.startswith('error: Class activation maps go to files that end with .png')
    assert err.count('\n') == 1 and not list(tmp_path.iterdir())
