"""`atomscope labels`: write, exchange and generate labels. Events go to the workspace's annotations, append-only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.lookup import AsJson, Workspace, emit, sae_folder
from cache.errors import UsageError
from cache.progress import progress
from cache.workspace import workspace_path

labels = typer.Typer(no_args_is_help=True, help="Labels and notes of features.")
SaeId = Annotated[str | None, typer.Option(help="SAE: sae_id, run or folder; default: the newest index.")]
POLES = {"1": (1,), "-1": (-1,), "both": (1, -1)}


def target_of(sae_id: str | None, workspace: Path | None) -> Any:
    """What label files call the SAE; from its index, or from its folder where it has none."""
    from saes.label_files import Target
    from saes.queries import FeatureIndex

    metas = FeatureIndex.find_all(workspace)
    found = [m for m in metas if sae_id in (None, m["sae_id"])]
    if found:
        return Target.from_meta(found[-1])
    return Target.from_folder(sae_folder(sae_id or "latest", workspace))


@labels.command("add")
def labels_add(
    feature: int,
    text: Annotated[
        str, typer.Argument(help="The label, at most 500 characters; empty takes the label away.")
    ],
    sign: Annotated[int, typer.Option(help="1 or -1 (the negative pole of a signed SAE).")] = 1,
    author: Annotated[str | None, typer.Option(help="Default: your user name.")] = None,
    note: Annotated[bool, typer.Option(help="Keep it as a note beside the label.")] = False,
    sae_id: SaeId = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Give a feature a label or a note."""
    from saes.labels import add_label

    target = target_of(sae_id, workspace)
    if not 0 <= feature < target.d_sae:
        raise UsageError(f"no feature {feature}: this SAE has features 0 to {target.d_sae - 1}")
    if sign == -1 and not target.signed:
        raise UsageError("this SAE has no negative pole: leave --sign out")
    event = add_label(
        workspace_path(workspace), sae_id=target.sae_id, feature=feature, text=text, sign=sign, author=author,
        kind="note" if note else "label",
    )  # fmt: skip
    emit(event, as_json, f"{event['kind']} of feature {feature} by {event['author']}: {event['text']}")


@labels.command("export")
def labels_export(
    path: Annotated[Path, typer.Argument(help="File to write: .json, .jsonl, .jsonl.gz or .csv.")],
    form: Annotated[
        str, typer.Option(help="explanations (a flat list) or features (one object each).")
    ] = "explanations",
    sae_id: SaeId = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Write the labels in force to a file in Neuronpedia's form."""
    from saes.label_files import export_labels

    target = target_of(sae_id, workspace)
    n = export_labels(workspace_path(workspace, create=False), target, path, form=form)
    emit(
        {"path": str(path), "labels": n, "sae_id": target.sae_id},
        as_json,
        f"{n:,} labels of {target.sae_id} in {path}",
    )


@labels.command("import")
def labels_import(
    path: Annotated[
        Path, typer.Argument(help="Neuronpedia's explanations or features, or a file of `labels export`.")
    ],
    source: Annotated[
        str | None,
        typer.Option(help="MODEL_ID/LAYER that the file uses for this SAE, if not its model/hook."),
    ] = None,
    keep_existing: Annotated[
        bool, typer.Option(help="Leave features alone that have a label already.")
    ] = False,
    sae_id: SaeId = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Take labels from a file; if one row is of another SAE or no label, nothing is taken and its line is named."""
    from saes.label_files import import_labels

    if source is not None and "/" not in source:
        raise UsageError("--source is MODEL_ID/LAYER, for example gemma-2-2b/20-gemmascope-res-16k")
    pair = None if source is None else (source.partition("/")[0], source.partition("/")[2])
    target = target_of(sae_id, workspace)
    done = import_labels(workspace_path(workspace), target, path, source=pair, keep_existing=keep_existing)
    emit(
        done._asdict() | {"sae_id": target.sae_id}, as_json,
        f"{done.added:,} labels of {target.sae_id} added, {done.same:,} already there, {done.kept:,} left as they are",
    )  # fmt: skip


@labels.command("explain")
def labels_explain(
    features: Annotated[list[int] | None, typer.Argument(help="Features; or use --top.")] = None,
    base_url: Annotated[
        str,
        typer.Option(
            help="OpenAI-compatible server, e.g. http://127.0.0.1:8080/v1 (llama.cpp, vLLM, Ollama)."
        ),
    ] = "http://127.0.0.1:8080/v1",
    model: Annotated[str, typer.Option(help="Model name that the server knows.")] = "default",
    key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the key, if there is one.")
    ] = "ATOMSCOPE_API_KEY",
    top: Annotated[int, typer.Option(help="Also the N features that fire most and have no label.")] = 0,
    sign: Annotated[str, typer.Option(help="1, -1 or both poles (of a signed SAE).")] = "1",
    max_requests: Annotated[
        int, typer.Option(help="Requests to send at most; answers from the cache are free.")
    ] = 200,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens to use at most, as the server counts them.")
    ] = 500_000,
    replace: Annotated[bool, typer.Option(help="Label features that have a label already.")] = False,
    sae_id: SaeId = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Let a language model label features from their contexts, and score each label by detection on other contexts.

    Contexts are sent to the server you name and nowhere else. Answers are cached in the workspace; a run that stops
    at its budget goes on with the same command.
    """
    from saes.autointerp import explain_features, unlabelled
    from saes.chat import ChatEndpoint, EndpointConfig
    from saes.queries import FeatureIndex

    if sign not in POLES:
        raise UsageError(f"--sign is 1, -1 or both, not {sign!r}")
    index = FeatureIndex.open(workspace, sae_id)
    if "-1" in sign and not index.meta["signed"]:
        raise UsageError("this SAE has no negative pole: leave --sign out")
    poles = POLES[sign] if index.meta["signed"] else (1,)
    wanted = [(f, s) for f in features or [] for s in poles]
    wanted += [p for p in unlabelled(index, top, poles) if p not in wanted]
    if not wanted:
        raise UsageError("say which features: ids, or --top 50 for those that fire most")
    config = EndpointConfig(
        base_url=base_url, model=model, key_env=key_env, max_requests=max_requests, max_tokens=max_tokens
    )
    endpoint = ChatEndpoint(config, cache=index.workspace / "autointerp")
    results: list[Any] = []
    try:
        with progress("explain", len(wanted), unit="pole") as bar:
            for result in explain_features(index, wanted, endpoint, replace=replace):
                results.append(result)
                bar.advance()
    finally:  # what is done is shown where a budget or a signal ends it, too
        used = f"{endpoint.requests} requests, {endpoint.tokens:,} tokens, {endpoint.cache_hits} answers from the cache"
        emit([r.to_dict() for r in results], as_json, "\n".join([*(r.line() for r in results), used]))
