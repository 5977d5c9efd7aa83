"""The examples on networks of a few channels: they run, and what they show is so."""
import copy
import itertools
import math
import re
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import ROOT, TINY, create_tiny
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from torchvision.ops import FrozenBatchNorm2d, box_iou, masks_to_boxes

from gunn_timm.layers import set_backend

sys.path.insert(0, str(ROOT / 'examples'))
import detection  # noqa: E402
import features  # noqa: E402
import finetune  # noqa: E402
import probe  # noqa: E402
import segmentation  # noqa: E402
from compositions import Compositions  # noqa: E402

EXAMPLES = (features, detection, segmentation, finetune, probe)
CAT = ROOT / 'assets' / 'cat.jpg'


@pytest.fixture
def tiny(monkeypatch):
    """Let timm create small networks instead, which have no weights, and return which were asked for."""
    create, asked = timm.create_model, []

    def create_small(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        return create(name, **TINY[name.split('.')[0]], **kwargs)

    monkeypatch.setattr(timm, 'create_model', create_small)
    return asked


def map_size(name, pixels, reduction):
    """What examples/features.py says."""
    if name == 'gunn15':
        return pixels // reduction
    return math.ceil(pixels / 2) if reduction == 2 else math.ceil(pixels / 4) // (reduction // 4)


@pytest.mark.parametrize('example', EXAMPLES, ids=lambda example: example.__name__)
def test_documented_commands_exist(example, capsys):
    with pytest.raises(SystemExit, match='0'):
        example.main(['--help'])
    printed = capsys.readouterr().out
    commands = re.findall(rf'^    python examples/{example.__name__}\.py(.*)$', example.__doc__, re.MULTILINE)
    assert commands
    for option in re.findall(r'--[\w-]+', ' '.join(commands)):
        assert option in printed


# features.py


@pytest.mark.parametrize('name, output_stride', [
    *(('gunn15', stride) for stride in (1, 2, 4)), *(('gunn18', stride) for stride in (4, 8, 16, 32))])
def test_feature_info_is_right_at_odd_sizes(name, output_stride):
    reductions = {'gunn15': (1, 2, 4), 'gunn18': (2, 4, 8, 16, 32)}[name]
    x = torch.randn(1, 3, 97, 131)
    for count in range(1, len(reductions) + 1):
        for out_indices in itertools.combinations(range(len(reductions)), count):
            backbone = create_tiny(name, features_only=True, out_indices=out_indices, output_stride=output_stride)
            info = backbone.feature_info
            assert info.reduction() == [min(reductions[i], output_stride) for i in out_indices]
            with torch.inference_mode():
                maps = backbone.eval()(x)
            assert [tuple(m.shape) for m in maps] == [
                (1, channels, map_size(name, 97, reduction), map_size(name, 131, reduction))
                for channels, reduction in zip(info.channels(), info.reduction())]


def test_features_prints_what_the_maps_are(tiny, capsys):
    assert features.main(['--image-size', '97', '131']) == 0
    out = capsys.readouterr().out
    rows = re.findall(r'^  (\S+) +reduction +(\d+)  \(1, \d+, (\d+), (\d+)\)$', out, re.MULTILINE)
    # Three times all five maps, once two of them.
    assert len(rows) == 17 and [row[1] for row in rows[10:15]] == ['2', '4', '8', '8', '8']
    for _, reduction, height, width in rows:
        assert int(height) == map_size('gunn18', 97, int(reduction))
        assert int(width) == map_size('gunn18', 131, int(reduction))
    assert 'channels_last: True' in out and 'embedding (1, 16)' in out
    assert set(tiny) == {('gunn18.mini_in100', True)}


def test_features_of_the_pretrained_network(run):
    result = run('examples/features.py', '--image-size', 64, 64)
    assert result.returncode == 0, result.stderr
    assert 'stages.3    reduction 32  (1, 2000, 2, 2)' in result.stdout
    # A network that knows something takes the mirror image for much the same; equal it is not.
    assert 0.5 < float(re.search(r'mirrored: ([\d.]+)', result.stdout)[1]) < 1


@pytest.mark.parametrize('arguments, message', [
    (['--image-size', '28', '64'], 'at least 29 pixels'),
    (['--image', 'nothing.jpg'], "No image 'nothing.jpg'"),
])
def test_features_of_bad_input(arguments, message, tiny, capsys):
    assert features.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_features_of_the_smallest_image(tiny, capsys):
    assert features.main(['--image-size', '29', '29']) == 0
    assert 'stages.3    reduction 32  (1, 16, 1, 1)' in capsys.readouterr().out


# compositions.py


def test_compositions():
    pictures, masks, boxes = next(iter(DataLoader(Compositions(64, 3), 20)))
    # Of the first and last pixel, where masks end behind it.
    torch.testing.assert_close(masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1]), boxes, rtol=0, atol=0)
    sizes = boxes[:, 2:] - boxes[:, :2]
    assert boxes.min() >= 0 and boxes.max() <= 64 and sizes.min() >= 16 and sizes.max() <= 48
    assert len(boxes.unique(dim=0)) == 20
    # But for the rounding of float32.
    assert pictures.min() >= 0 and pictures.max() <= 1 + 1e-6
    again, other = (next(iter(Compositions(64, seed)))[0] for seed in (3, 4))
    assert torch.equal(again, pictures[0]) and not torch.equal(other, pictures[0])


