"Multi-head attention: nn.MultiheadAttention's numbers, weights, initialisation, factories, life as a module."

import copy
import logging
import pickle

import pytest
import torch
from conftest import drawn
from hypothesis import given
from torch import nn

from dilated_attention_nb.block_sparse import BlockSparseAttention
from dilated_attention_nb.config import DilatedAttentionConfig, MultiheadConfig
from dilated_attention_nb.dilated import DilatedAttention
from dilated_attention_nb.improved import ImprovedDilatedAttention
from dilated_attention_nb.multihead import (
    ATTENTIONS,
    KINDS,
    MultiheadDilatedAttention,
    create_dilated_attention,
    create_multihead_dilated_attention,
    project,
    resolve_kind,
)
from dilated_attention_nb.testing import attention_cases, oracle_attention, oracle_counts, saved_for_backward

BRANCHES = {"segment_lengths": (4, 8), "dilation_rates": (1, 2)}
SMALL = {"embed_dim": 32, "num_heads": 4, **BRANCHES, "ragged": "mask"}


def make(kind="auto", **values):
    torch.manual_seed(0)
    return create_multihead_dilated_attention(kind, **{**SMALL, "dtype": torch.float64, **values})


def inputs(b=2, n=13, e=32, dtype=torch.float64, seed=0):
    return torch.randn(b, n, e, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------- nn.MultiheadAttention


def torchs(mha: MultiheadDilatedAttention) -> nn.MultiheadAttention:
    "nn.MultiheadAttention with the same weights."
    theirs = nn.MultiheadAttention(mha.config.embed_dim, mha.config.num_heads, bias=mha.config.bias, batch_first=True)
    state = {"in_proj_weight": torch.cat([p.weight for p in (mha.q_proj, mha.k_proj, mha.v_proj)])}
    state["out_proj.weight"] = mha.out_proj.weight
    if mha.config.bias:
        state["in_proj_bias"] = torch.cat([p.bias for p in (mha.q_proj, mha.k_proj, mha.v_proj)])
        state["out_proj.bias"] = mha.out_proj.bias
    theirs.to(torch.float64).load_state_dict(state)
    return theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["standard", "improved"])
def test_one_full_branch_is_torchs_multihead_attention(kind, padded, is_causal, bias):
    ours = make(kind, layer_norm=False, segment_lengths=(13,), dilation_rates=(1,), bias=bias)
    if bias:
        for p in (ours.q_proj, ours.k_proj, ours.v_proj, ours.out_proj):
            nn.init.normal_(p.bias)
    theirs = torchs(ours)
    x, y = inputs().requires_grad_(), inputs().requires_grad_()
    padding = torch.arange(13) >= torch.tensor([[13], [9]]) if padded else None
    future = torch.ones(13, 13, dtype=torch.bool).triu(1) if is_causal else None
    out, weights = ours(x, x, x, padding, True, is_causal)
    want, want_weights = theirs(y, y, y, padding, True, future)
    assert torch.allclose(out, want, atol=1e-13) and torch.allclose(weights, want_weights, atol=1e-13)
    out.square().sum().backward()
    want.square().sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-11)
    stacked = torch.cat([p.weight.grad for p in (ours.q_proj, ours.k_proj, ours.v_proj)])
    assert torch.allclose(stacked, theirs.in_proj_weight.grad, atol=1e-11)


@pytest.mark.parametrize("value_is_key", [True, False])
def test_cross_attention_is_torchs(value_is_key):
    ours = make(layer_norm=False, segment_lengths=(13,), dilation_rates=(1,))
    query, key = inputs(n=5, seed=1), inputs(seed=2)
    value = key if value_is_key else inputs(seed=3)
    out, weights = ours(query, key, value, need_weights=True, average_attn_weights=False)
    want, want_weights = torchs(ours)(query, key, value, average_attn_weights=False)
    assert torch.allclose(out, want, atol=1e-13) and torch.allclose(weights, want_weights, atol=1e-13)
    assert torch.equal(ours(query, key)[0], ours(query, key, key)[0])


