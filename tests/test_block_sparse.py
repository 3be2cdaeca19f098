"Block-sparse attention: patterns, their cache, every path against the oracle with the dense mask, life as a module."

import copy
import dataclasses
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import drawn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dilated_attention_nb import adaptive, backends, block_patterns, block_sparse, testing
from dilated_attention_nb.adaptive import BlockScorer, block_shares, pooled
from dilated_attention_nb.backends import attend
from dilated_attention_nb.block_patterns import SPARSE_PATTERNS, BlockPattern, PatternCache, block_pattern
from dilated_attention_nb.block_sparse import BlockSparseAttention, SparseAttentionConfig, block_sparse_attention
from dilated_attention_nb.multihead import create_dilated_attention, create_multihead_dilated_attention
from dilated_attention_nb.ring_block_sparse import BlockSparseRingConfig, BlockSparseRingDilatedAttention
from dilated_attention_nb.testing import (
    assert_batch_independent,
    assert_causal,
    assert_within_budget,
    make_qkv,
    plain_attention,
    saved_for_backward,
)

FIXED = tuple(p for p in SPARSE_PATTERNS if p != "adaptive")
fixed = pytest.mark.parametrize("name", FIXED)
causal = pytest.mark.parametrize("is_causal", [False, True])


def make_pattern(name, n, is_causal=False, heads=4, size=16, ratio=0.3, **options):
    if name in ("dilated_sparse", "hierarchical"):
        options = {"segment_lengths": (n, max(1, n // 2)), "dilation_rates": (3, 1)} | options
    return block_pattern(
        name, n, block_size=size, sparsity_ratio=ratio, is_causal=is_causal, num_heads=heads, **options
    )


def held(q, k, v, pattern, is_causal, mask=None, backend="auto", fn=None) -> dict[str, float]:
    "Output and gradients within the budget of the float64 oracle with the dense form of the same mask."
    counts = pattern.token_mask(is_causal)[0].expand(q.shape[2], -1, -1).long()
    zeros = torch.zeros(counts.shape[:2], dtype=torch.int64)
    seen, scale = testing._unpadded(counts, mask), q.shape[3] ** -0.5
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(q)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (testing._repeat_heads(x, q.shape[2]) for x in (k, v))
        weights, _ = testing._joint_softmax(torch.einsum("bihd,bjhd->bhij", q, k) * scale, seen, zeros)
        return torch.einsum("bhij,bjhd->bihd", weights, v)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_attention(q, k, v, counts, zeros, key_padding_mask=mask)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, pattern, is_causal=is_causal, key_padding_mask=mask, backend=backend)

    exact = testing._run(oracle, [x.detach().double() for x in (q, k, v)], dout)
    got, near = testing._run(fn or ours, [q, k, v], dout), testing._run(plain, [q, k, v], dout)
    sizes = testing._magnitudes(q, k, v, dout, seen, zeros, 1, scale)
    terms = sum(q.shape[1:]) + k.shape[1]
    return {x: assert_within_budget(got[x], exact[x], near[x], sizes[x], terms, x) for x in exact}


# ---------------------------------------------------------------- patterns


@fixed
@causal
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 31, 64, 200])
def test_every_row_meets_the_ratio_and_keeps_its_own_block(name, is_causal, rows):
    for ratio in (0.01, 0.1, 0.25, 0.3, 0.5, 0.77, 1.0):
        dense = make_pattern(name, 16 * rows - 5, is_causal, ratio=ratio).to_dense()[0]
        seen = torch.arange(1, rows + 1) if is_causal else torch.full((rows,), rows)
        kept = dense.sum(-1)
        assert ((kept - ratio * seen).abs() <= 1).all(), (ratio, kept)
        assert dense.diagonal(dim1=1, dim2=2).all()
        assert not is_causal or not dense.triu(1).any()
        assert ratio < 1 or (dense.all() if not is_causal else dense.sum() == len(dense) * rows * (rows + 1) // 2)


@drawn(150)
@given(
    st.sampled_from(FIXED), st.integers(1, 3000), st.floats(0.001, 1), st.booleans(), st.integers(1, 8),
    st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 40)), min_size=1, max_size=4),
)  # fmt: skip
def test_any_pattern_is_well_formed(name, n, ratio, is_causal, heads, branches):
    lengths, rates = zip(*branches)
    made = block_pattern(
        name, n, block_size=16, sparsity_ratio=ratio, is_causal=is_causal, num_heads=heads, segment_lengths=lengths,
        dilation_rates=rates,
    )  # fmt: skip
    seen = torch.arange(1, made.rows + 1) if is_causal else torch.full((made.rows,), made.rows)
    assert ((made.kv_num_blocks - ratio * seen).abs() <= 1).all()
    dense = made.to_dense()
    assert (dense.sum(-1) == made.kv_num_blocks).all() and dense.diagonal(dim1=2, dim2=3).all()
    assert made.kv_num_blocks.shape[1] in (1, max(heads, len(rates)))


def test_what_each_pattern_is():
    window = make_pattern("local_window", 640, True, ratio=0.2).to_dense()[0, 0]
    assert all((row.nonzero().diff(dim=0) == 1).all() for row in window)
    both = make_pattern("local_window", 640, False, ratio=0.2).to_dense()[0, 0]
    assert all((row.nonzero().diff(dim=0) == 1).all() for row in both) and both[20].nonzero().float().mean() - 20 <= 1
    assert make_pattern("global_local", 640, True, ratio=0.3).to_dense()[0, 0, 10:, 0].all()
    columns = make_pattern("strided", 640, True, ratio=0.4).to_dense()[0, 0][:, ::4]
    assert columns.tril(-8)[39, :9].all()
    scales = block_pattern("hierarchical", 1600, block_size=16, segment_lengths=(1, 1, 1), dilation_rates=(1, 2, 4))
    gaps = scales.to_dense()[0, 0, 50].nonzero().diff(dim=0).flatten()
    assert gaps[12] <= 2 and gaps[0] > 4 and gaps[-1] > 4


