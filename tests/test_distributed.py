"Meshes of processes against one process: losses, gradients, checkpoints, and a worker that is killed."

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dilated_attention_nb.config import DistributedConfig, RingAttentionConfig
from dilated_attention_nb.distributed import (
    DistributedLongNet,
    make_mesh,
    mesh_sizes,
    mesh_table,
    single_losses,
    stage_layers,
    steps_worker,
)
from dilated_attention_nb.elastic import Checkpoints, parse_elastic, train_elastic, training_tensors
from dilated_attention_nb.improved import dilated_attention
from dilated_attention_nb.longnet import LongNet, longnet_tiny
from dilated_attention_nb.ring import RingDilatedAttention
from dilated_attention_nb.sharded import LongNetShare, Team, share_worker
from dilated_attention_nb.testing import make_qkv, saved_for_backward, spawn_gloo
from dilated_attention_nb.training import NgramEmbedding, demo, read_metrics

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


def check_losses(world: int, steps: int = 20, model=TINY, **config) -> list[dict]:
    given = batches(steps)
    found = spawn_gloo(steps_worker, world, model, DistributedConfig(**config), given, timeout_s=240.0)
    wanted = single_losses(model, given)
    for rank in found:
        worst = max(abs(a - b) for a, b in zip(rank["losses"], wanted))
        assert len(rank["losses"]) == steps and worst <= bound(wanted), (config, worst, bound(wanted))
    return found


# ---------------------------------------------------------------- a share of a model


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_loss_and_gradients_do_not_know_that_the_sequence_is_cut(layout):
    "Embeddings that look back across borders included."
    torch.manual_seed(0)
    model = LongNet(longnet_tiny(tie_embeddings=False, position="xpos")).double()
    model.embed_tokens = NgramEmbedding(257, 64, (2, 3, 6), 512).double()
    tokens = batches(1, 2)[0]
    found = spawn_gloo(share_worker, 2, model, tokens, layout)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    for rank in found:
        assert abs(rank["loss"] - loss.item()) < 1e-12
        for name, p in model.named_parameters():
            assert (rank["grads"][name] - p.grad).abs().max() <= 1e-11 * p.grad.abs().max(), name


