"Checkpoints, GigaPath and torchscale weights, nn.MultiheadAttention: what was there stays, what misfits is refused."

import json
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dilated_attention_nb.config import DilatedAttentionConfig
from dilated_attention_nb.corpus import SEPARATOR
from dilated_attention_nb.embeddings import NgramEmbedding
from dilated_attention_nb.gigapath import (
    GigaPathConfig,
    GigaPathSlideEncoder,
    attention_rollout,
    position_codes,
    slide_segment_lengths,
    tile_cells,
)
from dilated_attention_nb.longnet import LongNet, LongNetEncoder, longnet_tiny
from dilated_attention_nb.pretrained import from_pretrained, save_pretrained
from dilated_attention_nb.processes import peak_memory
from dilated_attention_nb.testing import oracle_attention
from dilated_attention_nb.transformers import DilatedMHA, register_with_transformers, replace_attention

FILE = np.load(Path(__file__).parent / "golden" / "gigapath_slide_encoder.npz")
META = json.loads(FILE["meta"].tobytes())
STATE = {name[6:]: torch.tensor(FILE[name]) for name in FILE.files if name.startswith("param.")}
X, COORDS = torch.tensor(FILE["x"]), torch.tensor(FILE["coords"])
BRANCHES = dict(segment_lengths=META["segment_lengths"], dilation_rates=META["dilation_rates"])
SLIDE = dict(num_heads=META["heads"], **BRANCHES) | {
    name: META[name]
    for name in ("in_chans", "embed_dim", "depth", "ffn_dim", "slide_ngrids", "tile_size", "global_pool", "norm_eps")
}
SMALL = dict(
    in_chans=24, embed_dim=32, depth=2, num_heads=2, segment_lengths=(8, 21, 50), dilation_rates=(1, 2, 4), ffn_dim=48
)


def encoder(cls=LongNetEncoder, **values):
    torch.manual_seed(0)
    return cls(longnet_tiny(**values)).eval()


def slide(**values):
    torch.manual_seed(0)
    return GigaPathSlideEncoder(**SMALL | values).eval()


def tiles(n=60, side=10, channels=24, batch=1):
    places = torch.arange(n)
    coords = torch.stack((places % side, places // side), -1) * 256.0
    return torch.randn(batch, n, channels), coords.expand(batch, -1, -1)


# ---------------------------------------------------------------- golden values


def test_gigapaths_golden_values_are_reproduced():
    model = GigaPathSlideEncoder(**SLIDE).eval()
    model.load_state_dict(STATE)  # strict: the original names, all of them
    with torch.no_grad():
        assert (model(X, COORDS) - torch.tensor(FILE["out"])).abs().max() < 1e-5
        layers = model(X, COORDS, all_layer_embed=True)
        assert len(layers) == META["depth"] + 1
        for k, layer in enumerate(layers):
            assert layer.shape == (1, META["embed_dim"])
            assert (layer - torch.tensor(FILE[f"layer{k}"])).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["slide_encoder.pth", "bare.pth", "slide.safetensors", "folder"])
def test_gigapath_from_pretrained(tmp_path, kind):
    path = tmp_path / kind
    if kind == "slide_encoder.pth":
        torch.save({"model": STATE | {"pos_embed": torch.zeros(1, 65, 128)}}, path)
    elif kind == "bare.pth":
        torch.save(STATE, path)
    elif kind == "folder":
        model = GigaPathSlideEncoder(**SLIDE)
        model.load_state_dict(STATE)
        model.save_pretrained(path)
    else:
        save_file(STATE, path)
    model = GigaPathSlideEncoder.from_pretrained(path, **({} if kind == "folder" else SLIDE))
    assert not model.training and model.config == GigaPathConfig(**SLIDE)
    with torch.no_grad():
        assert (model(X, COORDS) - torch.tensor(FILE["out"])).abs().max() < 1e-5


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_no_code_of_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": STATE, "args": Evil()}, "evil.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(ValueError, match="can't be read"):
            GigaPathSlideEncoder.from_pretrained(tmp_path / name, **SLIDE)
    assert not Path("executed").exists()


def test_from_torchscale():
    inside = LongNetEncoder.from_torchscale(STATE, META["heads"], **BRANCHES, prefix="encoder.")
    assert inside.config.embed_dim == META["embed_dim"] and inside.config.ffn_dim == META["ffn_dim"]
    assert inside.config.num_layers == META["depth"] and inside.config.ragged == "zeros" and not inside.training
    outside = GigaPathSlideEncoder(**SLIDE).eval()
    outside.load_state_dict(STATE)
    x = torch.randn(1, 51, 128)
    with torch.no_grad():
        assert torch.equal(inside(x), outside.encoder(x))
    masked = LongNetEncoder.from_torchscale(STATE, META["heads"], **BRANCHES, prefix="encoder.", ragged="mask")
    assert masked.config.ragged == "mask" and not torch.allclose(masked(x), inside(x), atol=1e-3)
    bare = {name: x for name, x in STATE.items() if not name.endswith("bias") or "norm" in name or "ln" in name}
    assert not LongNetEncoder.from_torchscale(bare, 16, **BRANCHES, prefix="encoder.").config.bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prefix=""), "which prefix"), (dict(prefix="decoder."), "which prefix"), (dict(num_heads=5), "head_dim"),
        (dict(segment_lengths=(8,)), "segment_lengths"), (dict(state_dict={}), "got nothing"),
        (dict(state_dict=STATE | {"encoder.embed_positions.weight": X}), "embed_positions.weight is unknown"),
        (dict(state_dict=STATE | {"encoder.layer_norm.weight": X}), "layer_norm.weight has shape"),
        (dict(state_dict={k: v for k, v in STATE.items() if "inner_attn" not in k}), "inner_attn_ln.weight is missing"),
        (dict(embed_dims=3), "embed_dims"), (dict(ragged="pad"), "ragged"),
        (dict(state_dict=None), "be a mapping"), (dict(state_dict=[X]), "be a mapping"),
        (dict(state_dict="slide_encoder.pth"), "read_tensors"), (dict(state_dict={1: X}), "which prefix"),
        (dict(state_dict=STATE | {"encoder.layers.0.ffn.fc1.weight": 3}), "be a mapping"),
        (dict(state_dict=STATE | {"encoder.layers.x.y": X}), "layers.x.y is unknown"),
        (dict(state_dict={k.replace("layers.1", "layers.2"): v for k, v in STATE.items()}), "layers.1.*missing"),
    ],
)  # fmt: skip
def test_from_torchscale_refuses(change, message):
    given = dict(state_dict=STATE, num_heads=META["heads"], prefix="encoder.", **BRANCHES) | change
    with pytest.raises((ValueError, TypeError), match=message):
        LongNetEncoder.from_torchscale(**given)


BARE = {name.removeprefix("encoder."): x for name, x in STATE.items() if name.startswith("encoder.")}


