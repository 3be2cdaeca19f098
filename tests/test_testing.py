"The oracle against the authors' numbers and against itself; budgets, leak checks, drawn cases, processes."

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given

from dilated_attention_nb import testing
from dilated_attention_nb.testing import (
    AttentionCase,
    assert_batch_independent,
    assert_causal,
    assert_within_budget,
    attends,
    attention_cases,
    branches_of_head,
    check_against_oracle,
    error_budget,
    make_qkv,
    oracle_attention,
    oracle_counts,
    plain_attention,
    saved_for_backward,
)

GOLDEN = np.load(Path(__file__).parent / "golden" / "longnet_attention.npz")
GOLDEN_CASES = json.loads(GOLDEN["meta"].tobytes())
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------- who sees whom


def grid(*rows: str) -> list[list[int]]:
    return [[0 if c == "." else int(c) for c in row.replace(" ", "")] for row in rows]


@pytest.mark.parametrize(
    ("branch", "is_causal", "rows"),
    [
        ((4, 1, 0), False, ("1 1 1 1 . .",) * 4 + (". . . . 1 1",) * 2),
        (
            (4, 2, 1),
            False,
            (". . . . . .", ". 1 . 1 . .", ". . . . . .", ". 1 . 1 . .", ". . . . . .", ". . . . . 1"),
        ),
        (
            (6, 3, 0),
            True,
            ("1 . . . . .", ". . . . . .", ". . . . . .", "1 . . 1 . .", ". . . . . .", ". . . . . ."),
        ),
        # the grid starts anew in each segment when r does not divide w
        (
            (3, 2, 0),
            False,
            ("1 . 1 . . .", ". . . . . .", "1 . 1 . . .", ". . . 1 . 1", ". . . . . .", ". . . 1 . 1"),
        ),
        ((2, 5, 3), False, (". . . . . .",) * 6),  # an offset beyond the segment: nobody
    ],
)
def test_drawn_masks(branch, is_causal, rows):
    w, r, s = branch
    assert [[int(attends(i, j, w, r, s, is_causal)) for j in range(6)] for i in range(6)] == grid(*rows)


@pytest.mark.parametrize(
    ("heads", "rates", "expected"),
    [
        (12, (1, 2, 4, 6, 12), [0] * 3 + [1] * 3 + [2] * 2 + [3] * 2 + [4] * 2),
        (5, (1, 2), [0, 0, 0, 1, 1]),
        (2, (1, 2), [0, 1]),
    ],
)
def test_groups_are_contiguous_and_the_first_are_larger(heads, rates, expected):
    taken = [branches_of_head(h, heads, rates) for h in range(heads)]
    assert [branches[0][0] for branches in taken] == expected
    assert all(branches == [(g, g % rates[g])] for branches, g in zip(taken, expected))


def test_offsets_of_softmax_heads():
    blocked = [branches_of_head(h, 6, (4,), "softmax", "blocked")[0][1] for h in range(6)]
    interleaved = [branches_of_head(h, 6, (4,), "softmax", "interleaved")[0][1] for h in range(6)]
    assert blocked == [0, 0, 1, 1, 2, 2] and interleaved == [0, 1, 2, 3, 0, 1]


def test_counts_by_hand():
    counts, zeros = oracle_counts(4, 4, 2, (2, 4), (1, 2), mixing="softmax", is_causal=True)
    assert counts[0].tolist() == grid("2...", "11..", "1.2.", "..11")
    assert counts[1].tolist() == grid("1...", "12..", "..1.", ".112")
    assert not zeros.any()


def test_zero_keys_by_hand():
    # w = 4 and r = 2: grids of two places; segments 0..3, 4..6
    counts, zeros = oracle_counts(7, 7, 2, (4,), (2,), mixing="softmax", ragged="zeros")
    assert zeros.tolist() == [[0] * 7, [0, 0, 0, 0, 0, 1, 0]]
    assert counts[1, 5].tolist() == [0, 0, 0, 0, 0, 1, 0]
    assert not oracle_counts(7, 7, 2, (4,), (2,), mixing="softmax", ragged="zeros", is_causal=True)[1].any()


