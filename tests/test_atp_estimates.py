"""Attribution patching against what it claims to equal: exact effects where the model allows, loops, brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cache.errors import UsageError
from probes.attribution.atp import AtPStar
from probes.attribution.patching import ExactPatching
from probes.attribution.qk_fix import Attention, key_effects, query_effects
from saes import SAE, attach, presets
from tests.atp_models import linear_model, pair, random_pair, tiny_family

KINDS = ("q", "k", "v", "z", "mlp", "resid", "attn_out", "mlp_out")
LINEAR = ("v", "z", "mlp", "resid", "attn_out", "mlp_out")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_family("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return linear_model(tmp_path_factory.mktemp("linear"))


# --------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("positions", ["each", "sum"])
def test_on_a_linear_model_the_estimate_is_the_effect(linear: Any, positions: str) -> None:
    method = AtPStar(linear, nodes=LINEAR, positions=positions, qk_fix=False, grad_drop=False)
    example = random_pair()
    scores, truth = method.attribute(example), ExactPatching(method, example).effects()
    assert np.abs(truth).max() > 0.1
    assert np.allclose(scores.signed, truth, atol=1e-4 * np.abs(truth).max())
    assert np.allclose(scores.score, np.abs(scores.signed))


def attends(hf: Any, strength: float = 1.0) -> None:
    """Let the last layer attend: everything after its softmax stays linear."""
    torch.nn.init.normal_(hf.model.layers[-1].self_attn.q_proj.weight, std=0.2 * strength)


def test_the_qk_fix_is_exact_where_all_after_the_softmax_is_linear(tmp_path: Path) -> None:
    model, example = linear_model(tmp_path, attends), random_pair()
    last = lambda s: s.frame()["layer"].to_numpy() == 2  # noqa: E731
    fixed = AtPStar(model, nodes=("q", "k"), grad_drop=False)
    plain = AtPStar(model, nodes=("q", "k"), grad_drop=False, qk_fix=False)
    scores, truth = fixed.attribute(example), ExactPatching(fixed, example).effects()
    here = last(scores)
    assert np.allclose(scores.signed[here], truth[here], atol=1e-4 * np.abs(truth).max())
    assert not np.allclose(
        plain.attribute(example).signed[here], truth[here], atol=0.02 * np.abs(truth).max()
    )


def test_a_saturated_head_is_missed_by_atp_and_found_by_the_fix(tmp_path: Path) -> None:
    model, example = linear_model(tmp_path, lambda hf: attends(hf, 1000.0)), random_pair()
    fixed = AtPStar(model, nodes=("q", "k"), grad_drop=False)
    space = fixed.space(fixed.targets(example))
    attention = fixed.attention(fixed.case(space, fixed.targets(example)), 2)
    scores = attention.clean_scores().masked_fill(~attention.mask, -torch.inf)[0, :, -1].topk(2).values
    heads = (scores[:, 0] - scores[:, 1] >= 95).numpy()
    assert heads.any(), "logit gap of 95"
    got, truth = fixed.attribute(example), ExactPatching(fixed, example).effects()
    frame = got.space.frame()
    saturated = ((frame["layer"] == 2) & (frame["kind"] == "q") & (frame["pos"] == 8)).to_numpy()
    plain = AtPStar(model, nodes=("q", "k"), grad_drop=False, qk_fix=False).attribute(example)
    assert np.abs(plain.signed[saturated][heads]).max() < 1e-20
    layer = (frame["layer"] == 2).to_numpy()
    assert np.allclose(got.signed[layer], truth[layer], atol=1e-4 * np.abs(truth[layer]).max())
    moved = np.abs(truth[layer & (frame["kind"] == "k").to_numpy()]).max()
    assert moved > 0.1, "patching a key flips the saturated softmax"


# ------------------------------------------------------------------------------------- QK fix alone


def brute_force(a: Attention, g: Tensor) -> tuple[Tensor, Tensor]:
    """Each query and each key replaced by itself, the softmax computed again, in float64."""
    clean = a.pattern(a.clean_scores())
    b, t, h, _ = a.q.shape
    q_effect, k_effect = torch.zeros(b, t, h), torch.zeros(b, t, a.k.shape[2])
    for i in range(t):
        for head in range(h):
            q = a.q.clone()
            q[:, i, head] = a.q_noise[:, i, head]
            q_effect[:, i, head] = ((a.pattern(a.scores(q, a.k)) - clean) * g[0]).sum((1, 2, 3))
        for head in range(a.k.shape[2]):
            k = a.k.clone()
            k[:, i, head] = a.k_noise[:, i, head]
            k_effect[:, i, head] = ((a.pattern(a.scores(a.q, k)) - clean) * g[0]).sum((1, 2, 3))
    return q_effect, k_effect


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("size", [1.0, 12.0])
def test_query_and_key_fix_equal_brute_force(window: int | None, softcap: float | None, size: float) -> None:
    g = torch.Generator().manual_seed(0)
    t, mask = 7, torch.ones(7, 7, dtype=torch.bool).tril()
    mask = mask & ~torch.ones(7, 7, dtype=torch.bool).tril(-window) if window else mask
    q, q2 = (size * torch.randn(2, t, 6, 4, generator=g).double() for _ in range(2))
    k, k2, v = (torch.randn(2, t, 3, 4, generator=g).double() for _ in range(3))
    a = Attention(
        q=q, k=k, v=v, q_noise=q2, k_noise=k2, mask=mask[None, None], scale=0.5, softcap=softcap
    )  # fmt: skip
    grad = torch.randn(1, 2, 6, t, t, generator=g).double().masked_fill(~mask, 0)
    q_want, k_want = brute_force(a, grad)
    assert torch.allclose(query_effects(a, grad)[0].float(), q_want, atol=1e-5)
    assert torch.allclose(key_effects(a, grad)[0].float(), k_want, atol=1e-5)
    # In float32, with logits to 100 apart, the closed form keeps its digits.
    single = Attention(**{n: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in vars(a).items()})  # fmt: skip
    assert torch.allclose(key_effects(single, grad.float())[0], k_want, atol=2e-3 * float(k_want.abs().max()))


def test_a_key_fix_near_one_neither_overflows_nor_vanishes() -> None:
    k = torch.zeros(1, 2, 1, 1)
    a = Attention(
        q=torch.ones(1, 2, 1, 1), k=k + torch.tensor([[[[200.0]], [[0.0]]]]), v=k, q_noise=k, k_noise=k - 300,
        mask=torch.ones(2, 2, dtype=torch.bool).tril()[None, None], scale=1.0,
    )  # fmt: skip
    g = torch.tensor([[0.0, 0.0], [1.0, 3.0]])[None, None, None]
    effect = key_effects(a, g)[0, 0, :, 0]
    assert torch.allclose(effect, torch.tensor([2.0, 0.0])), (
        "taking the key away moves all weight to the other"
    )


# ---------------------------------------------------------------------------------------- GradDrop


def looped_graddrop(model: Any, example: Any, hook: str, dropped: int | None) -> Tensor:
    """Gradient at a hook with both writes of one layer detached: a plain forward and backward."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    edits: dict[str, Any] = {"blocks.0.hook_resid_pre": lambda x: x.detach().requires_grad_()}
    edits |= {hook: keep}
    with model.hooked(edits):
        if dropped is None:
            logits = model(torch.tensor([example.clean]))
        else:
            stop = {f"blocks.{dropped}.hook_{n}_out": lambda x: x.detach() for n in ("attn", "mlp")}
            with model.hooked(stop):
                logits = model(torch.tensor([example.clean]))
    value = logits[0, -1, 7] - logits[0, -1, 8]
    return torch.autograd.grad(value, kept[0], allow_unused=True, materialize_grads=True)[0]


