"""`MultiHeadAttentionWrapper`: against loops and PyTorch with masks of every shape, one per head too; refusals; modes."""
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import assert_parity_with_parameters, lively, looped_layer, multihead_state, stacked
from torch import nn
from torch.testing import assert_close

from attn_nb.causal import causal_mask, mask_from_mha, mask_to_bias, padding_mask
from attn_nb.dropout import CausalAttention
from attn_nb.multi_head_wrapper import MultiHeadAttentionWrapper
from attn_nb.testing import TOLERANCE, assert_as_precise, assert_causal, assert_eval_deterministic, assert_rows_sum_to_one

HEADS = 2                     # unequal sizes: B, H, T, Dh = 3, 2, 5, 4, and d_in = 6
REAL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
SHAPES = [(), (5,), (1, 5), (5, 1), (5, 5), (1, 5, 5), (2, 5, 5), (2, 1, 5), (2, 5, 1), (2, 1, 1), (3, 1, 1, 5), (1, 2, 5, 5),
          (3, 1, 5, 5), (3, 2, 1, 1), (3, 2, 5, 5)]


def layer_and_x(p=0.0, bias=True, length=8, dtype=torch.float64):
    layer = lively(MultiHeadAttentionWrapper(6, 4, length, p, HEADS, qkv_bias=bias)).to(dtype)
    return layer, torch.randn(3, 5, 6, dtype=dtype)


def output(layer, x, mask=None, weights_too=False):
    out = layer(x, attn_mask=mask, return_weights=weights_too)
    return out[0] if weights_too else out


def random_mask(shape, kind):
    """Bits, or numbers of which some are -inf; the first entry always allows."""
    may = torch.rand(shape) > 0.3
    may.view(-1)[:1] = True
    return may if kind == "bool" else torch.randn(shape).double().masked_fill(~may, -torch.inf)


def first(out):
    return out[0]


# --- the same numbers as others

