"""Transcoders: from the activations at one hook to those of the same tokens at another one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cache import build_corpus, harvest
from cache.errors import DataError, UsageError
from saes.activations import training_step
from saes.config import ACTIVATIONS, SAEConfig
from saes.controls import fit_reduced_rank
from saes.evaluation import evaluate
from saes.indexing import build_index
from saes.initialise import initialise
from saes.kernels import Dead
from saes.objectives import loss_terms
from saes.presets import PRESETS, jumprelu, relu_l1, topk
from saes.sae import SAE
from saes.splice import attach
from saes.train_config import TrainConfig
from saes.training import train
from tests.corpora import HOOK, OTHER, empty_store, fill, make_corpus
from tests.test_cli import run
from tests.tiny import SENTENCES

D, OUT, F, K = 16, 12, 48, 4
IN_HOOK, OUT_HOOK = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"


def make_transcoder(activation: str = "topk", d_out: int = OUT, **other) -> SAE:
    gen = torch.Generator().manual_seed(0)
    k = K if "topk" in activation else 0
    hooks = {"hook": "blocks.1.mlp.hook_in", "out_hook": "blocks.1.hook_mlp_out"}
    sae = SAE(SAEConfig(d_sae=F, k=k, activation=activation, d_model=D, d_out=d_out, **hooks, **other))
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=gen))
        if sae.cfg.has_threshold:
            sae.threshold.abs_().add_(1.0)
    return sae.requires_grad_(False)


def planted(n: int = 10_000, atoms: int = 24, d: int = 20, d_out: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """x = c V and y = c U of the same sparse c: what a linear MLP does, an atom at a time. Also U, unit rows."""
    gen = torch.Generator().manual_seed(0)
    v, u = torch.randn(atoms, d, generator=gen), torch.randn(atoms, d_out, generator=gen)
    v, u = v / v.norm(dim=1, keepdim=True), u / u.norm(dim=1, keepdim=True)
    which = torch.rand(n, atoms, generator=gen).topk(2, dim=1).indices
    c = torch.zeros(n, atoms).scatter_(1, which, torch.rand(n, 2, generator=gen) + 0.5)
    # far from the origin and in other units: the input is centred, both sides are scaled
    return 30 * (c @ v) + 5.0, 0.02 * (c @ u) - 1.0, u


def test_a_planted_linear_mlp_is_recovered_atom_by_atom() -> None:
    x, y, atoms = planted()
    config = TrainConfig(steps=800, batch_size=256, lr=4e-3, warmup_steps=50, screen="off", log_every=400)
    sae = train((x, y), [topk(d_sae=48, k=2)], config)[0].sae
    assert sae.W_dec.shape == (48, 24) and sae.b_dec.shape == (24,)
    cos = (atoms @ (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)).T).max(1).values
    assert cos.mean() > 0.98
    fvu = ((sae(x) - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert fvu < 0.05


@pytest.mark.parametrize("signed", [False, True])
def test_topk_gradients_with_a_target_of_its_own_equal_dense_autograd(signed: bool) -> None:
    gen = torch.Generator().manual_seed(1)
    activation = "abs_topk" if signed else "topk"
    cfg = SAEConfig(d_sae=40, k=5, activation=activation, auxk=0.25, k_aux=3, d_model=7, d_out=6)
    sae = SAE(cfg).double()
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64))
    x = torch.randn(9, 7, generator=gen, dtype=torch.float64)
    y = torch.randn(9, 6, generator=gen, dtype=torch.float64)
    dead = Dead(torch.tensor([1, 4, 6, 17, 30]), 3)
    loss_terms(cfg, y, training_step(sae, x, dead=dead), dead, 2.0, 1.0).loss.backward()
    got = {n: p.grad.clone() for n, p in sae.named_parameters()}

    sae.zero_grad()
    u = x @ sae.W_enc.T + sae.b_enc
    ids = (u.abs() if signed else u).topk(5, dim=1).indices
    z = u * torch.zeros_like(u).scatter(1, ids, 1.0)
    z = z if signed else z.relu()
    error = z @ sae.W_dec + sae.b_dec - y
    u_dead = u[:, dead.ids]
    kept = (u_dead.abs() if signed else u_dead).topk(3, dim=1).indices
    e_hat = (u_dead * torch.zeros_like(u_dead).scatter(1, kept, 1.0)) @ sae.W_dec[dead.ids]
    e = -error.detach()
    aux = ((e_hat - e) ** 2).sum() / ((e - e.mean(0)) ** 2).sum()
    ((error**2).sum() / (9 * 2.0) + 0.25 * aux).backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_saved_transcoder_loads_bit_equal_with_its_hooks_and_id(activation: str, tmp_path: Path) -> None:
    sae = make_transcoder(activation)
    again = SAE.load(sae.save(tmp_path / "t"))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert again.sae_id == sae.sae_id
    assert (again.cfg.out_hook, again.cfg.d_out, again.cfg.k) == (OUT_HOOK, OUT, sae.cfg.k)
    x = torch.randn(3, 5, D)
    assert torch.equal(again(x), sae(x)) and sae(x).shape == (3, 5, OUT)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batch_topk", "batch_abs_topk"])
def test_sae_lens_loads_our_transcoder_with_equal_outputs(activation: str, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install -e '.[dev]'")
    sae = make_transcoder(activation)
    theirs = sae_lens.SAE.load_from_disk(str(sae.save(tmp_path / "t")))
    assert type(theirs).__name__ == ("Transcoder" if activation == "relu" else "JumpReLUTranscoder")
    x = torch.randn(32, D, generator=torch.Generator().manual_seed(0))
    assert 0 < sae.encode(x).l0().float().mean() < F
    torch.testing.assert_close(theirs(x), sae(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Transcoder", "JumpReLUTranscoder"])
def test_a_transcoder_that_sae_lens_wrote_loads_here(name: str, tmp_path: Path) -> None:
    module = pytest.importorskip("sae_lens.saes.transcoder", reason="sae-lens is not installed")
    theirs = getattr(module, name)(
        getattr(module, f"{name}Config")(d_in=D, d_out=OUT, d_sae=F, apply_b_dec_to_input=False)
    )
    gen = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.5, generator=gen)
    theirs.save_model(tmp_path / "theirs")
    ours, x = SAE.load(tmp_path / "theirs"), torch.randn(20, D, generator=gen)
    assert ours.cfg.transcoder and ours.cfg.d_out == OUT
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_a_skip_transcoder_is_refused_by_its_name(tmp_path: Path) -> None:
    module = pytest.importorskip("sae_lens.saes.transcoder", reason="sae-lens is not installed")
    module.SkipTranscoder(
        module.SkipTranscoderConfig(d_in=D, d_out=OUT, d_sae=F, apply_b_dec_to_input=False)
    ).save_model(tmp_path)
    with pytest.raises(DataError, match="skip_transcoder"):
        SAE.load(tmp_path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    """Rows of two hooks, the second a fixed linear map of the first plus noise; of other widths and norms."""
    rng = np.random.default_rng(0)
    ws = tmp_path_factory.mktemp("ws")
    corpus = make_corpus(ws, rng.integers(20, 60, 40).tolist())
    made = empty_store(ws, corpus, rows_per_shard=500)
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(corpus.n_tokens, 10, generator=gen) @ torch.randn(10, 10, generator=gen) + 3
    fill(made, {HOOK: x, OTHER: 4 * x @ torch.randn(10, 6, generator=gen) - 7})
    return made


_OF_PRESET: dict = {"relu_l1": {"l1": 0.1}, "threshold_atoms": {"space": "scalar"}}


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "gba"])
def test_every_preset_trains_as_a_transcoder_and_comes_back_folded(preset: str, store) -> None:
    more = {"k": 3} if "top" in preset or preset == "matryoshka" else _OF_PRESET.get(preset, {})
    config = TrainConfig(steps=60, batch_size=64, lr=3e-3, log_every=20, screen="off")
    result = train(store, [PRESETS[preset](d_sae=24, **more)], config, hook=HOOK, out_hook=OTHER)[0]
    sae = result.sae
    assert (sae.cfg.hook, sae.cfg.out_hook, sae.cfg.d_model, sae.cfg.d_out) == (HOOK, OTHER, 10, 6)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24), rtol=0, atol=1e-4)
    found = evaluate(sae, store)
    # in the units of the stored rows: a scale that was folded wrongly is off by a factor
    assert found.value("fvu") < 1.0 and found.value("fvu") == pytest.approx(
        result.metrics[-1]["fvu"], rel=0.5
    )


def test_the_folded_transcoder_computes_what_training_computed(store) -> None:
    """Both scales and the shift of the input go into the weights: same latents, same output in other units."""
    from saes.sources import StoreSource
    from saes.trainer import Trainer

    config = TrainConfig(steps=20, batch_size=64, lr=3e-3, screen="off")
    source = StoreSource(store, HOOK, OTHER)
    for cfg in (topk(d_sae=24, k=3), jumprelu(d_sae=24, l0=0.01), PRESETS["gated"](d_sae=24, l1=0.01)):
        cfg = SAEConfig.from_dict(
            cfg.to_dict() | {"d_model": 10, "d_out": 6, "hook": HOOK, "out_hook": OTHER}
        )
        t = Trainer(cfg, config, source.moments(config), torch.device("cpu"), source.target_moments(config))
        rows = next(iter(source.stream(config, None, torch.device("cpu"))))
        t.start(rows.x, rows.target)
        for step in range(20):
            t.step(rows.x, step, rows.target)
        x, _ = t._rows(rows.x, rows.target)
        before = t.sae.encode(x)
        want = t.sae.decode(before) / t.scale_out
        folded = t.finish()
        codes = folded.encode(rows.x)
        assert torch.equal(codes.dense(24) != 0, before.dense(24) != 0)
        torch.testing.assert_close(folded.decode(codes), want.detach(), rtol=1e-3, atol=1e-3)


def test_a_resumed_transcoder_equals_an_uninterrupted_one(store, monkeypatch) -> None:
    from saes import training

    configs = [topk(d_sae=24, k=3), jumprelu(d_sae=24, l0=0.01)]
    config = TrainConfig(steps=16, batch_size=64, lr=3e-3, log_every=4, screen="off", checkpoint_seconds=0.0)
    whole = train(store, configs, config, hook=HOOK, out_hook=OTHER, workspace=store.workspace / "a")

    real, seen = training.Trainer.step, []

    def stops(self, x, step, target=None):
        if step == 9:
            raise KeyboardInterrupt
        seen.append(step)
        real(self, x, step, target)

    monkeypatch.setattr(training.Trainer, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        train(store, configs, config, hook=HOOK, out_hook=OTHER, workspace=store.workspace / "b")
    monkeypatch.setattr(training.Trainer, "step", real)
    resumed = train(store, configs, config, hook=HOOK, out_hook=OTHER, workspace=store.workspace / "b")
    for a, b in zip(whole, resumed, strict=True):
        for name, tensor in a.sae.state_dict().items():
            assert torch.equal(tensor, b.sae.state_dict()[name])
        assert [r["fvu"] for r in a.metrics] == [r["fvu"] for r in b.metrics]


def test_with_the_input_as_target_the_start_is_the_tied_one() -> None:
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9.0)
    tied = SAE(SAEConfig(d_sae=24, k=3, d_model=8))
    free = SAE(SAEConfig(d_sae=24, k=3, d_model=8, d_out=8))
    initialise(tied, x, seed=0)
    initialise(free, x - tied.b_dec.detach(), seed=0, target=x)
    torch.testing.assert_close(free.W_dec, tied.W_dec, rtol=0, atol=0.02)
    torch.testing.assert_close(free.W_enc, tied.W_enc, rtol=0.02, atol=0.02)


def test_reduced_rank_control_equals_pca_of_the_fitted_rows(store) -> None:
    """At full rank it is least squares; below, no other rank-k linear map has a smaller error."""
    rows = [(x, y) for x, y, _ in _pairs(store)]
    x, y = torch.cat([r[0] for r in rows]).double(), torch.cat([r[1] for r in rows]).double()
    whole = fit_reduced_rank(store, HOOK, OTHER, 6)
    xc, yc = x - x.mean(0), y - y.mean(0)
    best = torch.linalg.lstsq(xc, yc).solution
    torch.testing.assert_close(whole(x.float())[0].double(), xc @ best + y.mean(0), rtol=1e-2, atol=0.1)
    fitted = xc @ best
    top = torch.linalg.svd(fitted, full_matrices=False).Vh[:2]
    want = ((yc - fitted @ top.T @ top) ** 2).sum()
    got = ((y - fit_reduced_rank(store, HOOK, OTHER, 2)(x.float())[0].double()) ** 2).sum()
    assert got == pytest.approx(float(want), rel=1e-3)


def _pairs(store):
    from saes.controls import paired_rows

    return paired_rows(store, HOOK, OTHER, batch_size=500, split="train")


@pytest.fixture(scope="module")
def mlp(tiny_model, tmp_path_factory: pytest.TempPathFactory):
    """The tiny model, a store of its MLP's input and output, and a transcoder between them."""
    ws = tmp_path_factory.mktemp("mlp")
    corpus = build_corpus(SENTENCES * 3, tiny_model.tokenizer, context=32, workspace=ws)
    store = harvest(tiny_model, corpus, hooks=[IN_HOOK, OUT_HOOK], workspace=ws)
    config = TrainConfig(steps=80, batch_size=256, lr=3e-3, log_every=40)
    result = train(store, [topk(d_sae=96, k=8)], config, hook=IN_HOOK, out_hook=OUT_HOOK)[0]
    return tiny_model, store, result


