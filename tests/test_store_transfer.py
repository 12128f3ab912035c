"""Export and import: what comes out is what went in, and nothing that is not sound gets in."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.errors import AtomscopeError, DataError, MissingDataError, UsageError
from cache.records import record_path
from cache.store import ActivationStore
from cache.transfer import export_store, import_store
from tests.corpora import HOOK, OTHER, empty_store, make_corpus, make_store, random_vectors
from tests.test_cli import run

Files = dict[str, bytes]


def files_of(root: Path) -> Files:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, dict[str, torch.Tensor]]:
    return make_store(tmp_path_factory.mktemp("from"), hooks=(HOOK, OTHER), dtype=torch.float16)


@pytest.mark.parametrize("name", ["out.tar", "out.tar.zst", "folder"])
def test_an_imported_store_is_byte_for_byte_the_exported_one(made: Any, tmp_path: Path, name: str) -> None:
    store, vectors = made
    export_store(store, tmp_path / "out" / name)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]
    got = import_store(tmp_path / "out" / name, tmp_path / "to")
    assert files_of(tmp_path / "to") == files_of(store.workspace)
    assert got.verify() == [] and got.complete(OTHER) and got.corpus.fingerprint == store.corpus.fingerprint
    for hook in (HOOK, OTHER):
        assert torch.equal(got.rows(hook, range(196)), vectors[hook].float())
    again = import_store(tmp_path / "out" / name, tmp_path / "to")
    assert again.path == got.path and files_of(tmp_path / "to") == files_of(store.workspace)


def test_a_tar_holds_the_manifest_first_and_plain_files_only(made: Any, tmp_path: Path) -> None:
    export_store(made[0], tmp_path / "out.tar", hooks=[OTHER])
    with tarfile.open(tmp_path / "out.tar") as tar:
        members = tar.getmembers()
    assert members[0].name == "manifest.json" and all(m.isreg() for m in members)
    assert not any(HOOK in m.name for m in members)
    got = import_store(tmp_path / "out.tar", tmp_path / "to")
    assert got.hooks == [OTHER]


def test_import_adds_the_shards_and_hooks_that_are_missing_and_touches_no_other(
    made: Any, tmp_path: Path
) -> None:
    store, vectors = made
    corpus = make_corpus(tmp_path, (30, 7, 1, 40, 25, 12, 33, 18, 9, 21))
    here = empty_store(tmp_path, corpus)
    with here.writer(group_rows=16) as writer:
        row0, row1 = here.shards[3][2:]
        writer.submit(3, HOOK, vectors[HOOK][row0:row1])
    kept = {p: p.stat().st_mtime_ns for p in here.folder(HOOK).glob("shard-00003*")}
    export_store(store, tmp_path / "out.tar")
    got = import_store(tmp_path / "out.tar", tmp_path)
    assert got.path == here.path and got.complete(HOOK) and got.complete(OTHER) and got.verify() == []
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert torch.equal(got.rows(HOOK, range(196)), vectors[HOOK].float())


def test_an_unfinished_store_travels_as_it_is(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "a", [10] * 5)
    store = empty_store(tmp_path / "a", corpus, rows_per_shard=10)
    with store.writer() as writer:
        writer.submit(2, HOOK, random_vectors(10, 4))
    export_store(store, tmp_path / "out.tar")
    got = import_store(tmp_path / "out.tar", tmp_path / "b")
    assert got.committed(HOOK) == {2} and not got.complete(HOOK)


def test_shards_of_another_size_are_not_mixed(made: Any, tmp_path: Path) -> None:
    export_store(made[0], tmp_path / "out.tar")
    corpus = make_corpus(tmp_path, (30, 7, 1, 40, 25, 12, 33, 18, 9, 21))
    empty_store(tmp_path, corpus, rows_per_shard=80)
    with pytest.raises(UsageError, match="shards of another size"):
        import_store(tmp_path / "out.tar", tmp_path)


def test_export_refuses_a_damaged_store_and_an_existing_target(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    (tmp_path / "here.tar").write_text("mine")
    with pytest.raises(UsageError, match="exists: choose another name"):
        export_store(store, tmp_path / "here.tar")
    with pytest.raises(MissingDataError, match="it has"):
        export_store(store, tmp_path / "x.tar", hooks=[OTHER])
    data = store.folder(HOOK) / store.records(HOOK)[1].file
    raw = bytearray(data.read_bytes())
    raw[store.records(HOOK)[1].groups[0]["pages"]["x"]["offset"] + 3] ^= 1
    data.write_bytes(raw)
    with pytest.raises(DataError, match=r"damaged and was not exported.*row group 0"):
        export_store(store, tmp_path / "x.tar")
    assert not (tmp_path / "x.tar").exists()


# ----------------------------------------------------------------------------------------------- hostile exports


@pytest.fixture
def parts(made: Any, tmp_path: Path) -> Files:
    """Members of an export by name."""
    export_store(made[0], tmp_path / "whole", hooks=[HOOK])
    found = files_of(tmp_path / "whole")
    return {"manifest.json": found.pop("manifest.json")} | found


def tar_of(path: Path, members: Files | list[tuple[Any, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return path


def resign(parts: Files) -> Files:
    """The same members with a manifest that agrees with all of them."""
    manifest = json.loads(parts["manifest.json"])
    manifest["files"] = {
        n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()}
        for n, d in parts.items()
        if n != "manifest.json"
    }
    return parts | {"manifest.json": json.dumps(manifest).encode()}


def refused(path: Path, to: Path, message: str, kind: type[AtomscopeError] = DataError) -> None:
    with pytest.raises(kind, match=message):
        import_store(path, to)
    assert files_of(to) == {}, "something was committed, or left in _tmp"


def data_name(parts: Files) -> str:
    return next(n for n in parts if n.endswith(".parquet") and "acts" in n)


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "activations/../../evil", "corpora/x/../../evil", "activations/evil.parquet"],
)
def test_names_that_lead_elsewhere_are_refused(parts: Files, tmp_path: Path, name: str) -> None:
    path = tar_of(tmp_path / "x.tar", resign(parts | {name: b"evil"}))
    refused(path, tmp_path / "to", "no part of store")
    path = tar_of(tmp_path / "y.tar", parts | {name: b"evil"})  # not in the manifest either
    refused(path, tmp_path / "to", "which its manifest does not")
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_plain_files_are_refused(parts: Files, tmp_path: Path, kind: bytes) -> None:
    name = data_name(parts)
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    members: list[tuple[Any, bytes]] = [(info if n == name else n, d) for n, d in parts.items()]
    refused(tar_of(tmp_path / "x.tar", members), tmp_path / "to", "not a plain file")


def test_a_link_in_a_folder_is_refused(parts: Files, made: Any, tmp_path: Path) -> None:
    target = tmp_path / "whole" / data_name(parts)
    copy = tmp_path / "copy.parquet"
    shutil.move(target, copy)
    target.symlink_to(copy)
    refused(tmp_path / "whole", tmp_path / "to", "not a plain file")
    target.unlink()
    shutil.move(copy, target)
    (tmp_path / "whole" / "notes.txt").write_text("mine")
    refused(tmp_path / "whole", tmp_path / "to", "notes.txt")


CHANGES: dict[str, tuple[Callable[[Files], Any], str]] = {
    "flipped bit": (lambda p: p.update({data_name(p): flipped(p[data_name(p)])}), "differs from its sha256"),
    "other size": (lambda p: p.update({data_name(p): p[data_name(p)] + b"0"}), "which its manifest does not"),
    "missing file": (lambda p: p.pop(data_name(p)), "lacks 1 files"),
    "no manifest": (lambda p: p.pop("manifest.json"), "begins with 'activations"),
    "broken manifest": (lambda p: p.update({"manifest.json": b"{"}), "no readable manifest"),
    "other version": (
        lambda p: p.update(
            {"manifest.json": p["manifest.json"].replace(b'"schema_version": 1', b'"schema_version": 9')}
        ),
        "version 9, this version reads 1",
    ),
}


def flipped(data: bytes) -> bytes:
    return data[:500] + bytes([data[500] ^ 1]) + data[501:]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_export_is_refused_and_leaves_nothing(parts: Files, tmp_path: Path, change: str) -> None:
    edit, message = CHANGES[change]
    edit(parts)
    refused(tar_of(tmp_path / "x.tar", parts), tmp_path / "to", message)


def test_a_member_that_comes_twice_is_refused(parts: Files, tmp_path: Path) -> None:
    members: list[tuple[Any, bytes]] = [*parts.items(), (data_name(parts), parts[data_name(parts)])]
    refused(tar_of(tmp_path / "x.tar", members), tmp_path / "to", "which its manifest does not")


def forged(parts: Files, change: Callable[[dict[str, Any]], Any]) -> Files:
    """A changed store.json under a manifest that agrees with it."""
    name = next(n for n in parts if n.endswith("store.json"))
    meta = json.loads(parts[name])
    change(meta)
    return resign(parts | {name: json.dumps(meta).encode()})


def test_a_manifest_that_agrees_with_forged_content_does_not_help(parts: Files, tmp_path: Path) -> None:
    """Signed anew, a store must still be the one its name says, and its rows those of its records."""
    x, to = tmp_path / "x.tar", tmp_path / "to"
    refused(tar_of(x, forged(parts, lambda m: m["identity"].update(model="other"))), to, "not .* as it says")
    name = data_name(parts)
    record = json.loads(parts[name.rpartition("-")[0] + ".json"])
    at = record["groups"][1]["pages"]["x"]["offset"] + 3
    raw = parts[name][:at] + bytes([parts[name][at] ^ 1]) + parts[name][at + 1 :]
    refused(tar_of(x, resign(parts | {name: raw})), to, "damaged.*xxh3")
    stray = name.rpartition("-")[0] + "-00000000.parquet"
    refused(tar_of(x, resign(parts | {stray: b"stray"})), to, "which no record names")
    manifest = json.loads(parts["manifest.json"]) | {"store": "../../outside", "files": {}}
    refused(tar_of(x, {"manifest.json": json.dumps(manifest).encode()}), to, "no part of store")


def test_a_cut_or_foreign_file_is_refused(parts: Files, made: Any, tmp_path: Path) -> None:
    for name in ("a.tar", "a.tar.zst"):
        export_store(made[0], tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        refused(tmp_path / name, tmp_path / "to", "export or copy it again")
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    refused(tmp_path / "b.tar", tmp_path / "to", "not a whole export")
    refused(tmp_path / "nowhere.tar", tmp_path / "to", "no export at", MissingDataError)


def test_an_export_that_does_not_fit_the_disk_is_refused_before_it_is_read(
    parts: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tar_of(tmp_path / "x.tar", parts)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))  # type: ignore[attr-defined]
    refused(path, tmp_path / "to", "GB are free: make room first", MissingDataError)


def test_export_and_import_by_command(capsys, made: Any, tmp_path: Path) -> None:
    store, to = made[0], str(tmp_path / "to")
    path = str(tmp_path / "s.tar.zst")
    code, out, _ = run(capsys, "store", "export", path, "-w", str(store.workspace))
    assert code == 0 and store.hash in out
    code, out, _ = run(capsys, "store", "import", path, "-w", to, "--json")
    assert code == 0 and json.loads(out)["rows"] == {HOOK: 196, OTHER: 196}
    assert run(capsys, "store", "verify", "-w", to)[0] == 0
    code, _, err = run(capsys, "store", "import", str(tmp_path / "none.tar"), "-w", to)
    assert code == 3 and "no export at" in err and err.count("\n") == 1
    assert record_path(store.folder(HOOK), 0).exists()
