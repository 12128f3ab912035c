"""Hooks: the right numbers under the right names on both backends, and nothing left behind by an edit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cache.errors import AtomscopeError, DataError, MissingDataError, UsageError
from cache.hooks import PROBE_TOKENS
from cache.models import BACKENDS, LanguageModel, load_model
from tests.tiny import SENTENCES, tiny_model_dir, tiny_tokenizer

RESID = "blocks.1.hook_resid_post"
KINDS = (
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_in",
    "hook_mlp_out",
    "hook_resid_post",
)


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: Any, tiny_dir: Path) -> LanguageModel:
    return load_model(tiny_dir, backend=request.param, device="cpu")


@pytest.fixture(scope="module")
def plain(tiny_dir: Path) -> Any:
    """The same weights without any hook library: what the numbers must equal."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_dir, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(3, 390, (3, 9), generator=torch.Generator().manual_seed(0))


def by_plain_hooks(plain: Any, tokens: Tensor, block: int) -> dict[str, Tensor]:
    """Activations by PyTorch hooks on the untouched model."""
    layer = plain.model.layers[block]
    got: dict[str, Tensor] = {}

    def before(name: str) -> Any:
        return lambda _, args, kwargs: got.__setitem__(name, args[0] if args else kwargs["hidden_states"])

    def after(name: str) -> Any:
        return lambda _, __, out: got.__setitem__(name, out[0] if isinstance(out, tuple) else out)

    handles = [
        layer.register_forward_pre_hook(before("hook_resid_pre"), with_kwargs=True),
        layer.self_attn.o_proj.register_forward_pre_hook(before("attn.hook_z"), with_kwargs=True),
        layer.self_attn.register_forward_hook(after("hook_attn_out")),
        layer.post_attention_layernorm.register_forward_pre_hook(before("hook_resid_mid"), with_kwargs=True),
        layer.mlp.register_forward_pre_hook(before("mlp.hook_in"), with_kwargs=True),
        layer.mlp.register_forward_hook(after("hook_mlp_out")),
        layer.register_forward_hook(after("hook_resid_post")),
    ]
    with torch.no_grad():
        plain(tokens)
    for handle in handles:
        handle.remove()
    return got


