"""Compare: every evaluated SAE by L0, FVU and ΔCE beside its controls, and which features two SAEs share.

URL: ?pair=&side=. Matching is computed by `atomscope compare`; this page only reads what it left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from app import figures, state
from cache.errors import AtomscopeError
from saes.compare import find_comparisons, frontier, read_matching, stability

ROWS = 200
SUBJECTS = {"untrained": "untrained dictionary", "initial": "itself before training"}
METHODS = {"hungarian": "one to one", "mutual": "mutual nearest"}


def measures(root: Path) -> None:
    st.subheader("What they keep at what L0", anchor=False)
    table = frontier(root)
    if not len(table):
        state.line("No evaluation yet. Measure SAEs beside their controls with", "atomscope evaluate")
        return
    left, right = st.columns(2, gap="medium")
    for place, measure, title in ((left, "fvu", "FVU"), (right, "delta_ce", "ΔCE, nats")):
        with place:
            state.muted(
                f"L0 and {title}, lower is better; crosses are controls, the line joins what no SAE beats"
            )
            st.plotly_chart(
                figures.frontier(table, measure=measure, title=title, theme=state.theme_name()),
                theme=None, key=f"frontier_{measure}", config={"displayModeBar": False}, alt=f"L0 against {title}",
            )  # fmt: skip
    st.html(
        figures.table(
            ("SAE", "run", "store", "k", "seed", "L0", "FVU", "ΔCE, nats", "95 % interval"),
            rows(table),
            text=3,
        )
    )
    if table["skip"].nunique() > 1:
        state.muted("skip: rows left out, where it is not position 0; numbers of other rows do not compare.")
    n = table["store"].nunique()
    if n > 1:
        state.muted(
            f"{n} stores: numbers of different stores are of different texts, compare inside one store."
        )


def rows(table: pd.DataFrame) -> list[tuple[object, ...]]:
    out = []
    for r in table.to_dict("records"):
        own = r["subject"] == "sae"
        name = f"{r['name']} ({r['sae_id'][:6]})" if own else f"· {SUBJECTS.get(r['subject'], r['subject'])}"
        name += "" if r["skip"] == "first" else f", skip {r['skip']}"
        marks = ["  best" if r[m] else "" for m in ("best_fvu", "best_ce")]
        low, high = r["ci_low"], r["ci_high"]
        interval = "" if pd.isna(low) else f"{figures.number(low)} to {figures.number(high)}"
        whole = ["" if not own or pd.isna(r[c]) else f"{int(r[c])}" for c in ("k", "seed")]
        run = "" if not own or pd.isna(r["run"]) else r["run"]
        ce = "" if pd.isna(r["delta_ce"]) else figures.number(r["delta_ce"])
        out.append(
            (name, run, r["store"][:8], *whole, figures.number(r["l0"]), figures.number(r["fvu"]) + marks[0], ce + marks[1], interval)
        )  # fmt: skip
    return out


def matching(root: Path) -> None:
    st.subheader("Which features they share", anchor=False)
    found = {pair_id(r): r for r in find_comparisons(root)}
    if not found:
        state.line(
            "No decoders have been matched yet. Match two SAEs of one model with", "atomscope compare SAE SAE"
        )
        return
    asked = st.query_params.get("pair")
    if asked in found and "pair" not in st.session_state:
        st.session_state["pair"] = asked
    elif asked is not None and asked not in found and "pair" not in st.session_state:
        state.line(f"No comparison “{asked[:80]}” in this workspace.")
    left, right = st.columns([0.7, 0.3], vertical_alignment="bottom")
    with left:
        chosen = st.selectbox(
            "Pair", list(found), key="pair", format_func=lambda p: pair_name(found[p]) if p in found else p
        )
    record = found[chosen]
    st.query_params["pair"] = chosen
    with right:
        side = "b" if st.pills(
            "Features of", ["first", "second"], default="first", required=True, key="side", bind="query-params"
        ) == "second" else "a"  # fmt: skip
    pair(record, side)


def pair_id(record: dict[str, Any]) -> str:
    return f"{Path(record['folder']).name}-{record['method']}"


def pair_name(record: dict[str, Any]) -> str:
    a, b = (f"{record[s]['name']} ({record[s]['sae_id'][:6]})" for s in ("a", "b"))
    return f"{a} and {b}, {METHODS[record['method']]}"


def pair(record: dict[str, Any], side: str) -> None:
    frame = read_matching(record)
    s = record["sides"][side]
    st.html(
        figures.stat_tiles([
            (f"{s['n']:,}", "features compared"),
            (figures.number(s["mean_cos"]), "mean |cosine| of matches"),
            (f"{figures.number(100 * s['over_0.7'])} %", "matched above 0.7"),
            (f"{figures.number(100 * s['over_0.9'])} %", "matched above 0.9"),
            (f"{figures.number(100 * s['mutual'])} %", "mutual nearest"),
            (figures.number(record["chance"]), "|cosine| of random directions"),
        ])
    )  # fmt: skip
    if record["a"]["hook"] != record["b"]["hook"]:
        state.muted(f"Different hooks: {record['a']['hook']} and {record['b']['hook']}.")
    mine = frame[frame["side"] == side]
    live = mine[mine["density"] > 0] if mine["density"].notna().all() else mine
    left, right = st.columns(2, gap="medium")
    with left:
        state.muted(
            f"Matches of {len(live):,} of {len(mine):,} features; features that never fire are left out"
        )
        st.plotly_chart(
            figures.matching_hist(live["cos"], chance=record["chance"], theme=state.theme_name()),
            theme=None, key="matched", config={"displayModeBar": False}, alt="Histogram of matched cosines",
        )  # fmt: skip
    with right:
        bins = stability(frame, side)
        if len(bins):
            state.muted(
                "Are frequent features more stable? Matched |cosine| against density, with the median"
            )
            st.plotly_chart(
                figures.stability(live, bins, theme=state.theme_name()),
                theme=None, key="stability", config={"displayModeBar": False}, alt="Matched cosine against density",
            )  # fmt: skip
        else:
            state.line(
                "Densities come from the feature index. Build it, then compare again:", "atomscope index"
            )
    matched_table(live)


def matched_table(live: pd.DataFrame) -> None:
    worst = st.toggle("Least stable first", key="worst")
    order = live.assign(size=live["cos"].abs().fillna(0.0)).sort_values(
        ["size", "feature"], ascending=[worst, True]
    )
    shown = order.head(ROWS)[["feature", "match", "cos", "nearest", "nearest_cos", "mutual", "density"]]
    shown = shown.assign(match=shown["match"].where(shown["match"] >= 0))
    st.dataframe(
        shown, hide_index=True, key="pairs", alt="Features and their matches",
        column_config={
            "cos": st.column_config.NumberColumn("cosine", format="%.3f"),
            "nearest_cos": st.column_config.NumberColumn("nearest cosine", format="%.3f"),
            "density": st.column_config.NumberColumn("density", format="%.2e"),
        },
    )  # fmt: skip
    state.muted(
        f"{len(shown):,} of {len(live):,} features shown. A negative cosine matches the mirror image (signed SAEs)."
    )


def page() -> None:
    state.title("Compare SAEs")
    root = state.workspace()
    if not root.is_dir() or not any(root.glob("saes/*/run.json")):
        state.line("No SAE in this workspace yet. Make everything in one go with", "atomscope demo")
        return
    for part in (measures, matching):
        try:
            part(root)
        except AtomscopeError as e:
            state.line(str(e))


page()
