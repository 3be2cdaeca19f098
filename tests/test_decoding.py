"Decoding: caches equal the full forward at every position, in constant memory; generate draws what it should."

import copy
import math
import subprocess
import sys

import pytest
import torch
from conftest import product
from hypothesis import given
from hypothesis import strategies as st

from dilated_attention_nb.config import MIXINGS, OFFSETS, DilatedAttentionConfig
from dilated_attention_nb.corpus import SEPARATOR
from dilated_attention_nb.decoding import (
    JoinedCache,
    LongNetCache,
    draw_tokens,
    generate,
    kept_logits,
    kv_cache_bytes,
)
from dilated_attention_nb.embeddings import NgramEmbedding
from dilated_attention_nb.improved import dilated_attention
from dilated_attention_nb.kv_cache import DilatedKVCache, KVCache
from dilated_attention_nb.longnet import POSITIONS, LongNet, LongNetEncoder, longnet_125m, longnet_tiny
from dilated_attention_nb.processes import resident, spawn_gloo
from dilated_attention_nb.testing import check_against_oracle, make_qkv, oracle_counts


def in_pieces(cache, cuts, *tensors, mask=None):
    "What the cache makes of the tensors, cut along the sequence."
    pads = [None] * len(cuts) if mask is None else mask.split(cuts, 1)
    pieces = zip(*(x.detach().split(cuts, 1) for x in tensors), pads)
    return torch.cat([cache(q, k, v, key_padding_mask=pad) for q, k, v, pad in pieces], 1)


def make_cuts(data, n):
    cuts = []
    while sum(cuts) < n:
        cuts.append(min(n - sum(cuts), data.draw(st.sampled_from([1, 1, 1, 2, 5, 17]))))
    return cuts


# ---------------------------------------------------------------- equal to the definition


@given(st.data())
def test_any_cut_of_any_case_equals_the_oracle(data):
    n, mixing = data.draw(st.integers(1, 40)), data.draw(st.sampled_from(MIXINGS))
    ws, rs = zip(*data.draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=3)))
    h = data.draw(st.integers(len(ws) if mixing == "groups" else 1, 8))
    kv = data.draw(st.sampled_from([m for m in range(1, h + 1) if h % m == 0]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    q, k, v = make_qkv(2, n, h, 8, kv, dtype, seed=data.draw(st.integers(0, 4)))
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(1)) < 0.3 if data.draw(st.booleans()) else None
    options = dict(mixing=mixing, offsets=data.draw(st.sampled_from(OFFSETS)), ragged="mask")
    config, cuts = DilatedAttentionConfig(ws, rs, **options), make_cuts(data, n)
    scale = data.draw(st.sampled_from([None, 0.5]))
    place = dict(batch_size=2, num_kv_heads=kv, dtype=dtype, scale=scale)
    for cache in (DilatedKVCache(config, h, 8, **place), KVCache(n, h, 8, config=config, **place)):
        check_against_oracle(
            lambda *x, c=cache: in_pieces(c, cuts, *x, mask=mask), q, k, v, ws, rs, grad=False,
            key_padding_mask=mask, scale=scale, is_causal=True, **options,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_plain_cache_is_full_attention(dtype):
    q, k, v = make_qkv(2, 30, 4, 16, 2, dtype)
    for cuts in (30 * [1], [11, 1, 18]):
        cache = KVCache(30, 4, 16, 2, 2, dtype=dtype)
        check_against_oracle(
            lambda *x, c=cache, cuts=cuts: in_pieces(c, cuts, *x), q, k, v, (30,), (1,), grad=False, is_causal=True
        )
        assert torch.equal(cache.keys, k) and torch.equal(cache.values, v)


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_backends(backend):
    q, k, v = make_qkv(1, 30, 4, 16)
    config = DilatedAttentionConfig((8, 16), (1, 3), mixing="softmax")
    cache = DilatedKVCache(config, 4, 16, backend=backend)
    options = dict(grad=False, is_causal=True, mixing="softmax", ragged="mask")
    check_against_oracle(lambda *x: in_pieces(cache, [9] + 21 * [1], *x), q, k, v, (8, 16), (1, 3), **options)


def test_it_keeps_what_can_still_be_seen_and_no_more():
    "The slots are those of the grids, counted from the definition."
    for mixing, offsets in (("softmax", "blocked"), ("softmax", "interleaved"), ("groups", "blocked")):
        h, ws, rs = 6, (8, 24), (2, 3)
        config = DilatedAttentionConfig(ws, rs, mixing=mixing, offsets=offsets)
        slots = DilatedKVCache(config, h, 8).nbytes // (2 * 8 * 4)
        most = 0
        for w, r in zip(ws, rs):
            counts, _ = oracle_counts(24, 24, h, (w,), (r,), is_causal=True, mixing="softmax", offsets=offsets)
            most += int(counts.sum(-1).amax(-1).sum())  # of each head, the most keys that a query sees
        assert slots == (most if mixing == "softmax" else 3 * 8 // 2 + 3 * 24 // 3)


def test_groups_cut_uneven_heads():
    "Seven heads and three key/value heads' worth of sharing in no regular pattern."
    q, k, v = make_qkv(1, 26, 6, 8, 2, torch.float64)
    for offsets in OFFSETS:
        config = DilatedAttentionConfig((6, 13), (4, 5), mixing="softmax", offsets=offsets)
        cache = DilatedKVCache(config, 6, 8, 1, 2, dtype=torch.float64)
        options = dict(grad=False, is_causal=True, mixing="softmax", offsets=offsets, ragged="mask")
        check_against_oracle(lambda *x, c=cache: in_pieces(c, [4, 1, 1, 20], *x), q, k, v, (6, 13), (4, 5), **options)


# ---------------------------------------------------------------- back, reset, bounds


@pytest.mark.parametrize("masked", [False, True])
def test_rollback_forgets(masked):
    config = DilatedAttentionConfig((8, 32), (1, 2), mixing="softmax", ragged="mask")
    q, k, v = make_qkv(1, 32, 4, 8, dtype=torch.float64)
    mask = torch.rand(1, 32) < 0.3 if masked else None
    other = [torch.randn_like(x) for x in (q, k, v)]
    for make in (lambda: KVCache(64, 4, 8, config=config, dtype=torch.float64), lambda: dilated(config)):
        straight, drafted = make(), make()
        expected = in_pieces(straight, [32], q, k, v, mask=mask)
        in_pieces(drafted, [26], q[:, :26], k[:, :26], v[:, :26], mask=None if mask is None else mask[:, :26])
        in_pieces(drafted, [2, 3], *(x[:, :5] for x in other), mask=torch.ones(1, 5).bool() if masked else None)
        drafted.rollback(5)
        assert drafted.length == 26
        rest = in_pieces(drafted, 6 * [1], q[:, 26:], k[:, 26:], v[:, 26:], mask=None if mask is None else mask[:, 26:])
        assert torch.allclose(rest, expected[:, 26:], atol=1e-14)


def dilated(config, **values):
    return DilatedKVCache(config, 4, 8, **dict(dtype=torch.float64) | values)


def test_rollback_of_a_dilated_cache_knows_its_limit():
    q, k, v = make_qkv(1, 60, 4, 8, dtype=torch.float64)
    config = DilatedAttentionConfig((8, 32), (1, 2), mixing="softmax", ragged="mask")
    expected = in_pieces(dilated(config), [60], q, k, v)
    for n in range(1, 60):
        for back in range(0, n + 1):
            cache = dilated(config)
            in_pieces(cache, [n], q[:, :n], k[:, :n], v[:, :n])
            reached = n - back
            last = n - 1
            possible = all(reached % w == 0 or reached // w == last // w for w in (8, 32))
            if not possible:
                with pytest.raises(ValueError, match="count must be at most"):
                    cache.rollback(back)
                assert cache.length == n
                continue
            cache.rollback(back)
            if reached and (reached - 1) // 8 < last // 8:
                with pytest.raises(ValueError, match="count must be at most 0 here"):
                    cache.rollback(1)  # the segment before is gone, also from its end
            if n % 7 == 0:
                rows = in_pieces(cache, [60 - reached], q[:, reached:], k[:, reached:], v[:, reached:])
                assert torch.allclose(rows, expected[:, reached:], atol=1e-14)


def test_reset_begins_anew():
    q, k, v = make_qkv(1, 20, 4, 8, dtype=torch.float64)
    config = DilatedAttentionConfig((8, 16), (1, 2), mixing="softmax", ragged="mask")
    for cache in (dilated(config), KVCache(20, 4, 8, config=config, dtype=torch.float64)):
        first = in_pieces(cache, [20], q, k, v, mask=torch.zeros(1, 20, dtype=torch.bool))
        cache.reset()
        assert cache.length == 0
        again = in_pieces(cache, [20], q, k, v)
        torch.testing.assert_close(again, first, atol=1e-14, rtol=0)


def test_max_seq_len_bounds_and_saves():
    config = DilatedAttentionConfig((8, 1024), (1, 2), mixing="softmax")
    small, large = dilated(config, max_seq_len=20), dilated(config)
    assert small.nbytes == 2 * 4 * 8 * 8 * (8 + 10) and large.nbytes == 2 * 4 * 8 * 8 * (8 + 512)
    x = torch.randn(1, 20, 4, 8, dtype=torch.float64)
    assert torch.allclose(small(x, x, x), large(x, x, x), atol=1e-14)
    with pytest.raises(ValueError, match="at most 20 tokens, got 1 tokens after 20"):
        small(*3 * [x[:, :1]])


BAD_CACHES = [
    (KVCache, (0, 4, 8), "max_seq_len"), (KVCache, (8, 0, 8), "num_heads"), (KVCache, (8, 4, 0), "head_dim"),
    (KVCache, (8, 4, 8, 0), "batch_size"), (KVCache, (8, 4, 8, 1, 3), "num_kv_heads"),
    (KVCache, (8.5, 4, 8), "max_seq_len"), (KVCache, (8, 4, 8, 1, 4, "full"), "config"),
    (DilatedKVCache, (8, 4, 8), "config"),
    (DilatedKVCache, (DilatedAttentionConfig((4, 8), (1, 2)), 1, 8), "num_heads"),
    (DilatedKVCache, (DilatedAttentionConfig((4,), (1,)), 4, 8, 1, 4, 0), "max_seq_len"),
    (LongNetCache, (DilatedAttentionConfig((4,), (1,)),), "config"),
    (LongNetCache, (longnet_tiny(), 1, None, True), "max_seq_len"), (LongNetCache, (longnet_tiny(), 1, 8, 1), "full"),
    (LongNetCache, (longnet_tiny(), 0), "batch_size"), (JoinedCache, ([],), "parts"),
    (JoinedCache, (2 * [LongNetCache(longnet_tiny())],), "be different caches"), (JoinedCache, ([1, 2],), "parts"),
    (JoinedCache, (None,), "parts"),
    (kv_cache_bytes, (longnet_tiny(), 1, None, True), "max_seq_len"), (kv_cache_bytes, (8,), "config"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "args", "name"), BAD_CACHES)
def test_bad_caches_are_named(make, args, name):
    with pytest.raises((ValueError, TypeError), match=name):
        make(*args)


BAD_PLACES = [
    (dict(dtype=torch.int32), "dtype"), (dict(dtype=torch.complex64), "dtype"), (dict(dtype="float31"), "dtype"),
    (dict(device="gpu"), "device"), (dict(device=0.5), "device"), (dict(backend="fast"), "backend"),
    (dict(scale=0), "scale"), (dict(scale=math.nan), "scale"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "name"), BAD_PLACES)
def test_bad_places_are_named(change, name):
    config = DilatedAttentionConfig((4, 8), (1, 2))
    for make in (lambda **v: KVCache(8, 4, 8, **v), lambda **v: DilatedKVCache(config, 4, 8, **v)):
        with pytest.raises((ValueError, TypeError), match=name):
            make(**change)


def test_the_configs_dtype_and_device_count():
    config = DilatedAttentionConfig((4, 8), (1, 2), dtype=torch.bfloat16, device="meta")
    for cache in (DilatedKVCache(config, 4, 8), KVCache(8, 4, 8, config=config)):
        assert cache.dtype == torch.bfloat16 and cache.device.type == "meta"
    other = DilatedKVCache(config, 4, 8, dtype="float64", device="cpu")
    assert other.dtype == torch.float64 and other.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strided_and_expanded_inputs(dtype):
    config = DilatedAttentionConfig((4, 8), (1, 2), mixing="softmax")
    q, k, v = make_qkv(2, 6, 4, 8, dtype=dtype)
    k = k[:1].expand(2, -1, -1, -1)
    strided = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, v)]
    for make in (lambda: KVCache(8, 4, 8, 2, dtype=dtype), lambda: DilatedKVCache(config, 4, 8, 2, dtype=dtype)):
        torch.testing.assert_close(make()(strided[0], k, strided[1]), make()(q, k.contiguous(), v))


X = torch.zeros(2, 3, 4, 8)
BAD_STEPS = [
    (dict(q=None), "q must be a tensor"), (dict(k=None), "k must be a tensor"), (dict(v=X[:, :2]), "v must have"),
    (dict(q=X[:, :2]), "one row for each new key"), (dict(q=X.repeat(1, 1, 2, 1)), "have 4 heads"),
    (dict(q=X[:1], k=X[:1], v=X[:1]), r"have shape \[2, n, 4, 8\]"), (dict(q=X.double()), "dtype"),
    (dict(q=X.double(), k=X.double(), v=X.double()), "float32"), (dict(is_causal=False), "later tokens"),
    (dict(is_causal=1), "is_causal"), (dict(key_padding_mask=torch.zeros(2, 3)), "key_padding_mask"),
    (dict(key_padding_mask=torch.zeros(2, 4).bool()), "key_padding_mask"), (dict(q=X[:, :0]), "no size 0"),
    (dict(k=X.clone().requires_grad_()), "no gradient"), (dict(k=X[:, :, :2], v=X[:, :, :2]), "have shape"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_STEPS)
def test_bad_steps_are_explained_and_change_nothing(change, message):
    config = DilatedAttentionConfig((4, 8), (1, 2))
    for cache in (KVCache(8, 4, 8, 2), DilatedKVCache(config, 4, 8, 2)):
        with pytest.raises((ValueError, TypeError), match=message):
            cache(**dict(q=X, k=X, v=X) | change)
        assert cache.length == 0


def test_append_checks_as_well():
    cache = KVCache(4, 4, 8, 2)
    keys, values = cache.append(X, X)
    assert keys.shape == values.shape == X.shape
    for bad in ((X, X), (X[:1], X[:1]), (None, X), (X, X[:, :1])):
        with pytest.raises((ValueError, TypeError)):
            cache.append(*bad)
    assert cache.length == 3
    for count in (-1, 4, 1.5):
        with pytest.raises((ValueError, TypeError), match="count"):
            cache.rollback(count)


# ---------------------------------------------------------------- a whole model


def make(seed=0, dtype=torch.float64, **values):
    torch.manual_seed(seed)
    values = dict(segment_lengths=(8, 24, 48), dilation_rates=(1, 2, 4), tie_embeddings=False) | values
    return LongNet(longnet_tiny(**values)).to(dtype).eval()


def tokens(b=2, n=110, seed=0):
    return torch.randint(0, 256, (b, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decoded(model, cache, given, cuts, mask=None):
    pads = len(cuts) * [None] if mask is None else mask.split(cuts, 1)
    return torch.cat(
        [model(part, key_padding_mask=pad, cache=cache) for part, pad in zip(given.split(cuts, 1), pads)], 1
    )


@product(full=[False, True], mixing=MIXINGS, position=POSITIONS)
def test_decoding_equals_the_forward_at_every_position(full, mixing, position):
    for offsets in OFFSETS if mixing == "softmax" else OFFSETS[:1]:
        model = make(mixing=mixing, offsets=offsets, position=position, num_kv_heads=2)
        given = tokens()
        whole = model(given)
        for cuts in (110 * [1], [60] + 50 * [1], [7, 41, 1, 1, 60], [110]):
            cache = LongNetCache(model.config, 2, 110, full, dtype=torch.float64)
            assert torch.allclose(decoded(model, cache, given, cuts), whole, atol=1e-12)
            assert cache.length == 110


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_in_low_precision_stays_near(dtype):
    "As near to float64 as the forward pass in the same dtype, up to twice."
    model, given = make(), tokens()
    exact, low = model(given), copy.deepcopy(model).to(dtype)
    own = (low(given) - exact).abs().max()
    cache = LongNetCache(model.config, 2, dtype=dtype)
    error = (decoded(low, cache, given, [60] + 50 * [1]) - exact).abs().max()
    assert error <= 2 * own + 4 * torch.finfo(dtype).eps


def test_a_padded_batch_is_not_read_into_a_cache():
    "Its rows would stand at different places: generate and JoinedCache read each length on its own."
    model, given = make(), tokens(3)
    for call in (model, model.hidden):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match="key_padding_mask must be None with a cache.*JoinedCache"),
        ):
            call(given, key_padding_mask=given < 3, cache=LongNetCache(model.config, 3, dtype=torch.float64))


def test_rows_at_different_positions():
    model, given = make(), tokens(3)
    whole, starts = model(given), (5, 50, 33)
    parts = [LongNetCache(model.config, dtype=torch.float64) for _ in starts]
    for part, row, start in zip(parts, given, starts):
        decoded(model, part, row[None, :start], [start])
    both = JoinedCache(parts)
    for t in range(60):
        step = torch.stack([row[start + t] for row, start in zip(given, starts)])[:, None]
        logits = decoded(model, both, step, [1])
        for row in range(3):
            assert torch.allclose(logits[row, 0], whole[row, starts[row] + t], atol=1e-12)
    assert both.nbytes == 3 * parts[0].nbytes


def test_embeddings_that_look_back():
    model, given = make(), tokens()
    model.embed_tokens = NgramEmbedding(SEPARATOR + 1, 64, (2, 4), 512).double()
    whole = model(given)
    assert model.embed_tokens.context == 3
    for cuts in (110 * [1], [2, 1, 1, 50, 56]):
        cache = LongNetCache(model.config, 2, dtype=torch.float64)
        assert torch.allclose(decoded(model, cache, given, cuts), whole, atol=1e-12)
        cache.reset()
        assert torch.allclose(decoded(model, cache, given, cuts), whole, atol=1e-12)
    rows = [given[0, :60], given[0, :1]]
    batch = torch.stack([rows[0], torch.cat((rows[1], torch.zeros(59, dtype=torch.long)))])
    pads = torch.arange(60) >= torch.tensor([[60], [1]])
    together = model.generate(batch, 12, temperature=0, key_padding_mask=pads)
    assert torch.equal(together, torch.stack([model.generate(row, 12, temperature=0) for row in rows]))


def test_a_cache_belongs_to_its_config_and_survives_no_interruption():
    model = make()
    with pytest.raises(ValueError, match="this model's config"):
        model(tokens(), cache=LongNetCache(longnet_tiny(), 2))
    with pytest.raises(ValueError, match="no gradient"):
        model(tokens(), cache=LongNetCache(model.config, 2, dtype=torch.float64))
    for position in POSITIONS:
        model = make(position=position)
        cache = LongNetCache(model.config, 2, dtype=torch.float64)
        cache.layers[0].length = 3
        with pytest.raises(RuntimeError, match="interrupted"):
            decoded(model, cache, tokens(), [110])
    with pytest.raises(ValueError, match="need_weights must be False with a cache"):
        layer = model.decoder.layers[0].self_attn
        x = torch.randn(2, 3, 64, dtype=torch.float64)
        with torch.no_grad():
            layer(x, is_causal=True, need_weights=True, cache=LongNetCache(model.config, 2, dtype=x.dtype).layers[0])


def no_caches(config):
    "By what the message must say: things that are no cache of two rows of a model of this config."
    place = dict(dtype=torch.float64)
    one = LongNetCache(config, 1, **place)
    return {
        "be a LongNetCache.*got str": "cache", "got dict": {}, "got Tensor": torch.zeros(2), "got LongNet;": make(),
        "got KVCache": KVCache(200, 4, 16, 2, **place), "got list": [LongNetCache(config, 2, **place)],
        "got DilatedKVCache": LongNetCache(config, 2, **place).layers[0], "got type": LongNetCache,
        "this model's config, got one with num_heads=2, ": LongNetCache(longnet_tiny(num_heads=2), 2, **place),
        "a batch of 2, got 1;": one, "a batch of 2, got 3;": JoinedCache([one, LongNetCache(config, 2, **place)]),
        r"\[2, n, 4, 16\] in torch.float32.*in torch.float64": LongNetCache(config, 2, dtype=torch.float32),
        "on the tokens' device cpu, got meta": LongNetCache(config, 2, device="meta", **place),
        "at most 100 tokens, got 110": LongNetCache(config, 2, 100, **place),
    }  # fmt: skip


def test_what_is_no_cache_for_this_call_is_refused():
    model, given = make(position="rope"), tokens()
    encoder = LongNetEncoder(model.config).double().eval()
    for call in (model, model.hidden, lambda x, cache: encoder(x, is_causal=True, cache=cache)):
        for message, wrong in no_caches(model.config).items():
            with torch.no_grad(), pytest.raises((TypeError, ValueError), match=message) as error:
                call(given, cache=wrong)
            assert all(word in str(error.value) for word in ("cache", "got ", "make"))
    attention = model.decoder.layers[0].self_attn
    for name in ("cache", "position"):
        with pytest.raises(TypeError, match=f"{name} must be None or callable, got str"):
            attention(torch.zeros(2, 3, 64, dtype=torch.float64), is_causal=True, **{name: "x"})


def test_a_call_that_was_refused_changes_nothing():
    model, given = make(), tokens()
    model.embed_tokens = NgramEmbedding(SEPARATOR + 1, 64, (2, 4), 512).double()
    cache = LongNetCache(model.config, 2, 60, dtype=torch.float64)
    parts = [decoded(model, cache, given[:, :50], [30, 20])]
    for wrong in (given[:, :11], given[:1], given[:, :5] + 500):
        with torch.no_grad(), pytest.raises(ValueError):
            model(wrong, cache=cache)
    parts.append(decoded(model, cache, given[:, 50:60], [4, 6]))
    assert torch.allclose(torch.cat(parts, 1), model(given[:, :60]), atol=1e-12)


def test_generating_leaves_each_part_in_its_mode():
    model = make(dropout=0.3).train()
    model.decoder.layers[0].eval()  # frozen, say
    before = {name: module.training for name, module in model.named_modules()}
    written = model.generate(tokens(), 5, temperature=0)
    assert {name: module.training for name, module in model.named_modules()} == before
    model.decoder.training = False  # alone: the layers inside still train
    assert torch.equal(model.generate(tokens(), 5, temperature=0), written)
    assert torch.equal(model.eval().generate(tokens(), 5, temperature=0), written)


def test_a_causal_encoder_takes_a_cache():
    torch.manual_seed(0)
    encoder = LongNetEncoder(longnet_tiny(vocab_size=None, position="rope")).double().eval()
    x = torch.randn(1, 90, 64, dtype=torch.float64)
    cache = LongNetCache(encoder.config, dtype=torch.float64)
    with torch.no_grad():
        rows = [encoder(part, None, True, cache) for part in x.split([30] + 60 * [1], 1)]
        assert torch.allclose(torch.cat(rows, 1), encoder(x, is_causal=True), atol=1e-12)


# ---------------------------------------------------------------- drawing


def test_kept_logits():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[[2, 0, 3, 1]].expand(2, 4)  # probabilities 0.2 0.4 0.1 0.3

    def share(**dials):
        rows = kept_logits(logits, **dials).softmax(-1)
        assert torch.equal(rows[0], rows[1])
        return rows[0]

    assert torch.allclose(share(), torch.tensor([0.2, 0.4, 0.1, 0.3]))
    assert torch.allclose(share(top_k=2), torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]))
    assert torch.allclose(share(top_p=0.69), torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]))
    assert torch.allclose(share(top_p=0.71), torch.tensor([2 / 9, 4 / 9, 0.0, 3 / 9]))
    assert torch.allclose(share(top_p=1e-9), torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert torch.allclose(share(top_k=3, top_p=0.7), torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]))  # p of what k has kept
    assert torch.equal(share(top_k=9), share()) and torch.equal(share(top_p=1.0), share())
    assert torch.allclose(share(temperature=0.5), torch.tensor([4.0, 16.0, 1.0, 9.0]) / 30)
    assert kept_logits(torch.zeros(3, 7), top_k=2).isfinite().sum() == 6  # ties: still two of each row
    assert kept_logits(logits.bfloat16()).dtype == torch.float32


def test_draws_follow_the_probabilities():
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = draw_tokens(chances.log().expand(40_000, 4), generator=torch.Generator().manual_seed(0))
    error = drawn.bincount(minlength=4) / 40_000 - chances
    assert (error.abs() < 4 * (chances * (1 - chances) / 40_000).sqrt()).all()
    assert (draw_tokens(chances.log().expand(50, 4), temperature=0) == 0).all()


def test_extreme_temperatures_are_limits():
    logits = torch.tensor([[0.1, 3.0, 2.0], [5e4, -5e4, 1.0]])
    for temperature in (5e-324, 1e-45, 1e-30):
        assert (draw_tokens(logits, temperature) == logits.argmax(-1)).all()
        assert kept_logits(logits, temperature).softmax(-1).isfinite().all()
    assert torch.allclose(kept_logits(logits[:1], 1e30).softmax(-1), torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (torch.full((2, 4), math.nan), {}, "finite largest value"),
        (torch.full((2, 4), math.nan), dict(temperature=0), "finite largest value"),
        (torch.full((2, 4), -math.inf), {}, "finite largest value"),
        (torch.tensor([[0.0, math.inf]]), {}, "finite largest value"), (torch.zeros(4), {}, "have shape"),
        (torch.zeros(1, 4), dict(top_k=0), "top_k"), (torch.zeros(1, 4), dict(top_p=0), "top_p"),
    ],
)  # fmt: skip
def test_logits_to_draw_from_are_checked(logits, options, message):
    with pytest.raises(ValueError, match=message):
        draw_tokens(logits, **options)
    for wrong in (dict(temperature=0), dict(top_k=0), dict(top_p=2)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            kept_logits(torch.zeros(1, 4), **wrong)


def test_a_model_that_is_not_finite_any_more_says_so():
    model = make()
    model.embed_tokens.weight.data.fill_(math.nan)
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="finite largest value"):
            model.generate(tokens(1, 5), 3, temperature=temperature)


def test_only_a_language_model_writes():
    for model in (LongNetEncoder(longnet_tiny(position="rope")), None, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="model must be a LongNet"):
            generate(model, tokens(1, 5), 3)


@pytest.mark.parametrize("stop", [{3, 200}, range(100, 200), (7, 9), frozenset([5])])
def test_stops_of_any_collection(stop):
    model, prompt = make(), tokens(1, 20)
    assert torch.equal(*(model.generate(prompt, 60, temperature=0, stop=s) for s in (stop, sorted(stop))))


BAD_OPTIONS = [
    (dict(stop=b"."), "stop must be tokens, not text"), (dict(stop=[[1]]), "stop"), (dict(seed=2**64), "seed"),
    (dict(stop=torch.tensor([1])), "stop"), (dict(top_p=True), "top_p"), (dict(top_k=True), "top_k"),
    (dict(prompt="text"), "prompt"), (dict(prompt=torch.zeros(2, 0, dtype=torch.long)), "prompt"),
    (dict(prompt=torch.zeros(0, 3, dtype=torch.long)), "prompt"), (dict(prompt=torch.tensor(3)), "prompt"),
    (dict(prompt=torch.tensor([True])), "prompt"), (dict(temperature=math.inf), "temperature"),
    (dict(max_new_tokens=True), "max_new_tokens"), (dict(stop="end"), "not text"),
    (dict(max_new_tokens=0), "max_new_tokens"), (dict(max_new_tokens=1.5), "max_new_tokens"),
    (dict(temperature=-0.1), "temperature"), (dict(temperature=math.nan), "temperature"),
    (dict(temperature="0"), "temperature"), (dict(top_k=0), "top_k"), (dict(top_k=2.0), "top_k"),
    (dict(top_p=0.0), "top_p"), (dict(top_p=1.1), "top_p"), (dict(seed=-1), "seed"), (dict(seed=0.5), "seed"),
    (dict(stop=256), "stop"), (dict(stop=[1, -1]), "stop"), (dict(stop="end"), "stop"), (dict(stream=0), "stream"),
    (dict(prompt=[1, 2]), "prompt"), (dict(prompt=torch.zeros(0, dtype=torch.long)), "prompt"),
    (dict(prompt=torch.tensor([256])), "prompt"), (dict(prompt=torch.zeros(3)), "prompt"),
    (dict(key_padding_mask=torch.ones(1, 3).bool()), "prompt must have a token"),
    (dict(key_padding_mask=torch.ones(3).bool()), "key_padding_mask"),
    (dict(key_padding_mask=torch.ones(1, 3)), "key_padding_mask"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "name"), BAD_OPTIONS)
def test_bad_options_are_named_at_once(change, name):
    given = dict(prompt=torch.tensor([1, 2, 3]), max_new_tokens=4, stream=True) | change
    with pytest.raises((ValueError, TypeError), match=name):
        make().generate(**given)  # before the first token is asked for


# ---------------------------------------------------------------- generate


def by_hand(model, prompt, count):
    for _ in range(count):
        prompt = torch.cat((prompt, model(prompt)[:, -1].argmax(-1, keepdim=True)), 1)
    return prompt[:, -count:]


@pytest.mark.parametrize("n", [1, 7, 48, 100])
def test_greedy_is_the_forward_again_and_again(n):
    model, prompt = make(), tokens(2, n)
    got = model.generate(prompt, 30, temperature=0)
    assert torch.equal(got, by_hand(model, prompt, 30)) and got.shape == (2, 30) and got.unique().numel() > 10
    assert torch.equal(model.generate(prompt[0], 30, temperature=0), got[0])
    assert torch.equal(generate(model, prompt, 30, temperature=0), got)


def test_long_prompts_are_read_in_pieces(monkeypatch):
    model, prompt = make(), tokens(2, 100)
    whole = model.generate(prompt, 10, temperature=0)
    monkeypatch.setattr("dilated_attention_nb.decoding._PIECE", 17)
    assert torch.equal(model.generate(prompt, 10, temperature=0), whole)


