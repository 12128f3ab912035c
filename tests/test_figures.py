"""Figures: hostile tokens stay text, colours stay readable, numbers are those of the frame."""

from __future__ import annotations

import html
from html.parser import HTMLParser
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import figures, markup, theme

HOSTILE = [
    "<script>window.XSS=1</script>",
    '<img src="http://evil.test/x.png" onerror="window.XSS=1">',
    '" onmouseover="window.XSS=1',
    "' style='position:fixed",
    "</span></div><form action=http://evil.test><input>",
    "![x](http://evil.test/y.png) $x$ :red[hi]",
    "&lt;b&gt;",
    "\u202egnp.exe\u200b",
    "\x00\x1b[31m",
    "<!-- ", "-->", "<style>*{display:none}", " \n\t\r ",
]  # fmt: skip
hostile_tokens = st.lists(
    st.one_of(st.sampled_from(HOSTILE), st.text(max_size=12), st.text(alphabet="<>\"'&=/ \n!-", max_size=8)),
    min_size=1,
    max_size=12,
)


class Example(NamedTuple):
    value: float
    tokens: list[str]
    values: list[float]
    centre: int = 0
    doc: int = 3
    pos: int = 7
    band: str = ""
    repeats: int = 1


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.styles: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self.depth = 0
        self.comments: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.styles += [value or "" for name, value in attrs if name == "style"]
        self.titles += [value or "" for name, value in attrs if name == "title"]
        self.depth += tag != "wbr"

    def handle_endtag(self, tag: str) -> None:
        self.depth -= 1

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)


def parse(markup_object: object) -> _Seen:
    seen = _Seen()
    seen.feed(str(markup_object))
    seen.close()
    return seen


def assert_inert(markup_object: object) -> _Seen:
    """Nothing but our own tags and attributes exists, whatever the data was."""
    seen = parse(markup_object)
    assert set(seen.tags) <= {"div", "span", "b", "wbr", "table", "thead", "tbody", "tr", "th", "td"}
    assert seen.attributes <= {"style", "title"}
    assert seen.depth == 0 and not seen.comments
    assert all("url(" not in s and "position" not in s and "<" not in s for s in seen.styles)
    return seen


@settings(max_examples=150, deadline=None)
@given(hostile_tokens, st.data())
def test_hostile_tokens_in_a_strip_stay_text(tokens: list[str], data: st.DataObject) -> None:
    number = st.one_of(st.just(0.0), st.floats(-50, 50), st.just(float("nan")))
    values = data.draw(st.lists(number, min_size=len(tokens), max_size=len(tokens)))
    seen = assert_inert(figures.token_strip(tokens, values))
    shown = [
        figures.glyphs(t, spaces=bool(markup.highlight(v, _top(values)))) for t, v in zip(tokens, values)
    ]
    assert seen.text == "".join(shown)


def _top(values: list[float]) -> float:
    return max((abs(v) for v in values if np.isfinite(v)), default=0.0)


@settings(max_examples=60, deadline=None)
@given(hostile_tokens, st.text(max_size=20))
def test_hostile_tokens_in_the_other_panels_stay_text(tokens: list[str], word: str) -> None:
    hostile = word + tokens[0]
    example = Example(1.5, tokens, [1.0] * len(tokens), band=hostile)
    assert_inert(figures.examples_panel([example, example._replace(value=-2.0)], footer=hostile))
    frame = pd.DataFrame(
        {"side": "top", "rank": range(len(tokens)), "token": tokens, "value": np.linspace(1, 0, len(tokens))}
    )
    assert_inert(figures.logit_table(frame))
    assert_inert(figures.stat_tiles([(hostile, hostile)]))
    assert_inert(figures.table([hostile, "n"], [[hostile, 1], [tokens[-1], 2]]))
    assert_inert(figures.meters([figures.Meter(hostile, 1.0, 2.0, " %")]))
    both = assert_inert(figures.steer_compare(hostile, hostile, tokens[-1], notes=(hostile, hostile)))
    assert both.text.count(markup.plain(hostile)) >= 3


@given(st.text(max_size=30))
def test_no_character_that_acts_on_the_layout_survives(text: str) -> None:
    shown = figures.glyphs(text + "\u202e\x00\u200b")
    assert not set(shown) & set("\n\t\r \x00\u202e\u200b\u2028")
    assert shown.encode("utf-8")


def test_a_space_and_a_line_break_are_visible() -> None:
    assert figures.glyphs(" a\n") == "␣a↵"
    strip = parse(figures.token_strip([" a", " b"], [0.0, 2.0]))
    assert strip.text == " a␣b", "only a highlighted token shows its space as a glyph"


def test_sign_is_not_carried_by_colour_alone() -> None:
    seen = parse(figures.token_strip(["a", "b"], [1.0, -1.0]))
    assert seen.titles == ["a  +1.00", "b  −1.00"]
    assert "dotted" not in seen.styles[1] and "dotted" in seen.styles[2]


def test_examples_show_value_document_repeats_and_bands() -> None:
    rows = [
        Example(3.0, ["x"], [3.0], band="top", repeats=4),
        Example(-1.0, ["y"], [-1.0], band="top"),
        Example(0.5, ["z"], [0.5], band="5 to 10 %"),
    ]
    text = parse(figures.examples_panel(rows, footer="3 of 9 contexts")).text
    assert text.count("top") == 1 and "5 to 10 %" in text and "3 of 9 contexts" in text
    assert "+3.00" in text and "−1.00" in text and "doc 3:7 ×4" in text


