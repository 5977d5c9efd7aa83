"""What only a GPU can show: Algorithm 1 with CUDA's kernels, streams and graphs. `make test-gpu` runs it."""
from typing import Any, Callable, Dict

import pytest
import torch
import torch.distributed as dist
from conftest import assert_same_gradients, create_tiny, images, relative
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gunn_timm.layers import compile_units, set_backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]
DEVICE = 'cuda'
FORMATS = [torch.contiguous_format, torch.channels_last]


def create(name: str, backend: str, dtype=torch.double, memory_format=torch.channels_last, **kwargs: Any) -> nn.Module:
    model = create_tiny(name, **kwargs).to(DEVICE, dtype, memory_format=memory_format).train()
    set_backend(model, backend)
    return model


def batch(model: nn.Module, memory_format=torch.channels_last) -> torch.Tensor:
    return images(model, 8).to(next(model.parameters())).contiguous(memory_format=memory_format)


def step(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Forward and backward, always with the same random numbers."""
    torch.manual_seed(0)
    model.zero_grad()
    logits = model(x)
    logits.square().mean().backward()
    return logits.detach()


def assert_same(model: nn.Module, expected: nn.Module, tolerance: float = 1e-10) -> None:
    """Compare gradients and statistics."""
    assert_same_gradients(model, expected, tolerance)
    for (key, a), b in zip(model.named_buffers(), expected.buffers()):
        assert relative(a, b) <= tolerance, key


def run_on_side_stream(function: Callable[[], Any]) -> None:
    """Three times, which is also what a graph needs before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize('memory_format', FORMATS)
def test_equals_concatenation(tiny_name, memory_format):
    gradual, plain = (create(tiny_name, b, memory_format=memory_format) for b in ('gradual', 'plain'))
    x = batch(gradual, memory_format)
    assert relative(step(gradual, x), step(plain, x)) <= 1e-10
    assert_same(gradual, plain)
    with torch.no_grad():
        assert relative(gradual.eval()(x), plain.eval()(x)) <= 1e-10


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('memory_format', FORMATS)
def test_amp_is_no_further_off_than_concatenation(memory_format, dtype):
    """All gradients together: both are roundings of the same sums."""
    exact, errors = create('gunn15', 'plain'), {}
    step(exact, batch(exact))
    for backend in ('gradual', 'plain'):
        model = create('gunn15', backend, torch.float, memory_format)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024., enabled=dtype == torch.float16)
        with torch.autocast(DEVICE, dtype):
            logits = model(batch(model, memory_format))
        scaler.scale(logits.float().square().mean()).backward()
        scaler.unscale_(torch.optim.SGD(model.parameters()))
        errors[backend] = relative(*(torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, exact)))
    assert errors['gradual'] <= 1.2 * errors['plain'] <= 1.2


@pytest.mark.parametrize('drop_path_rate', [0., 0.3])
@pytest.mark.parametrize('name', ['gunn15', 'gunn18', 'sunn15'])
def test_checkpointing_changes_nothing(name, drop_path_rate):
    kept, recomputed = (create(name, 'gradual', drop_path_rate=drop_path_rate) for _ in range(2))
    recomputed.set_grad_checkpointing()
    assert relative(*(step(model, batch(model)) for model in (recomputed, kept))) <= 1e-10
    assert_same(recomputed, kept)


def test_side_stream():
    side, main = (create('gunn15', 'gradual') for _ in range(2))
    x = batch(side)
    run_on_side_stream(lambda: step(side, x))
    for _ in range(3):
        step(main, x)
    assert_same(side, main)


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('drop_path_rate', [0., 0.3])
def test_graph_of_a_training_step(drop_path_rate, amp):
    """Its replays, each with other images and random numbers, do what eager steps do."""
    def train(captured: bool) -> Dict[str, torch.Tensor]:
        model = create('gunn15', 'gradual', torch.float if amp else torch.double, drop_path_rate=drop_path_rate)
        x, optimizer = batch(model), torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True)

        def update() -> None:
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=amp):
                logits = model(x)
            logits.square().mean().backward()
            optimizer.step()

        torch.manual_seed(0)
        run_on_side_stream(update)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                update()
        for seed in range(1, 4):
            torch.manual_seed(seed)
            x.copy_(x.roll(1, 3))
            graph.replay() if captured else update()
        return model.state_dict()

    found, expected = train(True), train(False)
    assert all(relative(found[key], expected[key]) <= (2e-2 if amp else 1e-10) for key in found)


def test_synced_norms(tmp_path):
    """SyncBatchNorm and DDP over NCCL, in one process."""
    plain, model = (create('gunn15', backend) for backend in ('plain', 'gradual'))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    dist.init_process_group('nccl', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    try:
        x = batch(plain)
        assert relative(step(DistributedDataParallel(model, device_ids=[0]), x), step(plain, x)) <= 1e-10
        assert_same(model, plain)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize('compile_it', [nn.Module.compile, compile_units])
def test_compiled(compile_it, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    torch.compiler.reset()
    exact, model = create('gunn15', 'plain'), create('gunn15', 'auto', torch.float)
    compile_it(model, fullgraph=True)
    assert relative(step(model, batch(model)), step(exact, batch(exact))) <= 1e-4
    assert_same(model, exact.float(), 1e-3)
