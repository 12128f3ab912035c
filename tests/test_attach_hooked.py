"""SAEs in a HookedTransformer, which who comes from SAELens has in hand, and in a TransformerBridge."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from cache.errors import DataError, UsageError
from cache.hooked_transformer import HookedModel
from saes.codes import Codes
from saes.config import SAEConfig
from saes.conventions import Conventions
from saes.sae import SAE
from saes.splice import attach, misplaced, processed
from tests.test_attach_plain import make_sae as any_sae
from tests.tiny import tiny_tokenizer

D, VOCAB = 16, 50
RESID, MLP = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"


def make_model(**changes: Any) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    settings = {"n_layers": 2, "d_model": D, "n_ctx": 32, "d_head": 4, "n_heads": 4, "d_vocab": VOCAB,
                "d_mlp": 40, "act_fn": "gelu", "seed": 0, "device": "cpu"}  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = HookedTransformer(HookedTransformerConfig(**settings | changes))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape) * 0.2)
    return model.eval()


def make_sae(hook: str, d: int = D) -> SAE:
    return any_sae(hook, d)


def tokens(n: int = 9) -> Tensor:
    return torch.randint(0, VOCAB, (2, n), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def n_hooks(model: Any) -> int:
    points = sum(len(p._forward_hooks) + len(p.fwd_hooks) for p in model.hook_dict.values())
    return points + sum(len(m._forward_pre_hooks) for m in model.modules())


def test_unedited_with_the_error_term_is_bit_identical_at_every_hook_at_once(model) -> None:
    places = HookedModel(model)
    saes = {h: make_sae(h, places.d_hook(h)) for h in places.hook_names() if "mlp_in" not in h}
    assert {RESID, MLP, "blocks.1.attn.hook_z", "blocks.0.mlp.hook_post"} <= set(saes)
    clean = model(tokens())
    for grad in (torch.no_grad(), torch.enable_grad()):
        with grad, attach(model, saes) as a:
            assert torch.equal(model(tokens()), clean)
        assert set(a.codes) == set(saes)
    assert n_hooks(model) == 0 and torch.equal(model(tokens()), clean)


@pytest.mark.parametrize("hook", [RESID, "blocks.1.hook_resid_mid", "blocks.0.attn.hook_z", MLP])
def test_codes_and_reconstructions_are_those_of_the_model_s_own_cache(model, hook: str) -> None:
    sae = make_sae(hook)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens())
        x = cache[hook].flatten(2)
        with attach(model, sae, error=False) as a:
            _, spliced = model.run_with_cache(tokens())
    rows = x[:, 1:].reshape(-1, D)
    torch.testing.assert_close(a.codes[hook].dense(3 * D), sae.encode(rows).dense(3 * D))
    torch.testing.assert_close(spliced[hook].flatten(2)[:, 1:].reshape(-1, D), sae(rows))
    assert torch.equal(spliced[hook][:, 0], cache[hook][:, 0])  # position 0 passes untouched


def test_an_edit_is_the_same_as_a_hook_of_transformer_lens_that_adds_what_it_changes(model) -> None:
    sae = make_sae(RESID)

    def double(x: Tensor, hook: Any) -> Tensor:
        codes = sae.encode(x[:, 1:])
        more = sae.decode(codes._replace(values=codes.values * 2)) - sae.decode(codes)
        return torch.cat([x[:, :1], x[:, 1:] + more.view(x[:, 1:].shape)], 1)

    with torch.no_grad():
        want = model.run_with_hooks(tokens(), fwd_hooks=[(RESID, double)])
        with attach(model, sae) as a:
            a.edit(RESID, lambda c: Codes(c.values * 2, c.indices, c.offsets))
            got = model(tokens())
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, model(tokens()))


@pytest.mark.parametrize("frozen", [True, False])
def test_codes_have_the_gradient_of_a_finite_difference(frozen: bool) -> None:
    model, sae, j = make_model(dtype=torch.float64), make_sae(MLP).double(), 7
    model.requires_grad_(not frozen)

    def loss(step: float | None) -> tuple[Tensor, Codes]:
        def nudge(c: Codes) -> None:
            if step is not None:
                c.values[j, 2] += step

        with attach(model, sae) as a:
            a.edit(MLP, nudge)
            return model(tokens())[:, -1].logsumexp(-1).sum(), a.codes[MLP]

    value, codes = loss(None)
    value.backward()
    with torch.no_grad():
        numeric = (loss(1e-5)[0] - loss(-1e-5)[0]) / 2e-5
    assert codes.values.grad is not None
    assert float(codes.values.grad[j, 2]) == pytest.approx(float(numeric), rel=1e-5, abs=1e-9)


def test_hooks_are_gone_after_an_exception_and_those_of_the_caller_stay(model) -> None:
    seen: list[str] = []
    model.add_hook(RESID, lambda x, hook: seen.append(hook.name))
    try:
        with pytest.raises(RuntimeError, match="mine"), attach(model, make_sae(RESID)):
            model(tokens())
            raise RuntimeError("mine")
        assert seen == [RESID] and n_hooks(model) == 2  # the hook, and its entry in fwd_hooks
    finally:
        model.reset_hooks()
    assert n_hooks(model) == 0


def test_reset_hooks_inside_the_block_does_not_take_the_splice_away(model) -> None:
    """run_with_hooks and run_with_cache call it."""
    with torch.no_grad(), attach(model, make_sae(RESID), error=False) as a:
        spliced = model(tokens())
        a.codes.clear()
        model.reset_hooks()
        assert torch.equal(model(tokens()), spliced) and RESID in a.codes
    assert n_hooks(model) == 0


def test_unknown_and_unfit_hooks_are_one_line_with_the_nearest_names(model) -> None:
    for hook, words in (
        ("blocks.0.hook_resid_pst", "did you mean.*blocks.0.hook_resid_post"),
        ("blocks.0.attn.hook_pattern", "no hook"),
        ("blocks.0.hook_mlp_in", r"set_use_hook_mlp_in\(True\)"),
        ("model.layers.0", "did you mean|hook_dict"),
    ):
        with pytest.raises(UsageError, match=words) as e, attach(model, {hook: make_sae("", D)}):
            pass
        assert "\n" not in str(e.value)
    with pytest.raises(DataError, match="d_model=5"), attach(model, {RESID: make_sae(RESID, 5)}):
        pass
    assert n_hooks(model) == 0


def test_tokens_that_continue_a_cache_are_spliced_as_in_one_pass(model) -> None:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache as Cache

    x, ones = tokens(8)[:1], torch.ones(1, 8, dtype=torch.long)
    with torch.no_grad(), attach(model, make_sae(RESID), error=False) as a:
        whole = model(x)
        assert not a.continues
        past = Cache.init_cache(model.cfg, "cpu", 1)
        parts = [model(x[:, :5], past_kv_cache=past, attention_mask=ones[:, :5])]
        parts.append(model(x[:, 5:6], past_kv_cache=past, attention_mask=ones[:, 5:6]))
        assert a.continues and len(a.codes[RESID].values) == 1
        parts.append(model(x[:, 6:], past_kv_cache=past, attention_mask=ones[:, 6:]))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_generate_splices_every_token_but_the_first(model) -> None:
    """`generate` goes past the model's own __call__."""
    options = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    for cached, want in ((True, [3, 1, 1, 1]), (False, [3, 4, 5, 6])):
        rows: list[int] = []
        with torch.no_grad(), attach(model, make_sae(RESID)) as a:
            a.edit(RESID, lambda c: rows.append(len(c.values)))  # noqa: B023
            model.generate(tokens(4)[:1], use_past_kv_cache=cached, **options)
        assert rows == want


