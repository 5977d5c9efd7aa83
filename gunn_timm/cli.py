import argparse
from .launch import run_script
def main(argv=None):
    p = argparse.ArgumentParser(prog='python -m gunn_timm')
    sub = p.add_subparsers(dest='command', required=True)
    r = sub.add_parser('run'); r.add_argument('script'); r.add_argument('args', nargs=argparse.REMAINDER)
    a = p.parse_args(argv)
    run_script(a.script, a.args)
    return 0
