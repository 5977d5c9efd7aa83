"""The recipes, as far as they can be checked without running them: what timm makes of them."""
import argparse
import math
import re

import pytest
import timm
import torch
import yaml
from conftest import ROOT, timm_checkout
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from gunn_timm.zoo.records import model_infos, weights_records

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
        assert all((ROOT / recipe).is_file() for recipe in record.training['recipe'])
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
    model, optimizer, scheduler, epochs = optimizer_and_scheduler(recipe)
    assert sorted(group['weight_decay'] for group in optimizer.param_groups) == [0, recipe['weight_decay']]
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
