#!/usr/bin/env python3
"""Measure our networks against their unordered baselines and timm's peers, and print a table.

    python benchmarks/run.py                        the short version, for two CPU cores: under five minutes
    python benchmarks/run.py --full                 more networks, batches and data types
    python benchmarks/run.py --suite cuda --full    on a GPU: eager, compiled, in CUDA graphs, and combinations

Writes results.json, the tables as Markdown, and a plot of how time and memory grow, to the folder given by --out.
"""
import argparse
import gc
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import matplotlib
import subjects
import timm
import torch
from measure import (
    MODES,
    Workload,
    gmacs,
    kernel_launches,
    peak_memory,
    peak_rates,
    profile,
    step_times,
    summary,
    traffic,
)

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
_INFER_4 = Case(('gunn18', 'gunn18:fused', 'wide_gunn18:fused', *_PEERS), False, 4, 224)
_INFER_1 = Case(('gunn18', 'gunn18:fused', *_PEERS), False, 1, 224)
_MEMORY = Case(('gunn18', 'gunn18:plain'), True, 8, 160, timed=False)
_BF16 = Case(('gunn18', 'gunn18:plain', 'sunn18'), True, 8, 160, 'bfloat16', timed=False)

_SHORT = [_TRAIN_160, _MEMORY, _TRAIN_32, _INFER_4, _INFER_1, _BF16]
_LONG = [
    Case(('gunn18', 'sunn18', 'sunn18:grouped', 'resnet101', *_PEERS[1:]), True, 8, 160, 'bfloat16'),
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
    *(Case(('gunn18', 'gunn18:fused', 'resnet101'), False, batch_size, 224) for batch_size in (4, 1)),
]
_TARGETS = [
    Target('time', 'gunn18', 'sunn18', _TRAIN_160, 1.15),
    Target('time', 'gunn18', 'sunn18:grouped', _TRAIN_160, 1.3),
    Target('time', 'gunn18', 'resnet101', _TRAIN_160, 1.3),
    Target('time', 'gunn15', 'sunn15', _TRAIN_32, 1.25),
    Target('memory', 'gunn18', 'sunn18', _TRAIN_160, 1.05),
    Target('memory', 'gunn18', 'sunn18', _BF16, 1.05),
    Target('memory', 'gunn18', 'sunn18:grouped', _TRAIN_160, 1.2),
    Target('memory', 'gunn18', 'gunn18:plain', _MEMORY, None),
    Target('memory', 'gunn18', 'gunn18:plain', _BF16, None),
    *(Target('time', name, peer, case, limit)
      for case in (_INFER_4, _INFER_1)
      for name, limit in (('gunn18:fused', 0.95), ('gunn18', 1.05))
      for peer in _PEERS),
    Target('time per GMAC', 'wide_gunn18:fused', 'gunn18:fused', _INFER_4, 1.),
]
_CUDA_LARGE = ('gunn18', 'wide_gunn18', 'sunn18', 'resnet50', 'resnet101', 'resnext50_32x4d', 'resnext101_32x4d',
               'densenet161', 'densenet201', 'dpn98')


def _cuda_cases(full: bool) -> List[Case]:
    cases = []
    for mode in MODES if full else ('eager', 'units compiled, CUDA graph'):
        for train in (True, False):
            for batch in (64, 256) if full else (64,):
                # A captured graph keeps the memory of its step: of all networks together, that may be too much.
                together = [_CUDA_LARGE] if not MODES[mode][1] else [(name,) for name in _CUDA_LARGE]
                cases.extend(Case(names, train, batch, 224, 'bfloat16', mode) for names in together)
            for batch in (64, 256, 1024) if full else (64,):
                cases.append(Case(('gunn15', 'sunn15', 'gunn24'), train, batch, 32, 'bfloat16', mode))
    return cases


def _workload(model: torch.nn.Module, row: Dict[str, Any]) -> Workload:
    return Workload(
        model, row['batch_size'], row['image_size'], row['train'], row['device'], getattr(torch, row['dtype']),
        row['mode'])