@pytest.mark.parametrize("kind", ["z", "v", "mlp", "resid", "attn_out", "mlp_out"])
def test_graddrop_in_one_backward_equals_a_loop_over_layers(llama: Any, kind: str) -> None:
    example = random_pair()
    method = AtPStar(llama, nodes=(kind,), qk_fix=False)
    scores = method.attribute(example)
    targets = method.targets(example)
    case = method.case(method.space(targets), targets)
    for number, block in enumerate(scores.space.blocks):
        change = case.change(block)[0]
        rows = [looped_graddrop(llama, example, block.hook, d) for d in range(3)]
        if kind != "resid":
            assert rows[block.layer].abs().max() == 0, (
                "a layer's own writes have no gradient when it is dropped"
            )
        each = [(r[0].unflatten(-1, (block.n, -1)) * change).sum(-1).abs() for r in rows]
        want = torch.stack(each).sum(0) / (3 if kind == "resid" else 2)
        got = scores.score[scores.space.offsets[number] : scores.space.offsets[number + 1]]
        assert np.allclose(got, want.flatten().numpy(), rtol=1e-3, atol=1e-4 * float(want.max() + 1e-9)), (
            block
        )


@pytest.mark.parametrize("site", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out"])
def test_graddrop_goes_through_an_sae_that_takes_the_place_of_the_stream(llama: Any, site: str) -> None:
    example, hook = random_pair(), f"blocks.1.{site}"
    torch.manual_seed(0)
    sae = SAE(presets.topk(d_sae=48, k=6, d_model=32, hook=hook))
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(48, 32), dim=1))
    sae.requires_grad_(False)
    method = AtPStar(llama, nodes=("z",), saes={hook: sae}, error=False, qk_fix=False)
    scores, targets = method.attribute(example), method.targets(example)
    case = method.case(method.space(targets), targets)
    block = scores.space.blocks[0]
    change = case.change(block)[0]
    with attach(llama, {hook: sae}, error=False):
        rows = [looped_graddrop(llama, example, block.hook, d) for d in range(3)]
    want = sum((r[0].unflatten(-1, (block.n, -1)) * change).sum(-1).abs() for r in rows) / 2
    got = scores.score[: scores.space.offsets[1]]
    assert block.layer == 0 and float(want.max()) > 1e-3
    assert np.allclose(got, want.flatten().numpy(), rtol=1e-3, atol=1e-4 * float(want.max()))


