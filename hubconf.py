"""Entry points for torch.hub: `torch.hub.load(REPO, 'gunn15', pretrained=True)`."""
import importlib.util as _util

dependencies = ['torch', 'torchvision', 'timm', 'huggingface_hub', 'safetensors', 'yaml']

# torch.hub looks at `dependencies` only after this file was imported, too late to say what is missing.
_missing = [name for name in dependencies if _util.find_spec(name) is None]
if _missing:
    raise RuntimeError(f"gunn_timm needs packages that are not installed: {', '.join(_missing)}.")

from gunn_timm.gunn import (  # noqa: E402, F401
    gunn15,
    gunn15_nores,
    gunn18,
    gunn24,
    sunn15,
    sunn18,
    sunn24,
    wide_gunn18,
)