def test_an_attached_transcoder_replaces_the_mlp_by_what_it_makes_of_its_input(mlp) -> None:
    model, _, result = mlp
    sae, tokens = result.sae, torch.tensor([[5, 9, 30, 41, 17, 3]])
    clean = model.capture(tokens, [IN_HOOK, OUT_HOOK])
    with torch.no_grad(), attach(model, {OUT_HOOK: sae}, error=False) as a:
        spliced = model.forward(tokens)[0]
        codes = a.codes[OUT_HOOK]
    want = sae.encode(clean[IN_HOOK][0, 1:].float())
    assert torch.equal(codes.dense(96), want.dense(96))
    new = sae.decode(want)

    def put(y: Tensor) -> Tensor:
        return torch.cat([y[:, :1], new[None].to(y.dtype)], dim=1)

    with torch.no_grad(), model.hooked({OUT_HOOK: put}):
        expected = model.forward(tokens)[0]
    assert torch.equal(spliced, expected)


def test_an_unedited_transcoder_with_its_error_term_is_bit_identical_and_differentiable(mlp) -> None:
    model, _, result = mlp
    tokens = torch.tensor([[5, 9, 30, 41, 17, 3]])
    clean = model.forward(tokens)[0]
    with attach(model, {OUT_HOOK: result.sae}) as a:
        spliced = model.forward(tokens)[0]
        spliced[0, -1, 7].backward()
        assert a.codes[OUT_HOOK].values.grad.abs().sum() > 0
    assert torch.equal(spliced, clean)
    with torch.no_grad(), attach(model, {OUT_HOOK: result.sae}) as a:
        a.edit(OUT_HOOK, lambda c: c._replace(values=c.values * 0))
        assert not torch.equal(model.forward(tokens)[0], clean)


