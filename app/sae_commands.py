"""`atomscope sae check | convert` and `atomscope open`: SAEs that others published."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from app.lookup import AsJson, Workspace, emit, open_store, sae_folder
from cache.workspace import workspace_path

sae = typer.Typer(no_args_is_help=True, help="SAEs from elsewhere: check them, convert them.")

Reference = Annotated[
    str, typer.Argument(metavar="SAE", help="Folder, release:id, run name, sae_id or latest.")
]
NormFactor = Annotated[
    float | None,
    typer.Option(help="Factor that the rows had in training, where the files leave it out."),
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
    reference: Annotated[str, typer.Argument(metavar="SAE", help="Folder or release:id.")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    norm_factor: NormFactor = None,
) -> None:
    """Write an SAE of any readable format as cfg.json and safetensors; opens pickles, for tensors only."""
    from saes.foreign.convert import convert as run

    made = run(reference, out, norm_factor=norm_factor)
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
