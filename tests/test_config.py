"""Configs and checks refuse every bad value by name, keep every good one, and survive JSON."""

import copy
import dataclasses
import json
import math
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, replace

import numpy as np
import pytest
import torch
from conftest import drawn
from hypothesis import given
from hypothesis import strategies as st

from dilated_attention_nb.config import (
    BACKENDS,
    DISTRIBUTED_BACKENDS,
    EVICTION_POLICIES,
    FLOAT_DTYPES,
    MIXINGS,
    OFFSETS,
    RAGGED,
    RING_LAYOUTS,
    RING_STRATEGIES,
    SPARSE_PATTERNS,
    WIDEST,
    BlockSparseRingConfig,
    Config,
    DilatedAttentionConfig,
    DistributedConfig,
    MemoryPoolConfig,
    MultiheadConfig,
    RingAttentionConfig,
    SparseAttentionConfig,
    check_branches,
    check_choice,
    check_device,
    check_dropout,
    check_dtype,
    check_flag,
    check_heads,
    check_int,
    check_length,
    check_number,
    check_placement,
    check_qkv,
    check_scale,
    valid_lengths,
)
from dilated_attention_nb.gigapath import GigaPathConfig, GigaPathSlideEncoder
from dilated_attention_nb.longnet import LongNet, LongNetConfig, longnet_tiny
from dilated_attention_nb.multihead import KINDS, create_dilated_attention, create_multihead_dilated_attention

NAN, INF = float("nan"), float("inf")
BRANCHES = {"segment_lengths": (4, 8), "dilation_rates": (1, 2)}
GOOD = {
    DilatedAttentionConfig: BRANCHES,
    MultiheadConfig: {"embed_dim": 64, "num_heads": 8},
    RingAttentionConfig: BRANCHES,
    SparseAttentionConfig: BRANCHES,
    BlockSparseRingConfig: BRANCHES,
    DistributedConfig: {},
    MemoryPoolConfig: {},
}
ATTENTION = (DilatedAttentionConfig, RingAttentionConfig, SparseAttentionConfig, BlockSparseRingConfig)