def test_encoders_without_a_last_norm(tmp_path):
    "LongViT's, `normalize_output=False`: the last state as it is; saved and loaded again."
    longvit = {name: x for name, x in BARE.items() if not name.startswith("layer_norm.")}
    whole, bare = (LongNetEncoder.from_torchscale(state, META["heads"], **BRANCHES) for state in (BARE, longvit))
    x = torch.randn(1, 51, 128)
    *_, last = whole.states(x)
    assert torch.equal(bare(x), last) and torch.equal(whole.layer_norm(bare(x)), whole(x))
    assert not bare.config.normalize_output and set(bare.state_dict()) == set(longvit)
    bare.save_pretrained(tmp_path)
    again = LongNetEncoder.from_pretrained(tmp_path)
    assert again.config == bare.config and torch.equal(again(x), bare(x))
    model = LongNet(longnet_tiny(normalize_output=False))
    model(torch.randint(256, (1, 40)), torch.randint(256, (1, 40))).backward()
    assert not any("layer_norm" in name.split(".")[1] for name in model.state_dict())


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.slide_encoder.encoder."])
def test_prefixes_of_encoders_are_found(prefix):
    state = {prefix + name: x for name, x in BARE.items()} | {"head.weight": X} if prefix else BARE
    x = torch.randn(1, 51, 128)
    expected = LongNetEncoder.from_torchscale(BARE, META["heads"], **BRANCHES, prefix="")(x)
    for given in (None, prefix):
        assert torch.equal(LongNetEncoder.from_torchscale(state, META["heads"], **BRANCHES, prefix=given)(x), expected)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("embed_tokens.weight", "pass embeddings"), ("embed_positions.weight", "add the positions"),
        ("layernorm_embedding.weight", "apply it to the embeddings"), ("output_projection.weight", "what the encoder"),
        ("relative_position.relative_attention_bias.weight", "biases"), ("layers.0.self_attn.xpos.scale", "xPos"),
        ("layers.1.moe_layer.experts.0.fc1.weight", "experts"), ("layers.0.ffn.gate.weight", "gated"),
        ("layers.0.self_attn.q_proj.A.weight", "multiway"),
    ],
)  # fmt: skip
def test_other_encoders_of_torchscale_are_refused_with_a_reason(name, advice):
    for values in ({}, dict(vocab_size=2)):  # also where a name of ours would fit
        with pytest.raises(ValueError, match=f"{name} is unknown; .*{advice}"):
            LongNetEncoder.from_torchscale(BARE | {name: torch.zeros(2, 128)}, META["heads"], **BRANCHES, **values)


@pytest.mark.parametrize("part", ["inner_attn_ln", "ffn_layernorm"])
def test_encoders_without_norms_inside_are_refused(part):
    state = {name: x for name, x in BARE.items() if part not in name}
    with pytest.raises(ValueError, match=f"{part}.weight is missing; encoders without sub-LayerNorms"):
        LongNetEncoder.from_torchscale(state, META["heads"], **BRANCHES)


@pytest.mark.parametrize("prefix", ["slide_encoder.", "module.slide_encoder.", "net."])
def test_a_slide_encoder_that_was_part_of_another_model(tmp_path, prefix):
    state = {prefix + name: x for name, x in STATE.items()} | {prefix + "pos_embed": X}
    torch.save(state | {"head.weight": X}, tmp_path / "a.pth")
    for given in (None, prefix):
        model = GigaPathSlideEncoder.from_pretrained(tmp_path / "a.pth", given, **SLIDE | {"global_pool": True})
        assert all(torch.equal(x, STATE[name]) for name, x in model.state_dict().items())
    with pytest.raises(ValueError, match="missing"):
        GigaPathSlideEncoder.from_pretrained(tmp_path / "a.pth", "encoder.", **SLIDE)
    with pytest.raises(TypeError, match="prefix must be a string"):
        GigaPathSlideEncoder.from_pretrained(tmp_path / "a.pth", 3, **SLIDE)


def test_the_class_token_of_a_file_is_warned_about(tmp_path):
    torch.save(STATE, tmp_path / "a.pth")
    with pytest.warns(UserWarning, match="class token.*never trained.*global_pool=True") as caught:
        model = GigaPathSlideEncoder.from_pretrained(tmp_path / "a.pth", **SLIDE)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GigaPathSlideEncoder.from_pretrained(tmp_path / "a.pth", **SLIDE | {"global_pool": True})
        model.train()(X, COORDS)
        model.save_pretrained(tmp_path / "own")  # by somebody who has chosen the token
        GigaPathSlideEncoder.from_pretrained(tmp_path / "own")


def test_folders_of_0_1_are_read_and_written(tmp_path):
    "Fields that came later are written only where 0.1 had no such model."
    for model, later in (
        (encoder(LongNet), {"normalize_output"}),
        (slide(), {"max_wsi_size", "activation_checkpointing"}),
    ):
        model.save_pretrained(tmp_path)
        about = json.loads((tmp_path / "config.json").read_text())
        assert later <= model.config.to_dict().keys() - about["config"].keys()
        assert from_pretrained(tmp_path).config == model.config
    slide(activation_checkpointing=True).save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).config.activation_checkpointing


# ---------------------------------------------------------------- the slide encoder


