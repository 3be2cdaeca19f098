"PyTorch's own machinery around the models: FSDP, adapters, quantisation, meta devices, threads, torch.func, fakes."

import copy
import itertools
import random
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from dilated_attention_nb import longnet
from dilated_attention_nb.config import DilatedAttentionConfig, MultiheadConfig
from dilated_attention_nb.decoding import generate
from dilated_attention_nb.embeddings import NgramEmbedding
from dilated_attention_nb.gigapath import GigaPathSlideEncoder, attention_rollout
from dilated_attention_nb.longnet import (
    LayerStack,
    LongNet,
    LongNetConfig,
    LongNetEncoder,
    evaluating,
    longnet_tiny,
    token_losses,
)
from dilated_attention_nb.multihead import MultiheadDilatedAttention


def tokens(b=2, n=65, seed=0, vocab=256):
    return torch.randint(0, vocab, (b, n), generator=torch.Generator().manual_seed(seed))


def make(cls=LongNet, seed=0, **values):
    torch.manual_seed(seed)
    return cls(longnet_tiny(**values))


def loss_of(model, x=None):
    x = tokens() if x is None else x
    return model(x[:, :-1], x[:, 1:])


class Adapter(nn.Module):
    "As LoRA puts one: the base's output and something learnt."

    def __init__(self, base, dropout=0.0):
        super().__init__()
        self.base, self.drop = base, nn.Dropout(dropout)
        self.up = nn.Linear(base.in_features, base.out_features)

    weight = property(lambda self: self.base.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.drop(x))


