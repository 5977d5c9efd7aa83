"""Publishing to, and loading from, a hub on the loopback, by the real client."""
import copy
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from loopback_hub import READER, WRITER

from gunn_timm.commands.cli import main
from gunn_timm.zoo.hub import model_card, publish, repository_files
from gunn_timm.zoo.records import license_path, probe_images, weights_records

NAME, REPO = 'gunn15.cifar10', 'org/gunn15.cifar10'
FILES = {'model.safetensors', 'config.json', 'README.md', 'LICENSE'}
IMAGES = probe_images((3, 32, 32))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """The client waits seconds between its tries; here it does not."""
    module = huggingface_hub.utils._http
    if hasattr(module, 'time'):
        monkeypatch.setattr(module, 'time', SimpleNamespace(**{**vars(time), 'sleep': lambda seconds: None}))


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', WRITER)


@pytest.fixture(scope='module')
def published_once(running_hub):
    running_hub.reset()
    with pytest.MonkeyPatch.context() as context:
        context.setenv('HF_TOKEN', WRITER)
        publish(NAME, REPO)
    return running_hub.repos[REPO]


@pytest.fixture
def published(published_once, hub, token):
    hub.repos[REPO] = copy.deepcopy(published_once)
    return hub


@pytest.fixture(scope='module')
def expected():
    return timm.create_model(NAME, pretrained=True)


def same(model, expected):
    state = model.state_dict()
    return all(torch.equal(state[k], v) for k, v in expected.state_dict().items())


@torch.inference_mode()
def logits(model):
    return model.eval()(IMAGES)


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
    assert hashlib.sha256(files['model.safetensors']).hexdigest() == weights_records()[NAME].sha256
    assert files['LICENSE'] == (ROOT / 'LICENSE').read_bytes()

    model = load(tmp_path)
    assert torch.equal(logits(model), logits(expected))
    assert model.pretrained_cfg['label_names'] == weights_records()[NAME].label_names
    assert same(timm.create_model(f'hf-hub:{REPO}@{commit}', pretrained=True), expected)
    features = load(tmp_path, features_only=True)(IMAGES)
    assert [f.shape[1] for f in features] == [240, 300, 360]
    assert load(tmp_path, num_classes=3)(IMAGES).shape == (4, 3)


def test_nothing_new_is_no_commit(published, capsys):
    assert main(['publish', NAME, '--repo-id', REPO]) == 0
    assert 'nothing new' in capsys.readouterr().out
    assert published.commits_to(REPO) == 1
    assert all(r.startswith('GET') for r in published.requests)


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
    record = weights_records()[NAME]
    changed = dataclasses.replace(record, metrics={**record.metrics, 'top5': 1.25})
    monkeypatch.setitem(weights_records(), NAME, changed)
    with pytest.raises(ValueError, match=f'{REPO} has other content already: README.md. Replace it with --force'):
        publish(NAME, REPO)
    assert published.commits_to(REPO) == 1
    assert publish(NAME, REPO, force=True).changed == ['README.md']
    assert b'1.25' in published.repos[REPO].files()['README.md']


def test_pickled_weights_do_not_stay(published):
    repo = published.repos[REPO]
    repo.commit('main', {**repo.files(), 'pytorch_model.bin': b'pickle', 'notes.md': b'kept'})
    with pytest.raises(ValueError, match='other content already: pytorch_model.bin'):
        publish(NAME, REPO)
    assert publish(NAME, REPO, force=True).changed == ['pytorch_model.bin']
    assert set(repo.files()) == FILES | {'.gitattributes', 'notes.md'}


