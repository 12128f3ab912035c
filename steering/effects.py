"""What an edit did to one pair of texts, measured by the unedited model (teacher forced, one forward pass).

    perplexity      exp(mean −log p) of the generated tokens, given the prompt, under the unedited model
    repeated        share of token 3-grams of the text that occurred before in it
    kl_per_token    mean KL(unedited ‖ edited) in nats of the next-token distribution along the baseline text
    edit_size       mean |Δ|/|x| over the positions that were edited during generation

The three rows are baseline text, steered text (both unedited) and baseline text with the edit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache.errors import UsageError
from steering.edits import edit_hooks
from steering.generate import Generation

EDITED_ROW = 2


class TextEffect(NamedTuple):
    n_tokens: int
    perplexity: float
    repeated: float | None  # None for fewer than three tokens


class Effects(NamedTuple):
    baseline: TextEffect
    steered: TextEffect
    kl_per_token: float  # nats
    edit_size: float  # share of the residual norm


def measure(model: Any, generation: Generation) -> Effects:
    """Measure a finished or stopped generation."""
    g = generation
    if not g.baseline_ids or not g.steered_ids:
        raise UsageError("nothing was generated yet: iterate over the generation first")
    texts = [g.baseline_ids, g.steered_ids, g.baseline_ids]
    start = len(g.prompt_ids)
    logp = _next_logp(model, g, texts)  # [3, longest, d_vocab]; row t predicts generated token t
    n = len(g.baseline_ids)
    base, edited = logp[0, :n], logp[EDITED_ROW, :n]
    # With nothing to edit the two rows may still differ in the last bit; the distance is then 0 by definition.
    unchanged = not edit_hooks(g.edits, row=EDITED_ROW, prompt_length=start)
    kl = 0.0 if unchanged else float((base.exp() * (base - edited)).sum(-1).mean())
    return Effects(
        baseline=_text_effect(logp[0], g.baseline_ids),
        steered=_text_effect(logp[1], g.steered_ids),
        kl_per_token=max(kl, 0.0),
        edit_size=g.edit_size,
    )


def _next_logp(model: Any, g: Generation, texts: list[list[int]]) -> Tensor:
    """Log-probabilities of each generated position. Shorter rows are padded at the right, where causal
    attention cannot see the padding from a real position."""
    longest = max(len(t) for t in texts)
    rows = [g.prompt_ids + t + [0] * (longest - len(t)) for t in texts]
    tokens = torch.tensor(rows, device=model.device)[:, :-1]  # the last token predicts nothing that is scored
    hooks = edit_hooks(g.edits, row=EDITED_ROW, prompt_length=len(g.prompt_ids))
    with torch.inference_mode(), model.hooked(hooks):
        logits, _ = model.forward(tokens)
    wanted = logits[:, len(g.prompt_ids) - 1 :]
    return wanted.detach().to("cpu", torch.float32).log_softmax(-1)


def _text_effect(logp: Tensor, ids: list[int]) -> TextEffect:
    picked = logp[torch.arange(len(ids)), torch.tensor(ids)]
    return TextEffect(len(ids), math.exp(-float(picked.double().mean())), repeated_ngrams(ids))


def repeated_ngrams(ids: list[int], n: int = 3) -> float | None:
    """Share of n-grams that are a repeat of an earlier one; None where there is no n-gram."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None
