"""The faults of other systems as properties that every path of this one has: see nbs/27_defects.ipynb.

A path is a way to compute attention: readable, improved, within a multi-head layer, on a simulated ring, from a cache
(of constant size token by token, of everything some tokens at a time), along a pattern of blocks, alone and on a ring,
and the fused kernel. Patterns of all blocks are full attention; those on the diagonal alone are segments. Models that
contain a path are tested with those that made them: tests/test_transformers.py, tests/test_interop.py (GigaPath).
"""

import copy
import dataclasses
import gc
import pickle
import sys
import threading
import weakref
from collections import Counter
from contextlib import ExitStack
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import planned as by_plan
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from dilated_attention_nb import backends, block_sparse, dilated, improved, kv_cache, masking
from dilated_attention_nb.backends import attend
from dilated_attention_nb.block_patterns import BlockPattern, PatternCache
from dilated_attention_nb.block_sparse import BlockSparseAttention, SparseAttentionConfig, block_sparse_attention
from dilated_attention_nb.config import DilatedAttentionConfig, MultiheadConfig
from dilated_attention_nb.decoding import DilatedKVCache
from dilated_attention_nb.dilated import DilatedAttention
from dilated_attention_nb.improved import ImprovedDilatedAttention, dilated_attention
from dilated_attention_nb.kv_cache import KVCache
from dilated_attention_nb.longnet import LongNet, LongNetConfig
from dilated_attention_nb.masking import attention_counts, causal_mask, head_groups, tiles
from dilated_attention_nb.memory_pool import MemoryPoolConfig, UnifiedMemoryPool
from dilated_attention_nb.multihead import (
    KINDS,
    MultiheadDilatedAttention,
    create_dilated_attention,
    create_multihead_dilated_attention,
)
from dilated_attention_nb.partial import math_backward
from dilated_attention_nb.ring_block_sparse import BlockSparseRingConfig, BlockSparseRingDilatedAttention
from dilated_attention_nb.ring_dilated import RingAttentionConfig, RingDilatedAttention, simulate_ring
from dilated_attention_nb.ring_engine import RingLayer, run_together
from dilated_attention_nb.testing import assert_causal, check_against_oracle, make_qkv, oracle_attention

ROOT = Path(__file__).resolve().parent.parent
RING = sys.modules[RingDilatedAttention.__module__]

# ---------------------------------------------------------------- all paths


def readable(q, k, v, is_causal=False, key_padding_mask=None, **options) -> Tensor:
    return DilatedAttention(DilatedAttentionConfig(**options))(q, k, v, is_causal, key_padding_mask)


def fast(q, k, v, is_causal=False, key_padding_mask=None, **options) -> Tensor:
    return ImprovedDilatedAttention(DilatedAttentionConfig(**options))(q, k, v, is_causal, key_padding_mask)


def multihead(q, k, v, is_causal=False, key_padding_mask=None, **options) -> Tensor:
    "A layer whose projections change nothing."
    h, d = q.shape[2:]
    layer = MultiheadDilatedAttention(
        MultiheadConfig(h * d, h, bias=False, layer_norm=False), DilatedAttentionConfig(**options, dtype=q.dtype)
    )
    with torch.no_grad():
        for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
            torch.nn.init.eye_(linear.weight)
    out, _ = layer(q.flatten(2), k.flatten(2), v.flatten(2), key_padding_mask, is_causal=is_causal)
    return out.unflatten(2, (h, d))


def on_a_ring(size: int, layout: str = "contiguous"):
    def run(q, k, v, is_causal=False, key_padding_mask=None, **options) -> Tensor:
        config = RingAttentionConfig(**options, layout=layout, block_size=16)
        return simulate_ring(q, k, v, config, size, is_causal, key_padding_mask)

    return run


def token_by_token(q, k, v, is_causal=True, key_padding_mask=None, **options) -> Tensor:
    b, n, h, d = q.shape
    cache = DilatedKVCache(DilatedAttentionConfig(**options), h, d, b, dtype=q.dtype)
    pads = [None] * n if key_padding_mask is None else key_padding_mask.split(1, 1)
    return torch.cat([cache(*x, True, pad) for *x, pad in zip(*(y.split(1, 1) for y in (q, k, v)), pads)], 1)


def some_at_a_time(q, k, v, is_causal=True, key_padding_mask=None, **options) -> Tensor:
    "From a cache that keeps everything; steps of 1, 2, 3, 4 tokens and then the rest."
    b, n, h, d = q.shape
    cache = KVCache(n, h, d, b, config=DilatedAttentionConfig(**options), dtype=q.dtype)
    cuts = [0, *(c for c in (1, 3, 6, 10) if c < n), n]
    steps = [slice(*ends) for ends in zip(cuts, cuts[1:])]
    pads = [None if key_padding_mask is None else key_padding_mask[:, step] for step in steps]
    return torch.cat([cache(*(x[:, step] for x in (q, k, v)), True, pad) for step, pad in zip(steps, pads)], 1)


