#!/usr/bin/env python3
"""Train a CIFAR network on one GPU that holds all images, each step being one CUDA graph.

    python recipes/cifar_gpu.py --model gunn15.cifar10 --data-dir DIR --checkpoint run.ckpt --out gunn15.safetensors

The defaults are section 6.2 of the paper, in bfloat16: SGD with Nesterov's momentum, weight decay on all parameters,
images normalised, padded by 4, cropped and flipped. What fills no batch at the end of an epoch is left out. A command
that was cut goes on from its checkpoint. The test split is looked at once, with the weights of the last epoch.
"""
import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset, resolve_model_data_config

import gunn_timm  # noqa: F401
from gunn_timm.layers import compile_units
from gunn_timm.zoo.files import load_checkpoint, write_file

# What a run may not change on its way.
_FIXED = ('model', 'amp', 'epochs', 'batch_size', 'sched', 'lr', 'weight_decay', 'smoothing', 'ema', 'seed')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    add = parser.add_argument
    add('--model', default='gunn15.cifar10', metavar='NAME', help='model and tag (default: gunn15.cifar10)')
    add('--data-dir', type=Path, required=True, metavar='DIR', help='folder with train/CLASS and test/CLASS')
    add('--dataset', default='', metavar='NAME', help="such as 'torch/cifar10', which downloads itself; else folders")
    add('--cache', type=Path, metavar='FILE', help='decoded images, made if missing (default: in --data-dir)')
    add('--checkpoint', type=Path, required=True, metavar='FILE', help='to write after every epoch, and to go on from')
    add('--out', type=Path, required=True, metavar='FILE', help='safetensors file of the weights, at the end')
    add('--minutes', type=float, default=math.inf, metavar='X', help='run one epoch, then those that end in time')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME')
    add('--amp', default='bfloat16', choices=('float32', 'bfloat16', 'float16'), help='(default: bfloat16)')
    add('--compile-units', action='store_true', help='compile the update units')
    add('--epochs', type=int, default=300, metavar='N', help='epochs of the schedule (default: 300)')
    add('--batch-size', '-b', type=int, default=64, metavar='N', help='batch size (default: 64)')
    add('--sched', default='paper', choices=('paper', 'cosine'), help='/10 at a half and three quarters, or cosine')
    add('--lr', type=float, default=0.1, metavar='X', help='first learning rate (default: 0.1)')
    add('--weight-decay', type=float, default=1e-4, metavar='X', help='weight decay (default: 1e-4)')
    add('--smoothing', type=float, default=0., metavar='X', help='label smoothing (default: 0)')
    add('--ema', type=float, default=0., metavar='X', help='decay of averages, then the result (default: 0, none)')
    add('--seed', type=int, default=42, metavar='N', help='seed (default: 42)')
    return parser


def _write(path: Path, tensors: Dict[str, torch.Tensor], metadata: Dict[str, str]) -> None:
    write_file(path, safetensors.torch.save({k: tensor.contiguous() for k, tensor in tensors.items()}, metadata))


def _read_image(dataset: Any, index: int) -> Tuple[np.ndarray, int]:
    # timm's dataset takes the next image for one that cannot be read; its reader does not.
    image, target = getattr(dataset, 'reader', dataset)[index]
    return np.asarray((image if isinstance(image, Image.Image) else Image.open(image)).convert('RGB')), target


def _load_images(args: argparse.Namespace) -> Dict[str, torch.Tensor]:
    """Read images, uint8 of shape (N, H, W, 3), and targets of both splits."""
    cache = args.cache or args.data_dir / f"images{args.dataset.replace('/', '-')}.safetensors"
    if not cache.is_file():
        tensors = {}
        for split in ('train', 'test'):
            if not args.dataset and not (args.data_dir / split).is_dir():
                raise FileNotFoundError(f"There is no '{args.data_dir / split}'.")
            dataset = create_dataset(args.dataset, args.data_dir, split=split, download=bool(args.dataset))
            images, targets = zip(*(_read_image(dataset, index) for index in range(len(dataset))))
            tensors[f'{split}_images'], tensors[f'{split}_targets'] = (
                torch.from_numpy(np.stack(part)) for part in (images, targets))
        _write(cache, tensors, {})
    with contextlib.suppress(safetensors.SafetensorError):
        tensors = safetensors.torch.load_file(cache)
        if set(tensors) == {'train_images', 'train_targets', 'test_images', 'test_targets'}:
            return tensors
    raise ValueError(f"'{cache}' does not have the images of both splits; remove it, or give another by --cache.")


