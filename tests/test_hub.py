"""Publishing to, and loading from, a hub on the loopback, by the real client."""
import dataclasses
import hashlib
import json

import huggingface_hub
import pytest
import timm
import torch
from conftest import ROOT
from loopback_hub import READER, WRITER

from gunn_timm.commands.cli import main
from gunn_timm.zoo import records
from gunn_timm.zoo.hub import publish, repository_files
from gunn_timm.zoo.records import weights_records

NAME, REPO = 'gunn15.cifar10', 'org/gunn15.cifar10'
SHA256 = weights_records()[NAME].sha256
FILES = {'model.safetensors', 'config.json', 'README.md', 'LICENSE'}


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', WRITER)


@pytest.fixture
def published(hub, token):
    publish(NAME, REPO)
    hub.requests.clear()
    return hub


@pytest.fixture(scope='module')
def expected():
    return timm.create_model(NAME, pretrained=True)


def same(model, expected):
    state = model.state_dict()
    return all(torch.equal(state[k], v) for k, v in expected.state_dict().items())


def load(cache, **kwargs):
    return timm.create_model(f'hf-hub:{REPO}', pretrained=True, cache_dir=str(cache), **kwargs)


def weights_in(cache):
    return [p for p in cache.rglob('*') if p.is_file() and p.stat().st_size > 1e6 and p.suffix != '.incomplete']


def test_command_line_publishes_and_timm_loads(hub, run, expected, tmp_path):
    result = run('-m', 'gunn_timm', 'publish', NAME, '--repo-id', 'org/{name}', env={'HF_TOKEN': WRITER})
    assert result.returncode == 0, result.stderr
    commit = hub.repos[REPO].branches['main']
    assert f'hub: {{repo_id: {REPO}, revision: {commit}}}' in result.stdout
    assert WRITER not in result.stdout + result.stderr
    files = hub.repos[REPO].files()
    assert set(files) == FILES | {'.gitattributes'}
    assert hub.commits_to(REPO) == 1
    assert hashlib.sha256(files['model.safetensors']).hexdigest() == SHA256
    assert files['LICENSE'] == (ROOT / 'LICENSE').read_bytes()

    model = load(tmp_path)
    assert same(model, expected) and model.pretrained_cfg['label_names'] == weights_records()[NAME].label_names
    assert same(timm.create_model(f'hf-hub:{REPO}@{commit}', pretrained=True), expected)
    assert load(tmp_path, features_only=True).feature_info.channels() == [240, 300, 360]
    assert load(tmp_path, num_classes=3).fc.out_features == 3


def test_all_private_branch(hub, token, capsys):
    assert main(['publish', '--all', '--repo-id', 'org/{name}', '--private', '--revision', 'next']) == 0
    for name in weights_records():
        repo = hub.repos[f'org/{name}']
        assert repo.private and set(repo.files('next')) >= FILES and set(repo.files('main')) == {'.gitattributes'}


def test_dry_run_sends_nothing(hub, capsys):
    assert main(['publish', NAME, '--repo-id', REPO, '--dry-run']) == 0
    out = capsys.readouterr().out
    assert all(f'  {path}: ' in out for path in FILES)
    assert hub.requests == []


def test_only_what_changed_is_sent(published, monkeypatch):
    assert publish(NAME, REPO).changed == {}
    assert published.commits_to(REPO) == 1 and all(r.startswith('GET') for r in published.requests)
    record, repo = weights_records()[NAME], published.repos[REPO]
    changed = dataclasses.replace(record, metrics={**record.metrics, 'top5': 1.25})
    monkeypatch.setitem(weights_records(), NAME, changed)
    repo.commit('main', {**repo.files(), 'pytorch_model.bin': b'pickle', 'notes.md': b'kept'})
    with pytest.raises(ValueError, match='has other content already: README.md, pytorch_model.bin. Replace it'):
        publish(NAME, REPO)
    assert published.commits_to(REPO) == 2
    done = publish(NAME, REPO, force=True)
    assert done.changed == {'README.md': len(repo.files()['README.md']), 'pytorch_model.bin': None}
    assert b'1.25' in repo.files()['README.md'] and set(repo.files()) == FILES | {'.gitattributes', 'notes.md'}


