"""Dilated attention for very long sequences: a library written as notebooks.

The names that users type stand here: `from dilated_attention_nb import dilated_attention`. A module is imported when
one of its names is first used, so that plots, training or testing cost nothing to those who only attend. All other
public names are reached through their modules.
"""

# Written by scripts/root.py, which holds the list of names: run `make export` after a change.

from importlib import import_module, resources
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dilated_attention_nb import adaptive as adaptive
    from dilated_attention_nb import backends as backends
    from dilated_attention_nb import block_patterns as block_patterns
    from dilated_attention_nb import block_sparse as block_sparse
    from dilated_attention_nb import checkpoints as checkpoints
    from dilated_attention_nb import command as command
    from dilated_attention_nb import config as config
    from dilated_attention_nb import corpus as corpus
    from dilated_attention_nb import decoding as decoding
    from dilated_attention_nb import dilated as dilated
    from dilated_attention_nb import distributed as distributed
    from dilated_attention_nb import elastic as elastic
    from dilated_attention_nb import embeddings as embeddings
    from dilated_attention_nb import files as files
    from dilated_attention_nb import gigapath as gigapath
    from dilated_attention_nb import improved as improved
    from dilated_attention_nb import kv_cache as kv_cache
    from dilated_attention_nb import longnet as longnet
    from dilated_attention_nb import masking as masking
    from dilated_attention_nb import memory_pool as memory_pool
    from dilated_attention_nb import multihead as multihead
    from dilated_attention_nb import partial as partial
    from dilated_attention_nb import plotting as plotting
    from dilated_attention_nb import pretrained as pretrained
    from dilated_attention_nb import processes as processes
    from dilated_attention_nb import ring as ring
    from dilated_attention_nb import ring_block_sparse as ring_block_sparse
    from dilated_attention_nb import ring_dilated as ring_dilated
    from dilated_attention_nb import ring_engine as ring_engine
    from dilated_attention_nb import runs as runs
    from dilated_attention_nb import scaling as scaling
    from dilated_attention_nb import sharded as sharded
    from dilated_attention_nb import testing as testing
    from dilated_attention_nb import training as training
    from dilated_attention_nb import transformers as transformers
    from dilated_attention_nb import triton_backward as triton_backward
    from dilated_attention_nb import triton_forward as triton_forward
    from dilated_attention_nb.improved import dilated_attention as dilated_attention
    from dilated_attention_nb.improved import Packing as Packing
    from dilated_attention_nb.backends import attend as attend
    from dilated_attention_nb.partial import merge as merge
    from dilated_attention_nb.backends import available_backends as available_backends
    from dilated_attention_nb.block_patterns import block_pattern as block_pattern
    from dilated_attention_nb.block_sparse import block_sparse_attention as block_sparse_attention
    from dilated_attention_nb.dilated import DilatedAttention as DilatedAttention
    from dilated_attention_nb.improved import ImprovedDilatedAttention as ImprovedDilatedAttention
    from dilated_attention_nb.block_sparse import BlockSparseAttention as BlockSparseAttention
    from dilated_attention_nb.ring_dilated import RingDilatedAttention as RingDilatedAttention
    from dilated_attention_nb.ring_block_sparse import (
        BlockSparseRingDilatedAttention as BlockSparseRingDilatedAttention,
    )
    from dilated_attention_nb.multihead import create_dilated_attention as create_dilated_attention
    from dilated_attention_nb.multihead import MultiheadDilatedAttention as MultiheadDilatedAttention
    from dilated_attention_nb.multihead import create_multihead_dilated_attention as create_multihead_dilated_attention
    from dilated_attention_nb.transformers import DilatedMHA as DilatedMHA
    from dilated_attention_nb.transformers import replace_attention as replace_attention
    from dilated_attention_nb.config import DilatedAttentionConfig as DilatedAttentionConfig
    from dilated_attention_nb.config import MultiheadConfig as MultiheadConfig
    from dilated_attention_nb.block_sparse import SparseAttentionConfig as SparseAttentionConfig
    from dilated_attention_nb.ring_dilated import RingAttentionConfig as RingAttentionConfig
    from dilated_attention_nb.ring_block_sparse import BlockSparseRingConfig as BlockSparseRingConfig
    from dilated_attention_nb.longnet import LongNetConfig as LongNetConfig
    from dilated_attention_nb.gigapath import GigaPathConfig as GigaPathConfig
    from dilated_attention_nb.training import TrainingConfig as TrainingConfig
    from dilated_attention_nb.distributed import DistributedConfig as DistributedConfig
    from dilated_attention_nb.memory_pool import MemoryPoolConfig as MemoryPoolConfig
    from dilated_attention_nb.longnet import LongNet as LongNet
    from dilated_attention_nb.longnet import LongNetEncoder as LongNetEncoder
    from dilated_attention_nb.longnet import longnet_tiny as longnet_tiny
    from dilated_attention_nb.longnet import longnet_125m as longnet_125m
    from dilated_attention_nb.longnet import token_losses as token_losses
    from dilated_attention_nb.gigapath import GigaPathSlideEncoder as GigaPathSlideEncoder
    from dilated_attention_nb.gigapath import slide_segment_lengths as slide_segment_lengths
    from dilated_attention_nb.gigapath import tile_cells as tile_cells
    from dilated_attention_nb.gigapath import attention_rollout as attention_rollout
    from dilated_attention_nb.transformers import register_with_transformers as register_with_transformers
    from dilated_attention_nb.transformers import check_dilated as check_dilated
    from dilated_attention_nb.pretrained import save_pretrained as save_pretrained
    from dilated_attention_nb.pretrained import from_pretrained as from_pretrained
    from dilated_attention_nb.decoding import generate as generate
    from dilated_attention_nb.kv_cache import KVCache as KVCache
    from dilated_attention_nb.kv_cache import DilatedKVCache as DilatedKVCache
    from dilated_attention_nb.decoding import LongNetCache as LongNetCache
    from dilated_attention_nb.decoding import JoinedCache as JoinedCache
    from dilated_attention_nb.corpus import to_bytes as to_bytes
    from dilated_attention_nb.corpus import to_tokens as to_tokens
    from dilated_attention_nb.corpus import read_corpus as read_corpus
    from dilated_attention_nb.training import bits_per_byte as bits_per_byte
    from dilated_attention_nb.training import fit as fit
    from dilated_attention_nb.runs import train as train
    from dilated_attention_nb.runs import load_run as load_run
    from dilated_attention_nb.elastic import train_elastic as train_elastic
    from dilated_attention_nb.ring import shard_sequence as shard_sequence
    from dilated_attention_nb.ring import gather_sequence as gather_sequence
    from dilated_attention_nb.sharded import share_in_ring as share_in_ring
    from dilated_attention_nb.sharded import LongNetShare as LongNetShare
    from dilated_attention_nb.distributed import DistributedLongNet as DistributedLongNet
    from dilated_attention_nb.scaling import Cluster as Cluster
    from dilated_attention_nb.memory_pool import UnifiedMemoryPool as UnifiedMemoryPool
    from dilated_attention_nb.testing import make_qkv as make_qkv
    from dilated_attention_nb.testing import oracle_attention as oracle_attention
    from dilated_attention_nb.testing import check_against_oracle as check_against_oracle
    from dilated_attention_nb.testing import AttentionCase as AttentionCase
    from dilated_attention_nb.testing import attention_cases as attention_cases
    from dilated_attention_nb.testing import assert_causal as assert_causal
    from dilated_attention_nb.processes import spawn_gloo as spawn_gloo

