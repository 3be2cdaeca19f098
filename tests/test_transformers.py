"Hugging Face models with dilated attention: small ones, randomly initialised, made from configs."

from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install 'dilated-attention-nb[transformers]'")

from transformers import (  # noqa: E402
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from dilated_attention_nb.config import DilatedAttentionConfig  # noqa: E402
from dilated_attention_nb.interop import register_with_transformers  # noqa: E402
from dilated_attention_nb.testing import oracle_attention  # noqa: E402

SIZE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
MODELS = {
    "llama": (LlamaForCausalLM, lambda **v: LlamaConfig(**SIZE, eos_token_id=None, **v)),
    "qwen": (
        Qwen3ForCausalLM,
        lambda **v: Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=16, eos_token_id=None, **v),
    ),
    "bert": (BertModel, lambda **v: BertConfig(**SIZE, **v)),
}
DILATED = DilatedAttentionConfig((8, 32), (1, 4), mixing="softmax", ragged="mask")
CAUSAL = ("llama", "qwen")


@pytest.fixture(autouse=True, scope="module")
def registered():
    register_with_transformers("dilated", DILATED)
    register_with_transformers("dilated_full", DilatedAttentionConfig((1024,), (1,), ragged="mask"))


def make(kind, attention="dilated", **values):
    torch.manual_seed(0)
    cls, config = MODELS[kind]
    return cls._from_config(config(**values), attn_implementation=attention).eval()


def tokens(b=2, n=50, seed=0):
    return torch.randint(1, 99, (b, n), generator=torch.Generator().manual_seed(seed))


def run(model, *args, **values):
    with torch.no_grad():
        return model(*args, **values)[0]


# ---------------------------------------------------------------- one full branch


@pytest.mark.parametrize("kind", MODELS)
def test_one_full_branch_gives_the_logits_of_sdpa(kind):
    ours, theirs = make(kind, "dilated_full"), make(kind, "sdpa")
    assert torch.allclose(run(ours, tokens()), run(theirs, tokens()), atol=2e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", MODELS)
def test_one_full_branch_with_padding(kind, side):
    ours, theirs = make(kind, "dilated_full"), make(kind, "sdpa")
    at, length = torch.arange(50), torch.tensor([[50], [31]])
    real = (at >= 50 - length) if side == "left" else (at < length)
    a, b = (run(model, tokens(), attention_mask=real.long()) for model in (ours, theirs))
    assert torch.allclose(a[real], b[real], atol=2e-6)


@pytest.mark.parametrize("kind", CAUSAL)
def test_one_full_branch_generates_what_sdpa_does(kind):
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    a, b = (make(kind, name).generate(tokens(), **options) for name in ("dilated_full", "sdpa"))
    assert torch.equal(a, b)


# ---------------------------------------------------------------- dilated


def test_it_is_the_dilated_attention_of_the_definition(monkeypatch):
    model, seen = make("qwen"), []
    table = AttentionInterface._global_mapping
    ours = table["dilated"]

    def watched(module, q, k, v, mask, **options):
        out, _ = ours(module, q, k, v, mask, **options)
        seen.append((q, k, v, out, options["scaling"]))
        return out, None

    monkeypatch.setitem(table, "dilated", watched)
    run(model, tokens())
    for q, k, v, out, scale in seen:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = dict(mixing="softmax", ragged="mask", is_causal=True, scale=scale)
        expected, _ = oracle_attention(q, k, v, (8, 32), (1, 4), **options)
        assert torch.allclose(out.double(), expected, atol=1e-5)
    assert len(seen) == 2 and k.shape[2] == 2


@pytest.mark.parametrize("kind", CAUSAL)
def test_causality_is_not_lost(kind):
    for name in ("dilated", "dilated_full"):
        model, given = make(kind, name), tokens()
        other = given.clone()
        other[:, 30:] = tokens(seed=1)[:, 30:]
        for mask in (None, torch.ones(2, 50), (torch.arange(50) >= torch.tensor([[0], [3]])).long()):
            a, b = (run(model, x, attention_mask=mask)[:, 5:30] for x in (given, other))
            assert torch.equal(a, b)
        assert not torch.equal(run(model, given)[:, 30:], run(model, other)[:, 30:])


def test_an_encoder_looks_both_ways():
    given, other = tokens(), tokens()
    other[:, 5] = (other[:, 5] + 1) % 99
    a, b = (run(make("bert"), x) for x in (given, other))
    assert not torch.equal(a[:, 4], b[:, 4])


def test_without_the_mask_function_it_refuses_rather_than_losing_the_mask(monkeypatch):
    masks = dict(AttentionMaskInterface._global_mapping)
    masks.pop("dilated")
    monkeypatch.setattr(AttentionMaskInterface, "_global_mapping", masks)
    with pytest.raises(ValueError, match="come from the mask function of 'dilated'"):
        make("llama")(tokens())


@pytest.mark.parametrize("kind", CAUSAL)
def test_prefill_and_cache_equal_the_forward(kind):
    model, given = make(kind), tokens()
    whole = run(model, given)
    for make_cache in (lambda: DynamicCache(config=model.config), lambda: StaticCache(model.config, max_cache_len=70)):
        for cuts in ([20, 13, 17], [30] + 20 * [1]):
            cache, found = make_cache(), []
            for part in given.split(cuts, 1):
                found.append(run(model, part, past_key_values=cache, use_cache=True))
            assert torch.allclose(torch.cat(found, 1), whole, atol=2e-6)


@pytest.mark.parametrize("kind", CAUSAL)
def test_generate_with_and_without_cache(kind):
    model, options = make(kind), dict(max_new_tokens=40, do_sample=False, pad_token_id=0)
    expected = tokens()
    for _ in range(40):
        expected = torch.cat((expected, run(model, expected)[:, -1:].argmax(-1)), 1)
    for cache in (dict(use_cache=False), dict(use_cache=True), dict(cache_implementation="static")):
        assert torch.equal(model.generate(tokens(), **options, **cache), expected)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_what_they_are_alone(kind, side):
    model, given, lengths = make(kind), tokens(3), (50, 31, 6)
    at = torch.arange(50)
    real = torch.stack([at >= 50 - n if side == "left" else at < n for n in lengths])
    positions = (real.cumsum(1) - 1).clamp(min=0)  # as generate() makes them
    together = run(model, given, attention_mask=real.long(), position_ids=positions)
    for row, seen, out in zip(given, real, together):
        assert torch.allclose(out[seen], run(model, row[seen][None])[0], atol=3e-6)


@pytest.mark.parametrize("kind", CAUSAL)
def test_padded_batches_generate_what_they_would_alone(kind):
    model, given, lengths = make(kind), tokens(3), (50, 31, 6)
    real = torch.stack([torch.arange(50) >= 50 - n for n in lengths])
    options = dict(max_new_tokens=25, do_sample=False, pad_token_id=0)
    for cache in (dict(), dict(cache_implementation="static")):
        together = model.generate(given, attention_mask=real.long(), **options, **cache)
        for row, seen, out in zip(given, real, together):
            assert torch.equal(model.generate(row[seen][None], **options)[0, int(seen.sum()) :], out[50:])


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_training_step(kind):
    model = make(kind).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(tokens(), labels=tokens(), attention_mask=torch.arange(50) < torch.tensor([[50], [40]])).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_gradients_equal_those_of_sdpa_with_one_full_branch():
    found = []
    for name in ("dilated_full", "sdpa"):
        model = make("qwen", name)
        model(tokens(), labels=tokens()).loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found))


