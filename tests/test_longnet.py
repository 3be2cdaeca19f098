"LongNet: positions, blocks, loss, language model and encoder; GigaPath's encoder as a golden value."

import copy
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from dilated_attention_nb import longnet
from dilated_attention_nb.config import DilatedAttentionConfig, MultiheadConfig
from dilated_attention_nb.decoding import LongNetCache
from dilated_attention_nb.gigapath import GigaPathSlideEncoder
from dilated_attention_nb.kv_cache import DilatedKVCache, KVCache
from dilated_attention_nb.longnet import (
    POSITIONS,
    LayerStack,
    LongNet,
    LongNetConfig,
    LongNetEncoder,
    LongNetLayer,
    Rotation,
    longnet_125m,
    longnet_tiny,
    losses_op,
    make_rotation,
    parameter_counts,
    rotate,
    token_losses,
)
from dilated_attention_nb.multihead import MultiheadDilatedAttention
from dilated_attention_nb.testing import saved_for_backward

GOLDEN = Path(__file__).parent / "golden" / "gigapath_slide_encoder.npz"


def tokens(b=2, n=70, seed=0, vocab=256):
    return torch.randint(0, vocab, (b, n), generator=torch.Generator().manual_seed(seed))


def make(cls=LongNet, dtype=torch.float64, **values):
    torch.manual_seed(0)
    return cls(longnet_tiny(**values)).to(dtype)


# ---------------------------------------------------------------- config


