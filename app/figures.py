"""The figures of app and notebooks: frames in, a plotly figure or an `HTML` object out. No streamlit import.

All are pure and share one layout (`app.theme.plotly_layout`); `theme` is "light" or "dark". Each figure carries
in `layout.meta` how many rows it shows. Token markup lives in `app.markup` and is re-exported here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from app import theme as _theme
from app.markup import (
    HTML,
    Meter,
    examples_panel,
    glyphs,
    logit_table,
    meters,
    number,
    signed,
    stat_tiles,
    steer_compare,
    table,
    text_panel,
    token_strip,
)

CURVE_COLOURS = ("#8a5a83", "#5b7f3a", "#a1453f", "#3f6f8a")
MAX_CURVE = 2000
MAX_POINTS = 25_000
"""Points of a map: more than this slows the browser down."""

__all__ = [
    "HTML",
    "Meter",
    "act_histogram",
    "density_histogram",
    "examples_panel",
    "feature_bars",
    "feature_map",
    "frontier",
    "glyphs",
    "logit_table",
    "matching_hist",
    "meters",
    "number",
    "signed",
    "stability",
    "stat_tiles",
    "steer_compare",
    "table",
    "text_panel",
    "token_strip",
    "training_curves",
]


def _figure(theme: str | None, height: int, n: int, unit: str) -> go.Figure:
    fig = go.Figure()
    fig.update_layout(**_theme.plotly_layout(theme), height=height, meta={"n": n, "unit": unit})
    return fig


def act_histogram(frame: Any, *, theme: str | None = None, height: int = 180) -> go.Figure:
    """Non-zero activations of a feature: columns lo, hi, count. Counts on a log axis, sign by colour and side."""
    lo, hi = frame["lo"].to_numpy(float), frame["hi"].to_numpy(float)
    count = frame["count"].to_numpy(float)
    mid = (lo + hi) / 2
    fig = _figure(theme, height, int(count.sum()), "activations")
    colours = [f"rgb{_theme.NEGATIVE}" if m < 0 else f"rgb{_theme.POSITIVE}" for m in mid]
    fig.add_bar(
        x=mid,
        y=np.where(count > 0, count, np.nan),
        width=(hi - lo) * 0.9,
        marker={"color": colours, "line": {"width": 0}},
        customdata=np.stack([lo, hi], -1),
        hovertemplate="%{customdata[0]:.2f} to %{customdata[1]:.2f}: %{y:,.0f} tokens<extra></extra>",
    )
    fig.update_yaxes(type="log", dtick=1, title_text="tokens", tickformat="~s")
    fig.update_xaxes(title_text="activation")
    return fig


def density_histogram(
    density: Any,
    *,
    marker: float | None = None,
    theme: str | None = None,
    height: int = 130,
    bins: int = 40,
) -> go.Figure:
    """How often features fire: log10 of the share of tokens; dead ones are left out and counted in meta."""
    values = np.asarray(density, dtype=float)
    live = np.log10(values[values > 0])
    fig = _figure(theme, height, len(live), "features")
    fig.update_layout(meta={"n": len(live), "unit": "features", "dead": int(len(values) - len(live))})
    if len(live):
        count, edges = np.histogram(live, bins=bins, range=(min(live.min(), -6.0), 0.0))
        mid = (edges[:-1] + edges[1:]) / 2
        fig.add_bar(
            x=mid,
            y=count,
            width=(edges[1] - edges[0]) * 0.9,
            marker={"color": f"rgb{_theme.CONTROL}", "line": {"width": 0}},
            hovertemplate="10^%{x:.1f}: %{y} features<extra></extra>",
        )
    if marker is not None and marker > 0:
        fig.add_vline(x=float(np.log10(marker)), line={"color": f"rgb{_theme.POSITIVE}", "width": 2})
    fig.update_xaxes(title_text="share of tokens, log10", range=[-6.2, 0.05])
    fig.update_yaxes(title_text="features", nticks=4)
    return fig


def feature_map(
    frame: Any, *, marker: int | None = None, theme: str | None = None, height: int = 300
) -> go.Figure:
    """Features on the plane: columns feature, x, y, density. Colour is log10 density; a ring marks `marker`."""
    part = frame.head(MAX_POINTS)
    fig = _figure(theme, height, len(part), "features")
    fig.update_layout(meta={"n": len(part), "of": len(frame), "unit": "features"}, dragmode="select")
    p = _theme.palette(theme)
    fig.add_scattergl(
        x=part["x"],
        y=part["y"],
        mode="markers",
        marker={
            "size": 4,
            "color": np.log10(np.maximum(part["density"].to_numpy(dtype=float), 1e-9)),
            "colorscale": [[0, p.line], [1, p.accent]],
            "cmin": -5,
            "cmax": -1,
        },
        text=[
            f"feature {f}, {number(100 * d)} % of tokens" for f, d in zip(part["feature"], part["density"])
        ],
        hovertemplate="%{text}<extra></extra>",
    )
    here = part[part["feature"] == marker]
    if len(here):
        fig.add_scattergl(
            x=here["x"],
            y=here["y"],
            mode="markers",
            hoverinfo="skip",
            marker={
                "size": 13,
                "color": "rgba(0,0,0,0)",
                "line": {"width": 2, "color": f"rgb{_theme.POSITIVE}"},
            },
        )
    fig.update_layout(showlegend=False)
    fig.update_xaxes(visible=False)
    fig.update_yaxes(visible=False)
    return fig


def feature_bars(
    names: list[str], values: list[float], *, theme: str | None = None, height: int | None = None
) -> go.Figure:
    """Signed horizontal bars, first on top. Names are the caller's own words and ids, drawn as plain text."""
    fig = _figure(theme, height or 24 * len(names) + 40, len(names), "features")
    colours = [f"rgb{_theme.NEGATIVE}" if v < 0 else f"rgb{_theme.POSITIVE}" for v in values]
    safe = [_plain_label(n) for n in names]
    fig.add_bar(
        x=values,
        y=list(range(len(names))),
        orientation="h",
        marker={"color": colours},
        text=[signed(v) for v in values],
        textposition="auto",
        hovertemplate="%{text}<extra></extra>",
    )
    fig.update_yaxes(
        tickmode="array",
        tickvals=list(range(len(names))),
        ticktext=safe,
        autorange="reversed",
        showgrid=False,
    )
    fig.update_layout(margin={"l": 140})
    return fig


