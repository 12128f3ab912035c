"""`atomscope compare`, `atoms` and `feature proxies`: SAEs beside each other, their atoms, how readable features are."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Annotated

import typer

from app.lookup import AsJson, Workspace, emit, open_store, sae_folder
from cache.workspace import workspace_path


def compare(
    saes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SAE]...", help="SAE folders, run names or sae_ids; none: only the table."),
    ] = None,
    match: Annotated[
        str, typer.Option(help="hungarian (one to one, largest total cosine) or mutual (nearest both ways).")
    ] = "hungarian",
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Match the decoders of SAEs pair by pair, and list all evaluated SAEs by L0, FVU and delta CE."""
    from app.terminal import comparison_lines, frontier_lines
    from saes.compare import compare_saes, frontier

    root = workspace_path(workspace, create=False)
    folders = [sae_folder(name, workspace) for name in saes or []]
    found = [compare_saes(root, a, b, method=match) for a, b in combinations(folders, 2)]
    table = frontier(root)
    lines = [*comparison_lines(found), *frontier_lines(table)]
    value = {"comparisons": found, "frontier": json.loads(table.to_json(orient="records"))}
    emit(value, as_json, "\n".join(lines))


def atoms(
    sae: Annotated[str, typer.Argument(help="SAE folder, run name, sae_id or latest.")] = "latest",
    store_name: Annotated[str, typer.Argument(metavar="STORE")] = "latest",
    beside: Annotated[
        list[str] | None,
        typer.Option(help="Further SAEs beside it."),
    ] = None,
    topk: Annotated[
        bool,
        typer.Option(
            help="A TopK SAE of the same width and L0 beside it, by the schedule of the SAE's own run: trained once, then found."
        ),
    ] = True,
    max_rows: Annotated[int, typer.Option(help="Rows of each split for R² and L0.")] = 50_000,
    recovery: Annotated[
        int, typer.Option(help="Codes given to basis pursuit, seconds each; 0 leaves it out.")
    ] = 16,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Decoder rows as threshold atoms: coherence in the atomic inner product, R² on both splits, l1 recovery, controls."""
    from app.atom_table import atom_lines
    from saes import SAE, evaluate_atoms

    data = open_store(store_name, workspace)
    others = {name: SAE.load(sae_folder(name, workspace)) for name in beside or []}
    found = evaluate_atoms(
        SAE.load(sae_folder(sae, workspace)),
        data,
        beside=others,
        topk=topk,
        max_rows=max_rows,
        recovery=recovery,
    )
    rows = [r for r in found.rows if r["subject"].startswith("atoms:")]
    emit(rows, as_json, "\n".join(atom_lines(rows)))


def feature_proxies(
    feature: Annotated[
        int | None, typer.Argument(help="A feature; none: the table is made and its best are listed.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Features to list.")] = 20,
    sae_id: Annotated[str | None, typer.Option(help="SAE; default: the newest index.")] = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """How readable features are, judged without a language model: token purity, best rule, coherence, detection."""
    from saes import FeatureIndex
    from saes.proxies import build_proxies

    index = FeatureIndex.open(workspace, sae_id)
    if feature is not None:
        index.feature(feature)
    build_proxies(index)
    frame = index.proxies()
    total = len(frame)
    if feature is not None:
        frame = frame[frame["feature"] == feature]
    else:
        frame = frame.sort_values("proxy_score", ascending=False).head(limit)
    text = (
        frame.to_string(index=False, float_format=lambda v: f"{v:.3f}")
        if len(frame)
        else "this feature never fires"
    )
    emit(json.loads(frame.to_json(orient="records")), as_json, f"{text}\n{len(frame)} of {total} poles")


def feature_document(
    document: Annotated[int, typer.Argument(help="Number of a document of the index's corpus.")],
    limit: Annotated[int, typer.Option(min=1, help="Features to list.")] = 20,
    sae_id: Annotated[str | None, typer.Option(help="SAE; default: the newest index.")] = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Features that fire in a document, the strongest first: tokens, largest and smallest activation, sum of sizes."""
    from saes import FeatureIndex

    index = FeatureIndex.open(workspace, sae_id)
    frame = index.document_features(document, limit)
    labels = index.labels()
    frame["label"] = [
        " / ".join(labels[(f, s)]["text"] for s in (1, -1) if (f, s) in labels) for f in frame["feature"]
    ]
    text = frame.to_string(index=False, float_format=lambda v: f"{v:.2f}") if len(frame) else "nothing fires"
    emit(json.loads(frame.to_json(orient="records")), as_json, text)
