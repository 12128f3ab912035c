"""Runs and datasets: SAEs with their measures beside controls, stores and corpora."""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from app import figures, state
from app.atom_table import HEAD, PREFIX, atom_table
from app.catalogue import Catalogue, measure_table, newest_measures, read_catalogue, rows_left_out
from cache.errors import AtomscopeError

MEASURES = {
    "l0": "L0",
    "fvu": "FVU",
    "cos": "cosine",
    "ce_recovered_mean": "CE recovered",
    "delta_ce": "ΔCE, nats",
}
SUBJECTS = {"sae": "SAE", "untrained": "untrained dictionary", "initial": "itself before training"}


def summary(c: Catalogue, indexed: int) -> None:
    tokens = int(c.corpora["tokens"].sum()) if len(c.corpora) else 0
    rows = int(c.stores["n_rows"].fillna(0).sum())
    st.html(
        figures.stat_tiles([
            (f"{len(c.saes):,}", "SAEs"),
            (f"{indexed:,}", "feature indexes"),
            (f"{tokens:,}", "corpus tokens"),
            (f"{rows:,}", "cached rows, all hooks"),
            (size(c.bytes), "on disk"),
        ])
    )  # fmt: skip


def size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def saes(c: Catalogue) -> None:
    st.subheader("SAEs", anchor=False)
    if not len(c.saes):
        state.line("No SAE yet. Train one on a store with", "atomscope train")
        return
    rows = [
        (
            r["sae"], r["run"], r["status"], r["hook"], r["model"], f"{int(r['d_sae']):,}", int(r["k"]) or "–",
            f"{int(r['tokens']):,}", figures.number(r["train_fvu"]), figures.number(r["n_dead"]),
        )
        for r in c.saes.to_dict("records")
    ]  # fmt: skip
    names = ("SAE", "run", "status", "hook", "model", "latents", "k", "train tokens", "train FVU", "dead")
    st.html(figures.table(names, rows, text=5))
    if "running" in set(c.saes["status"]):
        state.muted("A run that is not finished goes on where it was when the same command is given again.")
    failed = c.saes[c.saes["status"] == "failed"].drop_duplicates(["run", "problem"])
    for r in failed.to_dict("records"):
        state.muted(f"Failed: {r['run']}: {r['problem']}")


def evaluations(c: Catalogue, metas: list[dict[str, Any]]) -> None:
    st.subheader("What they keep", anchor=False)
    if not len(c.measures):
        state.line("No evaluation yet. Measure an SAE beside its controls with", "atomscope evaluate")
        return
    names = {m["sae_id"]: f"{state.sae_name(m)} ({m['sae_id'][:6]})" for m in metas}
    rows = []
    for sae_id in c.measures["sae_id"].drop_duplicates():
        table = measure_table(c.measures, sae_id)
        interval, skip = (
            interval_of(newest_measures(c.measures, sae_id)[0], sae_id),
            rows_left_out(c.measures, sae_id),
        )
        name = names.get(sae_id, sae_id) + ("" if skip == "first" else f", skip {skip}")
        for i, (subject, values) in enumerate(table.iterrows()):
            cells = [figures.number(values.get(m)) for m in MEASURES]
            who = SUBJECTS.get(str(subject), str(subject).upper().replace("PCA-", "PCA, "))
            rows.append((name if i == 0 else "", who, *cells, interval if i == 0 else ""))
    st.html(figures.table(("SAE", "subject", *MEASURES.values(), "95 % interval"), rows, text=2))
    n = c.measures.groupby("metric")["n"].max()
    state.muted(
        f"FVU, L0 and cosine on held-out documents, {int(n.get('fvu', 0)):,} tokens; ΔCE on {int(n.get('delta_ce', 0)):,} "
        "tokens with the hook's output replaced by the reconstruction. Share recovered is against the train mean. "
        "Controls: PCA of the same rank; an untrained dictionary: random unit atoms, the same L0; and the SAE itself before "
        "its first step."
    )


def atoms(c: Catalogue, metas: list[dict[str, Any]]) -> None:
    """SAEs whose decoder rows were measured as threshold atoms; nothing where none was."""
    names = {m["sae_id"]: f"{state.sae_name(m)} ({m['sae_id'][:6]})" for m in metas}
    rows = []
    for sae_id, part in c.measures[c.measures["subject"].str.startswith(PREFIX)].groupby(
        "sae_id", sort=False
    ):
        name = names.get(str(sae_id), str(sae_id))
        table = atom_table(part.to_dict("records"))
        rows += [(name if i == 0 else "", *cells) for i, cells in enumerate(table)]
    if not rows:
        return
    st.subheader("Their decoder rows as atoms", anchor=False)
    st.html(figures.table(("SAE", "subject", *HEAD[1:]), rows, text=2))
    state.muted(
        "Coherence in the atomic inner product of the train rows. q* is nearly a function of L0: its excess over random unit "
        "atoms and over a tight frame of the same shape at the same L0s is the figure. R² of train and held-out documents without "
        "attention sinks; pursuit: the dictionary alone, coded by matching pursuit; ℓ₁: codes that basis pursuit recovers. "
        "TopK: an SAE of the same width and L0, trained by the same schedule on this store to stand beside it."
    )


def interval_of(measures: pd.DataFrame, sae_id: str) -> str:
    mine = (
        (measures["sae_id"] == sae_id) & (measures["metric"] == "delta_ce") & (measures["subject"] == "sae")
    )
    found = measures[mine]
    if not len(found) or pd.isna(found["ci_low"].iloc[0]):
        return ""
    return f"{figures.number(found['ci_low'].iloc[0])} to {figures.number(found['ci_high'].iloc[0])}"


def data(c: Catalogue) -> None:
    st.subheader("Activation stores", anchor=False)
    if not len(c.stores):
        state.line("No activations yet. Cache them with", "atomscope harvest")
    else:
        rows = [
            (
                r["store"], r["hook"], r["model"], r["backend"], r["dtype"], f"{figures.number(r['n_rows'])}",
                "complete" if r["complete"] else r["problem"] or f"{int(r['shards'])} of {int(r['shards_total'])} shards",
            )
            for r in c.stores.to_dict("records")
        ]  # fmt: skip
        st.html(figures.table(("store", "hook", "model", "backend", "dtype", "rows", "state"), rows, text=5))
    st.subheader("Datasets", anchor=False)
    if not len(c.corpora):
        state.line("No corpus yet. Tokenise one with", "atomscope corpus")
        return
    corpora = [
        (
            r["corpus"],
            r["source"],
            f"{int(r['documents']):,}",
            f"{int(r['held_out']):,}",
            f"{int(r['tokens']):,}",
        )
        for r in c.corpora.to_dict("records")
    ]
    st.html(figures.table(("corpus", "source", "documents", "held out", "tokens"), corpora, text=2))


def page() -> None:
    state.title("Runs and datasets")
    try:
        c = read_catalogue(state.workspace())
    except AtomscopeError as e:
        state.line(str(e))
        return
    if not (len(c.saes) or len(c.stores) or len(c.corpora)):
        state.line(
            "This workspace is empty. Make model, activations, SAEs and index in one go with",
            "atomscope demo",
        )
        return
    metas = state.index_metas()
    summary(c, len(metas))
    saes(c)
    evaluations(c, metas)
    atoms(c, metas)
    data(c)


page()
