"""`python -m gunn_timm run`: timm's scripts with our models, errors and exit codes as they are."""
from pathlib import Path

import pytest
import timm


@pytest.fixture
def script(tmp_path):
    """A script in a folder that, like a checkout of timm, has a folder `timm` of its own."""
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / '__init__.py').write_text("__version__ = 'shadow'")
    (tmp_path / 'sibling.py').write_text('VALUE = 3')
    return tmp_path / 'script.py'


def test_arguments_modules_and_errors(run, script):
    script.write_text('''
import sys, timm, sibling
print(sys.argv[1:], timm.is_model('gunn15'), timm.__version__ != 'shadow', __name__, sibling.VALUE)
raise KeyError('from the script')
''')
    result = run('-m', 'gunn_timm', 'run', script, '--model', 'gunn15', '-b', '2', '--help')
    assert result.stdout.strip() == "['--model', 'gunn15', '-b', '2', '--help'] True True __main__ 3"
    assert result.returncode == 1 and "KeyError: 'from the script'" in result.stderr


def test_called_in_a_checkout_of_timm(run, tmp_path):
    """`python -m` puts the current folder first on the path, and with it the checkout's timm."""
    (tmp_path / 'timm').symlink_to(Path(timm.__file__).parent)
    (tmp_path / 'script.py').write_text(
        'import sys, timm; print(timm.__file__, timm.is_model("gunn15"), sys.argv[1:]); sys.exit(7)')
    result = run('-m', 'gunn_timm', 'run', 'script.py', '-x', cwd=tmp_path)
    assert result.stdout.split() == [timm.__file__, 'True', "['-x']"], result.stderr
    assert result.returncode == 7


def test_under_torchrun(run, script):
    script.write_text('''
import torch, timm
from timm.task import ClassificationTask
torch.distributed.init_process_group('gloo')
model = timm.create_model('gunn15', channels=(8, 12, 12), segments=(2, 3, 2))
task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), device=torch.device('cpu'), verbose=False)
task.prepare_distributed(device_ids=[torch.device('cpu')])
torch.manual_seed(torch.distributed.get_rank())
task(torch.randn(4, 3, 16, 16), torch.arange(4))['loss'].backward()
total = sum(p.grad.double().abs().sum() for p in model.parameters())
both = [torch.zeros_like(total) for _ in range(2)]
torch.distributed.all_gather(both, total)
assert both[0] == both[1] > 0
torch.distributed.destroy_process_group()
''')
    result = run('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2, '-m', 'gunn_timm', 'run', script)
    assert result.returncode == 0, result.stderr