def test_padding_on_the_left_is_refused_where_position_0_is_passed_on(model) -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with (
        torch.no_grad(),
        attach(model, make_sae(RESID)),
        pytest.raises(DataError, match="padded on the left"),
    ):
        model(tokens(), attention_mask=mask)
    own = make_model(d_vocab=400)
    own.set_tokenizer(tiny_tokenizer(), default_padding_side="left")
    text = ["The cat waited in the garden.", "Short."]
    with torch.no_grad(), attach(own, make_sae(RESID)), pytest.raises(DataError, match="padded on the left"):
        own(text, prepend_bos=False)  # the model makes the mask itself
    with torch.no_grad(), attach(own, make_sae(RESID), skip_first=False) as a:
        own(text, prepend_bos=False)
    assert RESID in a.codes


def test_a_model_with_centred_weights_is_said_once(capsys) -> None:
    plain, centred = make_model(), make_model()
    centred.center_writing_weights(centred.state_dict())
    processed.cache_clear()
    misplaced.cache_clear()
    with attach(plain, make_sae(RESID)):
        pass
    own = make_sae(RESID)
    own.conventions = Conventions(centred=True)
    with torch.no_grad():
        centred.embed.W_E -= centred.embed.W_E.mean(-1, keepdim=True)
    with attach(centred, own):
        pass
    assert capsys.readouterr().err == ""
    for _ in range(2):
        with attach(centred, make_sae(RESID)):
            pass
    with attach(make_bridge(), make_sae(RESID)):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "from_pretrained_no_processing" in lines[0]


