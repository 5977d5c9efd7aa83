"""recipes/update_bn.py: new statistics, and nothing else."""
import functools
import sys

import numpy as np
import safetensors.torch
import timm
import torch
from conftest import ROOT, TINY, create_tiny, save_images

sys.path.insert(0, str(ROOT / 'recipes'))
import update_bn  # noqa: E402


def test_statistics_are_new_and_weights_old(tmp_path, monkeypatch, capsys):
    """Of eight images of one colour each."""
    save_images(tmp_path / 'train', [np.full((32, 32, 3), 30 * i, dtype=np.uint8) for i in range(8)])
    safetensors.torch.save_file(create_tiny('gunn15').state_dict(), tmp_path / 'in.safetensors')
    create = functools.partial(timm.create_model, num_classes=7, **TINY['gunn15'])
    monkeypatch.setattr(update_bn.timm, 'create_model', create)
    arguments = (f'--model gunn15 --checkpoint {tmp_path}/in.safetensors --data-dir {tmp_path} -b 4 '
                 f'--out {tmp_path}/out.safetensors').split()
    assert update_bn.main([*arguments, '--images', '9']) == 2
    assert 'has 8 images: --images takes up to that many' in capsys.readouterr().err
    assert update_bn.main([*arguments, '--dataset', 'torch/typo']) == 2
    assert 'Unknown torchvision dataset typo' in capsys.readouterr().err
    assert update_bn.main([*arguments, '--images', '8']) == 0
    before, after = (safetensors.torch.load_file(tmp_path / f'{name}.safetensors') for name in ('in', 'out'))
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]) != key.endswith(('running_mean', 'running_var', 'batches_tracked'))
    # What the first convolution makes of all images has the mean of its two batches' means; theirs are equally large.
    config = timm.data.resolve_model_data_config(create('gunn15'))
    grey = torch.arange(8).view(-1, 1, 1, 1) * 30 / 255
    x = (grey - torch.tensor(config['mean']).view(3, 1, 1)) / torch.tensor(config['std']).view(3, 1, 1)
    maps = torch.nn.functional.conv2d(x.expand(8, 3, 32, 32), before['stem.conv1.conv.weight'], padding=1)
    # In float32, of thousands of values of about 1; the old statistics are off by 0.1 and more.
    torch.testing.assert_close(after['stem.conv1.bn.running_mean'], maps.mean((0, 2, 3)), rtol=0, atol=1e-4)
