"""Files of weights: the checks that they must pass before they are loaded, and loading and writing them."""
import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Dict, Optional, Tuple, Union

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import PretrainedCfg, load_state_dict

from .records import weights_records

__all__ = ['HUB_FILE', 'fetch_verified', 'load_checkpoint', 'verify', 'write_file']

HUB_FILE = 'model.safetensors'


def verify(path: Union[str, Path], sha256: str, downloaded: bool = False) -> None:
    """Check that a file has the published SHA-256, and remove it from its cache if it has not and was downloaded.

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
        with contextlib.suppress(OSError):  # of a cache that is not the user's
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    raise ValueError(
        f"'{path}' is not the published file: its SHA-256 is {found}, expected {sha256}. "
        + ('Get it again where it came from.' if path.exists() else 'It was removed; try again.'))


def _sha256_in_config(path: Union[str, Path]) -> Optional[str]:
    config = json.loads(Path(path).read_text(encoding='utf-8'))
    # transformers keeps the entry when it saves weights of its own, which are others.
    return None if 'transformers_version' in config else config.get('sha256')


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
        except LocalEntryNotFoundError:  # the hub was not reached, so whether there is a hash is not known
            raise
        except EntryNotFoundError:
            return None
        # By its one name, whatever the cfg says: another may be a pickle.
        return (Path(hf_hub_download(repo_id, HUB_FILE, **kwargs)), sha256, True) if sha256 else None
    return None


def fetch_verified(cfg: PretrainedCfg, cache_dir: Optional[str] = None) -> PretrainedCfg:
    """Put the checked local file of a published weight in the place of its source in a resolved cfg.

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
    record = weights_records().get(f'{cfg.architecture}.{cfg.tag}')
    labels = record.label_names if record and record.sha256 == sha256 else cfg.label_names
    return dataclasses.replace(cfg, file=str(path), source=None, label_names=labels)


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
    there, here = ({key: tuple(value.shape) for key, value in d.items()} for d in (found, model.state_dict()))
    wrong = [key for key in {**here, **there} if there.get(key) != here.get(key)]
    if wrong:
        raise ValueError(
            f"'{path}' does not fit {type(model).__name__} as configured: {len(wrong)} tensors differ. '{wrong[0]}' "
            f'has shape {there.get(wrong[0])} there and {here.get(wrong[0])} here (None: there is none).')
    model.load_state_dict(found)


def write_file(path: Union[str, Path], content: bytes) -> None:
    """Write or replace a file as a whole or not at all: under another name first, which is then changed."""
    temporary = Path(f'{path}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
