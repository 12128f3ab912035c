"""Prompt pairs, metrics and the statistics on top: alignment, answers of several tokens, bounds that cover, recall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache.errors import DataError, UsageError
from cache.models import load_tokenizer
from probes.attribution.atp import AtPStar
from probes.attribution.diagnose import diagnose, draw_subsets, subset_bounds
from probes.attribution.metric import KL, LogitDifference, LogProb, as_metric
from probes.attribution.pair_sets import PAIR_SETS, pair_set
from probes.attribution.pairs import PromptPair, read_pairs, tokenise, write_pairs
from probes.attribution.patching import ExactPatching
from probes.attribution.recall import blocks, iterative, recall_at, recall_table, subset_sampling
from tests.atp_models import linear_model, pair, random_pair
from tests.conftest import REAL_MODEL
from tests.tiny import tiny_tokenizer

TOK = tiny_tokenizer()


# ------------------------------------------------------------------------------------------- pairs


def test_a_pair_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    pairs = [PromptPair(clean="a “b”", noise="a “c”", answers=(" x", " y"), wrong=(" z",), name="set")]
    write_pairs(tmp_path / "p.jsonl", pairs)
    assert read_pairs(tmp_path / "p.jsonl") == pairs
    odd = [
        PromptPair(clean="a\u2028b\x85c", noise="d\u2029e\nf", answers=(" x",), name="line ends of Unicode")
    ]
    write_pairs(tmp_path / "odd.jsonl", odd)
    assert read_pairs(tmp_path / "odd.jsonl") == odd
    (tmp_path / "q.jsonl").write_text('{"clean": "a", "noise": "b", "answers": " x"}\n\n')
    assert read_pairs(tmp_path / "q.jsonl")[0].answers == (" x",)


@pytest.mark.parametrize(
    "line", ["no", "[1]", '{"clean": "a"}', '{"clean": 1, "noise": "b", "answers": ["c"]}']
)
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"clean": "a", "noise": "b", "answers": ["c"]}\n' + line)
    with pytest.raises(DataError, match=r"p\.jsonl:2"):
        read_pairs(tmp_path / "p.jsonl")


def test_a_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes('{"clean": "é", "noise": "b"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"p\.jsonl is not UTF-8"):
        read_pairs(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("noise", "answers", "message"),
    [
        ("The cat and the dog", (" x",), "tokens"),
        ("The cat", (" x",), "same tokens"),
        ("The dog", ("",), "is empty"),
    ],
)
def test_prompts_that_cannot_be_patched_are_refused(noise: str, answers: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenise(PromptPair(clean="The cat", noise=noise, answers=answers), TOK)


@pytest.mark.assets
@pytest.mark.parametrize("name", PAIR_SETS)
def test_built_in_sets_are_aligned_in_the_packaged_models_tokens(name: str, real_workspace: Path) -> None:
    tokenizer = load_tokenizer(REAL_MODEL, workspace=real_workspace)
    pairs = pair_set(name, tokenizer, 20, seed=1)
    assert pairs == pair_set(name, tokenizer, 20, seed=1) != pair_set(name, tokenizer, 20, seed=2)
    assert len({(p.clean, p.noise) for p in pairs}) == 20
    tokens = [tokenise(p, tokenizer) for p in pairs]
    assert len({len(t.clean) for t in tokens}) == 1 and len({t.first_difference for t in tokens}) == 1
    for t in tokens:
        assert all(len(a) == 1 for a in t.answers + t.wrong) and not set(t.answers) & set(t.wrong)
        LogitDifference().target(t)


def test_a_tokenizer_without_whole_words_is_told_so() -> None:
    with pytest.raises(DataError, match="ask for fewer"):
        pair_set("city_country", TOK)
    with pytest.raises(UsageError, match="no pair set"):
        pair_set("cities", TOK)


# ----------------------------------------------------------------------------------------- metrics


def logits(rows: int = 3, positions: int = 1, vocab: int = 30) -> torch.Tensor:
    return torch.randn(rows, positions, vocab, generator=torch.Generator().manual_seed(0))


def test_logit_difference_reads_the_first_token_at_which_answers_differ() -> None:
    metric = LogitDifference()
    several = metric.target(pair([1, 2], [1, 3], answers=((5,), (6,)), wrong=((7,),)))
    x = logits()
    assert several.positions == (1,)
    assert torch.allclose(metric(x, several), (x[:, 0, 5] + x[:, 0, 6]) / 2 - x[:, 0, 7])
    shared = metric.target(pair([1, 2], [1, 3], answers=((9, 5, 4),), wrong=((9, 7),)))
    assert shared.pair.clean == (1, 2, 9) and shared.pair.noise == (1, 3, 9) and shared.positions == (2,)
    assert torch.allclose(metric(x, shared), x[:, 0, 5] - x[:, 0, 7])
    for answers, wrong in ((((9,),), ((9, 7),)), (((5,), (6,)), ((5, 1),)), (((5,),), ())):
        with pytest.raises((DataError, UsageError)):
            metric.target(pair([1, 2], [1, 3], answers=answers, wrong=wrong))


def test_log_probability_sums_over_the_tokens_of_the_answer() -> None:
    metric = LogProb()
    target = metric.target(pair([1, 2], [1, 3], answers=((5, 6, 7),)))
    assert target.pair.clean == (1, 2, 5, 6) and target.positions == (1, 2, 3)
    x = logits(positions=3)
    logp = x.log_softmax(-1)
    assert torch.allclose(metric(x, target), logp[:, 0, 5] + logp[:, 1, 6] + logp[:, 2, 7])
    any_of = metric.target(pair([1, 2], [1, 3], answers=((5,), (6,))))
    one = logits()
    assert torch.allclose(metric(one, any_of).exp(), one.softmax(-1)[:, 0, [5, 6]].sum(-1))


def test_kl_is_zero_on_the_noise_run_and_callables_see_every_position(tmp_path: Path) -> None:
    model, example = linear_model(tmp_path), random_pair()
    method = AtPStar(model, "kl", nodes=("resid",), qk_fix=False, grad_drop=False, positions="sum")
    exact = ExactPatching(method, example)
    assert exact.clean_value < -0.01 and isinstance(exact.metric, KL)
    last = exact.space.frame()["node"].to_numpy()[-1:]
    assert exact.effects(last)[0] == pytest.approx(-exact.clean_value, rel=1e-3), (
        "the last stream is the noise run"
    )
    seen = []

    def mine(x: torch.Tensor, p: Any) -> torch.Tensor:
        seen.append((x.shape[1], p))
        return x[:, -1, 3]

    AtPStar(model, mine, nodes=("z",)).attribute(example)
    assert seen[0][0] == len(example.clean) and seen[0][1] is example
    texts = ("The cat waited.", "The dog waited.")
    assert AtPStar(model, "kl", nodes=("z",)).attribute(*texts).score.max() > 0, (
        "two prompts are enough without answers"
    )
    with pytest.raises(UsageError, match="needs answers"):
        AtPStar(model, nodes=("z",)).attribute(*texts)
    with pytest.raises(UsageError, match="needs an answer"):
        AtPStar(model, "log_prob", nodes=("z",)).attribute(*texts)
    with pytest.raises(UsageError, match="attribute"):
        AtPStar(model, nodes=("z",)).attribute(texts[0])
    with pytest.raises(UsageError, match="one number a row"):
        AtPStar(model, lambda x, p: x[:, -1], nodes=("z",)).attribute(example)
    with pytest.raises(UsageError, match="no metric"):
        as_metric("accuracy")


# ------------------------------------------------------------------------------- bounds and recall


def test_the_bound_covers_the_largest_effect_of_an_additive_model() -> None:
    g = np.random.default_rng(0)
    covered, ratio = [], []
    for trial in range(150):
        effects = g.standard_t(3, 60) * 0.3
        member = draw_subsets(60, 200, 0.5, seed=trial)
        _, _, bounds = subset_bounds(member, member @ effects, alphas=(0.1, 0.01))
        covered.append(bounds[0.1] >= np.abs(effects).max())
        ratio.append(bounds[0.1] / np.abs(effects).max())
        assert bounds[0.01] >= bounds[0.1]
    assert np.mean(covered) >= 0.85 and np.median(ratio) < 1.6


def test_welch_statistics_are_scipys() -> None:
    from scipy import stats

    g = np.random.default_rng(1)
    member = draw_subsets(4, 40, 0.4, seed=0)
    y = member @ np.array([0.5, -1.0, 0.0, 0.2]) + g.normal(size=40)
    estimate, se, bounds = subset_bounds(member, y, alphas=(0.1,))
    upper = []
    for j in range(4):
        test = stats.ttest_ind(y[member[:, j]], y[~member[:, j]], equal_var=False)
        assert test.statistic == pytest.approx(estimate[j] / se[j])
        upper.append(abs(estimate[j]) + stats.t.ppf(0.9, test.df) * se[j])
    assert bounds[0.1] == pytest.approx(max(upper))
    with pytest.raises(UsageError, match="n_samples"):
        subset_bounds(np.ones((10, 2), dtype=bool), np.zeros(10))


def test_on_a_linear_model_searches_and_the_bound_agree_with_the_truth(tmp_path: Path) -> None:
    model, example = linear_model(tmp_path), random_pair(6, first=3)
    method = AtPStar(model, nodes=("v", "z"), qk_fix=False, grad_drop=False)
    exact = ExactPatching(method, example)
    truth, scores = exact.effects(), method.attribute(example)
    assert recall_at(scores.order(), truth, 10, 10) == 1.0
    found = diagnose(exact, scores.top(5), n_samples=120, p=0.5)
    missed = np.abs(np.delete(truth, scores.top(5))).max()
    assert found.bounds[0.001] >= missed and "averaged over random subsets" in found.lines()[-1]
    assert set(found.nodes).isdisjoint(scores.top(5)) and exact.live(found.nodes).all()
    rankings = [iterative(exact), blocks(exact, size=6), subset_sampling(exact, n_samples=60, p=0.5)]
    for r in rankings:
        assert sorted(r.order) == list(range(len(truth))), r.method
    table = recall_table(rankings, truth, 5)
    assert (table.groupby("method")["recall"].max() == 1).all()
    assert table[table["method"] == "subset_sampling"]["passes"].min() > 60, "own passes count"