def test_the_cat_is_where_the_mask_says():
    source = Compositions(48, 0)
    source.cat = torch.full_like(source.cat, 2)
    for picture, mask, _ in itertools.islice(source, 5):
        # Backgrounds have no more than 1.
        assert torch.equal((picture > 1.5).all(dim=0), mask == 1)


# detection.py


@pytest.mark.parametrize('head', ['fasterrcnn', 'retinanet'])
def test_detection_runs(head, tiny, capsys):
    assert detection.main(['--head', head, '--steps', '2', '--image-size', '64', '--batch-size', '2']) == 0
    out = capsys.readouterr().out
    assert re.search(r'step +2  loss \d', out)
    values = re.search(r'held-out pictures: (.*); mean ([\d.]+)', out)
    ious = [float(value) for value in values[1].split(', ')]
    assert len(ious) == 8 and all(0 <= iou <= 1 for iou in ious)
    assert tiny == [('gunn18.mini_in100', True)]


@pytest.mark.parametrize('head, steps', [('fasterrcnn', 20), ('retinanet', 40)])
def test_detection_learns_and_what_is_frozen_stays(head, steps, tiny):
    torch.manual_seed(0)
    detector = detection.create_detector(head, 64)
    batch = next(iter(DataLoader(Compositions(64, 0), 2)))
    body = detector.backbone.body
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in body.modules()) == sum(
        isinstance(m, torch.nn.Conv2d) for m in body.modules())
    before = copy.deepcopy(body.state_dict())
    losses = detection.train(detector, itertools.repeat(batch), steps, 1e-3)
    # One batch, again and again: it is learnt by heart, as far as 64 proposals drawn at random tell.
    assert losses[-1] < 0.6 * losses[0]
    assert min(detection.evaluate(detector, batch[0], batch[2])) > 0.4
    for name, tensor in body.state_dict().items():
        frozen = not name.endswith('conv.weight') or name.startswith(('stem', 'stages_0'))
        assert torch.equal(tensor, before[name]) is frozen, name


def test_frozen_backbone_has_the_same_gradients_by_concatenation(tiny):
    backbone = detection.PyramidBackbone((1, 2, 3, 4), 8, detection.LastLevelMaxPool()).double()
    plain = copy.deepcopy(backbone)
    set_backend(plain, 'plain')
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for network in (backbone, plain):
        maps = network(x)
        assert [(name, m.shape[-1]) for name, m in maps.items()] == [
            ('0', 16), ('1', 8), ('2', 4), ('3', 2), ('pool', 1)]
        sum(m.square().sum() for m in maps.values()).backward()
    trained = [(name, p, q) for (name, p), q in zip(backbone.named_parameters(), plain.parameters())
               if p.requires_grad]
    assert trained and not any(name.startswith(('body.stem', 'body.stages_0')) for name, _, _ in trained)
    for _, p, q in trained:
        torch.testing.assert_close(p.grad, q.grad)


def test_best_box_is_the_likeliest():
    class Detector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            boxes = torch.tensor([[0., 0., 8., 8.], [4., 0., 12., 8.]])
            return [dict(boxes=boxes), dict(boxes=boxes[:0])]

    truth = torch.tensor([[4., 0., 12., 8.]] * 2)
    ious = detection.evaluate(Detector(), torch.zeros(2, 3, 16, 16), truth)
    assert ious == pytest.approx([box_iou(torch.tensor([[0., 0., 8., 8.]]), truth[:1]).item(), 0])


