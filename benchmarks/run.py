#!/usr/bin/env python3
"""Measure our networks against their unordered baselines and timm's peers, and print a table.

    python benchmarks/run.py                        the short version, for two CPU cores: under five minutes
    python benchmarks/run.py --full                 more networks, batches and data types
    python benchmarks/run.py --suite cuda           on a GPU: eager, in CUDA graphs, compiled; under eight minutes
    python benchmarks/run.py --suite cuda --full --only train gunn18 graph

Writes results.json, the tables as Markdown, and a plot of how time and memory grow, to the folder given by --out; the
first two after every case, so that a run that is cut leaves what it has measured.
"""
import argparse
import gc
import itertools
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import matplotlib
import measure
import subjects
import timm
import torch

from gunn_timm.layers import GunnLayer, set_backend
from gunn_timm.zoo.files import write_file

matplotlib.use('Agg')
from matplotlib import pyplot  # noqa: E402


class Case(NamedTuple):
    """Networks that are timed together, in interleaved rounds."""
    names: Sequence[str]
    train: bool
    batch_size: int
    image_size: int
    dtype: str = 'float32'
    mode: str = 'eager'
    timed: bool = True


class Target(NamedTuple):
    """A ratio of two networks of one case, and the most it should be."""
    what: str
    name: str
    over: str
    case: Case
    limit: Optional[float]


_TRAIN_160 = Case(('gunn18', 'sunn18', 'sunn18:grouped', 'resnet101'), True, 8, 160)
_TRAIN_32 = Case(('gunn15', 'sunn15'), True, 32, 32)
_PEERS = ('resnet101', 'resnext101_32x4d', 'densenet161')
_FUSED_PEERS = tuple(f'{peer}:fused' for peer in _PEERS)
_INFER_4 = Case(('gunn18:fused', 'wide_gunn18:fused', *_FUSED_PEERS), False, 4, 224)
_INFER_1 = Case(('gunn18:fused', *_FUSED_PEERS), False, 1, 224)
_MEMORY = Case(('gunn18', 'gunn18:plain'), True, 8, 160, timed=False)
_BF16 = Case(('gunn18', 'gunn18:plain', 'sunn18', 'sunn18:grouped', 'resnet101'), True, 8, 160, 'bfloat16')

