import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Sequence

import numpy as np
import pytest
from loopback_hub import LoopbackHub
from PIL import Image

# The client reads these when it is imported. No test may reach the real hub, or anybody's cache or token.
_HUB = LoopbackHub()
_HOME = tempfile.TemporaryDirectory()
os.environ.update(
    HF_ENDPOINT=_HUB.url, HF_HUB_DISABLE_XET='1', HF_HOME=_HOME.name, TORCH_HOME=_HOME.name, HF_HUB_OFFLINE='0',
    HF_HUB_DISABLE_TELEMETRY='1')
for _name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_HUB_CACHE'):
    os.environ.pop(_name, None)

import timm  # noqa: E402
import torch  # noqa: E402

import gunn_timm  # noqa: E402, F401

# TorchScript knows operators by their id() and does not keep them. One that PyTorch renews, as it does when a library
# adds to it, leaves its id to any other object: a list of a convolution that has it cannot be scripted.
_operators = []
_register_operator = torch.jit._builtins._register_builtin
torch.jit._builtins._register_builtin = lambda op, name: _operators.append(op) or _register_operator(op, name)

ROOT = Path(__file__).parents[1]
# timm's train.py and validate.py are in its repository and in no release: the tests of them run where there is a clone.
_CHECKOUT = os.environ.get('TIMM_CHECKOUT')
timm_checkout = pytest.mark.skipif(not _CHECKOUT, reason='needs TIMM_CHECKOUT, a clone of pytorch-image-models')

# One of each kind that the entry points are made of, small enough to compile and export in seconds.
TINY: Dict[str, Dict[str, Any]] = {
    'gunn15': dict(channels=(8, 12, 12), segments=(2, 3, 2)),
    'gunn24': dict(channels=(8, 12, 12), segments=(2, 3, 2)),
    'gunn18': dict(channels=(8, 12, 12, 16), segments=(2, 3, 2, 2)),
    'sunn15': dict(channels=(8, 12, 12), segments=(2, 3, 2)),
    'sunn18': dict(channels=(8, 12, 12, 16), segments=(2, 3, 2, 2)),
    'gunn15_nores': dict(channels=(8, 12, 12), segments=(2, 3, 2)),
}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Give the norms weights, biases and statistics that are not the ones they start with."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor, low, high in (
                        (module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
                        (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 1.5)):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model


def create_tiny(name: str, **kwargs: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomize(timm.create_model(name, **{**TINY[name], 'num_classes': 7, **kwargs}))


def save_images(folder: Path, pixels: Iterable[np.ndarray], classes: Sequence[str] = 'ab') -> None:
    """Save images (H, W, 3) of uint8 as folder/CLASS/INDEX.png, of each class in turn."""
    for i, image in enumerate(pixels):
        path = folder / classes[i % len(classes)] / f'{i:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def images(model: torch.nn.Module, batch: int = 2, size: Any = None) -> torch.Tensor:
    size = size or (64 if 'pool' in dict(model.stem.named_children()) else 16)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, model.in_chans, height, width, generator=torch.Generator().manual_seed(2))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Distance of a from b, as a share of b."""
    difference = (a.double() - b.double()).norm().item()
    return difference / b.double().norm().item() if difference else 0.


def assert_same_gradients(model: torch.nn.Module, expected: torch.nn.Module, tolerance: float) -> None:
    pairs = [(name, p.grad, q.grad) for (name, p), q in zip(model.named_parameters(), expected.parameters())]
    # A bias that a later norm takes out again has gradient 0, of which there is no share.
    largest = max(b.norm().item() for _, _, b in pairs)
    for name, a, b in pairs:
        assert (a - b).norm().item() <= tolerance * max(b.norm().item(), 1e-3 * largest), name


@pytest.fixture(params=TINY)
def tiny_name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run() -> Callable[..., 'subprocess.CompletedProcess[str]']:
    """Run Python in a process of its own, from the folder of the project."""
    def run(*args: Any, **kwargs: Any) -> 'subprocess.CompletedProcess[str]':
        env = dict(os.environ, OMP_NUM_THREADS='1', **kwargs.pop('env', {}))
        return subprocess.run(
            [sys.executable, *map(str, args)], capture_output=True, text=True, env=env, timeout=300,
            **{'cwd': ROOT, **kwargs})
    return run


@pytest.fixture(scope='session')
def running_hub() -> LoopbackHub:
    _HUB.start()
    return _HUB


@pytest.fixture
def hub(running_hub: LoopbackHub) -> LoopbackHub:
    """An empty hub; HF_ENDPOINT has its address."""
    running_hub.reset()
    return running_hub


@pytest.fixture
def checkout() -> Path:
    return Path(_CHECKOUT)