# field, bad value, error, what the message must also say
BAD_ATTENTION = [
    ("segment_lengths", (), ValueError, "none"),
    ("segment_lengths", (4,), ValueError, "dilation_rates"),
    ("segment_lengths", (4, 0), ValueError, r"\[1\] must be at least 1, got 0"),
    ("segment_lengths", (-4, 8), ValueError, r"\[0\] must be at least 1, got -4"),
    ("segment_lengths", (True, 8), TypeError, r"\[0\].*True \(bool\)"),
    ("segment_lengths", (np.True_, 8), TypeError, r"\[0\].*bool"),
    ("segment_lengths", (4.0, 8), TypeError, r"4\.0 \(float\)"),
    ("segment_lengths", (NAN, 8), TypeError, "nan"),
    ("segment_lengths", ("4", "8"), TypeError, r"'4' \(str\)"),
    ("segment_lengths", (None, 8), TypeError, "None"),
    ("segment_lengths", ((4, 8), (4, 8)), TypeError, "tuple"),
    ("segment_lengths", "48", TypeError, "str"),
    ("segment_lengths", b"48", TypeError, "bytes"),
    ("segment_lengths", 4, TypeError, r"\(4,\)"),
    ("segment_lengths", {4, 8}, TypeError, "set"),
    ("segment_lengths", {4: 1, 8: 2}, TypeError, "dict"),
    ("segment_lengths", None, TypeError, "NoneType"),
    ("segment_lengths", iter((4, 8)), TypeError, "iterator"),
    ("segment_lengths", np.array([4.0, 8.0]), TypeError, "float"),
    ("segment_lengths", np.array([[4], [8]]), TypeError, "list"),
    ("segment_lengths", torch.tensor(4), TypeError, "Tensor"),
    ("dilation_rates", (1, 2, 4), ValueError, "segment_lengths"),
    ("dilation_rates", (1, 0), ValueError, r"\[1\] must be at least 1"),
    ("dilation_rates", (True, 2), TypeError, "bool"),
    ("dilation_rates", (1, 2.0), TypeError, "float"),
    ("dilation_rates", [], ValueError, "none"),
    ("dropout", 1, ValueError, "below 1, got 1"),
    ("dropout", 1.5, ValueError, "1.5"),
    ("dropout", -0.1, ValueError, "-0.1"),
    ("dropout", NAN, ValueError, "finite, got nan"),
    ("dropout", INF, ValueError, "finite"),
    ("dropout", 10**400, ValueError, "finite"),
    ("dropout", False, TypeError, "bool"),
    ("dropout", "0.1", TypeError, "str"),
    ("dropout", None, TypeError, "None"),
    ("dropout", 0.1j, TypeError, "complex"),
    ("mixing", "group", ValueError, "did you mean 'groups'"),
    ("mixing", "", ValueError, "'groups', 'softmax'"),
    ("mixing", None, TypeError, "NoneType"),
    ("mixing", ["groups"], TypeError, "list"),
    ("offsets", "block", ValueError, "did you mean 'blocked'"),
    ("offsets", 0, TypeError, "int"),
    ("ragged", "pad", ValueError, "'error', 'mask', 'zeros'"),
    ("ragged", "Mask", ValueError, "did you mean 'mask'"),
    ("ragged", True, TypeError, "bool"),
    ("use_tf32", 1, TypeError, r"1 \(int\)"),
    ("use_tf32", None, TypeError, "NoneType"),
    ("device", "gpu", ValueError, "'cpu' or 'cuda:0'"),
    ("device", "cuda:x", ValueError, "cuda:x"),
    ("device", 0, TypeError, "cuda:0"),
    ("dtype", "bf16", ValueError, "did you mean 'bfloat16'"),
    ("dtype", torch.int64, ValueError, "int64"),
    ("dtype", torch.complex64, ValueError, "complex64"),
    ("dtype", float, TypeError, "type"),
    ("dtype", 16, TypeError, "int"),
]
BAD = [(cls, *row) for cls in ATTENTION for row in BAD_ATTENTION] + [
    (MultiheadConfig, "embed_dim", 0, ValueError, "at least 1"),
    (MultiheadConfig, "embed_dim", 64.0, TypeError, "float"),
    (MultiheadConfig, "embed_dim", True, TypeError, "bool"),
    (MultiheadConfig, "embed_dim", 60, ValueError, "multiple of 8, got 60 / 8 = 7.5"),
    (MultiheadConfig, "embed_dim", 100, ValueError, "embed_dim could be 128"),
    (MultiheadConfig, "embed_dim", 2048, ValueError, "max_head_dim 128, got 2048 / 8 = 256; num_heads could be 16"),
    (MultiheadConfig, "num_heads", 0, ValueError, "at least 1"),
    (MultiheadConfig, "num_heads", -8, ValueError, "-8"),
    (MultiheadConfig, "num_heads", 3, ValueError, "num_heads could be 1, 2, 4"),
    (MultiheadConfig, "num_heads", 16, ValueError, "64 / 16 = 4"),
    (MultiheadConfig, "num_heads", 128, ValueError, "64 / 128 = 0.5"),
    (MultiheadConfig, "num_heads", None, TypeError, "NoneType"),
    (MultiheadConfig, "bias", 1, TypeError, "True or False"),
    (MultiheadConfig, "layer_norm", "yes", TypeError, "str"),
    (MultiheadConfig, "layer_norm_eps", 0, ValueError, "above 0"),
    (MultiheadConfig, "layer_norm_eps", NAN, ValueError, "finite"),
    (MultiheadConfig, "layer_norm_eps", -1e-5, ValueError, "above 0"),
    (MultiheadConfig, "gamma_init", 0.0, ValueError, "above 0"),
    (MultiheadConfig, "gamma_init", True, TypeError, "bool"),
    (MultiheadConfig, "gamma_init", INF, ValueError, "finite"),
    (MultiheadConfig, "num_kv_heads", 3, ValueError, "use one of 1, 2, 4, 8"),
    (MultiheadConfig, "num_kv_heads", 16, ValueError, "num_heads 8"),
    (MultiheadConfig, "num_kv_heads", 0, ValueError, "at least 1"),
    (MultiheadConfig, "num_kv_heads", True, TypeError, "bool"),
    (MultiheadConfig, "max_head_dim", 0, ValueError, "at least 1"),
    (MultiheadConfig, "max_head_dim", 4, ValueError, "at most max_head_dim 4, got 64 / 8 = 8"),
    (MultiheadConfig, "max_head_dim", None, TypeError, "NoneType"),
    (RingAttentionConfig, "block_size", 0, ValueError, "at least 1"),
    (RingAttentionConfig, "block_size", 1024.0, TypeError, "float"),
    (RingAttentionConfig, "ring_size", 0, ValueError, "at least 1"),
    (RingAttentionConfig, "ring_size", "4", TypeError, "str"),
    (RingAttentionConfig, "use_checkpointing", 0, TypeError, "int"),
    (RingAttentionConfig, "strategy", "rings", ValueError, "did you mean 'ring'"),
    (RingAttentionConfig, "layout", None, TypeError, "NoneType"),
    (SparseAttentionConfig, "pattern_type", "dilated", ValueError, "did you mean 'dilated_sparse'"),
    (SparseAttentionConfig, "pattern_type", None, TypeError, "NoneType"),
    (SparseAttentionConfig, "density", 0, ValueError, "above 0"),
    (SparseAttentionConfig, "density", 1.01, ValueError, "at most 1, got 1.01"),
    (SparseAttentionConfig, "density", NAN, ValueError, "finite"),
    (SparseAttentionConfig, "density", True, TypeError, "bool"),
    (SparseAttentionConfig, "block_size", -128, ValueError, "-128"),
    (SparseAttentionConfig, "block_size", 100, ValueError, "use 112 or 96"),
    (SparseAttentionConfig, "block_size", 128.0, TypeError, "128.0"),
    (SparseAttentionConfig, "enable_adaptive", None, TypeError, "NoneType"),
    (SparseAttentionConfig, "head_dim", 0, ValueError, "at least 1"),
    (SparseAttentionConfig, "seed", -1, ValueError, "at least 0"),
    (BlockSparseRingConfig, "pattern_type", "adaptive", ValueError, "not be 'adaptive' on a ring"),
    (BlockSparseRingConfig, "block_size", 100, ValueError, "use 112 or 96"),
    (BlockSparseRingConfig, "ring_size", 0, ValueError, "at least 1"),
    (BlockSparseRingConfig, "layout", "zig", ValueError, "did you mean 'zigzag'"),
    (BlockSparseRingConfig, "strategy", None, TypeError, "NoneType"),
    (DistributedConfig, "world_size", 0, ValueError, "at least 1"),
    (DistributedConfig, "world_size", 2.0, TypeError, "float"),
    (DistributedConfig, "rank", 0, ValueError, "give both"),
    (DistributedConfig, "rank", -1, ValueError, "at least 0"),
    (DistributedConfig, "rank", True, TypeError, "bool"),
    (DistributedConfig, "backend", "ncll", ValueError, "did you mean 'nccl'"),
    (DistributedConfig, "backend", None, TypeError, "NoneType"),
    (DistributedConfig, "sequence_parallel", 1, TypeError, "int"),
    (DistributedConfig, "model_parallel", 2, TypeError, "int"),
    (DistributedConfig, "pipeline_parallel", "no", TypeError, "str"),
    (DistributedConfig, "gradient_checkpointing", None, TypeError, "NoneType"),
    (DistributedConfig, "communication_optimization", 0.0, TypeError, "float"),
    (DistributedConfig, "bucket_size_mb", 0, ValueError, "at least 1"),
    (DistributedConfig, "bucket_size_mb", 25.5, TypeError, "float"),
    (MemoryPoolConfig, "max_pool_size", 0, ValueError, "at least 1"),
    (MemoryPoolConfig, "max_pool_size", 49, ValueError, "hot_cache_size must be at most max_pool_size 49, got 50"),
    (MemoryPoolConfig, "hot_cache_size", 101, ValueError, "max_pool_size 100, got 101"),
    (MemoryPoolConfig, "hot_cache_size", -1, ValueError, "at least 0"),
    (MemoryPoolConfig, "enable_adaptive_cleanup", 1, TypeError, "int"),
    (MemoryPoolConfig, "enable_pinned_memory", "cuda", TypeError, "str"),
    (MemoryPoolConfig, "cleanup_threshold", 0, ValueError, "at least 1"),
    (MemoryPoolConfig, "eviction_policy", "fifo", ValueError, "'lru', 'lfu', 'adaptive'"),
    (MemoryPoolConfig, "eviction_policy", 0, TypeError, "int"),
    (MemoryPoolConfig, "max_bytes", 0, ValueError, "max_bytes must be at least 1"),
    (MemoryPoolConfig, "max_bytes", 1e9, TypeError, "max_bytes must be an integer"),
]


