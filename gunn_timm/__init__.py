"""GUNN, Gradually Updated Neural Networks, for timm: `import gunn_timm` registers the models."""
from . import gunn as _gunn  # noqa: F401

__version__ = '0.1.0'
