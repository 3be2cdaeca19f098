"""The memory pool: a buffer is never in two hands, the bounds hold, nothing leaks, and every option does something."""

import copy
import gc
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import drawn
from hypothesis import given

from dilated_attention_nb import block_patterns, memory_pool
from dilated_attention_nb.block_patterns import PatternCache, block_pattern
from dilated_attention_nb.config import memory_limit, memory_pressure
from dilated_attention_nb.memory_pool import EVICTION_POLICIES, Kind, MemoryPoolConfig, UnifiedMemoryPool

CPU = torch.device("cpu")
F32, U8 = torch.float32, torch.uint8


def make(**options):
    options.setdefault("hot_cache_size", min(50, options.get("max_pool_size", 100)))
    return UnifiedMemoryPool(MemoryPoolConfig(**options), "cpu")


def cycle(pool, *sizes, key=None):
    "Ask for each size and return it."
    for size in sizes:
        pool.return_buffer(pool.get_buffer((size,), U8, key))


def kept(pool):
    "The sizes that the pool keeps."
    return sorted(block.kind.nbytes for block in pool._kept)


# --- lending


def test_a_returned_buffer_is_lent_again():
    pool = make()
    first = pool.get_buffer((2, 3), F32)
    assert first.shape == (2, 3) and first.dtype == F32 and first.is_contiguous() and first.grad_fn is None
    address = first.data_ptr()
    assert pool.return_buffer(first) is None and first.shape == (0,)
    again = pool.get_buffer([3, 2], F32, None, False)
    assert again.data_ptr() == address and again is not first
    stats = pool.get_stats()
    assert stats["hits"] == stats["misses"] == 1 and stats["hit_rate"] == 0.5
    assert (stats["bytes_lent"], stats["bytes_held"], stats["peak_bytes"]) == (24, 0, 24)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (5,), (2, 3, 4), torch.Size([2, 2])])
def test_any_shape_and_dtype(shape, dtype):
    pool = make()
    for _ in range(2):
        lent = pool.get_buffer(shape, dtype)
        assert lent.shape == torch.Size(shape) and lent.dtype == dtype
        lent.fill_(1)
        assert (lent == 1).all()
        pool.return_buffer(lent)
    assert pool.get_stats()["hits"] == 1


def test_keys_keep_buffers_apart():
    pool = make()
    cycle(pool, 8, key="keys")
    cycle(pool, 8, key="values")
    cycle(pool, 8)
    assert pool.get_stats()["pool_keys"] == 3 and pool.get_stats()["hits"] == 0
    cycle(pool, 8, key="keys")
    assert pool.get_stats()["hits"] == 1
    cycle(pool, 8, key=("keys", 3))  # anything that can be a key of a dictionary
    assert pool.get_stats()["pool_keys"] == 4


def test_buffers_lent_together_are_different_memory():
    pool = make()
    for _ in range(3):
        lent = [pool.get_buffer((8,), U8) for _ in range(20)]
        assert len({x.data_ptr() for x in lent}) == 20
        for x in lent:
            pool.return_buffer(x)
        del x, lent
    assert pool.get_stats()["misses"] == 20


def test_the_context_returns_after_an_error_too():
    pool = make()
    with pytest.raises(KeyError), pool.buffer((8,), U8, key="k") as lent:
        raise KeyError
    assert lent.numel() == 0 and pool.get_stats()["bytes_lent"] == 0 and pool.get_stats()["bytes_held"] == 8


def test_default_config_and_bytes():
    pool = UnifiedMemoryPool()
    assert pool.config == MemoryPoolConfig() and pool.device == CPU
    assert pool.max_bytes == memory_limit(CPU) // 8
    assert make(max_bytes=10).max_bytes == 10


# --- refusals

GET = [
    ((8, U8), TypeError, "shape must be a list or tuple"),
    (("8", U8), TypeError, r"shape\[0\] must be an integer"),
    (((True,), U8), TypeError, r"shape\[0\] must be an integer"),
    (((2, -1), U8), ValueError, r"shape\[1\] must be at least 0"),
    (((2.0,), U8), TypeError, r"shape\[0\]"),
    (((2,), "uint8"), TypeError, "dtype must be a torch.dtype"),
    (((2,), None), TypeError, "dtype"),
    (((2,), U8, [1]), TypeError, "unhashable"),
    (((2,), U8, None, 1), TypeError, "pin_memory must be True or False"),
]


@pytest.mark.parametrize(("args", "error", "says"), GET)
def test_bad_requests(args, error, says):
    pool = make()
    with pytest.raises(error, match=says):
        pool.get_buffer(*args)
    assert pool.get_stats() == make().get_stats()


def steal(lent):
    lent.set_(torch.ones(2, 3).untyped_storage(), 0, (2, 3))