_SHORT = [_TRAIN_160, _MEMORY, _TRAIN_32, _INFER_4, _INFER_1, _BF16]
_LONG = [
    Case(('wide_gunn18', 'gunn18'), True, 4, 160),
    Case(('gunn15', 'gunn15:plain', 'sunn15'), True, 32, 32, 'bfloat16'),
    Case(('gunn24', 'sunn24'), True, 4, 32),
    Case(('gunn15', 'gunn15:fused', 'sunn15'), False, 64, 32),
    Case(('gunn18',), True, 8, 160, mode='units compiled'),
    Case(('gunn15', 'sunn15'), True, 32, 32, 'bfloat16', 'units compiled'),
    Case(('gunn18',), True, 8, 160, mode='compiled'),
]
# Where the time goes, of what the targets compare.
_PROFILES = [
    Case(('gunn18', 'sunn18:grouped', 'resnet101'), True, 8, 160),
    *(Case(('gunn18:fused', 'resnet101:fused'), False, batch_size, 224) for batch_size in (4, 1)),
]
_TARGETS = [
    Target('time', 'gunn18', 'sunn18', _TRAIN_160, 1.15),
    Target('time', 'gunn18', 'sunn18:grouped', _TRAIN_160, 1.15),
    Target('time', 'gunn18', 'resnet101', _TRAIN_160, 1.1),
    Target('time', 'gunn18', 'sunn18:grouped', _BF16, 1.35),
    Target('time', 'gunn18', 'resnet101', _BF16, 1.15),
    Target('time', 'gunn15', 'sunn15', _TRAIN_32, 1.25),
    Target('memory', 'gunn18', 'sunn18', _TRAIN_160, 1.05),
    Target('memory', 'gunn18', 'sunn18', _BF16, 1.05),
    Target('memory', 'gunn18', 'sunn18:grouped', _TRAIN_160, 1.2),
    Target('memory', 'gunn18', 'gunn18:plain', _MEMORY, None),
    Target('memory', 'gunn18', 'gunn18:plain', _BF16, None),
    *(Target('time', 'gunn18:fused', peer, case, limit)
      for case in (_INFER_4, _INFER_1) for peer, limit in zip(_FUSED_PEERS, (1., None, 0.9))),
    Target('time per GMAC', 'wide_gunn18:fused', 'gunn18:fused', _INFER_4, 1.),
]
# The most telling first, for a run that is cut.
_CUDA_SHORT = [
    Case(('gunn18', 'sunn18:grouped', 'resnet101'), True, 64, 224, 'bfloat16', 'CUDA graph'),
    Case(('gunn15', 'gunn15:plain', 'sunn15'), True, 256, 32, 'bfloat16', 'CUDA graph'),
    Case(('gunn18:fused', 'resnet101'), False, 64, 224, 'bfloat16', 'CUDA graph'),
    Case(('gunn15', 'sunn15'), True, 256, 32, 'bfloat16'),
    Case(('gunn18', 'gunn18:plain', 'sunn18', 'sunn18:grouped', 'resnet101'), True, 64, 224, 'bfloat16'),
    Case(('gunn18', 'gunn18:fused', 'resnet101'), False, 64, 224, 'bfloat16'),
    Case(('gunn18:fused', 'resnet101'), False, 1, 224, 'bfloat16', 'CUDA graph'),
    Case(('gunn15',), True, 256, 32, 'float16'),
    Case(('gunn15',), True, 256, 32, 'float16', 'CUDA graph'),
    Case(('gunn18:fused',), False, 64, 224, 'float16', 'CUDA graph'),
    Case(('gunn15',), True, 256, 32, 'bfloat16', 'units compiled, CUDA graph'),
    Case(('gunn18',), True, 64, 224, 'bfloat16', 'units compiled, CUDA graph'),
]
_CUDA_224 = ('gunn18', 'gunn18:plain', 'gunn18:fused', 'wide_gunn18', 'wide_gunn18:fused', 'sunn18', 'sunn18:grouped',
             'resnet50', 'resnext50_32x4d', *_PEERS, 'densenet201', 'dpn98')
_CUDA_32 = ('gunn15', 'gunn15:plain', 'gunn15:fused', 'sunn15', 'gunn24', 'gunn24:plain', 'gunn24:fused')
# For the estimate of how long an H100 takes; none of it was measured. Seconds to prepare a network, to compile it, of a
# step in eager mode at the least; multiply-accumulates a second, and in one image's forward where it is not 8e9.
_PREPARE, _COMPILE, _EAGER_STEP, _RATE = 8, {'': 0, 'units': 40, 'whole': 150}, 0.05, 1e13
_MACS = {'gunn15': 0.56e9, 'sunn15': 0.56e9, 'gunn24': 10.7e9, 'wide_gunn18': 26.1e9}


def _cuda_cases() -> List[Case]:
    """Everything, hours of it; --only chooses. A captured graph keeps the memory of its step: one network a case."""
    return [
        Case((name,), train, batch, size, dtype, mode)
        for mode, dtype, train in itertools.product(measure.MODES, ('bfloat16', 'float16'), (True, False))
        for size, names, batches in ((224, _CUDA_224, (1, 64, 256)), (32, _CUDA_32, (1, 64, 256, 1024)))
        for batch, name in itertools.product(batches, names) if not (train and (batch == 1 or ':fused' in name))]


def _choose(cases: List[Case], words: Sequence[str]) -> List[Case]:
    """Keep the networks of each case whose line, as 'train gunn18 64 224 bfloat16 CUDA graph', has all the words."""
    def is_chosen(name: str, case: Case) -> bool:
        line = ' '.join(map(str, ('train' if case.train else 'infer', name, *case[2:6])))
        return all(word in line for word in words)

    chosen = [case._replace(names=tuple(name for name in case.names if is_chosen(name, case))) for case in cases]
    return [case for case in chosen if case.names]