def pattern(q, k, kept) -> BlockPattern:
    rows = -(-q.shape[1] // 16)
    return BlockPattern.from_dense(kept(rows)[None, None], 16, (q.shape[1], k.shape[1]))


def all_blocks(q, k, v, is_causal=False, key_padding_mask=None) -> Tensor:
    made = pattern(q, k, lambda rows: torch.ones(rows, rows, dtype=torch.bool))
    return block_sparse_attention(q, k, v, made, is_causal=is_causal, key_padding_mask=key_padding_mask)


def own_block(q, k, v, is_causal=False, key_padding_mask=None) -> Tensor:
    made = pattern(q, k, lambda rows: torch.eye(rows, dtype=torch.bool))
    return block_sparse_attention(q, k, v, made, is_causal=is_causal, key_padding_mask=key_padding_mask)


def blocks_on_a_ring(q, k, v, is_causal=False, key_padding_mask=None) -> Tensor:
    config = BlockSparseRingConfig((16,), (1,), pattern_type="local_window", block_size=16, sparsity_ratio=1.0)
    return BlockSparseRingDilatedAttention(config).simulate(q, k, v, 2, is_causal, key_padding_mask)


def fused(q, k, v, is_causal=False, key_padding_mask=None, **options) -> Tensor:
    how = dict(is_causal=is_causal, key_padding_mask=key_padding_mask, backend="triton", use_tf32=False)
    return dilated_attention(q, k, v, **options, **how)


PATHS = {
    "readable": readable, "improved": fast, "multihead": multihead, "ring": on_a_ring(2),
    "zigzag": on_a_ring(2, "zigzag"), "decoding": token_by_token, "cache": some_at_a_time,
    "block_sparse": all_blocks, "own_block": own_block, "block_sparse_ring": blocks_on_a_ring,
}  # fmt: skip
paths = pytest.mark.parametrize("path", PATHS)
ONE_WAY = {"decoding", "cache"}  # causal only, without gradients
# What a path computes that takes no branches.
FIXED = {
    "block_sparse": lambda n: dict(segment_lengths=(n,), dilation_rates=(1,), mixing="softmax", ragged="mask"),
    "own_block": lambda n: dict(segment_lengths=(16,), dilation_rates=(1,), mixing="softmax", ragged="mask"),
}
FIXED["block_sparse_ring"] = FIXED["block_sparse"]


def length(path: str, n: int) -> int:
    "Of a ring of blocks: some blocks for each rank."
    return 32 * -(-n // 16) if path == "block_sparse_ring" else n


def attention(path: str, q, k, v, options: dict, **how) -> Tensor:
    "The path, given the options that it has."
    if path == "fused":
        return fused(q, k, v, **options, **how)
    return PATHS[path](q, k, v, **how) if path in FIXED else PATHS[path](q, k, v, **options, **how)


def expected_options(path: str, n: int, options: dict) -> dict:
    "What the path computes."
    return FIXED[path](n) if path in FIXED else options


@st.composite
def cases(draw):
    "Options of a short call that all paths take: n a multiple of 4 with ragged ends, one to three branches."
    n = 4 * draw(st.integers(2, 7))
    branches = draw(
        st.lists(st.tuples(st.sampled_from([2, 4, 6, 8, 16, n, 40]), st.integers(1, 4)), min_size=1, max_size=3)
    )
    ws, rs = zip(*branches)
    mixing = draw(st.sampled_from(["groups", "softmax"]))
    options = dict(segment_lengths=ws, dilation_rates=rs, mixing=mixing, ragged="mask")
    return n, draw(st.integers(3, 5)), draw(st.integers(0, 9)), options


def holds_back_the_future(path, case, t):
    n, h, seed, options = case
    q, k, v = make_qkv(1, n, h, 8, seed=seed)
    if path not in ONE_WAY:
        assert_causal(lambda *x: attention(path, *x, options, is_causal=True), q, k, v, t)
        return
    other = [torch.cat([x[:, :t], 10 * torch.randn_like(x[:, t:])], 1) for x in (q, k, v)]
    assert torch.equal(attention(path, *other, options)[:, :t], attention(path, q, k, v, options)[:, :t])


def averages_the_values(path, case, is_causal, padded):
    n, h, seed, options = case
    q, k, v = make_qkv(1, n, h, 8, seed=seed)
    mask = torch.rand(1, n, generator=torch.Generator().manual_seed(seed)) < 0.3 if padded else None
    out = attention(path, q, k, torch.ones_like(v), options, is_causal=is_causal, key_padding_mask=mask)
    wanted = expected_options(path, n, options)
    branches, mixing = (wanted["segment_lengths"], wanted["dilation_rates"]), wanted["mixing"]
    counts = attention_counts(n, n, h, *branches, is_causal=is_causal, mixing=mixing)
    seen = counts if mask is None else counts * ~mask[0]
    share = 1 / len(wanted["segment_lengths"]) if wanted["mixing"] == "groups" else 1.0
    sums = (seen.sum(2) > 0).float().T[None, :, :, None] * share
    assert torch.allclose(out, sums.expand_as(out), atol=1e-6)


@paths
@settings(max_examples=15)
@given(case=cases(), data=st.data())
def test_no_path_leaks_the_future(path, case, data):
    "fkodom's normalisation, wrapped grids, triangles in every block, unmasked chunks of a ring."
    n = length(path, case[0])
    holds_back_the_future(path, (n, *case[1:]), data.draw(st.integers(1, n - 1)))


@paths
@settings(max_examples=15)
@given(case=cases(), is_causal=st.booleans(), padded=st.booleans())
def test_every_path_averages_the_values(path, case, is_causal, padded):
    "Weights of a row sum to 1 (softmaxes of blocks that are added: to 3 or 5), or to 0 where there is no key."
    averages_the_values(path, (length(path, case[0]), *case[1:]), is_causal or path in ONE_WAY, padded)


@paths
@settings(max_examples=12)
@given(case=cases(), is_causal=st.booleans())
def test_every_path_shares_heads_alike(path, case, is_causal):
    "Equal to the oracle, gradients too: heads left over go to the first groups, segments count, every rank takes part."
    n, (h, seed, options) = length(path, case[0]), case[1:]
    q, k, v = make_qkv(1, n, h, 8, seed=seed)
    how = dict(is_causal=is_causal or path in ONE_WAY)
    wanted = expected_options(path, n, options)
    check_against_oracle(
        lambda *x: attention(path, *x, options, **how), q, k, v, **wanted, **how, grad=path not in ONE_WAY
    )


@paths
def test_what_padding_holds_does_not_matter(path):
    "torchscale ignores its key_padding_mask, and zeros of ragged ends count as keys."
    q, k, v = make_qkv(1, length(path, 24), 4, 8)
    mask = torch.arange(q.shape[1])[None] < 5
    options = dict(segment_lengths=(8, 24), dilation_rates=(1, 2), ragged="mask")
    found = []
    for fill in (0.0, 1000.0):
        other = [torch.where(mask[..., None, None], fill, x) for x in (k, v)]
        found.append(attention(path, q, *other, options, is_causal=True, key_padding_mask=mask)[:, 5:])
    assert torch.equal(*found)


@paths
def test_every_path_takes_the_same_layout(path):
    "With as many heads as tokens, a transposed tensor has the right shape: the numbers tell."
    n = length(path, 16)
    q, k, v = make_qkv(1, n, n, 8)
    options = dict(segment_lengths=(n,), dilation_rates=(1,), mixing="softmax", ragged="mask")
    exact, _ = oracle_attention(q, k, v, (n,), (1,), mixing="softmax", is_causal=True)
    out = attention(path, q, k, v, options, is_causal=True)
    assert (out - exact).abs().max() < 1e-5
    assert (out.transpose(1, 2) - exact).abs().max() > 0.1


def test_the_fused_kernel_has_these_properties():
    "Two small cases of each, as its interpreter is slow; all of it: tests/test_triton.py."
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("is about the interpreter")
    for mixing in ("groups", "softmax"):
        case = 12, 3, 0, dict(segment_lengths=(4, 12), dilation_rates=(1, 3), mixing=mixing, ragged="mask")
        holds_back_the_future("fused", case, 5)
        averages_the_values("fused", case, mixing == "groups", True)


CHANGES = dict(
    segment_lengths=(8, 32), dilation_rates=(1, 3), mixing="groups", ragged="zeros", offsets="interleaved",
    is_causal=True, key_padding_mask=torch.arange(32)[None] < 3,
)  # fmt: skip
OPTIONS = {path: set(CHANGES) for path in PATHS} | {path: {"is_causal", "key_padding_mask"} for path in FIXED}
# A cache is causal, so that zeros at the end are never seen.
OPTIONS |= {path: set(CHANGES) - {"is_causal", "ragged"} for path in ONE_WAY}


@pytest.mark.parametrize("path,name", [(path, name) for path, names in OPTIONS.items() for name in sorted(names)])
def test_every_option_has_an_effect(path, name):
    "Accepted and ignored: an effect of 0.0."
    q, k, v = make_qkv(1, 32, 4, 8)
    base = dict(segment_lengths=(8, 12), dilation_rates=(1, 2), mixing="softmax", ragged="mask")
    change, how = (
        ({name: CHANGES[name]}, {}) if name in DilatedAttentionConfig.__annotations__ else ({}, {name: CHANGES[name]})
    )
    changed = attention(path, q, k, v, base | change, **how)
    assert (changed - attention(path, q, k, v, base)).abs().max() > 0.01


def cached(cache):
    return lambda q, k, v, **scale: cache(**scale)(q, k, v, True)


SCALED = {
    "dilated_attention": lambda *x, **scale: dilated_attention(*x, (8, 16), (1, 2), mixing="softmax", **scale),
    "attend": lambda *x, **scale: attend(*x, **scale)[0],
    "block_sparse_attention": lambda *x, **scale: block_sparse_attention(
        *x, pattern(*x[:2], lambda rows: torch.ones(rows, rows, dtype=torch.bool)), **scale
    ),
    "KVCache": cached(lambda **scale: KVCache(32, 4, 8, **scale)),
    "DilatedKVCache": cached(lambda **scale: DilatedKVCache(DilatedAttentionConfig((8, 16), (1, 2)), 4, 8, **scale)),
}


@pytest.mark.parametrize("name", SCALED)
def test_scale_has_the_effect_of_scaled_queries(name):
    "Whoever has the option: an effect, and the right one."
    q, k, v = make_qkv(1, 32, 4, 8)
    out = SCALED[name](q, k, v, scale=0.1)
    assert (out - SCALED[name](q, k, v)).abs().max() > 0.01
    assert torch.allclose(out, SCALED[name](q * 0.1 * 8**0.5, k, v), atol=1e-5)


def test_no_option_is_left_out_of_these_tests():
    "What the function to call takes: changed above, or documents, or about how and not what it computes."
    options = set(signature(dilated_attention).parameters) - set("qkv")
    documents = {"cu_seqlens", "cu_seqlens_q"}  # tests/test_packed.py
    assert options == set(CHANGES) | {"scale"} | documents | {"backend", "use_tf32"}


@paths
def test_shapes_that_do_not_fit_are_refused(path):
    "By name, before anything is computed; a batch of 1 is not broadcast."
    q, k, v = make_qkv(2, length(path, 16), 4, 8)
    options = dict(segment_lengths=(16,), dilation_rates=(1,), ragged="mask")
    for wrong in ((q, k[:1], v[:1]), (q, k, v[:, :, :, :4]), (q, k, v.double()), (q.long(), k, v)):
        with pytest.raises((ValueError, TypeError), match="must"):
            attention(path, *wrong, options, is_causal=True)


# ---------------------------------------------------------------- the checks themselves


def across_heads(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def detached_weights(q, k, v):
    one, two = attend(q, k, v), attend(q[:, ::2], k[:, ::2], v[:, ::2])
    out, lse = torch.zeros_like(q), torch.full_like(one[1], -torch.inf)
    out = out.index_copy(1, torch.arange(0, q.shape[1], 2), two[0])
    lse = lse.index_copy(1, torch.arange(0, q.shape[1], 2), two[1])
    weight = torch.stack([one[1], lse]).softmax(0).detach()[..., None]
    return weight[0] * one[0] + weight[1] * out


class KeysGetTheValuesGradientToo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = attend(q, k, v, backend="math")
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, dout):
        swapped = [x.transpose(1, 2) for x in (dout, *ctx.saved_tensors)]
        dq, dk, dv = (x.transpose(1, 2) for x in math_backward(*swapped, None, False, dout.shape[-1] ** -0.5))
        return dq, dk + dv, dv


def softmax_per_block(q, k, v):
    return sum(attend(q, k[:, a : a + 8], v[:, a : a + 8])[0] for a in range(0, k.shape[1], 8))


def excluded_own_rank(q, k, v):
    return torch.cat([attend(q[:, :8], k[:, 8:], v[:, 8:])[0], attend(q[:, 8:], k[:, :8], v[:, :8])[0]], 1)


WRONG = {
    "softmax per block": softmax_per_block,
    "own rank excluded": excluded_own_rank,
    "dk + dv": KeysGetTheValuesGradientToo.apply,
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_budgets_catch_wrong_versions(name, dtype):
    q, k, v = make_qkv(1, 16, 4, 8, dtype=dtype)
    with pytest.raises(AssertionError, match="times the"):
        check_against_oracle(WRONG[name], q, k, v, (16,), (1,))


def test_attending_across_heads_is_caught():
    "By the budget, and by the probe that needs no reference: token 1 must matter to token 0."
    q, k, v = make_qkv(1, 16, 4, 8)
    with pytest.raises(AssertionError, match="times the"):
        check_against_oracle(across_heads, q, k, v, (16,), (1,))
    other = v.clone()
    other[:, 1] += 1
    assert torch.equal(across_heads(q, k, other)[:, 0], across_heads(q, k, v)[:, 0])
    for path in ("readable", "improved", "multihead", "ring", "block_sparse"):
        options = dict(segment_lengths=(16,), dilation_rates=(1,), ragged="mask")
        changed = attention(path, q, k, other, options) - attention(path, q, k, v, options)
        assert changed[:, 0].abs().max() > 0.01


def test_detached_branch_weights_are_caught():
    "The output passes and dv does; dq does not."
    q, k, v = make_qkv(1, 16, 1, 8)
    options = dict(segment_lengths=(16, 16), dilation_rates=(1, 2), mixing="softmax")
    check_against_oracle(detached_weights, q, k, v, **options, grad=False)
    with pytest.raises(AssertionError, match="^d[qk]"):
        check_against_oracle(detached_weights, q, k, v, **options)


def test_stored_comparison_is_of_equal_functions():
    "What benchmarks/defects.py times: standard and improved are the definition, the form across heads is not."
    spec = spec_from_file_location("benchmark_of_defects", ROOT / "benchmarks/defects.py")
    defects = module_from_spec(spec)
    spec.loader.exec_module(defects)
    defects.LENGTHS = (64, 128, 256)
    torch.manual_seed(0)
    apart = defects.differences([torch.randn(1, 512, defects.H, defects.D) for _ in range(3)])
    assert (
        max(apart["standard_difference"], apart["improved_difference"]) < 1e-5 < 0.5 < apart["across_heads_difference"]
    )


# ---------------------------------------------------------------- dropout


@settings(max_examples=40)
@given(st.integers(1, 8), st.sampled_from([0.1, 0.5, 0.8]), st.integers(0, 10**6))
def test_normalising_before_dropout(groups, p, seed):
    "With a constant divisor the order makes no difference: same values, same gradients, for every mask."
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
    found = []
    for before in (True, False):
        torch.manual_seed(seed)
        out = F.dropout(x / groups, p) if before else F.dropout(x, p) / groups
        found.append((out, torch.autograd.grad(out.sum(), x)[0]))
    assert torch.allclose(*(out for out, _ in found)) and torch.allclose(*(grad for _, grad in found))
    kept = found[0][0] != 0
    assert torch.allclose(found[0][1], kept.double() / (1 - p) / groups)


def test_dropout_keeps_the_mean_of_value_and_gradient():
    "Of the modules: over 300 masks, to six standard errors."
    q, k, v = make_qkv(1, 16, 4, 8, dtype=torch.float64)
    for kind in (DilatedAttention, ImprovedDilatedAttention):
        module = kind(DilatedAttentionConfig((8, 16), (1, 2), dropout=0.5))
        leaf = v.clone().requires_grad_()
        outs = [module(q, k, leaf) for _ in range(300)]
        grads = torch.stack([torch.autograd.grad(out.sum(), leaf)[0] for out in outs])
        plain = module.eval()(q, k, leaf)
        exact = torch.autograd.grad(plain.sum(), leaf)[0]
        mean = torch.stack(outs).detach().mean(0)
        assert ((mean - plain).abs() <= 6 * plain.abs().clamp(min=1e-12) / 300**0.5).all()
        spread = grads.std(0).clamp(min=1e-12)
        assert ((grads.mean(0) - exact).abs() <= 6 * spread / 300**0.5).all()


# ---------------------------------------------------------------- counted work


FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


class Profiled:
    """What PyTorch's profiler recorded of a call: operations, and the bytes of each allocation.

    `count` and `allocated` leave out what a kernel of attention does inside; `within` is what was allocated there. A
    number that is wrapped in a tensor, to divide by, is no allocation.
    """

    def __init__(self, call):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            self.result = call()
        events = run.profiler.kineto_results.events()
        self.kernels = [e for e in events if e.name() in (FLASH, FLASH + "_backward")]
        spans = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in self.kernels]
        inside = [any(a < e.start_ns() < b for a, b in spans) for e in events]
        self.counts = Counter(e.name() for e, hidden in zip(events, inside) if not hidden)
        taken = [(e.nbytes(), hidden) for e, hidden in zip(events, inside) if e.name() == "[memory]" and e.nbytes() > 8]
        self.allocated = sorted(nbytes for nbytes, hidden in taken if not hidden)
        self.within = sorted(nbytes for nbytes, hidden in taken if hidden)

    def count(self, *names):
        return sum(self.counts[f"aten::{name}"] for name in names)


MOVES = ("copy_", "cat", "index_select", "index_copy_", "clone", "contiguous", "_to_copy", "repeat", "stack")
BRANCHES = [((8, 32), (1, 2)), ((8, 16, 32), (1, 2, 4)), ((32,), (1,)), ((16, 16), (2, 3))]
MERGED = 1  # temporaries of the size of its lse, that a merge takes


def planned(sizes: tuple[int, ...], plan: improved.Plan, backward: bool, groups: bool) -> tuple[int, list[int]]:
    "Copies, and bytes of each allocation, of a float32 call in one portion: from its plan."
    b, n, h, d, divisor = sizes
    copies, room = 0, {}
    taken = [4 * b * n * h * d] * 3 if backward else [4 * b * n * h * d, 4 * b * n * h]  # dq, dk, dv; out, lse
    for part in plan.parts:
        rows, keys = part.rows, part.keys
        segments, heads = rows[0].grid.segments, sum(one.pieces * one.serves for one in rows)
        store = groups or (plan.filled and part.first)
        sides = [("q", rows), ("k", keys), ("v", keys)]
        sides += [("dout", rows), ("out", rows), ("lse", rows)] if backward else []
        for name, side in sides:
            copies += len(side)
            size = 4 * b * segments * heads * side[0].grid.count * (1 if name == "lse" else d)
            if size > room.get(name, 0):
                room[name] = size
                taken.append(size)
        if backward:
            copies += (len(rows) + 2 * len(keys)) * store  # else they are added
        elif store:
            copies += len(rows) * (1 + (divisor == 1))  # lse, and out unless it is divided into place
        else:  # merged into out and lse themselves
            taken += [4 * b * segments * one.grid.count * one.pieces * one.serves for one in rows] * MERGED
    return copies, sorted(taken)


@pytest.mark.parametrize("branches", BRANCHES, ids=str)
@pytest.mark.parametrize("mixing", ["groups", "softmax"])
@pytest.mark.parametrize("backward", [False, True])
@by_plan()
def test_allocations_and_copies_are_those_planned(branches, mixing, backward):
    """By the profiler, of the function that users call: each grid copied once, each result written once.

    Every allocation by its bytes: results, one workspace for each tensor, grown to the largest grid, what a merge
    takes, and within the kernels as much as the same number of bare kernel calls take.
    """
    b, n, h, d = 2, 32, 4, 8
    q, k, v = make_qkv(b, n, h, d, requires_grad=backward)
    plan, groups = (
        improved.plan_portion(n, n, h, h, *branches, mixing, "blocked", False, None, 0, 0, h, n * h, b, 0),
        mixing == "groups",
    )
    dout = torch.randn(b, n, h, d)

    def forward():
        return dilated_attention(q, k, v, *branches, mixing=mixing)

    out = forward()
    if backward:
        torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)  # what is made once is made now
    work = Profiled((lambda: torch.autograd.grad(out, (q, k, v), dout)) if backward else forward)
    copies, taken = planned((b, n, h, d, len(branches[0]) if groups else 1), plan, backward, groups)
    assert len(work.kernels) == len(plan.parts)
    numbers = (1 + backward) * sum(len(part.rows) for part in plan.parts) if groups and len(branches[0]) > 1 else 0
    assert work.count("_to_copy") == numbers  # the divisor, one number each time
    assert work.count(*MOVES) - 2 * numbers == work.count("copy_") - numbers == copies, work.counts
    assert work.allocated == taken


def test_kernels_allocate_what_they_do_alone():
    "The rest of what is allocated: as in a call of the bare kernel on the same sizes."
    q, k, v = make_qkv(2, 32, 4, 8)
    bare = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    dilated_attention(q, k, v, (32,), (1,))
    alone = Profiled(lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*bare))
    ours = Profiled(lambda: dilated_attention(q, k, v, (32,), (1,)))
    assert ours.within == alone.within and len(alone.within) >= 2 and not alone.allocated