def training_curves(
    frame: Any, *, x: str = "tokens", y: str = "fvu", theme: str | None = None, height: int = 210
) -> go.Figure:
    """One metric against tokens or steps, a line for each `name` (one without that column); MAX_CURVE points at most."""
    frame = frame if "name" in frame else frame.assign(name="run")
    fig = _figure(theme, height, len(frame), "points")
    p = _theme.palette(theme)
    colours = [
        p.accent,
        *(f"rgb{c}" for c in (_theme.POSITIVE, _theme.NEGATIVE, _theme.CONTROL)),
        *CURVE_COLOURS,
    ]
    for i, (name, part) in enumerate(frame.groupby("name", sort=False)):
        step = -(-len(part) // MAX_CURVE)
        shown = part.iloc[::step]
        fig.add_scatter(
            x=shown[x],
            y=shown[y],
            name=_plain_label(str(name)),
            mode="lines",
            line={"color": colours[i % len(colours)], "width": 1.6, "dash": "solid" if i < 4 else "dot"},
            hovertemplate=f"%{{x:,}} {x}: %{{y:.4g}}<extra></extra>",
        )
    fig.update_xaxes(title_text=x)
    fig.update_layout(showlegend=frame["name"].nunique() > 1)
    return fig


def matching_hist(
    cos: Any, *, chance: float | None = None, theme: str | None = None, height: int = 220
) -> go.Figure:
    """|cosine| of matched decoder rows; a line where random directions would be. Unmatched ones are in meta."""
    values = np.abs(np.asarray(cos, dtype=float))
    found = values[np.isfinite(values)]
    fig = _figure(theme, height, len(found), "features")
    fig.update_layout(meta={"n": len(found), "unit": "features", "unmatched": len(values) - len(found)})
    count, edges = np.histogram(found, bins=40, range=(0.0, 1.0))
    fig.add_bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=count,
        width=0.9 / 40,
        marker={"color": _theme.palette(theme).accent, "line": {"width": 0}},
        hovertemplate="%{x:.2f}: %{y:,} features<extra></extra>",
    )
    if chance is not None:
        fig.add_vline(
            x=chance,
            line={"color": f"rgb{_theme.CONTROL}", "width": 2, "dash": "dot"},
            annotation={"text": "random directions", "font": {"size": 11}},
        )
    fig.update_xaxes(title_text="|cosine| with the matched decoder row", range=[0, 1.01])
    fig.update_yaxes(title_text="features")
    return fig


