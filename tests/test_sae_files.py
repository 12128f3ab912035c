"""SAE folders: what is saved is what loads, here and in sae-lens; damage and foreign files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cache.errors import DataError, MissingDataError
from saes.aip import AIP
from saes.config import ACTIVATIONS, SAEConfig
from saes.presets import PRESETS
from saes.sae import SAE, fix_signs, fold_input_scale
from saes.train_config import TrainConfig
from saes.training import train

D, F, K = 16, 48, 4


def make_sae(activation: str = "topk", seed: int = 0, **other) -> SAE:
    gen = torch.Generator().manual_seed(seed)
    k = K if "topk" in activation else 0
    sae = SAE(
        SAEConfig(d_sae=F, k=k, activation=activation, d_model=D, hook="blocks.1.hook_resid_post", **other)
    )
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=gen))
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        if sae.cfg.has_threshold:
            sae.threshold.abs_().add_(1.0)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("activation", ["topk", "abs_topk"])
def test_saved_sae_loads_bit_equal_with_the_same_id(activation: str, tmp_path: Path) -> None:
    sae = make_sae(activation)
    again = SAE.load(sae.save(tmp_path / "sae"))
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert again.sae_id == sae.sae_id
    assert (again.cfg.activation, again.cfg.k, again.cfg.hook) == (sae.cfg.activation, K, sae.cfg.hook)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sae_lens_loads_our_folder_with_equal_codes_and_reconstruction(
    activation: str, tmp_path: Path
) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install -e '.[dev]'")
    sae = make_sae(activation)
    theirs = sae_lens.SAE.load_from_disk(str(sae.save(tmp_path / "sae")))
    x = torch.randn(32, D, generator=torch.Generator().manual_seed(0)) * 3
    codes, found = sae.encode(x).dense(F), theirs.encode(x)
    assert 0 < (codes != 0).sum(1).float().mean() < F
    if activation == "batch_abs_topk":
        assert theirs.cfg.d_sae == 2 * F and (found >= 0).all()
        found = found[:, :F] - found[:, F:]
    torch.testing.assert_close(found, codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(x), sae(x), rtol=1e-5, atol=1e-5)


def _theirs(architecture: str):
    """A random SAE made with sae-lens's own classes."""
    from sae_lens.saes import abstopk_sae, gated_sae, jumprelu_sae, standard_sae, topk_sae

    cls, cfg = {
        "topk": (topk_sae.TopKSAE, topk_sae.TopKSAEConfig),
        "abstopk": (abstopk_sae.AbsTopKSAE, abstopk_sae.AbsTopKSAEConfig),
        "jumprelu": (jumprelu_sae.JumpReLUSAE, jumprelu_sae.JumpReLUSAEConfig),
        "standard": (standard_sae.StandardSAE, standard_sae.StandardSAEConfig),
        "gated": (gated_sae.GatedSAE, gated_sae.GatedSAEConfig),
    }[architecture]
    sae = cls(cfg(d_in=D, d_sae=F, **({"k": K} if "topk" in architecture else {})))
    gen = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in sae.parameters():
            p.normal_(0, 0.5, generator=gen)
    return sae


