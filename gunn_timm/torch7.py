"""Reading networks that were trained with the authors' Torch7 code, from the .t7 files that it saves.

A .t7 file is a stream of Lua values. The reader here takes the few kinds of which such a network consists, checks every
length against what is left of the file, and runs nothing that a file may hold.
"""
import math
import struct
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple, Union

import timm
import torch
from torch import nn

from .gunn import Gunn

__all__ = ['LuaObject', 'convert_torch7', 'read_torch7']

_NIL, _NUMBER, _STRING, _TABLE, _TORCH, _BOOLEAN = range(6)
_FUNCTIONS = (6, 7, 8)
_DTYPES = {
    'Byte': torch.uint8, 'Char': torch.int8, 'Short': torch.int16, 'Int': torch.int32, 'Long': torch.int64,
    'Half': torch.float16, 'Float': torch.float32, 'Double': torch.float64,
    'Cuda': torch.float32, 'CudaHalf': torch.float16, 'CudaDouble': torch.float64, 'CudaLong': torch.int64,
    'CudaInt': torch.int32, 'CudaByte': torch.uint8,
}
# More than any network nests, and fewer than Python can.
_MAX_DEPTH = 100


class LuaObject(NamedTuple):
    """An object of a Torch7 class, 'nn.Sequential' say.

    Attributes:
        class_name: Name of the class.
        fields: The object's table.
    """
    class_name: str
    fields: Dict[Any, Any]


