"""How it is measured: step times in interleaved rounds, peak memory by the allocator, multiplications by counting."""
import statistics
import time
from functools import lru_cache
from typing import Any, Callable, Dict, List, Tuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from gunn_timm.layers import GunnLayer, compile_units

__all__ = [
    'MODES', 'STEPS_PER_TIMING', 'Workload', 'gmacs', 'kernel_launches', 'peak_memory', 'peak_rates', 'profile',
    'step_times', 'summary', 'traffic',
]

# What is compiled, and whether the step is captured in a CUDA graph. Networks without update units are compiled whole.
MODES = {
    'eager': ('', False),
    'compiled': ('whole', False),
    'units compiled': ('units', False),
    'CUDA graph': ('', True),
    'units compiled, CUDA graph': ('units', True),
}
# Steps between two events on a GPU: what the first one waits for is then a small part.
STEPS_PER_TIMING = 20


def _seconds(function: Callable[[], Any], device: str) -> float:
    if device == 'cuda':
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Workload:
    """A step of training or inference that can be called again and again.

    Args:
        model: Network.
        batch_size: Images a step.
        image_size: Height and width.
        train: Forward, backward and an SGD update; else forward.
        device: 'cpu' or 'cuda'.
        dtype: Training autocasts to it (float16 with a gradient scaler); for inference the weights are of it.
        mode: One of `MODES`.
        in_chans: Channels of the input.
    """

    def __init__(
            self,
            model: nn.Module,
            batch_size: int,
            image_size: int,
            train: bool,
            device: str = 'cpu',
            dtype: torch.dtype = torch.float32,
            mode: str = 'eager',
            in_chans: int = 3,
    ):
        stored = torch.float32 if train else dtype
        self.model = model.to(device, stored, memory_format=torch.channels_last).train(train)
        self.train, self.device, self.dtype = train, device, dtype
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(batch_size, in_chans, image_size, image_size, generator=generator)
        self.images = images.to(device, stored, memory_format=torch.channels_last)
        if train:
            # Fused, it looks for infinite gradients on the GPU, so that the step can be captured with the scaler.
            fused = True if device == 'cuda' else None
            self.optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9, nesterov=True, fused=fused)
            self.scaler = torch.amp.GradScaler(device, 1024., enabled=dtype == torch.float16)
        self.call: Callable[[torch.Tensor], torch.Tensor] = self.model
        compiled, captured = MODES[mode]
        if compiled == 'units' and any(isinstance(module, GunnLayer) for module in model.modules()):
            compile_units(self.model)
        elif compiled:
            self.call = torch.compile(self.model)
        self.step: Callable[[], Any] = self._train_step if train else self._infer
        if captured:
            self.step = self._capture()

    def _train_step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            out = self.call(self.images)
        self.scaler.scale(out.float().square().mean()).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @torch.no_grad()
    def _infer(self) -> torch.Tensor:
        return self.call(self.images)

    def _capture(self) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def timed(self) -> float:
        """Run one step, on a GPU several between two events, and return the seconds of one."""
        if self.device == 'cpu':
            return _seconds(self.step, self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(STEPS_PER_TIMING):
            self.step()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / STEPS_PER_TIMING


def step_times(workloads: Dict[str, Workload], rounds: int) -> Dict[str, List[float]]:
    """Time each workload once a round, so that what else the machine does falls on all of them.

    Args:
        workloads: By name.
        rounds: Rounds that count; one goes before to warm up.

    Returns:
        Seconds by name.
    """
    times: Dict[str, List[float]] = {name: [] for name in workloads}
    for index in range(rounds + 1):
        for name, workload in workloads.items():
            seconds = workload.timed()
            if index:
                times[name].append(seconds)
    return times


def summary(seconds: List[float], batch_size: int) -> Dict[str, float]:
    """Median and spread of step times.

    Args:
        seconds: Step times.
        batch_size: Images a step.

    Returns:
        seconds (median), seconds_min, seconds_max and images_per_second (of the median).
    """
    median = statistics.median(seconds)
    return dict(
        seconds=median, seconds_min=min(seconds), seconds_max=max(seconds), images_per_second=batch_size / median)


def peak_memory(workload: Workload) -> int:
    """Measure how much more memory than before a step holds at its peak, in bytes, as the allocator counts it.

    A step runs first, so that optimiser state is not counted. Gradients are, which every step makes anew.
    """
    workload.step()
    workload.model.zero_grad()
    if workload.device == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        workload.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        workload.step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def profile(workload: Workload, top: int = 8) -> Dict[str, float]:
    """Measure which operations the time of one step on the CPU goes to.

    Args:
        workload: What to run; a step runs first, to warm up.
        top: Operations to name.

    Returns:
        Share of the step's wall time by the operation's name, the largest first. The rest, other operations and the
        time between them, is 'other'.
    """
    workload.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        seconds = workload.timed()
    # Those of worker threads, which autograd has, run while the main thread waits.
    times = {event.key: event.self_cpu_time_total * 1e-6 for event in profiler.key_averages()}
    largest = sorted(times, key=times.__getitem__, reverse=True)[:top]
    shares = {name.removeprefix('aten::'): times[name] / seconds for name in largest}
    return {**shares, 'other': 1 - sum(shares.values())}


def kernel_launches(workload: Workload) -> int:
    """Count the kernels that one step launches on a GPU."""
    workload.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        workload.step()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.device_type.name == 'CUDA']
    return sum(event.count for event in events if not event.is_user_annotation)  # such as the optimiser's step


class _TrafficCounter(TorchDispatchMode):
    """Adds up the sizes of what each operation reads and writes; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def traffic(workload: Workload) -> int:
    """Count the bytes that the operations of one step read and write, each tensor once an operation."""
    with _TrafficCounter() as counter:
        workload.step()
    return counter.bytes


def gmacs(model: nn.Module, image_size: int, in_chans: int = 3) -> float:
    """Count the multiply-accumulates of one image's forward pass, in units of 1e9.

    Args:
        model: Network; a form without fused norms.
        image_size: Height and width.
        in_chans: Channels of the input.
    """
    device = next(model.parameters()).device
    training = model.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, in_chans, image_size, image_size, device=device))
    model.train(training)
    return counter.get_total_flops() / 2e9


@lru_cache(maxsize=None)
def peak_rates(device: str, dtype: torch.dtype, size: int) -> Tuple[float, float]:
    """Measure what the machine can do, for a roofline: the best of some large matrix products, and of some copies.

    Args:
        device: 'cpu' or 'cuda'.
        dtype: Type of the matrices.
        size: Rows and columns of the matrices.

    Returns:
        Floating-point operations a second, and bytes read and written a second.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source, target = (torch.zeros(16 * size * size, device=device) for _ in range(2))

    product = min(_seconds(lambda: a @ b, device) for _ in range(8))
    copy = min(_seconds(lambda: target.copy_(source), device) for _ in range(8))
    return 2 * size ** 3 / product, 2 * source.numel() * source.element_size() / copy
