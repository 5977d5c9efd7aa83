"""Run a script of timm's, unchanged, with the models of this package registered and its training loader."""
import functools
import os
import runpy
import sys
from pathlib import Path
from typing import Any, Sequence

import timm
import timm.data
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .loader import create_loader

__all__ = ['run_script']

_WITHOUT_CURRENT_FOLDER = (
    'import sys; del sys.path[0]; from gunn_timm.commands.cli import main; sys.exit(main(sys.argv[1:]))')


def _allow_distributed_on_cpu() -> None:
    """Let timm's train.py run distributed without a GPU: it names a device to DDP, which takes none for the CPU."""
    init = DistributedDataParallel.__init__

    @functools.wraps(init)
    def without_cpu_ids(self: Any, module: nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
        if all(p.device.type == 'cpu' for p in module.parameters()):
            device_ids = None
        init(self, module, device_ids=device_ids, **kwargs)

    DistributedDataParallel.__init__ = without_cpu_ids


def run_script(script: str, args: Sequence[str]) -> None:
    """Run a Python script as `python SCRIPT ARGS...` would, in this process, where the models are registered already.

    The script's folder goes last on the module path, not first: it may be a checkout of timm, whose `timm` folder must
    not come before the installed one. Where timm was imported from the current folder, which `python -m` puts first,
    Python is started again without that. What the script raises, its SystemExit included, passes through.

    Args:
        script: Path of the script.
        args: Its arguments.
    """
    timm_folder = os.path.dirname(os.path.dirname(os.path.abspath(timm.__file__)))
    # After that start argv[0] is '-c', which keeps a folder that is on the path for other reasons from looping.
    if timm_folder == sys.path[0] == os.getcwd() and sys.argv[0] != '-c':
        os.execv(sys.executable, [sys.executable, '-c', _WITHOUT_CURRENT_FOLDER, 'run', script, *args])
    _allow_distributed_on_cpu()
    timm.data.create_loader = create_loader
    sys.argv = [script, *args]
    sys.path.append(str(Path(script).resolve().parent))
    runpy.run_path(script, run_name='__main__')
