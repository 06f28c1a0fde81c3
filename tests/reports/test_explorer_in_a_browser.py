"""The explorer in a real browser: pointer, keyboard, epochs played; no error and no request."""

from __future__ import annotations

from copy import deepcopy

import pytest
import synthetic
from browsing import MARKS, browser, open_file, violations  # noqa: F401 (the fixtures)

from lsa.reports import explorer

HOSTILE = "</script><img src=x onerror=alert(1)>"
EPOCHS = """document.getElementById('map').data.filter(trace => trace.meta === 'points')
    .flatMap(trace => trace.customdata).map(i => data.points[i].epoch)"""
# Where on the screen the k-th point of the first trace of a kind is.
PLACE = """(map, [kind, k]) => {
    const { _size: size, xaxis, yaxis } = map._fullLayout, box = map.getBoundingClientRect();
    const { x, y } = map.data.find(trace => trace.meta === kind && trace.x.length);
    return [box.x + size.l + xaxis.d2p(x[k]), box.y + size.t + yaxis.d2p(y[k])];
}"""
pytestmark = MARKS


@pytest.fixture
def open_page(open_file, tmp_path):  # noqa: F811
    """Opens a page of the explorer, which then asks for no file either."""
    asked: list[str] = []

    def opened(html: str, script: str = "", **options):
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        page = open_file(file, script, **options)
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_selector("html[data-ready=yes]", timeout=120_000)
        return page

    yield opened
    assert asked == []


@pytest.fixture(scope="module")
def content(made_once):
    _, made = made_once(lambda folder: explorer.content(synthetic.studied(folder)))
    made["points"][-1]["doubts"].append(HOSTILE)
    made["points"][-1]["optimizer"] = made["optimizers"][-1] = HOSTILE
    for point in made["points"]:
        if point["optimizer"] == "adamw":
            point["optimizer"] = HOSTILE
    return made


@pytest.fixture(scope="module")
def html(content):
    return explorer.explorer.page(content)


def chips(page, name: str) -> list[str]:
    return page.locator(f"#{name} button").all_inner_texts()


def test_by_keyboard_alone(content, html, open_page):
    page = open_page(html)
    status = page.locator("#status")
    page.keyboard.press("Tab")
    page.focus("#map")
    page.keyboard.press("Escape")
    assert chips(page, "selected") == [] and status.inner_text() == "None selected."
    seen = []
    for _ in range(6):
        page.keyboard.press("ArrowRight")
        seen.append(status.inner_text())
        if len(seen) == 2 or len(seen) == 4:
            page.keyboard.press("Enter")
    assert len(set(seen)) == 5 and all("largest curvature λ_max" in text for text in seen)
    assert len(chips(page, "selected")) == 2
    assert page.locator("#numbers tbody tr").count() == len(content["leading"])
    shown = page.locator("#numbers tbody tr", has_text="largest curvature").locator("td")
    assert all("±" in text for text in shown.all_inner_texts())
    assert page.evaluate("document.getElementById('curves').data.filter(t => t.name).length") == 2

    page.keyboard.press("e")
    assert page.evaluate("document.activeElement.id") == "edge-title"
    assert "barrier" in status.inner_text() and page.locator("#profile .scatterlayer path").count()
    ways = page.evaluate("document.getElementById('profile').data.map(t => t.name)")
    assert "straight line" in ways and any("minimum-energy path" in way for way in ways)
    page.locator("#edge-values summary").press("Enter")
    rows = page.locator("#edge-values tbody tr")
    rows.first.wait_for()
    assert rows.count() == 61 + 61 + 41

    page.locator("#list summary").press("Enter")
    page.locator("#list tbody tr").first.wait_for()
    assert page.locator("#list tbody tr").count() == len(content["points"])
    before = len(chips(page, "selected"))
    page.get_by_label(f"select {HOSTILE}, seed 1, epoch 12", exact=True).press("Space")
    assert abs(len(chips(page, "selected")) - before) == 1
    assert page.locator("img").count() == 0 and page.locator("script").count() == 4