# ---------------------------------------------------------------- FSDP


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("position", ["xpos", "rope", "none"])
@pytest.mark.parametrize("recompute", [False, True])
def test_fsdp_in_mixed_precision(one_process, position, recompute):
    model = make(position=position, activation_checkpointing=recompute, dropout=0.1)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in model.decoder.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    loss = loss_of(model)
    loss.backward()
    assert loss.isfinite() and all(p.grad.full_tensor().isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_head_and_embeddings_in_shares_of_their_own(one_process, tied, small, monkeypatch):
    "Gradients are those of one device, also where the head is called several times."
    plain, model = make(tie_embeddings=tied), make(tie_embeddings=tied)
    fully_shard(model.embed_tokens)
    if not tied:
        fully_shard(model.output_projection)
    for layer in model.decoder.layers:
        fully_shard(layer)
    fully_shard(model)
    if small:
        monkeypatch.setattr(longnet, "_LOGITS", 256 * 50)
    for _ in range(2):
        loss_of(plain).backward()
        loss = loss_of(model)
        loss.backward()
    torch.testing.assert_close(loss, loss_of(plain))
    for a, b in zip(plain.parameters(), model.parameters()):
        torch.testing.assert_close(b.grad.full_tensor(), a.grad)
    assert torch.equal(model.generate(tokens(1, 9), 5, temperature=0), plain.generate(tokens(1, 9), 5, temperature=0))


# ---------------------------------------------------------------- what stands at a Linear's place


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_what_stands_in_for_the_head_is_called(tied, small, monkeypatch):
    if small:
        monkeypatch.setattr(longnet, "_LOGITS", 256 * 50)
    model, x = make(tie_embeddings=tied), tokens()
    model.output_projection = Adapter(nn.Linear(64, 256))
    logits = model(x[:, :-1])
    torch.testing.assert_close(logits, model.output_projection(model.hidden(x[:, :-1])))
    want = nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    loss = loss_of(model)
    torch.testing.assert_close(loss, want)
    up = model.output_projection.up.weight
    torch.testing.assert_close(*(torch.autograd.grad(y, up)[0] for y in (loss, want)))
    assert torch.equal(model.generate(x[:, :5], 1, temperature=0)[:, 0], model.eval()(x[:, :5])[:, -1].argmax(-1))


def test_the_bias_of_a_head_counts():
    model, x = make(tie_embeddings=False), tokens()
    model.output_projection = nn.Linear(64, 256)
    nn.init.normal_(model.output_projection.bias)
    want = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(loss_of(model), want)


def test_global_hooks_see_every_linear():
    model, seen = make(tie_embeddings=False), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        loss_of(model)
    finally:
        handle.remove()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 13 and all(any(m is s for s in seen) for m in linears)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj"])
def test_projections_are_called(name):
    model = make()
    attention = model.decoder.layers[0].self_attn
    setattr(attention, name, Adapter(getattr(attention, name)))
    loss_of(model).backward()
    assert getattr(attention, name).up.weight.grad.any()
    attention.reset_parameters()  # of what has one


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrized_weights():
    model, x = make(tie_embeddings=False), tokens()
    want = copy.deepcopy(model)
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    for module in linears:
        parametrize.register_parametrization(module, "weight", Doubled())
    with torch.no_grad():
        for module in want.modules():
            if type(module) is nn.Linear:
                module.weight.mul_(2)
    torch.testing.assert_close(loss_of(model, x), loss_of(want, x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_dynamic_quantisation(tied):
    model = make(tie_embeddings=tied).eval()
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    count = sum(isinstance(m, torch.ao.nn.quantized.dynamic.Linear) for m in small.modules())
    assert count == 12 + (not tied)
    assert (small(tokens()) - model(tokens())).norm() < 0.1 * model(tokens()).norm()
    assert loss_of(small).isfinite() and small.generate(tokens(2, 5), 3).shape == (2, 3)


# ---------------------------------------------------------------- fresh models


MODELS = {
    "tied": lambda: make(),
    "untied": lambda: make(tie_embeddings=False, gamma_init=3.0, num_kv_heads=2),
    "encoder": lambda: make(LongNetEncoder, position="rope"),
    "multihead": lambda: MultiheadDilatedAttention(
        MultiheadConfig(64, 4, gamma_init=2.0), DilatedAttentionConfig((8,), (1,))
    ),
    "slides": lambda: GigaPathSlideEncoder(in_chans=16, embed_dim=64, depth=1, num_heads=4),
    "ngrams": lambda: NgramEmbedding(257, 64, (2, 3), 512),
}


@pytest.mark.parametrize("order", ["as they come", "backwards", "shuffled"])
@pytest.mark.parametrize("name", MODELS)
def test_from_meta_every_reset_gives_a_fresh_model(name, order):
    fresh = MODELS[name]()
    with torch.device("meta"):
        model = MODELS[name]()
    model.to_empty(device="cpu")
    modules = list(model.modules())
    if order != "as they come":
        modules = modules[::-1] if order == "backwards" else random.Random(0).sample(modules, len(modules))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    for module in modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for (key, a), b in zip(fresh.named_parameters(), model.parameters()):
        tolerance = 5 / (2 * a.numel()) ** 0.5  # five standard errors of a standard deviation, of each
        assert abs(b.std() - a.std()) <= 2 * tolerance * a.std(), key
        assert abs(b.mean() - a.mean()) <= 10 / a.numel() ** 0.5 * a.std(), key


def test_a_copy_resets_itself():
    model = make()
    twin = copy.deepcopy(model)
    twin.decoder.layers[0].ffn.fc1.reset_parameters()
    a, b = (m.decoder.layers[0].ffn.fc1.weight for m in (model, twin))
    assert not torch.equal(a, b)
    for first, second in zip(model.parameters(), make().parameters()):
        assert torch.equal(first, second)


# ---------------------------------------------------------------- threads


class Noisy(nn.Embedding):
    "A foreign module that asks for its mode itself, and remembers its calls."

    calls = 0

    def forward(self, x):
        self.calls += 1
        out = nn.functional.dropout(super().forward(x), 0.5, self.training)
        return out + torch.randn_like(out) if self.training else out


def foreign(model):
    model.embed_tokens = nn.Sequential(Noisy(256, 64), nn.Dropout(0.5))
    model.output_projection = Adapter(nn.Linear(64, 256), dropout=0.5)
    return model


RANDOM = dict(dropout=0.5, attention_dropout=0.5, activation_dropout=0.5, drop_path=0.5)


@pytest.mark.parametrize("outer", [lambda model: model, foreign], ids=["own", "foreign"])
def test_threads_that_generate_do_not_disturb_each_other(outer):
    model, prompt, texts, modes = outer(make(**RANDOM)), torch.arange(20), [], []
    modules = list(model.modules())
    want = tuple(copy.deepcopy(model).eval().generate(prompt, 12, temperature=0).tolist())

    def work():
        for _ in range(2):
            texts.append(tuple(model.generate(prompt, 12, temperature=0).tolist()))
            modes.append(all(module.training for module in modules))

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert texts == [want] * 16 and all(modes)
    assert outer is not foreign or model.embed_tokens[0].calls > 0


def test_rollout_does_not_touch_the_model():
    torch.manual_seed(0)
    model = GigaPathSlideEncoder(in_chans=16, embed_dim=64, depth=2, num_heads=4, dropout=0.5, check_layout=False)
    x, coords, seen = torch.randn(1, 9, 16), torch.arange(18).reshape(1, 9, 2) * 256.0, []
    model.encoder.layers[0].register_forward_hook(lambda *_: seen.append(model.training))
    shares = attention_rollout(model, x, coords)
    assert seen == [True] and torch.equal(shares, attention_rollout(model.eval(), x, coords))


def test_a_twin_shares_everything_but_the_mode():
    model = foreign(make(**RANDOM))
    twin = evaluating(model)
    assert not any(m.training for m in twin.modules()) and all(m.training for m in model.modules())
    assert isinstance(twin, LongNet) and isinstance(twin.decoder.layers[0], longnet.LongNetLayer)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters()))
    assert twin.decoder is twin._modules["decoder"] and twin.decoder is not model.decoder
    handle = model.decoder.layers[0].register_forward_hook(lambda module, inputs, out: 0 * out)
    assert not twin.decoder.layers[0](torch.randn(1, 16, 64)).any()
    handle.remove()
    model.eval()
    assert evaluating(model) is model
    compiled = make(**RANDOM)
    compiled.decoder.layers[0].compile(backend="eager")
    compiled.decoder.layers[1] = torch.compile(compiled.decoder.layers[1], backend="eager")
    assert torch.equal(*(compiled.generate(torch.arange(9), 4, temperature=0) for _ in range(2)))


# ---------------------------------------------------------------- torch.func, fakes, flops


def test_vmap_over_a_model():
    model, x = make().eval(), tokens(6, 32).view(3, 2, 32)
    torch.testing.assert_close(torch.func.vmap(model)(x), torch.stack([model(row) for row in x]))
    losses = torch.func.vmap(lambda x: model(x[:, :-1], x[:, 1:]))(x)
    torch.testing.assert_close(losses, torch.stack([loss_of(model, row) for row in x]))


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_each_sample(tied):
    model, x = make(tie_embeddings=tied), tokens(3, 33)
    parameters = dict(model.named_parameters())

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row[None, :-1], row[None, 1:]))

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, row in enumerate(x):
        want = torch.autograd.grad(loss_of(model, row[None]), list(parameters.values()))
        for name, gradient in zip(parameters, want):
            torch.testing.assert_close(found[name][i], gradient, atol=1e-5, rtol=1e-4)


