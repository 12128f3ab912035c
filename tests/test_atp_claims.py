"""The claim script of AtP* on a tiny model: every claim is decided, and a second run only reads what the first measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.atp_models import random_pair

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "claims"))
    module = importlib.import_module("atp_star")
    monkeypatch.setattr(module, "pair_set", lambda name, tok, n: [random_pair(6, seed=i) for i in range(n)])
    monkeypatch.setattr(module, "SUBSETS", 90)
    return module


def test_a_tiny_run_decides_every_claim_and_goes_on(
    script: Any,
    tiny_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [
        "--model",
        str(tiny_dir),
        "--workspace",
        str(tmp_path / "ws"),
        "--sets",
        "a_an",
        "city_country",
    ]
    arguments += ["--pairs", "3", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    script.main(arguments)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    ids = [c["id"] for c in result["claims"]]
    assert len(ids) == len(set(ids)) == 2 * 7 + 2
    assert {c["seeds"] for c in result["claims"]} == {3, 6}
    assert all(c["verdict"] in ("holds", "does not hold", "underpowered") for c in result["claims"])
    passes = result["data"]["a_an"]["passes_to_90"]
    assert passes["atp"] >= 5 + 45 and passes["subset_sampling"] >= 90 + 45, "own passes and one a node"
    monkeypatch.setattr(script, "measured", lambda *_: pytest.fail("it was measured already"))
    script.main(arguments)
    again = json.loads((tmp_path / "out.json").read_text())
    assert again["claims"] == result["claims"]
