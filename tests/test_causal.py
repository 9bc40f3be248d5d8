"""Masks and the causal head: against loops in plain Python, PyTorch and transformers, on the paths where silent errors live."""
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import multihead_of
from torch import nn
from torch.testing import assert_close

from attn_nb.causal import (
    CausalSelfAttention,
    _attend,
    _check_flag,
    _hide_unseen,
    _join_masks,
    _shift_bias,
    bias_to_mask,
    causal_mask,
    mask_from_mha,
    mask_to_bias,
    padding_mask,
)
from attn_nb.single_head import SelfAttention, attention
from attn_nb.testing import assert_as_precise, assert_causal, assert_parity, assert_rows_sum_to_one

SDPA = F.scaled_dot_product_attention
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
examples = settings(max_examples=150, deadline=None, derandomize=True)
lengths_of = st.integers(0, 7)


def table(rule, q_len, kv_len):
    """A mask cell by cell, in plain Python; reshape keeps empty sides."""
    return torch.tensor([[bool(rule(i, j)) for j in range(kv_len)] for i in range(q_len)]).reshape(q_len, kv_len).bool()


def oracle(query, key, value, may):
    """Attention of one head with lists and math.exp; a query that may attend to nothing reads 0."""
    query, key, value, may = (x.tolist() for x in (query, key, value, may))
    out = []
    for q, row in zip(query, may):
        scores = [sum(a * b for a, b in zip(q, k)) / math.sqrt(len(q)) for k in key]
        allowed = [s for s, m in zip(scores, row) if m]
        powers = [math.exp(s - max(allowed)) if m else 0.0 for s, m in zip(scores, row)]
        total = sum(powers) or 1.0
        out.append([sum(p * v[c] for p, v in zip(powers, value)) / total for c in range(len(value[0]))])
    return torch.tensor(out, dtype=torch.float64)


# --- builders

@given(q_len=lengths_of, kv_len=lengths_of, offset=st.integers(-9, 9))
@examples
def test_causal_mask_is_the_rule(q_len, kv_len, offset):
    got = causal_mask(q_len, kv_len, offset=offset)
    assert got.dtype == torch.bool and torch.equal(got, table(lambda i, j: j <= i + offset, q_len, kv_len))
    assert torch.equal(causal_mask(q_len, kv_len), table(lambda i, j: j <= i + kv_len - q_len, q_len, kv_len))


@given(q_len=lengths_of, kv_len=lengths_of, offsets=st.lists(st.integers(-9, 9), max_size=4))
@examples
def test_an_offset_per_row(q_len, kv_len, offsets):
    got = causal_mask(q_len, kv_len, offset=torch.tensor(offsets, dtype=torch.int32))
    assert got.shape == (len(offsets), 1, q_len, kv_len) and got.dtype == torch.bool
    for row, offset in zip(got, offsets):
        assert torch.equal(row[0], table(lambda i, j: j <= i + offset, q_len, kv_len))


@given(q_len=st.integers(1, 6), past=st.integers(0, 6), window=st.integers(1, 8), prefix=st.integers(0, 6))
@examples
def test_windows_and_prefixes_are_made_of_causal_masks(q_len, past, window, prefix):
    kv_len = q_len + past
    slide = causal_mask(q_len, kv_len) & ~causal_mask(q_len, kv_len, offset=past - window)
    assert torch.equal(slide, table(lambda i, j: i + past - window < j <= i + past, q_len, kv_len))
    both = causal_mask(q_len, kv_len) | padding_mask(torch.tensor([min(prefix, kv_len)]), kv_len)[0, 0]
    assert torch.equal(both, table(lambda i, j: j <= i + past or j < prefix, q_len, kv_len))


@given(lengths=st.lists(st.integers(0, 6), max_size=5), more=st.integers(0, 3))
@examples
def test_padding_mask_from_lengths(lengths, more):
    longest = max(lengths, default=0)
    for kv_len in (None, longest + more):
        got = padding_mask(torch.tensor(lengths, dtype=torch.long), kv_len)
        width = longest if kv_len is None else kv_len
        assert got.dtype == torch.bool and got.shape == (len(lengths), 1, 1, width)
        for row, length in zip(got, lengths):
            assert row[0, 0].tolist() == [j < length for j in range(width)]


@given(rows=st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1,
                                                         max_size=4)))
@examples
def test_padding_mask_from_an_attention_mask(rows):
    want = torch.tensor(rows)[:, None, None]
    for dtype in (torch.bool, torch.long, torch.int32, torch.uint8):
        given_mask = torch.tensor(rows).to(dtype)
        before = given_mask.clone()
        assert torch.equal(padding_mask(given_mask), want)
        assert torch.equal(padding_mask(given_mask, len(rows[0])), want) and torch.equal(given_mask, before)


@given(data=st.data(), q_len=st.integers(1, 5), kv_len=st.integers(1, 6), batch=st.integers(1, 3), heads=st.integers(1, 3))
@examples
def test_attention_with_any_mask_is_the_oracle(data, q_len, kv_len, batch, heads):
    """Causal with any offset, padding and any bits, joined; bool and additive; loops in plain Python."""
    query = 3 * torch.randn(batch, heads, q_len, 4, dtype=torch.float64)
    key, value = torch.randn(batch, heads, kv_len, 4).double(), torch.randn(batch, heads, kv_len, 3).double()
    offsets = data.draw(st.lists(st.integers(-2, kv_len), min_size=batch, max_size=batch))
    lengths = data.draw(st.lists(st.integers(0, kv_len), min_size=batch, max_size=batch))
    bits = torch.tensor(data.draw(st.lists(st.booleans(), min_size=q_len * kv_len, max_size=q_len * kv_len)))
    may = causal_mask(q_len, kv_len, offset=torch.tensor(offsets)) & padding_mask(torch.tensor(lengths), kv_len)
    may = may & bits.view(q_len, kv_len)
    out, weights = attention(query, key, value, may)
    added = attention(query, key, value, mask_to_bias(may, torch.float64))[0]
    assert torch.equal(out, added)
    full = may.expand(batch, heads, q_len, kv_len)
    for b in range(batch):
        for h in range(heads):
            want = oracle(query[b, h], key[b, h], value[b, h], full[b, h])
            assert_close(out[b, h], want, rtol=0, atol=1e-9)
    assert_rows_sum_to_one(weights, may)