def test_config_round_trips():
    config = longnet_125m(num_kv_heads=4, position="rope", dropout=0.1, drop_path=0.2, gamma_init=1.5)
    assert LongNetConfig.from_json(config.to_json()) == config
    assert LongNetConfig.from_dict(config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == config and hash(config) == hash(copy.deepcopy(config))
    assert longnet_tiny(segment_lengths=[16, 64]).segment_lengths == (16, 64)


def test_none_means_what_the_paper_does():
    config = longnet_125m()
    assert config.gain == math.sqrt(math.log(24)) and config.inner_dim == 3072 and config.scale_base == 512
    assert config.window == 32768 and config.multihead_config.gamma_init == config.gain
    assert replace(config, gamma_init=2.0).gain == 2 and replace(config, ffn_dim=100).inner_dim == 100


WIDE = dict(embed_dim=2**20, num_heads=2**14)  # of layers in TiB


@pytest.mark.parametrize(
    "build",
    [
        lambda: LongNet(LongNetConfig(vocab_size=2**31, embed_dim=2**14, num_heads=2**8)),
        lambda: LongNet(LongNetConfig(**WIDE)),
        lambda: LayerStack(LongNetConfig(**WIDE, num_layers=10_000)),
        lambda: LongNetEncoder(LongNetConfig(**WIDE, position="rope", vocab_size=None)),
        lambda: LongNetEncoder(longnet_tiny(position="rope", vocab_size=2**31, embed_dim=2**14, num_heads=2**8)),
        lambda: MultiheadDilatedAttention(MultiheadConfig(**WIDE, num_kv_heads=1), DilatedAttentionConfig((4,), (1,))),
        lambda: GigaPathSlideEncoder(**WIDE),
        lambda: LongNetCache(longnet_tiny(), 2**40),
        lambda: KVCache(2**44, 4, 16),
        lambda: DilatedKVCache(DilatedAttentionConfig((2**40,), (1,)), 4, 16),
    ],
)
def test_what_no_memory_holds_is_refused_before_it_is_built(build):
    with pytest.raises(ValueError, match=r"(the model|the layer|a cache) must fit into the [0-9.,]+ GiB of cpu"):
        build()


def test_on_meta_and_of_fake_tensors_any_size_can_be_built():
    config = LongNetConfig(vocab_size=2**31, embed_dim=2**14, num_heads=2**8, num_layers=1)
    with torch.device("meta"):
        assert LongNet(config).embed_tokens.weight.is_meta
    with FakeTensorMode():
        assert LongNet(config).embed_tokens.num_embeddings == 2**31


# ---------------------------------------------------------------- positions


def scores(config, positions, q, k, dtype=torch.float64):
    "Of `q` at every position with `k` at every position."
    q, k = (x.to(dtype).expand(1, len(positions), 1, -1) for x in (q, k))
    q, k = make_rotation(positions, config, torch.promote_types(dtype, torch.float32))(q, k)
    return q[0, :, 0].double() @ k[0, :, 0].double().T


@pytest.mark.parametrize("position", ["rope", "xpos"])
@pytest.mark.parametrize("start", [0, 1000, 2**20 + 17, 10**9])
def test_scores_depend_on_the_distance_alone(position, start):
    config = longnet_tiny(segment_lengths=(64, 256), dilation_rates=(1, 2), position=position)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    window = (start // 256) * 256 + torch.arange(256)
    table = scores(config, window, q, k)
    for distance in (0, 1, 37, 200):
        line = table.diagonal(-distance)
        assert (line - line[0]).abs().max() < 1e-14 * max(10.0, start)  # of the angle in float64
    base = scores(config, torch.arange(256), q, k)
    assert torch.allclose(table.tril(), base.tril(), atol=1e-14 * max(10.0, start))


def test_xpos_is_the_papers_formula():
    config = longnet_tiny(position="xpos", segment_lengths=(4096,), dilation_rates=(1,))
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    table = scores(config, torch.tensor([3, 700, 4000]), q, k)
    a, b = (torch.view_as_complex(x.flatten().view(8, 2)) for x in (q, k))
    i = torch.arange(8)
    theta, zeta = 10_000.0 ** (-2 * i.double() / 16), (2 * i.double() / 16 + 0.4) / 1.4
    for row, n in enumerate((3, 700, 4000)):
        for column, m in enumerate((3, 700, 4000)):
            want = (a * b.conj() * zeta ** ((n - m) / 512) * torch.polar(torch.ones(8).double(), (n - m) * theta)).real
            assert abs(table[row, column] - want.sum()) < 1e-11 * max(1.0, float(want.abs().max()))


def test_angles_of_far_positions_are_exact():
    near, far = (scores(longnet_tiny(), s + torch.arange(64), *VECTORS, torch.float32) for s in (0, 2**24))
    assert (near - far).tril().abs().max() < 3e-5


VECTORS = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_papers_window_stays_finite_and_accurate(dtype):
    config = longnet_125m(embed_dim=192, num_heads=12)
    positions = 31 * 32768 + torch.tensor([0, 1, 5000, 16384, 30000, 32767])
    exact, found = (scores(config, positions, *VECTORS, kind) for kind in (torch.float64, dtype))
    assert found.isfinite().all() and make_rotation(positions, config).queries.isfinite().all()
    size = float((VECTORS[0].abs() * VECTORS[1].abs()).sum())
    assert (found - exact).tril().abs().max() < 4 * torch.finfo(dtype).eps * size


def test_longer_windows_take_a_larger_base():
    long = longnet_125m(segment_lengths=(2**20,), dilation_rates=(1,))
    assert long.scale_base > 512
    assert make_rotation(torch.tensor([0, 2**20 - 1]), long).exponent <= longnet.LARGEST_EXPONENT
    assert make_rotation(torch.tensor([0, 2**20 - 1]), long).keys.isfinite().all()
    with pytest.raises(ValueError, match="xpos_scale_base must be at least 14928"):
        replace(long, xpos_scale_base=512.0)
    assert replace(long, xpos_scale_base=20_000.0).scale_base == 20_000


def test_float16_is_refused_where_it_would_overflow():
    q = torch.randn(1, 4, 1, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="bfloat16 or position='rope'"):
        make_rotation(torch.arange(4), longnet_125m())(q, q)
    for config in (longnet_125m(position="rope"), longnet_125m(segment_lengths=(4096,), dilation_rates=(1,))):
        turned, _ = make_rotation(torch.arange(4), config)(q, q)
        assert turned.dtype == torch.float16 and turned.isfinite().all()


def test_positions_are_different():
    outs = [make(position=position)(tokens()) for position in POSITIONS]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(outs, outs[1:] + outs[:1]))
    assert not torch.allclose(make(rope_base=100.0)(tokens()), outs[0])
    assert not torch.allclose(make(xpos_scale_base=50.0)(tokens()), outs[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rotate_eager_and_compiled_arithmetic_agree(dtype, monkeypatch):
    x, angle = torch.randn(2, 7, 3, 16).to(dtype), torch.randn(7, 8)
    factors = torch.stack((angle.cos(), angle.sin()), -1)
    eager = rotate(x, factors)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert eager.dtype == dtype and torch.allclose(rotate(x, factors), eager, atol=2 * torch.finfo(dtype).eps)


def test_late_queries_take_the_last_positions():
    rotation = make_rotation(torch.arange(9), longnet_tiny(), torch.float64)
    q, k = torch.randn(2, 1, 9, 2, 16, dtype=torch.float64)
    assert isinstance(rotation, Rotation)
    assert torch.equal(rotation(q[:, 6:], k)[0], rotation(q, k)[0][:, 6:])


# ---------------------------------------------------------------- blocks


def test_magneto_statistics():
    config = longnet_tiny(embed_dim=256, num_layers=6)
    torch.manual_seed(0)
    layer = LongNetLayer(config, 0)
    gains = {"q_proj": 1.0, "k_proj": 1.0, "v_proj": config.gain, "out_proj": config.gain}
    linears = {name: (getattr(layer.self_attn, name), gain) for name, gain in gains.items()}
    linears |= {name: (getattr(layer.ffn, name), config.gain) for name in ("fc1", "fc2")}
    for linear, gain in linears.values():
        std, count = gain * (2 / sum(linear.weight.shape)) ** 0.5, linear.weight.numel()
        assert abs(linear.weight.std() / std - 1) < 5 / (2 * count) ** 0.5
        assert not linear.bias.any()
    model = LongNet(config)
    assert abs(model.embed_tokens.weight.std() * 16 - 1) < 0.02


@pytest.mark.parametrize("mixing", ["softmax", "groups"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_the_stream_grows_as_predicted(mixing, is_causal):
    config = longnet_tiny(
        num_layers=32, position="rope", mixing=mixing, segment_lengths=(32, 96), dilation_rates=(1, 1)
    )
    torch.manual_seed(0)
    stack = LayerStack(config)
    with torch.no_grad():
        for depth, x in enumerate(stack.states(torch.randn(2, 96, 64), is_causal=is_causal)):
            want = math.sqrt(1 + 2.6 * config.gain**2 * depth)
            assert abs(x.square().mean().sqrt() / want - 1) < 0.15


def test_gradients_neither_vanish_nor_explode_over_48_layers():
    model = make(num_layers=48, dtype=torch.float32)
    model(tokens()[:, :-1], tokens()[:, 1:]).backward()
    norms = torch.stack([layer.ffn.fc1.weight.grad.norm() for layer in model.decoder.layers])
    assert norms.max() / norms.min() < 30


def test_layer_is_prenorm_with_norms_inside():
    layer = make(LayerStack, position="none").layers[0]
    x = torch.randn(1, 20, 64, dtype=torch.float64)
    said, _ = layer.self_attn(layer.self_attn_layer_norm(x), is_causal=True)
    y = x + said
    inner = F.layer_norm(F.gelu(layer.ffn.fc1(layer.final_layer_norm(y))), (256,), eps=1e-5)
    assert torch.allclose(layer(x, is_causal=True), y + layer.ffn.fc2(inner), atol=1e-13)
    assert layer.self_attn.inner_attn_ln is not None


# ---------------------------------------------------------------- GigaPath's encoder


def table_of(positions: torch.Tensor, grid: int, width: int) -> torch.Tensor:
    "The fixed sine-cosine table of GigaPath: column, then row, each sines and cosines."
    omega = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = [c[..., None].double() * omega for c in ((positions - 1) % grid, (positions - 1) // grid)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], -1).float()


def test_gigapaths_encoder_is_reproduced_layer_by_layer():
    file = np.load(GOLDEN)
    meta = json.loads(file["meta"].tobytes())
    p = {name[6:]: torch.tensor(file[name]) for name in file.files if name.startswith("param.")}
    branches = tuple(meta["segment_lengths"]), tuple(meta["dilation_rates"])
    config = LongNetConfig(
        meta["embed_dim"], meta["depth"], meta["heads"], *branches, vocab_size=None, ffn_dim=meta["ffn_dim"],
        ragged="zeros", position="none",
    )  # fmt: skip
    encoder = LongNetEncoder(config).eval()
    encoder.load_state_dict({n[8:]: x for n, x in p.items() if n.startswith("encoder.")})  # strict: names agree
    x = F.linear(torch.tensor(file["x"]), p["patch_embed.proj.weight"], p["patch_embed.proj.bias"])
    column, row = torch.floor(torch.tensor(file["coords"]) / meta["tile_size"]).long().unbind(-1)
    x = x + table_of(column * meta["slide_ngrids"] + row + 1, meta["slide_ngrids"], config.embed_dim)
    x = torch.cat((p["cls_token"], x), 1)

    def pooled(state):
        return F.layer_norm(state, (config.embed_dim,), p["norm.weight"], p["norm.bias"], meta["norm_eps"])[:, 0]

    with torch.no_grad():
        for k, state in enumerate(encoder.states(x)):
            assert np.abs(pooled(state).numpy() - file[f"layer{k}"]).max() < 1e-5
        assert np.abs(pooled(encoder(x)).numpy() - file["out"]).max() < 1e-5


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_losses_are_cross_entropy(dtype, rows, monkeypatch):
    monkeypatch.setattr(longnet, "_LOGITS", rows * 50)
    x, weight = torch.randn(3, 11, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    targets = tokens(3, 11, vocab=50)
    targets[0, 3:6] = targets[2] = -100
    factors = torch.rand(3, 11, dtype=torch.float64)
    results = []
    for kind in (dtype, torch.float64):
        a, w = x.to(kind).requires_grad_(), weight.to(kind).requires_grad_()
        if kind == dtype:
            losses = token_losses(a, w, targets)
        else:
            losses = F.cross_entropy((a @ w.T).flatten(0, 1), targets.flatten(), reduction="none").view(3, 11)
        results.append((losses, *torch.autograd.grad((losses * factors.to(losses)).sum(), (a, w))))
    for got, want in zip(*results):
        assert (got - want).abs().max() < 40 * torch.finfo(dtype).eps
    assert results[0][0].dtype == torch.promote_types(dtype, torch.float32) and results[0][1].dtype == dtype
    assert not results[0][0][targets == -100].any() and not results[0][1][targets == -100].any()


def test_losses_pass_gradcheck_and_opcheck():
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 4, -100, 2, 2, 1])
    torch.autograd.gradcheck(lambda x, w: token_losses(x, w, targets), (x, weight))
    torch.library.opcheck(losses_op, (x, weight, targets, -100))


def test_loss_is_the_mean_over_targets_that_count():
    model, given = make(), tokens(n=41)
    logits = model(given[:, :-1])
    targets = given[:, 1:].clone()
    targets[0, :10] = -100
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 40)
    assert torch.allclose(model(given[:, :-1], targets, reduction="none"), want, atol=1e-12)
    assert torch.allclose(model(given[:, :-1], targets), want.sum() / 70, atol=1e-12)
    padding = torch.arange(40) >= torch.tensor([[40], [25]])
    padded = model(given[:, :-1], targets, padding)
    assert torch.allclose(padded, (want[0].sum() + want[1, :25].sum()) / 55, atol=1e-12)
    assert model(given[:, :-1], torch.full_like(targets, -100)) == 0


def test_logits_never_exist_at_once():
    model = make(vocab_size=20_000, dtype=torch.float32)
    given = tokens(1, 512, vocab=20_000)
    saved = saved_for_backward(model, given, given).num_bytes
    assert saved < 512 * 20_000 * 4  # the logits alone would be more than everything that is kept


# ---------------------------------------------------------------- the language model


@pytest.mark.parametrize("mixing", ["softmax", "groups"])
@pytest.mark.parametrize("position", POSITIONS)
def test_causal_through_the_whole_model(mixing, position):
    model = make(mixing=mixing, position=position, num_kv_heads=2, num_layers=3)
    given, embedded = tokens(), []
    model.embed_tokens.register_forward_hook(lambda m, a, out: embedded.append(out) or out.retain_grad())
    for t in (1, 16, 33, 69):
        other = given.clone()
        other[:, t:] = (other[:, t:] + 1 + tokens(seed=t)[:, t:] % 255) % 256
        past = model(given)[:, :t]
        seen = embedded[-1]
        past.square().sum().backward()
        assert seen.grad[:, :t].any() and not seen.grad[:, t:].any()
        assert torch.equal(past, model(other)[:, :t])


def test_prefixes_are_prefixes():
    model, given = make(), tokens(n=100)
    whole = model(given)
    for n in (1, 5, 16, 17, 63, 64, 65):
        assert torch.allclose(model(given[:, :n]), whole[:, :n], atol=1e-12)


def test_batch_rows_are_independent():
    model, given = make(), tokens(3)
    other = tokens(3, seed=4)
    other[1] = given[1]
    assert torch.equal(model(given)[1], model(other)[1])
    assert torch.allclose(model(given[1:2])[0], model(given)[1], atol=1e-12)


@pytest.mark.parametrize("cls", [LongNet, LongNetEncoder])
@pytest.mark.parametrize("mixing", ["softmax", "groups"])
def test_padding_is_not_there(cls, mixing):
    model = make(cls, mixing=mixing, position="rope")
    given = tokens()
    padding = torch.arange(70) >= torch.tensor([[70], [45]])
    padded = model(given, key_padding_mask=padding)
    assert torch.allclose(padded[1, :45], model(given[1:, :45])[0], atol=1e-12)
    changed = given.clone()
    changed[1, 45:] = 7
    assert torch.equal(model(changed, key_padding_mask=padding)[1, :45], padded[1, :45])


def test_it_survives_what_modules_go_through(tmp_path):
    model, given = make(), tokens()
    want = model(given)
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(given[:, :-1], given[:, 1:]).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = LongNet(model.config).double()
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(twin(given), want) and twin.head_weight is twin.embed_tokens.weight
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        narrow = copy.deepcopy(model).to(dtype)(given)
        assert narrow.dtype == dtype and (narrow - want).abs().max() < 300 * torch.finfo(dtype).eps


def test_bfloat16_parameters_and_autocast_train():
    given = tokens()
    wide = make(dtype=torch.float32)
    loss = wide(given[:, :-1], given[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = wide(given[:, :-1], given[:, 1:])
    narrow = make(dtype=torch.bfloat16)
    half = narrow(given[:, :-1], given[:, 1:])
    assert mixed.dtype == half.dtype == torch.float32
    assert abs(mixed - loss) < 0.02 and abs(half - loss) < 0.05
    for model, found in ((wide, mixed), (narrow, half)):
        found.backward()
        assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in model.parameters())


def test_the_head_is_tied_or_not():
    tied, free = make(), make(tie_embeddings=False)
    assert not any("output" in name for name in tied.state_dict())
    assert free.head_weight is free.output_projection.weight
    assert len(list(free.parameters())) == len(list(tied.parameters())) + 1
    free.embed_tokens.load_state_dict(tied.embed_tokens.state_dict())
    free.decoder.load_state_dict(tied.decoder.state_dict())
    nn.init.zeros_(free.head_weight)
    assert not free(tokens()).any() and tied(tokens()).any()


@pytest.mark.parametrize("field", ["dropout", "attention_dropout", "activation_dropout", "drop_path"])
def test_every_dropout_acts_in_training_only(field):
    plain, dropping = make(), make(**{field: 0.5})
    assert torch.equal(dropping.eval()(tokens()), plain(tokens()))
    assert not torch.allclose(dropping.train()(tokens()), plain(tokens()), atol=1e-3)


def test_paths_are_dropped_by_depth_and_whole():
    stack = make(LayerStack, num_layers=3, drop_path=0.5, position="none")
    assert [layer.drop_path for layer in stack.layers] == [0, 0.25, 0.5]
    layer, x = stack.layers[2], torch.randn(4000, 2, 64, dtype=torch.float64)
    added = layer._dropped(x)
    kept = added.flatten(1).any(1)
    assert torch.equal(added[kept], x[kept] * 2) and abs(kept.double().mean() - 0.5) < 0.05


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpoints_save_memory_and_change_nothing(dropout):
    given, saved, grads = tokens(), [], []
    for recompute in (False, True):
        model = make(num_layers=4, activation_checkpointing=recompute, dropout=dropout)
        saved.append(saved_for_backward(model, given[:, :-1], given[:, 1:]).num_bytes)
        torch.manual_seed(3)
        model(given[:, :-1], given[:, 1:]).backward()
        grads.append([p.grad for p in model.parameters()])
    assert saved[1] < saved[0] / 3
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_every_attention_is_the_same_model():
    outs = [make(attention=kind)(tokens()) for kind in ("auto", "standard", "improved")]
    assert all(torch.allclose(out, outs[0], atol=1e-12) for out in outs)


def test_it_learns_what_it_can_copy():
    model = make(dtype=torch.float32)
    given = tokens(4, 24).repeat(1, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(given[:, :-1], given[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


def counting(graphs):
    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.mark.parametrize("position", ["xpos", pytest.param("rope", marks=pytest.mark.slow)])
def test_compiled_it_gives_the_same_numbers_for_eight_lengths(position):
    torch._dynamo.reset()
    graphs, model = [], make(position=position, num_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend=counting(graphs))
    for n in (5, 16, 17, 40, 64, 65, 100, 130):
        given = tokens(n=n + 1)
        assert torch.allclose(compiled(given[:, :-1]), model(given[:, :-1]), atol=1e-11)
    assert len(graphs) <= 3
    graphs.clear()
    for n in (5, 16, 17, 40, 64, 65, 100, 130):
        given = tokens(n=n + 1)
        loss = compiled(given[:, :-1], given[:, 1:])
        assert torch.allclose(loss, model(given[:, :-1], given[:, 1:]), atol=1e-11)
    assert len(graphs) <= 3


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_with_gradients(backend):
    "The default compiler's backend writes and compiles C++ for half a minute."
    torch._dynamo.reset()
    model, given = make(dtype=torch.float32, num_layers=1), tokens(n=33)
    found = []
    for fn in (model, torch.compile(model, fullgraph=True, backend=backend)):
        loss = fn(given[:, :-1], given[:, 1:])
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for a, b in zip(*found):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6


def test_compiled_with_checkpoints():
    torch._dynamo.reset()
    model, given = make(activation_checkpointing=True), tokens(n=33)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for fn in (model, compiled):
        grads.append(torch.autograd.grad(fn(given[:, :-1], given[:, 1:]), list(model.parameters())))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads))


# ---------------------------------------------------------------- the encoder


def test_encoder_reads_embeddings_and_tokens():
    encoder, given = make(LongNetEncoder, position="rope"), tokens()
    embedded = encoder.embed_tokens(given) * 8
    assert torch.equal(encoder(given), encoder(embedded))
    states = list(encoder.states(given))
    assert len(states) == 3 and torch.equal(states[0], embedded)
    assert torch.equal(encoder.layer_norm(states[-1]), encoder(given))


def test_encoder_looks_both_ways():
    encoder = make(LongNetEncoder, position="rope", vocab_size=None)
    x = torch.randn(1, 64, 64, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(encoder(x)[0, 20].square().sum(), x)
    assert grad[0, 21:].any()
    (grad,) = torch.autograd.grad(encoder(x, is_causal=True)[0, 20].square().sum(), x)
    assert not grad[0, 21:].any()


# ---------------------------------------------------------------- sizes


def test_presets_have_the_papers_size():
    counts = parameter_counts(longnet_125m())
    assert 120e6 < counts["total"] < 130e6
    assert counts["embeddings"] == 50_304 * 768
    assert sum(counts.values()) == 2 * counts["total"]


@pytest.mark.parametrize("values", [{}, {"tie_embeddings": False}, {"bias": False}, {"num_kv_heads": 1}])
def test_counts_are_those_of_the_model(values):
    config = longnet_tiny(**values)
    counts, model = parameter_counts(config), LongNet(config)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    layer = model.decoder.layers[0]
    projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.out_proj)
    assert counts["attention"] == 2 * sum(p.numel() for proj in projections for p in proj.parameters())
    assert counts["feed-forward"] == 2 * sum(
        p.numel() for fc in (layer.ffn.fc1, layer.ffn.fc2) for p in fc.parameters()
    )
    assert parameter_counts(longnet_tiny(vocab_size=None))["embeddings"] == 0


# ---------------------------------------------------------------- what it refuses

T = tokens(2, 10)


BAD = {
    "no layers": (ValueError, "num_layers", lambda: longnet_tiny(num_layers=0)),
    "layers a float": (TypeError, "num_layers", lambda: longnet_tiny(num_layers=2.0)),
    "layers a bool": (TypeError, "num_layers", lambda: longnet_tiny(num_layers=True)),
    "width of heads": (ValueError, "num_heads could be", lambda: longnet_tiny(num_heads=5)),
    "heads for groups": (ValueError, "num_heads", lambda: make(num_heads=1, mixing="groups")),
    "kv heads": (ValueError, "num_kv_heads", lambda: longnet_tiny(num_kv_heads=3)),
    "no vocabulary": (ValueError, "vocab_size", lambda: longnet_tiny(vocab_size=0)),
    "ffn_dim a string": (TypeError, "ffn_dim", lambda: longnet_tiny(ffn_dim="wide")),
    "branches unequal": (ValueError, "segment_lengths", lambda: longnet_tiny(dilation_rates=(1,))),
    "mixing": (ValueError, "did you mean 'softmax'", lambda: longnet_tiny(mixing="softmx")),
    "offsets": (ValueError, "offsets", lambda: longnet_tiny(offsets="none")),
    "ragged": (ValueError, "ragged", lambda: longnet_tiny(ragged="pad")),
    "position": (ValueError, "did you mean 'rope'", lambda: longnet_tiny(position="roope")),
    "position not a string": (TypeError, "position", lambda: longnet_tiny(position=3)),
    "attention": (ValueError, "attention must be one of", lambda: longnet_tiny(attention="rings")),
    "dropout 1": (ValueError, "dropout", lambda: longnet_tiny(dropout=1.0)),
    "dropout NaN": (ValueError, "attention_dropout", lambda: longnet_tiny(attention_dropout=math.nan)),
    "activation dropout": (ValueError, "activation_dropout", lambda: longnet_tiny(activation_dropout=-0.1)),
    "drop_path": (ValueError, "drop_path", lambda: longnet_tiny(drop_path=2)),
    "gamma": (ValueError, "gamma_init", lambda: longnet_tiny(gamma_init=-1)),
    "rope_base": (ValueError, "rope_base", lambda: longnet_tiny(rope_base=0)),
    "xpos base": (ValueError, "xpos_scale_base", lambda: longnet_tiny(xpos_scale_base=0.1)),
    "eps": (ValueError, "layer_norm_eps", lambda: longnet_tiny(layer_norm_eps=0)),
    "tie a number": (TypeError, "tie_embeddings", lambda: longnet_tiny(tie_embeddings=1)),
    "checkpointing a string": (
        TypeError,
        "activation_checkpointing",
        lambda: longnet_tiny(activation_checkpointing="y"),
    ),
    "unknown field": (ValueError, "did you mean 'num_layers'", lambda: LongNetConfig.from_dict({"num_layer": 2})),
    "language model without words": (ValueError, "vocab_size", lambda: make(vocab_size=None)),
    "tokens a list": (TypeError, "tokens must be a tensor", lambda: make()([[1, 2]])),
    "tokens floats": (TypeError, ".long()", lambda: make()(T.float())),
    "tokens bool": (TypeError, "tokens must be int64", lambda: make()(T > 3)),
    "tokens rank": (ValueError, "add the batch", lambda: make()(T[0])),
    "tokens empty": (ValueError, "neither 0", lambda: make()(T[:, :0])),
    "tokens too large": (ValueError, "tokens must be in [0, 256), got 300", lambda: make()(T + 300 - T.max())),
    "tokens negative": (ValueError, "got -1", lambda: make()(T - T.min() - 1)),
    "targets shape": (ValueError, "targets must have the shape of tokens", lambda: make()(T, T[:, 1:])),
    "targets floats": (TypeError, "targets must be int64", lambda: make()(T, T.double())),
    "targets too large": (ValueError, "targets must be -100 or in [0, 256), got 999", lambda: make()(T, T * 0 + 999)),
    "targets negative": (ValueError, "got -1", lambda: make()(T, T * 0 - 1)),
    "reduction": (ValueError, "reduction", lambda: make()(T, T, reduction="sum")),
    "mask dtype": (TypeError, "key_padding_mask must be bool", lambda: make()(T, key_padding_mask=T)),
    "mask shape": (ValueError, "key_padding_mask", lambda: make()(T, T, key_padding_mask=T[:, 1:] > 0)),
    "length": (ValueError, "ragged='mask'", lambda: make(ragged="error")(T)),
    "xpos both ways": (ValueError, "'rope' or 'none'", lambda: make(LongNetEncoder)(T)),
    "tokens without words": (
        TypeError,
        "vocab_size allows tokens",
        lambda: make(LongNetEncoder, vocab_size=None, position="rope")(T),
    ),
    "embeddings of another width": (
        ValueError,
        "embed_dim 64",
        lambda: make(LongNetEncoder, vocab_size=None, position="rope")(torch.zeros(1, 5, 32).double()),
    ),
    "embeddings dtype": (
        TypeError,
        "x must have the module's dtype torch.float64",
        lambda: make(LongNetEncoder, vocab_size=None, position="rope")(torch.zeros(1, 5, 64)),
    ),
    "embeddings device": (
        ValueError,
        "x must be on the module's device cpu",
        lambda: make(LongNetEncoder, vocab_size=None, position="rope")(torch.zeros(1, 5, 64, device="meta")),
    ),
    "stack of a list": (TypeError, "x must be a tensor", lambda: make(LayerStack, position="rope")([1.0])),
    "tokens device": (ValueError, "tokens must be on the module's device", lambda: make()(T.to("meta"))),
    "targets device": (ValueError, "targets must be on the module's device", lambda: make()(T, T.to("meta"))),
    "reduction without targets": (ValueError, "reduction", lambda: make()(T, reduction="sum")),
    "losses of other targets": (
        ValueError,
        "targets must have x's shape without the last dimension",
        lambda: token_losses(torch.zeros(2, 10, 8), torch.zeros(256, 8), T[:, :5]),
    ),
    "losses of floats": (
        TypeError,
        "targets must be int64",
        lambda: token_losses(torch.zeros(2, 10, 8), torch.zeros(256, 8), torch.zeros(2, 10)),
    ),
    "losses of another width": (
        ValueError,
        "weight must have a row of x's width",
        lambda: token_losses(torch.zeros(2, 10, 8), torch.zeros(256, 9), torch.zeros(2, 10).long()),
    ),
    "no embeddings": (
        ValueError,
        "none of them 0",
        lambda: make(LongNetEncoder, vocab_size=None, position="rope")(torch.zeros(1, 0, 64).double()),
    ),
    "rotation by no position": (
        ValueError,
        "position must be one of 'xpos', 'rope'",
        lambda: make_rotation(torch.arange(4), longnet_tiny(position="none")),
    ),
    "not a config": (TypeError, "config must be a LongNetConfig", lambda: LongNet({"num_layers": 2})),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, text, call = BAD[case]
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)
