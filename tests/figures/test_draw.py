"""The figures of a report: what is drawn where."""

from __future__ import annotations

import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

from lsa.figures import draw
from lsa.figures.axes import COLOURS, make_logarithmic

WIDE = "WIDE_NAMED_0.01"


def seeds(slope: float, n: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    x = np.linspace(0, 1, 11)
    return [(x, slope * x + i) for i in range(n)]


def test_an_overlay_has_a_colour_per_subject_thin_seeds_and_a_bold_median():
    figure = draw.overlay("t", "x", "y", {"a": seeds(1), "b": seeds(2)}, {"b": (0.5, "enough")})
    (plot,) = figure.axes
    _bold_a, bold_b, level = plot.lines
    _thin_a, thin_b = plot.collections
    assert np.allclose(bold_b.get_ydata(), seeds(2)[2][1])
    assert np.allclose(thin_b.get_segments(), np.stack([np.stack(p, 1) for p in seeds(2)]))
    assert bold_b.get_linewidth() > 2 * thin_b.get_linewidth()[0]
    assert to_rgba(level.get_color()) == to_rgba(bold_b.get_color()) == to_rgba("C1")
    assert tuple(thin_b.get_color()[0][:3]) == to_rgba("C1")[:3]
    assert plot.get_ylim()[0] < 0 and plot.get_ylim()[1] > 6  # the lowest seed's and the highest's
    texts = [text.get_text() for text in plot.get_legend().get_texts()]
    assert texts == ["a", "b", "enough"]


def test_thirty_optimizers_are_told_apart_and_all_stand_in_the_legend():
    names = {f"optimizer_{i}_with_a_long_name_of_its_own": seeds(i + 1, 1) for i in range(30)}
    thresholds = {name: (50.0, f"{name}: 2/η = 50") for name in names}
    for figure in (
        draw.overlay("t", "x", "y", names),
        draw.epochs("t", "λ", names, names, thresholds),
    ):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        (legend,) = figure.legends
        assert len(legend.get_texts()) in (30, 60) and not figure.axes[0].get_legend()
        box, page = legend.get_window_extent(), figure.bbox
        assert page.y0 <= box.y0 and box.y1 <= page.y1 and box.x1 <= page.x1
        assert all(panel.get_window_extent().x1 <= box.x0 for panel in figure.axes)
        lines = figure.axes[0].lines[:30]
        assert len({(line.get_color(), line.get_marker()) for line in lines}) == 30


def test_a_single_seed_is_its_own_line():
    (plot,) = draw.overlay("t", "x", "y", {"a": seeds(1, 1)}).axes
    assert len(plot.lines) == 1 and not plot.collections


def test_the_median_covers_what_all_seeds_reach():
    long, short = np.array([1.0, 2, 4, 8]), np.array([1.0, 2, 4])
    lines = {"a": [(long, long), (short, 3 * short), (long, long)]}
    (plot,) = draw.overlay("t", "d", "y", lines).axes
    assert plot.lines[-1].get_xdata().tolist() == [1, 2, 4]
    assert plot.lines[-1].get_ydata().tolist() == [1, 2, 4]


def test_thresholds_are_dashed_in_the_optimizers_colour():
    course = {"a": seeds(1), "b": seeds(2)}
    figure = draw.epochs("t", "λ", course, course, {"b": (50.0, "b: 2/η = 50")})
    left, right = figure.axes
    dashed = [line for line in left.lines if line.get_linestyle() != "-"]
    assert [line.get_color() for line in dashed] == [COLOURS[1]]
    assert list(dashed[0].get_ydata()) == [50, 50]
    assert left.get_ylim() == right.get_ylim()


@pytest.mark.parametrize(("last", "scale"), [(5.0, "log"), (20.0, "linear"), (-5.0, "linear")])
def test_a_course_over_decades_is_drawn_by_its_ratios(last, scale):
    course = {"a": [(np.arange(3.0), np.array([200.0, 150.0, last]))]}
    left, right = draw.epochs("t", "λ", course, course, {}).axes
    assert left.get_yscale() == right.get_yscale() == scale


def test_long_names_leave_room_for_the_lines():
    name = "rate_" * 30
    figure = draw.overlay("t", "d", "y", {name: seeds(1)})
    (text,) = figure.axes[0].get_legend().get_texts()
    assert 20 < len(text.get_text()) <= 32 and text.get_text().startswith("rate_rate_")


def test_barriers_stand_in_their_triangle():
    line, path = {("a", "b"): 1.5, ("a", "c"): 2.5}, {("a", "b"): 0.25, ("b", "c"): 0.0}
    figure = draw.barriers(["a", "b", "c"], line, path, ("line", "path"))
    found = {tuple(map(int, t.get_position()[::-1])): t.get_text() for t in figure.axes[0].texts}
    assert found == {(0, 1): "1.5", (0, 2): "2.5", (1, 0): "0.25", (2, 1): "0"}


def test_every_pair_has_a_panel_with_its_ways():
    ways = {"straight line": seeds(1), "minimum-energy path": seeds(2)}
    figure = draw.profiles({f"a – {i}": ways for i in range(4)}, bound=2.3)
    assert [plot.get_title() for plot in figure.axes] == [f"a – {i}" for i in range(4)]
    assert len(figure.axes[0].lines) == 3  # a median of each, ln C
    assert [len(thin.get_segments()) for thin in figure.axes[0].collections] == [5, 5]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["straight line", "minimum-energy path", "ln C"]


@pytest.mark.parametrize("outside", [-0.5, 1.5])
def test_only_what_lies_between_the_checkpoints_is_shown(outside):
    x, y = draw.inside([outside, 0, 0.5, 1], [9, 1, np.inf, 2])
    assert (list(x), list(y)) == ([0, 1], [1, 2])


def between(x: np.ndarray) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    return {"straight line": [(np.linspace(0, 1, 5), x)]}


@pytest.mark.parametrize(
    "y",
    [
        np.array([-0.00175, -0.0015, -0.00125, -0.001, -0.00075]),
        np.array([12345.0, 12346.5, 12347.5, 12348.5, 12350.0]),
        np.array([1e-7, 1e-3, 1.0, 1e3, 1e9]),
        np.array([-1e-12, 3e-13, 1e-12, 2e-12, 3e-12]),
    ],
)
@pytest.mark.parametrize("kind", ["overlay", "epochs", "profiles", "many profiles", "barriers"])
def test_the_margins_hold_all_text_and_none_lies_on_another(kind, y, monkeypatch):
    drawn, original = [], Text.draw

    def listed(text, renderer, *arguments):
        if text.get_visible() and text.get_text():
            box = text.get_window_extent().padded(-1)
            drawn.append((text.get_text(), box, text.get_rotation() % 90 == 0))
        return original(text, renderer, *arguments)

    lines = {"a": [(np.array([1.0, 2, 3, 4, 5]), y)]}
    heights = {("sgd", "b"): float(y[-1]), ("sgd", WIDE): float(y[0])}
    pairs = {f"{a} – {a}": between(y) for a in ("sgd", "heavy", "adamw", "muon", "sam")}
    figure = {
        "overlay": lambda: draw.overlay("title", "x_name", "y_name", lines),
        "epochs": lambda: draw.epochs("title", "y name", lines, lines, {"a": (y[0], "a: 1")}),
        "profiles": lambda: draw.profiles(dict(list(pairs.items())[:2]), y[0]),
        "many profiles": lambda: draw.profiles(pairs, y[0]),
        "barriers": lambda: draw.barriers(["sgd", WIDE, "b"], heights, {}, ("above", "below")),
    }[kind]()
    monkeypatch.setattr(Text, "draw", listed)
    FigureCanvasAgg(figure).draw()
    whole = figure.bbox
    for i, (text, box, straight) in enumerate(drawn):
        inside = (
            whole.x0 <= box.x0 <= box.x1 <= whole.x1 and whole.y0 <= box.y0 <= box.y1 <= whole.y1
        )
        assert inside, f"{text!r} at {box.extents} in {whole.extents}"
        # The box of a text that stands askew is far larger than it.
        lying = [t for t, its, flat in drawn[:i] if straight and flat and box.overlaps(its)]
        assert not lying, f"{lying} on {text!r}"
    assert len(drawn) > 10


@pytest.mark.parametrize(
    ("low", "high"), [(1e-5, 1e3), (1.5, 7), (0.3, 25), (0.02, 0.9), (1e-12, 1e4)]
)
def test_logarithmic_axes_say_in_plain_text_what_matplotlibs_own_say(low, high):
    def texts(plot) -> list[str]:
        plot.set_ylim(low, high)
        found = [*plot.get_yticklabels(), *plot.get_yticklabels(minor=True)]
        return [label.get_text() for label in found if label.get_text()]

    usual, plain = Figure().subplots(), Figure().subplots()
    usual.set_yscale("log")
    make_logarithmic(plain, y=True)
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    expected, decades = [], []
    for text in texts(usual):
        factor, power = re.fullmatch(
            r"\$\\mathdefault\{(?:(\d)\\times)?10\^\{(.+)\}\}\$", text
        ).groups()
        formula = (f"{factor}×" if factor else "") + "10" + power.translate(raised)
        near = -2 <= int(power) < 3  # written as people do
        expected.append(f"{int(factor or 1) * 10.0 ** int(power):g}" if near else formula)
        decades += [] if factor else expected[-1:]
    found = texts(plain)
    kept = [text for text in expected if text in decades or text in found]
    assert found == kept and len(found) >= 2
    if high < 30 * low:
        assert found == expected
