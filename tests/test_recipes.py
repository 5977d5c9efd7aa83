"""The recipes, as far as they can be checked without running them: what timm makes of them."""
import argparse
import functools
import json
import math
import re
import sys

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from conftest import ROOT, TINY, save_images, timm_checkout
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from gunn_timm.zoo.files import load_checkpoint
from gunn_timm.zoo.records import model_infos, weights_records

sys.path.insert(0, str(ROOT / 'recipes'))
import cifar_gpu  # noqa: E402

RECIPES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / 'recipes').glob('*.yaml'))}
PAPER = [name for name in RECIPES if name.endswith('_paper')]
SNAPSHOTS = [name for name in RECIPES if name.endswith('_snapshots')]
SNAPSHOTS_LAPTOP = yaml.safe_load((ROOT / 'experiments' / 'snapshots_laptop.yaml').read_text())


def optimizer_and_scheduler(recipe, updates_per_epoch=10):
    defaults = dict(momentum=0.9, min_lr=0., decay_epochs=90, cooldown_epochs=0, patience_epochs=10)
    args = argparse.Namespace(**{**defaults, **recipe})
    model = timm.create_model(recipe['model'], device='meta')
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **recipe.get('opt_kwargs', {}))
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)
    return model, optimizer, scheduler, epochs


def test_there_is_one_for_each():
    nets = ['gunn15_cifar10', 'gunn15_cifar100', 'gunn24_cifar10', 'gunn24_cifar100', 'gunn18_in1k', 'wide_gunn18_in1k']
    assert {f'{net}_{kind}' for net in nets for kind in ('paper', 'modern')} <= set(RECIPES)
    for record in weights_records().values():
        assert (ROOT / record.training['recipe']).is_file()
    for name, recipe in RECIPES.items():
        assert recipe['model'] in model_infos() and name.startswith(recipe['model'].replace('.', '_') + '_')
        assert f'-c recipes/{name}.yaml' in (ROOT / 'recipes' / f'{name}.yaml').read_text()


def assert_papers_optimizer(model, optimizer):
    """Section 6: SGD with Nesterov's momentum 0.9, no dampening, and weight decay 1e-4 on every parameter."""
    group, = optimizer.param_groups
    assert {id(p) for p in group['params']} == {id(p) for p in model.parameters()}
    assert isinstance(optimizer, torch.optim.SGD)
    assert {k: group[k] for k in ('lr', 'momentum', 'nesterov', 'dampening', 'weight_decay')} == dict(
        lr=0.1, momentum=0.9, nesterov=True, dampening=0, weight_decay=1e-4)


@pytest.mark.parametrize('name', PAPER)
def test_paper_recipes(name):
    recipe = RECIPES[name]
    # The authors' code divides in the 150th and the 225th epoch on CIFAR, and after the 30th and the 60th on ImageNet.
    drops = (149, 224, 300) if 'cifar' in name else (30, 60, 90)
    model, optimizer, scheduler, epochs = optimizer_and_scheduler(recipe)
    assert_papers_optimizer(model, optimizer)
    assert recipe['batch_size'] == (64 if 'cifar' in name else 256) and epochs == drops[-1]
    for epoch in range(epochs):
        assert optimizer.param_groups[0]['lr'] == pytest.approx(0.1 ** sum(epoch >= drop for drop in (0, *drops)))
        scheduler.step(epoch + 1)
    # No augmentation, regularisation or averaging that the paper does not have.
    assert recipe['smoothing'] == 0 and not {'aa', 'mixup', 'cutmix', 'reprob', 'drop', 'model_ema'} & set(recipe)
    assert recipe['train_crop_mode'] == ('pad4' if 'cifar' in name else 'rrc+lighting')


@pytest.mark.parametrize('recipe, cycles, cycle', [
    *((RECIPES[name], 6, 50) for name in SNAPSHOTS), (SNAPSHOTS_LAPTOP, 3, 3)], ids=[*SNAPSHOTS, 'laptop'])
def test_snapshot_recipes(recipe, cycles, cycle):
    """Cycles of one length from the full rate to none (Huang et al. 2017, equation 2), and each end is kept."""
    model, optimizer, scheduler, epochs = optimizer_and_scheduler(recipe)
    assert_papers_optimizer(model, optimizer)
    assert epochs == cycles * cycle and recipe['checkpoint_hist'] == cycles
    for epoch in range(epochs):
        for update in (0, 9):
            scheduler.step_update(10 * epoch + update)
            position = (10 * epoch + update) % (10 * cycle) / (10 * cycle)
            assert optimizer.param_groups[0]['lr'] == pytest.approx(0.05 * (1 + math.cos(math.pi * position)))
    # train.py saves after every epoch whose number, from 1, is a multiple of val_interval.
    ends = [epoch for epoch in range(epochs) if (epoch + 1) % recipe['val_interval'] == 0]
    assert ends == list(range(cycle - 1, epochs, cycle))


@pytest.mark.parametrize('name', [name for name in RECIPES if name not in PAPER + SNAPSHOTS])
def test_other_recipes_exempt_norms_and_anneal(name):
    recipe = RECIPES[name]
    if recipe['sched'] == 'wsd':
        pytest.importorskip('timm.scheduler.wsd_lr', reason='needs timm 1.0.31')
    model, optimizer, scheduler, epochs = optimizer_and_scheduler(recipe)
    # A fallback_list of Muon splits the weights that decay in two groups.
    decays = [0] + [recipe['weight_decay']] * (2 if 'fallback_list' in recipe.get('opt_kwargs', {}) else 1)
    assert sorted(group['weight_decay'] for group in optimizer.param_groups) == decays
    scheduler.step_update(epochs * 10)
    assert optimizer.param_groups[0]['lr'] <= recipe['lr'] / 1000
    assert all(p.ndim > 1 for g in optimizer.param_groups if g['weight_decay'] for p in g['params'])


