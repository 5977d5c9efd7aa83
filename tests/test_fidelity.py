"""Every model equals the literal implementation in reference.py, in float64, to rounding."""
import pytest
import reference
import timm
import torch
from conftest import randomize, relative

TOLERANCE = 1e-10

CIFAR = dict(layout='cifar', segments=(20, 25, 30))
IMAGENET = dict(layout='imagenet', segments=(10, 20, 40, 50))
CONFIGS = {
    'gunn15': CIFAR,
    'gunn24': dict(CIFAR, num_blocks=2),
    'gunn18': IMAGENET,
    'wide_gunn18': dict(IMAGENET, segments=(30, 40, 50, 50)),
    'sunn15': dict(CIFAR, ordered=False),
    'sunn24': dict(CIFAR, num_blocks=2, ordered=False),
    'sunn18': dict(IMAGENET, ordered=False),
    'gunn15_nores': dict(CIFAR, residual=False),
}


@pytest.mark.parametrize('name', [
    'gunn15', 'gunn24', 'gunn18', 'sunn15', 'gunn15_nores',
    *(pytest.param(name, marks=pytest.mark.slow) for name in ('wide_gunn18', 'sunn24', 'sunn18'))])
def test_equals_the_literal_network(name):
    config = CONFIGS[name]
    torch.manual_seed(0)
    model = randomize(timm.create_model(name, num_classes=10)).double()
    size = 8 if config['layout'] == 'cifar' else 64
    x = torch.randn(2, 3, size, size, dtype=torch.double)

    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        expected = reference.forward(tensors, x, config, training=False)
        assert relative(model(x), expected) <= TOLERANCE
    assert relative(model(x), expected) <= TOLERANCE  # with a gradient wanted it is another piece of code

    parameters = dict(model.named_parameters())
    for key in parameters:
        tensors[key].requires_grad_()
    x_model, x_reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(2, 10, dtype=torch.double)
    logits = model.train()(x_model)
    logits.backward(grad)
    expected = reference.forward(tensors, x_reference, config, training=True)
    expected.backward(grad)

    assert relative(logits, expected) <= TOLERANCE
    assert relative(x_model.grad, x_reference.grad) <= TOLERANCE
    largest = max(tensors[key].grad.norm().item() for key in parameters)
    for key, parameter in parameters.items():
        expected = tensors[key].grad
        # A bias that a later norm takes out again has gradient 0, of which there is no share.
        scale = max(expected.norm().item(), 1e-3 * largest)
        assert (parameter.grad - expected).norm().item() <= TOLERANCE * scale, key
    for key, buffer in model.named_buffers():
        assert relative(buffer, tensors[key]) <= TOLERANCE, key
