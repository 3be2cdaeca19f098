"Padding is an absence in models: left, right and no padding are the same numbers, and packed documents are alone."

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from dilated_attention_nb.embeddings import NgramEmbedding
from dilated_attention_nb.longnet import LayerStack, LongNet, LongNetEncoder, longnet_tiny
from dilated_attention_nb.multihead import create_multihead_dilated_attention

LENGTHS = (40, 23, 1, 40)
PLACES = 53


def padding(side):
    "A mask `[4, 53]` whose rows have `LENGTHS` real tokens."
    at, lengths = torch.arange(PLACES), torch.tensor(LENGTHS)[:, None]
    if side == "left":
        return at < PLACES - lengths
    if side == "right":
        return at >= lengths
    order = torch.rand(len(LENGTHS), PLACES, generator=torch.Generator().manual_seed(0)).argsort(1)
    return order >= lengths  # anywhere


def make(cls=LongNet, seed=0, **values):
    torch.manual_seed(seed)
    return cls(longnet_tiny(**values)).double().eval()


def rows(seed=0, width=None):
    generator = torch.Generator().manual_seed(seed)
    if width is None:
        return [torch.randint(256, (1, n), generator=generator) for n in LENGTHS]
    return [torch.randn(1, n, width, generator=generator, dtype=torch.float64) for n in LENGTHS]


def padded(parts, mask, fill):
    whole = torch.full((*mask.shape, *parts[0].shape[2:]), fill, dtype=parts[0].dtype)
    for row, pad, part in zip(whole, mask, parts):
        row[~pad] = part[0]
    return whole


SIDES = ["left", "right", "anywhere"]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "values",
    [
        dict(), dict(position="rope", mixing="groups", num_kv_heads=2), dict(ragged="zeros", position="none"),
        dict(attention="standard"), dict(segment_lengths=(7, 30), dilation_rates=(3, 4), ragged="zeros"),
    ],
    ids=["softmax", "groups", "zeros", "standard", "rates that do not divide"],
)  # fmt: skip
def test_padding_changes_nothing_for_the_rest(side, values):
    model, mask, parts = make(**values), padding(side), rows()
    x = padded(parts, mask, 777)  # no token of this vocabulary
    logits = model(x, key_padding_mask=mask)
    states = model.hidden(x, mask)
    assert not logits[mask].any() and not states[mask].any()
    for row, pad, part in zip(logits, mask, parts):
        torch.testing.assert_close(row[~pad], model(part)[0])
    for narrow in (x.to(torch.int16), x.to(torch.int32)):
        assert torch.equal(model(narrow, key_padding_mask=mask), logits)


@pytest.mark.parametrize("side", SIDES)
def test_losses_and_gradients_of_padded_rows(side):
    model, mask = make(tie_embeddings=False), padding(side)
    x, t = padded(rows(), mask, 0), padded(rows(1), mask, 999)
    losses = model(x, t, mask, reduction="none")
    mean = model(x, t, mask)
    found = torch.autograd.grad(mean, model.parameters())
    alone = [model(a, b, reduction="none")[0] for a, b in zip(rows(), rows(1))]
    assert not losses[mask].any()
    torch.testing.assert_close(torch.cat([row[~pad] for row, pad in zip(losses, mask)]), torch.cat(alone))
    want = torch.autograd.grad(torch.cat(alone).mean(), model.parameters())
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("cls", [LayerStack, LongNetEncoder])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("ragged", ["mask", "zeros"])
def test_nan_and_infinity_under_padding_reach_nobody(cls, side, is_causal, ragged):
    model, mask = make(cls, position="rope", ragged=ragged), padding(side)
    parts = rows(width=64)
    for fill in (float("nan"), float("inf"), 1e300):
        x = padded(parts, mask, fill).requires_grad_()
        out = model(x, mask, is_causal)
        assert not out[mask].any()
        for row, pad, part in zip(out, mask, parts):
            torch.testing.assert_close(row[~pad], model(part, is_causal=is_causal)[0])
        gradients = torch.autograd.grad(out.square().sum(), (x, *model.layers.parameters()))
        assert all(g.isfinite().all() for g in gradients) and not gradients[0][mask].any()
    states = list(model.states(x, mask, is_causal))
    for i, part in enumerate(parts):
        for state, want in zip(states, model.states(part, is_causal=is_causal)):
            torch.testing.assert_close(state[i][~mask[i]], want[0])


