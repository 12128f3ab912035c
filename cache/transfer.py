"""A store in one piece, to keep or to send: its corpus, commit records and data, as `.tar`, `.tar.zst` or a folder.

    manifest.json                        first; sha256 and size of every other member
    corpora/<fingerprint>/...            the token table
    activations/<hash>/store.json, acts/<hook>/shard-*.json and .parquet
Export verifies the store before it writes. Import takes only what the manifest names and only names of this form,
checks every sha256, the store's own hash, every xxh3 and the token columns in `_tmp/`, and commits after that.
Into a workspace that has the store already, import adds the shards that are missing there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from cache.corpus import Corpus
from cache.errors import DataError, MissingDataError, UsageError
from cache.progress import progress
from cache.provenance import provenance
from cache.records import read_store_json, record_path
from cache.store import ActivationStore
from cache.verifying import problems
from cache.workspace import (
    atomic_dir,
    atomic_file,
    canonical_json,
    fsync_dir,
    locked,
    no_space,
    scratch_for,
    workspace_path,
    write_json,
)

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_HEX = "[0-9a-f]{16}"
_HOOK = r"\w+(?:\.\w+)*"
_NAME = re.compile(
    rf"corpora/{_HEX}/(?:tokens\.parquet|docs\.parquet|vocab\.parquet|corpus\.json|inputs\.npy)"
    rf"|activations/{_HEX}/store\.json"
    rf"|activations/{_HEX}/acts/{_HOOK}/shard-\d{{5,}}(?:\.json|-[0-9a-f]{{8}}\.parquet)",
    re.ASCII,
)
_CHUNK = 2**22
_MANIFEST_LIMIT = 2**28  # bytes; a million shards need a tenth of it
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


# ---- export ----


def export_store(
    store: ActivationStore, path: str | os.PathLike[str], *, hooks: Sequence[str] | None = None
) -> dict[str, Any]:
    """Write `store` (all hooks, or some) to `path`; return the manifest. What is not committed yet is not in it."""
    target = Path(path).expanduser().resolve()
    if target.exists():
        raise UsageError(f"{target} exists: choose another name, or delete it first")
    chosen = list(hooks) if hooks else store.hooks
    found = problems(store, chosen)
    if found:
        raise DataError(f"{store.path} is damaged and was not exported: {found[0]}")
    files = {p.relative_to(store.workspace).as_posix(): p for p in _files(store, chosen)}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "store": store.hash,
        "corpus": store.corpus.path.name,
        "hooks": chosen,
        "files": {name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for name, p in files.items()},
        "provenance": provenance(),
    }
    with _tidy(target):
        if target.suffix == ".tar" or target.name.endswith(".tar.zst"):
            _write_tar(target, manifest, files)
        else:
            _write_folder(target, manifest, files)
    return manifest


def _files(store: ActivationStore, hooks: Sequence[str]) -> Iterator[Path]:
    names = ("corpus.json", "tokens.parquet", "docs.parquet", "vocab.parquet", "inputs.npy")
    yield from (p for n in names if (p := store.corpus.path / n).exists())
    yield store.path / "store.json"
    for hook in hooks:
        for shard, record in sorted(store.records(hook).items()):
            yield store.folder(hook) / record.file
            yield record_path(store.folder(hook), shard)


@contextmanager
def _tidy(target: Path) -> Iterator[None]:
    """Leave no empty `_tmp` beside a target outside the workspace."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / "_tmp"
    ours = not beside.exists()
    try:
        yield
    finally:
        if ours:
            with suppress(OSError):
                beside.rmdir()


