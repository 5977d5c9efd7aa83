"""Checks for hooks, subclasses, tracing and function transforms, for which PyTorch has no public names.

Algorithm 1 computes a unit's first convolutions itself, so it must know of whatever else would see or change them.
Where PyTorch lacks a name, the answer is the one that makes layers run by concatenation, which is always right; for the
two that backward uses a note says what is lost.
"""
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext

_TENSORS = (nn.Parameter, torch.Tensor)
_functorch = getattr(torch._C, '_functorch', None)
_is_batched = getattr(_functorch, 'is_batchedtensor', lambda tensor: False)
_is_legacy_batched = getattr(_functorch, 'is_legacy_batchedtensor', lambda tensor: False)
_functorch_is_active = getattr(torch._C, '_are_functorch_transforms_active', lambda: True)
_get_function_mode = getattr(torch.overrides, '_get_current_function_mode', lambda: None)
_count_function_modes = getattr(torch._C, '_len_torch_function_stack', lambda: 2)
_GLOBAL_HOOKS = [getattr(nn_module, f'_global_{n}_hooks', [True]) for n in (
    'forward_pre', 'forward', 'backward_pre', 'backward')]
# Tells one run of the autograd engine from another; without the name all are one.
current_backward = getattr(torch._C, '_current_graph_task_id', lambda: 0)


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether vmap computes with the tensor as one of many; without the names PyTorch raises an error of its own."""
    return _is_batched(tensor) or _is_legacy_batched(tensor)


def is_recorded() -> bool:
    """Whether operations are being traced, exported or compiled."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work; there are public names for neither."""
    return _functorch_is_active() or getattr(forward_ad, '_current_level', 0) >= 0


def is_watched() -> bool:
    """Whether hooks of all modules are set, or a TorchFunctionMode is on that is not that of the default device."""
    count = _count_function_modes()
    return any(_GLOBAL_HOOKS) or count > 1 or (count == 1 and type(_get_function_mode()) is not DeviceContext)


def runs_forward_only(module: nn.Module, kind: type) -> bool:
    """Whether calling the module does what `kind.forward` does, and nothing else.

    A class of its own (as adapters, parametrizations and FSDP give it), hooks, and a `forward` set on the instance do
    more.
    """
    own = module.__dict__  # attributes of modules are slow, and layers ask hundreds of times a call
    return type(module) is kind and 'forward' not in own and not (
        own['_forward_pre_hooks'] or own['_forward_hooks'] or own['_backward_pre_hooks'] or own['_backward_hooks'])


def is_plain_pointwise(conv: nn.Module) -> bool:
    """Whether calling the module is one product with the matrix of its weight, and perhaps the addition of a bias."""
    own = conv.__dict__
    return (
        runs_forward_only(conv, nn.Conv2d)
        and own['kernel_size'] == own['stride'] == (1, 1) and own['padding'] == (0, 0) and own['groups'] == 1
        # A computed weight is no parameter, but an attribute like any other.
        and type(own['_parameters'].get('weight', own.get('weight'))) in _TENSORS
    )


def raise_recompile_limit(needed: int) -> None:
    """Let torch.compile keep so many versions of one function; past the limit it would run the rest uncompiled."""
    config = torch._dynamo.config
    # As PyTorch 2.6 calls it.
    limit = 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit'
    for name in (limit, f'accumulated_{limit}'):
        setattr(config, name, max(getattr(config, name), needed))
