"""`python -m gunn_timm run`: timm's scripts with our models, errors and exit codes as they are."""
from pathlib import Path

import pytest
import timm

SCRIPT = '''
import sys
import timm
import sibling
print(sys.argv[1:], timm.is_model('gunn15'), timm.__version__ != 'shadow', __name__, sibling.VALUE)
if 'fail' in sys.argv:
    raise KeyError('from the script')
sys.exit(7)
'''


@pytest.fixture
def script(tmp_path):
    """A script in a folder that, like a checkout of timm, has a folder `timm` of its own."""
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / '__init__.py').write_text("__version__ = 'shadow'")
    (tmp_path / 'sibling.py').write_text('VALUE = 3')
    (tmp_path / 'script.py').write_text(SCRIPT)
    return tmp_path / 'script.py'


def test_arguments_exit_code_and_modules(run, script):
    result = run('-m', 'gunn_timm', 'run', script, '--model', 'gunn15', '-b', '2', '--help')
    assert result.stdout.strip() == "['--model', 'gunn15', '-b', '2', '--help'] True True __main__ 3"
    assert result.returncode == 7


def test_called_in_a_checkout_of_timm(run, tmp_path):
    """`python -m` puts the current folder first on the path, and with it the checkout's timm."""
    (tmp_path / 'timm').symlink_to(Path(timm.__file__).parent)
    (tmp_path / 'script.py').write_text('import sys, timm; print(timm.__file__, timm.is_model("gunn15"), sys.argv[1:])')
    result = run('-m', 'gunn_timm', 'run', 'script.py', '-x', cwd=tmp_path)
    assert result.stdout.split() == [timm.__file__, 'True', "['-x']"], result.stderr


def test_errors_pass_through(run, script):
    result = run('-m', 'gunn_timm', 'run', script, 'fail')
    assert result.returncode == 1
    assert "KeyError: 'from the script'" in result.stderr


def test_missing_script(run):
    result = run('-m', 'gunn_timm', 'run', 'missing.py')
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr == "error: No script 'missing.py'; give the path of a Python file, timm's train.py say.\n"


def test_under_torchrun(run, script):
    script.write_text('''
import os
import torch
import timm
from timm.task import ClassificationTask
torch.distributed.init_process_group('gloo')
torch.manual_seed(0)
model = timm.create_model('gunn15', channels=(8, 12, 12), segments=(2, 3, 2))
task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), device=torch.device('cpu'), verbose=False)
task.prepare_distributed(device_ids=[torch.device('cpu')])
rank = int(os.environ['RANK'])
torch.manual_seed(rank)
task(torch.randn(4, 3, 16, 16), torch.arange(4))['loss'].backward()
total = sum(p.grad.double().abs().sum() for p in model.parameters())
both = [torch.zeros_like(total) for _ in range(2)]
torch.distributed.all_gather(both, total)
if rank == 0:
    print('same gradients', bool(both[0] == both[1]), bool(total > 0))
torch.distributed.destroy_process_group()
''')
    result = run('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, '-m', 'gunn_timm', 'run', script)
    assert result.returncode == 0, result.stderr
    assert 'same gradients True True' in result.stdout
