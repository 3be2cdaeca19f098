"Layouts in memory change no number: every layer that takes q, k and v, and its gradients, for views of all kinds."

import pytest
import torch
from conftest import drawn, planned
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention_nb.backends import attend
from dilated_attention_nb.block_sparse import BlockSparseAttention, SparseAttentionConfig
from dilated_attention_nb.config import DilatedAttentionConfig
from dilated_attention_nb.dilated import DilatedAttention
from dilated_attention_nb.improved import dilated_attention
from dilated_attention_nb.kv_cache import DilatedKVCache, KVCache
from dilated_attention_nb.ring_dilated import RingAttentionConfig, simulate_ring
from dilated_attention_nb.testing import oracle_attention

B, N = 2, 16


def reordered(*order: int):
    "The numbers of `x` in memory with the dimensions in this order."
    back = [order.index(i) for i in range(4)]
    return lambda x: x.permute(order).contiguous().permute(back)


def sliced(x: Tensor) -> Tensor:
    "Every dimension a slice of a larger one, with a step where there is room for one."
    b, n, h, d = x.shape
    view = x.new_full((b + 1, 2 * n + 1, h + 2, 2 * d + 1), float("nan"))[1:, 1::2, 1 : h + 1, 1::2]
    return view.copy_(x)


def overlapping(x: Tensor) -> Tensor:
    "Windows of one row of numbers, each token one number after the one before."
    b, n, h, d = x.shape
    row = torch.randn(b, n + h * d, dtype=x.dtype)
    return row.as_strided(x.shape, (row.stride(0), 1, d, 1))


LAYOUTS = {
    "sdpa": reordered(0, 2, 1, 3),
    "tokens-last": reordered(0, 2, 3, 1),
    "heads-last": reordered(0, 1, 3, 2),
    "tokens-first": reordered(1, 0, 2, 3),
    "sliced": sliced,
    "offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
    "one-token": lambda x: x[:, :1].expand(x.shape),
    "one-head": lambda x: x[:, :, :1].expand(x.shape),
    "one-column": lambda x: x[..., :1].expand(x.shape),
    "one-row": lambda x: x[:1].expand(x.shape),
    "one-number": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "overlapping": overlapping,
}


def same(
    fn, layouts: tuple[str, ...], heads: tuple[int, int], d: int = 4, grad: bool = True, half: bool = False
) -> Tensor:
    "`fn` of q, k, v in these layouts (and of the gradient from above, the last) equals `fn` of copies; what they gave."
    dtype, close = (torch.bfloat16, {"rtol": 0.05, "atol": 0.05}) if half else (torch.float64, {})
    shapes = (B, N, heads[0], d), (B, N, heads[1], d), (B, N, heads[1], d), (B, N, heads[0], d)
    *views, dout = (LAYOUTS[name](torch.randn(shape, dtype=dtype)) for name, shape in zip(layouts, shapes))
    views = [x.detach().requires_grad_(grad) for x in views]
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(grad) for x in views]
    out, expected = fn(*views), fn(*copies)
    torch.testing.assert_close(out, expected, **close)
    if grad:
        grads = torch.autograd.grad(out, views, dout)
        torch.testing.assert_close(grads, torch.autograd.grad(expected, copies, dout.contiguous()), **close)
    return out.detach()


layouts = st.tuples(*[st.sampled_from(list(LAYOUTS))] * 4)
heads = st.sampled_from([(1, 1), (3, 3), (6, 2), (4, 1), (6, 3)])  # of queries, of keys and values
branches = st.lists(st.tuples(st.sampled_from([4, 5, 8, 16]), st.integers(1, 5)), min_size=1, max_size=3)
options = st.fixed_dictionaries({"offsets": st.sampled_from(["blocked", "interleaved"]), "mixing": st.just("softmax")})
options |= st.fixed_dictionaries({"offsets": st.just("blocked"), "mixing": st.just("groups")})


@pytest.mark.parametrize("backend", ["auto", "math"])
@drawn(100)
@given(
    layouts=layouts, heads=heads, branches=branches, options=options, is_causal=st.booleans(), d=st.sampled_from([1, 4])
)
def test_layouts_of_dilated_attention(backend, layouts, heads, branches, options, is_causal, d):
    torch.manual_seed(0)
    options = dict(options, mixing="softmax" if heads[0] < len(branches) else options["mixing"], ragged="mask")
    ws, rs = zip(*branches)
    config, kinds = DilatedAttentionConfig(ws, rs, **options), dict(options, is_causal=is_causal, backend=backend)

    def everybody(q, k, v):
        out = dilated_attention(q, k, v, ws, rs, **kinds)
        torch.testing.assert_close(DilatedAttention(config, backend)(q, k, v, is_causal), out)
        torch.testing.assert_close(oracle_attention(q, k, v, ws, rs, is_causal=is_causal, **options)[0], out)
        return out

    same(everybody, layouts, heads, d)
    with planned():
        same(everybody, layouts, heads, d)


