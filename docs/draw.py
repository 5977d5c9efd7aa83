#!/usr/bin/env python3
"""Draw layer.png: which values each segment of a layer is computed from, without and with the order."""
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

_SEGMENTS = 6
_OLD, _NEW, _WRITTEN = '#c6d4e1', '#2f6c9f', '#d1603d'


def main() -> None:
    """Write layer.png beside this file."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout='constrained')
    for panel, ordered in zip(panels, (False, True)):
        for step in range(_SEGMENTS):
            for segment in range(_SEGMENTS):
                colour = _NEW if ordered and segment < step else _OLD
                panel.add_patch(pyplot.Rectangle((segment, -step), 0.9, -0.62, color=colour))
            panel.add_patch(pyplot.Rectangle((step, -step - 0.64), 0.9, -0.16, color=_WRITTEN))
        panel.set(
            title='ordered (GUNN)' if ordered else 'unordered (SUNN)', xlim=(-0.1, _SEGMENTS), ylim=(-_SEGMENTS, 0.1),
            xlabel='segment of channels', xticks=[i + 0.45 for i in range(_SEGMENTS)],
            xticklabels=range(1, _SEGMENTS + 1))
        panel.set_frame_on(False)
        panel.tick_params(length=0)
    panels[0].set(
        ylabel='update', yticks=[-i - 0.31 for i in range(_SEGMENTS)], yticklabels=range(1, _SEGMENTS + 1))
    figure.legend(
        handles=[Patch(color=_OLD, label='read: old value'), Patch(color=_NEW, label='read: new value'),
                 Patch(color=_WRITTEN, label='written')],
        loc='outside lower center', ncols=3, frameon=False)
    figure.savefig(Path(__file__).with_name('layer.png'), dpi=120)


if __name__ == '__main__':
    main()
