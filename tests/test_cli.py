"""The command line: what it prints, and how it refuses."""
import json

import pytest
from conftest import ROOT

from gunn_timm.commands.cli import main
from gunn_timm.zoo.records import model_infos, weights_records

PHOTO = str(ROOT / 'assets' / 'cat.jpg')


def test_list_has_every_tag_and_our_errors(capsys):
    assert main(['list']) == 0
    _, _, *rows = (line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines())
    assert [row[0] for row in rows] == list(model_infos())
    ours = {row[0]: row[-1] for row in rows if row[-1] != '-'}
    assert ours == {name: f"{100 - record.metrics['top1']:.2f}" for name, record in weights_records().items()}


def test_readme_table_is_current(capsys):
    assert main(['list']) == 0
    begin, end = '<!-- models: written by `python -m gunn_timm list` -->\n', '<!-- /models -->'
    assert (ROOT / 'README.md').read_text().split(begin)[1].split(end)[0] == capsys.readouterr().out


@pytest.mark.parametrize('argv, message', [
    (['predict', 'missing.jpg'], "No image 'missing.jpg'."),
    (['predict', __file__], 'is not an image that can be read'),
    (['predict', PHOTO, '--model', 'gunn51'], 'Unknown model (gunn51)'),
    (['predict', PHOTO, '--model', 'sunn24'], 'No pretrained weights exist for sunn24.cifar10'),
    (['predict', PHOTO, '--model', 'org/gunn15'], "Use 'hf-hub:org/gunn15'"),
    (['run', 'missing.py'], "No script 'missing.py'; give a path, such as that of timm's train.py."),
    (['summary', 'resnet18'], 'must be a Gunn, for its layers are what is looked at; got ResNet'),
    (['summary', 'gunn18', '--image-size', '8', '8'], 'Output size is too small'),
    (['card', 'sunn15.cifar10'], "No weights 'sunn15.cifar10'; weights exist for: gunn15.cifar10"),
    (['export', 'gunn15', '--format', 'onnx', '--out', 'x', '--num-classes', '7'], '--num-classes goes with'),
])
def test_bad_input_is_one_line_and_exit_code_2(argv, message, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == '' and message in err
    assert err.startswith('error: ') and err.count('\n') == 1


def test_predict_names_the_cat(run, capsys):
    result = run('-m', 'gunn_timm', 'predict', PHOTO, PHOTO, '--topk', 3, '--json')
    assert (result.returncode, result.stderr) == (0, '')
    first, second = json.loads(result.stdout)
    assert first == second and first['image'] == PHOTO
    probabilities = [entry['probability'] for entry in first['predictions']]
    assert len(probabilities) == 3 and probabilities == sorted(probabilities, reverse=True)
    assert first['predictions'][0]['label'] == 'cat'
    assert main(['predict', PHOTO, '--topk', '1']) == 0
    assert capsys.readouterr().out.splitlines() == [PHOTO, f'  {probabilities[0]:6.1%}  cat']
