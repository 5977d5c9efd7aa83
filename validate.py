#!/usr/bin/env python3
"""Measure the top-1 and top-5 accuracy of a model on a dataset, and compare it with the record of its weights.

    python validate.py --model gunn15 --data-dir DIR --split test
    python validate.py --model gunn15 --data-dir DIR --split test --channels-last --check
    python validate.py --model gunn15 --checkpoint output/model_best.pth.tar --data-dir DIR --split test
    python validate.py --model gunn15 --ensemble SNAPSHOT SNAPSHOT ... --data-dir DIR --split test

Takes any model registered in timm. Datasets, transforms and loaders are timm's; so are the keys of the result.
"""
import argparse
import csv
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import ImageDataset, ImageNetInfo, create_dataset, create_loader, resolve_data_config
from timm.utils import accuracy, check_batch_size_retry, decay_batch_step
from tqdm import tqdm

import gunn_timm  # noqa: F401
from gunn_timm._timm import search_split
from gunn_timm.zoo.files import load_checkpoint, write_file
from gunn_timm.zoo.records import WeightsRecord, probe_images, weights_records

_SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')
_INTERPOLATIONS = ('bilinear', 'bicubic', 'nearest', 'box', 'hamming', 'lanczos')


def _number(kind: type, least: float, most: float = float('inf')) -> Callable[[str], Any]:
    """Make an argument's type: a number within limits."""
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            limits = f'of at least {least}' if most == float('inf') else f'from {least} to {most}'
            raise argparse.ArgumentTypeError(f"must be {kind.__name__} {limits}; got '{text:.20}'")
        return value
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n')[0], usage='%(prog)s --model NAME --data-dir DIR [OPTIONS]; --help lists them')
    data = parser.add_argument_group('data')
    data.add_argument('--data-dir', required=True, metavar='DIR', help='folder or tar file of the dataset')
    data.add_argument('--dataset', default='', metavar='NAME', help="type and name, as 'torch/cifar10'; else images")
    data.add_argument('--split', default='validation', metavar='NAME', help='split (default: validation)')
    data.add_argument('--dataset-download', action='store_true', help='let a torch/ dataset download itself')
    data.add_argument('--workers', '-j', type=_number(int, 0), default=2, metavar='N',
                      help='loader processes (default: 2)')
    data.add_argument('--batch-size', '-b', type=_number(int, 1), default=256, metavar='N',
                      help='batch size to begin with; made smaller when memory runs out (default: 256)')
    data.add_argument('--img-size', type=_number(int, 1), metavar='N', help="image size (default: the model's)")
    data.add_argument('--crop-pct', type=_number(float, 0.1, 1.), metavar='X',
                      help="share of the image to crop (default: the model's)")
    data.add_argument('--interpolation', default='', choices=_INTERPOLATIONS, metavar='NAME',
                      help="resizing (default: the model's)")
    model = parser.add_argument_group('model')
    model.add_argument('--model', default='gunn15', metavar='NAME', help="model, as timm names it (default: 'gunn15')")
    model.add_argument('--checkpoint', default='', metavar='FILE', help='weights to evaluate, not the published ones')
    model.add_argument('--ensemble', nargs='+', metavar='FILE',
                       help='evaluate each, and the averages of the probabilities of the first two, three and so on')
    model.add_argument('--num-classes', type=_number(int, 1), metavar='N',
                       help="number of classes (default: the model's)")
    run = parser.add_argument_group('run')
    run.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', metavar='NAME')
    run.add_argument('--amp', action='store_true', help='autocast to --amp-dtype')
    run.add_argument('--amp-dtype', default='bfloat16', choices=('bfloat16', 'float16'))
    run.add_argument('--channels-last', action='store_true', help='use the channels_last memory format')
    run.add_argument('--results-file', default='', metavar='FILE', help='write the result there too')
    run.add_argument('--results-format', default='csv', choices=('csv', 'json'))
    run.add_argument('--logits-file', default='', metavar='FILE',
                     help='write logits and targets of all images there, in safetensors format')
    run.add_argument('--check', action='store_true', help='exit with 1 if top-1 is off the record by over --tolerance')
    run.add_argument('--tolerance', type=_number(float, 0.), default=0.01, metavar='POINTS',
                     help='percentage points that --check lets pass (default: 0.01)')
    return parser


class _EveryImage(ImageDataset):
    """timm's dataset, which takes the next image for one that cannot be read; this does not."""

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, int]:
        file, target, *_ = self.reader[index]
        try:
            image = Image.open(file).convert('RGB')
        except Exception as e:  # Pillow's decoders raise what they like
            raise ValueError(f"'{self.filename(index, absolute=True)}' is not an image that can be read.") from e
        return self.transform(image), target


