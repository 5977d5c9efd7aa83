"""Publishing weights on the Hugging Face Hub: the model card, a repository's files, and the one commit they take."""
import contextlib
import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List, Optional

import timm
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    ModelInfo,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from .. import __version__
from .._timm import save_config_for_hf
from .files import HUB_FILE, verify
from .records import WeightsRecord, find_record, license_path, model_infos

__all__ = ['Publication', 'model_card', 'publish', 'repository_files']

_PICKLES = ('.bin', '.ckpt', '.pkl', '.pickle', '.pt', '.pth', '.tar')


def model_card(record: WeightsRecord, repo_id: Optional[str] = None) -> str:
    """Write the card of a weight, from its record alone.

    Args:
        record: Record of the weight.
        repo_id: Repository the card is for, 'ORG/NAME'; None for the card beside the record.

    Returns:
        Front matter and Markdown.
    """
    source = record.name if repo_id is None else f'hf-hub:{repo_id}'
    info, dataset, metrics, training = model_infos()[record.name], record.dataset, record.metrics, record.training
    _, height, width = record.preprocessing['input_size']
    data = ModelCardData(
        license=record.license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['timm', 'image-classification', 'gunn', 'gunn_timm', 'arxiv:1711.09280'],
        datasets=[dataset['hub_id']] if 'hub_id' in dataset else None,
        metrics=['accuracy'],
        model_name=record.name,
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=dataset.get('hub_id', dataset['name']),
                dataset_name=f"{dataset['name']} ({dataset['copy']})",
                dataset_split='test',
                metric_type='accuracy',
                metric_name=f'{metric} accuracy, in % ({record.how_measured})',
                metric_value=metrics[key],
            ) for key, metric in (('top1', 'Top-1'), ('top5', 'Top-5'))
        ],
    )
    paper = 'none for it' if info.paper_top1_err is None else f'{info.paper_top1_err}%'
    commands = '\n'.join(training['command'])
    notes = ''.join(f'\n{part}\n' for part in (metrics.get('notes'), training.get('notes')) if part)
    body = f'''# {record.name}

A GUNN (Gradually Updated Neural Network) image classifier, trained on {dataset['name']}. A GUNN computes the channels
of a layer in order, each segment from those already updated. The package gunn_timm registers the networks in
[timm](https://github.com/huggingface/pytorch-image-models).

| | |
| --- | --- |
| parameters | {record.parameters:,} |
| GMACs | {info.gmacs} at {info.input_size[1]}x{info.input_size[2]} |
| image size | {height}x{width} |
| classes | {len(record.label_names)} |
| top-1 / top-5 accuracy | {metrics['top1']}% / {metrics['top5']}% ({record.how_measured}) |
| measured on | all {metrics['images']} test images of {dataset['name']}: {dataset['copy']} |
| measured by | `{metrics['command']}` |
| paper | [Gradually Updated Neural Networks for Large-Scale Image Recognition](https://arxiv.org/abs/1711.09280) |

Top-1 error is {100 - metrics['top1']:.2f}%; the paper reports {paper}.

## Use

With the package gunn_timm installed (`pip install .` in a clone of its repository):

```python
import gunn_timm, timm, torch
from PIL import Image

model = timm.create_model('{source}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open('picture.jpg').convert('RGB')
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)
print(model.pretrained_cfg['label_names'][probabilities.argmax()])
```

Feature maps:

```python
import gunn_timm, timm, torch

model = timm.create_model('{source}', pretrained=True, features_only=True).eval()
for features in model(torch.randn(1, 3, {height}, {width})):
    print(features.shape)
```

Embeddings:

```python
import gunn_timm, timm, torch

model = timm.create_model('{source}', pretrained=True, num_classes=0).eval()
print(model(torch.randn(1, 3, {height}, {width})).shape)
```

## Training

{training['epochs']} epochs on {dataset['train_images']} images of {dataset['name']} ({dataset['copy']}),
{dataset['held_out_images']} held out for choices. Seeds: {', '.join(map(str, training['seed']))}. Hardware:
{training['hardware']}. Time: {training['wall_time']}. Date: {training['date']}. {training['versions']}.
Recipes, in the project's repository: {', '.join(f'`{recipe}`' for recipe in training['recipe'])}.

```bash
{commands}
```
{notes}
## Limits

It knows the {len(record.label_names)} classes of {dataset['name']} and no others, at the image size above, and inherits
that dataset's biases. The figures are for the copy of the data named above. It was not tested for any use in which a
wrong answer does harm.

## Files

`{HUB_FILE}` has the SHA-256 `{record.sha256}`, which gunn_timm checks when it loads it.

## Citation

```bibtex
@inproceedings{{qiao2018gunn,
  title     = {{Gradually Updated Neural Networks for Large-Scale Image Recognition}},
  author    = {{Siyuan Qiao and Zhishuai Zhang and Wei Shen and Bo Wang and Alan L. Yuille}},
  booktitle = {{International Conference on Machine Learning (ICML)}},
  year      = {{2018}},
}}
```
'''
    return str(ModelCard(f'---\n{data.to_yaml()}\n---\n\n{body}'))