@pytest.mark.parametrize('example', [detection, segmentation], ids=lambda example: example.__name__)
@pytest.mark.parametrize('arguments, message', [
    (['--steps', '0'], '--steps'),
    (['--batch-size', '0'], '--batch-size'),
    (['--image-size', '0'], 'at least 32; got 0'),
])
def test_bad_numbers_are_said(example, arguments, message, tiny, capsys):
    assert example.main(arguments) == 2
    assert message in capsys.readouterr().err


# segmentation.py


@pytest.mark.parametrize('decoder, strides', [
    ('unet', [1, 2, 4, 8, 16, 32]), ('fpn', [1, 2, 4, 8, 16, 32]), ('deeplabv3plus', [1, 2, 4, 8, 16, 16])])
def test_segmentation_learns(decoder, strides, tiny):
    torch.manual_seed(0)
    model = segmentation.create_segmenter(decoder, pretrained=True)
    assert ('gunn18.mini_in100', True) in tiny
    images, masks, _ = batch = next(iter(DataLoader(Compositions(64, 0), 2)))
    with torch.no_grad():
        maps = model.encoder(images)
    assert [m.shape[1] for m in maps] == model.encoder.out_channels == [3, 64, 8, 12, 12, 16]
    assert [64 // m.shape[-1] for m in maps] == strides
    segmentation.train(model, itertools.repeat(batch), 40, 5e-3)
    # One batch, again and again. Whole pictures as masks would reach the cat's share of them.
    assert segmentation.evaluate(model, images, masks) > 0.5 > masks.mean()


@pytest.mark.parametrize('pretrained', [True, False])
def test_segmentation_runs(pretrained, tiny, capsys):
    arguments = ['--decoder', 'deeplabv3plus', '--steps', '1', '--image-size', '64', '--batch-size', '2']
    assert segmentation.main([*arguments, '--pretrained' if pretrained else '--no-pretrained']) == 0
    out = capsys.readouterr().out
    assert re.search(r'step +1  loss \d', out)
    assert 0 <= float(re.search(r'held-out pictures: ([\d.]+)', out)[1]) <= 1
    # smp creates one more, without weights, to look at.
    assert tiny.count(('gunn18.mini_in100', True)) == pretrained


def test_iou_of_masks():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            logits = torch.full((2, 1, 32, 32), -0.1)
            logits[:, :, :16] = 0.1
            return logits

    masks = torch.zeros(2, 32, 32)
    masks[0, :16] = 1
    masks[1, 8:24] = 1
    # The first is found, of the second a third.
    assert segmentation.evaluate(Model(), torch.zeros(2, 3, 32, 32), masks) == pytest.approx((1 + 1 / 3) / 2)


def test_segmentation_wants_multiples_of_32(tiny, capsys):
    assert segmentation.main(['--image-size', '80']) == 2
    assert '--image-size must be a multiple of 32; got 80' in capsys.readouterr().err


def test_backbones_have_the_published_weights():
    name = 'stages.3.layer.units.49.blocks.0.conv1.conv.weight'
    expected = timm.create_model('gunn18', pretrained=True).state_dict()[name]
    name = name.replace('stages.', 'stages_')
    encoder = segmentation.smp.encoders.get_encoder('tu-gunn18', weights=True)
    backbone = detection.PyramidBackbone((4,), 8, detection.LastLevelMaxPool())
    assert torch.equal(encoder.model.state_dict()[name], expected)
    assert torch.equal(backbone.body.state_dict()[name], expected)


# finetune.py and probe.py


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Red discs, green squares and blue stripes."""
    folder = tmp_path_factory.mktemp('data')
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 12), ('val', 6)):
        for name in ('blue', 'green', 'red'):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                left, top, shade = torch.randint(0, 12, (3,), generator=generator).tolist()
                image = Image.new('RGB', (40, 40), (100 + shade, 100, 100))
                draw = ImageDraw.Draw(image)
                box = (left, top, left + 26, top + 26)
                if name == 'red':
                    draw.ellipse(box, fill=(220, 10 + shade, 10))
                elif name == 'green':
                    draw.rectangle(box, fill=(10, 220, 10 + shade))
                else:
                    for x in range(left, left + 26, 6):
                        draw.rectangle((x, top, x + 4, top + 26), fill=(10 + shade, 10, 220))
                image.save(folder / split / name / f'{i:02}.webp')
    return folder


@pytest.fixture
def seen(monkeypatch):
    """Watch finetune.py: the networks, what they start as, their rates at every step, their averages."""
    seen = SimpleNamespace(networks=[], starts=[], rates=[], averages=[], evaluated=[])
    create_optimizer, create_average, evaluate = (
        finetune.create_optimizer_v2, finetune.ModelEmaV3, finetune.evaluate)

    def watch_optimizer(model, *args, **kwargs):
        optimizer = create_optimizer(model, *args, **kwargs)
        names = {id(p): name for name, p in model.named_parameters()}
        rates = []
        optimizer.register_step_pre_hook(lambda *_: rates.append({
            names[id(p)]: group['lr'] for group in optimizer.param_groups for p in group['params']}))
        seen.networks.append(model)
        seen.starts.append(copy.deepcopy(model.state_dict()))
        seen.rates.append(rates)
        return optimizer

    def watch_average(*args, **kwargs):
        seen.averages.append(create_average(*args, **kwargs))
        return seen.averages[-1]

    def watch_evaluation(model, *args):
        seen.evaluated.append(model)
        return evaluate(model, *args)

    monkeypatch.setattr(finetune, 'create_optimizer_v2', watch_optimizer)
    monkeypatch.setattr(finetune, 'ModelEmaV3', watch_average)
    monkeypatch.setattr(finetune, 'evaluate', watch_evaluation)
    return seen


def finetune_arguments(folders, *more):
    return ['--data-dir', str(folders), '--classes', '3', '--image-size', '16', '--batch-size', '8', *more]


def test_finetune_learns_and_repeats_itself(folders, tiny, capsys):
    arguments = finetune_arguments(folders, '--images', '8', '--epochs', '8', '--lr', '1e-2', '--seeds', '5', '5')
    assert finetune.main(arguments) == 0
    head, *runs, last = capsys.readouterr().out.splitlines()
    assert head == '3 classes, 24 training images, 18 test images, 8 epochs'
    assert runs[0] == runs[1] and last.endswith('± 0.00')
    tuned, scratch, margin = map(float, re.findall(r'-?\d+\.\d+', runs[0]))
    # Colours tell the classes apart; chance is a third.
    assert tuned > 80 and scratch > 80 and margin == pytest.approx(tuned - scratch, abs=0.011)
    assert tiny == [('gunn15.cifar10', True), ('gunn15.cifar10', False)] * 2


def test_rates_fall_towards_the_input(folders, tiny, seen):
    assert finetune.main(finetune_arguments(folders, '--epochs', '2', '--layer-decay', '0.5')) == 0
    first, second = 'layer.units.0.blocks.0.conv1.conv.weight', 'layer.units.1.blocks.0.conv3.bn.bias'
    layers = ['stem.conv1.conv.weight', f'stages.0.{first}', 'stages.1.downsample.conv.conv.weight',
              f'stages.1.{first}', 'stages.2.downsample.conv.bn.weight', f'stages.2.{first}', 'fc.weight']
    tuned, scratch = seen.rates
    assert len(tuned) == len(scratch) == 2 * math.ceil(36 / 8)
    for rates in tuned:
        assert set(rates) == {name for name, _ in seen.networks[0].named_parameters()}
        for before, after in itertools.pairwise(layers):
            assert rates[before] == pytest.approx(0.5 * rates[after])
        # What is of one layer has one rate, norms included.
        assert rates[f'stages.2.{first}'] == rates[f'stages.2.{second}'] == rates['final_conv.conv.weight']
        assert rates['fc.weight'] == rates['fc.bias'] <= 1e-3
    assert tuned[-1]['fc.weight'] < tuned[1]['fc.weight']
    assert all(len(set(rates.values())) == 1 for rates in scratch)


@pytest.mark.parametrize('more', [[], ['--amp']])
def test_frozen_norms_stay_and_the_average_is_what_counts(more, folders, tiny, seen):
    assert finetune.main(finetune_arguments(folders, '--epochs', '2', '--freeze-bn', *more)) == 0
    frozen, trained = (
        [torch.equal(network.state_dict()[name], start[name]) for name in start if 'bn.running' in name]
        for network, start in zip(seen.networks, seen.starts))
    assert len(frozen) == len(trained) and all(frozen) and not any(trained)
    names = {name for name, _ in seen.networks[0].named_parameters()}
    assert names and not any('.bn.' in name for name in names)
    for network, start, average, evaluated in zip(seen.networks, seen.starts, seen.averages, seen.evaluated):
        assert evaluated is average.module
        # Weights stored with what rounds nothing: an average that lags behind is between start and end.
        end, mean = network.state_dict()['fc.weight'], average.module.state_dict()['fc.weight']
        assert not torch.equal(mean, start['fc.weight'])
        assert 0 < (mean - end).norm() < (start['fc.weight'] - end).norm()


def test_evaluation_counts_right_answers():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(3))

        def forward(self, x):
            return x.mean(dim=(2, 3)) @ self.weight

    images = torch.eye(3)[torch.tensor([0, 1, 2, 2, 1])][:, :, None, None].expand(-1, -1, 4, 4)
    pairs = list(zip(images, [0, 1, 2, 0, 0]))
    assert finetune.evaluate(Model(), DataLoader(pairs, 2), amp=False) == 60


def test_first_classes_and_images(folders):
    images = finetune.FirstClasses(folders / 'train', 2, 5)
    assert images.classes == ['blue', 'green'] and len(images) == 10
    assert [(path[-7:], target) for path, target in images.samples] == [
        (f'{i:02}.webp', target) for target in (0, 1) for i in range(5)]
    assert images[7][1] == images.targets[7] == 1


def test_probe_tells_colours_apart(folders, tiny, capsys):
    arguments = ['--data-dir', str(folders), '--classes', '3', '--images', '8', '--image-size', '16']
    assert probe.main([*arguments, '--neighbors', '3']) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == '3 classes, 24 training images, 18 test images'
    assert [row.split(':')[0].strip() for row in rows] == ['pretrained', 'untrained']
    for row in rows:
        linear, nearest = map(float, re.findall(r'\d+\.\d+', row))
        # Colours pass any network; chance is a third.
        assert linear > 80 and nearest > 80
    assert tiny == [('gunn15.cifar10', True), ('gunn15.cifar10', False)]
    assert probe.main([*arguments, '--neighbors', '25']) == 2
    assert 'from 1 to the number of training images, 24; got 25' in capsys.readouterr().err


def test_embeddings_are_in_the_order_of_the_images(tiny):
    model = timm.create_model('gunn15', num_classes=0).eval()
    images = torch.randn(5, 3, 16, 16)
    embeddings, targets = probe.embed(model, list(zip(images, range(5))))
    assert embeddings.shape == (5, 12) and targets.tolist() == [0, 1, 2, 3, 4]
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(embeddings)[3:4], model(images[3:4]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('example', [finetune, probe], ids=lambda example: example.__name__)
@pytest.mark.parametrize('broken, more, message', [
    (['train', 'val'], [], 'must have the folders train/CLASS, and val/CLASS or test/CLASS'),
    (['val'], [], 'must have the folders'),
    (['train'], [], 'must have the folders'),
    (['val/red'], [], "val' has 2 classes, fewer than the 3 asked for"),
    (['val/red/picture.png'], [], 'red'),
    ([], ['--classes', '4'], "train' has 3 classes, fewer than the 4 asked for"),
    ([], ['--classes', '1'], 'at least 2 classes of 1 image; got 1'),
    ([], ['--images', '0'], 'got 3 of 0'),
])
def test_bad_folders_are_said(example, broken, more, message, tmp_path, tiny, capsys):
    for split, name in itertools.product(('train', 'val'), ('blue', 'green', 'red')):
        names = (split, f'{split}/{name}', f'{split}/{name}/picture.png')
        if broken and broken[0] in ('train', 'val') and split in broken:
            continue
        if names[1] in broken:
            continue
        (tmp_path / split / name).mkdir(parents=True)
        if names[2] not in broken:
            Image.new('RGB', (16, 16)).save(tmp_path / split / name / 'picture.png')
    assert example.main(['--data-dir', str(tmp_path), '--classes', '3', *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error
    assert not tiny


def test_classes_must_be_the_same(tmp_path, capsys):
    for name in ('train/blue', 'train/red', 'test/blue', 'test/green'):
        (tmp_path / name).mkdir(parents=True)
        Image.new('RGB', (16, 16)).save(tmp_path / name / 'picture.png')
    assert probe.main(['--data-dir', str(tmp_path), '--classes', '2']) == 2
    assert "train' and " in capsys.readouterr().err
