"""What holds for every layer and network, on examples that hypothesis makes up."""
import copy
import functools
import itertools
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
import safetensors.torch
import timm
import torch
from conftest import randomize, relative
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.utils import reparameterize_model
from torch import nn

from gunn_timm.layers import GunnLayer, set_backend
from gunn_timm.zoo.files import load_checkpoint

# The same examples in every run of the same code, kept nowhere, on machines of any speed.
checked = functools.partial(
    settings, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# float64 rounds off 1e-16 of a value. A norm over a few values of a batch may multiply that by up to 316, one over the
# root of its eps, and some hundred operations follow.
EXACT = 1e-11

# What is fused has a way of its own where a unit is one block.
CONFIGS = st.fixed_dictionaries(dict(
    width=st.integers(1, 3), num_segments=st.integers(1, 4), expansion=st.integers(1, 3),
    num_blocks=st.sampled_from([1, 1, 2, 3]), shortcut=st.booleans(), residual=st.booleans(), ordered=st.booleans(),
    dilation=st.integers(1, 3)))
# Of few examples hypothesis may make up none with both.
every_kind = pytest.mark.parametrize('ordered, residual', list(itertools.product([True, False], repeat=2)))
# Batch, height, width.
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
LAYOUTS = st.sampled_from(['contiguous', 'channels_last', 'transposed', 'sliced', 'expanded'])


def make_layer(config: Dict[str, Any], layout: str, dtype: torch.dtype = torch.double) -> GunnLayer:
    config = dict(config)
    torch.manual_seed(0)
    layer = randomize(GunnLayer(config.pop('width') * config['num_segments'], **config)).to(dtype)
    return layer.to(memory_format=torch.channels_last) if layout == 'channels_last' else layer


def make_input(
        layer: GunnLayer, shape: Tuple[int, int, int], layout: str, dtype: torch.dtype = torch.double) -> torch.Tensor:
    (batch, height, width), channels = shape, layer.channels
    size, arrange = {
        'contiguous': ((batch, channels, height, width), lambda x: x),
        'channels_last': ((batch, height, width, channels), lambda x: x.permute(0, 3, 1, 2)),
        'transposed': ((batch, channels, width, height), lambda x: x.transpose(2, 3)),
        'sliced': ((2 * batch, channels + 1, height + 1, 2 * width), lambda x: x[::2, 1:, 1:, ::2]),
        'expanded': ((batch, channels, height, 1), lambda x: x.expand(-1, -1, -1, width)),
    }[layout]
    return arrange(torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype))


def values_of_a_channel(shape: Tuple[int, int, int], layout: str) -> int:
    """How many different values a norm sees: PyTorch refuses one, and of equal ones only rounding errors are left."""
    batch, height, width = shape
    return batch * height * (1 if layout == 'expanded' else width)


