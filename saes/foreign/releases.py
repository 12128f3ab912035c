""" "release:id" turned into a folder: local mirrors first, then the hub's cache, then the hub.

    mirrors   $ATOMSCOPE_SAE_MIRROR/<release>/<id>, <workspace>/saes-mirror/<release>/<id>
    hub       the release in sae-lens's directory (pretrained_saes.yaml, where sae-lens is installed), else a
              repository <release> = owner/name with a folder <id>

From the directory also come what its makers state (L0, variance explained), the factor on the rows where the files
leave it out, and overrides of their cfg.json. The directory is read as text: sae-lens itself is not imported.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cache.errors import MissingDataError, UsageError
from cache.workspace import workspace_path
from saes.foreign.found import Card

MIRROR = "ATOMSCOPE_SAE_MIRROR"
_READ = (None, "sae_lens", "sparsify", "gemma_2", "gemma_3", "dictionary_learning_1")
_FILES = ("cfg.json", "config.json", "*.safetensors", "params.npz", "ae.pt")
_WEIGHTS = ("sae_weights.safetensors", "sae.safetensors", "params.npz", "params.safetensors", "ae.pt")
_PART = re.compile(r"[\w.+=@ -]+")


class Located(NamedTuple):
    """Where an SAE lies, and what is known about it."""

    folder: Path
    card: Card


def split_reference(text: str) -> tuple[str, str] | None:
    """(release, id) of "release:id"; None for a path."""
    release, colon, name = text.partition(":")
    if not colon or not name or len(release) < 2 or Path(text).exists():
        return None
    return release, name


def locate(release: str, name: str, workspace: str | os.PathLike[str] | None = None) -> Located:
    """The folder of one SAE of a release. UsageError with the nearest names where there is no such SAE."""
    for text in (release, name):
        if not all(_PART.fullmatch(p) and p not in (".", "..") for p in text.split("/")):
            raise UsageError(
                f"{release}:{name} is not release:id, as in gpt2-small-res-jb:blocks.8.hook_resid_pre"
            )
    entry = directory_entry(release)
    card, repo, path = _card(release, name, entry)
    mirrors = mirror_roots(workspace)
    for root in mirrors:
        for inside in (f"{release}/{name}", f"{repo}/{path}"):
            if (root / inside).is_dir():
                return Located(root / inside, card)
    if entry is None and repo.count("/") != 1:
        raise UsageError(f"no release {release!r}: {_nearest(release, known_releases(mirrors))}")
    if path == "" or Path(path).suffix in (".pt", ".pth"):
        raise UsageError(f"{release}:{name} is a single pickle file, which this version does not read")
    return Located(_from_hub(repo, path, release, mirrors), card)


def mirror_roots(workspace: str | os.PathLike[str] | None = None) -> list[Path]:
    """Folders that may hold <release>/<id>."""
    given = os.environ.get(MIRROR)
    roots = [Path(given).expanduser()] if given else []
    with contextlib.suppress(MissingDataError):
        roots.append(workspace_path(workspace, create=False) / "saes-mirror")
    return [r for r in roots if r.is_dir()]


def known_releases(mirrors: list[Path]) -> list[str]:
    """Names of releases in the mirrors and in sae-lens's directory."""
    local = [p.name for root in mirrors for p in sorted(root.iterdir()) if p.is_dir()]
    return list(dict.fromkeys([*local, *_directory()]))


def _card(release: str, name: str, entry: dict[str, Any] | None) -> tuple[Card, str, str]:
    """Card, repository and folder of one SAE."""
    if entry is None:
        return Card(reference=f"{release}:{name}", where=f"{release}/{name}"), release, name
    ids = {str(s["id"]): s for s in entry["saes"]}
    if name not in ids:
        raise UsageError(f"release {release} has no SAE {name!r}: {_nearest(name, list(ids))}")
    kind = entry.get("conversion_func")
    if kind not in _READ:
        raise UsageError(
            f"{release} is published in the form {kind}, which this version does not read: it reads SAELens, sparsify, "
            "dictionary_learning and Gemma Scope"
        )
    one, repo = ids[name], entry["repo_id"]
    explained = one.get("variance_explained")
    card = Card(
        reference=f"{release}:{name}",
        where=f"{repo}/{one['path']}",
        model=entry.get("model") or "",
        l0=one.get("l0") or None,
        fvu=None if explained is None else 1.0 - float(explained),
        norm_factor=one.get("norm_scaling_factor"),
        overrides=entry.get("config_overrides") or {},
    )
    return card, repo, str(one["path"])


def _nearest(name: str, options: list[str]) -> str:
    near = difflib.get_close_matches(name, options, n=5, cutoff=0.3) or sorted(options)[:5]
    return (
        f"did you mean {', '.join(near)}?"
        if near
        else "no release is known here: install sae-lens, or give owner/name:folder"
    )


def _from_hub(repo: str, path: str, release: str, mirrors: list[Path]) -> Path:
    from huggingface_hub import snapshot_download

    parent = path.rpartition("/")[0]
    patterns = [f"{path}/{f}" for f in _FILES] + [f"{parent}/config.json" if parent else "config.json"]
    reason = ""
    for offline in (True, False):
        try:
            folder = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=offline)) / path
        except Exception as e:  # the hub client raises a family of network, permission and name errors
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            continue
        # a download that was cut off left a folder without its weights: the second round fetches the rest
        if any((folder / name).is_file() for name in _WEIGHTS):
            return folder
        reason = f"the repository has no SAE in {path!r}"
    known = known_releases(mirrors)
    near = "" if release in known else f" {_nearest(release, known)}"
    raise MissingDataError(
        f"{repo}/{path} is neither in a mirror nor from the hub ({reason}): put the folder at "
        f"${MIRROR}/{release}/<id>, or check the name.{near}"
    )


# ------------------------------------------------------------ sae-lens's directory


@cache
def _directory() -> dict[str, tuple[int, int]]:
    """Release -> the part of the file that describes it; empty without sae-lens."""
    text = _directory_text()
    starts = [(m.start(), m[1]) for m in re.finditer(r"^([^\s#][^\n]*?):[ \t]*$", text, re.MULTILINE)]
    ends = [s for s, _ in starts[1:]] + [len(text)]
    return {name.strip("'\""): (start, end) for (start, name), end in zip(starts, ends)}


@cache
def _directory_text() -> str:
    spec = find_spec("sae_lens")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder) / "pretrained_saes.yaml"
        if file.is_file():
            return file.read_text(encoding="utf-8")
    return ""


def directory_entry(release: str) -> dict[str, Any] | None:
    """What sae-lens's directory says about a release: only its own lines are parsed, the file has 40,000."""
    if release not in _directory():
        return None
    start, end = _directory()[release]
    value = yaml.safe_load(_directory_text()[start:end])
    return next(iter(value.values()))
