"""Two commands from a published SAE and a text file to an explorer with an index, and the commands for such SAEs."""

from __future__ import annotations

import io
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from app.cli import main
from saes.queries import FeatureIndex
from saes.sae import SAE
from tests.tiny import D_MODEL, SENTENCES

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).parent / "fixtures" / "foreign"
HOOK = "blocks.1.hook_resid_post"


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def command(*args: object, home: Path, **env: str) -> Done:
    """`atomscope args`, in this process: exit code and what it printed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name, value in ({"ATOMSCOPE_HOME": str(home), "HF_HUB_OFFLINE": "1"} | env).items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["atomscope", *map(str, args)])
        try:
            main()
        except SystemExit as e:
            code = int(e.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text("\n\n".join(SENTENCES[:60]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A mirror with one release, in SAELens's own layout, that names its model and its conventions."""
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install -e '.[dev]'")
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    cfg = TopKSAEConfig(d_in=D_MODEL, d_sae=96, k=4)
    cfg.metadata = sae_lens.saes.sae.SAEMetadata(
        model_name=str(tiny_dir), hook_name=HOOK, prepend_bos=False, context_size=32
    )
    theirs = TopKSAE(cfg)
    with torch.no_grad():
        for i, p in enumerate(theirs.parameters()):
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))
    mirror = tmp_path_factory.mktemp("mirror")
    theirs.save_model(mirror / "tiny-release" / HOOK)
    return mirror


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, published: Path, text_file: Path) -> tuple[Path, Any]:
    """The workspace after the first of the two commands, and what it printed."""
    home = tmp_path_factory.mktemp("home")
    mirror = {"ATOMSCOPE_SAE_MIRROR": str(published)}
    done = command("open", f"tiny-release:{HOOK}", text_file, "--json", home=home, **mirror)
    assert done.returncode == 0, done.stderr
    return home, json.loads(done.stdout)


def test_the_first_command_indexes_the_sae_over_the_text_by_its_own_conventions(
    opened: tuple[Path, Any], published: Path
) -> None:
    home, made = opened
    index = FeatureIndex.open(home)
    original = SAE.load(published / "tiny-release" / HOOK)
    assert index.meta["sae_id"] == original.sae_id == SAE.load(made["sae"]).sae_id
    assert index.meta["hook"] == HOOK and index.meta["logit_lens"] and index.meta["n_tokens"] > 300
    corpus = json.loads(next(home.glob("corpora/*/corpus.json")).read_text())
    assert (corpus["context"], corpus["prepend_bos"]) == (32, False)
    frame, total = index.list_features("the", mode="token")
    assert 0 < len(frame) <= total <= 96 and made["check"]["rows"] > 300
    assert made["check"]["stated_l0"] == 4 and made["notes"] == []


def test_the_second_command_shows_it(opened: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The explorer's own script over that workspace: a page without an error that names the SAE."""
    from streamlit.testing.v1 import AppTest

    monkeypatch.setenv("ATOMSCOPE_HOME", str(opened[0]))
    page = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=60).run()
    assert not page.exception, [e.stack_trace for e in page.exception]
    text = "\n".join(h.proto.body for h in page.html)
    assert "tiny-release" in text and "imported" in text and HOOK in text
    page.switch_page("screens/features.py").run()
    assert not page.exception, [e.stack_trace for e in page.exception]
    assert len(page.dataframe[0].value)


def test_a_second_call_finds_everything_done_and_other_commands_take_the_release(
    opened: tuple[Path, Any], published: Path, text_file: Path
) -> None:
    home, made = opened
    before = {p: p.stat().st_mtime_ns for p in home.rglob("*.parquet")}
    mirror = {"ATOMSCOPE_SAE_MIRROR": str(published)}
    again = command("open", f"tiny-release:{HOOK}", text_file, "--json", home=home, **mirror)
    assert again.returncode == 0 and json.loads(again.stdout) == made
    assert before == {p: p.stat().st_mtime_ns for p in home.rglob("*.parquet")}
    checked = command("sae", "check", f"tiny-release:{HOOK}", home=home, **mirror)
    assert checked.returncode == 0 and "FVU" in checked.stdout and "warning: FVU is" in checked.stdout
    feature = FeatureIndex.open(home).list_features("the", mode="token")[0]["feature"].iloc[0]
    options = ("--feature", feature, "--strength", 0, "--max-new-tokens", 3, "--json")
    steered = command("steer", "The cat", *options, home=home)
    assert steered.returncode == 0, steered.stderr
    texts = json.loads(steered.stdout)
    assert texts["baseline"] == texts["steered"]
    evaluated = command("evaluate", "latest", "--max-tokens", 200, home=home)
    assert evaluated.returncode == 0 and "held-out FVU" in evaluated.stdout