def test_codes_are_rows_of_the_table():
    width, grid = 32, 6
    omega = 10_000.0 ** (-np.arange(width // 4) / (width / 4))
    for p in range(grid * grid):
        halves = [np.concatenate([np.sin(c * omega), np.cos(c * omega)]) for c in (p % grid, p // grid)]
        row = position_codes(torch.tensor([[p // grid, p % grid]]), width)
        assert np.abs(row[0].numpy() - np.concatenate(halves)).max() < 1e-7
    far = position_codes(torch.tensor([[999, 999], [0, 0]]), 768)
    assert far.shape == (2, 768) and far.dtype == torch.float32


def test_segment_lengths_that_do_not_divide_each_other():
    model, (x, coords) = slide(), tiles()
    whole = GigaPathConfig()
    assert whole.segment_lengths == (1024, 5792, 32768, 185363, 1048576) and whole.encoder.num_heads == 16
    attention = model.encoder.layers[0].self_attn
    q, k, v = (torch.randn(1, 61, 2, 16) for _ in range(3))
    options = dict(mixing="softmax", ragged="zeros")
    expected, _ = oracle_attention(q, k, v, SMALL["segment_lengths"], SMALL["dilation_rates"], **options)
    assert torch.allclose(attention.attention(q, k, v).double(), expected, atol=1e-5)
    assert model(x, coords).shape == (1, 32)


def test_options_of_the_slide_encoder_count():
    x, coords = tiles()
    options = {}, dict(global_pool=True), dict(ragged="mask"), dict(tile_size=200, check_layout=False)
    outs = [slide(**v)(x, coords) for v in options]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(outs) for b in outs[:i])
    assert not torch.allclose(slide(norm_eps=0.5)(x, coords), outs[0], atol=1e-4)
    far = coords + 256 * 9
    assert not torch.allclose(slide()(x, far), outs[0], atol=1e-5)
    with pytest.raises(ValueError, match="lie in"):
        slide(slide_ngrids=9)(x, far)
    training = slide().train()
    assert not torch.equal(training(x, coords), training(x, coords))
    calm = slide(dropout=0.0, drop_path_rate=0.0).train()
    assert torch.allclose(calm(x, coords), outs[0], atol=1e-6)
    assert slide(dropout=0.1, drop_path_rate=0.3).encoder.layers[1].drop_path == 0.3


def test_slides_of_a_batch_are_independent_and_gradients_flow():
    model, (x, coords) = slide(), tiles(batch=2)
    both = model(x, coords)
    assert torch.allclose(both[1], model(x[1:], coords[1:])[0], atol=1e-6)
    model(x, coords, all_layer_embed=True)[-1].square()[:, 0].sum().backward()  # the sum after a LayerNorm is constant
    for parameter in (model.patch_embed["proj"].weight, model.cls_token):
        assert parameter.grad.abs().max() > 1e-3  # far above what rounding makes of a gradient of 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    (x, coords), model = tiles(), slide()
    exact = model(x, coords)
    low = slide().to(dtype)(x.to(dtype), coords)
    assert low.dtype == dtype and (low.float() - exact).abs().max() < (1e-5 if dtype == torch.float64 else 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x, coords).float() - exact).abs().max() < 0.2


@pytest.mark.parametrize("pooled", [False, True])
def test_rollout_is_the_product_of_the_matrices(pooled):
    model, (x, coords) = slide(global_pool=pooled, ragged="mask"), tiles(batch=2)
    with torch.no_grad():
        states = list(model.encoder.states(model.embed(x, coords)))
        product = torch.eye(61)
        for layer, state in zip(model.encoder.layers, states):
            _, weights = layer.self_attn(layer.self_attn_layer_norm(state), need_weights=True)
            product = (torch.eye(61) + weights) / 2 @ product
    expected = (product[:, 1:].mean(1) if pooled else product[:, 0])[:, 1:]
    got = attention_rollout(model, x, coords)
    assert torch.allclose(got, expected / expected.sum(1, keepdim=True), atol=1e-6)
    assert got.shape == (2, 60) and not got.requires_grad and all(p.grad is None for p in model.parameters())
    with torch.inference_mode():
        assert torch.allclose(attention_rollout(model, x, coords), got, atol=1e-6)
    model.train()  # dropout stays out of it
    assert torch.allclose(attention_rollout(model, x, coords), got, atol=1e-6) and model.encoder.training


def test_strided_tiles_and_integer_coordinates():
    model, (x, coords) = slide(), tiles()
    turned = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in (x, coords)]
    assert torch.allclose(model(*turned), model(x, coords), atol=1e-5)  # another product of matrices
    assert torch.equal(model(x, coords.int()), model(x, coords))
    assert torch.equal(model(x, coords.double()), model(x, coords)) and model(x[:, :1], coords[:, :1]).shape == (1, 32)
    half = slide().half()(x.half(), coords)
    assert half.dtype == torch.float16 and (half.float() - model(x, coords)).abs().max() < 0.05


GRID = torch.cartesian_prod(torch.arange(20), torch.arange(15))[None] * 256.0
BAD_COORDS = [
    (GRID / GRID.max(), "300 tiles in"), (GRID / GRID.max() * 1000, "300 tiles in"), (GRID / 256, "300 tiles in"),
    (GRID * 2, "2 x 2 tiles"), (GRID * 4, "4 x 4 tiles"), (GRID * torch.tensor([2.0, 3.0]), "2 x 3 tiles"),
    (GRID * 2.15, "2.15 x 2.15 tiles"), ((GRID * 2.15).long(), "2.15 x 2.15 tiles"), (GRID * 1.5, "1.5 x 1.5 tiles"),
    ((GRID * 4 / 3).int(), "1.33 x 1.33 tiles"), (GRID * 0.75, "0.75 x 0.75 tiles"), (GRID * 0.5, "300 tiles in"),
    (GRID * torch.tensor([1.0, 2.0]), None), (GRID * 1.01, None), (GRID.flip(-1), None),
    (GRID.to(torch.int16), "int64"), (GRID.to(torch.uint8), "int64"), (GRID.to(torch.complex64), "int64"),
    (GRID.to("meta"), "hold numbers"), (GRID[:, :40].clone().fill_(0), "40 tiles in 1 cells"),
    (torch.rand(1, 60, 2, generator=torch.Generator().manual_seed(0)) * 90_000, None),
    (GRID * 60, "lie in"), (GRID - 1, "lie in"), (GRID * float("nan"), "lie in"), (GRID + float("inf"), "lie in"),
    (GRID[0], "be a tensor"), (GRID[..., :1], "be a tensor"), (GRID.tolist(), "be a tensor"), (GRID[:, :0], None),
    (GRID.half(), "int64"), (GRID.bool(), "int64"), (GRID.long(), None), (GRID.int() * 2, "2 x 2"),
    (GRID + 13.7, None), (GRID[:, ::7] * 2, "2 x 2"), (GRID[:, :8] * 2, None), (GRID[:, :15] * 1.5, None),
]  # fmt: skip


@pytest.mark.parametrize(("coords", "message"), BAD_COORDS)
def test_coordinates_that_cannot_be_meant_are_refused(coords, message):
    if message is None:
        assert tile_cells(coords).dtype == torch.int64
        return
    with pytest.raises((ValueError, TypeError), match=message):
        tile_cells(coords)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (dict(tile_size=0), "tile_size"), (dict(tile_size=256.5), "tile_size"), (dict(tile_size="256"), "tile_size"),
        (dict(slide_ngrids=-1), "slide_ngrids"), (dict(check_layout="no"), "check_layout"),
    ],
)  # fmt: skip
def test_arguments_of_tile_cells_are_checked(values, name):
    with pytest.raises((ValueError, TypeError), match=name):
        tile_cells(GRID, **values)


def test_arguments_of_position_codes_are_checked():
    for cells, width, message in ((GRID.long(), 6, "multiple of 4"), (GRID.long(), 0, "embed_dim"), (X, 8, "cells")):
        with pytest.raises(ValueError, match=message):
            position_codes(cells, width)


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 2.15, 3.0])
def test_scales_are_seen_through_rounding_and_missing_tiles(factor):
    "Level 0 of scanners with other resolutions, tiles in random order, two thirds of them missing."
    for seed in range(20):
        some = torch.randperm(300, generator=torch.Generator().manual_seed(seed))[:100]
        pixels = (GRID[:, some] * factor + 77).round()
        if factor == 1:
            assert tile_cells(pixels).shape == (1, 100, 2)
            continue
        with pytest.raises(ValueError, match=f"steps of {factor:.3g} x {factor:.3g} tiles"):
            tile_cells(pixels)


def test_the_layout_check_can_be_switched_off():
    for coords in (GRID / 10, GRID * 2):
        assert tile_cells(coords, check_layout=False).shape == GRID.shape
    x = torch.randn(1, 300, 24)
    assert slide(check_layout=False)(x, GRID / 10).shape == (1, 32)
    with pytest.raises(ValueError, match="cells of their own"):
        slide()(x, GRID / 10)


def test_random_parts_of_a_slide_pass_the_layout_check():
    for seed in range(20):
        some = torch.randperm(300, generator=torch.Generator().manual_seed(seed))[:40]
        assert tile_cells(GRID[:, some] + 100.0).shape == (1, 40, 2)


BAD_SLIDES = [
    (dict(x=torch.randn(60, 24)), "x must be a tensor"), (dict(x=torch.randn(1, 60, 25)), "x must be a tensor"),
    (dict(x=None), "x must be a tensor"), (dict(x=torch.randn(1, 0, 24)), "x must be a tensor"),
    (dict(x=np.zeros((1, 60, 24))), "x must be a tensor"), (dict(x=torch.zeros(0, 60, 24)), "x must be a tensor"),
    (dict(x=torch.zeros(1, 60, 24).long()), "float tensor"),
    (dict(x=torch.zeros(1, 60, 24).double()), "module's dtype"),
    (dict(x=torch.zeros(1, 60, 24).half()), "module's dtype"),
    (dict(x=torch.zeros(1, 60, 24, device="meta")), "device"),
    (dict(x=torch.randn(1, 59, 24)), "a row for each of"), (dict(x=torch.randn(2, 60, 24)), "a row for each of"),
    (dict(all_layer_embed=1), "all_layer_embed"), (dict(coords=None), "coords must be a tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_SLIDES)
def test_bad_slides_are_explained(change, message):
    x, coords = tiles()
    with pytest.raises((ValueError, TypeError), match=message):
        slide()(**dict(x=x, coords=coords) | change)


BAD_ARGUMENTS = [
    dict(in_chans=0), dict(embed_dim=30), dict(embed_dim=34), dict(depth=0), dict(num_heads=3), dict(ffn_dim=-1),
    dict(slide_ngrids=0), dict(tile_size=0), dict(tile_size=1.5), dict(segment_lengths=(8, 16)),
    dict(dilation_rates=(1, 2, 0)), dict(global_pool=1), dict(norm_eps=0), dict(dropout=1.0), dict(drop_path_rate=-1),
    dict(ragged="pad"), dict(ragged="error"), dict(check_layout=None),
]  # fmt: skip


@pytest.mark.parametrize("change", BAD_ARGUMENTS)
def test_bad_arguments_are_named(change):
    name = next(iter(change))
    with pytest.raises((ValueError, TypeError), match="embed_dim" if name in ("num_heads", "embed_dim") else name):
        GigaPathSlideEncoder(**SMALL | change)


# ---------------------------------------------------------------- as its clients use it


@pytest.mark.parametrize("max_wsi_size", [256, 4096, 65_536, 100_000, 262_144, 524_288])
@pytest.mark.parametrize("tile_size", [224, 256, 512, 1024])
def test_segments_follow_from_the_sizes(max_wsi_size, tile_size):
    "Five powers of 2, rounded down, their exponents evenly from 10 to int(log2(tiles))."
    tiles = (max_wsi_size // tile_size) ** 2
    if not tiles:
        with pytest.raises(ValueError, match=f"max_wsi_size must be at least tile_size {tile_size}"):
            slide_segment_lengths(max_wsi_size, tile_size)
        return
    exponents = np.linspace(10, int(np.log2(tiles)), 5)
    expected = tuple(int(2**e) for e in exponents)
    assert slide_segment_lengths(max_wsi_size, tile_size) == expected
    config = GigaPathConfig(max_wsi_size=max_wsi_size, tile_size=tile_size)
    assert config.segment_lengths == config.encoder.segment_lengths == expected
    assert replace(GigaPathConfig(), max_wsi_size=max_wsi_size, tile_size=tile_size) == config
    assert GigaPathConfig.from_json(config.to_json()) == config


def test_segments_that_are_given_stay():
    config = GigaPathConfig(segment_lengths=[8, 21], dilation_rates=(1, 2), tile_size=512)
    assert replace(config, tile_size=256).segment_lengths == (8, 21)
    with pytest.raises(ValueError, match="max_wsi_size must be left out beside other lengths"):
        replace(config, max_wsi_size=131_072)
    with pytest.raises(ValueError, match="segment_lengths"):
        GigaPathConfig(dilation_rates=(1, 2))  # five lengths follow


@pytest.mark.parametrize("size", [128, 200, 512])
def test_each_call_can_have_its_own_tile_size(size):
    x, coords = tiles(50)
    coords = coords * size / 256
    ours, other = slide(global_pool=True), slide(global_pool=True, tile_size=size)
    assert torch.equal(ours(x, coords, tile_size=size), other(x, coords))
    assert torch.equal(other(x, coords, tile_size=size), other(x, coords))
    assert torch.equal(attention_rollout(ours, x, coords, tile_size=size), attention_rollout(other, x, coords))
    with pytest.raises((ValueError, TypeError), match="tile_size"):
        ours(x, coords, tile_size=size + 0.5)
    with pytest.raises(AttributeError, match="pass tile_size= where you call the model"):
        ours.tile_size = size


def test_coordinates_of_one_slide_serve_a_batch():
    model, (x, coords) = slide(), tiles(batch=3)
    assert torch.equal(model(x, coords[0]), model(x, coords))
    assert torch.equal(model(x, coords[0].int(), all_layer_embed=True)[1], model(x, coords, all_layer_embed=True)[1])
    for wrong in (coords[0, :-1], coords[:2], coords[:1]):
        with pytest.raises(ValueError, match="a row for each of"):
            model(x, wrong)


@pytest.mark.parametrize("place", [(0.0, 0.0), (512.0, 768.0)])
@pytest.mark.parametrize("count", [2, 20])
def test_slides_filled_up_with_one_place_are_refused(place, count):
    filler = torch.tensor(place).expand(1, count, 2)
    for coords in (torch.cat((GRID, filler), 1), torch.cat((filler, GRID), 1)):
        with pytest.raises(ValueError, match=r"of them at \(.*mark padding in key_padding_mask"):
            tile_cells(coords)
        assert tile_cells(coords, check_layout=False).shape == coords.shape
    shuffled = torch.cat((GRID, torch.zeros(1, 2, 2)), 1)[:, torch.randperm(302, generator=torch.Generator())]
    with pytest.raises(ValueError, match=r"3 of them at \(0, 0\)"):
        tile_cells(shuffled)


def filled_up(side, sizes=(60, 23, 1), fill=float("nan")):
    "A batch of slides with padding on one side, or in between; and each slide alone."
    places = {"right": lambda n: torch.arange(n), "left": lambda n: torch.arange(60 - n, 60)}
    places["between"] = lambda n: torch.randperm(60, generator=torch.Generator().manual_seed(n))[:n].sort().values
    x, coords, mask = torch.full((len(sizes), 60, 24), fill), torch.full((len(sizes), 60, 2), fill), []
    alone = [tiles(n) for n in sizes]
    for row, (n, (some, where)) in enumerate(zip(sizes, alone)):
        x[row, places[side](n)], coords[row, places[side](n)] = some[0], where[0]
        mask.append(torch.ones(60, dtype=torch.bool).index_fill(0, places[side](n), False))
    return x, coords, torch.stack(mask), alone


@pytest.mark.parametrize("side", ["right", "left", "between"])
@pytest.mark.parametrize("values", [{}, dict(global_pool=True), dict(ragged="mask", global_pool=True)])
def test_slides_of_different_sizes_in_a_batch(side, values):
    "As each alone, in every layer and in the shares of its tiles, whatever stands at padding."
    model = slide(**values).double()  # so that sums over padded and unpadded rows agree to 1e-7
    x, coords, mask, alone = filled_up(side)
    x, alone = x.double().requires_grad_(), [(some.double(), where) for some, where in alone]
    out = model(x, coords, key_padding_mask=mask)
    layers = model(x, coords, all_layer_embed=True, key_padding_mask=mask)
    shares = attention_rollout(model, x, coords, key_padding_mask=mask)
    grads = torch.autograd.grad(out.square().sum(), (*model.parameters(), x))
    assert not shares[mask].any() and not grads[-1][mask].any()
    expected = [0.0] * (len(grads) - 1)
    for row, (some, where) in enumerate(alone):
        single = model(some, where)
        torch.testing.assert_close(out[row], single[0])
        torch.testing.assert_close(shares[row, ~mask[row]], attention_rollout(model, some, where)[0])
        for layer, other in zip(layers, model(some, where, all_layer_embed=True), strict=True):
            torch.testing.assert_close(layer[row], other[0])
        one = torch.autograd.grad(single.square().sum(), tuple(model.parameters()))
        expected = [a + b for a, b in zip(expected, one)]
    torch.testing.assert_close(grads[:-1], tuple(expected))


def test_masks_of_slides_are_checked():
    x, coords, mask, _ = filled_up("right", fill=0.0)
    mask[1] = True
    for wrong, message in ((mask, "none of slide 1"), (mask[:1], "shape"), (mask.long(), "bool"), ([True], "bool")):
        with pytest.raises((ValueError, TypeError), match=f"key_padding_mask must.*{message}"):
            slide()(x, coords, key_padding_mask=wrong)
    with pytest.raises(ValueError, match="steps of 2 x 2"):
        slide()(x, 2 * coords, key_padding_mask=filled_up("right")[2])


@pytest.mark.slow
def test_padded_slides_are_exported_and_compiled():
    model = slide(global_pool=True, depth=1)
    x, coords, mask, _ = filled_up("right", (20, 7), fill=0.0)
    x, coords, mask = x[:, :20], coords[:, :20], mask[:, :20]
    torch._dynamo.reset()
    program = torch.export.export(model, (x, coords, False, None, mask)).module()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for traced in (program, compiled):
        for masked in (mask, mask.flip(0)):
            given = (x, coords, False, None, masked)
            torch.testing.assert_close(traced(*given), slide(global_pool=True, depth=1, check_layout=False)(*given))


def test_recomputed_activations_give_the_same_gradients():
    x, coords = tiles(40)

    def gradients(**values):
        model = slide(**values).train()
        torch.manual_seed(1)  # of dropout
        model(x, coords).square().sum().backward()
        return [p.grad for p in model.parameters()]

    plain, again = gradients(), gradients(activation_checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert slide(activation_checkpointing=True).encoder.config.activation_checkpointing


def test_depths_of_parameters_can_be_told_from_names():
    "Rates of learning that decay with depth read `encoder.num_layers` and `encoder.layers.N` of each name."
    model = slide(depth=3)
    assert model.encoder.num_layers == 3
    numbers = {name.split(".")[2] for name, _ in model.named_parameters() if name.startswith("encoder.layers.")}
    assert numbers == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("check_layout", "dynamic"), [(True, True), pytest.param(False, False, marks=pytest.mark.slow)]
)
def test_the_slide_encoder_is_exported_and_compiled(check_layout, dynamic):
    model, (x, coords) = slide(check_layout=check_layout, depth=1), tiles(20, side=5)
    count = torch.export.Dim("count", min=2, max=4096)
    shapes = {"x": {1: count}, "coords": {1: count}} if dynamic else None
    program = torch.export.export(model, (x, coords), dynamic_shapes=shapes).module()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=dynamic)
    for n in (20, 13) if dynamic else (20,):
        for traced in (program, compiled):
            torch.testing.assert_close(traced(x[:, :n], coords[:, :n]), model(x[:, :n], coords[:, :n]))


def test_fake_slides_have_shapes():
    with FakeTensorMode():
        model, (x, coords) = slide(), tiles()
        assert model(x, coords).shape == (1, 32) and len(model(x, coords, all_layer_embed=True)) == 3


def run_slide(n, depth):
    torch.set_num_threads(1)
    model = GigaPathSlideEncoder(depth=max(depth, 1)).eval()
    if depth:
        with torch.no_grad():
            model(*tiles(n, 100, 1536))


def extra(n, depth):
    return peak_memory(run_slide, n, depth).peak - peak_memory(run_slide, n, 0).peak


@pytest.mark.slow
def test_ten_thousand_tiles_in_a_gibibyte():
    assert extra(10_000, 1) < 2**30  # of one layer: layers give back what they take


@pytest.mark.slow
def test_ten_thousand_tiles_through_twelve_layers_in_a_gibibyte():
    built = sum(p.numel() for p in GigaPathSlideEncoder().parameters()) * 4
    one = sum(p.numel() for p in GigaPathSlideEncoder(depth=1).parameters()) * 4
    assert extra(10_000, 12) - (built - one) < 2**30


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_come_back(tmp_path, dtype):
    tokens, (x, coords) = torch.randint(0, 256, (1, 40)), tiles()
    models = [encoder(LongNet, tie_embeddings=tie, num_kv_heads=2) for tie in (True, False)]
    models += [encoder(vocab_size=256, position="rope"), slide(global_pool=True)]
    for model in models:
        model = model.to(dtype)
        given = (x.to(dtype), coords) if isinstance(model, GigaPathSlideEncoder) else (tokens,)
        save_pretrained(model, tmp_path / "a" / "b")
        for load in (from_pretrained, type(model).from_pretrained):
            again = load(tmp_path / "a" / "b")
            assert type(again) is type(model) and again.config == model.config and not again.training
            assert torch.equal(again(*given), model(*given))
            assert all(p.requires_grad and p.dtype == dtype for p in again.parameters())
        assert sorted(os.listdir(tmp_path / "a" / "b")) == ["config.json", "model.safetensors"]
    again(*given).float().sum().backward()


def saved(folder):
    encoder(LongNet).save_pretrained(folder)
    return folder / "config.json", folder / "model.safetensors"


def test_truncated_checkpoints_are_refused(tmp_path):
    config, tensors = saved(tmp_path)
    whole = tensors.read_bytes()
    for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        tensors.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated"):
            LongNet.from_pretrained(tmp_path)
    tensors.write_bytes(whole)
    text = config.read_text()
    for size in (0, 1, len(text) // 2, len(text) - 1):
        config.write_text(text[:size])
        with pytest.raises(ValueError, match="truncated"):
            LongNet.from_pretrained(tmp_path)
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="no JSON"):
        LongNet.from_pretrained(tmp_path)
    torch.save({"model": STATE}, tmp_path / "a.pth")
    data = (tmp_path / "a.pth").read_bytes()
    for size in (0, 3, 100, len(data) // 2, len(data) - 100):
        (tmp_path / "a.pth").write_bytes(data[:size])
        with pytest.raises(ValueError, match="can't be read"):
            GigaPathSlideEncoder.from_pretrained(tmp_path / "a.pth", **SLIDE)


def test_missing_checkpoints_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="config.json"):
            LongNet.from_pretrained(path)
    saved(tmp_path)[1].unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        LongNet.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="slide_encoder.pth"):
        GigaPathSlideEncoder.from_pretrained(tmp_path / "slide_encoder.pth")


def test_configs_that_do_not_fit_are_explained(tmp_path):
    config, _ = saved(tmp_path)
    about = json.loads(config.read_text())
    wrong = {
        "no field 'embed_dims'": about | {"config": about["config"] | {"embed_dims": 3}},
        "head_dim": about | {"config": about["config"] | {"num_heads": 5}},
        "embed_tokens.weight has shape": about | {"config": about["config"] | {"vocab_size": 100}},
        "layers.2.*is missing": about | {"config": about["config"] | {"num_layers": 3}},
        "layers.1.*is unknown": about | {"config": about["config"] | {"num_layers": 1}},
        "'class'.*got 'Linear'": about | {"class": "Linear"},
        "'class'.*got None": [1, 2],
        "'class'.*LongNet": about | {"class": ["LongNet"]},
        "have 'class' and 'config' alone, got extra": about | {"extra": 1},
        "num_layers must be an integer": about | {"config": about["config"] | {"num_layers": "2"}},
        "be a dict": {"class": "LongNet"},
    }
    for field in about["config"]:  # a default need not be what the model was made with
        rest = {name: value for name, value in about["config"].items() if name != field}
        wrong[f"must have all fields of LongNetConfig, got no {field};"] = about | {"config": rest}
    for message, content in wrong.items():
        config.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            from_pretrained(tmp_path)
    config.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="holds a LongNet, not a LongNetEncoder"):
        LongNetEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config.json of its own"):
        GigaPathSlideEncoder.from_pretrained(tmp_path, depth=3)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "a.pth"
    for content, message in (
        (STATE | {"head.weight": X}, "head.weight is unknown"),
        ({k: v for k, v in STATE.items() if k != "norm.bias"}, "norm.bias is missing"),
        (STATE | {"cls_token": torch.zeros(1, 1, 64)}, r"cls_token has shape \(1, 1, 64\), the model's \(1, 1, 128\)"),
        ({k: v for k, v in STATE.items() if "encoder" not in k}, "and .* more"),
        ({"model": 3}, "no state dict"), ([X], "no state dict"), ({"epoch": 3, "x": X}, "no state dict"),
        (STATE | {"norm.bias": STATE["norm.bias"].long()}, "norm.bias is torch.int64"),
        (STATE | {"patch_embed.proj.weight": STATE["patch_embed.proj.weight"].to_sparse()}, "torch.sparse_coo"),
        ({"state_dict": STATE}, "no state dict"),
        ({"module." + k: v for k, v in STATE.items() if k != "cls_token"}, "cls_token is missing"),
        ({k: v for k, v in STATE.items()} | {"b." + k: v for k, v in STATE.items()}, "prefix must.*got '', 'b.'"),
    ):  # fmt: skip
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            GigaPathSlideEncoder.from_pretrained(path, **SLIDE)


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "a.pth").write_text("hello")
    save_file(STATE, tmp_path / "b.pth")
    torch.save(STATE, tmp_path / "c.safetensors")
    for name in ("a.pth", "b.pth", "c.safetensors"):
        with pytest.raises(ValueError, match="can't be read") as caught:
            GigaPathSlideEncoder.from_pretrained(tmp_path / name, **SLIDE)
        assert "weights_only" not in str(caught.value)  # torch advises to switch it off
    with pytest.raises(FileNotFoundError, match="download it first"):
        GigaPathSlideEncoder.from_pretrained("hf_hub:prov-gigapath/prov-gigapath")