def ident(value):
    return value.__name__ if isinstance(value, type) else None


@pytest.mark.parametrize(("cls", "field", "value", "error", "says"), BAD, ids=ident)
def test_bad_values_are_refused_by_name(cls, field, value, error, says):
    with pytest.raises(error, match=says) as caught:
        cls(**(GOOD[cls] | {field: value}))
    assert field in str(caught.value)


def x(b=2, n=8, h=4, d=16, **kwargs):
    return torch.zeros(b, n, h, d, **kwargs)


MASK = torch.zeros(2, 8, dtype=torch.bool)
BAD_QKV = [  # q, k, v, mask, error, message
    ([[1.0]], x(), x(), None, TypeError, "q must be a tensor .* got list"),
    (x(), None, x(), None, TypeError, "k must be a tensor .* got NoneType"),
    (x(), x(), np.zeros((2, 8, 4, 16)), None, TypeError, "v must be a tensor .* got ndarray"),
    (x(dtype=torch.int64), x(), x(), None, TypeError, "q must be float16.* got torch.int64"),
    (x(), x(dtype=torch.bool), x(), None, TypeError, "k must be float16.* got torch.bool"),
    (x(dtype=torch.complex64), x(), x(), None, TypeError, "q must be float16.* got torch.complex64"),
    (x()[0], x(), x(), None, ValueError, "q must have 4 dimensions .* got 3"),
    (x(), x()[None], x(), None, ValueError, "k must have 4 dimensions .* got 5"),
    (x(n=0), x(), x(), None, ValueError, "q must have no size 0"),
    (x(b=0), x(b=0), x(b=0), None, ValueError, r"q must have no size 0 .*\(0, 8, 4, 16\)"),
    (x(), x(n=0), x(n=0), None, ValueError, "k must have no size 0"),
    (x(), x(h=0), x(h=0), None, ValueError, "k must have no size 0"),
    (x(d=0), x(d=0), x(d=0), None, ValueError, "q must have no size 0"),
    (x(), x(dtype=torch.float64), x(), None, TypeError, "k must have q's dtype torch.float32, got torch.float64"),
    (x(), x(), x(dtype=torch.float16), None, TypeError, "v must have q's dtype"),
    (x(), x(device="meta"), x(), None, ValueError, "k must be on q's device cpu, got meta"),
    (x(), x(), x(device="meta"), None, ValueError, "v must be on q's device"),
    (x(), x(b=1), x(b=1), None, ValueError, "k must have q's batch and head_dim"),
    (x(), x(d=8), x(d=8), None, ValueError, "k must have q's batch and head_dim"),
    (x(), x(), x(d=8), None, ValueError, "v must have q's batch and head_dim"),
    (x(), x(), x(n=9), None, ValueError, "v must have k's shape"),
    (x(), x(h=2), x(h=4), None, ValueError, "v must have k's shape"),
    (x(), x(h=3), x(h=3), None, ValueError, "k must have a number of heads that divides q's 4, got 3"),
    (x(), x(h=8), x(h=8), None, ValueError, "k must have a number of heads that divides q's 4, got 8"),
    (x(n=9), x(), x(), None, ValueError, "q must not be longer than k, got 9 queries for 8 keys"),
    (x(), x(), x(), [[False] * 8] * 2, TypeError, "key_padding_mask must be a bool tensor or None, got list"),
    (x(), x(), x(), MASK.float(), TypeError, "key_padding_mask must be bool, True for padding, got torch.float32"),
    (x(), x(), x(), MASK.int(), TypeError, "key_padding_mask must be bool.* got torch.int32"),
    (x(), x(), x(), MASK[:, :7], ValueError, r"key_padding_mask must have shape .*\(2, 8\), got \(2, 7\)"),
    (x(), x(), x(), MASK.T, ValueError, "key_padding_mask must have shape"),
    (x(n=4), x(), x(), MASK[:, :4], ValueError, "key_padding_mask must have shape"),
    (x(), x(), x(), MASK[None], ValueError, "key_padding_mask must have shape"),
    (x(), x(), x(), MASK.to("meta"), ValueError, "key_padding_mask must be on k's device cpu, got meta"),
]