def test_cost_table():
    text = (ROOT / 'recipes' / 'README.md').read_text()
    rows = re.findall(r'^\| (\w+) \| (\d+) \| ([\d.]+) \| ([\d.,]+) \|$', text, re.MULTILINE)
    # Those for CIFAR-100 have to do what those for CIFAR-10 do.
    assert {name for name, *_ in rows} == {
        name for name in RECIPES if name.endswith(('_paper', '_modern')) and 'cifar100' not in name}
    for name, *row in rows:
        recipe = RECIPES[name]
        images = recipe['epochs'] * (50_000 if 'cifar' in name else 1_281_167)
        pmacs = 3 * images * model_infos()[recipe['model']].gmacs / 1e6
        assert row == [str(recipe['epochs']), f'{images / 1e6:.1f}', f'{pmacs:,.1f}']


@timm_checkout
def test_keys_are_options_of_train_py(run, checkout):
    code = "import runpy, sys; print(*(a.dest for a in runpy.run_path(sys.argv[1])['parser']._actions))"
    result = run('-c', code, checkout / 'train.py', cwd='/')
    assert {key for recipe in RECIPES.values() for key in recipe} <= set(result.stdout.split()), result.stderr


@pytest.fixture
def train(tmp_path, monkeypatch):
    """cifar_gpu.py with a network of a few channels, on 22 images of two classes, five batches of 4."""
    generator = np.random.default_rng(0)
    for split, count in (('train', 22), ('test', 8)):
        save_images(tmp_path / 'data' / split, generator.integers(256, size=(count, 16, 16, 3), dtype=np.uint8))
    create = functools.partial(timm.create_model, num_classes=2, **TINY['gunn15'])
    monkeypatch.setattr(cifar_gpu.timm, 'create_model', create)

    def train(name, *options):
        return cifar_gpu.main([
            '--data-dir', f'{tmp_path}/data', '--checkpoint', f'{tmp_path}/{name}.ckpt', '--device', 'cpu', '-b', '4',
            '--out', f'{tmp_path}/{name}.safetensors', '--epochs', '2', *options])

    return train


@pytest.mark.parametrize('options', [
    ['--amp', 'float32'], ['--ema', '0.5', '--smoothing', '0.1', '--sched', 'cosine'], ['--amp', 'float16']])
def test_cifar_gpu_ends_as_an_uncut_run(options, train, tmp_path, capsys):
    assert train('whole', *options) == 0
    whole, = map(json.loads, capsys.readouterr().out.splitlines())
    assert train('cut', '--minutes', '0', *options) == 0 and not (tmp_path / 'cut.safetensors').exists()
    assert train('cut', '--seed', '1', *options) == 2
    assert 'is of a run with another seed' in capsys.readouterr().err
    for wrong, message in ('whole.safetensors', 'is no checkpoint of this script'), ('no/x.ckpt', 'There is no folder'):
        assert train('cut', '--checkpoint', f'{tmp_path}/{wrong}', *options) == 2
        assert message in capsys.readouterr().err
    assert train('cut', '--minutes', '0', *options) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == whole
    assert whole['epoch'] == 2 and 0 <= whole['top1'] <= 100
    models = [cifar_gpu.timm.create_model('gunn15') for _ in range(3)]
    for model, name in zip(models, ('whole', 'cut')):
        load_checkpoint(model, tmp_path / f'{name}.safetensors')
    initial, (first, second) = models.pop().state_dict(), (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) and not torch.equal(first[key], initial[key]) for key in first)
    # The average is what is written, but not what is trained on.
    trained = safetensors.torch.load_file(tmp_path / 'whole.ckpt')
    assert torch.equal(trained['model.fc.weight'], first['fc.weight']) is ('--ema' not in options)


def test_cifar_gpu_takes_the_papers_steps(train):
    """The optimiser, the learning rates, the crops and the flips."""
    args = cifar_gpu._parser().parse_args('--data-dir . --checkpoint . --out . -b 2 --device cpu'.split())
    trainer = cifar_gpu._Trainer(args, torch.randn(2, 24, 24, 3).bfloat16(), torch.tensor([0, 1]))
    assert trainer.train_epoch() > 0
    assert_papers_optimizer(trainer.model, trainer.optimizer)
    rates = [cifar_gpu._learning_rate(args, epoch, 0.5) for epoch in range(args.epochs)]
    assert rates == pytest.approx([0.1] * 149 + [0.01] * 75 + [0.001] * 76)
    args.sched = 'cosine'
    assert cifar_gpu._learning_rate(args, 149, 1.) == pytest.approx(0.05)
    images = torch.arange(2 * 12 * 13 * 3, dtype=torch.float).view(2, 12, 13, 3)
    index = torch.tensor([1, 0]).repeat(200)
    found = cifar_gpu._augment(images, index)
    crops = [images[:, top:top + 4, left:left + 5].permute(0, 3, 1, 2) for top in range(9) for left in range(9)]
    crops = torch.stack([view for crop in crops for view in (crop, crop.flip(3))])
    which = (found == crops[:, index]).flatten(2).all(2)
    assert (which.sum(0) == 1).all() and which.any(1).sum() > 120
