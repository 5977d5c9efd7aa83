"""What section 4 of the paper says of overlapping neurons, where it is exact."""
import functools
import json
import sys

import numpy as np
import timm
import torch
from conftest import ROOT, TINY, save_images

sys.path.insert(0, str(ROOT / 'experiments'))
import singularities  # noqa: E402


def test_command(tmp_path, monkeypatch):
    save_images(tmp_path / 'train', np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8))
    create = functools.partial(timm.create_model, **TINY['gunn15'])
    monkeypatch.setattr(singularities.timm, 'create_model', create)
    torch.save(create('gunn15', num_classes=10).state_dict(), tmp_path / 'gunn15.pth')
    arguments = f'--data-dir {tmp_path} --steps 3 --batch-size 4 --img-size 8 --out {tmp_path}'.split()
    assert singularities.main([*arguments, '--checkpoints', f'gunn15={tmp_path}/gunn15.pth']) == 0
    results = json.loads((tmp_path / 'results.json').read_text())
    for network, distances in results['linear'].items():
        assert max(distances) == 0 if network == 'unordered, no residual' else distances[-1] > 1e-2
    for what, staying in (('segments', ['unordered, no residual']),
                          ('channels', ['unordered, no residual', 'ordered, no residual'])):
        for network, distances in results[what].items():
            # In a norm of float64 numbers of about 1, rounding errors are below 1e-12.
            assert max(distances) < 1e-12 if network in staying else distances[-1] > 1e-5
    assert [len(maps) for maps in results['trained'].values()] == [3]
    assert (tmp_path / 'parting.png').is_file() and (tmp_path / 'channels.png').is_file()
