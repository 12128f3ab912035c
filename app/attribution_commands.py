"""`atomscope attribute`: which heads, neurons and features make a model answer as it does (AtP*)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from app.lookup import AsJson, Workspace, emit, sae_folder
from cache.errors import UsageError
from cache.workspace import workspace_path

SHOWN = 15


def attribute(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PAIRS",
            help="JSONL file of pairs, or a set: indirect_object, greater_than, city_country, gender_pronoun, a_an.",
        ),
    ],
    model: Annotated[str, typer.Option(help="Packaged name, local folder or hub id.")] = "smollm2-135m-instruct-q4_1",
    nodes: Annotated[
        str, typer.Option(help="Kinds, by commas: q,k,v,z,mlp,resid,attn_out,mlp_out. Empty: only SAE features.")
    ] = "q,k,v,z",
    pairs: Annotated[int, typer.Option(help="Pairs of a built-in set.")] = 10,
    seed: Annotated[int, typer.Option(help="Which pairs of a built-in set.")] = 0,
    metric: Annotated[str, typer.Option(help="logit_diff, log_prob or kl.")] = "logit_diff",
    positions: Annotated[str, typer.Option(help="each, or sum (pairs of several lengths).")] = "each",
    qk_fix: Annotated[bool, typer.Option(help="Through the softmax exactly, for q and k.")] = True,
    grad_drop: Annotated[bool, typer.Option(help="Against cancelling paths; L / 2 more backward passes.")] = True,
    sae: Annotated[list[str] | None, typer.Option(help="SAE whose features are nodes too; may be repeated.")] = None,
    error: Annotated[bool, typer.Option(help="Keep what the SAE leaves out, as a node of its own.")] = True,
    top_k: Annotated[int, typer.Option(min=0, help="Best nodes to patch exactly; 0: none.")] = 20,
    samples: Annotated[int, typer.Option(min=0, help="Random subsets that bound what was missed, a pair; 0: no bound.")] = 0,
    exact: Annotated[bool, typer.Option(help="Patch every node exactly (resumable): truth, and recall curves.")] = False,
    batch: Annotated[int, typer.Option(help="Rows of a backward pass: the cap on memory.")] = 32,
    name: Annotated[str, typer.Option(help="Name of the run; default: the set or file.")] = "",
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Rank every node by AtP*, patch the best exactly, and bound what was missed. Writes attributions/<run>/."""
    from cache import load_model
    from probes.attribution.atp import AtPStar
    from probes.attribution.diagnose import SHARE, check_sampling
    from saes import SAE

    started, root = time.time(), workspace_path(workspace)
    kinds = tuple(k.strip() for k in nodes.split(",") if k.strip())
    if samples:
        check_sampling(samples, SHARE)
    loaded = [SAE.load(sae_folder(s, workspace)) for s in sae or []]
    if len({s.cfg.hook for s in loaded}) < len(loaded):
        raise UsageError("two SAEs are of one hook: give one for each hook")
    lm = load_model(model, workspace=root)
    found = _pairs(source, lm.tokenizer, pairs, seed)
    method = AtPStar(
        lm, metric, kinds, positions=positions, qk_fix=qk_fix, grad_drop=grad_drop, batch=batch,
        saes={s.cfg.hook: s for s in loaded}, error=error,
    )  # fmt: skip
    scores = method.attribute(found)
    recall, truth = None, None
    if exact:
        recall, truth = _exact(method, scores, found, root, max(1, top_k))
    elif top_k:
        scores = method.verify(scores, found, top_k)
    steps = sorted({max(1, top_k // 4), max(1, top_k), 2 * max(1, top_k)})
    diagnoses = {k: method.diagnose(scores, found, k, n_samples=samples) for k in steps} if samples else {}
    folder = method.report(
        scores, found, root, name=name, recall=recall, diagnoses=diagnoses, truth=truth, started=started
    )
    _print(scores, diagnoses.get(max(1, top_k)), folder, as_json)


def _pairs(source: str, tokenizer: Any, n: int, seed: int) -> list[Any]:
    from probes.attribution.pair_sets import PAIR_SETS, pair_set
    from probes.attribution.pairs import read_pairs

    if source in PAIR_SETS:
        return pair_set(source, tokenizer, n, seed=seed)
    if not Path(source).exists() and not source.endswith((".jsonl", ".json")):
        raise UsageError(f"no pair set {source!r}: choose {', '.join(PAIR_SETS)}, or give a JSONL file")
    return read_pairs(source)


def _exact(method: Any, scores: Any, pairs: Any, root: Path, k: int) -> tuple[Any, Any]:
    """Every node of every pair patched exactly, kept pair by pair and put beside the scores; recall, and the effects."""
    import hashlib

    import numpy as np

    from cache.workspace import canonical_json
    from probes.attribution.patching import ExactPatching
    from probes.attribution.recall import Ranking, recall_table

    effects, live = [], np.zeros(len(scores.space), dtype=bool)
    for target in method.targets(pairs):
        key = [
            scores.space.signature(),
            method.model.identity,
            method.metric.name,
            target.pair.clean,
            target.pair.noise,
        ]
        key += [
            target.pair.answers,
            target.pair.wrong,
            method.error,
            {h: s.sae_id for h, s in method.saes.items()},
        ]
        exact = ExactPatching(method, target)
        digest = hashlib.sha256(canonical_json(key).encode()).hexdigest()[:16]
        effects.append(exact.run(root / "attributions" / f"exact-{digest}"))
        live |= exact.live(np.arange(len(live)))
    truth = np.abs(effects).mean(0)
    scores.columns |= {"exact": np.mean(effects, 0), "exact_abs": truth}
    ids = np.arange(len(truth))
    rankings = [
        Ranking(method=scores.method, order=scores.order(), passes=scores.passes),
        Ranking(method="iterative", order=np.concatenate([ids[live], ids[~live]]), passes=0),
    ]
    return recall_table(rankings, truth, min(k, len(truth))), effects


def _print(scores: Any, diagnoses: Any, folder: Path, as_json: bool) -> None:
    frame = scores.frame(scores.top(SHOWN)).drop(columns=["node"])
    lines = [frame.to_string(index=False, float_format=lambda v: f"{v:.4g}")]
    lines.append(f"{len(scores.space):,} nodes, {scores.n_pairs} pairs, {scores.method}: {scores.passes:.0f} passes a pair")  # fmt: skip
    for found in (diagnoses or [])[:1]:
        lines += ["first pair: " + found.lines()[0], *found.lines()[1:]]
    lines.append(str(folder))
    value = {
        "run": folder.name, "path": str(folder), "method": scores.method, "passes": scores.passes,
        "top": json.loads(scores.frame(scores.top(SHOWN)).to_json(orient="records")),
        "bounds": [{str(a): b for a, b in d.bounds.items()} for d in diagnoses or []],
    }  # fmt: skip
    emit(value, as_json, "\n".join(lines))
