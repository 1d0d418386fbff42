"""Pictures of attention: weights between tokens, weights over an image, and masks.

matplotlib is imported when a picture is drawn, never before, so that attnlib itself does not need it. Every function
draws into the Axes it is given or into a new pyplot figure, and returns the Axes.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlib import _checks
from attnlib._tiles import EMPTY, Ranges

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

# One hue from light to dark: the order survives colour blindness and a grey printer, and no weight is no ink.
WEIGHT_COLORS = "Blues"
INK = "#08306b"  # the dark end of it, for masks
SKIPPED = "#d5d5d5"  # tiles that are never computed: neither ink nor paper
OVERLAY_COLOR = "#e66100"  # an orange that stays apart from every grey of an image, for every kind of colour vision
QUERY_COLOR = "#1a85ff"  # the blue that colour-blind readers tell from that orange
CELL_INCHES = 0.24
MOST_LABELS = 80  # more tick labels than this cannot be read
MOST_TILE_LABELS = 12  # beyond so many tiles round positions say more than where each begins
MOST_PANELS_IN_A_ROW = 4


def attention_map(
    weights: ArrayLike,
    query_tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
    title: str | None = None,
) -> Axes | np.ndarray:
    """Draws which keys each query attends to: a row for each query, a column for each key, dark for a large weight.

    Args:
      weights: attention weights `(T, S)`, or `(N, T, S)` for one panel for each head, all on one colour scale.
      query_tokens: T texts for the rows; default: positions.
      key_tokens: S texts for the columns; default: positions.
      ax: the Axes to draw into, or N of them for N heads; default: a new figure.
      title: a title for the Axes, or for the figure where there are heads.

    Returns:
      The Axes; an array of N Axes where there are heads.

    Raises:
      ValueError: the weights have another rank or no entries, or tokens or Axes do not match them in number.
      ImportError: matplotlib is not installed.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> axes = attention_map([[0.9, 0.1], [0.2, 0.8]], ["le", "chat"], ["the", "cat"])
      >>> axes.get_xlabel()
      'key'
    """
    grid = _weights(weights, ranks=(2, 3), wanted="(queries, keys) or (heads, queries, keys)")
    queries, keys = grid.shape[-2:]
    _check_tokens("query_tokens", query_tokens, queries)
    _check_tokens("key_tokens", key_tokens, keys)
    panels = grid.reshape(-1, queries, keys)
    axes = _panels(ax, len(panels), size=(_inches(keys, len(panels)), _inches(queries, len(panels))))
    for panel, one_ax in zip(panels, axes, strict=True):
        drawn = one_ax.imshow(panel, cmap=WEIGHT_COLORS, aspect="auto", **_scale(grid))
        _label_axis(one_ax.xaxis, key_tokens, "key")
        _label_axis(one_ax.yaxis, query_tokens, "query")
    return _finish(axes, drawn, has_heads=grid.ndim == 3, title=title)


def attention_over_image(
    image: ArrayLike,
    weights: ArrayLike,
    *,
    query: tuple[int, int] | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
    title: str | None = None,
) -> Axes | np.ndarray:
    """Draws weights over the two axes of an image on the image itself: grey pixels, orange where the attention is.

    Args:
      image: `(H, W)` in any range, or `(H, W, 3)` colours as matplotlib takes them.
      weights: weights over the image `(h, w)`, or `(N, h, w)` for one panel for each head. A grid coarser than the
        image (patches) is stretched over it. With `query`, all queries: `(qh, qw, h, w)` or `(N, qh, qw, h, w)`.
      query: row and column of the query whose weights are drawn; it is framed in blue.
      ax: the Axes to draw into, or N of them for N heads; default: a new figure.
      title: a title for the Axes, or for the figure where there are heads.

    Returns:
      The Axes; an array of N Axes where there are heads.

    Raises:
      ValueError: image or weights have another rank or no entries, the query is outside, or Axes do not match in
        number.
      ImportError: matplotlib is not installed.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> weights = np.full((2, 8, 8), 1 / 64)  # two heads
      >>> attention_over_image(np.zeros((8, 8)), weights).shape
      (2,)
    """
    picture = np.asarray(image)
    if picture.ndim not in (2, 3) or 0 in picture.shape:
        raise ValueError(f"image: expected (H, W) or (H, W, colours), got shape {picture.shape}; pick one of a batch")
    if query is None:
        wanted = "(h, w) or (heads, h, w), or those of all queries together with query=(row, column)"
        grid = _weights(weights, ranks=(2, 3), wanted=wanted)
    else:
        grid = _weights(weights, ranks=(4, 5), wanted="(qh, qw, h, w) or (heads, qh, qw, h, w), since query is given")
        query_grid = grid.shape[-4:-2]
        if not all(0 <= place < size for place, size in zip(query, query_grid, strict=True)):
            raise ValueError(f"query: expected row and column inside {query_grid}, got {query}")
        grid = grid[..., query[0], query[1], :, :]
    height, width = picture.shape[:2]
    whole = (-0.5, width - 0.5, height - 0.5, -0.5)
    panels = grid.reshape(-1, *grid.shape[-2:])
    axes = _panels(ax, len(panels), size=(3.0, 3.0 * min(height / width, 2)))
    for panel, one_ax in zip(panels, axes, strict=True):
        one_ax.imshow(picture, cmap=_image_colors(), interpolation="nearest")
        drawn = one_ax.imshow(panel, cmap=_overlay_colors(), extent=whole, **_scale(grid))
        if query is not None:
            one_ax.add_patch(_frame(query, (height / query_grid[0], width / query_grid[1])))
        one_ax.set(xlabel="column", ylabel="row")
    return _finish(axes, drawn, has_heads=grid.ndim == 3, title=title)


def mask(
    mask: Any,
    query_shape: int | Sequence[int],
    key_shape: int | Sequence[int],
    *,
    block_sizes: tuple[int, int] | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> Axes | np.ndarray:
    """Draws which keys each query may attend to: filled where attention is allowed.

    Args:
      mask: anything with `as_array(query_shape, key_shape)`, such as `attnlib.masks.Causal()`.
      query_shape: the sizes of the query axes; one integer for one axis.
      key_shape: the sizes of the key axes; one integer for one axis.
      block_sizes: (queries, keys) of tiles to draw as well, grey where `implementation="blockwise"` with these
        `block_sizes` leaves them out.
      ax: the Axes to draw into, or one for each panel; default: a new figure.

    Returns:
      The Axes. Several axes are laid out in row-major order. A mask with batch or head axes gives an array of Axes, one
      for each entry of those axes.

    Raises:
      ValueError: the mask has no entries, block sizes that are not two positive ints, or Axes do not match in number.
      ImportError: matplotlib is not installed.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import attnlib
      >>> axes = mask(attnlib.masks.Causal(), 5, 5)
      >>> axes.get_ylabel()
      'query'
    """
    query_sizes, key_sizes = (tuple(np.atleast_1d(shape).tolist()) for shape in (query_shape, key_shape))
    allowed = np.asarray(mask.as_array(query_sizes, key_sizes), bool)
    if 0 in allowed.shape or not query_sizes + key_sizes:
        raise ValueError(f"mask: nothing to draw for query_shape {query_sizes} and key_shape {key_sizes}")
    leading = allowed.shape[: allowed.ndim - len(query_sizes) - len(key_sizes)]
    panels = allowed.reshape(-1, np.prod(query_sizes), np.prod(key_sizes))
    count, queries, keys = panels.shape
    axes = _panels(ax, count, size=(_inches(keys, count), _inches(queries, count)))
    block_sizes = _checks.block_sizes(block_sizes)
    skipped = None if block_sizes is None else _skipped(mask, query_sizes, key_sizes, block_sizes)
    for panel, one_ax, place in zip(panels, axes, np.ndindex(leading), strict=True):
        one_ax.imshow(panel, cmap=_mask_colors(), vmin=0, vmax=1, interpolation="nearest")
        if skipped is not None:
            one_ax.imshow(np.where(skipped, 1.0, np.nan), cmap=_skipped_colors(), interpolation="nearest")
        _label_axis(one_ax.xaxis, None, "key" + _order(key_sizes))
        _label_axis(one_ax.yaxis, None, "query" + _order(query_sizes))
        _draw_grid_lines(one_ax, panel.shape, block_sizes)
        if count > 1:
            one_ax.set_title(_place_name(place, leading), fontsize="medium")
    return axes if count > 1 else axes[0]


def _matplotlib(module: str) -> Any:
    """Returns a module of matplotlib, or say what to install."""
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ImportError('attnlib.plot needs matplotlib: pip install "attnlib[notebooks]"') from error


def _weights(weights: ArrayLike, *, ranks: tuple[int, ...], wanted: str) -> np.ndarray:
    """Returns weights as float32 (which holds bfloat16 too) after checking that they can be drawn."""
    grid = np.asarray(weights).astype(np.float32)
    if grid.ndim not in ranks or 0 in grid.shape:
        raise ValueError(f"weights: expected {wanted}; got shape {grid.shape}. One example of a batch: weights[0]")
    return grid


def _check_tokens(name: str, tokens: Sequence[str] | None, expected: int) -> None:
    if tokens is not None and len(tokens) != expected:
        raise ValueError(f"{name}: expected {expected} tokens to match the weights, got {len(tokens)}")


def _panels(ax: Any, count: int, *, size: tuple[float, float]) -> np.ndarray:
    """Returns `count` Axes: the given ones, or new ones of about `size` inches each."""
    if ax is not None:
        axes = np.ravel(np.asarray(ax, dtype=object))
        if len(axes) != count:
            raise ValueError(f"ax: expected {count} Axes, one for each panel, got {len(axes)}")
        return axes
    columns = min(count, MOST_PANELS_IN_A_ROW)
    rows = -(-count // columns)
    figure, axes = _matplotlib("pyplot").subplots(
        rows, columns, figsize=(columns * size[0] + 1, rows * size[1] + 0.4), layout="constrained", squeeze=False
    )
    for spare in axes.flat[count:]:
        figure.delaxes(spare)
    return axes.ravel()[:count]


def _inches(cells: int, panels: int) -> float:
    """Returns a readable extent of a panel for that many rows or columns, with room for the labels."""
    return float(np.clip(CELL_INCHES * cells, 1.5, 10 if panels == 1 else 5)) + 0.9


def _scale(grid: np.ndarray) -> dict[str, Any]:
    """Returns the colour scale of all panels: from zero to the largest weight, or to 1 where all are zero."""
    return {"vmin": 0.0, "vmax": float(np.nanmax(grid)) or 1.0, "interpolation": "nearest"}


def _label_axis(axis: Any, tokens: Sequence[str] | None, name: str) -> None:
    """Writes the name of an axis and, where they can be read, its tokens; without tokens, whole positions."""
    axis.set_label_text(name)
    if tokens is None:
        axis.set_major_locator(_matplotlib("ticker").MaxNLocator(integer=True))
        return
    if len(tokens) > MOST_LABELS:
        return
    texts = [re.sub(r"\s", "\N{OPEN BOX}", str(token)) for token in tokens]  # a space would be a tick without a label
    words = axis.axis_name == "x" and max(map(len, texts)) > 2
    # Tokens are data: a dollar sign in one must not start a formula.
    axis.set_ticks(range(len(texts)), texts, rotation=90 if words else 0, parse_math=False)
    size = "medium" if len(texts) <= 20 else "small" if len(texts) <= 40 else "xx-small"
    axis.set_tick_params(length=0, labelsize=size)


def _finish(axes: np.ndarray, drawn: AxesImage, *, has_heads: bool, title: str | None) -> Axes | np.ndarray:
    """Adds the colour scale, the names of the heads and the title."""
    figure = axes[0].figure
    figure.colorbar(drawn, ax=list(axes), label="attention weight", fraction=0.05, pad=0.02)
    if not has_heads:
        axes[0].set_title(title or "")
        return axes[0]
    for head, one_ax in enumerate(axes):
        one_ax.set_title(f"head {head}", fontsize="medium")
    if title is not None:
        figure.suptitle(title)
    return axes


def _image_colors() -> Any:
    """Returns greys without black, on which an overlay would not show."""
    return _matplotlib("colors").LinearSegmentedColormap.from_list("image", ["#303030", "white"])


def _overlay_colors() -> Any:
    """Returns a colour map from fully transparent to opaque orange."""
    colors = _matplotlib("colors")
    ends = [(*colors.to_rgb(OVERLAY_COLOR), opacity) for opacity in (0.0, 0.95)]
    return colors.LinearSegmentedColormap.from_list("overlay", ends)


def _mask_colors() -> Any:
    return _matplotlib("colors").ListedColormap(["white", INK])


def _skipped_colors() -> Any:
    return _matplotlib("colors").ListedColormap([SKIPPED])


def _frame(query: tuple[int, int], cell: tuple[float, float]) -> Any:
    """Returns the outline of one cell of the query grid, in pixels of the image."""
    corner = (query[1] * cell[1] - 0.5, query[0] * cell[0] - 0.5)
    return _matplotlib("patches").Rectangle(corner, cell[1], cell[0], fill=False, edgecolor=QUERY_COLOR, linewidth=2.5)


def _place_name(place: tuple[int, ...], sizes: tuple[int, ...]) -> str:
    """Returns "batch 1, head 0" for an entry of the axes before the query's, leaving out axes of size 1."""
    names = ["batch"] * (len(sizes) - 1) + ["head"]
    return ", ".join(f"{name} {index}" for name, index, size in zip(names, place, sizes, strict=True) if size > 1)


