"Meshes of processes against one process: losses, gradients, checkpoints, and a worker that is killed."

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dilated_attention_nb.config import DistributedConfig, RingAttentionConfig
from dilated_attention_nb.distributed import (
    DistributedLongNet,
    ShardedNorm,
    make_mesh,
    mesh_sizes,
    mesh_table,
    single_losses,
    stage_layers,
    steps_worker,
)
from dilated_attention_nb.elastic import Checkpoints, elastic_main, parse_elastic, train_elastic, training_tensors
from dilated_attention_nb.improved import dilated_attention
from dilated_attention_nb.longnet import LongNet, longnet_tiny
from dilated_attention_nb.ring import RingDilatedAttention, shard_sequence
from dilated_attention_nb.sharded import LongNetShare, Team, embed_share, joined_team, share_worker, shard_sequence
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
