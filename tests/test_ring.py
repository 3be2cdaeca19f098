"The ring against the oracle: in one process, in two, three, four and eight, and when a process fails."

import copy
import gc
import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from conftest import drawn, peak_of_tensors
from hypothesis import given

from dilated_attention_nb.improved import dilated_attention
from dilated_attention_nb.memory_pool import UnifiedMemoryPool
from dilated_attention_nb.processes import peak_memory, resident, spawn_gloo
from dilated_attention_nb.ring import RING_LAYOUTS, RING_STRATEGIES, gather_sequence, shard_sequence
from dilated_attention_nb.ring_block_sparse import BlockSparseRingConfig, BlockSparseRingDilatedAttention
from dilated_attention_nb.ring_dilated import (
    RingAttentionConfig,
    RingDilatedAttention,
    make_task,
    ring_worker,
    simulate_ring,
    traffic,
)
from dilated_attention_nb.ring_engine import Call, Traffic
from dilated_attention_nb.testing import (
    AttentionCase,
    assert_batch_independent,
    assert_causal,
    attention_cases,
    check_against_oracle,
    make_qkv,
    saved_for_backward,
)

W, R = (8, 24, 48), (1, 2, 3)  # for 48 tokens: local on up to six ranks, shared by some, shared by all


def config(lengths=W, rates=R, **options) -> RingAttentionConfig:
    return RingAttentionConfig(lengths, rates, **options)


# ---------------------------------------------------------------- in one process


