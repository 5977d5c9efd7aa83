"""What `python -m gunn_timm` does: predict, list, summary, export, card, publish, run."""
