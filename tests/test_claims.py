"""Claim scripts: the verdict rule, the curve at equal L0, absorption on a known hierarchy, and a tiny run of each of these."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from saes import make_suite
from saes.config import SAEConfig
from saes.sae import SAE
from tests.corpora import make_store
from tests.planted import build_planted

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "claims"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a claim script by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_a_verdict_needs_three_seeds_an_interval_and_the_registered_effect(script: Any) -> None:
    c = script("_common")
    assert c.judge([0.30, 0.32, 0.31], 0.2).verdict == "holds"
    assert c.judge([0.05, 0.06, 0.055], 0.2).verdict == "does not hold"  # there, but too small to count
    assert c.judge([-0.3, -0.31, -0.32], 0.2).verdict == "does not hold"
    assert c.judge([0.9, -0.5, 0.4], 0.2).verdict == "underpowered"
    assert c.judge([0.3, 0.3], 0.2).verdict == "underpowered"
    mean, (low, high), _ = c.judge([1.0, 2.0, 3.0], 0.0)
    # t(0.975, 2) = 4.3027, standard error 1 / sqrt(3)
    assert mean == 2 and high - mean == mean - low == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)


def test_an_fvu_is_read_off_a_curve_only_inside_it(script: Any) -> None:
    at_l0 = script("_common").at_l0
    curve = [(64.0, 0.1), (16.0, 0.4)]
    assert at_l0(curve, 32) == pytest.approx(0.2)  # a straight line in the logarithms
    assert at_l0(curve, 16) == pytest.approx(0.4) and math.isnan(at_l0(curve, 8))


def test_the_report_is_json_without_infinities(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    c = script("_common")
    report = c.Report("a paper", str(tmp_path / "out.json"))
    report.claim("x", c.judge([0.5], 0.1), seeds=1, why="one seed", paper_figure=0.2)
    report.finish()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert result["claims"] == [
        {"id": "x", "paper_figure": 0.2, "ours": 0.5, "interval": [None, None], "seeds": 1, "verdict": "underpowered",
         "why": "one seed"}
    ]  # fmt: skip


def test_absorption_is_none_for_the_truth_and_full_where_children_swallow_their_parent(script: Any) -> None:
    absorption = script("matryoshka").absorption
    # near-orthogonal features, so that a threshold reads them off
    s = make_suite("S6", 0, n_rows=2000, n=40, d=400)
    sae = SAE(SAEConfig(d_sae=40, d_model=400, activation="jumprelu"))
    with torch.no_grad():
        sae.W_enc.copy_(s.V)
        sae.W_dec.copy_(s.V)
        sae.threshold.fill_(0.5)
    assert absorption(sae, s) < 0.02
    child = s.parent >= 0
    with torch.no_grad():
        # a child's latent holds its parent's direction, and the parent's latent is silent when a child is there
        sae.W_dec[child] += s.V[s.parent[child]]
        for f in child.nonzero()[:, 0].tolist():
            sae.W_enc[s.parent[f]] -= 1.0 * s.V[f]
    assert absorption(sae, s, near=0.9) > 0.98


@pytest.mark.parametrize(
    ("name", "options", "claims"),
    [
        ("abs_topk", ["--parts", "k"], 6),
        ("matryoshka", ["--suite-steps", "2"], 3),
        ("auxk", [], 3),
        ("batch_topk", [], 4),
    ],
)
def test_a_script_runs_and_leaves_the_workspace_as_it_was(
    name: str, options: list[str], claims: int, script: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make_store(tmp_path, [40] * 40, d=80)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    where = ["--workspace", str(tmp_path), "--seeds", "1", "--steps", "2", "--batch", "32"]
    script(name).main([*where, *options])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert claims - 2 <= len(result["claims"]) <= claims
    of_store = [c for c in result["claims"] if c["id"] not in ("absorption", "children")]
    assert of_store and {c["verdict"] for c in of_store} == {"underpowered"}
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_poles_are_judged_for_both_readings_of_a_dictionary(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Rows whose coordinates follow the text: also an SAE that was hardly trained has poles to judge."""
    build_planted(tmp_path, signed=False)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    where = ["--workspace", str(tmp_path), "--seeds", "1", "--steps", "2", "--batch", "64"]
    script("abs_topk").main([*where, "--parts", "poles"])
    shares = json.loads(capsys.readouterr().out.splitlines()[-1])["data"]["poles"]
    for label in ("abs_topk", "topk"):
        found = shares[label][0]
        assert found["both"] + found["one"] + found["none"] == pytest.approx(1, abs=1e-4)
        assert found["both_3"] <= found["both"] <= found["both_2"]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_the_other_pole_of_a_topk_dictionary_is_its_lowest_scores_and_leaves_its_own_codes_alone(
    script: Any,
) -> None:
    gen = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(d_sae=12, d_model=6, k=3))
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=gen))
    x = torch.randn(50, 6, generator=gen)
    u = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    want = torch.where(u <= u.kthvalue(3, dim=1, keepdim=True).values, -u, 0.0).relu()
    found = script("abs_topk").mirrored(sae).encode(x).dense(12)
    torch.testing.assert_close(found, want.detach())


def test_the_scripts_of_gba_and_atoms_run_and_can_be_judged_again(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    gba, out = script("gba"), tmp_path / "gba.json"
    gba.main(["--parts", "imbalanced", "--seeds", "1", "--suite-steps", "2", "--out", str(out)])
    first = json.loads(out.read_text())
    assert {"imbalanced.recovered", "imbalanced.grid_against_grid"} <= {c["id"] for c in first["claims"]}
    first["claims"].append({"id": "store.parity", "kept": True})
    out.write_text(json.dumps(first))
    gba.main(["--judge", str(out), "--out", str(tmp_path / "again.json")])
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["data"] == first["data"]
    assert {c["id"] for c in again["claims"]} == {c["id"] for c in first["claims"]}
    atoms = script("atoms")
    with pytest.raises(Exception, match="not of"):
        atoms.main(["--judge", str(out)])
    report = script("_common").Report("x")
    report.data["S9"] = [atoms.one_suite("S9", seed, 2) for seed in range(2)]
    atoms.judge_suite(report, "S9")
    assert [c["id"] for c in report.claims] == [
        f"S9_{k}_{m}" for k in ("oracle", "trained") for m in ("f1", "q_star")
    ]
    # true atoms and 16,384 rows: training has no part in it
    assert report.claims[0]["ours"] > 0.3
    capsys.readouterr()


def test_gba_at_its_best_setting_does_not_win_over_a_grid_that_is_as_wide(script: Any) -> None:
    """A method tuned on the mixture against the mean of the other's grid says nothing: grids are compared with grids."""
    gba = script("gba")
    row = lambda v: {"frr0.8": v, "frr0.9": v, "over_target": 0.0}  # noqa: E731
    found = {f"K {k}": [row(0.7)] * 3 for k in gba.KS}
    found |= {f"HTF {p}": [row(0.9 if p == 0.1 else 0.3)] * 3 for p in gba.HTFS} | {
        "one 0.023": [row(0.5)] * 3
    }
    report = script("_common").Report("x")
    gba.judge_imbalanced(report, found, 3)
    verdicts = {c["id"]: c["verdict"] for c in report.claims}
    assert verdicts["imbalanced.against_topk"] == "holds"
    assert verdicts["imbalanced.grid_against_grid"] == "does not hold"
