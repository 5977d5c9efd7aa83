"""The command line: `python -m gunn_timm`."""
import argparse
import json
import sys
from pathlib import Path
from typing import List, Optional, Sequence

from ..zoo.files import load_checkpoint
from ..zoo.hub import model_card, publish
from ..zoo.records import WeightsRecord, find_record, model_infos, weights_records
from .cam import save_cams
from .export import FORMATS, ONNX_OPSET, check_export, export_model
from .predict import create_model, predict, read_image
from .run import run_script
from .summary import format_summary, plot_depth, summarize

__all__ = ['main', 'models_table']

_COLUMNS = ('model', 'params (M)', 'GMACs', 'input', 'dataset', 'paper top-1 err', 'our top-1 err', 'weights')


def _model_rows() -> List[List[str]]:
    rows = []
    for info in model_infos().values():
        record = weights_records().get(info.name)
        rows.append([
            info.name,
            f'{info.parameters / 1e6:.2f}',
            f'{info.gmacs:.2f}',
            'x'.join(map(str, info.input_size[1:])),
            record.dataset['name'] if record else info.dataset,
            '-' if info.paper_top1_err is None else f'{info.paper_top1_err:.2f}',
            f"{100 - record.metrics['top1']:.2f}" if record else '-',
            'yes' if record else 'no',
        ])
    return rows


def _provenance(record: WeightsRecord) -> str:
    metrics, training = record.metrics, record.training
    height, width = record.preprocessing['input_size'][1:]
    return (
        f"`{record.name}`: top-1 {metrics['top1']}%, top-5 {metrics['top5']}% on {record.dataset['name']} "
        f"({record.dataset['copy']}) at {height}x{width}; {training['epochs']} epochs on {training['hardware']}, "
        f"seed {', '.join(map(str, training['seed']))}, {record.how_measured}; "
        f"measured on {metrics['images']} test images by `{metrics['command']}`.")


def models_table() -> str:
    """Return the models, tags and figures as a Markdown table, and below it what stands behind our figures."""
    rows = [list(_COLUMNS), ['---'] * len(_COLUMNS), *_model_rows()]
    table = '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)
    return '\n'.join([table, *(f'\n{_provenance(record)}' for record in weights_records().values())])


