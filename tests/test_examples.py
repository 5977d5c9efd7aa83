"""The examples on networks of a few channels: they run, and what they show is so."""
import copy
import itertools
import re
import sys

import pytest
import timm
import torch
from conftest import ROOT, TINY
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

sys.path.insert(0, str(ROOT / 'examples'))
import detection  # noqa: E402
import features  # noqa: E402
import finetune  # noqa: E402
import probe  # noqa: E402
import segmentation  # noqa: E402
from compositions import Compositions  # noqa: E402


@pytest.fixture
def tiny(monkeypatch):
    """Let timm create small networks without weights instead, and return which were asked for."""
    create, asked = timm.create_model, []

    def create_small(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        return create(name, **TINY[name.split('.')[0]], **kwargs)

    monkeypatch.setattr(timm, 'create_model', create_small)
    return asked


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Red, green and blue squares."""
    folder = tmp_path_factory.mktemp('data')
    for split, name, i in itertools.product(('train', 'val'), ('blue', 'green', 'red'), range(12)):
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        image = Image.new('RGB', (40, 40), (100 + i, 100, 100))
        ImageDraw.Draw(image).rectangle((i, i, i + 26, i + 26), fill=name)
        image.save(folder / split / name / f'{i:02}.webp')
    return folder


def test_features(tiny, capsys):
    assert features.main(['--image-size', '97', '131']) == 0
    out = capsys.readouterr().out
    # Three times all five maps, once two of them.
    rows = re.findall(r'^  \S+ +reduction +(\d+)  \(1, \d+, (\d+), (\d+)\)$', out, re.MULTILINE)
    assert len(rows) == 17 and rows[:2] == [('2', '49', '66'), ('4', '25', '33')]
    assert 'channels_last: True' in out and 'embedding (1, 16)' in out
    assert set(tiny) == {('gunn18.mini_in100', True)}


def test_detection_learns_and_what_is_frozen_stays(tiny):
    torch.manual_seed(0)
    detector = detection.create_detector('retinanet', 64)
    batch = next(iter(DataLoader(Compositions(64, 0), 2)))
    before = copy.deepcopy(detector.backbone.body.state_dict())
    # One batch, again and again: it is learnt by heart.
    detection.train(detector, itertools.repeat(batch), 40, 1e-3)
    assert min(detection.evaluate(detector, batch[0], batch[2])) > 0.4
    for name, tensor in detector.backbone.body.state_dict().items():
        frozen = not name.endswith('conv.weight') or name.startswith(('stem', 'stages_0'))
        assert torch.equal(tensor, before[name]) is frozen, name


def test_segmentation_learns(tiny, capsys):
    arguments = '--decoder deeplabv3plus --no-pretrained --steps 60 --image-size 64 --batch-size 2 --lr 5e-3'
    assert segmentation.main(arguments.split()) == 0
    # Whole pictures as masks would reach the cat's share of them, which is a quarter at most.
    assert 0.5 < float(re.search(r'held-out pictures: ([\d.]+)', capsys.readouterr().out)[1]) <= 1
    assert not any(pretrained for _, pretrained in tiny)


def test_finetune_learns_and_repeats_itself(folders, tiny, capsys):
    arguments = '--classes 3 --image-size 16 --batch-size 8 --images 8 --epochs 8 --lr 1e-2 --seeds 5 5'
    assert finetune.main(['--data-dir', str(folders), *arguments.split()]) == 0
    head, first, again, _ = capsys.readouterr().out.splitlines()
    assert head == '3 classes, 24 training images, 36 test images, 8 epochs' and first == again
    tuned, scratch, margin = map(float, re.findall(r'-?\d+\.\d+', first))
    # Colours tell the classes apart; chance is a third.
    assert 80 < tuned <= 100 and 80 < scratch <= 100 and margin == pytest.approx(tuned - scratch, abs=0.011)
    assert tiny == [('gunn15.cifar10', True), ('gunn15.cifar10', False)] * 2


def test_finetune_replaces_a_classifier_of_as_many_classes(monkeypatch):
    before = timm.create_model('gunn15.cifar10', pretrained=True)
    monkeypatch.setattr(finetune, 'train', lambda model, *_: model)
    monkeypatch.setattr(finetune, 'evaluate', lambda model, *_: model)
    args = finetune._parser().parse_args(['--data-dir', '', '--classes', '10', '--device', 'cpu'])
    model = finetune._train_and_evaluate(True, 0, [None, None], args)
    assert torch.equal(model.final_conv.conv.weight, before.final_conv.conv.weight)
    assert not torch.equal(model.fc.weight, before.fc.weight)


def test_probe(folders, tiny, capsys):
    arguments = ['--data-dir', str(folders), *'--classes 3 --images 8 --image-size 16 --neighbors 3'.split()]
    assert probe.main(arguments) == 0
    values = re.findall(r'\d+\.\d+', capsys.readouterr().out)
    # By probe and by neighbours, for both networks: colours pass any.
    assert len(values) == 4 and all(float(value) > 80 for value in values)
    assert tiny == [('gunn15.cifar10', True), ('gunn15.cifar10', False)]
