"""Explorer: the list of features at the left, one feature at the right.

URL: ?sae=&fid=&sign=&q=&mode=&dens=&sort=&page=&kind=&width=. Everything shown comes from the feature index.
"""

from __future__ import annotations

import random
from typing import Any

import streamlit as st

from app import figures, state
from cache.errors import AtomscopeError
from saes.queries import FeatureIndex

PAGE_SIZE = 50
MODES = {"Label": "label", "Token": "token", "Id": "id"}
HINTS = {"Label": "words of a label", "Token": "a token it fires on, e.g. calendar", "Id": "a number"}
SORTS = {"density": "density", "largest activation": "max_act", "id": "feature"}
KINDS = {"Top": "top", "Quantiles": "quantile", "Random": "random"}
WIDTHS = {"10": 10, "30": 30, "Context": 1024}
COLUMNS = {
    "feature": st.column_config.NumberColumn("id", width=56, format="%d"),
    "label": st.column_config.TextColumn("label"),
    "top_token": st.column_config.TextColumn("top token", width=90),
    "density": st.column_config.NumberColumn("density", width=72, format="%.3g %%"),
    "max_act": st.column_config.NumberColumn("max", width=56, format="%.1f"),
}


def choose(feature: int) -> None:
    st.session_state["fid"] = str(feature)


def choose_row(features: list[int]) -> None:
    rows = st.session_state["list"]["selection"]["rows"]
    if rows and rows[0] < len(features):
        choose(features[rows[0]])


def choose_random(index: FeatureIndex) -> None:
    """A feature that fires, each as likely as any other."""
    _, total = index.list_features(limit=1)
    if total:
        frame, _ = index.list_features(sort="feature", descending=False, limit=1, offset=random.randrange(total))
        choose(int(frame["feature"].iloc[0]))


def first_page() -> None:
    st.session_state["page"] = 1


