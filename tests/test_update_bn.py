"""recipes/update_bn.py: new statistics, and nothing else."""
import functools
import importlib.util

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import ROOT, TINY, create_tiny
from PIL import Image

spec = importlib.util.spec_from_file_location('update_bn', ROOT / 'recipes' / 'update_bn.py')
update_bn = importlib.util.module_from_spec(spec)
spec.loader.exec_module(update_bn)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Eight images of one colour each, and a checkpoint."""
    for i in range(8):
        path = tmp_path / 'data' / 'train' / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 30 * i, dtype=np.uint8)).save(path)
    model = create_tiny('gunn15')
    monkeypatch.setattr(
        update_bn.timm, 'create_model', functools.partial(timm.create_model, num_classes=7, **TINY['gunn15']))
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'in.safetensors')
    return ['--model', 'gunn15', '--checkpoint', str(tmp_path / 'in.safetensors'), '--data-dir', str(tmp_path / 'data'),
            '--images', '8', '-b', '4', '--out', str(tmp_path / 'out.safetensors')]


def test_statistics_are_new_and_weights_old(arguments, tmp_path):
    assert update_bn.main(arguments) == 0
    before, after = (safetensors.torch.load_file(tmp_path / f'{name}.safetensors') for name in ('in', 'out'))
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]) != key.endswith(('running_mean', 'running_var', 'batches_tracked'))
    # What the first convolution makes of all images has the mean of its two batches' means; theirs are equally large.
    config = timm.data.resolve_model_data_config(timm.create_model('gunn15'))
    grey = torch.arange(8).view(-1, 1, 1, 1) * 30 / 255
    x = (grey - torch.tensor(config['mean']).view(3, 1, 1)) / torch.tensor(config['std']).view(3, 1, 1)
    maps = torch.nn.functional.conv2d(x.expand(8, 3, 32, 32), before['stem.conv1.conv.weight'], padding=1)
    # In float32, of thousands of values of about 1; the old statistics are off by 0.1 and more.
    torch.testing.assert_close(after['stem.conv1.bn.running_mean'], maps.mean((0, 2, 3)), rtol=0, atol=1e-4)


@pytest.mark.parametrize('more, message', [
    (['--images', '9'], 'has 8 images: --images takes up to that many'),
    (['-b', '1'], 'got 8 and 1.'),
    (['--data-dir', 'nowhere'], "There is no 'nowhere/train'."),
    (['--checkpoint', 'nothing'], "No checkpoint 'nothing'."),
])
def test_bad_input(arguments, more, message, tmp_path, capsys):
    assert update_bn.main([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / 'out.safetensors').exists()
