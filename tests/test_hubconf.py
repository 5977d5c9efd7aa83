import importlib.util
import sys

import pytest
import torch
from conftest import ROOT

MODELS = ['gunn15', 'gunn15_nores', 'gunn18', 'gunn24', 'sunn15', 'sunn18', 'sunn24', 'wide_gunn18']


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """The checkout where torch.hub keeps what it has downloaded, for it lists no local folders."""
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    (tmp_path / 'owner_gunn_timm_main').symlink_to(ROOT)
    return 'owner/gunn_timm:main'


def test_list_and_help(repo):
    assert sorted(torch.hub.list(repo, skip_validation=True, trust_repo=True)) == MODELS
    for name in MODELS:
        doc = torch.hub.help(repo, name, skip_validation=True, trust_repo=True)
        assert 'paper section' in doc


def test_load():
    model = torch.hub.load(str(ROOT), 'gunn15', source='local', num_classes=3)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_load_pretrained():
    model = torch.hub.load(str(ROOT), 'gunn15', source='local', pretrained=True)
    assert model.num_classes == 10
    with pytest.raises(RuntimeError, match='No pretrained weights exist for sunn24'):
        torch.hub.load(str(ROOT), 'sunn24', source='local', pretrained=True)


def test_missing_dependency_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'timm' else find_spec(name))
    monkeypatch.delitem(sys.modules, 'hubconf', raising=False)
    with pytest.raises(RuntimeError, match='needs packages that are not installed: timm'):
        torch.hub.load(str(ROOT), 'gunn15', source='local')
