"""README, docs/ and the folders' READMEs: what they show runs, and what they name exists."""
import importlib.util
import re
import shlex

import pytest
from conftest import ROOT

from gunn_timm.commands.cli import _parser

PAGES = [
    'README.md', *(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.md') if 'template' not in path.name),
    *(f'{folder}/README.md' for folder in ('benchmarks', 'experiments', 'recipes', 'weights'))]
# What the pages with Python code print first.
PRINTED = {
    'README.md': ['cat', '[400, 800, 1600, 2000] [4, 8, 16, 32]'],
    'docs/architecture.md': ['torch.Size([1, 10])'],
    'docs/layer.md': [],
    'docs/usage.md': ['[400, 800, 1600, 2000] [4, 8, 16, 16]'],
}


def read(page):
    return (ROOT / page).read_text()


def blocks(page, language):
    return re.findall(rf'```{language}\n(.*?)```', read(page), re.DOTALL)


@pytest.mark.parametrize('page', PRINTED)
def test_python_blocks_run(page, run):
    result = run('-c', '\n'.join(blocks(page, 'python')))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[:len(PRINTED[page])] == PRINTED[page]


@pytest.mark.parametrize('page', PAGES)
def test_what_is_named_exists(page):
    assert bool(blocks(page, 'python')) == (page in PRINTED)
    for target, anchor in re.findall(r'\]\((?!http)([^)#]*)#?([^)]*)\)', read(page)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        headings = re.findall(r'^#+ (.+)$', path.read_text(), re.MULTILINE) if anchor else ()
        assert anchor in ['', *(re.sub(r'[^\w -]', '', h).lower().replace(' ', '-') for h in headings)], anchor
    commands, makefile = '\n'.join(blocks(page, 'bash')).replace('\\\n', ''), read('Makefile')
    for target in re.findall(r'^make (\S+)', commands, re.MULTILINE):
        assert re.search(rf'^{target}:', makefile, re.MULTILINE)
    for file in re.findall(r'(?:recipes|assets|examples|experiments|benchmarks)/\S+', commands):
        assert (ROOT / file).is_file(), file
    for line in re.findall(r'^python -m gunn_timm (.+?)(?: +#.*)?$', commands, re.MULTILINE):
        _parser().parse_args(shlex.split(line))


def test_results_page_is_that_of_the_records():
    spec = importlib.util.spec_from_file_location('results', ROOT / 'docs' / 'results.py')
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    assert read('docs/results.md') == results.page(), 'run `make docs`'
