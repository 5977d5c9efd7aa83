"""README and docs/: what they show runs, what they name exists, and the API page is that of the code."""
import importlib.util
import inspect
import pkgutil
import re
import shlex

import pytest
import timm
from conftest import ROOT

import gunn_timm
from gunn_timm.cli import _parser

PAGES = [
    'README.md',
    *(f'docs/{path.name}' for path in sorted((ROOT / 'docs').glob('*.md')) if path.name != 'results.template.md')]
PRINTED = {
    'README.md': ['cat', '[400, 800, 1600, 2000] [4, 8, 16, 32]', 'torch.Size([1, 360])'],
    'docs/architecture.md': ['torch.Size([1, 10])'],
    'docs/layer.md': [],
    'docs/usage.md': ['[400, 800, 1600, 2000] [4, 8, 16, 16]'],
}


def read(page):
    return (ROOT / page).read_text()


def blocks(page, language):
    return re.findall(rf'```{language}\n(.*?)```', read(page), re.DOTALL)


@pytest.mark.parametrize('page', [page for page in PAGES if page != 'docs/api.md'])
def test_python_blocks_run(page, run):
    code = blocks(page, 'python')
    assert bool(code) == (page in PRINTED)
    result = run('-c', '\n'.join(code))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[:len(PRINTED.get(page, ()))] == PRINTED.get(page, [])


@pytest.mark.parametrize('page', PAGES)
def test_linked_files_exist(page):
    for target in re.findall(r'\]\((?!http|#)([^)#]+)', read(page)):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize('page', PAGES)
def test_links_to_headings_lead_there(page):
    for target, anchor in re.findall(r'\]\((?!http)([^)#]*)#([^)]+)\)', read(page)):
        if page == 'docs/api.md':  # it links types to the names of their packages, as its generator does
            continue
        headings = re.findall(r'^#+ (.+)$', ((ROOT / page).parent / target).read_text(), re.MULTILINE)
        assert anchor in [re.sub(r'[^\w -]', '', h).lower().replace(' ', '-') for h in headings], anchor


@pytest.mark.parametrize('page', PAGES)
def test_bash_blocks_name_commands_that_exist(page):
    commands = '\n'.join(blocks(page, 'bash'))
    makefile = read('Makefile')
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


def public_names():
    for module in pkgutil.iter_modules(gunn_timm.__path__):
        loaded = importlib.import_module(f'gunn_timm.{module.name}') if not module.name.startswith('_') else None
        for name in getattr(loaded, '__all__', ()):
            member = getattr(loaded, name)
            # timm adds the entry points to __all__; the page has the class that they make.
            if callable(member) and not timm.is_model(name):
                yield f'{loaded.__name__}.{name}', member


def test_api_page_is_that_of_the_code():
    """Not compared as a whole: another version of its generator may lay it out in another way."""
    page = read('docs/api.md')
    names = dict(public_names())
    assert 'gunn_timm.gunn.Gunn' in names
    for name, member in names.items():
        assert f'`{name}`' in page, f'{name}: run `make docs`'
        for parameter in inspect.signature(member).parameters:
            assert parameter in page, f'{name}, {parameter}: run `make docs`'
        assert inspect.getdoc(member).split('\n')[0] in page, f'{name}: run `make docs`'
    for name in re.findall(r'^#+ `(gunn_timm\.\w+\.\w+)`$', page, re.MULTILINE):
        assert name in names, f'{name} is gone: run `make docs`'
