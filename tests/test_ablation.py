"""The ablation around the trainings: what it runs, what it goes on from, and what it makes of their logs."""
import importlib.util
import json
import sys

import pytest
import yaml
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'experiments'))
spec = importlib.util.spec_from_file_location('ablation', ROOT / 'experiments' / 'ablation.py')
ablation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablation)

# Leaves the log that timm's train.py leaves, and fails once in the middle if it is told to.
SCRIPT = '''
import argparse, os, pathlib, yaml
parser = argparse.ArgumentParser()
for name in ('-c', '--model', '--output', '--experiment', '--resume', '--data-dir', '--dataset', '--train-split',
             '--val-split'):
    parser.add_argument(name)
parser.add_argument('--seed', type=int)
args = parser.parse_args()
if os.environ['RANK'] == '0':
    folder = pathlib.Path(args.output, args.experiment)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / 'summary.csv'
    epochs = yaml.safe_load(open(args.c))['epochs']
    start = 3 if args.resume else 0
    stop = 3 if args.seed == 7 and not args.resume else epochs
    with log.open('a') as file:
        if not args.resume:
            print('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr', file=file)
        for epoch in range(start, stop):
            top1 = len(args.model) + args.seed + epoch
            print(f'{epoch},{2 - epoch / 10},2,{top1},90,0.1', file=file)
    (folder / 'last.pth.tar').touch()
    assert stop == epochs, 'cut'
'''


@pytest.fixture
def arguments(tmp_path):
    for split in ('train', 'test'):
        (tmp_path / 'data' / split).mkdir(parents=True)
    (tmp_path / 'train.py').write_text(SCRIPT)
    return ['--budget', 'laptop', '--train-script', str(tmp_path / 'train.py'), '--data-dir', str(tmp_path / 'data'),
            '--processes', '1', '--out', str(tmp_path / 'out')]


def write_log(tmp_path, name, last_top1):
    folder = tmp_path / 'out' / 'runs' / name
    folder.mkdir(parents=True)
    rows = [f'{epoch},1,2,{last_top1 if epoch == 4 else 10},90,0.1' for epoch in range(5)]
    (folder / 'summary.csv').write_text('\n'.join(['epoch,train_loss,eval_loss,eval_top1,eval_top5,lr', *rows]))


def test_results_table_and_plot(arguments, tmp_path, capsys):
    assert ablation.main([*arguments, '--seeds', '0']) == 0
    assert '| sunn15 | 82.00 | 1 | 5.64 |' in capsys.readouterr().out
    # What is there is not trained again.
    (tmp_path / 'train.py').write_text('raise SystemExit(1)')
    for network, last_top1 in (('sunn15', 20), ('gunn15_nores', 30), ('gunn15', 40)):
        write_log(tmp_path, f'{network}-2', last_top1)
    assert ablation.main([*arguments, '--seeds', '0', '2']) == 0
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert [(run['network'], run['seed']) for run in results['runs']] == [
        (network, seed) for seed in (0, 2) for network in ('sunn15', 'gunn15_nores', 'gunn15')]
    # 100 less the last of five epochs: what the script wrote for seed 0, and what stands above for seed 2.
    assert '| sunn15 | 81.00 ± 1.41 | 2 | 5.64 |' in (tmp_path / 'out' / 'table.md').read_text()
    assert '| gunn15_nores | 73.00 ± 4.24 | 2 | - |' in capsys.readouterr().out
    assert (tmp_path / 'out' / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_a_cut_run_goes_on(arguments, tmp_path, capfd):
    assert ablation.main([*arguments, '--seeds', '7']) == 2
    assert 'error: Training sunn15-7 failed; its output is above.' in capfd.readouterr().err
    assert not (tmp_path / 'out' / 'results.json').exists()
    for network in ('gunn15_nores', 'gunn15'):
        write_log(tmp_path, f'{network}-7', 50)
    assert ablation.main([*arguments, '--seeds', '7']) == 0
    curve = json.loads((tmp_path / 'out' / 'results.json').read_text())['runs'][0]['curve']
    assert [row['epoch'] for row in curve] == [0, 1, 2, 3, 4]


def test_what_is_missing_is_said(arguments, tmp_path, capsys):
    (tmp_path / 'train.py').unlink()
    assert ablation.main(arguments) == 2
    assert capsys.readouterr().err == f"error: There is no '{tmp_path}/train.py'.\n"


def test_budgets_train_by_the_papers_optimizer():
    laptop, paper = (yaml.safe_load(ablation.RECIPES[budget].read_text()) for budget in ('laptop', 'gpu'))
    for key in ('opt', 'momentum', 'weight_decay', 'opt_kwargs', 'lr', 'smoothing'):
        assert laptop[key] == paper[key], key