def _check_classes(names: Sequence[str], labels: Sequence[str], model: torch.nn.Module) -> None:
    """Compare the classes of the data, in order, with those of the weights, if they have names."""
    if len(names) != model.num_classes:
        raise ValueError(
            f'The data has {len(names)} classes and the model {model.num_classes}; give data of its classes, or '
            '--num-classes and --checkpoint.')
    if not labels:
        return
    descriptions = ImageNetInfo().label_descriptions(as_dict=True)
    for index, (name, label) in enumerate(zip(names, labels)):
        found = descriptions.get(name, name).split(', ')
        if label.replace('_', ' ').lower() not in [word.replace('_', ' ').lower() for word in found]:
            raise ValueError(f"Class {index} of the data is '{name}', and of the weights '{label}'.")


def _create_dataset(args: argparse.Namespace, model: torch.nn.Module) -> Any:
    root = Path(args.data_dir)
    if not root.exists() and not args.dataset_download:
        raise FileNotFoundError(f"No data at '{root}'.")
    # timm would go on with every image in the folder or file, whatever its split.
    if not args.dataset and root.is_dir() and search_split(str(root), args.split) == str(root):
        found = ', '.join(sorted(p.name for p in root.iterdir() if p.is_dir())) or 'none'
        raise ValueError(f"'{root}' has no folder for the split '{args.split}'; folders there: {found}.")
    if not args.dataset and root.is_file() and tarfile.is_tarfile(root):
        with tarfile.open(root) as tar:
            found = sorted({name.lstrip('./').split('/')[0] for name in tar.getnames()} & set(_SPLITS))
        if len(found) > 1:
            raise ValueError(f"'{root}' holds several splits, {', '.join(found)}; give a tar file of one.")
    dataset = create_dataset(args.dataset, root=str(root), split=args.split, download=args.dataset_download)
    indices = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or {}
    classes = getattr(dataset, 'classes', None) or sorted(indices, key=indices.get)
    if classes:
        is_pretrained = not (args.checkpoint or args.ensemble)
        _check_classes(classes, (is_pretrained and model.pretrained_cfg.get('label_names')) or (), model)
    return _EveryImage(str(root), reader=dataset.reader) if type(dataset) is ImageDataset else dataset