def test_zero_keys_of_shifted_rows_by_hand():
    # w = 4 and r = 3: segments of 6 places, so rows 0..5 show places 0..5 of tokens 0..3, and row 6 shows token 4
    options = dict(mixing="softmax", ragged="zeros")
    counts, zeros = oracle_counts(7, 7, 3, (4,), (3,), **options)
    assert zeros.tolist() == [[0, 0, 0, 0, 0, 0, 1], [0, 1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1, 0]]
    assert counts[1, 4].tolist() == [0, 1, 0, 0, 0, 0, 0] and counts[0, 6].tolist() == [0, 0, 0, 0, 1, 0, 0]
    # causal: a place of padding sees its own zero key
    zeros = oracle_counts(7, 7, 3, (4,), (3,), **options, is_causal=True)[1]
    assert zeros.tolist() == [[0] * 7, [0, 0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0]]


def test_a_segment_longer_than_the_sequence_is_the_sequence():
    for ragged in ("mask", "zeros"):
        long, short = (oracle_counts(5, 5, 2, (w,), (2,), mixing="softmax", ragged=ragged) for w in (99, 5))
        assert all(torch.equal(a, b) for a, b in zip(long, short))


@given(case=attention_cases(max_length=14))
def test_fewer_queries_are_the_last_rows(case):
    options = case.options()
    del options["key_padding_mask"]
    last, whole = (oracle_counts(nq, case.nk, case.h, **options) for nq in (case.nq, case.nk))
    assert all(torch.equal(a, b[:, -case.nq :]) for a, b in zip(last, whole))


def test_cached_masks_are_not_handed_out():
    counts, _ = oracle_counts(4, 4, 1, (4,), (1,))
    counts += 7
    assert oracle_counts(4, 4, 1, (4,), (1,))[0].max() == 1
    assert testing._branch_mask.cache_info().maxsize == 128


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(mixing="sum"), "mixing"),
        (dict(offsets="none"), "offsets"),
        (dict(ragged="pad"), "ragged"),
        (dict(nk=7), "multiple of segment length 4"),
        (dict(nq=9), "nk"),
        (dict(nq=0), "nq"),
        (dict(num_heads=1), "num_heads"),
        (dict(dilation_rates=(1,)), "dilation_rates"),
    ],
)
def test_bad_options_are_refused(change, words):
    good = dict(nq=8, nk=8, num_heads=2, segment_lengths=(4, 8), dilation_rates=(1, 2))
    if "nk" in change:
        good["nq"] = 1
    with pytest.raises(ValueError, match=words):
        oracle_counts(**{**good, **change})


# ---------------------------------------------------------------- the oracle


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: str(case["index"]))
def test_oracle_reproduces_the_authors(case):
    q, k, v, theirs = (torch.from_numpy(GOLDEN[f"{case['index']}.{name}"]) for name in ("q", "k", "v", "out"))
    exact = all(case["length"] % w == 0 for w in case["segment_lengths"])
    branches = case["segment_lengths"], case["dilation_rates"]
    for ragged in ("error", "mask", "zeros") if exact else ("zeros", "mask") if case["is_causal"] else ("zeros",):
        out, _ = oracle_attention(q, k, v, *branches, is_causal=case["is_causal"], mixing="softmax", ragged=ragged)
        assert out.dtype == torch.float64 and (out - theirs).abs().max() < 1e-6
    if not exact and not case["is_causal"]:
        out, _ = oracle_attention(q, k, v, *branches, mixing="softmax", ragged="mask")
        assert (out - theirs).norm() > 0.1 * theirs.norm()
    out, _ = oracle_attention(q, k, v, *branches, mixing="softmax", ragged="zeros", offsets="interleaved")
    assert (out - theirs).abs().max() > 1e-2  # the offsets matter


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_one_branch_over_everything_is_full_attention(is_causal, kv_heads):
    q, k, v = make_qkv(2, 6, 4, 8, kv_heads, torch.float64, nk=9)
    out, lse = oracle_attention(q, k, v, (9,), (1,), is_causal=is_causal, scale=0.3)
    mask = torch.ones(6, 9, dtype=torch.bool).tril(3) if is_causal else None
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    theirs = torch.nn.functional.scaled_dot_product_attention(qt, kt, vt, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, theirs.transpose(1, 2))
    assert lse.shape == (2, 6, 4) and lse.isfinite().all()


