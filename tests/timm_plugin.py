"""pytest plugin that puts this package's models before timm's own tests.

    PYTHONPATH=tests pytest -p timm_plugin TIMM_SOURCE/tests/test_models.py -k gunn
"""
from timm.models import _registry

import gunn_timm  # noqa: F401

# Some of those tests choose models by the file that defines them, from a fixed list of timm's.
_registry._module_to_models['resnet'] |= _registry._module_to_models['gunn']