def test_rows_without_a_token():
    model, x = make(), torch.randint(256, (3, 20))
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[1] = True
    out = model(x, key_padding_mask=mask)
    assert not out[1].any()
    torch.testing.assert_close(out[2], model(x[2:])[0])
    nothing = model(x, key_padding_mask=mask | True)
    assert nothing.shape == (3, 20, 256) and not nothing.any()
    loss = model(x, x, mask | True)
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_documents_are_alone(dtype):
    ends = torch.tensor([0, 0, 40, 63, 64, 104], dtype=dtype)  # the first is empty
    model, encoder, stack = make(), make(LongNetEncoder, position="rope"), make(LayerStack)
    x, t = torch.cat(rows(), 1), torch.cat(rows(1), 1)
    h = torch.cat(rows(width=64), 1)
    pieces = [slice(a, b) for a, b in pairwise(ends.tolist()) if b > a]
    whole = {
        "logits": model(x, cu_seqlens=ends), "losses": model(x, t, reduction="none", cu_seqlens=ends),
        "hidden": model.hidden(x, cu_seqlens=ends), "encoder": encoder(x, cu_seqlens=ends),
        "stack": stack(h, is_causal=True, cu_seqlens=ends), "states": list(encoder.states(h, cu_seqlens=ends))[1],
    }  # fmt: skip
    for piece in pieces:
        x1, t1, h1 = x[:, piece], t[:, piece], h[:, piece]
        alone = {
            "logits": model(x1), "losses": model(x1, t1, reduction="none"), "hidden": model.hidden(x1),
            "encoder": encoder(x1), "stack": stack(h1, is_causal=True), "states": list(encoder.states(h1))[1],
        }  # fmt: skip
        for name, want in alone.items():
            torch.testing.assert_close(whole[name][:, piece], want, msg=name)
    torch.testing.assert_close(model(x, t, cu_seqlens=ends), whole["losses"].mean())


@pytest.mark.parametrize("kind", ["improved", "standard"])
def test_packed_documents_in_a_layer(kind):
    torch.manual_seed(0)
    layer = create_multihead_dilated_attention(
        kind, embed_dim=32, num_heads=4, segment_lengths=(8, 32), dilation_rates=(1, 4), ragged="mask",
        mixing="softmax", dtype=torch.float64,
    )  # fmt: skip
    x, ends = torch.randn(1, 50, 32, dtype=torch.float64), torch.tensor([0, 21, 50])
    out, weights = layer(x, need_weights=True, cu_seqlens=ends, is_causal=True)
    for piece in (slice(0, 21), slice(21, 50)):
        want, want_weights = layer(x[:, piece], need_weights=True, is_causal=True)
        torch.testing.assert_close(out[:, piece], want)
        torch.testing.assert_close(weights[:, piece, piece], want_weights)
    assert not weights[:, :21, 21:].any() and not weights[:, 21:, :21].any()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["ring", "block_sparse", "block_sparse_ring"])
def test_other_kinds_take_documents_one_by_one(kind, is_causal):
    layer = create_multihead_dilated_attention(
        kind, embed_dim=32, num_heads=4, segment_lengths=(16, 32), dilation_rates=(1, 2), ragged="mask"
    ).double()
    x, ends = torch.randn(1, 32, 32, dtype=torch.float64), [0, 12, 12, 32]
    out = layer(x, cu_seqlens=torch.tensor(ends), is_causal=is_causal)[0]
    alone = [layer(x[:, a:b], is_causal=is_causal)[0] for a, b in ((0, 12), (12, 32))]
    assert (out - torch.cat(alone, 1)).abs().max() < 1e-13


def test_attention_of_unknown_kinds_refuses_documents():
    model = make()
    model.decoder.layers[1].self_attn.attention = torch.nn.Identity()
    with pytest.raises(ValueError, match="cu_seqlens must be None, got documents for Identity"):
        model(torch.zeros(1, 32, dtype=torch.long), cu_seqlens=torch.tensor([0, 32]))