def test_several_dtypes_become_the_widest(tmp_path):
    mixed = {name: x.half() if i % 2 else x for i, (name, x) in enumerate(STATE.items())}
    torch.save({"model": mixed}, tmp_path / "a.pth")
    model = GigaPathSlideEncoder.from_pretrained(tmp_path / "a.pth", **SLIDE)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model(X, COORDS).isfinite().all()
    torch.save({"model": {name: x.half() for name, x in STATE.items()}}, tmp_path / "b.pth")
    model = GigaPathSlideEncoder.from_pretrained(tmp_path / "b.pth", **SLIDE)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_models_that_their_config_does_not_describe_are_not_saved(tmp_path):
    model = encoder(LongNet)
    model.embed_tokens = NgramEmbedding(SEPARATOR + 1, 64, (2,), 64)
    with pytest.raises(ValueError, match="other parameters"):
        save_pretrained(model, tmp_path / "x")
    with pytest.raises(TypeError, match="be one of LongNet"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- nn.MultiheadAttention


def stack(layers=2, **values):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, **dict(batch_first=True, dropout=0.0) | values)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


FULL = DilatedAttentionConfig((24,), (1,))
SEEN = torch.arange(24) >= torch.tensor([[24], [17]])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "values", [{}, dict(norm_first=True, activation="gelu"), dict(bias=False), dict(batch_first=False)]
)
def test_one_full_branch_is_the_original(values, causal, padded, training):
    model = stack(**values).train(training)
    x = torch.randn(2, 24, 32)
    given = x if values.get("batch_first", True) else x.transpose(0, 1)
    mask = nn.Transformer.generate_square_subsequent_mask(24) if causal else None
    options = dict(mask=mask, is_causal=causal, src_key_padding_mask=SEEN if padded else None)
    expected = model(given, **options)
    names, parameters = list(model.state_dict()), list(model.parameters())
    replace_attention(model, FULL)
    got = model(given, **options)
    error = (got - expected).abs()
    error = error if values.get("batch_first", True) else error.transpose(0, 1)
    assert error[~SEEN if padded else ...].max() < 2e-6
    assert list(model.state_dict()) == names and all(a is b for a, b in zip(model.parameters(), parameters))