@pytest.mark.parametrize("branches", BRANCHES, ids=str)
@by_plan()
def test_bfloat16_keys_are_read_where_they_lie(branches):
    q, k, v = make_qkv(2, 32, 4, 8, dtype=torch.bfloat16)
    dilated_attention(q, k, v, *branches)
    work = Profiled(lambda: dilated_attention(q, k, v, *branches))
    pieces = sum(len(tile.pieces) for tile in tiles(32, 32, 4, 4, *branches, "groups"))
    copies = pieces * (2 + (len(branches[0]) == 1))  # q in, lse out; out unless it is divided
    numbers = pieces * (len(branches[0]) > 1)  # the divisor, one number each time
    assert work.count(*MOVES) - 2 * numbers == work.count("copy_") - numbers == copies


def ranks_of_a_ring(config, q, size, pool):
    "The workers of all ranks, as `simulate_ring` makes them; buffers for messages from a pool."
    layer, (h, d) = RingDilatedAttention(config), q.shape[2:]
    call = layer.make_call(size, q.shape, h, False, False)
    plans = layer.make_plans([call], range(size))[0]
    options = dict(use_checkpointing=True, buffers=pool)
    return call, [layer.make_schedule(call, plan, d**-0.5, "flash", **options) for plan in plans]


def planned_on_a_ring(call, workers) -> tuple[Counter, list[int]]:
    "Copies of the two kinds, and bytes of each allocation, of the forward passes of all ranks; messages reuse buffers."
    (b, d), h = (call.batch, call.head_dim), call.num_heads
    m = call.place.n // call.place.ring_size
    copies, taken = Counter(), []
    for w in workers:
        taken += [4 * b * m * h * d, 4 * b * m * h]  # out, lse
        copies.update(copy_=1, _to_copy=1)  # the number that out is divided by
        sent = {move.parcel: None for move in w.plan.moves if move.sender == move.parcel.owner == w.plan.rank}
        came = [move.parcel for move in w.plan.moves if not move.gradient and move.receiver == w.plan.rank]
        for parcel in sent:
            for part in parcel.parts(call):  # keys and values, read and written
                copies.update(cat=2, copy_=2)
                taken += [4 * b * part.columns * part.keys * d] * 2
        copies.update(copy_=len(came))  # deliveries
        met = [(*pair, True) for pair in w.home] + [(s, parcel, False) for parcel in came for s in w.guests(parcel)]
        for strip, keys, own in met:
            held = mock.Mock(strip=keys if own else keys.strip)
            for group, where, rows, columns in w.tiles.rectangles(strip, held):
                each = 4 * b * (where.stop - where.start)
                taken.append(each * group.heads * (rows.stop - rows.start) * d)
                copies.update(cat=1, kernel=len(columns))
                for cut, _ in columns:
                    if own:
                        copies.update(cat=2)
                        taken += [each * group.columns * (cut.stop - cut.start) * d] * 2
                assert len(columns) == 1  # in this test
                for lane in group.lanes:
                    taken += [each * len(lane.q_heads) * (rows.stop - rows.start)] * MERGED
    return copies, sorted(taken)