def sized(case: AttentionCase, ring_size: int, layout: str) -> AttentionCase:
    "The case at the next length that can be cut."
    parts = ring_size * (2 if layout == "zigzag" else 1)
    n = case.nk * parts if case.ragged == "error" else -(-case.nk // parts) * parts
    return case.unshifted(n)


@drawn(100)
@given(
    attention_cases(max_length=24),
    st.integers(1, 5),
    st.sampled_from(RING_LAYOUTS),
    st.sampled_from(RING_STRATEGIES),
    st.booleans(),
    st.integers(1, 9),
)
def test_any_configuration_equals_the_oracle(case, ring_size, layout, strategy, checkpointing, block_size):
    case = sized(case, ring_size, layout)
    options = case.options()
    mask, causal = options.pop("key_padding_mask"), options.pop("is_causal")
    c = config(
        **{"lengths": options.pop("segment_lengths"), "rates": options.pop("dilation_rates"), **options},
        layout=layout, strategy=strategy, use_checkpointing=checkpointing, block_size=block_size,
    )  # fmt: skip
    check_against_oracle(
        lambda q, k, v: simulate_ring(q, k, v, c, ring_size, causal, mask), *case.qkv(), **case.options()
    )


@contextmanager
def heads_at_a_time(step: int):
    "Small inputs in portions, as large ones are."
    cut = Call.portions

    def portions(task, *_):
        firsts = range(0, task.kv_heads, step)
        return tuple(replace(task, first=a, last=min(a + step, task.kv_heads)) for a in firsts)

    Call.portions = portions
    try:
        yield
    finally:
        Call.portions = cut


@drawn(50)
@given(
    attention_cases(max_length=16), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.sampled_from(RING_LAYOUTS)
)
def test_portions_of_heads_change_nothing(case, ring_size, step, checkpointing, layout):
    case = sized(case, ring_size, layout)
    options = case.options()
    mask, causal = options.pop("key_padding_mask"), options.pop("is_causal")
    c = RingAttentionConfig(**options, layout=layout, use_checkpointing=checkpointing)
    with heads_at_a_time(step):
        check_against_oracle(
            lambda q, k, v: simulate_ring(q, k, v, c, ring_size, causal, mask), *case.qkv(), **case.options()
        )


def differentiated(attend, q, k, v, dout) -> list[torch.Tensor]:
    "Output and gradients."
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def assert_padding_reaches_nobody(ring, plain, mask: torch.Tensor) -> None:
    """What isn't finite under padding, in q, k, v, or in the gradient of the output, changes nothing elsewhere.

    In float64, against one device with the same, and with zeros in its place.
    """
    shape = len(mask), mask.shape[1], 4, 8
    tensors = *make_qkv(*shape, dtype=torch.float64), make_qkv(*shape, dtype=torch.float64, seed=1)[0]
    padding, nan, inf = mask[..., None, None], float("nan"), float("inf")
    zeroed = differentiated(plain, *(x.masked_fill(padding, 0.0) for x in tensors))
    for fills in ((nan, 0, 0, 0), (0, nan, nan, 0), (0, 0, 0, nan), (inf, inf, -inf, inf)):
        spoilt = [x.masked_fill(padding, fill) for fill, x in zip(fills, tensors)]
        found = differentiated(ring, *spoilt)
        assert all(x.isfinite().all() for x in found), fills
        for expected in (differentiated(plain, *spoilt), zeroed):
            for a, b in zip(found, expected):
                torch.testing.assert_close(a[~mask], b[~mask], atol=1e-12, rtol=1e-12)


def holes(n: int) -> torch.Tensor:
    "Padding at both ends, and between: more than a share of some ranks."
    mask = torch.zeros(2, n, dtype=torch.bool)
    mask[0, :2], mask[0, n // 2] = True, True
    mask[1, 3 : n // 5], mask[1, -n // 3 :] = True, True
    return mask


@pytest.mark.parametrize("is_causal", (False, True))
@pytest.mark.parametrize("mixing", ("groups", "softmax"))
@pytest.mark.parametrize(
    "options", (dict(), dict(layout="zigzag", strategy="gather", use_checkpointing=False)), ids=("ring", "gather")
)
def test_what_lies_under_padding_reaches_nobody(options, mixing, is_causal):
    mask, c = holes(48), config(mixing=mixing, **options)
    assert_padding_reaches_nobody(
        lambda *x: simulate_ring(*x, c, 4, is_causal, mask),
        lambda *x: dilated_attention(*x, W, R, mixing=mixing, is_causal=is_causal, key_padding_mask=mask),
        mask,
    )


def test_large_shares_are_cut():
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        task = make_task(config((2**16,), (1,)), 4, (1, 2**16, 8, 64), 4, False, True)
        sizes[dtype] = [(one.first, one.last) for one in task.portions(torch.device("cpu"), dtype)]
    assert sizes[torch.float32] == [(0, 4)] and sizes[torch.bfloat16] == [(0, 1), (1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("layout", RING_LAYOUTS)
@pytest.mark.parametrize("mixing", ("groups", "softmax"))
def test_no_rank_sees_the_future(layout, mixing):
    c = config(mixing=mixing, layout=layout)
    for border in (12, 23, 24, 25, 36):
        assert_causal(lambda q, k, v: simulate_ring(q, k, v, c, 4, True), *make_qkv(1, 48, 3, 8), border)
    assert_batch_independent(lambda q, k, v: simulate_ring(q, k, v, c, 4, True), *make_qkv(2, 48, 3, 8))


def work(record) -> list[tuple[int, int]]:
    "Tiles and pairs that each rank computed."
    tiles, pairs = Counter(), Counter()
    for event in record:
        if event.kind == "attend":
            tiles[event.rank] += event.size
            pairs[event.rank] += event.pairs
    return [(tiles[rank], pairs[rank]) for rank in sorted(tiles)]


@pytest.mark.parametrize("ring_size", [2, 3, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 6, 7)), 8])
@pytest.mark.parametrize(("lengths", "rates"), [((1,), (1,)), ((0.125, 0.5, 1), (1, 2, 4)), ((0.25, 1), (1, 3))])
def test_zigzag_balances_causal_work(ring_size, lengths, rates):
    n = 8 * 16 * ring_size
    q, k, v = make_qkv(1, n, 4, 8)
    worst = {}
    for layout in RING_LAYOUTS:
        found: list = []
        c = config(tuple(int(n * w) for w in lengths), rates, mixing="softmax", layout=layout, block_size=8)
        simulate_ring(q, k, v, c, ring_size, True, record=found)
        worst[layout] = [max(x) / (sum(x) / len(x)) for x in zip(*work(found))]
    assert max(worst["zigzag"]) <= 1.10
    assert worst["contiguous"][1] > 1.3 or lengths != (1,)


def test_all_pairs_are_computed_once():
    q, k, v = make_qkv(1, 48, 3, 8)
    for layout, causal in itertools.product(RING_LAYOUTS, (False, True)):
        record: list = []
        simulate_ring(q, k, v, config(layout=layout), 4, causal, record=record)
        sides = [48 // w * [len(range(g % r, w, r))] for g, (w, r) in enumerate(zip(W, R))]
        expected = sum(m * (m + 1) // 2 if causal else m * m for ms in sides for m in ms)
        assert sum(event.pairs for event in record) == expected


# ---------------------------------------------------------------- who sends what


def segment_bytes(w: int, r: int, h: int, d: int) -> int:
    "Sparse keys and values of one segment, float32, head h at offset h mod r."
    return 2 * 4 * d * sum(len(range(s % r, w, r)) for s in range(h))


def test_a_branch_inside_a_chunk_sends_nothing():
    assert all(t == Traffic(t.rank, 0, 0, 0, 0) for t in traffic(config((8, 16), (1, 2)), 64, 2, 8, ring_size=4))
    assert all(t.forward_sent == 0 for t in traffic(config((64,), (1,)), 64, 2, 8, ring_size=1))
    assert all(t.forward_sent > 0 for t in traffic(config((32,), (1,)), 64, 2, 8, ring_size=4))


@pytest.mark.parametrize("strategy", RING_STRATEGIES)
@pytest.mark.parametrize(("ring_size", "w", "r"), [(8, 64, 1), (8, 32, 2), (8, 16, 4), (4, 32, 4), (8, 64, 4)])
def test_only_sparse_keys_travel_and_only_within_a_segment(strategy, ring_size, w, r):
    n, h, d, m = 64, 4, 8, 64 // ring_size
    c = config((w,), (r,), mixing="softmax", offsets="interleaved", strategy=strategy)
    g = w // m
    share = segment_bytes(w, r, h, d) * (g - 1) // g
    world = (ring_size - 1) * segment_bytes(w, r, h, d) // g  # torchscale: everybody's sparse keys and values
    for t in traffic(c, n, h, d, ring_size):
        assert t.forward_sent == t.forward_received == share
        assert world >= ring_size / g * t.forward_received
    for t in traffic(c, n, h, d, ring_size, is_causal=True):
        assert t.forward_sent <= share and t.forward_received <= share


@given(
    st.integers(1, 6), st.sampled_from(RING_LAYOUTS), st.sampled_from(RING_STRATEGIES), st.booleans(), st.booleans(),
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 7)), min_size=1, max_size=3),
)  # fmt: skip
def test_what_is_sent_is_received(ring_size, layout, strategy, causal, masked, branches):
    lengths, rates = zip(*branches)
    c = config(lengths, rates, mixing="softmax", ragged="mask", layout=layout, strategy=strategy)
    found = traffic(c, 60 * 2, 4, 8, ring_size, kv_heads=2, is_causal=causal, masked=masked)
    assert sum(t.forward_sent for t in found) == sum(t.forward_received for t in found)
    assert sum(t.backward_sent for t in found) == sum(t.backward_received for t in found)


def test_strategy_auto():
    "All at once if a segment's sparse rows are no more than the rank's own tokens, else from neighbour to neighbour."
    q, k, v = make_qkv(1, 64, 2, 8)
    for r, star in ((8, True), (4, True), (2, False), (1, False)):
        record: list = []
        simulate_ring(q, k, v, config((64,), (r,)), 4, record=record)
        assert max(event.step for event in record if event.kind == "receive") == (1 if star else 3)


def test_traffic_needs_a_ring_size():
    assert traffic(config(ring_size=4), 48, 3, 8) == traffic(config(), 48, 3, 8, ring_size=4)
    with pytest.raises(ValueError, match="ring_size must be given"):
        traffic(config(), 48, 3, 8)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "n", "words"),
    [
        (dict(), 50, "multiple of 48.*got 50; pad to 96 or cut to 48"),
        (dict(ragged="mask"), 50, "multiple of 4, for 4 equal chunks .contiguous., got 50; pad to 52 or cut to 48"),
        (dict(ragged="mask", layout="zigzag"), 52, "multiple of 8, for 8 equal chunks .zigzag., got 52; pad to 56"),
        (dict(ragged="mask"), 2, "got 2; pad to 4$"),
    ],
)
def test_lengths_that_cannot_be_cut(change, n, words):
    with pytest.raises(ValueError, match=words):
        simulate_ring(*make_qkv(1, n, 3, 8), config(**change), 4)


