"""validate.py on small data of the test's own making."""
import csv
import importlib.util
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT, save_images
from PIL import Image
from timm.utils import accuracy

from gunn_timm.zoo.records import WeightsRecord, probe_images

spec = importlib.util.spec_from_file_location('validate', ROOT / 'validate.py')
validate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(validate)

COUNT = 20


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """A split of 10 classes, two images each, as a folder, a tar file, and a dataset of torchvision's."""
    root = tmp_path_factory.mktemp('data')
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
    save_images(root / 'folder' / 'test', pixels, [f'class{i}' for i in range(10)])
    with tarfile.open(root / 'test.tar', 'w') as tar:
        tar.add(root / 'folder' / 'test', arcname='test')
    batches = root / 'torch' / 'cifar-10-batches-py'
    batches.mkdir(parents=True)
    batch = dict(data=pixels.transpose(0, 3, 1, 2).reshape(COUNT, -1), labels=[i % 10 for i in range(COUNT)])
    (batches / 'test_batch').write_bytes(pickle.dumps(batch))
    (batches / 'batches.meta').write_bytes(pickle.dumps({'label_names': [f'class{i}' for i in range(10)]}))
    return root


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp('checkpoint') / 'gunn15.safetensors'
    safetensors.torch.save_file(timm.create_model('gunn15').state_dict(), file)
    return file


@pytest.fixture
def arguments(data, checkpoint):
    folder = str(data / 'folder')
    return ['--data-dir', folder, '--split', 'test', '--checkpoint', str(checkpoint), '-j', '0', '-b', '8']


def result(capsys):
    return json.loads(capsys.readouterr().out.split('--result\n')[1])


def images_and_targets(data, model):
    files = sorted((data / 'folder' / 'test').rglob('*.png'))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    targets = [int(file.parent.name[-1]) for file in files]
    return torch.stack([transform(Image.open(file)) for file in files]), torch.tensor(targets)


@pytest.fixture(scope='module')
def trained(checkpoint):
    model = timm.create_model('gunn15').eval()
    model.load_state_dict(safetensors.torch.load_file(checkpoint))
    return model


@pytest.fixture(scope='module')
def expected(data, trained):
    """Top-1 and top-5 accuracy in %."""
    images, targets = images_and_targets(data, trained)
    with torch.no_grad():
        hits = trained(images).argsort(descending=True) == targets[:, None]
    return round(100 * hits[:, 0].float().mean().item(), 4), round(100 * hits[:, :5].float().sum().item() / COUNT, 4)


def test_folder_tar_and_torchvision_agree(data, expected, arguments, capsys, monkeypatch):
    assert validate.main(arguments) == 0
    found = result(capsys)
    top1, top5 = expected
    assert found == dict(
        model='gunn15', top1=top1, top1_err=pytest.approx(100 - top1), top5=top5, top5_err=pytest.approx(100 - top5),
        images=COUNT, param_count=1.59, img_size=32, crop_pct=1.0, interpolation='bilinear')
    assert validate.main([*arguments, '--data-dir', str(data / 'test.tar')]) == 0
    assert result(capsys) == found
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda *args: True)
    monkeypatch.setattr('torchvision.datasets.CIFAR10.train_list', [])
    assert validate.main([*arguments, '--data-dir', str(data / 'torch'), '--dataset', 'torch/cifar10']) == 0
    assert result(capsys) == found
    assert validate.main([*arguments, '--channels-last', '--amp']) == 0
    # In bfloat16 an image or two may change sides.
    assert abs(result(capsys)['top5'] - top5) <= 2 * 100 / COUNT


@pytest.mark.parametrize('results_format', ['csv', 'json'])
def test_results_and_logits_files(results_format, arguments, expected, trained, tmp_path, capsys):
    file, logits_file = tmp_path / 'results', tmp_path / 'logits.safetensors'
    arguments = [*arguments, '--results-file', str(file), '--results-format', results_format]
    assert validate.main([*arguments, '--logits-file', str(logits_file)]) == 0
    row, = json.loads(file.read_text()) if results_format == 'json' else csv.DictReader(file.open())
    assert {k: str(v) for k, v in row.items()} == {k: str(v) for k, v in result(capsys).items()}
    kept = safetensors.torch.load_file(logits_file)
    assert kept['logits'].shape == (COUNT, 10)
    assert tuple(round(a.item(), 4) for a in accuracy(kept['logits'], kept['targets'], (1, 5))) == expected
    with torch.no_grad():
        assert torch.equal(kept['probe_logits'], trained(probe_images((3, 32, 32))))