@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", [None, *SHAPES])
def test_heads_one_by_one_with_masks_of_every_shape(shape, kind):
    """Outputs and gradients, of parameters too, are those of a plain loop, on both roads."""
    (layer, x), mask = layer_and_x(bias=kind == "bool"), None if shape is None else random_mask(shape, kind)

    def loop(state, x):
        return looped_layer(stacked(state, HEADS), HEADS, x, x, x, mask, causal=True)

    assert_parity_with_parameters(layer, loop, x, attn_mask=mask)
    assert_parity_with_parameters(layer, loop, x, attn_mask=mask, return_weights=True, pick=first)
    out, weights = layer(x, attn_mask=mask, return_weights=True)
    assert weights.shape == (3, HEADS, 5, 5)
    may = causal_mask(5) if mask is None else causal_mask(5) & (mask if kind == "bool" else mask > -torch.inf)
    assert_rows_sum_to_one(weights, may)
    alone = []
    for h, head in enumerate(layer.heads):
        own = None if mask is None else mask.expand(3, HEADS, 5, 5)[:, h:h + 1]
        alone.append(head(x, attn_mask=own, return_weights=True))
        assert_close(weights[:, h], alone[-1][1], rtol=0, atol=0)
    assert_close(out, torch.cat([a for a, _ in alone], -1), rtol=0, atol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masks", ["causal", "2-D", "3-D", "padding", "numbers"])
def test_equals_multihead_attention(masks, bias):
    """Heads side by side are the library's layer with the identity after it; scores are far from 0, wrong layers far off."""
    layer, x = lively(MultiHeadAttentionWrapper(8, 4, 5, 0.0, HEADS, bias)).double(), torch.randn(3, 5, 8).double()
    scores = layer.heads[0].q_proj(x) @ layer.heads[0].k_proj(x).mT / 2
    assert scores.std() > 1
    theirs = nn.MultiheadAttention(8, HEADS, bias=bias, batch_first=True).double()
    drop, pad = torch.rand((3 * HEADS, 5, 5) if masks == "3-D" else (5, 5)) > 0.6, REAL.flip(1) == 0
    drop.diagonal(dim1=-2, dim2=-1).fill_(False), pad[:, 0].fill_(False)
    future = ~causal_mask(5)
    if masks == "causal":
        mine, their_masks = None, {"attn_mask": future}
    elif masks == "padding":
        mine, their_masks = mask_from_mha(key_padding_mask=pad), {"attn_mask": future, "key_padding_mask": pad}
    elif masks == "numbers":
        mine = torch.randn(3, HEADS, 5, 5).double()
        their_masks = {"attn_mask": mine.masked_fill(future, -torch.inf).flatten(0, 1)}
    else:
        mine, their_masks = mask_from_mha(drop, num_heads=HEADS), {"attn_mask": drop | future}

    def library(i, flip=False, **options):
        def run(state, x):
            state = stacked({name.translate({48: "1", 49: "0"} if flip else {}): w for name, w in state.items()}, HEADS)
            every = {"average_attn_weights": False, **their_masks, **options}
            return torch.func.functional_call(theirs, multihead_state(state, 8), (x, x, x), every)[i]
        return run

    assert_parity_with_parameters(layer, library(0), x, attn_mask=mine)
    assert_parity_with_parameters(layer, library(0, need_weights=False), x, attn_mask=mine)
    assert_parity_with_parameters(layer, library(1), x, attn_mask=mine, return_weights=True, pick=lambda out: out[1])
    right, state = output(layer, x, mine), layer.state_dict()
    for wrong in (library(0, flip=True)(state, x), library(0, attn_mask=None, key_padding_mask=None)(state, x)):
        assert (right - wrong).abs().max() > 100 * TOLERANCE[torch.float64]
    if masks in ("2-D", "3-D"):
        assert (right - output(layer, x, ~mine)).abs().max() > 100 * TOLERANCE[torch.float64]


@given(data=st.data(), batch=st.integers(1, 3), heads=st.integers(1, 3), length=st.integers(1, 4), weights_too=st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_sizes_and_masks_are_the_loop(data, batch, heads, length, weights_too):
    """Also where the number of heads equals the batch or the length, so that only the place of an axis tells them apart."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    sizes = batch, heads, length, length
    shape = tuple(data.draw(st.sampled_from([1, n])) for n in sizes)[data.draw(st.integers(0, 4)):]
    mask = random_mask(shape, data.draw(st.sampled_from(["bool", "float"])))
    layer, x = lively(MultiHeadAttentionWrapper(3, 2, 4, 0.5, heads, True)).double().eval(), torch.randn(batch, length, 3)
    x = x.double()
    want = looped_layer(stacked(layer.state_dict(), heads), heads, x, x, x, mask, causal=True)
    assert_close(output(layer, x, mask, weights_too), want, rtol=0, atol=1e-9)


INPUTS = torch.tensor([[0.43, 0.15, 0.89], [0.55, 0.87, 0.66], [0.57, 0.85, 0.64],
                       [0.22, 0.58, 0.33], [0.77, 0.25, 0.10], [0.05, 0.80, 0.55]])


def test_reproduces_the_numbers_printed_in_a_book():
    """Raschka, Build a Large Language Model (From Scratch), 2024, section 3.6.1: seed 123, two heads of width 2."""
    torch.manual_seed(123)
    layer = MultiHeadAttentionWrapper(3, 2, 6, 0.0, num_heads=2)
    printed = torch.tensor([[-0.4519, 0.2216, 0.4772, 0.1063], [-0.5874, 0.0058, 0.5891, 0.3257],
                            [-0.6300, -0.0632, 0.6202, 0.3860], [-0.5675, -0.0843, 0.5478, 0.3589],
                            [-0.5526, -0.0981, 0.5321, 0.3428], [-0.5299, -0.1081, 0.5077, 0.3493]])
    assert_close(layer(torch.stack([INPUTS, INPUTS])), printed.expand(2, 6, 4), rtol=0, atol=5.1e-5)


def test_heads_are_created_one_after_another():
    torch.manual_seed(7)
    layer = MultiHeadAttentionWrapper(6, 4, 8, 0.1, 3, qkv_bias=True)
    torch.manual_seed(7)
    for head in layer.heads:
        for name, want in CausalAttention(6, 4, 8, 0.1, qkv_bias=True).state_dict().items():
            assert torch.equal(head.state_dict()[name], want)
    assert len({id(head) for head in layer.heads}) == 3


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_names_and_sizes(bias):
    layer = MultiHeadAttentionWrapper(6, 4, 10_000, 0.1, 3, bias)
    ends = [("weight", (4, 6)), ("bias", (4,))][:1 + bias]
    assert [(name, tuple(p.shape)) for name, p in layer.state_dict().items()] == [
        (f"heads.{h}.{p}_proj.{end}", shape) for h in range(3) for p in "qkv" for end, shape in ends]
    assert [*dict(layer.named_parameters())] == [*layer.state_dict()] and not list(layer.buffers())


# --- each head its own mask

@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("lead", [(), (1,), (3,)])
def test_a_mask_of_one_head_moves_that_head_only(lead, weights_too):
    layer, x = layer_and_x()
    plain = output(layer, x, None, weights_too)
    for h in range(HEADS):
        mask = torch.ones(*lead, HEADS, 5, 5).bool()
        mask[..., h, 1:, 0] = False
        moved = (output(layer, x, mask, weights_too) - plain).abs() > 1e-6
        assert not moved[..., 0, :].any() and moved[:, 1:].unflatten(-1, (HEADS, 4))[..., h, :].all()
        assert not moved.unflatten(-1, (HEADS, 4))[..., 1 - h, :].any()


def test_large_numbers_of_heads_are_compared_by_value():
    layer, x = MultiHeadAttentionWrapper(2, 1, 3, 0.0, 300), torch.randn(1, 3, 2)
    mask = torch.rand(300, 3, 3) > 0.3
    assert torch.equal(layer(x, attn_mask=mask)[..., 299:], layer.heads[299](x, attn_mask=mask[299]))


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("shape", [None, (5, 5), (2, 5, 5), (3, 1, 1, 5), (3, 2, 5, 5)])
def test_the_future_never_arrives(shape, weights_too):
    (layer, x), mask = layer_and_x(), None if shape is None else torch.ones(shape).bool()
    assert_causal(lambda x: output(layer, x, mask, weights_too), x)
    if mask is not None:
        noise = torch.randn(shape).double()
        assert_causal(lambda x: output(layer, x, noise, weights_too), x)


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_empty_rows_give_0_and_no_gradient(additive, weights_too):
    """In one head token 2 sees nothing; in row 0 of the batch tokens 0 and 1 see nothing in both."""
    layer, x = layer_and_x()
    mask = padding_mask(REAL).repeat(1, HEADS, 5, 1)
    mask[:, 1, 2] = False
    mask = mask_to_bias(mask, torch.float64) if additive else mask
    x.requires_grad_()
    out = output(layer, x, mask, weights_too).unflatten(-1, (HEADS, 4))
    empty = torch.zeros(3, 5, HEADS).bool()
    empty[0, :2], empty[:, 2, 1] = True, True
    assert torch.equal(~out.any(-1), empty)
    gradient, = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
    assert gradient.isfinite().all() and not gradient[0, :2].any() and gradient[1:, :3].any(-1).all()
    gradients = torch.autograd.grad(out[empty].sum(), [x, *layer.parameters()], materialize_grads=True, allow_unused=True)
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("garbage", [3e38, -3e38])
def test_pads_may_hold_anything_finite(garbage):
    layer, x = layer_and_x(dtype=torch.float32)
    dirty, mask = x.masked_fill(REAL[..., None] == 0, garbage), padding_mask(REAL)
    for mask in (mask, mask.repeat(1, HEADS, 1, 1), mask_to_bias(mask, torch.float32)):
        for weights_too in (False, True):
            got, want = output(layer, dirty, mask, weights_too), output(layer, x, mask, weights_too)
            assert_close(got[REAL == 1], want[REAL == 1])


@pytest.mark.parametrize("mask, error, words", [
    (REAL.bool(), ValueError, "attn_mask"),
    (torch.ones(3, 5, 5).bool(), ValueError, "attn_mask"),
    (torch.ones(4, 5).bool(), ValueError, "attn_mask"),
    (torch.ones(5, 6), ValueError, "attn_mask"),
    (torch.ones(4, 5, 5), ValueError, "attn_mask"),
    (torch.ones(2, 2, 5, 5), ValueError, "attn_mask"),
    (torch.ones(3, 3, 5, 5), ValueError, "attn_mask"),
    (torch.ones(1, 3, 2, 5, 5), ValueError, "attn_mask"),
    (padding_mask(REAL).long(), TypeError, "attn_mask"),
    ([[True]], TypeError, "attn_mask"),
    (torch.ones(5, 5, device="meta").bool(), TypeError, "attn_mask"),
])
@pytest.mark.parametrize("weights_too", [False, True])
def test_wrong_masks_are_refused(mask, error, words, weights_too):
    layer, x = layer_and_x()
    with pytest.raises(error, match=rf"\b{words}\b"):
        layer(x, attn_mask=mask, return_weights=weights_too)


# --- shapes, lengths, refusals

@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 1, 2), (0,), (2, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_any_leading_axes(lead, masked):
    (layer, _), x = layer_and_x(), torch.randn(*lead, 5, 6).double()
    rows = x.reshape(-1, 5, 6)
    mask = torch.rand(len(rows), HEADS, 5, 5) > 0.3 if masked else None
    out, weights = layer(x, attn_mask=mask, return_weights=True)
    assert out.shape == (*lead, 5, 8) and weights.shape == (*lead, HEADS, 5, 5)
    assert_close(output(layer, x, mask), out, rtol=0, atol=1e-9)
    want = [layer(row, attn_mask=None if mask is None else mask[n], return_weights=True) for n, row in enumerate(rows)]
    for n, (a, b) in enumerate(want):
        assert_close(out.reshape(-1, 5, 8)[n], a, rtol=0, atol=1e-9)
        assert_close(weights.reshape(-1, HEADS, 5, 5)[n], b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("length", [0, 1, 4, 5, 6])
def test_any_length_up_to_the_context(length):
    (layer, _), x = layer_and_x(length=5), torch.randn(3, length, 6).double()
    for mask in (None, torch.ones(HEADS, length, length).bool()):
        if length > 5:
            with pytest.raises(ValueError, match=r"\bcontext_length\b"):
                layer(x, attn_mask=mask)
        else:
            assert layer(x, attn_mask=mask).shape == (3, length, 8)


@pytest.mark.parametrize("arguments, error, words", [
    ((0, 4, 8, 0.1, 2), ValueError, "d_in"),
    ((6, 0, 8, 0.1, 2), ValueError, "d_out"),
    ((6, 4, 0, 0.1, 2), ValueError, "context_length"),
    ((6, 4, 8, 0.1, 0), ValueError, "num_heads"),
    ((6, 4, 8, 0.1, -2), ValueError, "num_heads"),
    ((6.0, 4, 8, 0.1, 2), TypeError, "d_in"),
    ((6, "4", 8, 0.1, 2), TypeError, "d_out"),
    ((6, 4, None, 0.1, 2), TypeError, "context_length"),
    ((6, 4, 8, 0.1, 2.0), TypeError, "num_heads"),
    ((6, 4, 8, 0.1, True), TypeError, "num_heads"),
    ((6, 4, 8, 2, 1), ValueError, "dropout"),
    ((6, 4, 8, -0.1, 2), ValueError, "dropout"),
    ((6, 4, 8, None, 2), TypeError, "dropout"),
])
def test_wrong_sizes_are_refused(arguments, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        MultiHeadAttentionWrapper(*arguments)


@pytest.mark.parametrize("x, error, words", [
    (None, TypeError, "x"),
    (torch.zeros(2, 5, 6).long(), TypeError, "x"),
    (torch.zeros(2, 5, 6), TypeError, "x"),
    (torch.zeros(()).double(), ValueError, "x"),
    (torch.zeros(6).double(), ValueError, "x"),
    (torch.zeros(2, 5, 8).double(), ValueError, "x"),
    (torch.zeros(2, 9, 6).double(), ValueError, "context_length"),
])
@pytest.mark.parametrize("masked", [False, True])
def test_wrong_input_is_refused(x, error, words, masked):
    with pytest.raises(error, match=rf"\b{words}\b"):
        layer_and_x()[0](x, attn_mask=torch.tensor(True) if masked else None)


def test_keywords_are_keywords():
    layer, x = layer_and_x()
    with pytest.raises(TypeError):
        layer(x, None)
    twin = MultiHeadAttentionWrapper(d_in=6, d_out=4, context_length=8, dropout=0.0, num_heads=2, qkv_bias=True).double()
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))


# --- dropout, modes, tools

@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_random_in_training_and_only_there(masked, weights_too):
    (layer, x), mask = layer_and_x(0.5), padding_mask(REAL) if masked else None

    class Road(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return output(self.layer, x, mask, weights_too)

    assert_eval_deterministic(Road(), x)
    outs = []
    for too in (False, True, weights_too):
        torch.manual_seed(1)
        outs.append(output(layer, x, mask, too))
    assert_close(outs[0], outs[1]), assert_close(outs[2], outs[0])
    assert torch.equal(layer(x, return_weights=True)[1], layer.eval()(x, return_weights=True)[1])


def test_each_head_drops_at_random_of_its_own():
    layer, x = layer_and_x(0.5)
    layer.heads[1].load_state_dict(layer.heads[0].state_dict())
    one, two = layer(x).chunk(2, -1)
    assert not torch.equal(one, two)
    one, two = layer.eval()(x).chunk(2, -1)
    assert torch.equal(one, two)
    assert [head.dropout.p for head in layer.heads] == [0.5, 0.5]
    assert not MultiHeadAttentionWrapper(6, 4, 8, 1.0, 2)(x.float()).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_too", [False, True])
def test_rounds_no_worse_than_the_fused_function(dtype, weights_too):
    layer, x = layer_and_x(dtype=torch.float32)
    names, values = zip(*layer.named_parameters())
    mask = padding_mask(REAL) | torch.eye(5).bool()

    def ours(x, *values):
        options = {"attn_mask": mask, "return_weights": weights_too}
        out = torch.func.functional_call(layer, dict(zip(names, values)), (x,), options)
        return out[0] if weights_too else out

    def theirs(x, *values):
        state = stacked(dict(zip(names, values)), HEADS)
        q, k, v = (F.linear(x, state[f"{p}_proj.weight"], state[f"{p}_proj.bias"]).unflatten(-1, (HEADS, 4)).transpose(1, 2)
                   for p in "qkv")
        return F.scaled_dot_product_attention(q, k, v, mask & causal_mask(5)).transpose(1, 2).flatten(2)

    assert_as_precise(ours, theirs, x, *values, dtype=dtype)


def test_round_trips():
    layer, x = layer_and_x(0.5)
    layer.eval()
    with torch.device("meta"):
        late = MultiHeadAttentionWrapper(6, 4, 8, 0.5, HEADS, True).double()
    late.to_empty(device="cpu").load_state_dict(layer.state_dict())
    for other in (late.eval(), copy.deepcopy(layer)):
        assert torch.equal(layer(x), other(x))
    assert_close(torch.vmap(layer)(x), layer(x))
    masks = torch.rand(3, HEADS, 5, 5) > 0.3
    assert_close(torch.vmap(lambda x, m: layer(x, attn_mask=m))(x, masks), layer(x, attn_mask=masks))
    zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    assert not torch.func.functional_call(layer, zeros, (x,)).any() and layer(x).any()
    before = x.clone(), masks.clone()
    layer(x, attn_mask=masks), layer(x, attn_mask=masks, return_weights=True)
    assert torch.equal(x, before[0]) and torch.equal(masks, before[1])


@pytest.mark.slow
def test_exports_with_free_length():
    layer, x = layer_and_x(length=64, dtype=torch.float32)
    free = torch.export.Dim("length", min=2, max=64)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, real):
            return self.layer(x, attn_mask=padding_mask(real))

    longer, real = torch.randn(3, 9, 6), torch.rand(3, 9) > 0.3
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes=({1: free},))
    assert_close(program.module()(longer), layer(longer))
    program = torch.export.export(Masked(), (x, REAL.bool()), dynamic_shapes=({1: free}, {1: free}))
    assert_close(program.module()(longer, real), layer(longer, attn_mask=padding_mask(real)))


@pytest.mark.slow
def test_exports_with_free_batch_and_mask():
    layer, x = MultiHeadAttentionWrapper(6, 4, 8, 0.0, 3).eval(), torch.randn(3, 5, 6)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (x,), {"attn_mask": torch.ones(3, 1, 1, 5).bool()},
                                  dynamic_shapes={"x": {0: batch}, "attn_mask": {0: batch}})
    x, mask = torch.randn(7, 5, 6), torch.rand(7, 1, 1, 5) > 0.3
    assert_close(program.module()(x, attn_mask=mask), layer(x, attn_mask=mask))
