"""Conventions of SAELens's folders are applied or refused: what sae-lens computes on the rows is what we compute."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cache.errors import DataError
from saes.conventions import Conventions, of_training
from saes.presets import topk
from saes.sae import SAE
from saes.train_config import TrainConfig
from saes.training import train
from tests.corpora import make_store
from tests.test_sae_files import D, F, K, _theirs, make_sae

sae_lens = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install -e '.[dev]'")
ARCHITECTURES = ["topk", "abstopk", "jumprelu", "standard", "gated"]


def rows(n: int = 24) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0)) * 3 + 1


def changed(path: Path, **keys) -> Path:
    cfg = json.loads((path / "cfg.json").read_text())
    (path / "cfg.json").write_text(json.dumps(cfg | keys))
    return path


def written(architecture: str, path: Path, **keys) -> Path:
    theirs = _theirs(architecture)
    if architecture == "jumprelu":
        theirs.threshold.data.abs_()
    theirs.save_model(path)
    return changed(path, **keys)


def same(ours: SAE, theirs, x: torch.Tensor) -> None:
    torch.testing.assert_close(ours.encode(x).dense(F), theirs.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_encoder_that_does_not_subtract_b_dec_gives_the_same_codes(
    architecture: str, tmp_path: Path
) -> None:
    path = written(architecture, tmp_path / "sae", apply_b_dec_to_input=False)
    theirs = sae_lens.SAE.load_from_disk(str(path))
    assert theirs.cfg.apply_b_dec_to_input is False
    same(SAE.load(path), theirs, rows())
    again = SAE.load(SAE.load(path).save(tmp_path / "again"))
    same(again, theirs, rows())
    same(again, sae_lens.SAE.load_from_disk(str(tmp_path / "again")), rows())


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_selection_by_decoder_norm_gives_the_same_codes(architecture: str, tmp_path: Path) -> None:
    path = written(architecture, tmp_path / "sae", rescale_acts_by_decoder_norm=True)
    same(SAE.load(path), sae_lens.SAE.load_from_disk(str(path)), rows())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("subtracted", [True, False])
def test_an_input_factor_is_folded_as_sae_lens_folds_it(
    architecture: str, subtracted: bool, tmp_path: Path
) -> None:
    path = written(
        architecture, tmp_path / "sae",
        normalize_activations="expected_average_only_in", apply_b_dec_to_input=subtracted,
    )  # fmt: skip
    theirs = sae_lens.SAE.load_from_disk(str(path))
    theirs.fold_activation_norm_scaling_factor(0.3)
    same(SAE.load(path, norm_factor=0.3), theirs, rows())
    with pytest.raises(DataError, match="norm_factor"):
        SAE.load(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_centred_writing_weights_are_folded_into_the_encoder(architecture: str, tmp_path: Path) -> None:
    """The SAE saw rows with mean 0 over d_model; ours takes the rows of the plain model."""
    path = written(
        architecture, tmp_path / "sae",
        metadata={"hook_name": "blocks.1.hook_resid_pre", "model_from_pretrained_kwargs": {"center_writing_weights": True}},
    )  # fmt: skip
    theirs, ours, x = sae_lens.SAE.load_from_disk(str(path)), SAE.load(path), rows()
    centred = x - x.mean(1, keepdim=True)
    torch.testing.assert_close(ours.encode(x).dense(F), theirs.encode(centred), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(x), theirs(centred), rtol=1e-4, atol=1e-4)
    assert ours.conventions.centred
    again = SAE.load(ours.save(tmp_path / "again"))
    assert again.conventions == ours.conventions
    torch.testing.assert_close(again(x), ours(x), rtol=1e-5, atol=1e-5)
    # folded once more, it would have another id on each load, and indexes and labels would lose it
    assert again.sae_id == ours.sae_id


# the keys of the published GPT-2 residual SAEs (gpt2-small-res-jb), which do not say prepend_bos
LEGACY = {
    "model_name": "gpt2-small", "hook_point": "blocks.1.hook_resid_pre", "hook_point_layer": 1,
    "hook_point_head_index": None, "dataset_path": "Skylion007/openwebtext", "is_dataset_tokenized": False,
    "context_size": 128, "use_cached_activations": False, "cached_activations_path": "activations", "d_in": D,
    "n_batches_in_buffer": 128, "total_training_tokens": 300000000, "store_batch_size": 32, "device": "cpu",
    "seed": 42, "dtype": "torch.float32", "b_dec_init_method": "geometric_median", "expansion_factor": 3,
    "from_pretrained_path": None, "l1_coefficient": 8e-5, "lr": 4e-4, "lr_scheduler_name": None,
    "lr_warm_up_steps": 5000, "train_batch_size": 4096, "use_ghost_grads": False, "feature_sampling_window": 1000,
    "feature_sampling_method": None, "resample_batches": 1028, "feature_reinit_scale": 0.2,
    "dead_feature_window": 5000, "dead_feature_estimation_method": "no_fire", "dead_feature_threshold": 1e-8,
    "log_to_wandb": True, "wandb_project": "p", "wandb_entity": None, "wandb_log_frequency": 100, "n_checkpoints": 10,
    "checkpoint_path": "checkpoints/x", "d_sae": F, "tokens_per_buffer": 67108864, "run_name": "r",
}  # fmt: skip


def test_a_topk_folder_of_version_5_keeps_its_k_with_the_activation(tmp_path: Path) -> None:
    path = written("standard", tmp_path / "sae")
    kind = {"architecture": "topk", "activation_fn": "topk", "activation_fn_kwargs": {"k": K}}
    (path / "cfg.json").write_text(json.dumps(LEGACY | kind))
    ours = SAE.load(path)
    same(ours, sae_lens.SAE.load_from_disk(str(path)), rows())
    assert (ours.cfg.activation, ours.cfg.k) == ("topk", K)


@pytest.mark.parametrize(
    "change",
    [
        {"d_in": None},
        {"d_sae": "24"},
        {"architecture": "topk"},
        {"architecture": "topk", "k": "3"},
        {"metadata": [1]},
        {"metadata": {"name": 3}},
        {"metadata": {"model_from_pretrained_kwargs": [1]}},
        {"metadata": {"seqpos_slice": "all"}},
    ],
)
def test_a_config_with_a_value_of_another_kind_is_an_error_that_names_it(
    change: dict, tmp_path: Path
) -> None:
    path = written("standard", tmp_path / "sae")
    cfg = json.loads((path / "cfg.json").read_text())
    (path / "cfg.json").write_text(json.dumps(cfg | change))
    with pytest.raises(DataError, match=r"cfg\.json has"):
        SAE.load(path)
    (path / "cfg.json").write_text("[1]")
    with pytest.raises(DataError, match="holds a list"):
        SAE.load(path)


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_a_folder_from_before_version_6_loads_as_what_it_is(kind: str, tmp_path: Path) -> None:
    """TopK was once written as `standard`: loaded as ReLU it fires on half of all latents, silently."""
    path = written("standard", tmp_path / "sae")
    legacy = LEGACY | (
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}} if kind == "topk" else {}
    )
    (path / "cfg.json").write_text(json.dumps(legacy))
    ours = SAE.load(path)
    same(ours, sae_lens.SAE.load_from_disk(str(path)), rows())
    assert ours.cfg.activation == kind and ours.cfg.hook == "blocks.1.hook_resid_pre"
    c = ours.conventions
    assert (c.model, c.prepend_bos, c.context) == ("gpt2-small", True, 128) and "openwebtext" in c.dataset


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"normalize_activations": "constant_norm_rescale"}, "constant_norm_rescale"),
        ({"reshape_activations": "hook_z", "metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "hook_z"),
        ({"metadata": {"hook_head_index": 3}}, "head 3"),
        ({"activation_fn_str": "tanh-relu"}, "tanh-relu"),
        ({"finetuning_scaling_factor": True}, "finetuning"),
        ({"metadata": {"model_from_pretrained_kwargs": {"refactor_factored_attn_matrices": True}}}, "refactor"),
        (
            {"metadata": {"hook_name": "blocks.0.attn.hook_z", "model_from_pretrained_kwargs": {"fold_ln": True}}},
            "fold_ln",
        ),
        ({"sharpness": 2}, "unknown keys sharpness"),
    ],
)  # fmt: skip
def test_a_convention_that_cannot_be_applied_is_refused_in_one_line(
    keys: dict, words: str, tmp_path: Path
) -> None:
    path = written("standard", tmp_path / "sae", **keys)
    with pytest.raises(DataError, match=words) as e:
        SAE.load(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("meta", "skip"),
    [
        ({"seqpos_slice": [1, None]}, True),
        ({"seqpos_slice": [None]}, False),
        ({"exclude_special_tokens": True, "prepend_bos": True}, True),
        ({"exclude_first_position": False}, False),
        ({}, None),
    ],
)
def test_the_policy_of_position_0_comes_along(meta: dict, skip: bool | None, tmp_path: Path) -> None:
    path = written("standard", tmp_path / "sae", metadata=meta)
    assert SAE.load(path).conventions.skip_first is skip


def test_heads_of_hook_z_are_joined_as_the_hooks_here_join_them(tmp_path: Path) -> None:
    path = written(
        "standard", tmp_path / "sae", reshape_activations="hook_z", metadata={"hook_name": "blocks.0.attn.hook_z"}
    )  # fmt: skip
    theirs, x = sae_lens.SAE.load_from_disk(str(path)), rows()
    heads = x.view(len(x), 1, 4, D // 4)
    torch.testing.assert_close(
        SAE.load(path).encode(x).dense(F), theirs.encode(heads)[:, 0], rtol=1e-5, atol=1e-5
    )


def test_what_training_knows_of_its_store_stands_in_the_saved_folder(tmp_path: Path, monkeypatch) -> None:
    """prepend_bos as it was, so that sae-lens feeds the model the same text."""
    store, _ = make_store(tmp_path)
    store.identity["prepend_bos"] = True
    config = TrainConfig(steps=3, batch_size=8, screen="off")
    result = train(store, [topk(d_sae=24, k=2)], config)[0]
    meta = json.loads((result.path / "cfg.json").read_text())["metadata"]
    assert meta["prepend_bos"] is True and meta["exclude_first_position"] is True
    assert meta["context_size"] == store.corpus.context
    loaded = SAE.load(result.path)
    assert loaded.conventions == result.sae.conventions and loaded.conventions.l0 <= 2
    assert sae_lens.SAE.load_from_disk(str(result.path)).cfg.metadata.prepend_bos is True


@pytest.mark.parametrize(
    ("skip", "bos", "left_out"),
    [("first", False, True), ("special", True, True), ("special", False, False), (None, True, False)],
)
def test_position_0_counts_as_left_out_where_it_is_a_bos_and_special_rows_are_left_out(
    skip: str | None, bos: bool, left_out: bool, tmp_path: Path
) -> None:
    """`attach` follows it: an SAE that has never seen BOS must not rebuild it, whose norm is a hundred times the rest."""
    store, _ = make_store(tmp_path)
    store.identity["prepend_bos"] = bos
    assert of_training(SimpleNamespace(store=store), skip, 2.0).skip_first is left_out


def test_the_fvu_of_training_is_stated_where_it_is_that_of_plain_rows(tmp_path: Path) -> None:
    """That of whitened or normalised rows is another number; neither is part of the id."""
    config = TrainConfig(steps=3, batch_size=8, screen="off")
    kinds = [topk(d_sae=24, k=2, space=s, name=s) for s in ("raw", "scalar", "unit", "aip")]
    for result in train(rows(200), kinds, config, workspace=tmp_path):
        meta = json.loads((result.path / "cfg.json").read_text())["metadata"]
        stated = result.metrics[-1]["fvu"] if result.sae.cfg.name in ("raw", "scalar") else None
        assert meta.get("stated_fvu") == stated
        without = dict(meta)
        without.pop("stated_fvu", None)
        changed(result.path, metadata=without)
        again = SAE.load(result.path)
        assert again.conventions.fvu is None and again.sae_id == result.sae.sae_id == meta["sae_id"]


def test_conventions_are_not_part_of_the_id(tmp_path: Path) -> None:
    sae = make_sae()
    before = sae.sae_id
    sae.conventions = Conventions(prepend_bos=True, context=64, l0=4.0, fvu=0.2, source="somewhere")
    assert sae.sae_id == before
    again = SAE.load(sae.save(tmp_path / "sae"))
    assert again.sae_id == before and again.conventions == sae.conventions


def test_old_scaling_factors_of_one_are_dropped(tmp_path: Path) -> None:
    path = written("standard", tmp_path / "sae")
    weights = load_file(path / "sae_weights.safetensors")
    save_file(weights | {"scaling_factor": torch.ones(F)}, path / "sae_weights.safetensors")
    same(SAE.load(path), sae_lens.SAE.load_from_disk(str(written("standard", tmp_path / "plain"))), rows())
    save_file(weights | {"scaling_factor": torch.full((F,), 2.0)}, path / "sae_weights.safetensors")
    with pytest.raises(DataError, match="scaling_factor"):
        SAE.load(path)
