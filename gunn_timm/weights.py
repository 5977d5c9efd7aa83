"""What is known of every registered tag and of every published weight, and the checks that weights must pass.

`weights/models.yaml` has a line a tag; `weights/NAME.TAG.yaml` is the record of a weight that exists. They lie beside
the package in a checkout and inside it once it is installed. The default cfgs, the README's table and the command line
all read them here.
"""
import dataclasses
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import torch
import yaml
from timm.models import load_state_dict

__all__ = [
    'ModelInfo', 'WeightsRecord', 'available_weights', 'load_checkpoint', 'model_infos', 'pretrained_source', 'verify',
    'weights_records',
]


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """One registered tag.

    Attributes:
        name: Architecture and tag, 'gunn15.cifar10'.
        dataset: Dataset the tag is named after.
        input_size: Channels, height and width of its images.
        parameters: Number of parameters.
        gmacs: Multiply-accumulates of one image's forward pass, in units of 1e9.
        paper_top1_err: Top-1 error in % that the paper reports for it, None where it reports none.
    """
    name: str
    dataset: str
    input_size: List[int]
    parameters: int
    gmacs: float
    paper_top1_err: Optional[float] = None


@dataclasses.dataclass(frozen=True)
class WeightsRecord:
    """One published weight: what to expect, how to load it, how it was made.

    Attributes:
        name: Architecture and tag, 'gunn15.cifar10'.
        file: Name of the safetensors file beside the record.
        sha256: SHA-256 of the file, hexadecimal.
        size: Size of the file in bytes.
        dtype: Type the floating-point tensors are stored in.
        parameters: Number of parameters.
        license: SPDX identifier.
        label_names: Names of the classes, in order.
        dataset: Name and exact copy, numbers of training and test images.
        metrics: top1 and top5 in % on the whole test split, how and by which command they were measured.
        training: Recipe, command, epochs, seed, hardware, wall time, date and versions.
    """
    name: str
    file: str
    sha256: str
    size: int
    dtype: str
    parameters: int
    license: str
    label_names: List[str]
    dataset: Dict[str, Any]
    metrics: Dict[str, Any]
    training: Dict[str, Any]

    @property
    def path(self) -> Path:
        """Where the file lies."""
        return _weights_dir() / self.file


def _weights_dir() -> Path:
    installed = Path(__file__).parent / '_weights'
    return installed if installed.is_dir() else Path(__file__).parents[1] / 'weights'


def _read(cls: type, name: str, path: Path, fields: Any) -> Any:
    try:
        return cls(name=name, **fields)
    except TypeError as e:
        accepted = ', '.join(f.name for f in dataclasses.fields(cls) if f.name != 'name')
        raise ValueError(f"'{path}' does not describe '{name}' as it should ({e}); its keys are {accepted}.") from e


@lru_cache(maxsize=None)
def model_infos() -> Dict[str, ModelInfo]:
    """Read what is known of every registered tag, by name."""
    path = _weights_dir() / 'models.yaml'
    return {name: _read(ModelInfo, name, path, fields) for name, fields in yaml.safe_load(path.read_text()).items()}


@lru_cache(maxsize=None)
def weights_records() -> Dict[str, WeightsRecord]:
    """Read the records of all weights that exist, by name."""
    paths = [_weights_dir() / f'{name}.yaml' for name in model_infos()]
    return {path.stem: _read(WeightsRecord, path.stem, path, yaml.safe_load(path.read_text()))
            for path in paths if path.is_file()}


def available_weights() -> str:
    """Name the tags that have weights, for messages."""
    return ', '.join(weights_records()) or 'none'


def pretrained_source(name: str) -> Dict[str, Any]:
    """Entries of a tag's default cfg that depend on its weights: none, if there are none.

    Args:
        name: Architecture and tag.
    """
    record = weights_records().get(name)
    return {} if record is None else dict(file=str(record.path), label_names=tuple(record.label_names))


def verify(record: WeightsRecord) -> None:
    """Check that a weight's file is the one that was published.

    Args:
        record: Record of the weight.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: Its SHA-256 is not the record's.
    """
    if not record.path.is_file():
        raise FileNotFoundError(f"The weights of {record.name} are missing: no file '{record.path}'.")
    found = hashlib.sha256(record.path.read_bytes()).hexdigest()
    if found != record.sha256:
        raise ValueError(
            f"'{record.path}' is not the published file: its SHA-256 is {found}, expected {record.sha256}. "
            'Install the package again.')


def load_checkpoint(model: torch.nn.Module, path: Union[str, Path]) -> None:
    """Load a checkpoint of timm's train.py, or a safetensors file, strictly; EMA weights are taken if there are any.

    Args:
        model: Model to load into; it is not changed if this fails.
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint, or it is one of another architecture.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No checkpoint '{path}'.")
    try:
        found = load_state_dict(str(path))
    except Exception as e:  # what a damaged file raises depends on where it is damaged
        raise ValueError(f"'{path}' is not a checkpoint that can be read ({type(e).__name__}).") from e
    expected = model.state_dict()
    problems = []
    for what, keys in (
            ('missing', [k for k in expected if k not in found]),
            ('unexpected', [k for k in found if k not in expected]),
            ('of another shape', [
                f'{k} {tuple(found[k].shape)} for {tuple(expected[k].shape)}'
                for k in expected if k in found and found[k].shape != expected[k].shape]),
    ):
        if keys:
            problems.append(f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
    if problems:
        raise ValueError(f"'{path}' does not fit {type(model).__name__} as configured: {'; '.join(problems)}.")
    model.load_state_dict(found)