@pytest.mark.parametrize("branches", [*BRANCHES, ((8, 64), (1, 2)), ((32, 64), (1, 1))], ids=str)
def test_a_ring_allocates_and_copies_what_is_planned(branches):
    """The defect was one of a ring: `zeros_like` for every chunk, transposes made contiguous at every step.

    By the profiler, of all four ranks: queries and own keys are read once for each tile that uses them, keys that came
    are read where they lie, and messages take nothing, as buffers are used again.
    """
    q, k, v = make_qkv(2, 64, 4, 8)
    config, pool = RingAttentionConfig(*branches, mixing="softmax"), UnifiedMemoryPool()
    call, workers = ranks_of_a_ring(config, q, 4, pool)
    shards = [[call.place.take(x, rank).contiguous() for x in (q, k, v)] for rank in range(4)]

    def together():
        return run_together([w.forward(*shard, None) for w, shard in zip(workers, shards)])

    together()
    work = Profiled(together)
    copies, taken = planned_on_a_ring(call, workers)
    assert len(work.kernels) == copies.pop("kernel")
    assert {name: work.count(name) for name in copies} == copies
    assert work.count(*MOVES) == sum(copies.values()), work.counts
    assert work.allocated == taken


def test_a_simulated_ring_takes_no_results_that_it_throws_away():
    "Of the size of q: one, that the shards are joined to."
    q, k, v = make_qkv(2, 64, 4, 8)
    config = RingAttentionConfig((8, 64), (1, 2), mixing="softmax")
    simulate_ring(q, k, v, config, 4)
    work = Profiled(lambda: simulate_ring(q, k, v, config, 4))
    assert work.allocated.count(q.nbytes) == 1


