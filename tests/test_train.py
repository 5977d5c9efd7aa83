"""timm's own train.py and validate.py over two processes, with the flags that people train with."""
import csv
import json

import numpy as np
import pytest
import torch
from conftest import save_images, timm_checkout

pytestmark = timm_checkout

MODEL = (
    '--model gunn15 --model-kwargs channels=(8,12,12) segments=(2,3,2) --num-classes 2 --input-size 3 16 16 '
    '--batch-size 8 --workers 1 --device cpu --no-prefetcher').split()
TRAINING = '--opt nesterov --lr 0.05 --warmup-epochs 0 --seed 3 --train-split train --val-split val'.split()


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    for split in ('train', 'val'):
        pixels = generator.integers(0, 128, (32, 16, 16, 3), dtype=np.uint8)
        pixels[1::2] += 127
        save_images(tmp_path / 'data' / split, pixels, ('dark', 'light'))
    return tmp_path / 'data'


@pytest.fixture
def train(run, checkout, data, tmp_path):
    """Train, and return the rows of the log."""
    def train(experiment, *args):
        result = run(
            '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, '-m', 'gunn_timm', 'run',
            checkout / 'train.py', *MODEL, *TRAINING, '--data-dir', data, '--output', tmp_path / 'out', '--experiment',
            experiment, *args)
        assert result.returncode == 0, result.stderr
        with (tmp_path / 'out' / experiment / 'summary.csv').open() as log:
            return list(csv.DictReader(log))
    return train


def test_train_resume_and_validate(train, run, checkout, data, tmp_path):
    assert [row['epoch'] for row in train('cut', '--epochs', 1)] == ['0']
    # One process alone writes.
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['cut']
    checkpoint = tmp_path / 'out' / 'cut' / 'last.pth.tar'
    rows = train('resumed', '--epochs', 6, '--resume', checkpoint)
    assert [row['epoch'] for row in rows] == ['1', '2', '3', '4', '5']
    results = tmp_path / 'results.json'
    validated = run(
        '-m', 'gunn_timm', 'run', checkout / 'validate.py', *MODEL, '--data-dir', data, '--split', 'val',
        '--checkpoint', tmp_path / 'out' / 'resumed' / 'last.pth.tar', '--results-file', results, '--results-format',
        'json')
    assert validated.returncode == 0, validated.stderr
    top1 = json.loads(results.read_text())['top1']
    # Dark from light is learnt by then, and train.py averaged its own figure over the same images.
    assert top1 == pytest.approx(float(rows[-1]['eval_top1'])) and top1 > 90


@pytest.mark.slow
@pytest.mark.parametrize('flags', [
    '--amp --amp-dtype bfloat16', '--channels-last', '--model-ema --model-ema-decay 0.9', '--grad-accum-steps 2',
    '--grad-checkpointing', '--torchcompile',
    pytest.param('--sync-bn --device cuda', marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="PyTorch's SyncBatchNorm takes tensors of a GPU only")),
])
def test_flags(flags, train, tmp_path):
    rows = train('flags', '--epochs', 1, *flags.split())
    assert np.isfinite([float(rows[0]['train_loss']), float(rows[0]['eval_loss'])]).all()
    checkpoint = torch.load(tmp_path / 'out' / 'flags' / 'last.pth.tar', weights_only=False)
    assert ('state_dict_ema' in checkpoint) == ('ema' in flags)
