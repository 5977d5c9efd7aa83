"""What experiments that compare trained networks show: errors with their spread, and curves against the epoch."""
import statistics
from typing import Dict, List, NamedTuple, Sequence

from matplotlib.figure import Figure


class Curve(NamedTuple):
    """One run, a value an epoch.

    Attributes:
        epochs: Epochs, counted from 1.
        errors: Test errors in %.
        losses: Training losses.
    """
    epochs: List[float]
    errors: List[float]
    losses: List[float]


def spread(values: Sequence[float]) -> str:
    """Write the mean of values, and their standard deviation if there is more than one."""
    mean = statistics.mean(values)
    return f'{mean:.2f}' + (f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else '')


def draw_curves(runs: Dict[str, List[Curve]]) -> Figure:
    """Draw the test error and the training loss against the epoch, as Figure 3 of the paper does; a line a run.

    Args:
        runs: Runs of each network, by what the legend calls it.
    """
    figure = Figure(figsize=(10, 4), layout='constrained')
    axes = figure.subplots(1, 2)
    for number, (network, curves) in enumerate(runs.items()):
        for index, curve in enumerate(curves):
            for axis, values in zip(axes, (curve.errors, curve.losses)):
                axis.plot(curve.epochs, values, '.-', color=f'C{number}', label=network if index == 0 else None)
    axes[0].set_ylabel('test error, %')
    axes[1].set_ylabel('training loss')
    for axis in axes:
        axis.set_xlabel('epoch')
    axes[0].legend()
    return figure