def test_seeds_and_streams():
    model, prompt = make(), tokens(2, 20)
    first, again, other = (model.generate(prompt, 25, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    stream = model.generate(prompt, 25, seed=3, stream=True)
    assert torch.equal(torch.stack(list(stream), 1), first)
    single = list(model.generate(prompt[0], 25, temperature=0, stream=True))
    assert torch.equal(torch.stack(single), model.generate(prompt[0], 25, temperature=0)) and single[0].dim() == 0
    torch.manual_seed(0)
    unseeded = [model.generate(prompt, 25) for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompt, 25), unseeded[0]) and not torch.equal(*unseeded)


def test_a_stream_computes_only_what_is_taken():
    model, calls = make(), []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    stream = model.generate(tokens(1, 5), 1000, stream=True)
    assert not calls
    next(stream), next(stream)
    assert len(calls) == 2


def test_rows_stop_on_their_own():
    model, prompt = make(), tokens(3, 20)
    free = model.generate(prompt, 40, temperature=0)
    stops = [int(free[0, 5]), int(free[1, 11])]
    got = model.generate(prompt, 40, temperature=0, stop=stops)
    for row, full in zip(got, free):
        hits = [i for i, token in enumerate(full.tolist()) if token in stops]
        end = hits[0] + 1 if hits else 40
        assert torch.equal(row[:end], full[:end]) and (row[end:] == full[end - 1]).all()
    alone = model.generate(prompt[:1], 40, temperature=0, stop=stops[0])
    assert alone.shape[1] == free[0].tolist().index(stops[0]) + 1


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
def test_padded_prompts_continue_as_alone(side):
    model, given = make(), tokens(4, 60)
    lengths = torch.tensor([[60], [22], [22], [3]])
    at = torch.arange(60)
    pads = {"left": at < 60 - lengths, "right": at >= lengths, "mixed": (at < 7) & (lengths < 60) | (at >= 7 + lengths)}
    mask = pads[side]
    together = model.generate(given, 30, temperature=0, key_padding_mask=mask)
    for row, pad, got in zip(given, mask, together):
        assert torch.equal(model.generate(row[~pad], 30, temperature=0), got)


def test_dropout_is_off_and_the_mode_comes_back():
    model = make(dropout=0.5, attention_dropout=0.5)
    calm = model.generate(tokens(1, 9), 20, temperature=0)
    model.train()
    assert torch.equal(model.generate(tokens(1, 9), 20, temperature=0), calm) and model.training


def test_autocast():
    model, prompt = make(dtype=torch.float32), tokens(1, 30)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(prompt, 10, temperature=0).shape == (1, 10)


def output_of(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_longnet_has_generate_wherever_it_comes_from():
    code = (
        "import torch\n"
        "from dilated_attention_nb.longnet import LongNet, longnet_tiny\n"
        "print(LongNet(longnet_tiny()).generate(torch.ones(1, 5, dtype=torch.int64), 3, temperature=0).shape)\n"
    )
    assert output_of(code) == "torch.Size([1, 3])"


# ---------------------------------------------------------------- memory


def test_bytes_are_what_is_set_aside():
    for config in (longnet_tiny(), longnet_tiny(num_kv_heads=2, mixing="groups"), longnet_tiny(offsets="interleaved")):
        for dtype in (torch.float32, torch.bfloat16):
            cache = LongNetCache(config, 3, dtype=dtype)
            assert kv_cache_bytes(config, 3, dtype=dtype) == cache.nbytes
            full = LongNetCache(config, 3, 50, full=True, dtype=dtype)
            heads = config.multihead_config.kv_heads
            assert (
                kv_cache_bytes(config, 3, 50, True, dtype)
                == full.nbytes
                == 2 * 2 * 3 * 50 * heads * 16 * dtype.itemsize
            )
    paper = longnet_125m()
    slots = sum(math.ceil(w / r) for w, r in zip(paper.segment_lengths, paper.dilation_rates))
    assert kv_cache_bytes(paper) == 12 * 2 * slots * 768 * 4


SMALL = dict(
    embed_dim=16, num_layers=1, num_heads=2, vocab_size=16, segment_lengths=(16, 64, 256), dilation_rates=(1, 2, 8)
)


@torch.no_grad()
def resident_after(rank, world, piece):
    "Resident memory, now and at its peak, after 10,000 tokens and after 100,000 read or drawn in the same process."
    torch.manual_seed(0)
    model = LongNet(longnet_tiny(**SMALL)).eval()
    cache, read = LongNetCache(model.config), torch.randint(0, 16, (1, piece))
    if piece == 1:
        steps = model.generate(torch.zeros(4, dtype=torch.long), 100_000, stream=True)
    else:
        steps = (model(read, cache=cache) for _ in range(100_000 // piece))
    return [(resident("VmRSS"), resident("VmHWM")) for n, _ in enumerate(steps, 1) if n * piece in (10_000, 100_000)]


def stays(piece, timeout_s):
    [short, long] = spawn_gloo(resident_after, 1, piece, timeout_s=timeout_s)[0]
    return all(b - a < 4 * 2**20 for a, b in zip(short, long))  # of a process that holds some 300 MiB of torch


def test_a_hundred_thousand_tokens_in_constant_memory():
    assert stays(500, 200.0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_tokens_one_by_one_in_constant_memory():
    assert stays(1, 1700.0)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("order", ["alternating", "any"])
def test_rows_of_unequal_length_in_any_order_are_as_fast(order, seed):
    "As many calls as there are lengths, then one for each token; the rows come back in the caller's order."
    model, prompt = LongNet(longnet_tiny()).eval(), tokens(12, 40)
    short = torch.arange(12) % 2 if order == "alternating" else torch.tensor([2, 0, 1, 0, 2, 1, 0, 0, 1, 2, 2, 0])
    pads, calls = torch.arange(40) < 3 * short[:, None], []
    handle = model.decoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    how = dict(temperature=0) if seed is None else dict(seed=seed, temperature=0.7)
    together = model.generate(prompt, 8, key_padding_mask=pads, **how)
    assert len(calls) == len(set(short.tolist())) + 7
    handle.remove()
    streamed = torch.stack(list(model.generate(prompt, 8, key_padding_mask=pads, stream=True, **how)), 1)
    assert torch.equal(streamed, together)
    if seed is None:
        for row, pad, got in zip(prompt, pads, together):
            assert torch.equal(model.generate(row[~pad], 8, temperature=0), got)
    else:  # a row draws as in the batch whose rows all have its length
        alike = model.generate(prompt, 1, **how)
        assert torch.equal(alike[short == 0], together[short == 0, :1])


@pytest.mark.parametrize("mixing", MIXINGS)
def test_the_padding_of_a_cache_takes_a_byte_a_slot(mixing):
    config = DilatedAttentionConfig((4, 8), (10**9, 2), mixing=mixing, ragged="mask")
    cache, x = DilatedKVCache(config, 4, 8, 2, dtype=torch.float64), torch.randn(2, 5, 4, 8, dtype=torch.float64)
    before, pads = cache.nbytes, torch.tensor([[True, False, False, False, False], 5 * [False]])
    out = cache(x, x, x, key_padding_mask=pads)
    assert before < cache.nbytes <= before + before // (2 * 8 * 8)  # keys and values of eight numbers of eight bytes
    how = dict(is_causal=True, mixing=mixing, ragged="mask", key_padding_mask=pads)
    want = dilated_attention(x, x, x, config.segment_lengths, config.dilation_rates, **how)
    assert torch.allclose(out, want, atol=1e-12)
    cache.reset()
    assert cache.nbytes == before