def test_dilation_takes_effect_in_eval_too():
    "PyTorch's fused layer and its nested tensors would bypass the attention."
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 1)
    twin = replace_attention(model, replace(FULL, segment_lengths=(6,))).eval()
    x = torch.randn(2, 24, 32)
    for padding in (None, SEEN):
        with torch.no_grad():
            whole = twin(x, src_key_padding_mask=padding)
            first = twin(x[:, :6], src_key_padding_mask=None if padding is None else padding[:, :6])
        assert torch.allclose(whole[:, :6], first, atol=1e-6)
    other = torch.cat((x[:, :6], torch.randn(2, 18, 32)), 1)
    with torch.no_grad():
        assert torch.equal(twin(other)[:, :6], twin(x)[:, :6])


def test_a_layer_in_several_places_stays_one():
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    shared = nn.MultiheadAttention(32, 4, batch_first=True)
    model = nn.ModuleDict({"layers": nn.ModuleList([layer, layer]), "a": shared, "b": shared})
    count = len(list(model.parameters()))
    replace_attention(model, FULL)
    assert isinstance(model["a"], DilatedMHA) and model["a"] is model["b"]
    assert isinstance(model["layers"][1].self_attn, DilatedMHA) and model["layers"][0] is model["layers"][1]
    assert len(list(model.parameters())) == count


