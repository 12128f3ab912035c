"""What every command shares: the options --workspace and --json, and names on the command line turned into folders."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from cache.errors import AtomscopeError, MissingDataError, UsageError
from cache.workspace import read_json, workspace_path
from saes.presets import CONTROL

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
_LISTED = 5
"""Names in an error."""


class SavedSAE(NamedTuple):
    """An SAE that is on disk."""

    folder: Path
    run: str
    name: str
    sae_id: str
    """Empty where its files do not say it."""


def saved_saes(root: Path) -> list[SavedSAE]:
    """The SAEs of a workspace, the oldest first."""
    paths = sorted(root.glob("saes/*/*/cfg.json"), key=lambda p: p.stat().st_mtime)
    return [_saved(p.parent) for p in paths]


def sae_folder(name: str, workspace: Path | None) -> Path:
    """The one SAE folder that a name means; a release:id is brought into the workspace.

    A name is a folder, `run/sae`, a run with one SAE, an SAE's own name, an sae_id or its beginning, or `latest` (no control
    that was trained to stand beside another SAE). Raises UsageError where several SAEs have it, MissingDataError where none has.
    """
    path = Path(name)
    if _is_sae(path):
        return path
    if ":" in name and not path.exists():
        from app.opening import bring_in

        return bring_in(name, workspace_path(workspace))[1]
    if path.is_dir() and name != "latest":
        inside = [_saved(p) for p in sorted(path.iterdir()) if _is_sae(p)]
        if inside:
            return _only(name, inside, [str(s.folder) for s in inside])
        if len(path.parts) > 1:  # a path, not the name of a run
            raise MissingDataError(
                _unfinished(path) or f"no SAE in the folder {path}: one holds {' or '.join(_SAE_FILES)}"
            )
    root = workspace_path(workspace, create=False)
    found = saved_saes(root)
    if name == "latest" and found:
        own = [s for s in found if not s.name.partition("-")[2].startswith(CONTROL)]
        return (own or found)[-1].folder
    matches = _named(name, found)
    if not matches:
        raise MissingDataError(_nothing(name, root, found))
    return _only(name, matches, [f"{s.run}/{s.name}" for s in matches])


def _is_sae(folder: Path) -> bool:
    return any((folder / f).is_file() for f in _SAE_FILES)


def _saved(folder: Path) -> SavedSAE:
    try:
        sae_id = read_json(folder / "cfg.json")["metadata"]["sae_id"]
    except (AtomscopeError, KeyError, TypeError):
        sae_id = None  # another format, or damaged: whoever loads it says so
    return SavedSAE(folder, folder.parent.name, folder.name, str(sae_id or ""))


def _named(name: str, found: list[SavedSAE]) -> list[SavedSAE]:
    """SAEs with this name, else those whose id begins with it; copies of one SAE count once."""
    matches = [s for s in found if name in (s.run, s.name, f"{s.run}/{s.name}", s.sae_id)]
    if not matches and len(name) >= 4:
        matches = [s for s in found if s.sae_id.startswith(name)]
    distinct: dict[str, SavedSAE] = {}
    for s in matches:
        distinct.setdefault(s.sae_id or str(s.folder), s)
    return list(distinct.values())


def _only(name: str, matches: list[SavedSAE], names: list[str]) -> Path:
    if len(matches) == 1:
        return matches[0].folder
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    raise UsageError(
        f"{name!r} stands for {len(names)} SAEs: give one of them as run/sae, {', '.join(names[:_LISTED])}{more}"
    )


def _nothing(name: str, root: Path, found: list[SavedSAE]) -> str:
    unfinished = _unfinished(root / "saes" / name)
    if unfinished:
        return unfinished
    if not found:
        return f"no SAE {name!r} in {root}; there are none: run `atomscope train` first"
    known = dict.fromkeys(n for s in found for n in (s.run, s.name))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    return f"no SAE {name!r} in {root}: nearest are {', '.join(near)}; `atomscope sae list` shows all"


def _unfinished(run: Path) -> str:
    if not (run / "run.json").is_file():
        return ""
    record = read_json(run / "run.json")
    if record.get("status") == "failed":
        return f"run {run.name} has no SAE, it failed: {record.get('problem', 'no reason is known')}"
    return f"run {run.name} has no finished SAE: the `atomscope train` command that began it goes on with it"


def sae_id_of(folder: Path) -> str:
    """The id by which this SAE is found again whatever is trained after it; the folder where its maker gave none."""
    return _saved(folder).sae_id or str(folder)
