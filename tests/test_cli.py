import json

import pytest
from conftest import ROOT

from gunn_timm.commands.cli import main, models_table
from gunn_timm.zoo.records import model_infos, weights_records

PHOTO = str(ROOT / 'assets' / 'cat.jpg')


def test_list_has_every_tag(capsys):
    assert main(['list']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(model_infos())
    for line in lines[1:]:
        assert line.endswith('yes') is (line.split()[0] in weights_records())


def test_readme_table_is_current(capsys):
    assert main(['list', '--markdown']) == 0
    table = capsys.readouterr().out.strip()
    assert table == models_table()
    assert table in (ROOT / 'README.md').read_text()


def test_page_of_the_weights_is_current():
    _, *provenance = models_table().split('\n\n')
    assert len(provenance) == len(weights_records())
    page = (ROOT / 'weights' / 'README.md').read_text()
    assert all(line in page for line in provenance)


@pytest.mark.parametrize('argv, message', [
    (['predict', 'missing.jpg'], "No image 'missing.jpg'."),
    (['predict', __file__], 'is not an image that can be read'),
    (['predict', PHOTO, '--model', 'gunn51'], "No model 'gunn51'; nearest: gunn"),
    (['predict', PHOTO, '--model', 'gunn15.cifar20'], "No model 'gunn15.cifar20'; nearest: gunn15.cifar10"),
    (['predict', PHOTO, '--model', 'sunn24'], 'No pretrained weights exist for sunn24.cifar10'),
    (['predict', PHOTO, '--model', 'org/gunn15'], "Use 'hf-hub:org/gunn15'"),
])
def test_bad_input_is_one_line_and_exit_code_2(argv, message, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == '' and message in err
    assert err.startswith('error: ') and err.count('\n') == 1


def test_unknown_command():
    with pytest.raises(SystemExit) as error:
        main(['forecast'])
    assert error.value.code == 2


def test_predict_names_the_cat(run):
    result = run('-m', 'gunn_timm', 'predict', PHOTO, PHOTO, '--topk', 3, '--json')
    assert (result.returncode, result.stderr) == (0, '')
    first, second = json.loads(result.stdout)
    assert first == second and first['image'] == PHOTO
    probabilities = [entry['probability'] for entry in first['predictions']]
    assert len(probabilities) == 3 and probabilities == sorted(probabilities, reverse=True)
    assert first['predictions'][0]['label'] == 'cat'


def test_predict_prints_percentages(capsys):
    assert main(['predict', PHOTO, '--topk', '1']) == 0
    path, line = capsys.readouterr().out.splitlines()
    assert path == PHOTO and line.endswith('%  cat')