@pytest.mark.parametrize('argv, env, message', [
    ([NAME, '--repo-id', REPO], None, 'No token for the hub: log in with `hf auth login`, or set HF_TOKEN.'),
    ([NAME, '--repo-id', REPO], READER, 'the token has no right to write there. Nothing was published.'),
    ([NAME, '--repo-id', REPO], 'hf_unknown', 'the token is not valid'),
    ([NAME, '--repo-id', 'gunn15'], WRITER, "must be 'ORG/NAME'; got 'gunn15'"),
    ([NAME, '--all', '--repo-id', 'org/{name}'], WRITER, 'Give either the name of a weight, or --all'),
    (['--all', '--repo-id', REPO], WRITER, "or --all and a repository like 'ORG/{name}'"),
])
def test_errors_are_one_line(argv, env, message, hub, monkeypatch, capsys):
    if env:
        monkeypatch.setenv('HF_TOKEN', env)
    assert main(['publish', *argv]) == 2
    out, err = capsys.readouterr()
    assert out == '' and message in err and err.startswith('error: ') and err.count('\n') == 1
    assert env is None or env not in err
    assert hub.repos == {}


def test_an_upload_that_fails_leaves_nothing_half_written(hub, token):
    for path in ('/api/repos/create', '/preupload/', '/lfs/objects/batch', '^/lfs/', '/commit/'):
        hub.refuse = path
        state = 'Nothing was published.' if 'create' in path else 'The commit was made as a whole or not at all'
        with pytest.raises(OSError, match=state):
            publish(NAME, REPO)
        assert all(set(repo.files()) == {'.gitattributes'} for repo in hub.repos.values())
    hub.refuse = None
    publish(NAME, REPO)
    assert hub.commits_to(REPO) == 1 and set(hub.repos[REPO].files()) == FILES | {'.gitattributes'}


def test_a_commit_in_between_is_not_lost(hub, token, monkeypatch):
    create_commit = huggingface_hub.HfApi.create_commit

    def late(self, *args, **kwargs):
        hub.repos[REPO].commit('main', {'notes.md': b'of somebody else'})
        return create_commit(self, *args, **kwargs)

    monkeypatch.setattr(huggingface_hub.HfApi, 'create_commit', late)
    with pytest.raises(OSError, match='there was a commit in between. The commit was made as a whole or not at all'):
        publish(NAME, REPO)
    assert hub.repos[REPO].files() == {'notes.md': b'of somebody else'}


def test_what_comes_back_is_compared(hub, token):
    hub.lfs[SHA256] = b'other content'
    with pytest.raises(OSError, match=f'{REPO} does not give back what was sent: the SHA-256 of .* not to be trusted'):
        publish(NAME, REPO)


def test_tampered_repository_is_refused(published, tmp_path):
    repo = published.repos[REPO]
    files = repo.files()
    weights = files.pop('model.safetensors')
    repo.commit('main', {**files, 'model.safetensors': weights[:-1] + b'\0'})
    with pytest.raises(ValueError, match=f'SHA-256 is .*, expected {SHA256}. It was removed'):
        load(tmp_path)
    assert weights_in(tmp_path) == []
    # A hash does not make a pickle welcome.
    config = json.loads(files['config.json'])
    config['pretrained_cfg']['hf_hub_filename'] = 'pytorch_model.bin'
    repo.commit('main', {**files, 'pytorch_model.bin': weights, 'config.json': json.dumps(config).encode()})
    with pytest.raises(huggingface_hub.errors.EntryNotFoundError, match='model.safetensors'):
        load(tmp_path)


