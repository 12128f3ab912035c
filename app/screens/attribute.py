"""Attribution: which heads, neurons and features matter for a set of prompt pairs, as `atomscope attribute` left it.

URL: ?run=&kind=. The page only reads: the ranking, what was patched exactly, recall and bounds.
"""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import figures, figures_attribution, state
from cache.errors import AtomscopeError
from probes.attribution.report import BOUNDS, RECALL, find_attributions, read_table

ROWS = 200
COMMAND = "atomscope attribute indirect_object"


def choose(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    asked = st.query_params.get("run")
    if asked in found and "run" not in st.session_state:
        st.session_state["run"] = asked
    elif asked is not None and asked not in found and "run" not in st.session_state:
        state.line(f"No attribution “{asked[:80]}” in this workspace.")
    chosen = st.selectbox("Run", list(found), key="run")
    st.query_params["run"] = chosen
    return found[chosen]


def facts(record: dict[str, Any], n_nodes: int) -> None:
    example = record["pairs"][0]
    st.html(
        figures.stat_tiles([
            (f"{record['n_pairs']:,}", "prompt pairs"),
            (f"{record['tokens']:,}", "tokens"),
            (f"{n_nodes:,}", "nodes with a score"),
            (figures.number(record["passes"]), "forward-equivalents a pair"),
            (record["method"], "method"),
            (record["metric"], "metric"),
        ])
    )  # fmt: skip
    state.muted(f"{record['model']}: “{example['clean']}” against “{example['noise']}”, and so on")


def chart(figure: Any, key: str, alt: str) -> None:
    st.plotly_chart(figure, theme=None, key=key, config={"displayModeBar": False}, alt=alt)


def maps(frame: Any) -> None:
    kinds = sorted(frame["kind"].unique())
    kind = st.pills("Nodes", kinds, default=kinds[-1], required=True, key="kind", bind="query-params")
    left, right = st.columns(2, gap="medium")
    with left:
        state.muted("Largest score over positions")
        chart(
            figures_attribution.layer_head(frame, kind=kind, theme=state.theme_name()),
            "heads",
            "Layer by head",
        )
    with right:
        if (frame["pos"] >= 0).any():
            state.muted("Largest score at each position; clean | noise where the token differs")
            chart(
                figures_attribution.layer_position(frame, kind=kind, theme=state.theme_name()),
                "places", "Layer by position",
            )  # fmt: skip
        else:
            state.muted("Positions were patched together in this run.")


def checks(record: dict[str, Any], frame: Any) -> None:
    st.subheader("How far it can be believed", anchor=False)
    measured = frame[frame["exact_abs"].notna()]
    recall, bounds = read_table(record, RECALL), read_table(record, BOUNDS)
    left, right = st.columns(2, gap="medium")
    with left:
        if len(measured):
            state.muted(f"{len(measured):,} nodes patched exactly")
            chart(
                figures_attribution.estimate_truth(measured, theme=state.theme_name()), "truth", "Estimate against truth"
            )  # fmt: skip
        else:
            state.line(
                "No node was patched exactly in this run. Patch the best with", f"{COMMAND} --top-k 20"
            )
    with right:
        if len(recall):
            state.muted("Share of the true top found, the method's own passes counted")
            chart(
                figures_attribution.recall(recall, theme=state.theme_name()),
                "recall",
                "Recall against passes",
            )
        if len(bounds):
            state.muted(
                "Bound on a missed node's effect averaged over random subsets, not on patching it alone"
            )
            chart(figures_attribution.bound_k(bounds, theme=state.theme_name()), "bounds", "Bound against K")
        if not len(recall) and not len(bounds):
            state.line("Bound what was missed, or patch every node, with", f"{COMMAND} --samples 200 --exact")


def page() -> None:
    state.title("Attribution")
    root = state.workspace()
    try:
        found = {r["run"]: r for r in find_attributions(root)} if root.is_dir() else {}
    except AtomscopeError as e:
        state.line(str(e))
        return
    if not found:
        state.line("No attribution in this workspace yet. Rank the heads of a model with", COMMAND)
        return
    record = choose(found)
    try:
        frame = read_table(record)
        facts(record, len(frame))
        if len(frame):
            maps(frame)
            checks(record, frame)
            st.dataframe(
                frame.head(ROWS).drop(columns="node"), hide_index=True, key="nodes", alt="Best nodes"
            )
            state.muted(f"{min(ROWS, len(frame)):,} of {len(frame):,} nodes shown, best first")
    except AtomscopeError as e:
        state.line(str(e))


page()