def _rows(case: Case, device: str, tiny: bool) -> List[Dict[str, Any]]:
    batch_size, image_size = (2, 32) if tiny else (case.batch_size, case.image_size)
    return [
        dict(name=name, device=device, train=case.train, batch_size=batch_size, image_size=image_size,
             dtype=case.dtype, mode=case.mode, timed=case.timed)
        for name in case.names]


def _measure_case(case: Case, device: str, rounds: int, tiny: bool) -> List[Dict[str, Any]]:
    workloads, rows = {}, _rows(case, device, tiny)
    compiled, captured = MODES[case.mode]
    for row in rows:
        try:
            model = subjects.create(row['name'], tiny)
            row['gmacs'] = gmacs(model, row['image_size'])
            start = time.perf_counter()
            workload = _workload(model, row)
            if compiled:
                workload.step()
                row['first_step_seconds'] = time.perf_counter() - start
            if not captured:
                row['peak_bytes'] = peak_memory(workload)
            if case.mode == 'eager':
                row['traffic_bytes'] = traffic(workload)
            if device == 'cuda':
                row['launches'] = kernel_launches(workload)
            workloads[row['name']] = workload
        except RuntimeError as e:  # out of memory, or a peer that cannot be captured: the others still can
            row['error'] = str(e).split('\n')[0]
    if case.timed:
        flops_per_second, bytes_per_second = peak_rates(device, getattr(torch, case.dtype))
        seconds = step_times(workloads, rounds)
        for row in rows:
            if row['name'] in seconds:
                row.update(summary(seconds[row['name']], row['batch_size']))
                macs = row['gmacs'] * row['batch_size'] * (3 if case.train else 1)
                row['gmacs_per_second'] = macs / row['seconds']
                if 'traffic_bytes' in row:
                    bound = max(2e9 * macs / flops_per_second, row['traffic_bytes'] / bytes_per_second)
                    row['roofline_share'] = bound / row['seconds']
    return rows


def _profiles(tiny: bool) -> List[Dict[str, Any]]:
    rows = [row for case in _PROFILES for row in _rows(case, 'cpu', tiny)]
    for row in rows:
        row['shares'] = profile(_workload(subjects.create(row['name'], tiny), row))
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
    workload = Workload(layer, batch, size, True, in_chans=channels)
    peak = peak_memory(workload)
    return dict(
        what=what, form=form, channels=channels, segments=segments, batch_size=batch, image_size=size, peak_bytes=peak,
        **summary(step_times({'': workload}, 3)[''], batch))


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


def _target_table(rows: Dict[Case, List[Dict[str, Any]]]) -> str:
    lines = ['| what | ratio | target | |', '| --- | --- | --- | --- |']
    for target in _TARGETS:
        by_name = {row['name']: row for row in rows[target.case]}
        a, b = by_name[target.name], by_name[target.over]
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
    parser.add_argument('--rounds', type=int, default=5, metavar='N', help='rounds that count (default: 5)')
    parser.add_argument('--tiny', action='store_true', help='networks and images of a few pixels, to try the script')
    parser.add_argument('--device', choices=('cpu', 'cuda'), help="device (default: the suite's)")
    parser.add_argument('--out', type=Path, default=Path('output/bench'), metavar='DIR', help='folder to write to')
    args = parser.parse_args(argv)
    device = args.device or args.suite
    if device == 'cuda' and not torch.cuda.is_available():
        print('error: --suite cuda needs a CUDA device; --device cpu tries the script without one', file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    cases = _cuda_cases(args.full) if args.suite == 'cuda' else _SHORT + (_LONG if args.full else [])
    if device == 'cpu':
        cases = [case for case in cases if not MODES[case.mode][1]]
    measured_on = machine(device)
    rows = {}
    for case in cases:
        print(f"measuring {'training' if case.train else 'inference'} of {', '.join(case.names)}", file=sys.stderr)
        rows[case] = _measure_case(case, device, args.rounds, args.tiny)
        gc.collect()
    flat = [row for case_rows in rows.values() for row in case_rows]
    results: Dict[str, Any] = dict(machine=measured_on, rows=flat)
    text = [', '.join(f'{k}: {v}' for k, v in measured_on.items()), _table(flat)]
    if args.suite == 'cpu':
        text.insert(1, _target_table(rows))
    write(results, text, args.out)
    if args.suite == 'cpu':
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
