"""`split_heads`, `merge_heads`, `MultiHeadAttention`: against loops, PyTorch and separate heads, where silent errors live."""
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import assert_parity_with_parameters, lively, looped_layer, multihead_state, stacked
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attn_nb.multi_head as module
from attn_nb.causal import CausalSelfAttention, causal_mask, mask_from_mha, mask_to_bias, padding_mask
from attn_nb.multi_head import MultiHeadAttention, merge_heads, split_heads
from attn_nb.multi_head_wrapper import MultiHeadAttentionWrapper
from attn_nb.testing import (
    TOLERANCE,
    assert_as_precise,
    assert_causal,
    assert_eval_deterministic,
    assert_parity,
    assert_rows_sum_to_one,
)

SDPA = F.scaled_dot_product_attention
B, H, TQ, TK, D = 3, 2, 4, 5, 8          # unequal sizes; D is the width of all heads
REAL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
SHAPES = [(), (5,), (4, 1), (4, 5), (1, 4, 5), (2, 4, 5), (2, 1, 5), (2, 1, 1), (3, 1, 1, 5), (1, 2, 4, 5), (3, 1, 4, 5),
          (3, 2, 1, 1), (3, 2, 4, 5)]
examples = settings(max_examples=100, deadline=None, derandomize=True)
sizes = st.integers(1, 4)


def make(d_in=6, d_out=D, context_length=8, p=0.0, heads=H, bias=True, **options):
    return lively(MultiHeadAttention(d_in, d_out, context_length, p, heads, bias, **options)).double()


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def output(layer, *inputs, weights_too=False, **options):
    out = layer(*inputs, return_weights=weights_too, **options)
    return out[0] if weights_too else out


def random_mask(shape, kind):
    """Bits, or numbers of which some are -inf; the first entry always allows."""
    may = torch.rand(shape) > 0.3
    may.view(-1)[:1] = True
    return may if kind == "bool" else torch.randn(shape).double().masked_fill(~may, -torch.inf)


def first(out):
    return out[0]


def second(out):
    return out[1]


def assert_lively(layer, query, key):
    """With scores near 0 all weights are equal, and many bugs hide."""
    q, k = (split_heads(p(x), layer.num_heads) for p, x in ((layer.q_proj, query), (layer.k_proj, key)))
    assert (q @ k.mT / math.sqrt(q.shape[-1])).std() >= 1


def assert_far(wrong, right):
    """A negative control: what is wrong misses the tolerance by 100 times at least."""
    assert (wrong - right).abs().max() > 100 * TOLERANCE[torch.float64]


# --- split and merge

@given(lead=st.lists(st.integers(0, 3), max_size=3), T=st.integers(0, 4), heads=sizes, wide=st.integers(0, 3),
       dtype=st.sampled_from([torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]))
@examples
def test_split_and_merge_undo_each_other(lead, T, heads, wide, dtype):
    """And each number lands where the rule says: head h gets columns h*Dh .. (h+1)*Dh - 1."""
    x = torch.arange(math.prod(lead) * T * heads * wide).reshape(*lead, T, heads * wide).to(dtype)
    parts = split_heads(x, heads)
    assert parts.shape == (*lead, heads, T, wide) and parts.dtype == dtype
    assert parts.data_ptr() == x.data_ptr() and torch.equal(merge_heads(parts), x)
    for h, t in itertools.product(range(heads), range(T)):
        assert torch.equal(parts[..., h, t, :], x[..., t, h * wide:(h + 1) * wide])
    y = parts.contiguous()
    merged = merge_heads(y)
    assert merged.shape == x.shape and torch.equal(split_heads(merged, heads), y)
    if merged.numel() and heads > 1 and T > 1 and wide > 1:
        assert merged.data_ptr() != y.data_ptr() and merged.is_contiguous()


def test_split_is_a_view():
    x = torch.zeros(2, 3, 4)
    split_heads(x, 2)[1, 0, 2, 1] = 1.0
    assert x.nonzero().tolist() == [[1, 2, 1]]
    split_heads(x, 2)[0, 1, 0, 0] = 1.0
    assert x.nonzero().tolist() == [[0, 0, 2], [1, 2, 1]]


def test_split_and_merge_pass_gradients_and_vmap():
    x, y = draw(2, 3, 6).requires_grad_(), draw(2, 3, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: split_heads(x, 3), x) and torch.autograd.gradcheck(merge_heads, y)
    assert torch.equal(torch.vmap(lambda x: split_heads(x, 3))(x), split_heads(x, 3))
    assert torch.equal(torch.vmap(merge_heads)(y), merge_heads(y))