def test_a_transcoder_is_refused_where_it_cannot_read_or_write(mlp) -> None:
    model, store, result = mlp
    with (
        pytest.raises(DataError, match="attach it at the hook that it predicts"),
        attach(model, {IN_HOOK: result.sae}),
    ):
        pass
    turned = SAE(SAEConfig.from_dict(result.sae.cfg.to_dict() | {"hook": OUT_HOOK, "out_hook": IN_HOOK}))
    with (
        pytest.raises(DataError, match="must come earlier"),
        torch.no_grad(),
        attach(model, {IN_HOOK: turned}, error=False),
    ):
        model.forward(torch.tensor([[5, 9, 30]]))
    for out, kind in ((IN_HOOK, UsageError), ("blocks.9.hook_mlp_out", Exception)):
        with pytest.raises(kind):
            train(store, [topk(d_sae=32, k=4)], TrainConfig(steps=2), hook=IN_HOOK, out_hook=out)
    with pytest.raises(UsageError, match="raw or scalar"):
        SAEConfig(d_sae=8, k=2, out_hook="x", space="aip")


def test_evaluation_scores_the_target_and_replaces_the_mlp(mlp) -> None:
    model, store, result = mlp
    found = evaluate(result.sae, store, model, max_tokens=300)
    total = spread = 0.0
    x, y = zip(
        *(
            (a.x[IN_HOOK], b.x[OUT_HOOK])
            for a, b in zip(
                store.sequential(IN_HOOK, batch_size=64, split="heldout"),
                store.sequential(OUT_HOOK, batch_size=64, split="heldout"),
                strict=True,
            )
        ),
        strict=True,
    )
    x, y = torch.cat(x), torch.cat(y)
    total, spread = ((result.sae(x) - y) ** 2).sum(), ((y - y.mean(0)) ** 2).sum()
    assert found.value("fvu") == pytest.approx(float(total / spread), rel=1e-4)
    linear = [r["subject"] for r in found.rows if r["subject"].startswith("linear-")]
    assert linear and found.value("fvu") < found.value("fvu", "untrained")
    assert np.isfinite(found.value("delta_ce")) and found.value("ce", "sae") != found.value(
        "ce_clean", "model"
    )


