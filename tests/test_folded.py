"""Folded convolutions and units are what they were with their norms, and CPUs run them packed."""
import copy
import io
import pickle
from typing import Any, Callable, List, Optional

import pytest
import timm
import torch
from conftest import create_tiny, images, relative
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gunn_timm import layers
from gunn_timm.folded import FoldedConv2d, FoldedUnit
from gunn_timm.layers import ConvNormAct, UpdateUnit, compile_units

# Float64, with the same operations in another order.
EXACT = 1e-11
# Of the type's precision: what another order of some hundred additions makes of it.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
PACKED = 'mkldnn::_convolution_pointwise'
needs_mkldnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='PyTorch without oneDNN')


def count_packed(call: Callable[..., torch.Tensor], *args: Any) -> int:
    """How many packed convolutions a call runs."""
    with torch.profiler.profile() as profile:
        call(*args)
    return sum(event.count for event in profile.key_averages() if event.key == PACKED)


def folded_conv(**kwargs) -> FoldedConv2d:
    torch.manual_seed(0)
    module = ConvNormAct(8, 16, 3, **kwargs)
    nn.init.uniform_(module.bn.running_mean)
    module.eval().requires_grad_(False).reparameterize()
    return module.conv


def input_of(conv: FoldedConv2d, seed: int = 1) -> torch.Tensor:
    x = torch.randn(2, conv.in_channels, 5, 7, generator=torch.Generator().manual_seed(seed))
    return x.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)


def unpacked(conv: FoldedConv2d, x: torch.Tensor) -> torch.Tensor:
    out = torch.conv2d(x.double(), conv.weight.double(), conv.bias.double(), conv.stride, conv.padding, conv.dilation)
    return out.relu() if conv.relu else out


def assert_right(conv: FoldedConv2d, packed: Optional[bool] = None) -> None:
    x = input_of(conv)
    with torch.no_grad():
        assert relative(conv(x), unpacked(conv, x)) <= ROUNDING[x.dtype]
        if packed is not None:
            assert count_packed(conv, x) == packed


