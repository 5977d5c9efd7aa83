"""The models as timm's users meet them; timm's own tests, see run_timm_tests.py, cover what every timm model does."""
import copy
import math

import pytest
import timm
import torch
from conftest import assert_same_gradients, create_tiny, images, relative
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from timm.models import group_parameters
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d

from gunn_timm.layers import GunnLayer, set_backend
from gunn_timm.zoo.records import model_infos, weights_records

MODELS = ['gunn15', 'gunn15_nores', 'gunn18', 'gunn24', 'sunn15', 'sunn18', 'sunn24', 'wide_gunn18']


def test_registered_models():
    assert timm.list_models(module='gunn') == MODELS
    assert set(timm.list_models(module='gunn', include_tags=True)) == set(model_infos())


@pytest.mark.parametrize('name', model_infos())
def test_model_infos_are_true(name):
    info = model_infos()[name]
    model = timm.create_model(name, device='meta').eval()
    assert all(t.is_meta for t in model.state_dict().values())
    assert sum(p.numel() for p in model.parameters()) == info.parameters
    assert tuple(info.input_size) == model.default_cfg['input_size']
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *info.input_size, device='meta'))
    assert counter.get_total_flops() / 2e9 == pytest.approx(info.gmacs, abs=0.0005)


@pytest.mark.parametrize('name', model_infos())
def test_default_cfgs(name):
    cfg = timm.get_pretrained_cfg(name)
    tag = name.split('.')[1]
    assert cfg.license == 'apache-2.0' and cfg.paper_ids == 'arXiv:1711.09280' and cfg.origin_url
    # The authors' ImageNet code resizes with torch7's bicubic; CIFAR's images are not resized.
    assert cfg.interpolation == ('bicubic' if tag == 'in1k' else 'bilinear')
    assert cfg.num_classes == {'cifar10': 10, 'cifar100': 100, 'in1k': 1000, 'mini_in100': 100}[tag]
    means = {'cifar10': (125.3, 123.0, 113.9), 'cifar100': (129.3, 124.1, 112.4)}
    deviations = {'cifar10': (63.0, 62.1, 66.7), 'cifar100': (68.2, 65.4, 70.4)}
    if tag in means:
        assert [255 * m for m in cfg.mean] == pytest.approx(means[tag])
        assert [255 * s for s in cfg.std] == pytest.approx(deviations[tag])
    assert tag == 'mini_in100' or cfg.crop_pct == (0.875 if tag == 'in1k' else 1.0)
    assert bool(cfg.has_weights) is (name in weights_records())


@pytest.mark.parametrize('name', [*MODELS, *model_infos()])
def test_one_name_is_one_network(name):
    """With and without weights; and timm says of both which have weights."""
    model = timm.create_model(name, device='meta')
    has_weights = timm.is_model_pretrained(name)
    assert has_weights is (f"{model.pretrained_cfg['architecture']}.{model.pretrained_cfg['tag']}" in weights_records())
    if has_weights:
        pretrained = timm.create_model(name, pretrained=True)
        shapes, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (pretrained, model))
        assert shapes == expected and pretrained.pretrained_cfg['input_size'] == model.pretrained_cfg['input_size']
    else:
        with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}.*gunn15.cifar10'):
            timm.create_model(name, pretrained=True)