def _write_tar(target: Path, manifest: dict[str, Any], files: dict[str, Path]) -> None:
    text = json.dumps(manifest, indent=1, sort_keys=True).encode()
    total = sum(f["bytes"] for f in manifest["files"].values())
    zstd = target.suffix == ".zst"
    with atomic_file(target) as tmp, progress("export", total, unit="B") as bar, tmp.open("wb") as raw:
        sink = pa.CompressedOutputStream(raw, "zstd") if zstd else raw
        with tarfile.open(fileobj=sink, mode="w|") as tar:
            info = tarfile.TarInfo(MANIFEST)
            info.size = len(text)
            tar.addfile(info, pa.BufferReader(text))
            for name, path in files.items():
                info = tarfile.TarInfo(name)
                info.size = manifest["files"][name]["bytes"]
                with path.open("rb") as file:
                    tar.addfile(info, file)
                bar.advance(info.size)
        if zstd:
            sink.close()


def _write_folder(target: Path, manifest: dict[str, Any], files: dict[str, Path]) -> None:
    with atomic_dir(target) as tmp:
        for name, path in files.items():
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, tmp / name)
        write_json(tmp / MANIFEST, manifest)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- import ----


def import_store(
    path: str | os.PathLike[str], workspace: str | os.PathLike[str] | None = None
) -> ActivationStore:
    """Take an exported store into a workspace, and return it; nothing is committed unless all of it is sound."""
    source = Path(path).expanduser()
    if not source.exists():
        raise MissingDataError(
            f"no export at {source}: give a .tar, .tar.zst or folder of `atomscope store export`"
        )
    root = workspace_path(workspace)
    with scratch_for(root / "import") as stage:
        with _members(source) as members:
            manifest = _stage(source, members, stage)
        corpus = _checked(source, manifest, stage, root)
        return _commit(manifest, stage, root, corpus)


@contextmanager
def _members(source: Path) -> Iterator[Iterator[tuple[str, int, IO[bytes]]]]:
    """(name, size, content) of the members of an export, in their order; the manifest comes first."""
    if source.is_dir():
        yield _folder_members(source)
        return
    with source.open("rb") as raw:
        zstd = raw.read(4) == _ZSTD_MAGIC
        raw.seek(0)
        try:
            with tarfile.open(
                fileobj=pa.CompressedInputStream(raw, "zstd") if zstd else raw, mode="r|"
            ) as tar:
                yield _tar_members(source, tar)
        except (tarfile.TarError, EOFError, OSError, pa.ArrowException) as e:
            if no_space(e):
                raise
            raise DataError(f"{source} is not a whole export ({e}): export or copy it again") from e


def _tar_members(source: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, int, IO[bytes]]]:
    for member in tar:
        content = tar.extractfile(member) if member.isreg() else None
        if content is None:
            raise DataError(f"{source} holds {member.name!r}, which is not a plain file: it is not an export")
        yield member.name, member.size, content