def test_ensemble(data, arguments, tmp_path, capsys):
    """Each snapshot is measured by itself, and so is the mean of the probabilities of the first ones."""
    model = timm.create_model('gunn15').eval()
    images, targets = images_and_targets(data, model)
    paths, probabilities = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model.init_weights()
        with torch.no_grad():
            # Else all images are of one class to it.
            model.fc.bias -= model(images).mean(dim=0)
            model.fc.weight *= 100
            model.fc.bias *= 100
            probabilities.append(model(images).double().softmax(dim=1))
        paths.append(str(tmp_path / f'{seed}.safetensors'))
        safetensors.torch.save_file(model.state_dict(), paths[-1])
    arguments[arguments.index('--checkpoint') + 1] = ''
    file = tmp_path / 'results.csv'
    assert validate.main([*arguments, '--results-file', str(file), '--ensemble', *paths]) == 0
    rows = result(capsys)
    assert [row['checkpoint'] for row in rows] == paths and {row['images'] for row in rows} == {COUNT}
    for i, row in enumerate(rows):
        for scores, prefix in ((probabilities[i], ''), (torch.stack(probabilities[:i + 1]).mean(0), 'ensemble_')):
            top1, top5 = (round(a.item(), 4) for a in accuracy(scores, targets, (1, 5)))
            assert row[f'{prefix}top1'] == top1 and row[f'{prefix}top5'] == top5
            assert row[f'{prefix}top1_err'] == pytest.approx(100 - top1)
    # Else the test would not tell an average from its last member.
    assert rows[-1]['ensemble_top1'] != rows[-1]['top1']
    assert [row['ensemble_top1'] for row in csv.DictReader(file.open())] == [str(r['ensemble_top1']) for r in rows]
    # A wrong snapshot is found before the first one is measured.
    (tmp_path / 'wrong.safetensors').write_bytes(b'')
    assert validate.main([*arguments, '--ensemble', *paths, str(tmp_path / 'wrong.safetensors')]) == 2
    assert "wrong.safetensors' is not a checkpoint" in capsys.readouterr().err


def test_batch_size_backs_off(arguments, expected, capsys, monkeypatch):
    evaluate, sizes = validate._evaluate, []

    def limited(model, dataset, data_config, batch_size, args):
        sizes.append(batch_size)
        if batch_size > 3:
            raise RuntimeError('CUDA out of memory.')
        return evaluate(model, dataset, data_config, batch_size, args)

    monkeypatch.setattr(validate, '_evaluate', limited)
    assert validate.main(arguments) == 0
    assert result(capsys)['top1'] == expected[0] and sizes == [8, 6, 4, 3]


def test_comparison_with_the_record(trained, expected, arguments, capsys, monkeypatch):
    top1, top5 = expected
    record = WeightsRecord(
        'gunn15.cifar10', '', 0, 'float32', 0, '', [], {}, {}, dict(top1=top1, top5=top5, images=COUNT), {}, '')
    monkeypatch.setattr(validate, 'weights_records', lambda: {record.name: record})
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained, **kwargs: trained if pretrained else None)
    arguments[arguments.index('--checkpoint') + 1] = ''
    assert validate.main([*arguments, '--check']) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.split('--result')[-1])['top1'] == top1  # as timm's bulk_runner.py reads it
    assert f'record of gunn15.cifar10: top-1 {top1}, top-5 {top5}' in err
    record.metrics['top1'] = top1 + 0.02
    assert validate.main([*arguments, '--check']) == 1
    assert '-0.0200 points off: DOES NOT AGREE within 0.01' in capsys.readouterr().err
    assert validate.main(arguments) == validate.main([*arguments, '--check', '--tolerance', '0.1']) == 0
    record.metrics['images'] += 1
    assert validate.main([*arguments, '--check', '--tolerance', '0.1']) == 1
    # Measured in another way there is nothing to compare with.
    assert validate.main([*arguments, '--crop-pct', '0.9', '--check']) == 2


