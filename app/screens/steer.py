"""Steering: one feature, one strength; baseline and steered text side by side, and what the edit did.

URL: ?sae=&fid=&sign=&op=&strength=&where=&prompt=. Strength is in units of the mean residual norm at the hook.
"""

from __future__ import annotations

from typing import Any

import streamlit as st

from app import figures, state
from app.steering_run import Request, Result, run
from cache.errors import AtomscopeError
from saes.queries import FeatureIndex

OPS = {"Add": "add", "Clamp": "clamp", "Ablate": "ablate"}
EXPLAIN = {
    "Add": "adds the direction, whatever the feature does by itself",
    "Clamp": "sets the feature to this size at every token",
    "Ablate": "removes the feature wherever it fires",
}
WHERE = {"Everywhere": "all", "Prompt": "prompt", "Generated": "generated"}
LIMIT = 2.0
MEASURE_SECONDS = 60.0


def feature_choice(index: FeatureIndex) -> tuple[int | None, int]:
    """The feature and its pole."""
    text = st.text_input("Feature id", key="fid", bind="query-params", max_chars=80, placeholder="e.g. 12")
    feature = None
    if text:
        try:
            feature = state.feature_id(text, index.meta["d_sae"])
            f = index.feature(feature)
        except AtomscopeError as e:
            state.line(str(e))
            return None, 1
        state.muted(
            f"{f.get('label') or 'no label yet'} · fires on {figures.number(100 * f['density'])} % of tokens"
        )
    else:
        state.muted("Choose one in the explorer, or type its id.")
    if not index.meta["signed"]:
        return feature, 1
    pole = st.pills(
        "Pole", list(state.POLES), default="positive", required=True, key="sign", bind="query-params",
        label_visibility="collapsed",
    )  # fmt: skip
    return feature, state.POLES[pole or "positive"]


def edit_choice() -> tuple[str, float, str]:
    """Operation, strength and place."""
    op = st.pills(
        "Operation", list(OPS), default="Add", required=True, key="op", bind="query-params",
        label_visibility="collapsed",
    ) or "Add"  # fmt: skip
    state.muted(EXPLAIN[op])
    slider, box = st.columns([0.66, 0.34], vertical_alignment="bottom")
    off = op == "Ablate"
    with box:
        strength = st.number_input(
            "Strength", -20.0, 20.0, 0.5, 0.05, key="strength", bind="query-params", format="%.2f", disabled=off,
            label_visibility="collapsed",
        )  # fmt: skip
    st.session_state["slide"] = min(max(float(strength or 0.0), -LIMIT), LIMIT)
    with slider:
        st.slider(
            "Strength, × residual norm", -LIMIT, LIMIT, step=0.05, key="slide", disabled=off,
            on_change=lambda: st.session_state.update(strength=st.session_state["slide"]),
        )  # fmt: skip
    where = st.pills(
        "Edited positions", list(WHERE), default="Everywhere", required=True, key="where", bind="query-params",
        label_visibility="collapsed",
    ) or "Everywhere"  # fmt: skip
    return OPS[op], float(strength or 0.0), WHERE[where]


def prompt_choice() -> dict[str, Any]:
    text = st.text_area(
        "Prompt", key="prompt", bind="query-params", max_chars=state.PROMPT_LIMIT, height=90,
        placeholder="The beginning of a text",
    )  # fmt: skip
    first, second, third = st.columns(3)
    tokens = first.number_input("Tokens", 1, 200, 40, key="tokens", bind="query-params")
    temperature = second.number_input("Temperature", 0.0, 2.0, 0.0, 0.1, key="temp", bind="query-params")
    seed = third.number_input("Seed", 0, 10**6, 16, key="seed", bind="query-params")
    chat = st.toggle("as a chat turn", key="chat", help="Wrap the prompt in the model's chat template")
    return {
        "prompt": text or "",
        "tokens": int(tokens),
        "temperature": temperature,
        "seed": int(seed),
        "chat": chat,
    }


def controls(index: FeatureIndex) -> Request | None:
    """Everything at the left; a request if Generate was pressed."""
    state.title("Steering")
    state.muted(
        f"at {index.meta['hook']}; mean residual norm {figures.number(index.meta['mean_resid_norm'])}"
    )
    feature, sign = feature_choice(index)
    op, strength, where = edit_choice()
    text = prompt_choice()
    if not state.model_button(index.meta):
        return None
    with st.container(horizontal=True):
        go = st.button("Generate", type="primary", key="generate")
        st.button("Stop", key="stop", help="Keeps what has been generated")
    if not go:
        return None
    if feature is None:
        state.line("No feature is chosen: type the id of one, or choose it in the explorer.")
        return None
    return Request(feature=feature, sign=sign, op=op, strength=strength, where=where, **text)


def notes(result: Result) -> tuple[str, str]:
    left = f"{len(result.baseline_ids)} tokens"
    at = result.differs_at()
    return left, f"{len(result.steered_ids)} tokens, " + (
        "the same" if at is None else f"differs from token {at + 1}"
    )


def texts(result: Result, panes: tuple[Any, Any]) -> None:
    left, right = notes(result)
    panes[0].html(figures.text_panel("Baseline", left, result.request.prompt, result.baseline))
    panes[1].html(figures.text_panel("Steered", right, result.request.prompt, result.steered))


def what_it_did(result: Result) -> None:
    state.title("What it did")
    e = result.effects
    if e is None:
        state.muted("Measured when both texts are there.")
        return
    percent = [None if t.repeated is None else 100 * t.repeated for t in (e.baseline, e.steered)]
    rows = [
        figures.Meter("Perplexity of the text", e.baseline.perplexity, e.steered.perplexity),
        figures.Meter("Repeated 3-grams", percent[0], percent[1], " %"),
        figures.Meter("Change of the next token, KL", 0.0, e.kl_per_token, " nats"),
        figures.Meter("Edit size against the residual", 0.0, e.edit_size),
    ]
    st.html(figures.meters(rows))
    state.muted(
        "Perplexity by the unedited model, of the generated tokens after the prompt. KL(unedited ‖ edited) per token "
        "along the baseline text. One pair of texts is an example, not a result."
    )


def page() -> None:
    index = state.current_index()
    if index is None:
        return
    left, middle, right = st.columns([0.27, 0.48, 0.25], gap="medium")
    with middle:
        first, second = st.columns(2, gap="medium")
        panes = (first.empty(), second.empty())
    with left:
        request = controls(index)
        problem = st.empty()
    if request is not None:
        try:
            with state.model_lock():
                model, sae = state.model_of(index.meta), state.load_sae(index.meta)
                result = Result(index.meta["sae_id"], request)
                st.session_state["steered"] = result
                run(result, model, sae, index.meta["mean_resid_norm"], lambda: texts(result, panes))
        except AtomscopeError as e:
            with problem:
                state.line(str(e))
    kept = st.session_state.get("steered")
    if kept is not None and not kept.finished.is_set():
        with middle, st.spinner("Measuring what was generated"):
            kept.finished.wait(MEASURE_SECONDS)
    if kept is not None and kept.sae_id == index.meta["sae_id"] and kept.baseline_ids:
        texts(kept, panes)
        with middle:
            state.muted(kept.describe())
        with right:
            what_it_did(kept)
    else:
        with middle:
            state.muted(
                "Baseline and steered text appear here, token by token, drawn with the same random numbers."
            )


page()