@pytest.mark.parametrize("side", ["right", "left"])
def test_attention_of_other_kinds_keeps_padding_in_its_place(side):
    "Nothing reaches the rest there either."
    model, mask = make(LongNetEncoder, position="none"), padding(side)[:2]
    sparse = dict(segment_lengths=(16, 64), dilation_rates=(1, 4), ragged="mask", block_size=16, sparsity_ratio=0.5)
    other = create_multihead_dilated_attention("block_sparse", embed_dim=64, num_heads=4, **sparse)
    for layer in model.layers:
        layer.self_attn.attention = other.attention
    parts = rows(width=64)[:2]
    outs = [model(padded(parts, mask, fill), mask) for fill in (float("nan"), 3.0)]
    assert outs[0].isfinite().all() and torch.equal(*outs)


BAD = {
    "beside padding": ("key_padding_mask must be None", dict(key_padding_mask=torch.zeros(1, 9).bool())),
    "not to the end": ("cu_seqlens must go from 0 to the 9 tokens", dict(cu_seqlens=torch.tensor([0, 4]))),
    "backwards": ("cu_seqlens must go from 0", dict(cu_seqlens=torch.tensor([0, 5, 3, 9]))),
    "not a tensor": ("cu_seqlens must be a tensor", dict(cu_seqlens=[0, 9])),
    "last": ("last must be None there", dict(last=1)),
}


@pytest.mark.parametrize("case", BAD)
def test_documents_that_cannot_be_meant(case):
    text, change = BAD[case]
    with pytest.raises((ValueError, TypeError), match=text):
        make()(torch.zeros(1, 9, dtype=torch.long), **(dict(cu_seqlens=torch.tensor([0, 9])) | change))
    with pytest.raises(ValueError, match="batch 1"):
        make()(torch.zeros(2, 9, dtype=torch.long), cu_seqlens=torch.tensor([0, 9]))


@pytest.mark.parametrize("packed", [False, True])
def test_embeddings_with_a_context_do_not_look_beyond_their_document(packed):
    model = make()
    torch.manual_seed(0)
    model.embed_tokens = NgramEmbedding(256, 64, (2, 4), 64).double()
    x = torch.cat(rows(), 1) if packed else padded(rows(), padding("anywhere"), 7)
    out = model(x, cu_seqlens=torch.tensor([0, 40, 63, 64, 104])) if packed else model(x, None, padding("anywhere"))
    found = out[0].split(LENGTHS) if packed else [row[~pad] for row, pad in zip(out, padding("anywhere"))]
    for part, row in zip(rows(), found):
        torch.testing.assert_close(row, model(part)[0])


def test_paths_are_dropped_by_document():
    torch.manual_seed(0)
    stack = LayerStack(longnet_tiny(num_layers=2, drop_path=0.5, position="none")).double()
    layer, x = stack.layers[1], torch.ones(1, 3000, 64, dtype=torch.float64)
    ends = torch.arange(0, 3001, 3)
    added = layer._dropped(x, ends)[0].unflatten(0, (1000, 3))
    stays = added.flatten(1).any(1)
    assert torch.equal(added[stays], torch.full_like(added[stays], 2.0)) and abs(stays.double().mean() - 0.5) < 0.08


# ---------------------------------------------------------------- traced


@pytest.mark.parametrize("cls", [LongNet, LongNetEncoder])
def test_padded_and_compiled(cls):
    torch._dynamo.reset()
    model, mask = make(cls, position="rope"), padding("left")
    x = padded(rows(), mask, 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, key_padding_mask=mask), model(x, key_padding_mask=mask))
    if cls is LongNet:
        t = padded(rows(1), mask, 5)
        torch.testing.assert_close(compiled(x, t, mask), model(x, t, mask))


def test_packed_and_exported():
    "Tokens behind the last document, which only traced code can meet, count for nothing."

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make()

        def forward(self, x, t, ends):
            return self.model(x, t, cu_seqlens=ends)

    loss, x, t = Loss(), torch.cat(rows(), 1), torch.cat(rows(1), 1)
    program = torch.export.export(loss, (x, t, torch.tensor([0, 40, 63, 104])), strict=False).module()
    torch.testing.assert_close(
        program(x, t, torch.tensor([0, 50, 60, 104])), loss(x, t, torch.tensor([0, 50, 60, 104]))
    )
    short = copy.deepcopy(loss)(x[:, :60], t[:, :60], torch.tensor([0, 50, 60]))
    torch.testing.assert_close(program(x, t, torch.tensor([0, 50, 60, 60])), short)