def _folder_members(source: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    found = sorted(p for p in source.rglob("*") if p.is_symlink() or not p.is_dir())
    for path in sorted(found, key=lambda p: p.relative_to(source).as_posix() != MANIFEST):
        if path.is_symlink() or not path.is_file():
            raise DataError(f"{source} holds {path.name!r}, which is not a plain file: it is not an export")
        with path.open("rb") as content:
            yield path.relative_to(source).as_posix(), path.stat().st_size, content


def _stage(source: Path, members: Iterator[tuple[str, int, IO[bytes]]], stage: Path) -> dict[str, Any]:
    """Write the members to `stage`, each against its size and sha256, and return the manifest."""
    name, size, content = next(members, ("nothing", 0, None))
    if name != MANIFEST or content is None or size > _MANIFEST_LIMIT:
        raise DataError(f"{source} begins with {name!r}, not with {MANIFEST}: it is not an export")
    manifest = _manifest(source, content.read())
    left = dict(manifest["files"])
    total = sum(f["bytes"] for f in left.values())
    free = shutil.disk_usage(stage).free
    if total > free:
        raise MissingDataError(
            f"{source} needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: make room first"
        )
    with progress("import", total, unit="B") as bar:
        for name, size, content in members:
            want = left.pop(name, None)
            if want is None or want["bytes"] != size:
                raise DataError(
                    f"{source} holds {name!r} of {size} bytes, which its manifest does not: refused"
                )
            if _copy(content, stage / name) != want["sha256"]:
                raise DataError(f"{source}: {name} differs from its sha256: export or copy it again")
            bar.advance(size)
    if left:
        raise DataError(f"{source} lacks {len(left)} files, {min(left)} among them: export or copy it again")
    return manifest


def _manifest(source: Path, raw: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(raw)
        version, files = manifest["schema_version"], manifest["files"]
        whole = all(isinstance(f["bytes"], int) and isinstance(f["sha256"], str) for f in files.values())
        names = [manifest["store"], manifest["corpus"]]
        whole &= all(re.fullmatch(_HEX, n) for n in names)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{source} has no readable {MANIFEST}: export it again") from e
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{source} is an export of version {version!r}, this version reads {SCHEMA_VERSION}: "
            "import it with the version that wrote it"
        )
    allowed = tuple(f"{kind}/{name}/" for kind, name in zip(("activations", "corpora"), names))
    bad = next((n for n in files if not _NAME.fullmatch(n) or not n.startswith(allowed)), None)
    if bad is not None or not whole:
        raise DataError(f"{source} names {bad!r}, which is no part of store {names[0]!r}: refused")
    return manifest


def _copy(content: IO[bytes], path: Path) -> str:
    """Write a file, synced, and return its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("xb") as out:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _checked(source: Path, manifest: dict[str, Any], stage: Path, root: Path) -> Corpus:
    """Check the staged store against itself and its corpus (the workspace's own, if it has it); return that."""
    here = root / "corpora" / manifest["corpus"]
    corpus = Corpus.open(here if (here / "corpus.json").exists() else stage / "corpora" / manifest["corpus"])
    folder = stage / "activations" / manifest["store"]
    meta = read_store_json(folder)
    digest = hashlib.sha256(canonical_json(meta["identity"]).encode()).hexdigest()[:16]
    if digest != manifest["store"] or corpus.fingerprint[:16] != manifest["corpus"]:
        raise DataError(f"{source}: the store is {digest}, not {manifest['store']} as it says: refused")
    store = ActivationStore(folder, corpus)
    found = problems(store, store.hooks)
    if found:
        raise DataError(f"{source} is damaged: {found[0].removeprefix(str(stage))}")
    named = {f"{h}/{r.file}" for h in store.hooks for r in store.records(h).values()}
    stray = {"/".join(p.parts[-2:]) for p in folder.glob("acts/*/*.parquet")} - named
    if stray:
        raise DataError(f"{source} holds {min(stray)}, which no record names: refused")
    return corpus


def _commit(manifest: dict[str, Any], stage: Path, root: Path, corpus: Corpus) -> ActivationStore:
    """Move what is staged into the workspace: corpus, then store.json, then shard by shard data and record."""
    target = root / "corpora" / manifest["corpus"]
    if corpus.path.is_relative_to(stage):
        target.parent.mkdir(exist_ok=True)
        os.replace(corpus.path, target)
        fsync_dir(target.parent)
    staged = ActivationStore(stage / "activations" / manifest["store"], Corpus.open(target))
    path = root / "activations" / manifest["store"]
    path.mkdir(parents=True, exist_ok=True)
    if not (path / "store.json").exists():
        os.replace(staged.path / "store.json", path / "store.json")
        fsync_dir(path)
    store = ActivationStore(path, Corpus.open(target))
    if store.shards != staged.shards:
        raise UsageError(f"{path} has shards of another size: import into another workspace")
    for hook in staged.hooks:
        _merge(staged, store, hook)
    return store


def _merge(staged: ActivationStore, store: ActivationStore, hook: str) -> None:
    new = [r for s, r in staged.records(hook).items() if s not in store.committed(hook)]
    folder = store.folder(hook)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        for record in new:
            store.check_matches(hook, record.d, record.dtype)
            os.replace(staged.folder(hook) / record.file, folder / record.file)
            fsync_dir(folder)
            record.save(folder)
            store.records(hook, refresh=True)
