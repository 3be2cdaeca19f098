"Every kind of attention as the attention of a LongNet: values, gradients, files, rings, and what is refused."

import json
from dataclasses import replace

import pytest
import torch

from dilated_attention_nb.backends import attend
from dilated_attention_nb.block_patterns import block_pattern
from dilated_attention_nb.block_sparse import block_sparse_attention
from dilated_attention_nb.config import SparseAttentionConfig
from dilated_attention_nb.decoding import generate
from dilated_attention_nb.longnet import LongNet, LongNetConfig, longnet_tiny
from dilated_attention_nb.multihead import KINDS
from dilated_attention_nb.processes import spawn_gloo
from dilated_attention_nb.sharded import share_worker
from dilated_attention_nb.training import TrainingConfig

N = 128
DENSE = dict(pattern_type="local_window", block_size=16, density=1.0)  # all blocks
LOCAL = dict(pattern_type="local_window", block_size=16, density=0.3)
NO_BRANCHES = dict(segment_lengths=(), dilation_rates=())


def fields(kind: str, options=None) -> dict:
    "Of a small model of that kind; without options: dilated, or local blocks."
    if "block_sparse" not in kind:
        return dict(attention=kind, position="rope")
    return dict(attention=kind, attention_options=LOCAL if options is None else options, **NO_BRANCHES)


def model_of(kind: str, options=None, seed=3, **values) -> LongNet:
    torch.manual_seed(seed)
    return LongNet(longnet_tiny(**{**fields(kind, options), **values})).double().eval()


