"""The benchmark on networks of a few channels: it runs, counts right, and its baseline is what it is said to be."""
import json
import sys

import pytest
import timm
import torch
from conftest import ROOT
from torch._dynamo.utils import counters

sys.path.insert(0, str(ROOT / 'benchmarks'))
import run as benchmark  # noqa: E402
import subjects  # noqa: E402
from measure import Workload, gmacs, peak_memory, profile, step_times, traffic  # noqa: E402


@pytest.mark.parametrize('suite', ['cpu', 'cuda'])
def test_short_version(suite, tmp_path, capsys):
    argv = ['--suite', suite, '--device', 'cpu', '--tiny', '--rounds', '1', '--out', str(tmp_path)]
    assert benchmark.main(argv) == 0
    results = json.loads((tmp_path / 'results.json').read_text())
    assert not any('error' in row for row in results['rows'])
    assert all(row['seconds'] > 0 and row['gmacs'] > 0 for row in results['rows'] if row['timed'])
    assert (tmp_path / 'tables.md').read_text() in capsys.readouterr().out
    assert (tmp_path / 'scaling.png').is_file() is (suite == 'cpu')


@pytest.mark.parametrize('name', ['gunn15', 'resnet101'])
@pytest.mark.parametrize('mode', ['compiled', 'units compiled'])
def test_compiled_modes_compute_the_same(name, mode):
    torch.compiler.reset()
    counters.clear()
    eager, compiled = (Workload(subjects.create(name, tiny=True), 2, 32, False, mode=m) for m in ('eager', mode))
    torch.testing.assert_close(compiled.step(), eager.step(), rtol=1e-4, atol=1e-4)
    # Units of three layers, or one whole network, ours or a peer without units.
    assert counters['stats']['unique_graphs'] == (3 if (name, mode) == ('gunn15', 'units compiled') else 1)


def test_a_network_that_fails_leaves_the_others(tmp_path, capsys, monkeypatch):
    create = subjects.create

    def fail(name, tiny):
        if name == 'sunn18':
            raise RuntimeError('out of memory')
        return create(name, tiny)

    monkeypatch.setattr(subjects, 'create', fail)
    assert benchmark.main(['--device', 'cpu', '--tiny', '--rounds', '1', '--out', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert 'gunn18 over sunn18 | - | 1.15 | not measured |' in out and '| out of memory |' in out


def test_profile_shares_are_of_the_wall_time():
    workload = Workload(torch.nn.Conv2d(16, 16, 3, padding=1), 8, 64, False, in_chans=16)
    shares = profile(workload, top=3)
    assert len(shares) == 4 and sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.get) in ('mkldnn_convolution', '_slow_conv2d_forward')
    assert all(-0.05 <= share <= 1 for share in shares.values())


def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert benchmark.main(['--suite', 'cuda']) == 2
    assert capsys.readouterr().err.startswith('error: --suite cuda needs a CUDA device')


def test_grouped_baseline_is_the_same_network():
    """Its weights are the units', put side by side; what it computes is then the same."""
    sunn, grouped = subjects.create('sunn18', tiny=True), subjects.create('sunn18:grouped', tiny=True)
    assert sum(p.numel() for p in sunn.parameters()) == sum(p.numel() for p in grouped.parameters())
    grouped.load_state_dict(sunn.state_dict(), strict=False)
    for a, b in zip(sunn.stages, grouped.stages):
        for part in ('conv1', 'conv2', 'conv3'):
            states = [getattr(unit.blocks[0], part).state_dict() for unit in a.layer.units]
            getattr(b.layer, part).load_state_dict({
                key: torch.cat([s[key] for s in states]) if states[0][key].ndim else states[0][key]
                for key in states[0]})
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(grouped.eval()(x), sunn.eval()(x))
    assert gmacs(grouped, 64) == pytest.approx(gmacs(sunn, 64))


def test_peak_memory_counts_what_is_held():
    model = torch.nn.Sequential(*[torch.nn.Conv2d(4, 4, 1, bias=False) for _ in range(8)])
    size = 4 * 8 * 4 * 32 * 32
    infer = peak_memory(Workload(model, 8, 32, False, in_chans=4))
    train = peak_memory(Workload(model, 8, 32, True, in_chans=4))
    # Without gradients there is one input and one output at a time (the first input is not the step's), with them every
    # convolution keeps its input, and the loss three more. Workspaces come on top.
    assert 2 * size <= infer < 4 * size
    assert 7 * size <= train < 14 * size


def test_traffic_and_gmacs_of_one_convolution():
    model = torch.nn.Conv2d(4, 8, 1, bias=False)
    workload = Workload(model, 2, 16, False, in_chans=4)
    assert traffic(workload) == 4 * (2 * 4 * 256 + 32 + 2 * 8 * 256)
    assert gmacs(model, 16, in_chans=4) == 4 * 8 * 256 / 1e9


def test_rounds_interleave():
    order = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def timed(self):
            order.append(self.name)
            return len(order)

    assert step_times({'a': Fake('a'), 'b': Fake('b')}, 2) == {'a': [3, 5], 'b': [4, 6]}
    assert order == list('ababab')


@pytest.mark.parametrize('name', ['gunn18:plain', 'gunn18:fused'])
def test_forms(name):
    model, base = subjects.create(name, tiny=True).eval(), timm.create_model('gunn18', **subjects.TINY['gunn18']).eval()
    base.load_state_dict(subjects.create('gunn18', tiny=True).state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), base(x), rtol=1e-4, atol=1e-5)
