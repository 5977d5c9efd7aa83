"""Exported files of networks of a few channels: what they compute, what they say of themselves, and how they fail."""
import copy
import json
from unittest import mock

import pytest
import timm
import torch
from conftest import create_tiny, images, relative

from gunn_timm.commands.cli import main
from gunn_timm.commands.export import FORMATS, ONNX_OPSET, TOLERANCE, check_export, export_model

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

# Float32, with the norms fused and the sums in another order: some 1e-7 in networks this small.
ROUNDING = 1e-5


@pytest.fixture
def tiny():
    """The smallest network there is: of two layers."""
    return create_tiny('gunn15', channels=(4, 8), segments=(2, 2)).eval()


def write_and_load(model, file, format):
    """Export, and return what the file computes, which must be right for images that neither exporter nor check use."""
    export_model(model, file, format)
    assert check_export(model, file, format) <= ROUNDING
    x = images(model, batch=5, size=(70, 99))
    if format == 'onnx':
        loaded = onnxruntime.InferenceSession(str(file))
        found = torch.from_numpy(loaded.run(None, {'images': x.numpy()})[0])
    else:
        loaded = (torch._inductor.aoti_load_package if format == 'pt2' else torch.jit.load)(str(file))
        found = loaded(x)
    assert relative(found, copy.deepcopy(model).eval()(x).detach()) <= ROUNDING
    assert not found.requires_grad
    return loaded


@pytest.mark.parametrize('name', ['gunn24', pytest.param('sunn18', marks=pytest.mark.slow)])
def test_onnx(name, tmp_path):
    file = tmp_path / 'model.onnx'
    session = write_and_load(create_tiny(name).eval(), file, 'onnx')
    assert session.get_inputs()[0].shape == ['batch', 3, 'height', 'width']
    assert session.get_outputs()[0].shape == ['batch', 7]
    proto = onnx.load(file)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [('', ONNX_OPSET)]
    onnx.checker.check_model(proto, full_check=True)
    # Nothing of where it was written.
    assert b'.py' not in file.read_bytes()
    assert not {'BatchNormalization', 'Sub', 'Div'} & {node.op_type for node in proto.graph.node}


@pytest.mark.parametrize('name', ['gunn24', 'sunn18'])
def test_torchscript(name, tmp_path):
    model = create_tiny(name).train()
    before = copy.deepcopy(model.state_dict())
    scripted = write_and_load(model, tmp_path / 'model.pt', 'torchscript')
    # The norms are in the convolutions, but not in those of the model.
    assert not any('running_mean' in name for name in scripted.state_dict())
    assert model.training and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize('kwargs', [{}, dict(ordered=False, residual=False)])
def test_pt2(kwargs, tmp_path, monkeypatch):
    model = create_tiny('gunn15', channels=(4, 8), segments=(2, 2), **kwargs).eval()
    watched = mock.Mock(side_effect=torch._inductor.aoti_compile_and_package)
    monkeypatch.setattr(torch._inductor, 'aoti_compile_and_package', watched)
    package = write_and_load(model, tmp_path / 'model.pt2', 'pt2')
    # Not even one a layer, of which compiling would make loops for every segment.
    nodes = watched.call_args.args[0].graph.nodes
    assert not any(node.target is torch.ops.aten.cat.default for node in nodes)
    assert not any('forward' in vars(module) for module in model.modules())
    assert json.loads(package.loader.get_metadata()['input_size']) == [3, 32, 32]


