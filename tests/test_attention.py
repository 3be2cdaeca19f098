"Every path of dilated attention against the oracle, and what must hold of all of them."

import copy
import dataclasses
import json
import math
import pickle
import threading
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import drawn, planned, product
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad as fwAD

from dilated_attention_nb import backends, improved, masking, partial
from dilated_attention_nb.backends import attend, available_backends
from dilated_attention_nb.config import DilatedAttentionConfig
from dilated_attention_nb.dilated import DilatedAttention
from dilated_attention_nb.improved import ImprovedDilatedAttention, dilated_attention
from dilated_attention_nb.masking import Grid, tiles
from dilated_attention_nb.partial import merge
from dilated_attention_nb.testing import (
    AttentionCase,
    assert_batch_independent,
    assert_causal,
    attention_cases,
    check_against_oracle,
    make_qkv,
    oracle_attention,
    saved_for_backward,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "longnet_attention.npz")
GOLDEN_CASES = json.loads(GOLDEN["meta"].tobytes())
BRANCHES = ("segment_lengths", "dilation_rates", "mixing", "offsets", "ragged")


def readable(backend: str = "auto"):
    "`DilatedAttention` with the signature of `dilated_attention`."

    def run(q, k, v, is_causal=False, key_padding_mask=None, **options) -> Tensor:
        module = DilatedAttention(DilatedAttentionConfig(**options), backend)
        return module(q, k, v, is_causal, key_padding_mask)

    return run


def fast(backend: str = "auto"):
    def run(q, k, v, segment_lengths, dilation_rates, **options) -> Tensor:
        return dilated_attention(q, k, v, segment_lengths, dilation_rates, backend=backend, **options)

    return run


PATHS = {
    "readable": readable(),
    "readable-math": readable("math"),
    "improved": fast(),
    "improved-math": fast("math"),
}
paths = pytest.mark.parametrize("path", PATHS)


def held(path: str, case: AttentionCase) -> dict[str, float]:
    "Forward and backward of a case within the budget: by the plan, and in one call where that is what happens."
    options, errors = case.options(), {}
    for form in (planned(), nullcontext()) if path == "improved" else (nullcontext(),):
        with form:
            errors = check_against_oracle(lambda q, k, v: PATHS[path](q, k, v, **options), *case.qkv(), **options)
    return errors


# ---------------------------------------------------------------- the oracle


@paths
@drawn(60)
@given(case=attention_cases())
def test_equals_the_oracle_on_drawn_cases(path, case):
    held(path, case)


@product(
    path=PATHS,
    dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
    is_causal=[False, True],
    shape=[
        dict(nq=1, nk=1, h=2, kv_heads=2),  # length 1
        dict(nq=3, nk=3, h=2, kv_heads=1),  # shorter than a segment
        dict(nq=61, nk=61, h=3, kv_heads=3),  # a prime length
        dict(nq=7, nk=97, h=4, kv_heads=2),  # late queries
        dict(nq=128, nk=128, h=7, kv_heads=7),  # many segments; heads that neither branches nor rates divide
    ],
    how=[("groups", "blocked"), ("softmax", "blocked"), ("softmax", "interleaved")],
    ids=lambda x: f"{x['nq']}of{x['nk']}" if isinstance(x, dict) else "-".join(x) if isinstance(x, tuple) else None,
)
def test_equals_the_oracle_on_awkward_lengths(path, dtype, is_causal, shape, how):
    mixing, offsets = how
    for ragged in ("mask", "zeros"):
        held(path, AttentionCase((8, 24), (1, 3), is_causal, mixing, offsets, ragged, b=2, dtype=dtype, **shape))


@paths
def test_segments_that_do_not_divide_each_other(path):
    held(path, AttentionCase((7, 12, 31), (1, 2, 4), True, "softmax", ragged="mask", nq=75, nk=75, h=4, kv_heads=4))


@pytest.mark.parametrize("path", ["readable", "improved"])
@pytest.mark.parametrize("index", range(len(GOLDEN_CASES)))
def test_reproduces_the_authors(path, index):
    case = GOLDEN_CASES[index]
    q, k, v, expected = (torch.from_numpy(GOLDEN[f"{index}.{x}"]) for x in ("q", "k", "v", "out"))
    options = dict(is_causal=case["is_causal"], mixing="softmax", ragged="zeros")
    lengths, rates = tuple(case["segment_lengths"]), tuple(case["dilation_rates"])
    got = PATHS[path](q, k, v, segment_lengths=lengths, dilation_rates=rates, **options)
    assert (got - expected).abs().max() <= 1e-6


@product(path=PATHS, mixing=["groups", "softmax"], is_causal=[False, True])
def test_gradcheck(path, mixing, is_causal):
    "Late queries, shared heads and a ragged end; its cost grows with the elements, of inputs and of outputs."
    q, k, v = make_qkv(1, 4, 2, 4, kv_heads=1, nk=7, dtype=torch.float64, requires_grad=True)
    options = dict(segment_lengths=(3, 7), dilation_rates=(1, 2), mixing=mixing, ragged="mask", is_causal=is_causal)
    assert torch.autograd.gradcheck(lambda *x: PATHS[path](*x, **options), (q, k, v))