# ---------------------------------------------------------------- projections


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_one_product_is_three(kv_heads):
    mha = make(num_kv_heads=kv_heads)
    x, y = inputs().requires_grad_(), inputs().requires_grad_()
    one, _ = mha(x)
    three, _ = mha(y, y.view_as(y), y.view_as(y) + 0)  # other tensors with the same numbers
    assert torch.allclose(one, three, atol=1e-14)
    grads = [torch.autograd.grad(out.square().sum(), [leaf, *mha.parameters()]) for out, leaf in ((one, x), (three, y))]
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(*grads))


def test_values_do_not_hold_on_to_queries_and_keys_that_were_moved():
    mha, x = make(dtype=None), inputs(1, 800, dtype=torch.float32)
    still = saved_for_backward(mha, x).num_bytes
    moved = saved_for_backward(lambda x: mha(x, position=lambda q, k: (q + 0, k + 0)), x).num_bytes
    assert moved <= still + 16_384  # q, k and v once, besides other copies of the weights


def test_names_are_those_of_torchscale():
    names = {f"{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")}
    assert set(make().state_dict()) == names | {"inner_attn_ln.weight", "inner_attn_ln.bias"}
    assert set(make(layer_norm=False).state_dict()) == names


def test_hooks_and_adapters_are_respected():
    mha, x = make(), inputs()
    before, _ = mha(x)

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    handle = mha.v_proj.register_forward_hook(lambda module, args, out: out * 2 + x.mean())
    assert not torch.allclose(mha(x)[0], before)
    handle.remove()
    assert torch.equal(mha(x)[0], before)
    adapter = Adapter(32, 32, dtype=torch.float64)
    adapter.load_state_dict(mha.k_proj.state_dict())
    assert torch.allclose(project(x, mha.q_proj, adapter)[1], mha.k_proj(x) + 1)
    plain = mha.q_proj.forward
    mha.q_proj.forward = lambda x: plain(x) * 3  # as accelerate and others patch single modules
    assert not torch.allclose(mha(x)[0], before)