def test_an_optimizer_made_before_still_trains_it():
    model = stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_attention(model, replace(FULL, segment_lengths=(6, 24), dilation_rates=(1, 2)))
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(2, 24, 32)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_it_is_dilated_attention():
    mha = nn.MultiheadAttention(32, 4, batch_first=True)
    config = DilatedAttentionConfig((6, 24), (1, 2), mixing="softmax")
    ours, x = replace_attention(mha, config), torch.randn(2, 24, 32)
    assert isinstance(ours, DilatedMHA) and isinstance(ours, nn.MultiheadAttention)
    q, k, v = (y.unflatten(2, (4, 8)) for y in (x @ mha.in_proj_weight.T + mha.in_proj_bias).chunk(3, -1))
    expected, _ = oracle_attention(q, k, v, (6, 24), (1, 2), mixing="softmax", is_causal=True)
    out, weights = ours(x, x, x, is_causal=True)
    assert torch.allclose(out.double(), mha.out_proj(expected.flatten(2).float()).double(), atol=1e-5)
    assert weights.shape == (2, 24, 24) and torch.allclose(weights.sum(-1), torch.ones(2, 24), atol=1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_weights_and_shapes_as_the_original(need_weights, average):
    for batch_first in (True, False):
        mha = nn.MultiheadAttention(32, 4, batch_first=batch_first).eval()
        ours = replace_attention(mha, FULL)
        x = torch.randn(2, 24, 32) if batch_first else torch.randn(24, 2, 32)
        for given, padding in ((x, SEEN), (x, None), (torch.randn(24, 32), None), (torch.randn(24, 32), SEEN[1])):
            options = dict(key_padding_mask=padding, need_weights=need_weights, average_attn_weights=average)
            out, weights = ours(given, given, given, **options)
            expected, expected_weights = mha(given, given, given, **options)
            real = (
                (torch.ones(2, 24).bool() if given.dim() == 3 else torch.ones(24).bool())
                if padding is None
                else ~padding
            )
            turned = given.dim() == 3 and not batch_first
            assert torch.allclose(out, expected * (real.T if turned else real)[..., None], atol=1e-6)  # 0 at padding
            assert (weights is None) == (expected_weights is None) == (not need_weights)
            if need_weights:
                rows = real[..., None] if average else real[..., None, :, None]
                assert torch.allclose(weights, expected_weights * rows, atol=1e-6)


def test_dropout_of_the_config_acts_in_training():
    model = replace_attention(stack(1), replace(FULL, dropout=0.5))
    x = torch.randn(2, 24, 32)
    assert not torch.equal(model.train()(x), model(x)) and torch.equal(model.eval()(x), model(x))


def test_dropout_of_a_layer_acts_in_training():
    config = replace(FULL, dropout=0.5)
    for model in (replace_attention(stack(1, dropout=0.5), FULL), replace_attention(stack(1, dropout=0.5), config)):
        assert model.layers[0].self_attn.dropout == 0.5
    x = torch.randn(2, 24, 32)
    ours = DilatedMHA(32, 4, dropout=0.5, batch_first=True, config=FULL)
    for p, padding in ((0.5, None), (0.5, SEEN), (0.0, None)):
        ours.dropout = p
        ours.train()
        torch.manual_seed(0)
        once, again = (ours(x, x, x, key_padding_mask=padding)[0] for _ in range(2))
        assert torch.equal(once, again) == (p == 0)
        ours.eval()
        assert torch.equal(*(ours(x, x, x, key_padding_mask=padding)[0] for _ in range(2)))


def test_two_dropouts_that_differ_are_refused():
    model = stack(1, dropout=0.1)
    with pytest.raises(ValueError, match="config.dropout must be 0 or the layer's 0.1, got 0.5"):
        replace_attention(model, replace(FULL, dropout=0.5))
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
        DilatedMHA(32, 4, dropout=1.0, config=FULL)


def test_a_replaced_layer_refuses_names_of_its_config():
    ours = replace_attention(nn.MultiheadAttention(32, 4), FULL)
    for name, value in dict(config=DILATED, ragged="mask", segment_lengths=(6,), mixing="softmax").items():
        with pytest.raises(AttributeError, match=f"{name} must be chosen when the module is made"):
            setattr(ours, name, value)


def test_masks_that_are_not_causal_are_refused():
    ours, x = replace_attention(nn.MultiheadAttention(32, 4, batch_first=True), FULL), torch.randn(2, 24, 32)
    causal = torch.ones(24, 24).triu(1).bool()
    wide = torch.zeros(24, 24).masked_fill(causal, float("-inf"))
    assert torch.equal(ours(x, x, x, attn_mask=causal)[0], ours(x, x, x, attn_mask=wide)[0])
    shifted = causal.roll(1, 1)
    for mask in (
        shifted,
        ~causal,
        wide + wide.isfinite(),
        causal[:5, :5],
        causal.expand(8, -1, -1),
        torch.zeros(24, 24),
    ):
        with pytest.raises(ValueError, match="attn_mask must be None or the causal mask"):
            ours(x, x, x, attn_mask=mask)
    with pytest.raises(ValueError, match="key_padding_mask"):
        ours(x, x, x, key_padding_mask=torch.rand(2, 24))
    with pytest.raises(ValueError, match="only self-attention"):
        ours(x, x[:, :12], x[:, :12])
    with pytest.raises(ValueError, match="not a multiple of segment length 24"):
        ours(x[:, :20], x[:, :20], x[:, :20])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.MultiheadAttention(32, 4, add_bias_kv=True), "add_bias_kv"),
        (lambda: nn.MultiheadAttention(32, 4, add_zero_attn=True), "add_zero_attn"),
        (lambda: nn.MultiheadAttention(32, 4, kdim=16), "kdim or vdim"),
        (lambda: nn.Linear(3, 3), "model must have a nn.MultiheadAttention"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), "model must have a nn.MultiheadAttention"),
    ],
)
def test_what_cannot_be_replaced_is_refused(make, message):
    model = nn.Sequential(nn.MultiheadAttention(32, 4), make()) if "model" not in message else make()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        replace_attention(model, FULL)
    assert [type(m) for m in model.modules()] == kinds
    with pytest.raises(ValueError, match="num_heads"):
        replace_attention(nn.MultiheadAttention(8, 1), DilatedAttentionConfig((4, 8), (1, 2)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(query=None), ValueError, "query must be a tensor"), (dict(key=[1]), ValueError, "key must be a tensor"),
        (dict(query=torch.zeros(2, 24, 16)), ValueError, "query must be a tensor"),
        (dict(value=torch.zeros(2, 24, 16)), ValueError, "value must be a tensor"),
        (dict(key=torch.zeros(24, 32)), ValueError, "key must have query's 3 dimensions"),
        (dict(query=torch.zeros(2, 24, 32).long()), TypeError, "query must be a floating-point tensor"),
        (dict(query=torch.zeros(32)), ValueError, "query must be"), (dict(is_causal=1), TypeError, "is_causal"),
        (dict(query=torch.zeros(1, 2, 24, 32)), ValueError, "query must be"),
        (dict(query=torch.zeros(2, 24, 32).double()), TypeError, "module's dtype"),
        (dict(key_padding_mask=torch.zeros(2, 24).long()), TypeError, "key_padding_mask"),
        (dict(key_padding_mask=[[False]]), TypeError, "key_padding_mask"),
        (dict(key_padding_mask=torch.zeros(2, 23).bool()), ValueError, "key_padding_mask"),
        (dict(attn_mask=[1]), ValueError, "attn_mask must be None"),
        (dict(key=torch.zeros(1, 24, 32)), ValueError, "key must have the shape of query"),
        (dict(value=torch.zeros(1, 24, 32), key_padding_mask=SEEN), ValueError, "value must have the shape of query"),
    ],
)  # fmt: skip
def test_bad_calls_of_the_module_are_explained(change, error, message):
    ours, x = replace_attention(nn.MultiheadAttention(32, 4, batch_first=True), FULL), torch.randn(2, 24, 32)
    with pytest.raises(error, match=message):
        ours(**dict(query=x, key=x, value=x) | change)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (None, FULL, "model"), (nn.TransformerEncoder, FULL, "model"), (nn.Linear(2, 2), None, "config"),
        (nn.Linear(2, 2), {"segment_lengths": (4,)}, "config"),
    ],
)  # fmt: skip
def test_arguments_of_replace_attention_are_checked(model, config, message):
    with pytest.raises(TypeError, match=message):
        replace_attention(model, config)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_replaced_models_in_other_dtypes(dtype):
    model, x = stack().eval(), torch.randn(2, 24, 32)
    exact = model(x)
    low = replace_attention(stack().eval().to(dtype), FULL)(x.to(dtype))
    assert low.dtype == dtype and (low.float() - exact).abs().max() < 0.1


