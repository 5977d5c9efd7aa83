"""The names used from timm that are not part of what it documents, kept in one place for the day one of them moves."""
from timm.models._features import feature_take_indices as feature_take_indices
from timm.task import ClassificationTask as ClassificationTask