def test_graddrop_on_a_model_of_one_layer_is_refused_and_not_all_zero(tmp_path: Path) -> None:
    model = tiny_family("llama", tmp_path, num_hidden_layers=1)
    with pytest.raises(UsageError, match="grad_drop=False"):
        AtPStar(model)
    assert AtPStar(model, grad_drop=False).attribute(random_pair()).score.max() > 0


def test_memory_cap_does_not_change_the_scores(llama: Any) -> None:
    small, large = (AtPStar(llama, nodes=KINDS, batch=b).attribute(random_pair()) for b in (1, 64))
    assert np.allclose(small.score, large.score, rtol=1e-4, atol=1e-5)


def test_two_paths_that_cancel_are_seen_by_graddrop_only(tmp_path: Path) -> None:
    def undo(hf: Any) -> None:
        """Layer 1 writes minus what it reads, so nothing of the stream passes; the last layer writes nothing."""
        hf.model.layers[0].self_attn.o_proj.weight.zero_()
        for layer in hf.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        mlp = hf.model.layers[1].mlp
        mlp.up_proj.weight.zero_()
        mlp.up_proj.weight[:32] = torch.eye(32)
        mlp.down_proj.weight[:, :32] = -torch.eye(32)

    model, example = linear_model(tmp_path, undo), random_pair(first=6, length=8)
    nodes = ("mlp_out",)
    plain = AtPStar(model, nodes=nodes, qk_fix=False, grad_drop=False).attribute(example)
    drop = AtPStar(model, nodes=nodes, qk_fix=False).attribute(example)
    first = (plain.space.frame()["layer"] == 0).to_numpy()
    assert np.abs(plain.score[first]).max() < 1e-5
    assert np.abs(drop.score[first]).max() > 0.1


# ------------------------------------------------------------------------- batches, lengths, methods