def _list(args: argparse.Namespace) -> None:
    if args.markdown:
        print(models_table())
        return
    rows = [list(_COLUMNS), *_model_rows()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _predict(args: argparse.Namespace) -> None:
    images = [read_image(path) for path in args.images]
    model = create_model(args.model, pretrained=True)
    results = predict(model, images, args.topk)
    if args.cam:
        save_cams(model, images, [top[0]['index'] for top in results], args.cam)
    if args.json:
        print(json.dumps([dict(image=path, predictions=top) for path, top in zip(args.images, results)], indent=2))
        return
    for path, top in zip(args.images, results):
        print(path)
        for entry in top:
            print(f"  {entry['probability']:6.1%}  {entry['label']}")


def _summary(args: argparse.Namespace) -> None:
    sizes = args.image_size
    rows = summarize(create_model(args.model, device='meta'), sizes[0] if sizes and len(sizes) == 1 else sizes)
    if args.plot:
        plot_depth({
            label: create_model(args.model, device='meta', ordered=ordered)
            for label, ordered in (('in order', True), ('all at once', False))
        }, args.plot)
    print(format_summary(rows))


def _card(args: argparse.Namespace) -> None:
    print(model_card(find_record(args.name)), end='')


def _publish(args: argparse.Namespace) -> None:
    if args.all == bool(args.name):
        raise ValueError('Give either the name of a weight or --all.')
    if args.all and '{name}' not in args.repo_id:
        raise ValueError(f"With --all the repository must be like 'ORG/{{name}}'; got '{args.repo_id}'.")
    for name in list(weights_records()) if args.all else [args.name]:
        repo_id = args.repo_id.replace('{name}', name)
        done = publish(name, repo_id, args.revision, args.private, args.force, args.dry_run)
        for path in done.changed:
            print(f"  {path}: {done.sizes[path]:,} bytes" if path in done.sizes else f'  {path}: removed')
        if args.dry_run:
            print(f'{name}: these files would be sent to {repo_id}; nothing was')
            continue
        print(f"{name}: {'published in' if done.changed else 'nothing new for'} {repo_id}, commit {done.commit}")
        print(f'its record says so with\nhub: {{repo_id: {repo_id}, revision: {done.commit}}}')


def _export(args: argparse.Namespace) -> None:
    if args.num_classes is not None and not args.checkpoint:
        raise ValueError('--num-classes goes with --checkpoint.')
    if args.checkpoint:
        model = create_model(args.model, num_classes=args.num_classes)
        load_checkpoint(model, args.checkpoint)
        # The published weights' classes, which need not be those of the checkpoint.
        model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': None}
    else:
        model = create_model(args.model, pretrained=True)
    export_model(model, args.out, args.format)
    opset = f', opset {ONNX_OPSET}' if args.format == 'onnx' else ''
    print(f'{args.out}: {args.model} as {args.format}{opset}, {Path(args.out).stat().st_size:,} bytes')
    if args.check:
        print(f'largest relative difference from eager: {check_export(model, args.out, args.format):.1e}')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m gunn_timm', description='GUNN models for timm.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    command = commands.add_parser('predict', help='name what is in pictures')
    command.add_argument('images', nargs='+', metavar='IMAGE', help='image files')
    command.add_argument('--model', default='gunn15', help="model with weights, as timm names it (default: 'gunn15')")
    command.add_argument('--topk', type=int, default=5, metavar='K', help='classes to print (default: 5)')
    command.add_argument('--json', action='store_true', help='print JSON')
    command.add_argument(
        '--cam', nargs='+', metavar='OUT.png',
        help='PNG files to write, one for each image in turn: where in it the likeliest class is seen, as a class '
             'activation map laid over it (needs torchcam)')
    command.set_defaults(function=_predict)

    command = commands.add_parser('list', help='list the models and tags, and which have weights')
    command.add_argument('--markdown', action='store_true', help="print the README's table")
    command.set_defaults(function=_list)

    command = commands.add_parser(
        'summary', help='print shapes, parameters, MACs, receptive field and depth of each part of a model')
    command.add_argument('model', metavar='MODEL', help="model, 'gunn18' say")
    command.add_argument(
        '--image-size', type=int, nargs='+', metavar=('H', 'W'),
        help='height and width of the images, or one number for both (default: what the model is made for)')
    command.add_argument(
        '--plot', metavar='FILE',
        help='draw how depth grows along the channels, in order and with all segments at once (needs matplotlib)')
    command.set_defaults(function=_summary)

    command = commands.add_parser('card', help='print the model card of published weights, written from their record')
    command.add_argument('name', metavar='NAME', help="weight, 'gunn15.cifar10' say")
    command.set_defaults(function=_card)

    command = commands.add_parser(
        'publish', help='publish weights on the Hugging Face Hub',
        description='Sends weights, configuration, model card and licence in one commit, reads them back and compares. '
                    'The token is that of `hf auth login`, or HF_TOKEN.')
    command.add_argument('name', nargs='?', metavar='NAME', help="weight to publish, 'gunn15.cifar10' say")
    command.add_argument('--all', action='store_true', help='publish all weights')
    command.add_argument('--repo-id', required=True, metavar='ORG/NAME', help="repository; '{name}' in it is replaced")
    command.add_argument('--revision', metavar='BRANCH', help='branch to commit to (default: main)')
    command.add_argument('--private', action='store_true', help='make a new repository private')
    command.add_argument('--force', action='store_true', help='replace other content, remove pickled weights')
    command.add_argument('--dry-run', action='store_true', help='only name the files that would be sent')
    command.set_defaults(function=_publish)

    command = commands.add_parser(
        'export', help='write a model to a file for deployment, norms fused, for batches and images of any size',
        description="ONNX needs pip install '.[export]', pt2 (AOTInductor) a C++ compiler.")
    command.add_argument('model', metavar='MODEL', help="model, as timm names it, 'gunn15' say")
    command.add_argument('--format', required=True, choices=FORMATS)
    command.add_argument('--out', required=True, metavar='FILE', help='file to write')
    command.add_argument('--checkpoint', metavar='FILE', help='export these, not the published weights')
    command.add_argument('--num-classes', type=int, metavar='N', help="classes of the checkpoint, if not the model's")
    command.add_argument('--check', action='store_true', help='run the file in its own runtime and compare')
    command.set_defaults(function=_export)

    command = commands.add_parser(
        'run', help="run one of timm's scripts, train.py say, with the models registered",
        description="Also distributed: torchrun --nproc_per_node 2 -m gunn_timm run train.py ...")
    command.add_argument('script', metavar='SCRIPT', help='path of the script')
    command.add_argument('args', nargs=argparse.REMAINDER, metavar='ARGS', help='its arguments')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0, or 2 where the input is at fault, after one line on stderr. `run` exits as its script does.
    """
    args = _parser().parse_args(argv)
    try:
        if args.command != 'run':
            args.function(args)
        elif not Path(args.script).is_file():
            raise FileNotFoundError(f"No script '{args.script}'; give the path of a Python file, timm's train.py say.")
    except (OSError, RuntimeError, ValueError) as e:
        print(f'error: {" ".join(str(e).split())}', file=sys.stderr)
        return 2
    if args.command == 'run':
        # Not inside the try: a script's own errors are its own.
        run_script(args.script, args.args)
    return 0