def _config(record: WeightsRecord) -> bytes:
    model = timm.create_model(record.name, device='meta')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'config.json'
        save_config_for_hf(
            model, path, model_config=dict(label_names=record.label_names, sha256=record.sha256))
        config = json.loads(path.read_text())
    # It is at the top already, which is where timm looks first.
    config['pretrained_cfg'].pop('label_names', None)
    return json.dumps(config, indent=2).encode()


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
    return {
        HUB_FILE: record.path.read_bytes(),
        'config.json': _config(record),
        'README.md': model_card(record, repo_id).encode(),
        'LICENSE': license_path().read_bytes(),
    }


@dataclasses.dataclass(frozen=True)
class Publication:
    """What came of publishing a weight.

    Attributes:
        name: Architecture and tag.
        repo_id: The repository.
        commit: Commit the files are in; None where nothing was sent (a dry run).
        changed: Files that the commit wrote or removed; of a dry run all of them; none if all were there already.
        sizes: Sizes of the files in bytes.
    """
    name: str
    repo_id: str
    commit: Optional[str]
    changed: List[str]
    sizes: Dict[str, int]


def _is_same(content: bytes, sibling: object) -> bool:
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
    def info() -> ModelInfo:
        return api.model_info(repo_id, revision=revision, files_metadata=True)

    try:
        return info()
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private, exist_ok=True)
    except RevisionNotFoundError:
        pass
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return info()


def publish(
        name: str,
        repo_id: str,
        revision: Optional[str] = None,
        private: bool = False,
        force: bool = False,
        dry_run: bool = False,
) -> Publication:
    """Publish a weight in one commit, read it back, and compare the hashes.

    The token is huggingface_hub's own: of `hf auth login`, or the environment's HF_TOKEN.

    Args:
        name: Architecture and tag, 'gunn15.cifar10'.
        repo_id: Repository, 'ORG/NAME'; it is made if it is not there.
        revision: Branch to commit to instead of main; it is made if it is not there.
        private: Make the repository, if it is made, a private one.
        force: Replace files that are there with other content, and remove pickled weights.
        dry_run: Make the files and send nothing.

    Returns:
        What was done; with nothing new there is no commit.

    Raises:
        FileNotFoundError: The weights did not come with the package.
        ValueError: There is no such weight, its record has no accuracy, there is no token, or the repository has other
            content.
        OSError: The hub refused or could not be reached; nothing is published then. Or what it gives back is not what
            was sent, which the message says.
    """
    record = find_record(name)
    if repo_id.count('/') != 1:
        raise ValueError(f"The repository must be 'ORG/NAME'; got '{repo_id}'.")
    files = repository_files(record, repo_id)
    sizes = {path: len(content) for path, content in files.items()}
    if dry_run:
        return Publication(name, repo_id, None, list(files), sizes)
    if get_token() is None:
        raise ValueError('No token for the hub: log in with `hf auth login`, or set HF_TOKEN.')

    api = HfApi(library_name='gunn_timm', library_version=__version__)
    nothing = 'Nothing was published.'
    with _hub_errors(repo_id, nothing):
        info = _open_repository(api, repo_id, revision, private)
    there = {sibling.rfilename: sibling for sibling in info.siblings}
    changed = [path for path, content in files.items() if path not in there or not _is_same(content, there[path])]
    pickles = [path for path in there if path.endswith(_PICKLES)]
    foreign = [path for path in changed if path in there] + pickles
    if foreign and not force:
        raise ValueError(
            f'{repo_id} has other content already: {", ".join(foreign)}. Replace it with --force. {nothing}')
    if not changed and not pickles:
        return Publication(name, repo_id, info.sha, [], sizes)
    with _hub_errors(repo_id, 'The commit was made as a whole or not at all; publish again to be sure of it.'):
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path, files[path]) for path in changed] + [CommitOperationDelete(p) for p in pickles],
            commit_message=f'Publish {name} from gunn_timm {__version__}',
            revision=revision,
            # If somebody else commits in between, neither of the two commits is lost.
            parent_commit=info.sha,
        ).oid

    state = f'It was committed there as {commit}, and is not to be trusted before it is read back.'
    with tempfile.TemporaryDirectory() as folder:
        with _hub_errors(repo_id, state):
            paths = {path: hf_hub_download(repo_id, path, revision=commit, cache_dir=folder) for path in files}
        for path, content in files.items():
            found = Path(paths[path]).read_bytes()
            if found != content:
                raise OSError(
                    f"{repo_id} does not give back what was sent: the SHA-256 of '{path}' is "
                    f'{hashlib.sha256(found).hexdigest()}, expected {hashlib.sha256(content).hexdigest()}. {state}')
    return Publication(name, repo_id, commit, changed + pickles, sizes)
