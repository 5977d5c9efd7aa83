"""The ablation around the trainings: what it runs, what it goes on from, and what it makes of their logs."""
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from conftest import ROOT

sys.path.insert(0, str(ROOT / 'experiments'))
import ablation  # noqa: E402


def train(command):
    """Log what timm's train.py would. The first network's training is cut in its first seed, until it is resumed."""
    options = dict(zip(command, command[1:]))
    log, seed = Path(options['--output'], options['--experiment'], 'summary.csv'), int(options['--seed'])
    log.parent.mkdir(parents=True, exist_ok=True)
    log.with_name('last.pth.tar').touch()
    resumed = options.get('--resume') == str(log.with_name('last.pth.tar'))
    epochs = (2, 3, 4) if resumed else (0, 1) if log.parent.name == 'sunn15-0' else range(5)
    with log.open('a') as file:
        file.write('' if resumed else 'epoch,train_loss,eval_top1\n')
        file.writelines(f'{epoch},2,{10 * epoch + len(options["--model"]) + seed}\n' for epoch in epochs)
    return SimpleNamespace(returncode=len(epochs) == 2)


def test_cut_runs_go_on_and_finished_ones_are_kept(tmp_path, capsys, monkeypatch):
    run = mock.Mock(side_effect=train)
    monkeypatch.setattr(ablation.subprocess, 'run', run)
    for split in ('train', 'test'):
        (tmp_path / split).mkdir()
    arguments = f'--budget laptop --train-script {__file__} --data-dir {tmp_path} --out {tmp_path} --seeds 0 2'.split()
    assert ablation.main(arguments) == 2
    assert 'error: Training sunn15-0 failed; its output is above.' in capsys.readouterr().err
    assert ablation.main(arguments) == ablation.main(arguments) == 0 and run.call_count == 1 + 6
    # 100 less the last epoch's 40, the length of 'sunn15.cifar10', and the seed.
    assert '| sunn15 | 45.00 ± 1.41 | 2 | 5.64 |' in (tmp_path / 'table.md').read_text()
    assert (tmp_path / 'curves.png').is_file()