def test_the_index_of_a_transcoder_lists_the_codes_of_its_input(mlp) -> None:
    model, store, result = mlp
    build_index(result.sae, store, model, sae_path=result.path)
    from saes import FeatureIndex

    frame, total = FeatureIndex.open(store.workspace, result.sae.sae_id).list_features(limit=5)
    assert total > 80 and frame["density"].iloc[0] > 0


def test_a_relu_transcoder_needs_its_sparsity_term_too(store) -> None:
    with pytest.raises(UsageError, match="l1"):
        train(store, [relu_l1(d_sae=8, l1=0.0)], TrainConfig(steps=2), hook=HOOK, out_hook=OTHER)


def test_the_command_line_trains_evaluates_and_goes_on_from_a_transcoder(mlp, capsys) -> None:
    _, store, _ = mlp
    more = ["--steps", "4", "--batch-size", "64", "-w", str(store.workspace), "--json"]
    hooks = ["--hook", IN_HOOK, "--out-hook", OUT_HOOK]
    code, out, _ = run(capsys, "train", store.path.name, *hooks, "--d-sae", "32", "--k", "4", *more)
    first = json.loads(out)[0]
    assert code == 0 and SAE.load(first["path"]).cfg.out_hook == OUT_HOOK
    again = ["--warm-start", first["sae_id"], "--set", "train.lr=1e-9"]
    code, out, _ = run(capsys, "train", store.path.name, *hooks, "--d-sae", "32", "--k", "4", *again, *more)
    assert code == 0 and json.loads(out)[0]["path"] != first["path"]
    code, _, err = run(capsys, "train", store.path.name, *hooks, "--d-sae", "64", "--k", "4", *again, *more)
    assert code == 1 and "d_sae 32" in err
    code, _, err = run(
        capsys, "train", store.path.name, "--hook", IN_HOOK, "--out-hook", "x", "--d-sae", "64", *more
    )
    assert code == 2 and "--out-hook is one of" in err
    options = ["--max-tokens", "0", "-w", str(store.workspace), "--json"]
    code, out, _ = run(capsys, "evaluate", first["sae_id"], store.path.name, *options)
    assert code == 0 and {"fvu", "l0"} <= {r["metric"] for r in json.loads(out)}


