"""The private names used from timm, kept in one place for the day one of them moves; and its register_model."""
import sys
from typing import Any, Callable

import timm.models
from timm.data.dataset_factory import _search_split as search_split  # noqa: F401
from timm.models._features import feature_take_indices  # noqa: F401
from timm.models._hub import save_config_for_hf  # noqa: F401


def register_model(function: Callable[..., Any]) -> Callable[..., Any]:
    """timm's, but for the copy of a module that torch.package takes along: it has no name by which timm finds it."""
    return timm.models.register_model(function) if function.__module__ in sys.modules else function
