"""The fused Triton kernels: in the interpreter where there is no GPU (conftest.py switches it on), else on the GPU."""

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_attention_nb import backends
from dilated_attention_nb.backends import attend, available_backends, resolve_backend
from dilated_attention_nb.config import BACKENDS, DilatedAttentionConfig, MultiheadConfig
from dilated_attention_nb.dilated import DilatedAttention
from dilated_attention_nb.improved import ImprovedDilatedAttention, dilated_attention, forward_op
from dilated_attention_nb.longnet import LongNet, LongNetConfig
from dilated_attention_nb.masking import attention_counts
from dilated_attention_nb.multihead import MultiheadDilatedAttention
from dilated_attention_nb.testing import (
    AttentionCase,
    assert_batch_independent,
    assert_causal,
    attention_cases,
    check_against_oracle,
    make_qkv,
    saved_for_backward,
)

pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl

from dilated_attention_nb import triton_forward
from dilated_attention_nb.triton_backward import fused_backward
from dilated_attention_nb.triton_forward import Blocks, block_sizes, fused_forward

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HERE = Path(__file__).parent
on_gpu = pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
interpreted = pytest.mark.skipif(CUDA, reason="is about the interpreter")


def fused(q, k, v, segment_lengths, dilation_rates, **options):
    return dilated_attention(
        q, k, v, segment_lengths, dilation_rates, backend="triton", **({"use_tf32": False} | options)
    )


def held(case: AttentionCase) -> dict[str, float]:
    "Forward and backward of a case within the budget."
    options = case.options()
    if options["key_padding_mask"] is not None:
        options["key_padding_mask"] = options["key_padding_mask"].to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in case.qkv())
    return check_against_oracle(lambda q, k, v: fused(q, k, v, **options), q, k, v, **options)


half, brain = torch.float16, torch.bfloat16
late = (2, 9, 40, 4, 2, 8, True)  # batch, queries, keys, heads, key/value heads, head_dim, padding
CASES = {
    "one branch": AttentionCase((32,), (1,), nq=32, nk=32, h=1, kv_heads=1),
    "one token": AttentionCase((4, 1), (1, 3), True, "softmax", nq=1, nk=1, h=2, kv_heads=1),
    "whole blocks": AttentionCase((64, 128), (1, 2), True, "softmax", "blocked", "error", 1, 128, 128, 1, 1, 16),
    "blocks across segments": AttentionCase((24,), (1,), nq=48, nk=48, h=1, kv_heads=1),
    "whole blocks, not causal": AttentionCase((64,), (1,), nq=128, nk=128, h=1, kv_heads=1, dtype=brain),
    "offsets": AttentionCase((16, 24, 48), (1, 2, 4), True, "softmax", nq=48, nk=48, h=3, kv_heads=3, dtype=brain),
    "groups": AttentionCase((16, 24, 48), (1, 2, 4), True, "groups", nq=48, nk=48, h=4, kv_heads=4, dtype=half),
    "misaligned": AttentionCase((7, 20), (3, 6), True, "softmax", "interleaved", nq=41, nk=41, h=2, kv_heads=2),
    "rate above segment": AttentionCase((3, 24), (5, 64), False, "softmax", nq=24, nk=24, h=2, kv_heads=2),
    "late queries, GQA, padding": AttentionCase((8, 24), (1, 3), True, "softmax", "blocked", "mask", *late),
    "groups and GQA": AttentionCase((8, 24), (1, 3), False, "groups", "blocked", "mask", 1, 20, 33, 4, 2, 8, True),
    "zeros": AttentionCase((8, 24), (1, 3), False, "softmax", "interleaved", "zeros", 1, 29, 29, 2, 2, 8, True),
    "zeros and groups": AttentionCase((8, 24), (1, 3), False, "groups", "blocked", "zeros", 1, 20, 29, 2, 2),
    "zeros and causal": AttentionCase((8, 24), (1, 3), True, "softmax", "blocked", "zeros", 1, 20, 29, 2, 2),
    "head_dim 24": AttentionCase((16, 48), (1, 2), True, "softmax", nq=48, nk=48, h=2, kv_heads=1, d=24, dtype=brain),
    "head_dim 1": AttentionCase((8, 24), (1, 2), True, "softmax", nq=24, nk=24, h=2, kv_heads=2, d=1),
    "head_dim 256": AttentionCase((16, 32), (1, 4), True, "softmax", nq=32, nk=32, h=1, kv_heads=1, d=256, dtype=half),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name):
    held(CASES[name])


