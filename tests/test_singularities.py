"""What section 4 of the paper says of overlapping neurons, where it is exact."""
import functools
import importlib.util
import json

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from conftest import TINY as ALL_TINY
from PIL import Image

spec = importlib.util.spec_from_file_location('singularities', ROOT / 'experiments' / 'singularities.py')
singularities = importlib.util.module_from_spec(spec)
spec.loader.exec_module(singularities)

TINY = ALL_TINY['gunn15']
# Rounding errors of float64 in a norm of numbers of about 1; those that part are above 1e-5 after a few steps.
ROUNDING = 1e-12


@pytest.fixture(scope='module')
def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64),
             torch.randint(0, 10, (4,), generator=generator)) for _ in range(4)]


@pytest.mark.parametrize('network', singularities.NETWORKS)
def test_linear_neurons_part_unless_unordered_and_without_residual(network):
    distances = singularities.train_linear(**singularities.NETWORKS[network], steps=20)
    assert distances[0] == 0 and len(distances) == 21
    if network == 'unordered, no residual':
        assert max(distances) == 0
    else:
        # Through the order within one step; through the residual alone, once the read-out has told them apart.
        assert (distances[1] > 0) == ('unordered' not in network) and distances[-1] > 1e-2


def test_what_parts_linear_neurons_is_the_order():
    """With overlapping neurons (w_1 = w_2 = w, both read by a) of error e, the gradients differ by
    e a (w[0] x + (x_1 - y_1, 0)): the first because y_2 reads y_1, the second because it does so in place of x_1."""
    x = torch.randn(1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w, a, target = torch.tensor([0.3, 0.2], dtype=torch.float64), 0.5, 2.
    weight = torch.stack([w, w]).requires_grad_()
    y = singularities.linear_layer(x, weight, ordered=True, residual=False)
    error = (y * a).sum() - target
    first, second = torch.autograd.grad(error ** 2 / 2, weight)[0]
    expected = error * a * (w[0] * x[0] + torch.stack([x[0, 0] - y[0, 0], x.new_zeros(())]))
    torch.testing.assert_close(first - second, expected.detach())


@pytest.mark.parametrize('network, segments_part, channels_part', [
    ('unordered, no residual', False, False), ('unordered', True, True),
    ('ordered, no residual', True, False), ('ordered', True, True)])
def test_overlapping_parts_of_a_layer(network, segments_part, channels_part, batches):
    kwargs = {**TINY, **singularities.NETWORKS[network]}
    for what, part in (('segments', segments_part), ('channels', channels_part)):
        distances = singularities.train_overlapping(batches, what, kwargs)
        assert len(distances) == len(batches) + 1
        assert distances[-1] > 1e-5 if part else max(distances) < ROUNDING


def test_alikeness():
    generator = torch.Generator().manual_seed(0)
    independent = torch.randn(4, 5, 30, 30, generator=generator)
    measured = singularities.alikeness(independent)
    # Of 3600 samples a correlation is about 1 / 60.
    assert measured['mean_correlation'] < 0.05 and measured['above_0_9'] == 0 and measured['effective_rank'] > 0.99
    scales = torch.tensor([1., 2, -1, 3, 1]).view(-1, 1, 1)
    same = singularities.alikeness(independent[:, :1] * scales)
    assert same == pytest.approx(dict(mean_correlation=1, above_0_9=1, effective_rank=1 / 5))


def test_command(tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / 'data' / 'train' / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    create = functools.partial(timm.create_model, **TINY)
    monkeypatch.setattr(singularities.timm, 'create_model', create)
    checkpoint = tmp_path / 'gunn15.pth'
    torch.save(create('gunn15', num_classes=10).state_dict(), checkpoint)
    arguments = ['--data-dir', str(tmp_path / 'data'), '--steps', '3', '--batch-size', '4', '--img-size', '8', '--out',
                 str(tmp_path / 'out')]
    assert singularities.main([*arguments, '--checkpoints', f'gunn15={checkpoint}']) == 0
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert max(results['segments']['unordered, no residual']) < ROUNDING
    assert len(results['trained'][f'gunn15={checkpoint}']) == 3
    for name in ('parting.png', 'channels.png'):
        assert (tmp_path / 'out' / name).read_bytes().startswith(b'\x89PNG')
    for more, message in (
            (['--checkpoints', 'gunn15'], "MODEL=FILE, 'gunn15=model_best.pth.tar' say; got 'gunn15'"),
            (['--steps', '4'], 'has 12 images; needed are 16'),
            (['--data-dir', str(tmp_path)], f"There is no '{tmp_path}/train'")):
        assert singularities.main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