def test_dilated_is_this_librarys_dilation_in_blocks():
    "With rate r and ratio 1 / r, over everything, blocks meet exactly if they are on the same grid."
    made = block_pattern(
        "dilated_sparse", 40 * 16, block_size=16, sparsity_ratio=0.25, is_causal=True, dilation_rates=(4,),
        segment_lengths=(40 * 16,),
    ).to_dense()[0, 0]  # fmt: skip
    i, j = torch.arange(40)[:, None], torch.arange(40)
    assert (made <= ((i - j) % 4 == 0)).all() and (made.sum(1) - (i // 4 + 1).flatten()).abs().max() <= 1
    near = block_pattern(
        "dilated_sparse", 4096, block_size=16, sparsity_ratio=0.05, segment_lengths=(512,), dilation_rates=(8,)
    )
    i, j = near.to_dense()[0, 0].nonzero().T
    assert (i - j).abs().max() < 512 // 16


def test_heads_differ_where_that_makes_sense():
    dense = make_pattern("random", 1600, heads=3).to_dense()[0]
    assert dense.shape[0] == 3 and not torch.equal(dense[0], dense[1])
    branches = block_pattern(
        "dilated_sparse", 1600, block_size=16, num_heads=5, segment_lengths=(1600, 800), dilation_rates=(3, 1)
    )
    dense = branches.to_dense()[0]
    assert [torch.equal(dense[h], dense[0]) for h in range(5)] == [True, True, True, False, False]


def test_random_is_seeded_and_nearly_uniform():
    one, two = (make_pattern("random", 1600, seed=s).to_dense() for s in (0, 0))
    assert torch.equal(one, two) and not torch.equal(one, make_pattern("random", 1600, seed=1).to_dense())
    share = (
        torch.stack([make_pattern("random", 1600, heads=8, seed=s).to_dense()[0] for s in range(20)])
        .float()
        .mean((0, 1))
    )
    far = share[80, 5:60]
    assert (far - far.mean()).abs().max() < 0.15 and far.mean() > 0.1


def test_a_million_tokens():
    "Each fixed pattern in some seconds even here; memory is that of the indices (see benchmarks/block_sparse.json)."
    for name in ("local_window", "strided"):
        begin = time.thread_time()
        made = block_pattern(name, 2**20, sparsity_ratio=0.1, is_causal=True)
        assert time.thread_time() - begin < 10 and made.rows == 8192
        assert made.kv_indices.numel() == 8192 * 819


# ---------------------------------------------------------------- pattern as data


@causal
@fixed
def test_round_trip_through_flex_attention(name, is_causal):
    made = make_pattern(name, 333, is_causal)
    back = BlockPattern.from_block_mask(made.to_block_mask(is_causal))
    assert torch.equal(back.to_dense(), made.to_dense()) and back.seq_lens == (333, 333) and back.block_size == 16
    assert torch.equal(BlockPattern.from_dense(made.to_dense(), 16, (333, 333)).to_dense(), made.to_dense())


def test_from_flex_attention():
    mask = create_block_mask(lambda b, h, q, k: q - k > 40 * h, 1, 2, 160, 160, device="cpu", BLOCK_SIZE=32)
    made = BlockPattern.from_block_mask(mask)
    assert torch.equal(made.to_dense(), mask.to_dense().bool()) and made.kv_num_blocks.shape == (1, 2, 5)


def test_densities_and_last_rows():
    made = make_pattern("strided", 320, True)
    dense = made.to_dense()[0, 0]
    assert made.density == pytest.approx(float(dense.float().mean()))
    assert made.causal_density == pytest.approx(float(dense.sum()) / 210)
    assert torch.equal(made.last(50).to_dense(), made.to_dense()[:, :, -4:]) if (320 - 50) % 16 == 0 else True
    assert torch.equal(made.last(48).to_dense(), made.to_dense()[:, :, -3:])
    assert torch.equal(made.last(48).token_mask(True), made.token_mask(True)[:, :, -48:])


def test_plot_draws_the_blocks():
    ax = make_pattern("random", 320).plot(head=2, title="random")
    assert ax.get_title("left") == "random" and ax.get_xlabel() == "block of keys"


def test_int64_indices_become_int32_and_rows_past_their_number_are_ignored():
    made = BlockPattern(torch.tensor([[[1, 0]]]), torch.tensor([[[[0, 99], [-7, -7]]]]), 16, (32, 32))
    assert made.kv_indices.dtype == torch.int32 and made.to_dense()[0, 0].tolist() == [[True, False], [False, False]]


def row(*blocks):
    return torch.tensor([[[list(blocks)]]], dtype=torch.int32)


ONE = torch.tensor([[[2]]], dtype=torch.int32)
BAD = [
    (dict(kv_indices=row(1, 0)), ValueError, "ascend"),
    (dict(kv_indices=row(1, 1)), ValueError, "each block once"),
    (dict(kv_indices=row(0, 2)), ValueError, "blocks of keys 0 ... 1, got 2"),
    (dict(kv_indices=row(-1, 0)), ValueError, "got -1"),
    (dict(kv_num_blocks=ONE + 1), ValueError, "between 0 and the 2 indices"),
    (dict(kv_num_blocks=-ONE), ValueError, "between 0"),
    (dict(kv_num_blocks=ONE[0]), ValueError, "be \\[b, h, 1\\]"),
    (dict(kv_num_blocks=ONE.expand(1, 1, 2)), ValueError, "one row for each"),
    (dict(kv_indices=row(0, 1)[0]), ValueError, "be \\[b, h, 1\\]"),
    (dict(kv_indices=row(0, 1).float()), TypeError, "integer tensor, got torch.float32"),
    (dict(kv_num_blocks=ONE.bool()), TypeError, "integer"),
    (dict(kv_indices=[[0, 1]]), TypeError, "integer tensor, got list"),
    (dict(block_size=0), ValueError, "at least 1"),
    (dict(block_size=24), ValueError, "multiple of 16, got 24; use 32 or 16"),
    (dict(block_size=16.0), TypeError, "16.0"),
    (dict(block_size=True), TypeError, "bool"),
    (dict(seq_lens=(32, 16)), ValueError, "seq_lens must be \\(queries, keys\\)"),
    (dict(seq_lens=(10, 30)), ValueError, "multiple of block_size 16"),
    (dict(seq_lens=(16,)), ValueError, "seq_lens"),
    (dict(seq_lens=16), TypeError, "seq_lens"),
]


@pytest.mark.parametrize("change, error, words", BAD, ids=range(len(BAD)))
def test_malformed_patterns_are_refused(change, error, words):
    good = dict(kv_num_blocks=ONE, kv_indices=row(0, 1), block_size=16, seq_lens=(16, 32))
    BlockPattern(**good)
    with pytest.raises(error, match=words):
        BlockPattern(**{**good, **change})


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(pattern_type="windowed"), ValueError, "did you mean 'local_window'"),
        (dict(pattern_type="adaptive"), ValueError, "pattern_type must be one of"),
        (dict(pattern_type=None), TypeError, "NoneType"),
        (dict(n=0), ValueError, "n must be at least 1"),
        (dict(n=1.5), TypeError, "n must be an integer"),
        (dict(density=0), ValueError, "above 0"),
        (dict(density=1.01), ValueError, "at most 1"),
        (dict(density=float("nan")), ValueError, "finite"),
        (dict(block_size=100), ValueError, "use 112 or 96"),
        (dict(block_size=-16), ValueError, "at least 1"),
        (dict(num_heads=0), ValueError, "num_heads"),
        (dict(is_causal=1), TypeError, "is_causal"),
        (dict(pattern_type="random", seed=-1), ValueError, "seed"),
        (dict(pattern_type="dilated_sparse", segment_lengths=(4,), dilation_rates=(1, 2)), ValueError, "as long as"),
    ],
)
def test_bad_arguments_of_block_pattern(change, error, words):
    good = dict(pattern_type="local_window", n=100, block_size=16)
    with pytest.raises(error, match=words):
        block_pattern(**{**good, **change})


def bad_calls():
    q, k, v = make_qkv(2, 64, 4, 8)
    made = make_pattern("random", 64)
    three = BlockPattern(made.kv_num_blocks[:, :3], made.kv_indices[:, :3], 16, (64, 64))
    batch = BlockPattern(made.kv_num_blocks.expand(3, -1, -1), made.kv_indices.expand(3, -1, -1, -1), 16, (64, 64))
    yield dict(pattern=made.to_block_mask()), TypeError, "BlockPattern, got BlockMask"
    yield dict(pattern=make_pattern("random", 80)), ValueError, "made for 64 queries and 64 keys, got \\(80, 80\\)"
    yield dict(pattern=three), ValueError, "1 or q's 4 in its heads dimension, got 3"
    yield dict(pattern=batch), ValueError, "1 or q's 2 in its batch dimension, got 3"
    yield dict(is_causal=None), TypeError, "is_causal"
    yield dict(scale=0.0), ValueError, "scale"
    yield dict(backend="flax"), ValueError, "did you mean 'flex'"
    yield dict(backend="efficient"), ValueError, "runs on CUDA"
    yield dict(key_padding_mask=torch.zeros(2, 64)), TypeError, "bool"
    yield dict(key_padding_mask=torch.zeros(2, 63, dtype=torch.bool)), ValueError, "keys"
    yield dict(k=k[:, :, :3]), ValueError, "shape"
    yield dict(q=q.int()), TypeError, "float"
    yield dict(q=q.requires_grad_(), backend="flex"), ValueError, "no backward pass on the CPU"
    yield dict(key_padding_mask=torch.zeros(2, 64, dtype=torch.bool), backend="flex"), ValueError, "key_padding_mask"


