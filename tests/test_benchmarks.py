"""The benchmark on networks of a few channels: it runs, counts right, and its baseline is what it is said to be."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch._dynamo.utils import counters

sys.path.insert(0, str(ROOT / 'benchmarks'))
import measure  # noqa: E402
import run as benchmark  # noqa: E402
import subjects  # noqa: E402
from measure import Workload, gmacs, peak_memory, step_times, traffic  # noqa: E402


@pytest.mark.parametrize('suite', ['cpu', 'cuda'])
def test_short_version(suite, tmp_path, capsys, monkeypatch):
    """A network that fails leaves the others."""
    create, layer_point = subjects.create, benchmark._layer_point

    def create_or_fail(name, tiny):
        if name == 'sunn18':
            raise RuntimeError('out of memory')
        return create(name, tiny)

    monkeypatch.setattr(subjects, 'create', create_or_fail)
    monkeypatch.setattr(benchmark, '_layer_point', lambda what, *sizes: layer_point(what, 8, 2, 2, 4, sizes[-1]))
    assert benchmark.main(f'--suite {suite} --device cpu --tiny --rounds 1 --out {tmp_path}'.split()) == 0
    rows = json.loads((tmp_path / 'results.json').read_text())['rows']
    assert {(row['name'], row['error']) for row in rows if 'error' in row} == {('sunn18', 'out of memory')}
    assert all(row['seconds'] > 0 and row['gmacs'] > 0 for row in rows if row['timed'] and 'error' not in row)
    assert {row['dtype'] for row in rows} == {'bfloat16', 'float32' if suite == 'cpu' else 'float16'}
    tables, printed = (tmp_path / 'tables.md').read_text(), capsys.readouterr()
    assert tables in printed.out and '| out of memory |' in tables
    assert ('s on an H100, assuming' in printed.err) is (suite == 'cuda')
    extras = ['sunn18 | - | 1.15 | not measured |' in tables, (tmp_path / 'scaling.png').is_file()]
    assert extras == [suite == 'cpu'] * 2


def test_results_are_written_after_every_case(tmp_path, monkeypatch):
    """Of what was asked for, in a run that is cut; timing that fails is recorded."""
    measured = []

    def fail_or_cut(workloads, rounds):
        measured.append(list(workloads))
        raise AssertionError('timing') if len(measured) == 1 else KeyboardInterrupt

    monkeypatch.setattr(measure, 'step_times', fail_or_cut)
    arguments = f'--suite cuda --device cpu --tiny --out {tmp_path} --only'.split()
    with pytest.raises(KeyboardInterrupt):
        benchmark.main([*arguments, 'gunn15', 'eager', 'train'])
    assert measured == [['gunn15'], ['gunn15']]
    rows = json.loads((tmp_path / 'results.json').read_text())['rows']
    assert [(row['name'], row['dtype'], row['error']) for row in rows] == [('gunn15', 'bfloat16', 'timing')]
    assert benchmark.main([*arguments, 'gunn16']) == 2


def test_networks_that_are_compared_have_as_many_classes():
    for names, classes in ((('gunn15', 'sunn15', 'gunn24'), 10), (('gunn18', 'sunn18', 'wide_gunn18'), 1000)):
        assert {subjects.create(name, tiny=True).num_classes for name in names} == {classes}


def test_cuda_suite_fits_eight_minutes_by_its_estimate():
    assert sum(benchmark._estimate(case, 3) for case in benchmark._CUDA_SHORT) < 480
    forms = {name for case in benchmark._CUDA_SHORT for name in case.names}
    assert {'gunn18:plain', 'gunn18:fused', 'sunn18:grouped'} <= forms
    cases = benchmark._cuda_cases()
    assert len(set(cases)) == len(cases)


@pytest.mark.parametrize('name, graphs', [('gunn15', 3), ('resnet101', 1)])
def test_compiled_units_compute_the_same(name, graphs):
    torch.compiler.reset()
    counters.clear()
    eager, compiled = (Workload(subjects.create(name, True), 2, 32, False, mode=m) for m in ('eager', 'units compiled'))
    torch.testing.assert_close(compiled.step(), eager.step(), rtol=1e-4, atol=1e-4)
    # Units of three layers, or a peer, which has none, as a whole.
    assert counters['stats']['unique_graphs'] == graphs


def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert benchmark.main(['--suite', 'cuda']) == 2
    assert capsys.readouterr().err.startswith('error: --suite cuda needs a CUDA device')


def test_grouped_baseline_is_the_same_network():
    """With the units' weights put side by side."""
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
    # Without gradients one input and one output at a time, but for the first input; with them every convolution keeps
    # its input, and the loss three more. Workspaces come on top.
    assert 2 * size <= infer < 4 * size
    assert 7 * size <= train < 14 * size


def test_traffic_and_gmacs_of_one_convolution():
    model = torch.nn.Conv2d(4, 8, 1, bias=False)
    workload = Workload(model, 2, 16, False, in_chans=4)
    assert traffic(workload) == 4 * (2 * 4 * 256 + 32 + 2 * 8 * 256)
    assert gmacs(model, 16, in_chans=4) == 4 * 8 * 256 / 1e9


def test_rounds_interleave():
    order = []
    fakes = {name: SimpleNamespace(timed=lambda name=name: order.append(name) or len(order)) for name in 'ab'}
    assert step_times(fakes, 2) == {'a': [3, 5], 'b': [4, 6]} and order == list('ababab')
