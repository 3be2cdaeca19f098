"What belongs to a process group: nobody keeps it, ranks that differ are told in what, and scripts end well."

import copy
import os
import pickle
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ending import KINDS

from dilated_attention_nb.distributed import DistributedConfig, DistributedLongNet, WideNorm
from dilated_attention_nb.improved import dilated_attention
from dilated_attention_nb.longnet import LongNet, longnet_tiny
from dilated_attention_nb.multihead import create_multihead_dilated_attention
from dilated_attention_nb.processes import spawn_gloo
from dilated_attention_nb.ring import gather_sequence, shard_sequence
from dilated_attention_nb.ring_block_sparse import BlockSparseRingConfig, BlockSparseRingDilatedAttention
from dilated_attention_nb.ring_dilated import RingAttentionConfig, RingDilatedAttention, simulate_ring
from dilated_attention_nb.sharded import LongNetShare, MeanLoss
from dilated_attention_nb.testing import make_qkv

# ---------------------------------------------------------------- ranks that differ


def dilated(**options) -> RingDilatedAttention:
    return RingDilatedAttention(
        RingAttentionConfig((16, 64), (1, 4), **({"mixing": "softmax", "ragged": "mask"} | options))
    )


def blocks(**options) -> BlockSparseRingDilatedAttention:
    return BlockSparseRingDilatedAttention(
        BlockSparseRingConfig((32,), (1,), pattern_type="random", block_size=16, **options)
    )


def x(batch=1, length=32, heads=4, width=8, dtype=torch.float32, grad=False) -> torch.Tensor:
    return torch.randn(batch, length, heads, width, dtype=dtype, requires_grad=grad)


MASK = torch.zeros(1, 32, dtype=torch.bool)


def attend(layer, causal=True, mask=None, kv_heads=None, train=False, **shape):
    q = x(**shape)
    k = x(**shape | {"heads": kv_heads or q.shape[2]})
    return layer.train(train)(q, k, k, causal, mask)


def forget(layer, odd):
    "One rank goes back from its output, the other attends again."
    out = attend(layer, grad=True)
    attend(layer, grad=True) if odd else out.sum().backward()


def other_order(layer, odd):
    "Two outputs, and each rank goes back from another one."
    outs = [attend(layer, grad=True) for _ in range(2)]
    outs[odd].sum().backward()


def refusing(layer, odd):
    q = x()
    layer(q, q[:, :16] if odd else q, q)


LAYERS = {  # what the ranks differ in, as the message calls it, and a call of each
    "whether there is a key_padding_mask": lambda layer, odd: attend(layer, mask=MASK if odd else None),
    "is_causal": lambda layer, odd: attend(layer, causal=odd),
    "the batch size": lambda layer, odd: attend(layer, batch=1 + odd),
    "the local length": lambda layer, odd: attend(layer, length=32 + 32 * odd),
    "dtype": lambda layer, odd: attend(layer, dtype=torch.float64 if odd else torch.float32),
    "the number of heads": lambda layer, odd: attend(layer, heads=4 - 2 * odd),
    "the number of key/value heads": lambda layer, odd: attend(layer, kv_heads=1 + odd),
    "head_dim": lambda layer, odd: attend(layer, width=8 + 8 * odd),
    "whether there are gradients": lambda layer, odd: attend(layer, grad=odd),
    "whether there is dropout": lambda layer, odd: attend(layer, train=odd),
    "the call": forget,
    "the call ": other_order,
    "the arguments": refusing,
}


def joins(odd):
    "One rank attends, the other joins shares."
    attend(dilated()) if odd else gather_sequence(x())


def of_a_model(odd):
    share = LongNetShare(LongNet(longnet_tiny()))
    tokens = torch.zeros(1, 64 * dist.get_world_size() + odd, dtype=torch.long)
    share(tokens, tokens)


OTHERS = {
    "config.mixing": lambda odd: attend(dilated(mixing="groups" if odd else "softmax")),
    "config.seed": lambda odd: attend(blocks(seed=int(odd))),
    "the layer": lambda odd: attend(blocks() if odd else dilated()),
    "the call": joins,
    "the shape of a share": lambda odd: gather_sequence(x(length=32 + odd)),
    "dtype": lambda odd: gather_sequence(x(dtype=torch.float64 if odd else torch.float32)),
    "the arguments": of_a_model,
}