def test_gradient_checkpointing_and_attention_dropout():
    plain, saving = make("llama").train(), make("llama").train()
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in zip(plain.parameters(), saving.parameters()))
    noisy = make("llama", attention_dropout=0.5)
    assert torch.equal(run(noisy, tokens()), run(noisy, tokens()))
    noisy.train()
    assert not torch.equal(run(noisy, tokens()), run(noisy, tokens()))


def test_switching_a_loaded_model():
    model, given = make("llama", "sdpa"), tokens()
    before = run(model, given)
    model.set_attn_implementation("dilated")
    assert torch.equal(run(model, given), run(make("llama"), given)) and not torch.equal(run(model, given), before)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "flex_attention", "", None, 3, "paged|x"])
def test_names_of_transformers_are_refused(name):
    with pytest.raises(ValueError, match="name must not be one of transformers' own"):
        register_with_transformers(name, DILATED)


def test_sliding_windows_are_refused():
    torch.manual_seed(0)
    config = MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=8)
    with pytest.raises(ValueError, match="the model's mask must be causal or bidirectional"):
        MistralForCausalLM._from_config(config, attn_implementation="dilated")(tokens())


def test_masks_of_ones_own_and_packed_sequences_are_refused():
    model, given = make("llama"), tokens()
    with pytest.raises(ValueError, match="2-D attention_mask"):
        model(given, attention_mask=torch.ones(2, 1, 50, 50).tril().bool())
    with pytest.raises(ValueError, match="packed"):
        model(given, position_ids=(torch.arange(50) % 25).expand(2, -1), use_cache=False)


def test_lengths_that_the_config_refuses_say_what_to_do():
    register_with_transformers("dilated_strict", DilatedAttentionConfig((8, 32), (1, 4)))
    assert run(make("llama", "dilated_strict"), tokens(n=64)).shape == (2, 64, 99)
    with pytest.raises(ValueError, match="pass ragged='mask'"):
        make("llama", "dilated_strict")(tokens())


def test_too_few_heads_are_refused():
    register_with_transformers("dilated_many", DilatedAttentionConfig(5 * (8,), 5 * (1,), ragged="mask"))
    with pytest.raises(ValueError, match="num_heads"):
        make("llama", "dilated_many")(tokens())


def test_cross_attention_is_refused():
    torch.manual_seed(0)
    size = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
    config = BartConfig(**size, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=99, max_position_embeddings=64)
    model = BartModel._from_config(config, attn_implementation="dilated").eval()
    assert model.encoder(tokens()).last_hidden_state.isfinite().all()
    for n in (20, 50):  # as many queries as keys, too
        with pytest.raises(ValueError, match=f"not be cross-attention, got {n} queries for 50 keys in BartAttention"):
            model(tokens(), decoder_input_ids=tokens(n=n))


def test_a_model_that_computes_attention_itself_is_refused():
    "Its own arithmetic on our mask would lose causality in silence."
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=64, n_layer=1, n_head=4, vocab_size=99)
    model = BloomModel._from_config(config, attn_implementation="dilated").eval()
    for mask in (None, (torch.arange(50) >= torch.tensor([[0], [3]])).long()):
        with pytest.raises(ValueError, match="the mask must be handed to the attention as it is"):
            model(tokens(), attention_mask=mask)


def test_a_mask_that_is_too_short_is_refused():
    for kind in MODELS:
        with pytest.raises(ValueError, match="attention_mask must cover all 50 tokens, got 40"):
            make(kind)(tokens(), attention_mask=torch.ones(2, 40).long())


def test_device_and_dtype_of_the_config_are_checked():
    for field, value in dict(dtype=torch.bfloat16, device=torch.device("meta")).items():
        register_with_transformers("dilated_placed", replace(DILATED, **{field: value}))
        with pytest.raises((TypeError, ValueError), match=f"query must be .*{value} as the config says"):
            make("llama", "dilated_placed")(tokens())
