"""The records of weights, the files and cards beside them, and checkpoints."""
import dataclasses
import hashlib
import json
import re
import shutil

import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT, create_tiny
from huggingface_hub import ModelCard
from timm.utils import accuracy

from gunn_timm.commands.cli import main
from gunn_timm.zoo import records
from gunn_timm.zoo.files import load_checkpoint, verify
from gunn_timm.zoo.hub import model_card, repository_files
from gunn_timm.zoo.records import model_infos, probe_images, weights_records


@pytest.mark.parametrize('name', weights_records())
def test_records_are_true(name):
    record = weights_records()[name]
    assert name in model_infos()
    assert record.path.stat().st_size == record.size
    assert hashlib.sha256(record.path.read_bytes()).hexdigest() == record.sha256
    tensors = safetensors.torch.load_file(record.path)
    assert {str(t.dtype) for t in tensors.values() if t.is_floating_point()} == {f'torch.{record.dtype}'}
    model = timm.create_model(name, pretrained=True)
    assert sum(p.numel() for p in model.parameters()) == record.parameters == model_infos()[name].parameters
    for key, value in model.state_dict().items():
        assert torch.equal(value, tensors[key].to(value.dtype)), key
    cfg = model.pretrained_cfg
    assert record.label_names == list(cfg['label_names']) and len(record.label_names) == model.num_classes
    assert cfg['file'] == str(record.path) and cfg['license'] == record.license
    for key, value in record.preprocessing.items():
        assert cfg[key] == (tuple(value) if isinstance(value, list) else value)
    assert record.metrics['images'] == record.dataset['test_images']
    assert record.metrics['epoch'] == 'last' or record.dataset['held_out_images']


@pytest.mark.parametrize('name', weights_records())
def test_accuracy_and_logits_are_the_recorded_ones(name):
    """The record's accuracy follows from the logits kept beside it, and the network still computes such logits."""
    record = weights_records()[name]
    kept = safetensors.torch.load_file(record.path.parent / record.logits_file)
    assert kept['logits'].shape == (record.metrics['images'], len(record.label_names))
    top1, top5 = accuracy(kept['logits'], kept['targets'], (1, 5))
    # The logits are float32, the record has two decimals.
    assert round(top1.item(), 2) == record.metrics['top1'] and round(top5.item(), 2) == record.metrics['top5']
    model = timm.create_model(name, pretrained=True).eval()
    with torch.inference_mode():
        logits = model(probe_images(record.preprocessing['input_size']))
    # Another processor sums in another order: rounding errors, through some seventy layers.
    assert torch.allclose(logits, kept['probe_logits'], atol=2e-3)


@pytest.mark.parametrize('name', weights_records())
def test_card_and_configuration_agree_with_the_record(name, capsys):
    record = weights_records()[name]
    files = repository_files(record, 'org/x')
    config = json.loads(files['config.json'])
    assert config['label_names'] == record.label_names and config['sha256'] == record.sha256
    assert f"{config['architecture']}.{config['pretrained_cfg']['tag']}" == name
    assert record.preprocessing.items() <= config['pretrained_cfg'].items()
    card = ModelCard(files['README.md'].decode())
    assert (card.data.library_name, card.data.license) == ('timm', record.license)
    # miniImageNet has no home of its own there.
    hub_id = record.dataset.get('hub_id')
    assert card.data.datasets == ([hub_id] if hub_id else None)
    top1, top5 = record.metrics['top1'], record.metrics['top5']
    assert {r.metric_name.split()[0]: r.metric_value for r in card.data.eval_results} == {'Top-1': top1, 'Top-5': top5}
    for figure in (f'{top1:.2f}% / {top5:.2f}%', f'{record.parameters:,}', record.sha256, record.dataset['copy'],
                   record.metrics['command'], *record.training['command']):
        assert figure in card.text
    assert not re.search(r'None|\{|\[More Information', re.sub(r'```.*?```', '', card.text, flags=re.DOTALL))
    # `python -m gunn_timm card NAME > weights/NAME.md` writes the one beside the record.
    assert main(['card', name]) == 0
    assert capsys.readouterr().out == (ROOT / 'weights' / f'{name}.md').read_text()


