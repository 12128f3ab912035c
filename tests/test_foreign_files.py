"""SAEs of other libraries, written by their own code: what they compute there is what they compute here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cache.errors import DataError, MissingDataError, UsageError
from saes.foreign import releases
from saes.foreign.convert import convert
from saes.foreign.module_names import hook_of
from saes.sae import SAE

FIXTURES = Path(__file__).parent / "fixtures" / "foreign"
DICTIONARIES = sorted(p.name for p in (FIXTURES / "dictionary_learning").iterdir())
D, F, K = 8, 16, 3


def copied(path: Path, to: Path) -> Path:
    return Path(shutil.copytree(path, to / path.name))


def check_equal(sae: SAE, folder: Path) -> None:
    golden = load_file(folder / "expected.safetensors")
    torch.testing.assert_close(sae.encode(golden["x"]).dense(F), golden["codes"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(golden["x"]), golden["x_hat"], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- sparsify


def test_a_sparsify_folder_gives_its_own_codes_and_brings_model_text_and_hook() -> None:
    folder = FIXTURES / "sparsify" / "layers.1"
    sae = SAE.load(folder)
    check_equal(sae, folder)
    assert (sae.cfg.activation, sae.cfg.k, sae.cfg.hook) == ("topk", K, "blocks.1.hook_resid_post")
    c = sae.conventions
    assert (c.model, c.context, c.skip_first) == ("EleutherAI/pythia-70m-deduped", 64, False)
    assert sae.cfg.model == c.model and "pile" in c.dataset and c.source == "sparsify"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "groupmax"}, "groupmax"),
        ({"transcode": True}, "transcode"),
        ({"skip_connection": True}, "skip_connection"),
        ({"signed": True}, "signed"),
        ({"temperature": 2}, "unknown keys temperature"),
        ({"d_in": 9}, "width 8"),
        ({"d_in": None}, "whole number"),
        ({"k": None}, "whole number"),
        ({"num_latents": 20}, "16 latents"),
    ],
)
def test_a_sparsify_folder_that_computes_something_else_is_refused(
    change: dict, words: str, tmp_path: Path
) -> None:
    folder = copied(FIXTURES / "sparsify" / "layers.1", tmp_path)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(cfg | change))
    with pytest.raises(DataError, match=words):
        SAE.load(folder)


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("layers.12", "blocks.12.hook_resid_post"),
        ("h.3.mlp", "blocks.3.hook_mlp_out"),
        ("model.layers.7.self_attn", "blocks.7.hook_attn_out"),
        ("embed_tokens", "hook_embed"),
        ("layers.3.mlp.experts", ""),
    ],
)
def test_hook_points_of_sparsify_get_their_names_or_none(name: str, hook: str) -> None:
    assert hook_of(name) == hook


# ------------------------------------------------------- dictionary_learning


@pytest.mark.parametrize("name", DICTIONARIES)
def test_a_dictionary_converts_to_safetensors_with_its_own_codes(name: str, tmp_path: Path) -> None:
    folder = FIXTURES / "dictionary_learning" / name
    convert(folder, tmp_path / "out")
    sae = SAE.load(tmp_path / "out")
    check_equal(sae, folder)
    assert sae.cfg.hook == "blocks.1.hook_resid_post" and sae.cfg.model == "EleutherAI/pythia-70m-deduped"
    assert sae.conventions.context == 64 and sae.conventions.source == "dictionary_learning"
    assert sae.cfg.k == (K if "TopK" in name else 0)


def test_a_factor_on_the_rows_that_the_files_leave_out_can_be_given() -> None:
    folder = FIXTURES / "sparsify" / "layers.1"
    golden = load_file(folder / "expected.safetensors")
    sae = SAE.load(folder, norm_factor=0.25)
    torch.testing.assert_close(sae.encode(golden["x"] * 4).dense(F), golden["codes"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(golden["x"] * 4), golden["x_hat"] * 4, rtol=1e-5, atol=1e-5)


def test_a_pickle_is_not_opened_on_the_way_and_the_line_names_the_command() -> None:
    with pytest.raises(DataError, match="atomscope sae convert"):
        SAE.load(FIXTURES / "dictionary_learning" / "AutoEncoderTopK")


class Bomb:
    """What an unpickler would run."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("opened"),))