@settings(max_examples=3)
@given(case=attention_cases(max_length=20, max_heads=2, dtypes=(torch.float32, brain, half)))
def test_equals_the_oracle_on_drawn_cases(case):
    held(case.unshifted())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, brain, half])
@settings(max_examples=40)
@given(data=st.data())
def test_equals_the_oracle_on_many_drawn_cases(dtype, data):
    held(data.draw(attention_cases(max_length=70, dtypes=(dtype,))).unshifted())


@pytest.mark.slow
@pytest.mark.parametrize("d", [16, 32, 40, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, brain, half])
def test_every_head_dim(d, dtype):
    held(AttentionCase((16, 64), (1, 4), True, "softmax", nq=64, nk=64, h=2, kv_heads=1, d=d, dtype=dtype))


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("own, step", [(32, 16), (16, 32), (64, 16), (128, 64)])
def test_blocks_of_other_sizes(own, step, monkeypatch):
    monkeypatch.setattr(triton_forward, "_blocks", lambda kernel, q: Blocks(own, step, 1, 1))
    for case in ("whole blocks", "offsets", "late queries, GQA, padding", "misaligned", "zeros"):
        held(CASES[case])


@pytest.mark.parametrize("mixing", ["groups", "softmax"])
def test_the_pattern_is_that_of_masking(mixing):
    "Values that are unit vectors show each row's weights, and so the counts that the kernel has in mind."
    n, ws, rs = 32, (8, 12, 32), (1, 3, 4)
    zero = torch.zeros(1, n, 4, n, device=DEVICE)
    unit = torch.eye(n, device=DEVICE)[None, :, None].expand(1, n, 4, n)
    weights, lse = fused_forward(zero, zero, unit, None, ws, rs, True, mixing, "interleaved", False, 1.0)
    weights = weights * (len(ws) if mixing == "groups" else 1)
    seen = (weights * lse.exp()[..., None])[0].transpose(0, 1)
    counts = attention_counts(n, n, 4, ws, rs, is_causal=True, mixing=mixing, offsets="interleaved")
    assert torch.allclose(seen.cpu(), counts.float(), atol=1e-3)


def test_causal_outputs_ignore_the_future():
    options = dict(segment_lengths=(8, 48), dilation_rates=(1, 4), is_causal=True, mixing="softmax")
    q, k, v = make_qkv(1, 30, 3, 8, nk=48, device=DEVICE)
    assert_causal(lambda *x: fused(*x, **options), q, k, v, 33)


def test_batch_rows_are_strangers():
    options = dict(segment_lengths=(8, 20), dilation_rates=(1, 3), mixing="softmax", ragged="mask")
    q, k, v = make_qkv(2, 27, 2, 8, kv_heads=1, device=DEVICE)
    mask = torch.rand(2, 27, device=DEVICE) < 0.2
    assert_batch_independent(lambda q, k, v, m: fused(q, k, v, key_padding_mask=m, **options), q, k, v, mask)


def test_strides_do_not_matter():
    "Slices of a fused projection, a head_dim that isn't contiguous, expanded heads, a gradient that is one number."
    options = dict(segment_lengths=(8, 24), dilation_rates=(1, 2), mixing="softmax")
    leaf = torch.randn(2, 24, 3, 2, 8, device=DEVICE, requires_grad=True)
    q, k, v = leaf.unbind(2)
    expected = fused(*(x.contiguous() for x in (q, k, v)), **options)
    assert torch.equal(fused(q, k, v, **options), expected)
    columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    assert torch.equal(fused(*columns, **options), expected)
    one = k[:, :, :1]
    spread = fused(q, one.expand(-1, -1, 2, -1), one.expand(-1, -1, 2, -1), **options)
    assert torch.equal(spread, fused(q, one, one, **options))
    (got,) = torch.autograd.grad(fused(q, k, v, **options).sum(), leaf)  # dout has strides 0
    (wanted,) = torch.autograd.grad(dilated_attention(q, k, v, **options).sum(), leaf)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