def test_bad_input_is_refused():
    q, k, v = make_qkv(1, 48, 3, 8)
    layer = RingDilatedAttention(config())
    for error, words, call in [
        (TypeError, "RingAttentionConfig", lambda: RingDilatedAttention((4,))),
        (TypeError, "is_causal", lambda: layer(q, k, v, "yes")),
        (TypeError, "float", lambda: layer(q.long(), k, v)),
        (ValueError, "as long as k", lambda: layer(q[:, :24], k, v)),
        (ValueError, "num_heads", lambda: layer(q[:, :, :1], k[:, :, :1], v[:, :, :1])),
        (TypeError, "float64 as the config says", lambda: RingDilatedAttention(config(dtype="float64"))(q, k, v)),
        (ValueError, "ring_size must be 1 without a process group, got 2",
         lambda: RingDilatedAttention(config(ring_size=2))(q, k, v)),
        (ValueError, "ring_size must be at least 1", lambda: simulate_ring(q, k, v, config(), 0)),
        (ValueError, "layout", lambda: shard_sequence(q, layout="zig")),
    ]:  # fmt: skip
        with pytest.raises(error, match=words):
            call()


# ---------------------------------------------------------------- alone


def test_without_a_process_group_it_is_one_device():
    q, k, v = make_qkv(2, 48, 3, 8, requires_grad=True)
    layer = RingDilatedAttention(config(mixing="softmax"))
    expected = dilated_attention(q, k, v, W, R, is_causal=True, mixing="softmax")
    torch.testing.assert_close(layer(q, k, v, True), expected)
    assert torch.equal(shard_sequence(q, layout="zigzag"), q) and torch.equal(gather_sequence(q), q)
    assert layer.ring() is layer._ring and layer._plans and layer.group is layer.ring().group is None
    twin = copy.deepcopy(layer)
    assert twin.config is layer.config and torch.equal(twin(q, k, v), layer(q, k, v))
    assert "softmax" in repr(layer)