def said(call, *args) -> str:
    try:
        call(*args)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def unlike(rank: int, world: int) -> dict[str, list[str]]:
    "What this rank hears in every case, after calls of both kinds were compared; in between all attend alike."
    heard = {}
    for name, layer in (("dilated", dilated(dropout=0.5)), ("blocks", blocks(dropout=0.5))):
        attend(layer), attend(layer, mask=MASK)
        heard[name] = [said(call, layer, rank == world - 1) for call in LAYERS.values()]
        assert said(attend, layer) == "accepted"
    heard["others"] = [said(call, rank == world - 1) for call in OTHERS.values()]
    assert said(attend, layer) == "accepted"
    return heard


@pytest.mark.parametrize("world", (2, pytest.param(3, marks=pytest.mark.slow)))
def test_ranks_that_disagree_later_are_told_in_what(world):
    heard = spawn_gloo(unlike, world)
    for kind, names in (("dilated", LAYERS), ("blocks", LAYERS), ("others", OTHERS)):
        for i, name in enumerate(names):
            texts = [ranks[kind][i] for ranks in heard]
            rule = f"ValueError: {name.strip()} must be the same on all ranks of a ring, got "
            assert all(text.startswith(rule) and f"on rank {world - 1}; call all" in text for text in texts), texts


# ---------------------------------------------------------------- groups that are gone


def everything(group) -> list:
    "Layers, models, and what they made."
    kept: list = [dilated(), blocks(), RingDilatedAttention(RingAttentionConfig((64,), (1,)), group)]
    kept += [layer(q, q, q) for layer in kept[:3] for q in (x(grad=True),)]
    kept += [copy.deepcopy(layer) for layer in kept[:3]]
    leaf = torch.randn(1, 64, requires_grad=True)
    kept += [shard_sequence(leaf, group), gather_sequence(shard_sequence(leaf))]
    model = LongNet(longnet_tiny())
    losses = MeanLoss(LongNetShare(model, group), group)
    tokens = torch.zeros(1, 64, dtype=torch.long)
    kept += [losses, losses(tokens, tokens), torch.optim.AdamW(model.parameters())]
    return kept


