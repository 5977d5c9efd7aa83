"""The wheel and the sdist, built and installed where nothing of the checkout is on the path."""
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from conftest import ROOT

from gunn_timm.zoo.records import weights_records

CHECK = '''
import gunn_timm, timm, torch
from gunn_timm.zoo.records import weights_records
print(gunn_timm.__file__)
for name in weights_records():
    timm.create_model(name, pretrained=True)
print(*weights_records())
'''


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', str(out), str(ROOT)],
                   check=True, capture_output=True, timeout=300)
    wheel, = out.glob('*.whl')
    sdist, = out.glob('*.tar.gz')
    return {'wheel': wheel, 'sdist': sdist}


def test_contents_of_the_wheel(built):
    names = zipfile.ZipFile(built['wheel']).namelist()
    shipped = {n.removeprefix('gunn_timm/_weights/') for n in names if n.startswith('gunn_timm/_weights/')}
    for name, record in weights_records().items():
        assert {record.file, f'{name}.yaml'} <= shipped
    assert 'models.yaml' in shipped
    assert any(n.endswith('licenses/LICENSE') for n in names)
    assert not any(n.startswith(('tests/', 'benchmarks/')) for n in names)


@pytest.mark.parametrize('kind', ['wheel', 'sdist'])
def test_installed_in_a_fresh_environment(kind, built, tmp_path):
    venv.create(tmp_path / 'venv', with_pip=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    # What the package depends on is taken from here; it is gigabytes. A path in a .pth file does not bring along that
    # folder's own .pth files, so not the checkout either.
    site = subprocess.run([python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'],
                          check=True, capture_output=True, text=True).stdout.strip()
    with open(f'{site}/dependencies.pth', 'w') as file:
        file.write(sysconfig.get_path('purelib'))
    options = ['-q', '--no-deps', '--no-index', '--no-build-isolation', '--ignore-installed']
    subprocess.run([python, '-m', 'pip', 'install', *options, built[kind]],
                   check=True, capture_output=True, timeout=120)
    result = subprocess.run([python, '-c', CHECK], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    path, names = result.stdout.splitlines()
    assert path.startswith(str(tmp_path)) and names.split() == list(weights_records())
