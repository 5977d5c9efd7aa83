"""The command line: `python -m gunn_timm`."""
import argparse
import io
import json
import sys
from pathlib import Path
from typing import Callable, Optional, Sequence

import timm

from ..zoo.files import load_checkpoint
from ..zoo.hub import model_card, publish
from ..zoo.records import find_record, model_infos, weights_records
from .export import FORMATS, check_export, export_model
from .predict import predict, read_image
from .run import run_script
from .summary import format_summary, summarize

__all__ = ['main']


def _predict(args: argparse.Namespace) -> None:
    images = [read_image(path) for path in args.images]
    results = predict(timm.create_model(args.model, pretrained=True).eval(), images, args.topk)
    if args.json:
        print(json.dumps([dict(image=path, predictions=top) for path, top in zip(args.images, results)], indent=2))
        return
    for path, top in zip(args.images, results):
        print(path)
        for entry in top:
            print(f"  {entry['probability']:6.1%}  {entry['label']}")


def _list(args: argparse.Namespace) -> None:
    rows = [['model', 'params (M)', 'GMACs', 'input', 'dataset', 'paper top-1 err', 'our top-1 err']]
    for name, info in model_infos().items():
        record = weights_records().get(name)
        rows.append([
            name, f'{info.parameters / 1e6:.2f}', f'{info.gmacs:.2f}', '{1}x{2}'.format(*info.input_size), info.dataset,
            '-' if info.paper_top1_err is None else f'{info.paper_top1_err:.2f}',
            '-' if record is None else f"{100 - record.metrics['top1']:.2f}"])
    rows.insert(1, ['---'] * len(rows[0]))
    print('\n'.join('| ' + ' | '.join(row) + ' |' for row in rows))


def _summary(args: argparse.Namespace) -> None:
    print(format_summary(summarize(timm.create_model(args.model, device='meta'), args.image_size)))


def _card(args: argparse.Namespace) -> None:
    print(model_card(find_record(args.name)), end='')


def _publish(args: argparse.Namespace) -> None:
    if args.all == bool(args.name) or (args.all and '{name}' not in args.repo_id):
        raise ValueError("Give either the name of a weight, or --all and a repository like 'ORG/{name}'.")
    for name in list(weights_records()) if args.all else [args.name]:
        repo_id = args.repo_id.replace('{name}', name)
        done = publish(name, repo_id, args.revision, args.private, args.force, args.dry_run)
        for path, size in done.changed.items():
            print(f'  {path}: ' + ('removed' if size is None else f'{size:,} bytes'))
        if args.dry_run:
            print(f'{name}: these files would be sent to {repo_id}; nothing was')
            continue
        print(f"{name}: {'published in' if done.changed else 'nothing new for'} {repo_id}, commit {done.commit}")
        print(f'its record says so with\nhub: {{repo_id: {repo_id}, revision: {done.commit}}}')


def _export(args: argparse.Namespace) -> None:
    if args.num_classes is not None and not args.checkpoint:
        raise ValueError('--num-classes goes with --checkpoint.')
    model = timm.create_model(args.model, pretrained=not args.checkpoint, num_classes=args.num_classes)
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint)
        model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': None}  # of the classes of other weights
    export_model(model, args.out, args.format)
    print(f'{args.out}: {args.model} as {args.format}, {Path(args.out).stat().st_size:,} bytes')
    if args.check:
        print(f'largest relative difference from eager: {check_export(model, args.out, args.format):.1e}')


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m gunn_timm', description='GUNN models for timm.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(name: str, help: str) -> Callable[..., argparse.Action]:
        return commands.add_parser(name, help=help, description=help).add_argument

    add = command('predict', 'name what is in pictures')
    add('images', nargs='+', metavar='IMAGE', help='image files')
    add('--model', default='gunn15', help="model with weights, as timm names it (default: 'gunn15')")
    add('--topk', type=int, metavar='K', help='classes to print (default: 5, or all if there are fewer)')
    add('--json', action='store_true', help='print JSON')

    command('list', 'list the models, and the errors of those with weights')

    add = command('summary', "print each part's shape, parameters, MACs and depth")
    add('model', metavar='MODEL', help="model, for example 'gunn18'")
    add('--image-size', type=int, nargs=2, metavar=('H', 'W'), help="size of the images (default: the model's own)")

    add = command('card', 'print the model card of published weights, from their record')
    add('name', metavar='NAME', help="weight, for example 'gunn15.cifar10'")

    add = command('publish', 'publish weights on the Hugging Face Hub, by the token of `hf auth login` or HF_TOKEN')
    add('name', nargs='?', metavar='NAME', help="weight to publish, for example 'gunn15.cifar10'")
    add('--all', action='store_true', help='publish all weights')
    add('--repo-id', required=True, metavar='ORG/NAME', help="repository; '{name}' in it is replaced")
    add('--revision', metavar='BRANCH', help='branch to commit to (default: main)')
    add('--private', action='store_true', help='make a new repository private')
    add('--force', action='store_true', help='replace other content, remove pickled weights')
    add('--dry-run', action='store_true', help='only name the files that would be sent')

    add = command('export', "write a model for deployment (onnx needs pip install '.[export]', pt2 a C++ compiler)")
    add('model', metavar='MODEL', help="model, as timm names it, for example 'gunn15'")
    add('--format', required=True, choices=FORMATS)
    add('--out', required=True, metavar='FILE', help='file to write')
    add('--checkpoint', metavar='FILE', help='weights to export, not the published ones')
    add('--num-classes', type=int, metavar='N', help="classes of the checkpoint, if not the model's")
    add('--check', action='store_true', help='run the file in its own runtime and compare')

    add = command('run', "run a script of timm's, for example train.py, with the models registered")
    add('script', metavar='SCRIPT', help='path of the script')
    add('args', nargs=argparse.REMAINDER, metavar='ARGS', help='its arguments')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; those of the process if None.

    Returns:
        Exit code: 0, or 2 where the input is at fault, after one line on stderr. `run` exits as its script does.
    """
    functions = dict(predict=_predict, list=_list, summary=_summary, card=_card, publish=_publish, export=_export)
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not cost the result
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        if args.command != 'run':
            functions[args.command](args)
        elif not Path(args.script).is_file():
            raise FileNotFoundError(f"No script '{args.script}'; give a path, such as that of timm's train.py.")
    except (ImportError, OSError, RuntimeError, ValueError) as e:
        print(f'error: {" ".join(str(e).split())}', file=sys.stderr)
        return 2
    if args.command == 'run':
        run_script(args.script, args.args)  # not inside the try: a script's own errors are its own
    return 0
