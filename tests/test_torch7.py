"""Conversion of the authors' Torch7 files, on files that are written here as their code would write them."""
import random
import struct

import pytest
import safetensors.torch
import timm
import torch
from conftest import randomize

from gunn_timm.cli import main
from gunn_timm.torch7 import LuaObject, convert_torch7, read_torch7


class Writer:
    """Torch7's binary serialisation."""

    def __init__(self):
        self.parts, self.count = [], 0

    def integer(self, *values):
        self.parts.append(struct.pack(f'<{len(values)}i', *values))

    def long(self, *values):
        self.parts.append(struct.pack(f'<{len(values)}q', *values))

    def string(self, text):
        self.integer(len(text))
        self.parts.append(text.encode())

    def header(self, kind):
        self.count += 1
        self.integer(kind, self.count)

    def torch_class(self, name):
        self.header(4)
        self.string('V 1')
        self.string(name)

    def value(self, value):
        if value is None:
            self.integer(0)
        elif isinstance(value, bool):
            self.integer(5, int(value))
        elif isinstance(value, (int, float)):
            self.integer(1)
            self.parts.append(struct.pack('<d', value))
        elif isinstance(value, str):
            self.integer(2)
            self.string(value)
        elif isinstance(value, list):
            self.value({i + 1: item for i, item in enumerate(value)})
        elif isinstance(value, dict):
            self.header(3)
            self.integer(len(value))
            for key, item in value.items():
                self.value(key)
                self.value(item)
        elif isinstance(value, LuaObject):
            self.torch_class(value.class_name)
            self.value(value.fields)
        else:
            kind = {torch.float32: 'Float', torch.float64: 'Double'}[value.dtype]
            self.torch_class(f'torch.{kind}Tensor')
            self.integer(value.ndim)
            self.long(*value.shape)
            self.long(*value.stride())
            self.long(value.storage_offset() + 1)
            self.torch_class(f'torch.{kind}Storage')
            storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
            self.long(len(storage))
            self.parts.append(storage.numpy().tobytes())
        return self

    def save(self, path):
        path.write_bytes(b''.join(self.parts))
        return path


def layer(name, **fields):
    # As `clearState` leaves them.
    return LuaObject(name, {'train': True, 'output': torch.empty(0), **fields})


def conv_norm(module, act=True):
    conv, bn = module.conv, module.bn
    return [
        layer('cudnn.SpatialConvolution', weight=conv.weight.detach(), kW=conv.kernel_size[0]),
        layer('cudnn.SpatialBatchNormalization', weight=bn.weight.detach(), bias=bn.bias.detach(), eps=1e-5,
              running_mean=bn.running_mean, running_var=bn.running_var),
        *([layer('cudnn.ReLU', inplace=True)] if act else [])]


def unit(module):
    block = module.blocks[0]
    branch = layer('nn.Sequential', modules=[
        *conv_norm(block.conv1), *conv_norm(block.conv2), *conv_norm(block.conv3, act=False)])
    if module.shortcut is None:
        return branch
    shortcut = layer('nn.Sequential', modules=conv_norm(module.shortcut, act=False))
    both = layer('nn.ConcatTable', modules=[shortcut, branch])
    return layer('nn.Sequential', modules=[both, layer('nn.CAddTable', inplace=True)])


def network(model):
    """The tables of models/gunn-15.lua and models/gunn-18.lua, with models/GunnLayer.lua."""
    is_cifar = isinstance(model.final_conv, torch.nn.Module) and hasattr(model.final_conv, 'conv')
    modules = conv_norm(model.stem.conv1)
    if not is_cifar:
        modules.append(layer('nn.SpatialMaxPooling', kW=3))
    modules += conv_norm(model.stem.conv2)
    for i, stage in enumerate(model.stages):
        if i:
            parts = [conv_norm(stage.downsample.conv), [layer('cudnn.SpatialAveragePooling', kW=2)]]
            modules += sum(parts if is_cifar else parts[::-1], [])
        modules.append(layer('nn.GunnLayer', modules=[unit(u) for u in stage.layer.units], inputTable={}))
    if is_cifar:
        modules += conv_norm(model.final_conv)
    modules += [layer('cudnn.SpatialAveragePooling', kW=8), layer('nn.Reshape', size=torch.ones(1))]
    modules.append(layer('nn.Linear', weight=model.fc.weight.detach(), bias=model.fc.bias.detach()))
    return layer('nn.Sequential', modules=modules)


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return randomize(timm.create_model('gunn15', num_classes=7))


