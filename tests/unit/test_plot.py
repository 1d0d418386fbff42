"""Pictures show the numbers they are given, at the right places, and say what is wrong with wrong ones."""

import sys

import numpy as np
import pytest

from attnlib import masks, plot
from attnlib.plot._drawings import CURVES

matplotlib = pytest.importorskip("matplotlib", reason="attnlib.plot needs the extra attnlib[notebooks]")
Figure = pytest.importorskip("matplotlib.figure").Figure


@pytest.fixture(autouse=True)
def pyplot():
    """pyplot without a window; every figure is closed after its test."""
    matplotlib.use("agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    yield pyplot
    pyplot.close("all")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def drawn(ax, image=-1):
    """The numbers of an image on the Axes, by default of the last one drawn."""
    return np.asarray(ax.images[image].get_array())


def labels(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def rendered(ax):
    ax.figure.canvas.draw()  # warnings are errors here: a glyph that is missing, a layout that does not fit
    return ax


def test_map_of_one_head(rng):
    weights = rng.random((2, 3))
    ax = rendered(plot.attention_map(weights, ["le", "chat"], ["the", r"$\cat$", "_$"], title="a map"))
    np.testing.assert_allclose(drawn(ax), weights, rtol=1e-6)
    assert (labels(ax.yaxis), labels(ax.xaxis)) == (["le", "chat"], ["the", r"$\cat$", "_$"])
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("key", "query", "a map")
    assert ax.images[0].get_clim() == pytest.approx((0, weights.max()))


def test_map_marks_spaces_and_numbers_positions(rng):
    ax = rendered(plot.attention_map(rng.random((3, 3)), key_tokens="a \N{NARROW NO-BREAK SPACE}"))
    assert labels(ax.xaxis) == ["a", "\N{OPEN BOX}", "\N{OPEN BOX}"]
    assert all(float(tick).is_integer() for tick in ax.get_yticks())


def test_map_of_heads_shares_one_scale(rng):
    weights = rng.random((5, 2, 3)).astype(np.float16)
    axes = plot.attention_map(weights, title="heads")
    assert axes.shape == (5,)
    assert len({ax.get_subplotspec().colspan.start for ax in axes}) == 3  # three and two
    for head, ax in enumerate(axes):
        np.testing.assert_array_equal(drawn(rendered(ax)), weights[head])
        assert ax.images[0].get_clim() == (0, weights.max())
        assert ax.get_title() == f"head {head}"
    assert axes[0].figure.get_suptitle() == "heads"


def test_given_axes_are_drawn_into(rng, pyplot):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot.attention_map(rng.random((2, 3)), ax=left) is left
    assert list(plot.attention_map(rng.random((2, 2, 3)), ax=[left, right])) == [left, right]
    assert pyplot.get_fignums() == []


def test_all_zero_weights_can_be_drawn():
    assert rendered(plot.attention_map(np.zeros((2, 2)))).images[0].get_clim() == (0, 1)


def test_image_of_one_head(rng):
    image, weights = rng.random((6, 8)), rng.random((3, 4))  # patches of 2 x 2
    ax = rendered(plot.attention_over_image(image, weights, title="patches"))
    np.testing.assert_array_equal(drawn(ax, 0), image)
    np.testing.assert_allclose(drawn(ax, 1), weights, rtol=1e-6)
    assert list(ax.images[1].get_extent()) == [-0.5, 7.5, 5.5, -0.5] == list(ax.images[0].get_extent())
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("column", "row", "patches")
    assert not ax.patches


def test_image_overlay_is_clear_where_there_is_no_attention():
    ax = plot.attention_over_image(np.zeros((2, 2)), [[0.0, 1.0], [0.5, 0.0]])
    overlay = ax.images[1]
    opacity = overlay.cmap(overlay.norm(drawn(ax)))[..., 3]
    np.testing.assert_allclose(opacity, [[0, 0.95], [0.475, 0]], atol=0.01)


def test_image_of_one_query_of_several_heads(rng):
    weights = rng.random((2, 3, 4, 3, 4))
    axes = plot.attention_over_image(rng.random((6, 8)), weights, query=(2, 1))
    assert axes.shape == (2,)
    for head, ax in enumerate(axes):
        np.testing.assert_allclose(drawn(rendered(ax)), weights[head, 2, 1], rtol=1e-6)
        (frame,) = ax.patches
        assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == (1.5, 3.5, 2, 2)


def test_image_of_one_query_from_its_weights_alone(rng):
    """As `inspect.attention_rows` gives them: drawn as they are, the query framed in the grid of the keys."""
    weights = rng.random((2, 3, 4))
    axes = plot.attention_over_image(rng.random((6, 8)), weights, query=(2, 1))
    for head, ax in enumerate(axes):
        np.testing.assert_allclose(drawn(rendered(ax)), weights[head], rtol=1e-6)
        (frame,) = ax.patches
        assert (frame.get_x(), frame.get_y(), frame.get_width(), frame.get_height()) == (1.5, 3.5, 2, 2)


@pytest.mark.parametrize("alone", [True, False])
def test_frames_of_a_video(rng, alone):
    frames, weights = rng.random((5, 6, 8)), rng.random((5, 3, 4, 5, 3, 4))
    axes = plot.attention_over_frames(frames, weights[3, 2, 1] if alone else weights, query=(3, 2, 1), title="video")
    for number, ax in enumerate(axes):
        np.testing.assert_array_equal(drawn(rendered(ax), 0), frames[number])
        np.testing.assert_allclose(drawn(ax, 1), weights[3, 2, 1, number], rtol=1e-6)
        assert ax.images[0].get_clim() == (frames.min(), frames.max())
        assert ax.images[1].get_clim() == pytest.approx((0, weights[3, 2, 1].max()))
        assert ax.get_title() == f"frame {number}"
        assert [(f.get_x(), f.get_y(), f.get_width(), f.get_height()) for f in ax.patches] == [(1.5, 3.5, 2, 2)] * (
            number == 3
        )
    assert axes[0].figure.get_suptitle() == "video"


def test_costs_are_curves_in_the_order_of_sizes():
    ax = rendered(plot.costs({"ours": {2048: 3e-3, 1024: 1e-3}, "theirs": {1024: 5e-2}}, title="a step"))
    ours, theirs = ax.get_lines()
    np.testing.assert_array_equal(ours.get_xydata(), [[1024, 1e-3], [2048, 3e-3]])
    np.testing.assert_array_equal(theirs.get_xydata(), [[1024, 5e-2]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ours", "theirs"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("length", "time", "a step")
    assert labels(ax.xaxis) == ["1,024", "2,048"]
    assert {"1 ms", "5 ms", "50 ms"} <= set(labels(ax.yaxis))
    other = Figure().subplots()
    assert rendered(plot.costs({"a": {1: 2e6, 2: 3e9}}, unit="B", ax=other)) is other
    assert "10 MB" in labels(other.yaxis)


def test_curves_are_apart_from_light_and_dark():
    """By the contrast that WCAG asks of graphics, 3 : 1, against white and against black."""

    def luminance(color):
        rgb = np.array(matplotlib.colors.to_rgb(color))
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    for color, _ in CURVES:
        assert 1.05 / (luminance(color) + 0.05) >= 3, color
        assert (luminance(color) + 0.05) / 0.05 >= 3, color
    assert len({marker for _, marker in CURVES}) == len({color for color, _ in CURVES}) == len(CURVES)


def test_mask_is_its_definition():
    mask = masks.Causal() & masks.SlidingWindow(2, 0)
    ax = rendered(plot.mask(mask, 4, 6))
    np.testing.assert_array_equal(drawn(ax), mask.as_array(4, 6))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert rendered(mask.plot((4,), (6,))).get_xlabel() == "key"


def test_large_drawings_have_no_lines_and_labels_that_would_cover_them(rng):
    ax = plot.mask(masks.Causal(), 33, 33)
    assert not len(ax.yaxis.get_minorticklocs()) and len(plot.mask(masks.Causal(), 32, 32).yaxis.get_minorticklocs())
    tokens = [f"token{n}" for n in range(200)]
    for count, shown in ((3, set(tokens[:3])), (200, set())):
        ax = rendered(plot.attention_map(rng.random((count, 3)), tokens[:count]))
        assert set(labels(ax.yaxis)) & set(tokens) == shown


def test_mask_over_several_axes_is_row_major():
    mask = masks.Neighborhood(3)
    ax = rendered(plot.mask(mask, (3, 5), (3, 5)))
    np.testing.assert_array_equal(drawn(ax), np.asarray(mask.as_array((3, 5), (3, 5))).reshape(15, 15))
    assert ax.get_ylabel() == "query (3 \N{MULTIPLICATION SIGN} 5, row-major)"


def test_mask_with_tiles_shows_those_that_are_skipped():
    """Overlaid where the tile is left out, and nowhere else; lines at the borders of tiles."""
    ax = rendered(masks.BlockLocal(3).plot(7, 8, block_sizes=(2, 3)))
    skipped = np.zeros((7, 8), bool)
    for row in range(0, 7, 2):
        for column in range(0, 8, 3):
            tile = slice(row, row + 2), slice(column, column + 3)
            skipped[tile] = not np.asarray(masks.BlockLocal(3).as_array(7, 8))[tile].any()
    assert skipped.any() and not skipped.all()
    np.testing.assert_array_equal(np.isfinite(np.ma.filled(ax.images[1].get_array(), np.nan)), skipped)
    assert ax.yaxis.get_minorticklocs().tolist() == [-0.5, 1.5, 3.5, 5.5, 6.5]
    assert ax.xaxis.get_minorticklocs().tolist() == [-0.5, 2.5, 5.5, 7.5]
    assert ax.yaxis.get_majorticklocs().tolist() == [0, 2, 4, 6]
    assert len(masks.BlockLocal(3).plot(7, 8).images) == 1


def test_mask_with_a_batch_axis_has_a_panel_for_each():
    mask = masks.Lengths(key=np.array([1, 3]))
    axes = plot.mask(mask, 2, 4)
    assert [ax.get_title() for ax in axes] == ["batch 0", "batch 1"]
    np.testing.assert_array_equal([drawn(rendered(ax))[0] for ax in axes], [[1, 0, 0, 0], [1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda: plot.attention_map(np.ones((1, 1, 2, 3))),
            r"weights: expected \(queries, keys\).*shape \(1, 1, 2, 3\)",
        ),
        (lambda: plot.attention_map(np.ones((0, 3))), r"weights: expected .* got shape \(0, 3\)"),
        (lambda: plot.attention_map(np.ones((2, 3)), ["a"]), "query_tokens: expected 2 tokens .*, got 1"),
        (lambda: plot.attention_map(np.ones((2, 3)), None, "ab"), "key_tokens: expected 3 tokens"),
        (lambda: plot.attention_map(np.ones((2, 2, 3)), ax=Figure().subplots()), "ax: expected 2 Axes.* got 1"),
        (lambda: plot.attention_over_image(np.ones(4), np.ones((2, 2))), r"image: expected \(H, W\).*got shape \(4,\)"),
        (
            lambda: plot.attention_over_image(np.ones((4, 4)), np.ones((2, 2, 2, 2))),
            r"together with query=\(row, column\)",
        ),
        (
            lambda: plot.attention_over_image(np.ones((4, 4)), np.ones((2, 2)), query=(0, 0, 0)),
            r"query: expected row and column inside \(2, 2\), got \(0, 0, 0\)",
        ),
        (lambda: plot.attention_over_frames(np.ones((4, 4)), np.ones((2, 2, 2))), r"frames: .*got shape \(4, 4\)"),
        (lambda: plot.attention_over_frames(np.ones((3, 4, 4)), np.ones((2, 2, 2))), "expected 3 frames .*, got 2"),
        (
            lambda: plot.attention_over_frames(np.ones((3, 4, 4)), np.ones((3, 2, 2)), query=(3, 0, 0)),
            r"query: expected frame, row and column inside \(3, 2, 2\), got \(3, 0, 0\)",
        ),
        (lambda: plot.costs({}), "measured: expected 1 to 6 names, got 0"),
        (lambda: plot.costs({str(n): {1: 1} for n in range(7)}), "measured: expected 1 to 6 names, got 7"),
        (lambda: plot.costs({"a": {1: 1, 2: 0}}), r"measured\['a'\]: expected positive numbers .*2: 0"),
        (lambda: plot.costs({"a": {1: np.nan}}), "expected positive numbers"),
        (lambda: plot.costs({"a": {1: 1}}, unit="h"), 'unit: expected "s" or "B", got \'h\''),
        (
            lambda: plot.attention_over_image(np.ones((4, 4)), np.ones((2, 2, 4, 4)), query=(0, 2)),
            r"query: expected row and column inside \(2, 2\), got \(0, 2\)",
        ),
        (lambda: plot.mask(masks.Causal(), 3, 3, block_sizes=(0, 2)), "block_sizes must be"),
        (lambda: plot.mask(masks.Causal(), 0, 3), r"mask: nothing to draw for query_shape \(0,\) and key_shape \(3,\)"),
    ],
)
def test_wrong_input(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'attnlib\.plot needs matplotlib: pip install "attnlib\[notebooks\]"'):
        plot.attention_map(np.ones((2, 2)))
