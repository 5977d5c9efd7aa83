"""Algorithm 1 and the in-place way equal concatenation, and Algorithm 1 needs less memory."""
import copy
from unittest import mock

import pytest
import timm
import torch
from conftest import randomize, relative
from torch import nn
from torch._dynamo.utils import counters

from gunn_timm.gradual import gradual_update, update_in_place
from gunn_timm.layers import GunnLayer, compile_units, set_backend

VARIANTS = {
    'imagenet': dict(),
    'cifar': dict(shortcut=True),
    'two_blocks': dict(shortcut=True, num_blocks=2),
    'nores': dict(shortcut=True, residual=False),
    'sunn': dict(shortcut=True, ordered=False),
    'sunn_nores': dict(ordered=False, residual=False),
    'drop_path': dict(shortcut=True, drop_path=0.5),
    'one_segment': dict(num_segments=1),
    'dilated': dict(dilation=2),
}
# Without the C++ compiler, so in a fraction of the time; what it changes is rounding.
BACKEND = 'aot_eager_decomp_partition'
FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


def make_layer(variant: str, dtype: torch.dtype = torch.double) -> GunnLayer:
    torch.manual_seed(0)
    return randomize(GunnLayer(**{'channels': 12, 'num_segments': 3, **VARIANTS[variant]})).to(dtype)