@pytest.mark.parametrize("case", list(bad_calls()), ids=lambda case: case[2])
def test_bad_calls(case):
    change, error, words = case
    q, k, v = make_qkv(2, 64, 4, 8)
    with pytest.raises(error, match=words):
        block_sparse_attention(**{"q": q, "k": k, "v": v, "pattern": make_pattern("random", 64), **change})


# ---------------------------------------------------------------- the cache


def test_a_pattern_is_made_once_even_by_many_threads(monkeypatch):
    calls, slow = [], block_patterns.block_pattern

    def counted(*args, **kwargs):
        calls.append(args)
        time.sleep(0.02)
        return slow(*args, **kwargs)

    monkeypatch.setattr(block_patterns, "block_pattern", counted)
    cache, start = PatternCache(), threading.Barrier(16)

    def work(i):
        start.wait()
        return [cache.get(FIXED[(i + j) % 6], 512, block_size=16, is_causal=True) for j in range(6)]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(work, range(16)))
    assert len(calls) == 6 == cache.made and len({id(p) for ps in found for p in ps}) == 6


def test_a_full_cache_forgets_the_least_recently_used():
    cache = PatternCache(max_entries=2)
    a, b = cache.get("strided", 512), cache.get("strided", 640)
    assert cache.get("strided", 512) is a
    cache.get("strided", 768)
    assert cache.get("strided", 512) is a and len(cache) == 2 and cache.get("strided", 640) is not b


def test_bytes_are_bounded():
    one = PatternCache()
    one.get("random", 4096, block_size=16)
    cache = PatternCache(max_bytes=2 * one.nbytes)
    for seed in range(10):
        cache.get("random", 4096, block_size=16, seed=seed)
    assert len(cache) == 2 and cache.nbytes <= cache.max_bytes
    tiny = PatternCache(max_bytes=1)
    assert tiny.get("strided", 512).rows == 4 and len(tiny) == 0


def test_failures_are_raised_to_all_and_not_kept():
    cache = PatternCache()
    for _ in range(2):
        with pytest.raises(ValueError, match="density"):
            cache.get("strided", 512, density=2)
    assert len(cache) == 0
    for bad in (dict(max_entries=0), dict(max_bytes=0)):
        with pytest.raises(ValueError, match="at least 1"):
            PatternCache(**bad)


def test_cache_under_stress():
    cache, errors = PatternCache(max_entries=3), []

    def work(seed):
        rng = np.random.default_rng(seed)
        for n in rng.integers(1, 9, 150):
            made = cache.get("random", 64 * int(n), block_size=16, seed=int(n))
            if made.seq_lens != (64 * n, 64 * n):
                errors.append(n)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert not errors and len(cache) <= 3


# ---------------------------------------------------------------- the oracle


@fixed
@causal
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_oracle(name, is_causal, dtype):
    for n in (1, 37, 128, 203):
        q, k, v = make_qkv(2, n, 4, 8, kv_heads=2, dtype=dtype)
        held(q, k, v, make_pattern(name, n, is_causal), is_causal)