@pytest.mark.parametrize('extra, message', [
    (['--split', 'train'], "has no folder for the split 'train'; folders there: test."),
    (['--data-dir', 'missing'], "No data at 'missing'."),
    (['--num-classes', '3'], "'fc.weight' has shape (10, 360) there and (3, 360) here"),
    (['--checkpoint', '', '--num-classes', '3'], '--num-classes needs --checkpoint or --ensemble'),
    (['--dataset', 'torch/cifar'], 'Unknown torchvision dataset'),
    (['--model', 'gunn16'], 'Unknown model (gunn16)'),
    (['--checkpoint', 'missing.pth'], "No checkpoint 'missing.pth'."),
    (['--check'], '--check needs published weights'),
    (['--ensemble', 'a.pth'], '--ensemble goes without --checkpoint and --logits-file.'),
])
def test_bad_input_is_one_line_and_exit_code_2(extra, message, arguments, capsys):
    assert validate.main([*arguments, *extra]) == 2
    out, err = capsys.readouterr()
    assert out == '' and message in err
    assert err.startswith('error: ') and err.count('\n') == 1


def test_data_that_does_not_fit(data, arguments, tmp_path, capsys):
    (tmp_path / 'val').symlink_to(data / 'folder' / 'test')
    # A split has other names.
    assert validate.main([*arguments, '--data-dir', str(tmp_path), '--split', 'validation']) == 0
    with tarfile.open(tmp_path / 'both.tar', 'w') as tar:
        for split in ('train', 'test'):
            tar.add(data / 'folder' / 'test', arcname=split)
    assert validate.main([*arguments, '--data-dir', str(tmp_path / 'both.tar')]) == 2
    assert 'holds several splits, test, train; give a tar file of one' in capsys.readouterr().err
    folder = tmp_path / 'test' / 'only'
    folder.mkdir(parents=True)
    Image.new('RGB', (32, 32)).save(folder / 'x.png')
    assert validate.main([*arguments, '--data-dir', str(tmp_path)]) == 2
    assert 'The data has 1 classes and the model 10' in capsys.readouterr().err


@pytest.mark.parametrize('name, workers', [('damaged.png', '0'), ('._0.png', '2'), ('cut.png', '0')])
def test_no_image_stands_in_for_one_that_cannot_be_read(name, workers, data, arguments, tmp_path, capsys):
    shutil.copytree(data / 'folder', tmp_path, dirs_exist_ok=True)
    file = tmp_path / 'test' / 'class3' / name
    file.write_bytes(next(file.parent.glob('*.png')).read_bytes()[:-300] if name == 'cut.png' else b'no image')
    assert validate.main([*arguments, '--data-dir', str(tmp_path), '-j', workers]) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.splitlines()[-1] == f"error: '{file}' is not an image that can be read."


@pytest.mark.parametrize('labels, message', [
    ([f'class{i}' for i in range(10)], None),
    (['class0', 'class2', 'class1', *(f'class{i}' for i in range(3, 10))],
     "Class 1 of the data is 'class1', and of the weights 'class2'."),
])
def test_class_names_are_those_of_the_weights(labels, message, data, trained, arguments, capsys, monkeypatch):
    monkeypatch.setattr(trained, 'pretrained_cfg', {**trained.pretrained_cfg, 'label_names': labels})
    monkeypatch.setattr(timm, 'create_model', lambda name, **kwargs: trained)
    arguments[arguments.index('--checkpoint') + 1] = ''
    assert validate.main(arguments) == (2 if message else 0)
    assert (message or '') in capsys.readouterr().err


def test_class_names_of_imagenet(trained):
    """Folders have WordNet's numbers, and labels one of its words."""
    imagenet = timm.data.ImageNetInfo()
    numbers = imagenet.label_names()[:10]
    labels = [imagenet.label_name_to_description(number).split(', ')[-1] for number in numbers]
    validate._check_classes(numbers, labels, trained)
    with pytest.raises(ValueError, match=f"Class 0 of the data is '{numbers[1]}'"):
        validate._check_classes([numbers[1], numbers[0], *numbers[2:]], labels, trained)


@pytest.mark.parametrize('argument, value', [
    ('--interpolation', 'foo'), ('--crop-pct', '1e-9'), ('--crop-pct', '0'), ('--crop-pct', 'nan'), ('--img-size', '0'),
    ('-b', '0'), ('-j', '-1'), ('--num-classes', 'x'), ('--tolerance', '-1'),
])
def test_bad_values_are_named(argument, value, arguments, capsys):
    with pytest.raises(SystemExit, match='2'):
        validate.main([*arguments, argument, value])
    last = capsys.readouterr().err.splitlines()[-1]
    assert argument in last and value in last and len(last) < 200