def make_input(memory_format: str = 'contiguous', dtype: torch.dtype = torch.double) -> torch.Tensor:
    x = torch.randn(3, 12, 5, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.contiguous(memory_format=FORMATS[memory_format])


def twins(variant: str, dtype: torch.dtype = torch.double):
    """The same layer twice, run by Algorithm 1 and by concatenation."""
    gradual = make_layer(variant, dtype)
    plain = copy.deepcopy(gradual)
    set_backend(gradual, 'gradual')
    set_backend(plain, 'plain')
    return gradual, plain


def assert_same_state(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    expected = b.state_dict()
    for key, value in a.state_dict().items():
        assert relative(value, expected[key]) <= tolerance, key


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('variant', VARIANTS)
def test_equals_concatenation(variant, memory_format):
    gradual, plain = twins(variant)
    x, x_plain = (make_input(memory_format).requires_grad_() for _ in range(2))
    torch.manual_seed(3)
    y = gradual(x)
    torch.manual_seed(3)
    y_plain = plain(x_plain)
    assert type(y) is torch.Tensor
    assert relative(y, y_plain) <= 1e-14
    grad = torch.randn(y.shape, dtype=y.dtype)
    y.backward(grad)
    y_plain.backward(grad)
    assert relative(x.grad, x_plain.grad) <= 1e-13
    for (name, p), q in zip(gradual.named_parameters(), plain.parameters()):
        assert relative(p.grad, q.grad) <= 1e-13, name
        assert p.grad.stride() == p.stride(), name
    assert_same_state(gradual, plain, 1e-14)


@pytest.mark.parametrize('variant', ['cifar', 'nores', 'sunn'])
@pytest.mark.parametrize('strides', ['transposed', 'expanded', 'sliced'])
def test_strides_of_the_input_do_not_matter(strides, variant):
    gradual, plain = twins(variant)
    base = make_input()
    x = {
        'transposed': base.transpose(2, 3), 'expanded': base[:1].expand(3, -1, -1, -1), 'sliced': base[..., ::2],
    }[strides]
    inputs = [x.detach().requires_grad_() for _ in range(2)]
    assert inputs[0].stride() == x.stride()
    for layer, x in zip((gradual, plain), inputs):
        # The gradient comes expanded, as that of a mean does.
        (layer(x).sin().mean(dim=(2, 3)) ** 2).sum().backward()
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-13
    for (name, p), q in zip(gradual.named_parameters(), plain.parameters()):
        assert (p.grad - q.grad).norm() <= 1e-13 * max(q.grad.norm(), 1e-3), name


@pytest.mark.parametrize('variant', VARIANTS)
def test_in_place_equals_concatenation(variant):
    gradual, plain = twins(variant)
    x = make_input()
    before = x.clone()
    set_backend(gradual, 'in_place')
    for training in (True, False):
        with torch.no_grad():
            torch.manual_seed(3)
            y = gradual.train(training)(x)
            torch.manual_seed(3)
            assert relative(y, plain.train(training)(x)) <= 1e-14
    with torch.inference_mode():
        assert relative(gradual(x), plain(x)) <= 1e-14
    assert torch.equal(x, before)
    assert_same_state(gradual, plain, 1e-14)


@pytest.mark.parametrize('steps', [1, 3])
@pytest.mark.parametrize('variant', VARIANTS)
def test_optimiser_steps_equal_concatenation(variant, steps):
    gradual, plain = twins(variant)
    for layer in (gradual, plain):
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
        for _ in range(steps):
            optimizer.zero_grad()
            layer(make_input()).square().mean().backward()
            optimizer.step()
    assert_same_state(gradual, plain, 1e-12)
    assert all(b == steps for n, b in gradual.named_buffers() if n.endswith('num_batches_tracked'))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('variant', VARIANTS)
def test_gradcheck(variant, training):
    layer = make_layer(variant).train(training)
    # Seldom-met kinks of ReLU would spoil finite differences.
    for module in layer.modules():
        if isinstance(module, nn.ReLU):
            module.forward = nn.functional.softplus
    set_backend(layer, 'gradual')
    x = make_input()[:2, :, :3, :2].clone().requires_grad_()

    def function(x, *_):
        torch.manual_seed(4)  # the same samples are dropped in every call
        return layer(x)

    assert torch.autograd.gradcheck(function, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize('input_grad', [True, False])
@pytest.mark.parametrize('frozen', ['units.0', 'units.1', 'units.0 units.1', 'units.2', 'all but bn', 'all'])
def test_frozen_parameters(frozen, input_grad):
    gradual, plain = twins('cifar')
    for layer in (gradual, plain):
        for name, p in layer.named_parameters():
            if frozen == 'all' or (frozen == 'all but bn' and 'bn' not in name) or name[:7] in frozen.split():
                p.requires_grad_(False)
    if frozen == 'all' and not input_grad:
        with pytest.raises(RuntimeError, match="Backend 'gradual' cannot run here: no gradient is wanted"):
            gradual(make_input())
        return
    inputs = [make_input().requires_grad_(input_grad) for _ in range(2)]
    for layer, x in zip((gradual, plain), inputs):
        layer(x).square().sum().backward()
    for (name, p), q in zip(gradual.named_parameters(), plain.parameters()):
        assert (p.grad is None) is (q.grad is None) is (not p.requires_grad), name
        if p.requires_grad:
            assert relative(p.grad, q.grad) <= 1e-13, name
    if input_grad:
        assert relative(inputs[0].grad, inputs[1].grad) <= 1e-13


@pytest.mark.parametrize('dtype', [torch.double, torch.bfloat16])
@pytest.mark.parametrize('variant', VARIANTS)
def test_recomputing_changes_nothing(variant, dtype):
    kept = make_layer(variant, torch.float if dtype == torch.bfloat16 else dtype)
    recomputed = copy.deepcopy(kept)
    recomputed.grad_checkpointing = True
    inputs = [make_input(dtype=kept.units[0].blocks[0].conv1.conv.weight.dtype).requires_grad_() for _ in range(2)]
    for layer, x in zip((kept, recomputed), inputs):
        torch.manual_seed(3)
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(x)
        torch.rand(5)
        y.float().square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for (name, p), q in zip(kept.named_parameters(), recomputed.named_parameters()):
        assert torch.equal(p.grad, q[1].grad), name
    for (name, b), c in zip(kept.named_buffers(), recomputed.buffers()):
        assert torch.equal(b, c), name


def test_recomputing_leaves_the_random_numbers_alone():
    layer = make_layer('drop_path')
    layer.grad_checkpointing = True
    y = layer(make_input())
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    y.sum().backward()
    assert torch.equal(torch.rand(2), expected)


def test_recomputing_writes_to_no_buffer_in_evaluation():
    """Other threads may use the model, and their graphs watch its statistics for writes."""
    layer = make_layer('cifar').eval()
    layer.grad_checkpointing = True
    versions = [buffer._version for buffer in layer.buffers()]
    layer(make_input()).square().sum().backward()
    assert [buffer._version for buffer in layer.buffers()] == versions


def test_recomputing_that_fails_leaves_the_statistics_as_they_were():
    layer = make_layer('cifar')
    layer.grad_checkpointing = True
    loss = layer(make_input()).square().sum()
    buffers = [buffer.clone() for buffer in layer.buffers()]
    bn = layer.units[1].blocks[0].conv3.bn
    bn.forward = mock.Mock(side_effect=RuntimeError('out of memory'))
    with pytest.raises(RuntimeError, match='out of memory'):
        loss.backward()
    assert bn.forward.called and all(map(torch.equal, layer.buffers(), buffers))


def test_autograd_grad_and_accumulation():
    gradual, plain = twins('cifar')
    grads = []
    for layer in (gradual, plain):
        x = make_input().requires_grad_()
        weight = layer.units[1].blocks[0].conv2.conv.weight
        grads.append(torch.autograd.grad(layer(x).square().sum(), [x, weight]))
        for _ in range(2):
            layer(x).square().sum().backward()
    for a, b in zip(*grads):
        assert relative(a, b) <= 1e-13
    for p, q in zip(gradual.parameters(), plain.parameters()):
        assert relative(p.grad, q.grad) <= 1e-13


def test_retain_graph():
    layer, _ = twins('cifar')
    x = make_input().requires_grad_()
    loss = layer(x).square().sum()
    first, = torch.autograd.grad(loss, x, retain_graph=True)
    second, = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('memory_format', FORMATS)
def test_autocast_is_no_further_off_than_concatenation(memory_format, dtype):
    gradual, plain = twins('cifar', torch.float)
    exact = copy.deepcopy(plain).double()
    errors = {}
    x, grad = make_input(memory_format, torch.float), torch.randn(3, 12, 5, 4)
    x_exact = x.double().requires_grad_()
    y_exact = exact(x_exact)
    y_exact.backward(grad.double())
    for name, layer in (('gradual', gradual), ('plain', plain)):
        x_low = x.clone().requires_grad_()
        with torch.autocast('cpu', dtype):
            y = layer(x_low)
        assert y.dtype == dtype
        y.backward(grad.to(dtype))
        pairs = [(y, y_exact), (x_low.grad, x_exact.grad)]
        pairs += [(p.grad, q.grad) for p, q in zip(layer.parameters(), exact.parameters())]
        errors[name] = torch.tensor([relative(a, b) for a, b in pairs])
    # Both are roundings of the same sums, so neither may be much further from the truth than the other.
    assert errors['gradual'].mean() <= 1.5 * errors['plain'].mean()
    assert errors['gradual'].max() <= 2 * errors['plain'].max()


def held_bytes(
        num_segments: int,
        channels: int,
        backend: str,
        grad_checkpointing: bool = False,
        compiled: str = '',
        compiler: str = BACKEND,
        memory_format: str = 'contiguous',
        dtype: torch.dtype = torch.float,
        num_blocks: int = 1,
) -> int:
    """Bytes that a layer's forward leaves allocated, its output among them; a dtype is autocast to."""
    layer = GunnLayer(channels, num_segments, num_blocks=num_blocks, shortcut=True)
    layer = layer.to(memory_format=FORMATS[memory_format])
    layer.grad_checkpointing = grad_checkpointing
    set_backend(layer, backend)
    x = torch.randn(4, channels, 16, 16).contiguous(memory_format=FORMATS[memory_format]).requires_grad_()
    if compiled == 'whole':
        layer = torch.compile(layer, fullgraph=True, backend=compiler)
    elif compiled == 'units':
        compile_units(layer, fullgraph=True, backend=compiler)

    def forward():
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float):
            return layer(x)

    forward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = forward()
    assert y.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.events())


def test_memory_is_flat_in_segments_and_linear_in_channels():
    state = 4 * 4 * 64 * 16 * 16  # bytes of one state of 64 channels
    few, many = (held_bytes(p, 64, 'gradual') for p in (4, 16))
    # The small change is one batch statistic more a unit.
    assert abs(many - few) <= 0.02 * few
    # Concatenation keeps a state a unit.
    assert held_bytes(16, 64, 'plain') - held_bytes(4, 64, 'plain') >= 11 * state
    # The units keep 10 values a channel: 2, 2, 2, 2 and 1 in the block, for K = 2, and 1 in the shortcut.
    assert 10 * state <= few <= 12 * state
    # Recomputed, the units keep nothing but where the random numbers stood.
    random_state = torch.get_rng_state().numel()
    assert held_bytes(16, 64, 'gradual', grad_checkpointing=True) <= state + 16 * random_state
    assert held_bytes(8, 128, 'gradual') == pytest.approx(2 * held_bytes(8, 64, 'gradual'), rel=0.02)


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype, num_blocks', [(torch.float, 2), (torch.bfloat16, 1), (torch.bfloat16, 2)])
def test_memory_is_flat_in_segments_in_every_form(dtype, num_blocks, memory_format):
    kwargs = dict(dtype=dtype, num_blocks=num_blocks, memory_format=memory_format)
    few, many = (held_bytes(p, 64, 'gradual', **kwargs) for p in (4, 16))
    # The small change is batch statistics, and under autocast the copies of the weights.
    assert abs(many - few) <= 0.05 * few
    state = dtype.itemsize * 4 * 64 * 16 * 16
    # Concatenation keeps one a unit, here two in all are kept.
    assert held_bytes(16, 64, 'plain', **kwargs) - many >= 13 * state


@pytest.mark.parametrize('compiled', ['whole', 'units'])
@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='concatenations are kept before PyTorch 2.7')
def test_inductor_takes_no_more_memory(compiled):
    """In channels_last format; it has its own idea of other formats."""
    torch.compiler.reset()
    kwargs = dict(memory_format='channels_last')
    eager = held_bytes(8, 64, 'gradual', **kwargs)
    assert held_bytes(8, 64, 'auto', compiled=compiled, compiler='inductor', **kwargs) <= 1.15 * eager


