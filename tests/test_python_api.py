"""Wrong arguments in Python are one line with what to do, as on the command line; plain arrays do the obvious thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache import load_model
from cache.devices import default_device, known_device
from cache.errors import AtomscopeError, DataError, UsageError
from saes import SAE, SAEConfig, TrainConfig, make_suite, presets, recovery_scores, train
from tests.corpora import HOOK, make_store

CONFIG = TrainConfig(steps=5, batch_size=16, screen="off", log_every=5)
TOPK = SAEConfig(d_sae=16, k=2)


def rows(n: int = 64, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def one_line(words: str, *args: Any, kind: type[AtomscopeError] = UsageError, **kwargs: Any) -> None:
    with pytest.raises(kind, match=words) as e:
        train(*args, **kwargs)
    assert "\n" not in str(e.value)


def test_a_numpy_array_trains_what_its_tensor_does() -> None:
    x = rows()
    want = train(x, [TOPK], CONFIG)[0].sae
    for given in (x.numpy(), x.double().numpy()[::-1][::-1]):
        assert train(given, [TOPK], CONFIG)[0].sae.sae_id == want.sae_id
    pair, arrays = (x, rows(seed=1)), (x.numpy(), rows(seed=1).numpy())
    assert train(arrays, [TOPK], CONFIG)[0].sae.sae_id == train(pair, [TOPK], CONFIG)[0].sae.sae_id


def test_one_config_is_a_list_of_one() -> None:
    assert len(train(rows(), TOPK, CONFIG)) == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([rows(), rows()], r"torch.cat.*tuple \(x, target\)"),
        ("latest", "ActivationStore.open"),
        (Path("activations"), "ActivationStore.open"),
        (None, "got NoneType"),
        ((rows(), "y"), "got str"),
        (np.array([["a", "b"]]), "numbers"),
    ],
    ids=["list", "name", "path", "nothing", "half a pair", "text"],
)
def test_data_of_another_kind_is_one_line(data: Any, words: str) -> None:
    one_line(words, data, [TOPK], CONFIG)


def test_other_arguments_of_another_kind_are_one_line() -> None:
    one_line(r"TrainConfig\(steps=5\)", rows(), [TOPK], {"steps": 5})
    one_line("TrainConfig", rows(), [TOPK], TOPK)
    one_line("presets.topk", rows(), [{"d_sae": 16}], CONFIG)
    one_line("presets.topk", rows(), "topk", CONFIG)
    one_line("presets.topk", rows(), [], CONFIG)
    one_line("presets.topk", rows(), CONFIG, [TOPK])
    one_line("presets.topk", rows(), 3, CONFIG)
    one_line("'gpu'.*cpu, cuda", rows(), [TOPK], CONFIG, device="gpu")
    one_line("cuda:99", rows(), [TOPK], CONFIG, device="cuda:99")
    with pytest.raises(UsageError, match="'gpu'"):
        SAE.load("anywhere", device="gpu")
    for field, value in (("lr", "1e-3"), ("steps", "10"), ("beta1", "0.9"), ("eps", "1e-8"), ("seed", "0")):
        with pytest.raises(UsageError, match=field):
            TrainConfig(**{field: value})
    for field, value in (("lr", "1e-3"), ("k", "2"), ("auxk", "0.1"), ("d_sae", "16"), ("beta1", "0.9")):
        with pytest.raises(UsageError, match=field):
            SAEConfig(**({"d_sae": 16, "k": 2} | {field: value}))


def test_the_hook_of_a_tensor_is_kept_with_its_sae(tmp_path: Path) -> None:
    made = train(rows(), [TOPK], CONFIG, hook="blocks.3.hook_resid_post", workspace=tmp_path)[0]
    assert made.sae.cfg.hook == "blocks.3.hook_resid_post" and made.path is not None
    assert SAE.load(made.path).cfg.hook == "blocks.3.hook_resid_post"
    assert train(rows(), [TOPK], CONFIG, workspace=tmp_path)[0].path != made.path
    assert train(rows(), [SAEConfig(d_sae=16, k=2, hook="a.place")], CONFIG)[0].sae.cfg.hook == "a.place"
    both = {"hook": "blocks.3.mlp.hook_in", "out_hook": "blocks.3.hook_mlp_out"}
    cfg = train((rows(), rows(seed=1)), [TOPK], CONFIG, **both)[0].sae.cfg
    assert (cfg.hook, cfg.out_hook, cfg.d_out) == (*both.values(), 6)
    one_line("two tensors", rows(), [TOPK], CONFIG, **both)
    one_line("hook= as well", (rows(), rows()), [TOPK], CONFIG, out_hook="blocks.3.hook_mlp_out")
    one_line("own hook", (rows(), rows()), [TOPK], CONFIG, hook="a", out_hook="a")


def test_a_store_still_trains_by_itself_and_names_its_hooks(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path, [20] * 20, d=6)
    assert train(store, TOPK, CONFIG)[0].sae.cfg.hook == HOOK


def random_sae(**more: Any) -> SAE:
    sae = SAE(SAEConfig(d_sae=12, k=3, d_model=6, **more))
    with torch.no_grad():
        for i, p in enumerate(sae.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return sae.requires_grad_(False)


def test_an_array_is_encoded_like_its_tensor() -> None:
    sae, x = random_sae(), rows()
    for given in (x.numpy(), x.double().numpy()):
        assert torch.equal(sae.encode(given).values, sae.encode(x).values)  # type: ignore[arg-type]
        assert torch.equal(sae(given), sae(x))
    for bad in (x.tolist(), "x", np.array(["a"]), None):
        with pytest.raises(DataError, match="tensor") as e:
            sae.encode(bad)  # type: ignore[arg-type]
        assert "\n" not in str(e.value)
    with pytest.raises(DataError, match="d_model=6"):
        sae.encode(torch.tensor(1.0))


def test_dense_activations_decode_like_their_codes() -> None:
    for sae in (random_sae(), random_sae(d_out=6)):
        codes = sae.encode(rows())
        dense = codes.dense(12)
        torch.testing.assert_close(sae.decode(dense), sae.decode(codes), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.decode(dense.view(8, 8, 12))[1], sae.decode(codes)[8:16])
    grads = dense.clone().requires_grad_()
    sae.decode(grads).sum().backward()
    torch.testing.assert_close(grads.grad[0], sae.W_dec.sum(1))
    with pytest.raises(DataError, match=r"Codes, or a tensor \[..., d_sae=12\]") as e:
        sae.decode(dense[:, :5])
    assert "\n" not in str(e.value)
    with pytest.raises(DataError, match="Codes"):
        sae.decode((codes.values, codes.indices))  # type: ignore[arg-type]


def test_an_sae_that_cannot_read_a_suite_is_not_scored_on_it() -> None:
    suite = make_suite("S0", n_rows=50)
    for d_out in (24, 7):
        transcoder = SAE(SAEConfig(d_sae=12, k=2, d_model=24, d_out=d_out))
        with pytest.raises(DataError, match="transcoder") as e:
            recovery_scores(transcoder, suite)
        assert "\n" not in str(e.value)
    with pytest.raises(DataError, match="24"):
        recovery_scores(random_sae(), suite)
    with pytest.raises(DataError, match="make_suite"):
        recovery_scores(random_sae(), "S0")
    with pytest.raises(DataError, match="an SAE"):
        recovery_scores(presets.topk(d_sae=8, k=2), suite)


@pytest.mark.parametrize(
    "bad",
    [
        {"noise": float("nan")}, {"noise": -1.0}, {"noise": float("inf")}, {"noise": "1"}, {"bias": float("nan")},
        {"n_rows": 0}, {"n_rows": -5}, {"n_rows": 10.5}, {"seed": -1}, {"draw": -1}, {"n": 0}, {"d": -3}, {"n": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_suite_of_no_rows_or_of_nan_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))) as e:
        make_suite("S0", **({"n_rows": 10} | bad))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "n"), [("S2", 40), ("S2-rows", 20), ("S4", 3), ("S5", 7), ("S5", 6), ("S6", 12), ("S9-zipf", 0)]
)
def test_a_suite_is_not_made_of_fewer_features_than_it_needs(name: str, n: int) -> None:
    with pytest.raises(UsageError, match=f"n={n}") as e:
        make_suite(name, n_rows=10, n=n)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", 1.5])
def test_a_device_that_is_not_there_is_one_line_wherever_one_is_given(device: Any, tmp_path: Path) -> None:
    store, _ = make_store(tmp_path)
    calls = (
        lambda: load_model("no such model", workspace=tmp_path, device=device),
        lambda: SAE.load("anywhere", device=device),
        lambda: train(store, [TOPK], CONFIG, device=device),
        lambda: store.stream(HOOK, batch_size=4, device=device),
    )
    for call in calls:
        with pytest.raises(UsageError, match="device") as e:
            call()
        assert "\n" not in str(e.value) and "cpu" in str(e.value)


def test_the_cpu_is_there_by_every_name_and_by_default() -> None:
    assert known_device("cpu") == known_device(torch.device("cpu")) == torch.device("cpu")
    assert known_device(default_device()) == default_device()
