"""Publishing weights on the Hugging Face Hub: the model card, a repository's files, and the one commit they take."""
import contextlib
import hashlib
import json
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any, Dict, Iterator, NamedTuple, Optional

import timm
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from .. import __version__
from .._timm import save_config_for_hf
from .files import HUB_FILE, verify
from .records import WeightsRecord, find_record, license_path, model_infos

__all__ = ['Publication', 'model_card', 'publish', 'repository_files']

_PICKLES = ('.bin', '.ckpt', '.pkl', '.pickle', '.pt', '.pth', '.tar')


def model_card(record: WeightsRecord, repo_id: Optional[str] = None) -> str:
    """Fill in the template card.md for a weight, from its record and its architecture's docstring.

    Args:
        record: Record of the weight.
        repo_id: Repository the card is for, 'ORG/NAME'; None for the card beside the record.

    Returns:
        Front matter in YAML, and Markdown.
    """
    info, dataset, training = model_infos()[record.name], record.dataset, record.training
    template = resources.files('gunn_timm.zoo').joinpath('card.md').read_text(encoding='utf-8')
    return template.format(
        **vars(record),
        architecture=timm.model_entrypoint(record.name).__doc__,
        how_measured=record.how_measured,
        info=info,
        datasets=f"datasets: [{dataset['hub_id']}]\n" if 'hub_id' in dataset else '',
        dataset_type=dataset.get('hub_id', dataset['name']),
        num_classes=len(record.label_names),
        top1_err=100 - record.metrics['top1'],
        paper='none for it' if info.paper_top1_err is None else f'{info.paper_top1_err:.2f}%',
        source=record.name if repo_id is None else f'hf-hub:{repo_id}',
        commands='\n'.join(training['command']),
        notes=''.join(f'\n{part}\n' for part in (record.metrics.get('notes'), training.get('notes')) if part),
    )


def repository_files(record: WeightsRecord, repo_id: str) -> Dict[str, bytes]:
    """Make what a weight's repository consists of.

    Args:
        record: Record of the weight.
        repo_id: Repository the files are for, 'ORG/NAME'.

    Returns:
        Contents by name: model.safetensors, config.json (timm's schema, the class names and the hash of the weights),
        README.md and LICENSE.

    Raises:
        FileNotFoundError: The weights did not come with the package.
        ValueError: They are not what the record says, or the record has no accuracy.
    """
    if not all(isinstance(record.metrics.get(key), (int, float)) for key in ('top1', 'top5')):
        raise ValueError(f'{record.name} cannot be published: its record has no top-1 and top-5 accuracy.')
    verify(record.path, record.sha256)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'config.json'
        save_config_for_hf(
            timm.create_model(record.name, device='meta'), file,
            # transformers would else compute in the type that the weights are stored in.
            model_config=dict(label_names=record.label_names, sha256=record.sha256, torch_dtype='float32'))
        config = json.loads(file.read_text(encoding='utf-8'))
    # The architecture implies them. transformers cannot take num_classes twice, and writes null where there are none.
    config['model_args'] = {}
    return {
        HUB_FILE: record.path.read_bytes(),
        'config.json': json.dumps(config, indent=2).encode(),
        'README.md': model_card(record, repo_id).encode(),
        'LICENSE': license_path().read_bytes(),
    }


class Publication(NamedTuple):
    """The commit that has the files, None after a dry run, and sizes of the files written, None for those removed.

    A dry run lists all files. Where the repository has them all, there are none.
    """
    commit: Optional[str]
    changed: Dict[str, Optional[int]]


def _is_same(content: bytes, sibling: Any) -> bool:
    if sibling.lfs is not None:
        return sibling.lfs.sha256 == hashlib.sha256(content).hexdigest()
    # What git calls the content of a file.
    return sibling.blob_id == hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


