"Hugging Face models with dilated attention: small ones, randomly initialised, made from configs."

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
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
    BertLMHeadModel,
    BertModel,
    BloomConfig,
    BloomModel,
    ConvNextConfig,
    ConvNextModel,
    CTRLConfig,
    CTRLLMHeadModel,
    DebertaConfig,
    DebertaModel,
    DebertaV2Config,
    DebertaV2Model,
    DynamicCache,
    FNetConfig,
    FNetModel,
    FunnelConfig,
    FunnelModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTJConfig,
    GPTJModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaModel,
    MistralConfig,
    MistralForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ReformerConfig,
    ReformerModel,
    RobertaConfig,
    RobertaForCausalLM,
    StaticCache,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    XLNetConfig,
    XLNetModel,
    YosoConfig,
    YosoModel,
    ZambaConfig,
    ZambaModel,
)
from transformers.masking_utils import causal_mask_function  # noqa: E402

from dilated_attention_nb.config import DilatedAttentionConfig  # noqa: E402
from dilated_attention_nb.testing import oracle_attention  # noqa: E402
from dilated_attention_nb.transformers import check_dilated, register_with_transformers  # noqa: E402

SIZE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
MODELS = {
    "llama": (LlamaForCausalLM, lambda **v: LlamaConfig(**SIZE | dict(eos_token_id=None) | v)),
    "qwen": (
        Qwen3ForCausalLM,
        lambda **v: Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=16, eos_token_id=None, **v),
    ),
    "bert": (BertModel, lambda **v: BertConfig(**SIZE | v)),
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


def test_masks_of_ones_own_are_refused():
    model, given = make("llama"), tokens()
    with pytest.raises(ValueError, match="2-D attention_mask"):
        model(given, attention_mask=torch.ones(2, 1, 50, 50).tril().bool())


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


ITSELF = {  # classes that accept any attn_implementation and compute an attention of their own
    BloomModel: BloomConfig(hidden_size=64, n_layer=1, n_head=4, vocab_size=99),
    DebertaModel: DebertaConfig(**SIZE),
    DebertaV2Model: DebertaV2Config(**SIZE),
    FunnelModel: FunnelConfig(block_sizes=[1], d_model=64, n_head=4, d_head=16, d_inner=64, vocab_size=99),
    GPTJModel: GPTJConfig(n_embd=64, n_layer=1, n_head=4, rotary_dim=8, vocab_size=99),
    ReformerModel: ReformerConfig(hidden_size=64, num_attention_heads=4, attention_head_size=16, vocab_size=99),
    WavLMModel: WavLMConfig(**SIZE),
    XLNetModel: XLNetConfig(d_model=64, n_layer=1, n_head=4, d_inner=64, vocab_size=99),
    YosoModel: YosoConfig(**SIZE),
}


@pytest.mark.parametrize("cls", ITSELF, ids=lambda cls: cls.__name__)
def test_a_model_that_computes_attention_itself_is_refused(cls):
    "The name would change nothing, in silence."
    with pytest.raises(ValueError, match=f"take its attention from transformers' table, got {cls.__name__}"):
        cls._from_config(ITSELF[cls], attn_implementation="dilated")


def test_arithmetic_on_the_note_of_the_mask_function_is_an_error():
    "A model of one's own that adds the mask to its scores can't lose causality in silence."
    note, scores = AttentionMaskInterface._global_mapping["dilated"], torch.zeros(2, 4, 50, 50)
    for given in (None, torch.arange(50) >= torch.tensor([[0], [3]])):
        mask = note(2, 50, 50, mask_function=causal_mask_function, attention_mask=given)
        for compute in (torch.add, torch.mul, torch.sub):
            with pytest.raises(RuntimeError):
                compute(scores, mask)
        with pytest.raises(RuntimeError):
            scores.masked_fill(mask, 0)


def test_a_mask_that_is_too_short_is_refused():
    for kind in MODELS:
        with pytest.raises(ValueError, match="attention_mask must cover all 50 tokens, got 40"):
            make(kind)(tokens(), attention_mask=torch.ones(2, 40).long())