@pytest.mark.parametrize(("q", "k", "v", "mask", "error", "says"), BAD_QKV, ids=lambda v: v if type(v) is str else "")
def test_bad_tensors_are_refused_by_name(q, k, v, mask, error, says):
    with pytest.raises(error, match=says) as caught:
        check_qkv(q, k, v, mask)
    assert ";" in str(caught.value)  # and says what to do


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_good_tensors_pass(dtype):
    q, kv = x(n=3, dtype=dtype), x(h=1, dtype=dtype)  # grouped queries, fewer of them than keys
    for mask in (None, MASK):
        assert check_qkv(q, kv, kv, mask) is None
    assert check_qkv(q.transpose(1, 2).contiguous().transpose(1, 2), kv, kv) is None  # strides don't matter


BAD_CALLS = [
    (check_choice, ("backend", "Flash", BACKENDS), ValueError, "backend must be one of .*did you mean 'flash'"),
    (check_choice, ("backend", None, BACKENDS), TypeError, "backend .*NoneType"),
    (check_branches, ((4, 8), (1,)), ValueError, "segment_lengths must be as long as dilation_rates"),
    (check_dropout, ("p", 1.0), ValueError, "p must be .* below 1, got 1.0"),
    (check_dropout, ("p", np.float32(NAN)), ValueError, "p must be finite"),
    (check_scale, (0,), ValueError, "scale must be above 0, got 0"),
    (check_scale, (-0.125,), ValueError, "scale must be above 0"),
    (check_scale, (NAN,), ValueError, "scale must be finite"),
    (check_scale, ("auto",), TypeError, "scale must be a number"),
    (check_scale, (True,), TypeError, "scale must be a number"),
    (check_scale, (torch.tensor(0.5),), TypeError, "scale must be a number"),
    (check_heads, (2, 3, "groups"), ValueError, "num_heads .* got 2 for 3 branches; .*mixing='softmax'"),
    (check_length, (10, (4,), "error"), ValueError, "length 10 is not a multiple of segment length 4; .*ragged='mask'"),
    (check_length, (10, (4,), "error"), ValueError, "pad to 12 or cut to 8"),
    (check_length, (10, (2, 4, 6), "error"), ValueError, "segment length 4; .*pad to 12$"),
    (check_length, (3, (4,), "error"), ValueError, "pad to 4$"),
    (check_placement, ("q", x(), torch.device("cuda"), None), ValueError, "q must be on cuda .* got cpu"),
    (check_placement, ("q", x(), torch.device("cpu", 1), None), ValueError, "q must be on cpu:1"),
    (check_placement, ("q", x(), None, torch.float64), TypeError, "q must be torch.float64 .* got torch.float32"),
]


