"""Prompt inspector: type a text, see the features of each token and of the whole text.

URL: ?sae=&prompt=&pool=&paint=. The model runs on this machine; results stay in the session as numpy arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from app import figures, state, theme
from app.components import clickable_strip
from app.inspection import Inspection, inspect_text
from cache.errors import AtomscopeError
from saes.queries import FeatureIndex

POOLS = {"Chosen token": "token", "Max over text": "max", "Mean": "mean", "Last token": "last"}
SHOWN = 30
DENSE = 0.1


def run(index: FeatureIndex, text: str, chat: bool) -> None:
    """Encode the text and keep the result in the session."""
    meta = index.meta
    try:
        with st.spinner("Running the model"), state.model_lock():
            mean = state.train_mean(meta)
            found = inspect_text(state.model_of(meta), state.load_sae(meta), text, mean=mean, chat=chat)
    except AtomscopeError as e:
        st.session_state["inspect_error"] = str(e)
        return
    st.session_state.pop("inspect_error", None)
    st.session_state["inspection"] = (meta["sae_id"], found)
    st.session_state["token"] = None


def prompt_form(index: FeatureIndex) -> None:
    with st.form("inspect", border=False):
        text = st.text_area(
            "Text", key="prompt", bind="query-params", max_chars=state.PROMPT_LIMIT, height=130,
            placeholder="Type or paste a text, up to 512 tokens",
        )  # fmt: skip
        row = st.columns([0.5, 0.5], vertical_alignment="center")
        chat = row[1].toggle("as a chat turn", key="chat", help="Wrap the text in the model's chat template")
        if row[0].form_submit_button("Run", type="primary"):
            run(index, text or "", chat)


def rows_of(found: Inspection, pool: str, token: int) -> list[tuple[int, float, int]]:
    if pool == "token":
        return [(f, v, token) for f, v in found.at(token)]
    return found.pooled(pool)  # type: ignore[arg-type]


def densities(index: FeatureIndex, features: list[int]) -> dict[int, float]:
    sql = "SELECT feature, density FROM idx.feature WHERE feature IN (SELECT unnest(?::INTEGER[]))"
    frame = index.frame(sql, [sorted(set(features))])
    return dict(zip(frame["feature"].tolist(), frame["density"].tolist()))


def label(labels: dict[tuple[int, int], Any], feature: int) -> str:
    return " / ".join(labels[(feature, s)]["text"] for s in (1, -1) if (feature, s) in labels)


def feature_table(index: FeatureIndex, found: Inspection, token: int) -> int | None:
    """Features of the chosen token or of the text; returns the one to paint."""
    name = st.pills(
        "Features of", list(POOLS), default="Max over text", required=True, key="pool", bind="query-params",
        label_visibility="collapsed",
    )  # fmt: skip
    pool = POOLS[name or "Max over text"]
    rows = rows_of(found, pool, token)
    dense = st.toggle(f"show features that fire on more than {DENSE:.0%} of tokens", key="dense")
    labels = index.labels()
    density = densities(index, [f for f, _, _ in rows])
    rows_shown = [r for r in rows if dense or density[r[0]] <= DENSE][:SHOWN]
    shown = [
        {
            "feature": f,
            "value": v,
            "label": label(labels, f),
            "token": figures.glyphs(found.tokens[at]),
            "at": at,
        }
        for f, v, at in rows_shown
    ]
    where = f"token {token}, {figures.glyphs(found.tokens[token])}" if pool == "token" else "the whole text"
    state.muted(
        f"{len(shown)} of {len(rows)} features that fire, for {where}. Choose a row to paint it on the text."
    )
    if not shown:
        return None
    ids = [f for f, _, _ in rows_shown]

    def paint() -> None:
        picked = st.session_state["fired"]["selection"]["rows"]
        if picked and picked[0] < len(ids):
            st.session_state["paint"] = str(ids[picked[0]])

    st.dataframe(
        pd.DataFrame(shown), key="fired", hide_index=True, on_select=paint, selection_mode="single-row",
        height=min(36 * (len(shown) + 1), 420), alt="Features that fire",
        column_config={
            "label": st.column_config.TextColumn("label", width="medium"),
            "feature": st.column_config.NumberColumn("id", width=64, format="%d"),
            "value": st.column_config.NumberColumn("activation", width=84, format="%.2f"),
            "token": st.column_config.TextColumn("on token", width=90),
            "at": st.column_config.NumberColumn("position", width=70, format="%d"),
        },
    )  # fmt: skip
    return ids[0]


def result(index: FeatureIndex, found: Inspection) -> None:
    chosen = st.session_state.get("token")
    token = chosen if isinstance(chosen, int) and chosen < len(found.tokens) else len(found.tokens) - 1
    strip = st.container()
    first = feature_table(index, found, token)
    with strip:
        head, box = st.columns([0.84, 0.16])
        with box:
            text = st.text_input(
                "Feature id", key="paint", bind="query-params", max_chars=80, label_visibility="collapsed",
                placeholder="" if first is None else str(first),
            )  # fmt: skip
        with head:
            values, feature = painted(index, found, text, first)
        scale = float(np.abs(values).max(initial=0)) or 1.0
        picked = clickable_strip(
            found.tokens,
            values,
            key="strip",
            scale=scale,
            chosen=-1 if chosen is None else token,
            on_change=show_token,
        )
        if picked is not None and picked != chosen:
            st.session_state["token"] = picked
            st.rerun()
        if feature is not None:
            open_it = {"sae": index.sae_id, "fid": str(feature)}
            with st.container(horizontal=True):
                st.page_link("screens/features.py", label="Open feature", query_params=open_it)
                st.page_link("screens/steer.py", label="Steer with it", query_params=open_it)
    reconstruction(found)


def show_token() -> None:
    """A click on a token asks for its features."""
    st.session_state["pool"] = "Chosen token"


def painted(
    index: FeatureIndex, found: Inspection, text: str, first: int | None
) -> tuple[np.ndarray, int | None]:
    """Values of the feature in the box (else the first of the list) on every token, under its name."""
    try:
        feature = state.feature_id(text, index.meta["d_sae"]) if text else first
    except AtomscopeError as e:
        state.line(str(e))
        feature = first
    if feature is None:
        state.muted("No feature to paint.")
        return np.zeros(len(found.tokens)), None
    values = found.column(feature)
    state.title(index.feature(feature)["label"] or "No label yet", str(feature))
    fires = int((values != 0).sum())
    state.muted(f"fires on {fires} of {len(values) - 1} tokens. Click a token for its features.")
    return values, feature


def reconstruction(found: Inspection) -> None:
    """How much of each token the SAE misses."""
    whole = found.fvu[1:]
    state.muted(
        f"Unexplained share of each token (FVU): median {np.median(whole):.3f}, largest {whole.max():.3f}. "
        "Darker is worse; position 0 is not encoded."
    )
    st.html(
        figures.token_strip(found.tokens, np.nan_to_num(found.fvu), scale=1.0, colour=theme.CONTROL, digits=3)
    )


def page() -> None:
    index = state.current_index()
    if index is None:
        return
    left, right = st.columns([0.32, 0.68], gap="medium")
    with left:
        state.title("Prompt inspector")
        state.muted("What an SAE sees in a text, token by token.")
        ready = state.model_button(index.meta)
        if ready:
            prompt_form(index)
        if "inspect_error" in st.session_state:
            state.line(st.session_state["inspect_error"])
    with right:
        kept: Any = st.session_state.get("inspection")
        if kept is not None and kept[0] == index.meta["sae_id"]:
            result(index, kept[1])
        else:
            state.muted("Nothing run yet." if ready else "Load the model to run a text through it.")


page()
