"""HTML of tokens and small tables: frames and lists in, an `HTML` object out that Streamlit and Jupyter show.

Everything that comes from data goes through `html.escape(quote=True)` here; numbers are formatted here. Styles
are inline and constant, colours are CSS variables with the light theme as fallback, so the same markup works in
the app, in a notebook and in a saved file without scripts or other files. No streamlit import.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app import theme

INK = f"var(--as-ink,{theme.LIGHT.ink})"
MUTED = f"var(--as-muted,{theme.LIGHT.muted})"
LINE = f"var(--as-line,{theme.LIGHT.line})"
ACCENT = f"var(--as-accent,{theme.LIGHT.accent})"
POSITIVE_TEXT = f"var(--as-positive-text,{theme.LIGHT.positive_text})"
NEGATIVE_TEXT = f"var(--as-negative-text,{theme.LIGHT.negative_text})"
_GLYPHS = {"\n": "↵", "\t": "⇥", "\r": "␍"}
_NUMBER = "font-variant-numeric:tabular-nums"
_TOKENS = (
    f"font-family:{theme.MONO};font-size:13px;line-height:1.75;white-space:pre-wrap;overflow-wrap:anywhere"
)


class HTML:
    """A piece of markup that notebooks and `st.html` render."""

    def __init__(self, body: str) -> None:
        self.body = body

    def _repr_html_(self) -> str:
        return self.body

    def __str__(self) -> str:
        return self.body

    def save(self, path: str | Path) -> None:
        """Write a page of its own."""
        page = f'<!doctype html><meta charset="utf-8"><body style="font-family:{theme.SANS}">{self.body}'
        Path(path).write_text(page, encoding="utf-8")


def escape(text: object) -> str:
    """Text from data, safe in element content and in quoted attributes."""
    return html.escape(plain(str(text)), quote=True)


def plain(text: str) -> str:
    """Text without characters that act on the layout: controls, bidirectional marks, lone surrogates."""
    return "".join(c if c in "\n\t\r" or unicodedata.category(c) not in _ACTING else _code(c) for c in text)


_ACTING = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def _code(char: str) -> str:
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"


def glyphs(token: str, *, spaces: bool = True) -> str:
    """A token as one line of plain text: breaks as ↵, tabs as ⇥, spaces as ␣ (if `spaces`)."""
    text = "".join(_GLYPHS.get(c, c) for c in plain(token))
    return text.replace(" ", "␣") if spaces else text


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, with a true minus; zero has none."""
    if not math.isfinite(value):
        return "–"
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def number(value: Any, digits: int = 3) -> str:
    """A number of any size in few characters; – for a missing one."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if float(value).is_integer() and size < 1e7:
        text = f"{size:,.0f}"
    elif 1e-3 <= size < 1e5:
        text = f"{size:,.{max(digits - 1 - math.floor(math.log10(size)), 0)}f}"
    else:
        text = f"{size:.{digits - 1}e}"
    return ("−" if value < 0 else "") + text


def highlight(value: float, scale: float, colour: tuple[int, int, int] | None = None) -> str:
    """Inline style of a token of this value: hue and underline by sign, strength by |value| / scale."""
    if not math.isfinite(value) or value == 0 or not scale > 0:
        return ""
    alpha = theme.MAX_ALPHA * (0.15 + 0.85 * min(abs(value) / scale, 1.0))
    if colour is not None:
        return f"background:{theme.rgba(colour, alpha)};border-radius:2px"
    if value > 0:
        return f"background:{theme.rgba(theme.POSITIVE, alpha)};border-radius:2px"
    under = f"border-bottom:2px dotted {NEGATIVE_TEXT}"
    return f"background:{theme.rgba(theme.NEGATIVE, alpha)};border-radius:2px;{under}"


def _spans(
    tokens: Sequence[str],
    values: Sequence[float],
    scale: float,
    *,
    centre: int | None = None,
    colour: tuple[int, int, int] | None = None,
    digits: int = 2,
) -> str:
    out = []
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        style = highlight(float(value), scale, colour)
        text = html.escape(glyphs(token, spaces=bool(style)), quote=True)
        if i == centre:
            style += ";font-weight:600"
        if style:
            tip = html.escape(f"{glyphs(token)}  {signed(float(value), digits)}", quote=True)
            # A visible space is no place to break a line, so one is named.
            brk = "<wbr>" if text.startswith("␣") else ""
            text = f'{brk}<span style="{style}" title="{tip}">{text}</span>'
        out.append(text)
    return "".join(out)


def token_strip(
    tokens: Sequence[str],
    values: Sequence[float] | None = None,
    *,
    scale: float | None = None,
    colour: tuple[int, int, int] | None = None,
    digits: int = 2,
) -> HTML:
    """Tokens in a row, each coloured by its value.

    `scale` is the |value| of full strength, by default the largest one. `colour` replaces orange and blue for
    values without a sign, such as an error.
    """
    values = [0.0] * len(tokens) if values is None else list(values)
    top = scale or max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    body = _spans(tokens, values, top, colour=colour, digits=digits)
    return HTML(f'<div style="{_TOKENS}">{body}</div>')


def examples_panel(examples: Sequence[Any], *, scale: float | None = None, footer: str = "") -> HTML:
    """Contexts of a feature, one a line: value at the centre, tokens coloured by their values, document.

    `examples` have value, tokens, values, centre, doc, pos, band and repeats (see saes.queries.Example).
    Consecutive ones of one band stand under its name.
    """
    top = scale or max((abs(e.value) for e in examples), default=0.0)
    rows, band = [], None
    for e in examples:
        if e.band and e.band != band:
            band = e.band
            rows.append(f'<div style="color:{MUTED};font-size:12px;padding:10px 0 2px">{escape(band)}</div>')
        rows.append(_example_row(e, top))
    foot = f'<div style="color:{MUTED};font-size:12px;padding:8px 0">{escape(footer)}</div>' if footer else ""
    return HTML(f"<div>{''.join(rows)}{foot}</div>")


def _example_row(e: Any, scale: float) -> str:
    ink = NEGATIVE_TEXT if e.value < 0 else POSITIVE_TEXT
    times = f" ×{int(e.repeats)}" if e.repeats > 1 else ""
    where = f"doc {int(e.doc)}:{int(e.pos)}{times}"
    line = "display:grid;grid-template-columns:62px minmax(0,1fr) max-content;gap:0 8px;align-items:baseline"
    return (
        f'<div style="{line};border-bottom:1px solid {LINE};padding:4px 0">'
        f'<span style="color:{ink};font-family:{theme.MONO};font-size:12.5px">{signed(e.value)}</span>'
        f'<span style="{_TOKENS}">{_spans(e.tokens, e.values, scale, centre=e.centre)}</span>'
        f'<span style="color:{MUTED};font-size:12px;{_NUMBER}">{where}</span></div>'
    )


def stat_tiles(stats: Iterable[tuple[str, str]]) -> HTML:
    """Figures under a rule, each with a line that says what it is."""
    cells = "".join(
        f'<div style="border-top:2px solid {INK};padding-top:6px">'
        f'<div style="font-size:17px;font-weight:650;{_NUMBER}">{escape(value)}</div>'
        f'<div style="font-size:12px;color:{MUTED}">{escape(caption)}</div></div>'
        for value, caption in stats
    )
    grid = "display:grid;grid-template-columns:repeat(auto-fit,minmax(112px,1fr));gap:10px"
    return HTML(f'<div style="{grid}">{cells}</div>')


def value_rows(rows: Iterable[tuple[str, float]], *, digits: int = 2) -> str:
    """Lines of token and value."""
    return "".join(
        f'<div style="display:flex;justify-content:space-between;border-bottom:1px solid {LINE};padding:3px 0">'
        f'<span style="font-family:{theme.MONO};font-size:12.5px;white-space:pre">{escape(glyphs(token))}</span>'
        f'<span style="font-size:12.5px;{_NUMBER}">{signed(value, digits)}</span></div>'
        for token, value in rows
    )


def logit_table(frame: Any, *, n: int = 15) -> HTML:
    """Tokens that a direction raises and lowers most (columns side, rank, token, value)."""
    sides = []
    for side in ("top", "bottom"):
        part = frame[frame["side"] == side].sort_values("rank").head(n)
        sides.append(f"<div>{value_rows(zip(part['token'], part['value']))}</div>")
    return HTML(f'<div style="display:grid;grid-template-columns:1fr 1fr;gap:18px">{"".join(sides)}</div>')


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, text: int = 1) -> HTML:
    """A table of short cells: the first `text` columns are words, the others figures, right-aligned."""

    def cells(row: Sequence[object], tag: str, style: str) -> str:
        sides = ("left" if i < text else "right" for i in range(len(row)))
        return "".join(
            f'<{tag} style="text-align:{side};padding:4px 10px 4px 0;border:0;border-bottom:1px solid {LINE};{style}">'
            f"{escape(cell)}</{tag}>"
            for cell, side in zip(row, sides)
        )

    head = cells(columns, "th", f"font-weight:400;font-size:12px;color:{MUTED};white-space:nowrap")
    body = "".join(f"<tr>{cells(row, 'td', '')}</tr>" for row in rows)
    style = f"border-collapse:collapse;font-size:13px;width:100%;{_NUMBER}"
    return HTML(
        f'<div style="overflow-x:auto"><table style="{style}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def text_panel(title: str, note: str, prompt: str, text: str) -> HTML:
    """One generated text under its title; the prompt stands before it in muted ink."""
    head = (
        f'<div style="display:flex;justify-content:space-between;border-bottom:2px solid {INK};'
        f'padding-bottom:6px;margin-bottom:8px"><b>{escape(title)}</b>'
        f'<span style="color:{MUTED};font-size:12px;{_NUMBER}">{escape(note)}</span></div>'
    )
    body = f'<span style="color:{MUTED}">{escape(prompt)}</span>{escape(text)}'
    return HTML(f'<div>{head}<div style="{_TOKENS}">{body}</div></div>')


def steer_compare(prompt: str, baseline: str, steered: str, *, notes: tuple[str, str] = ("", "")) -> HTML:
    """Baseline and steered text side by side."""
    left = text_panel("Baseline", notes[0], prompt, baseline)
    right = text_panel("Steered", notes[1], prompt, steered)
    grid = "display:grid;grid-template-columns:1fr 1fr;gap:18px"
    return HTML(f'<div style="{grid}">{left}{right}</div>')


class Meter(NamedTuple):
    """One measure of two texts. `steered` alone is drawn where `baseline` is None."""

    title: str
    baseline: float | None
    steered: float | None
    unit: str = ""


def meters(rows: Iterable[Meter]) -> HTML:
    """Bars of baseline (grey) and steered (accent) under each measure's name."""
    return HTML("".join(_meter(m) for m in rows))


def _meter(m: Meter) -> str:
    shown = [v for v in (m.baseline, m.steered) if v is not None and math.isfinite(v)]
    top = max(shown, default=0.0) or 1.0
    bars = "".join(
        _bar(name, value, top, m.unit, colour)
        for name, value, colour in (
            ("baseline", m.baseline, theme.rgba(theme.CONTROL, 0.8)),
            ("steered", m.steered, ACCENT),
        )
        if not (name == "baseline" and value is None)
    )
    return f'<div style="padding:0 0 12px"><div style="font-size:13px">{escape(m.title)}</div>{bars}</div>'


def _bar(name: str, value: float | None, top: float, unit: str, colour: str) -> str:
    share = 100 * value / top if value is not None and math.isfinite(value) else 0
    return (
        '<div style="display:grid;grid-template-columns:58px 1fr 74px;gap:8px;align-items:center;font-size:12px;'
        f'color:{MUTED};{_NUMBER}"><span>{name}</span>'
        f'<span style="background:{LINE};height:7px;border-radius:4px;overflow:hidden">'
        f'<span style="display:block;height:7px;width:{share:.1f}%;background:{colour}"></span></span>'
        f'<span style="text-align:right;color:{INK}">{number(value)}{escape(unit)}</span></div>'
    )