def _luminance(rgb: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    hi, lo = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (hi + 0.05) / (lo + 0.05)


def _hex(text: str) -> tuple[int, ...]:
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize("name", ["light", "dark"])
@pytest.mark.parametrize("colour", [theme.POSITIVE, theme.NEGATIVE, theme.CONTROL])
def test_text_on_the_strongest_highlight_is_readable(name: str, colour: tuple[int, int, int]) -> None:
    p = theme.palette(name)
    for alpha in np.linspace(0, theme.MAX_ALPHA, 20):
        ground = tuple(alpha * c + (1 - alpha) * g for c, g in zip(colour, _hex(p.ground)))
        assert _contrast(_hex(p.ink), ground) >= 4.5


@pytest.mark.parametrize("name", ["light", "dark"])
def test_every_written_colour_is_readable_on_the_page(name: str) -> None:
    p = theme.palette(name)
    for ink in (p.ink, p.muted, p.positive_text, p.negative_text):
        assert _contrast(_hex(ink), _hex(p.ground)) >= 4.5
        assert _contrast(_hex(ink), _hex(p.panel)) >= 4.5


def test_streamlit_theme_says_the_same_colours() -> None:
    import tomllib

    config = tomllib.loads((theme.CSS_FILE.parent / ".streamlit/config.toml").read_text(encoding="utf-8"))
    for name, p in (("light", theme.LIGHT), ("dark", theme.DARK)):
        part = config["theme"][name]
        assert part["backgroundColor"] == p.ground and part["textColor"] == p.ink
        assert part["sidebar"]["backgroundColor"] == p.panel and part["borderColor"] == p.line
    assert config["server"]["address"] == "127.0.0.1" and not config["browser"]["gatherUsageStats"]


def test_histogram_keeps_counts_and_tells_the_signs_apart() -> None:
    frame = pd.DataFrame({"lo": [-2.0, -1.0, 0.0, 1.0], "hi": [-1.0, 0.0, 1.0, 2.0], "count": [5, 0, 7, 1]})
    fig = figures.act_histogram(frame)
    assert fig.layout.meta["n"] == 13
    bar = fig.data[0]
    assert np.nansum(bar.y) == 13 and np.isnan(bar.y[1]), "an empty bin has no bar on a log axis"
    assert bar.marker.color[0] == f"rgb{theme.NEGATIVE}" and bar.marker.color[3] == f"rgb{theme.POSITIVE}"


def test_density_histogram_counts_dead_features_apart() -> None:
    fig = figures.density_histogram([0.0, 0.0, 1e-3, 1e-2, 1.0], marker=1e-3)
    assert fig.layout.meta == {"n": 3, "unit": "features", "dead": 2}
    assert sum(fig.data[0].y) == 3
    assert figures.density_histogram([0.0, 0.0]).layout.meta["n"] == 0


def test_plot_labels_cannot_carry_markup() -> None:
    fig = figures.feature_bars(["<b>x</b>", "y\n"], [1.0, -2.0])
    assert list(fig.layout.yaxis.ticktext) == ["&lt;b&gt;x&lt;/b&gt;", "y↵"]


def test_numbers_are_short_and_keep_their_sign() -> None:
    assert [figures.number(v) for v in (0, 3, 1234567, 0.0123456, -14.23, None, float("nan"))] == [
        "0", "3", "1,234,567", "0.0123", "−14.2", "–", "–",
    ]  # fmt: skip
    assert [figures.signed(v) for v in (1.234, -0.5, 0.0, -0.001)] == ["+1.23", "−0.50", "0.00", "0.00"]


def test_saved_page_is_self_contained(tmp_path) -> None:
    path = tmp_path / "strip.html"
    figures.token_strip(HOSTILE, list(range(len(HOSTILE)))).save(path)
    page = path.read_text(encoding="utf-8")
    assert "http://evil.test" in html.unescape(page) and "<script" not in page
    assert figures.token_strip(["a"])._repr_html_() == str(figures.token_strip(["a"]))


def test_curves_draw_a_line_for_each_run_and_thin_out_long_ones() -> None:
    frame = pd.DataFrame({"name": ["<b>a"] * 5000 + ["b"] * 3, "step": [*range(5000), 1, 2, 3], "fvu": 0.5})
    fig = figures.training_curves(frame, x="step")
    assert len(fig.data) == 2 and len(fig.data[0].x) <= figures.MAX_CURVE and list(fig.data[1].x) == [1, 2, 3]
    assert "<b>" not in fig.data[0].name
    assert len(figures.training_curves(frame.drop(columns="name"), x="step").data) == 1


def test_map_shows_every_living_feature_and_rings_the_chosen_one() -> None:
    frame = pd.DataFrame(
        {"feature": [3, 5, 8], "x": [0.0, 1.0, 2.0], "y": [0.0, 1.0, 0.5], "density": [0.1, 0.01, 1e-4]}
    )
    fig = figures.feature_map(frame, marker=5)
    assert list(fig.data[0].x) == [0.0, 1.0, 2.0] and fig.layout.meta["n"] == 3
    assert list(fig.data[1].x) == [1.0]
    assert len(figures.feature_map(frame, marker=99).data) == 1