def test_epochs_are_played_and_set_by_hand(html, open_page):
    page = open_page(html)
    assert set(page.evaluate(EPOCHS)) == {synthetic.EPOCHS}
    page.click("#play")
    page.wait_for_function(
        "document.getElementById('epoch-read').textContent.startsWith('epoch 3 ')"
    )
    assert set(page.evaluate(EPOCHS)) == {3}
    page.click("#play")
    assert page.inner_text("#play") == "Play"
    page.focus("#epoch")
    page.keyboard.press("Home")
    assert page.get_attribute("#epoch", "aria-valuetext") == f"epoch 1 of {synthetic.EPOCHS}"
    page.check("#all-shown")
    page.focus("#epoch")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    assert sorted(page.evaluate(EPOCHS)) == sorted([1, 2, 3] * 6)


@pytest.mark.parametrize("width", [1600, 390])
def test_by_pointer_and_by_touch(html, open_page, width):
    page = open_page(html, has_touch=width < 500, viewport={"width": width, "height": 900})
    plot = page.locator("#map")
    press = page.touchscreen.tap if width < 500 else page.mouse.click
    before = chips(page, "selected")
    plot.scroll_into_view_if_needed()
    press(*plot.evaluate(PLACE, ["points", 1]))
    page.wait_for_function(
        f"document.querySelectorAll('#selected button').length !== {len(before)}"
    )
    page.wait_for_timeout(600)  # a second tap within half a second counts as the first
    press(*plot.evaluate(PLACE, ["edges", 0]))
    page.wait_for_selector("#edge:not([hidden])")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(html, open_page, scheme):
    page = open_page(html, color_scheme=scheme)
    page.evaluate("openEdge(0)")
    page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    page.locator("#list tbody tr").first.wait_for()
    assert violations(page) == []


def test_a_screen_reader_has_a_name_for_everything_that_it_comes_to(html, open_page):
    page = open_page(html)
    page.evaluate("openEdge(0)")
    page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    page.locator("#list tbody tr").first.wait_for()
    session = page.context.new_cdp_session(page)
    session.send("Accessibility.enable")
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    told = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"]
    ]
    kinds = {"button", "checkbox", "combobox", "slider", "link", "image", "table", "region"}
    assert {role for role, _ in told} >= kinds
    assert [role for role, name in told if role in kinds and not name] == []
    assert "graphics-symbol" not in {role for role, _ in told}
    acting = [name for role, name in told if role in ("button", "checkbox")]
    assert len(acting) == len(set(acting))
    levels = [
        next(p["value"]["value"] for p in node["properties"] if p["name"] == "level")
        for node in nodes
        if not node["ignored"] and node["role"]["value"] == "heading"
    ]
    assert levels[0] == 1 and set(levels[1:]) == {2}


# --- many checkpoints, drawn by WebGL -------------------------------------------------------------

MANY = 60  # copies of the checkpoints
NO_WEBGL = """HTMLCanvasElement.prototype.getContext = (get => function (kind, ...more) {
    return kind.includes('webgl') ? null : get.call(this, kind, ...more);
})(HTMLCanvasElement.prototype.getContext);"""
KINDS = "[...new Set(document.getElementById('map').data.map(trace => trace.type))]"


@pytest.fixture(scope="module")
def many(content):
    """The page of some thousand checkpoints, each copy with other numbers."""
    made = deepcopy(content)
    for copy in range(1, MANY):
        for point in deepcopy(content["points"]):
            point["seed"] += 100 * copy
            point["run"] += f"-{copy}"
            for values in point["numbers"].values():
                values[:3] = [v and v * (1 + copy / MANY) for v in values[:3]]
            made["points"].append(point)
    return explorer.explorer.page(made)


