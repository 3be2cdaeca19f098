"Meshes of processes against one process: losses, gradients, checkpoints, and a worker that is killed."

import copy
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dilated_attention_nb import elastic
from dilated_attention_nb.block_sparse import BlockSparseAttention, SparseAttentionConfig
from dilated_attention_nb.checkpoints import signature, step_folders
from dilated_attention_nb.command import demo
from dilated_attention_nb.corpus import read_corpus
from dilated_attention_nb.distributed import (
    DistributedConfig,
    DistributedLongNet,
    check_supported,
    make_mesh,
    mesh_sizes,
    mesh_table,
    single_losses,
    stage_layers,
    steps_worker,
)
from dilated_attention_nb.elastic import Checkpoints, parse_elastic, train_elastic, training_tensors
from dilated_attention_nb.embeddings import NgramEmbedding
from dilated_attention_nb.improved import dilated_attention
from dilated_attention_nb.longnet import LongNet, LongNetEncoder, longnet_tiny
from dilated_attention_nb.pretrained import from_pretrained
from dilated_attention_nb.processes import spawn_gloo
from dilated_attention_nb.ring import RING_LAYOUTS
from dilated_attention_nb.ring_dilated import RingAttentionConfig, RingDilatedAttention
from dilated_attention_nb.runs import read_metrics
from dilated_attention_nb.sharded import LongNetShare, Team, group_backends, share_in_ring, share_worker
from dilated_attention_nb.testing import make_qkv, saved_for_backward

TINY = longnet_tiny(tie_embeddings=False, num_kv_heads=2)
SP = {"sequence_parallel": True}
TP = {"model_parallel": True}
PP = {"pipeline_parallel": True}
FSDP = {"data_engine": "fsdp"}
MANY = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}


def batches(steps: int = 20, rows: int = 4, length: int = 129) -> torch.Tensor:
    return torch.randint(0, 256, (steps, rows, length), generator=torch.Generator().manual_seed(1))


def bound(losses: list[float], dtype: torch.dtype = torch.float64) -> float:
    """How far losses may be from one another that were summed in another order.

    Some 2^12 numbers go into a sum and a step amplifies what was wrong before it by at most its learning rate times the
    curvature, here below 1: the error is at most steps x 2^12 x eps of the loss, and AdamW divides by a root that is as
    exact as its numerator.
    """
    return len(losses) * 2**12 * torch.finfo(dtype).eps * max(losses)


def worst(found: list[float], wanted: list[float]) -> float:
    "The largest difference."
    assert len(found) == len(wanted)
    return max(abs(a - b) for a, b in zip(found, wanted))


def check_losses(world: int, steps: int = 20, model=TINY, **config) -> list[dict]:
    given = batches(steps)
    found = spawn_gloo(steps_worker, world, model, DistributedConfig(**config), given)
    wanted = single_losses(model, given)
    for rank in found:
        off = worst(rank["losses"], wanted)
        assert off <= bound(wanted), (config, off, bound(wanted))
    return found


# ---------------------------------------------------------------- a share of a model


def layouts_worker(rank, world, model, tokens):
    "Loss and gradients with each placement."
    return {layout: share_worker(rank, world, copy.deepcopy(model), tokens, layout) for layout in RING_LAYOUTS}


def test_loss_and_gradients_do_not_know_that_the_sequence_is_cut():
    "Embeddings that look back across borders included."
    torch.manual_seed(0)
    model = LongNet(longnet_tiny(tie_embeddings=False, position="xpos")).double()
    model.embed_tokens = NgramEmbedding(257, 64, (2, 3, 6), 512).double()
    tokens = batches(1, 2)[0]
    found = spawn_gloo(layouts_worker, 2, model, tokens)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    for rank in (each for ranks in found for each in ranks.values()):
        assert abs(rank["loss"] - loss.item()) < 1e-12
        for name, p in model.named_parameters():
            assert (rank["grads"][name] - p.grad).abs().max() <= 1e-11 * p.grad.abs().max(), name
    assert not torch.equal(found[0]["zigzag"]["positions"], found[0]["contiguous"]["positions"])


def padded_worker(rank, world, model, tokens, targets, mask):
    "Loss and gradients with padding; and what is said where it stands before tokens on one rank."
    learner = share_in_ring(model)
    loss = learner(tokens, targets, mask)
    loss.backward()
    try:
        learner(tokens, targets, mask.flip(1) if rank else mask)
        said = "nothing"
    except ValueError as error:
        said = str(error)
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, said


def test_padding_at_the_end_is_left_out_as_on_one_device_and_refused_elsewhere():
    torch.manual_seed(0)
    model = LongNet(longnet_tiny(tie_embeddings=False)).double()
    tokens, targets = batches(1, 2)[0][:, :-1], batches(1, 2)[0][:, 1:]
    mask = torch.arange(128) >= torch.tensor([[128], [77]])
    found = spawn_gloo(padded_worker, 2, copy.deepcopy(model), tokens, targets, mask)
    loss = model(tokens, targets, key_padding_mask=mask)
    loss.backward()
    for value, grads, said in found:
        assert abs(value - loss.item()) < 1e-12
        for name, p in model.named_parameters():
            assert (grads[name] - p.grad).abs().max() <= 1e-11 * p.grad.abs().max(), name
        assert "key_padding_mask must be True at the end of rows only" in said and "on rank 1; call all" in said