def test_the_profiler_finds_what_is_needless():
    "A buffer for each chunk and branch, and transposes made contiguous: each is counted. A transpose alone is free."
    q, k, v = make_qkv(1, 32, 4, 8)
    chunks = Profiled(lambda: [torch.zeros_like(x[:, a : a + 8]) for a in range(0, 32, 8) for x in (k, v)])
    assert len(chunks.allocated) == 8
    copied = Profiled(lambda: q.transpose(1, 2).contiguous().transpose(1, 2).contiguous())
    assert copied.count("copy_") == 2 == len(copied.allocated)
    free = Profiled(lambda: q.transpose(1, 2).transpose(1, 2).contiguous())
    assert free.count("transpose") == 2 and not free.count("copy_") and not free.allocated
    thrown_away = Profiled(lambda: (attend(q[:, ::2], k[:, ::2], v[:, ::2]), attend(q, k, v))[1])
    assert len(thrown_away.kernels) == 2


@by_plan()
def test_every_tile_enters_the_output():
    "Nothing is computed and thrown away: without any one of its tiles the output is another."
    q, k, v = make_qkv(1, 32, 4, 8)
    plan = tiles(32, 32, 4, 4, (8, 16, 32), (1, 2, 4), "softmax")
    whole = dilated_attention(q, k, v, (8, 16, 32), (1, 2, 4), mixing="softmax")
    for left_out in range(len(plan)):
        rest = plan[:left_out] + plan[left_out + 1 :]
        improved.plan_portion.cache_clear()
        with mock.patch.object(improved, "tiles", return_value=rest):
            assert (dilated_attention(q, k, v, (8, 16, 32), (1, 2, 4), mixing="softmax") - whole).abs().max() > 1e-3
    improved.plan_portion.cache_clear()