@pytest.mark.parametrize(("check", "args", "error", "says"), BAD_CALLS)
def test_bad_arguments_are_refused_by_name(check, args, error, says):
    with pytest.raises(error, match=says):
        check(*args)


def test_there_are_at_least_sixty_cases():
    assert len(BAD_ATTENTION) >= 50 and len(BAD) + len(BAD_QKV) + len(BAD_CALLS) >= 200


def test_good_values_pass():
    assert check_int("n", np.uint8(3)) == 3 and type(check_int("n", np.int64(3))) is int
    assert type(check_number("x", np.float16(0.5))) is float and type(check_dropout("p", 0)) is float
    assert check_scale(None) is None and check_scale(2) == 2.0
    assert check_flag("f", True) is True
    assert check_heads(3, 3, "groups") is check_heads(1, 3, "softmax") is None
    for mode, n in (("error", 24), ("mask", 25), ("zeros", 25)):
        assert check_length(n, (4, 6), mode) is None
    assert check_placement("q", x(), None, None) is check_placement("q", x(), torch.device("cpu"), None) is None


@pytest.mark.parametrize("lengths", [[4, 8], (4, 8), range(4, 9, 4), np.array([4, 8]), torch.tensor([4, 8])])
def test_sequences_become_tuples_of_ints(lengths):
    config = DilatedAttentionConfig(lengths, [np.int32(1), 2])
    assert config.segment_lengths == (4, 8) and config.dilation_rates == (1, 2) and config.num_branches == 2
    assert {type(i) for i in config.segment_lengths + config.dilation_rates} == {int}
    hash(config)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_dtypes_and_devices_go_by_name(dtype):
    name = str(dtype).removeprefix("torch.")
    assert check_dtype("dtype", name) is check_dtype("dtype", f"torch.{name}") is check_dtype("dtype", dtype) is dtype
    config = DilatedAttentionConfig(**BRANCHES, device="cuda:1", dtype=dtype)  # needs no such device
    assert config.to_dict()["dtype"] == name and config.to_dict()["device"] == "cuda:1"
    again = DilatedAttentionConfig.from_json(config.to_json())
    assert again == config and again.device == torch.device("cuda", 1) and again.dtype is dtype
    assert check_device("device", None) is check_dtype("dtype", None) is None
    torch.nn.Linear(2, 2, device=check_device("device", "meta"), dtype=config.dtype)  # handed on as they are


@pytest.mark.parametrize("cls", GOOD)
def test_configs_are_frozen(cls):
    config = cls(**GOOD[cls])
    for field in dataclasses.fields(cls):
        with pytest.raises(FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))
    with pytest.raises(FrozenInstanceError):
        config.unknown = 1
    with pytest.raises(TypeError, match="unknown"):
        cls(**GOOD[cls], unknown=1)


@pytest.mark.parametrize("cls", GOOD)
def test_every_field_takes_part_in_equality(cls):
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.5, tuple: lambda v: v[::-1]}
    special = {
        "embed_dim": 128, "num_heads": 4, "num_kv_heads": 2, "ring_size": 2, "world_size": 2, "device": "cpu",
        "dtype": "float16", "mixing": "softmax", "offsets": "interleaved", "ragged": "mask", "backend": "gloo",
        "pattern_type": "local_window", "eviction_policy": "lfu", "max_bytes": 2**20, "strategy": "ring",
        "layout": "zigzag", "block_size": 64, "head_dim": 64, "sequence_shards": 2, "tensor_shards": 2,
        "pipeline_stages": 2, "microbatches": 4, "data_engine": "fsdp", "pipeline_schedule": "gpipe",
    }  # fmt: skip
    needs = {"rank": {"world_size": 2}, "sequence_shards": {"sequence_parallel": True}}
    needs |= {"tensor_shards": {"model_parallel": True}, "pipeline_stages": {"pipeline_parallel": True}}
    needs["microbatches"] = needs["pipeline_stages"]
    needs["seed"] = {"pattern_type": "random"}
    config = cls(**GOOD[cls])
    for field in dataclasses.fields(cls):
        if issubclass(cls, SparseAttentionConfig) and field.name in ("mixing", "offsets", "enable_adaptive"):
            continue  # a pattern leaves no choice
        value = getattr(config, field.name)
        extra = needs.get(field.name, {})
        base = replace(config, **extra)
        new = 1 if field.name == "rank" else special.get(field.name) or other[type(value)](value)
        new = "contiguous" if (cls, field.name) == (DistributedConfig, "layout") else new
        changed = replace(base, **{field.name: new})
        assert changed != base and len({changed, base}) == 2 and replace(changed, **{field.name: value}) == base


