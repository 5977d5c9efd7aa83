"""A training run that is cut and resumed ends where the uncut one does, bit for bit."""
import numpy as np
import pytest
import torch
from conftest import ROOT, save_images, timm_checkout

ARGS = (
    '--model gunn15 --batch-size 8 --epochs 3 --lr 0.05 --seed 3 --workers 1 --drop 0.2 --drop-path 0.2 --mixup 0.4 '
    '--train-crop-mode pad4 --num-classes 2 --input-size 3 16 16 --opt nesterov --warmup-epochs 0 --device cpu '
    '--no-prefetcher --model-ema --model-ema-decay 0.9 --sched-on-updates --train-split train --checkpoint-hist 5 '
    '--eval-metric loss --val-split').split() + ['']


@pytest.fixture
def data(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    save_images(tmp_path / 'data' / 'train', pixels)
    return tmp_path / 'data'


def differences(a, b, path=''):
    """Places where two checkpoints differ."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [d for k in a for d in differences(a[k], b[k], f'{path}.{k}')]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f'{path}[{i}]')]
    return [] if (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) else [path]


@pytest.mark.parametrize('script', ['tiny_train.py', pytest.param('train.py', marks=timm_checkout)])
def test_resumed_run_ends_bit_for_bit_the_same(script, data, run, tmp_path, request):
    folder = request.getfixturevalue('checkout') if script == 'train.py' else ROOT / 'tests'

    def train(experiment, *more):
        result = run('-m', 'gunn_timm', 'run', folder / script, *ARGS, '--data-dir', data, '--output', tmp_path,
                     '--experiment', experiment, *more)
        assert result.returncode == 0, result.stderr
        return [torch.load(tmp_path / experiment / f'checkpoint-{epoch}.pth.tar', weights_only=False)
                for epoch in (1, 2)]

    uncut = train('uncut')
    resumed = train('resumed', '--resume', tmp_path / 'uncut' / 'checkpoint-0.pth.tar')
    for a, b in zip(uncut, resumed):
        for part in ('epoch', 'state_dict', 'state_dict_ema', 'optimizer'):
            assert differences(a[part], b[part]) == [], part
    assert differences(uncut[0]['state_dict'], uncut[1]['state_dict']) != []