def test_causal_mask_is_one_comparison():
    "As many operations for 4 tokens as for 400, and equal to the loop."
    counts = []
    for nq, nk in ((4, 4), (3, 7), (300, 400)):
        work = Profiled(lambda nq=nq, nk=nk: causal_mask(nq, nk))
        mask = work.result
        counts.append(sum(count for name, count in work.counts.items() if name.startswith("aten::")))
        if nk < 10:
            assert mask.tolist() == [[j <= i + nk - nq for j in range(nk)] for i in range(nq)]
    assert len(set(counts)) == 1


@by_plan()
def test_grids_are_made_once():
    "Head groups and grids in the profile: the first call of a kind makes them, later ones find them, a ring too."
    q, k, v = make_qkv(1, 32, 4, 8)
    options = dict(segment_lengths=(8, 32), dilation_rates=(1, 2))
    ring = RingDilatedAttention(RingAttentionConfig((8, 32), (1, 2)))
    plan = sys.modules[RING.make_plan.__module__]
    named = record_function("branch_heads")(masking.branch_heads)
    with mock.patch.object(masking, "branch_heads", named), mock.patch.object(plan, "branch_heads", named):
        for path, plans in ((readable, tiles), (fast, improved.plan_portion)):
            tiles.cache_clear(), plans.cache_clear()
            asked = [Profiled(lambda path=path: path(q, k, v, **options)).counts["branch_heads"] for _ in range(4)]
            assert asked == [2, 0, 0, 0]
            info = plans.cache_info()
            assert (info.misses, info.hits) == (1, 3)
        asked = [Profiled(lambda: ring(q, k, v)).counts["branch_heads"] for _ in range(3)]
        assert asked == [2, 0, 0]
    with mock.patch.object(RING, "make_plan", wraps=RING.make_plan) as made:
        ring(q, k, v)
        assert made.call_count == 0
    sparse = BlockSparseAttention(SparseAttentionConfig((32,), (1,), block_size=16))
    for _ in range(3):
        sparse(q, k, v)
    assert sparse.cache.made == 1


# ---------------------------------------------------------------- state


def modules() -> list[torch.nn.Module]:
    """Every attention that the factory builds, one of them with parameters of its own.

    Layers and models around them are tested with those that made them: tests/test_multihead.py, tests/test_longnet.py,
    and a model's copies below.
    """
    branches = (8, 32), (1, 2)
    return [
        DilatedAttention(DilatedAttentionConfig(*branches, mixing="softmax")),
        ImprovedDilatedAttention(DilatedAttentionConfig(*branches, mixing="softmax")),
        RingDilatedAttention(RingAttentionConfig(*branches)),
        BlockSparseRingDilatedAttention(BlockSparseRingConfig(*branches, block_size=16)),
        BlockSparseAttention(SparseAttentionConfig(*branches, block_size=16)),
        BlockSparseAttention(
            SparseAttentionConfig(
                *branches, block_size=16, pattern_type="adaptive", enable_adaptive=True, head_dim=8, sparsity_ratio=0.5
            )
        ),
    ]


each_module = pytest.mark.parametrize(
    "which", range(len(modules())), ids=lambda i: f"{i}-{type(modules()[i]).__name__}"
)


def test_no_attention_is_left_out_of_these_tests():
    built = {type(create_dilated_attention(kind, segment_lengths=(8, 32), dilation_rates=(1, 2))) for kind in KINDS}
    assert {type(module) for module in modules()} == built


@each_module
def test_every_attention_works_at_once(which):
    "Directly after its construction, and again: no attribute is missing, no cache changes its type."
    q, k, v = make_qkv(1, 32, 4, 8)
    module = modules()[which].eval()
    assert torch.equal(module(q, k, v), module(q, k, v))
    assert torch.nn.Module in type(module).__mro__[1:4]  # all hold to their config; rings talk to other ranks, too


@each_module
def test_copies_work_twice(which):
    "Deep copies and pickles, made before and after a call; as `nn.TransformerEncoder` makes them of its layer."
    q, k, v = make_qkv(1, 32, 4, 8)
    module = modules()[which].eval()
    twins = [copy.deepcopy(module)]
    expected = module(q, k, v)
    twins.append(copy.deepcopy(module))
    if not isinstance(module, RingLayer):
        twins.append(pickle.loads(pickle.dumps(module)))
    for twin in twins:
        assert torch.equal(twin(q, k, v), expected) and torch.equal(twin(q, k, v), expected)