@pytest.mark.parametrize(("kv_heads", "mixing"), [(1, "groups"), (2, "softmax"), (2, "groups")])
def test_shared_heads_are_repeated_heads(kv_heads, mixing):
    few, full = make(num_kv_heads=kv_heads, mixing=mixing), make(mixing=mixing)
    state = few.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        state[name] = state[name].unflatten(0, (kv_heads, 8)).repeat_interleave(4 // kv_heads, 0).flatten(0, 1)
    full.load_state_dict(state)
    x = inputs()
    assert torch.allclose(few(x, is_causal=True)[0], full(x, is_causal=True)[0], atol=1e-13)
    weights = [m(x, need_weights=True, average_attn_weights=False)[1] for m in (few, full)]
    assert torch.allclose(*weights, atol=1e-13)


# ---------------------------------------------------------------- initialisation


@pytest.mark.parametrize("gamma", [1.0, 1.8])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_magneto_statistics(gamma, kv_heads):
    mha = make(embed_dim=512, num_heads=8, num_kv_heads=kv_heads, gamma_init=gamma)
    for name, gain in (("q", 1.0), ("k", 1.0), ("v", gamma), ("out", gamma)):
        linear = getattr(mha, f"{name}_proj")
        std = gain * (2 / sum(linear.weight.shape)) ** 0.5
        tolerance = 5 / (2 * linear.weight.numel()) ** 0.5  # five standard errors of a standard deviation
        assert abs(linear.weight.std() / std - 1) < tolerance and abs(linear.weight.mean()) < tolerance * std
        assert not linear.bias.any()
    assert (mha.inner_attn_ln.weight == 1).all() and not mha.inner_attn_ln.bias.any()


def test_reset_parameters_starts_again():
    mha = make()
    first = mha.q_proj.weight.clone()
    nn.init.zeros_(mha.inner_attn_ln.weight)
    mha.reset_parameters()
    assert not torch.equal(first, mha.q_proj.weight) and (mha.inner_attn_ln.weight == 1).all()


# ---------------------------------------------------------------- attention and its weights


def taken_apart(mha, x):
    return [y.unflatten(-1, (-1, mha.config.head_dim)) for y in (mha.q_proj(x), mha.k_proj(x), mha.v_proj(x))]


@pytest.mark.parametrize("kind", ["auto", "standard", "improved"])
@pytest.mark.parametrize("mixing", ["groups", "softmax"])
@pytest.mark.parametrize("offsets", ["blocked", "interleaved"])
def test_between_the_projections_stands_the_oracle(kind, mixing, offsets):
    mha, x = make(kind, mixing=mixing, offsets=offsets, layer_norm=False), inputs()
    options = dict(is_causal=True, mixing=mixing, offsets=offsets, ragged="mask")
    want, _ = oracle_attention(*taken_apart(mha, x), (4, 8), (1, 2), **options)
    assert torch.allclose(mha(x, is_causal=True)[0], mha.out_proj(want.flatten(2)), atol=1e-13)


@drawn(60)
@given(case=attention_cases(max_length=20, dtypes=(torch.float64,), d=8))
def test_weights_are_the_definitions(case):
    h, w, r = case.h, case.segment_lengths, case.dilation_rates
    how = {name: getattr(case, name) for name in ("mixing", "offsets", "ragged")}
    torch.manual_seed(0)
    mha = create_multihead_dilated_attention(
        embed_dim=8 * h, num_heads=h, num_kv_heads=case.kv_heads, segment_lengths=w, dilation_rates=r,
        dtype=torch.float64, **how,
    )  # fmt: skip
    key = inputs(case.b, case.nk, 8 * h)
    query, mask = key[:, case.nk - case.nq :], case.options()["key_padding_mask"]
    _, weights = mha(query, key, key, mask, True, case.is_causal, average_attn_weights=False)
    counts, zeros = oracle_counts(case.nq, case.nk, h, w, r, is_causal=case.is_causal, **how)
    q, k = (x.unflatten(-1, (-1, 8)) for x in (mha.q_proj(query), mha.k_proj(key)))
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(h // case.kv_heads, 2)) * 8**-0.5
    terms = counts * scores.exp()
    if mask is not None:
        terms = terms.masked_fill(mask[:, None, None], 0)
    total = terms.sum(-1, keepdim=True) + zeros[None, :, :, None]
    want = torch.where(total > 0, terms / total, 0.0) / (len(w) if case.mixing == "groups" else 1)
    assert torch.allclose(weights, want, atol=1e-12)
    _, averaged = mha(query, key, key, mask, True, case.is_causal)
    assert torch.allclose(averaged, want.mean(1), atol=1e-12)


def test_weights_times_values_are_the_output():
    mha, x = make(mixing="softmax", layer_norm=False, dropout=0.5), inputs()
    mha.train()
    _, weights = mha(x, need_weights=True, average_attn_weights=False)
    out = mha.eval()(x)[0]
    v = taken_apart(mha, x)[2]
    assert torch.allclose(mha.out_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)), out, atol=1e-13)


def test_weights_have_gradients():
    mha, x = make(mixing="softmax"), inputs().requires_grad_()
    mha(x, need_weights=True)[1].square().sum().backward()
    assert x.grad.any() and mha.q_proj.weight.grad.any() and not mha.v_proj.weight.grad.any()


def test_asking_for_weights_does_not_change_the_output():
    mha, x = make(), inputs()
    assert torch.equal(mha(x)[0], mha(x, need_weights=True)[0]) and mha(x)[1] is None


# ---------------------------------------------------------------- options


