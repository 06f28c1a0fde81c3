"""The page of a surface in a real browser: read by touch and keyboard, turned, axes, dark mode."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from browsing import MARKS, browser, open_file, violations  # noqa: F401 (the fixtures)

from lsa.figures import interactive
from lsa.probe import Metric, Result

pytestmark = MARKS
X = np.linspace(-1, 1, 5)
# What is written beside the relief, and where; what is drawn in the page's ink is text or an axis.
WRITTEN = """() => { const said = [], write = CanvasRenderingContext2D.prototype.fillText;
    CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
        const wide = this.measureText(text).width;
        const left = x - { left: 0, center: .5, right: 1 }[this.textAlign] * wide;
        if (this.canvas.id === 'relief') said.push([text, x, y, this.fillStyle, left, wide]);
        write.call(this, text, x, y); };
    drawRelief(); CanvasRenderingContext2D.prototype.fillText = write; return said; }"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The bowl 1 + x² + 2y², of heights 1 to 4."""
    loss = 1 + X[None, :] ** 2 + 2 * X[:, None] ** 2
    grid = {"loss": loss, "error": 0.1 * loss}
    errors = {k: np.full_like(loss, 0.01) for k in ("loss_error", "rise_error", "error_error")}
    marks = {
        "mark": np.array(["checkpoint"]),
        **{f"mark_{k}": np.zeros(1) for k in ("x", "y", "distance", *errors)},
        "mark_loss": np.ones(1),
        "mark_error": np.full(1, 0.1),
    }
    axes = {"x": X, "y": X, "plane": np.array("random"), "labels": np.array(["x, a", "y, b"])}
    arrays = {f"surface.{k}": v for k, v in {**grid, **errors, **marks, **axes}.items()}
    file = tmp_path_factory.mktemp("page") / "surface.html"
    file.write_text(interactive.surface(Result({"loss": Metric(1.0)}, arrays=arrays), "bowl"))
    return file


@pytest.mark.parametrize("width", [1600, 390])
def test_a_point_is_read_by_pointer_or_touch_and_by_keyboard(page, open_file, width):  # noqa: F811
    shown = open_file(page, has_touch=width < 500, viewport={"width": width, "height": 900})
    assert shown.inner_text("#reading").startswith("x = 0, y = 0: loss 1 ± 0.02")
    plane = shown.locator("#map")
    plane.scroll_into_view_if_needed()
    right = """map => { const box = map.getBoundingClientRect(), f = frame(box.width, box.width);
        return [box.x + f.x(.5), box.y + f.y(-1)]; }"""
    press = shown.touchscreen.tap if width < 500 else shown.mouse.click
    press(*plane.evaluate(right))
    assert shown.inner_text("#reading").startswith("x = 0.5, y = -1: loss 3.25 ± 0.02")
    plane.press("ArrowRight")
    plane.press("ArrowUp")
    assert shown.inner_text("#reading").startswith("x = 1, y = -0.5: loss 2.5 ± 0.02")
    assert shown.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1200, 390])
def test_the_relief_has_a_height_axis_however_it_is_turned(page, open_file, width):  # noqa: F811
    shown = open_file(page, viewport={"width": width, "height": 900})
    for turns in range(8):
        said = shown.evaluate(WRITTEN)
        (name,) = [row for row in said if row[0] == "loss"]
        near = [(text, y) for text, x, y, *_ in said if abs(x - name[1]) < 60]
        ticks = {text: y for text, y in near if text in ("2", "3", "4")}  # 1 ends x and y as well
        assert len(ticks) == 3, (turns, said)
        up = np.diff([ticks[level] for level in ("2", "3", "4")])
        assert (up < 0).all() and np.ptp(up) < 1e-6 * abs(up[0])  # upwards, and equal steps
        placed = [(left, left + wide, y) for *_, y, _, left, wide in said]
        for (a, b, y), (c, d, z) in combinations(placed, 2):
            assert b < c or d < a or abs(y - z) > 10, (turns, said)  # no text lies on another
        for _ in range(8):
            shown.locator("#relief").press("ArrowRight")
    shown.check("#logarithmic")
    assert [row[0] for row in shown.evaluate(WRITTEN)].count("loss (logarithmic)") == 1


def test_fingers_turn_the_relief_scroll_the_page_and_magnify_it(page, open_file):  # noqa: F811
    size = {"width": 390, "height": 844}
    shown = open_file(page, has_touch=True, is_mobile=True, viewport=size)
    session = shown.context.new_cdp_session(shown)

    def move(*fingers):  # each from a place to another, beside the middle of the relief
        relief = shown.locator("#relief")
        relief.evaluate("made => made.scrollIntoView({ block: 'center' })")
        box = relief.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for k in range(11):
            points = [
                {"id": i, "x": x + (a + (c - a) * k / 10), "y": y + (b + (d - b) * k / 10)}
                for i, ((a, b), (c, d)) in enumerate(fingers)
            ]
            kind = "touchMove" if k else "touchStart"
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
            shown.wait_for_timeout(16)
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        shown.wait_for_timeout(300)
        return shown.evaluate("[turn, scrollY, visualViewport.scale]")

    before, *_ = shown.evaluate("[turn]")
    turned, at, scale = move(((0, 0), (100, 0)))
    assert turned == pytest.approx(before + 1, abs=0.1) and scale == 1
    assert move(((0, 0), (0, -80)))[1] > at
    assert move(((-30, 0), (-120, 0)), ((30, 0), (120, 0)))[2] > 1.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_the_ink_follows_the_scheme(page, open_file, scheme):  # noqa: F811
    shown = open_file(page, color_scheme=scheme)
    shown.locator("summary").press("Enter")
    shown.locator("#values td").first.wait_for()
    assert violations(shown) == []
    inks = {row[3] for row in shown.evaluate(WRITTEN) if row[0] == "loss"}
    assert inks == {"#222222" if scheme == "light" else "#e6e6e6"}