@fixed
@causal
@pytest.mark.parametrize("backend", ["flash", "math"])
def test_padding_and_late_queries_equal_the_oracle(name, is_causal, backend):
    mask = torch.rand(2, 150, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[0, :20], mask[1, 90:] = True, True
    for nq in (150, 54):
        q, k, v = make_qkv(2, nq, 4, 8, nk=150, dtype=torch.float64)
        made = make_pattern(name, 150, True)
        held(q, k, v, made if nq == 150 else made.last(nq), is_causal, mask, backend)


@drawn(60)
@given(st.data())
def test_any_pattern_equals_the_oracle(data):
    "Arbitrary blocks: rows without keys, missing diagonals, lists of their own for each batch entry and head."
    draw = data.draw
    size, nk = draw(st.sampled_from([16, 32])), draw(st.integers(1, 130))
    cols = -(-nk // size)
    nq = nk - size * draw(st.integers(0, cols - 1))
    rows, heads = -(-nq // size), draw(st.sampled_from([1, 2, 4]))
    seed, density = draw(st.integers(0, 99)), draw(st.floats(0, 1))
    keep = torch.rand(1, draw(st.sampled_from([1, heads])), rows, cols, generator=torch.Generator().manual_seed(seed))
    made = BlockPattern.from_dense(keep < density, size, (nq, nk))
    q, k, v = make_qkv(
        draw(st.integers(1, 2)), nq, heads, 8, kv_heads=draw(st.sampled_from([1, heads])), nk=nk, dtype=torch.float64
    )
    mask = torch.rand(len(q), nk, generator=torch.Generator().manual_seed(seed)) < 0.4 if draw(st.booleans()) else None
    held(q, k, v, made, draw(st.booleans()), mask)


def test_batch_entries_may_have_patterns_of_their_own():
    made = [make_pattern("random", 100, True, seed=s) for s in range(2)]
    both = BlockPattern(
        *(torch.cat([getattr(p, x) for p in made]) for x in ("kv_num_blocks", "kv_indices")), 16, (100, 100)
    )
    q, k, v = make_qkv(2, 100, 4, 8)
    together = block_sparse_attention(q, k, v, both, is_causal=True)
    for b in range(2):
        alone = block_sparse_attention(*(x[b : b + 1] for x in (q, k, v)), made[b], is_causal=True)
        assert torch.allclose(together[b : b + 1], alone, atol=1e-6)


def gradients_hold(name, is_causal, fast_mode):
    q, k, v = make_qkv(1, 35, 2, 4, kv_heads=1, dtype=torch.float64, requires_grad=True)
    made = make_pattern(name, 35, is_causal, heads=2)
    return torch.autograd.gradcheck(
        lambda *x: block_sparse_attention(*x, made, is_causal=is_causal), (q, k, v), fast_mode=fast_mode
    )


@fixed
@causal
def test_gradcheck_in_one_direction(name, is_causal):
    assert gradients_hold(name, is_causal, True)


@pytest.mark.parametrize("name", [x if x == "random" else pytest.param(x, marks=pytest.mark.slow) for x in FIXED])
@causal
def test_gradcheck(name, is_causal):
    assert gradients_hold(name, is_causal, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["local_window", pytest.param("strided", marks=pytest.mark.slow), "random"])
def test_blocks_of_128_equal_the_oracle(name, dtype):
    "Large calls, those that stay in bfloat16 in the backward pass among them."
    q, k, v = make_qkv(1, 2048, 1, 16, dtype=dtype)
    held(q, k, v, block_pattern(name, 2048, sparsity_ratio=0.5, is_causal=True), True)


@causal
@pytest.mark.parametrize("ratio", [0.1, 0.3])  # blocks are read where they lie, and from a copy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_strung_together_equal_the_oracle(is_causal, ratio, dtype):
    n = 1000
    made = block_pattern("random", n, block_size=32, sparsity_ratio=ratio, is_causal=is_causal, num_heads=2)
    assert block_sparse._irregular(made.kv_num_blocks, made.kv_indices)
    assert block_sparse._often(made.kv_num_blocks, made.cols) == (ratio == 0.3)
    mask = torch.zeros(1, n, dtype=torch.bool)
    mask[0, 300:420] = True
    q, k, v = make_qkv(1, n, 2, 16, kv_heads=1, dtype=dtype)
    held(q, k, v, made, is_causal)
    held(q, k, v, made, is_causal, mask)


@causal
def test_a_row_of_blocks_may_be_one_masked_call_or_two(is_causal, monkeypatch):
    made = make_pattern("random", 203, is_causal)
    x = make_qkv(2, 203, 4, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for limit in (2**17, 0):
        for module in (backends, block_sparse):
            monkeypatch.setattr(module, "_ONE_CALL", limit)
        out = block_sparse_attention(*x, made, is_causal=is_causal)
        found.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found))


class Largest(TorchDispatchMode):
    "The number of elements of the largest tensor that any operation returns."

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.size = max(self.size, *sizes, 0)
        return out


@pytest.mark.parametrize("name", ["local_window", "random"])
def test_no_tensor_grows_with_the_square_of_the_length(name):
    "Operators are opaque to the mode, so their insides are called as functions."
    found = []
    for n in (2048, 8192):
        made = block_pattern(name, n, block_size=32, sparsity_ratio=256 / n, is_causal=True, num_heads=2)
        x, lists = make_qkv(1, n, 2, 8), (made.kv_num_blocks, made.kv_indices, 32)
        with Largest() as largest:
            out, lse = block_sparse.sparse_forward_op._init_fn(*x, None, *lists, True, 0.3, "auto", True)
            block_sparse.sparse_backward_op._init_fn(out, *x, out, lse, None, *lists, True, 0.3, "auto", True)
        found.append(largest.size)
    assert found[0] > 2048 * 2 * 8 - 1 and found[1] <= max(8192 * 2 * 8 * 8, 2**20) < 8192**2 // 8


def test_all_blocks_are_dense_attention():
    q, k, v = make_qkv(2, 200, 4, 16)
    made = make_pattern("local_window", 200, ratio=1.0)
    assert torch.allclose(block_sparse_attention(q, k, v, made), attend(q, k, v)[0], atol=1e-6)


def test_weights_of_a_row_sum_to_one():
    q, k, _ = make_qkv(1, 300, 4, 8, dtype=torch.float64)
    for name in FIXED:
        out = block_sparse_attention(q, 9 * k, torch.ones_like(k), make_pattern(name, 300, True), is_causal=True)
        assert torch.allclose(out, torch.ones_like(out), atol=1e-14)


def test_rows_without_keys_are_zero():
    keep = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    keep[0, 0, 2] = False
    made = BlockPattern.from_dense(keep, 16, (64, 64))
    q, k, v = make_qkv(1, 64, 2, 8, requires_grad=True)
    out = block_sparse_attention(q, k, v, made)
    assert (out[:, 32:48] == 0).all() and (out[:, :32] != 0).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert (grads[0][:, 32:48] == 0).all() and all(g.isfinite().all() for g in grads)
    nothing = BlockPattern.from_dense(~torch.ones_like(keep), 16, (64, 64))
    assert (block_sparse_attention(q, k, v, nothing) == 0).all()


@fixed
def test_the_future_stays_unseen(name):
    q, k, v = make_qkv(2, 150, 4, 8)
    for pattern_causal in (False, True):
        made = make_pattern(name, 150, pattern_causal)
        for t in (1, 77, 149):
            assert_causal(lambda *x, p=made: block_sparse_attention(*x, p, is_causal=True), q, k, v, t)


def test_batch_rows_are_strangers():
    q, k, v = make_qkv(3, 100, 4, 8)
    mask, made = torch.rand(3, 100) < 0.2, make_pattern("random", 100)
    assert_batch_independent(
        lambda q, k, v, m: block_sparse_attention(q, k, v, made, key_padding_mask=m), q, k, v, mask
    )


def test_scale_and_strides_and_empty_gradients():
    q, k, v = make_qkv(1, 100, 2, 8, dtype=torch.float64)
    made = make_pattern("strided", 100, heads=2)
    assert torch.allclose(
        block_sparse_attention(2 * q, k, v, made, scale=0.1), block_sparse_attention(q, k, v, made, scale=0.2)
    )
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    last = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]
    for other in (swapped, last):
        same(block_sparse_attention(*other, made), block_sparse_attention(q, k, v, made))
    out = block_sparse_attention(q, k, v.requires_grad_(), made)
    assert torch.autograd.grad(out.sum(), v)[0].shape == v.shape


def test_forward_mode_is_refused():
    q, k, v = make_qkv(1, 32, 2, 8)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: block_sparse_attention(q, k, v, make_pattern("strided", 32)), (q,), (q,))
    module = BlockSparseAttention(SparseAttentionConfig((32,), (1,), block_size=16))
    for derive in (lambda f: torch.func.jvp(f, (q,), (q,)), lambda f: torch.func.hessian(f)(q)):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            derive(lambda q: module(q, k, v).sum())


def test_autocast():
    q, k, v = make_qkv(1, 64, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert block_sparse_attention(q, k, v, make_pattern("random", 64)).dtype == torch.bfloat16


def test_saves_only_its_inputs_and_the_merged_result():
    q, k, v = make_qkv(1, 1024, 2, 16, requires_grad=True)
    made = make_pattern("random", 1024, heads=2)
    saved = saved_for_backward(lambda: block_sparse_attention(q, k, v, made))
    indices = made.kv_num_blocks.untyped_storage().nbytes() + made.kv_indices.untyped_storage().nbytes()
    assert saved.num_bytes == 4 * q.numel() * 4 + q.numel() // 16 * 4 + indices


# ---------------------------------------------------------------- plans


@drawn(100)
@given(st.integers(0, 999), st.integers(1, 20), st.integers(1, 20), st.floats(0, 1), st.booleans())
def test_a_plan_computes_every_block_once(seed, rows, past, density, swapped):
    rng = np.random.default_rng(seed)
    cols = rows + past
    keep = torch.from_numpy(rng.random((1, 1, rows, cols)) < density)
    keep = keep | keep.roll(1, 2) if seed % 2 else keep
    made = BlockPattern.from_dense(keep, 16, (16 * rows, 16 * cols))
    lists = block_sparse.Lists(made.kv_num_blocks[0, 0].numpy().astype(int), made.kv_indices[0, 0].numpy())
    for is_causal, joint in ((False, 0), (True, 0), (True, 4)):
        seen = np.zeros((rows, cols), int)
        for p in block_sparse.plan((lists,), past, cols, is_causal, swapped, 8, 16, False, joint):
            for b in p.batches:
                for r, c in zip(b.rows.blocks, b.cols.blocks):
                    block = np.tri(len(r), dtype=int) if b.is_causal and len(r) == len(c) else 1
                    seen[np.ix_(c, r) if swapped else np.ix_(r, c)] += block
        want = keep[0, 0].numpy()
        assert (seen == (want & np.tri(rows, cols, past, dtype=bool) if is_causal else want)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_rows_of_a_causal_window_are_one_call_for_each_length(dtype):
    n = 1500
    made = block_pattern("local_window", n, sparsity_ratio=0.4, is_causal=True)
    lists = block_sparse.Lists(made.kv_num_blocks[0, 0].numpy().astype(int), made.kv_indices[0, 0].numpy())
    assert lists.split(0, True)[0].stride() == 1
    portions = block_sparse.plan((lists,), 0, made.rows, True, False, 8, 16, False, 8)
    assert sorted(b.cols.k for p in portions for b in p.batches) == sorted(set(lists.num.tolist()))
    assert all(b.cols.step >= 0 and b.rows.run for p in portions for b in p.batches)  # views, no copies
    q, k, v = make_qkv(1, n, 2, 16, kv_heads=1, dtype=dtype)
    held(q, k, v, made, True)


def test_plans_of_the_same_content_are_made_once():
    made = make_pattern("strided", 2048, True)
    block_sparse._small_plan.cache_clear()
    q, k, v = make_qkv(2, 2048, 4, 8)
    for pattern in (made, make_pattern("strided", 2048, True)):
        block_sparse_attention(q, k, v, pattern, is_causal=True)
    assert block_sparse._small_plan.cache_info().misses == 1


# ---------------------------------------------------------------- compile, flex


def test_compiled_without_a_break():
    made = make_pattern("random", 96, True)
    compiled = torch.compile(
        lambda q, k, v: block_sparse_attention(q, k, v, made, is_causal=True), fullgraph=True, backend="aot_eager"
    )
    q, k, v = make_qkv(1, 96, 4, 8, requires_grad=True)
    out, want = compiled(q, k, v), block_sparse_attention(q, k, v, made, is_causal=True)
    same(out, want)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, want))):
        same(a, b)