def test_a_decoder_keeps_its_cross_attention():
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, dropout=0.0, batch_first=True), 1)
    x, memory = torch.randn(2, 24, 32), torch.randn(2, 7, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(24)
    expected = model(x, memory, tgt_mask=mask, tgt_is_causal=True)
    replace_attention(model, FULL)
    assert type(model.layers[0].multihead_attn) is nn.MultiheadAttention
    assert isinstance(model.layers[0].self_attn, DilatedMHA)
    assert torch.allclose(model(x, memory, tgt_mask=mask, tgt_is_causal=True), expected, atol=1e-6)


DILATED = replace(FULL, segment_lengths=(6, 24), dilation_rates=(1, 3), mixing="softmax", ragged="mask")


ZEROS = replace(DILATED, ragged="zeros")
PADDED = [DILATED, ZEROS, replace(ZEROS, segment_lengths=(5, 24), offsets="interleaved")]


@pytest.mark.parametrize("config", PADDED, ids=["mask", "zeros", "zeros whose rates don't divide"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_on_the_left_on_the_right_and_none(causal, config):
    model, x = replace_attention(stack(), config).eval(), torch.randn(1, 17, 32)
    alone = model(x, is_causal=causal, mask=torch.ones(17, 17).triu(1).bool() if causal else None)
    causal_mask = torch.ones(24, 24).triu(1).bool() if causal else None
    for start in (0, 7, 3):
        real = (torch.arange(24) >= start) & (torch.arange(24) < start + 17)
        padded = torch.full((1, 24, 32), float("nan")).index_copy(1, real.nonzero()[:, 0], x)
        padded.requires_grad_()
        model.zero_grad()
        out = model(padded, mask=causal_mask, is_causal=causal, src_key_padding_mask=~real[None])
        assert torch.allclose(out[:, real], alone, atol=1e-6)
        mha = model.layers[0].self_attn
        mha(*3 * [padded], key_padding_mask=~real[None], need_weights=False)[0].square().sum().backward()
        assert padded.grad.isfinite().all() and not padded.grad[:, ~real].any()
        assert all(p.grad.isfinite().all() for p in mha.parameters())


@pytest.mark.parametrize("config", PADDED, ids=["mask", "zeros", "zeros whose rates don't divide"])
def test_rows_of_nothing_but_padding(config):
    ours, x = replace_attention(nn.MultiheadAttention(32, 4, batch_first=True), config), torch.randn(2, 24, 32)
    nothing = torch.ones(2, 24).bool()
    for padding in (nothing, SEEN | torch.tensor([[False], [True]])):
        out, weights = ours(x, x, x, key_padding_mask=padding)
        assert not out[padding].any() and not weights[padding].any() and out.isfinite().all()


@pytest.mark.parametrize("config", PADDED, ids=["mask", "zeros", "zeros whose rates don't divide"])
def test_weights_of_padded_rows(config):
    ours, x = replace_attention(nn.MultiheadAttention(32, 4, batch_first=True), config), torch.randn(1, 17, 32)
    real = torch.arange(24) >= 7
    padded = torch.randn(1, 24, 32).index_copy(1, real.nonzero()[:, 0], x)
    for average in (True, False):
        alone = ours(x, x, x, average_attn_weights=average)[1]
        weights = ours(padded, padded, padded, key_padding_mask=~real[None], average_attn_weights=average)[1]
        assert torch.allclose(weights[..., real, :][..., real], alone, atol=1e-6) and not weights[..., ~real].any()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_replaced_encoder_is_compiled_as_a_whole(padded, causal):
    torch._dynamo.reset()
    model, x = replace_attention(stack(1), DILATED), torch.randn(2, 24, 32)
    mask = torch.ones(24, 24).triu(1).bool() if causal else None
    options = dict(mask=mask, is_causal=causal, src_key_padding_mask=SEEN if padded else None)
    out = torch.compile(model, backend="eager", fullgraph=True)(x, **options)
    assert torch.allclose(out, model(x, **options), atol=1e-6)
    torch._dynamo.reset()


def test_a_replaced_layer_is_exported_with_any_length():
    layer, n = replace_attention(stack(1), DILATED).eval().layers[0], torch.export.Dim("n", min=2, max=4096)
    shapes = {"src": {1: n}, "src_key_padding_mask": {1: n}}
    given = {"src": torch.randn(2, 24, 32), "src_key_padding_mask": SEEN}
    exported = torch.export.export(layer, (), given, dynamic_shapes=shapes, strict=False).module()
    for length in (24, 31):
        x, padding = torch.randn(2, length, 32), torch.arange(length) >= torch.tensor([[length], [17]])
        values = {"src": x, "src_key_padding_mask": padding}
        assert torch.allclose(exported(**values)[~padding], layer(**values)[~padding], atol=1e-6)


def test_a_traced_mask_must_be_said_to_be_causal():
    torch._dynamo.reset()
    ours, x = replace_attention(nn.MultiheadAttention(32, 4, batch_first=True), DILATED), torch.randn(2, 24, 32)
    traced, mask = torch.compile(ours, backend="eager"), torch.ones(24, 24).triu(1).bool()
    expected = ours(x, x, x, attn_mask=mask, need_weights=False)[0]
    assert torch.allclose(traced(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0], expected, atol=1e-6)
    with pytest.raises(Exception, match="is_causal=True in a traced forward"):
        torch.compile(ours, backend="eager", fullgraph=True)(x, x, x, attn_mask=mask, need_weights=False)
    torch._dynamo.reset()


def test_a_traced_forward_refuses_values_that_are_no_padding_and_not_causal():
    torch._dynamo.reset()
    ours, x = replace_attention(nn.MultiheadAttention(32, 4, batch_first=True), DILATED), torch.randn(2, 24, 32)
    causal, padding = torch.ones(24, 24).triu(1).bool(), torch.zeros(2, 24).masked_fill(SEEN, float("-inf"))
    good = dict(key_padding_mask=padding, attn_mask=causal, is_causal=True, need_weights=False)
    expected = ours(x, x, x, **good)[0]
    exported = torch.export.export(ours, (x, x, x), good, strict=False).module()
    for traced in (torch.compile(ours, backend="eager", fullgraph=True), exported):
        out = traced(x, x, x, **good)
        assert torch.allclose((out if isinstance(out, torch.Tensor) else out[0])[~SEEN], expected[~SEEN], atol=1e-6)
        for bad, name in (
            (dict(key_padding_mask=padding + 1), "key_padding_mask"),
            (dict(attn_mask=~causal), "attn_mask"),
        ):
            with pytest.raises(RuntimeError, match=f"{name} must be"):
                traced(x, x, x, **good | bad)
    with pytest.raises(ValueError, match="key_padding_mask must be bool"):
        torch.func.vmap(lambda p: ours(x[0], x[0], x[0], key_padding_mask=p)[0])(padding + 1)
    torch._dynamo.reset()


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(32, 2), nn.Linear(2, 32)

    weight, bias = property(lambda self: self.base.weight), property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_what_stands_in_for_the_last_projection_is_called():
    model, x = replace_attention(stack(1), DILATED), torch.randn(2, 24, 32)
    model.layers[0].self_attn.out_proj = Lora(model.layers[0].self_attn.out_proj)
    for training in (True, False):
        model.train(training).zero_grad()
        model(x, src_key_padding_mask=SEEN)[~SEEN].square().sum().backward()
        assert model.layers[0].self_attn.out_proj.up.weight.grad.abs().sum() > 0


def test_a_replaced_encoder_under_autocast():
    model, x = replace_attention(stack(1), DILATED), torch.randn(2, 24, 32)
    exact = model(x, src_key_padding_mask=SEEN)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, src_key_padding_mask=SEEN)
    out[~SEEN].float().square().sum().backward()
    assert (out - exact)[~SEEN].abs().max() < 0.1 and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_of_each_sample_of_a_replaced_encoder(padded):
    model, x = replace_attention(stack(1), DILATED), torch.randn(2, 24, 32)
    parameters, rows = dict(model.named_parameters()), SEEN if padded else torch.zeros(2, 24).bool()

    def loss(parameters, row, padding):
        options = dict(src_key_padding_mask=padding[None] if padded else None)
        out = torch.func.functional_call(model, parameters, (row[None],), options)[0]
        return (out.square().sum(1) * ~padding).sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, rows)
    for i in range(2):
        model.zero_grad()
        out = model(x[i : i + 1], src_key_padding_mask=rows[i : i + 1] if padded else None)
        out[0, ~rows[i]].square().sum().backward()
        assert all(torch.allclose(together[name][i], p.grad, atol=1e-4) for name, p in parameters.items())


# ---------------------------------------------------------------- transformers, absent


def test_nothing_imports_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import dilated_attention_nb as d\n"
        "[getattr(d, name) for name in d.__all__]\n"
        "try: d.register_with_transformers('dilated', d.DilatedAttentionConfig((4,), (1,)))\n"
        "except ImportError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.count("\n") == 1 and "pip install 'dilated-attention-nb[transformers]'" in out


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (dict(), TypeError, "config must be a DilatedAttentionConfig"),
        (dict(config=(4, 1)), TypeError, "config must be a DilatedAttentionConfig"),
        (dict(config=replace(FULL, dropout=0.1)), ValueError, "attention_dropout"),
    ],
)
def test_register_checks_its_config_first(values, error, message):
    with pytest.raises(error, match=message):
        register_with_transformers(**values)