@pytest.mark.slow
@paths
@pytest.mark.parametrize("mixing", ["groups", "softmax"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck_of_several_shared_heads(path, mixing, is_causal):
    q, k, v = make_qkv(1, 7, 4, 8, kv_heads=2, nk=11, dtype=torch.float64, requires_grad=True)
    options = dict(segment_lengths=(4, 11), dilation_rates=(1, 3), mixing=mixing, ragged="mask", is_causal=is_causal)
    assert torch.autograd.gradcheck(lambda *x: PATHS[path](*x, **options), (q, k, v))


def test_plain_backend_is_twice_differentiable():
    q, k, v = make_qkv(1, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    options = dict(segment_lengths=(3,), dilation_rates=(2,), mixing="softmax", ragged="mask")
    assert torch.autograd.gradgradcheck(lambda *x: PATHS["readable-math"](*x, **options), (q, k, v))


@paths
@pytest.mark.parametrize("ragged", ["mask", "zeros"])
def test_extreme_logits_stay_finite(path, ragged):
    "Logits of some thousands: no overflow in the merge, rows sum to one."
    q, k, v = make_qkv(1, 24, 2, 8, seed=4)
    q, k = 60 * q, 60 * k
    options = dict(segment_lengths=(8, 24), dilation_rates=(1, 2), mixing="softmax", ragged=ragged)
    leaves = [x.requires_grad_() for x in (q, k, torch.ones_like(v))]
    out = PATHS[path](*leaves, **options)
    assert ((out - 1).abs() < 1e-5).all() or ragged == "zeros"
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


# ---------------------------------------------------------------- leaks


@paths
@pytest.mark.parametrize("mixing", ["groups", "softmax"])
@pytest.mark.parametrize("shape", [(48, 48), (20, 48)], ids=["all", "late"])
def test_causal_outputs_ignore_the_future(path, mixing, shape):
    nq, nk = shape
    options = dict(segment_lengths=(8, 48), dilation_rates=(1, 4), mixing=mixing, is_causal=True, offsets="interleaved")
    q, k, v = make_qkv(2, nq, 5, 8, nk=nk)
    for t in (nk - nq + 1, nk - 15, nk - 1):
        assert_causal(lambda *x: PATHS[path](*x, **options), q, k, v, t)


@paths
@pytest.mark.parametrize("mixing", ["groups", "softmax"])
def test_batch_rows_are_strangers(path, mixing):
    options = dict(segment_lengths=(8, 20), dilation_rates=(1, 3), mixing=mixing, ragged="mask")
    q, k, v = make_qkv(3, 37, 4, 8, kv_heads=2)
    mask = torch.rand(3, 37) < 0.2
    assert_batch_independent(lambda q, k, v, m: PATHS[path](q, k, v, key_padding_mask=m, **options), q, k, v, mask)


@paths
def test_padding_equals_a_shorter_sequence(path):
    q, k, v = make_qkv(1, 40, 4, 8, dtype=torch.float64)
    mask = torch.arange(40)[None] >= 29
    options = dict(segment_lengths=(8, 16), dilation_rates=(1, 2), mixing="softmax", ragged="mask")
    padded = PATHS[path](q, k, v, key_padding_mask=mask, **options)[:, :29]
    short = PATHS[path](q[:, :29], k[:, :29], v[:, :29], **options)
    assert torch.allclose(padded, short, atol=1e-14)


@paths
def test_what_padding_holds_is_never_seen(path):
    "Not even NaN in padded keys would be acceptable as a number that shows; finite garbage must not show at all."
    q, k, v = make_qkv(2, 32, 2, 8)
    mask = torch.zeros(2, 32, dtype=torch.bool)
    mask[:, 20:] = True
    options = dict(segment_lengths=(8, 32), dilation_rates=(1, 2), mixing="softmax", key_padding_mask=mask)
    other_k, other_v = k.clone(), v.clone()
    other_k[:, 20:], other_v[:, 20:] = 1e4, -1e4
    assert torch.equal(PATHS[path](q, k, v, **options), PATHS[path](q, other_k, other_v, **options))


# ---------------------------------------------------------------- theorems


@paths
@pytest.mark.parametrize("is_causal", [False, True])
def test_one_branch_is_full_attention(path, is_causal):
    q, k, v = make_qkv(2, 50, 4, 16)
    got = PATHS[path](q, k, v, segment_lengths=(50,), dilation_rates=(1,), is_causal=is_causal)
    swapped = (x.transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*swapped, is_causal=is_causal)
    torch.testing.assert_close(got, expected.transpose(1, 2))


@paths
@pytest.mark.parametrize("mixing", ["groups", "softmax"])
def test_chunked_prefill_equals_the_whole(path, mixing):
    options = dict(segment_lengths=(8, 24), dilation_rates=(1, 3), mixing=mixing, ragged="mask", is_causal=True)
    q, k, v = make_qkv(2, 53, 4, 8, dtype=torch.float64)
    whole = PATHS[path](q, k, v, **options)
    cuts = [(0, 5), (5, 24), (24, 25), (25, 53)]
    chunks = [PATHS[path](q[:, a:b], k[:, :b], v[:, :b], **options) for a, b in cuts]
    assert torch.allclose(torch.cat(chunks, 1), whole, atol=1e-14)


@paths
def test_grouped_query_heads_equal_repeated_ones(path):
    q, k, v = make_qkv(2, 30, 6, 8, kv_heads=2, dtype=torch.float64)
    options = dict(segment_lengths=(10, 30), dilation_rates=(1, 4), mixing="softmax")
    repeated = PATHS[path](q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2), **options)
    assert torch.allclose(PATHS[path](q, k, v, **options), repeated, atol=1e-14)


@paths
def test_strides_do_not_matter(path):
    "Slices of a fused projection, expanded heads, a head_dim that isn't contiguous."
    fused = torch.randn(2, 24, 3, 4, 8, dtype=torch.float64)
    options = dict(segment_lengths=(8, 12), dilation_rates=(1, 2), mixing="softmax")
    q, k, v = fused.unbind(2)
    expected = PATHS[path](q.contiguous(), k.contiguous(), v.contiguous(), **options)
    assert torch.allclose(PATHS[path](q, k, v, **options), expected, atol=1e-14)
    columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert torch.allclose(PATHS[path](*columns, **options), expected, atol=1e-14)
    one = k[:, :, :1]
    expanded = PATHS[path](q, one.expand(-1, -1, 4, -1), one.expand(-1, -1, 4, -1), **options)
    assert torch.allclose(expanded, PATHS[path](q, one, one, **options), atol=1e-14)
    leaf = fused.clone().requires_grad_()
    (grad,) = torch.autograd.grad(PATHS[path](*leaf.unbind(2), **options).sum(), leaf)
    assert grad.isfinite().all()
    broadcast = torch.autograd.grad(PATHS[path](*leaf.unbind(2), **options)[..., 0].sum(), leaf)[0]
    assert broadcast.isfinite().all()


def test_readable_and_improved_agree_at_length(monkeypatch):
    "Several windows, portions of heads and parts of tiles."
    monkeypatch.setattr(improved, "portion_size", lambda q, backward: 2**17)
    q, k, v = make_qkv(1, 5000, 4, 64, kv_heads=2, requires_grad=True)
    options = dict(segment_lengths=(128, 512, 4096), dilation_rates=(1, 3, 8), mixing="softmax", ragged="mask")
    assert len(list(improved.portions(2**17, q, k, options["segment_lengths"]))) == 4
    for is_causal in (False, True):
        outs = [PATHS[p](q, k, v, is_causal=is_causal, **options) for p in ("readable", "improved")]
        torch.testing.assert_close(*outs)
        dout = torch.randn_like(q)
        pairs = zip(*(torch.autograd.grad(out, (q, k, v), dout) for out in outs))
        for a, b in pairs:
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [2**13, 2**27])
def test_portions_partition_the_work(size):
    for nq, nk, ws in ((100, 100, (8, 12)), (37, 100, (8, 12)), (1, 100, (64,)), (64, 64, (64, 32))):
        q, k, _ = make_qkv(2, nq, 6, 8, kv_heads=3, nk=nk)
        seen = torch.zeros(nq, 6, dtype=torch.int64)
        for _, (rows, heads), _ in improved.portions(size, q, k, ws):
            seen[rows, heads] += 1
        assert (seen == 1).all()


@given(
    start=st.integers(0, 5), segments=st.integers(1, 5), w=st.integers(1, 9), s=st.integers(0, 4), r=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 60), min_size=1, max_size=4),
)  # fmt: skip
def test_a_grid_falls_apart_at_any_cuts(start, segments, w, s, r, cuts):
    grid = Grid(start, segments, w, s, r)
    positions = grid.positions()
    seen = torch.zeros_like(positions)
    edges = [0, *sorted(cuts), 60]
    for low, high in zip(edges, edges[1:]):
        for where, rows, part in grid.within(low, high):
            assert torch.equal(part.positions() + low, positions[where, rows])
            assert ((low <= positions[where, rows]) & (positions[where, rows] < high)).all()
            seen[where, rows] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("offsets", ["blocked", "interleaved"])