def _estimate(case: Case, rounds: int) -> float:
    compiled, captured = measure.MODES[case.mode]
    macs = [_MACS.get(name.split(':')[0], 8e9) * case.batch_size * (3 if case.train else 1) for name in case.names]
    steps = (rounds + 1) * measure.STEPS_PER_TIMING
    return sum(_PREPARE + _COMPILE[compiled] + steps * max(m / _RATE, 0 if captured else _EAGER_STEP) for m in macs)


def _workload(model: torch.nn.Module, row: Dict[str, Any]) -> measure.Workload:
    return measure.Workload(
        model, row['batch_size'], row['image_size'], row['train'], row['device'], getattr(torch, row['dtype']),
        row['mode'])


def _rows(case: Case, device: str, tiny: bool) -> List[Dict[str, Any]]:
    batch_size, image_size = (2, 32) if tiny else (case.batch_size, case.image_size)
    return [
        dict(name=name, device=device, train=case.train, batch_size=batch_size, image_size=image_size,
             dtype=case.dtype, mode=case.mode, timed=case.timed)
        for name in case.names]


def _error(e: Exception) -> str:
    return (str(e) or type(e).__name__).split('\n')[0]


def _measure_case(case: Case, device: str, rounds: int, tiny: bool) -> List[Dict[str, Any]]:
    workloads, rows = {}, _rows(case, device, tiny)
    compiled, captured = measure.MODES[case.mode]
    for row in rows:
        try:  # out of memory, or what cannot be compiled or captured: the others still can
            model = subjects.create(row['name'], tiny)
            row['gmacs'] = measure.gmacs(model, row['image_size'])
            start = time.perf_counter()
            workload = _workload(model, row)
            if compiled:
                workload.step()
                row['first_step_seconds'] = time.perf_counter() - start
            if not captured:
                row['peak_bytes'] = measure.peak_memory(workload)
            if case.mode == 'eager':
                row['traffic_bytes'] = measure.traffic(workload)
            if device == 'cuda':
                row['launches'] = measure.kernel_launches(workload)
            workloads[row['name']] = workload
        except Exception as e:
            row['error'] = _error(e)
    if not case.timed:
        return rows
    try:
        seconds = measure.step_times(workloads, rounds)
        size = 64 if tiny else 8192 if device == 'cuda' else 2048
        rates = measure.peak_rates(device, getattr(torch, case.dtype), size) if case.mode == 'eager' else None
    except Exception as e:
        return [{'error': _error(e), **row} for row in rows]
    for row in rows:
        if row['name'] in seconds:
            row.update(measure.summary(seconds[row['name']], row['batch_size']))
            macs = row['gmacs'] * row['batch_size'] * (3 if case.train else 1)
            row['gmacs_per_second'] = macs / row['seconds']
            if rates:
                bound = max(2e9 * macs / rates[0], row['traffic_bytes'] / rates[1])
                row['roofline_share'] = bound / row['seconds']
    return rows


def _profiles(tiny: bool) -> List[Dict[str, Any]]:
    rows = [row for case in _PROFILES for row in _rows(case, 'cpu', tiny)]
    for row in rows:
        row['shares'] = measure.profile(_workload(subjects.create(row['name'], tiny), row))
    return rows


def _profile_table(rows: List[Dict[str, Any]]) -> str:
    lines = ['| phase | network | batch | size | share of a step by operation |', '| --- | --- | --- | --- | --- |']
    for row in rows:
        shares = ', '.join(f'{name} {share:.0%}' for name, share in row['shares'].items())
        lines.append(
            f"| {'train' if row['train'] else 'infer'} | {row['name']} | {row['batch_size']} | {row['image_size']} | "
            f'{shares} |')
    return '\n'.join(lines)


def _layer_point(what: str, channels: int, segments: int, batch: int, size: int, form: str) -> Dict[str, Any]:
    torch.manual_seed(0)
    layer = GunnLayer(channels, segments, ordered=form != 'unordered')
    if form == 'concatenation':
        set_backend(layer, 'plain')
    workload = measure.Workload(layer, batch, size, True, in_chans=channels)
    peak = measure.peak_memory(workload)
    return dict(
        what=what, form=form, channels=channels, segments=segments, batch_size=batch, image_size=size, peak_bytes=peak,
        **measure.summary(measure.step_times({'': workload}, 3)[''], batch))