def test_dropout_in_training_only():
    q, k, v = make_qkv(1, 48, 3, 8)
    layer = RingDilatedAttention(config(dropout=0.5))
    assert (layer(q, k, v) == 0).sum() > 1.5 * (layer.eval()(q, k, v) == 0).sum()
    torch.testing.assert_close(layer(q, k, v), dilated_attention(q, k, v, W, R))


def test_autocast():
    q, k, v = make_qkv(1, 48, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert RingDilatedAttention(config())(q, k, v).dtype == torch.bfloat16


def test_what_a_step_saves():
    q, k, v = make_qkv(2, 48, 3, 8, requires_grad=True)
    layer, mask = RingDilatedAttention(config()), torch.zeros(2, 48, dtype=torch.bool)
    for padding in (None, mask):
        kept = saved_for_backward(layer, q, k, v, True, padding)
        info = layer.memory_info()
        assert info["saved"] == kept.num_bytes and info["received"] == info["buffers"] == 0 < info["plans"]
    layer(q.detach(), k.detach(), v.detach())
    assert layer.memory_info()["saved"] == 0


def test_without_checkpointing_the_received_blocks_are_saved():
    q, k, v = make_qkv(1, 64, 2, 8, requires_grad=True)
    sizes = {}
    for again in (True, False):
        c = config((64,), (1,), use_checkpointing=again)
        sizes[again] = saved_for_backward(lambda q, k, v, c=c: simulate_ring(q, k, v, c, 4), q, k, v).num_bytes
        found = traffic(c, 64, 2, 8, ring_size=4)
        assert all((t.backward_sent == 2 * t.forward_sent) == again for t in found)
    assert sizes[False] - sizes[True] == 3 * (k.nbytes + v.nbytes)


class Pool:
    "A memory pool that watches."

    def __init__(self):
        self.lent, self.free, self.made = {}, [], 0

    def get_buffer(self, shape, dtype):
        fits = [i for i, x in enumerate(self.free) if x.shape == tuple(shape) and x.dtype == dtype]
        self.made += not fits
        x = self.free.pop(fits[0]) if fits else torch.empty(shape, dtype=dtype)
        self.lent[x.data_ptr()] = x
        return x.fill_(float("nan"))

    def return_buffer(self, x):
        self.free.append(self.lent.pop(x.data_ptr()).fill_(float("nan")))


# ---------------------------------------------------------------- real processes


class Given(torch.autograd.Function):
    "Outputs and gradients that were computed elsewhere."

    @staticmethod
    def forward(ctx, q, k, v, out, grads):
        ctx.grads = grads
        return out.clone()

    @staticmethod
    def backward(ctx, dout):
        return *ctx.grads, None, None


CASES = [
    dict(mixing="softmax"),
    dict(mixing="softmax", is_causal=True, strategy="ring"),
    dict(mixing="softmax", is_causal=True, strategy="ring", layout="zigzag", kv_heads=2),
    dict(mixing="groups", is_causal=True, strategy="gather", layout="zigzag", use_checkpointing=False),
    dict(mixing="groups", strategy="ring", use_checkpointing=False, kv_heads=2, dtype=torch.float64),
    dict(mixing="softmax", offsets="interleaved", is_causal=True, dtype=torch.bfloat16, strategy="ring"),
    dict(mixing="softmax", offsets="interleaved", layout="zigzag", kv_heads=1, dtype=torch.float16, block_size=5),
    dict(lengths=(10, 36, 100), rates=(1, 4, 3), ragged="mask", mixing="softmax", is_causal=True, padded=True),
    dict(lengths=(9, 36), rates=(3, 2), ragged="zeros", layout="zigzag", padded=True, strategy="ring"),
]


def parts(case: dict):
    "Config, attention case and whether it is causal."
    options = dict(case)
    fields = {name: options.pop(name) for name in ("is_causal", "kv_heads", "dtype", "padded") if name in options}
    c = config(**options)
    attention = AttentionCase(
        c.segment_lengths, c.dilation_rates, fields.get("is_causal", False), c.mixing, c.offsets, c.ragged, 2, 48, 48,
        6, fields.get("kv_heads", 6), 8, fields.get("padded", False), fields.get("dtype", torch.float32),
    )  # fmt: skip
    return c, attention


class Counted:
    "The bytes that really leave."

    def __enter__(self):
        self.sent, self.real = 0, dist.batch_isend_irecv
        dist.batch_isend_irecv = self.count
        return self

    def count(self, ops):
        told = [op for op in ops if op.tensor.dtype == torch.int64]  # fingerprints, by which ranks compare their calls
        assert all(op.tensor.nbytes == 16 for op in told)
        self.sent += sum(op.tensor.nbytes for op in ops if op.op is dist.isend and op not in told)
        return self.real(ops)

    def __exit__(self, *_):
        dist.batch_isend_irecv = self.real


def many(rank: int, world: int, cases: list[dict]) -> list[dict]:
    "All cases, one after the other, in the same processes."
    found = []
    for case in cases:
        c, attention = parts(case)
        inputs = attention.qkv()
        generator = torch.Generator().manual_seed(0)
        dout = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64).to(inputs[0])
        padding = attention.options()["key_padding_mask"]
        found.append(ring_worker(rank, world, c, (*inputs, dout), attention.is_causal, padding))
    return found