def test_configs_of_different_classes_differ():
    assert RingAttentionConfig(**BRANCHES) != DilatedAttentionConfig(**BRANCHES) != SparseAttentionConfig(**BRANCHES)


@pytest.mark.parametrize("cls", GOOD)
def test_unknown_and_missing_fields(cls):
    good = cls(**GOOD[cls]).to_dict()
    for field in good:
        for misspelt in (field + "s_", field[1:], field.upper() + "!"):
            if misspelt not in good:
                with pytest.raises(ValueError, match=f"{cls.__name__} has no field '{misspelt}'; did you mean '"):
                    cls.from_dict(good | {misspelt: 1})
    for field in dataclasses.fields(cls):
        rest = {k: v for k, v in good.items() if k != field.name}
        if field.default is dataclasses.MISSING:
            with pytest.raises(ValueError, match=f"{cls.__name__} needs {field.name}"):
                cls.from_dict(rest)
        else:
            assert getattr(cls.from_dict(rest), field.name) == field.default
    for wrong in (None, [], "{}", 1, [("a", 1)]):
        with pytest.raises(TypeError, match="must be a dict of the fields"):
            cls.from_dict(wrong)
    with pytest.raises(ValueError, match="has no field 1"):
        cls.from_dict({1: 2})
    for wrong in ("", "{", "nope", '{"a": }'):
        with pytest.raises(ValueError, match=f"must be the JSON of a {cls.__name__}"):
            cls.from_json(wrong)
    for wrong in (None, 5, {}):
        with pytest.raises(TypeError, match=f"must be the JSON of a {cls.__name__}"):
            cls.from_json(wrong)
    for wrong in ("[]", "null", "3"):
        with pytest.raises(TypeError, match="must be a dict of the fields"):
            cls.from_json(wrong)


def test_json_that_was_meddled_with_is_checked():
    text = DilatedAttentionConfig(**BRANCHES).to_json()
    with pytest.raises(ValueError, match="dropout must be finite"):
        DilatedAttentionConfig.from_json(text.replace('"dropout": 0.0', '"dropout": NaN'))
    with pytest.raises(TypeError, match=r"segment_lengths\[0\]"):
        DilatedAttentionConfig.from_json(text.replace("4,", "true,"))


@pytest.mark.parametrize("number", [10**9, 10**18, 10**5000], ids=["1e9", "1e18", "1e5000"])
@pytest.mark.parametrize(
    ("cls", "field"),
    [(MultiheadConfig, "embed_dim"), (MultiheadConfig, "num_heads"), (MultiheadConfig, "num_kv_heads"),
     (LongNetConfig, "num_layers"), (LongNetConfig, "embed_dim"), (LongNetConfig, "num_heads"),
     (LongNetConfig, "ffn_dim"), (GigaPathConfig, "depth"), (GigaPathConfig, "embed_dim"),
     (SparseAttentionConfig, "block_size"), (SparseAttentionConfig, "head_dim")],
)  # fmt: skip
def test_absurd_sizes_are_refused_by_name(cls, field, number):
    with pytest.raises(ValueError, match=f"{field} must be at most"):
        cls(**(GOOD.get(cls, {}) | {field: number}))


def test_json_without_end_is_refused():
    for text in ("[" * 10**5, '{"segment_lengths": ' * 10**5, '{"segment_lengths": [' + "9" * 5000 + "]}"):
        with pytest.raises(ValueError, match="must be the JSON of a DilatedAttentionConfig"):
            DilatedAttentionConfig.from_json(text)
    with pytest.raises(ValueError, match="segment_lengths must have at most 1024 entries"):
        DilatedAttentionConfig([1] * 10**6, [1] * 10**6)


def test_the_nearest_field_is_named():
    for misspelt, meant in (
        ("segment_length", "segment_lengths"),
        ("dialtion_rates", "dilation_rates"),
        ("drop", "dropout"),
    ):
        with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
            DilatedAttentionConfig.from_dict(BRANCHES | {misspelt: 1})


@dataclass(frozen=True)
class ModelConfig(Config):
    attention: DilatedAttentionConfig
    heads: MultiheadConfig
    layers: int = 2


def test_configs_nest():
    model = ModelConfig(DilatedAttentionConfig(**BRANCHES, dtype="bfloat16"), MultiheadConfig(64, 8))
    assert ModelConfig.from_json(model.to_json()) == model and hash(model) == hash(copy.deepcopy(model))
    assert model.to_dict()["attention"]["dtype"] == "bfloat16" and isinstance(model.to_dict()["heads"], dict)
    broken = model.to_dict()
    broken["attention"]["mixin"] = "groups"
    with pytest.raises(ValueError, match="DilatedAttentionConfig has no field 'mixin'; did you mean 'mixing'"):
        ModelConfig.from_dict(broken)