@pytest.mark.parametrize('variant', VARIANTS)
def test_compiled_training_is_the_same(variant):
    torch.compiler.reset()
    compiled, plain = twins(variant)
    set_backend(compiled, 'auto')
    step = torch.compile(compiled, fullgraph=True, backend=BACKEND)
    inputs = [make_input().requires_grad_() for _ in range(2)]
    grad = torch.randn_like(inputs[0])
    for _ in range(2):
        for layer, x in zip((step, plain), inputs):
            layer(x).backward(grad)
    # Decomposed, some operations round otherwise.
    if variant != 'drop_path':  # whose random numbers, compiled, are others
        assert relative(inputs[0].grad, inputs[1].grad) <= 1e-12
        for (name, p), q in zip(compiled.named_parameters(), plain.parameters()):
            assert (p.grad - q.grad).norm() <= 1e-11 * max(q.grad.norm(), x.grad.norm()), name
        for (name, b), c in zip(compiled.named_buffers(), plain.buffers()):
            torch.testing.assert_close(b, c, rtol=1e-12, atol=1e-12, msg=name)
    assert all(bn.num_batches_tracked == 2 for bn in compiled.modules() if isinstance(bn, nn.BatchNorm2d))


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='concatenations are kept before PyTorch 2.7')
def test_compiled_training_takes_no_more_memory():
    for segments in (4, 16):
        eager = held_bytes(segments, 64, 'gradual')
        torch.compiler.reset()
        assert held_bytes(segments, 64, 'auto', compiled='whole') <= 1.15 * eager