def bytes_sent(rank: int, world: int, cases: list[dict]) -> list[tuple[int, int]]:
    "Bytes of the forward and of the backward pass of each case."
    found = []
    for case in cases:
        c, attention = parts(case)
        cut = None, c.layout
        layer = RingDilatedAttention(c)
        mask = attention.options()["key_padding_mask"]
        mask = None if mask is None else shard_sequence(mask, *cut)
        q, k, v = (shard_sequence(x, *cut).requires_grad_() for x in attention.qkv())
        with Counted() as forward:
            out = layer(q, k, v, attention.is_causal, mask)
        with Counted() as backward:
            out.sum().backward()
        found.append((forward.sent, backward.sent))
    return found


def others(rank: int, world: int) -> dict:
    "What needs processes besides equality."
    return {"bytes": bytes_sent(rank, world, CASES), "steps": steps(rank, world), "differ": differ(rank, world)}


def tensors() -> int:
    "How many there are."
    gc.collect()
    return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())


def steps(rank: int, world: int) -> dict:
    "Two forwards, then two backwards; a pool; then 200 steps, and what they leave behind."
    pool = Pool()
    layer = RingDilatedAttention(config((48,), (1,), strategy="ring"), pool=pool)
    q, k, v = (shard_sequence(x).requires_grad_() for x in make_qkv(1, 48, 2, 8))

    def step():
        return torch.autograd.grad(layer(q, k, v, True).sum(), (q, k, v))

    shared = UnifiedMemoryPool()
    pooled = RingDilatedAttention(config((48,), (1,), strategy="ring"), pool=shared)
    first = step()
    for _ in range(3):
        out = torch.autograd.grad(pooled(q, k, v, True).sum(), (q, k, v))
        assert all(torch.equal(a, b) for a, b in zip(out, first))
    stats = shared.get_stats()
    assert stats["buffers_lent"] == 0 and stats["misses"] == stats["total_buffers"] and stats["hits"] > 0
    lent, made = len(pool.lent), pool.made
    one, two = layer(q, k, v, True), layer(q, k, v, True)
    grads = [torch.autograd.grad(x.sum(), (q, k, v)) for x in (two, one)]
    chained = torch.autograd.grad(layer(layer(q, k, v, True), k, v, True).sum(), (q, k, v))
    same = all(torch.equal(a, b) for g in grads for a, b in zip(first, g))
    del one, two, grads
    for _ in range(20):
        step()
    tensors()  # a list of all objects there are: what it takes must not count as growth
    before = tensors(), resident("VmRSS")
    for _ in range(200):
        step()
    after = tensors(), resident("VmRSS")
    return {
        "same": same, "lent": lent + len(pool.lent), "fresh": pool.made - made, "chained": chained,
        "grown": after[1] - before[1], "tensors": after[0] - before[0], "memory": layer.memory_info(),
    }  # fmt: skip