@pytest.mark.parametrize("mixing", ["groups", "softmax"])
def test_zero_keys_are_padding_with_zeros(mixing):
    "ragged='zeros' is what comes out when the sequence is really padded with zeros to a multiple of every segment."
    branches, n = ((4, 8), (2, 4)), 13
    q, k, v = make_qkv(1, n, 4, 8, dtype=torch.float64)
    padded = [torch.cat([x, x.new_zeros(1, 3, 4, 8)], dim=1) for x in (q, k, v)]
    ours, our_lse = oracle_attention(q, k, v, *branches, mixing=mixing, ragged="zeros")
    theirs, their_lse = oracle_attention(*padded, *branches, mixing=mixing, ragged="error")
    torch.testing.assert_close(ours, theirs[:, :n])
    torch.testing.assert_close(our_lse, their_lse[:, :n])


def test_padding_at_the_end_is_a_shorter_sequence():
    branches, options = ((4, 8), (1, 2)), dict(mixing="softmax", ragged="mask")
    q, k, v = make_qkv(1, 11, 2, 8, dtype=torch.float64)
    mask = torch.arange(11)[None] >= 7
    out, lse = oracle_attention(q, k, v, *branches, key_padding_mask=mask, **options)
    short, short_lse = oracle_attention(q[:, :7], k[:, :7], v[:, :7], *branches, **options)
    torch.testing.assert_close(out[:, :7], short)
    torch.testing.assert_close(lse[:, :7], short_lse)


@given(case=attention_cases(max_length=14))
def test_rows_without_keys(case):
    "out 0 and lse -inf where the counts are empty, finite elsewhere; gradients are finite everywhere."
    q, k, v = (x.double().requires_grad_() for x in case.qkv())
    options = case.options()
    out, lse = oracle_attention(q, k, v, **options)
    mask = options.pop("key_padding_mask")
    counts, zeros = oracle_counts(case.nq, case.nk, case.h, **options)
    seen = counts[None].expand(case.b, -1, -1, -1).clone()
    if mask is not None:
        seen *= ~mask[:, None, None]
    empty = ((seen.sum(-1) + zeros) == 0).transpose(1, 2)
    assert torch.equal(lse == -math.inf, empty) and not out[empty].any() and lse[~empty].isfinite().all()
    grads = torch.autograd.grad(out.sum() + lse[~empty].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)


def test_large_logits_stay_finite():
    q, k, v = make_qkv(1, 8, 2, 8, dtype=torch.float64)
    for sign in (1e4, -1e4):
        out, lse = oracle_attention(sign * q, k.abs(), v, (8,), (1,), scale=1.0)
        assert out.isfinite().all() and lse.isfinite().all()


def test_oracle_gradcheck():
    q, k, v = make_qkv(1, 5, 2, 2, kv_heads=1, dtype=torch.float64, requires_grad=True, nk=6)

    def fn(q, k, v):
        out, lse = oracle_attention(q, k, v, (3, 6), (1, 2), is_causal=True, mixing="groups")
        return out, lse[lse.isfinite()]

    assert torch.autograd.gradcheck(fn, (q, k, v))


# ---------------------------------------------------------------- budgets


