"""What every command shares: the options --workspace and --json, and names on the command line turned into folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cache.errors import MissingDataError
from cache.workspace import read_json, workspace_path

Workspace = Annotated[
    Path | None,
    typer.Option("--workspace", "-w", help="Workspace folder; default $ATOMSCOPE_HOME or ./workspace."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def emit(value: Any, as_json: bool, text: str) -> None:
    """Print `value` as JSON or `text` for people."""
    print(json.dumps(value, indent=1, default=str) if as_json else text)


def open_store(name: str, workspace: Path | None) -> Any:
    """A store by folder, by the beginning of its name, or `latest`."""
    from cache import ActivationStore

    if (Path(name) / "store.json").is_file():
        return ActivationStore.open(name)
    root = workspace_path(workspace, create=False)
    found = ActivationStore.find_all(root)
    if name == "latest" and found:
        return ActivationStore.open(max(found, key=lambda p: (p / "store.json").stat().st_mtime))
    matches = [p for p in found if p.name.startswith(name)]
    if len(matches) != 1:
        known = ", ".join(p.name for p in found) or "none: run `atomscope harvest` first"
        raise MissingDataError(f"{len(matches)} stores match {name!r} in {root}; there are {known}")
    return ActivationStore.open(matches[0])


def open_corpus(name: str, root: Path) -> Any:
    """A corpus by folder, by the beginning of its name, or `latest`."""
    from cache import Corpus
    from cache.corpus import list_corpora

    if (Path(name) / "corpus.json").is_file():
        return Corpus.open(name)
    found = list_corpora(root)
    if name == "latest" and found:
        return found[-1]
    matches = [c for c in found if c.path.name.startswith(name)]
    if len(matches) != 1:
        known = ", ".join(c.path.name for c in found) or "none: run `atomscope corpus build` first"
        raise MissingDataError(f"{len(matches)} corpora match {name!r} in {root}; there are {known}")
    return matches[0]


_SAE_FILES = ("cfg.json", "params.npz", "params.safetensors", "ae.pt")


def sae_folder(name: str, workspace: Path | None) -> Path:
    """An SAE folder: a path, a run's name, an sae_id, or `latest`; a release:id is brought into the workspace."""
    if any((Path(name) / f).is_file() for f in _SAE_FILES):
        return Path(name)
    if ":" in name and not Path(name).exists():
        from app.opening import bring_in

        return bring_in(name, workspace_path(workspace))[1]
    root = workspace_path(workspace, create=False)
    found = sorted(root.glob("saes/*/*/cfg.json"), key=lambda p: p.stat().st_mtime)
    if name == "latest" and found:
        return found[-1].parent
    for path in found:
        if name in (
            path.parent.name,
            path.parent.parent.name,
            read_json(path).get("metadata", {}).get("sae_id"),
        ):
            return path.parent
    known = ", ".join(p.parent.parent.name for p in found) or "none: run `atomscope train` first"
    raise MissingDataError(f"no SAE {name!r} in {root}; there are {known}")
