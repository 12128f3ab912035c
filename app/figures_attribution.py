"""Figures of an attribution: frames in, plotly figures out, in the layout of `app.figures`. No streamlit import.

layer_head       layer × head (or neuron, feature) of one kind, the largest score over positions
layer_position   layer × position, the largest score over the kinds and heads there
estimate_truth   estimate against exact |effect|, log-log, one colour a kind
recall           share of the true top K against forward-equivalents spent, own passes included
bound_k          upper bound on what was missed against K, the nodes verified
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from app import theme as _theme
from app.figures import CURVE_COLOURS, MAX_POINTS, _figure

MAX_COLUMNS = 200


def _heat(grid: Any, x: list[Any], title_x: str, unit: str, theme: str | None, height: int) -> go.Figure:
    fig = _figure(theme, height, int(np.isfinite(grid.to_numpy(float)).sum()), unit)
    palette = _theme.palette(theme)
    fig.add_heatmap(
        z=grid.to_numpy(float), x=x, y=grid.index.tolist(), xgap=1, ygap=1,
        colorscale=[[0, palette.ground], [1, f"rgb{_theme.POSITIVE}"]], zmin=0,
        colorbar={"thickness": 8, "outlinewidth": 0, "title": {"text": "score"}},
        hovertemplate=f"layer %{{y}}, {title_x} %{{x}}: %{{z:.4g}}<extra></extra>",
    )  # fmt: skip
    fig.update_yaxes(title_text="layer")
    fig.update_xaxes(title_text=title_x)
    return fig


def layer_head(frame: Any, *, kind: str = "z", theme: str | None = None, height: int = 360) -> go.Figure:
    """Columns layer, kind, index, score: the largest score over positions. Of many columns, those with the largest."""
    part = frame[frame["kind"] == kind]
    grid = part.pivot_table(index="layer", columns="index", values="score", aggfunc="max")
    if grid.shape[1] > MAX_COLUMNS:
        grid = grid[sorted(grid.max().nlargest(MAX_COLUMNS).index)]
    names = {"mlp": "neuron", "sae": "feature"}
    x = [str(c) for c in grid.columns]
    return _heat(grid, x, names.get(kind, "head"), "heads", theme, height)


def layer_position(frame: Any, *, kind: str | None = None, theme: str | None = None, height: int = 360) -> go.Figure:  # fmt: skip
    """Columns layer, kind, pos, token, score: the largest score at each layer and position."""
    part = frame if kind is None else frame[frame["kind"] == kind]
    part = part[part["pos"] >= 0]
    grid = part.pivot_table(index="layer", columns="pos", values="score", aggfunc="max")
    words = part.drop_duplicates("pos").set_index("pos")["token"]
    return _heat(grid, [f"{c} {words[c]}" for c in grid.columns], "position", "places", theme, height)


def estimate_truth(frame: Any, *, theme: str | None = None, height: int = 360) -> go.Figure:
    """Columns kind, score, exact_abs: measured nodes, both axes logarithmic, with the diagonal."""
    known = frame[(frame["exact_abs"] > 0) & (frame["score"] > 0)].nlargest(MAX_POINTS, "score")
    fig = _figure(theme, height, len(known), "nodes")
    for i, (kind, part) in enumerate(known.groupby("kind")):
        fig.add_scatter(
            x=part["score"], y=part["exact_abs"], mode="markers", name=str(kind),
            marker={"size": 6, "color": CURVE_COLOURS[i % len(CURVE_COLOURS)]},
            text=[f"{k} layer {n}, {j} at {p}" for k, n, j, p in part[["kind", "layer", "index", "pos"]].to_numpy()],
            hovertemplate="%{text}<br>estimate %{x:.3g}, exact %{y:.3g}<extra></extra>",
        )  # fmt: skip
    if len(known):
        ends = [float(known[["score", "exact_abs"]].to_numpy().min()), float(known[["score", "exact_abs"]].to_numpy().max())]  # fmt: skip
        fig.add_scatter(
            x=ends, y=ends, mode="lines", hoverinfo="skip", showlegend=False,
            line={"color": _theme.palette(theme).muted, "width": 1, "dash": "dot"},
        )  # fmt: skip
    fig.update_layout(showlegend=True)
    fig.update_xaxes(title_text="estimate, log", type="log")
    fig.update_yaxes(title_text="exact |effect|, log", type="log")
    return fig


def recall(frame: Any, *, theme: str | None = None, height: int = 300) -> go.Figure:
    """Columns method, passes, recall: one step line a method."""
    fig = _figure(theme, height, len(frame), "steps")
    for i, (method, part) in enumerate(frame.groupby("method", sort=False)):
        fig.add_scatter(
            x=part["passes"], y=part["recall"], mode="lines", name=str(method),
            line={"shape": "hv", "width": 1.6, "color": CURVE_COLOURS[i % len(CURVE_COLOURS)]},
            hovertemplate=f"{method}: %{{y:.0%}} after %{{x:,.0f}} passes<extra></extra>",
        )  # fmt: skip
    fig.update_layout(showlegend=True)
    fig.update_xaxes(title_text="forward-equivalents, log", type="log")
    fig.update_yaxes(title_text="found", tickformat=".0%", range=[0, 1.02])
    return fig


def bound_k(frame: Any, *, theme: str | None = None, height: int = 300) -> go.Figure:
    """Columns k, alpha, bound, missed (of pairs): the median bound for each confidence, and the truth if it is known."""
    fig = _figure(theme, height, len(frame), "bounds")
    for i, (alpha, part) in enumerate(frame.groupby("alpha")):
        middle = part.groupby("k")["bound"].median()
        fig.add_scatter(
            x=middle.index.tolist(), y=middle.tolist(), mode="lines+markers", name=f"confidence {1 - float(alpha):g}",
            line={"color": CURVE_COLOURS[i % len(CURVE_COLOURS)], "width": 1.6},
            hovertemplate="K = %{x}: no effect above %{y:.4g}<extra></extra>",
        )  # fmt: skip
    if "missed" in frame and frame["missed"].notna().any():
        missed = frame.drop_duplicates(["k", "pair"]).groupby("k")["missed"].median()
        fig.add_scatter(
            x=missed.index.tolist(), y=missed.tolist(), mode="lines+markers", name="truth",
            line={"color": _theme.palette(theme).muted, "width": 1.2, "dash": "dot"},
            hovertemplate="K = %{x}: the largest missed is %{y:.4g}<extra></extra>",
        )  # fmt: skip
    fig.update_layout(showlegend=True)
    fig.update_xaxes(title_text="nodes verified, K")
    fig.update_yaxes(title_text="bound", rangemode="tozero")
    return fig
