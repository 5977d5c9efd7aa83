"""What takes a network's code apart: torch.fx and what is built on it, and torch.package."""
import subprocess
import sys

import pytest
import timm
import torch
from conftest import create_tiny, images, relative
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.package import PackageExporter
from torchvision.models.feature_extraction import create_feature_extractor

LOAD = '''
import sys, torch
if sys.argv[2] == 'not installed':
    sys.modules['gunn_timm'] = None
model = torch.package.PackageImporter(sys.argv[1] + '/model.pt').load_pickle('model', 'model.pkl')
torch.save(model(torch.load(sys.argv[1] + '/x.pt')), sys.argv[1] + '/y.pt')
'''


def test_symbolic_trace_and_feature_extractor(tiny_name):
    model = create_tiny(tiny_name).double().eval()
    x = images(model).double()
    expected, maps = model.forward_intermediates(x)
    # Sums in another order: concatenation and Algorithm 1.
    assert relative(torch.fx.symbolic_trace(model)(x), model(x)) <= 1e-12
    last = f'stages.{len(model.stages) - 1}'
    assert relative(create_feature_extractor(model, {last: 'map'})(x)['map'], maps[-1]) <= 1e-12


def test_fx_quantisation():
    model = timm.utils.reparameterize_model(create_tiny('gunn15').eval())
    x = images(model, batch=8)
    prepared = prepare_fx(model, get_default_qconfig_mapping('x86'), (x,))
    prepared(x)
    # 8 bits through some ten layers; other weights or another order of the units are off by 1.
    assert relative(convert_fx(prepared)(x), model(x)) <= 0.2


@pytest.mark.parametrize('installed', ['installed', 'not installed'])
def test_torch_package_takes_the_code_along(installed, tmp_path):
    model = create_tiny('gunn15').eval()
    with PackageExporter(tmp_path / 'model.pt') as exporter:
        exporter.intern('gunn_timm.**')
        exporter.extern('**')
        exporter.save_pickle('model', 'model.pkl', model)
    x = images(model)
    torch.save(x, tmp_path / 'x.pt')
    subprocess.run([sys.executable, '-c', LOAD, str(tmp_path), installed], check=True)
    assert torch.equal(torch.load(tmp_path / 'y.pt'), model(x))