@pytest.mark.parametrize("shape", [(), (6,), (1, 6), (4, 1), (4, 6), (1, 4, 6), (3, 4, 6), (2, 1, 1, 6), (2, 3, 4, 6)])
def test_masks_of_any_rank(shape):
    query, key = 3 * torch.randn(2, 3, 4, 8).double(), torch.randn(2, 3, 6, 8).double()
    value = torch.randn(2, 3, 6, 5).double()
    mask, bias = torch.rand(shape) > 0.2, torch.randn(shape).double()
    out = attention(query, key, value, mask)[0]
    assert_close(out, SDPA(query, key, value, mask.expand(2, 3, 4, 6)), rtol=0, atol=1e-9)
    assert_close(attention(query, key, value, bias)[0], SDPA(query, key, value, bias.expand(2, 3, 4, 6)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_in_every_dtype(dtype):
    may = causal_mask(4, 6)
    bias = mask_to_bias(may, dtype)
    assert bias.dtype == dtype and bias.shape == (4, 6)
    assert torch.equal(bias == 0, may) and torch.equal(bias == -torch.inf, ~may)
    assert torch.equal(bias_to_mask(bias), may)
    lowest = torch.zeros(4, 6, dtype=dtype).masked_fill(~may, torch.finfo(dtype).min)
    assert torch.equal(bias_to_mask(lowest), may)
    twice = lowest + lowest
    assert torch.equal(bias_to_mask(twice), may)


def test_keywords():
    assert torch.equal(causal_mask(q_len=2, kv_len=3), causal_mask(2, 3))
    assert torch.equal(padding_mask(lengths_or_attention_mask=torch.tensor([1]), kv_len=2), padding_mask(torch.tensor([1]), 2))


def test_masks_follow_the_device():
    assert causal_mask(3, device="meta").device.type == "meta"
    offset = torch.zeros(2, dtype=torch.long, device="meta")
    assert causal_mask(3, offset=offset).device.type == "meta"
    assert causal_mask(3, offset=torch.zeros(2, dtype=torch.long), device="meta").device.type == "meta"
    bits = torch.ones(2, 3, dtype=torch.bool, device="meta")
    assert padding_mask(bits).device.type == "meta"
    assert mask_to_bias(bits, torch.float32).device.type == "meta"
    assert bias_to_mask(torch.zeros(2, 3, device="meta")).device.type == "meta"
    assert padding_mask(bits.long()).shape == padding_mask(offset, 3).shape == (2, 1, 1, 3)
    q = torch.zeros(2, 1, 4, 8, device="meta")
    assert attention(q, q, q, causal_mask(4, device="meta"))[0].shape == q.shape
    with torch.device("meta"):
        layer = CausalSelfAttention(6, 4)
    for out in (layer(torch.zeros(2, 3, 6, device="meta"), attn_mask=padding_mask(bits)),
                layer(torch.zeros(2, 3, 6, device="meta"), return_weights=True)[0]):
        assert out.shape == (2, 3, 4)


def test_a_mask_is_broadcast_not_copied():
    assert padding_mask(torch.tensor([64, 3])).shape == (2, 1, 1, 64)
    assert (causal_mask(64) & padding_mask(torch.tensor([64, 3]))).shape == (2, 1, 64, 64)
    ids = torch.ones(2, 5, dtype=torch.bool)
    padding_mask(ids)[0] = False
    assert ids.all()                     # the result is not a view of the argument


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_small_integers_do_not_wrap(dtype):
    got = padding_mask(torch.tensor([100, 3], dtype=dtype), 200)
    assert got.sum((1, 2, 3)).tolist() == [100, 3]
    offset = torch.tensor([127, -1], dtype=torch.int8 if dtype == torch.uint8 else dtype)
    assert causal_mask(3, 300, offset=offset).sum((1, 2, 3)).tolist() == [128 + 129 + 130, 0 + 1 + 2]


@pytest.mark.parametrize("offset", [2 ** 63 - 1, 2 ** 62, 10 ** 6])
def test_any_offset_of_64_bits(offset):
    for sign, all_of_it in ((1, True), (-1, False)):
        assert causal_mask(3, 4, offset=sign * offset).all() == all_of_it
        assert causal_mask(3, 4, offset=torch.tensor([sign * offset])).all() == all_of_it
    assert not causal_mask(3, 4, offset=-2 ** 63).any()


HUGGING_FACE = [torch.tensor(m) for m in ([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
                                          [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])]


@pytest.mark.slow
@pytest.mark.parametrize("attention_mask", HUGGING_FACE)
@pytest.mark.parametrize("past, window", [(0, None), (3, None), (0, 2), (3, 2)])
def test_equals_the_masks_of_transformers(attention_mask, past, window):
    """Both of its forms, bool for sdpa and additive for eager, with and without a cache, with and without a window."""
    from transformers import DynamicCache, MistralConfig
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = MistralConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, sliding_window=window)
    cache = DynamicCache(config=config)
    q_len, kv_len = 5 - past, 5
    if past:
        cache.update(*torch.zeros(2, 2, 2, past, 4), 0)
    may = causal_mask(q_len, kv_len) & padding_mask(attention_mask)
    if window:
        may = may & ~causal_mask(q_len, kv_len, offset=past - window)
    make = create_sliding_window_causal_mask if window else create_causal_mask
    for kind in ("sdpa", "eager"):
        config._attn_implementation = kind
        theirs = make(config=config, inputs_embeds=torch.zeros(2, q_len, 8), attention_mask=attention_mask,
                      past_key_values=cache if past else None)
        if theirs is None:          # sdpa: no mask, and is_causal is meant
            assert torch.equal(may, causal_mask(q_len).expand(may.shape))
            continue
        theirs = bias_to_mask(theirs) if theirs.is_floating_point() else theirs
        theirs = theirs[..., -kv_len:]
        columns = slice(kv_len - theirs.shape[-1], None)     # a sliding cache keeps the window only
        assert torch.equal(theirs.expand(may[..., columns].shape), may[..., columns])


# --- nn.MultiheadAttention's polarity

def plain_mha(heads, width):
    layer = nn.MultiheadAttention(heads * width, heads, bias=False, batch_first=True).double()
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.eye(heads * width).repeat(3, 1))
        layer.out_proj.weight.copy_(torch.eye(heads * width))
    return layer


@given(data=st.data(), batch=st.integers(1, 3), heads=st.integers(1, 3), q_len=st.integers(1, 4), kv_len=st.integers(1, 5))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_mask_from_mha_means_the_same(data, batch, heads, q_len, kv_len):
    """The library with its masks equals our attention with the converted one, for every form it takes."""
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    drop = torch.rand(data.draw(st.sampled_from([(q_len, kv_len), (batch * heads, q_len, kv_len)])), generator=rng) > 0.6
    pad = torch.rand(batch, kv_len, generator=rng) > 0.6
    drop[..., 0], pad[:, 0] = False, False          # the library gives NaN for a query that sees nothing
    layer, width = plain_mha(heads, 4), 4
    query = torch.randn(batch, q_len, heads * width, dtype=torch.float64)
    key = torch.randn(batch, kv_len, heads * width, dtype=torch.float64)
    use = data.draw(st.sampled_from(["both", "mask", "pad", "float"]))
    theirs = {"attn_mask": drop if use != "pad" else None, "key_padding_mask": pad if use != "mask" else None}
    if use == "float":
        theirs = {name: mask_to_bias(~mask, torch.float64) for name, mask in theirs.items()}
    want = layer(query, key, key, **theirs)[0]
    may = mask_from_mha(**theirs, num_heads=heads)

    def split(x):
        return x.unflatten(-1, (heads, width)).transpose(1, 2)

    out = attention(split(query), split(key), split(key), may)[0].transpose(1, 2).flatten(2)
    assert_close(out, want, rtol=0, atol=1e-9)


def test_mask_from_mha_without_a_batch():
    both = mask_from_mha(torch.tensor([[False, True], [False, False]]), torch.tensor([False, True]))
    assert both.tolist() == [[[True, False], [True, False]]]
    two_heads = torch.tensor([[[False, True], [False, False]], [[True, True], [False, True]]])
    heads = mask_from_mha(two_heads, torch.tensor([False, True]), num_heads=2)
    assert heads.tolist() == [[[[True, False], [True, False]], [[False, False], [True, False]]]]
    assert torch.equal(mask_from_mha(key_padding_mask=torch.tensor([False, True])), torch.tensor([[[True, False]]]))
    pads = torch.tensor([[False, True], [False, False]])
    assert torch.equal(mask_from_mha(key_padding_mask=pads), ~pads[:, None, None])


@pytest.mark.parametrize("arguments, error, words", [
    ({}, ValueError, "attn_mask or key_padding_mask must be given"),
    ({"attn_mask": [[True]]}, TypeError, "attn_mask must be a bool or float tensor, got list"),
    ({"attn_mask": torch.ones(2, 2).long()}, TypeError, "attn_mask must be a bool or float tensor, got torch.int64"),
    ({"attn_mask": torch.ones(2).bool()}, ValueError, r"attn_mask must have 2 or 3 axes, got shape \(2,\)"),
    ({"attn_mask": torch.ones(1, 1, 2, 2).bool()}, ValueError, "attn_mask must have 2 or 3 axes"),
    ({"key_padding_mask": torch.ones(2, 1, 2).bool()}, ValueError, "key_padding_mask must have 1 or 2 axes"),
    ({"attn_mask": torch.ones(4, 2, 2).bool(), "num_heads": 3}, ValueError,
     r"num_heads must divide .* got 3 and shape \(4, 2, 2\)"),
    ({"attn_mask": torch.ones(4, 2, 2).bool()}, TypeError, "num_heads must be an int, got None"),
    ({"attn_mask": torch.ones(4, 2, 2).bool(), "num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    ({"attn_mask": torch.ones(4, 2, 2).bool(), "num_heads": 2.0}, TypeError, "num_heads must be an int, got 2.0"),
    ({"attn_mask": torch.ones(2, 2)}, ValueError, "attn_mask must hold only 0 and -inf"),
    ({"key_padding_mask": torch.ones(2, 2)}, ValueError, "key_padding_mask must hold only 0 and -inf"),
    ({"attn_mask": torch.ones(2, 3).bool(), "key_padding_mask": torch.ones(2, 1).bool()}, ValueError, "must fit together"),
    ({"attn_mask": torch.ones(8, 3, 3).bool(), "key_padding_mask": torch.ones(1, 3).bool(), "num_heads": 2}, ValueError,
     r"must fit together, got shapes \(8, 3, 3\), \(1, 3\)"),
    ({"attn_mask": torch.ones(2, 3, 3).bool(), "key_padding_mask": torch.ones(2, 3).bool(), "num_heads": 2}, ValueError,
     r"must fit together, got shapes \(2, 3, 3\), \(2, 3\)"),
    ({"attn_mask": torch.ones(8, 3, 3).bool(), "key_padding_mask": torch.ones(3).bool(), "num_heads": 2}, ValueError,
     r"must fit together, got shapes \(8, 3, 3\), \(3,\)"),
    ({"attn_mask": torch.ones(3, 3).bool(), "key_padding_mask": torch.ones(2, 3, device="meta").bool()}, TypeError,
     "must share a device, got cpu, meta"),
    ({"attn_mask": torch.ones(2, 2).bool(), "key_padding_mask": torch.ones(2, 3).bool()}, ValueError,
     r"must fit together, got shapes \(2, 2\), \(2, 3\)"),
])
def test_mask_from_mha_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        mask_from_mha(**arguments)


# --- refusals of the builders

@pytest.mark.parametrize("call, error, words", [
    (lambda: causal_mask(-1), ValueError, "q_len must be at least 0, got -1"),
    (lambda: causal_mask(2, -3), ValueError, "kv_len must be at least 0, got -3"),
    (lambda: causal_mask(2.0), TypeError, "q_len must be an int, got 2.0"),
    (lambda: causal_mask(True), TypeError, "q_len must be an int, got True"),
    (lambda: causal_mask(2, torch.tensor(2)), TypeError, r"kv_len must be an int, got tensor\(2\)"),
    (lambda: causal_mask(2, offset=1.0), TypeError, r"offset must be an int or an integer tensor \(B,\), got 1.0"),
    (lambda: causal_mask(2, offset=2 ** 63), ValueError, "offset must fit in 64 bits, got 9223372036854775808"),
    (lambda: causal_mask(2, offset=10 ** 30), ValueError, "offset must fit in 64 bits, got 10000"),
    (lambda: causal_mask(2, offset=-2 ** 63 - 1), ValueError, "offset must fit in 64 bits, got -9223372036854775809"),
    (lambda: causal_mask(2, offset=torch.tensor([1], dtype=torch.uint16)), TypeError, "offset must be .* got torch.uint16"),
    (lambda: padding_mask(torch.tensor([1], dtype=torch.uint32)), TypeError, "lengths_or_attention_mask .* torch.uint32"),
    (lambda: padding_mask(torch.tensor([1], device="meta")), ValueError, "kv_len must be given with lengths .* got None"),
    (lambda: causal_mask(2, offset=True), TypeError, "offset must be .* got True"),
    (lambda: causal_mask(2, offset=[1]), TypeError, r"offset must be .* got \[1\]"),
    (lambda: causal_mask(2, offset=torch.tensor([1.0])), TypeError, "offset must be .* got torch.float32"),
    (lambda: causal_mask(2, offset=torch.tensor([True])), TypeError, "offset must be .* got torch.bool"),
    (lambda: causal_mask(2, offset=torch.tensor(1)), ValueError, r"offset must be .* got shape \(\)"),
    (lambda: causal_mask(2, offset=torch.tensor([[1]])), ValueError, r"offset must be .* got shape \(1, 1\)"),
    (lambda: padding_mask([3, 2]), TypeError, "lengths_or_attention_mask must be .* got list"),
    (lambda: padding_mask(torch.tensor([3.0, 2.0])), TypeError, r"lengths_or_attention_mask .* torch.float32 \(2,\)"),
    (lambda: padding_mask(torch.tensor([True, False])), TypeError, r"lengths_or_attention_mask .* torch.bool \(2,\)"),
    (lambda: padding_mask(torch.tensor([[1 + 1j]])), TypeError, "lengths_or_attention_mask .* torch.complex64"),
    (lambda: causal_mask(2, 2, 1), TypeError, "takes from 1 to 2 positional arguments"),
    (lambda: padding_mask(torch.ones(1, 1, 2).bool()), TypeError, r"lengths_or_attention_mask .* torch.bool \(1, 1, 2\)"),
    (lambda: padding_mask(torch.tensor(3)), ValueError, r"must be \(B,\) or \(B, Tk\), got shape \(\)"),
    (lambda: padding_mask(torch.ones(1, 1, 2).long()), ValueError, r"must be \(B,\) or \(B, Tk\), got shape \(1, 1, 2\)"),
    (lambda: padding_mask(torch.tensor([2, -1])), ValueError, "lengths must be in 0 .. 2, got -1"),
    (lambda: padding_mask(torch.tensor([2, 5]), 4), ValueError, "lengths must be in 0 .. 4, got 5"),
    (lambda: padding_mask(torch.tensor([2, 5, 7]), 4), ValueError, "lengths must be in 0 .. 4, got 5"),
    (lambda: padding_mask(torch.tensor([2, 5]), -4), ValueError, "kv_len must be at least 0, got -4"),
    (lambda: padding_mask(torch.tensor([2, 5]), 5.0), TypeError, "kv_len must be an int, got 5.0"),
    (lambda: padding_mask(torch.tensor([[1, 2]])), ValueError, "an attention mask must be in 0 .. 1, got 2"),
    (lambda: padding_mask(torch.tensor([[1, -1]])), ValueError, "an attention mask must be in 0 .. 1, got -1"),
    (lambda: padding_mask(torch.tensor([[1, 0]]), 1), ValueError, "kv_len must be the width .* 2, got 1"),
    (lambda: padding_mask(torch.tensor([[1, 0]]), 3), ValueError, "kv_len must be the width .* 2, got 3"),
    (lambda: mask_to_bias(torch.ones(2), torch.float32), TypeError, "attn_mask must be bool .* got torch.float32"),
    (lambda: mask_to_bias([True], torch.float32), TypeError, "attn_mask must be bool .* got list"),
    (lambda: mask_to_bias(causal_mask(2), torch.int32), TypeError, "dtype must be one of .* got torch.int32"),
    (lambda: bias_to_mask(causal_mask(2)), TypeError, "attn_bias must be a float16.* got torch.bool"),
    (lambda: bias_to_mask(None), TypeError, "attn_bias must be a float16.* got NoneType"),
    (lambda: bias_to_mask(torch.tensor([0.0, -1e4])), ValueError, r"attn_bias must hold only 0 and -inf .* got -1e\+04"),
    (lambda: bias_to_mask(torch.tensor([0.0, -2.0, -3.0])), ValueError, "attn_bias must hold only 0 and -inf .* got -2"),
    (lambda: bias_to_mask(torch.tensor([0.0, torch.inf])), ValueError, "attn_bias must hold only .* got inf"),
    (lambda: bias_to_mask(torch.tensor([0.0, torch.nan])), ValueError, "attn_bias must hold only .* got nan"),
])
def test_wrong_input_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


# --- the layer

def layer_and_x(dtype=torch.float64, bias=True):
    return CausalSelfAttention(6, 4, qkv_bias=bias).to(dtype), (3 * torch.randn(3, 5, 6)).to(dtype)


LEFT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
SEEDED = torch.Generator().manual_seed(0)
ISLANDS = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]])
MASKS = {"none": None, "left": padding_mask(LEFT), "islands": padding_mask(ISLANDS),
         "one axis": torch.tensor([True, False, True, True, False]),
         "added": mask_to_bias(padding_mask(ISLANDS), torch.float64), "favours": torch.randn(5, 5, generator=SEEDED).double(),
         "per row": torch.rand(3, 1, 5, 5, generator=SEEDED) > 0.5, "nothing": torch.zeros(5, 5).bool()}