@pytest.mark.parametrize('kwargs, message', [
    (dict(num_classes=-1), 'num_classes .* got -1'),
    (dict(channels=(8, 12, 15)), '15 channels and 2 segments'),
    (dict(channels=(8, 12)), 'of one length'),
    (dict(layout='vgg'), "'imagenet' or 'cifar'; got 'vgg'"),
    (dict(output_stride=8), r'one of \[1, 2, 4\]; got 8'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_tiny('gunn15', **kwargs)


@pytest.mark.parametrize('pool, factor', [('avg', 1), ('catavgmax', 2)])
@pytest.mark.parametrize('name', ['gunn15', 'gunn18'])
def test_input_channels_pooling_and_classifier(name, pool, factor):
    model = create_tiny(name, in_chans=4, global_pool=pool, drop_rate=0.5).eval()
    x = images(model)
    width = model.num_features * factor
    assert model.in_chans == 4 and model.head_hidden_size == width and model.fc.in_features == width
    assert model(x).shape == (2, 7)
    features = model.forward_features(x)
    assert model.forward_head(features, pre_logits=True).shape == (2, width)
    model.reset_classifier(3, 'avg')
    assert model.num_classes == 3 and model(x).shape == (2, 3) and model.head_hidden_size == model.num_features
    model.reset_classifier(0, '')
    assert model.num_classes == 0 and torch.equal(model(x), features)
    with pytest.raises(ValueError, match='got -1'):
        model.reset_classifier(-1)
    assert list(dict(model.named_children()))[-1] == 'fc'


@pytest.mark.parametrize('name', ['gunn15', 'gunn18'])
@pytest.mark.parametrize('feature_cls', ['list', 'getter', 'hook', 'fx'])
def test_features_only(name, feature_cls):
    full = create_tiny(name).eval()
    x = images(full, size=(96, 64))
    expected = full.forward_intermediates(x, intermediates_only=True)
    everything = list(range(len(expected)))
    for out_indices in (everything, [0], [1], everything[-1:]):
        model = create_tiny(name, features_only=True, out_indices=out_indices, feature_cls=feature_cls).eval()
        # Created from one seed, the weights are those of the whole network.
        maps = model(x)
        assert [m.shape[1] for m in maps] == model.feature_info.channels()
        for i, feature_map, reduction in zip(out_indices, maps, model.feature_info.reduction()):
            assert feature_map.shape[-2:] == (96 // reduction, 64 // reduction)
            torch.testing.assert_close(feature_map, expected[i])


@pytest.mark.parametrize('name, strides', [('gunn15', (1, 2, 4)), ('gunn18', (4, 8, 16, 32))])
def test_output_stride(name, strides):
    for output_stride in strides:
        model = create_tiny(name, output_stride=output_stride, features_only=True)
        assert model.feature_info.reduction()[-1] == output_stride
        x = torch.randn(1, 3, 64, 64)
        assert model.eval()(x)[-1].shape[-1] == 64 // output_stride
    dilated = create_tiny(name, output_stride=strides[0])
    dilations = [m.dilation[0] for m in dilated.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert max(dilations) == strides[-1] // strides[0]


# In float64, so that what is compared is the computation and not its rounding.
EXACT = 1e-11


def test_script_trace_and_export():
    batch = torch.export.Dim('batch', min=1, max=64)
    # All in one process: TorchScript may take two models for one where they differ in the order of modules only.
    for name in ('gunn15', 'gunn18', 'gunn24', 'sunn15'):
        model = create_tiny(name).double().eval()
        traced, x = images(model).double(), images(model, batch=3).double()
        with torch.no_grad():
            expected = model(x)
            for again in (
                    torch.jit.script(model), torch.jit.trace(model, traced),
                    torch.export.export(model, (traced,), dynamic_shapes=({0: batch},)).module()):
                assert relative(again(x), expected) <= EXACT, name


@pytest.mark.parametrize('name, training', [
    ('gunn15', True), pytest.param('gunn18', False, marks=pytest.mark.slow)])
def test_compile_in_one_graph(name, training):
    model = create_tiny(name).double().train(training)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend='aot_eager')
    x = images(model).double()
    out, expected = compiled(x), model(x)
    assert relative(out, expected) <= EXACT
    out.square().sum().backward()
    expected.square().sum().backward()
    assert_same_gradients(compiled, model, EXACT)


@pytest.mark.parametrize('frozen', [False, True])
def test_reparameterized_model_is_the_same(tiny_name, frozen):
    model = create_tiny(tiny_name).double().eval()
    x = images(model).double()
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    if frozen:
        model = freeze_batch_norm_2d(model)
    fused = timm.utils.reparameterize_model(model)
    assert any(isinstance(m, norm) for m in model.modules()) and not any(isinstance(m, norm) for m in fused.modules())
    with torch.inference_mode():
        assert relative(fused(x), model(x)) <= EXACT
    assert torch.equal(timm.utils.reparameterize_model(fused)(x), fused(x))
    # timm's scripts fold before they call eval().
    assert torch.equal(timm.utils.reparameterize_model(model.train()).eval()(x), fused(x))


def test_norms_of_another_class_are_not_fused():
    model = create_tiny('gunn15', norm_layer=BatchNormAct2d).double().eval()
    x = images(model).double()
    assert relative(timm.utils.reparameterize_model(model)(x), model(x)) <= EXACT


@pytest.mark.parametrize('backend', ['auto', 'plain'])
@pytest.mark.parametrize('name', ['gunn15', 'gunn18'])
def test_grad_checkpointing_changes_nothing(name, backend):
    model = create_tiny(name).double()
    set_backend(model, backend)
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = images(model).double()
    for m in (model, twin):
        m(x).square().sum().backward()
    assert_same_gradients(twin, model, EXACT)
    assert all(torch.equal(b, c) for b, c in zip(model.buffers(), twin.buffers()))


@pytest.mark.parametrize('name', ['gunn15', 'gunn18', pytest.param('wide_gunn18', marks=pytest.mark.slow)])
def test_init_follows_the_authors(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for key, conv in model.named_modules():
        if isinstance(conv, nn.Conv2d):
            sigma = math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))
            count = conv.weight.numel()
            # Six standard errors: passes by chance for all convs but one model in millions.
            assert conv.bias is None
            assert abs(conv.weight.mean().item()) <= 6 * sigma / math.sqrt(count), key
            assert abs(conv.weight.std().item() / sigma - 1) <= 6 / math.sqrt(2 * count), key
        elif isinstance(conv, nn.BatchNorm2d):
            assert (conv.weight == 1).all() and (conv.bias == 0).all()
    assert (model.fc.bias == 0).all()
    with torch.inference_mode():
        logits = model(torch.randn(2, 3, 32, 32))
    assert logits.isfinite().all() and logits.abs().max() < 1e3


def test_parameter_groups():
    model = create_tiny('gunn15')
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    fine = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(coarse) == set(fine) == {n for n, _ in model.named_parameters()}
    assert fine['stem.conv1.conv.weight'] < fine['stages.0.layer.units.0.blocks.0.conv1.conv.weight']
    assert fine['stages.1.downsample.conv.conv.weight'] < fine['stages.1.layer.units.0.blocks.0.conv1.conv.weight']
    assert fine['stages.2.layer.units.1.shortcut.conv.weight'] <= fine['final_conv.conv.weight'] < fine['fc.weight']
    assert coarse['stages.1.downsample.conv.conv.weight'] == coarse['stages.1.layer.units.0.shortcut.conv.weight']


def test_drop_path_rises_over_the_units():
    model = timm.create_model('gunn15', drop_path_rate=0.2, device='meta')
    layers = [m for m in model.modules() if isinstance(m, GunnLayer)]
    rates = [getattr(unit.drop_path, 'drop_prob', 0.) for layer in layers for unit in layer.units]
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == pytest.approx(0.2)
