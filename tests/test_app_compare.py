"""The page that compares SAEs: nothing yet, measures without a matching, and a finished matching."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from saes.compare import compare_saes
from tests.test_app import ROOT, checked, open_page, words

if TYPE_CHECKING:
    from tests.workspaces import TinyWorkspace

pytest_plugins = ("tests.workspaces",)


@pytest.fixture(scope="module")
def matched(tiny_workspace: TinyWorkspace, tmp_path_factory) -> Path:
    """The tiny workspace without, then with, a comparison (a copy: other tests see none)."""
    path = tmp_path_factory.mktemp("matched") / "workspace"
    for part in ("saes", "features", "evaluations", "corpora"):
        shutil.copytree(tiny_workspace.path / part, path / part)
    folders = sorted(p.parent for p in path.glob("saes/*/*/cfg.json"))
    compare_saes(path, *folders)
    compare_saes(path, *folders, method="mutual")
    return path


@pytest.mark.parametrize("exists", [True, False])
def test_an_empty_workspace_says_which_command_fills_it(exists, tmp_path, monkeypatch) -> None:
    workspace = tmp_path / "nothing"
    if exists:
        workspace.mkdir()
    assert "atomscope demo" in words(open_page("compare", workspace, monkeypatch))
    assert workspace.exists() == exists, "looking makes nothing"


def test_without_a_matching_the_measures_and_the_command_are_shown(tiny_workspace, monkeypatch) -> None:
    shutil.rmtree(tiny_workspace.path / "comparisons", ignore_errors=True)
    page = words(open_page("compare", tiny_workspace.path, monkeypatch))
    assert "atomscope compare SAE SAE" in page
    for word in ("topk-96-k4", "pca-4", "untrained dictionary", "best"):
        assert word in page, word


def test_a_matching_is_shown_from_both_sides(matched, monkeypatch) -> None:
    at = open_page("compare", matched, monkeypatch)
    page = words(at)
    for word in ("mean |cosine| of matches", "matched above 0.7", "of random directions", "features shown"):
        assert word in page, word
    assert len(at.selectbox(key="pair").options) == 2 and len(at.get("plotly_chart")) == 4
    table = at.dataframe[-1].value
    assert len(table) and (table["cos"].abs().fillna(0).diff().dropna() <= 1e-6).all(), "most stable first"
    at = checked(at.toggle(key="worst").set_value(True).run())
    assert (at.dataframe[-1].value["cos"].abs().fillna(0).diff().dropna() >= -1e-6).all()
    other = open_page("compare", matched, monkeypatch, side="second")
    assert not set(other.dataframe[-1].value.index) & set(table.index), "rows of the other SAE"


def test_nonsense_in_the_url_is_named_or_ignored(matched, monkeypatch) -> None:
    page = words(open_page("compare", matched, monkeypatch, pair="<b>../../etc", side="x"))
    assert "No comparison" in page and "<b>.." not in page


def test_a_damaged_table_is_one_line_and_the_measures_stay(matched, tmp_path, monkeypatch) -> None:
    copy = tmp_path / "ws"
    shutil.copytree(matched, copy)
    for file in copy.glob("comparisons/*/*.parquet"):
        file.write_bytes(b"no")
    page = words(open_page("compare", copy, monkeypatch))
    assert (
        "is damaged" in page
        and "atomscope compare" in page
        and "What they keep" not in page.split("is damaged")[1]
    )


def test_reading_a_comparison_does_not_import_torch(matched) -> None:
    code = """
import sys
from streamlit.testing.v1 import AppTest
at = AppTest.from_file("app/main.py", default_timeout=60).run()
at.switch_page("screens/compare.py").run()
assert not at.exception, at.exception
assert len(at.get("plotly_chart")) == 4
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    env = os.environ | {"ATOMSCOPE_HOME": str(matched), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("[]"), done.stdout


def test_features_can_be_sorted_by_readability_once_they_were_judged(matched, tmp_path, monkeypatch) -> None:
    from saes import FeatureIndex, build_proxies

    copy = tmp_path / "ws"
    shutil.copytree(matched, copy)
    before = open_page("features", copy, monkeypatch, sort="by readability")
    assert "by readability" not in before.selectbox(key="sort").options
    for meta in FeatureIndex.find_all(copy):
        build_proxies(FeatureIndex.open(copy, meta["sae_id"]))
    at = open_page("features", copy, monkeypatch, sort="by readability")
    assert at.selectbox(key="sort").value == "by readability"
    shown = at.dataframe[0].value["feature"].tolist()
    index = FeatureIndex.open(copy, at.selectbox(key="sae").value)
    assert shown == index.list_features(sort="proxy_score", limit=50)[0]["feature"].tolist()