def part_worker(rank, world, q, k, v, dout, cases):
    "This rank has some of the heads, on a ring of its own."
    heads, kv = q.shape[2] // world, k.shape[2] // world
    rings = [dist.new_group([r]) for r in range(world)]
    own = slice(rank * heads, (rank + 1) * heads), slice(rank * kv, (rank + 1) * kv)
    found = []
    for options in cases:
        ring = RingDilatedAttention(RingAttentionConfig(**options), rings[rank], part=(rank * heads, q.shape[2]))
        leaves = [q[:, :, own[0]].clone(), k[:, :, own[1]].clone(), v[:, :, own[1]].clone()]
        out = ring(*(x.requires_grad_() for x in leaves), True)
        found.append((out.detach(), torch.autograd.grad(out, leaves, dout[:, :, own[0]])))
    return found


def test_some_heads_attend_as_they_do_among_all():
    kinds = [("softmax", "blocked"), ("softmax", "interleaved"), ("groups", "blocked")]
    names = {"segment_lengths": (8, 24), "dilation_rates": (1, 3)}
    cases = [names | {"mixing": mixing, "offsets": offsets} for mixing, offsets in kinds]
    q, k, v = make_qkv(1, 24, 8, 8, kv_heads=4, dtype=torch.float64)
    leaves, dout = [x.clone().requires_grad_() for x in (q, k, v)], torch.randn_like(q)
    for options, *parts in zip(cases, *spawn_gloo(part_worker, 2, q, k, v, dout, cases)):
        whole = dilated_attention(*leaves, **options, is_causal=True)
        assert (torch.cat([out for out, _ in parts], 2) - whole).abs().max() < 1e-13
        for i, grad in enumerate(torch.autograd.grad(whole, leaves, dout)):
            assert (torch.cat([g[i] for _, g in parts], 2) - grad).abs().max() < 1e-12


class Watched(list):
    "What a ring records; at the first tile it notes whether the other rank had called, and says that it computes."

    def __init__(self, store, name):
        self.store, self.name, self.late = store, name, None

    def append(self, event):
        if event.kind == "attend" and self.late is None:
            self.late = self.store.check([f"{self.name} calls"])
            self.store.set(f"{self.name} computes", "")


def late_worker(rank, world, folder):
    "With overlap, the second rank calls when the first computes; without, it calls. Had it called before that?"
    x, found, store = torch.randn(1, 32, 2, 8), [], dist.FileStore(f"{folder}/watched", world)
    for overlap in (True, False):
        ring = RingDilatedAttention(RingAttentionConfig((64,), (1,), layout="zigzag"), overlap=overlap)
        ring(x, x, x, True)  # connects
        name = f"overlap {overlap}"
        ring.record = Watched(store, name) if rank == 0 else None
        dist.barrier()
        if rank == 1:
            if overlap:
                store.wait([f"{name} computes"])
            store.set(f"{name} calls", "")
        ring(x, x, x, True)
        found.append(rank == 0 and ring.record.late)
    return found


def test_overlap_computes_before_messages_have_come(tmp_path):
    assert spawn_gloo(late_worker, 2, str(tmp_path))[0] == [False, True]


# ---------------------------------------------------------------- meshes


def test_sizes_of_a_mesh():
    every = DistributedConfig(**SP, **TP, **PP, sequence_shards=2, tensor_shards=2, pipeline_stages=2)
    assert mesh_sizes(every, 16) == {"data": 2, "pipeline": 2, "sequence": 2, "tensor": 2}
    places = [tuple(place.values()) for place in mesh_table(mesh_sizes(every, 16))]
    assert len(set(places)) == 16 and places == sorted(places)
    with pytest.raises(ValueError, match="at most"):
        mesh_sizes(DistributedConfig(**SP, **TP), 4)
    with pytest.raises(ValueError, match="world_size must be a multiple of 8, got 12"):
        mesh_sizes(every, 12)
    with pytest.raises(RuntimeError, match="torchrun"):
        make_mesh(DistributedConfig())
    assert [len(x) for x in stage_layers(7, 3)] == [2, 3, 2]


ALONE = [  # no process is needed to refuse these: sizes of the mesh, config, model, words
    ({"pipeline": 2}, PP, {}, "tie_embeddings must be False in a pipeline"),
    ({"tensor": 2}, TP, {"num_kv_heads": 1}, "num_kv_heads must be a multiple of tensor_shards 2, got 1"),
    ({"tensor": 3}, TP, {}, "num_heads must be a multiple of tensor_shards 3, got 4"),
    ({"tensor": 4}, TP, {"ffn_dim": 130}, "ffn_dim must be a multiple of tensor_shards 4, got 130"),
    ({"tensor": 2, "sequence": 2}, TP | SP, {}, "data_engine must not be 'ddp' with cut matrices"),
    ({"tensor": 2, "data": 2}, TP, {}, "data_engine must not be 'ddp' with cut matrices"),
]


@pytest.mark.parametrize("sizes, config, model, words", ALONE)
def test_what_does_not_go_together_is_refused(sizes, config, model, words):
    every = dict.fromkeys(("data", "pipeline", "sequence", "tensor"), 1) | sizes
    with pytest.raises(ValueError, match=f"^{words}.*; "):
        check_supported(DistributedConfig(**config), longnet_tiny(**model), every)


