"""Explorer: the list of features at the left, one feature at the right.

URL: ?sae=&fid=&sign=&q=&mode=&dens=&sort=&page=&kind=&width=. Everything shown comes from the feature index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import streamlit as st

from app import figures, overview, state
from cache.errors import AtomscopeError, MissingDataError
from saes.labels import add_label, all_events
from saes.queries import Example, FeatureIndex

PAGE_SIZE = 50
CONTEXTS = 12
MODES = {"Label": "label", "Token": "token", "Id": "id"}
HINTS = {"Label": "words of a label", "Token": "a token it fires on, e.g. calendar", "Id": "a number"}
SORTS = {"by density": "density", "by activation": "max_act", "by id": "feature"}
KINDS = {"Top": "top", "Quantiles": "quantile", "Random": "random"}
WIDTHS = {"10": 10, "30": 30, "Context": 1024}
COLUMNS = {
    "feature": st.column_config.NumberColumn("id", width=48, format="%d"),
    "label": st.column_config.TextColumn("label", width=110),
    "top_token": st.column_config.TextColumn("top token", width=88),
    "density": st.column_config.NumberColumn("density", width=70, format="%.3g %%"),
    "max_act": st.column_config.NumberColumn("max", width=54, format="%.1f"),
}


def choose(feature: int) -> None:
    st.session_state["fid"] = str(feature)


def choose_row(features: list[int]) -> None:
    rows = st.session_state["list"]["selection"]["rows"]
    if rows and rows[0] < len(features):
        choose(features[rows[0]])


def choose_random(index: FeatureIndex) -> None:
    choose(index.random_feature())


def first_page() -> None:
    st.session_state["page"] = 1


def has_proxies(index: FeatureIndex) -> bool:
    """Whether `atomscope feature proxies` has judged the features of this index."""
    try:
        return bool(index.proxies_sql())
    except MissingDataError:
        return False


def feature_list(index: FeatureIndex) -> int | None:
    """Filters, one page of features, and the first feature of the list."""
    sorts = SORTS | ({"by readability": "proxy_score"} if has_proxies(index) else {})
    search = st.container()
    left, right = st.columns(2, vertical_alignment="bottom")
    with left:
        mode = st.pills(
            "Search by", list(MODES), default="Label", required=True, key="mode", bind="query-params",
            on_change=first_page, label_visibility="collapsed",
        ) or "Label"  # fmt: skip
    with right:
        sort = st.selectbox(
            "Sort by", list(sorts), key="sort", bind="query-params", on_change=first_page,
            label_visibility="collapsed",
        )  # fmt: skip
    with search:
        query = st.text_input(
            "Search features", key="q", type="search", placeholder=HINTS[mode], max_chars=200, live="250ms",
            on_change=first_page, bind="query-params", label_visibility="collapsed",
        )  # fmt: skip
    low, high = st.slider(
        "Fires on this share of tokens, log10", -6.0, 0.0, (-6.0, 0.0), 0.5, key="dens", bind="query-params",
        on_change=first_page,
    )  # fmt: skip
    whole = (low, high) == (-6.0, 0.0)
    found = index.tokens_like(query) if mode == "Token" and query else None
    filters: dict[str, Any] = {
        "query": query or "",
        "mode": MODES[mode],
        "density": None if whole else (10**low, 10**high),
        "sort": "match" if found is not None and sort == "by density" else sorts[sort],
        "descending": sort != "by id",
        "limit": PAGE_SIZE,
        "within": overview.chosen(index),
    }
    frame, total = index.list_features(**filters, offset=PAGE_SIZE * (_page() - 1))
    if total and not len(frame):  # a page in the URL that this list does not have
        frame, total = index.list_features(**filters)
    inside = " inside the selection on the map" if filters["within"] is not None else ""
    state.muted(f"{total:,} of {index.meta['d_sae']:,} features{inside}{tokens_searched(found)}")
    if not len(frame):
        state.line(
            "Nothing matches: clear the search or the selection on the map, or widen the density range."
        )
        return None
    shown = frame[list(COLUMNS)].copy()
    shown["density"] *= 100
    shown["top_token"] = [figures.glyphs(str(t)) for t in shown["top_token"]]
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


def tokens_searched(found: pd.DataFrame | None) -> str:
    """Which tokens a typed text stood for."""
    if found is None:
        return ""
    names = [figures.glyphs(str(t)) for t in found["token"].head(6)]
    more = f" and {len(found) - 6} more" if len(found) > 6 else ""
    return (
        f", strongest first, that fire on {', '.join(names)}{more}"
        if names
        else ": no such token in the corpus"
    )


def _page() -> int:
    """The page of the list, known before its widget is drawn."""
    asked = str(st.session_state.get("page") or st.query_params.get("page", "1"))
    return int(asked) if asked.isascii() and asked.isdigit() and 0 < int(asked) < 10_000 else 1


def header(index: FeatureIndex, first: int | None) -> int | None:
    """Title, id box and actions; returns the feature that is shown."""
    left, box, right = st.columns([0.56, 0.12, 0.32], vertical_alignment="top")
    with box:
        text = st.text_input(
            "Feature id", key="fid", bind="query-params", max_chars=80, label_visibility="collapsed",
            placeholder="" if first is None else str(first),
        )  # fmt: skip
    with right, st.container(horizontal=True, horizontal_alignment="right"):
        st.button("Random", on_click=choose_random, args=(index,), help="Any feature that fires")
        steer = st.button("Steer with it", type="primary", key="to_steering")
    with left:
        try:
            feature = state.feature_id(text, index.meta["d_sae"]) if text else first
            if feature is None:
                return None
            f = index.feature(feature)
        except AtomscopeError as e:
            state.line(str(e))
            return None
        state.title(f["label"] or "No label yet", str(feature))
        state.muted(about(f, index.meta))
    if steer:
        pole = st.session_state.get("sign") or "positive"
        ids = {"sae": index.sae_id, "fid": str(feature)} | ({"sign": pole} if index.meta["signed"] else {})
        st.switch_page("screens/steer.py", query_params=ids)
    return feature


def about(f: dict[str, Any], meta: dict[str, Any]) -> str:
    """Whose label it is and how the feature can be read."""
    parts = []
    for sign, e in f["labels"].items():
        pole = {1: "+ ", -1: "− "}[sign] if meta["signed"] else ""
        score = "not scored" if e["score"] is None else f"score {e['score']:.2f}"
        parts.append(f"Label {pole}by {e['author']} ({e['method']}, {score})")
    if meta["signed"]:
        parts.append("two poles, + and −")
    return " · ".join(parts) or f"Marks best {figures.glyphs(f['top_token'])}"


def tiles(f: dict[str, Any], meta: dict[str, Any]) -> figures.HTML:
    density = float(f["density"])
    stats = [
        (
            f"{figures.number(100 * density)} %",
            f"of tokens, 1 in {round(1 / density):,}" if density else "of tokens",
        ),
        (figures.number(f["max_act"]), "largest activation"),
    ]
    if meta["signed"]:
        stats.append((figures.number(f["min_act"]), "lowest activation"))
    stats.append((f"{int(f['n_fire']):,}", "tokens it fires on"))
    share = max(abs(f["max_act"]), abs(f["min_act"])) * f["dec_norm"] / meta["mean_resid_norm"]
    stats.append((figures.number(share), "× mean residual norm, at most"))
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
    examples: Sequence[Example] = index.examples(
        feature, kind=KINDS[kind or "Top"], sign=sign, n=CONTEXTS, width=WIDTHS[width or "30"]
    )
    f = index.feature(feature)
    if not examples:
        state.muted("No context: the feature did not fire on this side in the indexed tokens.")
        return
    names = {"train": "training", "heldout": "held-out"}
    where = " and ".join(names[s] for s in ("train", "heldout") if any(e.split == s for e in examples))
    scale = max(abs(f["max_act"]), abs(f["min_act"]))
    footer = f"{len(examples)} contexts of the {f['n_fire']:,} tokens that it fires on · {where} documents"
    st.html(figures.examples_panel([named(e) for e in examples], scale=scale, footer=footer))


def named(e: Example) -> Example:
    """The example with its band in words."""
    if not e.band:
        return e
    tenth = int(e.band[1:])
    words = {0: "strongest tenth of its firings", 9: "weakest tenth"}.get(
        tenth, f"{10 * tenth} to {10 * tenth + 10} %"
    )
    return replace(e, band=words)


def plots(index: FeatureIndex, feature: int) -> None:
    left, right = st.columns([0.6, 0.4], gap="medium")
    with left:
        histogram = index.histogram(feature)
        n = int(histogram["count"].sum()) if len(histogram) else 0
        state.muted(f"Non-zero activations, {n:,} of {index.meta['n_tokens']:,} tokens, log count")
        if n:
            st.plotly_chart(
                figures.act_histogram(histogram, theme=state.theme_name()),
                theme=None, key="hist", config={"displayModeBar": False}, alt="Histogram of activations",
            )  # fmt: skip
    with right:
        lens = index.logits(feature)
        if len(lens):
            state.muted(
                "Direct effect on the next token (logit lens, direct path only): most raised, most lowered"
            )
            st.html(figures.logit_table(lens, n=10))
        else:
            state.line("No logit lens in this index. Build it with the model:", "atomscope index")


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
    """The entry of a label, and every label and note given so far."""
    state.muted("Every label is kept; the newest one is shown. Stored in the workspace's annotations.")
    with st.form("label", clear_on_submit=True, border=False):
        text = st.text_input("Label", max_chars=200, placeholder="what it fires on, in a few words")
        author = st.text_input("Author", max_chars=60, value="", placeholder="your name or initials")
        if st.form_submit_button("Save label", type="primary"):
            if text.strip():
                save(index, feature, sign, text, author)
            state.line("The label is empty: type some words first.")
    events = [
        e for e in all_events(index.workspace) if (e["sae_id"], e["feature"]) == (index.sae_id, feature)
    ]
    if events:
        history = pd.DataFrame(events[::-1])[["kind", "text", "sign", "author", "method", "score", "created"]]
        st.dataframe(
            history, hide_index=True, key="history", alt="Labels and notes of this feature, newest first"
        )


def save(index: FeatureIndex, feature: int, sign: int, text: str, author: str) -> None:
    try:
        add_label(
            index.workspace,
            sae_id=index.sae_id,
            feature=feature,
            sign=sign,
            text=text,
            author=author.strip() or None,
        )
    except (AtomscopeError, OSError) as e:
        state.line(f"The label was not saved: {e}")
        st.stop()
    st.rerun()


def detail(index: FeatureIndex, feature: int) -> None:
    f, sign = index.feature(feature), 1
    st.html(tiles(f, index.meta))
    if not f["n_fire"]:
        state.line("This feature is dead: it did not fire on any indexed token.")
    if index.meta["signed"]:
        pole = st.pills(
            "Pole", list(state.POLES), default="positive", required=True, key="sign", bind="query-params",
            label_visibility="collapsed",
        )  # fmt: skip
        sign = state.POLES[pole or "positive"]
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
    left, right = st.columns([0.36, 0.64], gap="medium")
    with left:
        first = feature_list(index)
    with right:
        feature = header(index, first)
        if feature is not None:
            detail(index, feature)
    with left:
        overview.draw(index, feature)


page()