@pytest.mark.parametrize("architecture", ["topk", "abstopk", "jumprelu", "standard", "gated"])
def test_an_sae_that_sae_lens_wrote_loads_here(architecture: str, tmp_path: Path) -> None:
    """Thresholds below 0 included: sae-lens applies its ReLU first."""
    pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install -e '.[dev]'")
    theirs = _theirs(architecture)
    theirs.save_model(tmp_path / "theirs")
    ours, x = SAE.load(tmp_path / "theirs"), torch.randn(20, D, generator=torch.Generator().manual_seed(0))
    assert 0 < ours.encode(x).l0().float().mean() < F
    torch.testing.assert_close(ours.encode(x).dense(F), theirs.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_a_batch_topk_sae_that_sae_lens_trained_loads_here(tmp_path: Path) -> None:
    pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install -e '.[dev]'")
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    theirs = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K, rescale_acts_by_decoder_norm=False)
    )
    with torch.no_grad():
        for i, p in enumerate(theirs.parameters()):
            p.normal_(generator=torch.Generator().manual_seed(i))
        theirs.topk_threshold.fill_(2.5)
    theirs.save_inference_model(tmp_path / "theirs")
    ours, x = SAE.load(tmp_path / "theirs"), torch.randn(20, D, generator=torch.Generator().manual_seed(0))
    u = (x - theirs.b_dec) @ theirs.W_enc + theirs.b_enc
    assert ours.cfg.activation == "jumprelu"
    torch.testing.assert_close(ours.encode(x).dense(F), u * (u > 2.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["matryoshka", "batch_abs_topk", "jumprelu", "gated"])
def test_a_trained_sae_is_the_same_from_its_folder_and_in_sae_lens(preset: str, tmp_path: Path) -> None:
    """Thresholds in the units of raw activations: training ran on scaled rows."""
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install -e '.[dev]'")
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)) * 30 + 5
    config = TrainConfig(steps=40, batch_size=200, screen="off", lr=3e-3)
    more = {"k": 3} if preset in ("matryoshka", "batch_abs_topk") else {}
    result = train(x, [PRESETS[preset](d_sae=32, **more)], config, workspace=tmp_path)[0]
    loaded, theirs = SAE.load(result.path), sae_lens.SAE.load_from_disk(str(result.path))
    assert loaded.sae_id == result.sae.sae_id and torch.equal(loaded(x), result.sae(x))
    l0 = result.sae.encode(x).l0().float().mean()
    assert abs(l0 - 3) < 0.2 if more else 0 < l0 < 32
    torch.testing.assert_close(theirs(x), result.sae(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_an_sae_of_whitened_space_selects_the_same_in_sae_lens(activation: str, tmp_path: Path) -> None:
    """Folding leaves decoder rows that are not unit: a loader that rescales by their norm would select others."""
    sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install -e '.[dev]'")
    gen = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(8, 8, generator=gen)).Q * torch.logspace(1, -1, 8)
    x = torch.randn(2000, 8, generator=gen) @ mix + 1
    kinds = {
        "jumprelu": PRESETS["threshold_atoms"](d_sae=32, l0=0.02),
        "topk": PRESETS["topk"](d_sae=32, k=3, space="aip"),
    }
    config = TrainConfig(steps=60, batch_size=200, screen="off", lr=1e-2)
    result = train(x, [kinds[activation]], config, workspace=tmp_path)[0]
    assert (result.sae.W_dec.norm(dim=1) - 1).abs().max() > 0.1
    loaded, theirs = SAE.load(result.path), sae_lens.SAE.load_from_disk(str(result.path))
    assert torch.equal(loaded(x), result.sae(x)) and AIP.load(result.path).record["d_model"] == 8
    ours, found = result.sae.encode(x).dense(32), theirs.encode(x)
    assert torch.equal(ours != 0, found != 0) and (ours != 0).any()
    torch.testing.assert_close(theirs(x), result.sae(x), rtol=1e-5, atol=1e-5)


def test_halves_that_are_not_each_others_negatives_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = make_sae("batch_abs_topk").save(tmp_path / "sae")
    weights = load_file(path / "sae_weights.safetensors")
    weights["W_dec"][-1, 0] += 1
    save_file(weights, path / "sae_weights.safetensors")
    with pytest.raises(DataError, match="W_dec"):
        SAE.load(path)
    cfg = json.loads((path / "cfg.json").read_text())
    del cfg["metadata"]["activation"]
    (path / "cfg.json").write_text(json.dumps(cfg))
    assert SAE.load(path).cfg.d_sae == 2 * F


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "temporal"}, "architecture"),
        ({"architecture": "jumprelu"}, "unknown keys"),
        ({"metadata": {"made_by": "atomscope", "activation": "batch_topk", "k": 4}}, "metadata"),
        ({"threshold_rule": 3}, "unknown keys"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations"),
        ({"d_in": D + 1}, "shape"),
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
