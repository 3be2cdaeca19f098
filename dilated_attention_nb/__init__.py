"""Dilated attention for very long sequences: a library written as notebooks.

All public names stand here: `from dilated_attention_nb import dilated_attention`. A module is imported when one of its
names is first used, so that plots, training or testing cost nothing to those who only attend.
"""

# The names below are collected by scripts/root.py from the modules' __all__: run `make export` after a change.

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dilated_attention_nb import config as config
    from dilated_attention_nb.config import (
        BACKENDS as BACKENDS,
        BNHD as BNHD,
        C as C,
        Config as Config,
        DISTRIBUTED_BACKENDS as DISTRIBUTED_BACKENDS,
        DilatedAttentionConfig as DilatedAttentionConfig,
        DistributedConfig as DistributedConfig,
        EVICTION_POLICIES as EVICTION_POLICIES,
        FLOAT_DTYPES as FLOAT_DTYPES,
        MAX_FLOAT as MAX_FLOAT,
        MIXINGS as MIXINGS,
        MemoryPoolConfig as MemoryPoolConfig,
        MultiheadConfig as MultiheadConfig,
        OFFSETS as OFFSETS,
        RAGGED as RAGGED,
        RingAttentionConfig as RingAttentionConfig,
        SPARSE_PATTERNS as SPARSE_PATTERNS,
        SparseAttentionConfig as SparseAttentionConfig,
        check_alike as check_alike,
        check_branches as check_branches,
        check_choice as check_choice,
        check_device as check_device,
        check_dropout as check_dropout,
        check_dtype as check_dtype,
        check_flag as check_flag,
        check_floats as check_floats,
        check_head_dim as check_head_dim,
        check_heads as check_heads,
        check_int as check_int,
        check_ints as check_ints,
        check_kv_heads as check_kv_heads,
        check_length as check_length,
        check_number as check_number,
        check_padding as check_padding,
        check_placement as check_placement,
        check_positive as check_positive,
        check_qkv as check_qkv,
        check_scale as check_scale,
        complaint as complaint,
        heads_that_fit as heads_that_fit,
        nearest as nearest,
        plain as plain,
        shown as shown,
        valid_lengths as valid_lengths,
    )
    from dilated_attention_nb import testing as testing
    from dilated_attention_nb.testing import (
        assert_within_budget as assert_within_budget,
        attends as attends,
        check_against_oracle as check_against_oracle,
        error_budget as error_budget,
        head_branches as head_branches,
        make_qkv as make_qkv,
        oracle_attention as oracle_attention,
        oracle_counts as oracle_counts,
        plain_attention as plain_attention,
    )

_NAMES: dict[str, tuple[str, ...]] = {
    "config": (
        "BACKENDS",
        "BNHD",
        "C",
        "Config",
        "DISTRIBUTED_BACKENDS",
        "DilatedAttentionConfig",
        "DistributedConfig",
        "EVICTION_POLICIES",
        "FLOAT_DTYPES",
        "MAX_FLOAT",
        "MIXINGS",
        "MemoryPoolConfig",
        "MultiheadConfig",
        "OFFSETS",
        "RAGGED",
        "RingAttentionConfig",
        "SPARSE_PATTERNS",
        "SparseAttentionConfig",
        "check_alike",
        "check_branches",
        "check_choice",
        "check_device",
        "check_dropout",
        "check_dtype",
        "check_flag",
        "check_floats",
        "check_head_dim",
        "check_heads",
        "check_int",
        "check_ints",
        "check_kv_heads",
        "check_length",
        "check_number",
        "check_padding",
        "check_placement",
        "check_positive",
        "check_qkv",
        "check_scale",
        "complaint",
        "heads_that_fit",
        "nearest",
        "plain",
        "shown",
        "valid_lengths",
    ),
    "testing": (
        "assert_within_budget",
        "attends",
        "check_against_oracle",
        "error_budget",
        "head_branches",
        "make_qkv",
        "oracle_attention",
        "oracle_counts",
        "plain_attention",
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "__version__",
    "BACKENDS",
    "BNHD",
    "C",
    "Config",
    "DISTRIBUTED_BACKENDS",
    "DilatedAttentionConfig",
    "DistributedConfig",
    "EVICTION_POLICIES",
    "FLOAT_DTYPES",
    "MAX_FLOAT",
    "MIXINGS",
    "MemoryPoolConfig",
    "MultiheadConfig",
    "OFFSETS",
    "RAGGED",
    "RingAttentionConfig",
    "SPARSE_PATTERNS",
    "SparseAttentionConfig",
    "assert_within_budget",
    "attends",
    "check_against_oracle",
    "check_alike",
    "check_branches",
    "check_choice",
    "check_device",
    "check_dropout",
    "check_dtype",
    "check_flag",
    "check_floats",
    "check_head_dim",
    "check_heads",
    "check_int",
    "check_ints",
    "check_kv_heads",
    "check_length",
    "check_number",
    "check_padding",
    "check_placement",
    "check_positive",
    "check_qkv",
    "check_scale",
    "complaint",
    "error_budget",
    "head_branches",
    "heads_that_fit",
    "make_qkv",
    "nearest",
    "oracle_attention",
    "oracle_counts",
    "plain",
    "plain_attention",
    "shown",
    "valid_lengths",
]


def __getattr__(name: str) -> Any:
    "Find a public name, or a module, on first use (PEP 562)."
    if name in _NAMES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_NAMES, *__all__})
