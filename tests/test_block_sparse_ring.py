"The block-sparse ring against one device: in one process, in two, three, four and eight; what it sends; who fails."

import itertools
from dataclasses import replace
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_ring import PATIENCE, Counted, Pool, assert_padding_reaches_nobody, heads_at_a_time, holes, said_by_three

from dilated_attention_nb.block_patterns import SPARSE_PATTERNS
from dilated_attention_nb.block_sparse import BlockSparseAttention, SparseAttentionConfig, block_sparse_attention
from dilated_attention_nb.multihead import create_dilated_attention, create_multihead_dilated_attention
from dilated_attention_nb.processes import spawn_gloo
from dilated_attention_nb.ring import RING_LAYOUTS, RING_STRATEGIES, gather_sequence, shard_sequence
from dilated_attention_nb.ring_block_sparse import (
    BlockSparseRingConfig,
    BlockSparseRingDilatedAttention,
    block_sparse_ring_worker,
    block_sparse_traffic,
    make_sparse_plan,
    needed,
)
from dilated_attention_nb.ring_dilated import RingAttentionConfig, RingDilatedAttention
from dilated_attention_nb.testing import assert_batch_independent, assert_causal, make_qkv, saved_for_backward

FIXED = tuple(kind for kind in SPARSE_PATTERNS if kind != "adaptive")


def config(kind="global_local", lengths=(64, 256), rates=(1, 3), **options) -> BlockSparseRingConfig:
    "Two branches: of the pattern 'dilated_sparse' the heads have two different ones. Any length."
    branches = (lengths, rates) if kind in ("dilated_sparse", "hierarchical") else ()
    return BlockSparseRingConfig(*branches, pattern_type=kind, block_size=16, **{"ragged": "mask", **options})


def alone(q, k, v, c, is_causal=False, mask=None):
    "One device."
    pattern = BlockSparseAttention(c).pattern(q.shape[1], q.shape[2], is_causal)
    return block_sparse_attention(q, k, v, pattern, is_causal=is_causal, key_padding_mask=mask)


def together(q, k, v, c, size=4, is_causal=False, mask=None):
    "A ring in this process."
    return BlockSparseRingDilatedAttention(c).simulate(q, k, v, size, is_causal, mask)