CHANGES = {
    "shrunk": lambda t: t.resize_(1),
    "grown": lambda t: t.resize_(100),
    "grown and back": lambda t: t.resize_(100).resize_(2, 3),
    "transposed": lambda t: t.t_(),
    "unsqueezed": lambda t: t.unsqueeze_(0),
    "other memory": steal,
    "emptied": lambda t: t.set_(),
}


@pytest.mark.parametrize("returned", [True, False], ids=["returned", "dropped"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_buffer_comes_back_or_is_refused(change, returned):
    "Its memory is kept if it is what it was; a tensor with other memory is none of the pool's."
    pool = make()
    lent, other = pool.get_buffer((2, 3), F32), pool.get_buffer((2, 3), F32)
    CHANGES[change](lent)
    if change in ("other memory", "emptied"):
        with pytest.raises(ValueError, match="this pool lent, got another"):
            pool.return_buffer(lent)
        assert pool.get_stats()["buffers_lent"] == 2
    elif returned:
        pool.return_buffer(lent)
        assert lent.numel() == 0 and pool.get_stats()["buffers_lent"] == 1
    pool.return_buffer(other)
    del lent
    stats = pool.get_stats()
    assert stats["bytes_lent"] == stats["buffers_lent"] == 0
    assert kept(pool) == [24] * (1 if "grown" in change else 2)  # memory of another size is no use
    assert all(block.memory.numel() == 24 for block in pool._kept)


def test_strangers_views_and_second_returns_are_refused():
    pool, x = make(), torch.ones(4, requires_grad=True)
    lent, gone = pool.get_buffer((4,), F32), pool.get_buffer((4,), F32)
    waiting = pool.get_buffer((4,), F32)
    y = x * waiting  # keeps it from being emptied
    pool.return_buffer(gone)
    pool.return_buffer(waiting)
    before = pool.get_stats()
    stranger = make().get_buffer((4,), F32)
    for wrong, says in (
        (gone, "one that was returned"),
        (waiting, "another one"),
        (stranger, "another one"),
        (torch.ones(4), "another one"),
        (torch.empty(0), "another one"),
        (lent[:], "view or an alias"),
        (lent[1:], "view or an alias"),
        (lent.view(2, 2), "view or an alias"),
        (lent.detach(), "view or an alias"),
        (lent.data, "view or an alias"),
        (torch.nn.Parameter(lent), "view or an alias"),
    ):
        with pytest.raises(ValueError, match=says):
            pool.return_buffer(wrong)
    for wrong in (None, 1, [lent], lent.untyped_storage(), np.ones(4)):
        with pytest.raises(TypeError, match="buffer must be a tensor"):
            pool.return_buffer(wrong)
    assert pool.get_stats() == before
    del wrong
    pool.return_buffer(lent)
    y.sum().backward()


def test_of_two_threads_that_return_a_buffer_one_is_refused():
    pool = make()
    for _ in range(50):
        lent, start, errors = pool.get_buffer((8,), U8), threading.Barrier(2), []

        def give_back(lent=lent, start=start, errors=errors):
            start.wait()
            try:
                pool.return_buffer(lent)
            except ValueError as error:
                errors.append(error)

        run([give_back] * 2)
        assert len(errors) == 1 and pool.get_stats()["buffers_lent"] == 0


def run(functions):
    "Each in a thread of its own; errors of any are raised."
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=250)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


# --- hands


class Saves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(t)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def leaf(n=4):
    return torch.ones(n, requires_grad=True)


HOLDERS = {
    "product": lambda t: leaf() * t,
    "product of views": lambda t: leaf(2) * t[1:3],
    "result saved in place": lambda t: t.copy_(leaf()).exp_(),
    "matrix product": lambda t: leaf().view(2, 2) @ t.view(2, 2),
    "own function": lambda t: Saves.apply(leaf(), t),
    "leaf itself": lambda t: (t.requires_grad_() * 2).sum(),
    "view": lambda t: t[2:],
    "view of a view": lambda t: t.view(2, 2)[1].t(),
    "detached": lambda t: t.detach(),
    "data": lambda t: t.data,
    "expanded": lambda t: t.expand(3, 4),
    "another dtype": lambda t: t.view(torch.int32),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "numpy": lambda t: t.numpy(),
    "numpy view": lambda t: t.numpy()[1:],
    "memoryview": lambda t: memoryview(t.numpy()),
    "numpy through DLPack": lambda t: np.from_dlpack(t),
    "DLPack": lambda t: torch.utils.dlpack.to_dlpack(t),
    "torch through numpy": lambda t: torch.from_numpy(t.numpy()),
    "storage": lambda t: t.untyped_storage(),
    "module buffer, detached": lambda t: torch.nn.BatchNorm1d(4).register_buffer("kept", t.detach()) or t.view(4),
}


@pytest.mark.parametrize("forget", [False, True], ids=["name kept", "name dropped"])
@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_that_somebody_holds_is_not_lent(holder, forget):
    pool = make()
    lent = pool.get_buffer((4,), F32).fill_(3)
    address, held = lent.data_ptr(), HOLDERS[holder](lent)
    pool.return_buffer(lent)
    if forget or held is lent:  # a tensor with a history may be in it itself
        del lent
    others = [pool.get_buffer((4,), F32).fill_(99) for _ in range(3)]
    assert address not in [x.data_ptr() for x in others]
    del held
    gc.collect()
    found = pool.get_buffer((4,), F32)
    assert found.data_ptr() == address
    assert "lent" not in locals() or lent.shape == (0,)


def test_gradients_survive_returning_before_the_backward_pass():
    pool, x = make(), leaf()
    for step in range(5):  # the second step of a predecessor's pool failed here
        lent = pool.get_buffer((4,), F32).fill_(step)
        y = (x * lent).sum()
        pool.return_buffer(lent)
        noise = [pool.get_buffer((4,), F32).fill_(99) for _ in range(3)]
        x.grad = None
        y.backward()
        assert x.grad.tolist() == [step] * 4
        for buffer in noise:
            pool.return_buffer(buffer)
        del y, noise, buffer
    assert pool.get_stats()["misses"] <= 5


def test_a_graph_in_another_thread():
    pool, x = make(), leaf()
    lent = pool.get_buffer((4,), F32).fill_(3)
    y = (x * lent).sum()
    pool.return_buffer(lent)
    del lent
    done = threading.Event()

    def overwrite():
        while not done.is_set():
            with pool.buffer((4,), F32) as other:
                other.fill_(99)

    def backward():
        try:
            for _ in range(50):
                x.grad = None
                y.backward(retain_graph=True)
                assert x.grad.tolist() == [3] * 4
        finally:
            done.set()

    run([overwrite, overwrite, backward])


def test_every_loan_has_a_fresh_history():
    pool = make()
    with torch.inference_mode():
        lent = pool.get_buffer((4,), F32)
        assert lent.is_inference()
    pool.return_buffer(lent)
    lent = pool.get_buffer((4,), F32)
    assert not lent.is_inference() and not lent.requires_grad
    lent.copy_(leaf())
    assert lent.grad_fn is not None
    pool.return_buffer(lent)
    lent = pool.get_buffer((4,), F32)
    assert lent.grad_fn is None and lent._base is None and lent._version <= 1
    lent.requires_grad_().sum().backward()
    pool.return_buffer(lent)
    lent = pool.get_buffer((4,), F32)
    assert lent.grad is None and not lent.requires_grad
    with torch.inference_mode():
        pool.return_buffer(lent)
    assert pool.get_stats()["misses"] == 1


def test_shared_memory_is_not_kept():
    pool = make()
    lent = pool.get_buffer((4,), F32).share_memory_()
    pool.return_buffer(lent)
    assert kept(pool) == [] and pool.get_stats()["bytes_lent"] == 0


# --- dropped


def test_dropped_buffers_are_counted_and_come_back():
    pool = make()
    lent = pool.get_buffer((4,), F32)
    address = lent.data_ptr()
    del lent
    stats = pool.get_stats()
    assert stats["dropped"] == 1 and stats["bytes_lent"] == stats["buffers_lent"] == 0
    assert pool.get_buffer((4,), F32).data_ptr() == address
    ring = [pool.get_buffer((4,), F32)]
    ring.append(ring)
    before = pool.get_stats()["dropped"]
    del ring
    gc.collect()
    assert pool.get_stats()["dropped"] == before + 1


def test_a_dropped_buffer_with_a_view_waits():
    pool = make()
    tail = pool.get_buffer((4,), U8).fill_(7)[2:]
    other = pool.get_buffer((4,), U8).fill_(9)
    assert tail.tolist() == [7, 7] and pool.get_stats()["buffers_lent"] == 2  # a view keeps its base
    alias = other.detach()
    del other, tail
    assert pool.get_stats()["dropped"] == 2
    assert all(pool.get_buffer((4,), U8).data_ptr() != alias.data_ptr() for _ in range(3)) and alias.tolist() == [9] * 4


@pytest.mark.parametrize("let_go", [UnifiedMemoryPool.clear, lambda pool: pool.trim(0)], ids=["clear", "trim"])
def test_nothing_is_kept_after_clear_not_even_buffers_without_a_byte(let_go):
    pool = make()
    cycle(pool, 0, 8)
    cycle(pool, 0, key="named")
    lent = pool.get_buffer((0, 3), F32)
    assert pool.get_stats()["total_buffers"] == 2
    let_go(pool)
    stats = pool.get_stats()
    assert stats["total_buffers"] == stats["pool_keys"] == stats["bytes_held"] == 0
    assert stats["buffers_lent"] == 1 and stats["evictions"] == 2
    pool.return_buffer(lent)
    assert pool.get_stats()["total_buffers"] == 1
    pool.trim(1)
    assert pool.get_stats()["total_buffers"] == 1  # it takes no memory
    assert pool.trim(0) == 0 and pool.get_stats()["total_buffers"] == 0


def test_returned_buffers_that_die_later_are_not_counted_as_dropped():
    pool, x = make(), leaf()
    lent = pool.get_buffer((4,), F32)
    y = x * lent
    pool.return_buffer(lent)
    del lent, y
    assert pool.get_stats()["dropped"] == 0
    cycle(pool, *range(1, 200))
    assert pool.get_stats()["dropped"] == 0


def test_a_pool_may_die_before_its_buffers():
    pool = make()
    lent, watch = pool.get_buffer((4,), F32).fill_(1), weakref.ref(pool)
    del pool
    gc.collect()
    assert watch() is None and lent.tolist() == [1] * 4
    del lent


def test_memory_goes_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        watches = []
        for use in ("parked", "lent", "dropped", "kept"):
            pool = make()
            lent = pool.get_buffer((4,), F32)
            watches.append(weakref.ref(next(iter(pool._lent.values())).memory))
            held = [lent.detach()]
            if use in ("parked", "kept"):
                pool.return_buffer(lent)
            if use == "parked":
                pool.clear()
            if use == "dropped":
                del lent
                pool.clear()
            held.clear()
            lent = pool = None
        assert [watch() for watch in watches] == [None] * 4
    finally:
        gc.enable()


def test_a_finaliser_that_returns_is_refused_rather_than_stuck():
    pool = make()
    lent = pool.get_buffer((4,), F32)
    with pool._lock, pytest.raises(RuntimeError, match="finaliser"):
        pool.return_buffer(lent)
    pool.return_buffer(lent)


# --- locks


def test_looking_and_taking_are_one_step(monkeypatch):
    pool, real = make(), memory_pool.Block.free

    def slow(block):
        free = real(block)
        time.sleep(0.01)  # lets other threads look at what this one is about to take
        return free

    cycle(pool, 8)
    monkeypatch.setattr(memory_pool.Block, "free", slow)
    for _ in range(5):
        start, lent = threading.Barrier(4), []

        def get(start=start, lent=lent):
            start.wait()
            lent.append(pool.get_buffer((8,), U8))

        run([get] * 4)
        assert len({x.data_ptr() for x in lent}) == 4
        while lent:
            pool.return_buffer(lent.pop())


# --- bounds


def test_bounds_by_number_and_bytes():
    pool = make(max_pool_size=3, max_bytes=100)
    cycle(pool, 1, 2, 3, 4)
    assert kept(pool) == [2, 3, 4] and pool.get_stats()["evictions"] == 1
    cycle(pool, 95)
    assert kept(pool) == [4, 95]  # 3 + 4 + 95 are too many bytes
    cycle(pool, 101)  # more than may be kept: nothing else is let go for it when it comes back
    assert 101 not in kept(pool)
    lent = pool.get_buffer((60,), U8)
    assert pool.get_stats()["bytes_held"] <= 40
    pool.return_buffer(lent)


def test_a_large_buffer_does_not_flush_the_pool_for_nothing():
    pool = make(max_bytes=100)
    big = pool.get_buffer((200,), U8)
    small = pool.get_buffer((10,), U8)
    pool.return_buffer(small)
    assert kept(pool) == []  # nothing is kept while callers hold more than the bound
    pool.return_buffer(big)
    assert kept(pool) == []
    cycle(pool, 10, 20)
    assert kept(pool) == [10, 20]


def test_trim_and_clear():
    pool = make()
    lent = pool.get_buffer((7,), U8)
    cycle(pool, 10, 20, 30)
    assert pool.trim(60) == 0 and pool.trim(55) == 10 and kept(pool) == [20, 30]
    with pytest.raises(ValueError, match="target_bytes must be at least 0"):
        pool.trim(-1)
    with pytest.raises(TypeError, match="target_bytes"):
        pool.trim(1.5)
    pool.clear()
    assert kept(pool) == [] and pool.get_stats()["bytes_lent"] == 7 and pool.get_stats()["evictions"] == 3
    pool.return_buffer(lent)
    assert kept(pool) == [7]


def test_the_books_of_sizes_are_bounded():
    pool = make(max_pool_size=4, eviction_policy="adaptive")
    cycle(pool, *range(1, 5000))
    assert len(pool._asked) <= 2 * pool.config.cleanup_threshold and len(pool._kept) <= 4 and not pool._lent


@pytest.mark.parametrize(("pressure", "left"), [(0.79, 100), (0.81, 0)])
def test_clean_up_under_pressure(monkeypatch, pressure, left):
    for adaptive in (True, False):
        pool, asked = make(enable_adaptive_cleanup=adaptive, cleanup_threshold=12), []
        monkeypatch.setattr(memory_pool, "memory_pressure", lambda *args, asked=asked: asked.append(args) or pressure)
        lent = [pool.get_buffer((10,), U8) for _ in range(10)]
        for buffer in lent:
            pool.return_buffer(buffer)
        pool.get_buffer((0,), U8)
        assert not asked and pool.get_stats()["bytes_held"] == 100
        pool.get_buffer((0,), U8)  # the twelfth request
        assert asked == [(CPU,)] * adaptive and pool.get_stats()["bytes_held"] == (left if adaptive else 100)


def test_memory_that_cannot_be_had_leaves_the_pool_in_order(monkeypatch):
    pool = make()
    cycle(pool, 10, 20)
    monkeypatch.setattr(memory_pool, "Block", lambda *_: (_ for _ in ()).throw(RuntimeError("none at all")))
    with pytest.raises(RuntimeError, match="none at all"):
        pool.get_buffer((5000,), U8)
    stats = pool.get_stats()
    assert stats["bytes_lent"] == stats["buffers_lent"] == 0 and kept(pool) == [10, 20]


def test_an_impossible_size_leaves_the_pool_in_order():
    pool = make()
    with pytest.raises(RuntimeError):
        pool.get_buffer((2**47,), torch.float64)
    cycle(pool, 8)
    assert pool.get_stats()["bytes_lent"] == 0 and kept(pool) == [8]


# --- which one goes


def test_least_recently_and_least_frequently_used():
    trace = [1, 1, 1, 2, 3, 4]  # room for three: 1 is the oldest, 2 the least popular of the old
    pools = {policy: make(max_pool_size=3, hot_cache_size=0, eviction_policy=policy) for policy in EVICTION_POLICIES}
    for pool in pools.values():
        cycle(pool, *trace)
    assert kept(pools["lru"]) == [2, 3, 4] and kept(pools["lfu"]) == [1, 3, 4]


def test_adaptive_goes_by_requests_and_time():
    "What is asked for twice as often may lie twice as long."
    pool = make(max_pool_size=2, hot_cache_size=0, eviction_policy="adaptive")
    cycle(pool, 1, 1, 1, 1, 2, 3)  # 4 requests, two ago; 1 request, one ago
    assert kept(pool) == [1, 3]
    cycle(pool, *range(10, 15))
    assert kept(pool) == [1, 14]
    cycle(pool, 15)
    assert kept(pool) == [14, 15]  # 4 requests, eight ago, are less than 1, one ago


def hit_rate(trace, **options):
    pool = make(max_pool_size=8, enable_adaptive_cleanup=False, **options)
    cycle(pool, *trace)
    return pool.get_stats()["hit_rate"]


def traces(seed, steps):
    rng = random.Random(seed)
    moving = [1 + i // 25 + rng.randrange(8) for i in range(steps)]
    scanning, once = [], 1000
    while len(scanning) < steps:
        scanning += [1 + rng.randrange(7) for _ in range(3)] + list(range(once, once + 8))
        once += 8
    return moving, scanning[:steps]


@pytest.mark.parametrize("seed", range(5))
def test_each_policy_on_the_trace_that_it_is_for(seed):
    moving, scanning = traces(seed, 300)
    rates = [
        {policy: hit_rate(trace, hot_cache_size=0, eviction_policy=policy) for policy in EVICTION_POLICIES}
        for trace in (moving, scanning, moving + scanning + moving + scanning)
    ]
    assert rates[0]["lru"] > rates[0]["lfu"] + 0.1 and rates[0]["adaptive"] > rates[0]["lfu"] + 0.08
    assert rates[1]["lfu"] > rates[1]["lru"] + 0.1 and rates[1]["adaptive"] > rates[1]["lru"] + 0.05
    assert rates[2]["adaptive"] > max(rates[2]["lru"], rates[2]["lfu"])


def test_the_hot_cache_protects_what_is_asked_for_often():
    _, scanning = traces(0, 300)
    rates = [hit_rate(scanning, hot_cache_size=size) for size in (0, 3, 7)]
    assert rates[0] < rates[1] < rates[2]


def test_the_hot_cache_is_what_is_asked_for_most():
    pool = make(max_pool_size=4, hot_cache_size=2)
    cycle(pool, 1, 1, 1, 2, 3, 3)
    cycle(pool, 10, 11, 12, 13, 14)
    assert {1, 3} <= set(kept(pool)) and len(kept(pool)) == 4 and 2 not in kept(pool)
    cycle(pool, 14, 14, 14)  # now it is one of the two
    cycle(pool, 20, 21, 22)
    assert {1, 14} <= set(kept(pool)) and 3 not in kept(pool)
    assert pool.trim(0) and kept(pool) == []  # protected, not sacred


def test_old_requests_count_less():
    slow, fast = (
        make(max_pool_size=2, hot_cache_size=0, eviction_policy="lfu", cleanup_threshold=n) for n in (10**6, 4)
    )
    for pool in (slow, fast):
        cycle(pool, *[1] * 20, *[2, 2, 2, 3, 3, 3] * 2)
    assert kept(slow) == [1, 3] and kept(fast) != [1, 3]


# --- any order of things


@drawn(150)
@given(st.data())
def test_books_and_bounds_in_any_order(data):
    size, most = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 120))
    pool = UnifiedMemoryPool(
        MemoryPoolConfig(
            size,
            data.draw(st.integers(0, size)),
            data.draw(st.booleans()),
            cleanup_threshold=data.draw(st.integers(1, 9)),
            eviction_policy=data.draw(st.sampled_from(EVICTION_POLICIES)),
            max_bytes=most,
        )
    )
    lent, held = {}, []  # buffers with their tokens; views of returned ones with theirs
    requests = dropped = 0
    for token in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(["get", "get", "return", "view", "drop", "forget", "trim"]))
        if what == "get":
            requests += 1
            buffer = pool.get_buffer((data.draw(st.integers(0, 40)),), U8)
            lent[token] = buffer.fill_(token)
        elif what in ("return", "view", "drop") and lent:
            number = data.draw(st.sampled_from(sorted(lent)))
            buffer = lent.pop(number)
            if what == "view":
                held.append((buffer.detach(), number))
            if what == "drop":
                dropped += 1
            else:
                pool.return_buffer(buffer)
        elif what == "forget" and held:
            held.pop()
        elif what == "trim":
            target = data.draw(st.integers(0, 100))
            pool.trim(target)
            assert pool.get_stats()["bytes_held"] <= target
        buffer = None
        assert all((x == number).all() for number, x in lent.items()) and all((x == number).all() for x, number in held)
        stats = pool.get_stats()
        assert stats["dropped"] == dropped and stats["hits"] + stats["misses"] == requests
        assert stats["bytes_lent"] == sum(x.numel() for x in lent.values()) and stats["buffers_lent"] == len(lent)
        assert stats["total_buffers"] <= size and stats["bytes_held"] == sum(kept(pool))
        assert stats["bytes_held"] + stats["bytes_lent"] <= most or stats["bytes_held"] == 0
        assert stats["peak_bytes"] >= stats["bytes_held"] + stats["bytes_lent"]
        assert stats["total_buffers"] == stats["misses"] - stats["evictions"] - len(lent)


