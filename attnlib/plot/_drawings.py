"""The public functions of `attnlib.plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlib._core.operand_checks import check_block_sizes
from attnlib._core.tile_kinds import EMPTY, TileRanges
from attnlib.masks import Mask
from attnlib.masks._arrays import as_mask
from attnlib.plot import _panels

if TYPE_CHECKING:
    from jax.typing import ArrayLike
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

# One hue from white to dark: its order remains visible with colour blindness and on a grey printer.
WEIGHT_COLORS = "Blues"
INK = "#08306b"  # the darkest of these blues, for masks
SKIPPED = "#d5d5d5"  # tiles that are not computed
OVERLAY_COLOR = "#e66100"  # an orange that differs from all greys for every kind of colour vision
QUERY_COLOR = "#1a85ff"  # a blue that differs from this orange for every kind of colour vision
# Colours that differ from each other, from white and from black for every kind of colour vision, with markers.
CURVES = (
    ("#1a85ff", "o"), ("#d95f02", "s"), ("#0a9a74", "^"), ("#c565a9", "D"), ("#9a8400", "v"), ("#808080", "P"),
)  # fmt: skip
GRID = "#9a9a9a"
MAX_SIZE_TICKS = 10  # more sizes get the default ticks of a logarithmic axis
MAX_TILE_TICKS = 12  # more tiles get the default ticks


def attention_map(
    weights: ArrayLike,
    query_tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
    title: str | None = None,
) -> Axes | np.ndarray:
    """Draws attention weights: one row for each query, one column for each key, dark for a large weight.

    Args:
      weights: attention weights `(T, S)`, or `(N, T, S)` for one panel for each head with a common colour scale.
      query_tokens: T texts for the rows; default: positions.
      key_tokens: S texts for the columns; default: positions.
      ax: one Axes, or N Axes for N heads; default: a new figure.
      title: the title of the Axes, or of the figure if there are heads.

    Returns:
      The Axes, or an array of N Axes if there are heads.

    Raises:
      ValueError: the weights have another rank or no entries, or the number of tokens or Axes does not match.
      ImportError: matplotlib is not installed.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> axes = attention_map([[0.9, 0.1], [0.2, 0.8]], ["le", "chat"], ["the", "cat"])
      >>> axes.get_xlabel()
      'key'
    """
    grid = _panels.check_weights(weights, ranks=(2, 3), expected="(queries, keys) or (heads, queries, keys)")
    queries, keys = grid.shape[-2:]
    _panels.check_tokens("query_tokens", query_tokens, queries)
    _panels.check_tokens("key_tokens", key_tokens, keys)
    panels = grid.reshape(-1, queries, keys)
    sides = (keys, key_tokens), (queries, query_tokens)
    size = [_panels.panel_inches(count, len(panels), tokens is not None) for count, tokens in sides]
    axes = _panels.make_panels(ax, len(panels), size=(size[0], size[1]))
    for panel, one_ax in zip(panels, axes, strict=True):
        drawn = one_ax.imshow(panel, cmap=WEIGHT_COLORS, aspect="auto", **_panels.color_scale(grid))
        _panels.label_axis(one_ax.xaxis, key_tokens, "key")
        _panels.label_axis(one_ax.yaxis, query_tokens, "query")
    return _panels.finish(axes, drawn, panel_name="head" if grid.ndim == 3 else None, title=title)


def attention_over_image(
    image: ArrayLike,
    weights: ArrayLike,
    *,
    query: tuple[int, int] | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
    title: str | None = None,
) -> Axes | np.ndarray:
    """Draws attention weights over an image: grey pixels under orange weights.

    Args:
      image: `(H, W)` in any range, or `(H, W, 3)` colours as matplotlib takes them.
      weights: weights over the image `(h, w)`, or `(N, h, w)` for one panel for each head. A coarser grid (patches) is
        stretched over the image. With `query`, the weights may have query axes: `(qh, qw, h, w)` or `(N, qh, qw, h,
        w)`.
      query: row and column of one query; the plot shows its weights, and a blue frame around it. Weights without query
        axes, as from `attnlib.inspect.attention_rows`, belong to this query, and its grid is the grid of the keys.
      ax: one Axes, or N Axes for N heads; default: a new figure.
      title: the title of the Axes, or of the figure if there are heads.

    Returns:
      The Axes, or an array of N Axes if there are heads.

    Raises:
      ValueError: image or weights have another rank or no entries, the query is outside of its grid, or the number of
        Axes does not match.
      ImportError: matplotlib is not installed.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> weights = np.full((2, 8, 8), 1 / 64)  # two heads
      >>> attention_over_image(np.zeros((8, 8)), weights).shape
      (2,)
    """
    picture = np.asarray(image)
    if picture.ndim not in (2, 3) or 0 in picture.shape:
        raise ValueError(f"image: expected (H, W) or (H, W, colours), got shape {picture.shape}; pass one image")
    expected = "(h, w) or (heads, h, w), or the weights of all queries together with query=(row, column)"
    grid = _panels.check_weights(weights, ranks=(2, 3) if query is None else (2, 3, 4, 5), expected=expected)
    query_grid = grid.shape[-2:] if grid.ndim < 4 else grid.shape[-4:-2]
    grid = _select_query(grid, query, query_grid, "row and column")
    height, width = picture.shape[:2]
    panels = grid.reshape(-1, *grid.shape[-2:])
    axes = _panels.make_panels(ax, len(panels), size=(3.0, 3.0 * min(height / width, 2)))
    for panel, one_ax in zip(panels, axes, strict=True):
        drawn = _draw_over(one_ax, picture, panel, _panels.color_scale(grid), {})
        if query is not None:
            one_ax.add_patch(_frame(query, (height / query_grid[0], width / query_grid[1])))
    return _panels.finish(axes, drawn, panel_name="head" if grid.ndim == 3 else None, title=title)


def attention_over_frames(
    frames: ArrayLike,
    weights: ArrayLike,
    *,
    query: tuple[int, int, int] | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
    title: str | None = None,
) -> np.ndarray:
    """Draws attention weights over the frames of a video: one panel for each frame, with a common colour scale.

    Args:
      frames: `(F, H, W)` in any range, or `(F, H, W, 3)` colours as matplotlib takes them.
      weights: weights of one head over the frames `(F, h, w)`; the grid may be coarser than the frames. With `query`,
        the weights may have query axes: `(qf, qh, qw, F, h, w)`.
      query: frame, row and column of one query, as in `attention_over_image`.
      ax: F Axes; default: a new figure.
      title: the title of the figure.

    Returns:
      An array of F Axes.

    Raises:
      ValueError: frames or weights have another rank or no entries, their number or the number of Axes does not match,
        or the query is outside of its grid.
      ImportError: matplotlib is not installed.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> weights = np.full((3, 4, 4), 1 / 48)
      >>> attention_over_frames(np.zeros((3, 8, 8)), weights, query=(1, 0, 2)).shape
      (3,)
    """
    pictures = np.asarray(frames)
    if pictures.ndim not in (3, 4) or 0 in pictures.shape:
        raise ValueError(f"frames: expected (F, H, W) or (F, H, W, colours), got shape {pictures.shape}")
    expected = "(frames, h, w), or the weights of all queries together with query=(frame, row, column)"
    grid = _panels.check_weights(weights, ranks=(3,) if query is None else (3, 6), expected=expected)
    query_grid = grid.shape[:3]
    grid = _select_query(grid, query, query_grid, "frame, row and column")
    if len(grid) != len(pictures):
        raise ValueError(f"weights: expected {len(pictures)} frames as in frames, got {len(grid)}")
    height, width = pictures.shape[1:3]
    axes = _panels.make_panels(ax, len(pictures), size=(2.4, 2.4 * min(height / width, 2)))
    for frame, (one_ax, picture, panel) in enumerate(zip(axes, pictures, grid, strict=True)):
        # A common range, so that dark frames stay dark.
        shades = {} if picture.ndim == 3 else dict(vmin=pictures.min(), vmax=pictures.max())
        drawn = _draw_over(one_ax, picture, panel, _panels.color_scale(grid), shades)
        if query is not None and query[0] == frame:
            one_ax.add_patch(_frame(query[1:], (height / query_grid[1], width / query_grid[2])))
    _panels.finish(axes, drawn, panel_name="frame", title=title)
    return axes


def costs(
    measured: Mapping[str, Mapping[float, float]],
    *,
    unit: str = "s",
    x_label: str = "length",
    y_label: str | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draws measured costs as a function of a size, one curve for each name, with logarithmic axes.

    Args:
      measured: costs by name and size, `{"attnlib": {1024: 0.03, 2048: 0.12}, ...}`, positive numbers in seconds or
        bytes. Names may have different sizes.
      unit: "s" or "B"; tick labels have prefixes such as ms and MB.
      x_label: the name of the sizes.
      y_label: the name of the costs; default: "time" or "memory".
      ax: the Axes; default: a new figure.
      title: the title of the Axes.

    Returns:
      The Axes.

    Raises:
      ValueError: there are no costs, more names than colours, numbers that are not positive, or an unknown unit.
      ImportError: matplotlib is not installed.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> axes = costs({"tiled": {1024: 3e6, 2048: 6e6}, "dense": {1024: 8e6, 2048: 32e6}}, unit="B")
      >>> axes.get_ylabel()
      'memory'
    """
    if unit not in ("s", "B"):
        raise ValueError(f'unit: expected "s" or "B", got {unit!r}')
    if not measured or len(measured) > len(CURVES):
        raise ValueError(f"measured: expected 1 to {len(CURVES)} names, got {len(measured)}")
    for name, points in measured.items():
        if not points or not all(x > 0 and y > 0 and np.isfinite([x, y]).all() for x, y in points.items()):
            raise ValueError(f"measured[{name!r}]: expected positive numbers by positive sizes, got {dict(points)}")
    (one_ax,) = _panels.make_panels(ax, 1, size=(5.2, 3.4))
    for (name, points), (color, marker) in zip(measured.items(), CURVES, strict=False):
        one_ax.plot(*zip(*sorted(points.items()), strict=True), color=color, marker=marker, label=name)
    one_ax.set_xscale("log", base=2)
    one_ax.set_yscale("log")
    sizes = sorted(set().union(*measured.values()))
    if len(sizes) <= MAX_SIZE_TICKS:
        one_ax.set_xticks(sizes, [f"{size:,g}" if size < 1e6 else f"{size:.3g}" for size in sizes])
        one_ax.xaxis.set_minor_locator(_panels.matplotlib("ticker").NullLocator())
    values = [y for points in measured.values() for y in points.values()]
    tick_factors = (1, 2, 5) if max(values) < 100 * min(values) else (1,)
    one_ax.yaxis.set_major_locator(_panels.matplotlib("ticker").LogLocator(subs=tick_factors))
    one_ax.yaxis.set_major_formatter(_panels.matplotlib("ticker").EngFormatter(unit))
    one_ax.yaxis.set_minor_locator(_panels.matplotlib("ticker").NullLocator())
    one_ax.grid(color=GRID, linewidth=0.6, alpha=0.5)
    one_ax.set(xlabel=x_label, ylabel=y_label or {"s": "time", "B": "memory"}[unit], title=title or "")
    one_ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # outside, so that it hides no curve
    return one_ax