def joined(mask):
    """What the layer must make of a mask, cell by cell."""
    if mask is None:
        return causal_mask(5).expand(3, 1, 5, 5)
    allowed = mask if mask.dtype == torch.bool else mask > -torch.inf
    return causal_mask(5) & allowed.expand(3, 1, 5, 5)


@pytest.mark.parametrize("name", MASKS)
def test_both_roads_are_one_function(name):
    (layer, x), mask = layer_and_x(), MASKS[name]
    if name != "nothing":
        assert_parity(lambda x: layer(x, attn_mask=mask), lambda x: layer(x, attn_mask=mask, return_weights=True)[0], x)
    q, k, v = (p(x)[:, None] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    out, weights = layer(x, attn_mask=mask, return_weights=True)
    assert weights.shape == (3, 5, 5)
    assert_rows_sum_to_one(weights, joined(mask)[:, 0])
    if name != "favours":
        for b in range(3):
            want = oracle(q[b, 0].detach(), k[b, 0].detach(), v[b, 0].detach(), joined(mask)[b, 0])
            assert_close(out[b].detach(), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_the_future_never_arrives(name, return_weights):
    """Whatever the caller's mask allows, causality is joined to it."""
    (layer, x), mask = layer_and_x(), MASKS[name]

    def run(x):
        out = layer(x, attn_mask=mask, return_weights=return_weights)
        return out[0] if return_weights else out

    if name == "nothing":
        assert not run(x).any()
    else:
        assert_causal(run, x)
    assert_causal(lambda x: layer(x, attn_mask=torch.ones(5, 5).bool()), x)


def test_the_leak_test_has_teeth():
    layer, x = layer_and_x()
    with pytest.raises(AssertionError, match="it sees its future"):
        assert_causal(lambda x: SelfAttention.forward(layer, x), x)


@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_empty_rows_give_0_and_no_gradient(additive, return_weights):
    layer, x = layer_and_x()
    mask = mask_to_bias(padding_mask(ISLANDS), torch.float64) if additive else padding_mask(ISLANDS)
    x.requires_grad_()
    out = layer(x, attn_mask=mask, return_weights=return_weights)
    out = out[0] if return_weights else out
    empty = ~joined(mask)[:, 0].any(-1)
    assert empty.sum() == 6 and not out[empty].any()
    (out * torch.randn_like(out)).sum().backward()
    assert x.grad.isfinite().all() and not x.grad[1].any() and not x.grad[2, 0].any()
    assert all(p.grad.isfinite().all() for p in layer.parameters()) and x.grad[0].any()
    x.grad = None
    (layer(x, attn_mask=mask)[empty] * 5).sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("garbage", [3e38, -3e38, torch.inf, torch.nan])
@pytest.mark.parametrize("additive", [False, True])
def test_pads_may_hold_anything(garbage, additive):
    """A key that nobody may see is cleaned away before the fused function, gradients included."""
    layer, x = layer_and_x(torch.float32)
    mask = mask_to_bias(padding_mask(LEFT), torch.float32) if additive else padding_mask(LEFT)
    want = layer(x, attn_mask=mask)
    dirty = x.masked_fill(LEFT[..., None] == 0, garbage)
    out = layer(dirty, attn_mask=mask)
    assert torch.equal(out, want)
    out[1, 2:].sum().backward()
    if abs(garbage) < torch.inf:
        assert all(p.grad.isfinite().all() for p in layer.parameters())
    readable, weights = layer(dirty, attn_mask=mask, return_weights=True)
    assert_close(readable, want)
    assert_rows_sum_to_one(weights, joined(mask)[:, 0])


def test_a_padded_batch_is_each_text_alone():
    layer, _ = layer_and_x()
    texts = [3 * torch.randn(n, 6).double() for n in (5, 2, 4)]
    for side in ("left", "right"):
        x = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_side=side)
        real = nn.utils.rnn.pad_sequence([torch.ones(len(t)).bool() for t in texts], batch_first=True, padding_side=side)
        out = layer(x, attn_mask=padding_mask(real))
        for b, text in enumerate(texts):
            assert_close(out[b, real[b]], layer(text), rtol=0, atol=1e-9)


def test_equals_multihead_attention_with_its_own_masks():
    mine = CausalSelfAttention(8, 8, qkv_bias=True).double()
    theirs = multihead_of(mine)
    drop, pad = torch.ones(5, 5).bool().triu(1), torch.arange(5) >= torch.tensor([5, 3])[:, None]
    x = 3 * torch.randn(2, 5, 8)

    def library(i, **masks):
        return lambda x: theirs(x, x, x, attn_mask=drop, **masks)[i]

    assert_parity(mine, library(0), x)
    assert_parity(lambda x: mine(x, attn_mask=~pad[:, None, None]), library(0, key_padding_mask=pad), x)
    assert_parity(lambda x: mine(x, attn_mask=~pad[:, None, None], return_weights=True)[1],
                  library(1, key_padding_mask=pad), x)
    with pytest.raises(AssertionError, match="parity"):       # the negative control: one pad more
        assert_parity(lambda x: mine(x, attn_mask=~pad.roll(1, 1)[:, None, None]), library(0, key_padding_mask=pad), x)


def test_a_prefix_is_the_layer_of_chapter_one():
    layer, x = layer_and_x()
    before = SelfAttention(6, 4, qkv_bias=True).double()
    before.load_state_dict(layer.state_dict())
    assert_parity(layer, lambda x: torch.stack([before(x[:, :i + 1])[:, -1] for i in range(5)], 1), x)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("mask", [None, padding_mask(LEFT), "favours"])
def test_as_precise_as_pytorch(dtype, mask):
    layer = CausalSelfAttention(64, 64)
    x = 3 * torch.randn(3, 5, 64)
    mask = torch.randn(5, 5) if mask == "favours" else mask
    joint = torch.where(causal_mask(5), mask, -torch.inf) if mask is not None and mask.dtype != torch.bool else \
        causal_mask(5) if mask is None else causal_mask(5) & mask

    def run(x, fn):
        q, k, v = (F.linear(x, p.weight.to(x.dtype))[:, None] for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        return fn(q, k, v)

    def library(q, k, v):
        bias = joint if joint.dtype == torch.bool else joint.to(q.dtype)
        return SDPA(q, k, v, bias)[:, 0]

    typed = {d: copy.deepcopy(layer).to(d) for d in DTYPES}
    for weights_too in (False, True):
        def ours(x):
            out = typed[x.dtype](x, attn_mask=mask, return_weights=weights_too)
            return out[0] if weights_too else out
        assert_as_precise(ours, lambda x: run(x, library), x, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float_mask_keeps_its_numbers_in_half_precision(dtype):
    """-1e9 forbids nothing, it only disfavours: both roads agree, also where float16 would make it infinite."""
    layer, x = layer_and_x(dtype)
    mask = torch.full((5, 5), -1e9)
    fused, (readable, weights) = layer(x, attn_mask=mask), layer(x, attn_mask=mask, return_weights=True)
    assert fused.dtype == readable.dtype == dtype and fused.any(-1).all()
    assert_close(fused, readable, rtol=2e-2, atol=2e-2)
    assert_rows_sum_to_one(weights, causal_mask(5))
    wide = layer(x, attn_mask=mask.double())
    assert_close(wide, fused)


@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask_dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("number", [-1e39, -1e9, -1e5, 2048.0, torch.finfo(torch.float32).min])
def test_both_roads_agree_on_any_float_mask(number, mask_dtype, autocast):
    """A bias is shifted to 0 in each row, so that neither its size nor a narrow dtype swallows the scores."""
    mask = torch.zeros(5, 5, dtype=torch.float64)
    mask[:, :3] = number
    mask[1] = number
    mask[2, 0] = -torch.inf
    mask = mask.to(mask_dtype) if abs(number) < torch.finfo(mask_dtype).max else mask
    for dtype in (torch.float64, torch.float32) if autocast is None else (torch.float32,):
        layer, x = layer_and_x(dtype)
        outs, grads = [], []
        for weights_too in (False, True):
            x = x.detach().requires_grad_()
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                out = layer(x, attn_mask=mask, return_weights=weights_too)
            out = out[0] if weights_too else out
            out.double().square().sum().backward()
            outs.append(out.double()), grads.append(x.grad)
        size = 5e-2 if autocast else 1e-9 if dtype == torch.float64 else 1e-5
        assert outs[0].isfinite().all() and outs[0].any(-1).all()
        assert_close(outs[0], outs[1], rtol=size, atol=size)
        assert_close(grads[0], grads[1], rtol=20 * size, atol=20 * size * (1 + grads[1].abs().amax().item()))


def test_shift_bias():
    """The largest number of a row becomes 0; -inf stays, an empty row too; nothing overflows."""
    bias = torch.tensor([[-1e300, -1e300, -torch.inf], [3.0, 1.0, -2.0], [-torch.inf] * 3, [1e300, 0.0, -1e300]],
                        dtype=torch.float64)
    lowest = torch.finfo(torch.float32).min
    want = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -2.0, -5.0], [-torch.inf] * 3, [0.0, lowest, lowest]])
    assert torch.equal(_shift_bias(bias, torch.float32), want)
    assert _shift_bias(bias.half(), torch.float32).dtype == torch.float32
    for shape in ((2, 0), (0, 2), (0, 0)):
        assert _shift_bias(torch.zeros(shape), torch.float64).shape == shape
        assert _shift_bias(torch.zeros(shape), torch.float64).dtype == torch.float64
    assert _shift_bias(torch.tensor([[-7.0], [-torch.inf]]), torch.float32).tolist() == [[0.0], [-torch.inf]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", [torch.bool, *DTYPES])
def test_the_kernel_gets_a_mask_of_its_own_dtype(dtype, mask_dtype, monkeypatch):
    """GPU kernels refuse, or misread, a bias in another dtype than the query's."""
    seen = []

    def spy(query, key, value, attn_mask=None, *args, **kwargs):
        seen.append((attn_mask.dtype, attn_mask.dim()))
        return SDPA(query, key, value, attn_mask, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    layer, x = layer_and_x(dtype)
    layer(x, attn_mask=torch.ones(1, 5, 5).to(mask_dtype))
    assert seen == [(torch.bool if mask_dtype == torch.bool else dtype, 4)]


def test_kernels_never_see_p_of_1(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: pytest.fail("a kernel was called"))
    layer, x = layer_and_x()
    for mask in (None, causal_mask(5)):
        out = layer(x, attn_mask=mask, dropout_p=1.0)
        assert isinstance(out, torch.Tensor) and not out.any()


@pytest.mark.parametrize("length", [2, 300])
def test_without_a_mask_none_is_built(length, monkeypatch):
    seen = []

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
        seen.append((attn_mask, is_causal))
        return SDPA(query, key, value, attn_mask, dropout_p, is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    CausalSelfAttention(6, 4)(torch.randn(length, 6))
    assert seen == [(None, True)]


def test_large_sizes_are_compared_by_value():
    real = torch.ones(1, 300).bool()
    assert padding_mask(real, 300).all() and mask_from_mha(torch.zeros(300, 300).bool(), ~real).all()
    assert mask_from_mha(torch.zeros(300, 1, 1).bool(), torch.zeros(300, 1).bool(), num_heads=1).all()


def test_more_queries_than_keys():
    query, key, value = torch.randn(2, 1, 5, 4), torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4)
    got, _ = _attend(query, key, value, None, is_causal=True, dropout_p=0.0, return_weights=False)
    assert_close(got, attention(query, key, value, causal_mask(5, 3))[0])
    assert not got[:, :, :2].any()


def test_one_query_needs_no_mask(monkeypatch):
    """A step of decoding with a cache: no mask is built, and no key is hidden."""
    seen = []

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False):
        seen.append((attn_mask, is_causal))
        return SDPA(query, key, value, attn_mask, dropout_p, is_causal)

    query, key, value = torch.randn(2, 1, 1, 4), torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 4)
    want = SDPA(query, key, value)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    got, _ = _attend(query, key, value, None, is_causal=True, dropout_p=0.0, return_weights=False)
    assert seen == [(None, False)]
    assert_close(got, want)


