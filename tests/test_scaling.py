"The cost model against the exact plan of the ring."

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import drawn
from hypothesis import given

from dilated_attention_nb.benchmarks import dilated_pairs
from dilated_attention_nb.longnet import LayerStack, longnet_tiny
from dilated_attention_nb.ring_dilated import RingAttentionConfig, traffic
from dilated_attention_nb.scaling import (
    Cluster,
    attention_pairs,
    kept_numbers,
    layer_bytes,
    received_rows,
    step_flops,
    step_seconds,
    zigzag_parts,
)
from dilated_attention_nb.testing import saved_for_backward


def planned(model, n: int, ranks: int, dtype=torch.float32) -> tuple[float, float]:
    "Bytes that a rank receives on average, forward and backward, by the plan that the ring follows."
    branches = model.attention_config.to_dict() | {"dropout": 0.0, "layout": "zigzag"}
    heads = model.multihead_config
    sizes = n, heads.num_heads, heads.head_dim, ranks, 1, heads.kv_heads, dtype
    found = traffic(RingAttentionConfig(**branches), *sizes, is_causal=True)
    return tuple(sum(getattr(t, f"{way}_received") for t in found) / ranks for way in ("forward", "backward"))


@st.composite
def cut(draw):
    "Ranks, rate, tokens of a chunk, tokens of a segment: any, the rate dividing all."
    ranks, r, size = draw(st.integers(1, 7)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return ranks, r, r * size, r * draw(st.integers(1, 2 * ranks * size + 3))


@drawn(150)
@given(cut(), st.sampled_from(("softmax", "groups")), st.sampled_from((1, 2, 4)))
def test_bytes_are_those_of_the_plan(case, mixing, kv_heads):
    ranks, r, size, w = case
    model = longnet_tiny(
        segment_lengths=(w,), dilation_rates=(r,), mixing=mixing, num_kv_heads=kv_heads, position="none"
    )
    n = 2 * ranks * size
    found = layer_bytes(model, n, Cluster(ranks, bytes_per_number=4))
    assert found == pytest.approx(planned(model, n, ranks), rel=1e-12)


@drawn(50)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.integers(1, 110))
def test_thinning_is_off_by_less_than_a_row_for_each_part_and_receiver(ranks, r, size, w):
    n = 2 * ranks * size
    tokens, receivers = zigzag_parts(n, min(w, n), ranks)
    model = longnet_tiny(segment_lengths=(w,), dilation_rates=(r,), position="none")
    rows = received_rows(model, n, ranks, "ring")[0]
    columns = layer_bytes(model, n, Cluster(ranks, bytes_per_number=4))[0] / (8 * 16 * rows) if rows else 4
    exact = planned(model, n, ranks)[0] / (8 * 16 * columns)
    off = np.where(tokens < r, np.maximum(tokens, 1), 1)  # a part without a row need not travel, and one row is more
    assert abs(rows - exact) <= (off * receivers).sum() / ranks


def test_formulas_that_the_text_gives():
    n, ranks = 4096, 8
    m = n / ranks
    for w, rows in ((n, 0.75 * (n - m)), (n // 2, n // 2 - m / 2), (1024, 1024 - m / 2), (int(m / 2), 0)):
        tokens, receivers = zigzag_parts(n, w, ranks)
        assert (tokens * receivers).sum() / ranks == rows


@drawn(30)
@given(st.integers(100, 5000), st.integers(64, 6000), st.sampled_from((1, 2, 4)))
def test_pairs_are_those_counted_up_to_the_diagonal(n, w, r):
    model = longnet_tiny(segment_lengths=(w,), dilation_rates=(r,), position="none")
    exact = dilated_pairs(n, model.num_heads, (w,), (r,), True, "softmax")
    w = min(w, n)
    rows = model.num_heads * (n // w + 1) * (w / r + 1)  # half a pair for each, and as many for what r cuts off
    assert abs(attention_pairs(model, n, "ring") - exact) <= 1.5 * rows


def test_attention_has_a_rate_of_its_own():
    model = longnet_tiny()
    fast, slow = (step_seconds(model, 4096, Cluster(2, flops=1e9, attention_flops=a)) for a in (None, 5e8))
    assert slow["attention"] == pytest.approx(2 * fast["attention"]) and slow["products"] == fast["products"]
    assert (fast["products"] + fast["attention"]) * 2e9 == pytest.approx(step_flops(model, 4096))
    for name in ("attention_flops", "memory_bandwidth"):
        with pytest.raises(ValueError, match=name):
            Cluster(**{name: 0.0})


def test_what_is_moved_takes_time_where_memory_has_a_rate():
    model, n = longnet_tiny(), 4096
    free, narrow = (step_seconds(model, n, Cluster(4, memory_bandwidth=b)) for b in (None, 1e9))
    assert free["moving"] == 0 and free == narrow | {"moving": 0}
    kept = model.num_layers * n * kept_numbers(model) * 2  # bytes in bfloat16
    assert narrow["moving"] == pytest.approx(4 * kept / 4 / 1e9)


@pytest.mark.parametrize("change", [{}, {"num_kv_heads": 1}, {"ffn_dim": 100}, {"position": "none"}, {"num_heads": 8}])
def test_what_a_layer_keeps_is_counted(change):
    values = {"position": "rope"} | change

    def kept(layers, n):
        stack = LayerStack(longnet_tiny(num_layers=layers, **values))
        return saved_for_backward(stack, torch.randn(1, n, 64)).num_bytes

    grown = [kept(layers, 200) - kept(layers, 100) for layers in (1, 2)]
    assert grown[1] - grown[0] == 100 * 4 * kept_numbers(longnet_tiny(**values))
