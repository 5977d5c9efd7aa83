"""Exported files of networks of a few channels: what they compute, what they say of themselves, and how they fail."""
import copy
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import create_tiny, images, relative
from torch import nn

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


def odd_images(model):
    """Images of another number, height and width than the exporter and the check use."""
    return images(model, batch=5, size=(70, 99))


def scale(parameter, factor):
    def change(model):
        with torch.no_grad():
            model.get_parameter(parameter).mul_(factor)
    return change


def test_onnx(tiny_name, tmp_path):
    model = create_tiny(tiny_name).eval()
    file = tmp_path / 'model.onnx'
    export_model(model, file, 'onnx')
    assert check_export(model, file, 'onnx') <= ROUNDING
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    x = odd_images(model)
    logits, = session.run(['output'], {'images': x.numpy()})
    assert relative(torch.from_numpy(logits), model(x).detach()) <= ROUNDING

    assert session.get_inputs()[0].shape == ['batch', 3, 'height', 'width']
    assert session.get_outputs()[0].shape == ['batch', 7]
    proto = onnx.load(file)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [('', ONNX_OPSET)]
    onnx.checker.check_model(proto, full_check=True)
    # Nothing of where it was written.
    assert b'.py' not in file.read_bytes()
    assert not {'BatchNormalization', 'Sub', 'Div'} & {node.op_type for node in proto.graph.node}


def test_torchscript(tiny_name, tmp_path):
    model = create_tiny(tiny_name).eval()
    file = tmp_path / 'model.pt'
    export_model(model, file, 'torchscript')
    assert check_export(model, file, 'torchscript') <= ROUNDING
    scripted = torch.jit.load(file)
    x = odd_images(model)
    assert relative(scripted(x), model(x).detach()) <= ROUNDING
    # The norms are in the convolutions, and nothing is kept for a backward pass.
    assert not any('running_mean' in name for name in scripted.state_dict())
    assert not scripted(x).requires_grad


@pytest.mark.parametrize('name', ['gunn15', 'sunn15', 'gunn15_nores'])
def test_pt2(name, tmp_path, monkeypatch):
    model = create_tiny(name, channels=(4, 8), segments=(2, 2)).eval()
    file = tmp_path / 'model.pt2'
    programs, package_program = [], torch._inductor.aoti_compile_and_package

    def watch(program, **kwargs):
        programs.append(program)
        return package_program(program, **kwargs)

    monkeypatch.setattr(torch._inductor, 'aoti_compile_and_package', watch)
    export_model(model, file, 'pt2')
    # Not even one a layer, of which compiling would make loops for every segment.
    program, = programs
    assert not any(node.target is torch.ops.aten.cat.default for node in program.graph.nodes)
    assert not any('forward' in vars(module) for module in model.modules())
    assert check_export(model, file, 'pt2') <= ROUNDING
    package = torch._inductor.aoti_load_package(str(file))
    x = odd_images(model)
    before = x.clone()
    assert relative(package(x), model(x).detach()) <= ROUNDING
    assert torch.equal(x, before)
    assert json.loads(package.loader.get_metadata()['input_size']) == [3, 32, 32]
    scale('fc.weight', 1.01)(model)
    with pytest.raises(RuntimeError, match='does not compute what the model does'):
        check_export(model, file, 'pt2')


def metadata(file, format):
    if format == 'torchscript':
        extra = {'metadata.json': ''}
        torch.jit.load(file, _extra_files=extra)
        return json.loads(extra['metadata.json'])
    return onnxruntime.InferenceSession(
        str(file), providers=['CPUExecutionProvider']).get_modelmeta().custom_metadata_map


def test_names_of_other_classes_are_left_out(tiny, tmp_path):
    file = tmp_path / 'model.pt'
    export_model(tiny, file, 'torchscript')
    assert 'label_names' not in metadata(file, 'torchscript')


def test_the_model_is_not_changed(tiny, tmp_path):
    tiny.train()
    before = copy.deepcopy(tiny.state_dict())
    export_model(tiny, tmp_path / 'model.pt', 'torchscript')
    check_export(tiny, tmp_path / 'model.pt', 'torchscript')
    assert tiny.training and all(p.requires_grad for p in tiny.parameters())
    assert before.keys() == tiny.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in tiny.state_dict().items())


@pytest.mark.parametrize('name, format, kwargs, error, message', [
    ('model.h5', 'keras', {}, ValueError, "format must be one of onnx, pt2, torchscript; got 'keras'"),
    ('model.pt', 'pt2', {}, ValueError, "must end in .pt2; got '.*model.pt'"),
    ('missing/model.pt', 'torchscript', {}, FileNotFoundError, "No folder '.*missing' to write 'model.pt' to"),
    ('model.pt', 'torchscript', dict(dtype=torch.float16), ValueError, 'must be in float32; it is in float16'),
    ('model.pt', 'torchscript', dict(in_chans=1), ValueError, 'takes 1 channels, .* pretrained_cfg .* images of 3'),
])
def test_refused(name, format, kwargs, error, message, tmp_path):
    model = create_tiny('gunn15', **kwargs)
    with pytest.raises(error, match=message):
        export_model(model, tmp_path / name, format)
    assert list(tmp_path.iterdir()) == []


def test_other_channels_are_taken_where_they_are_described(tmp_path):
    model = create_tiny('gunn15', channels=(4, 8), segments=(2, 2), in_chans=1)
    model.pretrained_cfg.update(input_size=(1, 24, 28), mean=(0.5,), std=(0.25,))
    export_model(model, tmp_path / 'model.pt', 'torchscript')
    assert check_export(model, tmp_path / 'model.pt', 'torchscript') <= ROUNDING