def test_a_hidden_score_that_overflows():
    """The readable road and the plain causal kernel do not care; the kernel with a mask adds inf and -inf."""
    layer = CausalSelfAttention(4, 4)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.eye(4))
    x = torch.randn(1, 4, 4).abs() + 5
    x[:, 3] = torch.finfo(x.dtype).max / 8
    want = layer(x[:, :3])
    assert_close(layer(x)[:, :3], want)
    assert_close(layer(x, attn_mask=torch.ones(4).bool(), return_weights=True)[0][:, :3], want)
    assert_close(layer(x, attn_mask=torch.tensor([True, True, True, False]))[:, :3], want)    # nobody sees it: cleaned


def test_a_shift_of_a_row_changes_nothing():
    layer, x = layer_and_x()
    bias = torch.randn(5, 5).double()
    for weights_too in (False, True):
        pair = [layer(x, attn_mask=b, return_weights=weights_too) for b in (bias, bias + 1e6 * torch.randn(5, 1).double())]
        pair = [p[0] if weights_too else p for p in pair]
        assert_close(*pair, rtol=0, atol=1e-8)
    bias.requires_grad_()
    layer(x, attn_mask=bias).square().sum().backward()
    fused = bias.grad.clone()
    bias.grad = None
    layer(x, attn_mask=bias, return_weights=True)[0].square().sum().backward()
    assert fused.any() and not fused.triu(1).any()
    assert_close(bias.grad, fused, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mask", [torch.tensor(True), torch.tensor([True, False, True]), torch.tensor([0.0, -torch.inf, 1.0]),
                                  torch.tensor([[True], [False]]), torch.tensor(-5.0)])
