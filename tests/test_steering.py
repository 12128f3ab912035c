"""Steering: the edit is exactly what was asked for, where it was asked for, and nowhere else."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import DataError, UsageError
from saes import SAE, SAEConfig
from steering import Direction, Edit, generate, measure
from steering.edits import edit_hooks, feature_code
from steering.effects import repeated_ngrams
from steering.generate import Sampling, sample
from tests.tiny import D_MODEL

HOOK = "blocks.1.hook_resid_post"
PROMPT = "The cat waited in the garden until"
NORM = 6.0


@pytest.fixture
def model(tiny_model) -> Any:
    return tiny_model


@pytest.fixture(scope="module")
def direction() -> Direction:
    return Direction.from_vector(HOOK, torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1)))


def make_sae(activation: str, *, tied: bool) -> SAE:
    """An SAE on orthonormal decoder rows (tied: code = projection), or a random overcomplete one."""
    g = torch.Generator().manual_seed(3)
    d_sae = D_MODEL if tied else 4 * D_MODEL
    sae = SAE(
        SAEConfig(d_sae=d_sae, k=d_sae if tied else 8, activation=activation, d_model=D_MODEL, hook=HOOK)
    )
    rows = torch.randn(d_sae, D_MODEL, generator=g)
    if tied:
        rows = torch.linalg.qr(rows.T).Q.T.contiguous()
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows)
        if not tied:
            sae.W_dec.mul_(1.7)
    return sae.requires_grad_(False)


def steps(model: Any, *edits: Edit, n: int = 6, **options: Any) -> list[Any]:
    return list(generate(model, PROMPT, edits=edits, max_new_tokens=n, **options))


def residuals(model: Any, edits: list[Edit], tokens: torch.Tensor, prompt_length: int, offset: int = 0):
    """The residual before and after the edit, read at the hook itself."""
    seen: dict[str, torch.Tensor] = {}
    fns = edit_hooks(edits, row=1, prompt_length=prompt_length, offset=offset)

    def spy(x: torch.Tensor) -> torch.Tensor | None:
        seen["before"] = x.clone()
        out = fns[HOOK](x)
        seen["after"] = (x if out is None else out).clone()
        return out

    with torch.inference_mode(), model.hooked({HOOK: spy}):
        model.forward(tokens)
    return seen["before"], seen["after"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_strength_zero_gives_bit_identical_texts(model, direction, temperature) -> None:
    edit = Edit(direction=direction, strength=0.0, unit_norm=NORM)
    plain = steps(model, temperature=temperature, seed=4)
    zero = steps(model, edit, temperature=temperature, seed=4)
    assert len(zero) == len(plain) == 6
    for a, b in zip(plain, zero):
        assert torch.equal(b.logits[0], b.logits[1]) and torch.equal(a.logits, b.logits)
        assert b.baseline == b.steered and b.baseline_text == b.steered_text


def test_a_hook_that_adds_nothing_leaves_every_bit(model, direction) -> None:
    """The same through the hook: an edit of strength 0 beside one that acts elsewhere."""
    tokens = torch.tensor([model.tokenizer(PROMPT)["input_ids"]] * 2)
    nothing = Edit(direction=direction, strength=1.0, unit_norm=NORM, where="generated")
    before, after = residuals(model, [nothing], tokens, tokens.shape[1])
    assert torch.equal(before, after)


@pytest.mark.parametrize("where", ["prompt", "generated", "all"])
@pytest.mark.parametrize("offset", [0, 3])
def test_edit_is_exact_at_its_positions_and_absent_elsewhere(model, direction, where, offset) -> None:
    tokens = torch.tensor([model.tokenizer(PROMPT)["input_ids"]] * 2)
    prompt_length = offset + 3
    edit = Edit(direction=direction, strength=0.5, unit_norm=NORM, where=where)
    before, after = residuals(model, [edit], tokens, prompt_length, offset)
    for t in range(tokens.shape[1]):
        at = offset + t
        inside = {"prompt": at < prompt_length, "generated": at >= prompt_length, "all": True}[
            where
        ] and at > 0
        expected = before[1, t] + (0.5 * NORM) * direction.vector if inside else before[1, t]
        assert torch.equal(after[1, t], expected), f"position {at}"
    assert torch.equal(after[0], before[0]), "the baseline row is never edited"


def test_position_zero_is_never_edited_even_in_a_prompt_of_one_token(model, direction) -> None:
    tokens = torch.tensor([model.tokenizer(PROMPT)["input_ids"][:1]] * 2)
    before, after = residuals(model, [Edit(direction=direction, strength=9.0, unit_norm=NORM)], tokens, 1)
    assert torch.equal(before, after)


def test_baseline_row_is_the_unedited_generation(model, direction) -> None:
    strong = Edit(direction=direction, strength=3.0, unit_norm=NORM)
    plain, edited = steps(model), steps(model, strong)
    for a, b in zip(plain, edited):
        assert torch.equal(a.logits[0], b.logits[0])
    assert [s.baseline for s in plain] == [s.baseline for s in edited]
    assert [s.steered for s in edited] != [s.baseline for s in edited], "a strong edit changes the text"
    ids = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    alone = model.hf.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert alone[0, ids.shape[1] :].tolist() == [s.baseline for s in edited]


def test_cached_generation_equals_one_full_pass(model, direction) -> None:
    """Every position is edited once: generating step by step gives the logits of one pass over the whole text."""
    edit = Edit(direction=direction, strength=1.0, unit_norm=NORM)
    run = generate(model, PROMPT, edits=[edit], max_new_tokens=5)
    stepped = list(run)
    full = torch.tensor([run.prompt_ids + run.baseline_ids, run.prompt_ids + run.steered_ids])
    with torch.inference_mode(), model.hooked(edit_hooks([edit], row=1, prompt_length=len(run.prompt_ids))):
        logits, _ = model.forward(full)
    for i, step in enumerate(stepped):
        torch.testing.assert_close(step.logits, logits[:, len(run.prompt_ids) - 1 + i], rtol=1e-4, atol=1e-4)


def test_stopping_early_leaves_the_model_clean(model, direction) -> None:
    ids = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    with torch.inference_mode():
        before, _ = model.forward(ids)
        running = iter(
            generate(model, PROMPT, edits=[Edit(direction=direction, strength=5.0, unit_norm=NORM)])
        )
        next(running)
        between, _ = model.forward(ids)
        running.close()
        after, _ = model.forward(ids)
    assert torch.equal(before, between) and torch.equal(before, after)


@pytest.mark.parametrize("activation", ["topk", "abs_topk"])
@pytest.mark.parametrize("sign", [1, -1])
def test_clamp_sets_the_feature_coefficient(activation, sign) -> None:
    sae = make_sae(activation, tied=True)
    direction = Direction.from_sae_feature(sae, 5, sign)
    x = torch.randn(20, D_MODEL, generator=torch.Generator().manual_seed(0)) * 3
    edit = Edit(direction=direction, op="clamp", strength=0.75, unit_norm=NORM)
    moved = x + edit.delta(x)
    reached = moved @ sae.W_dec[5]
    negative_start = (x @ sae.W_dec[5]).clamp_max(0) if activation == "topk" else 0.0
    # A one-sided code reads 0 below zero, so the clamp moves from 0 there, not from the projection.
    torch.testing.assert_close(
        reached, torch.full((20,), sign * 0.75 * NORM) + negative_start, rtol=0, atol=1e-4
    )
    if activation == "abs_topk":
        code = sae.encode(moved).dense(D_MODEL)[:, 5]
        torch.testing.assert_close(code, torch.full((20,), sign * 0.75 * NORM), rtol=0, atol=1e-4)
    others = [i for i in range(D_MODEL) if i != 5]
    torch.testing.assert_close(moved @ sae.W_dec[others].T, x @ sae.W_dec[others].T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation", ["topk", "abs_topk"])
@pytest.mark.parametrize("op", ["clamp", "ablate"])
def test_feature_edit_moves_the_reconstruction_by_that_feature_only(activation, op) -> None:
    """For a linear decoder D(f') − D(f) = (c − f_i) d_i; f read from the dense codes is the oracle."""
    sae = make_sae(activation, tied=False)
    x = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(2))
    dense = sae.encode(x).dense(sae.cfg.d_sae)
    feature = int((dense != 0).sum(0).argmax())
    direction = Direction.from_sae_feature(sae, feature, -1)
    edit = Edit(direction=direction, op=op, strength=0.5, unit_norm=NORM)
    goal = edit.target_code() if op == "clamp" else 0.0
    assert edit.target_code() * float(sae.W_dec[feature].norm()) == pytest.approx(-0.5 * NORM, rel=1e-5)
    wanted = (goal - dense[:, feature])[:, None] * sae.W_dec[feature]
    torch.testing.assert_close(edit.delta(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(feature_code(sae, x, feature), dense[:, feature])


def test_ablation_of_a_silent_feature_changes_nothing() -> None:
    sae = make_sae("topk", tied=False)
    x = torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(5))
    dense = sae.encode(x).dense(sae.cfg.d_sae)
    feature = int((dense != 0).sum(0).argmax())
    delta = Edit(direction=Direction.from_sae_feature(sae, feature), op="ablate").delta(x)
    silent = dense[:, feature] == 0
    assert silent.any() and not delta[silent].any() and delta[~silent].any(-1).all()


@given(st.floats(-3, 3), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_projection_clamp_and_ablation_of_a_bare_direction(strength: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    d = Direction.from_vector(HOOK, torch.randn(D_MODEL, generator=g))
    x = torch.randn(7, D_MODEL, generator=g)
    for op, goal in (("clamp", strength * NORM), ("ablate", 0.0)):
        moved = x + Edit(direction=d, op=op, strength=strength, unit_norm=NORM).delta(x)
        torch.testing.assert_close(moved @ d.vector, torch.full((7,), goal), rtol=0, atol=1e-4)
        rest = moved - (moved @ d.vector)[:, None] * d.vector
        torch.testing.assert_close(rest, x - (x @ d.vector)[:, None] * d.vector, rtol=0, atol=1e-4)


def test_two_edits_at_one_hook_both_count_and_their_order_does_not(model) -> None:
    sae = make_sae("abs_topk", tied=False)
    first = Edit(direction=Direction.from_sae_feature(sae, 3), op="clamp", strength=0.4, unit_norm=NORM)
    second = Edit(direction=Direction.from_sae_feature(sae, 9), strength=0.3, unit_norm=NORM)
    tokens = torch.tensor([model.tokenizer(PROMPT)["input_ids"]] * 2)
    before, both = residuals(model, [first, second], tokens, 4)
    _, swapped = residuals(model, [second, first], tokens, 4)
    x = before[1, 1:]
    torch.testing.assert_close(both[1, 1:], x + first.delta(x) + second.delta(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both, swapped, rtol=1e-5, atol=1e-5)


def test_direction_of_a_feature_is_its_unit_decoder_row_turned_to_the_pole() -> None:
    sae = make_sae("abs_topk", tied=False)
    plus, minus = (Direction.from_sae_feature(sae, 11, s) for s in (1, -1))
    assert torch.equal(plus.vector, -minus.vector) and plus.hook == HOOK
    torch.testing.assert_close(plus.vector * plus.scale, sae.W_dec[11])
    assert float(plus.vector.norm()) == pytest.approx(1, abs=1e-6)


def test_effects_are_those_of_the_unedited_model(model, direction) -> None:
    edit = Edit(direction=direction, strength=1.0, unit_norm=NORM)
    run = generate(model, PROMPT, edits=[edit], max_new_tokens=8)
    list(run)
    got = measure(model, run)
    n = len(run.prompt_ids)
    for ids, effect in ((run.baseline_ids, got.baseline), (run.steered_ids, got.steered)):
        with torch.inference_mode():
            logits, _ = model.forward(torch.tensor([run.prompt_ids + ids]))
        loss = torch.nn.functional.cross_entropy(logits[0, n - 1 : -1].double(), torch.tensor(ids))
        assert effect.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-3)
        assert effect.n_tokens == len(ids)
    assert got.kl_per_token > 0 and got.edit_size > 0


def test_without_an_edit_there_is_no_effect(model, direction) -> None:
    run = generate(
        model, PROMPT, edits=[Edit(direction=direction, strength=0.0, unit_norm=NORM)], max_new_tokens=4
    )
    list(run)
    got = measure(model, run)
    assert got.kl_per_token == 0 and got.edit_size == 0
    assert got.baseline.perplexity == pytest.approx(got.steered.perplexity, rel=1e-5)


def test_edit_size_is_the_change_against_the_residual(model, direction) -> None:
    edit = Edit(direction=direction, strength=0.5, unit_norm=NORM, where="prompt")
    run = generate(model, PROMPT, edits=[edit], max_new_tokens=1)
    list(run)
    tokens = torch.tensor([run.prompt_ids] * 2)
    before, after = residuals(model, [edit], tokens, tokens.shape[1])
    share = (after - before)[1, 1:].norm(dim=-1) / before[1, 1:].norm(dim=-1)
    assert run.edit_size == pytest.approx(float(share.mean()), rel=1e-5)


def test_kl_grows_with_strength(model, direction) -> None:
    sizes = []
    for strength in (0.1, 0.5, 2.0):
        run = generate(
            model,
            PROMPT,
            edits=[Edit(direction=direction, strength=strength, unit_norm=NORM)],
            max_new_tokens=4,
        )
        list(run)
        sizes.append(measure(model, run).kl_per_token)
    assert sizes == sorted(sizes) and sizes[0] > 0


def test_repeated_trigrams() -> None:
    assert repeated_ngrams([1, 2]) is None
    assert repeated_ngrams([1, 2, 3, 4]) == 0
    assert repeated_ngrams([1, 1, 1, 1, 1, 1]) == pytest.approx(3 / 4)
    assert repeated_ngrams([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)


def test_sampling_follows_the_distribution_and_its_nucleus() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    grid = [(i + 0.5) / 2000 for i in range(2000)]
    for temperature, top_p, expected in (
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (1.0, 0.7, [0.625, 0.375, 0.0, 0.0]),
        (0.5, 1.0, [0.25, 0.09, 0.0225, 0.0025]),
    ):
        draw = Sampling(temperature=temperature, top_p=top_p)
        counts = torch.bincount(torch.tensor([sample(logits, draw, u) for u in grid]), minlength=4) / 2000
        wanted = torch.tensor(expected) / sum(expected)
        torch.testing.assert_close(counts, wanted, rtol=0, atol=1e-3)
    assert sample(logits, Sampling(temperature=0), 0.999) == 0
    assert sample(logits, Sampling(temperature=1.0), 1 - 1e-16) == 3


def test_the_same_seed_gives_the_same_texts(model, direction) -> None:
    edit = Edit(direction=direction, strength=0.2, unit_norm=NORM)
    first, again, other = (
        [(s.baseline, s.steered) for s in steps(model, edit, n=12, temperature=1.5, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert first == again and first != other


def test_text_of_the_steps_is_the_decoded_text(model, direction) -> None:
    run = generate(model, "café ☕ “", edits=[], max_new_tokens=20, temperature=3.0, seed=8)
    text = "".join(s.baseline_text for s in run)
    whole = model.tokenizer.decode(run.baseline_ids)
    assert whole.startswith(text) and len(whole) - len(text) <= 4


def test_chat_wraps_the_prompt_in_the_template(model) -> None:
    run = generate(model, "Hello", chat=True, max_new_tokens=1)
    text = model.tokenizer.decode(run.prompt_ids)
    assert text.startswith("<|im_start|>user\nHello") and text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "  "}, "empty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 100_000}, "context of 512"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
    ],
)
def test_wrong_requests_say_what_to_change(model, options, words) -> None:
    with pytest.raises(UsageError, match=words):
        generate(model, **({"prompt": PROMPT} | options))


def test_wrong_edits_say_what_to_change(model, direction) -> None:
    with pytest.raises(UsageError, match="add, clamp, ablate"):
        Edit(direction=direction, op="scale")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="prompt, generated, all"):
        Edit(direction=direction, where="first")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="finite"):
        Edit(direction=direction, strength=float("nan"))
    with pytest.raises(UsageError, match="features 0 to"):
        Direction.from_sae_feature(make_sae("topk", tied=True), D_MODEL)
    with pytest.raises(DataError, match="points nowhere"):
        Direction.from_vector(HOOK, torch.zeros(D_MODEL))
    elsewhere = Direction.from_vector("blocks.9.hook_resid_post", torch.ones(D_MODEL))
    with pytest.raises(UsageError, match="blocks"):
        generate(model, PROMPT, edits=[Edit(direction=elsewhere)])


def test_naming_the_package_does_not_import_torch() -> None:
    code = "import sys, steering; dir(steering); print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )
