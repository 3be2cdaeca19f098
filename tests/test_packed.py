"Packed documents are sequences of their own, and padding is an absence."

from itertools import accumulate

import numpy as np
import pytest
import torch
from conftest import planned, product
from torch import nn

from dilated_attention_nb import improved
from dilated_attention_nb.config import DilatedAttentionConfig
from dilated_attention_nb.dilated import DilatedAttention
from dilated_attention_nb.improved import ImprovedDilatedAttention, Packing, dilated_attention
from dilated_attention_nb.testing import make_qkv, oracle_attention

BRANCHES = (4, 16), (1, 3)
LENGTHS = {
    "unlike": [5, 5, 3, 0, 7, 5, 16, 1, 1, 41],  # equal ones apart, an empty one, some that are rounded up
    "alike": [8] * 5,
    "empty": [0, 33, 0],
    "tokens": [1] * 6,
}
HOW = [("groups", "blocked"), ("softmax", "blocked"), ("softmax", "interleaved")]


def ends(lengths, dtype=torch.int32):
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def apart(f, cu, q, k, v, mask=None, **options):
    "One document after the other."
    spans = [slice(a, b) for a, b in zip(cu.tolist(), cu[1:].tolist()) if b > a]
    masks = [None if mask is None else mask[:, s] for s in spans]
    return torch.cat([f(q[:, s], k[:, s], v[:, s], key_padding_mask=m, **options) for s, m in zip(spans, masks)], 1)


def oracle(q, k, v, **options):
    return oracle_attention(q, k, v, *BRANCHES, **options)[0]


def readable(q, k, v, segment_lengths, dilation_rates, is_causal=False, key_padding_mask=None, cu_seqlens=None, **how):
    module = DilatedAttention(DilatedAttentionConfig(segment_lengths, dilation_rates, **how), "math")
    return module(q, k, v, is_causal, key_padding_mask, cu_seqlens)


def same(a, b, x, atol=1e-12):
    "Values and gradients of two outputs."
    grad = torch.randn_like(a)
    torch.testing.assert_close(a, b, atol=atol, rtol=0)
    for one, two in zip(torch.autograd.grad(a, x, grad), torch.autograd.grad(b, x, grad, retain_graph=True)):
        torch.testing.assert_close(one, two, atol=atol, rtol=0)