def test_device_and_dtype_of_the_config_are_checked():
    for field, value in dict(dtype=torch.bfloat16, device=torch.device("meta")).items():
        register_with_transformers("dilated_placed", replace(DILATED, **{field: value}))
        with pytest.raises((TypeError, ValueError), match=f"query must be .*{value} as the config says"):
            make("llama", "dilated_placed")(tokens())


# ---------------------------------------------------------------- counting


def test_calls_are_counted_and_nothing_changes():
    model, fired = make("llama").train(), []
    model.model.layers[0].eval()
    model.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: fired.append(1))
    seed, config = torch.get_rng_state(), model.config.to_dict()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    modules = {name: (module.training, sorted(module.__dict__)) for name, module in model.named_modules()}
    assert check_dilated(model) == {f"model.layers.{i}.self_attn": 1 for i in range(2)}
    assert torch.equal(seed, torch.get_rng_state()) and config == model.config.to_dict() and not fired
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert modules == {name: (module.training, sorted(module.__dict__)) for name, module in model.named_modules()}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (BertModel, BertConfig(**SIZE)),
        (ViTModel, ViTConfig(**SIZE, image_size=16, patch_size=8)),
        (Wav2Vec2Model, Wav2Vec2Config(**SIZE, num_conv_pos_embedding_groups=4)),
    ],
)
def test_text_pictures_and_sound_are_counted(cls, config):
    register_with_transformers("dilated_strict", DilatedAttentionConfig((512, 2048), (1, 4)))  # not one segment
    assert sum(check_dilated(cls._from_config(config, attn_implementation="dilated_strict")).values()) == 2


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (MambaModel, MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=99)),
        (FNetModel, FNetConfig(**{k: v for k, v in SIZE.items() if k != "num_attention_heads"})),
        (ConvNextModel, ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])),
        (LlamaForCausalLM, LlamaConfig(**SIZE)),
    ],
)
def test_a_model_without_a_call_is_refused(cls, config):
    name = "sdpa" if cls is LlamaForCausalLM else "dilated"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = cls._from_config(config, attn_implementation=name)
    said = [str(w.message) for w in warned if "has no attention that could be dilated" in str(w.message)]
    assert bool(said) == (name == "dilated")  # parts of it say so, too
    with pytest.raises(ValueError, match=f"call dilated attention, got none in {cls.__name__} with '{name}'"):
        check_dilated(model)


def test_layers_of_another_kind_are_named():
    size = SIZE | dict(num_hidden_layers=5, attention_hidden_size=128, num_key_value_heads=4, n_mamba_heads=2)
    config = ZambaConfig(**size, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, use_mamba_kernels=False)
    model = ZambaModel._from_config(config, attn_implementation="dilated")
    with pytest.warns(UserWarning, match="3 layers of ZambaModel don't attend dilatedly: layers.0, layers.1, layers.3"):
        assert list(check_dilated(model)) == [f"layers.{i}.shared_transf.self_attn" for i in (2, 4)]


def test_what_dilated_attention_is_not_is_refused_while_counting():
    for cls, config, message in (
        (T5EncoderModel, T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=4, d_kv=8), "no position_bias"),
        (MistralForCausalLM, MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=8), "set sliding_window=None"),
        (Gemma2ForCausalLM, Gemma2Config(**SIZE, layer_types=2 * ["full_attention"]), "softcap|causal or bidir"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_dilated(cls._from_config(config, attn_implementation="dilated"))


def test_inputs_that_cannot_be_made_are_asked_for():
    with pytest.raises(TypeError, match="be a model of transformers"):
        check_dilated(torch.nn.Linear(2, 2))
    model = make("llama")
    with pytest.raises(ValueError, match="inputs must let LlamaForCausalLM run, got inputs_embeds .*pass its own"):
        check_dilated(model, inputs_embeds=torch.zeros(1, 4, 3))
    assert len(check_dilated(model, inputs_embeds=torch.zeros(1, 4, 64))) == 2


# ---------------------------------------------------------------- saving


def test_a_saved_model_keeps_its_branches_and_says_when_it_attends_otherwise(tmp_path):
    model, given = make("llama"), tokens()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["dilated_attention"]
    assert DilatedAttentionConfig.from_dict(saved) == DILATED
    for name in (None, "sdpa", "dilated_full"):
        with pytest.warns(UserWarning, match=r"saved with dilated.*segment_lengths=\[8, 32\].*now attends with"):
            other = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert other.config.dilated_attention == saved
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        same = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="dilated")
    assert torch.equal(run(same, given), run(model, given))
    same.set_attn_implementation("sdpa")
    same.save_pretrained(tmp_path)
    assert "dilated_attention" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("kind", MODELS)