@pytest.fixture
def recorded(published, monkeypatch, tmp_path):
    """The record of weights that did not come with the package, but are on the hub."""
    hub = {'repo_id': REPO, 'revision': published.repos[REPO].branches['main']}
    monkeypatch.setitem(weights_records(), NAME, dataclasses.replace(weights_records()[NAME], hub=hub))
    (tmp_path / f'{NAME}.yaml').touch()
    monkeypatch.setattr(records, '_weights_dir', lambda: tmp_path)
    return weights_records()[NAME]


def test_recorded_hash_goes_before_the_repositorys_own(recorded, published, tmp_path):
    """Who can change the weights can change config.json too, but not the record."""
    repo = published.repos[REPO]
    files = repo.files()
    changed = files['model.safetensors'][:-1] + b'\0'
    config = {**json.loads(files['config.json']), 'sha256': hashlib.sha256(changed).hexdigest()}
    for branch in ('main', 'other'):
        repo.commit(branch, {**files, 'model.safetensors': changed, 'config.json': json.dumps(config).encode()})
    with pytest.raises(ValueError, match=f'expected {SHA256}'):
        load(tmp_path)
    # The revision that the record names, as a tag's default cfg has it, is as it was.
    source = records.pretrained_source(NAME)
    assert source == {'hf_hub_id': '{repo_id}@{revision}'.format(**recorded.hub)}
    timm.create_model('gunn15', pretrained=True, pretrained_cfg_overlay=source, cache_dir=str(tmp_path))
    assert weights_in(tmp_path)  # not the file that ships
    # Another branch is another publication, and goes by its own hash.
    timm.create_model(f'hf-hub:{REPO}@other', pretrained=True, cache_dir=str(tmp_path))


def test_a_repository_cannot_talk_itself_out_of_the_record(recorded, published, tmp_path):
    """Neither by another tag, another file name, nor no hash in its config.json."""
    repo = published.repos[REPO]
    files = repo.files()
    config = json.loads(files['config.json'])
    config['pretrained_cfg'].update(tag='other', hf_hub_filename='pytorch_model.bin')
    del config['sha256']
    changed = files['model.safetensors'][:-1] + b'\0'
    files = {**files, 'model.safetensors': changed, 'pytorch_model.bin': changed}
    repo.commit('main', {**files, 'config.json': json.dumps(config).encode()})
    with pytest.raises(ValueError, match=SHA256):
        load(tmp_path)


def test_weights_are_not_loaded_unchecked_where_the_hub_fails(published, tmp_path):
    published.refuse = '/config.json'
    source = dict(hf_hub_id=REPO)
    with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError):
        timm.create_model('gunn15', pretrained=True, pretrained_cfg_overlay=source, cache_dir=str(tmp_path))


def test_repositories_of_users_load_as_timm_loads_them(hub, token, tmp_path):
    """What timm's own push_to_hf_hub makes has no hash."""
    model = timm.create_model('gunn15', num_classes=3)
    timm.models.push_to_hf_hub(model, 'org/mine', safe_serialization=True)
    assert same(timm.create_model('hf-hub:org/mine', pretrained=True, cache_dir=str(tmp_path)), model)


def test_offline_after_the_first_load(published, run, tmp_path):
    load(tmp_path)
    published.requests.clear()
    code = f"import gunn_timm, timm; timm.create_model('hf-hub:{REPO}', pretrained=True, cache_dir='{tmp_path}')"
    assert run('-c', code, env={'HF_HUB_OFFLINE': '1'}).returncode == 0
    assert published.requests == []


def test_folder(expected, tmp_path):
    for path, content in repository_files(weights_records()[NAME], REPO).items():
        (tmp_path / path).write_bytes(content)
    assert same(timm.create_model(f'local-dir:{tmp_path}', pretrained=True), expected)
    file = tmp_path / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-1] + b'\0')
    with pytest.raises(ValueError, match='is not the published file'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert file.is_file()