@pytest.mark.parametrize("rates", [(1, 3), (4,), (7,), (16,)])
def test_series_hold_the_pieces_of_a_tile(rates, offsets):
    "One view of a series is the views of its pieces, whole and cut anywhere."
    x = torch.arange(2 * 40 * 6).view(2, 40, 6)
    for tile in tiles(40, 40, 6, 6, (20,) * len(rates), rates, "softmax", offsets):
        queries, _ = improved.sides(tile)
        assert len(queries) <= 2 and sum(one.pieces for one in queries) == len(tile.pieces)
        pieces = iter(tile.pieces)
        for one in queries:
            here = [p.queries.view(x[:, :, p.q_heads]) for p in islice(pieces, one.pieces)]
            assert torch.equal(one.view(x), torch.stack(here, 3))
            found = torch.zeros_like(one.view(x))
            for low, high in ((0, 13), (13, 27), (27, 40)):
                for segments, rows, which, part in one.within(low, high):
                    found[:, segments, rows, which] += part.view(x[:, low:high])
            assert torch.equal(found, torch.stack(here, 3))


@drawn(60)
@given(case=attention_cases(dtypes=(torch.float32, torch.bfloat16)))
def test_equals_the_oracle_in_small_portions(case):
    "The same with portions so small that every sequence is cut wherever it may be."
    before = improved.portion_size
    improved.portion_size = lambda q, backward: 64
    try:
        held("improved", case)
    finally:
        improved.portion_size = before


# ---------------------------------------------------------------- few tokens in one call


def kernel_calls(fn) -> int:
    "Calls of PyTorch's CPU kernel, forward and backward."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
        fn()
    return sum("scaled_dot_product_flash_attention_for_cpu" in e.name() for e in run.profiler.kineto_results.events())


