#!/usr/bin/env python3
"""Write results.md: what the paper reports beside what was measured, from the records and the experiments' files."""
import json
from pathlib import Path
from typing import Any, Sequence

from gunn_timm.zoo.records import model_infos, weights_records

_ROOT = Path(__file__).parents[1]
_RESULTS = _ROOT / 'experiments' / 'results'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (header, ['---'] * len(header), *rows))


def _read(experiment: str) -> Any:
    return json.loads((_RESULTS / experiment / 'results.json').read_text(encoding='utf-8'))


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


def _written(experiment: str) -> str:
    """Return what an experiment wrote: what was run, and its tables."""
    return (_RESULTS / experiment / 'table.md').read_text(encoding='utf-8').strip()


def _snapshots() -> str:
    rows = [
        [str(i), f"{100 - row['top1']:.2f}", f"{100 - row['ensemble_top1']:.2f}"]
        for i, row in enumerate(_read('snapshots'), start=1)]
    return _table(['snapshot', 'its error', 'error of the average up to it'], rows)


def _parting() -> str:
    results = _read('singularities')
    parts = ('linear', 'segments', 'channels')
    rows = [[network, *(f'{results[part][network][-1]:.2g}' for part in parts)] for network in results['linear']]
    return _table(['network', 'two linear neurons', 'two segments of a layer', 'two channels of a segment'], rows)


def _alikeness() -> str:
    rows = [[checkpoint.partition('=')[0],
             *(' / '.join(f'{stage[measure]:.3f}' for stage in stages)
               for measure in ('mean_correlation', 'above_0_9', 'effective_rank'))]
            for checkpoint, stages in _read('singularities')['trained'].items()]
    return _table(['network', 'mean absolute correlation of two channels', 'share of pairs above 0.9',
                   'effective rank, as a share of the channels'], rows)


def page() -> str:
    """Return the page, as Markdown."""
    template = Path(__file__).with_name('results.template.md').read_text(encoding='utf-8')
    return template.format(
        networks=_networks(), ablation=_written('ablation'), snapshots=_snapshots(), parting=_parting(),
        parting_what=_read('singularities')['what'], alikeness=_alikeness(), conversion=_written('conversion'))


def main() -> None:
    """Write results.md beside this file."""
    Path(__file__).with_name('results.md').write_text(page(), encoding='utf-8')


if __name__ == '__main__':
    main()
