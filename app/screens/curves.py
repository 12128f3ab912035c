"""Training curves of up to eight runs: loss parts, sparsity, dead latents, gradient, rate. Follows running jobs.

URL: ?run=&run=&x=. Only what the runs wrote with their checkpoints is read; nothing is recomputed.
"""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app import figures, state
from app.catalogue import read_curves
from cache.errors import AtomscopeError

MOST = 8
REFRESH = "10s"
PANELS = {
    "fvu": "FVU of the training rows since the last point, without attention sinks",
    "l0": "L0, mean number of active latents",
    "n_dead": "Dead latents",
    "auxk": "AuxK loss, normalised",
    "grad_norm": "Gradient norm before clipping",
    "lr": "Learning rate",
}


def chosen(frame: pd.DataFrame) -> list[str]:
    """Names of the runs to draw: those of the URL, else the newest one."""
    names = list(dict.fromkeys(frame["name"]))
    return st.multiselect(
        "Runs", names, default=names[:1], max_selections=MOST, key="run", bind="query-params"
    )


@st.fragment(run_every=REFRESH)
def panels(names: list[str], x: str) -> None:
    """All panels, read anew: a running job adds points with each checkpoint."""
    frame = read_curves(state.workspace())
    frame = frame[frame["name"].isin(names)]
    columns = st.columns(2, gap="medium")
    for i, (metric, title) in enumerate(PANELS.items()):
        part = frame.dropna(subset=[metric])
        with columns[i % 2]:
            state.muted(title)
            st.plotly_chart(
                figures.training_curves(part, x=x, y=metric, theme=state.theme_name()),
                theme=None, key=f"curve-{metric}", config={"displayModeBar": False}, alt=title,
            )  # fmt: skip
    running = sorted(set(frame.loc[frame["status"] == "running", "name"]))
    if running:
        state.muted(f"Running or interrupted: {', '.join(running)}. The same command goes on with it.")
    failed = frame[frame["status"] == "failed"].drop_duplicates("name")
    for name, problem in zip(failed["name"], failed["problem"], strict=True):
        state.muted(f"Failed: {name}: {problem}")
    state.muted(f"{len(frame):,} logged points, {len(names)} of the SAEs")


def page() -> None:
    state.title("Training curves")
    try:
        frame = read_curves(state.workspace())
    except AtomscopeError as e:
        state.line(str(e))
        return
    if not len(frame):
        state.line(
            "No run has logged anything yet: atomscope demo makes everything in one go; or train with",
            "atomscope train",
        )
        return
    left, right = st.columns([0.75, 0.25], vertical_alignment="bottom")
    with left:
        names = chosen(frame)
    with right:
        x = st.pills(
            "Against", ["tokens", "step"], default="tokens", required=True, key="x", bind="query-params"
        )  # fmt: skip
    if not names:
        state.line("Choose a run above.")
        return
    panels(names, x or "tokens")


page()