def test_dropout_acts_in_training_only():
    plain, dropping, x = make(layer_norm=False), make(layer_norm=False, dropout=0.5), inputs()
    dropping.load_state_dict(plain.state_dict())
    assert torch.equal(dropping.eval()(x)[0], plain(x)[0])
    assert not torch.equal(dropping.train()(x)[0], plain(x)[0])
    with torch.no_grad():
        mean = dropping(x.repeat(1000, 1, 1))[0].unflatten(0, (1000, 2)).mean(0)
    assert (mean - plain(x)[0]).abs().max() < 0.2


def test_position_acts_on_projected_queries_and_keys():
    mha, x = make(num_kv_heads=2), inputs()
    shapes = []

    def position(q, k):
        shapes.append((tuple(q.shape), tuple(k.shape)))
        return 2 * q, k / 2

    assert torch.allclose(mha(x, position=position)[0], mha(x)[0], atol=1e-13)
    assert shapes == [((2, 13, 4, 8), (2, 13, 2, 8))]
    assert not torch.allclose(mha(x, position=lambda q, k: (3 * q, k))[0], mha(x)[0])


def test_config_places_the_parameters():
    mha = make(dtype=torch.bfloat16, device="meta")
    assert {(p.dtype, p.device.type) for p in mha.parameters()} == {(torch.bfloat16, "meta")}
    assert make(dtype=None).q_proj.weight.dtype == torch.float32


# ---------------------------------------------------------------- factories


def test_kinds():
    assert isinstance(create_dilated_attention("standard", **BRANCHES), DilatedAttention)
    assert isinstance(create_dilated_attention("improved", **BRANCHES), ImprovedDilatedAttention)
    assert isinstance(create_dilated_attention(**BRANCHES), ImprovedDilatedAttention)
    assert set(KINDS) == {"auto", *ATTENTIONS}
    assert isinstance(create_dilated_attention("block_sparse", **BRANCHES), BlockSparseAttention)


def test_auto_says_what_it_chose(caplog):
    with caplog.at_level(logging.INFO, logger="dilated_attention_nb.multihead"):
        assert resolve_kind("auto") == "improved"
        assert resolve_kind("standard") == "standard"
    (record,) = caplog.records
    assert "'improved'" in record.message
    assert "ImprovedDilatedAttention" in repr(make())


def test_fields_go_before_the_config():
    config = DilatedAttentionConfig(**BRANCHES, mixing="softmax")
    made = create_dilated_attention("improved", config, dropout=0.25)
    assert made.config == DilatedAttentionConfig(**BRANCHES, mixing="softmax", dropout=0.25)
    assert create_dilated_attention("improved", config).config == config
    mha = create_multihead_dilated_attention("standard", MultiheadConfig(32, 4), config, num_kv_heads=2, dropout=0.5)
    assert mha.config == MultiheadConfig(32, 4, num_kv_heads=2)
    assert mha.attention_config.dropout == 0.5 and mha.attention_config.mixing == "softmax"