def test_losses_can_be_differentiated_twice():
    torch.manual_seed(0)
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 4), (9, 4)))
    targets = torch.tensor([0, 8, -100, 3, 3, 1])
    assert torch.autograd.gradgradcheck(lambda x, w: token_losses(x, w, targets), (x, weight))
    assert torch.func.hessian(lambda x: token_losses(x, weight, targets).sum())(x).shape == (6, 4, 6, 4)
    _, tangent = torch.func.jvp(lambda x: token_losses(x, weight, targets).sum(), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.autograd.grad(token_losses(x, weight, targets).sum(), x)[0].sum())


@pytest.mark.parametrize("mixing", ["softmax", "groups"])
def test_a_model_has_second_derivatives_in_the_form_that_is_named(mixing):
    model = make(attention="standard", backend="math", mixing=mixing).double()
    loss, weight = loss_of(model, tokens(1, 33)), model.decoder.layers[0].self_attn.q_proj.weight
    (first,) = torch.autograd.grad(loss, weight, create_graph=True)
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (second,) = torch.autograd.grad((first * direction).sum(), weight)
    step = 1e-5
    slopes = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        slopes.append(torch.autograd.grad(loss_of(model, tokens(1, 33)), weight)[0])
        with torch.no_grad():
            weight -= sign * step * direction
    want = (slopes[0] - slopes[1]) / (2 * step)
    assert (second - want).norm() < 1e-5 * want.norm()
    with pytest.raises(NotImplementedError, match="DilatedAttention"):
        model = make()
        gradients = torch.autograd.grad(loss_of(model), model.parameters(), create_graph=True)
        sum(g.sum() for g in gradients).backward()


@pytest.mark.parametrize("cls", [LongNet, LongNetEncoder, LayerStack])
def test_fake_tensors(cls):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(1, 32, 64) if cls is LayerStack else torch.zeros(1, 32, dtype=torch.long)
        assert make(cls, position="rope")(x).shape[:2] == (1, 32)
        pad = torch.zeros(1, 32, dtype=torch.bool)
        assert make(cls, position="rope")(x, key_padding_mask=pad).shape[:2] == (1, 32)
        if cls is LongNet:
            loss_of(make(), torch.zeros(1, 33, dtype=torch.long)).backward()