def feature_list(index: FeatureIndex) -> int | None:
    """Filters, one page of features, and the first feature of the list."""
    mode = st.session_state.get("mode") or "Label"
    query = st.text_input(
        "Search features",
        key="q",
        type="search",
        placeholder=HINTS.get(mode, ""),
        max_chars=200,
        live="250ms",
        on_change=first_page,
        bind="query-params",
        label_visibility="collapsed",
    )
    top = st.columns([0.5, 0.5], vertical_alignment="bottom")
    with top[0]:
        st.pills(
            "Search by", list(MODES), default="Label", required=True, key="mode", bind="query-params",
            on_change=first_page, label_visibility="collapsed",
        )  # fmt: skip
    with top[1]:
        sort = st.selectbox(
            "Sort by", list(SORTS), key="sort", bind="query-params", on_change=first_page,
            format_func=lambda s: f"by {s}", label_visibility="collapsed",
        )  # fmt: skip
    low, high = st.slider(
        "Fires on this share of tokens, log10", -6.0, 0.0, (-6.0, 0.0), 0.5, key="dens", bind="query-params",
        on_change=first_page,
    )  # fmt: skip
    whole = (low, high) == (-6.0, 0.0)
    frame, total = index.list_features(
        query=query or "",
        mode=MODES[mode],
        density=None if whole else (10**low, 10**high),
        sort=SORTS[sort],
        descending=sort != "id",
        limit=PAGE_SIZE,
        offset=PAGE_SIZE * (_page() - 1),
    )
    state.muted(f"{total:,} of {index.meta['d_sae']:,} features" + ("" if total else ": widen the search"))
    if not len(frame):
        return None
    shown = frame[list(COLUMNS)].copy()
    shown["density"] *= 100
    shown["top_token"] = [figures.glyphs(str(t)) for t in shown["top_token"]]
    shown["label"] = shown["label"].fillna("")
    ids = [int(f) for f in frame["feature"]]
    st.dataframe(
        shown,
        key="list",
        hide_index=True,
        column_config=COLUMNS,
        height=min(36 * (len(shown) + 1), 470),
        on_select=lambda: choose_row(ids),
        selection_mode="single-row",
        alt="Features that match the filters",
    )
    pages = -(-total // PAGE_SIZE)
    if pages > 1:
        st.pagination(pages, key="page", max_visible_pages=5, bind="query-params")
    return ids[0]


def _page() -> int:
    asked = st.session_state.get("page") or st.query_params.get("page", 1)
    return int(asked) if str(asked).isdigit() and int(asked) > 0 else 1


def header(index: FeatureIndex, f: dict[str, Any], sign: int) -> None:
    left, right = st.columns([0.62, 0.38], vertical_alignment="top")
    with left:
        state.title(f.get("label") or "No label yet", str(f["feature"]))
        state.muted(about(f, index.meta))
    with right, st.container(horizontal=True, horizontal_alignment="right"):
        st.button("Random", on_click=choose_random, args=(index,), help="Any feature that fires")
        if st.button("Steer with it", type="primary"):
            ids = {"sae": index.meta["sae_id"], "fid": str(f["feature"]), "sign": "+" if sign > 0 else "−"}
            st.switch_page("pages/steer.py", query_params=ids)


def about(f: dict[str, Any], meta: dict[str, Any]) -> str:
    """Whose label it is and how the feature can be read."""
    parts = []
    if f.get("label"):
        score = f.get("label_score")
        by = " ".join(str(f[k]) for k in ("label_method", "label_author") if f.get(k))
        parts.append(f"Label: {by or 'by hand'}" + (f", score {score:.2f}" if score is not None else ", not scored"))
    if meta["signed"]:
        parts.append("two poles, + and −; the sign is fixed so that + is the larger side")
    parts.append(f"{meta['hook']}, {meta['model']}")
    return " · ".join(parts)


def tiles(f: dict[str, Any], meta: dict[str, Any]) -> figures.HTML:
    density = f["density"]
    stats = [
        (f"{figures.number(100 * density)} %", f"of tokens, 1 in {round(1 / density):,}" if density else "of tokens"),
        (figures.number(f["max_act"]), "largest activation"),
    ]
    if meta["signed"]:
        stats.append((figures.number(f["min_act"]), "lowest activation"))
    stats.append((f"{f['n_fire']:,}", "tokens it fires on"))
    largest = max(abs(f["max_act"] or 0), abs(f["min_act"] or 0))
    if f.get("dec_norm") and meta.get("mean_resid_norm"):
        share = largest * f["dec_norm"] / meta["mean_resid_norm"]
        stats.append((figures.number(share), "of the residual norm, at most"))
    return figures.stat_tiles(stats)


def activations(index: FeatureIndex, feature: int, sign: int) -> None:
    left, right = st.columns(2)
    with left:
        kind = st.pills(
            "Contexts", list(KINDS), default="Top", required=True, key="kind", bind="query-params",
            label_visibility="collapsed",
        )  # fmt: skip
    with right, st.container(horizontal=True, horizontal_alignment="right"):
        width = st.pills(
            "Tokens shown around the centre", list(WIDTHS), default="30", required=True, key="width",
            bind="query-params", label_visibility="collapsed",
        )  # fmt: skip
    examples = index.examples(feature, kind=KINDS[kind or "Top"], sign=sign, n=20, width=WIDTHS[width or "30"])
    f = index.feature(feature)
    splits = {e.split for e in examples}
    held = {0: "training documents", 1: "held-out documents"}
    where = " and ".join(held.get(s, str(s)) for s in sorted(splits, key=str))
    if examples:
        scale = max(abs(f["max_act"] or 0), abs(f["min_act"] or 0))
        footer = f"{len(examples)} of {f['n_fire']:,} tokens that it fires on · {where}"
        st.html(figures.examples_panel(examples, scale=scale, footer=footer))
    else:
        state.muted("No context: the feature did not fire on this side in the indexed tokens.")


def plots(index: FeatureIndex, feature: int) -> None:
    left, right = st.columns([0.6, 0.4], gap="medium")
    with left:
        histogram = index.histogram(feature)
        n = int(histogram["count"].sum()) if len(histogram) else 0
        state.muted(f"Non-zero activations, {n:,} of {index.meta['n_rows']:,} tokens, log count")
        if n:
            st.plotly_chart(
                figures.act_histogram(histogram, theme=state.theme_name()),
                theme=None, key="hist", config={"displayModeBar": False}, alt="Histogram of activations",
            )  # fmt: skip
    with right:
        state.muted("Direct effect on the next token (logit lens, direct path only): most raised, most lowered")
        st.html(figures.logit_table(index.logits(feature), n=10))


def neighbours(index: FeatureIndex, feature: int) -> None:
    frame = index.neighbours(feature)
    state.muted("Nearest decoder rows by cosine, opposed ones too. Choose a row to open the feature.")
    ids = [int(i) for i in frame["other"]]

    def open_row() -> None:
        rows = st.session_state["near"]["selection"]["rows"]
        if rows and rows[0] < len(ids):
            choose(ids[rows[0]])

    st.dataframe(
        frame[["other", "cos", "label"]],
        key="near",
        hide_index=True,
        on_select=open_row,
        selection_mode="single-row",
        column_config={
            "other": st.column_config.NumberColumn("id", width=70, format="%d"),
            "cos": st.column_config.NumberColumn("cosine", width=80, format="%.3f"),
        },
        alt="Features with the nearest decoder rows",
    )


def labels(index: FeatureIndex, feature: int, sign: int) -> None:
    """The entry of a label, and every label given so far."""
    state.muted("Every label is kept; the newest one is shown. Stored in the workspace's annotations.")
    with st.form("label", clear_on_submit=True, border=False):
        text = st.text_input("Label", max_chars=200, placeholder="what it fires on, in a few words")
        author = st.text_input("Author", max_chars=60, value="", placeholder="your name or initials")
        if st.form_submit_button("Save label", type="primary"):
            if text.strip():
                index.add_label(feature, text.strip(), sign=sign, author=author.strip(), method="by hand")
                st.rerun()
            state.line("The label is empty: type some words first.")
    history = index.labels(feature)
    if len(history):
        st.dataframe(history, hide_index=True, key="history", alt="Labels given to this feature, newest first")


def detail(index: FeatureIndex, text: str) -> None:
    try:
        feature = state.feature_id(text, index.meta["d_sae"])
        f = index.feature(feature)
    except AtomscopeError as e:
        state.line(str(e))
        return
    sign = 1
    if index.meta["signed"]:
        sign = -1 if st.session_state.get("sign") == "−" else 1
    header(index, f, sign)
    st.html(tiles(f, index.meta))
    if index.meta["signed"]:
        st.pills("Pole", ["+", "−"], default="+", required=True, key="sign", bind="query-params")
    if not f["n_fire"]:
        state.line("This feature is dead: it did not fire on any indexed token.")
    tabs = st.tabs(["Activations", "Neighbours", "Label"])
    with tabs[0]:
        activations(index, feature, sign)
        plots(index, feature)
    with tabs[1]:
        neighbours(index, feature)
    with tabs[2]:
        labels(index, feature, sign)


def page() -> None:
    index = state.current_index()
    if index is None:
        return
    left, right = st.columns([0.34, 0.66], gap="medium")
    with left:
        first = feature_list(index)
        densities = index.densities()
        state.muted(f"How often features fire; {int((densities == 0).sum()):,} never did")
        st.plotly_chart(
            figures.density_histogram(densities, theme=state.theme_name()),
            theme=None, key="densities", config={"displayModeBar": False}, alt="Histogram of feature densities",
        )  # fmt: skip
    with right:
        text = st.session_state.get("fid") or (str(first) if first is not None else "")
        st.text_input("Feature", key="fid", bind="query-params", placeholder=text, max_chars=20)
        text = st.session_state.get("fid") or text
        if text:
            detail(index, text)
        else:
            state.muted("No feature matches the filters.")


page()