def with_gradients(attend, q, k, v, *how):
    "Output and gradients for the same random gradient."
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, *how)
    dout = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(q)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def assert_equal(found, expected, atol=1e-12):
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def padding(n: int, batch: int = 2) -> torch.Tensor:
    "The last third of the second row, and a hole."
    mask = torch.zeros(batch, n, dtype=torch.bool)
    mask[-1, n - n // 3 :] = True
    mask[-1, 3 : n // 4] = True
    return mask


# ---------------------------------------------------------------- in one process


@settings(max_examples=50)
@given(
    st.data(), st.sampled_from(FIXED), st.integers(1, 5), st.integers(1, 3), st.sampled_from(RING_LAYOUTS),
    st.sampled_from(RING_STRATEGIES), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_configuration_equals_one_device(data, kind, size, each, layout, strategy, again, causal, masked):
    n = 16 * each * size * (2 if layout == "zigzag" else 1)
    if size == 1 and layout == "contiguous":
        n += data.draw(st.integers(1, 31))  # a shorter last block
    ratio = data.draw(st.floats(0.01, 1))
    heads, kv_heads = data.draw(st.sampled_from(((2, 2), (4, 2), (3, 1), (4, 4))))
    own = {"seed": each} if kind == "random" else {}
    c = config(kind, layout=layout, strategy=strategy, use_checkpointing=again, sparsity_ratio=ratio, **own)
    q, k, v = make_qkv(2, n, heads, 8, kv_heads=kv_heads, dtype=torch.float64)
    mask = padding(n) if masked else None
    found = with_gradients(together, q, k, v, c, size, causal, mask)
    assert_equal(found, with_gradients(alone, q, k, v, c, causal, mask))


@pytest.mark.parametrize("again", (False, True))
def test_portions_of_heads_change_nothing(again):
    for kind, step in itertools.product(("dilated_sparse", "random", "strided"), (1, 2)):
        c, (q, k, v) = config(kind, use_checkpointing=again), make_qkv(1, 256, 6, 8, kv_heads=3, dtype=torch.float64)
        with heads_at_a_time(step):
            found = with_gradients(together, q, k, v, c, 4, True)
        assert_equal(found, with_gradients(alone, q, k, v, c, True))


@pytest.mark.parametrize("is_causal", (False, True))
@pytest.mark.parametrize("kind", FIXED)
def test_what_lies_under_padding_reaches_nobody(kind, is_causal):
    mask = holes(128)
    for options in (dict(), dict(layout="zigzag", strategy="gather", use_checkpointing=False)):
        c = config(kind, **options)
        assert_padding_reaches_nobody(
            lambda *x, c=c: together(*x, c, 4, is_causal, mask), lambda *x, c=c: alone(*x, c, is_causal, mask), mask
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_other_dtypes_err_as_on_one_device(dtype):
    c, (q, k, v) = config("random", layout="zigzag"), make_qkv(1, 256, 4, 8, dtype=torch.float64)
    q, k, v = (x.to(dtype).double() for x in (q, k, v))
    exact = with_gradients(alone, q, k, v, c, True)
    ring = with_gradients(together, *(x.to(dtype) for x in (q, k, v)), c, 4, True)
    single = with_gradients(alone, *(x.to(dtype) for x in (q, k, v)), c, True)
    for a, b, x in zip(ring, single, exact):
        assert (a.double() - x).abs().max() <= 2 * (b.double() - x).abs().max() + torch.finfo(dtype).eps * x.abs().max()


@pytest.mark.parametrize("layout", RING_LAYOUTS)
def test_no_rank_sees_the_future(layout):
    for kind in ("local_window", "global_local", "random"):
        attend = partial(together, c=config(kind, layout=layout), is_causal=True)
        for border in (32, 63, 64, 65, 128):
            assert_causal(attend, *make_qkv(1, 256, 2, 8), border)
        assert_batch_independent(attend, *make_qkv(2, 256, 2, 8))


def test_without_a_process_group_it_is_one_device():
    c, (q, k, v) = config("strided"), make_qkv(2, 200, 4, 8, kv_heads=2, dtype=torch.float64, requires_grad=True)
    layer = BlockSparseRingDilatedAttention(c)
    assert_equal([layer(q, k, v, True)], [alone(q, k, v, c, True)])
    kept = saved_for_backward(layer, q, k, v, True)
    info = layer.memory_info()
    assert info["saved"] == kept.num_bytes and info["received"] == info["buffers"] == 0 < info["plans"]


def test_dropout_in_training_only():
    q, k, v = make_qkv(1, 64, 2, 8)
    layer = BlockSparseRingDilatedAttention(config("strided", dropout=0.5))
    assert (layer(q, k, v) == 0).sum() > 0.4 * q.numel()
    assert_equal([layer.eval()(q, k, v)], [alone(q, k, v, config("strided"))], 1e-6)


def test_without_checkpointing_the_received_blocks_are_saved():
    q, k, v = make_qkv(1, 256, 2, 8, requires_grad=True)
    sizes = {}
    for again in (True, False):
        layer = BlockSparseRingDilatedAttention(config("local_window", use_checkpointing=again))
        sizes[again] = saved_for_backward(lambda q, k, v, x=layer: x.simulate(q, k, v, 4), q, k, v).num_bytes
        found = layer.traffic(256, 2, 8, ring_size=4)
        assert all(t.backward_sent == t.forward_received + again * t.forward_sent for t in found)  # float32 gradients
    assert sizes[False] - sizes[True] == sum(t.forward_received for t in found)


# ---------------------------------------------------------------- who sends what


def by_hand(c, n, size, heads, kv_heads, d, causal, itemsize=4) -> list[int]:
    "Bytes that each rank receives forward, from the dense pattern: blocks that its rows look at and it doesn't hold."
    dense = BlockSparseAttention(c).pattern(n, heads, causal).to_dense()[0]
    dense = dense.expand(heads, -1, -1).unflatten(0, (kv_heads, -1)).any(1)
    if causal:
        dense = dense.tril()
    chunks = size * (2 if c.layout == "zigzag" else 1)
    chunk = torch.arange(n // 16) // (n // 16 // chunks)
    owner = torch.minimum(chunk, 2 * size - 1 - chunk)
    blocks = [(dense[:, owner == r].any(1) & (owner != r)).sum() for r in range(size)]
    return [int(x) * 2 * 16 * d * itemsize for x in blocks]


@settings(max_examples=60)
@given(
    st.sampled_from(FIXED), st.integers(1, 5), st.integers(1, 4), st.sampled_from(RING_LAYOUTS),
    st.sampled_from(RING_STRATEGIES), st.booleans(), st.floats(0.01, 1),
)  # fmt: skip
def test_each_needed_block_travels_once_and_nothing_else(kind, size, each, layout, strategy, causal, ratio):
    n = 16 * each * size * (2 if layout == "zigzag" else 1)
    c = config(kind, layout=layout, strategy=strategy, sparsity_ratio=ratio)
    found = block_sparse_traffic(c, n, 4, 8, size, kv_heads=2, is_causal=causal)
    assert [t.forward_received for t in found] == by_hand(c, n, size, 4, 2, 8, causal)
    assert sum(t.forward_sent for t in found) == sum(t.forward_received for t in found)
    assert sum(t.backward_sent for t in found) == sum(t.backward_received for t in found)


def test_empty_pairs_of_rank_and_block_cost_nothing():
    "A causal window of up to as many blocks as a rank holds, of few at the beginning: one message from the neighbour."
    c, n = config("local_window", sparsity_ratio=0.125), 16 * 64
    layer = BlockSparseRingDilatedAttention(c)
    call = layer.make_call(8, (1, n, 2, 8), 2, False, True)
    (plans,) = layer.make_plans([call], range(8))
    for rank, plan in enumerate(plans):
        peers = {(m.sender, m.receiver) for m in plan.moves if not m.gradient}
        assert peers <= {(rank - 1, rank), (rank, rank + 1)} and len(plan.guests) == (rank > 1)
    assert [bool(t.forward_received) for t in layer.traffic(n, 2, 8, 8, is_causal=True)] == [False] * 2 + [True] * 6
    inside = replace(c, density=1 / 64)  # only the diagonal
    assert all(t.forward_sent == t.backward_sent == 0 for t in block_sparse_traffic(inside, n, 2, 8, 8))


def test_all_kept_blocks_are_computed_once():
    for kind, layout in itertools.product(FIXED, RING_LAYOUTS):
        record, c = [], config(kind, layout=layout)
        layer = BlockSparseRingDilatedAttention(c)
        layer.simulate(*make_qkv(1, 256, 4, 8), 4, True, record=record)
        mask = BlockSparseAttention(c).pattern(256, 4, True).token_mask(True)
        assert sum(event.pairs for event in record) == mask.expand(1, 4, -1, -1).sum()


def test_strategy_auto():
    "All at once what is no more than the rank's own keys and values."
    steps = {}
    for kind, ratio in (("local_window", 0.05), ("random", 1.0)):
        record: list = []
        layer = BlockSparseRingDilatedAttention(config(kind, sparsity_ratio=ratio))
        layer.simulate(*make_qkv(1, 512, 2, 8), 4, record=record)
        steps[kind] = max(event.step for event in record if event.kind == "receive")
    assert steps == {"local_window": 1, "random": 3}


def test_zigzag_balances_causal_work():
    for size in range(2, 9):
        work = {}
        for layout in RING_LAYOUTS:
            record: list = []
            c = config("strided", sparsity_ratio=0.25, layout=layout)
            BlockSparseRingDilatedAttention(c).simulate(*make_qkv(1, 16 * 16 * size, 1, 8), size, True, record=record)
            tiles = [sum(e.size for e in record if e.kind == "attend" and e.rank == r) for r in range(size)]
            work[layout] = max(tiles) / (sum(tiles) / size)
        assert work["zigzag"] <= 1.10 < work["contiguous"]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("layout", "size", "n", "words"),
    [
        ("contiguous", 4, 200, "of 64, for 4 equal chunks .contiguous. of whole blocks of 16, got 200; pad to 256"),
        ("zigzag", 2, 96, "of 64, for 4 equal chunks .zigzag. of whole blocks of 16, got 96; pad to 128 or cut"),
        ("contiguous", 3, 47, "got 47; pad to 48$"),
    ],
)  # fmt: skip
def test_lengths_that_cannot_be_cut(layout, size, n, words):
    with pytest.raises(ValueError, match=words):
        BlockSparseRingDilatedAttention(config(layout=layout)).simulate(*make_qkv(1, n, 2, 8), size)


def test_bad_input_is_refused():
    q, k, v = make_qkv(1, 64, 2, 8)
    layer, make = BlockSparseRingDilatedAttention(config()), BlockSparseRingDilatedAttention
    for error, words, call in [
        (TypeError, "BlockSparseRingConfig", lambda: make(SparseAttentionConfig((4,), (1,)))),
        (TypeError, "BlockSparseRingConfig", lambda: make(RingAttentionConfig((4,), (1,)))),
        (ValueError, "mixing", lambda: make(config(mixing="softmax"))),
        (ValueError, "ragged", lambda: make(config(ragged="zeros"))),
        (ValueError, "enable_adaptive", lambda: make(config(enable_adaptive=True))),
        (TypeError, "is_causal", lambda: layer(q, k, v, "yes")),
        (ValueError, "as long as k", lambda: layer(q[:, :32], k, v)),
        (ValueError, "num_heads", lambda: make(config("dilated_sparse"))(q[:, :, :1], k[:, :, :1], v[:, :, :1])),
        (TypeError, "float64 as the config says", lambda: make(config(dtype="float64"))(q, k, v)),
        (ValueError, "ring_size must be 1 without", lambda: make(config(ring_size=2))(q, k, v)),
        (ValueError, "ring_size must be given", lambda: layer.traffic(64, 2, 8)),
    ]:
        with pytest.raises(error, match=words):
            call()


# ---------------------------------------------------------------- real processes

CASES = [
    dict(kind="local_window", is_causal=True),
    dict(kind="global_local", is_causal=True, layout="zigzag", kv_heads=2, padded=True),
    dict(kind="dilated_sparse", strategy="ring", use_checkpointing=False),
    dict(kind="random", is_causal=True, strategy="gather", layout="zigzag", kv_heads=1),
    dict(kind="strided", strategy="ring", padded=True, is_causal=True, use_checkpointing=False, layout="zigzag"),
    dict(kind="hierarchical", strategy="gather", kv_heads=2, dtype=torch.float32, padded=True),
]


def parts(case: dict, n: int):
    "Config, inputs with the gradient of the output, and how to call."
    options = dict(case)
    causal, padded = options.pop("is_causal", False), options.pop("padded", False)
    kv_heads, dtype = options.pop("kv_heads", 4), options.pop("dtype", torch.float64)
    q, k, v = make_qkv(2, n, 4, 8, kv_heads=kv_heads, dtype=dtype)
    dout = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(q)
    return config(**options), (q, k, v, dout), causal, padding(n) if padded else None


def many(rank: int, world: int, n: int, cases: list[dict] = CASES) -> list[dict]:
    "All cases, one after the other, in the same processes."
    return [block_sparse_ring_worker(rank, world, *parts(case, n)) for case in cases]


def held(results: list[list[dict]], n: int, cases: list[dict] = CASES) -> None:
    "Every rank has the same whole, and it is that of one device."
    for i, case in enumerate(cases):
        c, (*inputs, _), causal, mask = parts(case, n)
        expected = with_gradients(alone, *inputs, c, causal, mask)
        for found in results:
            tolerance = 1e-12 if inputs[0].dtype == torch.float64 else 1e-5
            assert_equal((found[i]["out"], *found[i]["grads"]), expected, tolerance)


def bytes_sent(rank: int, world: int, n: int, cases: list[dict]) -> list[tuple[int, int]]:
    "Bytes of the forward and of the backward pass of each case."
    found = []
    for case in cases:
        c, (*inputs, _), causal, mask = parts(case, n)
        layer = BlockSparseRingDilatedAttention(c)
        mask = None if mask is None else shard_sequence(mask, None, c.layout)
        q, k, v = (shard_sequence(x, None, c.layout).requires_grad_() for x in inputs)
        with Counted() as forward:
            out = layer(q, k, v, causal, mask)
        with Counted() as backward:
            out.sum().backward()
        found.append((forward.sent, backward.sent))
    return found


def predicted(case: dict, n: int, size: int) -> list[tuple[int, int]]:
    "The same from the plan."
    c, (q, k, *_), causal, mask = parts(case, n)
    sizes = dict(batch=2, kv_heads=k.shape[2], dtype=q.dtype, is_causal=causal, masked=mask is not None)
    return [(t.forward_sent, t.backward_sent) for t in block_sparse_traffic(c, n, 4, 8, size, **sizes)]


def steps(rank: int, world: int) -> dict:
    "Two forwards, then two backwards; then twenty steps, and what they leave behind in a pool that hands out NaN."
    pool = Pool()
    layer = BlockSparseRingDilatedAttention(config("random", strategy="ring"), pool=pool)
    q, k, v = (shard_sequence(x).requires_grad_() for x in make_qkv(1, 256, 2, 8))

    def step():
        return torch.autograd.grad(layer(q, k, v, True).sum(), (q, k, v))

    first = step()
    lent, made = len(pool.lent), pool.made
    one, two = layer(q, k, v, True), layer(q, k, v, True)
    grads = [torch.autograd.grad(x.sum(), (q, k, v)) for x in (two, one)]
    same = all(torch.equal(a, b) for g in grads for a, b in zip(first, g))
    for _ in range(20):
        step()
    return {"same": same, "lent": lent + len(pool.lent), "fresh": pool.made - made, "memory": layer.memory_info()}


def differ(rank: int, world: int) -> list[str]:
    "What the ranks say when the last one calls something else."
    odd, found = rank == world - 1, []
    q, k, v = (shard_sequence(x) for x in make_qkv(1, 256, 2, 8))
    for layer, inputs, causal in [
        (BlockSparseRingDilatedAttention(config()), (q, k, v), odd),
        (BlockSparseRingDilatedAttention(config("random", seed=int(odd))), (q, k, v), False),
        (BlockSparseRingDilatedAttention(config(sparsity_ratio=0.5 if odd else 0.25)), (q, k, v), False),
        (BlockSparseRingDilatedAttention(config()), [x[:, :48] if odd else x for x in (q, k, v)], False),
        (BlockSparseRingDilatedAttention(config()), [x.double() if odd else x for x in (q, k, v)], False),
        (RingDilatedAttention(RingAttentionConfig((64,), (1,))) if odd else BlockSparseRingDilatedAttention(config()),
         (q, k, v), False),
    ]:  # fmt: skip
        try:
            layer(*inputs, causal)
        except ValueError as error:
            found.append(str(error))
    return found


RINGS = [case | {"ring_size": size} for size in (1, 2) for case in CASES[1:3]]


def four(rank: int, world: int) -> dict:
    "All that four processes are needed for, so that they start once."
    with heads_at_a_time(1):
        cut = bytes_sent(rank, world, 384, CASES[2:4])
    found = {
        "whole": many(rank, world, 384),
        "rings": many(rank, world, 384, RINGS),
        "bytes": bytes_sent(rank, world, 384, CASES),
        "cut bytes": cut,
    }
    return found | {"steps": steps(rank, world), "differ": differ(rank, world), "heads": multihead(rank, world)}


@pytest.mark.parametrize(("world", "cases"), [pytest.param(2, CASES, marks=pytest.mark.slow), (3, CASES[1:5])])
def test_two_and_three_ranks(world, cases):
    held(spawn_gloo(many, world, 192, cases), 192, cases)


def test_four_ranks():
    results = spawn_gloo(four, 4)
    held([r["whole"] for r in results], 384)
    held([r["rings"] for r in results], 384, RINGS)
    for i, case in enumerate(CASES):  # the bytes that left are those that were predicted
        assert [r["bytes"][i] for r in results] == predicted(case, 384, 4)
    with heads_at_a_time(1):
        for i, case in enumerate(CASES[2:4]):
            assert [r["cut bytes"][i] for r in results] == predicted(case, 384, 4)
    for r in results:
        assert r["steps"]["same"] and r["steps"]["lent"] == r["steps"]["fresh"] == 0
        assert r["steps"]["memory"]["buffers"] > 0
    for said in zip(*(r["differ"] for r in results)):
        assert len(set(said)) == 1 and "the same on all ranks of a ring" in said[0] and "on rank 3" in said[0]
    names = [text.split(" must ")[0] for text in results[0]["differ"]]
    assert names == ["is_causal", "config.seed", "config.density", "the local length", "dtype", "the layer"]
    multihead_held([r["heads"] for r in results])


@pytest.mark.slow
def test_eight_ranks():
    held(spawn_gloo(many, 8, 512), 512)


# ---------------------------------------------------------------- multi-head attention on a ring

HEADS = [
    ("ring", "improved", dict(segment_lengths=(32, 96, 384), dilation_rates=(1, 2, 4), mixing="softmax")),
    ("block_sparse_ring", "block_sparse", dict(segment_lengths=(384,), dilation_rates=(1,), block_size=16,
                                               pattern_type="global_local")),
]  # fmt: skip


def multihead_of(kind: str, options: dict, **more):
    torch.manual_seed(0)
    shape = dict(embed_dim=32, num_heads=4, num_kv_heads=2)
    return create_multihead_dilated_attention(kind, **shape, **options, **more, dtype="float64")


def inputs() -> torch.Tensor:
    return torch.randn(2, 384, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def turned(place: torch.Tensor):
    "A position function: queries and keys are scaled by where they stand."

    def position(q, k):
        factor = 1 + 0.1 * torch.cos(place.double())[:, :, None, None]
        return q * factor, k / factor

    return position


def multihead(rank: int, world: int) -> list[dict]:
    "Outputs, gradients of the input, and gradients of the parameters from this rank's tokens."
    found = []
    for (kind, _, options), layout in itertools.product(HEADS, RING_LAYOUTS):
        mha = multihead_of(kind, options, layout=layout)
        x = inputs().requires_grad_()
        place = shard_sequence(torch.arange(384)[None], None, layout)
        mask = shard_sequence(padding(384), None, layout)
        out, _ = mha(shard_sequence(x, None, layout), None, None, mask, is_causal=True, position=turned(place))
        out.square().sum().backward()
        try:
            mha(shard_sequence(x, None, layout), need_weights=True)
            said = "nothing"
        except ValueError as error:
            said = str(error)
        grads = {name: p.grad for name, p in mha.named_parameters()}
        found.append({"out": gather_sequence(out.detach(), None, layout), "x": x.grad, "grads": grads, "said": said})
    return found


def multihead_held(results: list[list[dict]]) -> None:
    "Equal to one device; gradients of parameters add up over the ranks."
    for i, ((_, kind, options), _) in enumerate(itertools.product(HEADS, RING_LAYOUTS)):
        mha = multihead_of(kind, options)
        x = inputs().requires_grad_()
        position = turned(torch.arange(384)[None])
        out, _ = mha(x, None, None, padding(384), is_causal=True, position=position)
        out.square().sum().backward()
        for found in results:
            assert_equal([found[i]["out"], found[i]["x"]], [out.detach(), x.grad], 1e-11)
            assert "need_weights must be False on a ring of several ranks" in found[i]["said"]
        for name, p in mha.named_parameters():
            total = sum(found[i]["grads"][name] for found in results)
            torch.testing.assert_close(total, p.grad, atol=1e-10, rtol=0)


def test_rings_by_name():
    ring = create_dilated_attention("ring", segment_lengths=(4,), dilation_rates=(1,), layout="zigzag")
    assert isinstance(ring, RingDilatedAttention) and ring.config.layout == "zigzag" and ring.group is None
    blocks = create_dilated_attention("block_sparse_ring", config("strided"), block_size=32)
    assert isinstance(blocks, BlockSparseRingDilatedAttention) and blocks.config.block_size == 32
    for kind in ("auto", "improved", "standard", "block_sparse"):
        with pytest.raises(ValueError, match="group must be None for kind"):
            create_dilated_attention(kind, segment_lengths=(4,), dilation_rates=(1,), group=object())
    with pytest.raises(ValueError, match="has no field 'layout'"):
        create_dilated_attention("improved", segment_lengths=(4,), dilation_rates=(1,), layout="zigzag")
    group = object()  # handed on as it is
    mha = multihead_of(*HEADS[0][::2], group=group)
    assert mha.attention.group is group and isinstance(mha.attention, RingDilatedAttention)
    assert mha.attention_config.ring_size is None and mha.attention_config.segment_lengths == (32, 96, 384)


@pytest.mark.parametrize(("kind", "single", "options"), HEADS)
def test_multihead_alone(kind, single, options):
    ring, one = multihead_of(kind, options), multihead_of(single, options)
    assert set(ring.state_dict()) == set(one.state_dict())
    assert_equal([ring(inputs(), is_causal=True)[0]], [one(inputs(), is_causal=True)[0]])
    _, weights = ring(inputs(), need_weights=True)
    assert_equal([weights], [one(inputs(), need_weights=True)[1]])


# ---------------------------------------------------------------- when a process fails


@pytest.mark.slow  # the dilated ring, whose steps these are, does the same in `make test`
@pytest.mark.parametrize(("how", "strategy", "where"), [("die", "ring", "backward")])
def test_a_rank_that_fails_is_named(tmp_path, how, strategy, where):
    said = said_by_three(tmp_path, how, strategy, where, "sparse")
    for rank in (0, 2):
        assert f"ring attention, {where}, step" in said[rank] and "rank 1 failed" in said[rank], said
        assert float(said[rank].split(" s")[0]) < PATIENCE[how]


def test_plans_of_all_ranks_agree():
    "What one rank plans to send in a step, to whom and how much, is what the other plans to receive."
    for kind, layout, strategy in itertools.product(FIXED, RING_LAYOUTS, RING_STRATEGIES):
        layer = BlockSparseRingDilatedAttention(config(kind, layout=layout, strategy=strategy))
        call = layer.make_call(4, (1, 512, 4, 8), 2, True, True)
        pattern = BlockSparseAttention(layer.config).pattern(512, 4, True)
        needs = [needed(pattern, call, rank) for rank in range(4)]
        plans = [make_sparse_plan(pattern, call, needs, rank) for rank in range(4)]

        def listed(moves, call=call):
            return sorted((m.step, m.sender, m.receiver, m.gradient, m.parcel.numel(call, m.gradient)) for m in moves)

        sent = listed(m for plan in plans for m in plan.moves if m.sender == plan.rank)
        assert sent == listed(m for plan in plans for m in plan.moves if m.receiver == plan.rank)