def make_bridge() -> Any:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(n_embd=D, n_layer=2, n_head=4, n_positions=32, vocab_size=400, bos_token_id=0,
                            eos_token_id=0, initializer_range=0.2)  # fmt: skip
        hf = GPT2LMHeadModel(config).eval()
    hf.config.architectures = ["GPT2LMHeadModel"]
    return TransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("compatibility", [False, True])
def test_a_transformer_bridge_is_spliced_as_it_is(compatibility: bool) -> None:
    bridge = make_bridge()
    if compatibility:
        bridge.enable_compatibility_mode()
    hooks = [RESID, "blocks.1.hook_resid_pre", MLP, "blocks.0.attn.hook_z", "blocks.0.hook_resid_mid"]
    saes = {h: make_sae(h) for h in hooks}
    with torch.no_grad():
        clean, cache = bridge.run_with_cache(tokens())
        with attach(bridge, saes) as a:
            assert torch.equal(bridge(tokens()), clean)
        for h in hooks:
            rows = cache[h].flatten(2)[:, 1:].reshape(-1, D)
            torch.testing.assert_close(
                a.codes[h].dense(3 * D), saes[h].encode(rows).dense(3 * D), rtol=1e-4, atol=1e-4
            )
        with pytest.raises(RuntimeError, match="mine"), attach(bridge, saes, error=False):
            assert not torch.equal(bridge(tokens()), clean)
            raise RuntimeError("mine")
        assert torch.equal(bridge(tokens()), clean)
    with attach(bridge, saes) as a:
        bridge(tokens())[:, -1].logsumexp(-1).sum().backward()
    assert all(a.codes[h].values.grad is not None for h in hooks)
    with (
        pytest.raises(UsageError, match="did you mean"),
        attach(bridge, {"blocks.0.hook_resid": saes[RESID]}),
    ):
        pass


def test_generation_of_a_bridge_is_the_same_with_and_without_its_cache() -> None:
    bridge, prompt = make_bridge(), tokens(4)[:1]
    options = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with torch.no_grad(), attach(bridge, make_sae(RESID), error=False):
        cached = bridge.generate(prompt, use_past_kv_cache=True, **options)
        plain = bridge.generate(prompt, use_past_kv_cache=False, **options)
    assert torch.equal(cached, plain)


def test_a_model_with_hook_points_but_no_widths_is_one_line() -> None:
    class Odd(torch.nn.Linear):
        hook_dict = types.MappingProxyType({})

        def add_hook(self) -> None: ...

    with pytest.raises(UsageError, match="no cfg") as e, attach(Odd(3, 3), {RESID: SAE(SAEConfig(d_sae=8, k=2, d_model=D))}):  # fmt: skip
        pass
    assert "\n" not in str(e.value)


def test_a_bridge_whose_weights_were_processed_is_said(capsys) -> None:
    bridge = make_bridge()
    bridge.enable_compatibility_mode()
    processed.cache_clear()
    capsys.readouterr()
    with attach(bridge, make_sae(RESID)):
        pass
    assert "enable_compatibility_mode" in capsys.readouterr().err


def test_hooks_that_the_model_does_not_run_or_splits_by_head_are_one_line() -> None:
    """A splice there would do nothing, or fail in the middle of a pass."""
    with pytest.raises(UsageError, match="attention only"):
        HookedModel(make_model(attn_only=True)).check_hook(MLP)
    whole = make_model()
    whole.set_use_split_qkv_input(True)
    with pytest.raises(UsageError, match="for each head"):
        HookedModel(whole).check_hook("blocks.1.ln1.hook_normalized")