def differ(rank: int, world: int) -> list[str]:
    "What the ranks say when the last one calls something else."
    odd, found = rank == world - 1, []
    q, k, v = (shard_sequence(x) for x in make_qkv(1, 48, 3, 8))
    for c, inputs, causal in [
        (config(), (q, k, v), odd),
        (config(ragged="mask"), [x[:, :6] if odd else x for x in (q, k, v)], False),
        (config(), [x.double() if odd else x for x in (q, k, v)], False),
        (config(strategy="ring" if odd else "gather"), (q, k, v), False),
        (config(), [x.clone().requires_grad_(odd) for x in (q, k, v)], False),
    ]:
        try:
            RingDilatedAttention(c)(*inputs, causal)
        except ValueError as error:
            found.append(str(error))
    return found


def held(results: list[list[dict]], cases: list[dict]) -> None:
    "Every rank has the same whole, and it is within the budget of the oracle."
    for i, case in enumerate(cases):
        _, attention = parts(case)
        mine = results[0][i]
        for rank, theirs in enumerate(results):
            for a, b in zip((mine["out"], *mine["grads"]), (theirs[i]["out"], *theirs[i]["grads"])):
                assert torch.equal(a, b), (case, rank)
        check_against_oracle(
            lambda q, k, v, x=mine: Given.apply(q, k, v, x["out"], x["grads"]),
            *attention.qkv(), **attention.options(),
        )  # fmt: skip