def tokens(batch=2, n=N, seed=0):
    return torch.randint(256, (batch, n + 1), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model, x, **options):
    loss = model(x[:, :-1], x[:, 1:], **options).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def near(got, wanted):
    "Float64, sums of a few thousand terms: equal but for rounding."
    assert abs(got[0] - wanted[0]) < 1e-11 and got[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        assert (got[1][name] - grad).abs().max() <= 1e-11 * (1 + grad.abs().max()), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains(kind):
    "A few steps on one batch: the loss falls, and every parameter gets a finite gradient that isn't zero."
    model, x = model_of(kind).float().train(), tokens()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(loss_and_gradients(model, x)[0])
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("kind", ("block_sparse", "block_sparse_ring"))
def test_all_blocks_are_full_attention(kind):
    "The same parameters with one branch of rate 1 over the whole sequence: another layer, the same model."
    x = tokens()
    full = model_of("standard", segment_lengths=(N,), dilation_rates=(1,), seed=7)
    blocks = model_of(kind, DENSE, seed=8)
    blocks.load_state_dict(full.state_dict())
    near(loss_and_gradients(blocks, x), loss_and_gradients(full, x))


@pytest.mark.parametrize("kind", ("improved", "standard", "ring"))
def test_dilated_kinds_are_one_model(kind):
    x, plain = tokens(), model_of("auto")
    near(loss_and_gradients(model_of(kind), x), loss_and_gradients(plain, x))


def test_the_options_reach_the_layer():
    "What the layer computes is `block_sparse_attention` with those options, and none is ignored."
    model = model_of("block_sparse")
    q, k, v = (torch.randn(1, N, 4, 16, dtype=torch.float64) for _ in range(3))
    layer = model.decoder.layers[0].self_attn.attention
    own = block_pattern(LOCAL["pattern_type"], N, block_size=16, density=0.3, is_causal=True, num_heads=4)
    wanted = block_sparse_attention(q, k, v, own, is_causal=True)
    assert torch.equal(layer(q, k, v, is_causal=True), wanted)
    assert (wanted - attend(q, k, v, is_causal=True)[0]).abs().max() > 1e-3
    x, losses = tokens(), set()
    for change in ({}, {"density": 0.6}, {"block_size": 32}, {"pattern_type": "strided"}):
        losses.add(round(loss_and_gradients(model_of("block_sparse", LOCAL | change), x)[0], 9))
    assert len(losses) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_disk(kind, tmp_path):
    model, x = model_of(kind, vocab_size=257), tokens()
    model.save_pretrained(tmp_path)
    again = LongNet.from_pretrained(tmp_path)
    assert again.config == model.config and hash(again.config) == hash(model.config)
    assert torch.equal(again.eval()(x), model(x))
    assert LongNetConfig.from_json(model.config.to_json()) == model.config
    config = TrainingConfig(model.config, "digest", ((N, 2),))
    assert TrainingConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("kind", ("improved", "block_sparse", "block_sparse_ring"))
@pytest.mark.parametrize("side", ("left", "right"))
def test_padding_is_an_absence_in_every_kind(kind, side):
    model, x = model_of(kind), tokens(1)[:, :-1]
    padded, mask = torch.zeros(1, N + 32, dtype=torch.long), torch.ones(1, N + 32, dtype=torch.bool)
    where = slice(32, None) if side == "left" else slice(0, N)
    padded[:, where], mask[:, where] = x, False
    got = model(padded, key_padding_mask=mask)[:, where]
    assert (got - model(x)).abs().max() < 1e-11


@pytest.mark.parametrize("kind", ("improved", "block_sparse"))
def test_documents_are_sequences_of_their_own(kind):
    model, x = model_of(kind), tokens(1)[:, :-1]
    ends = torch.tensor([0, 48, 48, N], dtype=torch.int32)
    alone = torch.cat([model(x[:, :48]), model(x[:, 48:])], 1)
    assert (model(x, cu_seqlens=ends) - alone).abs().max() < 1e-11


CUT = [(kind, "zigzag") for kind in ("ring", "block_sparse", "block_sparse_ring")] + [("block_sparse", "contiguous")]


def shares(rank, world, x):
    return [share_worker(rank, world, model_of(kind), x, layout) for kind, layout in CUT]


def test_a_share_of_every_kind_is_the_model():
    x = tokens()
    ranks = spawn_gloo(shares, 2, x)
    for i, (kind, _) in enumerate(CUT):
        wanted = loss_and_gradients(model_of(kind), x)
        for rank in ranks:
            near((rank[i]["loss"], rank[i]["grads"]), wanted)


@pytest.mark.parametrize("kind", ("block_sparse", "block_sparse_ring"))
def test_no_cache_follows_blocks(kind):
    "Said before anything is computed."
    model = model_of(kind)
    with pytest.raises(ValueError, match="no cache follows"):
        generate(model, tokens(1)[:, :16], 4)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(attention="improved", attention_options={"density": 0.1}), "did you mean|known are|alone"),
        (dict(attention="block_sparse", attention_options={"densty": 0.1}), "did you mean 'density'"),
        (dict(attention="block_sparse", attention_options={"density": 2.0}), "density must be at most 1"),
        (dict(attention="block_sparse", attention_options={"head_dim": 8}), "embed_dim / num_heads"),
        (dict(attention="ring", attention_options={"ring_size": 2}), "group of a LongNetShare"),
        (dict(attention="block_sparse", attention_options={"dropout": 0.1}), "attention_dropout"),
        (dict(attention="block_sparse", attention_options={"density": 0.1, "sparsity_ratio": 0.2}), "density alone"),
        (dict(attention="block_sparse", position="xpos"), "'rope' or 'none'"),
        (dict(attention="block_sparse", mixing="softmax"), "mixing"),
        (dict(attention="blocks"), "attention"),
    ],
)
def test_wrong_options_get_a_sentence(values, message):
    with pytest.raises(ValueError, match=message):
        LongNetConfig(**values)


def test_options_that_are_no_dict_get_a_sentence():
    with pytest.raises(TypeError, match="attention_options must be a dict"):
        LongNetConfig(attention="block_sparse", attention_options=3)


# ---------------------------------------------------------------- the old name of density


def test_density_by_its_old_name():
    "Constructor, replace, JSON of version 0.1, options of a model; both at once only if they agree."
    new, old = (SparseAttentionConfig((64,), (1,), **{name: 0.1}) for name in ("density", "sparsity_ratio"))
    assert new == old and old.density == old.sparsity_ratio == 0.1
    assert replace(new, density=0.2).sparsity_ratio == 0.2
    with pytest.raises(ValueError, match="pass density alone"):  # `replace` passes density, too
        replace(new, sparsity_ratio=0.2)
    stored = new.to_dict() | {"sparsity_ratio": 0.3}
    del stored["density"]
    assert SparseAttentionConfig.from_json(json.dumps(stored)).density == 0.3
    options = {name: LOCAL | {name: 0.1} for name in ("density", "sparsity_ratio")}
    del options["sparsity_ratio"]["density"]
    models = [LongNetConfig(attention="block_sparse", attention_options=o) for o in options.values()]
    assert models[0] == models[1]
    with pytest.raises(ValueError, match="sparsity_ratio must be left out beside density"):
        SparseAttentionConfig((64,), (1,), density=0.1, sparsity_ratio=0.2)