def test_operators_keep_their_contract():
    made = make_pattern("random", 48)
    q, k, v = make_qkv(1, 48, 4, 8, requires_grad=True)
    arguments = (q, k, v, None, made.kv_num_blocks, made.kv_indices, 16, True, 0.3, "auto", True)
    torch.library.opcheck(block_sparse.sparse_forward_op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_flex_attention_agrees():
    for is_causal in (False, True):
        made = block_pattern("random", 512, is_causal=is_causal, num_heads=4)
        q, k, v = make_qkv(1, 512, 4, 16, kv_heads=2)
        flex = block_sparse_attention(q, k, v, made, is_causal=is_causal, backend="flex")
        assert torch.allclose(flex, block_sparse_attention(q, k, v, made, is_causal=is_causal), atol=1e-5)


# ---------------------------------------------------------------- module, adaptive


def config(cls=SparseAttentionConfig, **values):
    "For any length, unless a test says otherwise."
    branched = values.get("pattern_type", "dilated_sparse") in ("dilated_sparse", "hierarchical")
    branches = {"segment_lengths": (128,), "dilation_rates": (3,)} if branched else {}
    return cls(**{**branches, "block_size": 16, "ragged": "mask", **values})


ADAPTIVE = dict(pattern_type="adaptive", enable_adaptive=True, head_dim=8)


@pytest.mark.parametrize("name", SPARSE_PATTERNS)
def test_module(name):
    own = ADAPTIVE if name == "adaptive" else dict(pattern_type=name)
    attention = BlockSparseAttention(config(**own))
    q, k, v = make_qkv(2, 100, 4, 8, kv_heads=2, requires_grad=True)
    out = attention(q, k, v, is_causal=True)
    out.sum().backward()
    assert out.shape == q.shape and q.grad.isfinite().all()
    assert_causal(lambda *x: attention(*x, is_causal=True), q, k, v, 50)
    if name != "adaptive":
        made = attention.pattern(100, 4, True)
        same(out, block_sparse_attention(q, k, v, made, is_causal=True))
        assert attention.cache.made == 1
        for past in (48, 50, 99):
            late = attention(q[:, past:], k, v, is_causal=True)
            assert torch.allclose(late, out[:, past:], atol=1e-6)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        same(other(q, k, v, is_causal=True), attention(q, k, v, is_causal=True))
        assert len(attention.state_dict()) == len(other.state_dict()) == (2 if name == "adaptive" else 0)
    compiled = torch.compile(attention.eval(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(q, k, v, is_causal=True), attention(q, k, v, is_causal=True), atol=1e-6)


def test_module_shares_a_cache():
    cache = PatternCache()
    for _ in range(3):
        BlockSparseAttention(config(pattern_type="strided"), cache)(*make_qkv(1, 64, 2, 8))
    assert cache.made == 1


BRANCHED = ("dilated_sparse", "hierarchical")
REFUSED = [
    (dict(mixing="softmax"), "mixing must be 'groups'"),
    (dict(offsets="interleaved"), "offsets"),
    (dict(ragged="zeros"), "ragged"),
    (dict(enable_adaptive=True), "only for it, got True with 'dilated_sparse'"),
    (dict(pattern_type="adaptive"), "got False with 'adaptive'"),
    (dict(pattern_type="adaptive", enable_adaptive=True), "head_dim must be given"),
    (dict(pattern_type="strided", seed=1), "seed must be 0 for pattern 'strided'"),
    (dict(segment_lengths=(), dilation_rates=()), "needs segment_lengths for 'dilated_sparse'"),
    (dict(pattern_type="hierarchical", segment_lengths=(), dilation_rates=()), "needs segment_lengths"),
    (dict(pattern_type="random", segment_lengths=(64,)), "dilation_rates must have an entry"),
]


@pytest.mark.parametrize("values, words", REFUSED)
def test_the_config_refuses_what_has_no_meaning(values, words):
    with pytest.raises(ValueError, match=words):
        config(**values)
    with pytest.raises(ValueError, match="not be 'adaptive' on a ring" if "adaptive" in values.values() else words):
        config(BlockSparseRingConfig, **values)


def branches_of(name):
    return {"segment_lengths": (64, 128), "dilation_rates": (2, 3)} if name in BRANCHED else {}


def response(c):
    "What a config makes of two sequences, in training: outputs, or the errors that stand for them."
    found = []
    for n, dtype in ((384, torch.float32), (100, torch.float32), (384, torch.float64)):
        torch.manual_seed(0)
        q, k, v = make_qkv(1, n, 4, 8, dtype=dtype)
        try:
            found.append(BlockSparseAttention(c).train()(q, k, v).double().sum().item())
        except (ValueError, TypeError, RuntimeError) as error:
            found.append(str(error))
    return found


CHANGES = dict(
    segment_lengths=(50, 100), dilation_rates=(1, 9), dropout=0.5, mixing="softmax", offsets="interleaved",
    ragged="mask", device="meta", dtype="float64", pattern_type="random", density=0.7, block_size=64,
    enable_adaptive=True, head_dim=16, seed=3,
)  # fmt: skip


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(SparseAttentionConfig)])
@pytest.mark.parametrize("name", SPARSE_PATTERNS)
def test_every_field_of_every_pattern_changes_something_or_is_refused(name, field):
    if field == "use_tf32":
        pytest.skip("of float32 products on CUDA only")
    own = branches_of(name) | (ADAPTIVE if name == "adaptive" else dict(pattern_type=name))
    base = SparseAttentionConfig(**{"block_size": 16, "density": 0.3, **own})
    change = {field: CHANGES[field]}
    if field == "pattern_type" and name == "random":
        change = {"pattern_type": "strided"}
    if field in ("segment_lengths", "dilation_rates") and name not in BRANCHED:  # one needs the other
        change = {"segment_lengths": CHANGES["segment_lengths"], "dilation_rates": (1, 2)}
        with pytest.warns(UserWarning, match="has no branches: dilation_rates \\(1, 2\\) change nothing"):
            changed = dataclasses.replace(base, **change)
    elif field == "enable_adaptive" and name == "adaptive":
        change = {"enable_adaptive": False}
    try:
        changed = dataclasses.replace(base, **change)
    except ValueError as error:
        assert field in str(error)
        return
    assert response(changed) != response(base)


def test_patterns_without_branches_need_none():
    for name in FIXED:
        if name not in BRANCHED:
            attention = BlockSparseAttention(SparseAttentionConfig(pattern_type=name, block_size=16))
            assert attention(*make_qkv(1, 64, 4, 8)).shape == (1, 64, 4, 8)
            with pytest.raises(ValueError, match="length 50 is not a multiple of block_size 16; .* pad to 64"):
                attention(*make_qkv(1, 50, 4, 8))