@pytest.mark.parametrize("call, error, words", [
    (lambda: split_heads(torch.zeros(2, 3, 8), 3), ValueError, "num_heads"),
    (lambda: split_heads(torch.zeros(2, 3, 8), 16), ValueError, "num_heads"),
    (lambda: split_heads(torch.zeros(2, 3, 8), 0), ValueError, "num_heads"),
    (lambda: split_heads(torch.zeros(2, 3, 8), -2), ValueError, "num_heads"),
    (lambda: split_heads(torch.zeros(2, 3, 8), 2.0), TypeError, "num_heads"),
    (lambda: split_heads(torch.zeros(2, 3, 8), True), TypeError, "num_heads"),
    (lambda: split_heads(torch.zeros(8), 2), ValueError, "x"),
    (lambda: split_heads(torch.zeros(()), 1), ValueError, "x"),
    (lambda: split_heads([[1.0]], 1), TypeError, "x"),
    (lambda: merge_heads(torch.zeros(3, 8)), ValueError, "x"),
    (lambda: merge_heads(None), TypeError, "x"),
])
def test_split_and_merge_refuse(call, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        call()


# --- against loops

@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", [None, *SHAPES])
def test_the_loop_with_masks_of_every_shape(shape, kind):
    """Outputs, gradients of inputs and of parameters; both roads; causal or not; widths of keys and values of their own."""
    layer = make(bias=kind == "bool", k_in=7, v_in=3, out_bias=kind == "float")
    mask, inputs = None if shape is None else random_mask(shape, kind), (draw(B, TQ, 6), draw(B, TK, 7), draw(B, TK, 3))
    assert_lively(layer, *inputs[:2])
    for causal in (None, False, True):
        def loop(state, *inputs):
            return looped_layer(state, H, *inputs, mask, causal=bool(causal))
        assert_parity_with_parameters(layer, loop, *inputs, attn_mask=mask, is_causal=causal)
        assert_parity_with_parameters(layer, loop, *inputs, attn_mask=mask, is_causal=causal, return_weights=True, pick=first)
        _, weights = layer(*inputs, attn_mask=mask, is_causal=causal, return_weights=True)
        assert weights.shape == (B, H, TQ, TK)
        may = torch.tensor(True) if mask is None else mask if kind == "bool" else mask > -torch.inf
        assert_rows_sum_to_one(weights, may & causal_mask(TQ, TK) if causal else may)


@given(data=st.data(), batch=sizes, heads=st.integers(1, 3), q_len=sizes, kv_len=sizes, weights_too=st.booleans(),
       causal=st.sampled_from([None, False, True]), cross=st.booleans(), default=st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_sizes_and_masks_are_the_loop(data, batch, heads, q_len, kv_len, causal, weights_too, cross, default):
    """Also where two sizes are equal, so that only the place of an axis tells them apart."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    kv_len = kv_len if cross else q_len
    shape = tuple(data.draw(st.sampled_from([1, n])) for n in (batch, heads, q_len, kv_len))[data.draw(st.integers(0, 4)):]
    mask = data.draw(st.sampled_from([None, random_mask(shape, "bool"), random_mask(shape, "float")]))
    layer = make(4, 2 * heads, None, heads=heads, bias=data.draw(st.booleans()), is_causal=default)
    query = draw(batch, q_len, 4)
    inputs = (query, *(draw(batch, kv_len, 4) for _ in range(data.draw(st.integers(1, 2))))) if cross else (query,)
    full = (query, inputs[1] if cross else query, inputs[-1])
    meant = causal if causal is not None else default and not cross
    got = output(layer, *inputs, attn_mask=mask, is_causal=causal, weights_too=weights_too)
    assert_close(got, looped_layer(layer.state_dict(), heads, *full, mask, meant), rtol=0, atol=1e-9)


# --- against nn.MultiheadAttention

def draw_masks(kind):
    """nn.MultiheadAttention's masks, and ours made of them; every query keeps a key."""
    pad, drop = REAL.flip(1) == 0, torch.rand((B * H, TQ, TK) if "3-D" in kind else (TQ, TK)) > 0.6
    pad[:, 0], drop[..., 0] = False, False
    if kind == "none":
        return {}, None
    if "numbers" in kind:
        bias = torch.randn(drop.shape).double().masked_fill(drop, -torch.inf)
        return {"attn_mask": bias}, bias.unflatten(0, (B, H)) if "3-D" in kind else bias
    theirs = {} if kind == "pad" else {"attn_mask": drop}
    if "pad" in kind:
        theirs["key_padding_mask"] = pad
    if "additive" in kind:
        theirs = {name: mask_to_bias(~mask, torch.float64) for name, mask in theirs.items()}
    return theirs, mask_from_mha(**theirs, num_heads=H)


def library_of(layer, i=0, p=0.0, batch_first=True, seed=None, **options):
    """Its layer as a function of our weights and the inputs."""
    biased = layer.q_proj.bias is not None or layer.o_proj.bias is not None
    theirs = nn.MultiheadAttention(D, layer.num_heads, p, bias=biased, kdim=layer.k_proj.in_features,
                                   vdim=layer.v_proj.in_features, batch_first=batch_first).double()

    def run(state, *inputs):
        if seed is not None:
            torch.manual_seed(seed)
        inputs = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
        out = torch.func.functional_call(theirs, multihead_state(state, D), tuple(inputs), options)[i]
        return out if batch_first or i else out.transpose(0, 1)
    return run


KINDS = ["none", "2-D", "3-D", "pad", "2-D and pad", "3-D and pad", "2-D additive", "3-D and pad additive", "2-D numbers",
         "3-D numbers"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_multihead_attention(kind, bias):
    """Cross-attention, Tq != Tk; outputs of both roads, weights per head and averaged; then what must not be equal."""
    layer, (theirs, mask) = make(D, bias=bias, out_bias=bias), draw_masks(kind)
    inputs = draw(B, TQ, D), draw(B, TK, D), draw(B, TK, D)
    assert_lively(layer, *inputs[:2])
    for first_axis, weights_too in itertools.product((True, False), (True, False)):
        library = library_of(layer, batch_first=first_axis, need_weights=weights_too, **theirs)
        assert_parity_with_parameters(layer, library, *inputs, attn_mask=mask)
        assert_parity_with_parameters(layer, library, *inputs, attn_mask=mask, return_weights=True, pick=first)
    each = library_of(layer, 1, average_attn_weights=False, **theirs)
    assert_parity_with_parameters(layer, each, *inputs, attn_mask=mask, return_weights=True, pick=second)
    mean = library_of(layer, 1, **theirs)
    assert_parity_with_parameters(layer, mean, *inputs, attn_mask=mask, return_weights=True, pick=lambda out: out[1].mean(-3))

    right, state = library_of(layer, **theirs)(layer.state_dict(), *inputs), layer.state_dict()
    if mask is not None and mask.dtype == torch.bool:
        assert_far(layer(*inputs, attn_mask=~mask), right)                               # the library's polarity
        assert_far(layer(*inputs), right)
    for name in ("q_proj.weight", "v_proj.weight"):                                     # heads permuted
        assert_far(library_of(layer, **theirs)({**state, name: state[name].roll(D // H, 0)}, *inputs), right)
    assert_far(layer(inputs[0], inputs[2], inputs[1], attn_mask=mask), right)            # keys and values swapped


@pytest.mark.parametrize("name, wrong", [
    ("split_heads", lambda x, heads: x.reshape(*x.shape[:-2], heads, x.shape[-2], -1)),
    ("split_heads", lambda x, heads: x.unflatten(-1, (-1, heads)).movedim(-1, -3)),
    ("merge_heads", lambda x: x.reshape(*x.shape[:-3], x.shape[-2], -1)),
    ("merge_heads", lambda x: x.movedim(-3, -1).flatten(-2)),
])
def test_the_comparison_has_teeth(name, wrong, monkeypatch):
    """A view without the transpose has the right shape and the wrong numbers; so has a width cut the other way."""
    layer, inputs = make(D), (draw(B, TQ, D), draw(B, TK, D), draw(B, TK, D))
    right = library_of(layer)(layer.state_dict(), *inputs)
    assert_close(layer(*inputs), right, rtol=0, atol=1e-9)
    monkeypatch.setattr(module, name, wrong)
    assert layer(*inputs).shape == right.shape
    assert_far(layer(*inputs), right)


@pytest.mark.parametrize("bias, out_bias", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("k_in, v_in", [(None, None), (D, 3), (6, None), (6, 3)])
def test_other_widths_of_keys_and_values(k_in, v_in, bias, out_bias):
    layer = make(D, bias=bias, out_bias=out_bias, k_in=k_in, v_in=v_in)
    inputs = draw(B, TQ, D), draw(B, TK, k_in or D), draw(B, TK, v_in or k_in or D)
    theirs, mask = draw_masks("3-D and pad")
    assert_parity_with_parameters(layer, library_of(layer, **theirs), *inputs, attn_mask=mask)
    torch_layer = layer.to_torch()
    assert_close(torch_layer(*inputs, **theirs)[0], layer(*inputs, attn_mask=mask), rtol=0, atol=1e-9)
    assert_close(MultiHeadAttention.from_torch(torch_layer)(*inputs), layer(*inputs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_drops_what_multihead_attention_drops(p, weights_too, masked):
    layer, inputs = make(D, p=p), (draw(B, TQ, D), draw(B, TK, D), draw(B, TK, D))
    theirs, mask = draw_masks("3-D and pad") if masked else ({}, None)

    class Seeded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, *inputs):
            torch.manual_seed(1)
            return output(self.layer, *inputs, attn_mask=mask, weights_too=weights_too)

    def library(state, *inputs):
        state = {name.removeprefix("layer."): w for name, w in state.items()}
        return library_of(layer, p=p, seed=1, need_weights=weights_too, **theirs)(state, *inputs)

    assert_parity_with_parameters(Seeded(), library, *inputs)
    assert_far(Seeded()(*inputs), layer.eval()(*inputs, attn_mask=mask))
    assert_close(layer(*inputs), library_of(layer, p=0.0)(layer.state_dict(), *inputs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["none", "2-D", "3-D"])
def test_unbatched(kind):
    """(T, D) in, (T, D) out; weights (H, Tq, Tk)."""
    layer, inputs = make(D), (draw(TQ, D), draw(TK, D), draw(TK, D))
    theirs, mask = {}, None
    if kind != "none":
        drop = torch.rand((H, TQ, TK) if kind == "3-D" else (TQ, TK)) > 0.6
        drop[..., 0] = False
        theirs, mask = {"attn_mask": drop}, ~drop
    assert_parity_with_parameters(layer, library_of(layer, **theirs), *inputs, attn_mask=mask)
    each = library_of(layer, 1, average_attn_weights=False, **theirs)
    assert_parity_with_parameters(layer, each, *inputs, attn_mask=mask, return_weights=True, pick=second)
    assert layer(*inputs).shape == (TQ, D) and layer(*inputs, return_weights=True)[1].shape == (H, TQ, TK)


@given(data=st.data(), batch=sizes, heads=st.sampled_from([1, 2, 4]), q_len=sizes, kv_len=sizes, weights_too=st.booleans())
@examples
def test_any_sizes_are_multihead_attention(data, batch, heads, q_len, kv_len, weights_too):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    layer, inputs = make(D, context_length=None, heads=heads), [draw(batch, n, D) for n in (q_len, kv_len, kv_len)]
    drop = torch.rand(data.draw(st.sampled_from([(q_len, kv_len), (batch * heads, q_len, kv_len)]))) > 0.6
    pad = torch.rand(batch, kv_len) > 0.6
    drop[..., 0], pad[:, 0] = False, False
    want = layer.to_torch()(*inputs, attn_mask=drop, key_padding_mask=pad, need_weights=weights_too)[0]
    got = output(layer, *inputs, attn_mask=mask_from_mha(drop, pad, num_heads=heads), weights_too=weights_too)
    assert_close(got, want, rtol=0, atol=1e-9)


def torch_layer(**options):
    return lively(nn.MultiheadAttention(D, H, **{"dropout": 0.3, "batch_first": True, **options}))


OPTIONS = [{}, {"bias": False}, {"kdim": 6, "vdim": 3}, {"kdim": 6, "bias": False}, {"vdim": 5}, {"batch_first": False},
           {"dropout": 0.0}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_the_round_trip_is_exact(options, dtype, training):
    theirs = torch_layer(**options).to(dtype).train(training)
    state = torch.get_rng_state()
    ours = MultiHeadAttention.from_torch(theirs, context_length=9, is_causal=True)
    back = ours.to_torch()
    again = MultiHeadAttention.from_torch(back)
    assert torch.equal(torch.get_rng_state(), state)
    assert (ours.context_length, ours.is_causal, again.context_length, again.is_causal) == (9, True, None, False)
    for a, b in ((ours, again), (theirs, back)):
        assert type(a) is type(b) and [*a.state_dict()] == [*b.state_dict()]
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    for layer in (ours, back, again):
        assert all(p.requires_grad and p.is_leaf and p.dtype == dtype and p.device.type == "cpu" for p in layer.parameters())
        assert all(isinstance(p, nn.Parameter) for p in layer.parameters())
        assert {part.training for part in layer.modules()} == {training}
    assert back.batch_first and back.dropout == ours.dropout.p == again.dropout.p == theirs.dropout
    assert (back.kdim, back.vdim, back.num_heads, ours.num_heads) == (theirs.kdim, theirs.vdim, H, H)


@pytest.mark.parametrize("options", OPTIONS)
def test_from_torch_is_the_same_function(options):
    """Weights of the constructor, of N(0, 1) inputs and batch_first as it comes."""
    theirs = torch_layer(**options).double().eval()
    inputs = draw(B, TQ, D), draw(B, TK, theirs.kdim), draw(B, TK, theirs.vdim)
    ours, masks, mask = MultiHeadAttention.from_torch(theirs), *draw_masks("3-D and pad")
    there = inputs if theirs.batch_first else [x.transpose(0, 1) for x in inputs]
    want = theirs(*there, **masks)[0]
    assert_close(ours(*inputs, attn_mask=mask), want if theirs.batch_first else want.transpose(0, 1), rtol=0, atol=1e-9)
    if options in ({}, {"bias": False}):                # not causal by default, causal if asked
        x = inputs[0]
        assert_close(ours(x), theirs(x, x, x)[0], rtol=0, atol=1e-9)
        causal = MultiHeadAttention.from_torch(theirs, is_causal=True, context_length=TQ)
        assert_close(causal(x), theirs(x, x, x, attn_mask=~causal_mask(TQ))[0], rtol=0, atol=1e-9)
        with pytest.raises(ValueError, match=r"\bquery\b"):
            causal(draw(B, 5, D))


@pytest.mark.parametrize("options", OPTIONS)
def test_conversions_share_no_memory(options):
    theirs = torch_layer(**options)
    ours = MultiHeadAttention.from_torch(theirs)
    back = ours.to_torch()
    layers = [theirs, ours, back]
    storages = [{p.untyped_storage().data_ptr() for p in layer.parameters()} for layer in layers]
    assert not (storages[0] & storages[1] | storages[1] & storages[2] | storages[0] & storages[2])
    assert len(storages[1]) == len(list(ours.parameters()))          # nor do ours share among themselves
    before = [{name: p.clone() for name, p in layer.state_dict().items()} for layer in layers]
    for changed in range(3):
        with torch.no_grad():
            [p.add_(1.0) for p in layers[changed].parameters()]
        for n, layer in enumerate(layers):
            same = all(torch.equal(p, before[n][name]) for name, p in layer.state_dict().items())
            assert same == (n > changed)


@pytest.mark.parametrize("bias, out_bias", [(True, False), (False, True)])
def test_to_torch_fills_a_missing_bias_with_zeros(bias, out_bias):
    layer = make(D, p=0.2, bias=bias, out_bias=out_bias)
    theirs = layer.to_torch()
    assert theirs.in_proj_bias.any() == bias and theirs.out_proj.bias.any() == out_bias
    x = draw(B, TQ, D)
    assert_close(theirs.eval()(x, x, x)[0], layer.eval()(x, is_causal=False), rtol=0, atol=1e-9)
    assert make(D, bias=False, out_bias=False).to_torch().in_proj_bias is None


@pytest.mark.parametrize("call, error, words", [
    (lambda: MultiHeadAttention.from_torch(nn.MultiheadAttention(8, 2, add_bias_kv=True)), ValueError, "add_bias_kv=True"),
    (lambda: MultiHeadAttention.from_torch(nn.MultiheadAttention(8, 2, add_zero_attn=True)), ValueError, "add_zero_attn=True"),
    (lambda: MultiHeadAttention.from_torch(nn.Linear(8, 8)), TypeError, "layer"),
    (lambda: MultiHeadAttention.from_torch(None), TypeError, "layer"),
    (lambda: MultiHeadAttention.from_torch(nn.MultiheadAttention(8, 2), context_length=0), ValueError, "context_length"),
    (lambda: make(6).to_torch(), ValueError, "d_in"),
])
def test_conversions_refuse(call, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        call()


# --- the chain: separate heads

@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_separate_heads(heads, bias, masked):
    """Weights stacked, o_proj the identity: outputs, gradients of the inputs and of every matrix, weights."""
    wrapper = lively(MultiHeadAttentionWrapper(6, D // heads, 5, 0.0, heads, bias)).double()
    layer, x = make(6, D, 5, heads=heads, bias=bias), draw(B, 5, 6)
    mask = torch.rand(B, heads, 5, 5) > 0.3 if masked else None

    def one(i, weights_too):
        def run(state, x):
            state = {**stacked(state, heads), "o_proj.weight": torch.eye(D).double(), "o_proj.bias": torch.zeros(D).double()}
            options = {"attn_mask": mask, "return_weights": weights_too}
            out = torch.func.functional_call(layer, state, (x,), options)
            return out[i] if weights_too else out
        return run

    assert_parity_with_parameters(wrapper, one(0, False), x, attn_mask=mask)
    assert_parity_with_parameters(wrapper, one(0, True), x, attn_mask=mask)
    assert_parity_with_parameters(wrapper, one(1, True), x, attn_mask=mask, return_weights=True, pick=second)


def test_one_head_is_the_causal_head():
    head, x = lively(CausalSelfAttention(6, D, qkv_bias=True)).double(), draw(B, 5, 6)
    layer = make(6, D, None, heads=1)
    layer.load_state_dict({**head.state_dict(), "o_proj.weight": torch.eye(D), "o_proj.bias": torch.zeros(D)})
    assert_parity(layer, head, x)


INPUTS = torch.tensor([[0.43, 0.15, 0.89], [0.55, 0.87, 0.66], [0.57, 0.85, 0.64],
                       [0.22, 0.58, 0.33], [0.77, 0.25, 0.10], [0.05, 0.80, 0.55]])


def test_reproduces_the_numbers_printed_in_a_book():
    """Raschka, Build a Large Language Model (From Scratch), 2024, section 3.6.2: seed 123, two heads of width 1."""
    torch.manual_seed(123)
    layer = MultiHeadAttention(3, 2, 6, 0.0, num_heads=2)
    printed = torch.tensor([[0.3190, 0.4858], [0.2943, 0.3897], [0.2856, 0.3593], [0.2693, 0.3873], [0.2639, 0.3928],
                            [0.2575, 0.4028]])
    assert_close(layer(torch.stack([INPUTS, INPUTS])), printed.expand(2, 6, 2), rtol=0, atol=5.1e-5)


@pytest.mark.parametrize("bias, out_bias", [(True, True), (False, True), (True, False), (False, False)])
def test_created_in_the_order_of_the_names(bias, out_bias):
    torch.manual_seed(7)
    layer = MultiHeadAttention(6, D, 8, 0.1, H, bias, k_in=7, v_in=3, out_bias=out_bias)
    torch.manual_seed(7)
    want = {}
    for name, width in (("q", 6), ("k", 7), ("v", 3), ("o", D)):
        matrix = nn.Linear(width, D, bias=out_bias if name == "o" else bias)
        want |= {f"{name}_proj.{end}": w for end, w in matrix.state_dict().items()}
    assert [*layer.state_dict()] == [*want] and not list(layer.buffers())
    assert all(torch.equal(layer.state_dict()[name], w) for name, w in want.items())


# --- the two roads

@pytest.mark.parametrize("causal", [None, False, True])
@pytest.mark.parametrize("shape", [None, (5,), (3, 1, 1, 5), (2, 4, 5)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_both_roads_are_one_function(causal, shape, kind):
    layer, inputs = make(D), (draw(B, TQ, D), draw(B, TK, D))
    options = {"attn_mask": None if shape is None else random_mask(shape, kind), "is_causal": causal}
    assert_parity(lambda *x: layer(*x, **options), lambda *x: layer(*x, return_weights=True, **options)[0], *inputs)


def test_the_fused_road_never_makes_the_map():
    layer, x, key = make(D).float(), draw(B, 5, D).float(), draw(B, 6, D).float()
    for inputs, options, fused in (
            ((x,), {}, True), ((x,), {"is_causal": False}, True), ((x, x), {}, True), ((x, key), {"is_causal": True}, True),
            ((x,), {"attn_mask": padding_mask(REAL)}, True), ((x,), {"attn_mask": torch.randn(H, 5, 5)}, True),
            ((x[0],), {}, True), ((x[None],), {"attn_mask": torch.tensor(True)}, True),
            ((x,), {"return_weights": True}, False)):
        with torch.no_grad(), torch.profiler.profile() as profile:
            layer(*inputs, **options)
        names = {event.key for event in profile.key_averages()}
        assert ("aten::_softmax" not in names) == fused, options
        assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in names) == fused, options


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operator makes."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("causal", [None, False])
def test_memory_grows_with_the_length_alone(causal):
    """Without weights and mask no (T, T) tensor is made, forward or backward; with weights one per head is."""
    layer, T = make(D, context_length=None).float(), 600
    for cross in (False, True):
        x = draw(1, T, D).float().requires_grad_()
        with Largest() as largest:
            layer(x, x if cross else None, is_causal=causal).sum().backward()
        assert T * D <= largest.numel < T * T / 4
    with Largest() as largest:
        layer(x, return_weights=True)
    assert largest.numel == H * T * T


def test_what_the_fused_function_is_given(monkeypatch):
    """One call, all heads at once; no mask where none is needed; dropout in training only."""
    seen = []

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        seen.append((tuple(query.shape), tuple(key.shape), attn_mask is None, dropout_p, is_causal))
        return SDPA(query, key, value, attn_mask, dropout_p, is_causal, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    layer, x, key = make(D, p=0.25), draw(B, 5, D), draw(B, 6, D)
    own, keys = (B, H, 5, D // H), (B, H, 6, D // H)
    layer(x), layer(x, is_causal=False), layer(x, key), layer(x, x, is_causal=True), layer(x, key, is_causal=True)
    layer.eval()(x), layer(x[:, :1], key, is_causal=True)
    assert seen == [(own, own, True, 0.25, True), (own, own, True, 0.25, False), (own, keys, True, 0.25, False),
                    (own, own, True, 0.25, True), (own, keys, False, 0.25, False), (own, own, True, 0.0, True),
                    ((B, H, 1, D // H), keys, True, 0.0, False)]
    seen.clear()
    layer(x, return_weights=True)
    assert not seen


# --- causality, defaults of the arguments

@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("default", [False, True])
def test_when_it_is_causal(default, weights_too):
    """Self-attention: as the module says. With a key: not. An argument decides for itself, both ways."""
    layer, x, key = make(is_causal=default), draw(B, 5, 6), draw(B, 5, 6)
    state = layer.state_dict()
    for inputs, asked, meant in (((x,), None, default), ((x,), True, True), ((x,), False, False), ((x, x), None, False),
                                 ((x, key), None, False), ((x, key), True, True), ((x, key), False, False),
                                 ((x, key, x), None, False), ((x, x, x), None, False), ((x, x, x), True, True)):
        full = (*inputs, *[inputs[-1]] * (3 - len(inputs)))
        got = output(layer, *inputs, is_causal=asked, weights_too=weights_too)
        assert_close(got, looped_layer(state, H, *full, causal=meant), rtol=0, atol=1e-9)
        assert_far(got, looped_layer(state, H, *full, causal=not meant))
    assert MultiHeadAttention(6, 8, 4, 0.0, 2).is_causal


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("q_len, kv_len", [(2, 5), (1, 5), (5, 2), (3, 3)])
def test_the_last_query_sees_the_last_key(q_len, kv_len, weights_too):
    layer, query, key = make(), draw(B, q_len, 6), draw(B, kv_len, 6)
    got = output(layer, query, key, is_causal=True, weights_too=weights_too)
    assert_close(got, output(layer, query, key, attn_mask=causal_mask(q_len, kv_len), weights_too=True), rtol=0, atol=1e-9)
    if q_len > kv_len:                      # the first queries see no key: the bias alone
        assert torch.equal(got[:, :q_len - kv_len], layer.o_proj.bias.expand(B, q_len - kv_len, D))
    for cut in range(1, kv_len):
        other = torch.cat([key[:, :cut], 5 * draw(B, kv_len - cut, 6)], 1)
        moved = (output(layer, query, other, is_causal=True, weights_too=weights_too) - got).abs().amax((0, 2)) > 1e-9
        assert moved.tolist() == [i + kv_len - q_len >= cut for i in range(q_len)]


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("shape", [None, (5, 5), (2, 5, 5), (3, 1, 1, 5), (3, 2, 5, 5)])
def test_a_mask_never_replaces_causality(shape, weights_too):
    layer, x = make(), draw(B, 5, 6)
    masks = [torch.ones(shape).bool(), torch.randn(shape).double(), torch.zeros(shape).double()] if shape else [None]
    for mask in masks:
        assert_causal(lambda x: output(layer, x, attn_mask=mask, weights_too=weights_too), x)
        with pytest.raises(AssertionError, match=r"\bfuture\b"):
            assert_causal(lambda x: output(layer, x, attn_mask=mask, weights_too=weights_too, is_causal=False), x)


@pytest.mark.parametrize("weights_too", [False, True])
def test_value_defaults_to_key(weights_too):
    layer, query, key = make(k_in=7), draw(B, TQ, 6), draw(B, TK, 7)
    assert layer.v_proj.in_features == 7
    got = output(layer, query, key, weights_too=weights_too)
    assert torch.equal(got, output(layer, query, key, key, weights_too=weights_too))
    assert torch.equal(got, output(layer, query=query, key=key, weights_too=weights_too))
    assert MultiHeadAttention(6, 8, 4, 0.0, 2, v_in=5).k_proj.in_features == 6
    with pytest.raises(ValueError, match=r"\bkey\b"):
        layer(query, value=key)
    with pytest.raises(ValueError, match=r"\bkey\b"):
        make()(query, None, query)           # of widths that would fit


# --- empty rows, pads

@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_heads_of_empty_rows_give_0(additive, weights_too):
    """In row 0 tokens 0 and 1 see nothing: the output is the bias of o_proj. In head 1 token 2 sees nothing."""
    layer, x = make(), draw(B, 5, 6).requires_grad_()
    mask = padding_mask(REAL).repeat(1, H, 5, 1)
    mask[:, 1, 2] = False
    mask = mask_to_bias(mask, torch.float64) if additive else mask
    out = output(layer, x, attn_mask=mask, weights_too=weights_too)
    assert torch.equal(out[0, :2], layer.o_proj.bias.expand(2, D)) and (out[1:] != layer.o_proj.bias).all()
    gradients = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()], retain_graph=True)
    assert all(g.isfinite().all() and g.any() for g in gradients) and not gradients[0][0, :2].any()
    names = ["x", *dict(layer.named_parameters())]
    gradients = torch.autograd.grad(out[0, :2].sum(), [x, *layer.parameters()], materialize_grads=True, allow_unused=True)
    assert {name for name, g in zip(names, gradients) if g.any()} == {"o_proj.bias"}
    with torch.no_grad():
        layer.o_proj.weight.copy_(torch.eye(D)), layer.o_proj.bias.zero_()
    heads = output(layer, x, attn_mask=mask, weights_too=weights_too).unflatten(-1, (H, D // H))
    empty = torch.zeros(B, 5, H).bool()
    empty[0, :2], empty[:, 2, 1] = True, True
    assert torch.equal(~heads.any(-1), empty)
    nothing = layer(x, attn_mask=torch.zeros(5, 5).bool(), return_weights=True)
    assert not nothing[0].any() and not nothing[1].any()


@pytest.mark.parametrize("garbage", [3e38, -3e38])
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_pads_may_hold_anything_finite(garbage, additive, cross):
    """Left pads in self-attention: there a pad on the right is a query that sees real keys, and its own row is lost."""
    layer, x, query = make().float(), draw(B, 5, 6).float(), draw(B, TQ, 6).float()
    real = REAL if cross else REAL.sort(-1)[0]
    dirty = x.masked_fill(real[..., None] == 0, garbage)
    mask = mask_to_bias(padding_mask(real), torch.float32) if additive else padding_mask(real)
    for weights_too in (False, True):
        if cross:
            want = output(layer, query, x, attn_mask=mask, weights_too=weights_too)
            got = output(layer, query, dirty, attn_mask=mask, weights_too=weights_too)
        else:
            want = output(layer, x, attn_mask=mask, weights_too=weights_too)[real == 1]
            got = output(layer, dirty, attn_mask=mask, weights_too=weights_too)[real == 1]
        assert_close(got, want)
        grads = torch.autograd.grad(got.sum(), list(layer.parameters()))
        assert all(g.isfinite().all() for g in grads)


# --- leading axes, lengths, refusals

@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 1, 2), (0,), (2, 0)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_any_leading_axes(lead, masked, cross):
    layer, inputs = make(), [draw(*lead, 5, 6), draw(*lead, 7, 6), draw(*lead, 7, 6)][:3 if cross else 1]
    rows = [x.reshape(-1, *x.shape[-2:]) for x in inputs]
    mask = torch.rand(len(rows[0]), H, 5, inputs[-1].shape[-2]) > 0.3 if masked else None
    out, weights = layer(*inputs, attn_mask=mask, return_weights=True)
    assert out.shape == (*lead, 5, D) and weights.shape == (*lead, H, 5, inputs[-1].shape[-2])
    assert_close(layer(*inputs, attn_mask=mask), out, rtol=0, atol=1e-9)
    for n, row in enumerate(zip(*rows)):
        a, b = layer(*row, attn_mask=None if mask is None else mask[n], return_weights=True)
        assert_close(out.reshape(-1, 5, D)[n], a, rtol=0, atol=1e-9)
        assert_close(weights.reshape(-1, *b.shape)[n], b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("q_len, kv_len, words", [
    (5, 5, None), (6, 5, "query"), (1, 1, None), (0, 3, None), (3, 0, None), (5, 6, "key"), (9, 7, "query")])
@pytest.mark.parametrize("weights_too", [False, True])
def test_context_length(q_len, kv_len, words, weights_too):
    layer, free = make(context_length=5), make(context_length=None)
    free.load_state_dict(layer.state_dict())
    query, key = draw(B, q_len, 6), draw(B, kv_len, 6)
    want = output(free, query, key, weights_too=weights_too)
    assert want.shape == (B, q_len, D) and torch.all((want == layer.o_proj.bias) == (kv_len == 0))
    if words is None:
        assert torch.equal(output(layer, query, key, weights_too=weights_too), want)
    else:
        with pytest.raises(ValueError, match=rf"\b{words}\b"):
            output(layer, query, key, weights_too=weights_too)
    if q_len > 5:
        with pytest.raises(ValueError, match=r"\bquery\b"):
            output(layer, query, weights_too=weights_too)


@pytest.mark.parametrize("arguments, options, error, words", [
    ((6, 8, 4, 0.1, 3), {}, ValueError, "num_heads"),
    ((6, 8, 4, 0.1, 16), {}, ValueError, "num_heads"),
    ((0, 8, 4, 0.1, 2), {}, ValueError, "d_in"),
    ((6, 0, 4, 0.1, 2), {}, ValueError, "d_out"),
    ((6, 8, 0, 0.1, 2), {}, ValueError, "context_length"),
    ((6, 8, -4, 0.1, 2), {}, ValueError, "context_length"),
    ((6, 8, 4, 0.1, 0), {}, ValueError, "num_heads"),
    ((6, 8, 4, 0.1, -2), {}, ValueError, "num_heads"),
    ((6, 8, 4, 0.1, 2), {"k_in": 0}, ValueError, "k_in"),
    ((6, 8, 4, 0.1, 2), {"v_in": -1}, ValueError, "v_in"),
    ((6.0, 8, 4, 0.1, 2), {}, TypeError, "d_in"),
    ((6, "8", 4, 0.1, 2), {}, TypeError, "d_out"),
    ((6, 8, 4.5, 0.1, 2), {}, TypeError, "context_length"),
    ((6, 8, 4, 0.1, 2.0), {}, TypeError, "num_heads"),
    ((6, 8, 4, 0.1, True), {}, TypeError, "num_heads"),
    ((6, 8, 4, 0.1, 2), {"k_in": 6.0}, TypeError, "k_in"),
    ((6, 8, 4, 0.1, 2), {"v_in": "6"}, TypeError, "v_in"),
    ((6, 8, 4, 1.5, 2), {}, ValueError, "dropout"),
    ((6, 8, 4, -0.1, 2), {}, ValueError, "dropout"),
    ((6, 8, 4, "0.1", 2), {}, TypeError, "dropout"),
    ((6, 8, 4, None, 2), {}, TypeError, "dropout"),
    ((6, 8, 2, 4, 1), {}, ValueError, "dropout"),
    ((6, 8, 4, 0.1, 2, False, 6), {}, TypeError, "positional arguments"),
])
def test_wrong_sizes_are_refused(arguments, options, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        MultiHeadAttention(*arguments, **options)


def zeros(*shape, dtype=torch.float64):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("inputs, error, words", [
    ((None,), TypeError, "query"),
    ((zeros(2, 4, 6), [1.0]), TypeError, "key"),
    ((zeros(2, 4, 6), zeros(2, 5, 7), zeros(2, 5, 3, dtype=torch.int64)), TypeError, "value"),
    ((zeros(2, 4, 7), zeros(2, 5, 7), zeros(2, 5, 3)), ValueError, "query"),
    ((zeros(2, 4, 6), zeros(2, 5, 6), zeros(2, 5, 3)), ValueError, "key"),
    ((zeros(2, 4, 6), zeros(2, 5, 7), zeros(2, 5, 7)), ValueError, "value"),
    ((zeros(2, 4, 6), zeros(2, 5, 7)), ValueError, "value"),
    ((zeros(2, 4, 6),), ValueError, "key"),
    ((zeros(6), zeros(7), zeros(3)), ValueError, "query"),
    ((zeros(4, 6), zeros(7), zeros(3)), ValueError, "key"),
    ((zeros(4, 6, dtype=torch.float32), zeros(5, 7), zeros(5, 3)), TypeError, "query"),
    ((zeros(4, 6), zeros(5, 7), zeros(5, 3, dtype=torch.float16)), TypeError, "value"),
    ((zeros(2, 4, 6), zeros(3, 5, 7), zeros(3, 5, 3)), ValueError, "query"),
    ((zeros(2, 4, 6), zeros(2, 5, 7), zeros(3, 5, 3)), ValueError, "value"),
    ((zeros(2, 4, 6), zeros(1, 5, 7), zeros(1, 5, 3)), ValueError, "query"),
    ((zeros(2, 4, 6), zeros(5, 7), zeros(5, 3)), ValueError, "query"),
    ((zeros(2, 3, 4, 6), zeros(6, 5, 7), zeros(6, 5, 3)), ValueError, "query"),
    ((zeros(2, 4, 6), zeros(2, 5, 7), zeros(2, 4, 3)), ValueError, "value"),
    ((zeros(2, 4, 6), zeros(2, 5, 7), zeros(2, 9, 3)), ValueError, "value"),
])
@pytest.mark.parametrize("weights_too", [False, True])
def test_wrong_input_is_refused(inputs, error, words, weights_too):
    with pytest.raises(error, match=rf"\b{words}\b"):
        make(k_in=7, v_in=3)(*inputs, return_weights=weights_too)


@pytest.mark.parametrize("mask, error, words", [
    (REAL.bool(), ValueError, "attn_mask"),
    (torch.ones(3, 4, 5).bool(), ValueError, "attn_mask"),
    (torch.ones(6, 4, 5), ValueError, "attn_mask"),
    (torch.ones(5, 4), ValueError, "attn_mask"),
    (torch.ones(1, 3, 2, 4, 5), ValueError, "attn_mask"),
    (padding_mask(REAL).long(), TypeError, "attn_mask"),
    ([[True]], TypeError, "attn_mask"),
    (torch.ones(4, 5, device="meta").bool(), TypeError, "attn_mask"),
])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("weights_too", [False, True])
def test_wrong_masks_are_refused(mask, error, words, causal, weights_too):
    with pytest.raises(error, match=rf"\b{words}\b"):
        make()(draw(B, TQ, 6), draw(B, TK, 6), attn_mask=mask, is_causal=causal, return_weights=weights_too)


def test_large_sizes_are_compared_by_value():
    layer, x, key = make(context_length=300).float(), torch.randn(300, 2, 6), torch.randn(300, 300, 6)
    assert layer(x, key, key.clone()).shape == (300, 2, D) and layer(key).shape == (300, 300, D)
    wide = MultiHeadAttention(300, 300, None, 0.0, 300, k_in=300, v_in=300)
    assert wide.to_torch().in_proj_weight.shape == (900, 300)


def test_keywords_are_keywords():
    layer, x = make(), draw(B, 5, 6)
    with pytest.raises(TypeError):
        layer(x, x, x, causal_mask(5))
    twin = MultiHeadAttention(d_in=6, d_out=8, context_length=8, dropout=0.0, num_heads=2, qkv_bias=True).double()
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(query=x, key=x, value=x), layer(x, x, x))


# --- dropout, precision, tools

class Road(nn.Module):
    def __init__(self, layer, **options):
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, *inputs):
        return output(self.layer, *inputs, **self.options)


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_random_in_training_and_only_there(masked, weights_too, cross):
    layer, inputs = make(p=0.5), (draw(B, 5, 6), *([draw(B, 5, 6)] if cross else []))
    mask = padding_mask(REAL) if masked else None
    assert_eval_deterministic(Road(layer, attn_mask=mask, weights_too=weights_too), *inputs)
    outs = []
    for too in (False, True, weights_too):
        torch.manual_seed(1)
        outs.append(output(layer, *inputs, attn_mask=mask, weights_too=too))
    assert_close(outs[0], outs[1]), assert_close(outs[2], outs[0])
    weights = [m(*inputs, attn_mask=mask, return_weights=True)[1] for m in (layer.train(), layer.eval())]
    assert torch.equal(*weights)
    layer.dropout.train()                     # Monte Carlo dropout: the nn.Dropout module decides
    assert not torch.equal(layer(*inputs), layer(*inputs))


def test_dropout_of_1_leaves_the_bias():
    layer, x = make(p=1.0), draw(B, 5, 6)
    for weights_too in (False, True):
        assert torch.equal(output(layer, x, weights_too=weights_too), layer.o_proj.bias.expand(B, 5, D))
        assert_far(output(layer.eval(), x, weights_too=weights_too), layer.o_proj.bias)
        layer.train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("name", ["none", "padding", "numbers"])
def test_rounds_no_worse_than_multihead_attention(dtype, weights_too, name):
    """Its layer takes the fused function too; masks that leave each query a key."""
    layer, inputs = make(D).float(), (draw(B, TQ, D), draw(B, TK, D), draw(B, TK, D))
    names, values = zip(*layer.named_parameters())
    mask = {"none": None, "padding": padding_mask(REAL), "numbers": torch.randn(B, H, TQ, TK)}[name]

    def ours(*xs):
        state, options = dict(zip(names, xs[3:])), {"attn_mask": mask, "return_weights": weights_too}
        out = torch.func.functional_call(layer, state, xs[:3], options)
        return out[0] if weights_too else out

    def theirs(*xs):
        state = dict(zip(names, xs[3:]))
        bias = {"none": None, "padding": REAL == 0}.get(name, None)
        numbers = mask.flatten(0, 1).to(xs[0].dtype) if name == "numbers" else None
        peer = nn.MultiheadAttention(D, H, batch_first=True, dtype=xs[0].dtype)
        return torch.func.functional_call(peer, multihead_state(state, D), xs[:3], {
            "need_weights": False, "key_padding_mask": bias, "attn_mask": numbers})[0]

    assert_as_precise(ours, theirs, *inputs, *values, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_runs_in_every_dtype_and_under_autocast(dtype):
    layer, x = make(p=0.1).to(dtype), draw(B, 5, 6).to(dtype)
    for mask in (None, padding_mask(REAL), torch.randn(H, 5, 5)):
        for inputs in ((x,), (x, x[:, 1:], x[:, 1:])):
            cut = mask if mask is None else mask[..., :inputs[-1].shape[1]]
            out, weights = layer(*inputs, attn_mask=cut, return_weights=True)
            assert out.dtype == weights.dtype == layer(*inputs, attn_mask=cut).dtype == dtype and out.isfinite().all()
    if dtype == torch.float32:
        layer.eval()
        with torch.autocast("cpu", torch.bfloat16):
            fused, (readable, weights) = layer(x), layer(x, return_weights=True)
            assert fused.dtype == readable.dtype == torch.bfloat16 == layer(x.bfloat16(), x, x).dtype
        assert_close(fused.float(), readable.float(), rtol=2e-2, atol=5e-2)
        assert_close(fused.float(), layer(x), rtol=5e-2, atol=1e-1)
        assert_rows_sum_to_one(weights, causal_mask(5))


def test_round_trips():
    layer, x, key, mask = make(p=0.5).eval(), draw(B, TQ, 6), draw(B, TK, 6), torch.rand(B, H, TQ, TK) > 0.3
    with torch.device("meta"):
        late = MultiHeadAttention(6, D, 8, 0.5, H, True).double()
    late.to_empty(device="cpu").load_state_dict(layer.state_dict())
    for other in (late.eval(), copy.deepcopy(layer)):
        for inputs in ((x,), (x, key)):
            assert torch.equal(layer(*inputs), other(*inputs))
    masked = {"attn_mask": mask, "is_causal": True}
    assert_close(torch.vmap(layer)(x), layer(x)), assert_close(torch.vmap(layer)(x, key), layer(x, key))
    for options in ({}, {"return_weights": True}):
        got = torch.vmap(lambda x, k, m: layer(x, k, attn_mask=m, is_causal=True, **options))(x, key, mask)
        assert_close(got, layer(x, key, **masked, **options))
    empty = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    assert not torch.func.functional_call(layer, empty, (x,)).any() and layer(x).any()
    before = x.clone(), key.clone(), mask.clone()
    layer(x, key, **masked), layer(x, key, **masked, return_weights=True)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, key, mask)))
    assert MultiHeadAttention(6, D, 10 ** 9, 0.5, H, True).load_state_dict(layer.state_dict())


def test_on_the_meta_device():
    with torch.device("meta"):
        layer, x = MultiHeadAttention(6, D, 8, 0.1, H), torch.zeros(B, TQ, 6)
        for mask in (None, torch.zeros(H, TQ, TQ).bool()):
            out, weights = layer(x, attn_mask=mask, return_weights=True)
            assert out.is_meta and out.shape == (B, TQ, D) and weights.shape == (B, H, TQ, TQ)
            assert layer(x, attn_mask=mask).shape == layer(x, x, attn_mask=mask, is_causal=True).shape == (B, TQ, D)
        theirs = MultiHeadAttention(D, D, 8, 0.1, H).to_torch()
    assert theirs.in_proj_weight.is_meta and MultiHeadAttention.from_torch(theirs).q_proj.weight.is_meta


def test_gradcheck():
    layer, query, key = make(3, 4), draw(2, 3, 3).requires_grad_(), draw(2, 4, 3).requires_grad_()
    bias = draw(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k, b: layer(q, k, attn_mask=b, is_causal=True), (query, key, bias))
    assert torch.autograd.gradcheck(lambda q, k, b: layer(q, k, attn_mask=b, return_weights=True), (query, key, bias))


@pytest.mark.slow
def test_exports_with_free_lengths():
    layer, x, key = make(context_length=64).float().eval(), torch.randn(2, 5, 6), torch.randn(2, 7, 6)
    q_len, kv_len = torch.export.Dim("q_len", min=2, max=64), torch.export.Dim("kv_len", min=2, max=64)
    longer, other, real = torch.randn(2, 9, 6), torch.randn(2, 11, 6), torch.rand(2, 11) > 0.3

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, key, real):
            return self.layer(x, key, attn_mask=padding_mask(real))

    program = torch.export.export(layer, (x,), dynamic_shapes={"query": {1: q_len}})
    assert_close(program.module()(longer), layer(longer))
    free = ({1: q_len}, {1: kv_len}, {1: kv_len})
    program = torch.export.export(Masked(), (x, key, torch.rand(2, 7) > 0.3), dynamic_shapes=free)
    assert_close(program.module()(longer, other, real), layer(longer, other, attn_mask=padding_mask(real)))


@pytest.mark.slow
def test_split_and_merge_compile():
    torch.compiler.reset()
    both = torch.compile(lambda x: merge_heads(split_heads(x, 2).contiguous()), fullgraph=True, backend="aot_eager",
                         dynamic=True)
    for length in (3, 5):
        x = torch.randn(2, length, 8)
        assert torch.equal(both(x), x)


# --- found by reviewers

def test_a_subclass_that_computes_something_else_is_refused():
    """The quantizable layer keeps its weights elsewhere, and an unused matrix here."""
    from torch.ao.nn.quantizable import MultiheadAttention as Other

    with pytest.raises(TypeError, match=r"\blayer\b"):
        MultiHeadAttention.from_torch(Other(8, 2, batch_first=True))


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_layer_runs():
    layer, x = MultiHeadAttention(8, 8, None, 0.0, 2), torch.randn(2, 5, 8)
    quantized = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
    assert_close(quantized(x), layer(x), rtol=0, atol=0.1)
    with pytest.raises(ValueError, match=r"\bquery\b"):
        quantized(x[..., :7])


def test_other_devices_are_named():
    layer = MultiHeadAttention(8, 8, None, 0.0, 2)
    with pytest.raises(TypeError, match=r"\bquery\b"):
        layer(torch.randn(2, 5, 8, device="meta"))
    with pytest.raises(TypeError, match=r"\bquery\b"):
        layer.to("meta")(torch.randn(2, 5, 8, device="meta", dtype=torch.float16))
    assert layer(torch.randn(2, 5, 8, device="meta")).shape == (2, 5, 8)


def test_a_mask_that_comes_later_compiles():
    torch.compiler.reset()
    layer = MultiHeadAttention(8, 8, None, 0.0, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for length, mask in ((3, None), (4, torch.rand(4, 4) > 0.3), (5, torch.rand(5, 5) > 0.3)):
        x = torch.randn(2, length, 8)
        assert_close(compiled(x, attn_mask=mask), layer(x, attn_mask=mask))


def test_what_generated_bugs_got_through():
    mine = MultiHeadAttention(1, 1, None, 0.0, 1, True, out_bias=False)
    assert not mine.to_torch().out_proj.bias.any()                               # a width of 1
    wide = MultiHeadAttention(int("300"), int("300"), None, 0.0, 2)              # equal numbers, two objects
    assert wide.to_torch().embed_dim == 300
    for d_in, d_out in ((6, 12), (12, 6)):
        with pytest.raises(ValueError, match=r"\bd_in\b"):
            MultiHeadAttention(d_in, d_out, None, 0.0, 2).to_torch()
    with pytest.raises(TypeError):
        MultiHeadAttention.from_torch(nn.MultiheadAttention(8, 2), 5)            # keywords only
    layer, x = MultiHeadAttention(8, 8, None, 0.0, 2), torch.randn(2, 5, 8)
    for value in (x[:1], torch.cat([x, x])):
        with pytest.raises(ValueError, match=r"\bvalue\b"):
            layer(x, x, value)
    for value in (x[:, :4], torch.cat([x, x], 1)):
        with pytest.raises(ValueError, match=r"\bvalue\b"):
            layer(x, x, value)