def test_compiled_units_take_no_more_memory():
    for segments in (4, 16):
        eager = held_bytes(segments, 64, 'gradual')
        torch.compiler.reset()
        assert held_bytes(segments, 64, 'gradual', compiled='units') <= 1.15 * eager


@pytest.mark.parametrize('variant, grad_checkpointing', [
    ('imagenet', False), ('two_blocks', False), ('sunn', False), ('cifar', True), ('nores', True), ('sunn_nores', True),
])
def test_compiled_units_are_the_same(variant, grad_checkpointing):
    torch.compiler.reset()
    layer, plain = twins(variant)
    layer.grad_checkpointing = grad_checkpointing
    compile_units(layer, fullgraph=True, backend=BACKEND)
    grad = torch.randn_like(make_input())
    for _ in range(2):
        x, x_plain = (make_input().requires_grad_() for _ in range(2))
        y, y_plain = layer(x), plain(x_plain)
        y.backward(grad)
        y_plain.backward(grad)
        # Decomposed, some operations round otherwise.
        assert relative(y, y_plain) <= 1e-12 and relative(x.grad, x_plain.grad) <= 1e-12
    for p, q in zip(layer.parameters(), plain.parameters()):
        assert (p.grad - q.grad).norm() <= 1e-11 * max(q.grad.norm(), x.grad.norm())
    assert_same_state(layer, plain, 1e-12)
    with torch.no_grad():
        set_backend(layer, 'in_place')
        assert relative(layer.eval()(x), plain.eval()(x)) <= 1e-12


