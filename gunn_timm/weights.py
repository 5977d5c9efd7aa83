"""What is known of every registered tag and of every published weight, and the checks that weights must pass.

`weights/models.yaml` has a line a tag; `weights/NAME.TAG.yaml` is the record of a weight that exists. They lie beside
the package in a checkout and inside it once it is installed. The default cfgs, the model cards, the README's table and
the command line all read them here.
"""
import dataclasses
import hashlib
import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from timm.models import PretrainedCfg, load_state_dict

from ._timm import download_cached_file

__all__ = [
    'ModelInfo', 'WeightsRecord', 'available_weights', 'fetch_verified', 'find_record', 'license_path',
    'load_checkpoint', 'model_infos', 'pretrained_source', 'probe_images', 'verify', 'weights_records', 'write_file',
]

HUB_FILE = 'model.safetensors'


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

    Its YAML file has these keys, but for `name`, which is in the file's name.

    Attributes:
        name: Architecture and tag, 'gunn15.cifar10'.
        file: Name of the safetensors file beside the record.
        sha256: SHA-256 of the file, hexadecimal.
        size: Size of the file in bytes.
        dtype: Type the floating-point tensors are stored in, 'float32', 'float16' or 'bfloat16'.
        parameters: Number of parameters.
        license: SPDX identifier as the Hugging Face Hub writes it, 'apache-2.0'.
        label_names: Names of the classes, in order.
        preprocessing: Entries of the default cfg: input_size, mean, std, crop_pct, interpolation.
        dataset: name, copy (which one, where copies differ), train_images, held_out_images (training images kept for
            choices), test_images; hub_id (on the Hugging Face Hub) if it has one.
        metrics: top1 and top5 in % on the whole test split, images, epoch ('last', or 'best' by held-out images), ema,
            test_time_augmentation, command; notes if there is more to say.
        training: recipe, command and seed (lists, of as many as there were), epochs, hardware, wall_time, date and
            versions; notes if there is more to say.
        logits_file: Name of the file beside the record with what `validate.py --logits-file` writes.
        hub: repo_id and revision (a whole commit hash) on the Hugging Face Hub, once it is there.
        url: Another address of the file, if it has one.
    """
    name: str
    file: str
    sha256: str
    size: int
    dtype: str
    parameters: int
    license: str
    label_names: List[str]
    preprocessing: Dict[str, Any]
    dataset: Dict[str, Any]
    metrics: Dict[str, Any]
    training: Dict[str, Any]
    logits_file: str
    hub: Optional[Dict[str, str]] = None
    url: Optional[str] = None

    @property
    def path(self) -> Path:
        """Where the file lies if it came with the package."""
        return _weights_dir() / self.file

    @property
    def how_measured(self) -> str:
        """What must be said beside every figure: which epoch, averaged weights, test-time augmentation."""
        metrics = self.metrics
        return (
            f"{metrics['epoch']} epoch, {'EMA' if metrics['ema'] else 'no EMA'}, "
            f"test-time augmentation: {metrics['test_time_augmentation']}")


def _weights_dir() -> Path:
    installed = Path(__file__).parent / '_weights'
    return installed if installed.is_dir() else Path(__file__).parents[1] / 'weights'


def _read_mapping(path: Path) -> Dict[Any, Any]:
    text = path.read_bytes()
    try:
        content = yaml.safe_load(text)
    except Exception as e:  # PyYAML raises others than its own, for dates that do not exist say
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
    """Read what is known of every registered tag, by name.

    Raises:
        ValueError: The file is damaged, or says less, more or other than it should; the message names file and key.
    """
    path = _weights_dir() / 'models.yaml'
    return {name: _read(ModelInfo, name, path, fields) for name, fields in _read_mapping(path).items()}


@lru_cache(maxsize=None)
def weights_records() -> Dict[str, WeightsRecord]:
    """Read the records of all weights that exist, by name.

    Raises:
        ValueError: A file is damaged, or says less, more or other than it should; the message names file and key.
    """
    paths = [_weights_dir() / f'{name}.yaml' for name in model_infos()]
    return {path.stem: _read(WeightsRecord, path.stem, path, _read_mapping(path)) for path in paths if path.is_file()}


def available_weights() -> str:
    """Name the tags that have weights, for messages."""
    return ', '.join(weights_records()) or 'none'


def find_record(name: str) -> WeightsRecord:
    """Look up the record of a weight.

    Args:
        name: Architecture and tag.

    Raises:
        ValueError: There is no such weight.
    """
    if name not in weights_records():
        raise ValueError(f"No weights '{name}'; weights exist for: {available_weights()}.")
    return weights_records()[name]


def license_path() -> Path:
    """Where the licence of the package and its weights lies."""
    return (_weights_dir() if _weights_dir().parent == Path(__file__).parent else _weights_dir().parent) / 'LICENSE'


def pretrained_source(name: str) -> Dict[str, Any]:
    """Entries of a tag's default cfg that depend on its weights: none, if there are none.

    The file that came with the package goes before the hub, and that before another address.

    Args:
        name: Architecture and tag.
    """
    record = weights_records().get(name)
    if record is None:
        return {}
    if record.path.is_file() or not (record.hub or record.url):
        source = {'file': str(record.path)}
    elif record.hub:
        source = {'hf_hub_id': '{repo_id}@{revision}'.format(**record.hub)}
    else:
        source = {'url': record.url}
    preprocessing = {k: tuple(v) if isinstance(v, list) else v for k, v in record.preprocessing.items()}
    return dict(**source, **preprocessing, label_names=tuple(record.label_names))


def verify(path: Union[str, Path], sha256: str, downloaded: bool = False) -> None:
    """Check that a file of weights is the one that was published.

    Args:
        path: The file.
        sha256: Its published hash, hexadecimal.
        downloaded: Remove the file from the cache if it is another.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: Its SHA-256 is another.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The weights are missing: no file '{path}'.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found == sha256:
        return
    if downloaded:
        # The hub's cache has the content in one place and a link to it in another.
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    raise ValueError(
        f"'{path}' is not the published file: its SHA-256 is {found}, expected {sha256}. "
        + ('It was removed; try again.' if downloaded else 'Get it again where it came from.'))


