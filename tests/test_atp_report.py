"""What an attribution leaves behind: tables, views, figures, the command and the page that reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from app import figures_attribution as figs
from app.cli import app
from cache import connect
from cache.errors import UsageError
from cache.workspace import read_json
from probes.attribution.atp import AtPStar
from probes.attribution.pairs import PromptPair, write_pairs
from probes.attribution.report import BOUNDS, RECALL, find_attributions, read_table
from tests.test_app import checked, open_page, words

PAIRS = [
    PromptPair(clean=f"The cat waited in the {a}.", noise=f"The dog waited in the {a}.", answers=(" the",), wrong=(" a",))
    for a in ("garden", "forest")
]  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one run made by the command, everything on, and one made in Python."""
    root = tmp_path_factory.mktemp("atp") / "workspace"
    root.mkdir()
    write_pairs(root / "cats.jsonl", PAIRS)
    done = CliRunner().invoke(app, [
        "attribute", str(root / "cats.jsonl"), "--model", tiny_model.source, "--workspace", str(root), "--top-k", "6",
        "--samples", "80", "--exact", "--json",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output + str(done.exception)
    out = json.loads(done.stdout)
    assert out["method"] == "atp_star" and len(out["top"]) == 15 and len(out["bounds"]) == 2
    method = AtPStar(tiny_model, nodes=("mlp", "resid"), positions="sum", qk_fix=False, grad_drop=False)
    method.report(method.attribute(PAIRS), PAIRS, root, name="sums")
    return root


def test_the_views_hold_the_runs_and_their_nodes(workspace: Path) -> None:
    con = connect(workspace)
    runs = con.execute("SELECT name, method, n_pairs, metric FROM attribution_runs ORDER BY name").fetchall()
    assert runs == [("cats", "atp_star", 2, "logit_diff"), ("sums", "atp", 2, "logit_diff")]
    rows = con.sql(
        "SELECT a.* FROM attributions a JOIN attribution_runs USING (run) WHERE name = 'cats' ORDER BY score DESC"
    ).df()
    assert set(rows["kind"]) == {"q", "k", "v", "z"} and (rows["score"].diff().dropna() <= 0).all()
    assert rows["exact_abs"].notna().all(), "--exact measured every node"
    assert (rows["exact_abs"] >= rows["exact"].abs() - 1e-6).all()
    scored = rows[rows["score"] > 0]
    differing = scored[scored["pos"] == scored["pos"].min()]["token"].iloc[0]
    assert "|" in differing, "clean and noise token where they differ"
    assert con.execute("SELECT max(recall) FROM attribution_recall").fetchone() == (1.0,)
    assert con.execute("SELECT count(*) FROM attribution_bounds").fetchone() == (3 * 2 * 3,)
    low, high = con.execute("SELECT min(missed), max(missed) FROM attribution_bounds").fetchone()
    assert 0 < low <= high <= con.execute("SELECT 2 * max(exact_abs) FROM attributions").fetchone()[0]


def test_a_workspace_without_attributions_has_empty_views(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert connect(tmp_path / "none").execute("SELECT count(*) FROM attributions").fetchone() == (0,)


def test_a_run_says_where_it_came_from_and_is_replaced_by_the_same_question(
    workspace: Path, tiny_model: Any
) -> None:
    record = next(r for r in find_attributions(workspace) if r["name"] == "cats")
    assert record["provenance"]["versions"]["torch"] and record["identity"] == tiny_model.identity
    assert record["pairs"][0]["clean"] == PAIRS[0].clean and record["passes"] == 3 + 2 * (1 + 2 / 2)
    before = len(find_attributions(workspace))
    method = AtPStar(tiny_model, nodes=("mlp", "resid"), positions="sum", qk_fix=False, grad_drop=False)
    method.report(method.attribute(PAIRS), PAIRS, workspace, name="sums")
    assert len(find_attributions(workspace)) == before


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_show_the_rows_they_are_given(workspace: Path, theme: str) -> None:
    record = next(r for r in find_attributions(workspace) if r["name"] == "cats")
    frame = read_table(record)
    heads = figs.layer_head(frame, kind="z", theme=theme)
    z = frame[frame["kind"] == "z"]
    assert np.nanmax(np.array(heads.data[0].z, float)) == pytest.approx(z["score"].max())
    assert heads.layout.meta["n"] == len(z.groupby(["layer", "index"]))
    places = figs.layer_position(frame, theme=theme)
    assert places.layout.meta["n"] == len(frame.groupby(["layer", "pos"]))
    truth = figs.estimate_truth(frame, theme=theme)
    assert truth.layout.meta["n"] == int(((frame["exact_abs"] > 0) & (frame["score"] > 0)).sum())
    recall = figs.recall(read_table(record, RECALL), theme=theme)
    assert {t.name for t in recall.data} == {"atp_star", "iterative"}
    assert len(figs.bound_k(read_table(record, BOUNDS), theme=theme).data) == 4
    empty = pd.DataFrame({c: [] for c in ("kind", "score", "exact_abs", "layer", "index", "pos")})
    assert figs.estimate_truth(empty, theme=theme).layout.meta["n"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no pair set"),
        (["gone.jsonl"], "no pair file"),
        (["cats", "--nodes", "heads"], "no pair set"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: list[str], message: str, tiny_dir: Path, tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, ["attribute", *arguments, "--model", str(tiny_dir), "-w", str(tmp_path)])
    assert done.exit_code != 0 and message in str(done.exception)


def test_the_page_shows_ranking_truth_recall_and_bounds(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {r["name"]: r["run"] for r in find_attributions(workspace)}
    at = open_page("attribute", workspace, monkeypatch, run=runs["cats"])
    page = words(at)
    for word in ("atp_star", "nodes patched exactly", "own passes counted", "averaged over random subsets"):
        assert word in page, word
    assert len(at.get("plotly_chart")) == 5
    table = at.dataframe[0].value
    assert (table["score"].diff().dropna() <= 0).all()
    other = checked(at.selectbox(key="run").set_value(runs["sums"]).run())
    assert "Positions were patched together" in words(other) and "--top-k" in words(other)


def test_an_empty_workspace_names_the_command_and_a_bad_url_the_run(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "atomscope attribute" in words(open_page("attribute", tmp_path / "none", monkeypatch))
    page = words(open_page("attribute", workspace, monkeypatch, run="<b>../x"))
    assert "No attribution" in page and "<b>.." not in page


def test_a_damaged_record_is_named_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "attributions" / "run").mkdir(parents=True)
    (tmp_path / "attributions" / "run" / "run.json").write_text('{"name"')
    assert "run.json" in words(open_page("attribute", tmp_path, monkeypatch))


def test_features_of_a_saved_sae_are_ranked_beside_heads(
    workspace: Path, tiny_model: Any, tmp_path: Path
) -> None:
    import torch

    from saes import SAE, presets

    torch.manual_seed(0)
    sae = SAE(presets.topk(d_sae=96, k=6, d_model=64, hook="blocks.1.hook_resid_post"))
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(96, 64), dim=1))
    arguments = [
        "attribute",
        str(workspace / "cats.jsonl"),
        "--model",
        tiny_model.source,
        "-w",
        str(tmp_path / "ws"),
    ]
    arguments += ["--sae", str(sae.save(tmp_path / "sae")), "--nodes", "z", "--json"]
    for options, kinds in (([], {"z", "sae", "sae_error"}), (["--no-error"], {"z", "sae"})):
        done = CliRunner().invoke(app, [*arguments, *options])
        assert done.exit_code == 0, done.output + str(done.exception)
        run = json.loads(done.stdout)["run"]
        rows = connect(tmp_path / "ws").execute(f"SELECT * FROM attributions WHERE run = '{run}'").df()
        assert set(rows["kind"]) == kinds
        features = rows[rows["kind"] == "sae"]
        assert (features["pos"] > 0).all() and len(features) < 96 * 12, "only features that differ are rows"
    again = CliRunner().invoke(app, [*arguments, "--sae", str(tmp_path / "sae")])
    assert "one hook" in str(again.exception)


def test_a_transcoder_is_refused_in_one_line(workspace: Path, tiny_model: Any, tmp_path: Path) -> None:
    from saes import SAE
    from saes.config import SAEConfig

    sae = SAE(SAEConfig(
        d_sae=16, k=2, d_model=64, hook="blocks.1.hook_resid_mid", out_hook="blocks.1.hook_mlp_out", d_out=64,
    ))  # fmt: skip
    arguments = [
        "attribute",
        str(workspace / "cats.jsonl"),
        "--model",
        tiny_model.source,
        "-w",
        str(tmp_path),
    ]
    done = CliRunner().invoke(app, [*arguments, "--sae", str(sae.save(tmp_path / "sae"))])
    assert isinstance(done.exception, UsageError) and "is a transcoder" in str(done.exception)
    assert "\n" not in str(done.exception)
    assert CliRunner().invoke(app, [*arguments, "--top-k", "-3"]).exit_code == 2


def test_the_name_in_a_pair_file_is_no_path(tiny_model: Any, tmp_path: Path) -> None:
    method = AtPStar(tiny_model, nodes=("z",), qk_fix=False, grad_drop=False)
    for name in ("../../out/x", "a/b", "x" * 300, "..", "größer als"):
        pairs = [replace(p, name=name) for p in PAIRS]
        folder = method.report(method.attribute(pairs), pairs, tmp_path / "ws")
        assert (
            folder.parent == tmp_path / "ws" / "attributions"
            and read_json(folder / "run.json")["name"] == name
        )
    assert len(find_attributions(tmp_path / "ws")) == 5 and not (tmp_path / "out").exists()
