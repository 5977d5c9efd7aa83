"""The int8 example and the latency benchmark, on networks of a few channels and images of the tests' own making."""
import json
import sys
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, create_tiny, relative
from PIL import Image
from timm.data import ImageDataset, create_transform, resolve_model_data_config

from gunn_timm.commands.export import export_model

sys.path[:0] = [str(ROOT / 'examples'), str(ROOT / 'benchmarks')]
import latency  # noqa: E402
import quantize as example  # noqa: E402
import subjects  # noqa: E402

SMALLEST = dict(channels=(4, 8), segments=(2, 2))


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A network that tells three colours apart, beside images of them; every eighth test image is in a wrong folder."""
    root = tmp_path_factory.mktemp('exported')
    generator = np.random.default_rng(0)
    for split, i in [*(('train', i) for i in range(12)), *(('test', i) for i in range(24))]:
        pixels = generator.integers(0, 64, (32, 32, 3), dtype=np.uint8)
        pixels[..., i % 3] += 160
        folder = root / split / f'class{(i + (split == "test" and i % 8 == 0)) % 3}'
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f'{i:02}.png')
    model = create_tiny('gunn15', **SMALLEST, num_classes=3).eval()
    train = ImageDataset(str(root / 'train'), transform=create_transform(**resolve_model_data_config(model)))
    with torch.no_grad():
        features = model.forward_head(model.forward_features(torch.stack([x for x, _ in train])), pre_logits=True)
        centres = features.unflatten(0, (3, 4)).mean(dim=1)
        model.fc.weight.copy_(centres - centres.mean(dim=0))
        model.fc.bias.copy_(-(model.fc.weight * (centres + centres.mean(dim=0))).sum(dim=1) / 2)
    export_model(model, root / 'model.onnx', 'onnx')
    return root / 'model.onnx'


def test_quantized_forms(exported, capsys):
    assert example.main([str(exported), '--data-dir', str(exported.parent), '--limit', '12']) == 0
    _, _, *table, _ = capsys.readouterr().out.splitlines()
    # All but the three in a wrong folder, of every other one, are right: in int8 too, as such colours are far apart.
    operations = {}
    for row in table:
        form, accuracy, _, file = (cell.strip() for cell in row.strip('|').split('|'))
        assert accuracy == '75.00', form
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
            outputs.update({form: call.call() for form, call in calls.items()})
        return step_times(calls, rounds)

    monkeypatch.setattr(latency, 'step_times', watch)
    monkeypatch.setattr(latency, '_aotinductor', mock.Mock(side_effect=RuntimeError('no compiler\nin these places')))
    monkeypatch.setitem(subjects.TINY, 'gunn15', SMALLEST)
    assert latency.main(['--tiny', '--rounds', '2', '--batch-sizes', '2', '--out', str(tmp_path)]) == 0
    failed, *rows = json.loads((tmp_path / 'results.json').read_text())['rows']
    assert failed == dict(form='AOTInductor', error='no compiler') and len(rows) == len(outputs) == 8
    for form, out in outputs.items():
        # Of 8 bits a number each operation loses some tenths of a percent.
        out = torch.as_tensor(out[0] if isinstance(out, list) else out).float()
        assert relative(out, outputs['eager']) <= (0.1 if 'int8' in form or 'bfloat16' in form else 1e-5), form
    assert '| eager | 2 | 32 |' in (tmp_path / 'tables.md').read_text() in capsys.readouterr().out