def test_units_of_a_layer_are_compiled_once():
    torch.compiler.reset()
    counters.clear()
    layer = GunnLayer(16, 8)
    compile_units(layer, fullgraph=True, backend=BACKEND)
    layer(torch.randn(2, 16, 4, 4, requires_grad=True)).sum().backward()
    assert counters['stats']['unique_graphs'] == 1


def test_all_kinds_of_units_are_compiled():
    """However many there are: past its limit PyTorch would run the rest uncompiled, and only log that."""
    torch.compiler.reset()
    counters.clear()
    layers = nn.Sequential(*[GunnLayer(channels, 2) for channels in range(4, 24, 2)], GunnLayer(24, 4, drop_path=[
        0.1, 0.2, 0.3, 0.4]))
    compile_units(layers, backend=BACKEND)
    for layer in layers:
        for size in (4, 5, 6):
            x = torch.randn(2, layer.channels, size, size)
            for training in (True, False):
                layer.train(training)(x)
                with torch.no_grad():
                    layer(x)
    assert not counters['graph_break'] and counters['frames']['total'] == counters['frames']['ok']
    with pytest.raises(ValueError, match='Conv2d has no update units to compile.'):
        compile_units(nn.Conv2d(1, 1, 1))


def test_units_that_end_in_a_function():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    class Unit(nn.Conv2d):
        def forward(self, x):
            return Double.apply(super().forward(x))

    units = [Unit(4, 2, 1, bias=False).double() for _ in range(2)]
    x = torch.randn(2, 4, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gradual_update(x, units), x)


def test_gradient_hooks_of_parameters_run_once():
    layer, plain = twins('cifar')
    set_backend(layer, 'auto')
    for twin in (layer, plain):
        twin.units[0].blocks[0].conv1.conv.weight.register_hook(lambda grad: 2 * grad)
        twin(make_input()).square().sum().backward()
    for p, q in zip(layer.parameters(), plain.parameters()):
        assert relative(p.grad, q.grad) <= 1e-13