@pytest.mark.parametrize('argv, env, message', [
    ([NAME, '--repo-id', REPO], None, 'No token for the hub: log in with `hf auth login`, or set HF_TOKEN.'),
    ([NAME, '--repo-id', REPO], READER, 'the token has no right to write there. Nothing was published.'),
    ([NAME, '--repo-id', REPO], 'hf_unknown', 'the token is not valid'),
    ([NAME, '--repo-id', 'other/x'], WRITER, 'the token has no right to write there. Nothing was published.'),
    (['sunn15.cifar10', '--repo-id', REPO], WRITER, "No weights 'sunn15.cifar10'; weights exist for: gunn15.cifar10"),
    ([NAME, '--repo-id', 'gunn15'], WRITER, "must be 'ORG/NAME'; got 'gunn15'"),
    (['--repo-id', REPO], WRITER, 'Give either the name of a weight or --all.'),
    ([NAME, '--all', '--repo-id', REPO], WRITER, 'Give either the name of a weight or --all.'),
    (['--all', '--repo-id', REPO], WRITER, "must be like 'ORG/{name}'"),
])
def test_errors_are_one_line(argv, env, message, hub, monkeypatch, capsys):
    if env:
        monkeypatch.setenv('HF_TOKEN', env)
    assert main(['publish', *argv]) == 2
    out, err = capsys.readouterr()
    assert out == '' and message in err and err.startswith('error: ') and err.count('\n') == 1
    assert env is None or env not in err
    assert hub.repos == {}


def test_weights_without_accuracy_are_not_published(hub, token, monkeypatch):
    record = weights_records()[NAME]
    for metrics in ({}, {'top1': None, 'top5': None}):
        monkeypatch.setitem(weights_records(), NAME, dataclasses.replace(record, metrics=metrics))
        with pytest.raises(ValueError, match='its record has no top-1 and top-5 accuracy'):
            publish(NAME, REPO)
    assert hub.requests == []


def test_weights_that_are_not_the_recorded_ones_are_not_published(hub, token, monkeypatch):
    monkeypatch.setitem(weights_records(), NAME, dataclasses.replace(weights_records()[NAME], sha256='0' * 64))
    with pytest.raises(ValueError, match='is not the published file'):
        publish(NAME, REPO)
    assert hub.requests == []


@pytest.mark.parametrize('method, path', [
    ('POST', '/api/repos/create'), ('GET', '/api/models/'), ('POST', '/preupload/'), ('POST', '/lfs/objects/batch'),
    ('PUT', '/lfs/'), ('POST', '/lfs-verify'), ('POST', '/commit/'),
])
@pytest.mark.parametrize('kind, times', [('drop', 1), ('truncate', 1), (500, 1), (503, 99)])
def test_publishing_survives_or_says_so(method, path, kind, times, hub, token):
    hub.fault(method, path, kind, times)
    try:
        publish(NAME, REPO)
    except OSError as e:
        # The client tries an upload again.
        assert (path, times) != ('/lfs/', 1)
        if 'Nothing was published.' in str(e):
            assert REPO not in hub.repos or hub.commits_to(REPO) == 0
        else:
            assert 'The commit was made as a whole or not at all' in str(e)
    if REPO in hub.repos:
        assert set(hub.repos[REPO].files()) in ({'.gitattributes'}, FILES | {'.gitattributes'})
    hub.faults.clear()
    publish(NAME, REPO)
    assert hub.commits_to(REPO) == 1
    assert set(hub.repos[REPO].files()) == FILES | {'.gitattributes'}


def test_slow_hub(hub, token):
    hub.fault('PUT', '/lfs/', 'slow')
    hub.fault('POST', '/commit/', 'slow')
    assert set(publish(NAME, REPO).changed) == FILES


def test_a_commit_in_between_is_not_lost(hub, token, monkeypatch):
    create_commit = huggingface_hub.HfApi.create_commit

    def late(self, *args, **kwargs):
        hub.repos[REPO].commit('main', {'notes.md': b'of somebody else'})
        return create_commit(self, *args, **kwargs)

    monkeypatch.setattr(huggingface_hub.HfApi, 'create_commit', late)
    with pytest.raises(OSError, match='there was a commit in between. The commit was made as a whole or not at all'):
        publish(NAME, REPO)
    assert hub.repos[REPO].files() == {'notes.md': b'of somebody else'}


@pytest.mark.parametrize('method, path', [('PUT', '/lfs/'), ('GET', '/resolve/.*/config.json')])
def test_what_comes_back_is_compared(method, path, hub, token, tmp_path):
    hub.fault(method, path, 'corrupt')
    with pytest.raises(OSError, match=f'{REPO} does not give back what was sent: the SHA-256 of .* not to be trusted'):
        publish(NAME, REPO)
    if method == 'PUT':
        with pytest.raises(ValueError, match='is not the published file'):
            load(tmp_path)
        assert weights_in(tmp_path) == []
        hub.lfs.clear()
        assert 'model.safetensors' in publish(NAME, REPO, force=True).changed
    else:
        assert publish(NAME, REPO).changed == []


