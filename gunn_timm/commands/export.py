"""Export for deployment: ONNX, AOTInductor and TorchScript files, and the check that a file computes the same."""
import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Callable, Dict, Union

import torch
from timm.data import resolve_model_data_config
from timm.utils import reparameterize_model, unwrap_model

from ..layers import GunnLayer
from ..zoo.records import probe_images

__all__ = ['FORMATS', 'ONNX_OPSET', 'TOLERANCE', 'check_export', 'export_model']

ONNX_OPSET = 18  # the one that PyTorch's exporter is written in, from 2.6 on; it would convert to any other
TOLERANCE = 1e-4  # other kernels add up in another order, which makes 1e-7 to 1e-6; other weights make 1e-2 and more

_ACCEPTED = (
    '{} cannot be exported. Accepted are what timm.create_model makes, without features_only, and what torch.compile, '
    'DataParallel, DistributedDataParallel and ModelEma make of it.')


def _unwrap(model: torch.nn.Module) -> torch.nn.Module:
    model = unwrap_model(model)
    if not isinstance(getattr(model, 'pretrained_cfg', None), dict):
        raise ValueError(_ACCEPTED.format(type(model).__name__))
    return model


def _metadata(model: torch.nn.Module) -> Dict[str, str]:
    """Tell how to prepare images and what the outputs stand for; lists and numbers are in JSON."""
    config, labels = resolve_model_data_config(model), model.pretrained_cfg.get('label_names') or ()
    entries = dict(
        architecture=model.pretrained_cfg.get('architecture', ''),
        description='images: RGB in 0..1, less mean, over std, in contiguous float32; output: logits',
        **{key: config[key] for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')})
    if labels and len(labels) == model.num_classes:  # else those of other classes
        entries['label_names'] = labels
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}


def _trace(model: torch.nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    open_dims = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    # Strict tracing does not get past the question whether autocast is on before PyTorch 2.7.
    return torch.export.export(model, (images,), dynamic_shapes=(open_dims,), strict=False)


def _write_onnx(model: torch.nn.Module, images: torch.Tensor, metadata: Dict[str, str], file: Path) -> None:
    proto = torch.onnx.export(
        _trace(model, images), (), dynamo=True, opset_version=ONNX_OPSET, input_names=['images'],
        output_names=['output'], verbose=False).model_proto
    graph = proto.graph
    # ONNX Runtime finds shapes itself, and those of weights are in the way of its quantizer, which transposes some.
    graph.ClearField('value_info')
    # The exporter notes the paths of the Python code that each node comes from.
    for part in (graph, *graph.node):
        part.ClearField('metadata_props')
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    for axis, name in ((0, 'batch'), (2, 'height'), (3, 'width')):
        graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    graph.output[0].type.tensor_type.shape.dim[0].dim_param = 'batch'
    file.write_bytes(proto.SerializeToString())


def _update_in_place(layer: GunnLayer, x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    for unit, segment in zip(layer.units, y.chunk(layer.num_segments, dim=1)):
        out = unit(y if layer.ordered else x)
        segment.copy_(segment + out if layer.residual else out)
    return y


def _write_pt2(model: torch.nn.Module, images: torch.Tensor, metadata: Dict[str, str], file: Path) -> None:
    # What updates one state is compiled to code that does so. Concatenating before every unit, which tracing would see,
    # becomes loops whose number grows with the square of the number of segments, and minutes of compiling hours.
    for module in model.modules():
        if isinstance(module, GunnLayer):
            module.forward = functools.partial(_update_in_place, module)
    torch._inductor.aoti_compile_and_package(
        _trace(model, images), package_path=str(file), inductor_configs={'aot_inductor.metadata': metadata})


def _write_torchscript(model: torch.nn.Module, images: torch.Tensor, metadata: Dict[str, str], file: Path) -> None:
    torch.jit.save(torch.jit.script(model), str(file), _extra_files={'metadata.json': json.dumps(metadata)})


FORMATS = {'onnx': _write_onnx, 'pt2': _write_pt2, 'torchscript': _write_torchscript}


def export_model(model: torch.nn.Module, path: Union[str, Path], format: str) -> None:
    """Write a model to a file for deployment, norms fused; docs/usage.md says what the file takes and tells of itself.

    Args:
        model: Model of timm's in float32, whose pretrained_cfg describes its images, perhaps compiled or wrapped (DDP,
            ModelEma); it is not changed.
        path: File to write, as a whole or not at all; what was there is replaced.
        format: 'onnx' (opset `ONNX_OPSET`), 'pt2' (compiled by AOTInductor, which takes minutes) or 'torchscript'.

    Raises:
        ValueError: `format` is none of these, a pt2 file is named otherwise, or it is another kind of model.
        FileNotFoundError: The folder to write to does not exist.
        ImportError, RuntimeError: A package is missing, or PyTorch cannot run or export the model.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got '{format}'.")
    if format == 'pt2' and path.suffix != '.pt2':  # PyTorch's loader takes no other
        raise ValueError(f"The name of a file in format 'pt2' must end in .pt2; got '{path}'.")
    model = _unwrap(model)
    metadata = _metadata(model)
    # Of two images: a batch of one would be taken for the only size there is.
    images = probe_images(json.loads(metadata['input_size']))[:2].to(next(model.parameters()).device)
    # Before PyTorch 2.7 the ONNX exporter cannot translate norms that are not fused.
    fused = reparameterize_model(model).eval().requires_grad_(False)
    if not isinstance(fused(images), torch.Tensor):  # and TorchScript would write one that does not take them
        raise ValueError(_ACCEPTED.format(type(model).__name__))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        FORMATS[format](fused, images, metadata, file)
        file.replace(path)


def _load(path: Union[str, Path], format: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if format == 'pt2':
        return torch._inductor.aoti_load_package(str(path))
    if format == 'torchscript':
        return torch.jit.load(str(path))
    import onnxruntime
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(['output'], {'images': images.cpu().numpy()})[0])


@torch.no_grad()
def check_export(model: torch.nn.Module, path: Union[str, Path], format: str) -> float:
    """Run an exported file in its own runtime (ONNX Runtime, AOTInductor, TorchScript) and compare it with the model.

    Args:
        model, path, format: What `export_model` was called with.

    Returns:
        The largest difference of a batch's outputs, as a share of what the model computes: a ratio of norms.

    Raises:
        RuntimeError: The file cannot be run, or it differs by more than `TOLERANCE`.
    """
    eager, shares = copy.deepcopy(_unwrap(model)).eval(), []
    channels, height, width = json.loads(_metadata(eager)['input_size'])
    device = next(eager.parameters()).device
    try:
        exported = _load(path, format)
        for batch_size, size in ((1, (height, width)), (3, (height + 32, width + 16))):
            images = probe_images((channels, *size))[:batch_size].to(device)
            expected = eager(images)
            shares.append((exported(images).to(device) - expected).norm() / expected.norm())
    except Exception as e:  # each runtime has errors of its own
        raise RuntimeError(f"'{path}' cannot be run as a file of this model in format '{format}' ({e}).") from e
    largest = torch.stack(shares).max().item()  # NaN if one of them is
    if not largest <= TOLERANCE:
        raise RuntimeError(f"'{path}' does not compute what the model does: {largest:.1e} off, over {TOLERANCE:.0e}.")
    return largest