def test_errors_instead_of_wrong_gradients():
    layer, _ = twins('cifar')
    x = make_input().requires_grad_()
    grad, = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()
    loss = layer(x).square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match='second time'):
        loss.backward()
    y = layer(x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()
    x = make_input().requires_grad_()
    y = layer(x)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        y.sum().backward()


def test_functional_call():
    gradual, plain = twins('cifar')
    set_backend(gradual, 'auto')
    grads = []
    for layer in (gradual, plain):
        lent = {n: (2 * p.detach()).requires_grad_() for n, p in layer.named_parameters()}
        torch.func.functional_call(layer, lent, (make_input(),)).square().sum().backward()
        assert all(p.grad is None for p in layer.parameters())
        grads.append([p.grad for p in lent.values()])
    assert all(relative(a, b) <= 1e-13 for a, b in zip(*grads))


def test_parameters_frozen_between_forward_and_backward():
    layer, _ = twins('cifar')
    loss = layer(make_input()).square().sum()
    layer.units[1].requires_grad_(False)
    loss.backward()
    assert all((p.grad is None) is n.startswith('units.1') for n, p in layer.named_parameters())


def test_recomputing_needs_the_mode_of_forward():
    layer, _ = twins('cifar')
    layer.grad_checkpointing = True
    loss = layer.eval()(make_input()).sum()
    layer.train()
    with pytest.raises(RuntimeError, match='their mode and parameters must be what they were in forward'):
        loss.backward()
    loss = layer(make_input()).sum()
    layer.units[1].blocks[0].conv1.bn.eval()
    with pytest.raises(RuntimeError, match='their mode and parameters must be what they were in forward'):
        loss.backward()


def test_transforms_and_replicas_run_plain():
    layer = make_layer('cifar').eval()
    x = make_input()
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    grads = torch.func.grad(loss)(parameters, x)
    layer(x).square().sum().backward()
    assert all(relative(grads[n], p.grad) <= 1e-13 for n, p in parameters.items())
    with torch.no_grad():
        each = torch.func.vmap(lambda image: layer(image[None])[0])(x)
        assert relative(each, layer(x)) <= 1e-13
    replica = layer._replicate_for_data_parallel()
    assert replica._choose_backend(x) == 'plain'


def test_hooks_may_keep_what_they_see():
    gradual, plain = twins('cifar')
    set_backend(gradual, 'auto')
    seen = []
    for layer in (gradual, plain):
        kept = []
        for unit in layer.units:
            unit.register_forward_hook(lambda module, args, out, kept=kept: kept.append(args[0]))
        layer(make_input())
        seen.append(kept)
    assert all(torch.equal(a, b) for a, b in zip(*seen)) and len(seen[0]) == 3


@pytest.mark.parametrize('where', ['', 'blocks.0', 'blocks.0.conv1', 'blocks.0.conv1.conv', 'shortcut'])
def test_backward_hooks_see_the_gradients(where):
    gradual, plain = twins('cifar')
    set_backend(gradual, 'auto')
    inputs = [make_input().requires_grad_() for _ in range(2)]
    seen = []
    for layer, x in zip((gradual, plain), inputs):
        grads = []
        for unit in layer.units:
            unit.get_submodule(where).register_full_backward_hook(
                lambda module, grad_in, grad_out, grads=grads: grads.append((grad_in[0].clone(), grad_out[0].clone())))
        layer(x).square().sum().backward()
        seen.append(grads)
    assert len(seen[0]) == len(seen[1]) == 3
    for a, b in zip(*seen):
        assert relative(a[0], b[0]) <= 1e-13 and relative(a[1], b[1]) <= 1e-13
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-13


def test_global_hooks_may_keep_what_they_see():
    layer, _ = twins('cifar')
    set_backend(layer, 'auto')
    kept = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: kept.append((args[0], args[0].clone())))
    try:
        layer(make_input())
    finally:
        handle.remove()
    assert kept and all(torch.equal(a, b) for a, b in kept)


@pytest.mark.parametrize('variant', VARIANTS)
def test_training_of_folded_units(variant):
    """Convolutions with a bias are differentiated by autograd, not by the layer."""
    gradual, plain = (timm.utils.reparameterize_model(layer).requires_grad_() for layer in twins(variant))
    inputs = [make_input().requires_grad_() for _ in range(2)]
    for layer, x in zip((gradual, plain), inputs):
        torch.manual_seed(3)
        layer(x).square().sum().backward()
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-13
    for p, q in zip(gradual.parameters(), plain.parameters()):
        assert relative(p.grad, q.grad) <= 1e-13