@pytest.mark.parametrize('file, method, kind, times', [
    ('config.json', 'HEAD', 500, 1), ('config.json', 'GET', 'truncate', 1), ('config.json', 'GET', 'corrupt', 1),
    ('model.safetensors', 'HEAD', 'drop', 1), ('model.safetensors', 'HEAD', 404, 1),
    ('model.safetensors', 'GET', 'drop', 1), ('model.safetensors', 'GET', 'drop', 99),
    ('model.safetensors', 'GET', 'truncate', 1), ('model.safetensors', 'GET', 'truncate', 99),
    ('model.safetensors', 'GET', 'corrupt', 1), ('model.safetensors', 'GET', 'slow', 1),
    ('model.safetensors', 'GET', 503, 1), ('model.safetensors', 'GET', 503, 99),
])
def test_loading_is_right_or_fails(file, method, kind, times, published, expected, tmp_path):
    published.fault(method, f'/resolve/.*/{file}', kind, times)
    try:
        model = load(tmp_path)
    except Exception as e:
        assert not isinstance(e, (AttributeError, NameError, TypeError)), repr(e)
        assert not any(hashlib.sha256(p.read_bytes()).hexdigest() != weights_records()[NAME].sha256
                       for p in weights_in(tmp_path))
    else:
        assert same(model, expected)
    published.faults.clear()
    # A configuration has no hash: one that came wrong, and could still be read, stays in the cache.
    if (file, kind) == ('config.json', 'corrupt'):
        shutil.rmtree(tmp_path)
    assert same(load(tmp_path), expected)


def test_tampered_repository_is_refused(published, tmp_path):
    repo = published.repos[REPO]
    files = repo.files()
    for position in (0, 8, 2000, len(files['model.safetensors']) - 1):
        changed = bytearray(files['model.safetensors'])
        changed[position] ^= 1
        repo.commit('main', {**files, 'model.safetensors': bytes(changed)})
        with pytest.raises(ValueError, match=f'SHA-256 is .*, expected {weights_records()[NAME].sha256}. It was remov'):
            load(tmp_path)
        assert weights_in(tmp_path) == []
    repo.commit('main', {**{k: v for k, v in files.items() if k != 'model.safetensors'}, 'pytorch_model.bin': b'bad'})
    with pytest.raises(huggingface_hub.errors.EntryNotFoundError):
        load(tmp_path)


def test_recorded_hash_goes_before_the_repositorys_own(published, monkeypatch, tmp_path):
    """Who can change the weights can change config.json too, but not the record."""
    repo, record = published.repos[REPO], weights_records()[NAME]
    recorded = dataclasses.replace(record, file='elsewhere', hub={'repo_id': REPO, 'revision': repo.branches['main']})
    monkeypatch.setitem(weights_records(), NAME, recorded)
    files = repo.files()
    changed = files['model.safetensors'][:-1] + b'\0'
    config = {**json.loads(files['config.json']), 'sha256': hashlib.sha256(changed).hexdigest()}
    for branch in ('main', 'other'):
        repo.commit(branch, {**files, 'model.safetensors': changed, 'config.json': json.dumps(config).encode()})
    with pytest.raises(ValueError, match=f'expected {record.sha256}'):
        load(tmp_path)
    # The revision that the record names, as a tag's default cfg has it, is as it was.
    source = records.pretrained_source(NAME)
    assert source['hf_hub_id'] == '{repo_id}@{revision}'.format(**recorded.hub)
    overlay = dict(file=None, hf_hub_id=source['hf_hub_id'])
    timm.create_model('gunn15', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=str(tmp_path))
    # Another branch is another publication, and goes by its own hash.
    timm.create_model(f'hf-hub:{REPO}@other', pretrained=True, cache_dir=str(tmp_path))


