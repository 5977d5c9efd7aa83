"""Run timm's own tests/test_models.py, unchanged, over the models of this package.

    python tests/run_timm_tests.py TIMM_SOURCE [--all]

Without --all the light models take every test, and the rest the one that needs no values.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

CONFIGS = 'test_model_default_cfgs'
LIGHT = 'gunn15 or sunn15'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('source', type=Path, help="timm's source release, unpacked")
    parser.add_argument('--all', action='store_true', help='every test over every model')
    args = parser.parse_args()
    here = Path(__file__).parent
    selection = 'gunn or sunn' if args.all else f'(gunn or sunn) and ({CONFIGS}) or {LIGHT}'
    command = [
        sys.executable, '-m', 'pytest', '-q', '-n', 'auto', '-p', 'timm_plugin', '-p', 'no:cacheprovider',
        '-W', 'ignore', '--durations', '10', 'tests/test_models.py', '-k', selection,
    ]
    path = os.pathsep.join(filter(None, [str(here), os.environ.get('PYTHONPATH')]))
    return subprocess.run(command, cwd=args.source, env=dict(os.environ, PYTHONPATH=path)).returncode


if __name__ == '__main__':
    sys.exit(main())