# --- many threads


def stress(threads, operations):
    "Every buffer is signed by its holder, and every signature is read back before the buffer leaves the hand."
    sizes = [2**k for k in range(4, 13)]
    pool = make(max_pool_size=40, hot_cache_size=10, max_bytes=2**18, eviction_policy="adaptive", cleanup_threshold=50)

    def work(number):
        rng, mine, views = random.Random(number), [], []
        for step in range(operations):
            token = number * operations + step
            buffer = pool.get_buffer((rng.choice(sizes) // 8,), torch.int64).fill_(token)
            mine.append((buffer, token))
            del buffer
            if rng.random() < 0.1:
                time.sleep(0)  # let others in
            while len(mine) > rng.randrange(4):
                buffer, token = mine.pop(rng.randrange(len(mine)))
                assert int(buffer[0]) == token == int(buffer[-1])
                assert rng.random() < 0.9 or bool((buffer == token).all())
                chance = rng.random()
                if chance < 0.05:
                    views.append((buffer.detach(), token))  # kept beyond the return
                if chance > 0.02 or views:
                    pool.return_buffer(buffer)
                del buffer  # the others are dropped
            while len(views) > 3:
                view, token = views.pop(0)
                assert bool((view == token).all())
                del view
            if step % 500 == 250:
                pool.trim(rng.randrange(2**17))

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        run([lambda number=number: work(number) for number in range(threads)])
    finally:
        sys.setswitchinterval(switch)
    gc.collect()
    stats = pool.get_stats()
    assert stats["bytes_lent"] == stats["buffers_lent"] == 0
    assert stats["hits"] + stats["misses"] == stats["requests"] == threads * operations
    assert stats["total_buffers"] <= 40 and stats["bytes_held"] == sum(kept(pool)) <= 2**18
    assert stats["total_buffers"] == stats["misses"] - stats["evictions"]
    assert stats["dropped"] > 0 and stats["hits"] > 0 and stats["evictions"] > 0


def test_threads_never_share_a_buffer():
    "As many threads as the long one below, fewer operations."
    stress(32, 125)


@pytest.mark.slow
def test_32_threads_with_10_000_operations_never_share_a_buffer():
    stress(32, 10_000)


# --- processes that are forked


def in_a_fork(child):
    "Its exit status: 0 if `child()` returned. It is ended after minutes, which even a busy machine doesn't need."
    pid = os.fork()
    if not pid:
        try:
            child()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    for _ in range(12_000):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"


@contextmanager
def busy(work, threads=3):
    "While threads repeat `work()`."
    done = threading.Event()

    def repeat():
        while not done.is_set():
            work()

    workers = [threading.Thread(target=repeat) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        done.set()
        for worker in workers:
            worker.join()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
ignores_fork = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@needs_fork
@ignores_fork
def test_a_process_forked_while_threads_use_the_pool_works():
    pool, mine = make(max_pool_size=4, cleanup_threshold=3), []
    mine.append(pool.get_buffer((5,), U8).fill_(5))
    parents = pool.get_buffer((6,), U8).fill_(6)

    def child():
        assert pool.get_stats()["bytes_held"] == 0 and pool.get_stats()["buffers_lent"] >= 2
        with pool.buffer((6,), U8) as other:
            assert other.fill_(1).data_ptr() != parents.data_ptr()
        pool.return_buffer(mine[0])  # the fork holds it as well
        cycle(pool, 5, 6, 5)
        stats = pool.get_stats()
        assert stats["hits"] >= 2
        assert (parents == 6).all()
        pool.clear()
        assert pool.get_stats()["total_buffers"] == 0

    with busy(lambda: cycle(pool, 0, 3, 4, 100)):
        assert [in_a_fork(child) for _ in range(10)] == [0] * 10
    pool.return_buffer(mine[0])
    pool.return_buffer(parents)
    stats = pool.get_stats()
    assert stats["bytes_lent"] == stats["buffers_lent"] == 0  # nothing of it happened here
    assert stats["total_buffers"] == stats["misses"] - stats["evictions"]


@needs_fork
@ignores_fork
def test_a_process_forked_while_the_pool_is_locked_works():
    "By the thread that forks, and by another: no luck with threads is needed."
    pool, locked, done = make(), threading.Event(), threading.Event()
    cycle(pool, 8)

    def hold():
        with pool._lock:
            locked.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    locked.wait()
    assert in_a_fork(lambda: cycle(pool, 8, 8)) == 0
    done.set()
    holder.join()
    with pool._lock:
        assert in_a_fork(lambda: cycle(pool, 8, 8)) == 0
    assert kept(pool) == [8]


@needs_fork
@ignores_fork
def test_patterns_can_be_made_in_a_forked_process(monkeypatch):
    "While another thread makes the same one, and while the cache is locked."
    cache, started, go_on = PatternCache(), threading.Event(), threading.Event()

    def slow(*args, **options):
        started.set()
        go_on.wait()
        return block_pattern(*args, **options)

    def child():
        monkeypatch.undo()
        assert cache.get("strided", 512).rows == 4

    monkeypatch.setattr(block_patterns, "block_pattern", slow)
    maker = threading.Thread(target=lambda: cache.get("strided", 512))
    maker.start()
    started.wait()
    assert in_a_fork(child) == 0
    with cache._lock:
        assert in_a_fork(child) == 0
    go_on.set()
    maker.join()
    assert cache.get("strided", 512).rows == 4 and cache.made == 1


class Borrows(torch.utils.data.Dataset):
    "A data set that works in borrowed memory."

    def __init__(self, pool):
        self.pool = pool

    def __len__(self):
        return 8

    def __getitem__(self, i):
        with self.pool.buffer((4,), F32) as room:
            return room.fill_(i).clone()


@needs_fork
@ignores_fork
def test_workers_of_a_data_loader_may_share_a_pool():
    pool = make()
    with busy(lambda: cycle(pool, 16)):
        loader = torch.utils.data.DataLoader(Borrows(pool), batch_size=4, num_workers=2, multiprocessing_context="fork")
        assert [x[:, 0].tolist() for x in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]


# --- memory of the process


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_resident_memory_does_not_grow(count):
    pool, rng, x = make(max_pool_size=8, max_bytes=2**20, eviction_policy="adaptive"), random.Random(0), leaf(1)

    def operate(count):
        for step in range(count):
            buffer = pool.get_buffer((rng.randrange(1, 4096),), F32)
            if step % 10 == 0:
                y = x * buffer[:1]
            if step % 7:
                pool.return_buffer(buffer)
            del buffer
        del y

    operate(5_000)
    gc.collect()
    before = resident()
    operate(count)
    gc.collect()
    assert resident() < 1.01 * before


# --- GPUs


def test_pinned_memory_needs_cuda_and_the_config(monkeypatch):
    with pytest.raises(ValueError, match="pin_memory must be False, got True; set enable_pinned_memory"):
        make(enable_pinned_memory=False).get_buffer((4,), F32, pin_memory=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pool = make()
    with pytest.raises(RuntimeError, match="pin_memory needs CUDA, which is not available"):
        pool.get_buffer((4,), F32, pin_memory=True)
    with pytest.raises(RuntimeError, match="needs CUDA"), pool.buffer((4,), F32, pin_memory=True):
        pass
    assert pool.get_stats()["misses"] == 0


class Stream:
    "A stream on which nothing runs, until its work is declared done."

    device, done = CPU, False

    def record_event(self):
        return SimpleNamespace(query=lambda: self.done)


@pytest.mark.parametrize("pinned", [False, True])
def test_memory_in_use_by_a_stream_waits(monkeypatch, pinned):
    one, two = Stream(), Stream()
    pool, real, now = make(), memory_pool.Block, [one]

    def on_the_host(kind, device):
        "In place of page-locked memory, or of a GPU's."
        block = real(Kind(kind.nbytes), device)
        block.kind = kind
        return block

    def get():
        return pool.get_buffer((4,), U8)

    monkeypatch.setattr(memory_pool, "Block", on_the_host)
    monkeypatch.setattr(memory_pool, "kind_of", lambda *request: Kind(4, None, pinned, now[0]))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    first = get()
    address = first.data_ptr()
    pool.return_buffer(first)  # work may be queued on stream one
    second = get()
    assert (second.data_ptr() != address) == pinned  # in order on the same stream, but the host does not wait for it
    now[0] = two
    address = second.data_ptr()
    pool.return_buffer(second)  # lent on one, used on two
    other = get()
    now[0] = one
    third = get()
    assert address not in (other.data_ptr(), third.data_ptr())
    two.done = True
    assert get().data_ptr() == address
    dropped = get()  # of which only the stream that it was lent on is known
    address = dropped.data_ptr()
    now[0] = two
    del dropped
    pool.get_stats()
    now[0] = one
    more = [get()]
    assert (more[0].data_ptr() != address) == pinned
    one.done = True
    more += [get() for _ in range(3)]
    assert address in [x.data_ptr() for x in more]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@needs_cuda
def test_on_a_gpu():
    pool = UnifiedMemoryPool(MemoryPoolConfig(), "cuda")
    assert pool.max_bytes == torch.cuda.mem_get_info()[1] // 8
    lent = pool.get_buffer((1024,), F32).fill_(3)
    address, x = lent.data_ptr(), torch.ones(1024, device="cuda", requires_grad=True)
    y = (x * lent).sum()
    pool.return_buffer(lent)
    other = pool.get_buffer((1024,), F32).fill_(99)
    assert other.data_ptr() != address
    y.backward()
    assert (x.grad == 3).all()
    del y
    assert pool.get_buffer((1024,), F32).data_ptr() == address
    pinned = pool.get_buffer((1024,), F32, pin_memory=True)
    assert pinned.is_pinned() and pinned.device == CPU
    pinned.copy_(other, non_blocking=True)
    pool.return_buffer(pinned)
    torch.cuda.synchronize()
    assert pool.get_buffer((1024,), F32, pin_memory=True).is_pinned()
    assert pool.get_stats()["hits"] == 2 and 0 <= memory_pressure(pool.device) < 1


# --- the rest


def test_a_copy_is_a_new_pool():
    pool = make(max_bytes=1000)
    cycle(pool, 8)
    for twin in (copy.deepcopy(pool), pickle.loads(pickle.dumps(pool))):
        assert type(twin) is UnifiedMemoryPool and twin.config == pool.config and twin.device == pool.device
        assert twin.get_stats()["total_buffers"] == 0 and twin._lock is not pool._lock


def test_statistics_have_the_promised_names():
    assert set(make().get_stats()) == {
        "requests", "hits", "misses", "hit_rate", "evictions", "dropped", "total_buffers", "pool_keys", "buffers_lent",
        "bytes_held", "bytes_lent", "peak_bytes",
    }  # fmt: skip


def test_a_bad_device_is_refused():
    with pytest.raises(ValueError, match="device must name a device"):
        UnifiedMemoryPool(MemoryPoolConfig(), "gpu")
    with pytest.raises(TypeError, match="config must be a MemoryPoolConfig"):
        UnifiedMemoryPool("cpu")