@pytest.mark.parametrize("mixing", ["groups", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_few_tokens_take_one_call(mixing, dtype):
    "In half precision the kernel's backward is slow, and does only what the plan asks of it."
    x = make_qkv(1, 64, 8, 64, dtype=dtype, requires_grad=True)
    branches, dout = ((8, 16, 32, 64), (1, 2, 4, 8)), torch.randn(1, 64, 8, 64).to(dtype)
    out = dilated_attention(*x, *branches, mixing=mixing)
    calls = kernel_calls(lambda: dilated_attention(*x, *branches, mixing=mixing))
    backward = kernel_calls(lambda: torch.autograd.grad(out, x, dout))
    assert calls == 1 and (backward == 1) == (dtype.itemsize > 2)
    with planned():
        assert kernel_calls(lambda: dilated_attention(*x, *branches, mixing=mixing)) >= 4
    x = make_qkv(1, 256, 8, 64, dtype=dtype)
    assert kernel_calls(lambda: dilated_attention(*x, (32, 64, 128, 256), (1, 2, 4, 8), mixing=mixing)) >= 4


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@product(where=[0, 1, 2], is_causal=[False, True], mixing=["groups", "softmax"])
def test_what_is_not_finite_reaches_whom_it_concerns(garbage, where, is_causal, mixing):
    "A key that a row doesn't meet has no part in it, in one call as by the plan, nor in its gradient."
    x = make_qkv(1, 32, 4, 8, dtype=torch.float64)
    x[where][:, 20] = garbage
    x, dout = [y.requires_grad_() for y in x], torch.randn(1, 32, 4, 8, dtype=torch.float64)
    options = dict(segment_lengths=(4, 16), dilation_rates=(1, 2), is_causal=is_causal, mixing=mixing)

    def run():
        out = dilated_attention(*x, **options)
        return [out, *torch.autograd.grad(out, x, dout)]

    with planned():
        expected = run()
    assert any(not y.isfinite().all() for y in expected) and all(y[:, :16].isfinite().all() for y in expected)
    torch.testing.assert_close(run(), expected, equal_nan=True)


def test_weights_of_keys_are_found_again_and_bounded():
    improved.key_weights.cache_clear()
    with torch.inference_mode(), torch.device("meta"):  # neither is what later calls would want to find
        x = [torch.randn(1, 8, 4, 8, device="cpu") for _ in range(3)]
        dilated_attention(*x, (8,), (1,))
    x = make_qkv(1, 8, 4, 8, requires_grad=True)
    dilated_attention(*x, (8,), (1,)).sum().backward()
    info = improved.key_weights.cache_info()
    assert (info.misses, info.hits) == (1, 2) and info.maxsize * improved._WEIGHTS <= 2**24
    x = make_qkv(1, 600, 1, 1)
    dilated_attention(*x, (600,), (1,))  # few numbers, but many weights
    assert improved.key_weights.cache_info().misses == 1


# ---------------------------------------------------------------- partial


def test_a_gradient_through_lse():
    q, k, v = make_qkv(1, 9, 2, 8, nk=13, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 9, 2, dtype=torch.float64)
    for is_causal in (False, True):
        _, expected = oracle_attention(q, k, v, (13,), (1,), mixing="softmax", is_causal=is_causal)
        wanted = torch.autograd.grad((expected * weight).sum(), (q, k))
        for backend in ("math", "flash"):
            _, lse = attend(q, k, v, is_causal=is_causal, backend=backend)
            got = torch.autograd.grad((lse * weight).sum(), (q, k))
            assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(got, wanted))


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_parts_merge_to_the_whole(cut):
    q, k, v = make_qkv(2, 13, 3, 8, dtype=torch.float64)
    parts = [attend(q, k[:, s], v[:, s]) for s in (slice(cut), slice(cut, None))]
    out, lse = merge(*parts[0], *parts[1])
    expected = attend(q, k, v)
    assert torch.allclose(out, expected[0], atol=1e-14) and torch.allclose(lse, expected[1], atol=1e-14)


def test_backends_say_why_not():
    for device in ("cpu", "cuda", "mps"):
        reasons = available_backends(device)
        assert reasons["math"] is None
        assert all(reason is None or len(reason) > 20 for reason in reasons.values())
    assert available_backends("cpu")["flash"] is None
    assert (
        "not installed" in available_backends("cpu")["flash_attn"] or "CUDA" in available_backends("cpu")["flash_attn"]
    )


def test_auto_tells_what_it_chose(caplog):
    backends._chosen.cache_clear()
    caplog.set_level("INFO", logger="dilated_attention_nb")
    for _ in range(3):
        attend(*make_qkv())
    assert [r.getMessage() for r in caplog.records] == ["backend='auto' uses 'flash' for torch.float32 on cpu"]


# ---------------------------------------------------------------- modules


def modules() -> list[torch.nn.Module]:
    config = DilatedAttentionConfig((8, 16), (1, 2), mixing="softmax", dropout=0.5)
    return [DilatedAttention(config), ImprovedDilatedAttention(config)]


@pytest.mark.parametrize("which", [0, 1])
def test_modules_survive(which):
    "deepcopy, pickling, state_dict, .to(dtype), and a second forward and backward."
    module = modules()[which].eval()
    q, k, v = make_qkv(1, 32, 4, 8, requires_grad=True)
    expected = module(q, k, v, is_causal=True)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(copy.deepcopy(module))):
        assert torch.equal(twin(q, k, v, is_causal=True), expected)
    assert module.state_dict() == {} and not module.load_state_dict({}).missing_keys
    half = module.to(torch.bfloat16)
    assert half(*(x.bfloat16() for x in (q, k, v))).dtype == torch.bfloat16
    grads = [torch.autograd.grad(module(q, k, v).square().sum(), (q, k, v)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("which", [0, 1])
def test_dropout_in_training_only(which):
    module = modules()[which]
    q, k, v = make_qkv(4, 32, 4, 8)
    kept = module.eval()(q, k, v)
    assert torch.equal(kept, module(q, k, v))
    dropped = module.train()(q, k, v)
    zero = dropped == 0
    assert 0.45 < zero.float().mean() < 0.55
    torch.testing.assert_close(dropped[~zero], 2 * kept[~zero])


@pytest.mark.parametrize("which", [DilatedAttention, ImprovedDilatedAttention])
def test_device_and_dtype_of_the_config_are_checked(which):
    module = which(DilatedAttentionConfig((8,), (1,), dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="bfloat16"):
        module(*make_qkv(1, 8))
    module = which(DilatedAttentionConfig((8,), (1,), device="cuda"))
    with pytest.raises(ValueError, match="cuda"):
        module(*make_qkv(1, 8))


def test_tf32_is_set_within_and_put_back():
    fake = type("Fake", (), {"device": torch.device("cuda"), "dtype": torch.float32})()
    matmul = torch.backends.cuda.matmul
    untouched = matmul.fp32_precision
    for before in ("none", "ieee", "tf32"):
        for allowed in (False, True):
            matmul.fp32_precision = before
            inside = matmul.fp32_precision
            with pytest.raises(KeyError), backends.tf32(allowed, fake):
                assert matmul.fp32_precision == ("tf32" if allowed else "ieee")
                raise KeyError
            assert matmul.fp32_precision == inside
    matmul.fp32_precision = untouched


def test_every_option_reaches_the_operator(monkeypatch):
    "Of the function and of the module's config; and the backend, the kernel."
    seen = {}

    def spy(*args):
        names = "q k v mask lengths rates is_causal mixing offsets ragged scale backend use_tf32".split()
        seen.update(zip(names, args))
        return args[0], None

    monkeypatch.setattr(improved, "forward_op", spy)
    q, k, v = make_qkv(1, 16, 4, 8)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    config = dict(mixing="softmax", offsets="interleaved", ragged="mask", use_tf32=False)
    expected = dict(mask=mask, lengths=[8, 4], rates=[2, 1], is_causal=True) | config
    ImprovedDilatedAttention(DilatedAttentionConfig((8, 4), (2, 1), **config))(q, k, v, True, mask)
    assert all(seen[name] is value or seen[name] == value for name, value in expected.items())
    seen.clear()
    config |= dict(is_causal=True, key_padding_mask=mask, scale=0.3, backend="math")
    dilated_attention(q, k, v, (8, 4), (2, 1), **config)
    expected |= dict(scale=0.3, backend="math")
    assert all(seen[name] is value or seen[name] == value for name, value in expected.items())


@pytest.mark.parametrize("path", ["readable-math", "improved-math", "readable", "improved"])
def test_the_backend_that_was_named_computes(path, monkeypatch):
    calls = []
    for name, kernel in list(backends.KERNELS.items()):

        def spied(*args, name=name, kernel=kernel):
            calls.append(name)
            return kernel.forward(*args)

        monkeypatch.setitem(backends.KERNELS, name, dataclasses.replace(kernel, forward=spied))
    PATHS[path](*make_qkv(1, 16, 4, 8), segment_lengths=(8,), dilation_rates=(1,))
    assert set(calls) == {"math" if "math" in path else "flash"}


@pytest.mark.parametrize("path", ["improved", "improved-math"])
def test_scale(path):
    q, k, v = make_qkv(1, 20, 4, 8)
    options = dict(segment_lengths=(5, 20), dilation_rates=(1, 2), mixing="softmax", scale=0.9)
    check_against_oracle(lambda *x: PATHS[path](*x, **options), q, k, v, **options)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(23, 23), (9, 23)])
def test_plain_backend_in_blocks_of_rows(is_causal, shape, monkeypatch):
    monkeypatch.setattr(partial, "_MATH_SCORES", 100)
    held("improved-math", AttentionCase((23,), (1,), is_causal, b=2, nq=shape[0], nk=shape[1], h=2, kv_heads=1))
    held(
        "readable-math", AttentionCase((23, 7), (1, 2), is_causal, "softmax", nq=shape[0], nk=shape[1], h=2, kv_heads=2)
    )


@paths
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_logsumexp_of_exactly_zero_is_no_missing_row(path, is_causal):
    "One key with logit 0 has lse 0, which some systems take for a row without keys."
    q = k = torch.zeros(1, 4, 1, 8)
    v = make_qkv(1, 4, 1, 8)[2]
    options = dict(segment_lengths=(1, 4), dilation_rates=(1, 2), mixing="softmax", is_causal=is_causal)
    check_against_oracle(lambda *x: PATHS[path](*x, **options), q, k, v, **options)
    alone = PATHS[path](q, k, v, segment_lengths=(1,), dilation_rates=(1,), is_causal=is_causal)
    torch.testing.assert_close(alone, v)


@paths
def test_the_papers_heads_all_attend(path):
    "12 heads and 5 branches: none is left at zero."
    q, k, v = make_qkv(1, 48, 12, 8)
    options = dict(segment_lengths=(4, 8, 16, 24, 48), dilation_rates=(1, 2, 4, 6, 12))
    for mixing in ("groups", "softmax"):
        assert PATHS[path](q, k, v, mixing=mixing, **options).any(3).any(1).all()


def test_caches_are_bounded():
    for cache in (masking.tiles, backends._chosen):
        assert 0 < cache.cache_parameters()["maxsize"] <= 1024


def test_no_silent_forward_mode_derivative():
    q, k, v = make_qkv(1, 16, 2, 8, dtype=torch.float64)
    config = DilatedAttentionConfig((8,), (1,))

    def run(f):
        return torch.func.jvp(f, (q,), (torch.ones_like(q),))

    def attends(name, q):
        if name == "dilated_attention":
            return dilated_attention(q, k, v, (8,), (1,)).sum()
        return DilatedAttention(config)(q, k, v).sum() if name == "DilatedAttention" else attend(q, k, v)[0].sum()

    def through_vmap(f):
        return torch.func.jvp(torch.func.vmap(f), (q[None],), (q[None],))

    for name in ("dilated_attention", "DilatedAttention", "attend"):

        def f(q, name=name):
            return attends(name, q)

        for derive in (run, lambda f: torch.func.hessian(f)(q), through_vmap):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                derive(f)
        with fwAD.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            f(fwAD.make_dual(q, q))
        run(lambda q, f=f: f(k) * q)  # nobody asks for derivatives of what is constant
        torch.func.vmap(torch.func.grad(f))(q[None])
    module = DilatedAttention(DilatedAttentionConfig((8,), (1,)), "math")
    assert run(lambda q: module(q, k, v))[1].abs().max() > 0


def test_second_derivatives_are_refused_where_there_are_none():
    q, k, v = make_qkv(1, 16, 2, 8, requires_grad=True, dtype=torch.float64)
    given = dict(segment_lengths=(8,), dilation_rates=(2,))
    (dq,) = torch.autograd.grad(dilated_attention(q, k, v, **given).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative; use DilatedAttention\(config, 'math'\)"):
        dq.sum().backward()
    plain = DilatedAttention(DilatedAttentionConfig(**given), "math")
    (other,) = torch.autograd.grad(plain(q, k, v).square().sum(), q, create_graph=True)
    other.sum().backward()
    assert torch.allclose(dq, other) and q.grad.isfinite().all()


def test_second_derivative_at_ties():
    "Two equal halves, merged, have the derivatives of the whole."
    q, k, v = make_qkv(1, 4, 1, 8, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in (torch.zeros_like(q), torch.cat([k, k], 1), torch.cat([v, v], 1)))

    def halves():
        return merge(*(y for s in (slice(4), slice(4, 8)) for y in attend(q, k[:, s], v[:, s], backend="math")))[1]

    def second(lse):
        (first,) = torch.autograd.grad(lse.square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum() + first.sum(), q)[0]

    assert torch.allclose(second(halves()), second(attend(q, k, v, backend="math")[1]), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_gradients_through_lse_in_half_precision(dtype):
    q, k, v = make_qkv(1, 32, 2, 64, dtype=dtype, requires_grad=True)
    got, wanted = (
        torch.autograd.grad((attend(q, k, v, backend=b)[1] * 65536.0).mean() * 8, q)[0].float()
        for b in ("flash", "math")
    )
    assert got.isfinite().all() and (got - wanted).norm() <= 4 * torch.finfo(dtype).eps * wanted.norm()


def test_a_head_dim_that_leaves_no_room_for_lse_is_refused(monkeypatch):
    q, k, v = make_qkv(1, 8, 1, 8, requires_grad=True)
    kernel = backends.KERNELS["flash"]
    narrow = dataclasses.replace(kernel, obstacle=lambda device, dtype, d, masked: "too wide" if d > 8 else None)
    monkeypatch.setitem(backends.KERNELS, "flash", narrow)
    backends._chosen.cache_clear()
    out, lse = attend(q, k, v, backend="flash")
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True))
    with pytest.raises(ValueError, match="too wide"):
        torch.autograd.grad(lse.sum(), q)
    backends._chosen.cache_clear()


@pytest.mark.parametrize("path", ["readable", "improved"])
def test_meta_tensors_have_shapes(path):
    q, k, v = (x.to("meta") for x in make_qkv(1, 16, 4, 8))
    options = dict(segment_lengths=(8,), dilation_rates=(2,))
    out = PATHS["readable-math" if path == "readable" else path](q, k, v, **options)
    assert out.device.type == "meta" and out.shape == q.shape


@pytest.mark.parametrize("which", [0, 1])
def test_many_threads_through_one_module(which):
    module = modules()[which].eval()
    inputs = [make_qkv(1, 64, 4, 8, seed=i) for i in range(8)]
    expected = [module(*x) for x in inputs]
    wrong = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(module(*inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_autocast_like_torch():
    q, k, v = make_qkv(1, 32, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = dilated_attention(q, k, v, (8,), (1,))
        mixed = dilated_attention(q, k.bfloat16(), v, (8,), (1,))
        double = dilated_attention(q.double(), k.double(), v.double(), (8,), (1,), backend="math")
        alike = PATHS["readable"](q, k.bfloat16(), v, segment_lengths=(8,), dilation_rates=(1,))
        checked = ImprovedDilatedAttention(DilatedAttentionConfig((8,), (1,), dtype=torch.bfloat16))(q, k, v)
    assert out.dtype == mixed.dtype == alike.dtype == checked.dtype == torch.bfloat16 and double.dtype == torch.float64
    rounding = 2 * torch.finfo(torch.bfloat16).eps * float(v.abs().max())  # of the weights, and of what they sum to
    torch.testing.assert_close(alike, mixed, atol=rounding, rtol=0)
    assert torch.equal(out, dilated_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), (8,), (1,)))
    exact = dilated_attention(q.double(), k.double(), v.double(), (8,), (1,), backend="math")
    assert torch.equal(double, exact)


# ---------------------------------------------------------------- what is saved


@pytest.mark.parametrize("mixing", ["groups", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_for_backward_is_q_k_v_out_lse(mixing, dtype):
    q, k, v = make_qkv(2, 64, 4, 16, dtype=dtype, requires_grad=True)
    branches = ((16, 64), (1, 2))
    saved = saved_for_backward(lambda *x: dilated_attention(*x, *branches, mixing=mixing), q, k, v)
    lse = 2 * 64 * 4 * 4
    assert saved.num_bytes == 4 * q.numel() * q.element_size() + lse
    assert len(saved.tensors) == 5


def test_readable_form_saves_more():
    q, k, v = make_qkv(1, 64, 4, 16, requires_grad=True)
    config = DilatedAttentionConfig((16, 64), (1, 2), mixing="softmax")
    lean, rich = (
        saved_for_backward(module(config), q, k, v) for module in (ImprovedDilatedAttention, DilatedAttention)
    )
    assert rich.num_bytes > 2 * lean.num_bytes


# ---------------------------------------------------------------- compile


@pytest.mark.parametrize("mixing", ["groups", "softmax"])
def test_compiles_whole_with_few_recompilations(mixing):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    module = ImprovedDilatedAttention(DilatedAttentionConfig((16, 32), (1, 2), mixing=mixing))
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for n in (64, 96, 128, 160, 192, 224, 256, 320):
        q, k, v = make_qkv(1, n, 4, 16, requires_grad=True)
        out, expected = compiled(q, k, v, is_causal=True), module(q, k, v, is_causal=True)
        assert torch.equal(out, expected)
        got, wanted = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, wanted))
    assert counter.frame_count <= 3  # the first compilation and at most two more


def test_the_readable_form_compiles_too():
    "Whole, and for each length anew: its loops are unrolled. Use the improved form where lengths change."
    torch._dynamo.reset()
    module = DilatedAttention(DilatedAttentionConfig((16, 32), (1, 2), mixing="softmax"))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for n in (32, 64):
        q, k, v = make_qkv(1, n, 4, 16)
        assert torch.allclose(compiled(q, k, v, is_causal=True), module(q, k, v, is_causal=True), atol=1e-6)


def test_operator_is_registered_soundly():
    q, k, v = make_qkv(1, 24, 4, 8, kv_heads=2, requires_grad=True)
    mask = torch.zeros(1, 24, dtype=torch.bool)
    for padding in (None, mask):
        args = (q, k, v, padding, [8, 24], [1, 2], True, "softmax", "blocked", "error", 8**-0.5, "auto", True)
        torch.library.opcheck(improved.forward_op, args)


def test_export():
    module = ImprovedDilatedAttention(DilatedAttentionConfig((8,), (2,), ragged="mask"))
    q, k, v = make_qkv(1, 40, 4, 8)
    exported = torch.export.export(module, (q, k, v))
    assert torch.equal(exported.module()(q, k, v), module(q, k, v))


# ---------------------------------------------------------------- bad input


def qkv(**change):
    base = dict(zip("qkv", make_qkv(2, 32, 4, 8)))
    base |= dict(segment_lengths=(8, 16), dilation_rates=(1, 2))
    return base | change


def shaped(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


GOOD = (2, 32, 4, 8)
BAD = [  # what is passed, the error, what its text names
    (dict(q=None), TypeError, ["q", "NoneType"]),
    (dict(q=[[1.0]]), TypeError, ["q", "list"]),
    (dict(v=np.zeros(GOOD)), TypeError, ["v", "ndarray"]),
    (dict(q=shaped(32, 4, 8)), ValueError, ["q", "4 dimensions", "3"]),
    (dict(q=shaped(8)), ValueError, ["q", "4 dimensions"]),
    (dict(k=shaped(1, *GOOD)), ValueError, ["k", "4 dimensions", "5"]),
    (dict(q=shaped(*GOOD, dtype=torch.int64)), TypeError, ["q", "int64"]),
    (dict(k=shaped(*GOOD, dtype=torch.bool)), TypeError, ["k", "bool"]),
    (dict(v=shaped(*GOOD, dtype=torch.complex64)), TypeError, ["v", "complex64"]),
    (dict(q=shaped(*GOOD, dtype=torch.float8_e4m3fn)), TypeError, ["q", "float8"]),
    (dict(q=shaped(*GOOD).to_sparse()), TypeError, ["q", "dense", "sparse_coo"]),
    (dict(k=torch.nested.nested_tensor([shaped(32, 4, 8)] * 2)), TypeError, ["k", "dense", "nested"]),
    (dict(k=shaped(*GOOD, dtype=torch.float64)), TypeError, ["k", "float64", "float32"]),
    (dict(v=shaped(*GOOD, dtype=torch.bfloat16)), TypeError, ["v", "bfloat16"]),
    (dict(k=shaped(*GOOD, device="meta")), ValueError, ["k", "meta", "cpu"]),
    (dict(q=shaped(2, 0, 4, 8)), ValueError, ["q", "size 0"]),
    (dict(q=shaped(0, 32, 4, 8), k=shaped(0, 32, 4, 8), v=shaped(0, 32, 4, 8)), ValueError, ["q", "size 0"]),
    (dict(q=shaped(2, 32, 4, 0)), ValueError, ["q", "size 0"]),
    (dict(k=shaped(3, 32, 4, 8)), ValueError, ["k", "batch"]),
    (dict(k=shaped(2, 32, 4, 16), v=shaped(2, 32, 4, 16)), ValueError, ["k", "head_dim"]),
    (dict(v=shaped(2, 48, 4, 8)), ValueError, ["v", "(2, 32, 4, 8)", "(2, 48, 4, 8)"]),
    (dict(v=shaped(2, 32, 2, 8)), ValueError, ["v", "shape"]),
    (dict(k=shaped(2, 32, 3, 8), v=shaped(2, 32, 3, 8)), ValueError, ["k", "divides", "3"]),
    (dict(k=shaped(2, 32, 8, 8), v=shaped(2, 32, 8, 8)), ValueError, ["k", "divides", "8"]),
    (dict(q=shaped(2, 48, 4, 8)), ValueError, ["q", "48 queries for 32 keys"]),
    (dict(segment_lengths=()), ValueError, ["segment_lengths"]),
    (dict(segment_lengths=(), dilation_rates=()), ValueError, ["segment_lengths"]),
    (dict(segment_lengths=8), TypeError, ["segment_lengths", "list or tuple"]),
    (dict(segment_lengths="8"), TypeError, ["segment_lengths"]),
    (dict(segment_lengths=(8,)), ValueError, ["segment_lengths", "dilation_rates", "(8,)", "(1, 2)"]),
    (dict(dilation_rates=(1, 2, 4)), ValueError, ["dilation_rates", "(1, 2, 4)"]),
    (dict(segment_lengths=(0, 16)), ValueError, ["segment_lengths[0]", "0"]),
    (dict(segment_lengths=(8, -16)), ValueError, ["segment_lengths[1]", "-16"]),
    (dict(segment_lengths=(True, 16)), TypeError, ["segment_lengths[0]", "True"]),
    (dict(segment_lengths=(8.0, 16)), TypeError, ["segment_lengths[0]", "8.0"]),
    (dict(segment_lengths=(8, math.nan)), TypeError, ["segment_lengths[1]", "nan"]),
    (dict(segment_lengths=(8, None)), TypeError, ["segment_lengths[1]", "None"]),
    (dict(segment_lengths=(2**63, 16), ragged="mask"), ValueError, ["segment_lengths", "2**48"]),
    (dict(dilation_rates=(2**62, 1)), ValueError, ["dilation_rates", "2**48"]),
    (dict(dilation_rates=(0, 1)), ValueError, ["dilation_rates[0]", "0"]),
    (dict(dilation_rates=(1, -2)), ValueError, ["dilation_rates[1]", "-2"]),
    (dict(dilation_rates=(1, 2.5)), TypeError, ["dilation_rates[1]", "2.5"]),
    (dict(dilation_rates=(1, False)), TypeError, ["dilation_rates[1]", "False"]),
    (dict(dilation_rates=None), TypeError, ["dilation_rates", "None"]),
    (dict(mixing="group"), ValueError, ["mixing", "group", "groups"]),
    (dict(mixing=None), TypeError, ["mixing", "None"]),
    (dict(offsets="block"), ValueError, ["offsets", "blocked"]),
    (dict(offsets=0), TypeError, ["offsets", "0"]),
    (dict(ragged="pad"), ValueError, ["ragged", "pad"]),
    (dict(ragged=True), TypeError, ["ragged", "True"]),
    (dict(backend="flashy"), ValueError, ["backend", "flashy", "flash"]),
    (dict(backend=None), TypeError, ["backend", "None"]),
    (dict(backend="cudnn"), ValueError, ["backend", "cudnn", "CUDA", "flash"]),
    (dict(backend="efficient"), ValueError, ["backend", "efficient", "CUDA"]),
    (dict(backend="flash_attn"), ValueError, ["backend", "flash_attn", "not installed"]),
    (dict(is_causal=1), TypeError, ["is_causal", "1"]),
    (dict(is_causal=None), TypeError, ["is_causal", "None"]),
    (dict(use_tf32="yes"), TypeError, ["use_tf32", "yes"]),
    (dict(scale=0.0), ValueError, ["scale", "0"]),
    (dict(scale=-1.0), ValueError, ["scale", "-1"]),
    (dict(scale=math.nan), ValueError, ["scale", "nan"]),
    (dict(scale=math.inf), ValueError, ["scale", "inf"]),
    (dict(scale="1"), TypeError, ["scale", "1"]),
    (dict(scale=True), TypeError, ["scale", "True"]),
    (dict(segment_lengths=(8, 24)), ValueError, ["32", "24", "ragged='mask'", "pad to 48", "cut to 24"]),
    (dict(segment_lengths=(8, 64)), ValueError, ["32", "64", "ragged='mask'", "pad to 64"]),
    (dict(segment_lengths=(5, 16)), ValueError, ["32", "5", "pad to 80"]),
    (dict(segment_lengths=(8,) * 5, dilation_rates=(1,) * 5), ValueError, ["num_heads", "4", "5", "softmax"]),
    (dict(key_padding_mask=shaped(2, 31, dtype=torch.bool)), ValueError, ["key_padding_mask", "(2, 32)", "(2, 31)"]),
    (dict(key_padding_mask=shaped(32, dtype=torch.bool)), ValueError, ["key_padding_mask", "(2, 32)"]),
    (dict(key_padding_mask=shaped(2, 32)), TypeError, ["key_padding_mask", "bool", "float32"]),
    (dict(key_padding_mask=shaped(2, 32, dtype=torch.uint8)), TypeError, ["key_padding_mask", "bool", "uint8"]),
    (dict(key_padding_mask=[[True]]), TypeError, ["key_padding_mask", "list"]),
    (dict(key_padding_mask=shaped(2, 32, dtype=torch.bool, device="meta")), ValueError, ["key_padding_mask", "meta"]),
]
assert len(BAD) >= 60


@pytest.mark.parametrize(("change", "error", "texts"), BAD, ids=lambda x: "-".join(x) if isinstance(x, dict) else None)
def test_bad_input_is_explained(change, error, texts):
    arguments = qkv(**change)
    dense = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and not (x.is_sparse or x.is_nested)}
    before = {name: x.clone() for name, x in dense.items() if x.device.type != "meta"}
    with pytest.raises(error) as caught:
        dilated_attention(**arguments)
    message = str(caught.value)
    assert all(text in message for text in texts), message
    assert len(message) < 400 and "\n" not in message
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


CONFIG_FIELDS = {"segment_lengths", "dilation_rates", "mixing", "offsets", "ragged"}


@pytest.mark.parametrize("module", [DilatedAttention, ImprovedDilatedAttention])
@pytest.mark.parametrize(("change", "error", "texts"), BAD, ids=lambda x: "-".join(x) if isinstance(x, dict) else None)
def test_modules_explain_too(module, change, error, texts):
    if set(change) & {"scale", "use_tf32", "backend"}:
        pytest.skip("not an argument of the modules' forward")
    arguments = qkv(**change)
    with pytest.raises(error) as caught:
        config = DilatedAttentionConfig(**{x: arguments.pop(x) for x in CONFIG_FIELDS & set(arguments)})
        module(config)(**arguments)
    assert all(text in str(caught.value) for text in texts), str(caught.value)


@pytest.mark.parametrize("dropout", [1.0, 1.5, -0.1, math.nan, "0.1", True, None])
def test_bad_dropout(dropout):
    with pytest.raises((TypeError, ValueError), match="dropout"):
        DilatedAttentionConfig((8,), (1,), dropout=dropout)


@pytest.mark.parametrize("config", [None, {"segment_lengths": (8,), "dilation_rates": (1,)}, (8,)])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(TypeError, match="config must be a DilatedAttentionConfig, got"):
        DilatedAttention(config)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(dict(device="gpu"), ValueError), (dict(device=0), TypeError), (dict(dtype=torch.int8), ValueError)],
)
def test_backends_of_no_device_or_dtype(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        available_backends(**arguments)


def test_readable_backend_is_checked():
    with pytest.raises(ValueError, match="backend"):
        DilatedAttention(DilatedAttentionConfig((8,), (1,)), backend="flashy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(backends.KERNELS))
def test_every_kernel_that_can_be_had_is_within_the_budget(name, dtype):
    "On a GPU if there is one: forward and backward, causal and padded, against the oracle."
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := available_backends(device.type)[name]:
        pytest.skip(reason)
    q, k, v = make_qkv(2, 48, 4, 64, kv_heads=2, dtype=dtype, device=device)
    mask = torch.zeros(2, 48, dtype=torch.bool, device=device)
    mask[1, 40:] = True
    paddings = [x for x in (None, mask) if not backends.KERNELS[name].obstacle(device, dtype, 64, x is not None)]
    if not paddings:
        pytest.skip(f"{name} has no {dtype}")
    for padding in paddings:
        for is_causal in (True, False):
            options = dict(is_causal=is_causal, mixing="softmax", key_padding_mask=padding)
            path = lambda *x, o=options: dilated_attention(*x, (16, 48), (1, 3), backend=name, **o)  # noqa: E731
            check_against_oracle(path, q, k, v, (16, 48), (1, 3), **options)