def relative(a: Tensor, b: Tensor) -> float:
    """Largest ‖a − b‖ / ‖b‖ of a row."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)).max())


# ----------------------------------------------------------------------------------------------- capture


@pytest.mark.parametrize("block", [0, 1, 2])
def test_each_hook_is_the_activation_of_its_name(
    model: LanguageModel, plain: Any, tokens: Tensor, block: int
) -> None:
    expected = by_plain_hooks(plain, tokens, block)
    got = model.capture(tokens, [f"blocks.{block}.{k}" for k in KINDS])
    for kind in KINDS:
        x = got[f"blocks.{block}.{kind}"]
        assert x.shape == (3, 9, model.d_hook(f"blocks.{block}.{kind}"))
        assert relative(x, expected[kind]) < 1e-5, kind


def test_residuals_equal_hidden_states_and_do_not_depend_on_the_batch(
    model: LanguageModel, plain: Any
) -> None:
    rows = [model.tokenizer(s).input_ids for s in SENTENCES[::23]]
    width = max(map(len, rows))
    padded = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    names = [f"blocks.{i}.hook_resid_post" for i in range(2)]
    batched = model.capture(padded, names)
    for b, row in enumerate(rows):
        alone = model.capture(torch.tensor([row]), names)
        with torch.no_grad():
            hidden = plain(torch.tensor([row]), output_hidden_states=True).hidden_states
        for i, name in enumerate(names):
            assert relative(alone[name][0], hidden[i + 1][0]) < 1e-5
            assert relative(batched[name][b, : len(row)], hidden[i + 1][0]) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_makes_padding_invisible(model: LanguageModel, side: str) -> None:
    row = torch.tensor([model.tokenizer(SENTENCES[0]).input_ids])
    pad, n = torch.zeros(1, 4, dtype=torch.int64), row.shape[1]
    parts = [pad, row] if side == "left" else [row, pad]
    mask = torch.cat([torch.full_like(p, int(p is row)) for p in parts], dim=1)
    real = slice(4, None) if side == "left" else slice(0, n)
    got = model.capture(torch.cat(parts, dim=1), [RESID], mask)[RESID][:, real]
    assert relative(got, model.capture(row, [RESID])[RESID]) < 1e-5
    logits = model(torch.cat(parts, dim=1), mask)[:, real]
    assert torch.allclose(logits, model(row), atol=1e-4)


def test_capture_stops_after_the_deepest_hook(model: LanguageModel, tokens: Tensor) -> None:
    ran: list[int] = []
    hf: Any = model.hf
    handle = hf.model.layers[2].register_forward_pre_hook(lambda *_: ran.append(1))
    model.capture(tokens, ["blocks.0.hook_resid_post", RESID])
    assert not ran
    model.capture(tokens, ["blocks.2.hook_resid_pre"])
    assert ran
    handle.remove()


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "neox"])
def test_both_backends_agree_on_other_architectures(family: str, tmp_path: Path) -> None:
    import transformers as tf

    tok = tiny_tokenizer()
    small: dict[str, Any] = {"vocab_size": len(tok), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "gpt2":
        hf: Any = tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **small)
        )
    elif family == "gemma3":
        config = tf.Gemma3TextConfig(num_key_value_heads=2, head_dim=8, sliding_window=8, **sizes, **small)
        hf = tf.Gemma3ForCausalLM(config)
    else:
        hf = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(use_parallel_residual=True, **sizes, **small))
    hf.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    a, b = (load_model(tmp_path, backend=backend, device="cpu") for backend in BACKENDS)
    common = [n for n in b.hook_names() if n in a.hook_names()]
    assert {f"blocks.1.{k}" for k in KINDS} - set(common) <= (
        {"blocks.1.hook_resid_mid"} if family == "neox" else set()
    )
    ids = torch.randint(3, 390, (2, 13), generator=torch.Generator().manual_seed(1))
    for name, x in a.capture(ids, common).items():
        assert relative(x, b.capture(ids, [name])[name]) < 1e-5, name
    if family != "neox":
        mid = {"blocks.0.hook_resid_mid": lambda x: x * 0.5 + 1}
        with a.hooked(mid), b.hooked(mid):
            assert torch.allclose(a(ids), b(ids), rtol=1e-4, atol=1e-4)
    direction = torch.randn(2, a.d_model)
    assert torch.allclose(a.logit_lens(direction), b.logit_lens(direction), atol=1e-4)


# ----------------------------------------------------------------------------------------------- editing


@pytest.mark.parametrize("kind", KINDS)
def test_identity_edit_is_bit_identical_and_a_real_one_is_undone(
    model: LanguageModel, tokens: Tensor, kind: str
) -> None:
    name = f"blocks.1.{kind}"
    before = model(tokens)
    with model.hooked({name: lambda x: x.clone()}):
        assert torch.equal(model(tokens), before)
    with model.hooked({name: lambda _: None}):
        assert torch.equal(model(tokens), before)
    with model.hooked({name: lambda x: x * 0.5 + 1}):
        assert not torch.allclose(model(tokens), before, atol=1e-2)
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_reaches_everything_after_it(
    model: LanguageModel, plain: Any, tokens: Tensor, kind: str
) -> None:
    """Oracle: the layer written out by hand, with the edit at its place."""

    def edit(x: Tensor) -> Tensor:
        return 0.7 * x + torch.linspace(-1, 1, x.shape[-1])

    def at(name: str, x: Tensor) -> Tensor:
        return edit(x) if name == kind else x

    layers, base = plain.model.layers, plain.model
    with torch.no_grad():
        x = by_plain_hooks(plain, tokens, 1)["hook_resid_pre"]
        positions = torch.arange(tokens.shape[1])[None]
        rope = base.rotary_emb(x, positions)
        causal = torch.full((9, 9), float("-inf")).triu(1)[None, None]
        layer = layers[1]
        x = at("hook_resid_pre", x)
        handle = layer.self_attn.o_proj.register_forward_pre_hook(lambda _, a: (at("attn.hook_z", a[0]),))
        normed = layer.input_layernorm(x)
        a = layer.self_attn(hidden_states=normed, position_embeddings=rope, attention_mask=causal)[0]
        handle.remove()
        x = at("hook_resid_mid", x + at("hook_attn_out", a))
        mlp_in = at("mlp.hook_in", layer.post_attention_layernorm(x))
        x = at("hook_resid_post", x + at("hook_mlp_out", layer.mlp(mlp_in)))
        x = layers[2](x, position_embeddings=rope, attention_mask=causal)
        expected = plain.lm_head(base.norm(x))
    with model.hooked({f"blocks.1.{kind}": edit}):
        assert torch.allclose(model(tokens), expected, rtol=1e-4, atol=1e-4)


def test_capture_inside_an_edit_sees_the_edited_stream(model: LanguageModel, tokens: Tensor) -> None:
    clean = model.capture(tokens, ["blocks.1.hook_resid_mid", RESID])
    with model.hooked({RESID: lambda x: x + 3}):
        assert torch.allclose(model.capture(tokens, [RESID])[RESID], clean[RESID] + 3)
    with model.hooked({"blocks.1.hook_resid_mid": lambda x: x + 3, RESID: lambda x: x * 2}):
        got = model.capture(tokens, [RESID, "blocks.1.hook_mlp_out"])
    mid = clean["blocks.1.hook_resid_mid"] + 3
    assert relative(got[RESID], 2 * (mid + got["blocks.1.hook_mlp_out"])) < 1e-5
    assert torch.equal(model.capture(tokens, [RESID])[RESID], clean[RESID])


def test_contexts_nest_and_run_in_the_order_they_were_opened(model: LanguageModel, tokens: Tensor) -> None:
    clean = model.capture(tokens, [RESID])[RESID]
    with model.hooked({RESID: lambda x: x + 1}):
        with model.hooked({RESID: lambda x: x * 2}):
            assert torch.allclose(model.capture(tokens, [RESID])[RESID], (clean + 1) * 2)
        assert torch.allclose(model.capture(tokens, [RESID])[RESID], clean + 1)
    assert torch.equal(model.capture(tokens, [RESID])[RESID], clean)


def test_nothing_is_left_behind_by_an_exception(model: LanguageModel, tokens: Tensor) -> None:
    before = model(tokens)

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("the edit failed")

    for name in (RESID, "blocks.1.hook_resid_mid"):
        with pytest.raises(RuntimeError, match="the edit failed"), model.hooked({name: fail}):
            model(tokens)
        with pytest.raises(KeyError), model.hooked({name: lambda x: x + 1}):
            raise KeyError("outside of the forward pass")
    with pytest.raises(UsageError, match="same shape"), model.hooked({RESID: lambda x: x[:1]}):
        model(tokens)
    assert torch.equal(model(tokens), before)
    assert torch.isfinite(model.capture(tokens, [RESID])[RESID]).all()


@pytest.mark.parametrize("kind", ["hook_resid_mid", "hook_resid_post", "attn.hook_z"])
def test_gradients_flow_through_an_edit(model: LanguageModel, tokens: Tensor, kind: str) -> None:
    name = f"blocks.1.{kind}"
    v = torch.zeros(model.d_hook(name), requires_grad=True)

    def loss(shift: Tensor) -> Tensor:
        with model.hooked({name: lambda x: x + shift}):
            return model(tokens).square().mean()

    loss(v).backward()
    assert v.grad is not None
    direction = v.grad / v.grad.norm()
    step = 1e-2
    slope = (loss(step * direction) - loss(-step * direction)).detach() / (2 * step)
    assert torch.allclose(slope, v.grad.norm(), rtol=1e-2)


# ----------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("edit", [False, True])
def test_stepping_with_the_cache_equals_the_full_forward(
    model: LanguageModel, tokens: Tensor, edit: bool
) -> None:
    edits = {RESID: lambda x: x * 1.1, "blocks.0.hook_resid_mid": lambda x: x + 0.5} if edit else {}
    with model.hooked(edits), torch.no_grad():
        full, none = model.forward(tokens)
        assert none is None
        logits, past = model.forward(tokens[:, :4], use_cache=True)
        steps = [logits]
        for t in range(4, tokens.shape[1]):
            mask = torch.ones(3, t + 1, dtype=torch.int64)
            logits, past = model.forward(tokens[:, t : t + 1], mask if t % 2 else None, past, use_cache=True)
            steps.append(logits)
    assert torch.allclose(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-4)


def test_logit_lens_is_the_direct_path_in_closed_form(model: LanguageModel, plain: Any) -> None:
    x = torch.randn(5, model.d_model, generator=torch.Generator().manual_seed(0))
    expected = torch.stack(
        [torch.stack([(row * plain.model.norm.weight) @ u for u in plain.lm_head.weight[:50]]) for row in x]
    )
    got = model.logit_lens(x)
    assert got.shape == (5, model.d_vocab)
    assert torch.allclose(got[:, :50], expected, rtol=1e-4, atol=1e-5)
    # and it is what the model does to a stream that is that direction, up to the norm's division
    with torch.no_grad():
        real = plain.lm_head(plain.model.norm(x))
    assert torch.allclose(got / x.square().mean(-1, keepdim=True).sqrt(), real, rtol=1e-3, atol=1e-4)
    with pytest.raises(UsageError, match=r"\[n, 64\]"):
        model.logit_lens(x[0])


# ----------------------------------------------------------------------------------------- names, loading


def test_a_wrong_hook_is_answered_with_the_nearest_names(model: LanguageModel, tokens: Tensor) -> None:
    for call in (
        lambda: model.check_hook("blocks.1.hook_residpost"),
        lambda: model.capture(tokens, ["blocks.1.hook_residpost"]),
        lambda: model.hooked({"blocks.1.hook_residpost": lambda x: x}).__enter__(),
        lambda: model.d_hook("blocks.1.hook_residpost"),
    ):
        with pytest.raises(UsageError, match=r"did you mean.*blocks\.1\.hook_resid_post") as e:
            call()
        assert "\n" not in str(e.value)
    with pytest.raises(UsageError, match="3 layers"):
        model.check_hook("blocks.7.hook_resid_post")


def test_hooks_are_listed_in_the_order_they_run(model: LanguageModel) -> None:
    names = model.hook_names()
    wanted = [f"blocks.{i}.{k}" for i in range(3) for k in KINDS]
    assert [n for n in names if n in wanted] == wanted
    assert all(model.d_hook(n) > 1 for n in wanted)
    assert not any("hook_pattern" in n or "scores" in n for n in names)  # not one vector per token


def test_identity_names_what_decides_the_numbers(
    model: LanguageModel, tiny_dir: Path, tmp_path: Path
) -> None:
    assert set(model.identity) == {
        "model", "weights_sha256", "tokenizer_sha256", "template_sha256", "backend",
        "attn_implementation", "forward_dtype",
    }  # fmt: skip
    assert model.hf.config._attn_implementation == "eager"  # type: ignore[union-attr]
    moved = tmp_path / tiny_dir.name
    shutil.copytree(tiny_dir, moved)
    assert load_model(moved, backend=model.backend, device="cpu").identity == model.identity
    tiny_model_dir(moved, seed=1)
    other = load_model(moved, backend=model.backend, device="cpu").identity
    changed = {k for k in other if other[k] != model.identity[k]}
    assert changed == {"weights_sha256"}
    half = load_model(tiny_dir, backend=model.backend, device="cpu", dtype=torch.bfloat16)
    assert (
        half.identity["forward_dtype"] == "bfloat16"
        and half.capture(torch.ones(1, PROBE_TOKENS, dtype=torch.int64), [RESID])[RESID].dtype
        == torch.bfloat16
    )


def test_loading_leaves_the_tokenizer_as_it_is_on_disk(model: LanguageModel) -> None:
    from cache.vocab import tokenizer_sha256

    assert tokenizer_sha256(model.tokenizer) == model.identity["tokenizer_sha256"]
    assert model.tokenizer("a").input_ids == tiny_tokenizer()("a").input_ids


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "no such model", "a/b/c"])
def test_an_unknown_model_is_one_line_with_the_nearest_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="smollm2-135m-instruct-q4_1") as e:
        load_model(name, workspace=tmp_path)
    assert "\n" not in str(e.value) and repr(name) in str(e.value)


def test_folders_that_cannot_be_loaded_say_why(tiny_dir: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, type[AtomscopeError], str]] = [
        ("empty", MissingDataError, "config.json"),
        ("pickled", DataError, "safetensors"),
        ("small-vocab", DataError, "do not belong together"),
        ("nan", DataError, "not finite"),
    ]
    for name, kind, message in cases:
        folder = tmp_path / name
        folder.mkdir()
        if name == "pickled":
            shutil.copy(tiny_dir / "config.json", folder)
            (folder / "pytorch_model.bin").write_bytes(b"not read")
        elif name != "empty":
            shutil.copytree(tiny_dir, folder, dirs_exist_ok=True)
        if name == "nan":
            damage(folder)
        elif name == "small-vocab":
            tok = tiny_tokenizer()
            tok.add_tokens(["surplus"])
            tok.save_pretrained(folder)
        with pytest.raises(kind, match=message):
            load_model(folder, device="cpu")
    with pytest.raises(UsageError, match="transformer_lens or nnsight"):
        load_model(tiny_dir, backend="jax")


def damage(folder: Path) -> None:
    """Put a NaN into the last layer's weights."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_parameters_take_no_gradients(model: LanguageModel) -> None:
    assert isinstance(model.hf, nn.Module) and not model.hf.training
    assert not any(p.requires_grad for p in model.hf.parameters())


# --------------------------------------------------------------------------------------------- real model


@pytest.mark.assets
def test_the_packaged_model_reads_english_and_agrees_across_backends(real_workspace: Path) -> None:
    from transformers import AutoModelForCausalLM

    name = "smollm2-135m-instruct-q4_1"
    hook = "blocks.15.hook_resid_post"
    text = "The capital of France is Paris, a city on the river Seine."
    seen: list[Tensor] = []
    for backend in BACKENDS:
        model = load_model(name, backend=backend, workspace=real_workspace, device="cpu")
        assert (model.n_layers, model.d_model, model.d_vocab) == (30, 576, 49_152)
        assert model.name == name and model.identity["model"] == name
        ids = model.tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            logits = model(ids)[0, :-1]
        assert float(nn.functional.cross_entropy(logits, ids[0, 1:])) < 3.0
        seen.append(model.capture(ids, [hook])[hook])
    folder = real_workspace / "assets" / "models" / name
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = plain(ids, output_hidden_states=True).hidden_states[16]
    assert relative(seen[0], hidden) < 1e-5 and relative(seen[1], hidden) < 1e-5
