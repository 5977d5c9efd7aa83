"""The private names used from timm, kept in one place for the day one of them moves."""
from timm.data.dataset_factory import _search_split as search_split  # noqa: F401
from timm.models._features import feature_take_indices  # noqa: F401
from timm.models._hub import download_cached_file, save_config_for_hf  # noqa: F401