@product(
    form=[dilated_attention, readable],
    lengths=LENGTHS,
    is_causal=[False, True],
    how=HOW,
    ragged=["mask", "zeros"],
    padded=[False, True],
    ids=lambda x: getattr(x, "__name__", None) or ("-".join(x) if isinstance(x, tuple) else None),
)
def test_documents_equal_themselves_alone(form, lengths, is_causal, how, ragged, padded):
    cu = ends(LENGTHS[lengths])
    n = int(cu[-1])
    x = make_qkv(1, n, 4, 8, kv_heads=2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(1, n) < 0.3 if padded else None
    options = dict(is_causal=is_causal, mixing=how[0], offsets=how[1], ragged=ragged)
    expected = apart(oracle, cu, *x, mask, **options)
    same(form(*x, *BRANCHES, key_padding_mask=mask, cu_seqlens=cu, **options), expected, x)
    with planned():
        same(form(*x, *BRANCHES, key_padding_mask=mask, cu_seqlens=cu, **options), expected, x)


@pytest.mark.parametrize("backend", ["math", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
@planned()
def test_dtypes_and_scale(backend, dtype, is_causal):
    "As near to the float64 oracle as each document alone."
    cu, options = (
        ends(LENGTHS["unlike"], torch.int64),
        dict(is_causal=is_causal, mixing="softmax", ragged="mask", scale=0.7),
    )
    x = make_qkv(1, int(cu[-1]), 4, 8, dtype=dtype)
    exact = apart(oracle, cu, *x, **options)
    alone = apart(lambda *x, **how: dilated_attention(*x, *BRANCHES, backend=backend, **how), cu, *x, **options)
    packed = dilated_attention(*x, *BRANCHES, backend=backend, cu_seqlens=cu, **options)
    assert packed.dtype == dtype
    bound = 2 * (alone - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (packed - exact).abs().max() <= bound


def test_small_portions(monkeypatch):
    "Documents are cut into batches wherever they may be."
    cu, options = ends(LENGTHS["unlike"] * 3), dict(is_causal=True, mixing="softmax", ragged="mask")
    x = make_qkv(1, int(cu[-1]), 4, 8, dtype=torch.float64, requires_grad=True)
    expected = apart(oracle, cu, *x, **options)
    monkeypatch.setattr(improved, "portion_size", lambda q, backward: 300)
    same(dilated_attention(*x, *BRANCHES, cu_seqlens=cu, **options), expected, x)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("ragged", ["mask", "zeros"])
def test_a_documents_fewer_queries_are_its_last(is_causal, ragged):
    keys, queries = [7, 21, 21, 5, 0, 9], [2, 21, 4, 0, 0, 1]
    cu, cu_q = ends(keys), ends(queries)
    q, k, v = make_qkv(1, sum(queries), 4, 8, kv_heads=2, nk=sum(keys), dtype=torch.float64, requires_grad=True)
    options = dict(is_causal=is_causal, mixing="softmax", ragged=ragged)
    branches = (4, 15), (1, 3)  # rates divide: where they don't, "zeros" shows rows whose queries aren't there
    got = dilated_attention(q, k, v, *branches, cu_seqlens=cu, cu_seqlens_q=cu_q, **options)
    spans = [(slice(*a), slice(*b)) for a, b in zip(zip(cu_q, cu_q[1:]), zip(cu, cu[1:])) if a[1] > a[0]]
    same(
        got,
        torch.cat([oracle_attention(q[:, a], k[:, b], v[:, b], *branches, **options)[0] for a, b in spans], 1),
        (q, k, v),
    )


def test_equal_documents_are_one_call(monkeypatch):
    "And side by side they are a view of the packed sequence."
    calls = []

    def spied(out, lse, q, *x, real=improved.forward_into):
        calls.append((tuple(q.shape), q.untyped_storage().data_ptr()))
        return real(out, lse, q, *x)

    monkeypatch.setattr(improved, "forward_into", spied)
    q, k, v = make_qkv(1, 48, 4, 8)
    dilated_attention(q, k, v, *BRANCHES, cu_seqlens=ends([16] * 3))
    assert calls == [((3, 16, 4, 8), q.untyped_storage().data_ptr())]
    calls.clear()
    for ragged, shapes in (
        ("zeros", [(3, 5, 4, 8), (3, 11, 4, 8)]),
        ("mask", [(6, 11, 4, 8)]),
    ):  # short ones join longer
        dilated_attention(q, k, v, *BRANCHES, ragged=ragged, cu_seqlens=ends([5, 11, 5, 11, 5, 11]))
        assert [shape for shape, _ in calls] == shapes
        calls.clear()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_traced_forwards_read_no_values(backend):
    "One graph for all documents; tokens behind the last one give rows of 0."
    torch._dynamo.reset()
    module = ImprovedDilatedAttention(DilatedAttentionConfig(*BRANCHES, mixing="softmax", ragged="mask"))
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for lengths in ([20, 13], [1, 32], [9, 4]):
        x, cu = make_qkv(1, 33, 4, 8, requires_grad=True), ends(lengths)
        n = int(cu[-1])
        out = compiled(*x, True, cu_seqlens=cu)
        same(out[:, :n], module(*(y[:, :n] for y in x), True, cu_seqlens=cu), x, atol=1e-6)
        assert not out[:, n:].any()


def test_autocast_and_modules():
    x, cu = make_qkv(1, 20, 4, 8), ends([3, 17])
    module = ImprovedDilatedAttention(DilatedAttentionConfig(*BRANCHES, ragged="mask"))
    with torch.autocast("cpu", torch.bfloat16):
        out = module(*x, cu_seqlens=cu)
    assert torch.equal(out, module(*(y.bfloat16() for y in x), cu_seqlens=cu))


def test_operators_are_registered_soundly():
    x, cu = make_qkv(1, 24, 4, 8, kv_heads=2, requires_grad=True), ends([8, 16])[None]
    args = (*x, None, [8], [1], True, "softmax", "blocked", "error", 8**-0.5, "auto", True, cu, cu)
    torch.library.opcheck(improved.forward_op, args)


BAD = [
    (dict(cu_seqlens=[0, 32]), TypeError, ["cu_seqlens", "list"]),
    (dict(cu_seqlens=np.array([0, 32])), TypeError, ["cu_seqlens", "ndarray"]),
    (dict(cu_seqlens=torch.tensor([0.0, 32.0])), TypeError, ["cu_seqlens", "float32"]),
    (dict(cu_seqlens=torch.tensor([[0, 32]])), ValueError, ["cu_seqlens", "(1, 2)"]),
    (dict(cu_seqlens=torch.tensor([32])), ValueError, ["cu_seqlens", "(1,)"]),
    (dict(cu_seqlens=torch.tensor([1, 32])), ValueError, ["cu_seqlens", "32", "[1, 32]"]),
    (dict(cu_seqlens=torch.tensor([0, 31])), ValueError, ["cu_seqlens", "32", "[0, 31]"]),
    (dict(cu_seqlens=torch.tensor([0, 33])), ValueError, ["cu_seqlens", "32", "[0, 33]"]),
    (dict(cu_seqlens=torch.tensor([0, 20, 10, 32])), ValueError, ["cu_seqlens", "never back"]),
    (dict(cu_seqlens=torch.tensor([0, 12, 32])), ValueError, ["12", "8", "ragged='mask'"]),
    (dict(cu_seqlens=torch.tensor([0, 32], device="meta")), ValueError, ["cu_seqlens", "meta"]),
    (dict(cu_seqlens=torch.tensor([0, 32]), b=2), ValueError, ["batch 1", "2"]),
    (dict(cu_seqlens=torch.tensor([0, 32]), nq=8), ValueError, ["8 queries", "cu_seqlens_q"]),
    (dict(cu_seqlens_q=torch.tensor([0, 32])), ValueError, ["cu_seqlens", "cu_seqlens_q"]),
    (
        dict(cu_seqlens=torch.tensor([0, 8, 32]), cu_seqlens_q=torch.tensor([0, 16, 32])),
        ValueError,
        ["cu_seqlens_q", "more queries than keys"],
    ),
    (dict(cu_seqlens=torch.tensor([0, 8, 32]), cu_seqlens_q=torch.tensor([0, 32])), ValueError, ["_q", "2", "3"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "texts"), BAD)
def test_bad_documents_are_explained(change, error, texts):
    q, k, v = make_qkv(change.pop("b", 1), change.pop("nq", 32), 4, 8, nk=32)
    with pytest.raises(error) as caught:
        dilated_attention(q, k, v, (8,), (1,), **change)
    assert all(text in str(caught.value) for text in texts), str(caught.value)
    change["b"], change["nq"] = len(q), q.shape[1]


# ---------------------------------------------------------------- padding


def padding(kind: str) -> torch.Tensor:
    places = torch.arange(20)
    rows = {"left": places < 7, "right": places >= 11, "holes": (places % 5 == 3) | (places == 0), "none": places < 0}
    return rows[kind] if kind in rows else places >= 0  # "all"


KINDS = ("left", "right", "holes", "none", "all")
PACKED = dict(segment_lengths=(4, 16), dilation_rates=(1, 3), mixing="softmax", ragged="mask", is_causal=True)


class Layer(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        packing = Packing.of(mask)
        tokens = packing.unpad(x)
        return packing.pad(dilated_attention(tokens, tokens, tokens, cu_seqlens=packing.cu_seqlens, **PACKED))


def traced(x, mask):
    torch._dynamo.reset()
    return torch.compile(Layer(), fullgraph=True, backend="eager")(x, mask)


def exported(x, mask):
    b, n = torch.export.Dim("b"), torch.export.Dim("n")
    shapes = ({0: b, 1: n}, {0: b, 1: n})
    return torch.export.export(Layer(), (x.detach(), mask), dynamic_shapes=shapes).module()(x, mask)


@pytest.mark.parametrize("form", [Layer(), traced, exported], ids=["eager", "compile", "export"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_padding_is_an_absence(form, garbage):
    "Left, right, in the middle, none, nothing else: each row is what it is without, and what isn't finite stays away."
    mask = torch.stack([padding(kind) for kind in KINDS])
    rows = torch.randn(len(KINDS), 20, 4, 8, dtype=torch.float64)
    x = rows.masked_fill(mask[..., None, None], garbage).requires_grad_()
    out = form(x, mask)
    assert out.shape == x.shape and not out[mask].any()
    grad = torch.randn_like(out).masked_fill(mask[..., None, None], garbage)
    (got,) = torch.autograd.grad(out, x, grad)
    assert not got[mask].any()
    for row, hidden, one, g, dx in zip(rows, mask, out, grad, got):
        if not hidden.all():
            alone = row[~hidden][None].requires_grad_()
            expected = oracle_attention(alone, alone, alone, **PACKED)[0]
            torch.testing.assert_close(one[~hidden][None], expected)
            torch.testing.assert_close(dx[~hidden][None], torch.autograd.grad(expected, alone, g[~hidden][None])[0])


@pytest.mark.parametrize("form", [Layer(), traced, exported], ids=["eager", "compile", "export"])
def test_nothing_but_padding(form):
    x, mask = torch.full((2, 5, 4, 8), torch.nan, requires_grad=True), torch.ones(2, 5, dtype=torch.bool)
    out = form(x, mask)
    assert not out.any() and not torch.autograd.grad(out.sum(), x)[0].any()


def test_positions_count_from_a_rows_first_token():
    mask = torch.stack([padding(kind) for kind in ("left", "holes", "none")])
    packing = Packing.of(mask)
    lengths = (~mask).sum(1).tolist()
    assert packing.positions.tolist() == [[i for n in lengths for i in range(n)]]
    assert packing.cu_seqlens.tolist() == ends(lengths).tolist() and packing.cu_seqlens.dtype == torch.int32
    tokens = torch.arange(60).view(3, 20)
    assert torch.equal(packing.unpad(tokens)[0], tokens[~mask])
    assert torch.equal(packing.pad(packing.unpad(tokens)), tokens.masked_fill(mask, 0))


@pytest.mark.parametrize(
    ("mask", "error"),
    [(None, TypeError), (torch.zeros(2, 3), TypeError), (torch.zeros(3, dtype=torch.bool), ValueError)],
)
def test_what_is_no_mask_is_refused(mask, error):
    with pytest.raises(error, match="key_padding_mask"):
        Packing.of(mask)