def test_there_are_no_weights_to_return(kind):
    with pytest.raises(ValueError, match="output_attentions must be False"):
        make(kind)(tokens(), output_attentions=True)


# ---------------------------------------------------------------- packed documents

LENGTHS = (25, 15, 1, 9)
PLACES = torch.cat([torch.arange(n) for n in LENGTHS])[None]


def alone(model, given, lengths=LENGTHS):
    return torch.cat([run(model, part) for part in given.split(lengths, 1)], 1)


@pytest.mark.parametrize("values", [{}, {"use_cache": False}, {"use_cache": True}])
@pytest.mark.parametrize("mask", [None, torch.ones(1, 50)])
@pytest.mark.parametrize("kind", CAUSAL)
def test_packed_documents_do_not_meet(kind, mask, values):
    model, given = make(kind), tokens(1)
    together = run(model, given, position_ids=PLACES, attention_mask=mask, **values)
    assert torch.allclose(together, alone(model, given), atol=3e-6)


def test_documents_of_a_collator():
    from transformers import DataCollatorWithFlattening

    model, given = make("llama"), tokens(1)
    parts = [{"input_ids": part[0].tolist()} for part in given.split(LENGTHS, 1)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)(parts)
    expected = alone(model, given)
    assert torch.allclose(model(**batch).logits, expected, atol=3e-6)
    ends = {name: x for name, x in batch.items() if name not in ("labels", "position_ids")}
    ends["cu_seq_lens_k"] = ends["cu_seq_lens_q"]
    register_with_transformers("dilated_unrotated", DILATED)
    model = make("llama", "dilated_unrotated", rope_parameters={"rope_type": "default", "rope_theta": 1e30})
    a, b = model(**ends).logits, model(**batch).logits  # one frequency is left, so positions count a little
    assert (a - b).abs().max() < 0.3 * (a - run(model, given)).abs().max()
    with pytest.raises(ValueError, match="cu_seq_lens_k must go from 0 to the 50 tokens"):
        model(**ends | {"cu_seq_lens_k": torch.tensor([0, 25], dtype=torch.int32)})


def test_documents_in_a_batch_and_beside_padding():
    model, given = make("llama"), tokens(2)
    two = torch.cat([torch.arange(n) for n in (11, 32)])
    places = torch.stack((PLACES[0], torch.cat((torch.ones(7, dtype=torch.long), two))))
    real = torch.arange(50) >= torch.tensor([[0], [7]])
    out = run(model, given, position_ids=places, attention_mask=real.long())
    assert torch.allclose(out[:1], alone(model, given[:1]), atol=3e-6)
    assert torch.allclose(out[1:, 7:], alone(model, given[1:, 7:], (11, 32)), atol=3e-6)


def test_a_cache_of_documents_goes_on_with_the_last():
    model, given = make("llama"), tokens(1)
    for make_cache in (lambda: DynamicCache(config=model.config), lambda: StaticCache(model.config, max_cache_len=60)):
        cache, parts = make_cache(), []
        for part, at in zip(given.split((44, 3, 1, 2), 1), PLACES.split((44, 3, 1, 2), 1)):
            parts.append(run(model, part, position_ids=at, past_key_values=cache, use_cache=True))
        assert torch.allclose(torch.cat(parts, 1), alone(model, given), atol=3e-6)


