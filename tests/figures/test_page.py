"""Sections as HTML and as Markdown: the same content, and no text that becomes markup."""

from __future__ import annotations

from html.parser import HTMLParser

from lsa.figures.page import Link, Section, as_fragment, as_html, as_markdown

HOSTILE = "<script>alert('x')</script> | `a` *b* [c](d) \\ & \"e\""


class Reader(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_hostile_text_is_text_everywhere_on_the_page():
    link = Link(HOSTILE, "http://host/'onmouseover='x")
    section = Section(HOSTILE, HOSTILE, (HOSTILE,), [(HOSTILE,), (link,)])
    figure = Section(HOSTILE, HOSTILE, figure=b"png")
    page = Reader(as_html(HOSTILE, [section, figure]))
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and page.text.count(HOSTILE) == 9
    (anchor,) = [attributes for tag, attributes in page.tags if tag == "a"]
    assert anchor == {"href": "http://host/'onmouseover='x"}
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["alt"] == HOSTILE
    assert "script" not in [tag for tag, _ in Reader(as_fragment([section, figure])).tags]


def test_a_markdown_table_keeps_its_columns():
    section = Section("t", "", ("a", "b"), [("x | y", "two\nlines"), ("<b>", "c")])
    *_, first, second = as_markdown("title", [section]).strip().splitlines()
    assert first == r"| x \| y | two<br>lines |" and second == "| &lt;b&gt; | c |"


def test_verdicts_stand_out():
    verdicts = ["established: larger for a", "not established", "DOES NOT HOLD", "not converged"]
    rows = [("a", verdict) for verdict in verdicts]
    page = Reader(as_html("t", [Section("s", "", ("of", "verdict"), rows)]))
    classes = [attributes.get("class") for tag, attributes in page.tags if tag == "td"]
    assert classes == ["good", None, "bad", "bad"]
    cell = as_fragment([Section("", "", ("of", "λ"), [("a", "1 ± 2\nnot converged")])])
    assert "<td>1&nbsp;±&nbsp;2<br><span class='bad'>not converged</span></td>" in cell


def test_a_page_says_what_it_holds_and_fits_a_telephone():
    sections = [
        Section("Start"), Section("Figures"), Section("one", level=3), Section("Numbers"),
        Section("", "why", ("a",), [("1",)], folded="2 of 3"),
    ]  # fmt: skip
    page = Reader(as_html("t", sections))
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    named = {attributes.get("id"): tag for tag, attributes in page.tags if tag in ("h2", "h3")}
    assert links == ["#s1", "#s2", "#s3"] and [named[one[1:]] for one in links] == [
        "h2",
        "h3",
        "h2",
    ]
    tags = [tag for tag, _ in page.tags]
    assert tags.count("main") == tags.count("nav") == tags.count("details") == 1
    (viewport,) = [a for tag, a in page.tags if tag == "meta" and a.get("name") == "viewport"]
    assert "width=device-width" in viewport["content"]
