"""The wheel, built from the sdist as pip does, and installed where nothing of the checkout is on the path."""
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from conftest import ROOT

from gunn_timm.zoo.records import weights_records

CHECK = '''
import gunn_timm, timm
from gunn_timm.zoo.hub import repository_files
from gunn_timm.zoo.records import weights_records
print(gunn_timm.__file__)
for name, record in weights_records().items():
    timm.create_model(name, pretrained=True)
    repository_files(record, 'org/name')
print(*weights_records())
'''


def run(*command, **kwargs):
    command = list(map(str, command))
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, **kwargs).stdout


@pytest.mark.slow
def test_wheel(tmp_path):
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp_path, ROOT)
    wheel, = tmp_path.glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith('licenses/LICENSE') for name in names)
    assert all(name.startswith('gunn_timm') for name in names)

    venv.create(tmp_path / 'venv', with_pip=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    # What the package depends on is taken from here; it is gigabytes. A path in a .pth file does not bring along that
    # folder's own .pth files, so not the checkout either.
    site = run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip()
    with open(f'{site}/dependencies.pth', 'w') as file:
        file.write(sysconfig.get_path('purelib'))
    run(python, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--ignore-installed', wheel)
    path, records = run(python, '-c', CHECK, cwd=tmp_path).splitlines()
    assert path.startswith(str(tmp_path)) and records.split() == list(weights_records())
