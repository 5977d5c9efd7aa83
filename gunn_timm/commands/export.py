"""Export for deployment: ONNX, AOTInductor and TorchScript files, and the check that a file computes the same."""
import copy
import functools
import importlib
import io
import json
import re
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Union

import torch
from timm.data import resolve_model_data_config
from timm.utils import reparameterize_model

from ..layers import GunnLayer
from ..zoo.files import write_file
from ..zoo.records import probe_images

__all__ = ['FORMATS', 'ONNX_OPSET', 'TOLERANCE', 'check_export', 'export_model']

# The one that PyTorch's exporter is written in, from 2.6 on; it would convert to any other.
ONNX_OPSET = 18
# Of outputs in float32. Other kernels add up in another order, which makes 1e-7 to 1e-6 in networks as deep as these; a
# file of other weights, or without one of its operations, is off by 1e-2 and more.
TOLERANCE = 1e-4


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise RuntimeError(
            f"Format 'onnx' needs the package {package} ({e}); install it with pip install '.[export]'.") from e


def _metadata(model: torch.nn.Module) -> Dict[str, str]:
    """Tell what to feed the network and what its outputs stand for; lists and numbers are in JSON."""
    cfg = model.pretrained_cfg
    config = resolve_model_data_config(model)
    in_chans = getattr(model, 'in_chans', config['input_size'][0])
    if config['input_size'][0] != in_chans:
        raise ValueError(
            f"The model takes {in_chans} channels, but its pretrained_cfg describes images of "
            f"{config['input_size'][0]}; give input_size, mean and std there for {in_chans}.")
    entries = dict(
        architecture=cfg.get('architecture', ''),
        description='images: resized to input_size / crop_pct, cropped to input_size; RGB, scaled to 0..1, less mean, '
                    'over std; float32 (batch, channels, height, width), contiguous. output: logits (batch, classes)',
        **{key: config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')})
    labels = cfg.get('label_names') or ()
    if labels and len(labels) == model.num_classes:  # else those of other classes
        entries['label_names'] = labels
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}


def _program(model: torch.nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    open_dim = torch.export.Dim.DYNAMIC
    # Strict tracing does not get past the question whether autocast is on before PyTorch 2.7.
    return torch.export.export(
        model, (images,), dynamic_shapes=({0: open_dim, 2: open_dim, 3: open_dim},), strict=False)


def _to_onnx(model: torch.nn.Module, images: torch.Tensor, metadata: Dict[str, str]) -> bytes:
    _require('onnxscript')
    proto = torch.onnx.export(
        _program(model, images), (), dynamo=True, opset_version=ONNX_OPSET, input_names=['images'],
        output_names=['output'], optimize=True, verbose=False).model_proto
    graph = proto.graph
    # Weights have their shapes; those said once more are in the way of ONNX Runtime's quantizer, which transposes some.
    weights = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.value_info if value.name not in weights]
    graph.ClearField('value_info')
    graph.value_info.extend(values)
    # The exporter notes the paths of the Python code that each node comes from.
    for part in (graph, *graph.node, *graph.value_info):
        part.ClearField('metadata_props')
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    dims = graph.input[0].type.tensor_type.shape.dim
    names = {dims[axis].dim_param: name for axis, name in ((0, 'batch'), (2, 'height'), (3, 'width'))}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r'\w+', lambda match: names.get(match[0], match[0]), dim.dim_param)
    return proto.SerializeToString()


def _update_in_place(layer: GunnLayer, x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    for unit, segment in zip(layer.units, y.chunk(layer.num_segments, dim=1)):
        out = unit(y if layer.ordered else x)
        segment.copy_(segment + out if layer.residual else out)
    return y


def _to_pt2(model: torch.nn.Module, images: torch.Tensor, metadata: Dict[str, str]) -> bytes:
    # Imported here because it takes seconds.
    from torch._inductor import aoti_compile_and_package, cpp_builder
    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as e:
        raise RuntimeError(
            "Format 'pt2' needs a C++ compiler, and none was found; install g++, or name one in the environment "
            'variable CXX.') from e
    # What updates one state is compiled to code that does so. Concatenating before every unit, which tracing would see,
    # becomes loops whose number grows with the square of the number of segments, and minutes of compiling hours.
    for module in model.modules():
        if isinstance(module, GunnLayer):
            module.forward = functools.partial(_update_in_place, module)
    with tempfile.TemporaryDirectory() as folder:
        return Path(aoti_compile_and_package(
            _program(model, images), package_path=f'{folder}/model.pt2',
            inductor_configs={'aot_inductor.metadata': metadata})).read_bytes()


def _to_torchscript(model: torch.nn.Module, images: torch.Tensor, metadata: Dict[str, str]) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file, _extra_files={'metadata.json': json.dumps(metadata)})
    return file.getvalue()