class _Reader:
    """Reads one value after another from the bytes of a file."""

    def __init__(self, content: bytes):
        self.content, self.position = content, 0
        # Objects by the number that the file gives them: it writes each once.
        self.seen: Dict[int, Any] = {}

    def take(self, size: int, what: str) -> bytes:
        left = len(self.content) - self.position
        if not 0 <= size <= left:
            raise ValueError(f'{what} at byte {self.position} takes {size} bytes, and there are {left}')
        self.position += size
        return self.content[self.position - size:self.position]

    def integer(self, what: str) -> int:
        return struct.unpack('<i', self.take(4, what))[0]

    def longs(self, count: int, what: str) -> Tuple[int, ...]:
        return struct.unpack(f'<{count}q', self.take(8 * count, what))

    def string(self, what: str) -> str:
        return self.take(self.integer(what), what).decode('latin-1')

    def value(self, depth: int = 0) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError(f'values at byte {self.position} are nested more than {_MAX_DEPTH} deep')
        at = self.position
        kind = self.integer('the kind of a value')
        if kind == _NIL:
            return None
        if kind == _NUMBER:
            return struct.unpack('<d', self.take(8, 'a number'))[0]
        if kind == _STRING:
            return self.string('a string')
        if kind == _BOOLEAN:
            return self.integer('a boolean') == 1
        if kind not in (_TABLE, _TORCH):
            name = 'a Lua function' if kind in _FUNCTIONS else f'a value of unknown kind {kind}'
            raise ValueError(f'at byte {at} is {name}, which is not read')
        index = self.integer('the number of an object')
        if index not in self.seen:
            if kind == _TABLE:
                # Known before it is read, for it may hold itself.
                table = self.seen[index] = {}
                self.fill(table, depth)
            else:
                self.torch_object(index, depth)
        return self.seen[index]

    def fill(self, table: Dict[Any, Any], depth: int) -> None:
        for _ in range(self.integer('the length of a table')):
            at = self.position
            key = self.value(depth + 1)
            if not isinstance(key, (float, str, bool)):
                raise ValueError(f'the key of a table at byte {at} is neither a number, a string nor a boolean')
            table[key] = self.value(depth + 1)

    def torch_object(self, index: int, depth: int) -> None:
        at = self.position
        name = self.string('a version')
        if name.startswith('V '):
            name = self.string('the name of a class')
        library, _, kind = name.partition('.')
        if library in ('nn', 'cudnn'):
            found = self.seen[index] = LuaObject(name, {})
            table = self.value(depth + 1)
            if not isinstance(table, dict):
                raise ValueError(f"the object of class '{name}' at byte {at} has no table")
            found.fields.update(table)
        elif library == 'torch' and kind.endswith('Tensor') and kind[:-6] in _DTYPES:
            self.seen[index] = self.tensor(_DTYPES[kind[:-6]], depth)
        elif library == 'torch' and kind.endswith('Storage') and kind[:-7] in _DTYPES:
            dtype = _DTYPES[kind[:-7]]
            count, = self.longs(1, 'the length of a storage')
            content = bytearray(self.take(count * dtype.itemsize, 'a storage'))
            self.seen[index] = torch.frombuffer(content, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        else:
            raise ValueError(f"at byte {at} is an object of the unknown class '{name}'")

    def tensor(self, dtype: torch.dtype, depth: int) -> torch.Tensor:
        at = self.position
        ndim = self.integer('the dimensions of a tensor')
        size, stride = self.longs(ndim, 'the size of a tensor'), self.longs(ndim, 'the strides of a tensor')
        offset = self.longs(1, 'the offset of a tensor')[0] - 1
        storage = self.value(depth + 1)
        if not ndim or 0 in size or storage is None:
            return torch.empty(0, dtype=dtype)
        if not isinstance(storage, torch.Tensor) or storage.dtype != dtype:
            raise ValueError(f'the tensor at byte {at} has no storage of its type')
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        if min(size) < 0 or min(stride) < 0 or offset < 0 or math.prod(size) > len(storage) or last >= len(storage):
            raise ValueError(f'the tensor at byte {at} reaches beyond its storage of {len(storage)} values')
        return storage.as_strided(size, stride, offset)


def read_torch7(path: Union[str, Path]) -> Any:
    """Read the first value of a Torch7 file, as `torch.load` of Torch7 does, without running anything.

    Args:
        path: File in Torch7's binary format, written on a 64-bit little-endian machine.

    Returns:
        None, bool, float, str, dict for a table, tensor for a tensor or a storage, or `LuaObject`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or cut, or has a kind of value that a network does not need; the message says where.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No file '{path}'.")
    try:
        return _Reader(Path(path).read_bytes()).value()
    except ValueError as e:
        raise ValueError(f"'{path}' cannot be read as a Torch7 file: {e}.") from e


_WITHOUT_PARAMETERS = ('ReLU', 'SpatialAveragePooling', 'SpatialMaxPooling', 'CAddTable', 'Reshape', 'View', 'Identity')
_WITH_PARAMETERS = ('SpatialConvolution', 'SpatialConvolutionMM', 'SpatialBatchNormalization', 'Linear')
_CONTAINERS = ('Sequential', 'ConcatTable', 'GunnLayer')


def _layers(module: Any, depth: int = 0) -> Iterator[LuaObject]:
    """Yield the layers with parameters in the order in which the network holds them."""
    if not isinstance(module, LuaObject) or depth > _MAX_DEPTH:
        raise ValueError('it holds something else than modules, or itself')
    kind = module.class_name.split('.')[1]
    if kind in _CONTAINERS:
        modules = module.fields.get('modules')
        if not isinstance(modules, dict) or set(modules) != set(range(1, len(modules) + 1)):
            raise ValueError(f"a '{module.class_name}' has no list of modules")
        for i in range(1, len(modules) + 1):
            yield from _layers(modules[i], depth + 1)
    elif kind in _WITH_PARAMETERS:
        yield module
    elif kind not in _WITHOUT_PARAMETERS:
        raise ValueError(f"it has a layer of class '{module.class_name}', which the authors' networks do not have")


def _our_layers(model: Gunn) -> List[Tuple[str, nn.Module]]:
    """List our layers in the order in which the authors' code makes them: in a unit, the shortcut first."""
    layers: List[Tuple[str, nn.Module]] = []

    def add(prefix: str, module: nn.Module) -> None:
        layers.extend((f'{prefix}.{name}', m) for name, m in module.named_modules()
                      if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)))

    add('stem', model.stem)
    for i, stage in enumerate(model.stages):
        add(f'stages.{i}.downsample', stage.downsample)
        for j, unit in enumerate(stage.layer.units):
            prefix = f'stages.{i}.layer.units.{j}'
            if unit.shortcut is not None:
                add(f'{prefix}.shortcut', unit.shortcut)
            add(f'{prefix}.blocks', unit.blocks)
    add('final_conv', model.final_conv)
    return [*layers, ('fc', model.fc)]