@pytest.mark.parametrize('pickled', [False, True])
def test_a_repository_cannot_talk_itself_out_of_the_record(pickled, published, monkeypatch, tmp_path):
    """Neither by another tag or no hash in its config.json, nor by pickled weights instead."""
    repo, record = published.repos[REPO], weights_records()[NAME]
    recorded = dataclasses.replace(record, file='elsewhere', hub={'repo_id': REPO, 'revision': repo.branches['main']})
    monkeypatch.setitem(weights_records(), NAME, recorded)
    files = repo.files()
    changed = files['model.safetensors'][:-1] + b'\0'
    config = json.loads(files['config.json'])
    config['pretrained_cfg']['tag'] = 'other'
    del config['sha256']
    del files['model.safetensors']
    files['pytorch_model.bin' if pickled else 'model.safetensors'] = changed
    repo.commit('main', {**files, 'config.json': json.dumps(config).encode()})
    with pytest.raises((ValueError, OSError), match=f'{record.sha256}|model.safetensors'):
        load(tmp_path)


def test_a_hash_does_not_make_a_pickle_welcome(published, tmp_path):
    repo = published.repos[REPO]
    files = repo.files()
    content = files.pop('model.safetensors')
    config = json.loads(files['config.json'])
    config['pretrained_cfg']['hf_hub_filename'] = 'weights.bin'
    repo.commit('main', {**files, 'weights.bin': content, 'config.json': json.dumps(config).encode()})
    with pytest.raises(OSError, match='model.safetensors'):
        load(tmp_path)


def test_repositories_of_users_load_as_timm_loads_them(hub, token, tmp_path):
    """What timm's own push_to_hf_hub makes has no hash."""
    model = timm.create_model('gunn15', num_classes=3)
    timm.models.push_to_hf_hub(model, 'org/mine', safe_serialization=True)
    again = timm.create_model('hf-hub:org/mine', pretrained=True, cache_dir=str(tmp_path))
    assert same(again, model)


def test_offline_after_the_first_load(published, expected, tmp_path, run):
    code = f"import gunn_timm, timm; timm.create_model('hf-hub:{REPO}', pretrained=True)"
    env = {'HF_HOME': str(tmp_path)}
    assert run('-c', code, env=env).returncode == 0
    published.requests.clear()
    assert run('-c', code, env={**env, 'HF_HUB_OFFLINE': '1'}).returncode == 0
    assert published.requests == []
    result = run('-c', code, env={'HF_HOME': str(tmp_path / 'empty'), 'HF_HUB_OFFLINE': '1'})
    assert result.returncode == 1 and 'offline' in result.stderr.lower()


def _load_in_process(source, cache):
    if source.startswith('http'):
        # Another process does not have what a test put into the record.
        weights_records()[NAME] = dataclasses.replace(weights_records()[NAME], url=source)
        overlay = dict(file=None, url=source)
        model = timm.create_model('gunn15', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache)
    else:
        model = timm.create_model(source, pretrained=True, cache_dir=cache)
    return model.fc.weight.tolist()


@pytest.fixture
def recorded_url(hub, monkeypatch):
    """An address of the weights beside the hub's, as a record may have one."""
    url = f'{hub.url}/files/{NAME}.safetensors'
    record = weights_records()[NAME]
    hub.lfs[f'{NAME}.safetensors'] = record.path.read_bytes()
    monkeypatch.setitem(weights_records(), NAME, dataclasses.replace(record, url=url))
    return url


@pytest.mark.parametrize('source', [f'hf-hub:{REPO}', NAME, 'url'])
def test_eight_processes_load_at_once(source, published, expected, tmp_path, monkeypatch, request):
    if source == 'url':
        source = request.getfixturevalue('recorded_url')
    # A thread pool of OpenMP does not live through a fork.
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['gunn_timm', 'test_hub'])
    with context.Pool(8) as pool:
        results = pool.starmap(_load_in_process, [(source, str(tmp_path))] * 8, chunksize=1)
    assert all(result == expected.fc.weight.tolist() for result in results)