_WRITERS: Dict[str, Callable[[torch.nn.Module, torch.Tensor, Dict[str, str]], bytes]] = {
    'onnx': _to_onnx, 'pt2': _to_pt2, 'torchscript': _to_torchscript}
FORMATS = tuple(_WRITERS)


def _check_format(format: str, path: Union[str, Path]) -> None:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got '{format}'.")
    # PyTorch's loader takes no other.
    if format == 'pt2' and Path(path).suffix != '.pt2':
        raise ValueError(f"The name of a file in format 'pt2' must end in .pt2; got '{path}'.")


def export_model(model: torch.nn.Module, path: Union[str, Path], format: str) -> None:
    """Write a model to a file for deployment, for batches and images of any size.

    The norms are fused into the convolutions. The input is 'images', shape (N, C, H, W), normalised, and for a pt2
    package contiguous, which it does not check: of channels_last it computes something else. The output is 'output',
    shape (N, num_classes), or (N, num_features) without a classifier. The file has metadata that a deployer needs:
    architecture, description, input_size, mean, std, interpolation, crop_pct, crop_mode and, if they are known,
    label_names; lists and numbers in JSON. They are the metadata_props of an ONNX file, the metadata of a pt2 package's
    loader, and metadata.json in a TorchScript file.

    Args:
        model: Model of timm's in float32, whose pretrained_cfg describes its images; it is not changed.
        path: File to write, as a whole or not at all; what was there is replaced.
        format: 'onnx' (opset `ONNX_OPSET`), 'pt2' (compiled by AOTInductor for the model's device and for processors
            like this machine's, which takes a minute and more; for the PyTorch that wrote it) or 'torchscript'.

    Raises:
        ValueError: `format` is none of these, a pt2 file is named otherwise, the model is not in float32, or its
            pretrained_cfg is for other images.
        FileNotFoundError: The folder to write to does not exist.
        RuntimeError: A package or the C++ compiler is missing, or PyTorch cannot export the model.
    """
    _check_format(format, path)
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"No folder '{Path(path).parent}' to write '{Path(path).name}' to.")
    dtypes = {str(p.dtype).removeprefix('torch.') for p in model.parameters()}
    if dtypes != {'float32'}:
        raise ValueError(f"The model must be in float32; it is in {', '.join(sorted(dtypes))}.")
    metadata = _metadata(model)
    # Of two images: a batch of one would be taken for the only size there is.
    images = probe_images(json.loads(metadata['input_size']))[:2].to(next(model.parameters()).device)
    # Before PyTorch 2.7 the ONNX exporter cannot translate norms that are not fused.
    fused = reparameterize_model(model).eval().requires_grad_(False)
    write_file(path, _WRITERS[format](fused, images, metadata))


def _load(path: Union[str, Path], format: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if format == 'pt2':
        from torch._inductor import aoti_load_package
        return aoti_load_package(str(path))
    if format == 'torchscript':
        return torch.jit.load(str(path))
    import onnxruntime
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(['output'], {'images': images.cpu().numpy()})[0])


@torch.no_grad()
def check_export(model: torch.nn.Module, path: Union[str, Path], format: str) -> float:
    """Run an exported file in its own runtime (ONNX Runtime, AOTInductor, TorchScript) and compare it with the model.

    Batches are of one and three images, the images of the model's size and of a larger one that is not square.

    Args:
        model: Model that was exported.
        path: The file.
        format: Its format.

    Returns:
        The largest difference of a batch's outputs, as a share of what the model computes: a ratio of norms.

    Raises:
        ValueError: `format` is none of `FORMATS`, or the model's pretrained_cfg is for other images.
        FileNotFoundError: There is no such file.
        RuntimeError: A package is missing, the file cannot be run, or it differs by more than `TOLERANCE`.
    """
    _check_format(format, path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"No exported file '{path}'.")
    if format == 'onnx':
        _require('onnxruntime')
    channels, height, width = json.loads(_metadata(model)['input_size'])
    device = next(model.parameters()).device
    eager = copy.deepcopy(model).eval()
    shares = []
    try:
        exported = _load(path, format)
        for size in ((height, width), (height + 32, width + 16)):
            images = probe_images((channels, *size)).to(device)
            for batch_size in (1, 3):
                expected = eager(images[:batch_size])
                difference = exported(images[:batch_size]).to(device) - expected
                shares.append(difference.norm() / expected.norm())
    except Exception as e:  # each runtime has errors of its own
        raise RuntimeError(f"'{path}' cannot be run as a file of this model in format '{format}' ({e}).") from e
    # Of PyTorch's, which is NaN if one of them is.
    largest = torch.stack(shares).max().item()
    if not largest <= TOLERANCE:
        raise RuntimeError(
            f"'{path}' does not compute what the model does: the largest relative difference is {largest:.1e}, "
            f'accepted is {TOLERANCE:.0e}.')
    return largest
