"""SAE folders: what is saved is what loads, here and in sae-lens; damage and foreign files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cache.errors import DataError, MissingDataError
from saes.config import SAEConfig
from saes.sae import SAE, fix_signs, fold_input_scale

D, F, K = 16, 48, 4


def make_sae(activation: str = "topk", seed: int = 0, **other) -> SAE:
    gen = torch.Generator().manual_seed(seed)
    sae = SAE(
        SAEConfig(d_sae=F, k=K, activation=activation, d_model=D, hook="blocks.1.hook_resid_post", **other)
    )
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=gen))
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("activation", ["topk", "abs_topk"])
def test_saved_sae_loads_bit_equal_with_the_same_id(activation: str, tmp_path: Path) -> None:
    sae = make_sae(activation)
    again = SAE.load(sae.save(tmp_path / "sae"))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert again.sae_id == sae.sae_id
    assert (again.cfg.activation, again.cfg.k, again.cfg.hook) == (sae.cfg.activation, K, sae.cfg.hook)


@pytest.mark.parametrize("activation", ["topk", "abs_topk"])
def test_sae_lens_loads_our_folder_with_equal_codes_and_reconstruction(
    activation: str, tmp_path: Path
) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install -e '.[dev]'")
    sae = make_sae(activation)
    theirs = sae_lens.SAE.load_from_disk(str(sae.save(tmp_path / "sae")))
    x = torch.randn(32, D) * 3
    codes = sae.encode(x)
    torch.testing.assert_close(theirs.encode(x), codes.dense(F), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(x), sae(x), rtol=1e-5, atol=1e-5)


def test_an_sae_that_sae_lens_wrote_loads_here(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install -e '.[dev]'")
    from sae_lens.saes.topk_sae import TopKSAEConfig

    theirs = sae_lens.TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=K))
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    theirs.save_model(tmp_path / "theirs")
    ours, x = SAE.load(tmp_path / "theirs"), torch.randn(20, D)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "jumprelu"}, "architecture"),
        ({"threshold_rule": 3}, "unknown keys"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input"),
        ({"d_in": D + 1}, "shape"),
        ({"rescale_acts_by_decoder_norm": True}, "not unit"),
    ],
)
def test_a_folder_that_would_compute_something_else_is_refused(
    change: dict, words: str, tmp_path: Path
) -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec *= 2
    path = sae.save(tmp_path / "sae")
    cfg = json.loads((path / "cfg.json").read_text())
    (path / "cfg.json").write_text(json.dumps(cfg | change))
    with pytest.raises(DataError, match=words):
        SAE.load(path)


def test_truncated_weights_and_missing_folders_are_one_clear_line(tmp_path: Path) -> None:
    path = make_sae().save(tmp_path / "sae")
    weights = path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"safetensors"):
        SAE.load(path)
    weights.unlink()
    with pytest.raises(MissingDataError, match="incomplete"):
        SAE.load(path)
    with pytest.raises(MissingDataError, match="no SAE"):
        SAE.load(tmp_path / "elsewhere")


def test_nan_weights_are_not_saved(tmp_path: Path) -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.b_dec[0] = float("nan")
    with pytest.raises(DataError, match="b_dec"):
        sae.save(tmp_path / "sae")
    assert not (tmp_path / "sae" / "cfg.json").exists()


def test_activations_of_another_width_are_refused() -> None:
    with pytest.raises(DataError, match=f"d_model={D}"):
        make_sae().encode(torch.randn(3, D + 1))


@pytest.mark.parametrize("activation", ["topk", "abs_topk"])
def test_folding_the_input_scale_changes_neither_selection_nor_reconstruction(activation: str) -> None:
    scaled, folded, s = make_sae(activation), make_sae(activation), 0.07
    fold_input_scale(folded, s)
    x = torch.randn(40, D) * 10
    before, after = scaled.encode(x * s), folded.encode(x)
    assert torch.equal(before.indices.sort(1).values, after.indices.sort(1).values)
    torch.testing.assert_close(scaled(x * s) / s, folded(x), rtol=1e-4, atol=1e-4)


def test_flipping_the_sign_of_a_two_sided_latent_flips_its_code_and_keeps_the_reconstruction() -> None:
    plain, flipped = make_sae("abs_topk"), make_sae("abs_topk")
    sign = torch.where(torch.arange(F) % 2 == 0, 1.0, -1.0)
    fix_signs(flipped, sign)
    x = torch.randn(10, D)
    torch.testing.assert_close(flipped.encode(x).dense(F), plain.encode(x).dense(F) * sign)
    torch.testing.assert_close(flipped(x), plain(x))


def test_the_id_changes_with_a_weight_and_not_with_the_name() -> None:
    a, b = make_sae(name="one"), make_sae(name="two")
    assert a.sae_id == b.sae_id
    with torch.no_grad():
        b.W_enc[0, 0] += 1e-3
    assert a.sae_id != b.sae_id


def test_encode_gradients_reach_the_input() -> None:
    x = torch.randn(5, D, requires_grad=True)
    make_sae()(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