def step(layer: nn.Module, x: torch.Tensor) -> List[torch.Tensor]:
    """Differentiate a weighted sum of what a layer gives; return output and gradients, that of the input first."""
    y = layer(x)
    torch.manual_seed(2)
    y.backward(torch.randn(y.shape).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


def assert_same(found: List[torch.Tensor], expected: List[torch.Tensor]) -> None:
    """Hold tensors to expected ones, within a share of the largest: some gradients are 0 but for rounding."""
    assert [t is None for t in found] == [t is None for t in expected]
    pairs = [(a, b) for a, b in zip(found, expected) if a is not None]
    largest = max((b.double().norm().item() for _, b in pairs), default=0)
    for a, b in pairs:
        assert (a.double() - b.double()).norm().item() <= EXACT * largest


@every_kind
@checked(max_examples=30)
@given(config=CONFIGS, shape=SHAPES, layout=LAYOUTS, input_grad=st.booleans(), grad_checkpointing=st.booleans(),
       frozen=st.sampled_from([0, 0.1, 0.5, 0.9, 1]), chance=st.randoms(use_true_random=False))
def test_training_equals_concatenation(
        config, shape, layout, input_grad, grad_checkpointing, frozen, chance, ordered, residual):
    """Whatever is frozen, and whichever norms are in training mode."""
    layer = make_layer(dict(config, ordered=ordered, residual=residual), layout)
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(values_of_a_channel(shape, layout) > 1 and chance.random() < 0.5)
    for p in layer.parameters():
        p.requires_grad_(chance.random() >= frozen)
    plain = copy.deepcopy(layer)
    wanted = input_grad or any(p.requires_grad for p in layer.parameters())
    set_backend(layer, 'gradual')
    set_backend(plain, 'plain')
    layer.grad_checkpointing = grad_checkpointing
    results = []
    for twin in (layer, plain):
        x = make_input(layer, shape, layout).detach().requires_grad_(input_grad)
        before = x.detach().clone()
        if wanted:
            results.append(step(twin, x))
        else:
            results.append([twin(x)])
            assert not results[-1][0].requires_grad
        assert torch.equal(x, before)
    (y, *grads), (y_plain, *grads_plain) = results
    assert type(y) is torch.Tensor and y.shape == x.shape
    assert_same([y], [y_plain])
    assert_same(grads, grads_plain)
    for (name, b), c in zip(layer.named_buffers(), plain.buffers()):
        assert relative(b, c) <= EXACT, name


@every_kind
@checked(max_examples=30)
@given(config=CONFIGS, shape=SHAPES, layout=LAYOUTS)
def test_inference_is_the_same_in_every_way(config, shape, layout, ordered, residual):
    layer = make_layer(dict(config, ordered=ordered, residual=residual), layout).eval()
    x = make_input(layer, shape, layout)
    before = x.clone()
    fused = reparameterize_model(layer)
    set_backend(layer, 'plain')
    with torch.no_grad():
        expected = layer(x)
        for backend in ('plain', 'gradual'):
            set_backend(layer, backend)
            set_backend(fused, backend)
            # The one format in which what is fused has a way of its own.
            last = x.contiguous(memory_format=torch.channels_last)
            assert_same([layer(x), fused(x), fused(last)], [expected] * 3)
    set_backend(fused, 'gradual')
    assert_same([fused(x.detach().requires_grad_())], [expected])
    assert torch.equal(x, before)


@checked(max_examples=12)
@given(config=CONFIGS, shape=SHAPES, layout=LAYOUTS)
def test_scripted_layer_is_the_same(config, shape, layout):
    """In one process: TorchScript takes layers of the same modules for one."""
    layer = make_layer(config, layout).eval()
    x = make_input(layer, shape, layout)
    assert_same([torch.jit.script(layer)(x)], [layer(x)])


@checked(max_examples=5)
@given(config=CONFIGS, shape=SHAPES, layout=LAYOUTS)
def test_exported_layer_is_the_same(config, shape, layout):
    layer = make_layer(config, layout).eval()
    x = make_input(layer, shape, layout)
    assert_same([torch.export.export(layer, (x,)).module()(x)], [layer(x)])


@checked(max_examples=60)
@given(config=CONFIGS, shape=SHAPES, layout=LAYOUTS, dtype=st.sampled_from([torch.float, torch.bfloat16]),
       training=st.booleans())
def test_low_precision_is_no_further_off_than_concatenation(config, shape, layout, dtype, training):
    layer = make_layer(config, layout, dtype).train(training and values_of_a_channel(shape, layout) > 3)
    x = make_input(layer, shape, layout, dtype)

    def run(backend: str, dtype: torch.dtype) -> List[torch.Tensor]:
        twin = copy.deepcopy(layer).to(dtype)
        set_backend(twin, backend)
        y, *grads = step(twin, x.detach().to(dtype).requires_grad_())
        return [y, torch.cat([grad.flatten() for grad in grads])]

    exact, plain, found = run('plain', torch.double), run('plain', dtype), run('gradual', dtype)
    # Both round the same sums in another order: of few values one may by chance come out three times as far off, and
    # within the last places anything.
    allowed = [max(3 * relative(a, b), 4 * torch.finfo(dtype).eps) for a, b in zip(plain, exact)]
    assert all(relative(a, b) <= most for a, b, most in zip(found, exact, allowed))
    if not layer.training:
        with torch.no_grad():
            for way in (layer, reparameterize_model(layer)):
                assert way(x).dtype == dtype and relative(way(x), exact[0]) <= allowed[0]


@st.composite
def networks(draw: Callable[..., Any]) -> Tuple[Dict[str, Any], Tuple[int, int, int]]:
    """Arguments of a tiny network, and batch, height and width of images for it."""
    layout = draw(st.sampled_from(['cifar', 'imagenet']))
    segments = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    strides = [(1 if layout == 'cifar' else 4) * 2 ** i for i in range(len(segments))]
    num_classes = draw(st.integers(0, 4))
    pools = ['avg', 'max', 'avgmax', 'catavgmax', 'fast', 'fastmax', 'fastavgmax', 'fastcatavgmax']
    sides = st.integers(strides[-1], strides[-1] + 5)
    return dict(
        layout=layout,
        segments=tuple(segments),
        channels=tuple(p * draw(st.integers(1, 3)) for p in segments),
        expansion=draw(st.integers(1, 2)),
        num_blocks=draw(st.sampled_from([1, 1, 2])),
        ordered=draw(st.booleans()),
        residual=draw(st.booleans()),
        output_stride=draw(st.sampled_from([None, *strides])),
        in_chans=draw(st.integers(1, 4)),
        num_classes=num_classes,
        # Without pooling there can be no classifier.
        global_pool=draw(st.sampled_from(pools if num_classes else ['', *pools])),
    ), (draw(st.integers(1, 2)), draw(sides), draw(sides))


def create_network(kwargs: Dict[str, Any], **more: Any) -> nn.Module:
    torch.manual_seed(0)
    return randomize(timm.create_model('gunn15', **{**kwargs, **more})).eval()


def network_images(kwargs: Dict[str, Any], shape: Tuple[int, int, int]) -> torch.Tensor:
    batch, *size = shape
    return torch.randn(batch, kwargs['in_chans'], *size, generator=torch.Generator().manual_seed(1))


@checked(max_examples=30)
@given(network=networks(), chance=st.randoms(use_true_random=False))
def test_network_is_its_parts(network, chance):
    """What follows is the same operations on the same values, so equal to the last bit."""
    kwargs, shape = network
    model, x = create_network(kwargs), network_images(*network)
    with torch.inference_mode():
        features = model.forward_features(x)
        assert torch.equal(model(x), model.forward_head(features))
        assert torch.equal(model(x), model.fc(model.forward_head(features, pre_logits=True)))
        last, maps = model.forward_intermediates(x)
        assert torch.equal(last, features) and len(maps) == len(model.feature_info)
        for feature_map, info in zip(maps, model.feature_info):
            # The stem rounds up and the pools round down.
            assert feature_map.shape[:2] == (shape[0], info['num_chs'])
            assert all(n // info['reduction'] <= m <= -(-n // info['reduction'])
                       for n, m in zip(shape[1:], feature_map.shape[2:]))
        indices = sorted(chance.sample(range(len(maps)), chance.randint(1, len(maps))))
        for stop_early in (True, False):
            some = model.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
            assert all(torch.equal(a, maps[i]) for a, i in zip(some, indices)) and len(some) == len(indices)
        backbone = create_network(kwargs, features_only=True, out_indices=indices)
        assert backbone.feature_info.channels() == [maps[i].shape[1] for i in indices]
        backbone.load_state_dict({
            key: value for name, value in model.state_dict().items()
            if (key := name.replace('stem.', 'stem_').replace('stages.', 'stages_')) in backbone.state_dict()})
        assert all(torch.equal(a, maps[i]) for a, i in zip(backbone(x), indices))


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('properties')


@checked(max_examples=20)
@given(network=networks())
def test_network_survives_a_safetensors_file(folder, network):
    kwargs, _ = network
    model, x = create_network(kwargs), network_images(*network)
    file = folder / 'network.safetensors'
    safetensors.torch.save_file(model.state_dict(), file)
    torch.manual_seed(1)
    read = timm.create_model('gunn15', **kwargs, checkpoint_path=str(file)).eval()
    loaded = timm.create_model('gunn15', **kwargs).eval()
    load_checkpoint(loaded, file)
    with torch.inference_mode():
        assert torch.equal(read(x), model(x)) and torch.equal(loaded(x), model(x))


@every_kind
@checked(max_examples=10)
@given(network=networks())
def test_network_is_the_same_in_every_way(network, ordered, residual):
    kwargs, _ = network
    model = create_network(kwargs, ordered=ordered, residual=residual).double()
    x = network_images(*network).double()
    plain = copy.deepcopy(model)
    set_backend(plain, 'plain')
    assert_same(step(model, x.clone().requires_grad_()), step(plain, x.clone().requires_grad_()))
    with torch.inference_mode():
        fused = reparameterize_model(model)
        results = [model(x), fused(x)]
        fused.to(memory_format=torch.channels_last)
        results.append(fused(x.contiguous(memory_format=torch.channels_last)))
        assert_same(results, [plain(x)] * 3)
