#!/usr/bin/env python3
"""Measure the latency of networks on the CPU in each form they can be deployed in, and print a table.

    python benchmarks/latency.py                               gunn15, batches of 1 and 16 images
    python benchmarks/latency.py --model gunn18.in1k resnet101 --batch-sizes 1 4 --forms "eager, fused" "ONNX Runtime"

All networks get the same treatment, and all are timed in interleaved rounds. Writes results.json and the table as
Markdown to the folder given by --out. The weights are random, and so are the images that the static int8 form is
calibrated on: it is only timed. Needs `pip install '.[bench,export]'` and a C++ compiler.
"""
import argparse
import copy
import functools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import onnx
import onnxruntime
import subjects
import torch
from measure import step_times, summary
from run import machine, write
from timm.data import resolve_model_data_config
from torch import nn

from gunn_timm.commands.export import export_model

sys.path.append(str(Path(__file__).parents[1] / 'examples'))
from quantize import quantize  # noqa: E402


class Form(NamedTuple):
    """A network that can be called.

    Attributes:
        prepare: Turns images (N, C, H, W) in float32 into what `call` takes; not timed.
        call: Runs the network.
    """
    prepare: Callable[[torch.Tensor], Any]
    call: Callable[[Any], Any]


class Call:
    """A call of a form, as `step_times` takes it.

    Args:
        form: What to call.
        images: Images, shape (N, C, H, W).
    """

    def __init__(self, form: Form, images: torch.Tensor):
        self.call = functools.partial(form.call, form.prepare(images))

    @torch.inference_mode()
    def timed(self) -> float:
        """Run it once more and return its seconds."""
        # Not timed: what ran before keeps threads spinning for a while, and has filled the caches.
        self.call()
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start


def _eager(model: nn.Module, dtype: torch.dtype = torch.float32) -> Form:
    model = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last).eval()
    return Form(lambda images: images.to(dtype=dtype, memory_format=torch.channels_last), model)


def _torchscript(model: nn.Module, folder: Path) -> Form:
    file = folder / 'model.pt'
    export_model(model, file, 'torchscript')
    return Form(torch.Tensor.contiguous, torch.jit.load(file))


def _aotinductor(model: nn.Module, folder: Path) -> Form:
    file = folder / 'model.pt2'
    export_model(model, file, 'pt2')
    return Form(torch.Tensor.contiguous, torch._inductor.aoti_load_package(str(file)))


def _onnx(file: Path) -> Form:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    return Form(lambda images: {'images': images.numpy()}, functools.partial(session.run, None))


def _forms(model: nn.Module, fused: nn.Module, folder: Path) -> Dict[str, Callable[[], Form]]:
    """Name the forms, and what makes each."""

    @functools.lru_cache(maxsize=None)
    def files() -> Dict[str, Path]:
        file = folder / 'model.onnx'
        export_model(model, file, 'onnx')
        size = resolve_model_data_config(model)['input_size']
        images = np.random.default_rng(0).standard_normal((8, *size), dtype=np.float32)
        return {'float32': file, **quantize(file, [images])}

    return {
        'eager': lambda: _eager(model),
        'eager, fused': lambda: _eager(fused),
        'eager, fused, bfloat16': lambda: _eager(fused, torch.bfloat16),
        'TorchScript': lambda: _torchscript(model, folder),
        'AOTInductor': lambda: _aotinductor(model, folder),
        'ONNX Runtime': lambda: _onnx(files()['float32']),
        'ONNX Runtime, int8 dynamic': lambda: _onnx(files()['dynamic']),
        'ONNX Runtime, int8 static': lambda: _onnx(files()['static']),
    }


FORMS = list(_forms(nn.Identity(), nn.Identity(), Path()))


def _measure(args: argparse.Namespace, folder: Path) -> List[Dict[str, Any]]:
    forms, rows, sizes = {}, [], {}
    for name in args.model:
        model, fused = subjects.create(name, args.tiny), subjects.create(f'{name}:fused', args.tiny)
        sizes[name] = resolve_model_data_config(model)['input_size']
        (folder / name).mkdir()
        for form, make in _forms(model, fused, folder / name).items():
            if form not in args.forms:
                continue
            print(f'preparing {name}: {form}', file=sys.stderr)
            try:
                forms[form, name] = make()
            except RuntimeError as e:  # for example no compiler: the others can still be measured
                rows.append(dict(form=form, model=name, error=str(e).split('\n')[0]))
    for batch_size in args.batch_sizes:
        print(f'measuring batches of {batch_size}', file=sys.stderr)
        calls = {}
        for (form, name), made in forms.items():
            images = torch.randn(batch_size, *sizes[name], generator=torch.Generator().manual_seed(0))
            calls[form, name] = Call(made, images)
        for (form, name), times in step_times(calls, args.rounds).items():
            rows.append(dict(form=form, model=name, batch_size=batch_size, image_size=sizes[name][-1],
                             **summary(times, batch_size)))
    return sorted(rows, key=lambda row: (row.get('batch_size', 0), FORMS.index(row['form'])))


def _table(rows: List[Dict[str, Any]], first: str) -> str:
    lines = [['form', 'batch', 'size', 'network', 'ms', 'least', 'most', 'images/s', f'of {first}']]
    lines.append(['---'] * len(lines[0]))
    own = {(row['form'], row['batch_size']): row['seconds'] for row in rows
           if row['model'] == first and 'error' not in row}
    for row in rows:
        if 'error' in row:
            lines.append([row['form'], '-', '-', row['model'], row['error'], *['-'] * 4])
            continue
        share = row['seconds'] / own.get((row['form'], row['batch_size']), float('nan'))
        lines.append([
            row['form'], str(row['batch_size']), str(row['image_size']), row['model'],
            *(f'{1e3 * row[key]:.2f}' for key in ('seconds', 'seconds_min', 'seconds_max')),
            f"{row['images_per_second']:.1f}", f'{share:.2f}'])
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the benchmark.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code 0; 2 where an argument is at fault.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', nargs='+', default=['gunn15'], metavar='NAME', help='networks (default: gunn15)')
    parser.add_argument('--forms', nargs='+', default=FORMS, choices=FORMS, metavar='FORM',
                        help=f"forms (default: all, which are {', '.join(map(repr, FORMS))})")
    parser.add_argument('--batch-sizes', type=int, nargs='+', default=[1, 16], metavar='N', help='(default: 1 16)')
    parser.add_argument('--rounds', type=int, default=20, metavar='N', help='rounds that count (default: 20)')
    parser.add_argument('--tiny', action='store_true', help='a network of a few channels, to try the script')
    parser.add_argument('--out', type=Path, default=Path('output/latency'), metavar='DIR', help='folder to write to')
    args = parser.parse_args(argv)
    if min(*args.batch_sizes, args.rounds) < 1:
        print('error: --batch-sizes and --rounds must be at least 1', file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    versions = dict(**machine('cpu'), onnx=onnx.__version__, onnxruntime=onnxruntime.__version__)
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(args, Path(folder))
    text = [', '.join(f'{k}: {v}' for k, v in versions.items()), _table(rows, args.model[0])]
    write(dict(machine=versions, rows=rows), text, args.out)
    print('\n\n'.join(text))
    return 0


if __name__ == '__main__':
    sys.exit(main())
