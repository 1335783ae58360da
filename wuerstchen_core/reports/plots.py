"""Plots as PNG files, drawn by matplotlib."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..util.atomic import replacing
from ..util.errors import WuerstchenError, readable


@contextmanager
def plotted(
    path: Path, panels: int = 1, width: float = 6.0, height: float = 4.0, columns: int | None = None
) -> Iterator[list[Any]]:
    """`panels` axes of matplotlib side by side to draw on; the picture is at `path` in the end, whole or not at all.

    Args:
        path: a PNG file.
        columns: panels in a row, by default all of them.
        width, height: of one panel, in inches of 120 pixels.

    Raises:
        WuerstchenError: matplotlib is missing, or the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise WuerstchenError(
            f"plots need matplotlib, which can't be imported ({readable(error)}): pip install -e '.[measure]'"
        ) from error
    columns = min(panels, columns or panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=120)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in axes[panels:]:
        spare.remove()
    yield list(axes[:panels])
    try:
        with replacing(path) as partial:
            figure.savefig(partial, format="png")
    except OSError as error:
        raise WuerstchenError(f"{path}: could not be written ({error.strerror})") from error
