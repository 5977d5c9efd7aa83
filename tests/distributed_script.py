"""Run under torchrun by test_distributed.py: two ranks on half a batch each against one model on the whole batch."""
import sys

import timm
import torch
import torch.distributed as dist
from conftest import TINY
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gunn_timm.layers import set_backend


def create():
    torch.manual_seed(0)
    return timm.create_model('gunn15', **TINY['gunn15'], num_classes=7).double()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def check(kind):
    rank, world = dist.get_rank(), dist.get_world_size()
    model, single = create().train(), create().train()
    set_backend(single, 'plain')
    # Each rank has statistics of its own, which one model on the whole batch has not, so the norms are frozen.
    for module in [*model.modules(), *single.modules()]:
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    if kind == 'unused':
        # A parameter that takes part in nothing.
        for net in (model, single):
            net.register_parameter('unused', nn.Parameter(torch.ones(1, dtype=torch.double)))
    set_backend(model, 'gradual')
    raw = model
    if kind == 'fsdp':
        for stage in model.stages:
            fully_shard(stage)
        fully_shard(model)
    else:
        model = DistributedDataParallel(
            model, static_graph=kind == 'static', find_unused_parameters=kind == 'unused')
    optimizers = [torch.optim.SGD(net.parameters(), 0.05, momentum=0.9) for net in (model, single)]
    for step in range(3):
        torch.manual_seed(step)
        images, targets = torch.randn(4 * world, 3, 16, 16).double(), torch.arange(4 * world) % 7
        part = slice(4 * rank, 4 * rank + 4)
        for net, optimizer, x, y in (
                (model, optimizers[0], images[part], targets[part]), (single, optimizers[1], images, targets)):
            optimizer.zero_grad()
            if kind == 'accumulate' and net is model:
                # Two halves, of which only the second one is reduced.
                with net.no_sync():
                    (nn.functional.cross_entropy(net(x[:2]), y[:2]) / 2).backward()
                (nn.functional.cross_entropy(net(x[2:]), y[2:]) / 2).backward()
            else:
                nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        for (name, p), (_, q) in zip(raw.named_parameters(), single.named_parameters()):
            if q.grad is not None:
                torch.testing.assert_close(full(p.grad), q.grad, rtol=1e-8, atol=1e-10, msg=name)
    if rank == 0:
        print(kind, flush=True)


dist.init_process_group('gloo')
for kind in sys.argv[1:]:
    check(kind)
dist.destroy_process_group()