if not CUDA:

    @triton_forward.jit
    def copy_rows(x, y, STRIDE: triton_forward.tl.constexpr):
        "Read 2 rows of 3 numbers, which lie `step` apart in x, and write them so far apart again, 8 numbers later."
        tl = triton_forward.tl
        rows, seen, strides = tl.arange(0, 16), tl.arange(0, 16) < 2, (0, 1, 0, STRIDE)
        found = triton_forward.load_rows(x, rows, seen, strides, 3, 16, True)
        triton_forward.store_rows(y, rows, seen, (0, 16, 0, 1), found, 3, 16)
        triton_forward.store_rows(x + 8, rows, seen, strides, found, 3, 16)


@interpreted
def test_numbers_of_a_row_may_be_2_to_the_30_apart(tmp_path):
    """The address of the third is beyond 2**31 numbers, of which a sparse file holds those that are touched.

    In 32 bits it would be as far below the first, where the file has zeros.
    """
    step = 2**30
    with open(tmp_path / "sparse", "w+b") as file:
        file.truncate((4 * step + 4096) * 2)  # bytes of float16
        with mmap.mmap(file.fileno(), 0) as there:
            near = [torch.frombuffer(there, dtype=half, count=32, offset=(2 * step + i * step) * 2) for i in range(3)]
            for i, x in enumerate(near):
                x[:2] = torch.tensor([i + 1.0, i + 11.0])
            y = torch.zeros(16, 16, dtype=half)
            copy_rows[(1,)](near[0], y, step)
            written = [x[8:10].tolist() for x in near]
            x = near = None  # before the file is closed
    assert y[:2, :3].tolist() == [[1, 2, 3], [11, 12, 13]]
    assert written == [[1, 11], [2, 12], [3, 13]]


@on_gpu
def test_gpu_reads_numbers_of_a_row_2_to_the_30_apart():
    x = torch.zeros(2**31 + 64, dtype=half, device="cuda").as_strided((1, 16, 1, 3), (0, 1, 0, 2**30))
    x.copy_(torch.randn(1, 16, 1, 3))
    y = x.contiguous()
    assert torch.equal(fused(x, x, x, (8,), (1,)), fused(y, y, y, (8,), (1,)))


def test_inputs_are_read_where_they_lie():
    "No copy of q, k or v: beside the results a call allocates 8 bytes a row for the backward pass."
    q, k, v = torch.randn(1, 32, 3, 2, 16, device=DEVICE).unbind(2)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = any(name in str(func) for name in ("empty", "clone", "copy")) and out.is_floating_point()
            sizes.extend([out.numel()] if made and out.numel() else [])  # not the interpreter's copies of bytes
            return out

    call = ((16, 32), (1, 2), False, "softmax", "blocked")
    fused_backward(q, q, k, v, *fused_forward(q, k, v, None, *call, False, 0.25), None, *call, 0.25)  # makes the tables
    with Watch(), torch.no_grad():
        out, lse = fused_forward(q, k, v, None, *call, False, 0.25)
        assert sorted(sizes) == [32 * 2, 32 * 2 * 16]
        sizes.clear()
        fused_backward(out, q, k, v, out, lse, None, *call, 0.25)
    assert sorted(sizes) == [32 * 2] * 2 + [32 * 2 * 16] * 3


def test_the_same_bits_every_time():
    q, k, v = make_qkv(1, 48, 4, 16, kv_heads=2, dtype=brain, requires_grad=True, device=DEVICE)
    runs = []
    for _ in range(2):
        out = fused(q, k, v, (16, 48), (1, 3), mixing="softmax")
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", [torch.float32, brain])
def test_saves_q_k_v_out_lse(dtype):
    q, k, v = make_qkv(1, 32, 2, 16, dtype=dtype, requires_grad=True, device=DEVICE)
    saved = saved_for_backward(lambda *x: fused(*x, (16, 32), (1, 2), mixing="softmax"), q, k, v)
    assert len(saved.tensors) == 5 and saved.num_bytes == 4 * q.nbytes + 32 * 2 * 4