@contextlib.contextmanager
def _hub_errors(repo_id: str, state: str) -> Iterator[None]:
    """Turn the client's errors into one kind that says what became of the repository."""
    try:
        yield
    except HfHubHTTPError as e:
        reason = {
            401: 'the token is not valid, or not for this repository',
            403: 'the token has no right to write there',
            412: 'there was a commit in between',
        }.get(getattr(e.response, 'status_code', None), ' '.join(str(e).split()))
        raise OSError(f'The hub refused {repo_id}: {reason}. {state}') from e
    except HFValidationError:
        raise
    except Exception as e:  # the client's HTTP library, and with it the errors of the network, differ by version
        raise OSError(f'The hub could not be reached for {repo_id} ({type(e).__name__}: {e}). {state}') from e


def _open_repository(api: HfApi, repo_id: str, revision: Optional[str], private: bool) -> ModelInfo:
    try:
        return api.model_info(repo_id, revision=revision, files_metadata=True)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.model_info(repo_id, revision=revision, files_metadata=True)


def publish(
        name: str,
        repo_id: str,
        revision: Optional[str] = None,
        private: bool = False,
        force: bool = False,
        dry_run: bool = False,
) -> Publication:
    """Publish a weight in one commit, read it back, and compare.

    The token is huggingface_hub's own: of `hf auth login`, or the environment's HF_TOKEN.

    Args:
        name: Architecture and tag, 'gunn15.cifar10'.
        repo_id: Repository, 'ORG/NAME'; it is made if it is not there.
        revision: Branch to commit to instead of main; it is made if it is not there.
        private: Make the repository, if it is made, a private one.
        force: Replace files that are there with other content, and remove pickled weights.
        dry_run: Make the files and send nothing.

    Returns:
        What was done; with nothing new, the commit that is there and no files.

    Raises:
        FileNotFoundError: The weights did not come with the package.
        ValueError: No such weight, no accuracy in its record, no token, or other content in the repository.
        OSError: The hub refused, could not be reached, or does not give back what was sent; the message says what is
            published then.
    """
    record = find_record(name)
    if repo_id.count('/') != 1:
        raise ValueError(f"The repository must be 'ORG/NAME'; got '{repo_id}'.")
    files = repository_files(record, repo_id)
    if dry_run:
        return Publication(None, {path: len(content) for path, content in files.items()})
    if get_token() is None:
        raise ValueError('No token for the hub: log in with `hf auth login`, or set HF_TOKEN.')

    api = HfApi(library_name='gunn_timm', library_version=__version__)
    with _hub_errors(repo_id, 'Nothing was published.'):
        info = _open_repository(api, repo_id, revision, private)
    there = {sibling.rfilename: sibling for sibling in info.siblings}
    new = {path: content for path, content in files.items() if path not in there or not _is_same(content, there[path])}
    pickles = [path for path in there if path.endswith(_PICKLES)]
    foreign = ', '.join([path for path in new if path in there] + pickles)
    if foreign and not force:
        raise ValueError(
            f'{repo_id} has other content already: {foreign}. Replace it with --force. Nothing was published.')
    if not new and not pickles:
        return Publication(info.sha, {})
    with _hub_errors(repo_id, 'The commit was made as a whole or not at all; publish again to be sure of it.'):
        commit = api.create_commit(
            repo_id,
            [*(CommitOperationAdd(*item) for item in new.items()), *(CommitOperationDelete(path) for path in pickles)],
            commit_message=f'Publish {name} from gunn_timm {__version__}',
            revision=revision,
            # If somebody else commits in between, neither of the two commits is lost.
            parent_commit=info.sha,
        ).oid

    state = f'It was committed there as {commit}, and is not to be trusted before it is read back.'
    with tempfile.TemporaryDirectory() as folder:
        for path, content in files.items():
            with _hub_errors(repo_id, state):
                found = Path(hf_hub_download(repo_id, path, revision=commit, cache_dir=folder)).read_bytes()
            if found != content:
                raise OSError(
                    f"{repo_id} does not give back what was sent: the SHA-256 of '{path}' is another. {state}")
    return Publication(commit, {**{path: len(content) for path, content in new.items()}, **dict.fromkeys(pickles)})
