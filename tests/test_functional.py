"torch.func through every form of attention, what padding holds, fake tensors, counted operations."

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.utils.flop_counter import FlopCounterMode

from dilated_attention_nb.backends import attend
from dilated_attention_nb.config import DilatedAttentionConfig
from dilated_attention_nb.dilated import DilatedAttention
from dilated_attention_nb.improved import ImprovedDilatedAttention, Packing, dilated_attention
from dilated_attention_nb.testing import make_qkv

BRANCHES = dict(segment_lengths=(4, 8), dilation_rates=(1, 2), mixing="softmax", ragged="mask")
CONFIG = DilatedAttentionConfig(**BRANCHES)


def function(q, k, v, mask=None, is_causal=True):
    return dilated_attention(q, k, v, **BRANCHES, is_causal=is_causal, key_padding_mask=mask)


def pair(q, k, v, mask=None, is_causal=True):
    out, lse = attend(q, k, v, is_causal=is_causal, key_padding_mask=mask)
    return out + lse.masked_fill(lse == -torch.inf, 0.0)[..., None]


def plain_pair(q, k, v, mask=None, is_causal=True):
    return attend(q, k, v, is_causal=is_causal, key_padding_mask=mask, backend="math")[0]


def module(q, k, v, mask=None, is_causal=True):
    return ImprovedDilatedAttention(CONFIG)(q, k, v, is_causal, mask)


def readable(q, k, v, mask=None, is_causal=True):
    return DilatedAttention(CONFIG)(q, k, v, is_causal, mask)


def readable_math(q, k, v, mask=None, is_causal=True):
    return DilatedAttention(CONFIG, "math")(q, k, v, is_causal, mask)


FORMS = [function, pair, plain_pair, module, readable, readable_math]
forms = pytest.mark.parametrize("f", FORMS, ids=lambda f: f.__name__)
SAMPLES = 3


def samples():
    "q, k, v, mask of several samples, each a batch of its own."
    q, k, v = (torch.randn(SAMPLES, 2, 9, 4, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(SAMPLES, 2, 9) < 0.3
    return q, k, v, mask


def one(args, dims, i):
    return [x[i] if dim == 0 else x for x, dim in zip(args, dims)]


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


# ---------------------------------------------------------------- torch.func


@forms
def test_gradients_of_functions(f):
    *x, mask = (y[0] for y in samples())
    loss = lambda *y: f(*y, mask).square().sum()  # noqa: E731
    leaves = [y.clone().requires_grad_() for y in x]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for got in (grad(loss, argnums=(0, 1, 2))(*x), vjp(loss, *x)[1](torch.ones((), dtype=torch.float64))):
        for a, b in zip(got, expected):
            close(a, b)


@forms
@pytest.mark.parametrize("dims", [(0, 0, 0, 0), (0, None, None, None), (None, 0, None, None), (None, None, None, 0)])
def test_vmap_over_some_of_the_inputs(f, dims):
    "Values and per-sample gradients."
    args = [x if dim == 0 else x[0] for x, dim in zip(samples(), dims)]
    per_sample = grad(lambda *x: f(*x).square().sum(), argnums=(0, 1, 2))
    close(vmap(f, dims)(*args), torch.stack([f(*one(args, dims, i)) for i in range(SAMPLES)]))
    for got, expected in zip(
        vmap(per_sample, dims)(*args), zip(*[per_sample(*one(args, dims, i)) for i in range(SAMPLES)])
    ):
        close(got, torch.stack(expected))


@forms
def test_vmap_along_any_dimension_nested_and_in_chunks(f):
    q, k, v, mask = samples()
    expected = torch.stack([f(*x) for x in zip(q, k, v, mask)])
    moved = vmap(f, (2, 0, 1, 0), 1, chunk_size=2)(q.movedim(0, 2), k, v.movedim(0, 1), mask)
    close(moved, expected.movedim(0, 1))
    close(vmap(vmap(f, (None, 0, 0, 0)))(q, *(x[:, None] for x in (k, v, mask))), expected[:, None])


@forms
def test_jacobians(f):
    q, k, v = (x[0, :1, :5, :3, :2] for x in samples()[:3])
    close(jacrev(f)(q, k, v), torch.autograd.functional.jacobian(lambda q: f(q, k, v), q))


def test_functional_call_and_documents():
    layer = torch.nn.Sequential(torch.nn.Linear(16, 16, dtype=torch.float64))
    x, cu = torch.randn(SAMPLES, 1, 9, 16, dtype=torch.float64), torch.tensor([0, 4, 9])

    def loss(weights, x, cu):
        y = functional_call(layer, weights, (x,)).unflatten(2, (4, 4))
        return dilated_attention(y, y, y, **BRANCHES, cu_seqlens=cu).square().sum()

    weights = {name: y.detach() for name, y in layer.named_parameters()}
    got = vmap(grad(loss), (None, 0, None))(weights, x, cu)
    apart = [grad(loss)(weights, row, cu) for row in x]
    for name, gradients in got.items():
        close(gradients, torch.stack([g[name] for g in apart]))
    ends = torch.tensor([[0, 4, 9], [0, 0, 9], [0, 9, 9]])
    close(vmap(loss, (None, 0, 0))(weights, x, ends), torch.stack([loss(weights, *y) for y in zip(x, ends)]))


# ---------------------------------------------------------------- padding


@forms
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "out", "all"])
def test_what_padding_holds_reaches_nobody(f, is_causal, garbage, where):
    "Not from keys, values, queries or gradients: the real rows and their gradients are those of finite padding."
    *x, mask = (y[0] for y in samples())
    mask[0], mask[1] = torch.arange(9) >= 6, torch.arange(9) % 4 == 0
    hidden, dout = mask[..., None, None], torch.randn(2, 9, 4, 4, dtype=torch.float64) * ~mask[..., None, None]
    results = []
    for value in (0.0, garbage):
        leaves = [
            (y.masked_fill(hidden, value) if where in (name, "all") else y).clone().requires_grad_()
            for name, y in zip("qkv", x)
        ]
        out = f(*leaves, mask, is_causal)
        upstream = dout.masked_fill(hidden, value) if where in ("out", "all") else dout
        results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    for expected, got in zip(*results):
        close(got.masked_fill(hidden, 0.0), expected.masked_fill(hidden, 0.0))


