"""Metrics with known answers, and the splice behind the cross-entropy numbers."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F

from cache import connect
from cache.errors import DataError, MissingDataError
from saes.codes import Codes
from saes.compare import frontier
from saes.config import SAEConfig
from saes.controls import fit_pca, untrained_dictionary
from saes.evaluation import evaluate, load_evaluation
from saes.initial import initial_sae
from saes.metrics import Firing, Reconstruction, l1_norms
from saes.predictions import context_losses, heldout_batches
from saes.sae import SAE
from saes.sources import TensorSource
from saes.splice import attach
from saes.train_config import TrainConfig
from saes.trainer import Trainer
from tests.corpora import HOOK, empty_store, fill, make_corpus, make_store, random_vectors

TINY_HOOK = "blocks.1.hook_resid_post"


def reconstruction(x: torch.Tensor, x_hat: torch.Tensor, batch: int = 1000) -> dict[str, float]:
    r = Reconstruction(x.shape[1])
    for i in range(0, len(x), batch):
        r.add(x[i : i + batch], x_hat[i : i + batch])
    return r.values()


def test_predicting_the_mean_gives_fvu_1_and_a_perfect_copy_0() -> None:
    x = torch.randn(500, 8, dtype=torch.float64) * 3 + 100
    assert reconstruction(x, x.mean(0).expand_as(x))["fvu"] == pytest.approx(1.0, abs=1e-9)
    assert reconstruction(x, x)["fvu"] == 0.0
    assert reconstruction(x, x)["cos"] == pytest.approx(1.0)


@pytest.mark.parametrize("batch", [1, 7, 128])
def test_metrics_do_not_depend_on_the_batch_size(batch: int) -> None:
    x, x_hat = torch.randn(300, 6), torch.randn(300, 6)
    whole, parts = reconstruction(x, x_hat), reconstruction(x, x_hat, batch)
    assert whole == pytest.approx(parts, rel=1e-12)


def test_fvu_agrees_with_sae_lens_explained_variance() -> None:
    evals = pytest.importorskip("sae_lens.evals", reason="sae-lens is not installed: pip install -e '.[dev]'")
    calculator = getattr(evals, "ExplainedVarianceCalculator", None)
    if calculator is None:
        pytest.skip("this sae-lens has no ExplainedVarianceCalculator")
    x = torch.randn(400, 5) * 2 + 1
    x_hat = x + torch.randn(400, 5) * 0.3
    theirs = calculator()
    for i in range(0, 400, 100):
        theirs.add_batch(x_hat[i : i + 100], x[i : i + 100])
    assert 1 - float(theirs.compute()) == pytest.approx(reconstruction(x, x_hat)["fvu"], rel=1e-4)


def test_l0_and_density_count_negative_activations_and_not_selected_zeros() -> None:
    codes = Codes(
        torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 3.0]]), torch.tensor([[0, 1, 2], [0, 1, 2]]).int()
    )
    r, f = Reconstruction(2), Firing(4)
    r.add(torch.randn(2, 2), torch.randn(2, 2), codes)
    f.add(codes)
    assert r.values()["l0"] == 1.5
    assert f.density().tolist() == [0.5, 0.5, 0.5, 0.0]
    assert f.values()["alive"] == 0.75
    assert sum(h["count"] for h in f.histogram()) == 3


def test_pca_control_is_the_best_linear_code(tmp_path: Path) -> None:
    store, vectors = make_store(tmp_path, [40] * 40, d=8)
    x = vectors[HOOK].float()
    first = store.corpus.column("pos") == 0
    train = x[torch.from_numpy(~first & (store.corpus.column("split") == 0))].double()
    pca = fit_pca(store, HOOK, 3)
    x_hat, _ = pca(train.float())
    values = torch.linalg.eigvalsh(torch.cov(train.T, correction=0)).flip(0)
    fvu = reconstruction(train, x_hat)["fvu"]
    assert fvu == pytest.approx((values[3:].sum() / values.sum()).item(), rel=1e-4)


def zero_sae(d_model: int, hook: str) -> SAE:
    return SAE(SAEConfig(d_sae=8, k=2, d_model=d_model, hook=hook)).requires_grad_(False)


def test_spliced_zero_dictionary_equals_zero_ablation(tiny_model) -> None:
    ids = torch.randint(5, 200, (2, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    hook = TINY_HOOK
    zero = context_losses(tiny_model, ids, mask, hook, lambda x: (torch.zeros_like(x), None))
    with attach(tiny_model, {hook: zero_sae(tiny_model.d_hook(hook), hook)}, error=False):
        logits, _ = tiny_model.forward(ids)
    want = F.cross_entropy(logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten(), reduction="none").view(2, -1)
    np.testing.assert_allclose(np.stack(zero), want.detach().double().numpy(), rtol=1e-5)


def test_position_0_is_neither_spliced_nor_scored(tiny_model) -> None:
    ids = torch.randint(5, 200, (1, 6))
    seen = []

    def record(x: torch.Tensor):
        seen.append(x.shape)
        return x, None

    losses = context_losses(tiny_model, ids, torch.ones_like(ids, dtype=torch.bool), TINY_HOOK, record)
    assert seen == [(5, tiny_model.d_hook(TINY_HOOK))]
    assert len(losses[0]) == 4


def test_padding_changes_no_loss(tiny_model) -> None:
    ids = torch.randint(5, 200, (1, 6))
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.int64)], dim=1)
    mask = torch.arange(10)[None] < 6
    alone = context_losses(tiny_model, ids, torch.ones_like(ids, dtype=torch.bool), TINY_HOOK, None)
    together = context_losses(tiny_model, padded, mask, TINY_HOOK, None)
    np.testing.assert_allclose(alone[0], together[0], rtol=1e-4)


def test_unedited_splice_with_error_term_is_bit_identical_and_gradients_reach_the_codes(tiny_model) -> None:
    hook = TINY_HOOK
    sae = zero_sae(tiny_model.d_hook(hook), hook)
    with torch.no_grad():
        for p in sae.parameters():
            p.normal_(0, 0.3)
    sae.requires_grad_(True)
    ids = torch.randint(5, 200, (2, 7))
    plain, _ = tiny_model.forward(ids)
    with attach(tiny_model, {hook: sae}) as a:
        logits, _ = tiny_model.forward(ids)
        codes = a.codes[hook]
    assert torch.equal(plain, logits)
    assert codes.values.shape == (2 * 6, 2)
    logits.sum().backward()
    assert codes.values.grad is not None and codes.values.grad.abs().sum() > 0


@pytest.mark.parametrize("error", [True, False, "detached"])
def test_codes_of_a_frozen_sae_in_a_frozen_model_are_differentiable(tiny_model, error) -> None:
    sae = zero_sae(tiny_model.d_hook(TINY_HOOK), TINY_HOOK)
    with torch.no_grad():
        for p in sae.parameters():
            p.normal_(0, 0.3)
    ids = torch.randint(5, 200, (1, 6))
    with attach(tiny_model, {TINY_HOOK: sae}, error=error) as a:
        logits, _ = tiny_model.forward(ids)
        logits[0, -1, 7].backward()
        values = a.codes[TINY_HOOK].values
    assert values.grad is not None and values.grad.abs().sum() > 0
    # finite difference on the largest gradient: the same edit moves the logit by as much
    row, j = divmod(int(values.grad.abs().argmax()), values.shape[1])

    def moved(step: float) -> float:
        def edit(c: Codes) -> Codes:
            new = c.values.clone()
            new[row, j] += step
            return Codes(new, c.indices)

        with torch.no_grad(), attach(tiny_model, {TINY_HOOK: sae}, error=error) as b:
            b.edit(TINY_HOOK, edit)
            return float(tiny_model.forward(ids)[0][0, -1, 7])

    slope = (moved(1e-2) - moved(-1e-2)) / 2e-2
    assert slope == pytest.approx(values.grad[row, j].item(), rel=0.05, abs=1e-4)


def test_edited_codes_change_the_residual_by_exactly_the_decoder_rows(tiny_model) -> None:
    hook = TINY_HOOK
    sae = zero_sae(tiny_model.d_hook(hook), hook)
    with torch.no_grad():
        for p in sae.parameters():
            p.normal_(0, 0.3)
    ids = torch.randint(5, 200, (1, 5))
    before = tiny_model.capture(ids, [hook])[hook]
    with attach(tiny_model, {hook: sae}) as a:
        a.edit(hook, lambda c: Codes(c.values + 2.0, c.indices))
        after = tiny_model.capture(ids, [hook])[hook]
        codes = a.codes[hook]
    want = before.clone()
    want[0, 1:] += 2.0 * sae.W_dec[codes.indices.long()].sum(1)
    torch.testing.assert_close(after, want, rtol=1e-4, atol=1e-4)


def test_attach_refuses_a_wrong_hook_and_a_wrong_width(tiny_model) -> None:
    with pytest.raises(DataError, match="d_model"), attach(tiny_model, {TINY_HOOK: zero_sae(5, TINY_HOOK)}):
        pass
    with (
        pytest.raises(Exception, match="blocks"),
        attach(tiny_model, {"blocks.9.hook_nothing": zero_sae(5, "")}),
    ):
        pass


def test_sae_and_store_of_different_width_are_one_clear_line(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [20] * 8, d=8)
    with pytest.raises(DataError, match=r"d_model=5.*d_model=8"):
        evaluate(zero_sae(5, HOOK), store)


def test_an_sae_of_other_weights_is_refused_though_its_shape_fits(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [20] * 8)
    store = empty_store(tmp_path, corpus, weights_sha256="a" * 64)
    fill(store, {HOOK: random_vectors(corpus.n_tokens, 8)})
    foreign = SAE(SAEConfig(d_sae=8, k=2, d_model=8, hook=HOOK, model_sha="f" * 64)).requires_grad_(False)
    with pytest.raises(DataError, match="other weights"):
        evaluate(foreign, store)


def test_a_smaller_evaluation_keeps_what_it_did_not_measure(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 40, d=8)
    sae = zero_sae(8, HOOK)
    evaluate(sae, store)
    again = evaluate(sae, store, controls=False)
    assert {"sae", "pca-2", "untrained", "initial"} <= set(again.table().columns)
    kept = load_evaluation(sae, store)
    assert kept is not None and len(kept.rows) == len(again.rows)


def test_evaluation_writes_controls_beside_the_sae(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 40, d=8)
    sae = zero_sae(8, HOOK)
    result = evaluate(sae, store)
    assert set(result.table().columns) == {"sae", "pca-2", "untrained", "initial"}
    mean = store.stats(HOOK, split="heldout").mean
    x = store.rows(HOOK, where="split = 1 and pos > 0").double()
    want = (x**2).sum() / ((x - torch.as_tensor(mean)) ** 2).sum()
    assert result.value("fvu") == pytest.approx(want.item(), rel=1e-5)
    assert result.path is not None and result.path.is_file()
    with pytest.raises(MissingDataError):
        result.value("delta_ce")


def test_held_out_batches_hold_every_chosen_token_once(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [5, 9, 2, 7, 30, 4, 8, 12, 6, 6, 6, 11])
    got = [ids[mask].tolist() for ids, mask in heldout_batches(corpus, 1000)]
    split, offsets, tok = corpus.column("split"), corpus.seq_offsets, corpus.column("tok")
    want = [tok[offsets[s] : offsets[s + 1]].tolist() for s in range(corpus.n_seqs) if split[offsets[s]] == 1]
    assert sorted(chain(*got)) == sorted(chain(*(w for w in want if len(w) > 2)))
    with pytest.raises(MissingDataError, match="max_tokens"):
        next(heldout_batches(corpus, 2))


@pytest.mark.parametrize("activation", ["topk", "abs_topk", "batch_topk", "jumprelu", "relu", "gated"])
def test_the_initial_control_is_the_sae_as_training_starts_it(activation: str, tmp_path: Path) -> None:
    """Same architecture and width, weights of the first step: against the trainer itself, in the space of the data.

    Where training starts from a quarter of the best encoder scale, the control has the best one."""
    store, _ = make_store(tmp_path, [40] * 40, d=8)
    need = {"jumprelu": {"l0": 1.0}, "relu": {"l1": 1.0}, "gated": {"l1": 1.0}}.get(activation, {"k": 3})
    cfg = SAEConfig(d_sae=24, d_model=8, hook=HOOK, activation=activation, space="raw", **need)
    made = initial_sae(SAE(cfg).requires_grad_(False), store, HOOK, seed=5)
    x, rows = next((b.x[HOOK], b.row) for b in store.sequential(HOOK, batch_size=8192, split="train"))
    plan = TrainConfig(steps=1, seed=5)
    trainer = Trainer(cfg, plan, TensorSource(x).moments(plan), torch.device("cpu"))
    trainer.start(x)
    for name, want in trainer.sae.named_parameters():
        if name != "threshold" or activation == "jumprelu":
            factor = 4 if name == "W_enc" and cfg.has_k else 1
            torch.testing.assert_close(dict(made.sae.named_parameters())[name], factor * want.detach())
    x_hat, sums = made(x)
    codes = made.sae.encode(x)
    torch.testing.assert_close(x_hat, made.sae.decode(codes))
    torch.testing.assert_close(sums.l0().long(), codes.l0())
    torch.testing.assert_close(sums.size, l1_norms(codes))
    if activation == "batch_topk":
        assert sums.l0().double().mean().item() == pytest.approx(3, abs=0.05)
    assert len(rows) == len(x)


@pytest.mark.parametrize("activation", ["topk", "abs_topk", "jumprelu"])
def test_the_untrained_control_reconstructs_as_well_as_its_atoms_can_at_one_scale(
    activation: str, tmp_path: Path
) -> None:
    """A control at a smaller scale would make every trained SAE look better beside it."""
    store, _ = make_store(tmp_path, [40] * 40, d=8)
    need = {"l0": 1.0} if activation == "jumprelu" else {"k": 3}
    sae = SAE(SAEConfig(d_sae=24, d_model=8, hook=HOOK, activation=activation, **need)).requires_grad_(False)  # type: ignore[arg-type]
    x = next(b.x[HOOK] for b in store.sequential(HOOK, batch_size=8192, split="train"))[:1024]
    controls = [untrained_dictionary(sae, store, HOOK, 3)]
    if sae.cfg.has_k:
        controls.append(initial_sae(sae, store, HOOK))
    for control in controls:
        centre = control.sae.b_dec
        guess, wanted = control(x)[0] - centre, x - centre
        assert ((guess * wanted).sum() / (guess**2).sum()).item() == pytest.approx(1.0, abs=0.05)


def test_an_evaluation_of_an_older_version_shows_its_control_once_and_by_its_new_name(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [40] * 40, d=8)
    sae = zero_sae(8, HOOK)
    result = evaluate(sae, store)
    old = [r | {"subject": "random"} for r in result.rows if r["subject"] == "untrained"]
    for rows in ([r for r in result.rows if r["subject"] != "untrained"] + old, result.rows + old):
        pq.write_table(pa.Table.from_pylist(rows), result.path)
        loaded = load_evaluation(sae, store)
        assert loaded is not None and len(loaded.rows) == len(result.rows)
        assert loaded.value("fvu", "untrained") == result.value("fvu", "untrained")
        found = connect(tmp_path).execute(
            "SELECT subject, count(*) FROM evaluations WHERE metric = 'fvu' GROUP BY 1 ORDER BY 1"
        )
        assert found.fetchall() == [("initial", 1), ("pca-2", 1), ("sae", 1), ("untrained", 1)]
        table = frontier(tmp_path)
        assert sorted(table["subject"]) == ["initial", "pca-2", "sae", "untrained"]