def predicted(case: dict) -> list[tuple[int, int]]:
    "Bytes that each of four ranks sends, forward and backward."
    c, attention = parts(case)
    sizes = dict(ring_size=4, batch=2, kv_heads=attention.kv_heads, dtype=attention.dtype)
    found = traffic(c, 48, 6, 8, is_causal=attention.is_causal, masked=attention.padded, **sizes)
    return [(t.forward_sent, t.backward_sent) for t in found]


def test_one_rank():
    held(spawn_gloo(many, 1, CASES[:2]), CASES[:2])


@pytest.mark.parametrize("world", (pytest.param(2, marks=pytest.mark.slow), 3))
def test_two_and_three_ranks(world):
    held(spawn_gloo(many, world, CASES), CASES)


def four(rank: int, world: int) -> dict:
    "All that four processes are needed for, so that they start once."
    rings = [case | {"ring_size": size} for size in (1, 2) for case in CASES[1:4]]
    found = {"whole": many(rank, world, CASES), "rings": many(rank, world, rings), "group": subgroup(rank)}
    with heads_at_a_time(1):
        cut = {"cut": many(rank, world, CASES[1:5]), "cut bytes": bytes_sent(rank, world, CASES)}
    return found | cut | others(rank, world)


def subgroup(rank: int):
    "A ring of ranks 1 and 3; the others are told that they have no part in it."
    group = dist.new_group([1, 3])
    x = make_qkv(1, 48, 3, 8)[0]
    if rank in (1, 3):
        mine = shard_sequence(x, group)
        return gather_sequence(RingDilatedAttention(config(), group)(mine, mine, mine, True), group)
    try:
        shard_sequence(x, group)
    except ValueError as error:
        return str(error)


def test_four_ranks():
    results = spawn_gloo(four, 4)
    held([r["whole"] for r in results], CASES)
    rings = [case for _ in (1, 2) for case in CASES[1:4]]
    held([r["rings"] for r in results], rings)

    held([r["cut"] for r in results], CASES[1:5])

    for i, case in enumerate(CASES):  # the bytes that left are those that were predicted
        assert [r["bytes"][i] for r in results] == predicted(case)
        with heads_at_a_time(1):
            assert [r["cut bytes"][i] for r in results] == predicted(case)

    x = make_qkv(1, 48, 3, 8)[0]  # a subgroup
    expected = dilated_attention(x, x, x, W, R, is_causal=True)
    for rank in (1, 3):
        torch.testing.assert_close(results[rank]["group"], expected)
    assert "group must contain this process" in results[0]["group"]

    q, k, v = make_qkv(1, 48, 2, 8, requires_grad=True)  # two layers in a row, and many steps
    inner = dilated_attention(q, k, v, (48,), (1,), is_causal=True)
    chained = torch.autograd.grad(dilated_attention(inner, k, v, (48,), (1,), is_causal=True).sum(), (q, k, v))
    for name, grads in enumerate(zip(*(r["steps"]["chained"] for r in results))):
        torch.testing.assert_close(torch.cat(grads, 1), chained[name])
    for r in results:
        found = r["steps"]
        assert found["same"] and found["lent"] == found["fresh"] == found["tensors"] == 0
        assert found["grown"] < 2 * 2**20
        assert found["memory"]["buffers"] > 0

    for said in zip(*(r["differ"] for r in results)):
        assert len(set(said)) == 1 and "the same on all ranks of a ring" in said[0] and "on rank 3" in said[0]
    names = [text.split(" must ")[0] for text in results[0]["differ"]]
    assert names == ["is_causal", "the local length", "dtype", "config.strategy", "whether there are gradients"]


@pytest.mark.slow
def test_eight_ranks():
    cases = [case | {"lengths": (6, 24, 48)} for case in CASES[:7]] + CASES[7:]
    cases = [case for case in cases if 48 % (16 if case.get("layout") == "zigzag" else 8) == 0]
    held(spawn_gloo(many, 8, cases), cases)


