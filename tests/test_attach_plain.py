"""SAEs in plain Hugging Face models: the same splice as through TransformerLens, at every hook, on two families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cache.backend_tl import TransformerLensBackend
from cache.errors import DataError, UsageError
from cache.hooks import module_sites, probe_tokens
from cache.plain_model import PlainModel
from saes.codes import Codes
from saes.config import SAEConfig
from saes.conventions import Conventions
from saes.sae import SAE
from saes.splice import Attached, attach, misplaced
from tests.tiny import tiny_tokenizer

D, VOCAB = 32, 60
MLP_OUT = "blocks.0.hook_mlp_out"


def make_model(family: str) -> Any:
    import transformers as t

    shared = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "llama":
            config = t.LlamaConfig(
                hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, initializer_range=0.2, **shared,
            )  # fmt: skip
            return t.LlamaForCausalLM(config).eval().requires_grad_(False)
        config = t.GPT2Config(n_embd=D, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **shared)
        return t.GPT2LMHeadModel(config).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def hf(request) -> Any:
    return make_model(request.param)


def make_sae(hook: str, d: int = D, activation: str = "topk", seed: int = 0) -> SAE:
    k = 5 if activation == "topk" else 0
    sae = SAE(SAEConfig(d_sae=3 * d, k=k, activation=activation, d_model=d, hook=hook))
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=gen) * 0.3)
    return sae.requires_grad_(False)


def tokens(n: int = 9) -> Tensor:
    return torch.randint(0, VOCAB, (2, n), generator=torch.Generator().manual_seed(5))


def hooks_of(model: Any) -> list[str]:
    return PlainModel(model).hook_names()


def test_an_unedited_splice_with_the_error_term_is_bit_identical_at_every_hook_at_once(hf) -> None:
    plain = PlainModel(hf)
    saes = {h: make_sae(h, plain.d_hook(h)) for h in plain.hook_names()}
    clean = hf(tokens()).logits
    for grad in (torch.no_grad(), torch.enable_grad()):
        with grad, attach(hf, saes) as a:
            assert torch.equal(hf(tokens()).logits, clean)
        assert set(a.codes) == set(saes)
        assert all(len(c.values) == 2 * 8 for c in a.codes.values())
    assert torch.equal(hf(tokens()).logits, clean)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())


@pytest.mark.parametrize("error", [True, False, "detached"])
@pytest.mark.parametrize(("family", "activation"), [("llama", "topk"), ("llama", "relu"), ("gpt2", "topk")])
def test_the_splice_equals_that_of_transformer_lens(error: Any, family: str, activation: str) -> None:
    """Values of codes, logits and gradients, with edits at two hooks, one of them past the residual's branch."""
    hooks = [
        "blocks.0.hook_resid_mid",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_attn_out",
        "blocks.1.hook_mlp_out",
    ]
    saes = {h: make_sae(h, activation=activation, seed=i) for i, h in enumerate(hooks)}
    got = {}
    for kind in ("plain", "bridge"):
        model = make_model(family)
        spliced: Any = model if kind == "plain" else Bridged(model)
        with attach(spliced, saes, error=error) as a:
            a.edit(hooks[0], lambda c: Codes(c.values * 2, c.indices, c.offsets))
            logits = model(tokens()).logits
            logits[:, -1].logsumexp(-1).sum().backward()
        got[kind] = (logits.detach(), [a.codes[h] for h in hooks])
    torch.testing.assert_close(got["plain"][0], got["bridge"][0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got["plain"][1], got["bridge"][1]):
        assert torch.equal(ours.indices, theirs.indices)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-5, atol=1e-5)
        assert theirs.values.grad is not None and theirs.values.grad.abs().sum() > 0
        torch.testing.assert_close(ours.values.grad, theirs.values.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_splices_further_down_do_not_count_the_gradient_of_codes_twice(activation: str) -> None:
    """With the error term the model goes on with x itself, so codes further up have the plain model's gradient."""
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post"]
    saes = {h: make_sae(h, activation=activation, seed=i) for i, h in enumerate(hooks)}
    got = []
    for used in (hooks[:1], hooks):
        model = make_model("llama")
        with attach(model, {h: saes[h] for h in used}) as a:
            model(tokens()).logits[:, -1].logsumexp(-1).sum().backward()
        got.append(a.codes[hooks[0]].values.grad)
        assert all(a.codes[h].values.grad.abs().sum() > 0 for h in used)
    torch.testing.assert_close(got[1], got[0], rtol=1e-5, atol=1e-7)


def test_rows_padded_on_the_left_are_refused_where_position_0_is_passed_on(hf) -> None:
    """The sink would be rebuilt and a padding token passed on in its place, without a word."""
    hook = "blocks.0.hook_resid_post"
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        with attach(hf, {hook: make_sae(hook)}), pytest.raises(DataError, match="padded on the left"):
            hf(tokens(), attention_mask=mask)
        for given, skip in ((mask.flip(1), None), (mask, False)):
            with attach(hf, {hook: make_sae(hook)}, skip_first=skip) as a:
                hf(tokens(), attention_mask=given)
            assert hook in a.codes


@pytest.mark.parametrize("factor", [2.0, 0.0])
def test_an_edit_with_the_error_term_has_the_gradient_of_what_it_computes(factor: float) -> None:
    """y = x + D(edit(z)) - D(z): by hand, with z a function of x in both places."""
    sae, g = make_sae("here", activation="relu"), torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 4, D, generator=g), torch.randn(2, 4, D, generator=g)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a = Attached({"here": sae}, True, False)
    a.edit("here", lambda c: c._replace(values=c.values * factor))
    y = a._at("here", ours)
    assert y is not None
    (y * weight).sum().backward()
    z = ((theirs - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    wanted = theirs + (factor * z) @ sae.W_dec - z @ sae.W_dec
    (wanted * weight).sum().backward()
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


class Bridged:
    """The TransformerLens backend of `LanguageModel` over a model that has no files."""

    name, identity = "bridged", {}

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.backend = _backend(hf)
        hf.requires_grad_(False)

    def check_hook(self, name: str) -> None:
        assert name in self.backend.dims

    def d_hook(self, name: str) -> int:
        return self.backend.dims[name]

    def hooked(self, edits: Any) -> Any:
        return self.backend.hooked(edits)


def _backend(hf: Any) -> TransformerLensBackend:
    hf.config.architectures = [type(hf).__name__]
    return TransformerLensBackend(hf, "tiny", tiny_tokenizer(), probe_tokens(VOCAB, torch.device("cpu")))


def test_edits_without_the_error_term_pass_on_the_edited_reconstruction(hf) -> None:
    hook = "blocks.1.hook_resid_post"
    sae, seen = make_sae(hook), {}
    module = hf.get_submodule(module_sites(hf)[hook].path)

    def tensor(out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    def keep(name: str) -> Any:
        return lambda _, __, out: seen.__setitem__(name, tensor(out))

    with torch.no_grad():
        before = module.register_forward_hook(keep("x"))
        hf(tokens())
        before.remove()
        with attach(hf, {hook: sae}, error=False) as a:
            a.edit(hook, lambda c: Codes(c.values.clamp(max=0.5), c.indices, c.offsets))
            after = module.register_forward_hook(keep("y"))
            hf(tokens())
            after.remove()
    codes = sae.encode(seen["x"][:, 1:])
    want = sae.decode(Codes(codes.values.clamp(max=0.5), codes.indices, codes.offsets)).view(2, 8, D)
    torch.testing.assert_close(seen["y"][:, 1:], want, rtol=1e-5, atol=1e-5)
    assert torch.equal(seen["y"][:, :1], seen["x"][:, :1])


def test_position_0_is_spliced_where_the_sae_was_trained_on_it(hf) -> None:
    hook = "blocks.0.hook_resid_post"
    sae = make_sae(hook)
    for convention, argument, rows in (
        (None, None, 16),
        (True, None, 16),
        (False, None, 18),
        (False, True, 16),
    ):
        sae.conventions = Conventions(skip_first=convention)
        with torch.no_grad(), attach(hf, {hook: sae}, skip_first=argument) as a:
            hf(tokens())
        assert len(a.codes[hook].values) == rows


def test_generation_with_a_cache_splices_every_new_token(hf) -> None:
    """The first token of a continued pass is not position 0; without a cache the text is the same."""
    hook = "blocks.1.hook_resid_pre"
    sae, prompt = make_sae(hook), tokens(4)[:1]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad(), attach(hf, {hook: sae}, error=False) as a:
        cached = hf.generate(prompt, use_cache=True, **options)
        assert a.continues and len(a.codes[hook].values) == 1
        plain = prompt
        for _ in range(6):
            plain = torch.cat([plain, hf(plain, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, hf.generate(prompt, use_cache=True, **options))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("error", [True, False, "detached"])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_an_edit_may_write_into_the_codes_it_is_given(
    activation: str, error: Any, frozen: bool, grad: bool
) -> None:
    """As a new tuple of new tensors would do: values, gradients of the codes, and what stands in `codes`."""
    model, hook = make_model("llama").requires_grad_(not frozen), "blocks.0.hook_resid_post"
    sae, got = make_sae(hook, activation=activation), []

    def written(c: Codes) -> None:
        c.values[c.indices == off] = 0
        c.values.mul_(3.0)

    def made(c: Codes) -> Codes:
        return c._replace(values=torch.where(c.indices == off, 0.0, c.values) * 3.0)

    def both(c: Codes) -> Codes:
        written(c)
        return c

    with torch.no_grad(), attach(model, sae) as a:
        model(tokens())
    off, plain = int(a.codes[hook].indices[0, 0] if activation == "topk" else a.codes[hook].indices[0]), a.codes[hook].values  # fmt: skip
    for edit in (made, written, both):
        with torch.set_grad_enabled(grad), attach(model, sae, error=error) as a:
            a.edit(hook, edit)
            logits = model(tokens()).logits
            if grad:
                logits[:, -1].logsumexp(-1).sum().backward()
        got.append((logits.detach(), a.codes[hook].values))
    for logits, values in got:
        assert torch.equal(logits, got[0][0]) and torch.equal(values.detach(), plain)
        assert (values.grad is not None) is grad
        if grad:
            torch.testing.assert_close(values.grad, got[0][1].grad)
            assert values.grad[a.codes[hook].indices == off].abs().max() == 0 < values.grad.abs().max()


def test_bfloat16_models_keep_their_values_bit_for_bit() -> None:
    model = make_model("llama").to(torch.bfloat16)
    hook = "blocks.0.hook_resid_post"
    clean = model(tokens()).logits
    with attach(model, {hook: make_sae(hook)}):
        assert torch.equal(model(tokens()).logits, clean)


def test_wrong_hooks_widths_and_modules_are_one_line(hf) -> None:
    hook = "blocks.0.hook_resid_post"
    with (
        pytest.raises(UsageError, match="did you mean"),
        attach(hf, {"blocks.0.hook_resid_pst": make_sae(hook)}),
    ):
        pass
    with pytest.raises(DataError, match="d_model=5"), attach(hf, {hook: make_sae(hook, 5)}):
        pass
    with (
        pytest.raises(UsageError, match="load_module"),
        attach(torch.nn.Linear(3, 3), {hook: make_sae(hook)}),
    ):
        pass


def test_an_sae_spliced_where_it_was_not_trained_says_so_in_one_line(hf, capsys) -> None:
    trained, other = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
    sae = make_sae(trained)
    misplaced.cache_clear()
    for hook in (trained, "blocks.1.hook_resid_pre"):  # two names of one place
        with attach(hf, {hook: sae}):
            pass
    with attach(hf, {other: make_sae("")}):
        pass
    assert capsys.readouterr().err == ""
    for _ in range(3):  # a loop over prompts says it once
        with attach(hf, {other: sae}), torch.no_grad():
            hf(tokens())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and trained in lines[0] and other in lines[0]


def test_an_sae_alone_is_spliced_at_its_own_hook(hf) -> None:
    sae = make_sae("blocks.1.hook_resid_pre")
    with torch.no_grad(), attach(hf, sae) as a:
        hf(tokens())
    assert list(a.codes) == ["blocks.1.hook_resid_pre"]
    transcoder = SAE(
        SAEConfig(d_sae=8, k=2, d_model=D, d_out=D, hook="blocks.0.mlp.hook_in", out_hook=MLP_OUT)
    )
    with torch.no_grad(), attach(hf, transcoder) as a:
        hf(tokens())
    assert list(a.codes) == [MLP_OUT]


@pytest.mark.parametrize(
    ("saes", "words"),
    [
        ({"blocks.0.hook_resid_post": "latest"}, "SAE.load"),
        ("latest", "SAE.load"),
        ([SAE(SAEConfig(d_sae=8, k=2, d_model=D))], r"\{hook: sae\}"),
        (SAE(SAEConfig(d_sae=8, k=2, d_model=D)), "does not say where"),
    ],
)
def test_what_cannot_be_attached_is_one_line(hf, saes: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as e, attach(hf, saes):
        pass
    assert "\n" not in str(e.value)
    with pytest.raises(UsageError, match="detached"), attach(hf, {}, error="detach"):  # type: ignore[arg-type]
        pass