@drawn(50)
@given(layouts=layouts, heads=heads, is_causal=st.booleans(), padded=st.booleans(), half=st.booleans())
def test_layouts_of_one_part(layouts, heads, is_causal, padded, half):
    torch.manual_seed(0)
    mask = torch.rand(N, B).T < 0.3 if padded else None

    def part(q, k, v):
        out, lse = attend(q, k, v, is_causal=is_causal, key_padding_mask=mask)
        return out if half else out + lse.clamp(-9)[..., None]

    same(part, layouts, heads, grad=not half, half=half)


@drawn(50)
@given(
    layouts=layouts,
    heads=heads,
    is_causal=st.booleans(),
    layout=st.sampled_from(["contiguous", "zigzag"]),
    options=options,
)
def test_layouts_of_rings(layouts, heads, is_causal, layout, options):
    torch.manual_seed(0)
    mixing = "softmax" if heads[0] < 2 else options["mixing"]
    config = RingAttentionConfig((8, 16), (2, 3), **dict(options, mixing=mixing), layout=layout, block_size=4)
    same(lambda q, k, v: simulate_ring(q, k, v, config, 2, is_causal), layouts, heads)


@drawn(50)
@given(
    layouts=layouts,
    heads=heads,
    is_causal=st.booleans(),
    pattern=st.sampled_from(["local_window", "random", "strided"]),
)
def test_layouts_of_block_sparse_attention(layouts, heads, is_causal, pattern):
    torch.manual_seed(0)
    options = dict(block_size=16, sparsity_ratio=0.5, pattern_type=pattern, ragged="mask")
    attention = BlockSparseAttention(SparseAttentionConfig((16,), (1,), **options))
    longer = lambda q, k, v: attention(*(torch.cat([x, x], 1) for x in (q, k, v)), is_causal)[:, :N]  # noqa: E731
    same(longer, layouts, heads)
    same(lambda q, k, v: attention(q, k, v, is_causal), layouts, heads)


@drawn(50)
@given(layouts=layouts, heads=heads, options=options, kind=st.sampled_from(["full", "dilated", "small"]))
def test_layouts_of_caches(layouts, heads, options, kind):
    "Chunks of views, read into a cache, whose own keys lie as SDPA's do."
    torch.manual_seed(0)
    mixing = "softmax" if heads[0] < 2 else options["mixing"]
    config = DilatedAttentionConfig((4, 8), (2, 3), **dict(options, mixing=mixing, ragged="mask"))

    def read(q, k, v):
        shape, dtype = (heads[0], 4, B, heads[1]), q.dtype
        if kind == "small":
            cache = DilatedKVCache(config, *shape, dtype=dtype)
        else:
            cache = KVCache(N, *shape, None if kind == "full" else config, dtype=dtype)
        cuts = (0, 5, 6, N)
        return torch.cat([cache(*(x[:, a:b] for x in (q, k, v))) for a, b in zip(cuts, cuts[1:])], 1)

    out = same(read, layouts, heads, grad=False)
    assert out.isfinite().all()


def test_views_in_the_layout_of_sdpa():
    "Six heads on two, offsets that interleave: pieces of one tile whose heads go back while their offsets go on."
    how = dict(mixing="softmax", offsets="interleaved")
    q, k = (torch.randn(1, h, 8, 4, dtype=torch.float64).transpose(1, 2) for h in (6, 2))
    good = DilatedAttention(DilatedAttentionConfig((4,), (2,), **how))(q, k, k)
    torch.testing.assert_close(dilated_attention(q, k, k, (4,), (2,), **how), good)
    leaf = q.contiguous().requires_grad_()
    out = dilated_attention(leaf, k.contiguous(), k.contiguous(), (4,), (2,), **how)
    out.transpose(1, 2).backward(torch.randn(1, 6, 8, 4, dtype=torch.float64))
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize(
    "reduce", [torch.sum, torch.mean, lambda x: x[:, -1].sum(), lambda x: x.mean(1).square().sum()]
)
def test_gradients_that_reductions_expand(reduce):
    "What `backward` passes on of a sum is one number, expanded; of a mean over tokens, one token."
    q, k, v = (torch.randn(1, 16, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = dilated_attention(q, k, v, (8,), (2,), mixing="softmax")
    leaf = out.detach().requires_grad_()
    (dout,) = torch.autograd.grad(reduce(leaf), leaf)
    expected = torch.autograd.grad(out, (q, k, v), dout.clone(memory_format=torch.contiguous_format), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(reduce(out), (q, k, v)), expected)