def test_the_inspector_holds_a_transcoder_against_its_target(mlp) -> None:
    from app.inspection import inspect_text

    model, store, result = mlp
    mean = store.stats(OUT_HOOK, split="train", skip="first").mean
    found = inspect_text(model, result.sae, SENTENCES[0], mean=mean)
    ids = torch.tensor([model.tokenizer(SENTENCES[0], add_special_tokens=False)["input_ids"]])
    seen = model.capture(ids, [IN_HOOK, OUT_HOOK])
    y = seen[OUT_HOOK][0, 1:].float()
    error = ((result.sae(seen[IN_HOOK][0, 1:].float()) - y) ** 2).sum(1) / (
        (y - torch.as_tensor(mean)) ** 2
    ).sum(1)
    np.testing.assert_allclose(found.fvu[1:], error.numpy(), rtol=1e-3)


def test_a_transcoder_works_in_every_way_to_run_the_model(mlp, tiny_dir: Path) -> None:
    """nnsight and the plain Hugging Face model read and write at the same places as TransformerLens."""
    from transformers import AutoModelForCausalLM

    from cache import load_model

    model, _, result = mlp
    tokens = torch.tensor([[5, 9, 30, 41, 17, 3]])
    with torch.no_grad(), attach(model, {OUT_HOOK: result.sae}, error=False):
        want = model.forward(tokens)[0]
    other = load_model(tiny_dir, backend="nnsight", device="cpu")
    with torch.no_grad(), attach(other, {OUT_HOOK: result.sae}, error=False):
        torch.testing.assert_close(other.forward(tokens)[0], want, rtol=1e-3, atol=1e-3)
    plain = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()
    with torch.no_grad(), attach(plain, {OUT_HOOK: result.sae}, error=False, skip_first=True):
        torch.testing.assert_close(plain(tokens).logits, want, rtol=1e-3, atol=1e-3)


def test_other_numbers_of_tensors_than_one_or_two_are_one_line() -> None:
    x = torch.zeros(8, 4)
    with pytest.raises(UsageError, match="3 tensors"):
        train((x, x, x), [SAEConfig(d_sae=8, k=2)], TrainConfig(steps=1, batch_size=4))