class FlashLike(torch.autograd.Function):
    """How fast paths work, in plain torch: parts with float32 sums, merged by their lse; one joint backward.

    Rounds to the dtype where kernels do: weights before each product, the output, every branch's gradient.
    """

    @staticmethod
    def forward(ctx, q, k, v, masks, divisor, scale, wrong):
        sums = torch.float64 if q.dtype == torch.float64 else torch.float32
        keys, values = (testing._repeat_heads(x, q.shape[2]).to(sums) for x in (k, v))
        logits = torch.einsum("bihd,bjhd->bhij", q.to(sums), keys) * scale
        out, lse = torch.zeros_like(q.transpose(1, 2), dtype=sums), torch.full(logits.shape[:3], -math.inf, dtype=sums)
        for mask in masks:
            seen = logits.masked_fill(~mask, -math.inf)
            part_lse = seen.logsumexp(-1)
            peak = seen.amax(-1, keepdim=True).clamp(min=-1e30)
            terms = torch.exp(seen - peak)
            weights = terms.to(q.dtype).to(sums)
            part = torch.einsum("bhij,bjhd->bhid", weights, values) / terms.sum(-1, keepdim=True).clamp(min=1e-30)
            joint = torch.logaddexp(lse, part_lse)
            safe = joint.masked_fill(joint == -math.inf, 0)
            a, b = torch.exp(lse - safe)[..., None], torch.exp(part_lse - safe)[..., None]
            out, lse = a * out + b * part.to(q.dtype).to(sums), joint
        out = (out / divisor).transpose(1, 2).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = masks, divisor, scale, wrong, sums
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        masks, divisor, scale, wrong, sums = ctx.rest
        keys, values = (testing._repeat_heads(x, q.shape[2]).to(sums) for x in (k, v))
        logits = torch.einsum("bihd,bjhd->bhij", q.to(sums), keys) * scale
        safe = lse.masked_fill(lse == -math.inf, 0)[..., None]
        rowsum = torch.einsum("bihd,bihd->bhi", dout.to(sums), out.to(sums))[..., None]
        if wrong == "no rowsum":
            rowsum = 0 * rowsum
        dout = (dout / divisor).to(sums)
        dq, dk, dv = 0, 0, 0
        for mask in masks:
            weights = torch.exp(logits.masked_fill(~mask, -math.inf) - safe)
            ds = weights * (torch.einsum("bihd,bjhd->bhij", dout, values) - rowsum) * scale
            weights, ds = (x.to(q.dtype).to(sums) for x in (weights, ds))
            dq = dq + torch.einsum("bhij,bjhd->bihd", ds, keys).to(q.dtype)
            dk = dk + torch.einsum("bhij,bihd->bjhd", ds, q.to(sums)).to(q.dtype)
            dv = dv + torch.einsum("bhij,bihd->bjhd", weights, dout).to(q.dtype)
        dk, dv = (x.unflatten(2, (k.shape[2], -1)).sum(3) for x in (dk, dv))
        if wrong == "dk + dv":
            dk = dk + dv
        return dq, dk, dv, None, None, None, None


def flash_like(case: AttentionCase, wrong: str = ""):
    "The function under test, and its branches' masks, for any case without zero keys."
    options = case.options()
    padding, rates = options["key_padding_mask"], case.dilation_rates
    masks: list[torch.Tensor] = []
    for g, (w, r) in enumerate(zip(case.segment_lengths, rates)):
        rows = []
        for head in range(case.h):
            offsets = dict(branches_of_head(head, case.h, rates, case.mixing, case.offsets))
            size = (case.nq, case.nk, min(w, case.nk), r)
            mask = testing._branch_mask(*size, offsets.get(g, 0), case.is_causal)
            rows.append(mask if g in offsets else torch.zeros_like(mask))
        seen = torch.stack(rows)[None]
        masks.append(seen if padding is None else seen & ~padding[:, None, None])
    divisor = len(masks) if case.mixing == "groups" and wrong != "no division" else 1
    scale = case.d**-0.5 * (1.05 if wrong == "scale" else 1.0)
    if wrong == "first branch only":
        masks = masks[:1]
    return lambda q, k, v: FlashLike.apply(q, k, v, masks, divisor, scale, wrong)