def test_refused(tiny, tmp_path):
    for name, format, error, message in (
            ('model.h5', 'keras', ValueError, "format must be one of onnx, pt2, torchscript; got 'keras'"),
            ('model.pt', 'pt2', ValueError, "must end in .pt2; got '.*model.pt'"),
            ('missing/model.pt', 'torchscript', FileNotFoundError, 'missing')):
        with pytest.raises(error, match=message):
            export_model(tiny, tmp_path / name, format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('wrap', [
    torch.nn.DataParallel, timm.utils.ModelEmaV3, lambda model: torch.compile(model, backend='eager'),
    lambda model: create_tiny('gunn15', channels=(4, 8), segments=(2, 2), num_classes=0),
], ids=['DataParallel', 'ModelEmaV3', 'compiled', 'headless'])
def test_wrapped_compiled_and_headless_models(wrap, tiny, tmp_path):
    model = wrap(tiny)
    export_model(model, tmp_path / 'model.pt', 'torchscript')
    assert check_export(model, tmp_path / 'model.pt', 'torchscript') <= ROUNDING


@pytest.mark.parametrize('wrap', [
    lambda model: torch.nn.Sequential(model, torch.nn.Softmax(1)), torch.jit.script,
    lambda model: create_tiny('gunn15', channels=(4, 8), segments=(2, 2), features_only=True),
], ids=['Sequential', 'scripted', 'features_only'])
def test_other_models_are_refused(wrap, tiny, tmp_path):
    with pytest.raises(ValueError, match='cannot be exported. Accepted are what timm.create_model makes, without feat'):
        export_model(wrap(tiny), tmp_path / 'model.pt', 'torchscript')
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    file = tmp_path / 'model.pt'
    file.write_bytes(b'before')

    def fail(module, target, **kwargs):
        with open(target, 'wb') as half:
            half.write(b'half')
        raise OSError('No space left on device')

    monkeypatch.setattr(torch.jit, 'save', fail)
    with pytest.raises(OSError, match='No space left'):
        export_model(tiny, file, 'torchscript')
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b'before'


@pytest.mark.parametrize('factor', [1.1, float('nan')])
def test_check_finds_another_network(factor, tiny, tmp_path):
    file, other = tmp_path / 'model.pt', copy.deepcopy(tiny)
    other.stages[1].layer.units[1].blocks[0].conv2.conv.weight.data.mul_(factor)
    export_model(other, file, 'torchscript')
    with pytest.raises(RuntimeError, match=r'does not compute what the model does: (\d|nan).* off, over 1e-04'):
        check_export(tiny, file, 'torchscript')


@pytest.mark.parametrize('format', FORMATS)
def test_check_of_what_is_no_such_file(format, tiny, tmp_path):
    (tmp_path / 'other.pt2').write_bytes(b'something else')
    with pytest.raises(RuntimeError, match=f"other.pt2' cannot be run as a file of this model in format '{format}'"):
        check_export(tiny, tmp_path / 'other.pt2', format)


@pytest.fixture
def saved(tiny, tmp_path):
    """A network as timm saves it, by the name it then has."""
    timm.models.save_for_hf(
        tiny, tmp_path / 'saved', model_config=dict(label_names=list('abcdefg')), safe_serialization=True,
        model_args=dict(channels=(4, 8), segments=(2, 2)))
    return f"local-dir:{tmp_path / 'saved'}"


def metadata(file, format):
    if format == 'onnx':
        return onnxruntime.InferenceSession(str(file)).get_modelmeta().custom_metadata_map
    extra = {'metadata.json': ''}
    torch.jit.load(file, _extra_files=extra)
    return json.loads(extra['metadata.json'])


@pytest.mark.parametrize('format', ['onnx', 'torchscript'])
def test_command(format, saved, tiny, tmp_path, capsys):
    file = tmp_path / 'model'
    assert main(['export', saved, '--format', format, '--out', str(file), '--check']) == 0
    written, checked = capsys.readouterr().out.splitlines()
    assert written == f'{file}: {saved} as {format}, {file.stat().st_size:,} bytes'
    assert checked.startswith('largest relative difference from eager: ') and float(checked.split()[-1]) <= TOLERANCE
    found = metadata(file, format)
    assert found.pop('description').startswith('images: ')
    words = {key: found.pop(key) for key in ('architecture', 'interpolation', 'crop_mode')}
    assert words == {'architecture': 'gunn15', 'interpolation': 'bilinear', 'crop_mode': 'center'}
    assert {key: json.loads(value) for key, value in found.items()} == {
        'input_size': [3, 32, 32], 'mean': list(tiny.pretrained_cfg['mean']), 'std': list(tiny.pretrained_cfg['std']),
        'crop_pct': 1., 'label_names': list('abcdefg')}


def test_command_with_a_checkpoint(saved, tmp_path):
    trained = create_tiny('gunn15', channels=(4, 8), segments=(2, 2), num_classes=5).eval()
    checkpoint, file = tmp_path / 'checkpoint.pth.tar', tmp_path / 'model.pt'
    torch.save(dict(state_dict=trained.state_dict()), checkpoint)
    argv = ['export', saved, '--format', 'torchscript', '--out', str(file)]
    assert main([*argv, '--checkpoint', str(checkpoint), '--num-classes', '5']) == 0
    assert check_export(trained, file, 'torchscript') <= ROUNDING
    assert 'label_names' not in metadata(file, 'torchscript')
