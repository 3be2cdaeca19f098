"""Hold the cost model against training steps of 1, 2 and 4 processes; store the figures in benchmarks/distributed.json.

    python benchmarks/distributed.py                  all sections (some six minutes on two cores)
    python benchmarks/distributed.py bytes memory     some of them

All ranks are processes on this machine, one thread each, joined by gloo over the loopback device. Four of them share
two cores: the rates that the model is given are those that each of so many processes reaches while all of them work.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dilated_attention_nb.benchmarks import run_sections, show_rows

RESULTS = Path(__file__).with_name("distributed.json")
PROCESSES = (1, 2, 4)
WIDE = {  # of the steps that are timed: products and attention take about equally long
    "embed_dim": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 257, "position": "rope", "tie_embeddings": False,
    "segment_lengths": (1024, 4096, 8192), "dilation_rates": (1, 2, 4),
}  # fmt: skip
N = 8192
LONG = WIDE | {
    "embed_dim": 128,
    "num_heads": 2,
    "segment_lengths": (2048, 32_768, 65_536),
    "dilation_rates": (1, 8, 16),
}
N_LONG = 65_536
STEPS = 7


def the_slowest(taken: float) -> float:
    "Seconds of the slowest rank."
    import torch.distributed as dist

    found = torch.tensor(taken)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def together(runs: dict[str, tuple[Callable[[], Any], int]], repeats: int) -> dict[str, float]:
    """Seconds of each call while all ranks make it, so many times at a stretch: the median of the slowest rank's.

    They take turns, so that a machine that slows down slows all of them; one round of warm-up.
    """
    import torch.distributed as dist

    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, (run, times) in runs.items():
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(times):
                run()
            found[name].append(the_slowest((time.perf_counter() - begin) / times))
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def rates(rank: int, world: int, shape: dict[str, Any], n: int) -> dict[str, float]:
    """Seconds of a step, and what a process reaches in products, attention, copies and messages, while all do the same.

    Attention is a layer's, by the code of the step but without messages: in a ring all ranks' tiles, one after the
    other, in each process. `kernel_flops` is the kernel alone on the shortest segment.
    """
    import torch.distributed as dist

    from dilated_attention_nb.backends import attend
    from dilated_attention_nb.improved import dilated_attention
    from dilated_attention_nb.longnet import LongNetConfig
    from dilated_attention_nb.ring_dilated import RingAttentionConfig, simulate_ring
    from dilated_attention_nb.scaling import attention_pairs

    model = LongNetConfig(**shape)
    e, heads, d, m = model.embed_dim, model.num_heads, model.embed_dim // model.num_heads, n // max(PROCESSES)
    x, w, grad = torch.randn(m, e), torch.randn(4 * e, e), torch.randn(m, 4 * e)

    def products() -> None:
        x @ w.T, grad @ w, grad.T @ x

    def tensors(rows: int) -> list[torch.Tensor]:
        return [torch.randn(1, rows, heads, d).requires_grad_() for _ in range(3)]

    few, all_ = tensors(model.segment_lengths[0]), tensors(n)
    dout, douts = torch.randn_like(few[0]), torch.randn_like(all_[0])
    branches = model.attention_config.to_dict() | {"dropout": 0.0}
    options = {name: branches[name] for name in ("mixing", "offsets", "ragged")}

    def kernel() -> None:
        torch.autograd.grad(attend(*few, is_causal=True)[0], few, dout)

    def layer() -> None:
        if world > 1:
            out = simulate_ring(*all_, RingAttentionConfig(**branches, layout="zigzag"), world, True)
        else:
            out = dilated_attention(*all_, model.segment_lengths, model.dilation_rates, is_causal=True, **options)
        torch.autograd.grad(out, all_, douts)

    source, target = torch.zeros(2, 2**24)
    small, large = (torch.zeros(2, size) for size in (2, 2**20))

    def pass_on(out: torch.Tensor, into: torch.Tensor) -> None:
        peers = (rank + 1) % world, (rank - 1) % world
        ops = [dist.P2POp(dist.isend, out, peers[0]), dist.P2POp(dist.irecv, into, peers[1])]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    runs = {"step": (stepper(world, shape, n)[0], 1), "products": (products, 8), "kernel": (kernel, 4)}
    runs |= {"layer": (layer, 1), "copy": (lambda: target.copy_(source), 2)}
    if world > 1:
        runs |= {"small": (lambda: pass_on(*small), 200), "large": (lambda: pass_on(*large), 8)}
    taken = together(runs, STEPS)
    found = {"step": taken["step"], "flops": 6.0 * x.numel() * 4 * e / taken["products"]}
    found["kernel_flops"] = 14.0 * d * heads * few[0].shape[1] * (few[0].shape[1] + 1) / 2 / taken["kernel"]
    found["attention_flops"] = 14.0 * d * attention_pairs(model, n, "ring") / taken["layer"]
    found["memory_bandwidth"] = 2.0 * source.nbytes / taken["copy"]
    if world > 1:
        found |= {"latency": taken["small"], "bandwidth": large[0].nbytes / (taken["large"] - taken["small"])}
    return found


class Sent:
    "Counts the bytes that are handed to the process group in point-to-point messages."

    def __enter__(self) -> Sent:
        import torch.distributed as dist

        self.bytes, self.real = 0, dist.batch_isend_irecv
        dist.batch_isend_irecv = self.count
        return self

    def count(self, ops: list[Any]) -> Any:
        import torch.distributed as dist

        self.bytes += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return self.real(ops)

    def __exit__(self, *_: Any) -> None:
        import torch.distributed as dist

        dist.batch_isend_irecv = self.real


def stepper(world: int, shape: dict[str, Any], n: int) -> tuple[Callable[[], Any], Any]:
    "A forward and backward pass over one sequence, and this rank's part; one process has the LongNet and no ring."
    from dilated_attention_nb.distributed import DistributedConfig, DistributedLongNet
    from dilated_attention_nb.longnet import LongNet, LongNetConfig

    torch.manual_seed(0)
    model = LongNet(LongNetConfig(**shape))
    x = torch.randint(0, 257, (1, n + 1))
    if world == 1:
        return lambda: model(x[:, :-1], x[:, 1:]).backward(), model
    part = DistributedLongNet(model, DistributedConfig(sequence_parallel=True))
    return lambda: part.loss_and_gradients(x[:, :-1], x[:, 1:]), part


def counted(rank: int, world: int, shape: dict[str, Any], n: int) -> tuple[int, int]:
    "Bytes of keys, values and their gradients that this rank sends in a step, and bytes of gradients it averages."
    run, part = stepper(world, shape, n)
    run()
    with Sent() as sent:
        run()
    return sent.bytes, sum(getattr(part, "reduced", []))


def held(rank: int, world: int, shape: dict[str, Any], n: int) -> tuple[int, int]:
    "Bytes that a step adds at its worst moment to what the process holds, and bytes of parameters."
    from dilated_attention_nb.processes import resident

    warm, part = stepper(world, shape, 64 * world)
    warm()  # connections, threads and gradients
    for p in part.parameters():
        p.grad = None
    torch.manual_seed(0)
    x = torch.randint(0, 257, (1, n + 1))
    before = resident("VmRSS")
    if world == 1:
        part(x[:, :-1], x[:, 1:]).backward()
    else:
        part.loss_and_gradients(x[:, :-1], x[:, 1:])
    return resident("VmHWM") - before, sum(p.nbytes for p in part.parameters())


def spawn(name: str, world: int, shape: dict[str, Any], n: int) -> list[Any]:
    "What each of `world` processes returns."
    import distributed  # this file, under a name that another process can import

    from dilated_attention_nb.processes import spawn_gloo

    return spawn_gloo(getattr(distributed, name), world, shape, n, timeout_s=1200.0)


def about(shape: dict[str, Any], n: int, rows: Iterator[dict[str, Any]]) -> dict[str, Any]:
    "A section."
    torch.set_num_threads(1)  # of each process
    fixed = {"threads": 1, "n": n, "dtype": "float32", "causal": True, "layout": "zigzag", "what": "forward+backward"}
    return fixed | {"model": shape, "rows": show_rows(rows)}


def time_() -> dict[str, Any]:
    "Seconds of a step, predicted from the rates that so many processes reach at once, and measured."
    from dilated_attention_nb.longnet import LongNetConfig
    from dilated_attention_nb.scaling import Cluster, step_seconds

    def rows() -> Iterator[dict[str, Any]]:
        for world in PROCESSES:
            reached = spawn("rates", world, WIDE, N)[0]
            links = {} if world == 1 else {key: reached[key] for key in ("latency", "bandwidth")}
            computing = {key: reached[key] for key in ("flops", "attention_flops", "memory_bandwidth")}
            cluster = Cluster(world, bytes_per_number=4, **computing, **links)
            predicted = step_seconds(LongNetConfig(**WIDE), N, cluster)
            row = {"processes": world, "gflops": reached["flops"] / 1e9}
            row |= {f"{key}_gflops": reached[f"{key}_flops"] / 1e9 for key in ("attention", "kernel")}
            row |= {"memory_gb_s": reached["memory_bandwidth"] / 1e9}
            if world > 1:
                row |= {"latency_us": reached["latency"] * 1e6, "gb_s": reached["bandwidth"] / 1e9}
            row |= {f"{key}_s": value for key, value in predicted.items()}
            yield row | {"predicted_s": sum(predicted.values()), "measured_s": reached["step"]}

    return about(WIDE, N, rows())


def bytes_() -> dict[str, Any]:
    "Bytes per rank in a step, by the formula, by the plan and as handed to gloo."
    from dilated_attention_nb.longnet import LongNetConfig
    from dilated_attention_nb.ring_dilated import RingAttentionConfig, traffic
    from dilated_attention_nb.scaling import Cluster, layer_bytes

    def rows() -> Iterator[dict[str, Any]]:
        for shape, n in ((WIDE, N), (LONG, N_LONG)):
            model = LongNetConfig(**shape)
            m = model.multihead_config
            ring = RingAttentionConfig(**model.attention_config.to_dict() | {"dropout": 0.0}, layout="zigzag")
            for world in PROCESSES:
                plan = traffic(ring, n, m.num_heads, m.head_dim, world, 1, m.kv_heads, is_causal=True)
                planned = [model.num_layers * (t.forward_sent + t.backward_sent) for t in plan]
                formula = model.num_layers * sum(layer_bytes(model, n, Cluster(world, bytes_per_number=4)))
                other = model.num_layers * sum(layer_bytes(model, n, Cluster(world, bytes_per_number=4), "world"))
                found = spawn("counted", world, shape, n)
                row = {"n": n, "processes": world, "sent": [sent for sent, _ in found], "planned": planned}
                yield row | {"formula_mean": formula, "world_mean": other, "averaged": found[0][1]}

    return about(WIDE, N, rows())


def memory() -> dict[str, Any]:
    "Peak of a step beyond what the process held before, resident, each in processes of their own."
    from dilated_attention_nb.longnet import LongNetConfig
    from dilated_attention_nb.scaling import Cluster, rank_memory

    def rows() -> Iterator[dict[str, Any]]:
        alone = 0.0
        for world in PROCESSES:
            model, cluster = LongNetConfig(**LONG), Cluster(world, bytes_per_number=4)
            predicted = rank_memory(model, N_LONG, cluster, recompute=False, sharded=False)
            found = spawn("held", world, LONG, N_LONG)
            peak = max(peak for peak, _ in found) / 2**20
            alone = alone or peak
            row = {"processes": world, "peak_mib": peak, "ratio": peak / alone, "parameters_mib": found[0][1] / 2**20}
            yield row | {"predicted_mib": (predicted["kept"] + predicted["blocks"]) / 2**20}

    return about(LONG, N_LONG, rows())


SECTIONS = {"time": time_, "bytes": bytes_, "memory": memory}

if __name__ == "__main__":
    sys.exit(run_sections(__doc__, RESULTS, SECTIONS))
