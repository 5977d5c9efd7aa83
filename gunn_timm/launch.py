"""Run a script of timm's, unchanged, with the models of this package registered."""
import functools
import os
import runpy
import sys
from pathlib import Path
from typing import Any, Sequence

import timm

from ._timm import ClassificationTask

__all__ = ['run_script']

_WITHOUT_CURRENT_FOLDER = 'import sys; del sys.path[0]; from gunn_timm.cli import main; sys.exit(main(sys.argv[1:]))'


def _allow_distributed_on_cpu() -> None:
    """Let timm's train.py run distributed without a GPU: it names a device to DDP, which takes none for the CPU."""
    prepare = ClassificationTask.prepare_distributed

    @functools.wraps(prepare)
    def prepare_distributed(self: ClassificationTask, device_ids: Any = None, **kwargs: Any) -> ClassificationTask:
        if all(p.device.type == 'cpu' for p in self.parameters()):
            device_ids = None
        return prepare(self, device_ids=device_ids, **kwargs)

    ClassificationTask.prepare_distributed = prepare_distributed


def run_script(script: str, args: Sequence[str]) -> None:
    """Run a Python script as `python SCRIPT ARGS...` would, in this process, where the models are registered already.

    The script's folder goes last on the module path, not first: it may be a checkout of timm, whose `timm` folder must
    not come before the installed one. Where `python -m` has put it first, being called in that folder, Python is
    started again without it. What the script raises, its SystemExit included, passes through.

    Args:
        script: Path of the script.
        args: Its arguments.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(script)
    if not path.is_file():
        raise FileNotFoundError(f"No script '{script}'; give the path of a Python file, such as timm's train.py.")
    folder = str(path.resolve().parent)
    if sys.path[0] == folder and os.path.dirname(os.path.dirname(os.path.abspath(timm.__file__))) == folder:
        os.execv(sys.executable, [sys.executable, '-c', _WITHOUT_CURRENT_FOLDER, 'run', script, *args])
    _allow_distributed_on_cpu()
    sys.argv = [script, *args]
    sys.path.append(folder)
    runpy.run_path(str(path), run_name='__main__')