@needs_mkldnn
@pytest.mark.parametrize('dtype', ROUNDING)
@pytest.mark.parametrize('kwargs', [{}, dict(act=False), dict(stride=2), dict(dilation=2)])
def test_packed_convolution_is_the_same(kwargs, dtype):
    conv = folded_conv(**kwargs).to(dtype)
    assert_right(conv, packed=dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    x = input_of(conv)[:1, :, :3, :3].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        # The weight was packed for another size.
        assert relative(conv(x), unpacked(conv, x)) <= ROUNDING[dtype]
        assert conv(x).is_contiguous(memory_format=torch.channels_last)


CHANGES = {
    'in place': lambda conv: conv.weight.mul_(2),
    'loaded': lambda conv: conv.load_state_dict({k: v + 1 for k, v in conv.state_dict().items()}),
    'assigned': lambda conv: conv.load_state_dict({k: v + 1 for k, v in conv.state_dict().items()}, assign=True),
    'replaced': lambda conv: setattr(conv, 'weight', nn.Parameter(conv.weight + 1)),
    'bias replaced': lambda conv: setattr(conv, 'bias', nn.Parameter(conv.bias + 1)),
    'bias in place': lambda conv: conv.bias.data.add_(1),
    'data swapped': lambda conv: setattr(conv.weight, 'data', conv.weight + 1),
    'there and back': lambda conv: conv.bfloat16().float(),
    'format': lambda conv: conv.to(memory_format=torch.channels_last),
    'stride': lambda conv: setattr(conv, 'stride', (2, 2)),
    'dilation': lambda conv: vars(conv).update(dilation=(2, 2), padding=(2, 2)),
    'activation': lambda conv: setattr(conv, 'relu', False),
}


@pytest.mark.parametrize('change', CHANGES)
def test_changed_weight_is_packed_again(change):
    conv = folded_conv()
    assert_right(conv)
    with torch.no_grad():
        CHANGES[change](conv)
    assert_right(conv)


@pytest.mark.parametrize('copied', [
    copy.deepcopy,
    lambda conv: pickle.loads(pickle.dumps(conv)),
    lambda conv: torch.load(save(conv), weights_only=False),
])
def test_copies_have_weights_of_their_own(copied):
    conv = folded_conv()
    assert_right(conv)
    other = copied(conv)
    with torch.no_grad():
        other.weight.mul_(2)
    assert_right(other)
    assert_right(conv)
    assert conv.state_dict().keys() == {'weight', 'bias'}


def save(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_weight_made_in_inference_mode_is_not_packed():
    """Writes to it are not counted, so that it may change unseen."""
    with torch.inference_mode():
        conv = folded_conv()
        assert_right(conv, packed=False)
        conv.weight.mul_(2)
        assert_right(conv)


@needs_mkldnn
def test_packed_only_where_it_can_be():
    conv = folded_conv()
    x = input_of(conv)
    expected = unpacked(conv, x)
    with torch.no_grad():
        assert count_packed(conv, x) == 1
        others = [
            torch.jit.script(conv), torch.jit.trace(conv, x), torch.fx.symbolic_trace(conv),
            torch.export.export(conv, (x,)).module(), lambda x: conv(x.contiguous()),
            lambda x: torch.vmap(conv)(x[None])[0],
        ]
        for other in others:
            assert relative(other(x), expected) <= ROUNDING[torch.float32]
            assert count_packed(other, x) == 0
        weights = {name: 2 * tensor for name, tensor in conv.state_dict().items()}
        assert count_packed(torch.func.functional_call, conv, weights, x) == 0
        with torch.backends.mkldnn.flags(enabled=False):
            assert count_packed(conv, x) == 0
        with torch.autocast('cpu', torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            conv(x)
        assert counter.get_total_flops() == 2 * conv.weight.numel() * x[:, 0].numel()
        with pytest.raises(RuntimeError, match='(?i)type'):
            conv(x.bfloat16())
    x.requires_grad_()
    conv(x).sum().backward()
    assert x.grad.abs().sum() > 0


def count_calls(monkeypatch: pytest.MonkeyPatch) -> List[torch.Tensor]:
    calls: List[torch.Tensor] = []
    update = layers.update_folded
    monkeypatch.setattr(layers, 'update_folded', lambda *args: calls.append(update(*args)) or calls[-1])
    return calls


@pytest.mark.parametrize('name', ['gunn15', 'gunn18', 'sunn15', 'sunn18'])
def test_folded_layers_are_the_same(name, monkeypatch):
    torch.compiler.reset()
    model = create_tiny(name, drop_path_rate=0.5).double().eval().to(memory_format=torch.channels_last)
    x = images(model).double().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
    folded = timm.utils.reparameterize_model(model)
    assert not any(isinstance(m, (nn.BatchNorm2d, UpdateUnit)) for m in folded.modules())
    calls = count_calls(monkeypatch)
    with torch.inference_mode():
        assert relative(folded(x), expected) <= EXACT
        assert len(calls) == len(folded.stages)
        # Where it cannot be done that way it is done the other, with the same result.
        calls.clear()
        contiguous = copy.deepcopy(folded).to(memory_format=torch.contiguous_format)
        assert relative(contiguous(x.contiguous()), expected) <= EXACT
        assert relative(torch.compile(folded, fullgraph=True, backend='eager')(x), expected) <= EXACT
        with torch.autocast('cpu', torch.bfloat16):
            copy.deepcopy(folded).float()(x.float())
        assert calls == []
        handle = folded.stages[0].layer.units[0].conv2.register_forward_hook(lambda *args: None)
        assert relative(folded(x), expected) <= EXACT
        handle.remove()
        assert len(calls) == len(folded.stages) - 1
        calls.clear()
        folded.train()(x)
        # Dropping a path is the units' own work.
        assert calls == []
    assert relative(folded.eval()(x), expected) <= EXACT


@needs_mkldnn
@pytest.mark.parametrize('name', ['gunn15', 'gunn18', 'sunn15'])
def test_folded_network_runs_packed(name):
    model = create_tiny(name).eval()
    x = images(model)
    folded = timm.utils.reparameterize_model(model).to(memory_format=torch.channels_last)
    convs = sum(isinstance(module, FoldedConv2d) for module in folded.modules())
    units = sum(isinstance(module, FoldedUnit) for module in folded.modules())
    with torch.inference_mode():
        x = x.contiguous(memory_format=torch.channels_last)
        assert relative(folded(x), model(x)) <= 1e-5
        # The last of a unit is a matrix product that adds to the segment.
        assert count_packed(folded, x) == convs - units


@pytest.mark.parametrize('kwargs', [
    dict(act_layer=nn.Identity), dict(act_layer=nn.SiLU), dict(num_blocks=2), dict(norm_layer=nn.InstanceNorm2d),
])
def test_other_units_stay_units(kwargs):
    torch.manual_seed(0)
    layer = layers.GunnLayer(8, 2, shortcut=True, **kwargs).double().eval()
    x = torch.randn(2, 8, 5, 5).double().contiguous(memory_format=torch.channels_last)
    folded = timm.utils.reparameterize_model(layer)
    assert all(isinstance(unit, UpdateUnit) for unit in folded.units)
    with torch.inference_mode():
        assert relative(folded(x), layer(x)) <= EXACT


@needs_mkldnn
def test_other_paddings_are_not_packed():
    module = ConvNormAct(8, 16, 3).eval().requires_grad_(False)
    module.conv = nn.Conv2d(8, 16, 3, padding=1, padding_mode='reflect', bias=False)
    x = input_of(module.conv)
    with torch.no_grad():
        expected = module(x)
        module.reparameterize()
        assert relative(module(x), expected) <= ROUNDING[torch.float32]
        assert isinstance(module.conv, FoldedConv2d) and count_packed(module, x) == 0


def test_what_is_put_into_a_folded_unit_is_called():
    class Doubled(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return 2 * self.conv(x)

    torch.manual_seed(0)
    layer = timm.utils.reparameterize_model(layers.GunnLayer(8, 2, shortcut=True).double().eval())
    layer.units[1].shortcut = Doubled(layer.units[1].shortcut)
    x = torch.randn(2, 8, 5, 5).double().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert relative(layer(x), layer._forward_plain(x)) <= EXACT


def test_units_with_a_last_activation_stay_units():
    torch.manual_seed(0)
    layer = layers.GunnLayer(8, 2).double().eval()
    layer.units[0].blocks[0].conv3.act = nn.ReLU()
    x = torch.randn(2, 8, 5, 5).double().contiguous(memory_format=torch.channels_last)
    folded = timm.utils.reparameterize_model(layer)
    assert [type(unit) for unit in folded.units] == [UpdateUnit, FoldedUnit]
    with torch.inference_mode():
        assert relative(folded(x), layer(x)) <= EXACT


def test_hooks_outlast_folding():
    layer = layers.GunnLayer(8, 2).eval()
    seen = []
    layer.units[0].register_forward_hook(lambda *args: seen.append(args))
    with torch.inference_mode():
        timm.utils.reparameterize_model(layer, inplace=True)(torch.randn(1, 8, 5, 5))
    assert len(seen) == 1


def test_other_convolutions_keep_their_norm():
    """What a subclass computes is its own affair."""
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    module = ConvNormAct(4, 4).eval()
    module.conv = Standardized(4, 4, 1, bias=False)
    x = torch.randn(2, 4, 3, 3)
    expected = module(x)
    module.reparameterize()
    assert isinstance(module.bn, nn.BatchNorm2d) and torch.equal(module(x), expected)


def test_folded_units_can_be_compiled():
    torch.compiler.reset()
    model = create_tiny('gunn15').double().eval().to(memory_format=torch.channels_last)
    x = images(model).double().contiguous(memory_format=torch.channels_last)
    folded = timm.utils.reparameterize_model(model)
    compile_units(folded, backend='eager', fullgraph=True)
    with torch.inference_mode():
        assert relative(folded(x), model(x)) <= EXACT