def asked(call, *args) -> str:
    try:
        call(*args)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def outliving(rank: int, world: int, folder: str) -> dict:
    "Everything is kept, and the group destroyed and made again."
    group = dist.new_group([0, 1])
    kept = everything(group)
    named = create_multihead_dilated_attention(
        "ring", embed_dim=16, num_heads=2, segment_lengths=(4,), dilation_rates=(1,), group=group
    )
    assert named.attention.group is group
    refs = [weakref.ref(group), weakref.ref(dist.group.WORLD)]
    dist.barrier()
    del group
    dist.destroy_process_group()
    q = x()
    heard = {
        "left": [ref() is not None for ref in refs],
        "calls": [asked(layer, q, q, q) for layer in (*kept[:3], *kept[6:9])],
        "graphs": [asked(out.sum().backward) for out in (*kept[3:6], kept[9], kept[12])],
        "lost": named.attention.group,
        "copied": copy.deepcopy(kept[2]).group,
    }
    store = dist.FileStore(f"{folder}/again", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    whole = make_qkv(1, 64, 4, 8)
    layers = kept[0], pickle.loads(pickle.dumps(kept[0])), kept[6]
    outs = [gather_sequence(layer.eval()(*map(shard_sequence, whole), True)) for layer in layers]
    heard |= {"again": outs, "old": asked(kept[2], q, q, q)}
    return heard


def test_nothing_keeps_a_group_and_a_layer_says_that_it_is_gone(tmp_path):
    expected = dilated_attention(*make_qkv(1, 64, 4, 8), (16, 64), (1, 4), mixing="softmax", is_causal=True)
    for heard in spawn_gloo(outliving, 2, str(tmp_path)):
        assert heard["left"] == [False, False] and heard["lost"] is heard["copied"] is None
        for text in (*heard["calls"], *heard["graphs"], heard["old"]):
            assert text.startswith("the process group must ") and "destroyed" in text and "; call " in text, text
        for out in heard["again"]:
            torch.testing.assert_close(out, expected)


def wrapped(rank: int, world: int, config: dict) -> tuple[list[bool], list[bool]]:
    "What keeps groups when they are destroyed, and after what is done when Python ends."
    from dilated_attention_nb import sharded

    ends = []

    class AtExit:
        register = staticmethod(lambda *call: ends.append(call))

    sharded.atexit = AtExit
    torch.manual_seed(0)
    part = DistributedLongNet(LongNet(longnet_tiny(tie_embeddings=False)), DistributedConfig(**config))
    tokens = torch.zeros(2, 64, dtype=torch.long)
    part.loss_and_gradients(tokens, tokens)
    optimizer = torch.optim.AdamW(part.parameters())
    optimizer.step()
    refs = [
        weakref.ref(group) for group in (dist.group.WORLD, part.replicas.get_group(), part.mesh.get_group("sequence"))
    ]
    (let_go, *args), *_ = ends
    let_go(*args)
    in_use = [ref() is not None for ref in refs]
    part.loss_and_gradients(tokens, tokens)  # nothing was taken away
    dist.barrier()
    dist.destroy_process_group()
    let_go(*args)
    left = [ref() is not None for ref in refs]
    store = dist.FileStore(tempfile.mkdtemp() + "/alone", 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)  # for the end of the worker
    return in_use, left


@pytest.mark.parametrize("config", ({"sequence_parallel": True}, {"data_engine": "fsdp", "sequence_parallel": True}))
def test_wrappers_of_pytorch_let_go_of_their_groups_at_the_end(config):
    assert spawn_gloo(wrapped, 2, config) == [([True] * 3, [False] * 3)] * 2


# ---------------------------------------------------------------- derivatives, documents


def test_a_ring_under_functorch_and_its_sentences():
    q, k, v = make_qkv(1, 64, 4, 8, dtype=torch.float64)
    layer, config = dilated(), RingAttentionConfig((16, 64), (1, 4), mixing="softmax", use_checkpointing=False)

    def alone(*qkv):
        return dilated_attention(*qkv, (16, 64), (1, 4), mixing="softmax", is_causal=True).square().sum()

    leaves = [each.clone().requires_grad_() for each in (q, k, v)]
    expected = torch.autograd.grad(alone(*leaves), leaves)
    for ring in (lambda *qkv: layer(*qkv, True), lambda *qkv: simulate_ring(*qkv, config, 4, True)):

        def loss(*qkv, ring=ring):
            return ring(*qkv).square().sum()

        torch.testing.assert_close(torch.func.grad(loss, (0, 1, 2))(q, k, v), tuple(expected))
        _, pull = torch.func.vjp(loss, q, k, v)
        torch.testing.assert_close(pull(torch.ones((), dtype=q.dtype)), tuple(expected))
        grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative; .*DilatedAttention.config, 'math'"):
            sum(grad.sum() for grad in grads).backward()
        with pytest.raises(NotImplementedError, match="no rule for vmap; fold"):
            torch.vmap(ring)(*(each[None] for each in (q, k, v)))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative; use torch.func.vjp"):
            torch.func.jvp(ring, (q, k, v), (q, k, v))


def test_shards_have_derivatives_of_any_order():
    whole = torch.randn(1, 8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda y: gather_sequence(shard_sequence(y)) ** 3, (whole,))


def norm_worker(rank: int, world: int) -> str:
    y = torch.randn(2, 3, 8, requires_grad=True)
    out = WideNorm.apply(y, torch.ones(8), torch.zeros(8), 1e-5, dist.group.WORLD)
    torch.testing.assert_close(out, torch.nn.functional.layer_norm(y, (8,)))
    torch.autograd.grad(out.sum(), y, retain_graph=True)
    try:
        torch.autograd.grad(out.sum(), y, create_graph=True)
    except NotImplementedError as error:
        return str(error)
    return "nothing"


def test_a_cut_norm_says_that_it_has_no_second_derivative():
    assert spawn_gloo(norm_worker, 1) == ["a norm cut over ranks has no second derivative; leave tensor_shards at 1"]


@pytest.mark.parametrize("layer", (dilated(), blocks()))
def test_packed_documents_are_refused(layer):
    q = x(length=64)
    with pytest.raises(ValueError, match="cu_seqlens must be None on a ring, got packed documents; attend"):
        layer(q, q, q, cu_seqlens=torch.tensor([0, 32, 64]))


# ---------------------------------------------------------------- how scripts end


def check_exit_codes(kinds: str, ranks: int, times: int) -> None:
    "All of so many runs end with 0."
    script = str(Path(__file__).with_name("ending.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), script]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    runs = [subprocess.run([*command, *kinds.split()], capture_output=True, env=env) for _ in range(times)]
    failed = [run.stderr[-3000:] for run in runs if run.returncode]
    assert not failed, failed[0].decode()


def test_a_script_with_a_ring_ends_well():
    "With outputs, losses, errors, models and optimizers of all kinds that two ranks can have."
    check_exit_codes(" ".join(KINDS), 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_scripts_end_well(kind):
    check_exit_codes(kind, 4, 10)