def test_import_needs_torch_only():
    heavy = ["matplotlib", "einops", "safetensors", "jaxtyping", "fastcore", "nbdev", "IPython", "flash_attn"]
    code = f"import sys, dilated_attention_nb.config; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200, check=True)
    assert out.stdout.strip() == "[]"


# --- drawn by hypothesis

ints = st.integers(1, 2**40)
widths = st.integers(1, WIDEST)
flags = st.booleans()
branches = st.lists(st.tuples(ints, ints), min_size=1, max_size=6)
dtypes = st.sampled_from([None, *FLOAT_DTYPES])
devices = st.sampled_from([None, "cpu", "cuda", "cuda:3", "mps", "meta"])
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


@st.composite
def attention_configs(draw):
    pairs = draw(branches)
    fields = {
        "segment_lengths": draw(st.sampled_from([list, tuple, np.array]))([w for w, _ in pairs]),
        "dilation_rates": [r for _, r in pairs],
        "dropout": draw(st.floats(0, 1, exclude_max=True)),
        "mixing": draw(st.sampled_from(MIXINGS)),
        "offsets": draw(st.sampled_from(OFFSETS)),
        "ragged": draw(st.sampled_from(RAGGED)),
        "use_tf32": draw(flags),
        "device": draw(devices),
        "dtype": draw(dtypes),
    }
    ring = {
        "block_size": draw(ints),
        "ring_size": draw(st.none() | ints),
        "use_checkpointing": draw(flags),
        "strategy": draw(st.sampled_from(RING_STRATEGIES)),
        "layout": draw(st.sampled_from(RING_LAYOUTS)),
    }
    pattern = draw(st.sampled_from(SPARSE_PATTERNS))
    sparse = {
        "pattern_type": pattern,
        "sparsity_ratio": draw(st.floats(0, 1, exclude_min=True)),
        "block_size": 16 * draw(st.integers(1, 64)),
        "enable_adaptive": pattern == "adaptive",
        "head_dim": draw(widths if pattern == "adaptive" else st.none() | widths),
        "seed": draw(st.integers(0, 2**31)) if pattern == "random" else 0,
        "mixing": "groups", "offsets": "blocked", "ragged": draw(st.sampled_from(["error", "mask"])),
    }  # fmt: skip
    if pattern not in ("dilated_sparse", "hierarchical"):
        sparse["dilation_rates"] = (1,) * len(fields["dilation_rates"])
        if draw(flags):
            sparse["segment_lengths"] = sparse["dilation_rates"] = ()
    cls, extra = draw(st.sampled_from([*zip(ATTENTION, ({}, ring, sparse))]))
    return cls(**{**fields, **extra})


@st.composite
def multihead_configs(draw):
    kv, group, eighths = draw(st.integers(1, 16)), draw(st.integers(1, 8)), draw(st.integers(1, 64))
    heads, head_dim = kv * group, 8 * eighths
    return MultiheadConfig(
        heads * head_dim, heads, draw(flags), draw(flags), draw(positive), draw(positive),
        draw(st.sampled_from([None, kv])), max_head_dim=draw(st.integers(head_dim, 1024)),
    )  # fmt: skip


@st.composite
def other_configs(draw):
    world = draw(st.integers(1, 10**6))
    size = draw(st.integers(1, 10**6))
    rank = draw(st.none() | st.integers(0, world - 1))
    backend, policy = draw(st.sampled_from(DISTRIBUTED_BACKENDS)), draw(st.sampled_from(EVICTION_POLICIES))
    distributed = DistributedConfig(world, rank, backend, *(draw(flags) for _ in range(5)), draw(ints))
    pool = MemoryPoolConfig(
        size, draw(st.integers(0, size)), draw(flags), draw(flags), draw(ints), policy, draw(st.none() | ints)
    )
    return draw(st.sampled_from([distributed, pool]))


@given(attention_configs() | multihead_configs() | other_configs())
def test_good_configs_survive_everything(config):
    cls, text = type(config), config.to_json()
    assert json.loads(text, parse_constant=pytest.fail) == config.to_dict()  # strict JSON: no NaN, no Infinity
    copies = [
        cls.from_json(text),
        cls.from_dict(config.to_dict()),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        replace(config),
        eval(repr(config), {cls.__name__: cls, "torch": torch, "device": torch.device}),
    ]
    for other in copies:
        assert other == config and hash(other) == hash(config) and other.to_json() == text and type(other) is cls


