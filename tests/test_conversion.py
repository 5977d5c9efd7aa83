"""GUNN as a conversion: what it computes, what it leaves as it was, and what it refuses."""
import copy
import importlib.util
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_same_gradients, randomize
from PIL import Image
from timm.layers import BatchNormAct2d, BlurPool2d, DropBlock2d, DropPath, GroupNorm1, SEModule, freeze_batch_norm_2d
from timm.models import FeatureListNet, create_feature_extractor
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import gunn_timm
from gunn_timm.conversion import GradualBottleneck, conversion_report, to_gradual

CHANNELS, GROUPS = 16, 4


def create_block(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return randomize(Bottleneck(CHANNELS, CHANNELS // 4, cardinality=GROUPS, base_width=32, **kwargs)).to(dtype)


def create_network(**kwargs):
    torch.manual_seed(0)
    kwargs = {**dict(
        block=Bottleneck, layers=(2, 2, 1, 1), channels=(16, 4, 4, 4), cardinality=GROUPS, base_width=32,
        num_classes=3), **kwargs}
    return randomize(ResNet(**kwargs))


def inputs(dtype=torch.float64, batch=3, channels=CHANNELS, size=5):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(2), dtype=dtype)


def literal(block, x, num_segments, training):
    """The formula, channel by channel of the hidden layers, from the parameters of timm's own block.

    Returns the output, and the statistics (mean, unbiased variance) of the batch for each norm.
    """
    moments = {1: [], 2: [], 3: []}

    def norm(bn, z, channel, key):
        weight, bias = bn.weight[channel], bn.bias[channel]
        mean, var = bn.running_mean[channel], bn.running_var[channel]
        if training:
            mean, var = z.mean(), z.var(correction=0)
            moments[key].append((mean.detach(), z.var().detach()))
        return weight * (z - mean) / (var + bn.eps).sqrt() + bias

    conv1, conv2, conv3, bn3 = block.conv1, block.conv2, block.conv3, block.bn3
    hidden, inner = conv2.out_channels, conv1.out_channels
    running_mean, running_var = bn3.running_mean.clone(), bn3.running_var.clone()
    state, total = x, torch.zeros_like(x)
    for segment in range(num_segments):
        first = [
            F.relu(norm(block.bn1, torch.einsum('nchw,c->nhw', state, conv1.weight[i, :, 0, 0]), i, 1))
            for i in range(segment * inner // num_segments, (segment + 1) * inner // num_segments)]
        first = torch.stack(first, dim=1)
        out = torch.zeros_like(x)
        for o in range(segment * hidden // num_segments, (segment + 1) * hidden // num_segments):
            # What the group of this channel reads, counted from this segment's first channel.
            group = o // (hidden // GROUPS)
            start = group * (inner // GROUPS) - segment * inner // num_segments
            z = F.conv2d(
                first[:, start:start + inner // GROUPS], conv2.weight[o:o + 1], padding=conv2.padding,
                dilation=conv2.dilation)[:, 0]
            out = out + torch.einsum('nhw,c->nchw', F.relu(norm(block.bn2, z, o, 2)), conv3.weight[:, o, 0, 0])
        total = total + out
        # Each segment adds its own output, and an equal share of the mean and of the bias.
        view = [t.view(1, -1, 1, 1) for t in (bn3.weight, running_mean, running_var, bn3.bias)]
        state = state + view[0] * (out - view[1] / num_segments) / (view[2] + bn3.eps).sqrt() + view[3] / num_segments
    if training:
        total = torch.stack([norm(bn3, total[:, c], c, 3) for c in range(x.shape[1])], dim=1)
        state = x + total
    return F.relu(state), moments


@pytest.mark.parametrize('num_segments', [1, 2, GROUPS])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kwargs', [{}, dict(reduce_first=2, dilation=2)])
def test_is_the_formula(num_segments, training, kwargs):
    block = create_block(**kwargs)
    gradual = to_gradual(copy.deepcopy(block), num_segments).train(training)
    before = copy.deepcopy(block.state_dict())
    x, expected_x = (inputs().requires_grad_() for _ in range(2))
    expected, moments = literal(block, expected_x, num_segments, training)
    y = gradual(x)
    torch.testing.assert_close(y, expected)
    (y * inputs().cos()).sum().backward()
    (expected * inputs().cos()).sum().backward()
    torch.testing.assert_close(x.grad, expected_x.grad)
    # Rounding errors of float64, added up over a few thousand values.
    assert_same_gradients(gradual, block, 1e-10)
    for number, found in moments.items():
        bn = getattr(gradual, f'bn{number}')
        assert bn.num_batches_tracked == int(training)
        for i, name in enumerate(('running_mean', 'running_var')):
            was = before[f'bn{number}.{name}']
            becomes = 0.9 * was + 0.1 * torch.stack([pair[i] for pair in found]) if training else was
            torch.testing.assert_close(getattr(bn, name), becomes)


@pytest.mark.parametrize('training', [True, False])
def test_one_segment_is_timms_own_block(training):
    """So the control, a network trained in the same way without the order, is the network itself."""
    network = create_network(drop_path_rate=0.3).double().train(training)
    gradual = to_gradual(copy.deepcopy(network), num_segments=1)
    assert sum(isinstance(m, GradualBottleneck) for m in gradual.modules()) == 3
    for model in (network, gradual):
        torch.manual_seed(3)  # stochastic depth draws the same
        model(inputs(channels=3, size=40)).square().sum().backward()
    assert_same_gradients(gradual, network, 1e-10)
    torch.testing.assert_close(gradual.state_dict(), network.state_dict())


def test_gradcheck():
    gradual = to_gradual(create_block()).eval()
    parameters = dict(gradual.named_parameters())

    def call(x, *values):
        return torch.func.functional_call(gradual, dict(zip(parameters, values)), (x,))

    x = inputs(batch=1, size=2).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize('num_segments', [None, 1, 2])
def test_parameters_names_and_multiplications_stay(num_segments):
    network = create_network()
    gradual = to_gradual(copy.deepcopy(network), num_segments)
    found = [m.num_segments for m in gradual.modules() if isinstance(m, GradualBottleneck)]
    assert found == [num_segments or GROUPS] * 3
    gradual.load_state_dict(network.state_dict())
    network.load_state_dict(gradual.state_dict())
    shapes = [[(name, p.shape) for name, p in model.named_parameters()] for model in (network, gradual)]
    assert shapes[0] == shapes[1]
    for training in (True, False):
        flops = []
        for model in (network, gradual):
            # Not of backward: there it takes grouped convolutions for dense ones.
            with FlopCounterMode(display=False) as counter:
                model.train(training)(inputs(torch.float32, channels=3, size=40))
            flops.append(counter.get_total_flops())
        assert flops[0] == flops[1]


def test_parameters_are_the_very_same():
    network = create_network()
    before = dict(network.named_parameters())
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    assert gunn_timm.to_gradual(network) is network
    after = dict(network.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    network(inputs(torch.float32, channels=3, size=40)).square().sum().backward()
    weight = network.layer2[1].conv1.weight
    was = weight.clone()
    optimizer.step()
    assert not torch.equal(weight, was)


def test_report_says_what_is_converted_and_why_the_rest_is_not():
    network = create_network()
    report = conversion_report(network)
    assert list(report) == ['layer1.0', 'layer1.1', 'layer2.0', 'layer2.1', 'layer3.0', 'layer4.0']
    assert [name for name, objection in report.items() if objection is None] == ['layer1.0', 'layer1.1', 'layer2.1']
    to_gradual(network)
    assert conversion_report(network) == report
    assert [name for name, m in network.named_modules() if isinstance(m, GradualBottleneck)] == [
        'layer1.0', 'layer1.1', 'layer2.1']


def replaced(name, module):
    block = create_block()
    setattr(block, name, module)
    return block


@pytest.mark.parametrize('create, reason', [
    (lambda: BasicBlock(16, 16), '3x3 convolutions are dense'),
    (lambda: Bottleneck(16, 4), r'3x3 convolution is dense \(groups=1\)'),
    (lambda: create_block(stride=2), 'stride 2: what paths add has another shape'),
    (lambda: create_block(downsample=nn.Conv2d(16, 16, 1)), r'projection \(downsample\)'),
    (lambda: create_block(attn_layer=SEModule), r'attention \(SEModule\) reads the channels of all paths'),
    (lambda: create_block(drop_block=DropBlock2d), r'anti-aliasing or DropBlock .* \(accepted: neither\)'),
    (lambda: create_block(aa_layer=BlurPool2d, first_dilation=2), 'anti-aliasing or DropBlock'),
    (lambda: replaced('conv3', nn.Conv2d(8, 16, 1)), r'not a plain convolution \(accepted: Conv2d without bias'),
    (lambda: create_block(norm_layer=GroupNorm1), 'GroupNorm1 as a norm .accepted: BatchNorm2d, SyncBatchNorm'),
    (lambda: replaced('bn3', BatchNormAct2d(16)), 'BatchNormAct2d as a norm'),
    (lambda: replaced('bn3', nn.BatchNorm2d(16, track_running_stats=False)), 'with weights and running statistics'),
    (lambda: replaced('act2', nn.PReLU(8)), 'PReLU as an activation .accepted: ReLU, '),
    (lambda: type('Other', (Bottleneck,), {})(16, 4, cardinality=4), 'Other is not a Bottleneck of timm'),
    (lambda: nn.Conv2d(3, 3, 1), 'Found: no residual block of timm.models.resnet'),
])
def test_what_does_not_meet_the_assumptions_is_refused(create, reason):
    block = create()
    with pytest.raises(ValueError, match=f'No block of Sequential can be updated gradually.* {reason}'):
        to_gradual(nn.Sequential(block))


def test_error_names_all_blocks_by_reason():
    network = timm.create_model('resnet18', device='meta')
    with pytest.raises(ValueError, match=r'Found: layer1\.0, layer1\.1, .*, layer4\.1: its 3x3 .*bottleneck\)\.$'):
        to_gradual(network)


@pytest.mark.parametrize('num_segments', [0, -1, 3, 8])
def test_segments_must_divide_groups(num_segments):
    network = create_network()
    with pytest.raises(ValueError, match=f'divisor .* got 4 groups and {num_segments} segments'):
        to_gradual(network, num_segments)
    assert not any(isinstance(m, GradualBottleneck) for m in network.modules())


def test_number_of_segments_can_be_changed():
    gradual = to_gradual(to_gradual(create_block(), 2), 4).eval()
    expected = to_gradual(create_block(), 4).eval()
    assert torch.equal(gradual(inputs()), expected(inputs())) and 'num_segments=4' in repr(gradual)


def test_registered_resnext():
    """ResNeXt-50 as timm names it: all but the first block of each stage."""
    network = timm.create_model('resnext50_32x4d', device='meta')
    to_gradual(network)
    assert [name for name, m in network.named_modules() if isinstance(m, GradualBottleneck)] == [
        f'layer{stage + 1}.{i}' for stage, blocks in enumerate((3, 4, 6, 3)) for i in range(1, blocks)]


def test_cumulative_statistics():
    """With momentum None the norms average over batches, by the number of batches seen."""
    block = create_block()
    for bn in (block.bn1, block.bn2, block.bn3):
        bn.momentum = None
    gradual = to_gradual(block)
    single = [copy.deepcopy(gradual) for _ in range(2)]
    for i, network in enumerate(single):
        network(inputs() + i)
        gradual(inputs() + i)
    assert gradual.bn1.num_batches_tracked == gradual.bn2.num_batches_tracked == gradual.bn3.num_batches_tracked == 2
    # The first segment reads the input alone, so its statistics are not those of the others' weights.
    first = slice(0, len(gradual.bn1.running_mean) // GROUPS)
    average = (single[0].bn1.running_mean + single[1].bn1.running_mean) / 2
    torch.testing.assert_close(gradual.bn1.running_mean[first], average[first])


@pytest.mark.parametrize('freeze', [lambda block: block.bn3.eval(), freeze_batch_norm_2d], ids=['eval', 'frozen'])
def test_frozen_norms(freeze):
    gradual = to_gradual(create_block()).train()
    freeze(gradual)
    before = copy.deepcopy(gradual.bn3.state_dict())
    y = gradual(inputs())
    y.sum().backward()
    torch.testing.assert_close(gradual.bn3.state_dict(), before, rtol=0, atol=0)
    assert gradual.conv3.weight.grad.abs().sum() > 0
    if not isinstance(gradual.bn1, nn.BatchNorm2d):
        torch.testing.assert_close(y, to_gradual(create_block()).eval()(inputs()))


def test_synchronized_norms_in_eval_mode():
    gradual = to_gradual(create_block()).eval()
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(gradual))
    assert type(synchronized.bn1) is nn.SyncBatchNorm
    torch.testing.assert_close(synchronized(inputs()), gradual(inputs()))


def test_threads_share_a_network():
    gradual = to_gradual(create_block(torch.float32)).eval()
    x = inputs(torch.float32, size=32)
    with torch.inference_mode():
        expected = gradual(x)

    @torch.inference_mode()
    def call(_):
        return gradual(x)

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(call, range(40)))


@pytest.mark.parametrize('training', [True, False])
def test_modules_that_are_called(training):
    gradual = to_gradual(create_block(), 2).train(training)
    called = []
    for name in ('conv1', 'bn1', 'bn2', 'bn3', 'act1', 'act2', 'act3'):
        getattr(gradual, name).register_forward_hook(lambda module, args, out, name=name: called.append(name))
    gradual(inputs())
    segment = ['bn1', 'act1', 'bn2', 'act2'] if training else ['act1', 'act2']
    assert called == segment * 2 + ['bn3', 'act3']


@pytest.mark.parametrize('name, replace, message', [
    ('conv2', nn.Sequential, 'is not a plain convolution'),
    ('conv1', lambda conv: nn.Conv2d(CHANNELS, 8, 3, padding=1, bias=False), '1x1 and dense before and after'),
    ('conv3', lambda conv: prune.l1_unstructured(conv, 'weight', 0.5), 'has hooks that run before it'),
    ('bn2', lambda bn: nn.GroupNorm(1, bn.num_features), 'GroupNorm as a norm'),
    ('bn3', lambda bn: nn.Identity(), 'Identity as a norm'),
    ('act1', lambda act: nn.Softmax2d(), 'Softmax2d as an activation'),
])
def test_modules_that_may_not_take_their_place(name, replace, message):
    block = create_block()
    gradual = to_gradual(copy.deepcopy(block), 2)
    for changed in (block, gradual):
        setattr(changed, name, replace(getattr(changed, name)))
        assert message in conversion_report(changed)['']
    with pytest.raises(RuntimeError, match=f'applies parts of its modules, which it cannot here: .*{message}'):
        gradual(inputs())


def test_replicas():
    """Those of DataParallel, whose modules have tensors as plain attributes in place of parameters."""
    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicate(child)
        return replica

    gradual = to_gradual(create_block(), 2)
    expected = copy.deepcopy(gradual)
    y, expected_y = replicate(gradual)(inputs()), expected(inputs())
    assert torch.equal(y, expected_y)
    y.sum().backward()
    expected_y.sum().backward()
    assert_same_gradients(gradual, expected, 0)


def test_one_block_with_two_names():
    block = create_block()
    model = to_gradual(nn.ModuleDict(dict(a=nn.Sequential(block), b=nn.Sequential(block))), 2)
    assert model['a'][0] is model['b'][0] and type(model['a'][0]) is GradualBottleneck


def test_init_weights_starts_blocks_as_the_identity():
    network = to_gradual(create_network())
    network.init_weights(zero_init_last=True)
    assert network.layer2[1].bn3.weight.abs().sum() == 0 and network.layer2[1].bn2.weight.abs().sum() > 0
    x = inputs(torch.float32).abs()
    network.layer2[1].bn3.bias.data.zero_()
    torch.testing.assert_close(network.layer2[1].eval()(x), x)


def test_training_modes_and_drop_path_are_kept():
    block = create_block(drop_path=DropPath(0.5)).eval()
    gradual = to_gradual(block)
    assert not any(m.training for m in gradual.modules()) and gradual.drop_path is block.drop_path
    gradual.train()
    torch.manual_seed(0)
    x = inputs(batch=32)
    unchanged = (gradual(x) == F.relu(x)).flatten(1).all(dim=1)
    assert 0 < unchanged.sum() < 32


def test_memory_formats():
    gradual = to_gradual(create_block())
    x = inputs()
    expected = copy.deepcopy(gradual)(x)
    y = gradual.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize('training', [True, False])
def test_autocast(training):
    gradual = to_gradual(create_block(torch.float32)).train(training)
    x = inputs(torch.float32)
    expected = copy.deepcopy(gradual)(x)
    with torch.autocast('cpu', torch.bfloat16):
        y = gradual(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert gradual.conv1.weight.grad.dtype == torch.float32
    # A rounding of bfloat16 is up to 2^-9, and each of the segments adds a few.
    assert (y.float() - expected).norm() < 0.02 * expected.norm()


def test_grad_checkpointing():
    networks = [to_gradual(create_network()) for _ in range(2)]
    networks[1].set_grad_checkpointing()
    original = create_network()
    original.set_grad_checkpointing()
    x = inputs(torch.float32, channels=3, size=40)
    for network in (*networks, original):
        network(x).square().sum().backward()
    # The second call counts the batch once more, as it does without the conversion.
    counts = [network.layer2[1].bn3.num_batches_tracked.item() for network in (*networks, original)]
    assert counts == [1, 2, 2]
    for network in networks:
        network.zero_grad()
        # Of the statistics that segments scale by, the second call sees what the first one left.
        for module in network.modules():
            if isinstance(module, GradualBottleneck):
                module.bn3.eval()
        network.load_state_dict(original.state_dict())
        network(x).square().sum().backward()
    # The same operations, whose gradients of the input may be added up in another order, in float32.
    assert_same_gradients(networks[1], networks[0], 1e-6)


def test_copies_and_files():
    gradual = to_gradual(create_block()).eval()
    file = io.BytesIO()
    torch.save(gradual.state_dict(), file)
    file.seek(0)
    loaded = to_gradual(create_block()).eval()
    nn.init.zeros_(loaded.conv1.weight)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    y = gradual(inputs())
    assert torch.equal(loaded(inputs()), y) and torch.equal(copy.deepcopy(gradual)(inputs()), y)


def test_compiles_in_one_graph():
    gradual = to_gradual(create_block(), 2)
    plain = copy.deepcopy(gradual)
    # As by the default backend but for the generated code, which takes minutes to compile.
    compiled = torch.compile(gradual, fullgraph=True, backend='aot_eager')
    for network in (compiled, plain):
        network(inputs()).square().sum().backward()
    assert_same_gradients(gradual, plain, 1e-10)
    torch.testing.assert_close(gradual.state_dict(), plain.state_dict())


def test_exports():
    gradual = to_gradual(create_block(), 2).eval()
    # The default from PyTorch 2.7; the other one of 2.6 loses the norm's statistics.
    exported = torch.export.export(gradual, (inputs(),), strict=False)
    torch.testing.assert_close(exported.module()(inputs()), gradual(inputs()))


def test_features():
    """Of timm's two ways, one takes the network's modules, the other traces it by FX."""
    network = to_gradual(create_network()).eval()
    x = inputs(torch.float32, channels=3, size=40)
    expected = network.forward_intermediates(x, indices=[2], intermediates_only=True)
    traced = create_feature_extractor(network, {'layer2': 'layer2'})
    assert torch.equal(traced(x)['layer2'], expected[0])
    listed = FeatureListNet(network, out_indices=(2,))
    assert torch.equal(listed(x)[0], expected[0])


def test_experiment(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / 'experiments')
    spec = importlib.util.spec_from_file_location('conversion', ROOT / 'experiments' / 'conversion.py')
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    generator = np.random.default_rng(0)
    for i in range(80):
        path = tmp_path / 'data' / ('train' if i < 70 else 'test') / 'ab'[i % 2] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    arguments = [
        '--data-dir', str(tmp_path / 'data'), '--images', '70', '--test-images', '10', '--img-size', '8',
        '--epochs', '2', '--seeds', '4', '--out', str(tmp_path / 'out')]
    assert experiment.main(arguments) == 0
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results['what'] == (
        '2 epochs of 70 images of CIFAR-10 (.png files) at 8x8, tested on 10; seeds 4; last epoch')
    assert [(run['network'], run['seed']) for run in results['runs']] == [(name, 4) for name in experiment.NETWORKS]
    plain, *ordered = (results['networks'][name] for name in experiment.NETWORKS)
    assert plain['ordered'] == []
    for network in ordered:
        assert network == {**plain, 'ordered': ['layer1.0', 'layer1.1', 'layer2.1', 'layer3.1']}
    # The same weights and batches, and in the first step a residual branch that is nothing yet: the order comes later.
    curves = [run['curve'] for run in results['runs']]
    assert all(len(curve) == 2 for curve in curves)
    # In float32, where the order makes small convolutions of large ones.
    losses = [curve[0]['train_loss'] for curve in curves]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-6)
    table, printed = (tmp_path / 'out' / 'table.md').read_text(), capsys.readouterr().out
    conversion = results['runs'][0]['conversion']
    assert conversion['before'] == curves[0][-1]['test_error']
    assert f"| before | {conversion['before']:.2f} |" in table and table.endswith(printed)
    assert (tmp_path / 'out' / 'curves.png').read_bytes().startswith(b'\x89PNG')
    for more, message in (
            (['--images', '71'], f"'{tmp_path}/data/train' has 70 images, fewer than the 71 asked for."),
            (['--images', '63'],
             'at least 64 training images, and 1 test image, pixel and epoch; got 63, 10, 8 and 2.'),
            (['--data-dir', str(tmp_path)], f"There is no '{tmp_path}/train'.")):
        assert experiment.main([*arguments, *more]) == 2
        assert capsys.readouterr().err.strip().endswith(message)