def test_flops_of_the_loss_are_counted():
    model, x = make(), tokens(1, 65)
    products = {}
    for name, call in (("logits", lambda: model(x[:, :-1]).sum()), ("loss", lambda: loss_of(model, x))):
        with FlopCounterMode(display=False) as counter:
            call()
        products[name] = counter.get_total_flops()
    assert products["logits"] == products["loss"]
    with FlopCounterMode(display=False) as counter:
        h = torch.randn(7, 64, requires_grad=True)
        token_losses(h, torch.randn(11, 64, requires_grad=True), torch.zeros(7, dtype=torch.long)).sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 7 * 64 * 11


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_checkpoints(dynamic):
    torch._dynamo.reset()
    model = make(activation_checkpointing=True)
    compiled = torch.compile(model, backend="aot_eager", dynamic=dynamic or None)
    for n in (33, 49, 70) if dynamic else (33,):
        x = tokens(2, n)
        model.zero_grad()
        loss_of(model, x).backward()
        want = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        loss = loss_of(compiled, x)
        loss.backward()
        torch.testing.assert_close(loss, loss_of(model, x))
        for a, p in zip(want, model.parameters()):
            torch.testing.assert_close(p.grad, a, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- tokens and names


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_tokens_of_any_integers(dtype):
    model, x = make().eval(), tokens(2, 33, vocab=128)
    narrow = x.to(dtype)
    assert torch.equal(model(narrow), model(x)) and torch.equal(loss_of(model, narrow), loss_of(model, x))
    encoder = make(LongNetEncoder, position="rope").eval()
    assert torch.equal(encoder(narrow), encoder(x))
    written = model.generate(narrow, 6, temperature=0)
    fits = torch.iinfo(dtype).max >= 255
    assert written.dtype == (dtype if fits else torch.int64)
    assert torch.equal(written.long(), model.generate(x, 6, temperature=0))
    targets = x.view(-1).to(dtype)
    h = torch.randn(66, 8)
    assert torch.equal(
        token_losses(h, torch.ones(256, 8), targets), token_losses(h, torch.ones(256, 8), targets.long())
    )
    table = NgramEmbedding(257, 16, (2, 3), 64)
    assert torch.equal(table(narrow), table(x))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("labels", "targets="), ("attention_mask", "key_padding_mask"), ("input_ids", "tokens come first"),
        ("use_cache", "LongNetCache"), ("position_ids", "cu_seqlens"), ("target", "did you mean 'targets'"),
    ],
)  # fmt: skip
def test_names_of_other_libraries_get_a_hint(name, advice):
    model, x = make(), tokens()
    for call in (lambda: model(x, **{name: x}), lambda: model(**{name: x})):
        with pytest.raises(TypeError, match=f"LongNet.forward has no argument '{name}'.*{advice}"):
            call()


@pytest.mark.parametrize("name", ["do_sample", "max_length", "num_beams", "eos_token_id", "pad_token_id", "top_pp"])
def test_names_of_other_generators_get_a_hint(name):
    with pytest.raises(TypeError, match=f"generate has no argument '{name}'; .*(pass|temperature|top_p)"):
        make().generate(tokens(1, 3), 2, **{name: 1})
    with pytest.raises(TypeError, match=f"generate has no argument '{name}'; "):
        generate(make(), tokens(1, 3), **{name: 1})


def test_names_of_other_layers_get_a_hint():
    x = torch.randn(1, 8, 64)
    attention = MODELS["multihead"]()
    for call, name in itertools.product(
        (attention, make(LayerStack), make(LongNetEncoder, position="rope")), ("attn_mask", "attention_mask")
    ):
        with pytest.raises(TypeError, match=f"has no argument '{name}'; pass .*key_padding_mask"):
            call(x, **{name: None})


def test_an_encoder_knows_both_directions():
    for vocab_size in (5, None):
        with pytest.raises(ValueError, match="position must be 'rope' or 'none' in an encoder"):
            LongNetEncoder(LongNetConfig(vocab_size=vocab_size))


@pytest.mark.parametrize("attention", ["standard", "improved", "auto"])
def test_a_config_refuses_a_backend_that_its_attention_has_not(attention):
    if attention == "standard":
        with pytest.raises(ValueError, match="backend must be one of"):
            longnet_tiny(attention=attention, backend="triton")
    else:
        assert longnet_tiny(attention=attention, backend="triton").backend == "triton"
    layer = make(attention=attention, backend="math").decoder.layers[0].self_attn.attention
    assert layer.backend == "math"
