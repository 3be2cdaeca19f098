"""`ragged="zeros"` is torchscale where rates don't divide segments, too: rows show other queries (`row_shifts`)."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import drawn, product
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention_nb import improved
from dilated_attention_nb.config import DilatedAttentionConfig, row_shifts
from dilated_attention_nb.decoding import LongNetCache
from dilated_attention_nb.dilated import DilatedAttention
from dilated_attention_nb.improved import ImprovedDilatedAttention, dilated_attention
from dilated_attention_nb.kv_cache import DilatedKVCache, KVCache
from dilated_attention_nb.longnet import LongNet, longnet_tiny
from dilated_attention_nb.multihead import create_multihead_dilated_attention
from dilated_attention_nb.ring_dilated import RingAttentionConfig, RingDilatedAttention, simulate_ring, traffic
from dilated_attention_nb.testing import AttentionCase, check_against_oracle, make_qkv, oracle_attention

GOLDEN = np.load(Path(__file__).parent / "golden" / "longnet_rates_that_do_not_divide.npz")
CASES = json.loads(GOLDEN["meta"].tobytes())
ZEROS = dict(mixing="softmax", ragged="zeros")


def readable(q, k, v, ws, rs, is_causal=False, key_padding_mask=None, cu_seqlens=None, **options) -> Tensor:
    module = DilatedAttention(DilatedAttentionConfig(ws, rs, **options))
    return module(q, k, v, is_causal, key_padding_mask, cu_seqlens)


def dense(*args, **options) -> Tensor:
    return oracle_attention(*args, **options)[0]


paths = pytest.mark.parametrize("path", [readable, dilated_attention], ids=["readable", "improved"])


@pytest.mark.parametrize("path", [dense, readable, dilated_attention], ids=["oracle", "readable", "improved"])
@pytest.mark.parametrize("index", range(len(CASES)))
def test_reproduces_the_authors(path, index):
    case = CASES[index]
    q, k, v, expected = (torch.from_numpy(GOLDEN[f"{index}.{x}"]) for x in ("q", "k", "v", "out"))
    ws, rs = tuple(case["segment_lengths"]), tuple(case["dilation_rates"])
    assert any(row_shifts(q.shape[1], ws, rs, "zeros"))
    out = path(q, k, v, ws, rs, is_causal=case["is_causal"], **ZEROS)
    assert (out - expected).norm() / expected.norm() < 1e-6


def by_hand(q, k, v, w: int, r: int, s: int, is_causal: bool) -> Tensor:
    "One head `[n, d]` of one branch at offset s: the padded segments written down, one after another."
    n, d = q.shape
    padded = -(-w // r) * r
    rows = []
    for first in range(0, n, w):
        x = [torch.zeros(padded, d, dtype=q.dtype) for _ in range(3)]
        for places, whole in zip(x, (q, k, v)):
            places[: min(w, n - first)] = whole[first : min(first + w, n)]
        out = torch.zeros(padded, d, dtype=q.dtype)
        for i in range(s, padded, r):
            seen = range(s, (i if is_causal else padded - 1) + 1, r)
            out[i] = torch.softmax(x[0][i] @ x[1][seen].T * d**-0.5, 0) @ x[2][seen]
        rows.append(out)
    return torch.cat(rows)[:n]


@pytest.mark.parametrize("path", [dense, readable, dilated_attention], ids=["oracle", "readable", "improved"])
@product(n=[11, 30, 41], w=[3, 7, 10], r=[2, 4, 6], is_causal=[False, True])
def test_one_branch_by_hand(path, n, w, r, is_causal):
    q, k, v = make_qkv(1, n, r, 4, dtype=torch.float64)
    out = path(q, k, v, (w,), (r,), is_causal=is_causal, **ZEROS)
    for s in range(r):  # one head for each offset
        torch.testing.assert_close(out[0, :, s], by_hand(*(x[0, :, s] for x in (q, k, v)), w, r, s, is_causal))


@pytest.mark.parametrize("path", [dense, readable, dilated_attention], ids=["oracle", "readable", "improved"])
def test_a_grid_of_padding_alone_is_no_key(path):
    "Offset 3 in segments of 2: one zero key, whose lse of 0 the authors' code reads as a row without keys."
    q, k, v = make_qkv(1, 8, 4, 4, dtype=torch.float64)
    both = path(q, k, v, (2, 8), (4, 1), **ZEROS)
    torch.testing.assert_close(both[:, :, 2:], path(q, k, v, (8,), (1,), **ZEROS)[:, :, 2:])


def test_nothing_moves_where_rates_divide_or_one_segment_holds_all():
    assert row_shifts(100, (10, 12, 100, 200), (5, 6, 7, 7), "zeros") == (0, 0, 0, 0)
    assert row_shifts(101, (10, 12, 100), (4, 6, 7), "zeros") == (2, 0, 5)
    assert row_shifts(101, (10, 12, 100), (4, 6, 7), "mask") == (0, 0, 0)


PAPER = (16, 32, 64, 128, 256), (1, 2, 4, 6, 12)  # 2048, …, 32768 with rates 1, 2, 4, 6, 12, over 128
FINE_TUNING = (8, 38, 181, 861), (1, 2, 4, 8)  # 1024, 4870, 23170, 110217 with rates 1, 2, 4, 8, over 128


@paths
@product(branches=[PAPER, FINE_TUNING], is_causal=[False, True], mixing=["groups", "softmax"])
def test_the_branches_of_the_paper_and_of_fine_tuning(path, branches, is_causal, mixing):
    n = 300
    assert any(row_shifts(n, *branches, "zeros"))
    case = AttentionCase(*branches, is_causal, mixing, ragged="zeros", nq=n, nk=n, h=6, kv_heads=3, d=8)
    options = case.options()
    check_against_oracle(lambda q, k, v: path(q, k, v, options["segment_lengths"], options["dilation_rates"], **{
        name: x for name, x in options.items() if name not in ("segment_lengths", "dilation_rates")
    }), *case.qkv(), **options)  # fmt: skip


sizes = st.integers(2, 9)


@paths
@drawn(80)
@given(
    data=st.data(), n=st.integers(8, 40), pairs=st.lists(st.tuples(sizes, st.integers(2, 7)), min_size=1, max_size=3),
    mixing=st.sampled_from(["groups", "softmax"]), offsets=st.sampled_from(["blocked", "interleaved"]),
    is_causal=st.booleans(), padded=st.booleans(), portion=st.sampled_from([64, 2**20]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_equals_the_oracle(path, data, n, pairs, mixing, offsets, is_causal, padded, portion, dtype):
    "Values and gradients, with padding and shared heads, in the smallest portions."
    ws, rs = zip(*pairs)
    h = data.draw(st.integers(len(ws), 6))
    kv = data.draw(st.sampled_from([m for m in range(1, h + 1) if h % m == 0]))
    case = AttentionCase(ws, rs, is_causal, mixing, offsets, "zeros", 2, n, n, h, kv, 8, padded, dtype)
    options = case.options()
    rest = {name: x for name, x in options.items() if name not in ("segment_lengths", "dilation_rates")}
    size, improved.portion_size = improved.portion_size, lambda q, backward: portion
    try:
        check_against_oracle(lambda q, k, v: path(q, k, v, ws, rs, **rest), *case.qkv(), **options)
    finally:
        improved.portion_size = size


@paths
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_documents_are_sequences_of_their_own(path, is_causal):
    q, k, v = make_qkv(1, 60, 4, 8, dtype=torch.float64, requires_grad=True)
    ends, options = torch.tensor([0, 25, 25, 32, 60], dtype=torch.int32), dict(ZEROS, is_causal=is_causal)
    packed = path(q, k, v, (5, 10), (2, 4), cu_seqlens=ends, **options)
    alone = [
        path(*(x[:, a:b] for x in (q, k, v)), (5, 10), (2, 4), **options) for a, b in ((0, 25), (25, 32), (32, 60))
    ]
    expected = torch.cat(alone, 1)
    torch.testing.assert_close(packed, expected)
    dout = torch.randn_like(packed)
    grads = [torch.autograd.grad(out, (q, k, v), dout) for out in (packed, expected)]
    torch.testing.assert_close(*grads)


def test_what_cannot_show_other_rows_says_so():
    config = DilatedAttentionConfig((10,), (4,), mixing="softmax", ragged="zeros")
    q, k, v = make_qkv(1, 5, 4, 8, nk=30)
    for module in (DilatedAttention(config), ImprovedDilatedAttention(config)):
        with pytest.raises(ValueError, match="fewer queries than keys .* rate 4 for segments of 10; use ragged='mask'"):
            module(q, k, v)
        assert module(q, k[:, :9], v[:, :9]).shape == q.shape  # one segment holds all
    with pytest.raises(ValueError, match="fewer queries than keys"):
        oracle_attention(q, k, v, (10,), (4,), **ZEROS)
    for make in (lambda: KVCache(30, 4, 8, config=config), lambda: DilatedKVCache(config, 4, 8)):
        with pytest.raises(ValueError, match="in a cache"):
            make()
    assert KVCache(10, 4, 8, config=config).length == 0
    ring = RingAttentionConfig((10,), (4,), **ZEROS)
    for ring_of in (RingDilatedAttention, lambda c: simulate_ring(k, k, v, c, 2), lambda c: traffic(c, 30, 4, 8, 2)):
        with pytest.raises(ValueError, match="in a ring"):
            ring_of(ring)
    with pytest.raises(ValueError, match="in a ring"):
        create_multihead_dilated_attention("ring", embed_dim=32, num_heads=4, attention_config=ring)
    with pytest.raises(ValueError, match="with backend='triton'"):
        ImprovedDilatedAttention(config, backend="triton")
    model = longnet_tiny(segment_lengths=(10,), dilation_rates=(4,), ragged="zeros")
    with pytest.raises(ValueError, match="in a cache"):
        LongNetCache(model)
    with pytest.raises(ValueError, match="with backend='triton'"):
        LongNet(replace(model, backend="triton"))


def test_the_fused_kernels_say_so():
    pytest.importorskip("triton")
    q, k, v = make_qkv(1, 30, 4, 8)
    with pytest.raises(ValueError, match="backend='triton'"):
        dilated_attention(q, k, v, (10,), (4,), backend="triton", **ZEROS)


def test_it_compiles_and_saves_no_more():
    config = DilatedAttentionConfig((10, 30), (4, 4), mixing="softmax", ragged="zeros")
    attention = ImprovedDilatedAttention(config)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    for n in (30, 41, 52):
        q, k, v = make_qkv(1, n, 4, 8, dtype=torch.float64)
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