def test_scale_and_extreme_logits():
    q, k, v = make_qkv(1, 24, 2, 8, device=DEVICE)
    check_against_oracle(lambda *x: fused(*x, (8, 24), (1, 2), scale=0.9), q, k, v, (8, 24), (1, 2), scale=0.9)
    leaves = [x.requires_grad_() for x in (60 * q, 60 * k, torch.ones_like(v))]
    out = fused(*leaves, (8, 24), (1, 2), mixing="softmax")
    assert ((out - 1).abs() < 1e-5).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


def test_what_padding_holds_is_never_seen():
    q, k, v = make_qkv(1, 32, 2, 8, device=DEVICE)
    mask = torch.arange(32, device=DEVICE)[None] >= 20
    options = dict(segment_lengths=(8, 32), dilation_rates=(1, 2), mixing="softmax", key_padding_mask=mask)
    other_k, other_v = k.clone(), v.clone()
    other_k[:, 20:], other_v[:, 20:] = 1e4, -1e4
    assert torch.equal(fused(q, k, v, **options), fused(q, other_k, other_v, **options))


def test_compiles_as_one_operator():
    torch._dynamo.reset()
    module = ImprovedDilatedAttention(DilatedAttentionConfig((8, 16), (1, 2), mixing="softmax"), "triton")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    q, k, v = make_qkv(1, 32, 2, 8, requires_grad=True, device=DEVICE)
    pairs = [(out, *torch.autograd.grad(out.square().sum(), (q, k, v))) for out in (compiled(q, k, v), module(q, k, v))]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*pairs))