def mask(
    mask: Any,
    query_shape: int | Sequence[int],
    key_shape: int | Sequence[int],
    *,
    block_sizes: tuple[int, int] | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
    heads: int | None = None,
    batch: int | Sequence[int] | None = None,
) -> Axes | np.ndarray:
    """Draws a mask: one row for each query, one column for each key, filled if the query may attend the key.

    Args:
      mask: a mask such as `attnlib.masks.Causal()`, the function of a `masks.Function`, or another object with
        `as_array(query_shape, key_shape)`.
      query_shape: the sizes of the query axes; one int for one axis.
      key_shape: the sizes of the key axes; one int for one axis.
      block_sizes: (queries, keys) of the tiles to draw. Tiles that `implementation="blockwise"` skips are grey.
      ax: one Axes for each panel; default: a new figure.
      heads, batch: sizes for a mask that depends on them, as in `Mask.as_array`.

    Returns:
      The Axes; for a mask with batch or head axes an array of Axes, one for each entry of these axes. Several query or
      key axes are flattened in row-major order.

    Raises:
      ValueError: the mask has no entries, block_sizes are not two positive ints, or the number of Axes does not match.
      ImportError: matplotlib is not installed.

    Example:
      >>> import matplotlib; matplotlib.use("agg")
      >>> import attnlib
      >>> axes = mask(attnlib.masks.Causal(), 5, 5)
      >>> axes.get_ylabel()
      'query'
    """
    query_sizes, key_sizes = (tuple(np.atleast_1d(shape).tolist()) for shape in (query_shape, key_shape))
    mask = mask if hasattr(mask, "as_array") else as_mask(mask)
    if isinstance(mask, Mask):
        mask = mask.with_sizes(query_sizes, key_sizes, heads, batch)
    allowed = np.asarray(mask.as_array(query_sizes, key_sizes), bool)
    if 0 in allowed.shape or not query_sizes + key_sizes:
        raise ValueError(f"mask: nothing to draw for query_shape {query_sizes} and key_shape {key_sizes}")
    leading = allowed.shape[: allowed.ndim - len(query_sizes) - len(key_sizes)]
    panels = allowed.reshape(-1, np.prod(query_sizes), np.prod(key_sizes))
    count, queries, keys = panels.shape
    axes = _panels.make_panels(
        ax, count, size=(_panels.panel_inches(keys, count), _panels.panel_inches(queries, count))
    )
    block_sizes = check_block_sizes(block_sizes)
    skipped = None if block_sizes is None else _skipped(mask, query_sizes, key_sizes, block_sizes)
    for panel, one_ax, index in zip(panels, axes, np.ndindex(leading), strict=True):
        one_ax.imshow(panel, cmap=_mask_colors(), vmin=0, vmax=1, interpolation="nearest")
        if skipped is not None:
            one_ax.imshow(np.where(skipped, 1.0, np.nan), cmap=_skipped_colors(), interpolation="nearest")
        _panels.label_axis(one_ax.xaxis, None, "key" + _order(key_sizes))
        _panels.label_axis(one_ax.yaxis, None, "query" + _order(query_sizes))
        _draw_grid_lines(one_ax, panel.shape, block_sizes)
        if count > 1:
            one_ax.set_title(_panel_title(index, leading), fontsize="medium")
    return axes if count > 1 else axes[0]


