"""The int8 example and the latency benchmark, on networks of a few channels and images of the tests' own making."""
import json
import sys
from unittest import mock

import numpy as np
import onnx
import torch
from conftest import ROOT, create_tiny, relative, save_images

from gunn_timm.commands.export import export_model

sys.path[:0] = [str(ROOT / 'examples'), str(ROOT / 'benchmarks')]
import latency  # noqa: E402
import quantize as example  # noqa: E402
import subjects  # noqa: E402

SMALLEST = dict(channels=(4, 8), segments=(2, 2))


def test_quantized_forms(tmp_path, capsys):
    generator = np.random.default_rng(0)
    for split in ('train', 'test'):
        save_images(tmp_path / split, generator.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8), 'abc')
    model = create_tiny('gunn15', **SMALLEST, num_classes=3).eval()
    export_model(model, tmp_path / 'model.onnx', 'onnx')
    assert example.main([str(tmp_path / 'model.onnx'), '--data-dir', str(tmp_path), '--limit', '12']) == 0
    _, _, *table, _ = capsys.readouterr().out.splitlines()
    operations = {}
    for row in table:
        form, accuracy, _, file = (cell.strip() for cell in row.strip('|').split('|'))
        assert 0 <= float(accuracy) <= 100, form
        proto = onnx.load(file)
        operations[form] = [node.op_type for node in proto.graph.node]
        assert {'input_size', 'mean', 'std'} <= {prop.key for prop in proto.metadata_props}
    convolutions = operations['float32'].count('Conv')
    assert operations['dynamic'].count('ConvInteger') == convolutions and 'Conv' not in operations['dynamic']
    assert operations['static'].count('Conv') == convolutions and 'QuantizeLinear' in operations['static']


def test_latency_of_every_form(tmp_path, capsys, monkeypatch):
    """One that fails, as AOTInductor does without a compiler, leaves the others."""
    torch.compiler.reset()
    step_times, outputs = latency.step_times, {}

    def watch(calls, rounds):
        with torch.inference_mode():
            outputs.update({form: call.call() for (form, _), call in calls.items()})
        return step_times(calls, rounds)

    monkeypatch.setattr(latency, 'step_times', watch)
    monkeypatch.setattr(latency, '_aotinductor', mock.Mock(side_effect=RuntimeError('no compiler\nin these places')))
    monkeypatch.setitem(subjects.TINY, 'gunn15', SMALLEST)
    assert latency.main(['--tiny', '--rounds', '2', '--batch-sizes', '2', '--out', str(tmp_path)]) == 0
    failed, *rows = json.loads((tmp_path / 'results.json').read_text())['rows']
    assert failed == dict(form='AOTInductor', model='gunn15', error='no compiler') and len(rows) == len(outputs) == 7
    for form, out in outputs.items():
        # Of 8 bits a number each operation loses some tenths of a percent.
        out = torch.as_tensor(out[0] if isinstance(out, list) else out).float()
        assert relative(out, outputs['eager']) <= (0.1 if 'int8' in form or 'bfloat16' in form else 1e-5), form
    assert '| eager | 2 | 32 | gunn15 |' in (tmp_path / 'tables.md').read_text() in capsys.readouterr().out
