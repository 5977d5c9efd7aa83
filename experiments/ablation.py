#!/usr/bin/env python3
"""Table 5 and Figure 3 of the paper: what channel ordering and residual learning do to the error.

    python experiments/ablation.py --budget laptop --train-script TIMM/train.py --data-dir DIR
    python experiments/ablation.py --budget gpu --seeds 0 1 2 --train-script TIMM/train.py --data-dir DIR

Trains sunn15, gunn15_nores and gunn15 on CIFAR-10 by one recipe, each with every seed, and writes results.json,
table.md and curves.png to the folder given by --out. A run that is there already is not trained again, one that was cut
goes on.
TIMM is a checkout of pytorch-image-models; DIR has the folders train/CLASS and test/CLASS.
"""
import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import yaml
from curves import Curve, draw_curves, spread

from gunn_timm.zoo.files import write_file
from gunn_timm.zoo.records import model_infos

NETWORKS = ('sunn15', 'gunn15_nores', 'gunn15')
# The recipe, the processes that its batch size is for, and what the results are called.
BUDGETS = {
    'laptop': (
        Path(__file__).parent / 'ablation_laptop.yaml', 2,
        'gunn15 and its baselines on CIFAR-10 for two CPU cores: 5 epochs of 7,680 images each, at 16x16 pixels'),
    'gpu': (
        Path(__file__).parents[1] / 'recipes' / 'gunn15_cifar10_paper.yaml', 1,
        "gunn15 and its baselines on CIFAR-10 by the paper's recipe, 300 epochs"),
}
# The recipe of the paper names torchvision's dataset, which is downloaded; here the data are folders in both cases.
FOLDERS = ('--dataset', '', '--train-split', 'train', '--val-split', 'test')


def _read_curve(path: Path) -> List[Dict[str, float]]:
    if not path.is_file():
        return []
    with path.open() as file:
        # A resumed run may write the header, or the epoch that it was in, once more.
        rows = {row['epoch']: row for row in csv.DictReader(file) if row['epoch'] != 'epoch'}
    return [{key: float(value) for key, value in row.items()} for row in rows.values()]


def _train(network: str, seed: int, recipe: Path, args: argparse.Namespace) -> List[Dict[str, float]]:
    """Train one network, unless that was done, and return a row an epoch."""
    epochs = yaml.safe_load(recipe.read_text())['epochs']
    name = f'{args.budget}-{network}-{seed}'
    folder = args.out / 'runs' / name
    curve = _read_curve(folder / 'summary.csv')
    if len(curve) < epochs:
        command = [
            sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', str(args.processes), '-m', 'gunn_timm',
            'run', str(args.train_script), '-c', str(recipe), '--model', f'{network}.cifar10', '--seed', str(seed),
            '--data-dir', str(args.data_dir), '--output', str(args.out / 'runs'), '--experiment', name, *FOLDERS]
        if (folder / 'last.pth.tar').is_file():
            command += ['--resume', str(folder / 'last.pth.tar')]
        print(f'training {name}', file=sys.stderr)
        if subprocess.run(command).returncode:
            raise RuntimeError(f'Training {name} failed; its output is above. What is done is kept in {folder}.')
        curve = _read_curve(folder / 'summary.csv')
    if [row['epoch'] for row in curve] != list(range(epochs)):
        raise ValueError(
            f"'{folder}/summary.csv' does not have the {epochs} epochs of {recipe.name}; remove the folder to train "
            'anew.')
    return curve


def table(results: Dict[str, Any]) -> str:
    """Write the last epoch's test errors, in %, as Markdown, beside those of the paper.

    Args:
        results: What results.json has.
    """
    lines = ['| network | test error, mean ± standard deviation | seeds | paper |', '| --- | --- | --- | --- |']
    for network in NETWORKS:
        errors = [100 - run['curve'][-1]['eval_top1'] for run in results['runs'] if run['network'] == network]
        paper = model_infos()[f'{network}.cifar10'].paper_top1_err
        lines.append(f"| {network} | {spread(errors)} | {len(errors)} | {'-' if paper is None else paper} |")
    return '\n'.join(lines)


def plot(results: Dict[str, Any], path: Path) -> None:
    """Draw the test error and the training loss against the epoch, as Figure 3 does; a line a run.

    Args:
        results: What results.json has.
        path: PNG file to write.
    """
    figure = draw_curves({
        network: [
            Curve([row['epoch'] + 1 for row in run['curve']], [100 - row['eval_top1'] for row in run['curve']],
                  [row['train_loss'] for row in run['curve']])
            for run in results['runs'] if run['network'] == network]
        for network in NETWORKS})
    figure.suptitle(results['what'])
    figure.savefig(path, dpi=110)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the experiment.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0, or 2 where the input is at fault or a training failed, after one line on stderr.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--budget', choices=BUDGETS, required=True, help='laptop: two cores, minutes; gpu: the paper')
    parser.add_argument('--train-script', type=Path, required=True, metavar='FILE', help="timm's train.py")
    parser.add_argument('--data-dir', type=Path, required=True, metavar='DIR', help='CIFAR-10 as folders')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1], metavar='N', help='seeds (default: 0 1)')
    parser.add_argument('--processes', type=int, metavar='N', help='processes (default: laptop 2, gpu 1)')
    parser.add_argument('--out', type=Path, default=Path('output/ablation'), metavar='DIR', help='folder to write to')
    args = parser.parse_args(argv)
    recipe, processes, what = BUDGETS[args.budget]
    args.processes = processes if args.processes is None else args.processes
    try:
        for path in (args.train_script, args.data_dir / 'train', args.data_dir / 'test'):
            if not path.exists():
                raise FileNotFoundError(f"There is no '{path}'.")
        results = dict(
            budget=args.budget,
            what=what,
            runs=[dict(network=network, seed=seed, curve=_train(network, seed, recipe, args))
                  # All networks of a seed before the next seed, so that a cut experiment has whole comparisons.
                  for seed in args.seeds for network in NETWORKS])
    except (OSError, RuntimeError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
    write_file(args.out / 'results.json', (json.dumps(results, indent=1) + '\n').encode())
    write_file(args.out / 'table.md', f"{results['what']}\n\n{table(results)}\n".encode())
    plot(results, args.out / 'curves.png')
    print(table(results))
    return 0


if __name__ == '__main__':
    sys.exit(main())