def test_copies_of_a_model_work_twice():
    model = LongNet(LongNetConfig(32, 2, 4, segment_lengths=(8, 32), dilation_rates=(1, 2), vocab_size=16)).eval()
    tokens = torch.arange(32)[None] % 16
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens), model(tokens)) and torch.equal(twin(tokens), model(tokens))


@each_module
def test_modules_own_their_state(which):
    "No class holds anything that changes; what one module does leaves another as it was."
    q, k, v = make_qkv(1, 32, 4, 8)
    one, other = modules()[which], modules()[which]
    before = {name: repr(value) for name, value in vars(other).items() if not name.startswith("_buffers")}
    kept = {name: value for name, value in vars(one).items() if isinstance(value, (dict, list, set))}
    shared = {name for name, value in kept.items() if value is vars(other)[name]}
    one(q, k, v)
    assert not shared and {n: repr(x) for n, x in vars(other).items() if not n.startswith("_buffers")} == before
    for cls in type(one).__mro__:
        if cls.__module__.startswith("dilated_attention_nb"):
            assert not [n for n, x in vars(cls).items() if isinstance(x, (dict, list, set)) and not n.startswith("__")]


@each_module
def test_layers_die_when_they_are_dropped(which):
    "Module and results, after a forward and a backward pass, without the garbage collector: there are no cycles."
    q, k, v = make_qkv(1, 32, 4, 8)
    module = modules()[which]
    leaf = q.clone().requires_grad_()
    module(leaf, k, v).sum().backward()  # what is made once for the class is made now
    del module
    gc.collect()
    gc.disable()
    try:
        module = modules()[which]
        out = module(leaf, k, v)
        out.sum().backward()
        watched = [weakref.ref(module), weakref.ref(out)]
        del module, out
        assert [x() for x in watched] == [None, None]
    finally:
        gc.enable()


@each_module
def test_threads_get_what_they_would_get_alone(which):
    "One module, eight threads, forward and backward; the adaptive one, whose scorer draws rows, forward only."
    module = modules()[which].eval()
    inputs = [make_qkv(1, 32, 4, 8, seed=i) for i in range(8)]
    start = threading.Barrier(8)

    def step(i):
        leaves = [x.clone().requires_grad_() for x in inputs[i]]
        if any(True for _ in module.parameters()):
            with torch.no_grad():
                return [module(*leaves, is_causal=True)]
        out = module(*leaves, is_causal=True)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    alone, found = [step(i) for i in range(8)], [None] * 8

    def work(i):
        start.wait()
        found[i] = [step(i) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, several in zip(alone, found):
        assert all(torch.equal(a, b) for got in several for a, b in zip(expected, got))


class Counting:
    "A lock that counts how often any of its kind is taken."

    taken: list[str] = []

    def __init__(self, kind):
        self.lock = kind()

    def acquire(self, *how, **more):
        if threading.current_thread() is threading.main_thread():
            self.taken.append(type(self.lock).__name__)
        return self.lock.acquire(*how, **more)

    def __enter__(self):
        return self.acquire()

    def __exit__(self, *error):
        self.lock.release()

    def __getattr__(self, name):
        return getattr(self.lock, name)


def locks_taken(make, call) -> list[int]:
    "In each of three calls, by whatever `make` returns and what is made on the way; the first may make caches."
    with ExitStack() as patches:
        for name in ("Lock", "RLock"):  # also what Condition, Future, Event and Semaphore are made of
            counting = (lambda kind: lambda: Counting(kind))(getattr(threading, name))
            patches.enter_context(mock.patch.object(threading, name, counting))
        made, found = make(), []
        for _ in range(3):
            Counting.taken.clear()
            call(made)
            found.append(len(Counting.taken))
    return found


class Locks(torch.nn.Module):
    "The smallest wrong version: its lock existed before, and is taken for every chunk."

    def __init__(self):
        super().__init__()
        self._lock = threading.Lock()

    def forward(self, q, k, v):
        parts = []
        for x in zip(*(y.split(8, 1) for y in (q, k, v))):
            with self._lock:
                parts.append(attend(*x)[0])
        return torch.cat(parts, 1)


def test_no_locks_in_a_forward_pass():
    """Acquisitions are counted, of every lock that a module has or meets: none where attention is computed.

    A module with a cache of patterns takes two locks a call, for the cache's dictionary and the pattern's future; a
    ring that borrows its messages from a pool, two for each buffer; none is held while anything is computed.
    """
    q, k, v = make_qkv(1, 32, 4, 8)
    assert locks_taken(Locks, lambda m: m(q, k, v)) == [4, 4, 4]  # a lock that is already there is seen
    for layer in (masking, backends, dilated, improved, kv_cache, block_sparse, RING):
        assert "threading" not in vars(layer), layer.__name__
    for which, module in enumerate(modules()):
        found = locks_taken(lambda which=which: modules()[which], lambda m: m(q, k, v))
        fixed = isinstance(module, BlockSparseAttention) and not list(module.parameters())
        assert found[1:] == ([2, 2] if fixed else [0, 0]), (which, found)
    lent = locks_taken(UnifiedMemoryPool, lambda pool: pool.return_buffer(pool.get_buffer((4,), torch.float32)))
    assert lent[1:] == [2, 2]  # one to lend it, one to take it back


def test_memory_info_before_and_after():
    q, k, v = make_qkv(1, 32, 4, 8)
    ring = RingDilatedAttention(RingAttentionConfig((8, 32), (1, 2)))
    assert set(ring.memory_info().values()) == {0}
    ring(q.clone().requires_grad_(), k, v)
    assert ring.memory_info()["saved"] == 4 * q.nbytes + 32 * 4 * 4
    ring(q, k, v)
    assert ring.memory_info()["saved"] == 0


# ---------------------------------------------------------------- buffers


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=40), st.integers(1, 4))
def test_no_buffer_is_lent_twice(history, bound):
    "Whatever is borrowed and returned: what is out is disjoint, what is kept is bounded."
    pool = UnifiedMemoryPool(MemoryPoolConfig(max_pool_size=bound, hot_cache_size=min(1, bound)))
    out: list[Tensor] = []
    for borrow, size in history:
        if borrow or not out:
            out.append(pool.get_buffer((size,), torch.float32).fill_(len(out)))
        else:
            pool.return_buffer(out.pop(size % len(out)))
        assert len({x.data_ptr() for x in out}) == len(out)
        stats = pool.get_stats()
        assert stats["buffers_lent"] == len(out) and stats["total_buffers"] <= bound