@pytest.mark.parametrize('kind', [None, 'drop', 'truncate', 'corrupt', 'slow', 500, 404])
def test_url(kind, recorded_url, hub, expected, tmp_path):
    if kind:
        hub.fault('GET', '/files/', kind)
    if kind in (None, 'slow'):
        assert _load_in_process(recorded_url, str(tmp_path)) == expected.fc.weight.tolist()
    else:
        with pytest.raises((OSError, ValueError)):
            _load_in_process(recorded_url, str(tmp_path))
        assert weights_in(tmp_path) == []
    assert _load_in_process(recorded_url, str(tmp_path)) == expected.fc.weight.tolist()
    assert [p.name for p in tmp_path.iterdir()] == [f'{NAME}.safetensors']


def test_url_goes_to_the_usual_cache(recorded_url, hub, expected):
    file = Path(torch.hub.get_dir()) / 'checkpoints' / f'{NAME}.safetensors'
    for _ in range(2):
        assert _load_in_process(recorded_url, None) == expected.fc.weight.tolist()
    assert file.is_file() and sum('/files/' in request for request in hub.requests) == 1
    file.unlink()


def test_folder(expected, tmp_path):
    for path, content in repository_files(weights_records()[NAME], REPO).items():
        (tmp_path / path).write_bytes(content)
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert same(model, expected)
    file = tmp_path / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:-1] + b'\0')
    with pytest.raises(ValueError, match='is not the published file'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert file.is_file()
    config = tmp_path / 'config.json'
    for sha256 in ('', 'abc', 5):
        config.write_text(json.dumps({**json.loads(config.read_text()), 'sha256': sha256}))
        with pytest.raises(ValueError, match=f"{config}' has {sha256!r} for 'sha256'; it must be 64 hexadecimal"):
            timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


@pytest.mark.parametrize('name', weights_records())
def test_card_and_configuration_agree_with_the_record(name):
    record = weights_records()[name]
    files = repository_files(record, 'org/x')
    config = json.loads(files['config.json'])
    assert config['label_names'] == record.label_names and config['sha256'] == record.sha256
    assert config['num_classes'] == len(record.label_names)
    assert f"{config['architecture']}.{config['pretrained_cfg']['tag']}" == name
    for key, value in record.preprocessing.items():
        assert config['pretrained_cfg'][key] == value
    card = ModelCard(files['README.md'].decode())
    assert (card.data.library_name, card.data.license) == ('timm', record.license)
    # miniImageNet has no home of its own there.
    hub_id = record.dataset.get('hub_id')
    assert card.data.datasets == ([hub_id] if hub_id else None)
    assert {r.metric_name.split()[0]: r.metric_value for r in card.data.eval_results} == {
        'Top-1': record.metrics['top1'], 'Top-5': record.metrics['top5']}
    for figure in (f"{record.metrics['top1']}% / {record.metrics['top5']}%", f'{record.parameters:,}', record.sha256,
                   record.dataset['copy'], record.metrics['command'], *record.training['command']):
        assert figure in card.text
    assert not re.search(r'None|\{|\[More Information', re.sub(r'```.*?```', '', card.text, flags=re.DOTALL))


@pytest.mark.parametrize('name', weights_records())
def test_card_beside_the_record_is_current(name, capsys):
    """`python -m gunn_timm card NAME > weights/NAME.md` writes it."""
    assert main(['card', name]) == 0
    written, kept = ModelCard(capsys.readouterr().out), ModelCard((ROOT / 'weights' / f'{name}.md').read_text())
    assert kept.text == written.text and kept.data.to_dict() == written.data.to_dict()


def test_code_on_the_card_runs(published, run, tmp_path):
    blocks = re.findall(r'```python\n(.*?)```', model_card(weights_records()[NAME], REPO), re.DOTALL)
    assert len(blocks) == 3
    shutil.copy(ROOT / 'assets' / 'cat.jpg', tmp_path / 'picture.jpg')
    result = run('-c', '\n'.join(blocks), cwd=tmp_path, env={'PYTHONPATH': str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        'cat', *(f'torch.Size([1, {c}, {s}, {s}])' for c, s in ((240, 32), (300, 16), (360, 8))),
        'torch.Size([1, 360])']


def test_licence():
    assert license_path().read_bytes() == (ROOT / 'LICENSE').read_bytes()


def test_home_of_the_tests_is_not_the_users():
    assert os.environ['HF_HOME'] != os.path.expanduser('~/.cache/huggingface')
    assert huggingface_hub.constants.ENDPOINT.startswith('http://127.0.0.1')