# ---------------------------------------------------------------- when a process fails


PATIENCE = {"die": 300, "stall": 10}  # seconds


def failing(rank: int, world: int, store: str, how: str, strategy: str, where: str, kind: str = "dilated") -> str:
    """Rank 1 dies, or stalls until the others are done; what these say, and after how long.

    A death is seen long before the group's time-out, which is longer than a busy machine makes anybody wait.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    patience = timedelta(seconds=PATIENCE[how])
    kept = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=kept, rank=rank, world_size=world, timeout=timedelta(seconds=600))
    group = dist.new_group(list(range(world)), timeout=patience)
    if kind == "sparse":
        sparse = BlockSparseRingConfig((48,), (1,), pattern_type="random", block_size=16, strategy=strategy)
        layer = BlockSparseRingDilatedAttention(replace(sparse, density=1.0), group)
    else:
        layer = RingDilatedAttention(config((48,), (1,), strategy=strategy), group)
    q, k, v = (shard_sequence(x, group).requires_grad_() for x in make_qkv(1, 48, 2, 8))
    dist.barrier()  # all have started
    out = layer(q, k, v)
    begin = time.monotonic()
    if rank == 1:
        if how == "stall":
            kept.wait([f"done {other}" for other in (0, 2)], timedelta(seconds=600))
        os._exit(3)
    try:
        if where == "forward":
            layer(q, k, v)
        else:
            out.sum().backward()
    except RuntimeError as error:
        kept.set(f"done {rank}", "")
        return f"{time.monotonic() - begin:.1f} s: {error}"
    return "nothing happened"


def said_by_three(tmp_path, *args: str) -> list[str]:
    "What three processes print that run `failing`."
    code = "import sys, os; from test_ring import failing; a = sys.argv; print(failing(int(a[1]), 3, *a[2:])); "
    code += "sys.stdout.flush(); os._exit(0)"  # threads of a broken group must not keep the process
    paths = os.pathsep.join([os.path.dirname(__file__), *(p or os.getcwd() for p in sys.path)])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "store"), *args],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": paths},
        )
        for rank in range(3)
    ]  # fmt: skip
    try:
        return [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("how", "strategy", "where"),
    [("die", "ring", "forward"), pytest.param("stall", "gather", "backward", marks=pytest.mark.slow)],
)
def test_a_rank_that_fails_is_named(tmp_path, how, strategy, where):
    said = said_by_three(tmp_path, how, strategy, where)
    for rank in (0, 2):
        assert f"ring attention, {where}, step 1" in said[rank] and "rank 1 failed" in said[rank], said
        assert (float(said[rank].split(" s")[0]) < PATIENCE[how]) == (how == "die")


# ---------------------------------------------------------------- memory


LENGTH = 512


def one_step(width: int, block_size: int, checkpointing: bool) -> None:
    "Forward and backward of the two shares of a ring, in this process."
    q, k, v = (torch.randn(1, LENGTH, 8, width, requires_grad=True) for _ in range(3))
    c = config((LENGTH,), (1,), mixing="softmax", block_size=block_size, use_checkpointing=checkpointing)
    simulate_ring(q, k, v, c, 2).sum().backward()


def test_block_size_and_checkpointing_bound_memory():
    small, large, kept = (peak_of_tensors(one_step, 64, *how) for how in ((64, True), (LENGTH, True), (64, False)))
    tensor = LENGTH * 8 * 64 * 4
    assert large - small > 2 * tensor  # what is copied and computed for a tile
    assert abs(kept - small - 2 * tensor) < tensor / 50  # each rank keeps the other's half of the keys and values


@pytest.mark.slow
def test_block_size_and_checkpointing_bound_resident_memory(monkeypatch):
    "The same seen from outside, with tensors of 32 MiB and an allocator that gives back at once what is freed."
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    hows = (64, True), (LENGTH, True), (64, False)
    small, large, kept = (peak_memory(one_step, 2048, *how).extra for how in hows)
    tensor = LENGTH * 8 * 2048 * 4
    assert large - small > tensor and kept - small > tensor
