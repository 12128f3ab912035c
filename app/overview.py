"""All features at once, under the list: the decoder's 2-D map, which filters the list, and the densities."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import figures, state
from saes.queries import FeatureIndex

KEY = "map"


def chosen(index: FeatureIndex) -> list[int] | None:
    """Features inside the box or lasso drawn on the map; None without a selection."""
    event: Any = st.session_state.get(KEY) or {}
    points = (event.get("selection") or {}).get("points") or []
    places = [p["point_index"] for p in points if p.get("curve_number", 0) == 0]
    if not places:
        return None
    ids = index.map().head(figures.MAX_POINTS)["feature"].to_numpy()
    return [int(ids[i]) for i in places if 0 <= i < len(ids)]


def draw(index: FeatureIndex, feature: int | None) -> None:
    """Two tabs: map and densities."""
    on_map, how_often = st.tabs(["Map", "Density"])
    with on_map:
        _map(index, feature)
    with how_often:
        _densities(index, feature)


def _map(index: FeatureIndex, feature: int | None) -> None:
    frame = index.map()
    shown = min(len(frame), figures.MAX_POINTS)
    state.muted(
        f"First two principal components of the decoder, {shown:,} of {len(frame):,} living features; "
        "darker fires more often. Drag to filter the list, double-click to clear."
    )
    st.plotly_chart(
        figures.feature_map(frame, marker=feature, theme=state.theme_name()),
        theme=None, key=KEY, on_select="rerun", selection_mode=("box", "lasso"),
        config={"displayModeBar": False}, alt="Map of the features; the list holds the same features",
    )  # fmt: skip


def _densities(index: FeatureIndex, feature: int | None) -> None:
    frame = index.frame("SELECT feature, density FROM idx.feature")
    values = frame["density"].to_numpy()
    mark = None if feature is None else float(values[frame["feature"].to_numpy() == feature][0])
    never = f"{int((values == 0).sum()):,} never did"
    state.muted(f"How often features fire; {never}" + ("" if not mark else "; the line is the one shown"))
    st.plotly_chart(
        figures.density_histogram(values, marker=mark, theme=state.theme_name()),
        theme=None,
        key="densities",
        config={"displayModeBar": False},
        alt="Histogram of feature densities",
    )