def test_any_module_may_attend():
    class Mean(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

        def forward(self, q, k, v, is_causal=False, key_padding_mask=None):
            return v.mean(1, keepdim=True).expand_as(q)

    torch.manual_seed(0)
    mha = MultiheadDilatedAttention(MultiheadConfig(32, 4), DilatedAttentionConfig(**BRANCHES, dropout=0.1), Mean)
    assert isinstance(mha.attention, Mean) and mha.attention.config.dropout == 0  # the layer itself drops
    _, weights = mha.eval()(inputs(dtype=torch.float32), need_weights=True)
    assert torch.allclose(weights, torch.full_like(weights, 1 / 13))


# ---------------------------------------------------------------- theorems of a layer


@pytest.mark.parametrize("mixing", ["groups", "softmax"])
@pytest.mark.parametrize("kind", ["standard", "improved"])
def test_causal(kind, mixing):
    mha, x = make(kind, mixing=mixing), inputs().requires_grad_()
    for t in (1, 4, 7, 12):
        other = x.detach().clone()
        other[:, t:] = inputs(seed=9)[:, t:] * 10
        assert torch.equal(mha(x, is_causal=True)[0][:, :t], mha(other, is_causal=True)[0][:, :t])
        (grad,) = torch.autograd.grad(mha(x, is_causal=True)[0][:, :t].square().sum(), x)
        assert not grad[:, t:].any()


def test_batch_rows_are_independent():
    mha, x = make(mixing="softmax"), inputs(b=3)
    other = inputs(b=3, seed=5)
    other[1] = x[1]
    assert torch.equal(mha(x)[0][1], mha(other)[0][1])
    assert torch.allclose(mha(x[1:2])[0][0], mha(x)[0][1], atol=1e-14)


@pytest.mark.parametrize("mixing", ["groups", "softmax"])
def test_padding_is_not_there(mixing):
    mha, x = make(mixing=mixing), inputs()
    padding = torch.arange(13) >= torch.tensor([[13], [9]])
    out, _ = mha(x, key_padding_mask=padding)
    assert torch.allclose(out[1, :9], mha(x[1:, :9])[0][0], atol=1e-13)


def test_it_survives_what_modules_go_through(tmp_path):
    mha, x = make(mixing="softmax"), inputs()
    want = mha(x)[0]
    want.sum().backward()
    first = [p.grad.clone() for p in mha.parameters()]
    mha.zero_grad()
    mha(x)[0].sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, mha.parameters()))
    torch.save(mha.state_dict(), tmp_path / "state.pt")
    loaded = make(mixing="softmax")
    loaded.reset_parameters()
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for twin in (copy.deepcopy(mha), pickle.loads(pickle.dumps(mha)), loaded):
        assert torch.equal(twin(x)[0], want)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        narrow = copy.deepcopy(mha).to(dtype)(x.to(dtype))[0]
        assert narrow.dtype == dtype and (narrow - want).abs().max() < 60 * torch.finfo(dtype).eps


def test_autocast():
    mha, x = make(dtype=None), inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = mha(x)
    assert out.dtype == torch.bfloat16 and (out - mha(x)[0]).abs().max() < 0.1
    out.float().sum().backward()
    assert mha.q_proj.weight.grad.dtype == torch.float32


def test_compiled_it_gives_the_same_numbers_for_eight_lengths():
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    mha = make(mixing="softmax")
    compiled = torch.compile(mha, fullgraph=True, backend=counting)
    for n in (5, 8, 13, 16, 21, 40, 64, 100):
        x = inputs(n=n)
        assert torch.allclose(compiled(x, is_causal=True)[0], mha(x, is_causal=True)[0], atol=1e-13)
    assert len(graphs) <= 3  # the first compilation and at most two more


@pytest.mark.slow
def test_compiled_gradients():
    torch._dynamo.reset()
    mha, x = make(dtype=None), inputs(dtype=torch.float32)
    want = torch.autograd.grad(mha(x)[0].square().sum(), list(mha.parameters()))
    got = torch.autograd.grad(torch.compile(mha, fullgraph=True)(x)[0].square().sum(), list(mha.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5 * float(b.abs().max()) + 1e-4) for a, b in zip(got, want))


# ---------------------------------------------------------------- what it refuses

