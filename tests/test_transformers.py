"""A published repository in transformers, where many meet the hub's weights first."""
import pytest
import timm
import torch
import transformers
from conftest import ROOT
from PIL import Image

from gunn_timm.zoo.hub import repository_files
from gunn_timm.zoo.records import weights_records

RECORD = weights_records()['gunn15.cifar10']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('repository')
    for name, content in repository_files(RECORD, 'org/gunn15.cifar10').items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture(scope='module')
def expected(folder):
    """The images of a batch, and what timm computes of them."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return x, model(x)


def test_loads_with_the_same_logits_and_labels(folder, expected):
    x, logits = expected
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    assert [model.config.id2label[i] for i in range(10)] == RECORD.label_names
    with torch.no_grad():
        assert torch.equal(model(pixel_values=x).logits, logits)
    pipeline = transformers.pipeline('image-classification', str(folder))
    assert pipeline(Image.open(ROOT / 'assets' / 'cat.jpg'))[0]['label'] == 'cat'


def test_fine_tunes_and_loads_again(folder, tmp_path):
    model = transformers.AutoModelForImageClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True)
    before = model.timm_model.stem.conv1.conv.weight.detach().clone()
    data = [dict(pixel_values=torch.randn(3, 32, 32), labels=i % 3) for i in range(6)]
    arguments = transformers.TrainingArguments(
        tmp_path / 'run', max_steps=3, per_device_train_batch_size=2, report_to=[], save_strategy='no', use_cpu=True,
        disable_tqdm=True)
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert not torch.equal(model.timm_model.stem.conv1.conv.weight, before)
    model.save_pretrained(tmp_path / 'tuned')
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'tuned')
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()(pixel_values=x).logits
        assert torch.equal(again.eval()(pixel_values=x).logits, expected)
        # And in timm: the published weights' hash is not that of these.
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'tuned'}", pretrained=True).eval()(x), expected)