def test_a_difference_to_the_training_of_the_sae_is_said_once(
    published: Path, text_file: Path, tmp_path: Path
) -> None:
    """`open` checks and indexes in a row, and both look at the conventions."""
    mirror = {"ATOMSCOPE_SAE_MIRROR": str(published)}
    done = command("open", f"tiny-release:{HOOK}", text_file, "--context", 48, home=tmp_path, **mirror)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("contexts of 32 tokens") == 1


def test_a_folder_without_names_asks_for_model_and_hook(
    text_file: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    sae = SAE.load(FIXTURES / "sparsify" / "layers.1")
    sae.cfg, sae.conventions = replace(sae.cfg, hook="", model=""), replace(sae.conventions, model="")
    sae.save(tmp_path / "nameless")
    for extra, words in (((), "--hook"), (("--hook", HOOK), "--model")):
        done = command("open", tmp_path / "nameless", text_file, *extra, home=tmp_path / "home")
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    done = command(
        "open", tmp_path / "nameless", text_file, "--hook", HOOK, "--model", tiny_dir, home=tmp_path / "home"
    )
    assert done.returncode == 1 and "d_model=8" in done.stderr


def test_a_factor_or_hook_given_to_a_folder_of_the_workspace_makes_a_folder_of_its_own(
    tmp_path: Path,
) -> None:
    """An index names the folder of its SAE: that folder has to hold the SAE that was indexed."""
    from app.opening import bring_in

    sae = SAE.load(FIXTURES / "sparsify" / "layers.1")
    sae.cfg = replace(sae.cfg, hook="")
    kept = sae.save(tmp_path / "saes" / "mine" / "0-sae")
    assert bring_in(str(kept), tmp_path)[1] == kept
    for more in ({"norm_factor": 0.5}, {"hook": HOOK}):
        made, folder = bring_in(str(kept), tmp_path, **more)
        assert folder != kept and made.sae_id != sae.sae_id
        assert SAE.load(folder).sae_id == made.sae_id


def test_unknown_releases_and_pickles_are_one_line_with_what_to_do(text_file: Path, tmp_path: Path) -> None:
    done = command("open", "no-such-release:x", text_file, home=tmp_path)
    assert done.returncode == 2 and "no release" in done.stderr and done.stderr.count("\n") == 1
    pickled = FIXTURES / "dictionary_learning" / "BatchTopKSAE"
    done = command("open", pickled, text_file, home=tmp_path)
    assert done.returncode == 1 and "atomscope sae convert" in done.stderr
    done = command("sae", "convert", pickled, tmp_path / "out", home=tmp_path)
    assert done.returncode == 0 and "batch_topk, 16 latents of 8" in done.stdout
    assert SAE.load(tmp_path / "out").cfg.k == 3


def test_bos_goes_before_each_row_where_the_training_had_it(
    tmp_path: Path, text_file: Path, tiny_dir: Path
) -> None:
    from transformers import AutoTokenizer

    from cache import build_corpus
    from cache.errors import UsageError

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    with pytest.raises(UsageError, match="BOS"):
        build_corpus(text_file, tokenizer, workspace=tmp_path, prepend_bos=True)
    tokenizer.bos_token = tokenizer.eos_token
    plain = build_corpus(text_file, tokenizer, workspace=tmp_path)
    with_bos = build_corpus(text_file, tokenizer, workspace=tmp_path, prepend_bos=True)
    first = with_bos.column("tok")[with_bos.column("pos") == 0]
    assert (first == tokenizer.bos_token_id).all() and with_bos.meta["prepend_bos"] is True
    assert with_bos.n_tokens == plain.n_tokens + with_bos.n_seqs and plain.meta["prepend_bos"] is False
    assert (
        build_corpus(text_file, tokenizer, workspace=tmp_path, prepend_bos=False).fingerprint
        == plain.fingerprint
    )
    tokenizer.save_pretrained(tmp_path / "model")
    shutil.copy(tiny_dir / "config.json", tmp_path / "model")
    build = ("corpus", "build", text_file, "--model", tmp_path / "model", "--context", 128, "--json")
    done = command(*build, "--prepend-bos", home=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["fingerprint"] == with_bos.fingerprint
