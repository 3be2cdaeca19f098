"""Scripts that end as scripts of users do: the process group is destroyed, and everything that was made is still there.

python -m torch.distributed.run --standalone --nproc-per-node 4 tests/ending.py KIND
"""

import os
import sys

import torch
import torch.distributed as dist

from dilated_attention_nb import (
    BlockSparseRingConfig,
    BlockSparseRingDilatedAttention,
    DistributedConfig,
    DistributedLongNet,
    LongNet,
    RingAttentionConfig,
    RingDilatedAttention,
    gather_sequence,
    longnet_tiny,
    shard_sequence,
    share_in_ring,
)

KEPT: list = []  # outputs, losses, layers, models, optimizers, errors


def qkv() -> list[torch.Tensor]:
    return [torch.randn(2, 32, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def lengths() -> tuple[int, ...]:
    "Segments of a part of a rank's tokens, of all of them, and of all ranks'."
    return 16, 32, 32 * dist.get_world_size()


def attend(layer) -> None:
    "Outputs that went back, and outputs that didn't."
    q, k, v = qkv()
    out = layer(q, k, v, is_causal=True)
    KEPT.extend((layer, out, torch.autograd.grad(out.sum(), (q, k, v)), layer(q, k, v).sum()))


def dilated(group=None) -> None:
    for mixing in ("groups", "softmax"):
        attend(RingDilatedAttention(RingAttentionConfig(lengths(), (1, 2, 4), mixing=mixing), group))


def block_sparse() -> None:
    attend(BlockSparseRingDilatedAttention(BlockSparseRingConfig((64,), (1,), pattern_type="random", block_size=16)))


def subgroup() -> None:
    "The group is remembered by the layers alone."
    dilated(dist.new_group(list(range(dist.get_world_size()))))


def sharding() -> None:
    x = qkv()[0]
    whole = gather_sequence(shard_sequence(x))
    KEPT.extend((whole, torch.autograd.grad(whole.sum(), x), shard_sequence(x).sum()))


def refused() -> None:
    "The error of ranks that differ is kept, with its traceback."
    layer = RingDilatedAttention(RingAttentionConfig(lengths(), (1, 2, 4)))
    try:
        layer(*qkv(), is_causal=dist.get_rank() == 0)
    except ValueError as error:
        KEPT.append(error)
    assert isinstance(KEPT[-1], ValueError)
    KEPT.append(layer)


def share() -> None:
    "A model in DDP over a ring."
    model = LongNet(longnet_tiny(tie_embeddings=False))
    learner = share_in_ring(model)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 256, (1, 65), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        loss = learner(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
    KEPT.extend((model, learner, optimizer, loss, learner(tokens[:, :-1], tokens[:, 1:])))


def mesh(**config) -> None:
    "A model on a mesh."
    model = LongNet(longnet_tiny(tie_embeddings=False))
    part = DistributedLongNet(model, DistributedConfig(**config))
    optimizer = torch.optim.AdamW(part.parameters())
    tokens = torch.randint(0, 256, (4, 65), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        loss = part.loss_and_gradients(tokens[:, :-1], tokens[:, 1:])
        optimizer.step()
    KEPT.extend((model, part, optimizer, loss))


KINDS = {
    "dilated": dilated,
    "block-sparse": block_sparse,
    "subgroup": subgroup,
    "sharding": sharding,
    "refused": refused,
    "share": share,
    "fsdp": lambda: mesh(sequence_parallel=True, data_engine="fsdp"),
    "ddp": lambda: mesh(sequence_parallel=True),
    "tensor": lambda: mesh(model_parallel=True),
    "pipeline": lambda: mesh(pipeline_parallel=True, pipeline_stages=2, data_engine="fsdp"),
}

if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for kind in sys.argv[1:]:
        KINDS[kind]()
    total = torch.tensor(1.0)
    dist.all_reduce(total)
    dist.destroy_process_group()
