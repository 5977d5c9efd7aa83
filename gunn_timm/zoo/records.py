"""What is known of every registered tag and of every published weight.

`weights/models.yaml` has a line a tag; `weights/NAME.TAG.yaml` is the record of a weight that exists. They lie beside
the package in a checkout and inside it once it is installed. The model cards, the README's table and the command line
read them here. Importing the package reads none, unless a record's weights are on the hub only.
"""
import dataclasses
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union, get_args, get_origin, get_type_hints

import torch
import yaml

__all__ = [
    'ModelInfo', 'WeightsRecord', 'available_weights', 'find_record', 'license_path', 'model_infos',
    'pretrained_source', 'probe_images', 'weights_records',
]


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """One registered tag."""
    name: str  # architecture and tag, 'gunn15.cifar10'
    dataset: str
    input_size: List[int]  # channels, height and width
    parameters: int
    gmacs: float  # multiply-accumulates of one image's forward pass, in units of 1e9
    paper_top1_err: Optional[float] = None  # in %, None where the paper reports none


@dataclasses.dataclass(frozen=True)
class WeightsRecord:
    """One published weight: what to expect, how to load it, how it was made.

    Its YAML file has these keys, but for `name`, which is in the file's name.
    """
    name: str  # architecture and tag, 'gunn15.cifar10'
    sha256: str  # of the safetensors file beside the record, hexadecimal
    size: int  # of the file in bytes
    dtype: str  # that the floating-point tensors are stored in, 'float32', 'float16' or 'bfloat16'
    parameters: int
    license: str  # SPDX identifier as the Hugging Face Hub writes it, 'apache-2.0'
    label_names: List[str]  # of the classes, in order
    preprocessing: Dict[str, Any]  # entries of the default cfg: input_size, mean, std, crop_pct, interpolation
    # name, copy (which one, where copies differ), train_images, held_out_images (training images kept for choices),
    # test_images; hub_id (on the Hugging Face Hub) if it has one
    dataset: Dict[str, Any]
    # top1 and top5 in % on the whole test split, images, epoch ('last', or 'best' by held-out images), ema,
    # test_time_augmentation, command; notes if there is more to say
    metrics: Dict[str, Any]
    # recipe, command (a list, of as many as there were), seed, epochs, hardware, wall_time, date and versions; notes if
    # there is more to say
    training: Dict[str, Any]
    logits_file: str  # beside the record, what `validate.py --logits-file` writes
    hub: Optional[Dict[str, str]] = None  # repo_id and revision (a whole commit hash) on the Hub, once it is there

    @property
    def path(self) -> Path:
        """Where the file lies if it came with the package."""
        return _weights_dir() / f'{self.name}.safetensors'

    @property
    def how_measured(self) -> str:
        """What must be said beside every figure: which epoch, averaged weights, test-time augmentation."""
        metrics = self.metrics
        return (
            f"{metrics['epoch']} epoch, {'EMA' if metrics['ema'] else 'no EMA'}, "
            f"test-time augmentation: {metrics['test_time_augmentation']}")


def _weights_dir() -> Path:
    try:
        package = Path(str(resources.files('gunn_timm')))
    except ModuleNotFoundError:  # torch.package took the code along, not the files
        package = Path(__file__).parent
    return package / '_weights' if (package / '_weights').is_dir() else package.parent / 'weights'


def _read_mapping(path: Path) -> Dict[Any, Any]:
    text = path.read_bytes()
    try:
        content = yaml.safe_load(text)
    except Exception as e:  # PyYAML raises others than its own, for example for dates that do not exist
        raise ValueError(f"'{path}' is not YAML that can be read ({' '.join(str(e).split())}).") from e
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' must have keys and values; it has {content!r:.40}.")
    return content


def _read(cls: type, name: str, path: Path, fields: Any) -> Any:
    try:
        described = cls(name=name, **fields)
    except TypeError as e:
        accepted = ', '.join(f.name for f in dataclasses.fields(cls) if f.name != 'name')
        raise ValueError(f"'{path}' does not describe '{name}' as it should ({e}); its keys are {accepted}.") from e
    for key, hint in get_type_hints(cls).items():
        kinds = [get_origin(kind) or kind for kind in (get_args(hint) if get_origin(hint) is Union else (hint,))]
        # YAML makes plain types; of a whole number that may have decimals, an int.
        if type(getattr(described, key)) not in [*kinds, *([int] if float in kinds else [])]:
            raise ValueError(
                f"'{path}' does not describe '{name}' as it should: '{key}' is {getattr(described, key)!r:.40}, and "
                f"must be of type {' or '.join(kind.__name__ for kind in kinds)}.")
    return described


@lru_cache(maxsize=None)
def model_infos() -> Dict[str, ModelInfo]:
    """Read what is known of every registered tag, by name; ValueError names what is wrong with the file."""
    path = _weights_dir() / 'models.yaml'
    return {name: _read(ModelInfo, name, path, fields) for name, fields in _read_mapping(path).items()}


@lru_cache(maxsize=None)
def weights_records() -> Dict[str, WeightsRecord]:
    """Read the records of all weights that exist, by name; ValueError names what is wrong with a file."""
    paths = [_weights_dir() / f'{name}.yaml' for name in model_infos()]
    return {path.stem: _read(WeightsRecord, path.stem, path, _read_mapping(path)) for path in paths if path.is_file()}


def available_weights() -> str:
    """Name the tags that have weights, for messages."""
    return ', '.join(weights_records()) or 'none'


def find_record(name: str) -> WeightsRecord:
    """Look up the record of a weight by architecture and tag; ValueError says which there are."""
    if name not in weights_records():
        raise ValueError(f"No weights '{name}'; weights exist for: {available_weights()}.")
    return weights_records()[name]


def license_path() -> Path:
    """Where the licence of the package and its weights lies."""
    folder = _weights_dir()
    return (folder if folder.name == '_weights' else folder.parent) / 'LICENSE'


def pretrained_source(name: str) -> Dict[str, Any]:
    """Entries of a tag's default cfg that say where its weights are: a file, else the hub, else nothing."""
    path = _weights_dir() / f'{name}.safetensors'
    if path.is_file():
        return {'file': str(path)}
    record = weights_records().get(name) if path.with_suffix('.yaml').is_file() else None
    if record is None:
        return {}
    return {'hf_hub_id': '{repo_id}@{revision}'.format(**record.hub)} if record.hub else {'file': str(record.path)}


def probe_images(input_size: Sequence[int]) -> torch.Tensor:
    """Make four images of size (C, H, W), smooth patterns of mean 0 and variance about 1, shape (4, C, H, W).

    A record keeps logits of them, to tell whether a network still computes what it did.
    """
    channels, height, width = input_size
    y = torch.linspace(-1, 1, height).view(1, 1, -1, 1)
    x = torch.linspace(-1, 1, width).view(1, 1, 1, -1)
    image = torch.arange(4.).view(-1, 1, 1, 1)
    channel = torch.arange(float(channels)).view(1, -1, 1, 1)
    return 2 ** 0.5 * torch.sin((2 + image) * x + (5 - 2 * image) * y + (1 + image) * channel)