def test_code_on_the_card_runs(run, tmp_path):
    blocks = re.findall(r'```python\n(.*?)```', model_card(weights_records()['gunn15.cifar10']), re.DOTALL)
    assert len(blocks) == 3
    shutil.copy(ROOT / 'assets' / 'cat.jpg', tmp_path / 'picture.jpg')
    result = run('-c', '\n'.join(blocks), cwd=tmp_path, env={'PYTHONPATH': str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        'cat', *(f'torch.Size([1, {c}, {s}, {s}])' for c, s in ((240, 32), (300, 16), (360, 8))),
        'torch.Size([1, 360])']


def test_changed_and_missing_weights_are_refused(monkeypatch, tmp_path):
    record = weights_records()['gunn15.cifar10']
    monkeypatch.setitem(weights_records(), record.name, dataclasses.replace(record, sha256='0' * 64))
    with pytest.raises(ValueError, match=f'is not the published file: its SHA-256 is {record.sha256}, expected 0000'):
        timm.create_model('gunn15', pretrained=True)
    assert record.path.is_file()
    with pytest.raises(FileNotFoundError, match="The weights are missing: no file '.*missing.safetensors'"):
        verify(tmp_path / 'missing.safetensors', record.sha256)


@pytest.mark.parametrize('info, text, problem', [
    ({}, '{sha256: 0}', r"gunn15.cifar10.yaml' does not describe .*missing.* its keys are sha256, size"),
    ({}, '{a: 1', "gunn15.cifar10.yaml' is not YAML that can be read"),
    ({}, '[1]', "gunn15.cifar10.yaml' must have keys and values"),
    ({'gmacs': 'many'}, '{}', r"models.yaml' does not describe .*'gmacs' is 'many', and must be of type float"),
])
def test_damaged_records_are_named(info, text, problem, tmp_path, monkeypatch):
    info = {'dataset': 'D', 'input_size': [3, 8, 8], 'parameters': 1, 'gmacs': 1, **info}
    (tmp_path / 'models.yaml').write_text(json.dumps({'gunn15.cifar10': info}))
    (tmp_path / 'gunn15.cifar10.yaml').write_text(text)
    monkeypatch.setattr(records, '_weights_dir', lambda: tmp_path)
    # As they are without the cache of what was read.
    monkeypatch.setattr(records, 'model_infos', model_infos.__wrapped__)
    with pytest.raises(ValueError, match=problem):
        weights_records.__wrapped__()


def test_averaged_weights_of_a_checkpoint_are_taken(tmp_path):
    source, model = create_tiny('gunn15'), create_tiny('gunn15')
    with torch.no_grad():
        source.fc.bias += 1
    torch.save({'state_dict': model.state_dict(), 'state_dict_ema': source.state_dict()}, tmp_path / 'x.pth.tar')
    load_checkpoint(model, tmp_path / 'x.pth.tar')
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings('ignore:Validating sparse tensor invariants')
@pytest.mark.parametrize('value', [
    {'a': torch.zeros(2)}, torch.zeros(2).to_sparse(), torch.zeros(2, device='meta'),
], ids=['mapping', 'sparse', 'meta'])
def test_what_is_no_dense_tensor_is_refused(value, tmp_path):
    """Whether this package or timm loads the file, which, as one of PyTorch's, may hold anything."""
    file, model = tmp_path / 'other.pth', create_tiny('gunn15')
    torch.save({**model.state_dict(), 'fc.bias': value}, file)
    for load in (
            lambda: load_checkpoint(model, file),
            lambda: create_tiny('gunn15', pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))):
        with pytest.raises(ValueError, match="other.pth' is not a checkpoint of weights: 'fc.bias' is no dense tensor"):
            load()


def test_checkpoints_that_do_not_fit(tmp_path):
    model = create_tiny('gunn15')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    file = tmp_path / 'x.safetensors'
    with pytest.raises(FileNotFoundError, match='No checkpoint'):
        load_checkpoint(model, file)
    safetensors.torch.save_file(create_tiny('gunn24').state_dict(), file)
    with pytest.raises(ValueError, match='does not fit Gunn as configured'):
        load_checkpoint(model, file)
    safetensors.torch.save_file(create_tiny('gunn15', num_classes=3).state_dict(), file)
    with pytest.raises(ValueError, match=r"2 tensors differ. 'fc.weight' has shape \(3, 12\) there and \(7, 12\) here"):
        load_checkpoint(model, file)
    for damage in (b'', file.read_bytes()[:1000]):
        for name in ('x.safetensors', 'x.pth'):
            (tmp_path / name).write_bytes(damage)
            with pytest.raises(ValueError, match='is not a checkpoint that can be read'):
                load_checkpoint(model, tmp_path / name)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