def _order(sizes: tuple[int, ...]) -> str:
    return "" if len(sizes) == 1 else f" ({' × '.join(map(str, sizes))}, row-major)"


def _skipped(
    mask: Any, query_sizes: tuple[int, ...], key_sizes: tuple[int, ...], block_sizes: tuple[int, int]
) -> np.ndarray:
    """For each pair of positions, whether it is in a tile that the mask empties."""
    query, key = Ranges.of(query_sizes, block_sizes[0], "query"), Ranges.of(key_sizes, block_sizes[1], "key")
    empty = np.broadcast_to(mask.tile(query, key) == EMPTY, (query.first.size, key.first.size))
    every_query = empty.repeat(query.last.ravel() - query.first.ravel() + 1, 0)
    return every_query.repeat(key.last.ravel() - key.first.ravel() + 1, 1)


def _draw_grid_lines(ax: Axes, shape: tuple[int, ...], block_sizes: tuple[int, int] | None) -> None:
    """Separates the tiles, or the cells of a small mask, so that they can be counted."""
    if block_sizes is None and max(shape) > 32:
        return
    steps = (1, 1) if block_sizes is None else block_sizes
    for axis, size, step in ((ax.yaxis, shape[0], steps[0]), (ax.xaxis, shape[1], steps[1])):
        starts = np.arange(0, size, step)
        axis.set_ticks(np.append(starts, size) - 0.5, minor=True)
        if block_sizes is not None and len(starts) <= MOST_TILE_LABELS:
            axis.set_ticks(starts)
    ax.grid(which="minor", color="lightgrey" if block_sizes is None else "grey", linewidth=0.5)
    ax.tick_params(which="minor", length=0)
