"""The inspector's numbers against dense arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from app.inspection import Inspection, inspect_text
from cache.errors import UsageError
from saes import SAE, SAEConfig
from tests.tiny import D_MODEL

HOOK = "blocks.1.hook_resid_post"
TEXT = "The cat waited in the garden until the rain had stopped."


@pytest.fixture(scope="module")
def sae() -> SAE:
    g = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(d_sae=200, k=6, activation="abs_topk", d_model=D_MODEL, hook=HOOK))
    with torch.no_grad():
        for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
            p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return sae


def test_codes_and_unexplained_share_are_those_of_the_dense_sae(tiny_model, sae) -> None:
    mean = np.linspace(-1, 1, D_MODEL)
    found = inspect_text(tiny_model, sae, TEXT, mean=mean)
    ids = tiny_model.tokenizer(TEXT)["input_ids"]
    x = tiny_model.capture(torch.tensor([ids]), [HOOK])[HOOK][0].clone()
    with torch.no_grad():
        dense = sae.encode(x).dense(200)
        x_hat = dense @ sae.W_dec + sae.b_dec
    for feature in range(200):
        assert found.column(feature)[0] == 0, "position 0 is not encoded"
        np.testing.assert_allclose(
            found.column(feature)[1:], dense[1:, feature].numpy(), rtol=1e-4, atol=1e-5
        )
    share = ((x - x_hat) ** 2).sum(-1).numpy() / ((x.numpy() - mean) ** 2).sum(-1)
    np.testing.assert_allclose(found.fvu[1:], share[1:], rtol=1e-4)
    assert np.isnan(found.fvu[0]) and "".join(found.tokens) == TEXT


def test_pooling_over_the_text_and_over_one_token() -> None:
    indices = np.array([[-1, -1], [3, 5], [5, 3], [7, -1]])
    values = np.array([[0, 0], [1.0, -4.0], [2.0, -1.5], [0.5, 0]], dtype=np.float32)
    found = Inspection(tokens=list("abcd"), indices=indices, values=values, fvu=np.zeros(4), norm=np.ones(4))
    assert found.at(2) == [(5, 2.0), (3, -1.5)] and found.at(0) == []
    assert found.pooled("max") == [(5, -4.0, 1), (3, -1.5, 2), (7, 0.5, 3)]
    assert found.pooled("last") == [(7, 0.5, 3)]
    means = {f: v for f, v, _ in found.pooled("mean")}
    assert means == pytest.approx({5: -2 / 3, 3: -0.5 / 3, 7: 0.5 / 3})


@pytest.mark.parametrize(
    ("text", "words"), [("", "empty"), ("The", "one token"), ("xqz!" * 400, "takes 512")]
)
def test_texts_that_cannot_be_inspected_say_why(tiny_model, sae, text, words) -> None:
    with pytest.raises(UsageError, match=words):
        inspect_text(tiny_model, sae, text, mean=np.zeros(D_MODEL))