@pytest.mark.parametrize(
    "change, name",
    [({"dropout": 0.1}, "dropout"), ({"drop_path": 0.1}, "drop_path")],
)
def test_what_a_share_cannot_do_it_refuses(change, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        LongNetShare(LongNet(longnet_tiny(**change)))


def part_worker(rank, world, q, k, v, dout, options):
    "This rank has some of the heads, on a ring of its own."
    heads, kv = q.shape[2] // world, k.shape[2] // world
    rings = [dist.new_group([r]) for r in range(world)]
    ring = RingDilatedAttention(RingAttentionConfig(**options), rings[rank], part=(rank * heads, q.shape[2]))
    own = slice(rank * heads, (rank + 1) * heads), slice(rank * kv, (rank + 1) * kv)
    leaves = [q[:, :, own[0]].clone(), k[:, :, own[1]].clone(), v[:, :, own[1]].clone()]
    out = ring(*(x.requires_grad_() for x in leaves), True)
    return out.detach(), torch.autograd.grad(out, leaves, dout[:, :, own[0]])


@pytest.mark.parametrize("mixing, offsets", [("softmax", "blocked"), ("softmax", "interleaved"), ("groups", "blocked")])
def test_some_heads_attend_as_they_do_among_all(mixing, offsets):
    options = {"segment_lengths": (8, 24), "dilation_rates": (1, 3), "mixing": mixing, "offsets": offsets}
    q, k, v = make_qkv(1, 24, 8, 8, kv_heads=4, dtype=torch.float64)
    leaves, dout = [x.clone().requires_grad_() for x in (q, k, v)], torch.randn_like(q)
    whole = dilated_attention(*leaves, (8, 24), (1, 3), mixing=mixing, offsets=offsets, is_causal=True)
    grads = torch.autograd.grad(whole, leaves, dout)
    found = spawn_gloo(part_worker, 2, q, k, v, dout, options)
    assert (torch.cat([out for out, _ in found], 2) - whole).abs().max() < 1e-13
    for i, grad in enumerate(grads):
        assert (torch.cat([g[i] for _, g in found], 2) - grad).abs().max() < 1e-12


def late_worker(rank, world, overlap):
    "Seconds until the first tile is computed, where the other rank comes half a second later."
    x = torch.randn(1, 32, 2, 8)
    ring = RingDilatedAttention(RingAttentionConfig((64,), (1,), layout="zigzag"), overlap=overlap)
    ring(x, x, x, True)  # connects, and compares arguments
    ring.record = []
    if rank == 1:
        time.sleep(0.5)
    begin = time.perf_counter()
    ring(x, x, x, True)
    return min(e.begin for e in ring.record if e.kind == "attend") - begin


def test_overlap_computes_before_messages_have_come():
    assert spawn_gloo(late_worker, 2, True)[0] < 0.3
    assert spawn_gloo(late_worker, 2, False)[0] > 0.4


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
    with pytest.raises(ValueError, match="sequence_shards must be None"):
        DistributedConfig(sequence_shards=2)
    assert [len(x) for x in stage_layers(7, 3)] == [2, 3, 2]


def refusing_worker(rank, world):
    "The complaints of models and configs that don't go together."
    said = []
    for model, config in (
        (longnet_tiny(), DistributedConfig(**PP)),
        (longnet_tiny(num_kv_heads=1), DistributedConfig(**TP)),
        (longnet_tiny(num_layers=1, tie_embeddings=False), DistributedConfig(**PP)),
        (longnet_tiny(dropout=0.1), DistributedConfig()),
    ):
        torch.manual_seed(0)
        try:
            DistributedLongNet(LongNet(model), config)
        except ValueError as error:
            said.append(str(error))
    torch.manual_seed(rank)
    try:
        DistributedLongNet(LongNet(longnet_tiny()), DistributedConfig())
    except ValueError as error:
        said.append(str(error))
    return said


def test_what_is_not_supported_is_refused_on_all_ranks():
    words = [
        "tie_embeddings must",
        "num_kv_heads must",
        "pipeline_stages must",
        "dropout must",
        "the model must be the same",
    ]
    for said in spawn_gloo(refusing_worker, 2):
        assert len(said) == len(words) and all(s.startswith(w) for s, w in zip(said, words)), said


def test_the_sequence_alone_takes_the_steps_of_one_process():
    found = check_losses(2, **SP)
    assert [r["place"]["sequence"] for r in found] == [0, 1]


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


def elastic_worker(rank, world, config, folder, steps, crash=None):
    "Train to a step; or die in the middle of saving after it."
    torch.manual_seed(0)
    part = DistributedLongNet(LongNet(TINY).double(), config)
    tokens = (torch.arange(5000) * 37 % 251).short()
    if crash is None:
        return train_elastic(part, tokens, Path(folder), steps, 64, 4, every=4)
    train_elastic(part, tokens, Path(folder), steps, 64, 4, every=4)
    checkpoints = Checkpoints(folder)
    optimizer = torch.optim.AdamW(part.parameters())
    checkpoints.load(part, optimizer)
    checkpoints.save(part, optimizer, steps + 1)  # in the background; nobody waits for it and renames it
    time.sleep(0.2)
    return sorted(p.name for p in Path(folder).glob("step-*"))


@pytest.mark.slow
def test_training_goes_on_with_another_number_of_ranks_after_a_crash_while_saving(tmp_path):
    alone = spawn_gloo(elastic_worker, 1, DistributedConfig(), str(tmp_path / "whole"), 12)[0]
    there = spawn_gloo(elastic_worker, 2, DistributedConfig(**SP, **FSDP), str(tmp_path / "cut"), 8, True)[0]
    assert there == ["step-00000004", "step-00000008", "step-00000009.part"]
    (last,) = spawn_gloo(elastic_worker, 1, DistributedConfig(), str(tmp_path / "cut"), 12)
    assert len(last) == 12 and max(abs(a - b) for a, b in zip(last, alone)) < bound(alone)
    assert not list((tmp_path / "cut").glob("*.part"))


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
    return step, about, all(torch.equal(after[name], t) for name, t in before.items()), len(before)


def test_a_checkpoint_is_what_was_there_and_reading_it_runs_nothing(tmp_path):
    ((step, about, equal, count),) = spawn_gloo(frozen_worker, 1, str(tmp_path))
    assert (step, about, equal) == (1, {"note": "kept"}, True) and count > 3 * 20
    folder = tmp_path / "step-00000001"
    files = sorted(p.name for p in folder.iterdir())
    assert [name for name in files if not name.endswith(".safetensors")] == ["about.json"]
    (tmp_path / "proof").unlink(missing_ok=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(str(tmp_path / "proof"))))  # what DCP's own reader unpickles
    (folder / "x.distcp").write_bytes(pickle.dumps(Bomb(str(tmp_path / "proof"))))
    spawn_gloo(loading_worker, 1, str(tmp_path))
    assert not (tmp_path / "proof").exists()
    torch.distributed.checkpoint.FileSystemReader(folder).read_metadata()
    assert (tmp_path / "proof").exists()  # the file was a live one
    shards = next(folder.glob("*.safetensors"))
    shards.write_bytes(pickle.dumps(Bomb(str(tmp_path / "second"))))
    with pytest.raises(RuntimeError, match="[Hh]eader|safetensors|SafetensorError"):
        spawn_gloo(loading_worker, 1, str(tmp_path))
    assert not (tmp_path / "second").exists()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def loading_worker(rank, world, folder):
    torch.manual_seed(0)
    part = DistributedLongNet(LongNet(TINY), DistributedConfig())
    return Checkpoints(folder).load(part, torch.optim.AdamW(part.parameters()))[0]


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    spawn_gloo(frozen_worker, 1, str(tmp_path))
    path = tmp_path / "step-00000001" / "about.json"
    about = json.loads(path.read_text())
    about["config"]["num_layers"] = 3
    path.write_text(json.dumps(about))
    with pytest.raises(RuntimeError, match="checkpoint must be of this model"):
        spawn_gloo(loading_worker, 1, str(tmp_path))


