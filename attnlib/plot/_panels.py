"""Panels of a plot, with their labels and their colour scale."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

CELL_INCHES = 0.24
MAX_LABELS = 80  # more tick labels are not legible
MAX_PANELS_IN_A_ROW = 4


def matplotlib(module: str) -> Any:
    """A module of matplotlib; without matplotlib, ImportError names the extra to install."""
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError('attnlib.plot needs matplotlib: pip install "attnlib[notebooks]"') from error


def check_weights(weights: ArrayLike, *, ranks: tuple[int, ...], expected: str) -> np.ndarray:
    """The weights in float32 (matplotlib cannot draw bfloat16), after a check of their shape."""
    grid = np.asarray(weights).astype(np.float32)
    if grid.ndim not in ranks or 0 in grid.shape:
        raise ValueError(f"weights: expected {expected}; got shape {grid.shape}. For one example, pass weights[0]")
    return grid


def check_tokens(name: str, tokens: Sequence[str] | None, expected: int) -> None:
    if tokens is not None and len(tokens) != expected:
        raise ValueError(f"{name}: expected {expected} tokens to match the weights, got {len(tokens)}")


def make_panels(ax: Any, count: int, *, size: tuple[float, float]) -> np.ndarray:
    """`count` Axes: those in `ax`, or new Axes of about `size` inches."""
    if ax is not None:
        axes = np.ravel(np.asarray(ax, dtype=object))
        if len(axes) != count:
            raise ValueError(f"ax: expected {count} Axes, one for each panel, got {len(axes)}")
        return axes
    rows = -(-count // MAX_PANELS_IN_A_ROW)
    columns = -(-count // rows)  # five panels make rows of three and two
    figure, axes = matplotlib("pyplot").subplots(
        rows, columns, figsize=(columns * size[0] + 1, rows * size[1] + 0.4), layout="constrained", squeeze=False
    )
    for unused in axes.flat[count:]:
        figure.delaxes(unused)
    return axes.ravel()[:count]


def panel_inches(cells: int, panels: int, has_tokens: bool = True) -> float:
    """The extent of a panel with this number of rows or columns, including its labels."""
    return float(np.clip(CELL_INCHES * cells, 1.5, 10 if panels == 1 else 5 if has_tokens else 2.4)) + 0.9


def color_scale(grid: np.ndarray) -> dict[str, Any]:
    """The colour scale of all panels: from zero to the largest weight, or to 1 if all weights are zero."""
    return {"vmin": 0.0, "vmax": float(np.nanmax(grid)) or 1.0, "interpolation": "nearest"}


def label_axis(axis: Any, tokens: Sequence[str] | None, name: str) -> None:
    """Labels an axis with its name and with its tokens, if they are legible; without tokens, with positions."""
    axis.set_label_text(name)
    if tokens is None:
        axis.set_major_locator(matplotlib("ticker").MaxNLocator(integer=True))
        return
    if len(tokens) > MAX_LABELS:
        return
    texts = [re.sub(r"\s", "\N{OPEN BOX}", str(token)) for token in tokens]  # a space would be an invisible label
    is_vertical = axis.axis_name == "x" and max(map(len, texts)) > 2
    # A dollar sign in a token must not start a formula.
    axis.set_ticks(range(len(texts)), texts, rotation=90 if is_vertical else 0, parse_math=False)
    size = "medium" if len(texts) <= 20 else "small" if len(texts) <= 40 else "xx-small"
    axis.set_tick_params(length=0, labelsize=size)


def finish(axes: np.ndarray, drawn: AxesImage, *, panel_name: str | None, title: str | None) -> Axes | np.ndarray:
    """Adds the colour bar, the names of the panels and the title, and returns the Axes."""
    figure = axes[0].figure
    bar = figure.colorbar(drawn, ax=list(axes), label="attention weight", fraction=0.05, pad=0.02)
    bar.ax.set_facecolor("white")  # small weights of an overlay are transparent; a dark style would show through
    if panel_name is None:
        axes[0].set_title(title or "")
        return axes[0]
    for number, one_ax in enumerate(axes):
        one_ax.set_title(f"{panel_name} {number}", fontsize="medium")
    if title is not None:
        figure.suptitle(title)
    return axes
