"""`CausalAttention`: random in training and only there, refusals, the numbers of a well-known book, parity with PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import multihead_of
from torch import nn
from torch.testing import assert_close

from attn_nb.causal import CausalSelfAttention, causal_mask, padding_mask
from attn_nb.dropout import CausalAttention
from attn_nb.testing import assert_causal, assert_eval_deterministic, assert_parity, assert_rows_sum_to_one

REAL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
MASKS = {"none": None, "padding": padding_mask(REAL), "favours": torch.randn(5, 5, generator=torch.Generator().manual_seed(0))}


def layer_and_x(p=0.5, bias=True, length=8):
    return CausalAttention(6, 4, length, p, qkv_bias=bias), 3 * torch.randn(3, 5, 6)


def output(layer, x, mask, weights_too=False):
    out = layer(x, attn_mask=mask, return_weights=weights_too)
    return out[0] if weights_too else out


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_random_in_training_and_only_there(name, weights_too):
    layer, x = layer_and_x()

    class Road(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return output(layer, x, MASKS[name], weights_too)

    assert_eval_deterministic(Road(), x)
    assert_eval_deterministic(Road().double(), x.double())


def test_the_dropout_module_decides():
    """Monte Carlo dropout: only the nn.Dropout modules are put back to training."""
    layer, x = layer_and_x()
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.dropout.train()
    assert not layer.training and not torch.equal(layer(x), layer(x))
    layer.dropout.p = 0.0
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("name", MASKS)
def test_both_roads_draw_the_same(name):
    layer, x = layer_and_x()
    outs = []
    for weights_too in (False, True):
        torch.manual_seed(1)
        outs.append(output(layer, x, MASKS[name], weights_too))
    assert_close(*outs)
    torch.manual_seed(1)
    assert torch.equal(output(layer, x, MASKS[name]), outs[0])


def test_weights_are_those_before_dropout():
    layer, x = layer_and_x()
    _, weights = layer(x, attn_mask=MASKS["padding"], return_weights=True)
    assert_rows_sum_to_one(weights, (causal_mask(5) & padding_mask(REAL))[:, 0])
    assert torch.equal(weights, layer.eval()(x, attn_mask=MASKS["padding"], return_weights=True)[1])


def test_survivors_are_scaled_and_the_rate_is_p():
    """With values of 1 the output is the sum of the kept weights; row 0 is all or nothing."""
    layer = CausalAttention(2, 1, 4, 0.2, qkv_bias=True)
    with torch.no_grad():
        layer.v_proj.weight.zero_(), layer.v_proj.bias.fill_(1.0)
    sums = layer(torch.randn(20_000, 4, 2))[..., 0]
    first = sums[:, 0]
    assert_close(first[first != 0], torch.full_like(first[first != 0], 1.25))
    assert abs((first == 0).double().mean() - 0.2) < 0.01
    assert_close(sums.mean(0), torch.ones(4), rtol=0, atol=0.02)


@pytest.mark.parametrize("p", [0, 0.0, 1, 1.0])
def test_the_ends_are_exact(p):
    layer, x = layer_and_x(p)
    plain = CausalSelfAttention(6, 4, qkv_bias=True)
    plain.load_state_dict(layer.state_dict())
    for mask in MASKS.values():
        for weights_too in (False, True):
            out = output(layer.train(), x, mask, weights_too)
            assert torch.equal(out, torch.zeros_like(out) if p == 1 else output(plain, x, mask, weights_too))
            assert torch.equal(output(layer.eval(), x, mask, weights_too), output(plain, x, mask, weights_too))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_chain_eval_is_chapter_two(name, bias):
    layer, x = layer_and_x(bias=bias)
    before = CausalSelfAttention(6, 4, qkv_bias=bias)
    before.load_state_dict(layer.state_dict())
    layer, before = layer.double().eval(), before.double()
    mask = MASKS[name].double() if name == "favours" else MASKS[name]
    assert_parity(lambda x: layer(x, attn_mask=mask), lambda x: before(x, attn_mask=mask), x)
    assert_parity(lambda x: layer(x, attn_mask=mask, return_weights=True)[1],
                  lambda x: before(x, attn_mask=mask, return_weights=True)[1], x)
    assert_causal(lambda x: layer(x, attn_mask=mask), x.double())


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_equals_multihead_attention_draw_by_draw(p):
    mine = CausalAttention(8, 8, 5, p, qkv_bias=True).double()
    theirs = multihead_of(mine, p)

    def seeded(fn):
        def run(x):
            torch.manual_seed(1)
            return fn(x)
        return run

    x, pads = 3 * torch.randn(3, 5, 8), REAL.flip(1) == 0
    pads[0, 0], pads[1, 0] = False, False
    library = seeded(lambda x: theirs(x, x, x, attn_mask=~causal_mask(5), key_padding_mask=pads)[0])
    for mode in (True, False):
        mine.train(mode), theirs.train(mode)
        assert_parity(seeded(lambda x: mine(x, attn_mask=~pads[:, None, None])), library, x)
    with pytest.raises(AssertionError, match="parity"):
        assert_parity(seeded(lambda x: mine(x)), library, x)


INPUTS = torch.tensor([[0.43, 0.15, 0.89], [0.55, 0.87, 0.66], [0.57, 0.85, 0.64],
                       [0.22, 0.58, 0.33], [0.77, 0.25, 0.10], [0.05, 0.80, 0.55]])


def test_reproduces_the_numbers_printed_in_a_book():
    """Raschka, Build a Large Language Model (From Scratch), 2024, section 3.5.3: seed 123, d_in 3, d_out 2."""
    torch.manual_seed(123)
    layer = CausalAttention(3, 2, INPUTS.shape[0], 0.0)
    printed = torch.tensor([[-0.4519, 0.2216], [-0.5874, 0.0058], [-0.6300, -0.0632],
                            [-0.5675, -0.0843], [-0.5526, -0.0981], [-0.5299, -0.1081]])
    assert_close(layer(torch.stack([INPUTS, INPUTS])), printed.expand(2, 6, 2), rtol=0, atol=5.1e-5)


@given(length=st.integers(1, 6), context_length=st.integers(1, 6), weights_too=st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_length_up_to_the_context(length, context_length, weights_too):
    layer, x = CausalAttention(6, 4, context_length, 0.5).eval(), torch.randn(2, length, 6)
    if length > context_length:
        with pytest.raises(ValueError, match=r"\bcontext_length\b"):
            layer(x, return_weights=weights_too)
    else:
        longest = CausalAttention(6, 4, 99, 0.5).eval()
        longest.load_state_dict(layer.state_dict())
        assert torch.equal(output(layer, x, None, weights_too), output(longest, x, None, weights_too))


def test_state_dict_is_small_and_free_of_the_length():
    layer, _ = layer_and_x(length=100_000)
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        **{f"{p}_proj.weight": (4, 6) for p in "qkv"}, **{f"{p}_proj.bias": (4,) for p in "qkv"}}
    assert not list(layer.buffers())
    CausalAttention(6, 4, 2, 0.0, qkv_bias=True).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("arguments, error, words", [
    ((0, 4, 8, 0.1), ValueError, "d_in=0"), ((6, 0, 8, 0.1), ValueError, "d_out=0"),
    ((6, 4, 0, 0.1), ValueError, "context_length"),
    ((6, 4, -8, 0.1), ValueError, "context_length"),
    ((6, 4, 8.0, 0.1), TypeError, "context_length"),
    ((6, 4, 0.1, 8), TypeError, "context_length"),
    ((6, 4, 8, 1.5), ValueError, "dropout"),
    ((6, 4, 8, -0.1), ValueError, "dropout"),
    ((6, 4, 8, float("nan")), ValueError, "dropout"),
    ((6, 4, 8, 6), ValueError, "dropout"),
    ((6, 4, 8, "0.1"), TypeError, "dropout"),
    ((6, 4, 8, None), TypeError, "dropout"),
    ((6, 4, 8, True), TypeError, "dropout"),
])
def test_wrong_sizes_are_refused(arguments, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        CausalAttention(*arguments)


@pytest.mark.parametrize("x, error, words", [
    (None, TypeError, "x"),
    (torch.zeros(2, 5, 6).long(), TypeError, "x"),
    (torch.zeros(()), ValueError, "x"),
    (torch.zeros(6), ValueError, "x"),
    (torch.zeros(2, 5, 7), ValueError, "x"),
    (torch.zeros(2, 9, 6), ValueError, "context_length"),
    (torch.zeros(9, 6), ValueError, "context_length"),
])
def test_wrong_input_is_refused(x, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        layer_and_x()[0](x)


def test_wrong_masks_are_refused_and_keywords_are_keywords():
    layer, x = layer_and_x()
    with pytest.raises(ValueError, match=r"\battn_mask\b"):
        layer(x, attn_mask=REAL.bool())
    with pytest.raises(TypeError):
        layer(x, None)
