"""`atomscope sae list | check | convert` and `atomscope open`: the workspace's SAEs and those that others published."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from app.lookup import AsJson, Workspace, emit, open_store, sae_folder
from cache.workspace import workspace_path

sae = typer.Typer(no_args_is_help=True, help="SAEs: list them, check them, convert them.")

Reference = Annotated[
    str,
    typer.Argument(
        metavar="SAE", help="Folder, release:id, run/sae, run with one SAE, SAE's name, sae_id or latest."
    ),
]
NormFactor = Annotated[
    float | None,
    typer.Option(help="Factor that the rows had in training, where the files leave it out."),
]


@sae.command("list")
def list_saes(workspace: Workspace = None, as_json: AsJson = False) -> None:
    """The workspace's SAEs, newest first, each under a name that other commands take: status, hook, FVU, L0, dead."""
    from app.catalogue import read_saes

    rows = read_saes(workspace_path(workspace, create=False))
    emit(rows, as_json, "\n".join(_table(rows)))


def _table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["no SAE yet: run `atomscope train`"]

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    head = ("SAE", "sae_id", "status", "hook", "FVU", "L0", "dead", "held-out FVU")
    cells = [
        (
            f"{r['run']}/{r['sae']}", r["sae_id"] or "-", r["status"], r["hook"], number(r["train_fvu"], 4),
            number(r["train_l0"], 1), number(r["n_dead"], 0),
            number(r["heldout_fvu"], 4) if r["evaluated"] else "not evaluated",
        )
        for r in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    text = 4  # these columns begin at the left
    lines = [
        "  ".join(f"{c:<{w}}" if i < text else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in (head, *cells)
    ]  # fmt: skip
    return [
        *lines,
        "FVU, L0 and dead latents as last logged in training; held-out FVU of `atomscope evaluate`",
    ]


@sae.command("check")
def check(
    reference: Reference = "latest",
    store_name: Annotated[str, typer.Argument(metavar="STORE")] = "latest",
    norm_factor: NormFactor = None,
    max_rows: Annotated[int, typer.Option(help="Rows of the sample.")] = 20_000,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """L0 and FVU on rows of a store beside what the SAE's card says; names the convention that is off."""
    from saes import SAE
    from saes.checking import check as run

    data = open_store(store_name, workspace)
    loaded = SAE.load(sae_folder(reference, workspace), norm_factor=norm_factor)
    found = run(loaded, data, max_rows=max_rows)
    emit(found.to_dict(), as_json, str(found))


@sae.command("convert")
def convert(
    reference: Reference,
    out: Annotated[Path, typer.Argument(help="New folder.")],
    norm_factor: NormFactor = None,
    workspace: Workspace = None,
) -> None:
    """Write an SAE of any readable format as cfg.json and safetensors; opens pickles, for tensors only."""
    from saes.foreign.convert import convert as run

    # a release is converted as it is, without being brought into the workspace first: its weights may be a pickle
    release = ":" in reference and not Path(reference).exists()
    found = reference if release else sae_folder(reference, workspace)
    made = run(found, out, norm_factor=norm_factor, workspace=workspace)
    print(f"{out}  {made.cfg.activation}, {made.cfg.d_sae:,} latents of {made.cfg.d_model}, {made.sae_id}")


def open_command(
    reference: Annotated[str, typer.Argument(metavar="SAE", help="Folder or release:id.")],
    text: Annotated[
        str,
        typer.Argument(metavar="TEXT", help="Text file, data set or packaged corpus, as in corpus build."),
    ],
    model: Annotated[str | None, typer.Option(help="Model; default: the one that the SAE names.")] = None,
    hook: Annotated[str | None, typer.Option(help="Hook, where the SAE's files do not name it.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a row; default: as in its training.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens.")] = None,
    norm_factor: NormFactor = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Any SAE over your text: harvest, check and index it; `atomscope app` then shows it."""
    from app.opening import open_text

    made = open_text(
        reference, text, workspace_path(workspace), model=model, hook=hook, context=context, max_tokens=max_tokens,
        norm_factor=norm_factor,
    )  # fmt: skip
    for note in made.notes:
        print(f"warning: {note}", file=sys.stderr)
    value = {
        "sae": str(made.sae), "store": made.store, "index": str(made.index), "check": made.checked.to_dict(),
        "notes": list(made.notes),
    }  # fmt: skip
    emit(value, as_json, f"{made.checked}\nindex {made.index}\nnow: atomscope app")
