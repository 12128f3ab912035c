"""The one component of the app: a token strip that can be clicked. Constant script and style; tokens are data.

The script sets `textContent`, so a token that looks like markup stays text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import streamlit as st

from app.markup import glyphs, highlight, signed

HERE = Path(__file__).parent
_strip = st.components.v2.component(
    "atomscope_token_strip",
    html='<div id="strip" role="group" aria-label="tokens"></div>',
    css=(HERE / "token_strip.css").read_text(encoding="utf-8"),
    js=(HERE / "token_strip.js").read_text(encoding="utf-8"),
)


def clickable_strip(
    tokens: Sequence[str],
    values: Sequence[float] | np.ndarray,
    *,
    key: str,
    scale: float,
    chosen: int = -1,
    colour: tuple[int, int, int] | None = None,
    unit: str = "activation",
    on_change: Callable[[], None] = lambda: None,
) -> int | None:
    """Show tokens coloured by value; returns the index of the token that was clicked last."""
    styles = [highlight(float(v), scale, colour) for v in values]
    data = {
        "tokens": [glyphs(t, spaces=bool(s)) for t, s in zip(tokens, styles)],
        "tips": [
            f"token {i} {glyphs(t)}, {unit} {signed(float(v))}"
            for i, (t, v) in enumerate(zip(tokens, values))
        ],
        "styles": styles,
        "chosen": chosen,
    }
    result = _strip(data=data, key=key, on_chosen_change=on_change)
    picked = result.get("chosen") if result is not None else None
    return int(picked) if isinstance(picked, int | float) and 0 <= int(picked) < len(tokens) else None