@torch.inference_mode()
def _evaluate(
        model: torch.nn.Module,
        dataset: Any,
        data_config: Dict[str, Any],
        batch_size: int,
        args: argparse.Namespace,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Compute logits (images, classes), and collect targets (images)."""
    device = torch.device(args.device)
    loader = create_loader(
        dataset,
        input_size=data_config['input_size'],
        batch_size=batch_size,
        is_training=False,
        use_prefetcher=device.type == 'cuda',
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        num_workers=args.workers,
        device=device,
    )
    all_logits, all_targets = [], []
    for images, target in tqdm(loader, desc=args.model, unit='batch', disable=None):
        images = images.to(device)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp):
            all_logits.append(model(images).float().cpu())
        all_targets.append(target.cpu())
    return torch.cat(all_logits), torch.cat(all_targets)


def _evaluate_in_memory(
        model: torch.nn.Module,
        dataset: Any,
        data_config: Dict[str, Any],
        args: argparse.Namespace,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Evaluate with the largest batch, of at most the one asked for, that fits."""
    batch_size = args.batch_size
    while True:
        try:
            return _evaluate(model, dataset, data_config, batch_size, args)
        except RuntimeError as e:
            smaller = decay_batch_step(batch_size)
            if 'memory' not in str(e).lower() or not check_batch_size_retry(str(e)) or not smaller:
                raise
            print(f'batch size {batch_size} does not fit, trying {smaller}', file=sys.stderr)
            batch_size = smaller


def _accuracy(scores: torch.Tensor, targets: torch.Tensor, prefix: str = '') -> Dict[str, float]:
    top1, top5 = (round(a.item(), 4) for a in accuracy(scores, targets, (1, 5)))
    return {
        f'{prefix}top1': top1, f'{prefix}top1_err': round(100 - top1, 4),
        f'{prefix}top5': top5, f'{prefix}top5_err': round(100 - top5, 4)}


def _published_record(args: argparse.Namespace, model: torch.nn.Module) -> Optional[WeightsRecord]:
    """Find the record that the result can be compared with: of these weights, measured in their own way."""
    if args.checkpoint or args.ensemble or args.img_size or args.crop_pct or args.interpolation:
        return None
    cfg = model.pretrained_cfg
    return weights_records().get(f"{cfg.get('architecture')}.{cfg.get('tag')}")


def validate(
        args: argparse.Namespace,
) -> Tuple[List[Dict[str, Any]], Dict[str, torch.Tensor], Optional[WeightsRecord]]:
    """Evaluate the model that the arguments name.

    Args:
        args: Arguments of this script.

    Returns:
        A result, with timm's keys: model, top1, top1_err, top5, top5_err (all in %), param_count (millions), img_size,
        crop_pct, interpolation; and the number of images. For an ensemble, a result for each checkpoint, with its file,
        and ensemble_top1 and so on for the probabilities averaged up to it. Then, if a file is asked for them, the
        images' logits (images, classes) and targets (images) in the dataset's order, and the logits of `probe_images`.
        Then the record to compare with, if there is one.

    Raises:
        ValueError: The data, a checkpoint, the model's name or an argument is not what it should be.
        RuntimeError: The model has no weights.
    """
    checkpoints = args.ensemble or ([args.checkpoint] if args.checkpoint else [])
    if args.ensemble and (args.checkpoint or args.logits_file):
        raise ValueError('--ensemble goes without --checkpoint and --logits-file.')
    if args.num_classes is not None and not checkpoints:
        raise ValueError('--num-classes needs --checkpoint or --ensemble: published weights have classes of their own.')
    model = timm.create_model(args.model, pretrained=not checkpoints, num_classes=args.num_classes).eval()
    record = _published_record(args, model)
    if args.check and record is None:
        raise ValueError(
            f"--check needs published weights, as they are: '{args.model}' with these arguments has no record.")
    # All of them before the first is evaluated, so that a wrong one is found at once.
    for path in checkpoints:
        load_checkpoint(model, path)
    data_config = resolve_data_config(
        dict(img_size=args.img_size, crop_pct=args.crop_pct, interpolation=args.interpolation), model=model)
    dataset = _create_dataset(args, model)
    model = model.to(
        args.device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    rows = []
    probabilities = 0
    for path in checkpoints or [None]:
        if args.ensemble:
            load_checkpoint(model, path)
        logits, targets = _evaluate_in_memory(model, dataset, data_config, args)
        row = dict(
            model=args.model,
            **_accuracy(logits, targets),
            images=len(targets),
            param_count=round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
            img_size=data_config['input_size'][-1],
            crop_pct=data_config['crop_pct'],
            interpolation=data_config['interpolation'],
        )
        if args.ensemble:
            probabilities = probabilities + logits.double().softmax(dim=1)
            row.update(checkpoint=path, **_accuracy(probabilities, targets, 'ensemble_'))
        rows.append(row)
    outputs = {}
    if args.logits_file:
        probe = probe_images(data_config['input_size']).to(args.device)
        with torch.inference_mode():
            outputs = dict(logits=logits, targets=targets, probe_logits=model(probe).float().cpu())
    return rows, outputs, record


def _format_results(results_format: str, rows: List[Dict[str, Any]]) -> str:
    text = io.StringIO()
    if results_format == 'json':
        json.dump(rows, text, indent=4)
    else:
        writer = csv.DictWriter(text, fieldnames=rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the script.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0; 1 if --check found another accuracy than the record's; 2 where the input is at fault, after one
        line on stderr.
    """
    args = _parser().parse_args(argv)
    try:
        rows, outputs, record = validate(args)
        # Before the files: what took so long to find must not be lost where one cannot be written.
        print(f'--result\n{json.dumps(rows if args.ensemble else rows[0], indent=4)}')
        if args.results_file:
            write_file(args.results_file, _format_results(args.results_format, rows).encode())
        if args.logits_file:
            write_file(args.logits_file, safetensors.torch.save(outputs))
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as e:  # timm and torch assert
        # What a loader's worker raises comes with its traceback, and the message last, after the kind of error.
        message = str(e).strip().split('\n')[-1].split(': ', 1)[-1] if 'Original Traceback' in str(e) else str(e)
        print(f'error: {" ".join(message.split())}', file=sys.stderr)
        return 2
    if record is None:
        return 0
    here, theirs = rows[0], record.metrics
    off = here['top1'] - theirs['top1']
    agrees = abs(off) <= args.tolerance and here['images'] == theirs['images']
    # Not on stdout, where timm's bulk_runner.py reads nothing but JSON behind --result.
    print(f"record of {record.name}: top-1 {theirs['top1']}, top-5 {theirs['top5']} of {theirs['images']} images; "
          f"top-1 here, of {here['images']}, is {off:+.4f} points off: {'agrees' if agrees else 'DOES NOT AGREE'} "
          f'within {args.tolerance}', file=sys.stderr)
    return 1 if args.check and not agrees else 0


if __name__ == '__main__':
    sys.exit(main())