@pytest.fixture(scope='module')
def file(model, tmp_path_factory):
    return Writer().value(network(model)).save(tmp_path_factory.mktemp('t7') / 'model_best.t7')


def test_converted_network_is_the_same(model, file, tmp_path, capsys):
    out = tmp_path / 'gunn15.safetensors'
    assert main(['convert-torch7', str(file), '--model', 'gunn15', '--out', str(out)]) == 0
    assert capsys.readouterr().out == f'{out}: gunn15 with 7 classes\n'
    assert [path.name for path in tmp_path.iterdir()] == ['gunn15.safetensors']
    found, expected = safetensors.torch.load_file(out), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    again = timm.create_model('gunn15', num_classes=7, checkpoint_path=str(out))
    assert torch.equal(again.fc.weight, model.fc.weight)


def test_imagenet_network(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('gunn18', num_classes=3)
    path = Writer().value(network(model)).save(tmp_path / 'model.t7')
    found, expected = convert_torch7(path, 'gunn18'), model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_values(tmp_path):
    value = {'a': [1, 2.5, True, None], 'b': torch.arange(6.).view(2, 3).t(), 'c': torch.zeros(0), 3: 'text',
             'd': torch.arange(4, dtype=torch.double)[1:3]}
    found = read_torch7(Writer().value(value).save(tmp_path / 'x.t7'))
    assert found['a'] == {1: 1, 2: 2.5, 3: True, 4: None} and found[3] == 'text'
    for key in 'bcd':
        assert torch.equal(found[key], value[key])


def test_an_object_written_once_is_one_object(tmp_path):
    writer = Writer()
    writer.integer(3, 1, 1)
    writer.value('itself')
    writer.integer(3, 1)
    found = read_torch7(writer.save(tmp_path / 'x.t7'))
    assert found['itself'] is found


def edited(model, edit):
    net = network(model)
    edit(net.fields['modules'])
    return net


def without_first_unit(modules):
    del modules[6].fields['modules'][0]


def set_field(index, field, value):
    return lambda modules: modules[index].fields.update({field: value})


@pytest.mark.parametrize('edit, message', [
    (lambda modules: modules.pop(), 'it does not end in a Linear'),
    (without_first_unit, 'it has 603 layers with parameters and not 611'),
    (set_field(0, 'weight', torch.zeros(64, 3, 5, 5)), r"the 'weight' for stem.conv1.conv has shape \(64, 3, 5, 5\)"),
    (set_field(0, 'bias', torch.ones(64)), 'the convolution for stem.conv1.conv has a bias'),
    (set_field(1, 'running_var', None), "the 'cudnn.SpatialBatchNormalization' for stem.conv1.bn has no 'running_var'"),
    (set_field(1, 'eps', 1e-3), 'the norm for stem.conv1.bn has an eps of 0.001 and not 1e-05'),
    (lambda m: m.insert(0, layer('nn.Dropout')), "it has a layer of class 'nn.Dropout', which the authors'"),
    (lambda m: m.insert(0, m.pop(1)), "it has a 'cudnn.SpatialBatchNormalization' where stem.conv1.conv is a Conv2d"),
    (lambda m: m.insert(0, 'text'), 'it holds something else than modules'),
    (set_field(6, 'modules', {}), 'it has 451 layers with parameters and not 611'),
    (set_field(6, 'modules', 5), "a 'nn.GunnLayer' has no list of modules"),
])
def test_other_networks_are_refused(edit, message, model, tmp_path):
    path = Writer().value(edited(model, edit)).save(tmp_path / 'x.t7')
    with pytest.raises(ValueError, match=f"x.t7' is not a gunn15 of the authors' code: {message}"):
        convert_torch7(path, 'gunn15')


def test_wrong_name_and_missing_file(file, tmp_path, capsys):
    for path, name, message in (
            (file, 'gunn24', "Of the authors' code are gunn15, gunn18 and wide_gunn18; got 'gunn24'."),
            (file, 'gunn18', "is not a gunn18 of the authors' code: it has 611 layers"),
            (tmp_path / 'none.t7', 'gunn15', "none.t7'.")):
        assert main(['convert-torch7', str(path), '--model', name, '--out', str(tmp_path / 'x')]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('content, message', [
    (b'', 'the kind of a value at byte 0 takes 4 bytes, and there are 0'),
    (struct.pack('<i', 99), 'at byte 0 is a value of unknown kind 99'),
    (struct.pack('<i', 6), 'at byte 0 is a Lua function, which is not read'),
    (struct.pack('<ii', 2, -1), 'a string at byte 8 takes -1 bytes'),
    (struct.pack('<ii', 2, 2 ** 31 - 1), 'a string at byte 8 takes 2147483647 bytes, and there are 0'),
    (struct.pack('<iii', 3, 1, 1) + struct.pack('<i', 0) * 2, 'the key of a table at byte 12 is neither'),
    (struct.pack('<iii', 3, 1, 1) * 1, 'the kind of a value at byte 12'),
    (b''.join(struct.pack('<iii', 3, i, 1) for i in range(200)), 'nested more than 100 deep'),
    (b''.join(Writer().value(LuaObject('os.execute', {})).parts), "the unknown class 'os.execute'"),
    (struct.pack('<iii3si8si', 4, 1, 3, b'V 1', 8, b'nn.Dummy', 0), "'nn.Dummy' at byte 8 has no table"),
])
def test_damaged_files(content, message, tmp_path):
    (tmp_path / 'x.t7').write_bytes(content)
    with pytest.raises(ValueError, match=f"x.t7' cannot be read as a Torch7 file: .*{message}"):
        read_torch7(tmp_path / 'x.t7')


@pytest.mark.parametrize('size, stride, offset', [
    ((3, 3), (3, 1), 0), ((2, 3), (4, 1), 0), ((2, 3), (3, 1), 1), ((-1, 3), (3, 1), 0), ((2, 3), (-1, 1), 3),
    ((2, 3), (3, 1), -1), ((2 ** 62, 4), (0, 0), 0),
])
def test_tensors_stay_within_their_storage(size, stride, offset, tmp_path):
    writer = Writer()
    writer.torch_class('torch.FloatTensor')
    writer.integer(2)
    writer.long(*size, *stride, offset + 1)
    writer.torch_class('torch.FloatStorage')
    writer.long(6)
    writer.parts.append(bytes(24))
    with pytest.raises(ValueError, match='reaches beyond its storage of 6 values'):
        read_torch7(writer.save(tmp_path / 'x.t7'))


def test_cut_and_changed_files_are_read_or_refused(tmp_path):
    """Whatever bytes are wrong, there is a network or a ValueError, never another error."""
    tiny = layer('nn.Sequential', modules=[
        layer('cudnn.SpatialConvolution', weight=torch.randn(2, 3, 1, 1)),
        layer('nn.GunnLayer', modules=[layer('nn.Linear', weight=torch.randn(2, 2), bias=torch.randn(2))])])
    content = b''.join(Writer().value(tiny).parts)
    path = tmp_path / 'x.t7'
    for end in range(0, len(content), 3):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError):
            read_torch7(path)
    generator = random.Random(0)
    refused = 0
    for _ in range(500):
        changed = bytearray(content)
        for _ in range(generator.choice((1, 2, 8))):
            byte = generator.choice((0, 1, 3, 4, 127, 255, generator.randrange(256)))
            changed[generator.randrange(len(changed))] = byte
        path.write_bytes(changed)
        try:
            convert_torch7(path, 'gunn15')
        except ValueError:
            refused += 1
    assert refused == 500
