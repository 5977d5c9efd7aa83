"""What holds for every layer and network, on examples that hypothesis makes up."""
import copy
import functools
import itertools
from typing import Any, Dict, List, Tuple

import pytest
import torch
from conftest import randomize, relative
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.utils import reparameterize_model
from torch import nn

from gunn_timm.layers import GunnLayer, set_backend

# The same examples in every run of the same code, kept nowhere, on machines of any speed.
checked = functools.partial(
    settings, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# float64 rounds off 1e-16 of a value. A norm over a few values of a batch may multiply that by up to 316, one over the
# root of its eps, and some hundred operations follow.
EXACT = 1e-11

CONFIGS = st.fixed_dictionaries(dict(
    width=st.integers(1, 3), num_segments=st.integers(1, 4), expansion=st.integers(1, 3),
    num_blocks=st.sampled_from([1, 1, 2, 3]), shortcut=st.booleans(), dilation=st.integers(1, 3)))
# Of few examples hypothesis may make up none with both.
every_kind = pytest.mark.parametrize('ordered, residual', list(itertools.product([True, False], repeat=2)))
# Batch, height, width.
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
LAYOUTS = st.sampled_from(['contiguous', 'channels_last', 'transposed', 'sliced', 'expanded'])


def make_layer(config: Dict[str, Any], layout: str, **more: Any) -> GunnLayer:
    config = {**config, **more}
    torch.manual_seed(0)
    layer = randomize(GunnLayer(config.pop('width') * config['num_segments'], **config)).double()
    return layer.to(memory_format=torch.channels_last) if layout == 'channels_last' else layer


def make_input(layer: GunnLayer, shape: Tuple[int, int, int], layout: str) -> torch.Tensor:
    (batch, height, width), channels = shape, layer.channels
    size, arrange = {
        'contiguous': ((batch, channels, height, width), lambda x: x),
        'channels_last': ((batch, height, width, channels), lambda x: x.permute(0, 3, 1, 2)),
        'transposed': ((batch, channels, width, height), lambda x: x.transpose(2, 3)),
        'sliced': ((2 * batch, channels + 1, height + 1, 2 * width), lambda x: x[::2, 1:, 1:, ::2]),
        'expanded': ((batch, channels, height, 1), lambda x: x.expand(-1, -1, -1, width)),
    }[layout]
    return arrange(torch.randn(size, generator=torch.Generator().manual_seed(1)).double())


def assert_same(found: List[torch.Tensor], expected: List[torch.Tensor]) -> None:
    """Hold tensors to expected ones, within a share of the largest: some gradients are 0 but for rounding."""
    assert [t is None for t in found] == [t is None for t in expected]
    pairs = [(a, b) for a, b in zip(found, expected) if a is not None]
    largest = max((b.norm().item() for _, b in pairs), default=0)
    for a, b in pairs:
        assert (a - b).norm().item() <= EXACT * largest


@every_kind
@checked(max_examples=30)
@given(config=CONFIGS, shape=SHAPES, layout=LAYOUTS, input_grad=st.booleans(), grad_checkpointing=st.booleans(),
       frozen=st.sampled_from([0, 0.1, 0.5, 0.9, 1]), chance=st.randoms(use_true_random=False))
def test_training_equals_concatenation(
        config, shape, layout, input_grad, grad_checkpointing, frozen, chance, ordered, residual):
    """Whatever is frozen, and whichever norms are in training mode."""
    layer = make_layer(config, layout, ordered=ordered, residual=residual)
    batch, height, width = shape
    # PyTorch's norms refuse a single value a channel, and of equal ones leave only rounding errors.
    values = batch * height * (1 if layout == 'expanded' else width)
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(values > 1 and chance.random() < 0.5)
    for p in layer.parameters():
        p.requires_grad_(chance.random() >= frozen)
    plain = copy.deepcopy(layer)
    set_backend(layer, 'gradual')
    set_backend(plain, 'plain')
    layer.grad_checkpointing = grad_checkpointing
    results = []
    for twin in (layer, plain):
        x = make_input(layer, shape, layout).detach().requires_grad_(input_grad)
        before = x.detach().clone()
        y = twin(x)
        assert type(y) is torch.Tensor and torch.equal(x, before)
        assert y.requires_grad is (input_grad or any(p.requires_grad for p in layer.parameters()))
        if y.requires_grad:
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
        results.append(([y.detach()], [x.grad, *(p.grad for p in twin.parameters())]))
    for found, expected in zip(*results):
        assert_same(found, expected)
    for (name, b), c in zip(layer.named_buffers(), plain.buffers()):
        assert relative(b, c) <= EXACT, name


@every_kind
@checked(max_examples=30)
@given(config=CONFIGS, shape=SHAPES, layout=LAYOUTS)
def test_inference_is_the_same_in_every_way(config, shape, layout, ordered, residual):
    layer = make_layer(config, layout, ordered=ordered, residual=residual).eval()
    x = make_input(layer, shape, layout)
    before = x.clone()
    # Pointwise convolutions of what is in channels_last are matrix products.
    last = x.contiguous(memory_format=torch.channels_last)
    fused = reparameterize_model(layer)
    set_backend(layer, 'plain')
    with torch.no_grad():
        expected = layer(x)
        for backend in ('plain', 'gradual'):
            set_backend(layer, backend)
            set_backend(fused, backend)
            assert_same([layer(x), layer(last), fused(x), fused(last)], [expected] * 4)
    assert_same([fused(x.detach().requires_grad_())], [expected])
    assert torch.equal(x, before)