def test_a_batch_of_padded_pairs_equals_one_pair_at_a_time(llama: Any) -> None:
    pairs = [random_pair(n, seed=n) for n in (6, 9, 12)]
    method = AtPStar(llama, nodes=KINDS, positions="sum")
    together = method.attribute(pairs)
    apart = [method.attribute(p) for p in pairs]
    assert np.allclose(together.score, np.mean([s.score for s in apart], 0), rtol=1e-3, atol=1e-4)
    assert np.allclose(together.signed, np.mean([s.signed for s in apart], 0), rtol=1e-3, atol=1e-4)


def test_absolute_values_are_taken_before_the_mean_over_pairs(linear: Any) -> None:
    one = random_pair()
    back = pair(list(one.noise), list(one.clean))
    scores = AtPStar(linear, nodes=LINEAR, qk_fix=False, grad_drop=False).attribute([one, back])
    assert np.abs(scores.score).max() > 0.1
    assert np.abs(scores.signed).max() < 1e-4 * scores.score.max(), (
        "opposite effects cancel in the signed mean only"
    )


def test_pairs_of_several_lengths_need_summed_positions(llama: Any) -> None:
    with pytest.raises(Exception, match="positions='sum'"):
        AtPStar(llama).attribute([random_pair(6), random_pair(7)])


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_softcap_qk_norm_and_sliding_windows_are_what_the_fix_sees(family: str, tmp_path: Path) -> None:
    model, example = tiny_family(family, tmp_path), random_pair()
    method = AtPStar(model, nodes=("q", "k", "v", "z"))
    targets = method.targets(example)
    case = method.case(method.space(targets), targets)
    windows = [int(case.clean.mask(layer)[0, 0, -1].sum()) for layer in range(3)]
    assert 4 in windows and 9 in windows, "one layer slides, one is full"
    scores = AtPStar(model, nodes=("q", "k"), grad_drop=False).attribute(example).frame()
    for layer in range(3):
        for kind, heads in (("q", 4), ("k", 2)):
            want = patched_outputs(model, example, layer, kind, heads)
            got = scores[(scores["layer"] == layer) & (scores["kind"] == kind)]["signed"].to_numpy()
            assert np.abs(want).max() > 1e-3
            assert np.allclose(got, want, atol=2e-4 * np.abs(want).max() + 1e-6), (layer, kind)


def patched_outputs(model: Any, example: Any, layer: int, kind: str, heads: int) -> np.ndarray:
    """Σ (z' − z) · ∂L/∂z with z' from running the model itself with each query or key replaced, [T · heads]."""
    hook, z = f"blocks.{layer}.attn.hook_{kind}", f"blocks.{layer}.attn.hook_z"
    clean, noise = torch.tensor([example.clean]), torch.tensor([example.noise])
    other, before = model.capture(noise, hook)[hook][0], model.capture(clean, z)[z]
    gradient = looped_graddrop(model, example, z, None)
    rows, d = len(example.clean) * heads, other.shape[-1] // heads

    def swap(x: Tensor) -> Tensor:
        x = x.clone()
        for row in range(rows):
            t, h = divmod(row, heads)
            x[row, t, h * d : (h + 1) * d] = other[t, h * d : (h + 1) * d]
        return x

    with model.hooked({hook: swap}):
        after = model.capture(clean.expand(rows, -1), z)[z]
    return ((after - before) * gradient).sum((1, 2)).detach().numpy()


def test_half_precision_is_close_to_float32(llama: Any) -> None:
    from cache.models import load_model

    half = load_model(llama.source, device="cpu", dtype=torch.bfloat16)
    a, b = (AtPStar(m, nodes=KINDS).attribute(random_pair()) for m in (llama, half))
    assert np.isfinite(b.score).all() and np.corrcoef(a.score, b.score)[0, 1] > 0.98


def test_other_backends_and_unknown_kinds_are_refused(llama: Any, tiny_dir: Path) -> None:
    from cache.models import load_model

    with pytest.raises(Exception, match="no node kind"):
        AtPStar(llama, nodes=("heads",))
    with pytest.raises(Exception, match="positions is"):
        AtPStar(llama, positions="all")
    other = load_model(tiny_dir, backend="nnsight", device="cpu")
    with pytest.raises(Exception, match=r"hook|TransformerLens"):
        AtPStar(other).attribute(random_pair())