def _select_query(grid: np.ndarray, query: Any, query_grid: tuple[int, ...], axis_names: str) -> np.ndarray:
    """The weights of one query; weights without query axes are returned unchanged."""
    if query is None:
        return grid
    if len(query) != len(query_grid) or not all(0 <= n < size for n, size in zip(query, query_grid, strict=True)):
        raise ValueError(f"query: expected {axis_names} inside {query_grid}, got {query}")
    axes = len(query_grid)
    if grid.ndim < 2 * axes:
        return grid
    return grid[(..., *query, *(slice(None),) * axes)]


def _draw_over(
    ax: Axes, picture: np.ndarray, grid: np.ndarray, scale: dict[str, Any], shades: dict[str, Any]
) -> AxesImage:
    """Draws an image, and the weights stretched over the image."""
    height, width = picture.shape[:2]
    ax.imshow(picture, cmap=_image_colors(), interpolation="nearest", **shades)
    ax.set(xlabel="column", ylabel="row")
    return ax.imshow(grid, cmap=_overlay_colors(), extent=(-0.5, width - 0.5, height - 0.5, -0.5), **scale)


def _image_colors() -> Any:
    """Greys without black, which would hide the overlay."""
    return _panels.matplotlib("colors").LinearSegmentedColormap.from_list("image", ["#303030", "white"])