def test_recomputing_within_autocast():
    """There backward finds the casts that forward made of the weights without gradients."""
    layer, _ = twins('cifar', torch.float)
    again = copy.deepcopy(layer)
    again.grad_checkpointing = True
    for twin in (layer, again):
        with torch.autocast('cpu', torch.bfloat16):
            twin(make_input(dtype=torch.float).requires_grad_()).square().sum().backward()
    for (name, p), q in zip(again.named_parameters(), layer.parameters()):
        assert p.grad is not None and relative(p.grad, q.grad) <= 1e-2, name


def test_saved_tensors_in_another_layout():
    gradual, plain = twins('cifar')
    inputs = [make_input('channels_last').requires_grad_() for _ in range(2)]
    for layer in (gradual, plain):
        for unit in layer.units:  # with a bias a convolution is differentiated by autograd
            unit.shortcut.conv.bias = nn.Parameter(torch.ones(4, dtype=torch.double))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        losses = [layer(x).square().sum() for layer, x in zip((gradual, plain), inputs)]
    for loss in losses:
        loss.backward()
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-13


def test_float_state_under_autocast():
    layer = make_layer('cifar', torch.float)
    inputs = [make_input(dtype=torch.float).requires_grad_() for _ in range(3)]
    with torch.autocast('cpu', torch.bfloat16):
        outs = [gradual_update(inputs[0], layer.units), layer(inputs[1])]
    outs.append(layer(inputs[2]))
    assert [y.dtype for y in outs] == [torch.float, torch.bfloat16, torch.float]
    for y in outs:
        y.float().square().sum().backward()
    # The layer casts its state under autocast; without that the gradient may not be worse.
    errors = [relative(x.grad, inputs[2].grad) for x in inputs]
    assert errors[0] <= 1.5 * errors[1]


class Scale(nn.Module):
    """A unit that is no convolution: it reads the state in another way."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.double))

    def forward(self, x):
        return (x[:, :4].sin() + x[:, 4:8] * x.mean(dim=1, keepdim=True)) * self.weight


def test_any_unit():
    units = nn.ModuleList([Scale() for _ in range(3)])
    x = make_input().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gradual_update(x, units), x)
    with torch.no_grad():
        assert torch.equal(update_in_place(x, units), gradual_update(x, units))


@pytest.mark.parametrize('residual', [True, False])
def test_unit_without_gradient(residual):
    class Detached(Scale):
        def forward(self, x):
            return super().forward(x).detach()

    units = [Scale(), Detached(), Scale()]
    x, x_plain = (make_input().requires_grad_() for _ in range(2))
    gradual_update(x, units, residual).square().sum().backward()
    segments = list(x_plain.chunk(3, dim=1))
    for i, unit in enumerate(units):
        segments[i] = unit(torch.cat(segments, dim=1)) + (segments[i] if residual else 0)
    torch.cat(segments, dim=1).square().sum().backward()
    assert relative(x.grad, x_plain.grad) <= 1e-14


class Wrong(nn.Module):

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize('update', [gradual_update, update_in_place])
def test_bad_units(update):
    x = make_input()
    good = Scale()
    with pytest.raises(ValueError, match=r'segment 1 returned shape \(3, 5, 5, 4\).* \(3, 4, 5, 4\)'):
        update(x, [good, Wrong(lambda x: x[:, :5]), good])
    with pytest.raises(ValueError, match='12 channels cannot be cut into 5 segments'):
        update(x, [good] * 5)

    def change(x):
        x.detach().add_(1)
        return x[:, :4] * 1.

    with pytest.raises(ValueError, match='segment 2 changed its input in place'):
        update(x, [good, good, Wrong(change)])
    with pytest.raises(ValueError, match='segment 1 changed its input in place'):
        update(x, [good, Wrong(lambda x: x.relu_()[:, :4] * 1.), good])
