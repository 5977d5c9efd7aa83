import importlib.util
import sys

import pytest
import timm
import torch
from conftest import ROOT


def test_list_and_help(tmp_path, monkeypatch):
    # The checkout where torch.hub keeps what it has downloaded, for it lists no local folders.
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    (tmp_path / 'owner_gunn_timm_main').symlink_to(ROOT)
    trusted = dict(skip_validation=True, trust_repo=True)
    names = torch.hub.list('owner/gunn_timm:main', **trusted)
    assert sorted(names) == timm.list_models(module='gunn')
    assert all('paper section' in torch.hub.help('owner/gunn_timm:main', name, **trusted) for name in names)


def test_load():
    model = torch.hub.load(str(ROOT), 'gunn15', source='local', num_classes=3)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert torch.hub.load(str(ROOT), 'gunn15', source='local', pretrained=True).num_classes == 10


def test_missing_dependency_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'timm' else find_spec(name))
    monkeypatch.delitem(sys.modules, 'hubconf', raising=False)
    with pytest.raises(RuntimeError, match='needs packages that are not installed: timm'):
        torch.hub.load(str(ROOT), 'gunn15', source='local')