@given(case=attention_cases(max_length=24).filter(lambda case: case.ragged != "zeros"))
def test_honest_rounding_stays_within_budget(case):
    used = check_against_oracle(flash_like(case), *case.qkv(), **case.options())
    assert set(used) == {"out", "dq", "dk", "dv"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", ["scale", "no rowsum", "dk + dv", "no division", "first branch only"])
def test_wrong_versions_are_caught(wrong, dtype):
    mixing = "groups" if wrong == "no division" else "softmax"
    case = AttentionCase((8, 16, 48), (1, 2, 4), True, mixing, b=2, nq=48, nk=48, h=4, kv_heads=2, d=16, dtype=dtype)
    assert max(check_against_oracle(flash_like(case), *case.qkv(), **case.options()).values()) < 0.6
    with pytest.raises(AssertionError, match=r"^(out|dq|dk|dv)\[.*got .*, should be .*allowed"):
        check_against_oracle(flash_like(case, wrong), *case.qkv(), **case.options())


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_attention_uses_at_most_half(dtype):
    counts, zeros = oracle_counts(24, 24, 4, (8, 24), (1, 3), mixing="softmax")

    def plain(q, k, v):
        return plain_attention(q, k, v, counts, zeros)

    used = check_against_oracle(plain, *make_qkv(2, 24, 4, dtype=dtype), (8, 24), (1, 3), mixing="softmax")
    assert max(used.values()) <= 0.5


def test_the_rounding_part_stays_small():
    "For halves, the budget on ordinary inputs is at most a few times 2 x (error of plain attention)."
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = make_qkv(2, 64, 4, 16, dtype=dtype)
        exact, _ = oracle_attention(q, k, v, (64,), (1,))
        plain = plain_attention(q, k, v, *oracle_counts(64, 64, 4, (64,), (1,)))
        budget = error_budget(exact, plain, terms=64 + 16)
        assert budget.max() < 6 * (plain.double() - exact).abs().max()


def test_budget_messages():
    exact = torch.zeros(2, 3, dtype=torch.float64)
    good = torch.zeros(2, 3)
    assert assert_within_budget(good, exact, good) == 0
    for bad, words in [
        (good.index_fill(1, torch.tensor([1]), 0.5), r"dq\[0, 1\]: got 0.5, should be 0; .* 2 of 6 entries"),
        (good.index_fill(1, torch.tensor([2]), math.nan), r"dq\[0, 2\]: got nan"),
        (good.index_fill(1, torch.tensor([2]), math.inf), r"dq\[0, 2\]: got inf"),
        (good.double(), "dq: got torch.float64"),
        (good[:1], r"got torch.float32 \(1, 3\), should be torch.float32 \(2, 3\)"),
    ]:
        with pytest.raises(AssertionError, match=words):
            assert_within_budget(bad, exact, good, name="dq")


def test_make_qkv():
    q, k, v = make_qkv(2, 3, 4, 8, 2, torch.bfloat16, seed=5, requires_grad=True, nk=7)
    assert q.shape == (2, 3, 4, 8) and k.shape == v.shape == (2, 7, 2, 8)
    assert all(x.requires_grad and x.is_leaf and x.dtype == torch.bfloat16 for x in (q, k, v))
    exact = make_qkv(2, 3, 4, 8, 2, torch.float64, seed=5, nk=7)
    assert all(torch.equal(x, y.to(torch.bfloat16)) for x, y in zip((q, k, v), exact))


# ---------------------------------------------------------------- leaks


def oracle(q, k, v, **options):
    return oracle_attention(q, k, v, (4, 16), (1, 2), mixing="softmax", is_causal=True, ragged="mask", **options)[0]


@pytest.mark.parametrize("t", [1, 5, 15])
def test_causal_attention_passes(t):
    assert_causal(oracle, *make_qkv(2, 16, 2, kv_heads=1), t)
    if t > 10:
        assert_causal(oracle, *make_qkv(2, 6, 2, kv_heads=1, nk=16), t)


class LeaksBackward(torch.autograd.Function):
    "Identity whose gradient reaches one position too far."

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + 1e-6 * grad.roll(1, dims=1)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_leaks_are_found(name):
    def wrapped(change):
        def fn(**inputs):
            return oracle(**{**inputs, name: change(inputs[name])})

        return lambda q, k, v: fn(q=q, k=k, v=v)

    qkv = make_qkv(1, 16, 2)
    with pytest.raises(AssertionError, match="other inputs from position 8 on change outputs before it"):
        assert_causal(wrapped(lambda x: x + 1e-3 * x.roll(-1, dims=1)), *qkv, 8)
    with pytest.raises(AssertionError, match=f"outputs before position 8 have a gradient of .* at later {name}"):
        assert_causal(wrapped(lambda x: LeaksBackward.apply(x)), *qkv, 8)


@pytest.mark.parametrize("t", [0, 16, 10])
def test_causal_needs_rows_before_t(t):
    with pytest.raises(ValueError, match=f"t must be above .* got {t}"):
        assert_causal(oracle, *make_qkv(1, 6 if t == 10 else 16, 2, nk=16), t)


def test_batch_rows():
    q, k, v = make_qkv(3, 16, 2)
    mask = torch.rand(3, 16) < 0.3
    assert_batch_independent(lambda q, k, v, mask: oracle(q, k, v, key_padding_mask=mask), q, k, v, mask)
    with pytest.raises(AssertionError, match="changes with the other rows"):
        assert_batch_independent(lambda q, k, v: oracle(q, k, v + 1e-3 * v.roll(1, 0)), q, k, v)
    with pytest.raises(AssertionError, match="alone differs"):
        assert_batch_independent(lambda q, k, v: oracle(q, k, v * len(v)), q, k, v)


# ---------------------------------------------------------------- drawn cases


def test_every_option_is_drawn():
    drawn = []

    @hypothesis.settings(max_examples=300, database=None)
    @given(case=attention_cases())
    def collect(case):
        drawn.append(case)
        options = case.options()
        mask = options.pop("key_padding_mask")
        q, k, v = case.qkv()
        testing.check_qkv(q, k, v, mask)
        assert q.shape == (case.b, case.nq, case.h, case.d) and k.shape[1:3] == (case.nk, case.kv_heads)
        testing.check_length(case.nk, case.segment_lengths, case.ragged)
        testing.check_heads(case.h, len(case.segment_lengths), case.mixing)

    collect()
    choices = dict(mixing=testing.MIXINGS, offsets=testing.OFFSETS, ragged=testing.RAGGED, dtype=DTYPES)
    for name, values in dict(choices, is_causal=(True, False), padded=(True, False), b=(1, 2)).items():
        assert {getattr(case, name) for case in drawn} == set(values)
    assert any(case.nq < case.nk for case in drawn) and any(case.kv_heads < case.h for case in drawn)
    assert any(len(case.segment_lengths) == 3 for case in drawn)
    assert any(case.h % len(case.segment_lengths) for case in drawn if case.mixing == "groups")
    assert any(max(case.segment_lengths) > case.nk for case in drawn) and any(case.nk == 1 for case in drawn)


@given(case=attention_cases(ragged="mask", dtype=torch.float64, padded=False))
def test_fixed_fields(case):
    assert (case.ragged, case.dtype, case.options()["key_padding_mask"]) == ("mask", torch.float64, None)


def test_unknown_fixed_field_is_refused():
    with pytest.raises(ValueError, match="field must be one of .* did you mean 'ragged'"):
        attention_cases(raged="mask")


def test_the_package_does_not_need_hypothesis():
    code = "import sys; sys.modules['hypothesis'] = None; import dilated_attention_nb.testing"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent, timeout=1200)


def test_cases_are_plain_values():
    case = AttentionCase(padded=True)
    assert case == AttentionCase(padded=True) and hash(case) == hash(dataclasses.replace(case))
    assert torch.equal(case.options()["key_padding_mask"], case.options()["key_padding_mask"])


# ---------------------------------------------------------------- memory


def test_saved_tensors():
    w = torch.randn(4, 8, requires_grad=True)
    big = torch.randn(100, 8)
    assert saved_for_backward(lambda: (w + 1).sum()).tensors == ()
    saved = saved_for_backward(lambda x: (x * x).sum(), w)  # one tensor, saved twice
    assert saved.tensors == ("float32[4, 8]",) and saved.num_bytes == 4 * 8 * 4
    assert saved_for_backward(lambda: w * big[:4]).num_bytes == big.nbytes  # a view keeps its base


def test_saved_by_a_custom_function():
    case = AttentionCase((16,), (1,), nq=16, nk=16, h=2, kv_heads=2)
    q, k, v = (x.requires_grad_() for x in case.qkv())
    saved = saved_for_backward(flash_like(case), q, k, v)
    assert sorted(saved.tensors) == sorted(["float32[1, 16, 2, 8]"] * 4 + ["float32[1, 2, 16]"])