@pytest.mark.parametrize("name", SPARSE_PATTERNS)
def test_lengths_are_multiples_unless_ragged_is_mask(name):
    own = ADAPTIVE if name == "adaptive" else dict(pattern_type=name)
    strict, free = (
        BlockSparseAttention(config(segment_lengths=(32, 48), dilation_rates=(1, 1), ragged=ragged, **own))
        for ragged in ("error", "mask")
    )
    for n in (96, 64, 50):
        q, k, v = make_qkv(1, n, 4, 8)
        assert free(q, k, v).shape == q.shape
        if n == 96:
            assert strict(q, k, v).shape == q.shape and strict(q[:, 40:], k, v).shape == (1, 56, 4, 8)
            continue
        with pytest.raises(ValueError, match=f"sequence length {n} is not a multiple of segment length"):
            strict(q, k, v)


def test_no_branch_of_a_pattern_is_dropped():
    "In silence: by the module, its pattern, the ring, the multi-head layer and the functional form."
    four = {"segment_lengths": (128, 256, 512, 512), "dilation_rates": (1, 2, 4, 8)}
    q, k, v = make_qkv(1, 512, 2, 16)
    c = config(**four)
    made = block_pattern("dilated_sparse", 512, block_size=16, num_heads=2, **four)
    ring = BlockSparseRingDilatedAttention(BlockSparseRingConfig(**four, block_size=16))
    for call in (
        lambda: BlockSparseAttention(c)(q, k, v),
        lambda: BlockSparseAttention(c).pattern(512, 2),
        lambda: ring.simulate(q, k, v, 2),
        lambda: ring(q, k, v),
        lambda: create_multihead_dilated_attention("block_sparse", embed_dim=32, num_heads=2, block_size=16, **four),
        lambda: block_sparse_attention(q, k, v, made),
    ):
        with pytest.raises(ValueError, match="heads"):
            call()
    hierarchical = config(pattern_type="hierarchical", **four)  # every head has all scales
    assert BlockSparseAttention(hierarchical)(q, k, v).shape == q.shape


def test_the_width_of_heads_is_the_configs():
    for c in (config(head_dim=16), config(**{**ADAPTIVE, "head_dim": 16})):
        with pytest.raises(ValueError, match="head_dim must be the config's 16, got 8"):
            BlockSparseAttention(c)(*make_qkv(1, 64, 2, 8))
    with pytest.raises(ValueError, match="head_dim must be 8, embed_dim / num_heads, got 16"):
        create_multihead_dilated_attention(
            "block_sparse", embed_dim=32, num_heads=4, segment_lengths=(64,), dilation_rates=(1,), head_dim=16
        )


def test_documents_are_refused():
    q, k, v = make_qkv(1, 64, 4, 8)
    for call in (
        BlockSparseAttention(config()),
        lambda *x, **kw: block_sparse_attention(*x, make_pattern("strided", 64), **kw),
    ):
        with pytest.raises(ValueError, match="cu_seqlens must be None in block-sparse attention"):
            call(q, k, v, cu_seqlens=torch.tensor([0, 32, 64]))


def test_module_checks_config_dtype_and_dropout():
    with pytest.raises(TypeError, match="SparseAttentionConfig"):
        BlockSparseAttention(config().to_dict())
    with pytest.raises(TypeError, match="float64 as the config says"):
        BlockSparseAttention(config(dtype="float64"))(*make_qkv(1, 32, 2, 8))
    dropped = BlockSparseAttention(config(dropout=0.5))
    q, k, v = make_qkv(1, 64, 4, 8)
    assert 0.3 < (dropped(q, k, v) == 0).float().mean() < 0.7 and (dropped.eval()(q, k, v) != 0).all()


def test_the_options_of_the_config_reach_the_pattern():
    base = BlockSparseAttention(config()).pattern(512, 4, True).to_dense()
    for values in (
        dict(sparsity_ratio=0.5),
        dict(pattern_type="random"),
        dict(dilation_rates=(1,)),
        dict(segment_lengths=(16,)),
    ):
        other = BlockSparseAttention(config(**{"sparsity_ratio": 0.1, **values})).pattern(512, 4, True).to_dense()
        assert other.shape != base.shape or not torch.equal(other, base)
    seeds = [BlockSparseAttention(config(pattern_type="random", seed=s)).pattern(512, 4).to_dense() for s in (0, 1)]
    assert not torch.equal(*seeds)


def test_factories():
    made = create_dilated_attention("block_sparse", pattern_type="strided")
    assert isinstance(made, BlockSparseAttention) and made.config.pattern_type == "strided"
    with pytest.raises(ValueError, match="no field 'sparsity'"):
        create_dilated_attention("block_sparse", segment_lengths=(64,), dilation_rates=(2,), sparsity=0.1)
    with pytest.raises(ValueError, match="no field 'density'"):
        create_dilated_attention("improved", segment_lengths=(64,), dilation_rates=(2,), sparsity_ratio=0.1)
    layer = create_multihead_dilated_attention(
        "block_sparse", embed_dim=32, num_heads=4, block_size=16, ragged="mask",
        pattern_type="adaptive", enable_adaptive=True, dtype=torch.float64,
    )  # fmt: skip
    x = torch.randn(2, 70, 32, dtype=torch.float64)
    layer(x, is_causal=True)[0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.attention.scorer.parameters())
    _, weights = layer(x, is_causal=True, need_weights=True)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 70, dtype=torch.float64))


@causal
@pytest.mark.parametrize("ratio", [0.1, 0.4, 1.0])
def test_adaptive_rows_meet_the_ratio(is_causal, ratio):
    scorer = BlockScorer(8, 16, ratio)
    q, k, _ = make_qkv(2, 330, 4, 8, kv_heads=2)
    made = BlockPattern(*scorer.choose(*scorer(q, k), is_causal), 16, (330, 330))
    seen = torch.arange(1, 22) if is_causal else torch.full((21,), 21)
    assert ((made.kv_num_blocks - ratio * seen).abs() <= 1).all()
    dense = made.to_dense()
    assert dense.diagonal(dim1=2, dim2=3).all() and not (is_causal and dense.triu(1).any())


def test_adaptive_keeps_the_highest_scores():
    scorer = BlockScorer(8, 16, 0.25)
    of_q, of_k = torch.randn(1, 20, 2, 8), torch.randn(1, 20, 2, 8)
    made = BlockPattern(*scorer.choose(of_q, of_k, False), 16, (320, 320)).to_dense()
    scores = torch.einsum("bihr,bjhr->bhij", of_q, of_k)
    for i in range(20):
        best = {i, *scores[0, 0, i].masked_fill(torch.arange(20) == i, float("-inf")).topk(4).indices.tolist()}
        assert set(made[0, 0, i].nonzero().flatten().tolist()) == best


def test_the_scorers_gradient_is_that_of_its_loss_and_changes_no_other():
    attention = BlockSparseAttention(config(**ADAPTIVE))
    q, k, v = make_qkv(1, 128, 2, 8, requires_grad=True)
    out = attention(q, k, v, is_causal=True)
    grads = torch.autograd.grad(2 * out.sum(), (q, k, v, attention.scorer.q_proj.weight))
    rows = torch.tensor([1, 3, 5, 7])
    of_q, of_k = attention.scorer(q.detach(), k.detach())
    loss = adaptive.scorer_loss(of_q, of_k, block_shares(q, k, rows, 16, True), rows, True)
    length = 2 * out.numel() ** 0.5  # of the gradient of the output
    assert torch.allclose(grads[3], length * torch.autograd.grad(loss, attention.scorer.q_proj.weight)[0])
    of_q, of_k = attention.scorer(q, k)
    made = BlockPattern(*attention.scorer.choose(of_q, of_k, True), 16, (128, 128))
    plain = torch.autograd.grad(2 * block_sparse_attention(q, k, v, made, is_causal=True).sum(), (q, k, v))
    for got, want in zip(grads, plain):
        same(got, want)