@pytest.mark.parametrize(
    "script, kind", [("", "scattergl"), pytest.param(NO_WEBGL, "scatter", marks=pytest.mark.full)]
)
def test_a_thousand_checkpoints_by_pointer_and_by_keyboard(many, content, open_page, script, kind):
    page = open_page(many, script)
    page.check("#all-shown")
    assert len(page.evaluate(EPOCHS)) == MANY * len(content["points"]) > 1000
    assert page.evaluate(KINDS) == [kind]
    plot = page.locator("#map")
    plot.scroll_into_view_if_needed()
    before = chips(page, "selected")
    page.mouse.click(*plot.evaluate(PLACE, ["points", 7]))
    page.wait_for_function(
        f"document.querySelectorAll('#selected button').length !== {len(before)}"
    )
    page.focus("#map")
    told = page.inner_text("#status")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#status") != told and page.locator("#rings .aimed").count() == 1
    page.mouse.move(*plot.evaluate(PLACE, ["edges", 0]))
    page.locator("#map .hovertext", has_text=" – ").wait_for()
    page.wait_for_timeout(600)  # two clicks within a third of a second are a double click
    page.mouse.click(*plot.evaluate(PLACE, ["edges", 0]))
    page.wait_for_selector("#edge:not([hidden])")


COUNTED = """window.begun = new Set();
HTMLCanvasElement.prototype.getContext = (get => function (kind, ...more) {
    if (kind.includes('webgl')) begun.add(this);
    return get.call(this, kind, ...more);
})(HTMLCanvasElement.prototype.getContext);"""


def test_axes_with_few_and_many_numbers_alternate_without_a_new_canvas(many, open_page):
    page = open_page(many, COUNTED)
    page.check("#all-shown")
    page.evaluate("data.points.slice(99).forEach(p => { delete p.numbers['auto_neb/path_loss']; })")
    drawn = []
    for name in ("lanczos/lambda_max", "auto_neb/path_loss", "lanczos/lambda_max") * 2:
        page.select_option("#x", name)
        page.wait_for_timeout(100)
        drawn.append((len(page.evaluate(EPOCHS)), page.evaluate("begun.size")))
    counts, canvases = zip(*drawn, strict=True)
    assert min(counts) < 200 and max(counts) > 1000 and len(set(canvases)) == 1, drawn


# --- surfaces -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_surface(content):
    """The page of a bowl 1 + x² + 2y² through the first checkpoint."""
    x = [-1.0, -0.5, 0.0, 0.5, 1.0]
    loss = [[1 + a * a + 2 * b * b for a in x] for b in x]
    marks = {"name": [HOSTILE], "x": [0.0], "y": [0.0], "loss": [1.0]}
    found = {"point": 0, "plane": "random", "labels": ["x, first", "y, second"], "x": x, "y": x}
    surfaces = [{**found, "grid": {"loss": loss}, "marks": marks}]
    return explorer.explorer.page({**content, "surfaces": surfaces})


@pytest.mark.parametrize(
    "width, kind",
    [
        (1600, "surface"),
        (390, "contour"),
        pytest.param(1600, "contour", marks=pytest.mark.full),
        pytest.param(390, "surface", marks=pytest.mark.full),
    ],
)
def test_a_surface_is_seen_turned_and_read(with_surface, open_page, kind, width):
    page = open_page(with_surface, viewport={"width": width, "height": 900})
    assert page.locator("#surface-shown").is_hidden()
    page.select_option("#surface-as", kind)
    page.locator("#surface-show").press("Enter")
    page.wait_for_function("document.getElementById('surface').data")
    assert page.evaluate("document.getElementById('surface').data.map(t => t.type)") == [
        kind, "scatter3d" if kind == "surface" else "scatter",
    ]  # fmt: skip
    assert page.inner_text("#status").endswith("loss 1 to 4.")
    page.locator("#surface-values summary").press("Enter")
    page.locator("#surface-values tbody tr").first.wait_for()
    rows = page.locator("#surface-values tbody tr").all_inner_texts()
    assert len(rows) == 25 and rows[5].split() == ["-0.5", "-1", "2.5"]
    if kind == "surface":
        eye = "document.getElementById('surface')._fullLayout.scene._scene.getCamera().eye"
        before = page.evaluate(eye)
        page.locator("#surface").press("ArrowLeft")
        page.wait_for_function(f"Math.abs({eye}.x - {before['x']}) > .1")
        after = page.evaluate(eye)
        far = [sum(v * v for v in at.values()) for at in (before, after)]
        assert far[0] == pytest.approx(far[1]) and after["z"] == pytest.approx(before["z"])
        heights = "document.getElementById('surface')._fullLayout.scene.zaxis.title.text"
        assert page.evaluate(heights) == "loss"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert violations(page) == []