@pytest.mark.parametrize("return_weights", [False, True])
def test_the_road_without_causality(mask, return_weights):
    """For chapters to come: cross-attention, with masks of any rank."""
    query, key, value = torch.randn(2, 1, 2, 4), torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 5)
    got, weights = _attend(query=query, key=key, value=value, attn_mask=mask, is_causal=False, dropout_p=0.0,
                           return_weights=return_weights)
    want, want_weights = attention(query, key, value, mask)
    assert_close(got, want)
    assert weights is None if not return_weights else torch.allclose(weights, want_weights, atol=1e-6)


@pytest.mark.parametrize("return_weights", [False, True])
def test_the_corner_is_never_the_upper_left(return_weights):
    query, key, value = torch.randn(2, 1, 2, 4), torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 4)
    got, _ = _attend(query, key, value, None, is_causal=True, dropout_p=0.0, return_weights=return_weights)
    assert_close(got, SDPA(query, key, value, causal_mask(2, 5)))
    assert not torch.allclose(got, SDPA(query, key, value, is_causal=True))


def test_layer_refuses_another_dtype():
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(TypeError, match=f"x must be torch.float32 like the weights, got {dtype}"):
            CausalSelfAttention(6, 4)(torch.zeros(5, 6, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert CausalSelfAttention(6, 4)(torch.zeros(5, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(5, 6), (1, 5, 6), (2, 5, 6), (2, 3, 5, 6), (0, 5, 6), (2, 1, 6), (2, 0, 6)])
@pytest.mark.parametrize("return_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_layer_takes_any_leading_axes(shape, return_weights, masked):
    layer, x = CausalSelfAttention(6, 4), torch.randn(shape)
    mask = torch.zeros(shape[-2]) if masked else None
    out = layer(x, return_weights=return_weights, attn_mask=mask)
    out, weights = out if return_weights else (out, None)
    assert out.shape == (*shape[:-1], 4)
    assert weights is None or weights.shape == (*shape[:-1], shape[-2])
    if out.numel():
        assert_close(out.reshape(-1, shape[-2], 4)[0], layer(x.reshape(-1, *shape[-2:])[0]))


def test_fused_road_never_makes_the_map():
    layer, x = layer_and_x(torch.float32)
    for options, fused in (({}, True), ({"attn_mask": padding_mask(LEFT)}, True), ({"return_weights": True}, False),
                           ({"attn_mask": torch.randn(5, 5)}, True), ({"dropout_p": 0.5}, False),
                           ({"attn_mask": torch.ones(1, 5, 5).bool()}, True), ({"attn_mask": torch.ones(5).bool()}, True),
                           ({"attn_mask": torch.zeros(1, 1, 5)}, True), ({"attn_mask": torch.tensor(True)}, True)):
        with torch.no_grad(), torch.profiler.profile() as profile:
            layer(x, **options)
        names = {event.key for event in profile.key_averages()}
        assert ("aten::_softmax" not in names) == fused, options
        assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in names) == fused, options


@pytest.mark.parametrize("mask, error, words", [
    (LEFT.bool(), ValueError, r"attn_mask must broadcast .* \(3, 1, 5, 5\), got \(3, 5\)"),
    (torch.ones(3, 5, 5).bool(), ValueError, "attn_mask must broadcast"),
    (torch.ones(5, 4).bool(), ValueError, "attn_mask must broadcast"),
    (LEFT[:, None, None], TypeError, "attn_mask must be bool .* got torch.int64"),
    ([True], TypeError, "attn_mask must be bool .* got list"),
    (torch.ones(5, 5, device="meta").bool(), TypeError, "attn_mask must be on cpu"),
])
@pytest.mark.parametrize("return_weights", [False, True])
def test_layer_refuses_wrong_masks(mask, error, words, return_weights):
    layer, x = layer_and_x()
    with pytest.raises(error, match=words):
        layer(x, attn_mask=mask, return_weights=return_weights)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("return_weights", [False, True])
def test_layer_refuses_wrong_dropout(masked, return_weights):
    layer, x = layer_and_x()
    mask = padding_mask(LEFT) if masked else None
    for p in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="dropout_p must be in"):
            layer(x, attn_mask=mask, dropout_p=p, return_weights=return_weights)
    with pytest.raises(TypeError, match="dropout_p must be a number"):
        layer(x, attn_mask=mask, dropout_p="0.1", return_weights=return_weights)


@pytest.mark.parametrize("name", ["none", "left", "favours"])
def test_dropout_is_the_same_draw_on_both_roads(name):
    layer, x = layer_and_x()
    outs = []
    for weights_too in (False, True):
        torch.manual_seed(1)
        out = layer(x, attn_mask=MASKS[name], dropout_p=0.5, return_weights=weights_too)
        outs.append(out[0] if weights_too else out)
    assert_close(*outs, rtol=0, atol=1e-9)
    assert not torch.allclose(outs[0], layer(x, attn_mask=MASKS[name]))
    assert not layer(x, attn_mask=MASKS[name], dropout_p=1.0).any()


def test_arguments_are_not_written_and_keywords_are_keywords():
    layer, x = layer_and_x()
    for mask in MASKS.values():
        before = [t.clone() for t in (x, mask) if t is not None]
        layer(x, attn_mask=mask), layer(x, attn_mask=mask, return_weights=True)
        assert all(torch.equal(a, b) for a, b in zip(before, (x, mask)))
    with pytest.raises(TypeError):
        layer(x, None)


def test_layer_round_trips():
    layer, x = layer_and_x()
    assert [*layer.state_dict()] == [*SelfAttention(6, 4, qkv_bias=True).state_dict()] and not list(layer.buffers())
    other = CausalSelfAttention(6, 4, qkv_bias=True).double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x)) and torch.equal(layer(x), copy.deepcopy(layer)(x))
    zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    assert not torch.func.functional_call(layer, zeros, (x,)).any()


