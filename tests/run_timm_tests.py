"""Run timm's own tests/test_models.py, unchanged, over the models of this package.

    python tests/run_timm_tests.py TIMM_SOURCE
"""
import os
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Run them from the folder TIMM_SOURCE, timm's source release unpacked, and return pytest's exit code."""
    source = Path(sys.argv[1])
    command = [
        sys.executable, '-m', 'pytest', '-q', '-n', 'auto', '-p', 'timm_plugin', '-p', 'no:cacheprovider',
        '-W', 'ignore', 'tests/test_models.py', '-k', 'gunn or sunn',
    ]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get('PYTHONPATH')]))
    return subprocess.run(command, cwd=source, env=dict(os.environ, PYTHONPATH=path)).returncode


if __name__ == '__main__':
    sys.exit(main())