@causal
def test_shares_of_blocks_are_those_of_dense_attention(is_causal):
    q, k, _ = make_qkv(2, 64, 4, 8, kv_heads=2, nk=100 - 4, dtype=torch.float64)
    mask = torch.rand(2, 96) < 0.3
    shares = block_shares(q, k, torch.tensor([0, 2, 3]), 16, is_causal, mask)
    logits = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 8**-0.5
    logits = logits.masked_fill(mask[:, None, None], float("-inf"))
    if is_causal:
        logits = logits.masked_fill(~torch.ones(64, 96).tril(32).bool(), float("-inf"))
    dense = logits.softmax(3).unflatten(3, (6, 16)).sum(4).unflatten(2, (4, 16))
    real = ~mask[:, None, 32:, None].unflatten(2, (4, 16))  # queries that are padding have no say
    dense = (dense * real).sum(3) / real.sum(3)
    assert torch.allclose(shares, dense[:, :, [0, 2, 3]], atol=1e-14)


def test_pooling_ignores_what_is_not_there():
    x = torch.randn(2, 40, 3, 8)
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[1, 20:] = True
    found = pooled(x, 16, mask)
    assert torch.allclose(found[0, 2], x[0, 32:].mean(0)) and torch.allclose(found[1, 1], x[1, 16:20].mean(0))
    assert (found[1, 2] == 0).all()


def test_the_scorer_learns_planted_links():
    torch.manual_seed(0)
    blocks, size, width = 32, 16, 16
    attention = BlockSparseAttention(config(**{**ADAPTIVE, "head_dim": width, "sparsity_ratio": 0.2}))
    optimizer = torch.optim.Adam(attention.parameters(), 0.01)

    def planted():
        marks = torch.nn.functional.normalize(torch.randn(2, blocks, 2, width), dim=-1) * 4
        partner = (torch.rand(2, blocks) * torch.arange(blocks)).long()
        q, k, v = (0.5 * torch.randn(2, blocks * size, 2, width) for _ in range(3))
        q = q + marks[torch.arange(2)[:, None], partner].repeat_interleave(size, 1)
        return q, k + marks.repeat_interleave(size, 1), v, partner

    def recall():
        q, k, _, partner = planted()
        made = BlockPattern(*attention.scorer.choose(*attention.scorer(q, k), True), size, (blocks * size,) * 2)
        found = made.to_dense().gather(3, partner[:, None, :, None].expand(-1, 2, -1, -1))
        return float(found[:, :, 8:].float().mean())

    before = recall()
    for _ in range(60):
        q, k, v, _ = planted()
        optimizer.zero_grad()
        attention(q, k, v, is_causal=True).sum().backward()
        optimizer.step()
    assert before < 0.4 and recall() > 0.8


def gradients(attention, q, loss, scale=1.0):
    "Of the scorer."
    attention.zero_grad()
    (loss(attention(q, q, q, is_causal=True)) * scale).backward()
    return [p.grad.clone() for p in attention.parameters()]


def squares(out):
    return out.float().square().mean((1, 2, 3)).sum()


@pytest.mark.parametrize("scale", [2.0**-20, 0.5, 1000.0, 2.0**16])
def test_the_scorer_learns_from_the_scaled_loss(scale):
    attention, q = BlockSparseAttention(config(**ADAPTIVE)), make_qkv(2, 128, 4, 8)[0]
    one, other = gradients(attention, q, squares), gradients(attention, q, squares, scale)
    for a, b in zip(one, other):
        assert a.norm() > 0 and torch.allclose(b, a * scale, rtol=1e-4, atol=1e-5 * scale * a.norm())


def test_parts_of_a_batch_teach_the_scorer_what_the_batch_does():
    attention, q = BlockSparseAttention(config(**ADAPTIVE)), make_qkv(4, 128, 2, 8)[0]
    whole = gradients(attention, q, squares, 1 / 4)
    attention.zero_grad()
    for part in q.split([1, 3]):
        (squares(attention(part, part, part, is_causal=True)) / 4).backward()
    for a, p in zip(whole, attention.parameters()):
        assert torch.allclose(p.grad, a, rtol=1e-4, atol=1e-5 * a.norm())


