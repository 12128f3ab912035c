"""A model for tests of the store: a few integer operations on the token ids, exact in float16, without transformers.

The vector of a token depends on all tokens before it in its row of the forward pass, so rows that are mixed up,
shifted or read from another row show. `expected` computes the same with numpy from the token table.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.corpus import Corpus

D = 12
HOOK = "blocks.0.hook_resid_post"


class FakeModel:
    """`shift` stands for another machine's rounding: the same identity, other values."""

    name = "fake"
    source = ""
    max_context = None
    device = torch.device("cpu")
    edits_open = 0

    def __init__(self, *, shift: int = 0, seconds: float = 0.0) -> None:
        self.shift, self.seconds = shift, seconds
        self.running = threading.RLock()
        self.identity: dict[str, Any] = {
            "model": self.name, "weights_sha256": "0" * 64, "tokenizer_sha256": "0" * 64,
            "template_sha256": None, "backend": "fake", "attn_implementation": "none", "forward_dtype": "float32",
        }  # fmt: skip

    def hook_names(self) -> list[str]:
        return [HOOK]

    def d_hook(self, name: str, /) -> int:
        return D

    def check_hook(self, name: str, /) -> None:
        assert name == HOOK

    def capture(self, inputs: Tensor, hooks: Sequence[str], /) -> dict[str, Tensor]:
        time.sleep(self.seconds)
        total = (inputs * 31 + 7).cumsum(1)[..., None] + torch.arange(D) * 101 + self.shift
        return {HOOK: (total % 1009 - 504).float() / 8}

    def hooked(self, edits: Mapping[str, Any], /) -> Any:
        return nullcontext()


def expected(corpus: Corpus, *, shift: int = 0) -> Tensor:
    """Row r of every token table row, float32 [n_tokens, D]."""
    tok, start = corpus.column("tok").astype(np.int64), corpus.seq_offsets
    sums = np.concatenate([np.cumsum(tok[a:b] * 31 + 7) for a, b in pairwise(start)])
    return torch.from_numpy(
        ((sums[:, None] + np.arange(D) * 101 + shift) % 1009 - 504).astype(np.float32) / 8
    )
