"""Generation with and without an edit, in lock-step.

Baseline and steered text are rows 0 and 1 of ONE forward pass with one key-value cache; the edit touches row 1
only. Both rows draw with the same random number at each step (inverse CDF over token ids), so that where the
two distributions agree the two texts agree, and a difference between them is due to the edit. Hooks exist only
during a forward pass: stopping between two tokens leaves the model clean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache.errors import UsageError
from steering.edits import Edit, edit_hooks

BASELINE, STEERED = 0, 1


class Step(NamedTuple):
    """What one step of generation adds. A token is None once its text has ended."""

    number: int  # 0 for the first generated token
    baseline: int | None  # token id
    steered: int | None
    baseline_text: str  # new characters; empty while a character is incomplete
    steered_text: str
    logits: Tensor  # [2, d_vocab] float32, what the two tokens were drawn from


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.0  # 0 takes the most likely token
    top_p: float = 1.0  # draw from the smallest set of tokens that holds this much probability
    seed: int = 0  # of the draws shared by both rows

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise UsageError(f"temperature {self.temperature}: use 0 to 10")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p}: use a number above 0, at most 1")


class Generation:
    """A running or finished pair of texts. Iterate over it once to generate; stop whenever you like."""

    def __init__(
        self, model: Any, prompt_ids: list[int], edits: Sequence[Edit], limit: int, draw: Sampling
    ) -> None:
        self.model = model
        self.prompt_ids = prompt_ids
        self.edits = list(edits)
        self.limit = limit
        self.draw = draw
        self.baseline_ids: list[int] = []
        self.steered_ids: list[int] = []
        self._sizes: list[Tensor] = []

    @property
    def edit_size(self) -> float:
        """Mean |Δ|/|x| over the positions edited so far; 0 if none was."""
        return float(torch.cat(self._sizes).mean()) if self._sizes else 0.0

    def __iter__(self) -> Iterator[Step]:
        rng = torch.Generator().manual_seed(self.draw.seed)
        texts = (_Text(self.model.tokenizer), _Text(self.model.tokenizer))
        ids = (self.baseline_ids, self.steered_ids)
        eos = _eos_ids(self.model)
        ended = [False, False]
        tokens = torch.tensor([self.prompt_ids] * 2, device=self.model.device)
        past, offset = None, 0
        for number in range(self.limit):
            logits, past = self._forward(tokens, past, offset)
            offset += tokens.shape[1]
            uniform = float(torch.rand((), generator=rng, dtype=torch.float64))
            drawn = [sample(row, self.draw, uniform) for row in logits]
            shown: list[int | None] = [None, None]
            pieces = ["", ""]
            for row in (BASELINE, STEERED):
                if ended[row]:
                    continue
                shown[row] = drawn[row]
                ids[row].append(drawn[row])
                ended[row] = drawn[row] in eos
                pieces[row] = "" if ended[row] else texts[row].push(drawn[row])
            yield Step(number, shown[0], shown[1], pieces[0], pieces[1], logits)
            if all(ended):
                return
            tokens = torch.tensor([[drawn[0]], [drawn[1]]], device=self.model.device)

    def _forward(self, tokens: Tensor, past: Any, offset: int) -> tuple[Tensor, Any]:
        """Logits of the last position [2, d_vocab] and the grown cache."""
        hooks = edit_hooks(
            self.edits, row=STEERED, prompt_length=len(self.prompt_ids), offset=offset, sizes=self._sizes
        )
        with torch.inference_mode(), self.model.hooked(hooks):
            logits, past = self.model.forward(tokens, past=past, use_cache=True)
        last = logits[:, -1].detach().to("cpu", torch.float32)
        if all(edit.is_noop for edit in self.edits):
            # Rows of one matrix product may differ in the last bit; with nothing to edit both are the baseline.
            last = last[[BASELINE, BASELINE]]
        return last, past


def generate(
    model: Any,
    prompt: str,
    *,
    edits: Sequence[Edit] = (),
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
) -> Generation:
    """Generate `max_new_tokens` from `prompt` without and with `edits`; iterate over the result for the steps.

    `chat=True` wraps the prompt as the user's turn in the tokenizer's chat template. Nothing runs before the
    first step is asked for.
    """
    for edit in edits:
        model.check_hook(edit.hook)
    draw = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    prompt_ids = encode_prompt(model.tokenizer, prompt, chat=chat)
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}: use 1 or more")
    room = model.max_context
    if room is not None and len(prompt_ids) + max_new_tokens > room:
        raise UsageError(
            f"prompt of {len(prompt_ids)} tokens + {max_new_tokens} new ones exceed the model's context of {room}: "
            "shorten one of them"
        )
    return Generation(model, prompt_ids, edits, max_new_tokens, draw)


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = False) -> list[int]:
    """Token ids of a prompt, with whatever special tokens the tokenizer itself adds."""
    if not prompt.strip():
        raise UsageError("the prompt is empty: type some text to continue")
    if not chat:
        return [int(i) for i in tokenizer(prompt)["input_ids"]]
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("this model's tokenizer has no chat template: switch chat off")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def sample(logits: Tensor, draw: Sampling, uniform: float) -> int:
    """The token that the uniform number in [0, 1) picks from the distribution, tokens in order of id."""
    if draw.temperature == 0:
        return int(logits.argmax())
    p = torch.softmax(logits.double() / draw.temperature, -1)
    if draw.top_p < 1:
        ordered, order = p.sort(descending=True)
        # Keep a token while the ones before it hold less than top_p; the first always stays.
        outside = ordered.cumsum(0) - ordered >= draw.top_p
        p = p.index_fill(0, order[outside], 0.0)
    cdf = p.cumsum(0)
    return int(torch.searchsorted(cdf, uniform * cdf[-1], right=True).clamp_max(int(p.nonzero()[-1])))


class _Text:
    """Characters as tokens arrive: a token that ends inside a UTF-8 character shows when it is complete."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self._shown) :]
        self._shown = text
        return piece


def _eos_ids(model: Any) -> set[int]:
    """Every id that ends a text: the tokenizer's and the ones of the model's generation config."""
    found: list[Any] = [model.tokenizer.eos_token_id]
    config = getattr(model.hf, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    found += listed if isinstance(listed, list | tuple) else [listed]
    return {int(i) for i in found if i is not None}