X = inputs(dtype=torch.float32)
BAD = {
    "a far field": (ValueError, "has no field 'lr'; known are", lambda: create_dilated_attention(lr=1, **BRANCHES)),
    "kind unknown": (ValueError, "did you mean 'improved'", lambda: create_dilated_attention("improve", **BRANCHES)),
    "kind not a string": (TypeError, "kind", lambda: create_dilated_attention(3, **BRANCHES)),
    "kind upper case": (ValueError, "standard", lambda: create_multihead_dilated_attention("Standard", **SMALL)),
    "field misspelt": (ValueError, "'dropout'", lambda: create_dilated_attention("auto", **BRANCHES, droput=0.1)),
    "field of the other": (ValueError, "embed_dim", lambda: create_dilated_attention("auto", **BRANCHES, embed_dim=8)),
    "field of neither": (ValueError, "num_heads", lambda: create_multihead_dilated_attention(**SMALL, heads=1)),
    "fields missing": (ValueError, "segment_lengths", lambda: create_dilated_attention("auto")),
    "no embed_dim": (ValueError, "embed_dim", lambda: create_multihead_dilated_attention(**BRANCHES, num_heads=4)),
    "config a dict": (TypeError, "config must be a Dil", lambda: create_dilated_attention("auto", BRANCHES)),
    "configs swapped": (
        TypeError,
        "config must be a MultiheadConfig, got DilatedAttentionConfig",
        lambda: MultiheadDilatedAttention(DilatedAttentionConfig(**BRANCHES), MultiheadConfig(32, 4)),
    ),
    "fewer heads than groups": (ValueError, "num_heads", lambda: make(num_heads=1)),
    "heads do not divide": (ValueError, "num_heads could be", lambda: make(num_heads=3)),
    "kv heads do not divide": (ValueError, "num_kv_heads", lambda: make(num_kv_heads=3)),
    "gamma not positive": (ValueError, "gamma_init", lambda: make(gamma_init=0.0)),
    "query rank": (ValueError, "query must have shape", lambda: make(dtype=None)(X[0])),
    "query dtype": (
        TypeError,
        "query must have the module's dtype torch.float32",
        lambda: make(dtype=None)(X.double()),
    ),
    "query bfloat16": (TypeError, "query must have the module's dtype", lambda: make(dtype=None)(X.bfloat16())),
    "key dtype": (TypeError, "key must have the module's dtype", lambda: make(dtype=None)(X, X.double())),
    "value dtype": (TypeError, "value must have the module's dtype", lambda: make(dtype=None)(X, X, X.half())),
    "query device": (ValueError, "query must be on the module's device cpu", lambda: make(dtype=None)(X.to("meta"))),
    "key device": (ValueError, "key must be on the module's device cpu", lambda: make(dtype=None)(X, X.to("meta"))),
    "query width": (ValueError, "embed_dim 32", lambda: make(dtype=None)(X[..., :16])),
    "query tokens": (TypeError, "embed tokens first", lambda: make(dtype=None)(X.long())),
    "query a list": (TypeError, "query must be a tensor", lambda: make(dtype=None)([1.0])),
    "key width": (ValueError, "key must have shape", lambda: make(dtype=None)(X, X[..., :16])),
    "value not a tensor": (TypeError, "value must be a tensor", lambda: make(dtype=None)(X, X, 3)),
    "value of another length": (ValueError, "v must have k's shape", lambda: make(dtype=None)(X, X, X[:, :5])),
    "more queries than keys": (ValueError, "q must not be longer", lambda: make(dtype=None)(X, X[:, :5])),
    "mask dtype": (TypeError, "key_padding_mask", lambda: make(dtype=None)(X, key_padding_mask=torch.zeros(2, 13))),
    "mask shape": (ValueError, "key_padding_mask", lambda: make(dtype=None)(X, key_padding_mask=X[:, :5, 0] > 0)),
    "length": (ValueError, "ragged='mask'", lambda: make(dtype=None, ragged="error")(X)),
    "need_weights a number": (TypeError, "need_weights", lambda: make(dtype=None)(X, need_weights=1)),
    "is_causal a string": (TypeError, "is_causal", lambda: make(dtype=None)(X, is_causal="yes")),
    "average a number": (
        TypeError,
        "average_attn_weights",
        lambda: make(dtype=None)(X, need_weights=True, average_attn_weights=1),
    ),
    "weights too long": (
        ValueError,
        "need_weights must be False for more than 2048 keys, got True for 2049",
        lambda: make(dtype=None)(torch.zeros(1, 2049, 32), need_weights=True),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, text, call = BAD[case]
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)
