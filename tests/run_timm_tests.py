"""Run timm's own tests/test_models.py, unchanged, over the models of this package.

    python tests/run_timm_tests.py TIMM_SOURCE [-k NAMES]
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Run them from the folder TIMM_SOURCE, timm's source release unpacked, and return pytest's exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument('source', type=Path)
    parser.add_argument('-k', default='gunn or sunn', help="names of the tests, as pytest's -k takes them")
    args = parser.parse_args()
    command = [
        sys.executable, '-m', 'pytest', '-q', '-n', 'auto', '-p', 'timm_plugin', '-p', 'no:cacheprovider',
        '-W', 'ignore', 'tests/test_models.py', '-k', args.k,
    ]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get('PYTHONPATH')]))
    return subprocess.run(command, cwd=args.source, env=dict(os.environ, PYTHONPATH=path)).returncode


if __name__ == '__main__':
    sys.exit(main())
