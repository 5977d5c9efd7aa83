#!/usr/bin/env python3
"""Quantize an exported ONNX file to int8, dynamically and statically, and compare accuracy and size.

    python -m gunn_timm export gunn15 --format onnx --out gunn15.onnx
    python examples/quantize.py gunn15.onnx --data-dir DIR --limit 1000

DIR has images in folders train/CLASS, from some of which the static form learns the ranges of its activations, and
test/CLASS, on which all three forms are measured. Writes gunn15.dynamic.onnx and gunn15.static.onnx beside the file.
How to prepare the images is read from the file's metadata. Needs `pip install '.[export]'`.
"""
import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from timm.data import ImageDataset, create_transform
from torch.utils.data import DataLoader, Subset

from gunn_timm.zoo.files import write_file

CALIBRATION_IMAGES = 256


class _Batches(CalibrationDataReader):
    """What ONNX Runtime reads batches of images through."""

    def __init__(self, batches: Iterable[np.ndarray]):
        self.batches = iter(batches)

    def get_next(self) -> Optional[Dict[str, np.ndarray]]:
        batch = next(self.batches, None)
        return None if batch is None else {'images': batch}


def quantize(file: Path, batches: Iterable[np.ndarray]) -> Dict[str, Path]:
    """Write both int8 forms of an exported network beside it.

    Args:
        file: ONNX file of `python -m gunn_timm export`.
        batches: Images that the ranges of the static form are taken from, each of shape (N, C, H, W).

    Returns:
        The files by form: 'dynamic' (the weights are int8, and each activation's range is found while it runs) and
        'static' (all is int8, by ranges found now; weights have one for each channel).
    """
    written = {form: file.with_suffix(f'.{form}.onnx') for form in ('dynamic', 'static')}
    with tempfile.TemporaryDirectory() as folder:
        prepared, quantized = Path(folder) / 'prepared.onnx', Path(folder) / 'quantized.onnx'
        # Symbolic shapes are for transformers.
        quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        # ONNX Runtime has no integer convolution on CPUs with a range for each channel, or with signed weights.
        quantize_dynamic(prepared, quantized, weight_type=QuantType.QUInt8)
        write_file(written['dynamic'], quantized.read_bytes())
        # What ONNX Runtime advises for x86.
        quantize_static(
            prepared, quantized, _Batches(batches), per_channel=True, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8)
        write_file(written['static'], quantized.read_bytes())
    return written


def _session(file: Path) -> onnxruntime.InferenceSession:
    if not file.is_file():
        raise FileNotFoundError(f"No file '{file}'.")
    try:
        return onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    except Exception as e:  # ONNX Runtime's errors have no class of their own in common
        raise ValueError(f"'{file}' is not an ONNX file that can be run ({e}).") from e


def _loader(folder: Path, images: int, session: onnxruntime.InferenceSession) -> DataLoader:
    """Load that many images of a folder, evenly spaced, so that all classes are among them."""
    metadata = session.get_modelmeta().custom_metadata_map
    if 'input_size' not in metadata:
        raise ValueError('The file does not say how to prepare images; write it with `python -m gunn_timm export`.')
    if not folder.is_dir():
        raise FileNotFoundError(f"No folder '{folder}'; --data-dir must have train/CLASS and test/CLASS.")
    dataset = ImageDataset(str(folder), transform=create_transform(
        interpolation=metadata['interpolation'], crop_mode=metadata['crop_mode'],
        **{key: json.loads(metadata[key]) for key in ('input_size', 'mean', 'std', 'crop_pct')}))
    found, expected = len(dataset.reader.class_to_idx), session.get_outputs()[0].shape[1]
    if found != expected:
        raise ValueError(f"'{folder}' has {found} classes, and the network {expected}.")
    count = min(images, len(dataset))
    return DataLoader(Subset(dataset, [i * len(dataset) // count for i in range(count)]), batch_size=32)


def top1(session: onnxruntime.InferenceSession, loader: DataLoader) -> float:
    """Measure the top-1 accuracy, in %, of a network on batches of images (N, C, H, W) and targets (N,)."""
    right = [session.run(None, {'images': images.numpy()})[0].argmax(axis=1) == targets.numpy()
             for images, targets in loader]
    return 100 * float(np.concatenate(right).mean())


def _table(files: Dict[str, Path], loader: DataLoader) -> List[str]:
    lines = ['| form | top-1 % | MB | file |', '| --- | --- | --- | --- |']
    for form, file in files.items():
        accuracy = top1(_session(file), loader)
        lines.append(f'| {form} | {accuracy:.2f} | {file.stat().st_size / 1e6:.2f} | {file} |')
    return lines


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the example.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0, or 2 where the input is at fault, after one line on stderr.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('file', type=Path, metavar='FILE.onnx', help='what `python -m gunn_timm export` wrote')
    parser.add_argument('--data-dir', type=Path, required=True, metavar='DIR', help='has train/CLASS and test/CLASS')
    parser.add_argument('--limit', type=int, metavar='N', help='measure on N test images only (default: all)')
    args = parser.parse_args(argv)
    try:
        if args.limit is not None and args.limit < 1:
            raise ValueError(f'--limit must be at least 1; got {args.limit}.')
        session = _session(args.file)
        calibration = _loader(args.data_dir / 'train', CALIBRATION_IMAGES, session)
        test = _loader(args.data_dir / 'test', args.limit or sys.maxsize, session)
        files = {'float32': args.file, **quantize(args.file, (images.numpy() for images, _ in calibration))}
        print('\n'.join(_table(files, test)))
        print(f'top-1 on {len(test.dataset)} of {len(test.dataset.dataset)} test images; the static form is calibrated '
              f'on {len(calibration.dataset)} training images')
    except (OSError, RuntimeError, ValueError) as e:
        print(f'error: {" ".join(str(e).split())}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
