"""`atomscope store`: look at activation stores, check them, tidy them up, and take them elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.lookup import AsJson, Workspace, emit, open_store
from cache.workspace import workspace_path

store = typer.Typer(no_args_is_help=True, help="Activation stores.")


@store.command("info")
def store_info(
    name: Annotated[str, typer.Argument()] = "latest", workspace: Workspace = None, as_json: AsJson = False
) -> None:
    """What a store holds: model, corpus, hooks, rows, mean norms."""
    s = open_store(name, workspace)
    hooks = []
    for hook in s.hooks:
        stats = s.stats(hook)
        hooks.append({
            "hook": hook, "d_model": s.d(hook), "dtype": s.dtype(hook), "rows": s.n_rows(hook),
            "complete": s.complete(hook), "mean_norm": stats.mean_norm, "max_abs": stats.max_abs,
        })  # fmt: skip
    lines = [f"{s.path}", f"model {s.identity.get('model', '')}, corpus {s.corpus!r}"]
    lines += [
        f"{h['hook']}: {h['rows']:,} rows x {h['d_model']} {h['dtype']}, mean norm {h['mean_norm']:.1f}"
        + ("" if h["complete"] else ", incomplete: run `atomscope harvest` again")
        for h in hooks
    ]
    emit({"store": s.path.name, "identity": s.identity, "hooks": hooks}, as_json, "\n".join(lines))


@store.command("verify")
def store_verify(name: Annotated[str, typer.Argument()] = "latest", workspace: Workspace = None) -> None:
    """Check every row group of a store against its hash; exit code 1 if anything is damaged."""
    problems = open_store(name, workspace).verify()
    print("\n".join(problems) or "every row group is intact")
    if problems:
        raise typer.Exit(1)


@store.command("gc")
def store_gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List, and delete nothing.")] = False,
    older_than: Annotated[
        float, typer.Option(help="Hours since the last write; younger files are left alone.")
    ] = 1.0,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Delete what killed processes left: half-written files, uncommitted shards, checkpoints of finished runs, idle
    rings of training on the fly, and databases of feature indexes that a newer one has replaced.

    Committed data is never deleted, nor anything that a running process is writing.
    """
    from cache.cleaning import collect_garbage
    from saes.checkpoint import finished_checkpoints
    from saes.index_file import superseded_files

    root = workspace_path(workspace, create=False)
    runs = [(path, "checkpoints of a finished run") for path in finished_checkpoints(root)]
    old = superseded_files(root, older_than=older_than * 3600)
    runs += [(path, "of a feature index, replaced by a newer one") for path in old]
    found = collect_garbage(root, older_than=older_than * 3600, delete=not dry_run, more=runs)
    total = sum(g.bytes for g in found)
    lines = [f"{g.bytes / 1e6:10.1f} MB  {g.path.relative_to(root)}  ({g.why})" for g in found]
    lines.append(f"{len(found)} items, {total / 1e6:,.1f} MB {'would be' if dry_run else 'were'} deleted")
    rows = [g._asdict() for g in found]
    emit({"deleted": not dry_run, "bytes": total, "items": rows}, as_json, "\n".join(lines))


@store.command("export")
def store_export(
    path: Annotated[Path, typer.Argument(help="Target: FILE.tar, FILE.tar.zst or a new folder.")],
    name: Annotated[str, typer.Argument(metavar="STORE")] = "latest",
    hook: Annotated[
        list[str] | None, typer.Option("--hook", help="Only this hook; repeat for several.")
    ] = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Write a store with its corpus and records to one file or folder, checked before it is written."""
    from cache.transfer import export_store

    manifest = export_store(open_store(name, workspace), path, hooks=hook)
    total = sum(f["bytes"] for f in manifest["files"].values())
    text = f"{path}: store {manifest['store']}, {len(manifest['files'])} files, {total / 1e6:,.1f} MB"
    emit({"path": str(path), "bytes": total} | manifest, as_json, text)


@store.command("import")
def store_import(
    path: Annotated[Path, typer.Argument(help="What `atomscope store export` wrote.")],
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Take an exported store into the workspace; every hash is checked before anything is committed."""
    from cache.transfer import import_store

    made = import_store(path, workspace_path(workspace))
    rows = {hook: made.n_rows(hook) for hook in made.hooks}
    text = f"{made.path}: " + ", ".join(f"{hook} {n:,} rows" for hook, n in rows.items())
    emit({"store": made.path.name, "path": str(made.path), "rows": rows}, as_json, text)
