"""Algorithm 1 on two ranks: as one process on the joined batch, whatever wraps the model."""
import pytest
from conftest import ROOT


@pytest.mark.parametrize('kinds', [
    ['plain', 'fsdp'], pytest.param(['static', 'unused', 'accumulate'], marks=pytest.mark.slow)], ids=str)
def test_two_ranks_are_one(kinds, run):
    result = run('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2,
                 ROOT / 'tests' / 'distributed_script.py', *kinds, env={'PYTHONPATH': str(ROOT / 'tests')})
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == kinds
