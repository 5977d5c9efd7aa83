"""Algorithm 1 on two ranks: as one process on the joined batch, whatever wraps the model."""
from conftest import ROOT

KINDS = ['plain', 'static', 'unused', 'bucket_view', 'accumulate', 'sync_bn', 'fsdp', 'fsdp_keep', 'fsdp_sync_bn']


def test_two_ranks_are_one(run):
    result = run('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2,
                 ROOT / 'tests' / 'distributed_script.py', *KINDS, env={'PYTHONPATH': str(ROOT / 'tests')})
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == KINDS