def test_gradcheck():
    layer, x = CausalSelfAttention(2, 2).double(), torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[[[0, 1, 1, 1]]], [[[1, 1, 0, 0]]]]).bool()
    bias = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, attn_mask=mask), x)
    assert torch.autograd.gradcheck(lambda x, b: layer(x, attn_mask=b, return_weights=True), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x: layer(x, attn_mask=mask, return_weights=True)[0], x)


def test_vmap_and_autocast():
    layer, x = layer_and_x(torch.float32)
    for mask in (None, causal_mask(5)):
        assert_close(torch.vmap(lambda x: layer(x, attn_mask=mask))(x), layer(x))
    masks = padding_mask(LEFT)[:, 0]
    assert_close(torch.vmap(lambda x, m: layer(x, attn_mask=m))(x, masks), layer(x, attn_mask=padding_mask(LEFT)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, (readable, weights) = (layer(x, attn_mask=padding_mask(LEFT)),
                                      layer(x, attn_mask=padding_mask(LEFT), return_weights=True))
    assert fused.dtype == readable.dtype == torch.bfloat16
    assert_close(fused.float(), readable.float(), rtol=2e-2, atol=5e-2)
    assert_rows_sum_to_one(weights, joined(padding_mask(LEFT))[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_builders_compile_into_one_graph(dynamic):
    """Values are then not looked at; shapes still are."""
    torch.compiler.reset()

    def build(x, lengths, real):
        T = x.shape[1]
        may = causal_mask(T, offset=lengths - T) & padding_mask(lengths, T) & padding_mask(real)
        return may, bias_to_mask(mask_to_bias(may, torch.float32))

    compiled = torch.compile(build, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (5, 7):
        inputs = torch.zeros(2, length), torch.tensor([length, 3]), torch.ones(2, length, dtype=torch.long)
        for got, want in zip(compiled(*inputs), build(*inputs)):
            assert torch.equal(got, want)


@pytest.mark.slow
def test_exports_with_free_length():
    layer, x = CausalSelfAttention(6, 4), torch.randn(2, 5, 6)
    length = torch.export.Dim("length", min=2, max=64)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, real):
            return self.layer(x, attn_mask=padding_mask(real))

    program = torch.export.export(layer, (x,), dynamic_shapes=({1: length},))
    longer = torch.randn(2, 9, 6)
    assert_close(program.module()(longer), layer(longer))
    real = torch.ones(2, 5, dtype=torch.long)
    program = torch.export.export(Masked(), (x, real), dynamic_shapes=({1: length}, {1: length}))
    real = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    assert_close(program.module()(longer, real), layer(longer, attn_mask=padding_mask(real)))


@pytest.mark.parametrize("heads", [1, 6])
def test_heads_that_share_a_key_all_hide_it(heads):
    """A key is set to 0 if no query of any head of its group sees it; a query if it sees nothing."""
    query, key, value = torch.randn(2, 6, 3, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 7)
    mask = torch.rand(2, heads, 3, 5) > 0.5
    mask[0, :, :, 1], mask[1, 0, 2] = False, False           # a key that nobody sees; a query that sees nothing
    mask[1, :, :, 3] = False
    if heads == 6:
        mask[0, :2, :, 4], mask[0, 3, 0, 4] = False, True    # hidden from the first group only
        mask[1, 4, 1, 3] = True
    seen = mask.expand(2, 6, 3, 5)
    for form in (mask, mask_to_bias(mask, torch.float32)):
        q, k, v, joined, empty = _hide_unseen(query, key, value, form)
        assert torch.equal(empty, ~mask.any(-1, keepdim=True)) and joined.shape == mask.shape
        for b, h in itertools.product(range(2), range(6)):
            for i in range(3):
                assert torch.equal(q[b, h, i], query[b, h, i] * seen[b, h, i].any())
        for b, j, t in itertools.product(range(2), range(3), range(5)):
            visible = seen[b, 2 * j:2 * j + 2, :, t].any()
            assert torch.equal(k[b, j, t], key[b, j, t] * visible) and torch.equal(v[b, j, t], value[b, j, t] * visible)


@pytest.mark.parametrize("q_len, kv_len, offset, kernel", [
    (4, 4, 0, True), (5, 3, 0, True), (3, 5, 0, False), (4, 4, -1, False), (4, 4, 1, False), (4, 4, 2, False),
    (4, 4, 3, None), (4, 4, 9, None), (1, 6, 5, None), (1, 6, 4, False), (2, 7, 5, False), (2, 6, 6, None), (2, 8, 6, False)])
def test_what_the_kernel_can_do_without_a_mask(q_len, kv_len, offset, kernel):
    """True: its own causality; None: nothing is hidden; False: a mask with all axes."""
    query, key = torch.randn(2, 3, q_len, 4), torch.randn(2, 3, kv_len, 4)
    mask, is_causal = _join_masks(query, key, None, is_causal=True, offset=offset, as_mask=False)
    assert is_causal == bool(kernel) and (mask is None) == (kernel is not False)
    if mask is not None:
        assert mask.shape == (1, 1, q_len, kv_len) and torch.equal(mask[0, 0], causal_mask(q_len, kv_len, offset=offset))
    mask, is_causal = _join_masks(query, key, None, is_causal=True, offset=offset, as_mask=True)
    assert not is_causal and (mask is None) == (kernel is None)
    may = torch.rand(q_len, kv_len) > 0.5
    mask, is_causal = _join_masks(query, key, may, is_causal=True, offset=offset, as_mask=False)
    assert not is_causal and mask.shape == (1, 1, q_len, kv_len)
    assert torch.equal(mask[0, 0], may & causal_mask(q_len, kv_len, offset=offset))
    mask, is_causal = _join_masks(query, key, may[:, 0].any(), is_causal=False, offset=offset, as_mask=False)
    assert not is_causal and mask.shape == (1, 1, 1, 1)
    rows, is_causal = _join_masks(query, key, None, is_causal=True, offset=torch.tensor([offset, 0]), as_mask=False)
    assert not is_causal and torch.equal(rows, causal_mask(q_len, kv_len, offset=torch.tensor([offset, 0])))


def test_flags_are_true_or_false():
    for flag in (True, False):
        _check_flag("is_causal", flag)
    for flag in (0, 1, None, "no", torch.tensor(True)):
        with pytest.raises(TypeError, match="is_causal must be True or False, got"):
            _check_flag("is_causal", flag)


def test_heads_are_told_from_other_axes():
    """A mask for each of 4 heads, 2 KV heads; batch and length are larger."""
    query, key, mask = torch.randn(7, 4, 2, 3), torch.randn(7, 2, 8, 3), torch.rand(7, 4, 2, 8) > 0.3
    assert _hide_unseen(query, key, key, mask)[1].shape == key.shape