@pytest.mark.parametrize('place', ['exporter', 'disk'])
def test_a_file_is_written_whole_or_not_at_all(place, tiny, tmp_path, monkeypatch):
    file = tmp_path / 'model.pt'
    file.write_bytes(b'before')

    def fail(target, content, *args, **kwargs):
        if place == 'disk':
            with open(target, 'wb') as half:
                half.write(content[:len(content) // 2])
        raise OSError('No space left on device')

    monkeypatch.setattr(*((Path, 'write_bytes') if place == 'disk' else (torch.jit, 'save')), fail)
    with pytest.raises(OSError, match='No space left'):
        export_model(tiny, file, 'torchscript')
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b'before'


def test_missing_packages_are_named(tiny, tmp_path, monkeypatch):
    file = tmp_path / 'model.onnx'
    file.touch()
    # As Python marks what cannot be imported.
    for package, call in (('onnxscript', export_model), ('onnxruntime', check_export)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(RuntimeError, match=rf"needs the package {package} .* pip install '\.\[export\]'"):
            call(tiny, file, 'onnx')


def test_a_missing_compiler_is_named(tiny, tmp_path):
    from torch._inductor import config
    with config.patch({'cpp.cxx': (None, 'no-such-compiler')}), pytest.raises(RuntimeError, match=r'install g\+\+'):
        export_model(tiny, tmp_path / 'model.pt2', 'pt2')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('change, difference', [
    (scale('stages.1.layer.units.1.blocks.0.conv2.conv.weight', 1.1), r'\d'),
    (scale('stages.0.layer.units.0.shortcut.bn.bias', 1.1), r'\d'),
    (scale('fc.weight', float('nan')), 'nan'),
    (lambda model: setattr(model.stages[1].layer, 'residual', False), r'\d'),
    (lambda model: setattr(model.stages[0].layer, 'ordered', False), r'\d'),
    (lambda model: setattr(model.final_conv, 'act', nn.Identity()), r'\d'),
])
def test_check_finds_another_network(change, difference, tiny, tmp_path):
    other = copy.deepcopy(tiny)
    change(other)
    file = tmp_path / 'model.pt'
    export_model(other, file, 'torchscript')
    with pytest.raises(RuntimeError, match=f'largest relative difference is {difference}.*accepted is 1e-04'):
        check_export(tiny, file, 'torchscript')


@pytest.mark.parametrize('format, name', zip(FORMATS, ('model.onnx', 'model.pt2', 'model.pt')))
def test_check_of_what_is_no_such_file(format, name, tiny, tmp_path):
    file = tmp_path / name
    with pytest.raises(FileNotFoundError, match='No exported file'):
        check_export(tiny, file, format)
    file.write_bytes(b'something else')
    with pytest.raises(RuntimeError, match=f"{name}' cannot be run as a file of this model in format '{format}'"):
        check_export(tiny, file, format)


@pytest.fixture
def saved(tiny, tmp_path):
    """A network as timm saves it, by the name it then has."""
    timm.models.save_for_hf(
        tiny, tmp_path / 'saved', model_config=dict(label_names=list('abcdefg')), safe_serialization=True,
        model_args=dict(channels=(4, 8), segments=(2, 2)))
    return f"local-dir:{tmp_path / 'saved'}"


@pytest.mark.parametrize('format, name, said', [
    ('onnx', 'model.onnx', f'onnx, opset {ONNX_OPSET},'), ('torchscript', 'model.pt', 'torchscript,')])
def test_command(format, name, said, saved, tiny, tmp_path, capsys):
    file = tmp_path / name
    assert main(['export', saved, '--format', format, '--out', str(file), '--check']) == 0
    written, checked = capsys.readouterr().out.splitlines()
    assert written == f'{file}: {saved} as {said} {file.stat().st_size:,} bytes'
    assert checked.startswith('largest relative difference from eager: ') and float(checked.split()[-1]) <= TOLERANCE
    assert check_export(tiny, file, format) <= ROUNDING
    found = metadata(file, format)
    assert found.pop('description').startswith('images: ')
    words = {key: found.pop(key) for key in ('architecture', 'interpolation', 'crop_mode')}
    assert words == {'architecture': 'gunn15', 'interpolation': 'bilinear', 'crop_mode': 'center'}
    assert {key: json.loads(value) for key, value in found.items()} == {
        'input_size': [3, 32, 32], 'mean': list(tiny.pretrained_cfg['mean']), 'std': list(tiny.pretrained_cfg['std']),
        'crop_pct': 1., 'label_names': list('abcdefg')}


def test_command_with_a_checkpoint(saved, tmp_path, capsys):
    trained = create_tiny('gunn15', channels=(4, 8), segments=(2, 2), num_classes=7).eval()
    scale('fc.weight', 3.)(trained)
    checkpoint, file = tmp_path / 'checkpoint.pth.tar', tmp_path / 'model.pt'
    torch.save(dict(state_dict=trained.state_dict()), checkpoint)
    argv = ['export', saved, '--format', 'torchscript', '--out', str(file), '--check']
    assert main([*argv, '--checkpoint', str(checkpoint), '--num-classes', '7']) == 0
    assert check_export(trained, file, 'torchscript') <= ROUNDING
    # Whose names they were is another matter than whose classes these are.
    assert 'label_names' not in metadata(file, 'torchscript')
    capsys.readouterr()
    assert main([*argv, '--num-classes', '7']) == 2
    assert capsys.readouterr().err == 'error: --num-classes goes with --checkpoint.\n'


def test_command_fails_where_the_check_does(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('gunn_timm.commands.export.TOLERANCE', 0.)
    file = tmp_path / 'model.pt'
    assert main(['export', saved, '--format', 'torchscript', '--out', str(file), '--check']) == 2
    assert 'does not compute what the model does' in capsys.readouterr().err
