"""The int8 example and the latency benchmark, on networks of a few channels and images of the tests' own making."""
import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, create_tiny, relative
from PIL import Image
from timm.data import ImageDataset, create_transform, resolve_model_data_config

from gunn_timm.commands.export import export_model

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

sys.path[:0] = [str(ROOT / 'examples'), str(ROOT / 'benchmarks')]
import latency  # noqa: E402
import quantize as example  # noqa: E402
import subjects  # noqa: E402

SMALLEST = dict(channels=(4, 8), segments=(2, 2))
CLASSES = 3
TRAINING_IMAGES, TEST_IMAGES = 12, 24


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Noise on one of three colours, which is its class; but every eighth test image lies in the folder of another."""
    root = tmp_path_factory.mktemp('data')
    generator = np.random.default_rng(0)
    for split, count in (('train', TRAINING_IMAGES), ('test', TEST_IMAGES)):
        for i in range(count):
            pixels = generator.integers(0, 64, (32, 32, 3), dtype=np.uint8)
            pixels[..., i % CLASSES] += 160
            label = (i + (split == 'test' and i % 8 == 0)) % CLASSES
            folder = root / split / f'class{label}'
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f'{i:02}.png')
    return root


@pytest.fixture(scope='module')
def exported(data, tmp_path_factory):
    """A network that tells the colours apart."""
    model = create_tiny('gunn15', **SMALLEST, num_classes=CLASSES).eval()
    transform = create_transform(**resolve_model_data_config(model))
    x, labels = zip(*ImageDataset(str(data / 'train'), transform=transform))
    with torch.no_grad():
        features = model.forward_head(model.forward_features(torch.stack(x)), pre_logits=True)
        centres = torch.stack([features[torch.tensor(labels) == label].mean(dim=0) for label in range(CLASSES)])
        # The nearest centre's class: its logit is that centre's distance, less what all classes have in common.
        middle = centres.mean(dim=0)
        model.fc.weight.copy_(centres - middle)
        model.fc.bias.copy_(-((centres - middle) * (centres + middle)).sum(dim=1) / 2)
    file = tmp_path_factory.mktemp('exported') / 'model.onnx'
    export_model(model, file, 'onnx')
    return file


def test_quantized_forms(exported, data, capsys):
    assert example.main([str(exported), '--data-dir', str(data)]) == 0
    *table, note = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in table]
    assert rows[0] == ['form', 'top-1 %', 'MB', 'file'] and len(rows) == 5
    files = {}
    for form, accuracy, size, file in rows[2:]:
        # All but the images in the wrong folder: in int8 too, as such colours are far apart.
        assert accuracy == '87.50', form
        files[form] = onnx.load(file)
        assert size == f'{len(files[form].SerializeToString()) / 1e6:.2f}'
    assert list(files) == ['float32', 'dynamic', 'static']
    assert note == (f'top-1 on {TEST_IMAGES} of {TEST_IMAGES} test images; the static form is calibrated on '
                    f'{TRAINING_IMAGES} training images')

    operations = {form: [node.op_type for node in proto.graph.node] for form, proto in files.items()}
    convolutions = operations['float32'].count('Conv')
    assert operations['dynamic'].count('ConvInteger') == convolutions and 'Conv' not in operations['dynamic']
    # Every convolution has its weights in int8, with a scale for each channel.
    static = files['static'].graph
    weights = {tensor.name: tensor for tensor in static.initializer}
    dequantized = {node.output[0]: node for node in static.node if node.op_type == 'DequantizeLinear'}
    for node in static.node:
        if node.op_type == 'Conv':
            weight, scale, _ = (weights[name] for name in dequantized[node.input[1]].input)
            assert weight.data_type == onnx.TensorProto.INT8 and list(scale.dims) == [weight.dims[0]]
    assert operations['static'].count('Conv') == convolutions
    # What a deployer must know went along.
    known = {prop.key: prop.value for prop in files['float32'].metadata_props}
    for proto in files.values():
        assert known.items() <= {prop.key: prop.value for prop in proto.metadata_props}.items()


def test_limit_takes_images_of_all_classes(exported, data, capsys, monkeypatch):
    monkeypatch.setattr(example, 'quantize', lambda file, batches: {})
    assert example.main([str(exported), '--data-dir', str(data), '--limit', '6']) == 0
    *_, row, note = capsys.readouterr().out.splitlines()
    # Every fourth of them in the order of their folders.
    chosen = sorted((data / 'test').rglob('*.png'))[::4]
    assert len({path.parent for path in chosen}) == CLASSES
    right = sum(int(path.stem) % CLASSES == int(path.parent.name[-1]) for path in chosen)
    assert f'| {100 * right / 6:.2f} |' in row and note.startswith(f'top-1 on 6 of {TEST_IMAGES} test images')


@pytest.mark.parametrize('file, folder, limit, message', [
    ('missing.onnx', '.', 1, "No file '.*missing.onnx'"),
    ('damaged.onnx', '.', 1, "damaged.onnx' is not an ONNX file that can be run"),
    ('foreign.onnx', '.', 1, 'does not say how to prepare images; write it with `python -m gunn_timm export`'),
    ('model.onnx', 'train', 1, "No folder '.*train/train'; --data-dir must have train/CLASS and test/CLASS"),
    ('model.onnx', 'fewer', 1, "train' has 2 classes, and the network 3"),
    ('model.onnx', '.', 0, '--limit must be at least 1; got 0'),
])
def test_refused(file, folder, limit, message, exported, data, capsys):
    (exported.parent / 'damaged.onnx').write_bytes(exported.read_bytes()[:1000])
    foreign = onnx.load(exported)
    foreign.ClearField('metadata_props')
    onnx.save(foreign, exported.parent / 'foreign.onnx')
    if folder == 'fewer':
        for label in (0, 1):
            (data / folder / 'train' / f'class{label}').mkdir(parents=True)
            Image.new('RGB', (32, 32)).save(data / folder / 'train' / f'class{label}' / '0.png')
    argv = [str(exported.parent / file), '--data-dir', str(data / folder), '--limit', str(limit)]
    assert example.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith('error: ') and err.count('\n') == 1
    assert re.search(message, err)


def test_latency_of_every_form(tmp_path, capsys, monkeypatch):
    torch.compiler.reset()
    outputs = []

    class Recorded(latency.Call):
        def __init__(self, form, images):
            super().__init__(form, images)
            with torch.inference_mode():
                out = self.call()
            outputs.append(torch.from_numpy(out[0]) if isinstance(out, list) else out.float())

    monkeypatch.setattr(latency, 'Call', Recorded)
    monkeypatch.setitem(subjects.TINY, 'gunn15', SMALLEST)
    assert latency.main(['--tiny', '--rounds', '2', '--batch-sizes', '2', '--out', str(tmp_path)]) == 0
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['machine']['onnxruntime'] == onnxruntime.__version__
    forms = [row['form'] for row in results['rows']]
    assert len(forms) == len(set(forms)) == len(outputs) == 9
    for row, out in zip(results['rows'], outputs):
        assert row['batch_size'] == 2 and 0 < row['seconds_min'] <= row['seconds'] <= row['seconds_max']
        # A form that computed something else would be quick for nothing. Of 8 bits a number each operation loses some
        # tenths of a percent.
        rough = 'int8' in row['form'] or 'bfloat16' in row['form']
        assert relative(out, outputs[0]) <= (0.1 if rough else 1e-5), row['form']
    table = (tmp_path / 'tables.md').read_text()
    assert table in capsys.readouterr().out and '| eager | 2 | 32 |' in table and '| 1.00 |' in table


def test_a_form_that_fails_leaves_the_others(tmp_path, capsys, monkeypatch):
    def fail():
        raise RuntimeError('no compiler\nin any of these places')

    forms = {'eager': lambda: latency._eager(subjects.create('gunn15', tiny=True)), 'AOTInductor': fail}
    monkeypatch.setattr(latency, '_forms', lambda *args: forms)
    assert latency.main(['--tiny', '--rounds', '1', '--batch-sizes', '1', '--out', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert '| AOTInductor | no compiler |' in out and '| eager | 1 | 32 |' in out


def test_refused_numbers(capsys):
    assert latency.main(['--rounds', '0']) == 2
    assert capsys.readouterr().err == 'error: --batch-sizes and --rounds must be at least 1\n'