def _augment(padded: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Crop images of (N, H + 8, W + 8, 3) at random and flip half of them; the result has shape (M, 3, H, W)."""
    rows, columns = (torch.arange(size - 8, device=index.device) for size in padded.shape[1:3])
    top, left = torch.randint(9, (2, len(index), 1), device=index.device)
    columns = torch.where(torch.rand(len(index), 1, device=index.device) < 0.5, columns.flip(0), columns)
    return padded[index[:, None, None], (top + rows)[:, :, None], (left + columns)[:, None]].permute(0, 3, 1, 2)


def _learning_rate(args: argparse.Namespace, epoch: int, share_done: float) -> float:
    if args.sched == 'cosine':
        return args.lr * 0.5 * (1 + math.cos(math.pi * (epoch + share_done) / args.epochs))
    return args.lr * 0.1 ** sum(epoch + 1 >= args.epochs * part for part in (0.5, 0.75))


class _Trainer:
    """A network in training. All that a step reads and writes stays in its place in memory, as a CUDA graph needs."""

    def __init__(self, args: argparse.Namespace, images: torch.Tensor, targets: torch.Tensor):
        self.args, self.images, self.targets, self.epoch, device = args, images, targets, 0, images.device
        torch.manual_seed(args.seed)
        self.model = timm.create_model(args.model).train().to(device, memory_format=torch.channels_last)
        self.index = torch.zeros(args.batch_size, dtype=torch.long, device=device)
        self.lr, self.loss = (torch.zeros((), device=device) for _ in range(2))
        parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.SGD(
            parameters.values(), self.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay, fused=True)
        momentum = {key: torch.zeros_like(parameter) for key, parameter in parameters.items()}
        self.optimizer.state.update({p: {'momentum_buffer': momentum[key]} for key, p in parameters.items()})
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'float16')
        self.weights = self.model.state_dict()
        self.averages = {k: v.clone() for k, v in self.weights.items() if args.ema and v.is_floating_point()}
        self.state = {f'{kind}.{k}': v for kind, tensors in dict(
            model=self.weights, average=self.averages, momentum=momentum).items() for k, v in tensors.items()}
        if args.checkpoint.is_file():
            try:
                with safetensors.safe_open(args.checkpoint, 'pt') as file:
                    saved = {key: json.loads(value) for key, value in file.metadata().items()}
                changed = [key for key in _FIXED if saved[key] != getattr(args, key)]
            except Exception as e:  # what another file raises depends on what it is
                raise ValueError(f"'{args.checkpoint}' is no checkpoint of this script.") from e
            if changed:
                raise ValueError(f"'{args.checkpoint}' is of a run with another {', '.join(changed)}.")
            self._restore(safetensors.torch.load_file(args.checkpoint))
            self.scaler.load_state_dict(saved['scaler'])
            self.epoch = saved['epoch']
        if args.compile_units:
            compile_units(self.model)
        self._run = self._capture() if device.type == 'cuda' else self._step

    @torch.no_grad()
    def _restore(self, tensors: Dict[str, torch.Tensor]) -> None:
        for key, tensor in self.state.items():
            tensor.copy_(tensors[key])

    def save(self) -> None:
        metadata = dict({k: getattr(self.args, k) for k in _FIXED}, epoch=self.epoch, scaler=self.scaler.state_dict())
        _write(self.args.checkpoint, self.state, {key: json.dumps(value) for key, value in metadata.items()})

    def _step(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.index.device.type, self.images.dtype, enabled=self.args.amp != 'float32'):
            logits = self.model(_augment(self.images, self.index))
        loss = F.cross_entropy(logits.float(), self.targets[self.index], label_smoothing=self.args.smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.loss += loss.detach()
        if self.averages:
            torch._foreach_lerp_([*self.averages.values()], [self.weights[k] for k in self.averages], 1 - self.args.ema)

    def _capture(self) -> Callable[[], None]:
        """Capture a step; the steps that warm up are undone."""
        kept, scaler = {key: tensor.clone() for key, tensor in self.state.items()}, self.scaler.state_dict()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._restore(kept)
        self.scaler.load_state_dict(scaler)
        return graph.replay

    def train_epoch(self) -> float:
        """Train for an epoch, with random numbers that only its number decides, and return the mean loss."""
        torch.manual_seed(self.args.seed + 1_000_003 * self.epoch)
        order, steps = torch.randperm(len(self.targets), device=self.index.device), len(self.targets) // len(self.index)
        self.loss.zero_()
        for i, index in zip(range(steps), order.split(len(self.index))):
            self.index.copy_(index)
            self.lr.fill_(_learning_rate(self.args, self.epoch, i / steps))
            self._run()
        self.epoch += 1
        return self.loss.item() / steps


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Train, and print the result as JSON.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0, or 2 where the input is at fault, after one line on stderr.
    """
    args, start, longest = _parser().parse_args(argv), time.monotonic(), 0.
    torch.backends.cudnn.benchmark = True
    try:
        if args.out.suffix != '.safetensors':
            raise ValueError(f"--out must end in .safetensors; got '{args.out}'.")
        for path in (args.out, args.checkpoint):
            if not path.parent.is_dir():
                raise FileNotFoundError(f"There is no folder '{path.parent}'.")
        model = timm.create_model(args.model).eval().to(args.device, memory_format=torch.channels_last)
        config = resolve_model_data_config(model)
        mean, std = (torch.tensor(config[key], device=args.device) for key in ('mean', 'std'))
        data = {key: tensor.to(args.device) for key, tensor in _load_images(args).items()}
        targets = data['train_targets']
        num_classes = int(targets.max()) + 1
        if num_classes != model.num_classes:
            raise ValueError(f'{args.model} has {model.num_classes} classes, the data {num_classes}.')
        if not 1 <= args.batch_size <= len(targets):
            raise ValueError(f'--batch-size is from 1 to {len(targets)}; got {args.batch_size}.')
        train, test = (
            torch.cat([((part / 255 - mean) / std).to(getattr(torch, args.amp)) for part in data[key].split(5000)])
            for key in ('train_images', 'test_images'))
        trainer = _Trainer(args, F.pad(train, (0, 0, 4, 4, 4, 4)), targets)
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as e:  # timm and torch assert
        print(f'error: {e}', file=sys.stderr)
        return 2
    result = dict(model=args.model, epochs=args.epochs, epoch=trainer.epoch)
    while trainer.epoch < args.epochs and (not longest or time.monotonic() - start + longest <= 60 * args.minutes):
        begin = time.monotonic()
        result.update(loss=trainer.train_epoch(), epoch=trainer.epoch)
        if not math.isfinite(result['loss']):
            sys.exit(f"error: the mean loss of epoch {trainer.epoch} is {result['loss']}")
        trainer.save()
        longest = max(longest, time.monotonic() - begin)
        print(f"{json.dumps(result)} {len(train) / (time.monotonic() - begin):.0f} images/s", file=sys.stderr)
    if trainer.epoch == args.epochs:
        _write(args.out, {**trainer.weights, **trainer.averages}, {'format': 'pt'})
        load_checkpoint(model, args.out)
        with torch.inference_mode(), torch.autocast(test.device.type, test.dtype, enabled=args.amp != 'float32'):
            found = torch.cat([model(images.permute(0, 3, 1, 2)).argmax(1) for images in test.split(500)])
        result.update(top1=100 * (found == data['test_targets']).double().mean().item(), ema=args.ema > 0, amp=args.amp)
    print(json.dumps(result))
    return 0


if __name__ == '__main__':
    sys.exit(main())
