import re

from conftest import ROOT

README = (ROOT / 'README.md').read_text()


def test_python_blocks_run(run):
    blocks = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    assert len(blocks) == 4
    result = run('-c', '\n'.join(blocks))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ['cat', '[400, 800, 1600, 2000] [4, 8, 16, 32]', 'torch.Size([1, 360])']


def test_linked_files_exist():
    for target in re.findall(r'\]\((?!http)([^)#]+)\)', README):
        assert (ROOT / target).exists(), target


def test_bash_blocks_name_commands_that_exist():
    commands = '\n'.join(re.findall(r'```bash\n(.*?)```', README, re.DOTALL))
    makefile = (ROOT / 'Makefile').read_text()
    for target in re.findall(r'^make (\S+)', commands, re.MULTILINE):
        assert re.search(rf'^{target}:', makefile, re.MULTILINE)
    for file in re.findall(r'(?:recipes|assets)/\S+', commands):
        assert (ROOT / file).is_file(), file