def test_arguments_of_a_config_that_need_one_another():
    for values, words in (
        ({"sequence_shards": 2}, "sequence_shards must be None without sequence_parallel"),
        ({"tensor_shards": 2}, "tensor_shards must be None without model_parallel"),
        ({"pipeline_stages": 2}, "pipeline_stages must be None without pipeline_parallel"),
        ({"microbatches": 2}, "microbatches must be None without pipeline_parallel"),
        ({"data_engine": "zero"}, "data_engine must be one of"),
        ({"pipeline_schedule": "zb"}, "pipeline_schedule must be one of"),
        ({"layout": "striped"}, "layout must be one of"),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            DistributedConfig(**values)


def test_backends_of_a_group():
    "NCCL alone could not send what lies on the CPU, and is not there without GPUs; another name is taken as it is."
    assert group_backends("nccl", True) == group_backends("cpu:gloo,cuda:nccl", True) == "cpu:gloo,cuda:nccl"
    assert group_backends("nccl", False) == group_backends("gloo", True) == "gloo"
    assert group_backends("mpi", False) == "mpi"


def with_blocks() -> LongNet:
    "A model one of whose layers attends to blocks."
    model = LongNet(longnet_tiny())
    model.decoder.layers[1].self_attn.attention = BlockSparseAttention(
        SparseAttentionConfig((64,), (1,), block_size=16)
    )
    return model


def asked(model: LongNet, config: DistributedConfig, rows: int, length: int):
    "A step."
    x = torch.zeros(rows, length, dtype=torch.long)
    return DistributedLongNet(model, config).loss_and_gradients(x, x)


def untied(**values) -> LongNet:
    return LongNet(longnet_tiny(tie_embeddings=False, **values))


def elsewhere() -> None:
    "Ranks that begin with different weights."
    torch.manual_seed(dist.get_rank())
    asked(untied(), DistributedConfig(), 2, 8)


def odd_batch() -> None:
    "Three sequences for two ranks; refused before anything is written."
    train_elastic(DistributedLongNet(untied(), DistributedConfig()), torch.zeros(99).short(), Path("/nowhere"), 1, 8, 3)


def encoder() -> None:
    LongNetShare(LongNetEncoder(longnet_tiny(vocab_size=None, position="rope")))


def dropping(name: str):
    return lambda: asked(untied(**{name: 0.1}), DistributedConfig(), 2, 8)


def test_a_share_has_the_models_parameters_and_leaves_the_model_as_it_is():
    model, x = untied(), batches(1, 2, 128)[0]
    before, names = model(x), [(name, type(module)) for name, module in model.named_modules()]
    share = LongNetShare(model)
    assert all(isinstance(layer.self_attn.attention, RingDilatedAttention) for layer in share.decoder.layers.values())
    ids = [{name: id(p) for name, p in module.named_parameters()} for module in (share, model)]
    assert ids[0] == ids[1]
    called = []
    for layer in share.decoder.layers.values():
        layer.register_forward_hook(lambda *_: called.append("share"))
    assert torch.equal(model(x), before) and not called
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    assert share(x).shape == (*x.shape, model.config.embed_dim) and len(called) == model.config.num_layers
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    targets = x.roll(-1, 1)
    torch.testing.assert_close(share(x, targets).mean(), model(x, targets))
    share.double()
    assert next(model.parameters()).dtype == torch.float64


BLOCKS = "attention of layer 1 must be dilated attention in a model over a ring, got BlockSparseAttention; other kinds"
ADVICE = "must be 0 .*got 0.1; set it to 0, or train the LongNet whole"
TOGETHER = [  # what two ranks ask for, and what both say to it
    (
        lambda: asked(untied(num_layers=1), DistributedConfig(**PP), 2, 8),
        "pipeline_stages must be at most num_layers 1",
    ),
    (lambda: asked(untied(), DistributedConfig(**PP), 3, 8), "the batch must be a multiple of microbatches 2, got 3"),
    (lambda: asked(untied(), DistributedConfig(**SP), 1, 10), "sequence length must be a multiple of 4.*pad to 12"),
    (
        lambda: asked(untied(), DistributedConfig(world_size=3), 2, 8),
        "world_size must be 2, as the launcher says, got 3",
    ),
    (
        lambda: asked(untied(), DistributedConfig(world_size=2, rank=1), 2, 8),
        "rank must be . here, as the launcher says",
    ),
    (
        lambda: asked(untied(), DistributedConfig(backend="mpi"), 2, 8),
        "backend must be gloo, which the group has for cpu",
    ),
    (lambda: make_mesh(DistributedConfig(), "cuda"), "backend must be gloo, which the group has for cuda, got 'nccl'"),
    (lambda: asked(untied(), DistributedConfig(**SP, sequence_shards=3), 2, 8), "world_size must be a multiple of 3"),
    (lambda: asked(untied(), DistributedConfig(**SP, **TP), 2, 8), "config must leave one dimension open at most"),
    *((dropping(x), f"{x} {ADVICE}") for x in ("dropout", "attention_dropout", "activation_dropout", "drop_path")),
    (lambda: asked(with_blocks(), DistributedConfig(**SP), 2, 8), BLOCKS),
    (lambda: share_in_ring(with_blocks()), BLOCKS),
    (encoder, "model must be a LongNet, got LongNetEncoder"),
    (elsewhere, "the model must be the same on all ranks"),
    (odd_batch, "rows must be a multiple of 2, the ranks that share a batch, got 3"),
]


def refusing_worker(rank, world):
    "What this rank says to each of `TOGETHER`, and whether the advice about dropout helps."
    said = []
    for ask, _ in TOGETHER:
        torch.manual_seed(0)
        try:
            said.append(f"nothing, but made {ask()}")
        except (TypeError, ValueError) as error:
            said.append(str(error))
    whole = torch.nn.parallel.DistributedDataParallel(untied(dropout=0.5))
    x = batches(1, 2)[0]
    whole(x[:, :-1], x[:, 1:]).backward()
    return said, sum(float(p.grad.sum()) for p in whole.parameters())


def test_what_is_not_supported_is_refused_on_all_ranks():
    (one, grads), (other, same) = spawn_gloo(refusing_worker, 2)
    for (_, words), *said in zip(TOGETHER, one, other, strict=True):
        assert all(re.match(words, text) for text in said), (words, said)
    assert grads == same != 0  # each drew its own mask, and the gradients were averaged


def both_dtypes(rank: int, world: int, config: DistributedConfig, given: torch.Tensor) -> list[dict]:
    return [steps_worker(rank, world, TINY, config, given, dtype) for dtype in (torch.float64, torch.float32)]


def test_the_sequence_alone_takes_the_steps_of_one_process():
    """In float64 up to the order of sums; in float32 not further from that than one process in float32, times two.

    The factor and the one rounding for each step are those of the budgets of attention: another order of sums errs
    differently, but not more.
    """
    given = batches()
    exact, rough = (single_losses(TINY, given, dtype) for dtype in (torch.float64, torch.float32))
    allowed = 2 * worst(rough, exact) + len(given) * torch.finfo(torch.float32).eps * max(exact)
    assert allowed < 1e-3 * min(exact)  # or the test says nothing
    found = spawn_gloo(both_dtypes, 2, DistributedConfig(**SP), given)
    assert [r[0]["place"]["sequence"] for r in found] == [0, 1]
    for wide, narrow in found:
        assert worst(wide["losses"], exact) <= bound(exact)
        assert worst(narrow["losses"], exact) <= allowed


@pytest.mark.slow
def test_sequence_and_tensor_take_the_steps_of_one_process():
    "Four processes, FSDP2 over the sequence, heads and matrices cut."
    found = check_losses(4, **SP, **TP, sequence_shards=2, **FSDP)
    whole = sum(p.numel() for p in LongNet(TINY).parameters())
    assert all(rank["held"] < whole / 2.5 for rank in found)


ALL = {
    "data": (2, {}),
    "data, fsdp": (2, FSDP),
    "tensor": (2, TP),
    "pipeline": (2, PP),
    "pipeline, gpipe": (2, PP | {"pipeline_schedule": "gpipe", "microbatches": 4}),
    "sequence, contiguous": (2, SP | {"layout": "contiguous"}),
    "sequence, not optimized": (2, SP | {"communication_optimization": False}),
    "sequence, recomputed": (2, SP | {"gradient_checkpointing": True}),
    "sequence of four": (4, SP),
    "data x sequence": (4, SP | {"sequence_shards": 2}),
    "data x sequence, fsdp": (4, SP | FSDP | {"sequence_shards": 2}),
    "sequence x tensor, one by one": (4, SP | TP | {"sequence_shards": 2, "communication_optimization": False}),
    "pipeline x sequence": (4, SP | PP | {"sequence_shards": 2}),
    "pipeline x sequence, fsdp, recomputed": (
        4,
        SP | PP | FSDP | {"sequence_shards": 2, "gradient_checkpointing": True},
    ),
    "data x tensor": (4, TP | FSDP | {"tensor_shards": 2}),
    "pipeline x tensor": (4, PP | TP | {"tensor_shards": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_arrangement_takes_the_steps_of_one_process(name):
    world, config = ALL[name]
    check_losses(world, **config)


@pytest.mark.slow
def test_groups_mixing_and_four_layers():
    model = longnet_tiny(tie_embeddings=False, mixing="groups", position="rope", num_layers=4)
    check_losses(4, model=model, **SP, **TP, sequence_shards=2, **FSDP)


# ---------------------------------------------------------------- what switches change


def switch_worker(rank, world, config):
    "What a step sends for gradients, and what it keeps for the backward pass."
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    part = DistributedLongNet(
        LongNet(longnet_tiny(embed_dim=256, num_heads=4, num_layers=4, tie_embeddings=False)), config
    )
    x = batches(1, 2)[0]
    part.loss_and_gradients(x[:, :-1], x[:, 1:])
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        part.loss_and_gradients(x[:, :-1], x[:, 1:])
    counts = {event.key: event.count for event in seen.key_averages() if event.key.startswith("c10d::")}
    kept = saved_for_backward(part.share, x[:, :-1], x[:, 1:]).num_bytes
    return {"reduced": list(part.reduced), "counts": counts, "kept": kept}


@pytest.mark.slow
def test_switches_change_what_is_sent_and_kept():
    def run(**config):
        return spawn_gloo(switch_worker, 2, DistributedConfig(**SP, **config))[0]

    together, small, alone = run(), run(bucket_size_mb=1), run(communication_optimization=False)
    assert sum(together["reduced"]) == sum(small["reduced"]) == sum(alone["reduced"])
    assert (
        len(together["reduced"])
        < len(small["reduced"])
        < len(alone["reduced"])
        == len(list(LongNet(longnet_tiny(embed_dim=256, num_heads=4, num_layers=4, tie_embeddings=False)).parameters()))
    )
    layers, at_once = run(**FSDP, bucket_size_mb=1), run(**FSDP, communication_optimization=False)
    assert sum(n for op, n in layers["counts"].items() if "reduce_scatter" in op) == 5  # four layers, and the rest
    assert sum(n for op, n in at_once["counts"].items() if "reduce_scatter" in op) == 1
    assert run(gradient_checkpointing=True)["kept"] < 0.5 * together["kept"]


# ---------------------------------------------------------------- checkpoints


class Half:
    "A file that is cut off in the middle, and with it the process."

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, data):
        self.stream.write(data[: len(data) // 2])
        self.stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def die_while_writing(files: int) -> None:
    "Whoever calls this writes half of the so manyth file of a checkpoint from now on, and is dead."
    system = torch.distributed.checkpoint.filesystem.FileSystem
    real, count = system.create_stream, itertools.count(1)

    @contextmanager
    def create_stream(self, path, mode):
        with real(self, path, mode) as stream:
            yield Half(stream) if mode == "wb" and next(count) == files else stream

    system.create_stream = create_stream


def elastic_worker(rank, world, config, folder, steps, dies=False):
    "Train up to a step, with a checkpoint every second one; or die while the second one is written."
    if dies and rank == world - 1:
        die_while_writing(2)
    torch.manual_seed(0)
    part = DistributedLongNet(LongNet(TINY).double(), config)
    tokens = (torch.arange(5000) * 37 % 251).short()
    return train_elastic(part, tokens, Path(folder), steps, 64, 4, every=2)


def resuming_worker(rank, world, config, folder, steps):
    "What is left of a run, and the same in another folder from the start."
    return [elastic_worker(rank, world, config, f"{folder}/{name}", steps) for name in ("cut", "whole")]


def steps_taken(folder: Path) -> list[tuple[int, int]]:
    "Step and number of ranks of every line that a run, and those before it in the folder, wrote."
    rows = map(json.loads, (folder / "losses.jsonl").read_text().splitlines())
    return [(row["step"], row["ranks"]) for row in rows]


def test_a_death_while_writing_leaves_the_last_good_checkpoint_to_another_number_of_ranks(tmp_path):
    with pytest.raises(RuntimeError, match="rank [01] of 2"):  # the dead one, or the one that misses it
        spawn_gloo(elastic_worker, 2, DistributedConfig(**SP, **FSDP), str(tmp_path / "cut"), 20, True)
    good, broken = sorted(p for p in (tmp_path / "cut").glob("step-*"))
    assert [good.name, broken.name] == ["step-00000002", "step-00000004.part"]
    ours = {p.name: p.stat().st_size for p in broken.glob("*.safetensors")}
    assert any(size < (good / name).stat().st_size for name, size in ours.items())  # half of a file
    ((rest, whole),) = spawn_gloo(resuming_worker, 1, DistributedConfig(), str(tmp_path), 6)
    assert len(rest) == len(whole) == 6 and worst(rest, whole) < bound(whole)
    taken = steps_taken(tmp_path / "cut")
    assert taken[:4] == [(1, 2), (2, 2), (3, 2), (4, 2)]
    assert taken[-4:] == [(3, 1), (4, 1), (5, 1), (6, 1)]  # from step 2 on, with one rank
    assert not list((tmp_path / "cut").glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, after", [((1, {}), (4, SP | FSDP)), ((4, SP | TP | FSDP | {"sequence_shards": 2}), (2, TP))]
)
def test_training_goes_on_with_another_number_of_ranks(tmp_path, before, after):
    (ranks, config), (others, other) = before, after
    spawn_gloo(elastic_worker, ranks, DistributedConfig(**config), str(tmp_path / "cut"), 4)
    found = spawn_gloo(resuming_worker, others, DistributedConfig(**other), str(tmp_path), 8)
    for rest, whole in found:
        assert len(rest) == len(whole) == 8 and worst(rest, whole) < bound(whole)
    assert [n for _, n in steps_taken(tmp_path / "cut")] == [ranks] * 4 + [others] * 4


def generated_worker(rank, world, folder):
    "On ranks that each have a part, the model of an elastic run: what one process makes of it, and of the whole."
    torch.manual_seed(0)
    losses = elastic_worker(rank, world, DistributedConfig(**SP, **FSDP), folder, 4)
    dist.barrier()
    return losses, sorted(os.listdir(folder))


def test_what_ranks_wrote_is_a_model_for_one_process(tmp_path):
    "`from_pretrained` and `generate` on the folder, on a checkpoint, and on the folder of a run that has not ended."
    folder = tmp_path / "run"
    (_, names), _ = spawn_gloo(generated_worker, 2, str(folder))
    assert names == ["config.json", "losses.jsonl", "model.safetensors", "step-00000002", "step-00000004"]
    torch.manual_seed(0)
    alone, prompt = LongNet(TINY).double(), torch.arange(9)[None]  # the same steps, without anything distributed
    optimizer, tokens = torch.optim.AdamW(alone.parameters(), lr=1e-3), (torch.arange(5000) * 37 % 251).short()
    for step in range(4):
        alone(*elastic.step_batch(tokens, 64, 4, step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = [LongNet.from_pretrained(folder), from_pretrained(folder / "step-00000004")]
    for name in ("model.safetensors", "config.json"):  # as if it had been killed before these were written
        (folder / name).unlink()
    found.append(from_pretrained(folder))
    for model in found:
        assert model.config == alone.config and not model.training
        assert all((x - y).abs().max() < 1e-6 for x, y in zip(model.parameters(), alone.parameters()))
        assert torch.equal(model.generate(prompt, 6, 0.0), found[0].generate(prompt, 6, 0.0))
    continued = found[0].generate(prompt, 1, 0.0)[0, 0]
    assert continued == found[0](prompt)[0, -1].argmax()
    with pytest.raises(ValueError, match="holds a LongNet, not a LongNetEncoder"):
        LongNetEncoder.from_pretrained(folder)
    next((folder / "step-00000004").glob("*.safetensors")).write_bytes(b"")
    with pytest.warns(UserWarning, match="step-00000004 is passed over"):
        older = from_pretrained(folder)
    assert not torch.equal(older.head_weight, found[0].head_weight)
    with pytest.raises(ValueError, match="truncated"):
        from_pretrained(folder / "step-00000004")
    (folder / "step-00000002/about.json").write_text("{}")
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(ValueError, match="no other checkpoint"):
        from_pretrained(folder)


def test_more_steps_take_the_model_of_fewer_away(tmp_path):
    (seen,) = spawn_gloo(ended_twice_worker, 1, str(tmp_path / "run"))
    assert seen == [[4, True], [5, False], [6, True]]


def ended_twice_worker(rank, world, folder):
    "Steps taken, and whether a model is there: after four of four, after the fifth of six, after six of six."
    elastic_worker(rank, world, DistributedConfig(), folder, 4)
    model, seen = Path(folder, "model.safetensors"), [[4, Path(folder, "model.safetensors").exists()]]
    compute = DistributedLongNet.loss_and_gradients

    def looking(self, *batch):
        seen[1:] = [[5, model.exists()]]
        return compute(self, *batch)

    DistributedLongNet.loss_and_gradients = looking
    elastic_worker(rank, world, DistributedConfig(), folder, 6)
    return [*seen, [6, model.exists()]]


def frozen_worker(rank, world, folder):
    "What is saved is what was there when `save` was called, whatever the next steps do."
    torch.manual_seed(0)
    part = DistributedLongNet(LongNet(TINY), DistributedConfig())
    optimizer, checkpoints = torch.optim.AdamW(part.parameters()), Checkpoints(folder)
    x = batches(1, 2)[0]
    part.loss_and_gradients(x[:, :-1], x[:, 1:])
    optimizer.step()
    before = {name: t.clone() for name, t in training_tensors(part, optimizer).items()}
    checkpoints.save(part, optimizer, 1, {"note": "kept"})
    with torch.no_grad():
        for p in part.parameters():
            p.fill_(7)
            optimizer.state[p]["exp_avg"].fill_(7)
    checkpoints.wait()
    step, about = checkpoints.load(part, optimizer)
    after = training_tensors(part, optimizer)
    equal = all(torch.equal(after[name], t) for name, t in before.items())
    files = sorted(p.name for p in step_folders(checkpoints.folder)[0].iterdir())
    return {"step": (step, about), "equal": equal, "tensors": len(before), "files": files} | armed(
        part, optimizer, folder
    )


def armed(part, optimizer, folder):
    "Load the checkpoint with pickles beside and in place of its files; which of them ran, and what was said."
    (path,) = Path(folder).glob("step-*")
    proofs = [Path(folder, name) for name in ("beside", "inside")]
    for name in (".metadata", "x.distcp"):  # what the default reader of torch.distributed.checkpoint unpickles
        (path / name).write_bytes(pickle.dumps(Bomb(str(proofs[0]))))
    loaded = Checkpoints(folder).load(part, optimizer)[0]
    ran = [proofs[0].exists()]
    torch.distributed.checkpoint.FileSystemReader(path).read_metadata()
    ran.append(proofs[0].exists())  # it was a live one
    text = (path / "about.json").read_text()
    about = json.loads(text)
    about["config"]["num_layers"] = 3
    (path / "about.json").write_text(json.dumps(about | {"sha256": signature(about)}))
    try:
        other = f"loaded {Checkpoints(folder).load(part, optimizer)}"
    except ValueError as error:
        other = str(error)
    (path / "about.json").write_text(text)
    next(path.glob("*.safetensors")).write_bytes(pickle.dumps(Bomb(str(proofs[1]))))
    try:
        said = f"loaded {Checkpoints(folder).load(part, optimizer)}"
    except ValueError as error:
        said = str(error)
    return {"loaded": loaded, "ran": [*ran, proofs[1].exists()], "said": said, "other": other}


def continuing_worker(rank, world, folder):
    "What is said when a folder is taken up again in other ways, or after damage, and the losses where nothing is."
    folder, tokens, said = Path(folder), (torch.arange(5000) * 37 % 251).short(), {}

    def go(name, steps=6, context=64, rows=4, tokens=tokens, folder=folder, **values):
        torch.manual_seed(0)
        part = DistributedLongNet(LongNet(TINY).double(), DistributedConfig())
        try:
            with redirect_stderr(io.StringIO()) as notes:
                losses = train_elastic(part, tokens, folder, steps, context, rows, every=2, **values)
            said[name] = losses, notes.getvalue()
        except (OSError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    go("first", steps=4)
    go("steps", steps=2)
    go("context", context=32)
    go("rows", rows=2)
    go("seed", seed=1)
    go("lr", lr=1.0)
    go("text", tokens=tokens + 1)
    go("short", context=5000)
    go("huge", rows=10**12)
    path = next((folder / "step-00000004").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    go("damaged")
    go("again")
    about = json.loads((folder / "step-00000006/about.json").read_text())
    (folder / "step-00000006/about.json").write_text(json.dumps(about | {"step": 5}))
    (folder / "step-00000004/about.json").unlink()
    go("no good one")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    go("full", folder=folder / "full")
    return said | {"left": sorted(p.name for p in (folder / "full").iterdir())}


def test_what_a_checkpoint_is_not_for_is_refused_and_damage_is_passed_over(tmp_path):
    (said,) = spawn_gloo(continuing_worker, 1, str(tmp_path), timeout_s=1200.0)
    for name in ("context", "rows", "seed", "lr", "text"):
        assert said[name].startswith(f"ValueError: {name} must be what the run began with"), said[name]
    assert said["steps"].startswith("ValueError: steps must be at least 4, which are taken, got 2")
    assert said["short"].startswith("ValueError: text must be longer than the context 5,000")
    assert said["huge"].startswith("ValueError: rows and context must fit into")
    losses, notes = said["damaged"]
    assert "step-00000004 is passed over" in notes and "is damaged" in notes and len(losses) == 6
    assert losses[:4] == said["first"][0] and said["again"] == (losses, "")
    assert "step" in said["no good one"] and "no other checkpoint in" in said["no good one"]
    assert said["full"].startswith("OSError: ") and "step-00000002.part can't be written" in said["full"]
    assert said["left"] == ["losses.jsonl"]  # and nothing half written


def keeping_worker(rank, world, folder):
    "What is in a folder after a fall back, beside a copy of somebody's, without checkpoints, and after a loss of NaN."
    folder, tokens, notes = Path(folder), (torch.arange(5000) * 37 % 251).short(), io.StringIO()

    def go(steps, every, finite=None):
        torch.manual_seed(0)
        part = DistributedLongNet(LongNet(TINY), DistributedConfig())
        if finite is not None:
            losses = itertools.chain([1.0] * finite, [math.nan])
            part.loss_and_gradients = lambda *_: next(losses)
        with redirect_stderr(notes):
            train_elastic(part, tokens, folder, steps, 64, 4, every=every)
        return sorted(p.name for p in folder.glob("step-*"))

    go(8, 4)
    shutil.copytree(folder / "step-00000004", folder / "step-00000004-mine")
    next((folder / "step-00000008").glob("*.safetensors")).write_bytes(b"")
    said = {"fall back": go(6, 1)}
    with open(folder / "losses.jsonl", "a") as file:
        file.write('{"step": 7')
    said |= {"again": go(8, 1), "steps": [step for step, _ in steps_taken(folder)]}
    for path in folder.glob("step-*"):
        shutil.rmtree(path)
    notes.truncate(0)
    said |= {"without": go(2, 2), "notes": notes.getvalue()}
    with pytest.raises(ValueError, match="loss must stay finite, got nan at step 5"):
        go(9, 2, finite=3)
    return said | {"nan": sorted(p.name for p in folder.glob("step-*"))}


def test_whole_checkpoints_stay_beside_damaged_ones_and_before_a_loss_that_is_none(tmp_path):
    (said,) = spawn_gloo(keeping_worker, 1, str(tmp_path / "run"))
    mine, damaged = "step-00000004-mine", "step-00000008"
    assert said["fall back"] == [mine, "step-00000005", "step-00000006", damaged]
    assert said["again"] == [mine, "step-00000007", damaged] and said["steps"] == [*range(1, 9), 5, 6, 7, 8]
    assert said["without"] == ["step-00000002"]
    assert "losses.jsonl has losses, but no checkpoint is there: it begins at step 0" in said["notes"]
    assert said["nan"] == ["step-00000002", "step-00000004"]


def test_a_checkpoint_is_what_was_there_and_reading_it_runs_nothing(tmp_path):
    (found,) = spawn_gloo(frozen_worker, 1, str(tmp_path))
    assert found["step"] == (1, {"note": "kept"}) and found["equal"] and found["tensors"] > 3 * 20
    assert [name for name in found["files"] if not name.endswith(".safetensors")] == ["about.json"]
    assert found["loaded"] == 1 and found["ran"] == [False, True, False]
    assert re.search("[Hh]eader|[Ss]afetensor", found["said"]), found["said"]
    assert found["other"].startswith("checkpoint must be of this model")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def settling_worker(rank, world, folder):
    "A checkpoint is whole as soon as it is written: nobody saves again or waits."
    torch.manual_seed(0)
    part = DistributedLongNet(LongNet(TINY), DistributedConfig())
    checkpoints = Checkpoints(folder)
    checkpoints.save(part, torch.optim.AdamW(part.parameters()), 1)
    early = [p.name for p in Path(folder).glob("step-*")]
    while checkpoints.pending:  # for as long as a test may take
        time.sleep(0.01)
        checkpoints.settle()
    return early, [p.name for p in step_folders(checkpoints.folder)]


def test_a_written_checkpoint_gets_its_name_at_once(tmp_path):
    found = spawn_gloo(settling_worker, 1, str(tmp_path))
    assert found == [(["step-00000001.part"], ["step-00000001"])]


# ---------------------------------------------------------------- commands

SMALL = "--steps 30 --checkpoint-every 5 --context 128 --rows 2 --width 32 --segments 32 128 --rates 1 2".split()


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]


DYING = """
import os, sys
sys.path.insert(0, {tests!r})
from test_distributed import die_while_writing
from dilated_attention_nb.elastic import elastic_main
if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == ("0", "0"):
    die_while_writing(3)
sys.exit(elastic_main())
"""


def elastic_run(folder: Path, kill_at: int | None, dies: bool = False) -> list[dict]:
    "Lines of losses.jsonl of a run with a worker killed after so many steps, or one that dies while it writes."
    folder.mkdir(parents=True)
    log, rows, script = folder / "log", folder / "losses.jsonl", folder / "dying.py"
    script.write_text(DYING.format(tests=str(Path(__file__).parent)))
    command = [str(script)] if dies else ["-m", "dilated_attention_nb.elastic"]
    command = [*torchrun("--max-restarts", "2"), *command, "--sequence-parallel", "2", "--folder", str(folder)]
    with open(log, "w") as out:
        run = subprocess.Popen([*command, *SMALL], stdout=out, stderr=out, env=os.environ | MANY)
    try:
        while run.poll() is None:  # for as long as a test may take
            time.sleep(0.05)
            if kill_at and rows.exists() and len(rows.read_text().splitlines()) >= kill_at:
                os.kill(int(re.search(r"rank 1 is process (\d+)", log.read_text())[1]), signal.SIGKILL)
                kill_at = None
    finally:
        if run.poll() is None:
            run.terminate()
            run.wait()
    assert run.returncode == 0, log.read_text()[-3000:]
    assert kill_at is None
    return [json.loads(line) for line in rows.read_text().splitlines()]


@pytest.mark.slow
def test_training_survives_the_death_of_a_worker(tmp_path):
    "SIGKILL in mid-training: torchrun starts all again, and the losses are those of a run without it."
    whole, hurt = elastic_run(tmp_path / "whole", None), elastic_run(tmp_path / "hurt", 12)
    assert len(whole) == 30 < len(hurt)  # some steps were taken twice
    assert {r["step"]: r["loss"] for r in hurt} == {r["step"]: r["loss"] for r in whole}
    torn = elastic_run(tmp_path / "torn", None, dies=True)
    steps = [r["step"] for r in torn]
    again = next(i for i, step in enumerate(steps) if i and step <= steps[i - 1])
    assert (
        steps[again] == 11 and steps[again - 1] >= 15
    )  # the third checkpoint, of step 15, was torn: on from the second
    assert {r["step"]: r["loss"] for r in torn} == {r["step"]: r["loss"] for r in whole}


def test_a_signal_ends_an_elastic_run_with_a_checkpoint(tmp_path, monkeypatch, capsys):
    real, taken = DistributedLongNet.loss_and_gradients, itertools.count(1)

    def interrupted(self, *batch):
        if next(taken) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *batch)

    (tmp_path / "text.txt").write_text("".join(f"line {i}\n" for i in range(500)))
    command = ["--folder", str(tmp_path / "run"), "--text", str(tmp_path / "text.txt"), *SMALL, "--backend", "gloo"]
    with monkeypatch.context() as patch:
        patch.setattr(DistributedLongNet, "loss_and_gradients", interrupted)
        assert elastic.elastic_main(command) == 128 + signal.SIGTERM
    assert "saved step 3 of 30" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").glob("step-*")] == ["step-00000003"]
    with monkeypatch.context() as patch:  # and one before the first step
        patch.setattr(elastic, "read_corpus", lambda text: (signal.raise_signal(signal.SIGHUP), read_corpus(text))[1])
        assert elastic.elastic_main(command) == 128 + signal.SIGHUP
    assert elastic.elastic_main(command) == 0
    assert [step for step, _ in steps_taken(tmp_path / "run")] == list(range(1, 31))


DEAD_LEARNER = """
import os, signal, sys
from dilated_attention_nb import command, runs
real = runs.train_step
def dying(model, optimizers, config, tokens, step):
    if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"], step) == ("0", "1", 6):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(model, optimizers, config, tokens, step)
runs.train_step = dying
sys.exit(command.demo())
"""


@pytest.mark.slow
def test_a_restart_by_torchrun_goes_on_with_its_run(tmp_path):
    "The same command is started again, without `--resume`, and must not begin another run."
    (tmp_path / "dying.py").write_text(DEAD_LEARNER)
    command = [*torchrun("--max-restarts", "2"), str(tmp_path / "dying.py"), "--text", str(Path(__file__).parent)]
    size = "--steps 12 --context 256 --width 32 --layers 1 --segments 64 256 --rates 1 4 --eval-bytes 2048 --device cpu"
    command += [*size.split(), "--sequence-parallel", "2", "--out", str(tmp_path / "runs")]
    done = subprocess.run(command, env=os.environ | MANY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["longnet"]
    assert [row["step"] for row in read_metrics(tmp_path / "runs/longnet")] == list(range(12))


def demo_worker(rank, world, out):
    size = "--steps 4 --context 256 --width 32 --layers 1 --segments 64 256 --rates 1 4 --eval-bytes 2048 --device cpu"
    size += f" --dtype float32 --sequence-parallel {world} --out {out} --name run{world}"
    return demo([*size.split(), "--text", str(Path(__file__).parent)])


@pytest.mark.slow
def test_the_demo_trains_alike_with_its_sequence_cut(tmp_path):
    assert spawn_gloo(demo_worker, 1, str(tmp_path)) == [0]
    assert spawn_gloo(demo_worker, 2, str(tmp_path)) == [0, 0]
    one, two = ([row["bits_per_byte"] for row in read_metrics(tmp_path / f"run{size}")] for size in (1, 2))
    assert len(one) == 4 and one == pytest.approx(two, rel=5e-3)  # Muon orthogonalizes in bfloat16
    assert (tmp_path / "run2" / "results.json").exists()


def test_the_demo_says_how_to_start_it(capsys, tmp_path):
    assert demo(["--sequence-parallel", "2", "--out", str(tmp_path)]) == 2
    assert (
        "torchrun --nproc-per-node 2 -m dilated_attention_nb.training --sequence-parallel 2" in capsys.readouterr().err
    )


def agree_worker(rank, world):
    team, found = Team(), []
    found.append(team.agreed(lambda: {"rank": rank}))
    found.append([team.any(rank == 1), team.any(False)])
    try:
        team.agreed(lambda: 0 if rank else open("/nowhere/at/all"))
    except ValueError as error:
        found.append("No such file" in str(error))
    return found


def test_a_team_agrees():
    assert spawn_gloo(agree_worker, 2) == [[{"rank": 0}, [True, False], True]] * 2


GUIDE = Path(__file__).parent.parent / "nbs" / "explanations" / "cluster.qmd"


def guide_lines() -> list[list[str]]:
    "The commands of the guide, the one in YAML too, as lists of words."
    text = GUIDE.read_text()
    yaml = [
        re.sub(r"[\[\],\"]", " ", line.split("command:")[1]).split() for line in text.splitlines() if "command:" in line
    ]
    shell = [
        line.removeprefix("srun ").split()
        for line in text.splitlines()
        if re.match(r"(srun )?(torchrun|python) ", line)
    ]
    return yaml + shell


def test_flags_of_the_guide_exist():
    import shlex

    from torch.distributed.run import get_args_parser

    from dilated_attention_nb.command import parse

    lines = guide_lines()
    assert len(lines) == 8
    for words in lines:
        at = words.index("-m")
        words = shlex.split(" ".join(words))
        module, options = words[at + 1], words[at + 2 :]
        {"dilated_attention_nb.training": parse, "dilated_attention_nb.elastic": parse_elastic}[module](options)
        if words[0] == "torchrun":
            launcher = ["4" if word.startswith("$SLURM_NNODES") else word for word in words[1:at]]
            get_args_parser().parse_args([*launcher, "script"])


@pytest.mark.slow
def test_memory_of_a_step_falls_with_the_ranks(monkeypatch):
    "65,536 tokens, every process beyond what it held before: at four ranks at most 0.35 of one process."
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import distributed as measured

    held = {world: measured.spawn("held", world, measured.LONG, measured.N_LONG) for world in (1, 4)}
    alone, most = (max(peak for peak, _ in held[world]) for world in (1, 4))
    assert alone > 2**28 and most <= 0.35 * alone
