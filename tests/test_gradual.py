"""Algorithm 1 equals concatenation, hides nothing from autograd, and needs less memory."""
import contextlib
import copy
import pickle
import re
from typing import Any, Callable, Dict, Set, Tuple
from unittest import mock

import pytest
import timm
import torch
from conftest import randomize, relative
from torch import nn
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.autograd.graph import register_multi_grad_hook, save_on_cpu, saved_tensors_hooks
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapper
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from gunn_timm.layers import GunnBottleneck, GunnConv, GunnLayer, UpdateUnit, compile_units, set_backend

VARIANTS = {
    'imagenet': dict(),
    'cifar': dict(shortcut=True),
    'many_segments': dict(shortcut=True, num_segments=6),
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
    layer = randomize(GunnLayer(**{'channels': 12, 'num_segments': 3, **VARIANTS[variant]})).to(dtype)
    layer.block_size = 2  # several blocks, the last one of another size
    return layer


def make_input(memory_format: str = 'contiguous', dtype: torch.dtype = torch.double) -> torch.Tensor:
    x = torch.randn(3, 12, 5, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.contiguous(memory_format=FORMATS[memory_format])


def twins(variant: str, dtype: torch.dtype = torch.double) -> Tuple[GunnLayer, GunnLayer]:
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


def assert_same_grads(a: nn.Module, b: nn.Module, tolerance: float = 1e-12) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        assert (p.grad is None) is (q.grad is None), name
        # One that is zero but for rounding has no share of its own.
        assert p.grad is None or (p.grad - q.grad).norm() <= tolerance * max(q.grad.norm(), 1e-3), name


def assert_same_training(
        a: nn.Module,
        b: nn.Module,
        tolerance: float = 1e-12,
        loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda layer, x: layer(x).square().sum(),
) -> None:
    """Differentiate by input and parameters, and compare."""
    inputs = [make_input().requires_grad_() for _ in range(2)]
    for layer, x in zip((a, b), inputs):
        torch.manual_seed(3)
        loss(layer, x).backward()
    assert relative(inputs[0].grad, inputs[1].grad) <= tolerance
    assert_same_grads(a, b, tolerance)


def reason(layer: GunnLayer, x: torch.Tensor) -> str:
    """Why the layer runs by concatenation."""
    return layer._choose(x)[0]


def graph(node: Any) -> Set[Any]:
    """A node of a graph and all that are before it."""
    return {node}.union(*(graph(previous) for previous, _ in node.next_functions if previous is not None))


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('variant', VARIANTS)
def test_equals_concatenation(variant, memory_format):
    gradual, plain = (layer.to(memory_format=FORMATS[memory_format]) for layer in twins(variant))
    inputs = [make_input(memory_format).requires_grad_() for _ in range(2)]
    for training, context in (
            (True, torch.enable_grad), (True, torch.no_grad), (False, torch.no_grad), (False, torch.inference_mode)):
        outs = []
        for layer, x in zip((gradual, plain), inputs):
            torch.manual_seed(3)
            with context():
                outs.append(layer.train(training)(x))
            if context is torch.enable_grad:
                outs[-1].backward(torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(4)))
        assert type(outs[0]) is torch.Tensor and outs[0].stride() == x.stride() and relative(*outs) <= 1e-14
    assert all(torch.equal(x, make_input()) for x in inputs)
    assert relative(inputs[0].grad, inputs[1].grad) <= 1e-13
    assert_same_grads(gradual, plain, 1e-13)
    assert all(p.grad.stride() == p.stride() for p in gradual.parameters())
    assert_same_state(gradual, plain, 1e-14)


@pytest.mark.parametrize('block_size', [1, 4, 10])
def test_block_size_changes_nothing(block_size):
    layer, plain = twins('many_segments')
    layer.block_size = block_size
    assert_same_training(layer, plain)


@pytest.mark.parametrize('input_grad', [True, False])
@pytest.mark.parametrize('frozen', [r'units\.[01]', r'units\.2', r'\.conv\.', r'(conv1|shortcut)\.conv\.', ''])
def test_frozen_parameters(frozen, input_grad):
    gradual, plain = twins('cifar')
    inputs = [make_input().requires_grad_(input_grad) for _ in range(2)]
    for layer, x in zip((gradual, plain), inputs):
        for name, p in layer.named_parameters():
            p.requires_grad_(not re.search(frozen, name))
        y = layer(x)
        assert y.requires_grad is (input_grad or frozen != '')
        if y.requires_grad:
            nodes = graph(y.grad_fn)
            y.square().sum().backward()
            # Whatever backward needed is freed.
            assert not any(hasattr(node.shared, 'state') for node in nodes if hasattr(node, 'shared'))
    assert_same_grads(gradual, plain)
    assert not input_grad or relative(inputs[0].grad, inputs[1].grad) <= 1e-13


def test_gradients_of_some():
    """The engine then leaves out the functions that these do not depend on."""
    grads = []
    for layer in twins('many_segments'):
        x = make_input().requires_grad_()
        some = [layer.units[1].blocks[0].conv2.conv.weight, layer.units[4].shortcut.conv.weight]
        loss = layer(x).square().sum()
        for wanted in (some[:1], some[1:], [x]):
            grads.append(torch.autograd.grad(loss, wanted, retain_graph=True)[0])
        loss.backward(inputs=some)
        grads += [p.grad for p in some]
        assert x.grad is None
    assert all(relative(a, b) <= 1e-13 for a, b in zip(grads[:5], grads[5:], strict=True))


def test_shared_weights_two_calls_in_one_loss_and_backward_twice():
    gradual, plain = twins('many_segments')
    for layer in (gradual, plain):
        for unit in layer.units[1:]:
            unit.blocks[0].conv1.conv.weight = layer.units[0].blocks[0].conv1.conv.weight
        loss = (layer(layer(make_input())) * layer(2 * make_input())).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_grads(gradual, plain)


class Scaled(nn.Module):
    """An activation that a tensor from outside conditions, and that keeps a loss and its input."""

    def __init__(self, gamma=None):
        super().__init__()
        self.gamma = torch.ones(3, 8, dtype=torch.double) if gamma is None else gamma

    def forward(self, x):
        self.kept = x
        self.penalty = x.abs().mean()
        return torch.relu(x * self.gamma[:, :, None, None])


@pytest.mark.parametrize('grad_checkpointing', [False, True])
@pytest.mark.parametrize('variant', ['cifar', 'nores', 'sunn'])
def test_tensors_that_enter_and_leave_beside_the_input(variant, grad_checkpointing):
    grads = []
    for layer in twins(variant):
        layer.grad_checkpointing = grad_checkpointing
        gamma = torch.full((3, 8), 0.5, dtype=torch.double, requires_grad=True)
        for unit in layer.units:
            unit.blocks[0].conv2.act = Scaled(gamma * 2)
        loss = layer(make_input()).square().sum()
        activations = [unit.blocks[0].conv2.act for unit in layer.units]
        (loss + sum(act.penalty for act in activations)).backward()
        grads.append([gamma.grad, *(p.grad for p in layer.parameters()), *(act.kept for act in activations)])
    assert all((a - b).norm() <= 1e-12 * max(b.norm(), 1e-3) for a, b in zip(*grads))


@pytest.mark.parametrize('before', [
    lambda loss, layer: None, lambda loss, layer: loss.backward(retain_graph=True),
    lambda loss, layer: torch.autograd.grad(loss, layer.units[-1].blocks[0].conv3.conv.weight, retain_graph=True)])
def test_a_loss_inside_of_a_unit_alone_is_refused(before):
    """Whether backward was at the layer's output never, as a whole, or in part."""
    layer, _ = twins('cifar')
    act = layer.units[1].blocks[0].conv2.act = Scaled()
    before(layer(make_input()).square().sum(), layer)
    with pytest.raises(RuntimeError, match=r"from a layer's output.*set_backend\(model, 'plain'\)"):
        act.penalty.backward()


def test_a_unit_that_cuts_the_graph_behind_a_loss():
    """What it read is then to be differentiated, and none of the updates before."""
    gradual, plain = twins('cifar')
    for layer in (gradual, plain):
        act = layer.units[0].blocks[0].conv2.act = Scaled()
        layer.units[0].drop_path.forward = lambda out: out.detach()
        loss = layer(make_input().detach()).square().sum()
        (loss + act.penalty).backward()
    for a, b in zip(gradual.parameters(), plain.parameters()):
        # What the cut leaves without a gradient has one of zeros here.
        zeros = torch.zeros_like(a)
        assert relative(zeros if a.grad is None else a.grad, zeros if b.grad is None else b.grad) <= 1e-12


@pytest.mark.parametrize('kind', ['as made', 'transposed', 'functional_call'])
def test_computed_weights(kind):
    """As a hypernetwork or weight standardisation sets them; with the backend 'gradual' concatenation is an error."""
    grads = []
    for layer in twins('cifar'):
        sources = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
        computed = {name: source * 2 for name, source in sources.items()}
        if kind == 'functional_call':
            y = torch.func.functional_call(layer, computed, (make_input(),))
        else:
            for name, module in layer.named_modules():
                if isinstance(module, nn.Conv2d):
                    weight = computed[f'{name}.weight']
                    del module.weight
                    module.weight = weight if kind == 'as made' else weight.transpose(0, 1).contiguous().transpose(0, 1)
            y = layer(make_input())
        y.square().sum().backward()
        grads.append([source.grad for source in sources.values() if source.grad is not None])
    assert grads[0] and all(relative(a, b) <= 1e-12 for a, b in zip(*grads, strict=True))


def test_second_part_without_gradient():
    class Detached(nn.Module):
        def forward(self, x):
            return x.detach()

    gradual, plain = twins('many_segments')
    for layer in (gradual, plain):
        layer.units[1].drop_path = Detached()
        layer(make_input()).square().sum().backward()
    # Concatenation gives no gradient to what the detached unit read with, Algorithm 1 gives zeros.
    for p, q in zip(gradual.parameters(), plain.parameters()):
        assert q.grad is not None or p.grad is None or not p.grad.any()
        assert q.grad is None or relative(p.grad, q.grad) <= 1e-12


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


# What changes or watches a unit so that it is more than its known parts: to do it, and what the reason names.
def _replace_forward(module: nn.Module) -> None:
    module.forward = lambda *args, _forward=module.forward: 2 * _forward(*args)


class Adapter(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv, self.scale = conv, nn.Parameter(torch.full((1,), 2., dtype=torch.double))

    def forward(self, x):
        return self.conv(x) * self.scale


class Unit(UpdateUnit):
    def forward(self, x):
        return 2 * super().forward(x)


READERS = ['', 'blocks.0', 'blocks.0.conv1', 'blocks.0.conv1.conv', 'shortcut', 'shortcut.conv']
CHANGES: Dict[str, Callable[[nn.Module], Any]] = {
    'forward': _replace_forward,
    'forward hook': lambda module: module.register_forward_hook(lambda module, args, out: 2 * out),
    'forward pre-hook': lambda module: module.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    'backward hook': lambda module: module.register_full_backward_hook(lambda module, grads, _: (2 * grads[0],)),
    'backward pre-hook': lambda module: module.register_full_backward_pre_hook(lambda module, grads: (2 * grads[0],)),
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('reader', READERS)
def test_changed_units_run_by_concatenation(reader, change):
    layer, plain = twins('cifar')
    for twin in (layer, plain):
        CHANGES[change](twin.units[1].get_submodule(reader))
    with pytest.raises(RuntimeError, match="'gradual' cannot run here: unit 1 .* forward of their own. Use 'plain'"):
        layer(make_input())
    set_backend(layer, 'auto')
    assert_same_training(layer, plain, tolerance=0)
    with torch.no_grad():
        assert torch.equal(layer(make_input()), plain(make_input()))


@pytest.mark.parametrize('change', [
    lambda unit: prune.l1_unstructured(unit.blocks[0].conv1.conv, 'weight', 0.5),
    lambda unit: parametrizations.weight_norm(unit.blocks[0].conv1.conv),
    lambda unit: setattr(unit.shortcut, 'conv', Adapter(unit.shortcut.conv)),
    lambda unit: setattr(unit.blocks[0].conv1, 'conv', nn.Conv2d(12, 8, 3, padding=1, dtype=torch.double)),
    lambda unit: setattr(unit.blocks[0].conv1, 'conv', nn.Conv2d(12, 8, 1, groups=4, dtype=torch.double)),
    lambda unit: setattr(unit, '__class__', Unit),
], ids=['prune', 'parametrization', 'adapter', '3x3', 'groups', 'class'])
def test_other_readers_run_by_concatenation(change):
    layer, plain = twins('cifar')
    set_backend(layer, 'auto')
    for twin in (layer, plain):
        torch.manual_seed(0)
        change(twin.units[2])
    assert reason(layer, make_input()).startswith('unit 2 ')
    with parametrize.cached():
        assert_same_training(layer, plain, tolerance=0)


@pytest.mark.parametrize('kind', [UpdateUnit, GunnBottleneck, GunnConv])
def test_modules_wrapped_for_checkpointing(kind):
    layer, plain = twins('cifar')
    set_backend(layer, 'auto')
    wrapper.apply_activation_checkpointing(
        layer, checkpoint_wrapper_fn=wrapper.checkpoint_wrapper, check_fn=lambda module: isinstance(module, kind))
    assert_same_training(layer, plain)


def test_what_comes_behind_may_be_anything():
    """Hooks and replaced modules of the second part see what they see in any network, by Algorithm 1."""
    seen = []
    for layer in twins('cifar'):
        kept = []
        for unit in layer.units:
            unit.blocks[0].conv3 = nn.Sequential(unit.blocks[0].conv3)
            for module in (unit.blocks[0].conv2, unit.blocks[0].conv2.conv, unit.blocks[0].conv3):
                module.register_forward_hook(lambda module, args, out, kept=kept: kept.append(args[0]))
                module.register_full_backward_hook(lambda module, grads, _, kept=kept: kept.append(grads[0]))
        layer(make_input()).square().sum().backward()
        seen.append(kept)
    assert len(seen[0]) == len(seen[1]) == 18
    assert all((a - b).norm() <= 1e-12 * max(b.norm(), 1e-3) for a, b in zip(*seen))


@pytest.mark.parametrize('register', [
    lambda p: p.register_hook(lambda grad: 2 * grad),
    lambda p: p.register_post_accumulate_grad_hook(lambda p: setattr(p, 'grad', 2 * p.grad)),
], ids=['hook', 'post_accumulate_grad_hook'])
@pytest.mark.parametrize('when', ['before', 'after'])
def test_hooks_of_parameters_run_once(when, register):
    gradual, plain = twins('cifar')
    for layer in (gradual, plain):
        early = layer(make_input()).square().sum()
        for p in layer.parameters():
            register(p)
        (early if when == 'after' else layer(make_input()).square().sum()).backward()
    assert_same_grads(gradual, plain)


def test_multi_grad_hooks_and_anomaly_mode():
    layer, _ = twins('cifar')
    calls = []
    loss = layer(make_input()).square().sum()
    register_multi_grad_hook(list(layer.parameters()), calls.append)
    loss.backward()
    assert len(calls) == 1 and len(calls[0]) == len(list(layer.parameters()))
    with pytest.warns(UserWarning, match='Anomaly'), torch.autograd.detect_anomaly():
        layer(make_input()).square().sum().backward()


@contextlib.contextmanager
def _global_hook():
    with nn.modules.module.register_module_forward_hook(lambda module, args, out: None):
        yield


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('surroundings, expected', [
    (_global_hook, 'TorchFunctionMode'), (_Mode, 'TorchFunctionMode'), (lambda: torch.device('cpu'), ''),
    (forward_ad.dual_level, 'forward-mode'), (contextlib.nullcontext, ''),
], ids=['global hook', 'mode', 'default device', 'dual level', 'nothing'])
def test_surroundings_that_concatenation_is_for(surroundings, expected):
    layer, plain = twins('cifar')
    set_backend(layer, 'auto')
    with surroundings():
        assert expected in reason(layer, make_input()) and bool(expected) is bool(reason(layer, make_input()))
        assert relative(layer(make_input()), plain(make_input())) <= (0 if expected else 1e-14)


def test_transforms():
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
        tangent = torch.ones_like(x)
        _, along = torch.func.jvp(layer, (x,), (tangent,))
        with forward_ad.dual_level():
            dual = layer(forward_ad.make_dual(x, tangent))
            assert relative(forward_ad.unpack_dual(dual).tangent, along) <= 1e-13
    assert relative(torch.fx.symbolic_trace(layer)(x), layer(x)) <= 1e-14


@pytest.mark.parametrize('linear', [True, False])
def test_second_derivatives_are_refused(linear):
    """By both ways to ask for them, and also where the gradient of the output is a constant."""
    layer, plain = (twin.eval().requires_grad_(False) for twin in twins('cifar'))
    x = make_input().requires_grad_()

    def loss(layer):
        y = layer(x)
        return y.sum() if linear else y.square().sum()

    for differentiate in (
            lambda: torch.autograd.grad(loss(layer), x, create_graph=True),
            lambda: loss(layer).backward(create_graph=True)):
        with pytest.raises(RuntimeError, match=r"create_graph=True.*set_backend\(model, 'plain'\)"):
            differentiate()
    grad, = torch.autograd.grad(loss(plain), x, create_graph=True)
    assert linear or torch.autograd.grad(grad.square().sum(), x)[0].any()


def test_batched_gradients_are_refused():
    x = make_input().requires_grad_()
    y, grads = twins('cifar')[0](x), torch.ones(2, *x.shape, dtype=x.dtype)
    for differentiate in (
            lambda: torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True),
            lambda: torch.func.vmap(lambda grad: torch.autograd.grad(y, x, grad)[0])(grads)):
        with pytest.raises(RuntimeError, match=r"is_grads_batched=True.*set_backend\(model, 'plain'\)"):
            differentiate()


def test_what_backward_needs_may_not_be_changed():
    layer, _ = twins('cifar')
    # In the layer's own format, for else its output is a copy.
    x = make_input('channels_last')
    unit = layer.units[1]
    convs = (unit.blocks[0].conv1, unit.blocks[0].conv2, unit.blocks[0].conv3, unit.shortcut)
    for changed in (None, x, *(part.conv.weight for part in convs)):
        y = layer(x)
        with torch.no_grad():
            (y if changed is None else changed).mul_(2)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            y.sum().backward()
    y = layer(x).sum()
    y.backward()
    with pytest.raises(RuntimeError, match='second time'):
        y.backward()


@pytest.mark.parametrize('variant', VARIANTS)
def test_training_of_fused_units(variant):
    assert_same_training(*(timm.utils.reparameterize_model(layer).requires_grad_() for layer in twins(variant)))


@pytest.mark.parametrize('variant', ['cifar', 'sunn'])
def test_partly_fused_units(variant):
    """A norm with a hook is left as it is, so that some convolutions have a bias and others have none."""
    layer = make_layer(variant).eval()
    kept = []
    layer.units[0].blocks[0].conv1.bn.register_forward_hook(lambda module, args, out: kept.append(out))
    fused = timm.utils.reparameterize_model(layer)
    convs = [unit.blocks[0].conv1.conv for unit in fused.units]
    assert convs[0].bias is None and convs[1].bias is not None and not reason(fused, make_input())
    assert relative(fused(make_input()), layer(make_input())) <= 1e-13 and kept


# Activation checkpointing and saved tensors.


@pytest.mark.parametrize('dtype', [torch.double, torch.bfloat16])
@pytest.mark.parametrize('variant', VARIANTS)
def test_checkpointing_changes_nothing(variant, dtype):
    kept = make_layer(variant, torch.float if dtype == torch.bfloat16 else dtype)
    recomputed = copy.deepcopy(kept)
    recomputed.grad_checkpointing = True
    inputs = [make_input(dtype=kept.units[0].blocks[0].conv1.conv.weight.dtype).requires_grad_() for _ in range(2)]
    for layer, x in zip((kept, recomputed), inputs):
        torch.manual_seed(3)
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(x)
        random = torch.manual_seed(4).get_state()
        y.float().square().sum().backward()
        assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert_same_grads(kept, recomputed, 0)
    assert_same_state(kept, recomputed, 0)


def test_checkpointing_writes_to_no_buffer_in_evaluation():
    """Other threads may use the model, and their graphs watch its statistics for writes."""
    layer = make_layer('cifar').eval()
    layer.grad_checkpointing = True
    versions = [buffer._version for buffer in layer.buffers()]
    layer(make_input()).square().sum().backward()
    assert [buffer._version for buffer in layer.buffers()] == versions


def test_checkpointing_that_fails_leaves_the_statistics_as_they_were():
    layer = make_layer('cifar')
    layer.grad_checkpointing = True
    loss = layer(make_input()).square().sum()
    buffers = [buffer.clone() for buffer in layer.buffers()]
    bn = layer.units[1].blocks[0].conv3.bn
    bn.forward = mock.Mock(side_effect=RuntimeError('out of memory'))
    with pytest.raises(RuntimeError, match='out of memory'):
        loss.backward()
    assert bn.forward.called and all(map(torch.equal, layer.buffers(), buffers))


def checkpointed(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(layer, x, use_reentrant=False)


def within(context: Callable[[], Any]) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    def call(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with context():
            return layer(x)
    return call


@pytest.mark.parametrize('around', [
    checkpointed, within(save_on_cpu), within(lambda: saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t)),
    within(lambda: saved_tensors_hooks(lambda t: pickle.dumps(t.detach()), pickle.loads)),
], ids=['checkpoint', 'save_on_cpu', 'another format', 'pickled'])
def test_saved_tensors_are_the_users(around):
    assert_same_training(*twins('many_segments'), loss=lambda layer, x: around(layer, x).square().sum())


def held_bytes(
        num_segments: int,
        channels: int,
        backend: str = 'gradual',
        grad_checkpointing: bool = False,
        memory_format: str = 'channels_last',
        around: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda layer, x: layer(x),
        compiled: str = '',
) -> int:
    """Bytes that a layer's forward leaves allocated, its output among them."""
    layer = GunnLayer(channels, num_segments, shortcut=True).to(memory_format=FORMATS[memory_format])
    layer.grad_checkpointing = grad_checkpointing
    set_backend(layer, backend)
    x = torch.randn(4, channels, 16, 16).contiguous(memory_format=FORMATS[memory_format]).requires_grad_()
    if compiled == 'whole':
        layer = torch.compile(layer, fullgraph=True)
    elif compiled == 'units':
        compile_units(layer, fullgraph=True)
    around(layer, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = around(layer, x)
    assert y.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.events())


def test_memory_in_states():
    state = 4 * 4 * 64 * 16 * 16
    # It is flat in segments but for batch statistics; concatenation keeps a state a unit.
    few, many = (held_bytes(p, 64) for p in (4, 16))
    assert abs(many - few) <= 0.05 * few and held_bytes(16, 64, 'plain') - many >= 13 * state
    # The units keep 10 values a channel: 2, 2, 2, 2 and 1 in the block, for K = 2, and 1 in the shortcut.
    assert 10 * state <= many <= 12 * state
    # In the other format the layer computes in channels_last, and its output is a copy.
    assert held_bytes(16, 64, memory_format='contiguous') <= 13 * state
    # Checkpointed, they keep what they read, 3 values a channel, and where the random numbers stood.
    assert held_bytes(16, 64, grad_checkpointing=True) <= 5 * state + 16 * torch.get_rng_state().numel()
    # Checkpointed as a whole, the layer keeps its output; moved elsewhere, what is saved is gone.
    gone = within(lambda: saved_tensors_hooks(
        lambda t: (t.shape, t.dtype), lambda saved: torch.zeros(saved[0], dtype=saved[1])))
    for around in (checkpointed, gone):
        assert held_bytes(16, 64, around=around) <= 1.1 * state


@pytest.mark.parametrize('memory_format', FORMATS)
def test_no_weight_gradient_for_each_image(memory_format):
    """The gradients of 25 units' weights, one for each of 16 images, would be many times what backward needs else."""
    layer = GunnLayer(400, 25).to(memory_format=FORMATS[memory_format])
    loss = layer(torch.randn(16, 400, 3, 3).contiguous(memory_format=FORMATS[memory_format])).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss.backward()
    weights = sum(unit.blocks[0].conv1.conv.weight.nbytes for unit in layer.units)
    assert max(event.cpu_memory_usage for event in profiler.events()) <= weights


# Compiling.


@pytest.mark.slow
@pytest.mark.parametrize('compiled', ['whole', 'units'])
@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='concatenations are kept before PyTorch 2.7')
def test_inductor_takes_no_more_memory(compiled):
    torch.compiler.reset()
    assert held_bytes(8, 64, 'auto', compiled=compiled) <= 1.15 * held_bytes(8, 64)


@pytest.mark.parametrize('compiled, variant, grad_checkpointing', [
    ('units', 'cifar', True),
    *(pytest.param('whole', variant, False, marks=pytest.mark.slow) for variant in ('cifar', 'nores', 'sunn')),
    *(pytest.param('units', variant, False, marks=pytest.mark.slow) for variant in ('imagenet', 'two_blocks', 'sunn')),
    *(pytest.param('units', variant, True, marks=pytest.mark.slow) for variant in ('nores', 'sunn_nores')),
])
def test_compiled_training_is_the_same(compiled, variant, grad_checkpointing):
    torch.compiler.reset()
    layer, plain = twins(variant)
    layer.grad_checkpointing = grad_checkpointing
    step = layer
    if compiled == 'units':
        compile_units(layer, fullgraph=True, backend=BACKEND)
    else:
        set_backend(layer, 'auto')
        step = torch.compile(layer, fullgraph=True, backend=BACKEND)
    grad = torch.randn_like(make_input())
    for _ in range(2):
        x, x_plain = (make_input().requires_grad_() for _ in range(2))
        y, y_plain = step(x), plain(x_plain)
        y.backward(grad)
        y_plain.backward(grad)
        # Decomposed, some operations round otherwise.
        assert relative(y, y_plain) <= 1e-12 and relative(x.grad, x_plain.grad) <= 1e-12
    for p, q in zip(layer.parameters(), plain.parameters()):
        assert (p.grad - q.grad).norm() <= 1e-11 * max(q.grad.norm(), x.grad.norm())
    assert_same_state(layer, plain, 1e-12)
    with torch.no_grad():
        assert relative(step.eval()(x), plain.eval()(x)) <= 1e-12
    if compiled == 'units':
        assert relative(pickle.loads(pickle.dumps(layer))(x), plain(x)) <= 1e-12


@pytest.mark.slow
def test_all_kinds_of_units_are_compiled():
    """However many there are: past its limit PyTorch would run the rest uncompiled, and only log that."""
    torch.compiler.reset()
    counters.clear()
    layers = nn.Sequential(GunnLayer(4, 2), GunnLayer(6, 3, drop_path=[0.1, 0.2, 0.3]))
    compile_units(layers, backend=BACKEND)
    for layer in layers:
        for size in (4, 5):
            x = torch.randn(2, layer.channels, size, size)
            for training in (True, False):
                layer.train(training)(x)
                with torch.no_grad():
                    layer(x)
    assert not counters['graph_break'] and counters['frames']['total'] == counters['frames']['ok']
    # One graph for all units of a shape: 4 kinds, 2 sizes, 2 modes, with and without gradients.
    assert counters['stats']['unique_graphs'] == 32