def test_gaps_in_a_mask_begin_no_document():
    model, given, real = make("llama"), tokens(1), torch.ones(1, 50).long()
    real[:, 20:24] = 0
    counted = (real.cumsum(1) - 1).clamp(min=0)
    out = run(model, given, attention_mask=real, position_ids=counted)
    short = torch.cat((given[:, :20], given[:, 24:]), 1)
    assert torch.allclose(out[:, real[0].bool()], run(model, short), atol=3e-6)
    as_they_are = run(model, given, attention_mask=real)
    places = torch.cat((torch.arange(20), torch.arange(24, 50)))[None]
    seen = run(model, short, position_ids=places, attention_mask=torch.ones(1, 46))
    assert not torch.allclose(as_they_are[:, real[0].bool()], seen, atol=1e-3)  # there the positions do jump


SMALL = dict(vocab_size=99, n_embd=64, n_layer=1, n_head=4, n_positions=64)
KEEP_POSITIONS = {  # models whose layers get no position_ids, and the position of a first token
    "bigcode": (GPTBigCodeForCausalLM, lambda: GPTBigCodeConfig(**SMALL, n_inner=64), 0),
    "persimmon": (PersimmonForCausalLM, lambda: PersimmonConfig(**SIZE), 0),
    "ctrl": (CTRLLMHeadModel, lambda: CTRLConfig(**SMALL, dff=64), 0),
    "bert": (BertLMHeadModel, lambda: BertConfig(**SIZE, is_decoder=True), 0),
    "roberta": (RobertaForCausalLM, lambda: RobertaConfig(**SIZE, is_decoder=True, pad_token_id=0), 1),
}


def keeping(kind):
    torch.manual_seed(0)
    cls, config, first = KEEP_POSITIONS[kind]
    return cls._from_config(config(), attn_implementation="dilated").eval(), first


@pytest.mark.parametrize("values", [{}, {"use_cache": False}, {"attention_mask": torch.ones(1, 50).long()}])
@pytest.mark.parametrize("kind", KEEP_POSITIONS)
def test_models_that_keep_their_positions_to_themselves(kind, values):
    model, first = keeping(kind)
    given = tokens(1)
    out = run(model, given, position_ids=PLACES + first, **values)
    assert torch.allclose(out, alone(model, given), atol=3e-6)
    assert torch.allclose(run(model, given, **values), run(model, given, use_cache=False), atol=3e-6)
    for make_cache in (lambda: DynamicCache(config=model.config), lambda: StaticCache(model.config, max_cache_len=60)):
        cache, parts = make_cache(), []
        for part, at in zip(given.split((44, 3, 1, 2), 1), (PLACES + first).split((44, 3, 1, 2), 1)):
            parts.append(run(model, part, position_ids=at, past_key_values=cache, use_cache=True))
        assert torch.allclose(torch.cat(parts, 1), alone(model, given), atol=3e-6)


@pytest.mark.parametrize("kind", KEEP_POSITIONS)
def test_kept_positions_beside_padding(kind):
    model, first = keeping(kind)
    given, two = tokens(2), torch.cat([torch.arange(n) for n in (11, 32)])
    places = first + torch.stack((PLACES[0], torch.cat((torch.zeros(7, dtype=torch.long), two))))
    real = torch.arange(50) >= torch.tensor([[0], [7]])
    out = run(model, given, position_ids=places, attention_mask=real.long())
    assert torch.allclose(out[:1], alone(model, given[:1]), atol=3e-6)
    assert torch.allclose(out[1:, 7:], alone(model, given[1:, 7:], (11, 32)), atol=3e-6)


def test_an_encoder_packs_too():
    model, given = make("bert"), tokens(1)
    for values in ({}, {"attention_mask": torch.ones(1, 50).long()}):
        assert torch.allclose(run(model, given, position_ids=PLACES, **values), alone(model, given), atol=3e-6)
    by_place = run(model, given, None, None, PLACES)
    assert torch.equal(by_place, run(model, given, position_ids=PLACES))