def test_a_gradient_scaler_gives_the_scorer_what_it_gets_without():
    attention = BlockSparseAttention(config(**ADAPTIVE))
    q = make_qkv(2, 128, 2, 8, dtype=torch.float16)[0]
    attention.half()
    steps = []
    for enabled in (False, True):
        made = copy.deepcopy(attention).float()
        optimizer = torch.optim.SGD(made.parameters(), 1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        with torch.autocast("cpu", torch.float16):
            loss = squares(made(q.float(), q.float(), q.float(), is_causal=True))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        steps.append([p - before.float() for p, before in zip(made.parameters(), attention.parameters())])
    for a, b in zip(*steps):
        assert a.norm() > 0 and torch.allclose(a, b, rtol=0.02, atol=0.02 * float(a.norm()))


def test_infinite_gradients_reach_the_scorer_so_that_its_step_is_skipped():
    attention, q = BlockSparseAttention(config(**ADAPTIVE)), make_qkv(1, 64, 2, 8)[0]
    assert not any(g.isfinite().all() for g in gradients(attention, q, squares, float("inf")))


# ---------------------------------------------------------------- what PyTorch asks of a layer


def each_layer():
    for name in SPARSE_PATTERNS:
        yield BlockSparseAttention(config(**(ADAPTIVE if name == "adaptive" else dict(pattern_type=name))))


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", list(each_layer()), ids=lambda a: a.config.pattern_type)
def test_torch_func(attention):
    q, k, v = make_qkv(2, 70, 4, 8, kv_heads=2)

    def loss(q, k, v):
        return attention(q, k, v, is_causal=True).square().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    want = torch.autograd.grad(loss(*leaves), leaves)
    for got in (torch.func.grad(loss, (0, 1, 2))(q, k, v), torch.func.vjp(loss, q, k, v)[1](torch.tensor(1.0))):
        same(got, want)
    jacobian = torch.func.jacrev(lambda q: attention(q, k, v, is_causal=True)[0, 0, :, 0])(q)
    assert jacobian.shape == (4, *q.shape) and jacobian[0, 0, 1:].abs().sum() == 0


@pytest.mark.parametrize("attention", list(each_layer()), ids=lambda a: a.config.pattern_type)
def test_vmap_folds_into_the_batch(attention):
    q, k, v = (torch.stack([x, -x, 2 * x]) for x in make_qkv(2, 70, 4, 8, kv_heads=2))
    masks = torch.arange(70) >= torch.tensor([70, 60, 50])[:, None, None].expand(-1, 2, 1)

    def run(q, k, v, mask):
        return attention(q, k, v, True, mask)

    same(torch.vmap(run)(q, k, v, masks), torch.stack([run(*x) for x in zip(q, k, v, masks)]))
    shared = torch.vmap(run, (2, None, 0, None), 1)(q.movedim(0, 2), k[0], v, masks[1])
    same(shared, torch.stack([run(q[i], k[0], v[i], masks[1]) for i in range(3)], 1))


def test_per_sample_gradients():
    layer = create_multihead_dilated_attention(
        "block_sparse", embed_dim=32, num_heads=4, pattern_type="random", block_size=16
    )
    x, params = torch.randn(3, 48, 32), dict(layer.named_parameters())

    def loss(params, row):
        return torch.func.functional_call(layer, params, (row[None],))[0].square().sum()

    grads = torch.vmap(torch.func.grad(loss), (None, 0))(params, x)
    for i, row in enumerate(x):
        layer.zero_grad()
        loss(params, row).backward()
        for name, p in layer.named_parameters():
            same(grads[name][i], p.grad)


def test_a_second_derivative_is_refused_and_the_form_that_has_one_named():
    q, made = make_qkv(1, 32, 2, 8)[0], make_pattern("strided", 32)

    def loss(q):
        return block_sparse_attention(q, q, q, made).square().sum()

    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    for call in (first.sum().backward, lambda: torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(q)):
        with pytest.raises(NotImplementedError, match="no second derivative; .*pattern.token_mask"):
            call()
    leaf = q.double().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        x = leaf.transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(x, x, x, made.token_mask()).transpose(1, 2)
        same(out, block_sparse_attention(leaf, leaf, leaf, made))
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        first.square().sum().backward()
    assert leaf.grad.norm() > 0


@pytest.mark.parametrize("attention", list(each_layer()), ids=lambda a: a.config.pattern_type)
def test_fake_and_meta_tensors(attention):
    with FakeTensorMode(allow_non_fake_inputs=True):  # for the scorer's weights
        q = torch.randn(1, 70, 4, 8, requires_grad=True)
        out = attention(q, q, q, is_causal=True)
        out.sum().backward()
        assert out.shape == q.shape == q.grad.shape
        made = BlockSparseAttention(attention.config)
        assert made(q[:, :33], q[:, :33], q[:, :33]).shape == (1, 33, 4, 8)
    x = torch.randn(1, 70, 4, 8, device="meta")
    assert copy.deepcopy(attention).to("meta")(x, x, x).shape == x.shape


def test_the_functional_form_takes_fake_tensors():
    made = make_pattern("random", 70)
    with FakeTensorMode():
        q = torch.randn(1, 70, 4, 8)
        assert block_sparse_attention(q, q, q, made).shape == q.shape


@causal
@pytest.mark.parametrize("name", ["random", "strided"])
def test_flops_are_those_of_kept_blocks(name, is_causal):
    made = make_pattern(name, 100, ratio=0.4)
    q = make_qkv(2, 100, 4, 8, requires_grad=True)[0]
    with FlopCounterMode(display=False) as counter:
        out = block_sparse_attention(q, q, q, made, is_causal=is_causal)
        forward = counter.get_total_flops()
        out.sum().backward()
    dense = made.to_dense().expand(2, 4, -1, -1)
    pairs = int((dense.tril() if is_causal else dense).sum()) * 16**2
    assert forward == 4 * 8 * pairs and counter.get_total_flops() == 14 * 8 * pairs
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x = torch.randn(2, 100, 4, 8)
        block_sparse_attention(x, x, x, made, is_causal=is_causal)
    assert counter.get_total_flops() >= 4 * 8 * pairs


LENGTHS = (64, 48, 100, 33, 128)


slow_ones = [pytest.param(name, marks=pytest.mark.slow) for name in ("random", "adaptive")]


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["local_window", *slow_ones])
def test_compiled_at_several_lengths(name, dynamic):
    own = ADAPTIVE if name == "adaptive" else dict(pattern_type=name)
    attention = BlockSparseAttention(config(sparsity_ratio=0.5, **own))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, backend=counter, dynamic=dynamic)
    for n in LENGTHS:
        x = [y.requires_grad_() for y in make_qkv(1, n, 4, 8, kv_heads=2)]
        outs = compiled(*x, is_causal=True), attention(*x, is_causal=True)
        same(*outs)
        same(*(torch.autograd.grad(out.square().sum(), x) for out in outs))
    assert counter.frame_count <= 3


def test_late_queries_compiled():
    attention = BlockSparseAttention(config(pattern_type="strided"))
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    q, k, v = make_qkv(1, 100, 4, 8)
    for past in (48, 50, 99):
        same(compiled(q[:, past:], k, v, True), attention(q[:, past:], k, v, True))


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["dilated_sparse", *slow_ones])
def test_exported(name, strict):
    "For one length and for any; what is exported can be trained (the scorer learns in Python only)."
    own = ADAPTIVE if name == "adaptive" else dict(pattern_type=name)
    attention, x = BlockSparseAttention(config(**own)), make_qkv(1, 64, 4, 8)
    still = torch.export.export(attention, x, strict=strict).module()
    same(still(*x), attention(*x))
    n = torch.export.Dim("n", min=2, max=256)
    dynamic = ({1: 16 * n if name == "adaptive" else torch.export.Dim("n", min=17)},) * 3
    program = torch.export.export(attention, x, strict=strict, dynamic_shapes=dynamic).module()
    for n in (64, 128) if name == "adaptive" else (64, 100, 33):
        x = make_qkv(1, n, 4, 8, requires_grad=True)
        outs = program(*x), attention(*x)
        same(*outs)
        same(*(torch.autograd.grad(out.square().sum(), x) for out in outs))


@pytest.mark.parametrize("attention", list(each_layer()), ids=lambda a: a.config.pattern_type)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e4])
def test_what_lies_under_padding_reaches_nobody(attention, junk):
    plain = make_qkv(2, 96, 4, 8, kv_heads=2)
    mask = torch.arange(96) >= torch.tensor([[96], [70]])
    mask[0, :5] = True
    dout = torch.randn(2, 96, 4, 8).masked_fill(mask[..., None, None], 0.0)
    found = []
    for fill in (0.5, junk):
        x = [y.masked_fill(mask[..., None, None], fill).requires_grad_() for y in plain]
        attention.zero_grad()
        out = attention(*x, True, mask)
        grads = torch.autograd.grad(out, [*x, *attention.parameters()], dout)
        found.append([y.masked_fill(mask[..., None, None], 0.0) for y in (out, *grads[:3])] + list(grads[3:]))
    same(*found)
    assert all(y.isfinite().all() for y in found[1])


LAYOUTS = {
    "as SDPA has it": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "head_dim apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "of a larger one": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "every other head": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "every other token": lambda x: x.repeat_interleave(2, 1)[:, 1::2],
    "tokens last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["random", "strided", "local_window"])
def test_views_of_inputs_and_gradients(name, layout):
    x, made = make_qkv(2, 100, 4, 8, kv_heads=2, dtype=torch.float64), make_pattern(name, 100)
    dout = torch.randn(2, 100, 4, 8, dtype=torch.float64)
    results = []
    for view in (lambda x: x, LAYOUTS[layout]):
        leaves = [y.clone().requires_grad_() for y in x]
        out = block_sparse_attention(*(view(y) for y in leaves), made, is_causal=True)
        results.append((out, *torch.autograd.grad(out, leaves, view(dout))))
    same(*results)


def test_expanded_inputs_and_gradients():
    made = make_pattern("random", 64)
    x = torch.randn(1, 64, 1, 8, dtype=torch.float64)
    wide, row = x.expand(2, -1, 4, -1), x[:, :1].expand(2, 64, 4, -1)
    for q, k, v in ((wide, wide, wide), (wide, row, wide), (row, wide, row)):
        got, want = (y.requires_grad_() for y in (q.detach(), q.detach().contiguous()))
        outs = (
            block_sparse_attention(got, k, v, made),
            block_sparse_attention(want, k.contiguous(), v.contiguous(), made),
        )
        same(*outs)
        grads = [torch.autograd.grad(out.sum(), y)[0] for out, y in zip(outs, (got, want))]
        same(*grads)
