"""What layers refuse, sizes and strides that are seldom met, and threads."""
import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import List

import pytest
import torch
from conftest import create_tiny
from torch import nn

from gunn_timm.layers import GunnLayer, compile_units, set_backend


@pytest.mark.parametrize('make, message', [
    (lambda: GunnLayer(12, 5), 'divisor .* got 12 channels and 5 segments'),
    (lambda: GunnLayer(0, 1), 'divisor .* got 0 channels and 1 segments'),
    (lambda: GunnLayer(12, 3, drop_path=[0.1, 0.2]), r'for each of 3 segments; got \[0.1, 0.2\]'),
    (lambda: set_backend(GunnLayer(12, 3), 'fast'), "one of auto, plain, gradual; got 'fast'"),
    (lambda: compile_units(nn.Conv2d(1, 1, 1)), 'Conv2d has no update units to compile.'),
])
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_forced_backend_says_why_it_cannot_run():
    layer, unordered = GunnLayer(12, 3), GunnLayer(12, 3, ordered=False)
    x = torch.randn(2, 12, 4, 4)
    for model in (layer, unordered):
        set_backend(model, 'gradual')
    with pytest.raises(RuntimeError, match="'gradual' cannot run here: the layer is being traced"):
        torch.jit.trace(layer, x)
    # Evaluation and the unordered baseline run as they can.
    with torch.no_grad():
        torch.jit.trace(layer, x)
    torch.jit.trace(unordered, x)


@pytest.mark.parametrize('shape', [(0, 12, 4, 4), (2, 12, 1, 1)])
def test_degenerate_sizes(shape):
    layer = GunnLayer(12, 3, shortcut=True).eval()
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize('arrange', [
    lambda x: x.transpose(2, 3), lambda x: x[::2, :, 1:, ::2], lambda x: x[..., :1].expand(-1, -1, -1, 4),
], ids=['transposed', 'sliced', 'expanded'])
def test_inputs_of_any_strides(arrange):
    layer = GunnLayer(12, 3, shortcut=True).double()
    plain = copy.deepcopy(layer)
    set_backend(layer, 'gradual')
    set_backend(plain, 'plain')
    sources = [torch.randn(4, 12, 5, 6, generator=torch.Generator().manual_seed(1)).double() for _ in range(2)]
    for twin, source in zip((layer, plain), sources):
        twin(arrange(source.requires_grad_())).square().sum().backward()
    torch.testing.assert_close(sources[0].grad, sources[1].grad, rtol=1e-10, atol=1e-10)  # rounding of float64


def test_drop_path_without_residual_is_left_out():
    assert isinstance(GunnLayer(12, 3, drop_path=0.5, residual=False).units[0].drop_path, nn.Identity)
    assert GunnLayer(12, 3, drop_path=[0.1, 0.2, 0.3]).units[1].drop_path.drop_prob == 0.2


@pytest.mark.parametrize('grad_checkpointing', [True, False])
def test_threads_are_as_good_as_one(grad_checkpointing):
    """To the last bit: they do the same operations on the same values."""
    model = create_tiny('gunn15', channels=(4, 4), segments=(2, 2)).eval()
    model.set_grad_checkpointing(grad_checkpointing)
    inputs = [torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]

    def infer() -> List[torch.Tensor]:
        with torch.inference_mode():
            return [model(x) for x in inputs]

    def differentiate() -> List[torch.Tensor]:
        xs = [x.clone().requires_grad_() for x in inputs]
        return [torch.autograd.grad(model(x).square().sum(), x)[0] for x in xs]

    jobs = [infer, differentiate, infer, differentiate]
    interval = sys.getswitchinterval()
    # Change between threads as often as Python can.
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(jobs)) as pool:
            results = list(pool.map(lambda job: job(), jobs))
    finally:
        sys.setswitchinterval(interval)
    for found, job in zip(results, jobs):
        assert all(torch.equal(a, b) for a, b in zip(found, job()))