def _sha256_in_config(path: Union[str, Path]) -> Optional[str]:
    sha256 = json.loads(Path(path).read_text(encoding='utf-8')).get('sha256')
    if sha256 is not None and not re.fullmatch('[0-9a-f]{64}', str(sha256)):
        raise ValueError(f"'{path}' has {sha256!r} for 'sha256'; it must be 64 hexadecimal digits, or not be there.")
    return sha256


def _published_file(cfg: PretrainedCfg, cache_dir: Optional[str]) -> Optional[Tuple[Path, str, bool]]:
    """Find a published weight's local file, downloaded if need be, its hash, and whether it lies in a cache.

    Published is what a record of ours says where to find, and any repository or folder whose config.json has a hash. It
    is None for the rest: a file of the user's, or a repository that train.py's weights were pushed to.
    """
    record = weights_records().get(f'{cfg.architecture}.{cfg.tag}')
    if cfg.source == 'local-dir':
        sha256 = _sha256_in_config(Path(cfg.file) / 'config.json')
        return (Path(cfg.file) / HUB_FILE, sha256, False) if sha256 else None
    if cfg.source != 'hf-hub' and (cfg.state_dict or cfg.file):
        return (record.path, record.sha256, False) if record and cfg.file == str(record.path) else None
    if cfg.hf_hub_id:
        repo_id, _, revision = cfg.hf_hub_id.partition('@')
        kwargs = dict(revision=revision or None, cache_dir=cache_dir)
        # Not by the cfg's architecture and tag: of a repository they are what its config.json says.
        recorded = [r for r in weights_records().values()
                    if r.hub and r.hub['repo_id'] == repo_id and revision in ('', r.hub['revision'])]
        if recorded:
            return Path(hf_hub_download(repo_id, HUB_FILE, **kwargs)), recorded[0].sha256, True
        try:
            sha256 = _sha256_in_config(hf_hub_download(repo_id, 'config.json', **kwargs))
        except EntryNotFoundError:
            return None
        # By its one name, whatever the cfg says: another may be a pickle.
        return (Path(hf_hub_download(repo_id, HUB_FILE, **kwargs)), sha256, True) if sha256 else None
    if record and cfg.url == record.url:
        return Path(download_cached_file(cfg.url, cache_dir=cache_dir)), record.sha256, True
    return None


def fetch_verified(cfg: PretrainedCfg, cache_dir: Optional[str] = None) -> PretrainedCfg:
    """Put the checked local file of a published weight in the place of its source, wherever that is.

    Args:
        cfg: Resolved cfg of a model to be created with its weights.
        cache_dir: Where downloads are kept, instead of the usual caches.

    Returns:
        The cfg to load by; as given where the weights are the user's own.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: Its SHA-256 is not the published one; if it was downloaded, it is removed. Or the user's own file is
            no checkpoint.
        OSError: The download failed.
    """
    published = _published_file(cfg, cache_dir)
    if published is None:
        if cfg.file and not cfg.state_dict and cfg.source not in ('hf-hub', 'local-dir'):
            # For a clear error only: timm, which reads it once more, lets through what a damaged file raises.
            _read_checkpoint(cfg.file)
        return cfg
    path, sha256, downloaded = published
    verify(path, sha256, downloaded)
    return dataclasses.replace(cfg, file=str(path), source=None)


def probe_images(input_size: Sequence[int]) -> torch.Tensor:
    """Make the images on which a record keeps logits, to tell whether a network still computes what it did.

    Args:
        input_size: Channels, height and width.

    Returns:
        Smooth patterns of mean 0 and variance about 1, shape (4, C, H, W).
    """
    channels, height, width = input_size
    y = torch.linspace(-1, 1, height).view(1, 1, -1, 1)
    x = torch.linspace(-1, 1, width).view(1, 1, 1, -1)
    image = torch.arange(4.).view(-1, 1, 1, 1)
    channel = torch.arange(float(channels)).view(1, -1, 1, 1)
    return 2 ** 0.5 * torch.sin((2 + image) * x + (5 - 2 * image) * y + (1 + image) * channel)


def _read_checkpoint(path: Union[str, Path]) -> Dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"No checkpoint '{path}'.")
    try:
        found = load_state_dict(str(path))
    except Exception as e:  # what a damaged file raises depends on where it is damaged
        raise ValueError(f"'{path}' is not a checkpoint that can be read ({type(e).__name__}).") from e
    for key, value in found.items():
        # Of what is on the device 'meta' there is nothing to copy.
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise ValueError(f"'{path}' is not a checkpoint of weights: {key!r} is no dense tensor.")
    return found


def load_checkpoint(model: torch.nn.Module, path: Union[str, Path]) -> None:
    """Load a checkpoint of timm's train.py, or a safetensors file, strictly; EMA weights are taken if there are any.

    Args:
        model: Model to load into; it is not changed if this fails.
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint, or it is one of another architecture.
    """
    found = _read_checkpoint(path)
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


def write_file(path: Union[str, Path], content: bytes) -> None:
    """Write a file as a whole or not at all: under another name first, which it then takes the place of.

    Args:
        path: The file; what was there is replaced.
        content: What to write.
    """
    temporary = Path(f'{path}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
