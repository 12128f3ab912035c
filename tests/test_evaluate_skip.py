"""Which rows an evaluation leaves out: the SAE's own convention by default, others on request, never two kinds in one table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from app.catalogue import measure_table, rows_left_out
from app.terminal import frontier_lines
from cache import ActivationStore, connect, load_model
from cache.errors import MissingDataError, UsageError
from cache.filters import class_mask, row_classes
from saes.compare import frontier
from saes.config import SAEConfig
from saes.evaluation import evaluate, load_evaluation, save_evaluation
from saes.predictions import heldout_contexts, prediction_rows
from saes.sae import SAE
from saes.train_config import TrainConfig
from saes.training import train
from tests.corpora import HOOK, make_store
from tests.test_cli import run

pytest_plugins = ("tests.workspaces",)

TINY_HOOK = "blocks.1.hook_resid_post"


def random_sae(d: int, hook: str = HOOK, seed: int = 0) -> SAE:
    sae = SAE(SAEConfig(d_sae=24, k=3, d_model=d, hook=hook)).requires_grad_(False)
    for i, p in enumerate(sae.parameters()):
        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)))
    return sae


def fvu_by_hand(sae: SAE, x: torch.Tensor) -> float:
    x = x.double()
    return float(((x - sae(x.float()).double()) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())


def convention(sae: SAE, skip_first: bool | None) -> SAE:
    sae.conventions = replace(sae.conventions, skip_first=skip_first)
    return sae


@pytest.mark.parametrize(("skip_first", "where"), [(None, "pos > 0"), (True, "pos > 0"), (False, "true")])
def test_position_0_counts_where_the_sae_was_trained_on_it(skip_first, where: str, tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 40)
    sae = convention(random_sae(8), skip_first)
    found = evaluate(sae, store)
    rows = store.rows(HOOK, where=f"split = 1 AND {where}")
    every = store.rows(HOOK, where=where)
    assert found.value("fvu") == pytest.approx(fvu_by_hand(sae, rows), rel=1e-5)
    n = {(r["subject"], r["metric"]): r["n"] for r in found.rows}
    assert n["sae", "fvu"] == n["pca-3", "fvu"] == n["untrained", "fvu"] == len(rows)
    assert n["sae", "alive"] == len(every)
    assert {r["skip"] for r in found.rows} == {"none" if skip_first is False else "first"}


def test_what_is_asked_for_wins_over_the_convention(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 40)
    for skip_first, skip, where in ((True, None, "true"), (False, "first", "pos > 0")):
        sae = convention(random_sae(8), skip_first)
        rows = store.rows(HOOK, where=f"split = 1 AND {where}")
        assert evaluate(sae, store, skip=skip).value("fvu") == pytest.approx(fvu_by_hand(sae, rows), rel=1e-5)
    with pytest.raises(UsageError, match="skip='frist'"):
        evaluate(random_sae(8), store, skip="frist")


def test_figures_of_other_rows_do_not_stay_in_the_table(tmp_path: Path) -> None:
    """Those that are of rows of their own do: atoms, kinds of token."""
    store, _ = make_store(tmp_path, [40] * 40)
    sae = random_sae(8)
    evaluate(sae, store, token_classes=True)
    more = [{"subject": "atoms:sae", "metric": "q_star", "value": 0.5, "n": 9}]
    save_evaluation(sae, store, HOOK, [*more, {"subject": "sae", "metric": "delta_ce", "value": 1.0, "n": 9}])
    evaluate(sae, store)
    there = {(r["subject"], r["metric"]) for r in load_evaluation(sae, store).rows}  # type: ignore[union-attr]
    assert ("sae", "delta_ce") in there
    evaluate(sae, store, skip=None)
    kept = {(r["subject"], r["metric"]): r["skip"] for r in load_evaluation(sae, store).rows}  # type: ignore[union-attr]
    assert ("sae", "delta_ce") not in kept and kept["sae", "fvu"] == "none"
    assert ("atoms:sae", "q_star") in kept and ("sae", "nmse@content") in kept
    with connect(store.workspace) as con:
        found = con.sql("SELECT DISTINCT skip FROM evaluations WHERE metric = 'fvu'").fetchall()
    assert found == [("none",)]


def test_kinds_of_token_of_controls_go_with_the_rows_that_these_were_fitted_to(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 40)
    sae = random_sae(8)

    def kinds() -> set[str]:
        return {r["subject"] for r in load_evaluation(sae, store).rows if "@" in r["metric"]}  # type: ignore[union-attr]

    evaluate(sae, store, token_classes=True)
    assert kinds() == {"sae", "pca-3", "untrained", "initial"}
    evaluate(sae, store)
    assert len(kinds()) == 4
    evaluate(sae, store, skip=None, controls=False)
    assert kinds() == {"sae"}
    # a control of another name, as where the L0 without these rows is another
    other = {"subject": "pca-9", "metric": "nmse@content", "value": 0.5, "n": 9}
    save_evaluation(sae, store, HOOK, [other])
    assert kinds() == {"pca-9"}
    evaluate(sae, store, skip=None, token_classes=True)
    assert kinds() == {"sae", "pca-3", "untrained", "initial"}


def test_the_home_page_never_shows_figures_of_two_stores_or_of_other_rows_in_one_table() -> None:
    def row(store: str, skip: str | None, subject: str, metric: str, value: float) -> dict[str, Any]:
        return {
            "sae_id": "s", "store": store, "subject": subject, "metric": metric, "value": value, "skip": skip
        }  # fmt: skip

    # the newest first, as the catalogue gives them
    newest = [
        row("b", None, "sae", "nmse@content", 0.4),
        row("b", "none", "sae", "fvu", 0.3),
        row("b", "none", "pca-7", "fvu", 0.6),
    ]
    older = [
        row("a", None, "sae", "fvu", 0.2),
        row("a", None, "sae", "delta_ce", 0.1),
        row("a", None, "pca-5", "fvu", 0.5),
    ]
    measures = pd.DataFrame([row("c", None, "atoms:sae", "q_star", 0.1), *newest, *older])
    table = measure_table(measures, "s")
    assert list(table.index) == ["sae", "pca-7"] and rows_left_out(measures, "s") == "none"
    assert table.loc["sae"].to_dict() == {"fvu": 0.3, "nmse@content": 0.4}
    table = measure_table(pd.DataFrame(older + newest), "s")
    assert (
        list(table.index) == ["sae", "pca-5"] and rows_left_out(pd.DataFrame(older + newest), "s") == "first"
    )
    assert table.loc["sae"].to_dict() == {"fvu": 0.2, "delta_ce": 0.1}
    assert measure_table(measures, "other").empty and rows_left_out(measures, "other") == "first"
    assert list(measure_table(pd.DataFrame(newest[:1]), "s").columns) == ["nmse@content"]


def test_saes_measured_on_other_rows_do_not_beat_each_other(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 40)
    for seed, skip in ((0, "first"), (10, "first"), (20, None)):
        evaluate(random_sae(8, seed=seed), store, skip=skip, controls=False)
    table = frontier(store.workspace)
    best = table[table["best_fvu"]]
    assert sorted(best["skip"]) == ["first", "none"]
    assert sum("skip none" in line for line in frontier_lines(table)) == 1


@pytest.fixture(scope="module")
def tiny(tiny_workspace) -> tuple[Any, Any]:
    store = ActivationStore.open(ActivationStore.find_all(tiny_workspace.path)[0])
    return store, load_model(tiny_workspace.model_dir, workspace=tiny_workspace.path, device="cpu")


class Zero:
    name = "zero-sae"

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(x), None


@pytest.mark.parametrize("skip", ["first", None, "special", "first+special"])
def test_predictions_splice_and_score_the_rows_that_are_kept(skip: str | None, tiny, monkeypatch) -> None:
    store, model = tiny
    flags = store.corpus.column("flags").copy()
    flags[3::7] |= 2  # some tokens are special
    real = store.corpus.column
    monkeypatch.setattr(store.corpus, "column", lambda name: flags if name == "flags" else real(name))
    found = prediction_rows([Zero()], store, model, TINY_HOOK, 300, skip=skip)
    value = {(r["subject"], r["metric"]): r for r in found}
    offsets, split, tok = store.corpus.seq_offsets, real("split"), real("tok")
    losses: list[torch.Tensor] = []
    clean_losses: list[torch.Tensor] = []
    total = 0
    for seq in range(len(offsets) - 1):
        a, b = int(offsets[seq]), int(offsets[seq + 1])
        if split[a] != 1 or b - a < 3 or total + b - a > 300:
            continue
        total += b - a
        kept = torch.ones(b - a, dtype=torch.bool)
        if skip and "first" in skip:
            kept[0] = False
        if skip and "special" in skip:
            kept &= torch.from_numpy((flags[a:b] & 2) == 0)
        ids = torch.from_numpy(tok[a:b].astype("int64"))[None]

        def edit(x: torch.Tensor, kept: torch.Tensor = kept) -> torch.Tensor:
            return torch.where(kept[None, :, None], torch.zeros_like(x), x)

        with torch.no_grad():
            clean = model(ids)[0, :-1]
            with model.hooked({TINY_HOOK: edit}):
                spliced = model(ids)[0, :-1]
        for logits, out in ((clean, clean_losses), (spliced, losses)):
            out.append(F.cross_entropy(logits, ids[0, 1:], reduction="none")[kept[:-1]])
    want = torch.cat(losses)
    assert value["zero-sae", "ce"]["n"] == len(want)
    assert value["zero-sae", "ce"]["value"] == pytest.approx(float(want.mean()), rel=1e-4)
    assert value["model", "ce_clean"]["value"] == pytest.approx(
        float(torch.cat(clean_losses).mean()), rel=1e-4
    )
    assert value["zero-sae", "kl"]["value"] == pytest.approx(value["model", "kl_zero"]["value"], rel=1e-5)


def test_contexts_keep_what_a_stream_would_give(tiny) -> None:
    store, _ = tiny
    for skip in ("first", None):
        look = class_mask(row_classes("heldout", skip))
        n = int(look[store.row_class(0, store.corpus.n_tokens)].sum())
        batches = list(heldout_contexts(store.corpus, 10**9, skip))
        short = [b for b in torch.tensor(store.corpus.seq_offsets).diff().tolist() if b < 3]
        assert not short and sum(int(b.kept.sum()) for b in batches) == n


def test_rows_that_are_all_left_out_are_one_line(tiny, monkeypatch) -> None:
    store, model = tiny
    flags, real = store.corpus.column("flags") | 2, store.corpus.column
    monkeypatch.setattr(store.corpus, "column", lambda name: flags if name == "flags" else real(name))
    with pytest.raises(MissingDataError, match="skip"):
        prediction_rows([Zero()], store, model, TINY_HOOK, 300, skip="special")


def test_the_command_takes_skip_and_says_which_rows_are_left_out(capsys, tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 40)
    sae = convention(random_sae(8), True)
    sae.save(tmp_path / "saes" / "run" / "0-some")
    args = ["evaluate", "latest", "--max-tokens", "0", "-w", str(tmp_path)]
    code, out, _ = run(capsys, *args)
    assert code == 0 and "rows left out" not in out
    code, out, _ = run(capsys, *args, "--skip", "none")
    assert code == 0 and "rows left out: none" in out
    found = load_evaluation(sae, store)
    want = fvu_by_hand(sae, store.rows(HOOK, where="split = 1"))
    assert found is not None and found.value("fvu") == pytest.approx(want, rel=1e-5)
    code, _, err = run(capsys, *args, "--skip", "frist")
    assert code == 2 and "frist" in err and err.count("\n") == 1


def test_the_pages_say_which_rows_were_left_out_where_it_is_not_position_0(
    tmp_path: Path, monkeypatch
) -> None:
    from tests.test_app import open_page, words

    store, _ = make_store(tmp_path, [40] * 40)
    for seed, skip, shown in ((0, "first", 0), (1, None, 1)):
        config = TrainConfig(steps=4, batch_size=16, log_every=2, screen="off", seed=seed, skip=skip)
        sae = train(store, SAEConfig(d_sae=24, k=3), config)[0].sae
        evaluate(sae, store, controls=False)  # by the convention that training leaves in the SAE
        for page in ("home", "compare"):
            assert words(open_page(page, tmp_path, monkeypatch)).count("skip none") == shown