def stability(frame: Any, bins: Any, *, theme: str | None = None, height: int = 260) -> go.Figure:
    """Matched |cosine| of features (columns feature, density, cos) against density, and the median of each bin."""
    part = frame[frame["density"] > 0].head(MAX_POINTS)
    fig = _figure(theme, height, len(part), "features")
    fig.update_layout(meta={"n": len(part), "of": len(frame), "unit": "features"})
    fig.add_scattergl(
        x=np.log10(part["density"].to_numpy(dtype=float)),
        y=part["cos"].abs().fillna(0.0),
        mode="markers",
        marker={"size": 4, "opacity": 0.35, "color": f"rgb{_theme.CONTROL}"},
        text=[f"feature {f}" for f in part["feature"]],
        hovertemplate="%{text}: %{y:.3f}<extra></extra>",
    )
    fig.add_scatter(
        x=(bins["lo"] + bins["hi"]) / 2,
        y=bins["median"],
        mode="lines+markers",
        line={"color": _theme.palette(theme).accent, "width": 2},
        customdata=bins["n"],
        hovertemplate="median %{y:.3f} of %{customdata:,} features<extra></extra>",
    )
    fig.update_xaxes(title_text="share of tokens, log10")
    fig.update_yaxes(title_text="|cosine|", range=[-0.02, 1.02])
    return fig


def frontier(
    frame: Any, *, measure: str = "fvu", title: str = "FVU", theme: str | None = None, height: int = 300
) -> go.Figure:
    """SAEs and controls: L0 (log) against a measure, lower is better; the SAEs that none beats are joined."""
    known = frame[(frame["l0"] > 0) & frame[measure].notna()]
    fig = _figure(theme, height, len(known), "points")
    saes, controls = known[known["subject"] == "sae"], known[known["subject"] != "sae"]
    best = saes[saes["best_ce" if measure == "delta_ce" else "best_fvu"]].sort_values("l0")
    accent = _theme.palette(theme).accent
    for _, line in best.groupby(["store", "hook", "skip"]):
        fig.add_scatter(
            x=line["l0"],
            y=line[measure],
            mode="lines",
            hoverinfo="skip",
            line={"color": accent, "width": 1.4},
        )
    for part, colour, symbol in ((controls, f"rgb{_theme.CONTROL}", "x"), (saes, accent, "circle")):
        fig.add_scatter(
            x=part["l0"],
            y=part[measure],
            mode="markers",
            marker={"size": 9, "color": colour, "symbol": symbol},
            text=[_plain_label(_point_name(r), 48) for r in part.to_dict("records")],
            hovertemplate=f"%{{text}}<br>L0 %{{x:.1f}}, {title} %{{y:.4g}}<extra></extra>",
        )
    fig.update_xaxes(title_text="L0, log", type="log")
    fig.update_yaxes(title_text=title)
    return fig


def _point_name(row: dict[str, Any]) -> str:
    owner = f"{row['name']} ({str(row['sae_id'])[:6]})"
    return owner if row["subject"] == "sae" else f"{row['subject']} control of {owner}"


def _plain_label(text: str, limit: int = 28) -> str:
    """A label that plotly, which reads some tags, shows as it is."""
    shown = glyphs(text, spaces=False)
    shown = shown if len(shown) <= limit else shown[: limit - 1] + "…"
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