junk = st.recursive(
    st.none() | flags | st.integers(-3, 3) | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
    | st.sampled_from([np.int64(2), np.float32("nan"), np.bool_(True), torch.ones(2), object(), "cpu:"]),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(ints, inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


@drawn(300)
@given(st.data())
def test_any_value_is_either_kept_or_refused_by_name(data):
    cls = data.draw(st.sampled_from(list(GOOD)))
    field = data.draw(st.sampled_from([f.name for f in dataclasses.fields(cls)]))
    value = data.draw(junk)
    try:
        config = cls(**(GOOD[cls] | {field: value}))
    except (TypeError, ValueError) as error:
        assert field in str(error) and ("; " in str(error)) and len(str(error)) < 400
    else:
        assert cls.from_json(config.to_json()) == config
        hash(config)


@given(st.integers(1, 3000), st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_valid_lengths_are_the_nearest(n, segments):
    below, above = valid_lengths(n, segments)
    fits = [m for m in range(n + math.prod(segments) + 1) if all(m % w == 0 for w in segments)]
    assert below == max(m for m in fits if m <= n) and above == min(m for m in fits if m >= n)
    if below == above == n:
        assert check_length(n, segments, "error") is None
    else:
        with pytest.raises(ValueError, match=f"sequence length {n} .* pad to {above}"):
            check_length(n, segments, "error")
        assert check_length(above, segments, "error") is None


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 300))
def test_head_rules(embed_dim, num_heads, max_head_dim):
    ok = embed_dim % (8 * num_heads) == 0 and embed_dim // num_heads <= max_head_dim
    try:
        config = MultiheadConfig(embed_dim, num_heads, max_head_dim=max_head_dim)
    except ValueError as error:
        assert not ok
        advice = str(error).split("; ")[1]
        name, numbers = advice.split(" could be ")
        for number in map(int, numbers.split(", ")):  # what the message advises is valid
            if name == "num_heads":
                MultiheadConfig(embed_dim, number, max_head_dim=max_head_dim)
            else:
                assert number % (8 * num_heads) == 0
    else:
        assert ok and config.head_dim * num_heads == embed_dim and config.kv_heads == num_heads


# --- under torch.compile


def test_checks_compile_whole_and_lengths_stay_symbolic():
    from torch._dynamo.exc import Unsupported
    from torch._dynamo.testing import CompileCounter

    def forward(q, k, v, mask):
        check_qkv(q, k, v, mask)
        check_placement("q", q, torch.device("cpu"), torch.float32)
        lengths, _ = check_branches([4, 8], (1, 2))
        check_length(k.shape[1], lengths, "error")
        check_choice("mixing", "groups", MIXINGS)
        check_heads(q.shape[2], 2, "groups")
        return (q + k * v) * (check_scale(0.5) + check_dropout("dropout", 0.0))

    counter = CompileCounter()
    compiled = torch.compile(forward, fullgraph=True, backend=counter)
    for n in (8, 16, 24, 40, 64, 128, 1024, 4096):
        q = torch.ones(2, n, 2, 8)
        assert torch.equal(compiled(q, q, q, torch.zeros(2, n, dtype=torch.bool)), q)
    assert counter.frame_count <= 2
    with pytest.raises(Unsupported, match="sequence length 10 is not a multiple of segment length 4; pass ragged"):
        compiled(q[:, :10], q[:, :10], q[:, :10], torch.zeros(2, 10, dtype=torch.bool))


@pytest.mark.parametrize("word", ["lr", "depth", "block_size", "pad_to", "zz"])
def test_hints_are_near(word):
    known = tuple(f.name for f in dataclasses.fields(DilatedAttentionConfig))
    for refuse in (
        lambda: DilatedAttentionConfig.from_dict(BRANCHES | {word: 1}),
        lambda: check_choice("name", word, known),
    ):
        with pytest.raises(ValueError) as error:
            refuse()
        assert "did you mean" not in str(error.value) and all(name in str(error.value) for name in known)


def configured():
    "One module of each kind that is made of a config."
    branches = dict(segment_lengths=(16, 32), dilation_rates=(1, 2))
    model = LongNet(longnet_tiny())
    yield from (model, model.decoder, model.decoder.layers[1], model.decoder.layers[1].ffn)
    extra = {"block_sparse": dict(block_size=16), "block_sparse_ring": dict(block_size=16)}
    yield from (create_dilated_attention(kind, **branches, **extra.get(kind, {})) for kind in KINDS if kind != "auto")
    yield create_multihead_dilated_attention(embed_dim=32, num_heads=4, **branches)
    yield GigaPathSlideEncoder(embed_dim=32, depth=1, num_heads=2, in_chans=8)


@pytest.mark.parametrize("module", configured(), ids=lambda module: type(module).__name__)
def test_names_of_a_config_cannot_be_set_on_its_module(module):
    configs = {name: value for name, value in vars(module).items() if isinstance(value, Config)}
    values = {name: getattr(config, name) for config in configs.values() for name in config.to_dict()}
    if "density" in values:
        values["sparsity_ratio"] = 0.5  # its old name
    assert configs and values
    for name, value in (values | configs).items():
        if name in vars(module) and name not in configs:
            continue  # an attribute that it reads itself: `drop_path` of a layer
        with pytest.raises(AttributeError, match=f"{name} must be"):
            setattr(module, name, value)
    module.eval().note = 1  # anything else can be
    assert not module.training and module.note == 1 and type(copy.deepcopy(module)) is type(module)