def _scaling(tiny: bool) -> List[Dict[str, Any]]:
    size = 4 if tiny else 28
    grid = [
        ('segments', [(160, p, 4, size) for p in (4, 8, 16, 32)]),
        ('channels', [(n, n // 10, 4, size) for n in (80, 160, 320, 640)]),
        ('batch', [(160, 16, b, size) for b in (2, 4, 8, 16)]),
        ('image size', [(160, 16, 4, s) for s in ((4, 8) if tiny else (14, 28, 42, 56))]),
    ]
    return [_layer_point(what, *point, form) for what, points in grid for point in points
            for form in ('Algorithm 1', 'concatenation', 'unordered')]


def _plot_scaling(points: List[Dict[str, Any]], path: Path) -> None:
    keys = {'segments': 'segments', 'channels': 'channels', 'batch': 'batch_size', 'image size': 'image_size'}
    labels = {
        'segments': 'segments P, at N = 160', 'channels': 'channels N, at n = 10 a segment', 'batch': 'batch size',
        'image size': 'height and width'}
    figure, axes = pyplot.subplots(2, 4, figsize=(13, 5.4), layout='constrained')
    for column, (what, key) in zip(axes.T, keys.items()):
        for form in ('Algorithm 1', 'concatenation', 'unordered'):
            chosen = [p for p in points if p['what'] == what and p['form'] == form]
            xs = [p[key] for p in chosen]
            column[0].plot(xs, [p['peak_bytes'] / 2 ** 20 for p in chosen], 'o-', label=form)
            column[1].plot(xs, [1e3 * p['seconds'] for p in chosen], 'o-', label=form)
        column[0].set_ylim(bottom=0)
        column[1].set_ylim(bottom=0)
        column[1].set_xlabel(labels[what])
    axes[0, 0].set_ylabel('peak memory of a training step, MiB')
    axes[1, 0].set_ylabel('time of a training step, ms')
    axes[0, 0].legend()
    figure.suptitle('One layer, float32, channels_last')
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _table(rows: List[Dict[str, Any]]) -> str:
    head = ['phase', 'network', 'batch', 'size', 'dtype', 'mode', 'GMACs', 'ms', 'images/s', 'GMAC/s', 'peak MiB',
            'traffic MiB', 'roofline %', 'first step s', 'launches']
    lines = [head, ['---'] * len(head)]
    measured = [
        ('gmacs', 2, 1), ('seconds', 1, 1e3), ('images_per_second', 1, 1), ('gmacs_per_second', 0, 1),
        ('peak_bytes', 0, 2 ** -20), ('traffic_bytes', 0, 2 ** -20),
        ('roofline_share', 0, 100), ('first_step_seconds', 1, 1), ('launches', 0, 1)]
    for row in rows:
        cells = [f'{row[key] * scale:.{digits}f}' if key in row else '-' for key, digits, scale in measured]
        if 'error' in row:
            cells[1] = row['error']
        lines.append([
            'train' if row['train'] else 'infer', row['name'], str(row['batch_size']), str(row['image_size']),
            row['dtype'], row['mode'], *cells])
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _target_table(rows: Dict[Tuple[Any, ...], List[Dict[str, Any]]]) -> str:
    """Compare with the targets; the rows are those of a case without its names."""
    lines = ['| what | ratio | target | |', '| --- | --- | --- | --- |']
    for target in _TARGETS:
        by_name = {row['name']: row for row in rows.get(target.case[1:], ())}
        a, b = by_name.get(target.name, {}), by_name.get(target.over, {})
        key = 'peak_bytes' if target.what == 'memory' else 'seconds'
        case = target.case
        limit = '-' if target.limit is None else f'{target.limit:.2f}'
        ratio, verdict = '-', 'not measured'
        if key in a and key in b:
            value = a[key] / b[key]
            if target.what == 'time per GMAC':
                value *= b['gmacs'] / a['gmacs']
            ratio = f'{value:.3f}'
            verdict = '' if target.limit is None else 'met' if value <= target.limit else 'NOT MET'
        lines.append(
            f"| {target.what}, {'training' if case.train else 'inference'} {case.image_size}x{case.image_size} batch "
            f'{case.batch_size} {case.dtype}: {target.name} over {target.over} | {ratio} | {limit} | {verdict} |')
    return '\n'.join(lines)


def machine(device: str) -> Dict[str, Any]:
    """Say what is measured on, and with which versions.

    Args:
        device: 'cpu' or 'cuda'.
    """
    name = platform.processor() or platform.machine()
    if device == 'cuda':
        name = torch.cuda.get_device_name()
    elif Path('/proc/cpuinfo').is_file():
        models = [line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines()
                  if line.startswith('model name')]
        name = models[0] if models else name
    return dict(
        device=name, threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__,
        timm=timm.__version__, malloc={k: v for k, v in os.environ.items() if k.startswith('MALLOC_')})


def write(results: Dict[str, Any], text: List[str], folder: Path) -> None:
    """Write results.json and, of the tables, tables.md.

    Args:
        results: Everything measured.
        text: Tables as Markdown.
        folder: Folder, which is there.
    """
    write_file(folder / 'results.json', json.dumps(results, indent=1).encode())
    write_file(folder / 'tables.md', ('\n\n'.join(text) + '\n').encode())


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the benchmark.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code 0; 2 where an argument is at fault.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--suite', default='cpu', choices=('cpu', 'cuda'), help='what to measure (default: cpu)')
    parser.add_argument('--full', action='store_true', help='measure more')
    parser.add_argument('--only', nargs='+', default=[], metavar='WORD',
                        help="networks whose line has these, for example 'train', 'gunn18', '224' or 'graph'")
    parser.add_argument('--rounds', type=int, metavar='N', help='rounds that count (default: 5; on a GPU 3)')
    parser.add_argument('--tiny', action='store_true', help='networks and images of a few pixels, to try the script')
    parser.add_argument('--device', choices=('cpu', 'cuda'), help="device (default: the suite's)")
    parser.add_argument('--out', type=Path, default=Path('output/bench'), metavar='DIR', help='folder to write to')
    args = parser.parse_args(argv)
    device = args.device or args.suite
    if args.rounds is not None and args.rounds < 1:
        print(f'error: --rounds must be at least 1; got {args.rounds}', file=sys.stderr)
        return 2
    if device == 'cuda' and not torch.cuda.is_available():
        print('error: --suite cuda needs a CUDA device; --device cpu tries the script without one', file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    rounds = args.rounds or (5 if device == 'cpu' else 3)
    if args.suite == 'cpu':
        cases = _SHORT + (_LONG if args.full else [])
    else:
        cases = _cuda_cases() if args.full else _CUDA_SHORT
    cases = [case for case in _choose(cases, args.only) if device == 'cuda' or not measure.MODES[case.mode][1]]
    if not cases:
        print(f"error: there is nothing to measure with {' and '.join(args.only)}", file=sys.stderr)
        return 2
    if args.suite == 'cuda':
        seconds = sum(_estimate(case, rounds) for case in cases)
        print(f"About {seconds:.0f} s on an H100, assuming {_PREPARE} s a network, {_COMPILE['units']} to compile its "
              f"units or {_COMPILE['whole']} the whole, {_EAGER_STEP} an eager step, and {_RATE:.0e} MACs a second.",
              file=sys.stderr)
    measured_on, rows = machine(device), {}
    results: Dict[str, Any] = dict(machine=measured_on, rows=[])
    for case in cases:
        print(f"measuring {'training' if case.train else 'inference'} of {', '.join(case.names)}", file=sys.stderr)
        rows[case[1:]] = _measure_case(case, device, rounds, args.tiny)
        results['rows'] += rows[case[1:]]
        text = [', '.join(f'{k}: {v}' for k, v in measured_on.items()), _table(results['rows'])]
        if args.suite == 'cpu':
            text.insert(1, _target_table(rows))
        write(results, text, args.out)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    if args.suite == device == 'cpu' and not args.only:
        print('profiling', file=sys.stderr)
        results['profiles'] = _profiles(args.tiny)
        text.append(_profile_table(results['profiles']))
        results['scaling'] = _scaling(args.tiny)
        _plot_scaling(results['scaling'], args.out / 'scaling.png')
        write(results, text, args.out)
    print('\n\n'.join(text))
    return 0


if __name__ == '__main__':
    sys.exit(main())
