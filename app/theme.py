"""Colours and type of the app and of every figure: one palette for light, one for dark, the same roles.

Positive activations are orange, negative ones blue, controls grey; the sign is always written as well. The
strength of a highlight is capped so that text on it keeps a contrast of at least 4.5 : 1 in both themes.
`app/.streamlit/config.toml` says the same to Streamlit; `theme.css` holds the few rules it has no option for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

POSITIVE = (217, 119, 6)
NEGATIVE = (37, 99, 175)
CONTROL = (128, 134, 146)
MAX_ALPHA = 0.62

SANS = "Inter, 'DejaVu Sans', 'Segoe UI', system-ui, sans-serif"
MONO = "'DejaVu Sans Mono', ui-monospace, 'Cascadia Mono', Menlo, monospace"
CSS_FILE = Path(__file__).with_name("theme.css")


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Roles of colour; values are hex."""

    ground: str  # page
    panel: str  # sidebar
    ink: str  # text
    muted: str  # text of less weight
    line: str  # hairlines
    accent: str  # the one action that matters
    positive_text: str  # a written positive value
    negative_text: str  # a written negative value


LIGHT = Palette(
    ground="#fbfaf7",
    panel="#f5f3ec",
    ink="#1d2330",
    muted="#5c6473",
    line="#e4e1d8",
    accent="#0f766e",
    positive_text="#a84d05",
    negative_text="#2563af",
)
DARK = Palette(
    ground="#14171d",
    panel="#191d24",
    ink="#e8e6df",
    muted="#a3a9b5",
    line="#2e343f",
    accent="#3aa79b",
    positive_text="#f0a04b",
    negative_text="#7fb0ea",
)


def palette(theme: str | None) -> Palette:
    """The palette of "dark", else the light one."""
    return DARK if theme == "dark" else LIGHT


def rgba(rgb: tuple[int, int, int], alpha: float) -> str:
    return f"rgba({rgb[0]},{rgb[1]},{rgb[2]},{alpha:.2f})"


def variables(theme: str | None) -> str:
    """CSS variables of a theme. Markup falls back to the light values where they are not set (notebooks)."""
    p = palette(theme)
    names = ("ground", "panel", "ink", "muted", "line", "accent", "positive_text", "negative_text")
    return ":root{" + "".join(f"--as-{n.replace('_', '-')}:{getattr(p, n)};" for n in names) + "}"


def stylesheet(theme: str | None) -> str:
    """The constant style sheet of the app. No data goes into it."""
    return f"<style>{variables(theme)}\n{CSS_FILE.read_text(encoding='utf-8')}</style>"


def plotly_layout(theme: str | None) -> dict[str, Any]:
    """Layout that every plot shares: no frame, hairline axes, transparent ground."""
    p = palette(theme)
    axis = {
        "linecolor": p.ink,
        "gridcolor": p.line,
        "zeroline": False,
        "ticks": "",
        "tickfont": {"color": p.muted, "size": 11},
        "title": {"font": {"color": p.muted, "size": 11}, "standoff": 6},
    }
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": SANS, "size": 12, "color": p.ink},
        "margin": {"l": 44, "r": 8, "t": 8, "b": 34},
        "bargap": 0.12,
        "showlegend": False,
        "hoverlabel": {"font": {"family": SANS, "size": 12}},
        "xaxis": axis | {"showgrid": False, "showline": True},
        "yaxis": axis | {"showgrid": True, "showline": False},
    }
