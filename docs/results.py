#!/usr/bin/env python3
"""Write results.md: what the paper reports beside what was measured, from the records, logits and results kept here."""
import json
from pathlib import Path
from typing import Any, Dict, Sequence

from safetensors.torch import load_file

from gunn_timm.zoo.records import model_infos, weights_records

_SINGULARITIES = Path(__file__).parents[1] / 'experiments' / 'results' / 'singularities' / 'results.json'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (header, ['---'] * len(header), *rows))


def _paper_recipe(name: str) -> str:
    """Name the recipe that trains a tag as the paper does; the baselines go by that of the network they belong to."""
    model, tag = name.replace('sunn', 'gunn').replace('_nores', '').split('.')
    return f'recipes/{model}_{tag}_paper.yaml'


def _link(path: str) -> str:
    return f'[{Path(path).name}](../{path})'


def _networks() -> str:
    records, rows = weights_records(), []
    for name, info in model_infos().items():
        record = records.get(name)
        if record is None and info.paper_top1_err is None:
            continue
        paper = '-' if info.paper_top1_err is None else f'{info.paper_top1_err:.2f}'
        if record is None:
            rows.append([name, info.dataset, paper, 'not run', '-', _link(_paper_recipe(name))])
            continue
        ours = f"[{100 - record.metrics['top1']:.2f}](../weights/{name}.md), {record.training['epochs']} epochs"
        rows.append([name, info.dataset, paper, ours, record.how_measured, _link(record.training['recipe'])])
    return _table(['model', 'data', 'paper', 'ours', 'how measured', 'recipe'], rows)


def _ordering() -> Dict[str, str]:
    """Compare gunn15 with sunn15 on every test image."""
    records = [weights_records()[name] for name in ('gunn15.cifar100', 'sunn15.cifar100')]
    logits = [load_file(record.path.with_name(record.logits_file)) for record in records]
    gunn, sunn = (kept['logits'].argmax(1) == kept['targets'] for kept in logits)
    count, only_gunn, only_sunn = len(gunn), int((gunn & ~sunn).sum()), int((sunn & ~gunn).sum())
    rows = [['sunn15 right', f'{int((gunn & sunn).sum())}', f'{only_sunn}'],
            ['sunn15 wrong', f'{only_gunn}', f'{int((~gunn & ~sunn).sum())}']]
    papers = [model_infos()[record.name].paper_top1_err for record in records]
    return dict(
        images=f'{count:,}', ordering=_table(['', 'gunn15 right', 'gunn15 wrong'], rows),
        difference=f'{100 * (only_gunn - only_sunn) / count:.2f}',
        deviation=f'{100 * (only_gunn + only_sunn) ** 0.5 / count:.2f}', paper=f'{papers[1] - papers[0]:.2f}')


def _parting(results: Dict[str, Any]) -> str:
    parts = ('linear', 'segments', 'channels')
    rows = [[network, *(f'{results[part][network][-1]:.2g}' for part in parts)] for network in results['linear']]
    return _table(['network', 'two linear neurons', 'two segments of a layer', 'two channels of a segment'], rows)


def page() -> str:
    """Return the page, as Markdown."""
    template = Path(__file__).with_name('results.template.md').read_text(encoding='utf-8')
    singularities = json.loads(_SINGULARITIES.read_text(encoding='utf-8'))
    return template.format(
        networks=_networks(), **_ordering(), parting=_parting(singularities), parting_what=singularities['what'])


def main() -> None:
    """Write results.md beside this file."""
    Path(__file__).with_name('results.md').write_text(page(), encoding='utf-8')


if __name__ == '__main__':
    main()