def _overlay_colors() -> Any:
    """A colour map from transparent to nearly opaque orange."""
    colors = _panels.matplotlib("colors")
    ends = [(*colors.to_rgb(OVERLAY_COLOR), opacity) for opacity in (0.0, 0.95)]
    return colors.LinearSegmentedColormap.from_list("overlay", ends)


def _mask_colors() -> Any:
    return _panels.matplotlib("colors").ListedColormap(["white", INK])


def _skipped_colors() -> Any:
    return _panels.matplotlib("colors").ListedColormap([SKIPPED])


def _frame(query: tuple[int, int], cell: tuple[float, float]) -> Any:
    """The outline of one cell of the query grid, in pixels of the image."""
    corner = (query[1] * cell[1] - 0.5, query[0] * cell[0] - 0.5)
    patches = _panels.matplotlib("patches")
    return patches.Rectangle(corner, cell[1], cell[0], fill=False, edgecolor=QUERY_COLOR, linewidth=2.5)


def _panel_title(index: tuple[int, ...], sizes: tuple[int, ...]) -> str:
    """A title such as "batch 1, head 0", without axes of size 1."""
    names = ["batch"] * (len(sizes) - 1) + ["head"]
    return ", ".join(f"{name} {i}" for name, i, size in zip(names, index, sizes, strict=True) if size > 1)


def _order(sizes: tuple[int, ...]) -> str:
    return "" if len(sizes) == 1 else f" ({' × '.join(map(str, sizes))}, row-major)"


def _skipped(
    mask: Any, query_sizes: tuple[int, ...], key_sizes: tuple[int, ...], block_sizes: tuple[int, int]
) -> np.ndarray:
    """Whether each pair of positions is in an empty tile of the mask."""
    query, key = TileRanges.of(query_sizes, block_sizes[0], "query"), TileRanges.of(key_sizes, block_sizes[1], "key")
    empty = np.broadcast_to(mask.classify_tiles(query, key) == EMPTY, (query.first.size, key.first.size))
    every_query = empty.repeat(query.last.ravel() - query.first.ravel() + 1, 0)
    return every_query.repeat(key.last.ravel() - key.first.ravel() + 1, 1)


def _draw_grid_lines(ax: Axes, shape: tuple[int, ...], block_sizes: tuple[int, int] | None) -> None:
    """Draws lines between tiles, or between the cells of a small mask."""
    if block_sizes is None and max(shape) > 32:
        return
    steps = (1, 1) if block_sizes is None else block_sizes
    for axis, size, step in ((ax.yaxis, shape[0], steps[0]), (ax.xaxis, shape[1], steps[1])):
        starts = np.arange(0, size, step)
        axis.set_ticks(np.append(starts, size) - 0.5, minor=True)
        if block_sizes is not None and len(starts) <= MAX_TILE_TICKS:
            axis.set_ticks(starts)
    ax.grid(which="minor", color="lightgrey" if block_sizes is None else "grey", linewidth=0.5)
    ax.tick_params(which="minor", length=0)