@forms
def test_finite_queries_at_padded_places_keep_their_results(f):
    *x, mask = (y[0] for y in samples())
    mask[:, 0], mask[:, 4] = False, True
    broken = [y.masked_fill(mask[..., None, None], torch.nan) for y in x[1:]]
    close(f(x[0], *broken, mask), f(*x, mask))


def test_padding_of_fewer_queries():
    q, k, v = make_qkv(1, 5, 4, 8, nk=12, requires_grad=True)
    mask = torch.arange(12)[None] >= 10
    clean = dilated_attention(q, k, v, **BRANCHES, is_causal=True, key_padding_mask=mask)
    hidden = mask[:, 7:, None, None]
    dirty = dilated_attention(q.masked_fill(hidden, torch.nan), k, v, **BRANCHES, is_causal=True, key_padding_mask=mask)
    assert torch.equal(dirty[:, :3], clean[:, :3])
    assert all(g.isfinite().all() for g in torch.autograd.grad(dirty[:, :3].sum(), (q, k, v)))


# ---------------------------------------------------------------- fakes, counts, second derivatives


def test_fake_tensors():
    with FakeTensorMode():
        x, cu = torch.randn(1, 32, 4, 8), torch.tensor([0, 12, 32])
        mask = torch.zeros(1, 32, dtype=torch.bool)
        for out in (*(f(x, x, x, mask) for f in FORMS), dilated_attention(x, x, x, **BRANCHES, cu_seqlens=cu)):
            assert out.shape == x.shape
        packing = Packing.of(mask)
        assert packing.pad(packing.unpad(x)).shape == x.shape


@pytest.mark.parametrize("is_causal", [False, True])
def test_operations_are_counted(is_causal):
    "The rectangles of the tiles, causal ones whole, as PyTorch counts them: 2 products forward, 5 backward."
    x = torch.randn(2, 64, 4, 8, requires_grad=True)
    options = dict(segment_lengths=(16, 64), dilation_rates=(1, 4), mixing="softmax", is_causal=is_causal)
    pairs = 2 * 4 * (4 * 16 * 16 + 16 * 16)
    with FlopCounterMode(display=False) as counter:
        dilated_attention(x, x, x, **options).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * pairs * 8
    config = DilatedAttentionConfig((16, 64), (1, 4), mixing="softmax")
    with FlopCounterMode(display=False) as counter:
        DilatedAttention(config)(x, x, x, is_causal)
    assert counter.get_total_flops() == 4 * pairs * 8
    y = x[:1].detach()
    with FlopCounterMode(display=False) as counter:
        dilated_attention(y, y, y, (64,), (1,), ragged="mask", cu_seqlens=torch.tensor([0, 20, 20, 64]))
    assert counter.get_total_flops() == 4 * 4 * (20 * 20 + 44 * 44) * 8


def test_counting_imports_nothing_by_itself():
    "The counter imports Triton, which decides then whether it interprets."
    code = "import sys, dilated_attention_nb.improved as m; assert 'triton' not in sys.modules; import torch\n"
    code += "from torch.utils.flop_counter import FlopCounterMode\nx = torch.randn(1, 8, 1, 8)\n"
    code += "with FlopCounterMode(display=False) as c: m.dilated_attention(x, x, x, (8,), (1,))\n"
    code += "assert c.get_total_flops() == 4 * 8 * 8 * 8"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_attend_says_which_backend_has_a_second_derivative():
    q, k, v = make_qkv(1, 8, 2, 8, requires_grad=True)
    for part in (0, 1):
        first = torch.autograd.grad(attend(q, k, v)[part].square().sum(), q, create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="backend='math'"):
            first.sum().backward()
    first = torch.autograd.grad(attend(q, k, v, backend="math")[0].square().sum(), q, create_graph=True)[0]
    first.sum().backward()


def test_the_readable_form_compiles_with_lengths_that_vary():
    "For each length anew, as its loops are unrolled."
    torch._dynamo.reset()
    module = DilatedAttention(CONFIG)
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    for n in (8, 12):
        x = make_qkv(1, n, 4, 8)
        assert torch.allclose(compiled(*x, True), module(*x, True), atol=1e-6)
