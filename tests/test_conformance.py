"""One suite over every activation and preset: what a user may rely on whichever SAE they choose.

Gradients of every loss term against a dense float64 reference, codes and shapes, files, folding, resume, and planted
atoms of synthetic suite S0 (48 unit atoms in 24 dimensions, exactly 2 active, magnitudes in [0.5, 1.5]).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cache.errors import UsageError
from saes import activations, training
from saes.activations import training_step
from saes.aip import second_moment
from saes.config import ACTIVATIONS, SAEConfig
from saes.kernels import Dead
from saes.objectives import loss_terms
from saes.presets import PRESETS
from saes.sae import SAE, fold_input_scale
from saes.sources import TensorSource
from saes.train_config import TrainConfig
from saes.trainer import Trainer
from saes.training import train

D, F, B, K = 7, 40, 9, 5
EPS = 0.8
ARGUMENTS = {
    "relu": {"l1": 0.3}, "gated": {"l1": 0.3}, "jumprelu": {"l0": 0.2},
    **{a: {"k": K, "auxk": 0.5} for a in ACTIVATIONS if "topk" in a},
}  # fmt: skip
SMALL = {name: {"k": 3} if "top" in name or name == "matryoshka" else {} for name in PRESETS}


def make(activation: str, seed: int = 0, *, double: bool = False, **other) -> SAE:
    """A random SAE with thresholds that let about a quarter of the latents through."""
    gen = torch.Generator().manual_seed(seed)
    cfg = SAEConfig(
        d_sae=F, d_model=D, activation=activation, hook="h", space="raw", **(ARGUMENTS[activation] | other)
    )
    sae = SAE(cfg)
    sae = sae.double() if double else sae
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64))
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        if cfg.has_threshold:
            sae.threshold.copy_(
                sae.threshold.abs() + 1 if activation == "jumprelu" else torch.full((F,), 2.0)
            )
    return sae


def rows(n: int = B, seed: int = 1, *, double: bool = False) -> Tensor:
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x if double else x.float()


# ---- gradients against the definition ----


def _keep(u: Tensor, cfg: SAEConfig) -> Tensor:
    size = u.detach().abs() if cfg.signed else u.detach()
    if cfg.fixed_k:
        return torch.zeros_like(u).scatter(1, size.topk(cfg.k, dim=1).indices, 1.0)
    return (
        torch.zeros_like(u).flatten().scatter(0, size.flatten().topk(cfg.k * len(u)).indices, 1.0).view_as(u)
    )


def _dense(p: dict[str, Tensor], x: Tensor, cfg: SAEConfig) -> dict[str, Tensor]:
    """The definitions with dense [B, F] tensors; straight-through terms as products whose value is 0."""
    u = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    out = {}
    if cfg.has_k:
        z = u * _keep(u, cfg)
        z = z if cfg.signed else z.relu()
    elif cfg.activation == "relu":
        z = u.relu()
        out["sparsity"] = z.sum() / len(x)
    elif cfg.activation == "jumprelu":
        theta = p["threshold"]
        near = ((u - theta).abs() < EPS / 2).double().detach()
        moves = theta - theta.detach()
        z = u * (u > theta) - theta.detach() / EPS * near * moves
        out["sparsity"] = ((u > theta).double() - near / EPS * moves).sum() / len(x)
    else:
        linear = (x - p["b_dec"]) @ p["W_enc"].T
        z = (linear * p["r_mag"].exp() + p["b_mag"]).relu() * (u > 0)
        out["sparsity"] = u.relu().sum() / len(x)
        out["gate"] = u.relu() @ p["W_dec"].detach() + p["b_dec"].detach()
    if cfg.multi_topk:
        wide = u * _keep(u, replace(cfg, k=4 * cfg.k, multi_topk=0.0))
        out["wide"] = (wide if cfg.signed else wide.relu()) @ p["W_dec"] + p["b_dec"]
    edges = (*cfg.matryoshka, cfg.d_sae)
    nested = [z[:, :w] @ p["W_dec"][:w] + p["b_dec"] for w in edges]
    return out | {"u": u, "z": z, "x_hat": nested[-1], "prefixes": torch.stack(nested[:-1] or nested, 1)}


def _dense_loss(term: str, p: dict[str, Tensor], x: Tensor, cfg: SAEConfig, dead: Dead | None) -> Tensor:
    out, target = _dense(p, x, cfg), x.detach()
    error = out["x_hat"] - target
    if term == "mse":
        return (error**2).sum() / len(x)
    if term in ("l1", "l0"):
        return getattr(cfg, term) * out["sparsity"]
    if term == "l0_target":
        return cfg.l0 * (out["sparsity"] / cfg.l0_target - 1) ** 2
    if term == "gate":
        return ((out["gate"] - target) ** 2).sum() / len(x)
    if term == "matryoshka":
        total = (error**2).sum() + ((out["prefixes"] - target[:, None]) ** 2).sum()
        return total / len(x) / (1 + len(cfg.matryoshka))
    if term == "multi_topk":
        return ((error**2).sum() + cfg.multi_topk * ((out["wide"] - target) ** 2).sum()) / len(x)
    assert dead is not None
    ud = out["u"][:, dead.ids]
    best = (ud.abs() if cfg.signed else ud).topk(dead.k_aux, dim=1).indices
    e_hat = (ud * torch.zeros_like(ud).scatter(1, best, 1.0)) @ p["W_dec"][dead.ids]
    e = -error.detach()
    share = min(1.0, len(dead.ids) / cfg.aux_width())
    return cfg.auxk * share * ((e_hat - e) ** 2).sum() / ((e - e.mean(0)) ** 2).sum()


TERMS = [
    *((a, "mse", {}) for a in ACTIVATIONS),
    *((a, "auxk", {"auxk": 0.7}) for a in ACTIVATIONS if a != "gated"),
    *((a, "matryoshka", {"matryoshka": (4, 11)}) for a in ACTIVATIONS if "topk" in a),
    *((a, "multi_topk", {"multi_topk": 0.3}) for a in ACTIVATIONS if "topk" in a),
    ("relu", "l1", {}), ("gated", "l1", {}), ("gated", "gate", {}), ("jumprelu", "l0", {}),
    ("jumprelu", "l0_target", {"l0_target": 3.0}),
]  # fmt: skip


# the dense switch is for thresholds: how many latents a TopK keeps is set
CASES = [(*t, path) for t in TERMS for path in ("sparse", "dense") if path == "sparse" or "topk" not in t[0]]


@pytest.mark.parametrize(
    ("activation", "term", "more", "path"), CASES, ids=[f"{a}-{t}-{p}" for a, t, _, p in CASES]
)
def test_gradient_of_each_loss_term_equals_dense_autograd(
    activation: str, term: str, more: dict, path: str, monkeypatch
) -> None:
    monkeypatch.setattr(activations, "DENSE_SHARE", 2.0 if path == "sparse" else -1.0)
    sae, x = make(activation, double=True, **more), rows(double=True).requires_grad_()
    cfg, dead = sae.cfg, None
    if term == "auxk":
        dead = Dead(torch.tensor([1, 4, 6, 17, 30, 31]), 3)
    out = training_step(sae, x, dead=dead, eps=EPS)
    assert (out.indices is None) == (path == "dense")
    # the loss is a sum: a term is what is left when the others are taken away
    target = x.detach()
    if term == "mse":
        got = ((out.x_hat - target) ** 2).sum() / B
    elif term == "gate":
        assert out.gate is not None
        got = ((out.gate - target) ** 2).sum() / B
    elif term in ("matryoshka", "multi_topk"):
        got = loss_terms(cfg, target, out, None, 1.0, 1.0).loss
    else:
        plain = out._replace(sparsity=None if out.sparsity is None else out.sparsity.detach() * 0)
        without = loss_terms(cfg, target, plain, None, 1.0, 1.0).loss
        if cfg.l0_target:
            without = without - cfg.l0
        got = loss_terms(cfg, target, out, dead, 1.0, 1.0).loss - without
    if term == "auxk" and out.sparsity is not None:
        weight = cfg.l1 or cfg.l0
        got = got - weight * out.sparsity
    got.backward()
    p = {n: t.detach().clone().requires_grad_() for n, t in sae.named_parameters()}
    x2 = x.detach().clone().requires_grad_()
    want = _dense_loss(term, p, x2, cfg, dead)
    want.backward()
    torch.testing.assert_close(got, want)
    for name, b in (*p.items(), ("x", x2)):
        a = x if name == "x" else getattr(sae, name)
        zero = torch.zeros_like(b)
        torch.testing.assert_close(
            zero if a.grad is None else a.grad,
            zero if b.grad is None else b.grad,
            msg=lambda m, n=name: f"gradient of {n}: {m}",
        )
    moved = {n for n, t in p.items() if t.grad is not None and t.grad.abs().sum() > 0}
    if term in ("auxk", "matryoshka", "multi_topk"):
        assert {"W_enc", "W_dec"} <= moved
    if (activation, term) in (("jumprelu", "mse"), ("jumprelu", "l0"), ("jumprelu", "l0_target")):
        assert "threshold" in moved


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encode_is_differentiable_in_the_input(activation: str) -> None:
    sae, x = make(activation, double=True), rows(double=True).requires_grad_()
    weight = torch.randn(F, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (sae.encode(x).dense(F) * weight).sum().backward()
    fires = sae.encode(x).dense(F).detach() != 0
    scale = sae.r_mag.exp() if activation == "gated" else torch.ones(F)
    want = (fires * weight * scale) @ sae.W_enc
    torch.testing.assert_close(x.grad, want)


# ---- codes ----


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_codes_have_the_stated_types_and_decode_to_the_reconstruction(activation: str) -> None:
    sae, x = make(activation).requires_grad_(False), rows(12)
    codes = sae.encode(x.view(3, 4, D))
    assert codes.values.dtype == torch.float32 and codes.indices.dtype == torch.int32
    assert codes.n_rows == 12 and codes.dense(F).shape == (12, F)
    if sae.cfg.fixed_k:
        assert codes.offsets is None and codes.values.shape == (12, K)
    else:
        assert codes.offsets is not None and codes.offsets.dtype == torch.int64
        assert codes.offsets[-1] == len(codes.values) == len(codes.indices)
    want = codes.dense(F) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae(x.view(3, 4, D)), want.view(3, 4, D), rtol=1e-5, atol=1e-5)
    assert (codes.l0() == (codes.dense(F) != 0).sum(1)).all()
    assert sae.cfg.signed or not (codes.values < 0).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_codes_follow_the_definition(activation: str) -> None:
    sae, x = make(activation).requires_grad_(False), rows(50)
    u = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    if sae.cfg.fixed_k:
        want = u * _keep(u, sae.cfg)
        want = want if sae.cfg.signed else want.relu()
    elif activation == "gated":
        want = ((u - sae.b_enc) * sae.r_mag.exp() + sae.b_mag).relu() * (u > 0)
    else:
        theta = sae.threshold if sae.cfg.has_threshold else torch.zeros(F)
        want = u * ((u.abs() if sae.cfg.signed else u) > theta)
    torch.testing.assert_close(sae.encode(x).dense(F), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_batch_size_does_not_change_codes(activation: str, monkeypatch) -> None:
    sae, x = make(activation).requires_grad_(False), rows(64)
    whole = sae.encode(x)
    assert 0 < whole.l0().float().mean() < F
    for size in (1, 7):
        parts = torch.cat([sae.encode(x[i : i + size]).dense(F) for i in range(0, 64, size)])
        torch.testing.assert_close(parts, whole.dense(F), rtol=1e-5, atol=1e-6)
    for place in ("selection", "top_products"):
        monkeypatch.setattr(f"saes.{place}.CHUNK_BYTES", F * 4 * 5)
    blocks = sae.encode(x)
    torch.testing.assert_close(blocks.dense(F), whole.dense(F), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a not in ("topk", "abs_topk")])
def test_rows_on_which_nothing_fires_give_empty_codes_and_b_dec(activation: str) -> None:
    sae = make(activation).requires_grad_(False)
    for p in (sae.W_enc, sae.b_enc):
        p.fill_(0)
    if activation == "gated":
        sae.b_enc.fill_(-1.0)
    x = rows(4)
    codes = sae.encode(x)
    assert codes.n_rows == 4 and len(codes.values) == 0 and codes.l0().tolist() == [0] * 4
    torch.testing.assert_close(sae(x), sae.b_dec.expand(4, D))
    assert sae.encode(x[:0]).n_rows == 0 and sae(x[:0]).shape == (0, D)


# ---- weights: files, identity, folding ----


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_saved_sae_loads_bit_equal_with_the_same_id(activation: str, tmp_path: Path) -> None:
    sae = make(activation).requires_grad_(False)
    again = SAE.load(sae.save(tmp_path / "sae"))
    assert again.state_dict().keys() == sae.state_dict().keys()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.sae_id == sae.sae_id
    assert (again.cfg.activation, again.cfg.k, again.cfg.d_sae) == (activation, sae.cfg.k, F)
    x = rows(30)
    assert torch.equal(again.encode(x).values, sae.encode(x).values) and torch.equal(again(x), sae(x))


@pytest.mark.parametrize(
    ("activation", "sae_id"), [("topk", "9be633e1948a1a23"), ("abs_topk", "8a1300359d2ccab3")]
)
def test_the_id_of_a_published_sae_never_changes(activation: str, sae_id: str) -> None:
    """Labels are filed under it. The values are those of the first version."""
    cfg = SAEConfig(
        d_sae=6, k=2, activation=activation, d_model=3, hook="blocks.1.hook_resid_post", model_sha="ab"
    )
    sae = SAE(cfg)
    with torch.no_grad():
        for i, p in enumerate((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)):
            p.copy_((torch.arange(p.numel()).view(p.shape) - i * 2) / 4)
    assert sae.sae_id == sae_id


@pytest.mark.parametrize("activation", ["jumprelu", "gated"])
def test_every_parameter_is_in_the_id(activation: str) -> None:
    sae = make(activation).requires_grad_(False)
    ids = {sae.sae_id}
    for p in sae.parameters():
        p.view(-1)[0] += 0.5
        ids.add(sae.sae_id)
    assert len(ids) == 1 + len(list(sae.parameters()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_folding_the_input_scale_changes_neither_selection_nor_reconstruction(activation: str) -> None:
    scaled, folded, s = make(activation), make(activation), 0.0625
    fold_input_scale(folded, s)
    x = rows(60) * 16
    before, after = scaled.encode(x * s).dense(F), folded.encode(x).dense(F)
    assert torch.equal(before != 0, after != 0)
    torch.testing.assert_close(before / s, after, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled(x * s) / s, folded(x), rtol=1e-4, atol=1e-4)


# ---- training ----


def s0(seed: int, n: int = 6000) -> tuple[Tensor, Tensor]:
    """Rows of suite S0 and its atoms `[48, 24]`."""
    gen = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(48, 24, generator=gen), dim=1)
    ids = torch.rand(n, 48, generator=gen).topk(2, dim=1).indices
    codes = torch.zeros(n, 48).scatter_(1, ids, 0.5 + torch.rand(n, 2, generator=gen))
    return codes @ atoms, atoms


# weights of the sparsity terms that suit magnitudes near 1 and an L0 of 2
S0_JOB: dict[str, dict] = {
    # target frequencies in place of a k; its latents split over more than the 48 atoms
    "gba": {"d_sae": 144, "gba_groups": 4, "gba_htf": 0.1, "gba_ltf": 0.02},
    "relu_l1": {"l1": 1.0}, "gated": {"l1": 2.0}, "jumprelu": {"l0": 0.03}, "threshold_atoms": {"l0": 0.03}, "matryoshka": {"k": 2, "matryoshka": (24,)},
    **{name: {"k": 2} for name in ("topk", "abs_topk", "batch_topk", "batch_abs_topk")},
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_preset_finds_the_planted_atoms(seed: int) -> None:
    assert set(S0_JOB) == set(PRESETS)
    x, atoms = s0(seed)
    config = TrainConfig(
        steps=600, batch_size=256, lr=8e-3, warmup_steps=20, screen="off", seed=seed, log_every=600
    )
    for result in train(x, [PRESETS[p](**({"d_sae": 48} | more)) for p, more in S0_JOB.items()], config):
        sae = result.sae
        cosine = torch.nn.functional.normalize(sae.W_dec, dim=1) @ atoms.T
        found = (cosine.abs() if sae.cfg.signed else cosine).max(0).values.mean().item()
        assert found > 0.95, f"{sae.cfg.label} found its atoms to a mean cosine of {found:.3f}"
        l0 = sae.encode(x).l0().float().mean().item()
        assert abs(l0 / 2 - 1) < 0.05 if sae.cfg.has_k else 1 < l0 < 6, (sae.cfg.label, l0)


@pytest.fixture(scope="module")
def small() -> Tensor:
    return s0(5, 3000)[0] * 3 + 1


def test_a_killed_run_of_every_preset_goes_on_bit_for_bit(small, tmp_path: Path, monkeypatch) -> None:
    job = [PRESETS[name](d_sae=64, **more) for name, more in SMALL.items()]
    config = TrainConfig(steps=60, batch_size=64, screen="off", log_every=10, dead_window_tokens=300, lr=3e-3)
    whole = train(small, job, config, workspace=tmp_path / "a")
    real, calls = training.save_checkpoint, []

    def stop_after_some(run: Path, checkpoint):
        path = real(run, checkpoint)
        calls.append(checkpoint.step)
        if len(calls) == 37:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(training, "save_checkpoint", stop_after_some)
    often = TrainConfig(**(config.to_dict() | {"checkpoint_seconds": -1.0}))
    with pytest.raises(KeyboardInterrupt):
        train(small, job, often, workspace=tmp_path / "b")
    monkeypatch.setattr(training, "save_checkpoint", real)
    resumed = train(small, job, config, workspace=tmp_path / "b")
    for a, b in zip(whole, resumed, strict=True):
        for name, tensor in a.sae.state_dict().items():
            assert torch.equal(tensor, b.sae.state_dict()[name]), f"{a.sae.cfg.label}: {name}"
        keep = ("step", "fvu", "auxk", "l0", "n_dead", "sparsity")
        assert [[r[k] for k in keep] for r in a.metrics] == [[r[k] for k in keep] for r in b.metrics]


@pytest.mark.parametrize("preset", PRESETS)
def test_steps_keep_decoder_rows_unit_and_thresholds_at_or_above_zero(preset: str, small) -> None:
    cfg = PRESETS[preset](d_sae=64, d_model=24, **SMALL[preset])
    config = TrainConfig(steps=30, batch_size=100, screen="off", lr=0.05, warmup_steps=1)
    t = Trainer(cfg, config, TensorSource(small).moments(config), torch.device("cpu"))
    if cfg.space == "aip":
        with pytest.raises(UsageError, match="whiten before start"):
            t.start(small)
        t.whiten(second_moment([small], 24, len(small)).aip())
    t.start(small)
    for step in range(6):
        t.step(small[step * 100 : (step + 1) * 100], step)
        # GBA ties its decoder to unit encoder rows: it is a_m w_m once the run has ended
        unit = t.sae.W_enc if cfg.bias_rule == "gba" else t.sae.W_dec
        assert (unit.norm(dim=1) - 1).abs().max() < 1e-5
        if cfg.has_threshold:
            assert (t.sae.threshold >= 0).all()
    metrics = t.metrics()
    assert all(v == v and abs(v) < float("inf") for v in metrics.values())