def test_convert_runs_nothing_that_a_pickle_asks_for(tmp_path: Path, monkeypatch) -> None:
    folder = copied(FIXTURES / "dictionary_learning" / "AutoEncoderTopK", tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder.weight": Bomb()}, folder / "ae.pt")
    with pytest.raises(DataError, match="plain tensors"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "opened").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("AutoEncoderTopK", {"dict_class": "IdentityDict"}, "IdentityDict"),
        ("AutoEncoderTopK", {"dict_class": "AutoEncoder"}, "expected"),
        ("AutoEncoderTopK", {"k": 5}, "k=3"),
        ("AutoEncoderTopK", {"dict_size": 17}, "config.json says"),
    ],
)
def test_a_dictionary_whose_config_does_not_belong_to_it_is_refused(
    name: str, change: dict, words: str, tmp_path: Path
) -> None:
    folder = copied(FIXTURES / "dictionary_learning" / name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["trainer"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=words):
        convert(folder, tmp_path / "out")


def test_a_batch_topk_dictionary_without_a_threshold_is_refused(tmp_path: Path) -> None:
    """Its own code would let every positive latent fire."""
    folder = copied(FIXTURES / "dictionary_learning" / "BatchTopKSAE", tmp_path)
    held = torch.load(folder / "ae.pt", weights_only=True)
    torch.save(held | {"threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    with pytest.raises(DataError, match="threshold"):
        convert(folder, tmp_path / "out")


def test_convert_does_not_write_into_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        convert(FIXTURES / "sparsify" / "layers.1", tmp_path)


# -------------------------------------------------------------- Gemma Scope


def gemma_weights() -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "threshold": (F,)}
    out = {n: torch.randn(s, generator=gen) for n, s in shapes.items()}
    return out | {"threshold": out["threshold"].abs()}


def gemma_rows() -> torch.Tensor:
    return torch.randn(20, D, generator=torch.Generator().manual_seed(4)) * 2


def test_gemma_scope_loads_as_in_sae_lens_and_knows_its_layer_from_the_names(
    tmp_path: Path, monkeypatch
) -> None:
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    sae_lens = pytest.importorskip("sae_lens")
    w = gemma_weights()
    folder = tmp_path / "google/gemma-scope-2b-pt-res" / "layer_20/width_16k/average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{n: t.numpy() for n, t in w.items()})
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **_: str(folder / "params.npz"))
    cfg, state, _ = loaders.gemma_2_sae_huggingface_loader(
        "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", cfg_overrides={"d_in": D, "d_sae": F}
    )  # fmt: skip
    theirs = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(cfg))
    theirs.load_state_dict(state)
    monkeypatch.setenv(releases.MIRROR, str(tmp_path))
    ours, x = (
        SAE.load("google/gemma-scope-2b-pt-res:layer_20/width_16k/average_l0_71"),
        gemma_rows(),
    )
    torch.testing.assert_close(ours.encode(x).dense(F), theirs.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    c = ours.conventions
    assert (ours.cfg.hook, c.model, c.l0) == ("blocks.20.hook_resid_post", "google/gemma-2-2b", 71.0)
    assert (c.prepend_bos, c.skip_first, c.context) == (True, True, 1024)
    assert theirs.cfg.metadata.hook_name == ours.cfg.hook and theirs.cfg.metadata.prepend_bos is True


def test_gemma_scope_2_is_read_from_safetensors_with_its_config(tmp_path: Path) -> None:
    folder = tmp_path / "resid_post" / "layer_9_width_16k_l0_small"
    folder.mkdir(parents=True)
    w = gemma_weights()
    save_file({n.lower(): t for n, t in w.items()}, folder / "params.safetensors")
    config = {
        "hf_hook_point_in": "model.layers.9.output", "hf_hook_point_out": "model.layers.9.output", "width": F,
        "model_name": "gemma-v3-270m-pt", "architecture": "jump_relu", "l0": 7, "affine_connection": False,
        "type": "sae",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    sae, x = SAE.load(folder), gemma_rows()
    u = x @ w["W_enc"] + w["b_enc"]
    z = u * (u > w["threshold"])
    torch.testing.assert_close(sae.encode(x).dense(F), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), z @ w["W_dec"] + w["b_dec"], rtol=1e-5, atol=1e-5)
    assert (sae.cfg.hook, sae.cfg.model) == ("blocks.9.hook_resid_post", "google/gemma-3-270m")
    assert sae.conventions.l0 == 7
    for change, words in (
        ({"hf_hook_point_out": "model.layers.9.mlp.output"}, "transcoder"),
        ({"affine_connection": True}, "affine_connection"),
        ({"rescale": 2}, "unknown keys rescale"),
        ({"architecture": "topk"}, "topk"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(DataError, match=words):
            SAE.load(folder)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("google/gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_9", "transcoder"),
        ("google/gemma-scope-2-1b-pt/clt/width_262k_l0_big", "transcoder"),
        ("google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "embedding"),
    ],
)
def test_what_only_its_name_tells_from_an_sae_is_refused(where: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / where
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{n: t.numpy() for n, t in gemma_weights().items()})
    with pytest.raises(DataError, match=words):
        SAE.load(folder)


def test_archives_with_objects_other_arrays_or_damage_are_refused(tmp_path: Path) -> None:
    arrays = {n: t.numpy() for n, t in gemma_weights().items()}
    for change, words in (
        ({"W_dec": np.array([Bomb()], dtype=object)}, "plain arrays"),
        ({"scale": np.ones(1)}, "expected"),
        ({"b_dec": np.full(D, np.nan, np.float32)}, "NaN"),
        ({"b_enc": np.ones(F + 1, np.float32)}, "shape"),
    ):
        np.savez(tmp_path / "params.npz", **(arrays | change))
        with pytest.raises(DataError, match=words):
            SAE.load(tmp_path)
    np.save(tmp_path / "one.npy", arrays["b_enc"])
    # cut off, empty (a download that was stopped), and an array that is no archive
    for content in (b"PK\x03\x04 cut", b"", (tmp_path / "one.npy").read_bytes()):
        (tmp_path / "params.npz").write_bytes(content)
        with pytest.raises(DataError, match="readable"):
            SAE.load(tmp_path)


# ------------------------------------------------------------------ by name


def test_a_release_is_found_in_a_mirror_and_in_the_workspace(tmp_path: Path, monkeypatch) -> None:
    source = FIXTURES / "sparsify"
    shutil.copytree(source, tmp_path / "mirror" / "pile-saes")
    monkeypatch.setenv(releases.MIRROR, str(tmp_path / "mirror"))
    sae = SAE.load("pile-saes:layers.1")
    assert sae.conventions.source == "sparsify pile-saes:layers.1" and sae.conventions.context == 64
    check_equal(sae, source / "layers.1")
    monkeypatch.delenv(releases.MIRROR)
    monkeypatch.setenv("ATOMSCOPE_HOME", str(tmp_path / "space"))
    shutil.copytree(source, tmp_path / "space" / "saes-mirror" / "mine")
    check_equal(SAE.load("mine:layers.1"), source / "layers.1")


def test_wrong_names_are_one_line_with_the_nearest_ones(tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(FIXTURES / "sparsify", tmp_path / "mirror" / "pile-saes")
    monkeypatch.setenv(releases.MIRROR, str(tmp_path / "mirror"))
    with pytest.raises(UsageError, match="did you mean pile-saes"):
        SAE.load("pile-sae:layers.1")
    with pytest.raises(UsageError, match="release:id"):
        SAE.load("pile-saes:../../etc")
    with pytest.raises(MissingDataError, match="no SAE at"):
        SAE.load(tmp_path / "nowhere")


DIRECTORY = """\
gpt2-small-res-jb:
  conversion_func: null
  model: gpt2-small
  repo_id: jbloom/GPT2-Small-SAEs-Reformatted
  config_overrides:
    model_from_pretrained_kwargs:
      center_writing_weights: true
  saes:
  - id: blocks.8.hook_resid_pre
    path: blocks.8.hook_resid_pre
    variance_explained: 0.99
    l0: 65
scaled-release:
  conversion_func: null
  model: tiny
  repo_id: someone/scaled
  saes:
  - id: one
    path: folder/one
    norm_scaling_factor: 0.25
elsewhere:
  conversion_func: llama_scope
  model: m
  repo_id: a/b
  saes:
  - id: one
    path: one
"""


@pytest.fixture
def directory(monkeypatch):
    monkeypatch.setattr(releases, "_directory_text", lambda: DIRECTORY)
    releases._directory.cache_clear()
    yield
    releases._directory.cache_clear()


def test_the_directory_of_sae_lens_gives_card_factor_and_overrides(directory) -> None:
    entry = releases.directory_entry("gpt2-small-res-jb")
    card, repo, path = releases._card("gpt2-small-res-jb", "blocks.8.hook_resid_pre", entry)
    assert (repo, path) == ("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre")
    assert card.l0 == 65 and abs(card.fvu - 0.01) < 1e-9 and card.model == "gpt2-small"
    assert card.overrides["model_from_pretrained_kwargs"]["center_writing_weights"] is True
    for name, words in (
        ("gpt2-small-res-jb:blocks.8.hook_resid_pst", "did you mean blocks.8.hook_resid_pre"),
        ("elsewhere:one", "llama_scope"),
        ("gpt2-small-res:x", "did you mean gpt2-small-res-jb"),
    ):
        with pytest.raises(UsageError, match=words):
            SAE.load(name)


def test_an_unreachable_hub_is_one_line_that_names_the_mirror(directory, monkeypatch) -> None:
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no route to host\nlong trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(MissingDataError, match=releases.MIRROR) as e:
        SAE.load("gpt2-small-res-jb:blocks.8.hook_resid_pre")
    assert "\n" not in str(e.value) and "no route to host" in str(e.value)


def test_a_release_on_the_hub_is_downloaded_by_the_folder_and_completed_where_it_was_cut_off(
    directory, monkeypatch, tmp_path: Path
) -> None:
    import huggingface_hub

    asked = []

    def download(repo: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((repo, tuple(allow_patterns), local_files_only))
        if local_files_only:
            cut = tmp_path / "snapshot" / "layers.1"
            cut.mkdir(parents=True)
            shutil.copy(FIXTURES / "sparsify" / "layers.1" / "cfg.json", cut)
            return str(cut.parent)
        return str(FIXTURES / "sparsify")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    check_equal(SAE.load("EleutherAI/sae-pythia:layers.1"), FIXTURES / "sparsify" / "layers.1")
    assert [a[2] for a in asked] == [True, False] and asked[0][0] == "EleutherAI/sae-pythia"
    assert "layers.1/cfg.json" in asked[0][1] and "config.json" in asked[0][1]


def test_the_real_directory_is_read_where_sae_lens_is_installed() -> None:
    pytest.importorskip("sae_lens")
    entry = releases.directory_entry("gpt2-small-res-jb")
    assert entry is not None and entry["repo_id"] == "jbloom/GPT2-Small-SAEs-Reformatted"
    assert len(releases.known_releases([])) > 100


def test_the_factor_and_the_centring_of_a_release_are_folded_as_in_sae_lens(
    directory, tmp_path: Path, monkeypatch
) -> None:
    """Neither stands in the folder; without them the SAE loads and is silently wrong."""
    sae_lens = pytest.importorskip("sae_lens")
    from tests.test_sae_files import _theirs

    monkeypatch.setenv(releases.MIRROR, str(tmp_path))
    one, jb = tmp_path / "someone/scaled/folder/one", tmp_path / "gpt2-small-res-jb/blocks.8.hook_resid_pre"
    for folder, rule in ((one, "expected_average_only_in"), (jb, "none")):
        _theirs("standard").save_model(folder)
        cfg = json.loads((folder / "cfg.json").read_text()) | {"normalize_activations": rule}
        cfg["metadata"]["hook_name"] = "blocks.8.hook_resid_pre"
        (folder / "cfg.json").write_text(json.dumps(cfg))
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)) * 5 + 1
    theirs = sae_lens.SAE.load_from_disk(str(one))
    theirs.fold_activation_norm_scaling_factor(0.25)
    ours = SAE.load("scaled-release:one")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert ours.conventions.source == "saelens scaled-release:one"
    theirs, ours = sae_lens.SAE.load_from_disk(str(jb)), SAE.load("gpt2-small-res-jb:blocks.8.hook_resid_pre")
    torch.testing.assert_close(ours(x), theirs(x - x.mean(1, keepdim=True)), rtol=1e-4, atol=1e-4)
    assert ours.conventions.centred and ours.conventions.l0 == 65