_HOME = {
    # attention
    "dilated_attention": "improved",
    "Packing": "improved",
    "attend": "backends",
    "merge": "partial",
    "available_backends": "backends",
    "block_pattern": "block_patterns",
    "block_sparse_attention": "block_sparse",
    # modules
    "DilatedAttention": "dilated",
    "ImprovedDilatedAttention": "improved",
    "BlockSparseAttention": "block_sparse",
    "RingDilatedAttention": "ring_dilated",
    "BlockSparseRingDilatedAttention": "ring_block_sparse",
    "create_dilated_attention": "multihead",
    "MultiheadDilatedAttention": "multihead",
    "create_multihead_dilated_attention": "multihead",
    "DilatedMHA": "transformers",
    "replace_attention": "transformers",
    # configs
    "DilatedAttentionConfig": "config",
    "MultiheadConfig": "config",
    "SparseAttentionConfig": "block_sparse",
    "RingAttentionConfig": "ring_dilated",
    "BlockSparseRingConfig": "ring_block_sparse",
    "LongNetConfig": "longnet",
    "GigaPathConfig": "gigapath",
    "TrainingConfig": "training",
    "DistributedConfig": "distributed",
    "MemoryPoolConfig": "memory_pool",
    # models
    "LongNet": "longnet",
    "LongNetEncoder": "longnet",
    "longnet_tiny": "longnet",
    "longnet_125m": "longnet",
    "token_losses": "longnet",
    "GigaPathSlideEncoder": "gigapath",
    "slide_segment_lengths": "gigapath",
    "tile_cells": "gigapath",
    "attention_rollout": "gigapath",
    "register_with_transformers": "transformers",
    "check_dilated": "transformers",
    "save_pretrained": "pretrained",
    "from_pretrained": "pretrained",
    # decoding
    "generate": "decoding",
    "KVCache": "kv_cache",
    "DilatedKVCache": "kv_cache",
    "LongNetCache": "decoding",
    "JoinedCache": "decoding",
    # data and training
    "to_bytes": "corpus",
    "to_tokens": "corpus",
    "read_corpus": "corpus",
    "bits_per_byte": "training",
    "fit": "training",
    "train": "runs",
    "load_run": "runs",
    "train_elastic": "elastic",
    # distributed
    "shard_sequence": "ring",
    "gather_sequence": "ring",
    "share_in_ring": "sharded",
    "LongNetShare": "sharded",
    "DistributedLongNet": "distributed",
    "Cluster": "scaling",
    "UnifiedMemoryPool": "memory_pool",
    # testing
    "make_qkv": "testing",
    "oracle_attention": "testing",
    "check_against_oracle": "testing",
    "AttentionCase": "testing",
    "attention_cases": "testing",
    "assert_causal": "testing",
    "spawn_gloo": "processes",
}