def test_clearing_while_others_lend():
    pool, wrong = UnifiedMemoryPool(), []

    def work(i):
        try:
            for _ in range(300):
                if i % 2:
                    pool.clear()
                else:
                    x = pool.get_buffer((4,), torch.float32).fill_(i)
                    assert x.eq(i).all()
                    pool.return_buffer(x)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = pool.get_stats()
    assert not wrong and stats["bytes_lent"] == 0 and stats["hits"] + stats["misses"] == 900


def test_a_shared_pattern_cache_serves_many_modules():
    cache = PatternCache(max_entries=2)
    q, k, v = make_qkv(1, 32, 4, 8)
    found = [BlockSparseAttention(SparseAttentionConfig((32,), (1,), block_size=16), cache)(q, k, v) for _ in range(3)]
    assert cache.made == 1 and all(torch.equal(x, found[0]) for x in found)


# ---------------------------------------------------------------- rings, rows, kinds


@settings(max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 6), st.sampled_from(["contiguous", "zigzag"]), st.sampled_from(["error", "mask"])
)
def test_ring_sizes_are_checked(n, size, layout, ragged):
    "Any length: computed as on one device, or refused with a length that works. No token is lost."
    config = RingAttentionConfig((4, 8), (1, 2), layout=layout, ragged=ragged)
    q, k, v = make_qkv(1, n, 2, 8)
    try:
        out = simulate_ring(q, k, v, config, size)
    except ValueError as error:
        advised = int(str(error).split("pad to ")[1].split()[0])
        assume(advised <= 200)
        padded = make_qkv(1, advised, 2, 8)
        assert simulate_ring(*padded, config, size).shape[1] == advised > n
        return
    one = simulate_ring(q, k, v, RingAttentionConfig((4, 8), (1, 2), ragged=ragged), 1)
    assert torch.allclose(out, one, atol=1e-6) and out.shape == q.shape


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_ring_without_processes_is_refused(size):
    "No silent fallback to one device."
    q, k, v = make_qkv(1, 16, 2, 8)
    with pytest.raises(ValueError, match="ring_size must be 1 without a process group"):
        RingDilatedAttention(RingAttentionConfig((16,), (1,), ring_size=size))(q, k, v)


@pytest.mark.parametrize("is_causal", [False, True])
def test_backends_agree_on_rows_without_keys(is_causal):
    "`(0, -inf)`, whatever the kernel says: PyTorch's on the CPU says lse 0."
    q, k, v = make_qkv(2, 8, 2, 8)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0], mask[1, :3] = True, True
    for backend in ("math", "flash"):
        out, lse = attend(q, k, v, is_causal=is_causal, key_padding_mask=mask, backend=backend)
        empty = torch.zeros(2, 8, dtype=torch.bool)
        empty[0], empty[1, :3] = True, is_causal
        assert (lse[empty] == -torch.inf).all() and lse[~empty].isfinite().all()
        assert not out[empty].any() and out[~empty].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_built(kind):
    "Alone and in a layer; called twice, with gradients."
    branches = dict(segment_lengths=(16, 32), dilation_rates=(1, 2))
    q, k, v = make_qkv(1, 32, 4, 8, requires_grad=True)
    attention = create_dilated_attention(kind, **branches)
    for _ in range(2):
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v)))
    layer = create_multihead_dilated_attention(kind, embed_dim=32, num_heads=4, **branches)
    layer(torch.randn(1, 32, 32))[0].square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


FIELDS = dict(
    num_heads=2, bias=False, layer_norm=False, layer_norm_eps=0.1, gamma_init=2.0, num_kv_heads=2,
    segment_lengths=(8, 32), dilation_rates=(1, 2), dropout=0.9, mixing="softmax", offsets="interleaved",
    ragged="zeros",
)  # fmt: skip
# Where a field counts only together with another: offsets of several branches a head, lengths that w does not divide.
BESIDE = {"offsets": dict(mixing="softmax"), "ragged": dict(segment_lengths=(8, 20), ragged="mask")}
ELSEWHERE = {  # fields that change no number of this layer on the CPU, and the test of what they do
    "embed_dim": "tests/test_config.py::test_head_rules",  # the width of the input itself
    "max_head_dim": "tests/test_config.py::test_head_rules",  # a limit: accepts or refuses
    "use_tf32": "tests/test_attention.py::test_tf32_is_set_within_and_put_back",  # of GPUs
    "device": "tests/test_multihead.py::test_config_places_the_parameters",
    "dtype": "tests/test_multihead.py::test_config_places_the_parameters",
}


def test_no_field_is_left_out_of_these_tests():
    "Of both configs of a layer: changed below, or named above with its test."
    fields = {f.name for config in (MultiheadConfig, DilatedAttentionConfig) for f in dataclasses.fields(config)}
    assert fields == FIELDS.keys() | ELSEWHERE.keys() and not FIELDS.keys() & ELSEWHERE.keys()
    for file, name in (test.split("::") for test in ELSEWHERE.values()):
        assert f"\ndef {name}(" in (ROOT / file).read_text()


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_the_layer(field):
    "From the same seed: other numbers, or other parameters."

    def built(**change):
        torch.manual_seed(0)
        base = dict(embed_dim=32, num_heads=4, segment_lengths=(8, 16), dilation_rates=(1, 3)) | BESIDE.get(field, {})
        layer = create_multihead_dilated_attention("auto", **base | change)
        x = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(1))
        return layer(x)[0].detach(), sum(p.numel() for p in layer.parameters())

    (one, size), (other, other_size) = built(), built(**{field: FIELDS[field]})
    if size == other_size:
        assert (one - other).abs().max() > 1e-3


@settings(max_examples=30)
@given(st.integers(1, 16), st.integers(1, 6))
def test_no_head_is_left_over(num_heads, branches):
    assume(num_heads >= branches)
    groups = head_groups(num_heads, branches)
    assert [h for group in groups for h in group] == list(range(num_heads))
    sizes = [len(group) for group in groups]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