def test_kept_positions_in_threads_after_errors_and_in_recomputed_layers():
    model, given = keeping("persimmon")[0], tokens(1)
    expected = alone(model, given), run(model, given)
    with pytest.raises(IndexError):
        model(given + 99, position_ids=PLACES)
    assert torch.equal(run(model, given), expected[1])
    with ThreadPoolExecutor(4) as threads:
        several = [None if i % 2 else PLACES for i in range(8)]
        for i, out in enumerate(threads.map(lambda places: run(model, given, position_ids=places), several)):
            assert torch.allclose(out, expected[i % 2], atol=3e-6)
    model.train()
    sum(model(part, use_cache=False).logits.square().sum() for part in given.split(LENGTHS, 1)).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(given, position_ids=PLACES, use_cache=False).logits.square().sum().backward()
    for p, expected in zip(model.parameters(), grads):
        assert torch.allclose(p.grad, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("padded", [False, True])
def test_kept_positions_while_compiling(fresh_graphs, padded):
    model, given = keeping("persimmon")[0], tokens(1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    values = dict(use_cache=False) | (dict(attention_mask=torch.ones(1, 50).long()) if padded else {})
    for places in (torch.arange(50)[None], PLACES):
        out = run(compiled, given, position_ids=places, **values)
        expected = alone(model, given) if places is PLACES else run(model, given)
        assert torch.allclose(out, expected, atol=3e-6)


# ---------------------------------------------------------------- padding, precision


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_under_autocast(side):
    model, real = make("llama"), torch.arange(50) < torch.tensor([[50], [31]])
    real = real.flip(1) if side == "left" else real
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens(), attention_mask=real.long(), labels=tokens())
        rows = [run(model, row[seen][None])[0] for row, seen in zip(tokens(), real)]
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    exact = run(model, tokens(), attention_mask=real.long())
    for together, row, seen in zip(out.logits, rows, real):
        assert (together[seen] - row).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
def test_nan_under_padding_reaches_nobody(side):
    model, real = make("llama"), torch.arange(50) < torch.tensor([[50], [31]])
    real = real.flip(1) if side == "left" else real
    x = model.get_input_embeddings()(tokens()).detach()
    bad = x.masked_fill(~real[..., None], float("nan")).requires_grad_()
    x.requires_grad_()
    for cache in (False, True):
        a, b = (model(inputs_embeds=y, attention_mask=real.long(), use_cache=cache).logits[real] for y in (x, bad))
        assert torch.equal(a, b)
        for grads in zip(*(torch.autograd.grad(y.square().sum(), z) for y, z in ((a, x), (b, bad)))):
            assert torch.equal(*(grad[real] for grad in grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_six_query_and_two_key_heads(dtype):
    "With a full cache, a static one and padding on the left; beams too."
    model = make("llama", num_attention_heads=6, num_key_value_heads=2, hidden_size=96).to(dtype)
    given, real = tokens(3), torch.stack([torch.arange(50) >= 50 - n for n in (50, 31, 6)])
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, attention_mask=real.long())
    dynamic, static = (model.generate(given, cache_implementation=name, **options) for name in ("dynamic", "static"))
    beams = model.generate(given, num_beams=3, **options)
    if dtype == torch.float32:
        assert torch.equal(dynamic, static)
        for row, seen, out, best in zip(given, real, dynamic, beams):
            single = options | dict(attention_mask=torch.ones(1, int(seen.sum())))
            assert torch.equal(model.generate(row[seen][None], **single)[0, int(seen.sum()) :], out[50:])
            assert torch.equal(model.generate(row[seen][None], num_beams=3, **single)[0, int(seen.sum()) :], best[50:])
    model(given, labels=given, attention_mask=real.long()).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------- traced


@pytest.fixture
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("padded", [False, True])
def test_compiling_the_whole_model(fresh_graphs, padded, backend):
    model, real = make("llama", num_hidden_layers=1, num_key_value_heads=2), torch.ones(2, 50).long()
    real[0, :9] = 0
    values = dict(use_cache=False) | (dict(attention_mask=real) if padded else {})
    seen = real.bool() if padded else ...
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.allclose(run(compiled, tokens(), **values)[seen], run(model, tokens(), **values)[seen], atol=1e-5)
    compiled(tokens(), labels=tokens(), **values).loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(tokens(), labels=tokens(), **values).loss.backward()
    assert all(torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(grads, model.parameters()))


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_model_packs_by_the_values_that_come(fresh_graphs, packed):
    model, given = make("llama", num_hidden_layers=1), tokens(1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    run(compiled, given, position_ids=torch.arange(50)[None], use_cache=False)
    places = PLACES if packed else torch.arange(50)[None]
    out = run(compiled, given, position_ids=places, use_cache=False)
    assert torch.allclose(out, alone(model, given) if packed else run(model, given), atol=3e-6)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("static", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiling_the_steps_of_a_cache(fresh_graphs, static, backend):
    model, real = make("llama", num_hidden_layers=1, num_key_value_heads=2), torch.ones(2, 50).long()
    real[0, :9] = 0
    places = (real.cumsum(1) - 1).clamp(min=0)
    whole = run(model, tokens(), attention_mask=real, position_ids=places)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    cache = StaticCache(model.config, max_cache_len=60) if static else DynamicCache(config=model.config)
    start, parts = 0, []
    for n in (48, 1, 1):
        values = dict(attention_mask=real[:, : start + n], position_ids=places[:, start : start + n])
        one = run(compiled, tokens()[:, start : start + n], past_key_values=cache, use_cache=True, **values)
        parts, start = [*parts, one], start + n
    assert torch.allclose(torch.cat(parts, 1)[real.bool()], whole[real.bool()], atol=1e-5)


@pytest.mark.parametrize("window", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_other_masks_are_refused_while_compiling_too(fresh_graphs, window):
    torch.manual_seed(0)
    config = MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=8 if window else None)
    model = MistralForCausalLM._from_config(config, attn_implementation="dilated").eval()
    compiled, values = torch.compile(model, backend="eager", fullgraph=True), dict(use_cache=False)
    if window:
        with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException)):
            compiled(tokens(), **values)
    else:
        assert torch.allclose(run(compiled, tokens(), **values), run(model, tokens(), **values), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("padded", [False, True])
def test_exporting_at_one_length_and_running_at_others(kind, padded):
    model = make(kind, **(dict(use_cache=False) if kind == "llama" else {}))
    n, given = torch.export.Dim("n", min=4, max=256), {"input_ids": tokens()}
    given |= {"attention_mask": torch.ones(2, 50).long()} if padded else {}
    shapes = {name: {1: n} for name in given}
    exported = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False).module()
    for length in (50, 37, 90):
        values, seen = {"input_ids": tokens(n=length)}, torch.ones(2, length).bool()
        if padded:
            seen = torch.arange(length) >= torch.tensor([[0], [9]])
            values["attention_mask"] = seen.long()
        with torch.no_grad():
            assert torch.allclose(exported(**values)[0][seen], run(model, **values)[seen], atol=1e-5)


# ---------------------------------------------------------------- other families


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZE)),
        (MistralForCausalLM, MistralConfig(**SIZE, num_key_value_heads=2, sliding_window=None)),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_other_families_with_one_full_branch(cls, config, padded):
    models = []
    for name in ("dilated_full", "sdpa"):
        torch.manual_seed(0)
        models.append(cls._from_config(config, attn_implementation=name).eval())
    real = torch.arange(50) >= torch.tensor([[0], [19 * padded]])
    a, b = (run(model, tokens(), attention_mask=real.long())[real] for model in models)
    assert torch.allclose(a, b, atol=3e-6)


def test_pictures_with_one_full_branch():
    pixels, models = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), []
    for name in ("dilated_full", "sdpa", "dilated"):
        torch.manual_seed(0)
        config = ViTConfig(**{k: v for k, v in SIZE.items() if k != "vocab_size"}, image_size=16, patch_size=2)
        models.append(ViTModel._from_config(config, attn_implementation=name).eval())
    full, sdpa, dilated = (run(model, pixels) for model in models)
    assert torch.allclose(full, sdpa, atol=3e-6) and not torch.allclose(dilated, sdpa, atol=1e-3)