__all__ = [
    "__version__",
    # attention
    "dilated_attention",
    "Packing",
    "attend",
    "merge",
    "available_backends",
    "block_pattern",
    "block_sparse_attention",
    # modules
    "DilatedAttention",
    "ImprovedDilatedAttention",
    "BlockSparseAttention",
    "RingDilatedAttention",
    "BlockSparseRingDilatedAttention",
    "create_dilated_attention",
    "MultiheadDilatedAttention",
    "create_multihead_dilated_attention",
    "DilatedMHA",
    "replace_attention",
    # configs
    "DilatedAttentionConfig",
    "MultiheadConfig",
    "SparseAttentionConfig",
    "RingAttentionConfig",
    "BlockSparseRingConfig",
    "LongNetConfig",
    "GigaPathConfig",
    "TrainingConfig",
    "DistributedConfig",
    "MemoryPoolConfig",
    # models
    "LongNet",
    "LongNetEncoder",
    "longnet_tiny",
    "longnet_125m",
    "token_losses",
    "GigaPathSlideEncoder",
    "slide_segment_lengths",
    "tile_cells",
    "attention_rollout",
    "register_with_transformers",
    "check_dilated",
    "save_pretrained",
    "from_pretrained",
    # decoding
    "generate",
    "KVCache",
    "DilatedKVCache",
    "LongNetCache",
    "JoinedCache",
    # data and training
    "to_bytes",
    "to_tokens",
    "read_corpus",
    "bits_per_byte",
    "fit",
    "train",
    "load_run",
    "train_elastic",
    # distributed
    "shard_sequence",
    "gather_sequence",
    "share_in_ring",
    "LongNetShare",
    "DistributedLongNet",
    "Cluster",
    "UnifiedMemoryPool",
    # testing
    "make_qkv",
    "oracle_attention",
    "check_against_oracle",
    "AttentionCase",
    "attention_cases",
    "assert_causal",
    "spawn_gloo",
]


if not TYPE_CHECKING:  # or every name would pass for one of ours

    def __getattr__(name: str) -> Any:
        "Find a public name, or a module, on first use (PEP 562). Raises `ImportError` for names of modules alone."
        if name in _HOME:
            globals()[name] = value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
            return value
        if not name.startswith("_"):
            if find_spec(f"{__name__}.{name}"):
                return import_module(f"{__name__}.{name}")
            for file in sorted(resources.files(__name__).iterdir(), key=lambda file: file.name):
                lists = file.read_text("utf-8").partition("\n__all__ = [")[2] if file.name.endswith(".py") else ""
                if file.name != "__init__.py" and repr(name) in lists.partition("]")[0]:
                    home = f"{__name__}.{file.name[:-3]}"
                    raise ImportError(f"{name} isn't at the package root: from {home} import {name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