def settling_worker(rank, world, folder):
    "A checkpoint is whole as soon as it is written: nobody saves again or waits."
    torch.manual_seed(0)
    part = DistributedLongNet(LongNet(TINY), DistributedConfig())
    checkpoints = Checkpoints(folder)
    checkpoints.save(part, torch.optim.AdamW(part.parameters()), 1)
    early, deadline = [p.name for p in Path(folder).glob("step-*")], time.monotonic() + 30
    while checkpoints.pending and time.monotonic() < deadline:
        time.sleep(0.01)
        checkpoints.settle()
    return early, [p.name for p in checkpoints.whole()]


def test_a_written_checkpoint_gets_its_name_at_once(tmp_path):
    found = spawn_gloo(settling_worker, 1, str(tmp_path))
    assert found == [(["step-00000001.part"], ["step-00000001"])]


def shared_batch_worker(rank, world, folder):
    torch.manual_seed(0)
    part = DistributedLongNet(LongNet(TINY), DistributedConfig())
    train_elastic(part, torch.arange(500).short(), Path(folder), 1, 64, 3)


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="rows must be a multiple of 2, the ranks that share a batch, got 3"):
        spawn_gloo(shared_batch_worker, 2, str(tmp_path))


# ---------------------------------------------------------------- commands

SMALL = "--steps 30 --checkpoint-every 5 --context 128 --rows 2 --width 32 --segments 32 128 --rates 1 2".split()


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]


def elastic_run(folder: Path, kill_at: int | None) -> list[dict]:
    "Lines of losses.jsonl, last ones for each step, of a run with a worker killed after so many steps."
    folder.mkdir(parents=True)
    log, rows = folder / "log", folder / "losses.jsonl"
    command = [*torchrun("--max-restarts", "2"), "-m", "dilated_attention_nb.elastic", "--sequence-parallel", "2"]
    with open(log, "w") as out:
        run = subprocess.Popen(
            [*command, "--folder", str(folder), *SMALL], stdout=out, stderr=out, env=os.environ | MANY
        )
    try:
        deadline = time.monotonic() + 150
        while run.poll() is None:
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.05)
            if kill_at and rows.exists() and len(rows.read_text().splitlines()) >= kill_at:
                os.kill(int(re.search(r"rank 1 is process (\d+)", log.read_text())[1]), signal.SIGKILL)
                kill_at = None
    finally:
        if run.poll() is None:
            run.terminate()
            run.wait(30)
    assert run.returncode == 0, log.read_text()[-3000:]
    assert kill_at is None
    return [json.loads(line) for line in rows.read_text().splitlines()]


@pytest.mark.slow
def test_training_survives_the_death_of_a_worker(tmp_path):
    "SIGKILL in mid-training: torchrun starts all again, and the losses are those of a run without it."
    whole, hurt = elastic_run(tmp_path / "whole", None), elastic_run(tmp_path / "hurt", 12)
    assert len(whole) == 30 < len(hurt)  # some steps were taken twice
    assert {r["step"]: r["loss"] for r in hurt} == {r["step"]: r["loss"] for r in whole}


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

    from dilated_attention_nb.training import parse

    lines = guide_lines()
    assert len(lines) == 7
    for words in lines:
        at = words.index("-m")
        words = shlex.split(" ".join(words))
        module, options = words[at + 1], words[at + 2 :]
        {"dilated_attention_nb.training": parse, "dilated_attention_nb.elastic": parse_elastic}[module](options)
        if words[0] == "torchrun":
            launcher = ["4" if word.startswith("$SLURM_NNODES") else word for word in words[1:at]]
            get_args_parser().parse_args([*launcher, "script"])