def _tensor(layer: LuaObject, field: str, shape: Tuple[int, ...], name: str) -> torch.Tensor:
    found = layer.fields.get(field)
    if not isinstance(found, torch.Tensor) or found.numel() == 0:
        raise ValueError(f"the '{layer.class_name}' for {name} has no '{field}'")
    # SpatialConvolutionMM keeps its weight as a matrix.
    if found.numel() != math.prod(shape) or (found.ndim == len(shape) and tuple(found.shape) != shape):
        raise ValueError(f"the '{field}' for {name} has shape {tuple(found.shape)} and not {shape}")
    return found.reshape(shape).float().clone()


def _state_of(layer: LuaObject, module: nn.Module, name: str) -> Dict[str, torch.Tensor]:
    fields = ('weight', 'bias', 'running_mean', 'running_var')
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items() if key in fields}
    state = {f'{name}.{key}': _tensor(layer, key, shape, name) for key, shape in expected.items()}
    if isinstance(module, nn.BatchNorm2d):
        eps = layer.fields.get('eps', module.eps)
        if eps != module.eps:
            raise ValueError(f'the norm for {name} has an eps of {eps} and not {module.eps}')
        state[f'{name}.num_batches_tracked'] = torch.tensor(0)
    elif isinstance(module, nn.Conv2d):
        bias = layer.fields.get('bias')
        if isinstance(bias, torch.Tensor) and bias.count_nonzero():
            raise ValueError(f'the convolution for {name} has a bias, which the networks here do not')
    return state


def convert_torch7(path: Union[str, Path], model_name: str) -> Dict[str, torch.Tensor]:
    """Turn a network that the authors' Torch7 code saved into the weights of one of ours.

    Written after that code; no file that it saved was at hand to try this on.

    Args:
        path: The file, 'model_best.t7' say.
        model_name: Network of ours: 'gunn15', 'gunn18' or 'wide_gunn18'. The classes are counted in the file.

    Returns:
        State dict, for `timm.create_model(model_name, num_classes=...)`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such network, or damaged; the message says what is wrong.
    """
    if model_name not in ('gunn15', 'gunn18', 'wide_gunn18'):
        raise ValueError(f"Of the authors' code are gunn15, gunn18 and wide_gunn18; got '{model_name}'.")
    network = read_torch7(path)
    try:
        found = list(_layers(network))
        if not found or not found[-1].class_name.endswith('.Linear'):
            raise ValueError('it does not end in a Linear')
        weight = found[-1].fields.get('weight')
        num_classes = len(weight) if isinstance(weight, torch.Tensor) and weight.ndim else 0
        model = timm.create_model(model_name, num_classes=num_classes or 1, device='meta')
        expected = _our_layers(model)
        if len(found) != len(expected):
            raise ValueError(f'it has {len(found)} layers with parameters and not {len(expected)}')
        state: Dict[str, torch.Tensor] = {}
        for layer, (name, module) in zip(found, expected):
            kind = {nn.Conv2d: 'Convolution', nn.BatchNorm2d: 'BatchNormalization'}.get(type(module), 'Linear')
            if kind not in layer.class_name:
                raise ValueError(f"it has a '{layer.class_name}' where {name} is a {type(module).__name__}")
            state.update(_state_of(layer, module, name))
    except ValueError as e:
        raise ValueError(f"'{path}' is not a {model_name} of the authors' code: {e}.") from e
    return {key: state[key] for key in model.state_dict()}