def test_operator_is_sound():
    q, k, v = make_qkv(1, 16, 2, 8, requires_grad=True, device=DEVICE)
    args = (q, k, v, None, [8, 16], [1, 2], True, "softmax", "blocked", "error", 8**-0.5, "triton", False)
    torch.library.opcheck(forward_op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_autocast():
    q, k, v = make_qkv(1, 16, 2, 8, device=DEVICE)
    with torch.autocast(DEVICE, brain):
        out = fused(q, k, v, (8,), (1,))
    assert torch.equal(out, fused(q.bfloat16(), k.bfloat16(), v.bfloat16(), (8,), (1,)))


# ---------------------------------------------------------------- who may have it


def test_auto_never_chooses_it():
    "As long as nobody has measured it."
    assert "triton" not in backends.KERNELS and "triton" not in BACKENDS
    for dtype in (torch.float32, brain, half, torch.float64):
        assert resolve_backend("auto", torch.empty(1, 1, 1, 8, dtype=dtype), whole=True) != "triton"


def model_with_it() -> LongNet:
    "As the notebook of `improved` shows it."
    torch.manual_seed(0)
    model = LongNet(LongNetConfig(16, 1, 2, (8, 16), (1, 2), vocab_size=16))
    changed = [module for module in model.modules() if isinstance(module, ImprovedDilatedAttention)]
    assert len(changed) == 1
    for module in changed:
        module.backend = "triton"
    return model.to(DEVICE).eval()


def test_a_model_can_have_it():
    model, tokens = model_with_it(), torch.arange(16, device=DEVICE)[None]
    assert "backend='triton'" in repr(model)
    got = model(tokens)
    for module in model.modules():
        if isinstance(module, ImprovedDilatedAttention):
            module.backend = "auto"
    torch.testing.assert_close(got, model(tokens), atol=1e-4, rtol=1e-4)
    built = MultiheadDilatedAttention(
        MultiheadConfig(16, 2), DilatedAttentionConfig((8,), (1,)), lambda c: ImprovedDilatedAttention(c, "triton")
    )
    assert built.attention.backend == "triton"


@interpreted
def test_a_model_without_cuda_says_what_it_needs(monkeypatch):
    model = model_with_it()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backends._chosen.cache_clear()
    with pytest.raises(ValueError, match="got 'triton': the Triton kernels need CUDA"):
        model(torch.arange(16)[None])
    backends._chosen.cache_clear()


def test_parts_refuse_it():
    q, k, v = make_qkv(1, 8, 1, 8)
    with pytest.raises(ValueError, match="'triton', which computes whole layers only; use dilated_attention"):
        attend(q, k, v, backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"):
        DilatedAttention(DilatedAttentionConfig((8,), (1,)), "triton")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(dtype=torch.float64), "float16, bfloat16 and float32"),
        (dict(d=257), "head_dim of at most 256, not torch.float32 and 257"),
        (dict(n=2**30 + 1), "at most 2\\*\\*30 tokens"),
        (dict(h=65_536), "65,535 batch rows and heads"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_bad_input_is_explained(change, text):
    shape = {"n": 16, "h": 2, "d": 8} | {key: value for key, value in change.items() if key != "dtype"}
    x = torch.zeros(1, dtype=change.get("dtype"), device=DEVICE).expand(1, shape["n"], shape["h"], shape["d"])
    with pytest.raises(ValueError, match=text):
        fused(x, x, x, (8,), (1,), ragged="mask")


def test_module_checks_its_backend():
    with pytest.raises(ValueError, match="did you mean 'triton'"):
        ImprovedDilatedAttention(DilatedAttentionConfig((8,), (1,)), "tritom")
    module = ImprovedDilatedAttention(DilatedAttentionConfig((8,), (1,)), "triton")
    assert "backend='triton'" in repr(module)
    with pytest.raises(ValueError, match="takes float16"):
        module(*make_qkv(1, 8, dtype=torch.float64, device=DEVICE))


def test_says_that_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert "pip install 'dilated-attention-nb[triton]'" in available_backends(DEVICE)["triton"]
    assert "runs on CUDA" in available_backends("mps")["efficient"]


@triton_forward.jit
def kernel_of_branch(branches, rows, found, ENTRIES: tl.constexpr):
    "What a program learns of each branch: its segments, and whether all rows are in."
    low, high, stride = tl.load(rows), tl.load(rows + 1), tl.load(rows + 2)
    for e in range(ENTRIES):
        _, _, _, _, first, last, whole = triton_forward.branch(branches, e, low, high, stride, ENTRIES)
        tl.store(found + 3 * e, first)
        tl.store(found + 3 * e + 1, last)
        tl.store(found + 3 * e + 2, whole.to(tl.int32))


def test_no_branch_is_visited_that_no_row_can_be_on():
    "Results can't tell, as keys that are visited in vain are masked: so the program's own question is asked."
    branches = [(w, r, s, 0) for w in (4, 6, 16, 30) for r in (1, 2, 3, 4, 6) for s in (0, r // 2, r - 1)]
    table = torch.tensor(branches, dtype=torch.int32, device=DEVICE)
    skipped = partly = 0
    for stride in (1, 2, 3, 4, 8, 12):
        for low, count in ((0, 1), (1, 2), (7, 4), (10, 3)):
            high = low + stride * (count - 1)
            rows = torch.tensor([low, high, stride], dtype=torch.int32, device=DEVICE)
            found = torch.zeros(len(branches), 3, dtype=torch.int32, device=DEVICE)
            kernel_of_branch[(1, 1, 1)](table, rows, found, len(branches))
            for (w, r, s, _), (first, last, whole) in zip(branches, found.tolist()):
                one = low // w == high // w
                # As far on as the grid repeats, in one segment; the same in all segments if r divides w.
                on = {((i - low // w * w) - s) % r == 0 for i in range(low, low + stride * r, stride)}
                assert first == low // w and bool(whole) == (one and on == {True})
                if one or w % r == 0:
                    assert (last >= first) == (True in on) and last in (first - 1, high // w), (w, r, s, low, stride)
                    skipped += True not in on and stride % r > 0
                    partly += len(on) == 2
    assert skipped > 100 and partly > 100


@interpreted
def test_says_why_not_without_the_interpreter(monkeypatch):
    assert available_backends("cpu", brain)["triton"] is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backends._chosen.cache_clear()
    reason = available_backends("cpu", brain)["triton"]
    assert reason.startswith("the Triton kernels need CUDA; set TRITON_INTERPRET=1 before Python")
    with pytest.raises(ValueError, match="backend must be available here, got 'triton': the Triton kernels need CUDA"):
        fused(*make_qkv(1, 8), (8,), (1,))
    backends._chosen.cache_clear()
    assert "runs on CUDA, the tensors are on mps" in available_backends("mps", brain)["triton"]


def script(code: str, **env: str) -> str:
    "What Python prints, with other variables set and TRITON_INTERPRET only if given."
    base = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = os.pathsep.join(filter(None, [str(HERE.parent), base.get("PYTHONPATH")]))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=base | {"PYTHONPATH": paths} | env, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@interpreted
def test_the_variable_set_too_late_is_noticed():
    code = """
import os, triton
os.environ["TRITON_INTERPRET"] = "1"
from dilated_attention_nb.backends import available_backends
print(available_backends("cpu")["triton"])
"""
    assert "before Python starts" in script(code)


def test_the_package_imports_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not there
import torch
import dilated_attention_nb as nb
from dilated_attention_nb import triton_backward, triton_forward
out = nb.dilated_attention(*(torch.randn(1, 8, 2, 8) for _ in range(3)), (8,), (1,))
assert triton_forward.triton is None
try:
    triton_forward.fused_forward(out, out, out, None, (8,), (1,), False, "groups", "blocked", False, 1.0)
except ImportError as error:
    print(tuple(out.shape), error)
"""
    assert script(code).startswith("(1, 8, 2, 8) triton can't be imported; pip install")


@pytest.mark.parametrize("module", ["triton_forward", "triton_backward"])
@pytest.mark.parametrize(
    "fault,said",
    [
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("raise ImportError('undefined symbol')", "undefined symbol"),
        ("", "No module named 'triton.language'"),
    ],
)
def test_a_broken_triton_is_not_taken_for_none(module, fault, said, tmp_path):
    "A Triton that is there and cannot be imported: its own error comes through."
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text(fault + "\n")
    code = f"""
import sys
from unittest import mock
if {module!r} == "triton_backward":  # which imports the other
    sys.modules["dilated_attention_nb.triton_forward"] = mock.MagicMock()
sys.path.insert(0, {str(tmp_path)!r})
try:
    import dilated_attention_nb.{module}
    print("imported")
except ImportError as error:
    print(error)
"""
    assert script(code).strip() == said


@pytest.mark.slow
def test_the_notebooks_pass_without_triton(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['triton'] = None\n")
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    notebooks = [f"nbs/{name}.ipynb" for name in ("33_triton_forward", "34_triton_backward", "35_main")]
    command = [sys.executable, str(HERE.parent / "scripts/run_notebooks_tests.py"), *notebooks]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE.parent, env=os.environ | {"PYTHONPATH": paths}, timeout=1200
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout[-3000:]


def test_asking_who_is_there_does_not_import_triton():
    code = """
import sys, torch
from dilated_attention_nb import available_backends, dilated_attention
available_backends("cpu")
print("triton" in sys.modules)
"""
    assert script(code).strip() == "False"


# ---------------------------------------------------------------- the compiler


def compiled(*wanted: str) -> list[dict]:
    command = [sys.executable, str(HERE / "compile_kernels.py"), *wanted]
    paths = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_compiled(reports: list[dict]) -> None:
    for found in reports:
        assert found["atomics"] == 0, found
        exact = found["dtype"] == "fp32" and not found["tf32"]  # for which there are no matrix instructions
        assert (found["tensor_core"] == 0) if exact else (found["tensor_core"] > 0), found
        assert found["shared"] <= found["shared_limit"], found


def test_launches_compile_for_gpus_without_atomics():
    "Triton's compiler needs no GPU: the launches are accepted, use the tensor cores and add nothing to memory."
    reports = compiled("bf16:64:90", "fp32:16:90:ieee")
    check_compiled(reports)
    assert [r["kernel"] for r in reports] == ["forward_kernel", "queries_kernel", "keys_kernel"] * 2
    assert all(r["async_copies"] > 0 and r["spilled"] == 0 for r in reports[:3]), reports


@pytest.mark.slow
def test_nothing_is_spilled_where_it_matters():
    "With 128 numbers a head, in half precision; float32 without TF32 spills, as the lab log says."
    assert all(r["spilled"] == 0 for r in compiled("bf16:128:90", "fp16:128:90", "fp32:64:90"))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_launches_of_every_size_compile(capability):
    kinds = [f"{dtype}:{d}" for dtype in ("bf16", "fp32") for d in (16, 64, 80, 128, 256)]
    check_compiled(compiled(*(f"{kind}:{capability}" for kind in kinds)))
    check_compiled(compiled(*(f"fp32:{d}:{capability}:ieee" for d in (64, 128))))
    check_compiled(compiled(*(f"fp16:{d}:{capability}:full:padded" for d in (24, 128))))
    check_compiled(compiled(f"bf16:64:{capability}:one", f"bf16:64:{capability}:one:full:padded"))


def test_sizes_fit_the_dot_product():
    "Sides of blocks are powers of two of at least 16, and small devices get small blocks."
    for kernel in ("forward", "queries", "keys"):
        for dtype in (brain, torch.float32):
            for d in (16, 64, 65, 128, 129, 256):
                large, small = (block_sizes(kernel, dtype, d, shared) for shared in (232_448, 101_376))
                for sizes in (large, small):
                    assert all(x >= 16 and x & (x - 1) == 0 for x in (sizes.own, sizes.step))
                assert small.own <= large.own or dtype == torch.float32


# ---------------------------------------------------------------- on a GPU only


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, brain, half])
@pytest.mark.parametrize("d", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gpu_equals_the_oracle(dtype, d, is_causal):
    "Blocks of their real sizes."
    case = AttentionCase((128, 512), (1, 4), is_causal, "softmax", nq=512, nk=512, h=4, kv_heads=2, d=d, dtype=dtype)
    held(case.unshifted())


@on_gpu
@pytest.mark.parametrize("mixing", ["groups", "softmax"])
def test_gpu_equals_the_bundled_kernels_at_length(mixing):
    q, k, v = make_qkv(1, 32_768, 8, 64, dtype=brain, requires_grad=True, device="cuda")
    dout, runs = torch.randn_like(q), []
    for backend in ("triton", "flash"):
        options = dict(is_causal=True, mixing=mixing, backend=backend)
        out = dilated_attention(q, k, v, (2048, 8192, 32_768), (1, 4, 16), **options)
        runs.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
    for a, b in zip(*runs):
        assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()


@on_gpu
def test_gpu_reaches_beyond_2_to_the_31_numbers():
    n, h, d = 2**21, 16, 128
    if torch.cuda.get_device_properties(0).total_memory < 45 * 2**30:
        pytest.skip("needs 45 GiB of GPU memory")
    q = torch.randn(1, n, h, d, dtype=brain, device="cuda")  # 2**32 numbers
    out = dilated_attention(q, q, q, (1024,), (4,), is_causal=True, backend="triton", mixing="softmax")
    tail = q[:, -1024:].contiguous()
    expected = dilated_attention(tail, tail, tail, (1024,), (4,), is_causal=True, backend="triton", mixing="softmax")
    assert torch.equal(out[:, -1024:], expected)


@interpreted
@pytest.mark.slow
def test_the_benchmark_can_be_rehearsed():
    "Every section runs, at toy size; without a GPU and the option it says what it needs and measures nothing."
    file = HERE.parent / "benchmarks" / "gpu.py"
    results = file.with_name("gpu.json")
    stored = results.read_text() if results.exists() else None
    paths = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    for options, text in ([], "needs an NVIDIA GPU"), (["--rehearse"], "sizes_keys ..."):
        command = [sys.executable, str(file), *options]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, timeout=1200
        )
        assert done.returncode == 0 and text in done.stdout, done.stderr[-3000:]
    assert stored == (results.read_text() if results.exists() else None)
