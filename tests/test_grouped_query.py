"""Shared KV heads: against PyTorch on copied heads, Hugging Face's Llama and Qwen2, the chapter before, and counted bytes."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import HALVES, Recorder, gap, with_parameters
from torch import nn
from torch.testing import assert_close

from attn_nb import grouped_query
from attn_nb.causal import causal_mask, padding_mask
from attn_nb.grouped_query import GroupedQueryAttention, grouped_attention, kv_cache_bytes, repeat_kv
from attn_nb.multi_head import MultiHeadAttention
from attn_nb.single_head import attention
from attn_nb.testing import (
    assert_as_precise,
    assert_causal,
    assert_eval_deterministic,
    assert_parity,
    assert_rows_sum_to_one,
)

SDPA = F.scaled_dot_product_attention
PAIRS = [(6, 6), (6, 3), (6, 2), (6, 1)]         # query heads, KV heads
REAL = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
PADS = padding_mask(REAL)
MASKS = {"none": None, "padding": PADS, "favours": torch.randn(5, 5, generator=torch.Generator().manual_seed(0)),
         "per head": torch.rand(6, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.4}


def qkv(B=2, H=6, Hkv=2, Tq=4, Tk=5, Dh=8, Dv=None, dtype=torch.float64):
    Dv = Dh if Dv is None else Dv
    made = 2 * torch.randn(B, H, Tq, Dh), torch.randn(B, Hkv, Tk, Dh), torch.randn(B, Hkv, Tk, Dv)
    return tuple(x.to(dtype) for x in made)


def spread(x, heads):
    """Query head h reads KV head h // R, said with an index."""
    return x[:, torch.arange(heads) // (heads // x.shape[1])]


def written_out(query, key, mask, is_causal, offset):
    """The additive mask with all sizes, and the queries that see nothing."""
    (B, H, Tq), Tk = query.shape[:3], key.shape[2]
    bias = torch.zeros(B, H, Tq, Tk, dtype=query.dtype)
    if mask is not None:
        bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
    if is_causal:
        first = torch.as_tensor(offset).reshape(-1, 1, 1, 1)
        bias = bias.masked_fill(torch.arange(Tk) > torch.arange(Tq)[:, None] + first, -torch.inf)
    return bias, (bias == -torch.inf).all(-1, keepdim=True)


def oracle(query, key, value, mask=None, *, is_causal=False, offset=0, scale=None):
    """PyTorch on copied heads; a query that sees nothing reads 0."""
    bias, empty = written_out(query, key, mask, is_causal, offset)
    key, value = spread(key, query.shape[1]), spread(value, query.shape[1])
    return SDPA(query, key, value, bias.masked_fill(empty, 0.0), scale=scale).masked_fill(empty, 0.0)


def both_roads(*inputs, **options):
    return (grouped_attention(*inputs, **options), grouped_attention(*inputs, **options, return_weights=True)[0])


# --- repeat_kv

@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_repeat_kv_is_that_of_transformers(group_size):
    from transformers.models.llama.modeling_llama import repeat_kv as theirs

    x = torch.randn(2, 3, 5, 4)
    assert torch.equal(repeat_kv(x, group_size), theirs(x, group_size))
    assert torch.equal(repeat_kv(x[0], group_size), theirs(x, group_size)[0])
    assert torch.equal(repeat_kv(x[:, None].expand(2, 2, 3, 5, 4), group_size)[:, 1], theirs(x, group_size))
    assert torch.equal(repeat_kv(x.long(), group_size), theirs(x.long(), group_size))
    assert torch.equal(x.repeat(1, group_size, 1, 1), theirs(x, group_size)) == (group_size == 1)    # the other order


def test_repeat_kv_order():
    x = torch.arange(3.0)[:, None, None]
    assert repeat_kv(x, 2).flatten().tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("x, group_size, error, words", [
    ([1.0], 2, TypeError, "x"),
    (torch.zeros(3, 4), 2, ValueError, "x"),
    (torch.zeros(2, 3, 4), 0, ValueError, "group_size"),
    (torch.zeros(2, 3, 4), 2.0, TypeError, "group_size"),
    (torch.zeros(2, 3, 4), True, TypeError, "group_size"),
])
def test_repeat_kv_refuses(x, group_size, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        repeat_kv(x, group_size)


# --- grouped_attention: numbers

MASK_SHAPES = ["", "k", "1k", "q1", "qk", "1qk", "hqk", "h11", "h1k", "b11k", "b1qk", "bhqk", "bh11", "bh1k", "1h1k",
               "11qk", "1111"]


@given(data=st.data(), B=st.integers(1, 3), Hkv=st.integers(1, 3), R=st.integers(1, 3), Tq=st.integers(1, 4),
       Tk=st.integers(1, 5), is_causal=st.booleans(), kind=st.sampled_from([None, "bool", "float"]),
       scale=st.sampled_from([None, 0.3, 1.0]))
@settings(max_examples=250, deadline=None, derandomize=True)
def test_equals_pytorch_on_copied_heads(data, B, Hkv, R, Tq, Tk, is_causal, kind, scale):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    query, key, value = qkv(B, Hkv * R, Hkv, Tq, Tk, 3, data.draw(st.sampled_from([2, 3, 4])))
    mask = None
    if kind:
        sizes = {"1": 1, "b": B, "h": Hkv * R, "q": Tq, "k": Tk}
        may = torch.rand([sizes[c] for c in data.draw(st.sampled_from(MASK_SHAPES))]) > 0.4
        mask = may if kind == "bool" else torch.randn(may.shape).double().masked_fill(~may, -torch.inf)
    place = st.integers(-Tq - 1, Tk + 1)
    offset = data.draw(st.one_of(place, st.lists(place, min_size=B, max_size=B).map(torch.tensor)))
    options = {"is_causal": is_causal, "offset": offset, "scale": scale}
    want = oracle(query, key, value, mask, **options)
    bias, empty = written_out(query, key, mask, is_causal, offset)

    def plain_weights(q, k, v):
        return attention(q, spread(k, q.shape[1]), spread(v, q.shape[1]), bias, scale=scale)[1]

    outs = both_roads(query, key, value, mask, **options)
    for out in outs:
        assert out.shape == want.shape and not out[empty.expand(want.shape)].any()
        assert_close(out, want, rtol=0, atol=1e-9)
    weights = grouped_attention(query, key, value, mask, **options, return_weights=True)[1]
    assert_close(weights, plain_weights(query, key, value), rtol=0, atol=1e-9)
    if want.abs().amax() > 1e-6:
        inputs = query, key, value
        for n in (0, 1):
            assert_parity(lambda *x: both_roads(*x, mask, **options)[n], lambda *x: oracle(*x, mask, **options), *inputs)
        assert_parity(lambda *x: grouped_attention(*x, mask, **options, return_weights=True)[1], plain_weights, *inputs)


@pytest.mark.parametrize("H, Hkv", PAIRS)
def test_unlike_orders_and_masks_miss(H, Hkv):
    """Negative control: what the comparison above would say to the usual mistakes."""
    query, key, value = qkv(H=H, Hkv=Hkv)
    want = oracle(query, key, value, is_causal=True, offset=1)
    turned = [x.repeat(1, H // Hkv, 1, 1) for x in (key, value)]
    wrong = [grouped_attention(query, key, value, is_causal=True), grouped_attention(query, key, value),
             grouped_attention(query, key, value, is_causal=True, offset=1, scale=1.0)]
    if 1 < Hkv < H:
        wrong.append(oracle(query, *turned, is_causal=True, offset=1))
    for out in wrong:
        assert (out - want).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("Tq", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_as_precise_as_pytorch(dtype, Tq, masked):
    """Both roads round at most twice as badly as PyTorch's function with shared heads."""
    query, key, value = qkv(3, 6, 2, Tq, 40, 16)
    mask = padding_mask(torch.tensor([40, 3, 17]), 40) if masked else None
    pytorch = mask if mask is None else mask.expand(3, 6, Tq, 40)
    for weights_too in (False, True):
        assert_as_precise(
            lambda *x: (grouped_attention(*x, mask, return_weights=True)[0] if weights_too else grouped_attention(*x, mask)),
            lambda *x: SDPA(*x, pytorch, enable_gqa=True), query, key, value, dtype=dtype)


@pytest.mark.parametrize("Hkv", [1, 2, 6])
def test_one_query_and_the_offset(Hkv):
    """offset = Tk - 1 sees all, as does no causality; 0 sees the first key only, -1 nothing."""
    query, key, value = qkv(H=6, Hkv=Hkv, Tq=1)
    for n in (0, 1):
        def run(offset):
            return both_roads(query, key, value, is_causal=True, offset=offset)[n]
        assert_close(run(0), spread(value, 6)[:, :, :1], rtol=0, atol=1e-12)
        assert_close(grouped_attention(query, key, value, is_causal=True), run(0), rtol=0, atol=1e-12)    # the default
        for offset in (4, 5, 10 ** 6, torch.tensor([4, 9])):
            assert_close(run(offset), both_roads(query, key, value)[n], rtol=0, atol=1e-12)
        assert not run(-1).any() and not run(torch.tensor([-1, -9])).any()
        rows = run(torch.tensor([1, 3]))
        assert_close(rows[:1], run(1)[:1], rtol=0, atol=1e-12)
        assert_close(rows[1:], run(3)[1:], rtol=0, atol=1e-12)


def test_a_chunk_is_aligned_by_its_offset():
    """Rows of the full result, one chunk at a time, with all keys or only those so far."""
    query, key, value = qkv(Tq=7, Tk=7)
    full = grouped_attention(query, key, value, is_causal=True)
    for start, stop in ((0, 3), (2, 5), (3, 7), (6, 7), (0, 1)):
        for kv_len in (7, stop):
            chunk = query[:, :, start:stop], key[:, :, :kv_len], value[:, :, :kv_len]
            for out in both_roads(*chunk, is_causal=True, offset=start):
                assert_close(out, full[:, :, start:stop], rtol=0, atol=1e-9)


@pytest.mark.parametrize("sizes", [(2, 0, 5), (2, 3, 0), (2, 1, 0), (0, 3, 5), (0, 1, 5)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.ones(1).bool()},
                                     {"attn_mask": torch.zeros(1)}])
def test_empty_axes(sizes, options):
    B, Tq, Tk = sizes
    for out in both_roads(*qkv(B, 6, 2, Tq, Tk), **options):
        assert out.shape == (B, 6, Tq, 8) and not out.any()


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("Tq", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_garbage_behind_a_mask_does_not_matter(dtype, Tq, per_head):
    """Keys and values of the largest number where nobody looks; a KV head whose whole group is blocked is hidden too."""
    query, key, value = qkv(Tq=Tq, dtype=dtype)
    may = torch.ones(2, 6, 1, 5).bool() if per_head else torch.ones(2, 1, 1, 5).bool()
    may[0, :3, :, 3:] = False            # the first group, which is all heads if there is one axis
    hidden = torch.zeros(2, 2, 5, 1).bool()
    hidden[0, :1 if per_head else 2, 3:] = True
    for mask in (may, torch.zeros(may.shape, dtype=dtype).masked_fill(~may, -torch.inf)):
        results = []
        for fill in (0.0, torch.finfo(dtype).max):
            inputs = [query.clone(), *(x.masked_fill(hidden, fill) for x in (key, value))]
            inputs = [x.requires_grad_() for x in inputs]
            for out in both_roads(*inputs, mask):
                results.append((out.detach(), *torch.autograd.grad(out.sum(), inputs)))
        for zeros, garbage in zip(results[:2], results[2:]):
            for a, b in zip(zeros, garbage):
                assert torch.equal(a, b) and b.isfinite().all()


@pytest.mark.parametrize("Tq", [1, 4])
@pytest.mark.parametrize("shape", ["hqk", "1k", "b11k"])
def test_a_bias_learns(Tq, shape):
    """Gradients of an additive mask, on both roads."""
    query, key, value = qkv(Tq=Tq)
    bias = torch.randn([{"1": 1, "b": 2, "h": 6, "q": Tq, "k": 5}[c] for c in shape])
    for n in (0, 1):
        assert_parity(lambda *x: both_roads(*x, is_causal=True, offset=2)[n],
                      lambda *x: oracle(*x, is_causal=True, offset=2), query, key, value, bias)


def test_arguments_are_left_alone():
    query, key, value = qkv()
    mask = torch.randn(6, 4, 5)
    mask[0], before = -torch.inf, [x.clone() for x in (query, key, value)]
    copy_of_mask = mask.clone()
    both_roads(query, key, value, mask, is_causal=True, offset=1)
    assert all(map(torch.equal, (query, key, value, mask), (*before, copy_of_mask)))


@pytest.mark.parametrize("Tq", [1, 4])
def test_any_strides(Tq):
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(Tq=Tq))
    for out in both_roads(query, key, value, is_causal=True, offset=1):
        assert_close(out, oracle(query, key, value, is_causal=True, offset=1), rtol=0, atol=1e-9)


def test_in_a_vmap():
    query, key, value = qkv()
    got = torch.vmap(lambda *x: grouped_attention(*(y[None] for y in x), is_causal=True)[0])(query, key, value)
    assert_close(got, grouped_attention(query, key, value, is_causal=True))


# --- dropout

@pytest.mark.parametrize("Tq", [1, 4])
@pytest.mark.parametrize("name", ["none", "bool", "float"])
def test_dropout(Tq, name):
    query, key, value = qkv(1, 6, 2, Tq, 5, dtype=torch.float32)
    mask = {"none": None, "bool": torch.rand(6, Tq, 5) > 0.3, "float": torch.randn(6, Tq, 5)}[name]
    plain, weights = grouped_attention(query, key, value, mask, return_weights=True)
    for weights_too in (False, True):
        def run(p, n=1):
            inputs = [x.expand(n, -1, -1, -1) for x in (query, key, value)]
            out = grouped_attention(*inputs, mask, dropout_p=p, return_weights=weights_too)
            if weights_too:
                assert_close(out[1], weights.expand(n, -1, -1, -1), rtol=1e-6, atol=1e-6)     # those before dropout
            return out[0] if weights_too else out
        off = grouped_attention(query, key, value, mask, return_weights=weights_too)
        assert torch.equal(run(0.0), off[0] if weights_too else off) and torch.equal(run(0), run(0.0))
        assert run(1).shape == plain.shape and not run(1).any() and not run(1.0).any()
        assert not torch.equal(run(0.5), run(0.5))
        assert_close(run(0.5, 20_000).mean(0, keepdim=True), plain, rtol=0, atol=0.05)


@pytest.mark.parametrize("Tq", [1, 4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_both_roads_draw_the_same(Tq, is_causal):
    query, key, value = qkv(Tq=Tq)
    outs = []
    for weights_too in (False, True):
        torch.manual_seed(1)
        out = grouped_attention(query, key, value, is_causal=is_causal, offset=1, dropout_p=0.5, return_weights=weights_too)
        outs.append(out[0] if weights_too else out)
    assert_close(*outs, rtol=0, atol=1e-9)
    assert (outs[0] - grouped_attention(query, key, value, is_causal=is_causal, offset=1)).abs().max() > 1e-2


# --- grouped_attention: what it does not make

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("Tq, masked, options", [
    (48, False, {}), (1, False, {}), (1, False, {"is_causal": True, "offset": 63}),
    (1, True, {}), (1, True, {"is_causal": True, "offset": 63}), (1, False, {"is_causal": True, "offset": torch.tensor([60])}),
])
def test_no_repeated_heads_and_no_table_of_scores(dtype, Tq, masked, options):
    query, key, value = (x.requires_grad_() for x in qkv(1, 8, 2, Tq, 64, 4, dtype=dtype))
    mask = padding_mask(torch.tensor([50]), 64) if masked else None
    repeated = 8 * 64 * 4
    most = max(query.numel(), key.numel())       # the output, or keys with the hidden ones set to 0
    assert most < repeated and most < 48 * 64
    for context in (torch.no_grad(), torch.enable_grad()) if mask is None else (torch.no_grad(),):
        with Recorder() as recorder, context:
            grouped_attention(query, key, value, mask, **options)
        assert max(recorder.made) <= most, recorder.made
    with Recorder() as recorder, torch.no_grad():        # control: the recorder notices
        SDPA(query, repeat_kv(key, 4), repeat_kv(value, 4))
    assert repeated in recorder.made
    with Recorder() as recorder, torch.no_grad():
        grouped_attention(query, key, value, mask, **options, return_weights=True)
    assert Tq == 1 or max(recorder.made) == 8 * 48 * 64


def test_a_prompt_needs_no_repeated_keys():
    query, key, value = (torch.randn(1, heads, 48, 4) for heads in (8, 2, 2))
    for fn, full_size in ((lambda: grouped_attention(query, key, value, is_causal=True), 1),     # the output alone
                          (lambda: SDPA(query, repeat_kv(key, 4), repeat_kv(value, 4), is_causal=True), 3)):
        with Recorder() as recorder, torch.no_grad():
            fn()
        assert max(recorder.made) == 8 * 48 * 4 and recorder.made[8 * 48 * 4] == full_size


def test_a_padding_mask_is_kept_small():
    """For a chunk, a mask without an axis for heads is not copied for each head; one query makes its scores, and no more."""
    query, key, value = qkv(2, 8, 2, 6, 64, 2)
    pads = padding_mask(torch.tensor([64, 3]), 64)
    for Tq, most in ((1, 2 * 8 * 64), (6, 2 * 6 * 64)):
        with Recorder() as recorder:
            grouped_attention(query[:, :, :Tq].contiguous(), key, value, pads, is_causal=True, offset=64 - Tq)
        assert max(recorder.made) <= max(most, key.numel())


@pytest.fixture
def kernel(monkeypatch):
    """What PyTorch's function is called with."""
    calls = []

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        calls.append(SimpleNamespace(query=query, key=key, value=value, attn_mask=attn_mask, is_causal=is_causal,
                                     options=options))
        return SDPA(query, key, value, attn_mask, dropout_p, is_causal, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


def test_a_mask_copies_no_keys_for_one_query():
    """Serving a padded batch, each token would otherwise write the whole cache anew."""
    query, key, value = qkv(1, 8, 2, 1, 512, 64, dtype=torch.float32)
    mask = padding_mask(torch.tensor([500]), 512)
    with Recorder() as recorder, torch.no_grad():
        grouped_attention(query, key, value, mask, is_causal=True, offset=511)
    assert max(recorder.made) == 8 * 512 < key.numel()
    with Recorder() as recorder, torch.no_grad():        # control: an additive mask does
        grouped_attention(query, key, value, torch.zeros(512))
    assert key.numel() in recorder.made


@pytest.mark.parametrize("Hkv", [1, 2, 6])
def test_what_the_kernel_sees(kernel, Hkv):
    """One query: rows of its group, no mask if none is needed. A prompt: shared heads and the kernel's own causality."""
    query, key, value = qkv(Hkv=Hkv)
    one = query[:, :, :1]
    for options in ({}, {"is_causal": True, "offset": 4}, {"is_causal": True, "offset": 99}):
        grouped_attention(one, key, value, **options)
        call = kernel.pop()
        assert call.query.shape == (2, Hkv, 6 // Hkv, 8) and call.key is key and call.value is value
        assert call.attn_mask is None and not call.is_causal
    grouped_attention(one, key, value, torch.randn(2, 1, 1, 5))
    assert kernel.pop().attn_mask.shape in [(2, 1, 6 // Hkv, 5), (2, 1, 1, 5)]
    grouped_attention(one, key, value, torch.randn(6, 1, 5))
    assert kernel.pop().query.shape == (2, Hkv, 6 // Hkv, 8)
    grouped_attention(one, key, value, torch.rand(6, 1, 5) > 0.5)
    assert not kernel                                    # a boolean is filled in: no copies of keys with the hidden ones 0
    query = torch.cat([query, one], 2)                   # as many queries as keys
    for is_causal in (False, True):
        grouped_attention(query, key, value, is_causal=is_causal)
        call = kernel.pop()
        assert call.query is query and call.key is key and call.attn_mask is None and call.is_causal == is_causal
        assert call.options.get("enable_gqa", False) == (Hkv != 6)
    grouped_attention(query, key, value, is_causal=True, return_weights=True)
    grouped_attention(query, key, value, dropout_p=1.0)
    assert not kernel                                    # the readable road does without


def test_who_reads_groups(monkeypatch):
    """On a GPU only the flash kernel does: half precision, no mask, compute capability 8.0."""
    reads, mask, asked = grouped_query._reads_groups, torch.ones(1).bool(), []

    def capability(device):
        asked.append(device)
        return version
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    for version in ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0)):
        for dtype in (*HALVES, torch.float32, torch.float64):
            query = SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:3", shape=(2, 4, 5, 256))
            assert reads(query, query, None) == (dtype in HALVES and version != (7, 5))
            assert not reads(query, query, mask)
            assert reads(*2 * [torch.zeros(1, dtype=dtype)], mask) and reads(*2 * [torch.zeros(1, dtype=dtype)], None)
    assert set(asked) == {"cuda:3"}


@pytest.mark.parametrize("Tq", [1, 4])
@pytest.mark.parametrize("H, Hkv", PAIRS)
def test_a_kernel_that_cannot_share_gets_copies(monkeypatch, kernel, H, Hkv, Tq):
    query, key, value = qkv(H=H, Hkv=Hkv, Tq=Tq)
    asked = []

    def says_no(*arguments):
        asked.append(arguments)
        return False
    monkeypatch.setattr(grouped_query, "_reads_groups", says_no)
    masks = [None, torch.tensor([1, 1, 0, 1, 1]).bool(), torch.rand(H, Tq, 5) > 0.4, torch.randn(2, 1, Tq, 5)]
    for mask in masks:
        for options in ({}, {"is_causal": True, "offset": 1}):
            want = oracle(query, key, value, mask, **options)
            assert_close(grouped_attention(query, key, value, mask, **options), want, rtol=0, atol=1e-9)
            if Tq == 1 and (options if mask is None else mask.dtype == torch.bool):
                assert not kernel                        # filled in, on the readable road
            else:
                call = kernel.pop()                      # one query needs no copies on any device
                assert call.key.shape[1] == call.query.shape[1] == (Hkv if Tq == 1 else H)
                assert "enable_gqa" not in call.options
            assert_close(both_roads(query, key, value, mask, **options)[1], want, rtol=0, atol=1e-9)
            kernel.clear()
    assert bool(asked) == (Tq > 1 and H > Hkv)
    assert [mask is None for _, _, mask in asked] == (2 * [True] + 14 * [False])[:len(asked)]       # the joint mask


# --- grouped_attention: refusals

def zeros(*shapes, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


GOOD = zeros((2, 6, 4, 8), (2, 3, 5, 8), (2, 3, 5, 7))


@pytest.mark.parametrize("inputs, options, error, words", [
    (zeros((6, 4, 8), (3, 5, 8), (3, 5, 8)), {}, ValueError, "query"),
    (zeros((2, 6, 4, 8), (2, 3, 5, 8), (3, 5, 8)), {}, ValueError, "value"),
    (zeros((2, 6, 4, 8), (5, 8), (2, 3, 5, 8)), {}, ValueError, "key"),
    (zeros((1, 2, 6, 4, 8), (1, 2, 3, 5, 8), (1, 2, 3, 5, 8)), {}, ValueError, "query"),
    (zeros((2, 6, 4, 8), (1, 3, 5, 8), (1, 3, 5, 8)), {}, ValueError, "query"),
    (zeros((1, 6, 4, 8), (2, 3, 5, 8), (2, 3, 5, 8)), {}, ValueError, "query"),
    (zeros((2, 6, 4, 8), (2, 3, 5, 8), (1, 3, 5, 8)), {}, ValueError, "value"),
    (zeros((2, 6, 4, 8), (2, 3, 5, 9), (2, 3, 5, 8)), {}, ValueError, "key"),
    (zeros((2, 6, 4, 8), (2, 3, 5, 8), (2, 3, 6, 8)), {}, ValueError, "value"),
    (zeros((2, 6, 4, 8), (2, 3, 5, 8), (2, 2, 5, 8)), {}, ValueError, "value"),
    (zeros((2, 6, 4, 8), (2, 3, 5, 8), (2, 1, 5, 8)), {}, ValueError, "value"),
    (zeros((2, 6, 4, 8), (2, 4, 5, 8), (2, 4, 5, 8)), {}, ValueError, "KV heads"),
    (zeros((2, 3, 4, 8), (2, 6, 5, 8), (2, 6, 5, 8)), {}, ValueError, "KV heads"),
    (zeros((2, 6, 4, 8), (2, 0, 5, 8), (2, 0, 5, 8)), {}, ValueError, "KV heads"),
    (zeros((2, 6, 4, 0), (2, 3, 5, 0), (2, 3, 5, 8)), {}, ValueError, "query"),
    ([None, *GOOD[1:]], {}, TypeError, "query"),
    ([GOOD[0], [1.0], GOOD[2]], {}, TypeError, "key"),
    (zeros(*(x.shape for x in GOOD), dtype=torch.long), {}, TypeError, "query"),
    ([GOOD[0], *(x.double() for x in GOOD[1:])], {}, TypeError, "query"),
    ([*GOOD[:2], GOOD[2].to("meta")], {}, TypeError, "value"),
    (GOOD, {"attn_mask": torch.ones(3, 1, 1).bool()}, ValueError, "attn_mask"),
    (GOOD, {"attn_mask": torch.ones(2, 5).bool()}, ValueError, "attn_mask"),
    (GOOD, {"attn_mask": torch.ones(2, 3, 2, 4, 5)}, ValueError, "attn_mask"),
    (GOOD, {"attn_mask": torch.ones(4, 5).long()}, TypeError, "attn_mask"),
    (GOOD, {"attn_mask": "causal"}, TypeError, "attn_mask"),
    (GOOD, {"attn_mask": torch.ones(4, 5, device="meta")}, TypeError, "attn_mask"),
    (GOOD, {"offset": 1.0}, TypeError, "offset"),
    (GOOD, {"offset": True}, TypeError, "offset"),
    (GOOD, {"offset": None}, TypeError, "offset"),
    (GOOD, {"offset": torch.tensor([0.0, 1.0])}, TypeError, "offset"),
    (GOOD, {"offset": torch.tensor(1)}, ValueError, "offset"),
    (GOOD, {"offset": torch.zeros(2, 1).long()}, ValueError, "offset"),
    (GOOD, {"offset": 2 ** 63}, ValueError, "offset"),
    (GOOD, {"dropout_p": 1.5}, ValueError, "dropout_p"),
    (GOOD, {"dropout_p": -0.1}, ValueError, "dropout_p"),
    (GOOD, {"dropout_p": True}, TypeError, "dropout_p"),
    (GOOD, {"scale": "1"}, TypeError, "scale"),
    (GOOD, {"offset": torch.tensor([0, 1, 2])}, ValueError, "offset"),
    ([x[:1] for x in GOOD], {"offset": torch.tensor([0, 1])}, ValueError, "offset"),
    (GOOD, {"offset": torch.zeros(0).long()}, ValueError, "offset"),
])
def test_wrong_arguments_are_refused(inputs, options, error, words):
    for is_causal in (False, True):
        for weights_too in (False, True):
            with pytest.raises(error, match=rf"\b{words}\b"):
                grouped_attention(*inputs, **options, is_causal=is_causal, return_weights=weights_too)


def test_options_are_keywords():
    with pytest.raises(TypeError):
        grouped_attention(*GOOD, None, True)
    assert grouped_attention(*GOOD).shape == (2, 6, 4, 7)


# --- the layer against Hugging Face

def spread_out(layer, x, heads, kv_heads):
    """Random weights under which the scores differ: a library's initial ones hide mistakes."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(torch.randn(p.shape) * (0.5 if name.endswith("bias") else 1.5 * p.shape[1] ** -0.5))
    q, k = (p(x).unflatten(-1, (n, -1)).transpose(1, 2) for p, n in ((layer.q_proj, heads), (layer.k_proj, kv_heads)))
    assert (q @ spread(k, heads).mT * q.shape[-1] ** -0.5).std() >= 1
    return layer


def additive(may, dtype=torch.float64):
    return torch.zeros(may.shape, dtype=dtype).masked_fill(~may, -torch.inf)


@pytest.mark.parametrize("kind, bound", [("sdpa", 1e-9), ("eager", 1e-5)])      # eager computes its softmax in float32
@pytest.mark.parametrize("family, bias", [("Llama", False), ("Llama", True), ("Qwen2", True)])
@pytest.mark.parametrize("d_model, Hkv, Dh", [(24, 6, None), (24, 3, None), (24, 2, 6), (24, 1, 10)])
def test_equals_hugging_face(kind, bound, family, bias, d_model, Hkv, Dh):
    """Outputs and the gradients of x and of all parameters. Llama's attention_bias also puts a bias on o_proj."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

    H, Dh = 6, Dh or d_model // 6
    options = {"attention_bias": bias, "head_dim": Dh} if family == "Llama" else {}
    config = getattr(transformers, f"{family}Config")(
        hidden_size=d_model, num_attention_heads=H, num_key_value_heads=Hkv, num_hidden_layers=1, attn_implementation=kind,
        **options)
    config.head_dim = Dh
    theirs = {"Llama": LlamaAttention, "Qwen2": Qwen2Attention}[family](config, 0).double()
    x = torch.randn(3, 5, d_model, dtype=torch.float64)
    spread_out(theirs, x, H, Hkv)
    ours = GroupedQueryAttention(d_model, H, Hkv, head_dim=None if Dh * H == d_model else Dh, qkv_bias=bias,
                                 out_bias=bias and family == "Llama").double()
    assert ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert [*ours.state_dict()] == [*theirs.state_dict()]

    still = torch.ones(1, 5, Dh).double(), torch.zeros(1, 5, Dh).double()      # cos 1 and sin 0: nothing is rotated
    may = causal_mask(5) & PADS

    def library(x):
        return theirs(x, still, additive(may))[0]

    inputs = x, *theirs.parameters()
    reference = with_parameters(theirs, library)
    assert gap(with_parameters(ours, lambda x: ours(x, attn_mask=PADS)), reference, *inputs) < bound
    assert gap(with_parameters(ours, lambda x: ours(x, attn_mask=PADS, return_weights=True)[0]), reference, *inputs) < bound
    if kind == "sdpa":
        assert_parity(with_parameters(ours, lambda x: ours(x, attn_mask=PADS)), reference, *inputs)
        assert_close(ours(x), theirs(x, still, None)[0], rtol=0, atol=bound)
        assert_close(ours(x), theirs(x, still, causal_mask(5).expand(3, 1, 5, 5))[0], rtol=0, atol=bound)
    else:
        weights = ours(x, attn_mask=PADS, return_weights=True)[1]
        assert_close(weights, theirs(x, still, additive(may))[1], rtol=0, atol=bound)
    wrong = [ours(x), ours(x, attn_mask=PADS.flip(-1))]              # controls: each must miss by far
    loose = GroupedQueryAttention(d_model, H, Hkv, head_dim=Dh, qkv_bias=bias, out_bias=bias and family == "Llama",
                                  is_causal=False).double()
    loose.load_state_dict(ours.state_dict())
    wrong.append(loose(x, attn_mask=PADS))
    if 1 < Hkv < H:                                                   # KV heads in repeat order: query heads moved instead
        order = torch.arange(H).view(-1, Hkv).T.flatten()
        state = ours.state_dict()
        for name in ("q_proj.weight", *(["q_proj.bias"] if bias else [])):
            state[name] = state[name].unflatten(0, (H, Dh))[order].flatten(0, 1)
        state["o_proj.weight"] = state["o_proj.weight"].unflatten(1, (H, Dh))[:, order].flatten(1)
        turned = copy.deepcopy(ours)
        turned.load_state_dict(state)
        wrong.append(turned(x, attn_mask=PADS))
    for out in wrong:
        assert (out - library(x)).abs().max() > 100 * bound


# --- the layer: the chain, roads, shapes

def layer_and_x(Hkv=2, T=5, **options):
    """15 numbers a token, 6 query heads of width 4, all biases."""
    options = {"head_dim": 4, "qkv_bias": True, "out_bias": True, **options}
    layer = GroupedQueryAttention(15, 6, Hkv, **options).double()
    x = torch.randn(3, T, 15, dtype=torch.float64)
    return spread_out(layer, x, 6, Hkv), x


def output(layer, x, mask=None, weights_too=False):
    out = layer(x, attn_mask=mask, return_weights=weights_too)
    return out[0] if weights_too else out


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_chain_as_many_kv_heads_is_multi_head(bias, is_causal):
    before = MultiHeadAttention(15, 15, None, 0.0, 5, qkv_bias=bias, out_bias=bias, is_causal=is_causal).double()
    layer = GroupedQueryAttention(15, 5, 5, qkv_bias=bias, out_bias=bias, is_causal=is_causal).double()
    x = torch.randn(3, 5, 15).double()
    spread_out(before, x, 5, 5)
    layer.load_state_dict(before.state_dict())
    for mask in (None, PADS, torch.randn(5, 5, 5).double(), torch.rand(3, 5, 5, 5) > 0.5):
        for weights_too in (False, True):
            assert_parity(with_parameters(layer, lambda x: output(layer, x, mask, weights_too)),
                          with_parameters(before, lambda x: output(before, x, mask, weights_too)), x, *before.parameters())
        assert_parity(lambda x: layer(x, attn_mask=mask, return_weights=True)[1],
                      lambda x: before(x, attn_mask=mask, return_weights=True)[1], x)


@pytest.mark.parametrize("Hkv", [1, 2, 3])
@pytest.mark.parametrize("name", MASKS)
def test_shared_heads_are_multi_head_with_copied_weights(Hkv, name):
    """Gradients of k_proj and v_proj are those of the copies, added up."""
    layer, x = layer_and_x(Hkv)
    before = MultiHeadAttention(15, 24, None, 0.0, 6, qkv_bias=True).double()
    before.o_proj = nn.Linear(24, 15).double()
    mask = MASKS[name]
    mask = mask.double() if name == "favours" else mask

    def copied(x, *parameters):
        state = dict(zip([name for name, _ in layer.named_parameters()], parameters))
        for n in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
            state[n] = state[n].unflatten(0, (Hkv, 4))[torch.arange(6) // (6 // Hkv)].flatten(0, 1)
        return torch.func.functional_call(before, state, (x,), {"attn_mask": mask})

    for weights_too in (False, True):
        assert_parity(with_parameters(layer, lambda x: output(layer, x, mask, weights_too)), copied, x, *layer.parameters())


@pytest.mark.parametrize("Hkv", [1, 2, 6])
@pytest.mark.parametrize("name", MASKS)
def test_both_roads_and_the_weights(Hkv, name):
    layer, x = layer_and_x(Hkv)
    out, weights = layer(x, attn_mask=MASKS[name], return_weights=True)
    assert_close(layer(x, attn_mask=MASKS[name]), out, rtol=0, atol=1e-9)
    assert weights.shape == (3, 6, 5, 5) and out.shape == (3, 5, 15)
    may = causal_mask(5) if MASKS[name] is None or name == "favours" else causal_mask(5) & MASKS[name]
    assert_rows_sum_to_one(weights, may)
    v = spread(layer.v_proj(x).unflatten(-1, (Hkv, 4)).transpose(1, 2), 6)
    assert_close(layer.o_proj((weights @ v).transpose(1, 2).flatten(2)), out, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (1, 1, 5), (0, 5), (2, 1), (2, 0)])
def test_any_leading_axes(shape):
    layer, _ = layer_and_x()
    x = torch.randn(*shape, 15).double()
    out, weights = layer(x, return_weights=True)
    assert out.shape == layer(x).shape == x.shape and weights.shape == (*shape[:-1], 6, shape[-1], shape[-1])
    rows = x.reshape(math.prod(shape[:-1]), shape[-1], 15)
    for n, row in enumerate(rows):
        alone, its_weights = layer(row, return_weights=True)
        assert_close(out.reshape(rows.shape)[n], alone)
        assert_close(weights.reshape(len(rows), *weights.shape[-3:])[n], its_weights)
    if shape == (2, 3, 5):
        pads = padding_mask(torch.tensor([5, 4, 3, 2, 1, 5]))
        assert_close(layer(x, attn_mask=pads).flatten(0, 1), layer(rows, attn_mask=pads))


@pytest.mark.parametrize("name", MASKS)
def test_no_token_sees_its_future_unless_allowed(name):
    layer, x = layer_and_x()
    for weights_too in (False, True):
        assert_causal(lambda x: output(layer, x, MASKS[name], weights_too), x)
        both, _ = layer_and_x(is_causal=False)
        with pytest.raises(AssertionError, match=r"\bfuture\b"):
            assert_causal(lambda x: output(both, x, MASKS[name], weights_too), x)


def test_not_causal_is_plain_attention():
    layer, x = layer_and_x(is_causal=False)
    weights = layer(x, return_weights=True)[1]
    assert (weights > 0).all()
    causal, _ = layer_and_x()
    causal.load_state_dict(layer.state_dict())
    for mask in (None, PADS):
        both = causal_mask(5) if mask is None else mask & causal_mask(5)
        assert_close(layer(x, attn_mask=both), causal(x, attn_mask=mask))


@pytest.mark.parametrize("out_bias", [False, True])
def test_a_token_that_sees_nothing_gives_the_bias(out_bias):
    layer, x = layer_and_x(out_bias=out_bias)
    x.requires_grad_()
    left = padding_mask(REAL.flip(1))[:2]
    for weights_too in (False, True):
        out = output(layer, x[:2], left, weights_too)
        want = layer.o_proj.bias if out_bias else torch.zeros(15).double()
        assert torch.equal(out[0, :2], want.expand(2, 15)) and (out[0, 2:] - want).abs().min() > 0
        grads = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        assert all(g.isfinite().all() for g in grads) and not grads[0][0, :2].any() and grads[0][0, 2:].any()


# --- the layer: doors for a cache and for rotary positions (chapters 07 and 08 use them)

class Joined:
    """The plainest cache: everything so far in two tensors, in a dtype of its own."""

    def __init__(self, dtype=None):
        self.length, self.pair, self.dtype, self.calls = 0, None, dtype, 0

    def update(self, key, value):
        self.calls += 1
        new = tuple(x.to(self.dtype or x.dtype) for x in (key, value))
        self.pair = new if self.pair is None else tuple(torch.cat(two, 2) for two in zip(self.pair, new))
        self.length = self.pair[0].shape[2]
        return self.pair


def rope_for(B, T, half, dtype=torch.float64):
    """Another angle for each text, token and point; cos and sin carry a factor, as long-context models want it."""
    turn = 6 * torch.rand(B, T, half, dtype=torch.float64)
    return (1.2 * turn.cos()).to(dtype), (1.2 * turn.sin()).to(dtype)


def turned(x, rope):
    """The same with complex numbers, (B, H, T, Dh)."""
    half = rope[0].shape[-1]
    points = torch.complex(x[..., :half], x[..., half:2 * half]) * torch.complex(*rope)[:, None]
    return torch.cat([points.real, points.imag, x[..., 2 * half:]], -1)


def written_out_layer(layer, x, rope=None, mask=None):
    """Projections, turns, PyTorch's function on copied heads; and what a cache should keep."""
    Hkv = layer.num_kv_heads
    q, k, v = (p(x).unflatten(-1, (n, -1)).transpose(1, 2) for p, n in (
        (layer.q_proj, layer.num_heads), (layer.k_proj, Hkv), (layer.v_proj, Hkv)))
    if rope is not None:
        q, k = turned(q, rope), turned(k, rope)
    out = oracle(q, k, v, mask, is_causal=layer.is_causal)
    return layer.o_proj(out.transpose(1, 2).flatten(2)), k, v


@pytest.mark.parametrize("half", [1, 2])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_rotation_is_that_of_transformers(rows, half):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 6, 5, 2 * half).double(), torch.randn(2, 3, 5, 2 * half).double()
    cos, sin = rope_for(rows, 5, half)
    theirs = apply_rotary_pos_emb(q, k, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    for x, want in zip((q, k), theirs):
        assert_close(grouped_query._rotate(x, cos, sin), want, rtol=0, atol=1e-12)
        assert_close(want, turned(x, (cos, sin)), rtol=0, atol=1e-12)
        assert (grouped_query._rotate(x, cos, -sin) - want).abs().max() > 1e-2
    wide = torch.cat([q, torch.randn(2, 6, 5, 3)], -1)       # numbers behind the points stay as they are
    assert torch.equal(grouped_query._rotate(wide, cos, sin), torch.cat([theirs[0], wide[..., 2 * half:]], -1))
    assert torch.equal(grouped_query._rotate(q, cos[..., :0], sin[..., :0]), q)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_rotation_is_rounded_once(dtype):
    x, (cos, sin) = torch.randn(2, 3, 50, 8).to(dtype), rope_for(2, 50, 4, torch.float32)
    exact = turned(x.double(), (cos.double(), sin.double()))
    assert torch.equal(grouped_query._rotate(x, cos, sin), turned(x.float(), (cos, sin)).to(dtype))
    step = torch.finfo(dtype).eps
    assert ((grouped_query._rotate(x, cos, sin).double() - exact).abs() <= 0.5001 * step * 2 ** exact.abs().log2().floor()
            + 1e-6).all()


@pytest.mark.parametrize("Hkv", [1, 2, 6])
@pytest.mark.parametrize("rows, half", [(1, 2), (3, 2), (3, 1), (1, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_doors_open_together(masked, rows, half, Hkv):
    """With rope, in one pass and in pieces: outputs and what is kept are those written out."""
    layer, x = layer_and_x(Hkv)
    rope, mask = rope_for(rows, 5, half), PADS if masked else None
    want, keys, values = written_out_layer(layer, x, rope, mask)
    for weights_too in (False, True):
        def run(start, stop, **options):
            out = layer(x[:, start:stop], rope=tuple(t[:, start:stop] for t in rope), return_weights=weights_too,
                        attn_mask=None if mask is None else mask[..., :stop], **options)
            return out[0] if weights_too else out
        assert_close(run(0, 5), want, rtol=0, atol=1e-9)
        for cuts in ((0, 5), (0, 3, 4, 5), (0, 1, 5), (0, 1, 2, 3, 4, 5), (0, 2, 2, 5)):
            cache = Joined()
            got = torch.cat([run(a, b, cache=cache) for a, b in zip(cuts, cuts[1:])], 1)
            assert_close(got, want, rtol=0, atol=1e-9)
            assert_close(cache.pair[0], keys, rtol=0, atol=1e-12)
            assert_close(cache.pair[1], values, rtol=0, atol=1e-12)
            assert cache.calls == len(cuts) - 1
    if half:
        assert (layer(x, attn_mask=mask) - want).abs().max() > 1e-2      # the turn does something


def test_weights_of_new_rows_reach_back():
    layer, x = layer_and_x()
    cache, want = Joined(), layer(x, return_weights=True)[1]
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        weights = layer(x[:, start:stop], cache=cache, return_weights=True)[1]
        assert_close(weights, want[:, :, start:stop, :stop], rtol=0, atol=1e-9)


def test_gradients_go_through_both_doors():
    layer, x = layer_and_x()
    rope = rope_for(3, 5, 2)

    def pieces(x):
        cache, spans = Joined(), ((0, 2), (2, 3), (3, 5))
        return torch.cat([layer(x[:, a:b], cache=cache, rope=tuple(t[:, a:b] for t in rope)) for a, b in spans], 1)
    assert_parity(with_parameters(layer, pieces), with_parameters(layer, lambda x: written_out_layer(layer, x, rope)[0]),
                  x, *layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_cache_may_have_another_dtype(dtype, kept):
    """Computed and returned in the layer's; float32 rope does not widen it."""
    layer, x = layer_and_x()
    layer, x = layer.to(dtype), x.to(dtype)
    cache, rope = Joined(kept), rope_for(1, 5, 2, torch.float32)
    outs = [layer(x[:, a:b], cache=cache, rope=tuple(t[:, a:b] for t in rope)) for a, b in ((0, 3), (3, 4), (4, 5))]
    assert {out.dtype for out in outs} == {dtype} and cache.pair[0].dtype == kept
    out = torch.cat(outs, 1)
    q = grouped_query._rotate(layer.q_proj(x).unflatten(-1, (6, 4)).transpose(1, 2), *rope)
    want = oracle(q, *(t.to(dtype) for t in cache.pair), is_causal=True)
    assert_close(out, layer.o_proj(want.transpose(1, 2).flatten(2)), rtol=0, atol=20 * torch.finfo(dtype).eps)


GOOD_ROPE = torch.ones(1, 5, 2), torch.zeros(1, 5, 2)


@pytest.mark.parametrize("options, error, words", [
    ({"cache": 3}, TypeError, "cache"),
    ({"cache": SimpleNamespace(length=0)}, TypeError, "cache"),
    ({"cache": {"update": 1, "length": 2}}, TypeError, "cache"),
    ({"rope": GOOD_ROPE[0]}, TypeError, "rope"),
    ({"rope": (*GOOD_ROPE, 1)}, TypeError, "rope"),
    ({"rope": [*GOOD_ROPE]}, TypeError, "rope"),
    ({"rope": tuple(t.long() for t in GOOD_ROPE)}, TypeError, "rope"),
    ({"rope": tuple(t[:, :4] for t in GOOD_ROPE)}, ValueError, "rope"),
    ({"rope": (GOOD_ROPE[0], GOOD_ROPE[1][:, :4])}, ValueError, "rope"),
    ({"rope": tuple(t[:, :1] for t in GOOD_ROPE)}, ValueError, "rope"),
    ({"rope": tuple(t[0] for t in GOOD_ROPE)}, ValueError, "rope"),
    ({"rope": tuple(t[:, None] for t in GOOD_ROPE)}, ValueError, "rope"),
    ({"rope": tuple(t.expand(2, 5, 2) for t in GOOD_ROPE)}, ValueError, "rope"),
    ({"rope": tuple(t.repeat(1, 1, 2) for t in GOOD_ROPE)}, ValueError, "rope"),
    ({"rope": tuple(t.to("meta") for t in GOOD_ROPE)}, TypeError, "rope"),
    ({"attn_mask": torch.ones(5, 5).bool()}, ValueError, "attn_mask"),
    ({"attn_mask": torch.ones(7).long()}, TypeError, "attn_mask"),
    ({"attn_mask": torch.ones(7, device="meta")}, TypeError, "attn_mask"),
])
def test_what_the_doors_refuse_is_not_kept(options, error, words):
    layer, x = layer_and_x()
    cache = Joined()
    layer(x[:, :2], cache=cache)
    for weights_too in (False, True):
        with pytest.raises(error, match=rf"\b{words}\b"):
            layer(x, return_weights=weights_too, **{"cache": cache, **options})
        assert cache.calls == 1 and cache.length == 2


# --- the layer: dropout

class Road(nn.Module):
    def __init__(self, layer, mask, weights_too):
        super().__init__()
        self.layer, self.mask, self.weights_too = layer, mask, weights_too

    def forward(self, x):
        return output(self.layer, x, self.mask, self.weights_too)


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("rates", [{"dropout": 0.5}, {"out_dropout": 0.5}, {"dropout": 0.3, "out_dropout": 0.3}])
def test_random_in_training_and_only_there(rates, weights_too):
    layer, x = layer_and_x(**rates)
    assert (layer.dropout.p, layer.out_dropout.p) == (rates.get("dropout", 0.0), rates.get("out_dropout", 0.0))
    for mask in (None, PADS):
        assert_eval_deterministic(Road(layer, mask, weights_too), x)
    plain, _ = layer_and_x()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(output(layer.eval(), x, PADS, weights_too), output(plain, x, PADS, weights_too))
    weights = layer(x, return_weights=True)[1]
    assert torch.equal(layer.train()(x, return_weights=True)[1], weights)     # those before dropout


@pytest.mark.parametrize("weights_too", [False, True])
def test_the_two_dropouts_are_where_they_should_be(weights_too):
    layer, x = layer_and_x(dropout=1.0)
    assert torch.equal(output(layer, x, None, weights_too), layer.o_proj.bias.expand(3, 5, 15))    # no weight is left
    layer, x = layer_and_x(out_dropout=1.0)
    assert not output(layer, x, None, weights_too).any()                                          # the bias is gone too
    layer, x = layer_and_x(out_dropout=0.75)
    out, calm = output(layer, x, None, weights_too), output(layer.eval(), x, None, weights_too)
    assert_close(out, torch.where(out == 0, out, calm * 4)) and 0 < (out == 0).double().mean() < 1
    assert abs((out == 0).double().mean() - 0.75) < 0.15
    layer, x = layer_and_x(dropout=0.75)
    many = x[:1].expand(4000, 5, 15)
    out, calm = output(layer, many, None, weights_too), output(layer.eval(), x[:1], None, weights_too)
    assert out.all() and (out[:, 0] == layer.o_proj.bias).all(-1).double().mean() < 0.3
    assert (out.mean(0) - calm[0]).abs().max() < 0.1 * out.std(0).max()


def test_the_dropout_modules_decide():
    layer, x = layer_and_x(dropout=0.5, out_dropout=0.5)
    layer.eval()
    for module in (layer.dropout, layer.out_dropout):
        module.train()
        assert not torch.equal(layer(x), layer(x))
        module.eval()
        assert torch.equal(layer(x), layer(x))
    layer.train()
    layer.dropout.p = layer.out_dropout.p = 0.0
    assert torch.equal(layer(x), layer(x))


# --- the layer: construction and life

@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("out_bias", [False, True])
@pytest.mark.parametrize("Hkv, Dh", [(6, None), (3, None), (1, 7)])
def test_names_and_shapes(qkv_bias, out_bias, Hkv, Dh):
    layer = GroupedQueryAttention(30, 6, Hkv, head_dim=Dh, qkv_bias=qkv_bias, out_bias=out_bias)
    Dh = Dh or 5
    rows = {"q": 6 * Dh, "k": Hkv * Dh, "v": Hkv * Dh, "o": 30}
    want = {f"{p}_proj.weight": (n, 6 * Dh if p == "o" else 30) for p, n in rows.items()}
    want |= {f"{p}_proj.bias": (n,) for p, n in rows.items()}
    want = {name: shape for name, shape in want.items() if "weight" in name or (out_bias if name[0] == "o" else qkv_bias)}
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == want
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.is_causal) == (6, Hkv, Dh, True)
    assert layer(torch.randn(2, 3, 30)).shape == (2, 3, 30)


def test_defaults():
    layer = GroupedQueryAttention(30, 6, 2)
    assert all(p.bias is None for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj))
    assert layer.dropout.p == layer.out_dropout.p == 0 and layer.is_causal and layer.head_dim == 5
    with pytest.raises(TypeError):
        GroupedQueryAttention(30, 6, 2, 5)


@pytest.mark.parametrize("sizes, options, error, words", [
    ((0, 6, 2), {}, ValueError, "d_model"),
    ((12, 0, 2), {}, ValueError, "num_heads"),
    ((12, -6, 2), {}, ValueError, "num_heads"),
    ((12, 6, 0), {}, ValueError, "num_kv_heads"),
    ((12, 6, 2.0), {}, TypeError, "num_kv_heads"),
    ((12.0, 6, 2), {}, TypeError, "d_model"),
    ((12, None, 2), {}, TypeError, "num_heads"),
    ((12, 6, None), {}, TypeError, "num_kv_heads"),
    ((12, 6, 4), {}, ValueError, "num_kv_heads"),
    ((12, 2, 6), {}, ValueError, "num_kv_heads"),
    ((15, 6, 2), {}, ValueError, "num_heads"),
    ((12, 6, 2), {"head_dim": 0}, ValueError, "head_dim"),
    ((12, 6, 2), {"head_dim": 2.0}, TypeError, "head_dim"),
    ((12, 6, 2), {"dropout": 1.5}, ValueError, "dropout"),
    ((12, 6, 2), {"dropout": None}, TypeError, "dropout"),
    ((12, 6, 2), {"out_dropout": -0.1}, ValueError, "out_dropout"),
    ((12, 6, 2), {"out_dropout": True}, TypeError, "out_dropout"),
])
def test_wrong_sizes_are_refused(sizes, options, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        GroupedQueryAttention(*sizes, **options)


@pytest.mark.parametrize("x, error, words", [
    (None, TypeError, "x"),
    (torch.zeros(2, 5, 15).long(), TypeError, "x"),
    (torch.zeros(2, 5, 15), TypeError, "x"),
    (torch.zeros(15), ValueError, "x"),
    (torch.zeros(2, 5, 14), ValueError, "x"),
    (torch.zeros(()), ValueError, "x"),
])
def test_wrong_input_is_refused(x, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        layer_and_x()[0](x)


def test_wrong_masks_are_refused_and_options_are_keywords():
    layer, x = layer_and_x()
    with pytest.raises(ValueError, match=r"\battn_mask\b"):
        layer(x, attn_mask=PADS[:2])
    with pytest.raises(ValueError, match=r"\battn_mask\b"):
        layer(x, attn_mask=torch.ones(2, 5, 5).bool())               # one mask per KV head is not one per query head
    with pytest.raises(TypeError):
        layer(x, PADS)


@pytest.mark.parametrize("dtype", HALVES + [torch.float32])
@pytest.mark.parametrize("name", MASKS)
def test_runs_in_every_dtype_and_under_autocast(dtype, name):
    exact, x = layer_and_x(2)
    want = exact(x, attn_mask=MASKS[name])
    layer, low = copy.deepcopy(exact).to(dtype), x.to(dtype)
    for weights_too in (False, True):
        out = output(layer, low, MASKS[name], weights_too)
        assert out.dtype == dtype and (out.double() - want).abs().max() < 40 * torch.finfo(dtype).eps
    if dtype != torch.float32:
        with torch.autocast("cpu", dtype=dtype):
            out = exact.float()(x.float(), attn_mask=MASKS[name])
        assert out.dtype == dtype and (out.double() - want).abs().max() < 40 * torch.finfo(dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 3, torch.tensor([3, 1])])
def test_the_function_compiles_into_one_graph(offset):
    torch.compiler.reset()
    fn = torch.compile(grouped_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for Tq in (1, 4, 6):
        query, key, value = qkv(Tq=Tq, Tk=Tq + 3)
        for mask in (None, torch.rand(6, Tq, Tq + 3) > 0.4):
            options = {"is_causal": True, "offset": offset}
            assert_close(fn(query, key, value, mask, **options), oracle(query, key, value, mask, **options))


@pytest.mark.slow
@pytest.mark.parametrize("Hkv", [1, 2, 6])
def test_exports_with_free_length(Hkv):
    layer, x = layer_and_x(Hkv)
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=64)},))
    longer = torch.randn(3, 9, 15).double()
    assert_close(program.module()(longer), layer(longer))


# --- from_multi_head

def multi_head(bias=True, dtype=torch.float64, **options):
    layer = MultiHeadAttention(18, 18, 7, options.pop("dropout", 0.0), 6, qkv_bias=bias, out_bias=bias, **options)
    return layer.to(dtype)


def heads_of(t, n):
    return t.unflatten(0, (n, 3))


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("bias", [False, True])
def test_as_many_heads_as_before_change_nothing(method, bias):
    before, x = multi_head(bias), torch.randn(3, 5, 18).double()
    same = GroupedQueryAttention.from_multi_head(before, 6, method)
    assert isinstance(same, GroupedQueryAttention) and (same.num_heads, same.num_kv_heads, same.head_dim) == (6, 6, 3)
    assert same.state_dict().keys() == before.state_dict().keys()
    for a, b in zip(same.state_dict().values(), before.state_dict().values()):
        assert torch.equal(a, b)
    assert_close(same(x, attn_mask=PADS), before(x, attn_mask=PADS))


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("Hkv", [1, 2, 3])
def test_groups_of_equal_heads_lose_nothing(Hkv, method):
    before, x = multi_head(), torch.randn(3, 5, 18).double()
    with torch.no_grad():
        for p in (before.k_proj.weight, before.k_proj.bias, before.v_proj.weight, before.v_proj.bias):
            p.copy_(heads_of(p, 6)[torch.arange(6) // (6 // Hkv) * (6 // Hkv)].flatten(0, 1))
    fewer = GroupedQueryAttention.from_multi_head(before, Hkv, method)
    assert fewer.k_proj.weight.shape == (3 * Hkv, 18)
    assert_close(fewer(x, attn_mask=PADS), before(x, attn_mask=PADS), rtol=0, atol=1e-9)
    for name in ("k_proj", "v_proj"):        # control: unlike heads do lose something
        damaged = copy.deepcopy(before)
        with torch.no_grad():
            getattr(damaged, name).weight[3:6].add_(1.0)
        gap = GroupedQueryAttention.from_multi_head(damaged, Hkv, method)(x) - damaged(x)
        assert gap.abs().max() > 1e-3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("Hkv", [1, 2, 3, 6])
def test_pooled_by_hand(Hkv, bias):
    before, R = multi_head(bias), 6 // Hkv
    mean, first = (GroupedQueryAttention.from_multi_head(before, Hkv, m) for m in ("mean", "first"))
    for name in ("k_proj", "v_proj"):
        for kind in ("weight", "bias") if bias else ("weight",):
            old = getattr(getattr(before, name), kind)
            for j in range(Hkv):
                rows = [old[3 * h:3 * h + 3] for h in range(j * R, j * R + R)]
                assert_close(getattr(getattr(mean, name), kind)[3 * j:3 * j + 3], sum(rows) / R, rtol=0, atol=1e-12)
                assert torch.equal(getattr(getattr(first, name), kind)[3 * j:3 * j + 3], rows[0])
    for new in (mean, first):
        for name in [n for n in before.state_dict() if n[0] in "qo"]:
            assert torch.equal(new.state_dict()[name], before.state_dict()[name])
    default = GroupedQueryAttention.from_multi_head(before, Hkv)
    assert all(map(torch.equal, default.state_dict().values(), mean.state_dict().values()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("Hkv", [2, 6])
def test_random_draws_new_keys_and_values(Hkv, bias):
    before, layers = multi_head(bias), []
    for s in (1, 1, 2):
        torch.manual_seed(s)
        layers.append(GroupedQueryAttention.from_multi_head(before, Hkv, "random").state_dict())
    for name, t in layers[0].items():
        assert torch.equal(t, layers[1][name]) and t.dtype == torch.float64
        if name[0] in "kv":
            assert not torch.equal(t, layers[2][name])
            assert all(not torch.equal(a, b) for a in heads_of(t, Hkv) for b in heads_of(before.state_dict()[name], 6))
            assert t.abs().max() <= 18 ** -0.5       # nn.Linear's own initial weights
        else:
            assert torch.equal(t, before.state_dict()[name])


@pytest.mark.parametrize("method", ["mean", "first"])
def test_the_global_generator_is_left_alone(method):
    state = torch.random.get_rng_state()
    before = multi_head()
    torch.random.set_rng_state(state)
    for Hkv in (1, 2, 6):
        GroupedQueryAttention.from_multi_head(before, Hkv, method)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("method", ["mean", "first", "random"])
@pytest.mark.parametrize("Hkv", [1, 2, 6])
def test_the_copy_stands_alone(method, Hkv):
    before = multi_head()
    saved = copy.deepcopy(before.state_dict())
    new = GroupedQueryAttention.from_multi_head(before, Hkv, method)
    places = {t.untyped_storage().data_ptr() for t in before.parameters()}
    assert not places & {t.untyped_storage().data_ptr() for t in new.parameters()}
    kept = copy.deepcopy(new.state_dict())
    assert all(p.is_leaf and p.requires_grad and p.device.type == "cpu" for p in new.parameters())
    new(torch.randn(2, 5, 18).double()).sum().backward()
    assert all(p.grad is not None for p in new.parameters()) and all(p.grad is None for p in before.parameters())
    with torch.no_grad():
        for p in before.parameters():
            p.fill_(9.0)
    assert all(map(torch.equal, new.state_dict().values(), kept.values()))
    with torch.no_grad():
        before.load_state_dict(saved)
        for p in new.parameters():
            p.zero_()
    assert all(map(torch.equal, before.state_dict().values(), saved.values()))


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_what_is_carried_over(method):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for training in (False, True):
            for is_causal in (False, True):
                before = multi_head(dtype=dtype, dropout=0.25, is_causal=is_causal).train(training)
                new = GroupedQueryAttention.from_multi_head(before, 2, method)
                assert {p.dtype for p in new.parameters()} == {dtype} and new.is_causal == is_causal
                assert all(m.training == training for m in new.modules())
                assert (new.dropout.p, new.out_dropout.p) == (0.25, 0.0)
    for qkv_bias, out_bias in ((False, True), (True, False)):
        before = MultiHeadAttention(18, 18, None, 0.0, 6, qkv_bias=qkv_bias, out_bias=out_bias)
        new = GroupedQueryAttention.from_multi_head(before, 2, method)
        assert [p.bias is not None for p in (new.q_proj, new.k_proj, new.v_proj, new.o_proj)] == [qkv_bias] * 3 + [out_bias]
    with torch.device("meta"):
        before = multi_head()
    assert {p.device.type for p in GroupedQueryAttention.from_multi_head(before, 2, method).parameters()} == {"meta"}


def test_from_grouped_to_fewer_heads():
    """Twice is the same as at once for means; a free head width and the second dropout are kept."""
    layer = GroupedQueryAttention(10, 12, 12, head_dim=3, qkv_bias=True, dropout=0.1, out_dropout=0.3, is_causal=False)
    layer.double().eval()
    for method in ("mean", "first"):
        half = GroupedQueryAttention.from_multi_head(layer, 6, method)
        twice, once = (GroupedQueryAttention.from_multi_head(x, 2, method) for x in (half, layer))
        assert (half.dropout.p, half.out_dropout.p, half.head_dim) == (0.1, 0.3, 3) and not (half.is_causal or half.training)
        assert half.o_proj.bias is None and half.num_heads == 12 and half.o_proj.weight.shape == (10, 36)
        for a, b in zip(twice.state_dict().values(), once.state_dict().values()):
            assert_close(a, b, rtol=0, atol=1e-12)
        x = torch.randn(2, 4, 10).double()
        assert_close(twice(x), once(x)) and twice(x).shape == x.shape
    with pytest.raises(ValueError, match=r"\bnum_kv_heads\b"):
        GroupedQueryAttention.from_multi_head(half, 4)      # divides the 12 query heads, but not the 6 KV heads


@pytest.mark.parametrize("layer, Hkv, method, error, words", [
    (nn.MultiheadAttention(18, 6), 2, "mean", TypeError, "layer"),
    (None, 2, "mean", TypeError, "layer"),
    (MultiHeadAttention(10, 18, None, 0.0, 6), 2, "mean", ValueError, "layer"),
    (MultiHeadAttention(18, 18, None, 0.0, 6, k_in=10), 2, "mean", ValueError, "layer"),
    (MultiHeadAttention(18, 18, None, 0.0, 6, v_in=9), 2, "mean", ValueError, "layer"),
    (multi_head(), 4, "mean", ValueError, "num_kv_heads"),
    (multi_head(), 12, "first", ValueError, "num_kv_heads"),
    (multi_head(), 0, "mean", ValueError, "num_kv_heads"),
    (multi_head(), 2.0, "mean", TypeError, "num_kv_heads"),
    (multi_head(), 2, "last", ValueError, "method"),
    (multi_head(), 2, None, ValueError, "method"),
])
def test_conversions_refused(layer, Hkv, method, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        GroupedQueryAttention.from_multi_head(layer, Hkv, method)


# --- kv_cache_bytes

@given(sizes=st.tuples(*[st.integers(0, 4)] * 5), dtype=st.sampled_from(
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_bytes_are_those_of_the_tensors(sizes, dtype):
    L, Hkv, Dh, T, B = sizes
    got = kv_cache_bytes(*sizes, dtype=dtype)
    assert type(got) is int and got == sum(torch.zeros(B, Hkv, T, Dh, dtype=dtype).nbytes for _ in range(2 * L))
    named = kv_cache_bytes(num_layers=L, num_kv_heads=Hkv, head_dim=Dh, seq_len=T)
    assert named == kv_cache_bytes(L, Hkv, Dh, T, 1, torch.float16)


@pytest.mark.parametrize("model, sizes, want", [
    ("Llama 3 8B", (32, 8, 128, 4096), 2 ** 29), ("Llama 2 7B", (32, 32, 128, 4096), 2 ** 31),
    ("Llama 2 70B", (80, 8, 128, 4096), 5 * 2 ** 28), ("OPT 13B, one token", (40, 40, 128, 1), 800 * 2 ** 10),
    ("Llama 3 8B, 10 texts of 131072", (32, 8, 128, 131072, 10), 160 * 2 ** 30)])
def test_published_numbers(model, sizes, want):
    assert kv_cache_bytes(*sizes) == kv_cache_bytes(*sizes, dtype=torch.float16) == want
    assert kv_cache_bytes(*sizes, dtype=torch.float32) == 2 * want


@pytest.mark.parametrize("arguments, error, words", [
    ((-1, 8, 128, 5), ValueError, "num_layers"),
    ((1, -8, 128, 5), ValueError, "num_kv_heads"),
    ((1, 8, -1, 5), ValueError, "head_dim"),
    ((1, 8, 128, -5), ValueError, "seq_len"),
    ((1, 8, 128, 5, -2), ValueError, "batch_size"),
    ((1, 8, 128.0, 5), TypeError, "head_dim"),
    ((True, 8, 128, 5), TypeError, "num_layers"),
    ((1, 8, 128, None), TypeError, "seq_len"),
    ((1, 8, 128, 5, 1, 2), TypeError, "dtype"),
    ((1, 8, 128, 5, 1, "bfloat16"), TypeError, "dtype"),
])
def test_wrong_counts_are_refused(arguments, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        kv_cache_bytes(*arguments)


# --- found by reviewers

def test_a_mask_that_comes_later_compiles():
    """A size that became dynamic is compared by value."""
    torch.compiler.reset()
    compiled = torch.compile(grouped_attention, fullgraph=True, backend="eager")
    for B, mask in ((2, None), (3, torch.ones(3, 1, 1, 6).bool()), (4, torch.rand(4, 4, 3, 6) > 0.5)):
        query, key, value = qkv(B, 4, 2, 3, 6)
        assert_close(compiled(query, key, value, mask), grouped_attention(query, key, value, mask))


@pytest.mark.parametrize("scale", [0.0, -1.0, 0, 2])
@pytest.mark.parametrize("Tq, Tk", [(4, 4), (3, 5), (5, 3), (1, 4)])
def test_any_finite_scale(scale, Tq, Tk):
    query, key, value = qkv(Tq=Tq, Tk=Tk)
    mask = torch.ones(Tq, Tk).tril().bool()
    want, _ = attention(query, repeat_kv(key, 3), repeat_kv(value, 3), mask, scale=scale)
    for out in both_roads(query, key, value, is_causal=True, scale=scale):
        assert_close(out, want)
    for wrong in (torch.inf, torch.nan, -torch.inf):
        with pytest.raises(ValueError, match=r"\bscale\b"):
            grouped_attention(query, key, value, scale=wrong)
    with pytest.raises(TypeError, match=r"\bscale\b"):
        grouped_attention(query, key, value, scale=True)


def test_the_dtype_of_the_query_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        for out in both_roads(*qkv(dtype=torch.float32)):
            assert out.dtype == torch.float32


def test_keys_after_the_last_query_leave_no_trace():
    """Also in the gradients, and whatever they hold."""
    query, key, value = (x.requires_grad_() for x in qkv(Tq=3, Tk=5))
    late = [torch.cat([x[:, :, :3], torch.full_like(x[:, :, 3:], torch.finfo(x.dtype).max)], 2) for x in (key, value)]
    for tensors in ((query, key, value), (query, *late)):
        out = grouped_attention(*tensors, is_causal=True)
        assert_close(out, grouped_attention(query, key[:, :, :3], value[:, :, :3], is_causal=True))
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (query, key, value)))


@pytest.mark.parametrize("shapes", [
    ((2, 6, 4, 8, 1), (2, 2, 5, 8), (2, 2, 5, 8)), ((2, 6, 4, 8), (2, 2, 5, 8, 1), (2, 2, 5, 8)),
    ((2, 6, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8, 1)), ((2, 6, 4, 8, 1), (2, 2, 5, 8, 1), (2, 2, 5, 8, 1)),
    ((2, 4, 8), (2, 5, 8), (2, 5, 8)), ((4, 8), (2, 2, 5, 8), (2, 2, 5, 8)), ((2, 6, 4, 8), (5, 8), (2, 2, 5, 8)),
    ((2, 6, 4, 8), (2, 2, 5, 7), (2, 2, 5, 8)), ((2, 6, 4, 7), (2, 2, 5, 8), (2, 2, 5, 8)),
    ((2, 6, 4, 8, 1), (2, 2, 5, 8, 1), (2, 2, 5, 8)), ((2, 6, 4), (2, 2, 5, 8), (2, 2, 5, 8)),
    ((2, 6, 4), (2, 2, 5), (2, 2, 5, 8)),
])
def test_any_other_rank_or_width_is_refused(shapes):
    with pytest.raises(ValueError, match=r"\bquery\b"):
        grouped_attention(*map(torch.zeros, shapes))


@pytest.mark.parametrize("Dh, Dv, version, reads", [
    (64, 64, (8, 0), True), (256, 256, (9, 0), True), (257, 257, (9, 0), False), (64, 65, (9, 0), False),
    (65, 64, (9, 0), False), (64, 64, (7, 5), False), (64, 64, (12, 0), True), (320, 320, (8, 9), False)])
def test_which_widths_the_flash_kernel_reads(monkeypatch, Dh, Dv, version, reads):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: version)
    query, value = (SimpleNamespace(is_cuda=True, dtype=torch.float16, device="cuda:0", shape=(2, 4, 5, D)) for D in (Dh, Dv))
    assert grouped_query._reads_groups(query, value, None) == reads


@pytest.mark.parametrize("offset, kept", [(0, 3), (-1, 5), (1, 5)])
def test_keys_after_the_last_query_are_cut_off(kernel, offset, kept):
    """Where nobody sees them the kernel does not get them; another offset takes the road of masks."""
    query, key, value = qkv(Tq=3, Tk=5)
    out = grouped_attention(query, key, value, is_causal=True, offset=offset)
    call = kernel.pop()
    assert call.key.shape[2] == call.value.shape[2] == kept and (call.attn_mask is None) == (offset == 0) == call.is_causal
    assert_close(out, oracle(query, key, value, None, is_causal=True, offset=offset), rtol=0, atol=1e-9)
    grouped_attention(query, key[:, :, :2], value[:, :, :2], is_causal=True)
    assert kernel.pop().key.shape[2] == 2
    equal = qkv(Tq=3, Tk=3)
    grouped_attention(*equal, is_causal=True)
    assert kernel.pop().key is equal[1]


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0])
def test_a_positive_scale_keeps_the_causality_of_the_kernel(kernel, scale):
    grouped_attention(*qkv(Tq=5), is_causal=True, scale=scale)
    call = kernel.pop()
    assert call.is_causal and call.attn_mask is None


def test_methods_are_compared_by_value():
    layer = GroupedQueryAttention(8, 4, 4)
    mean = "".join(["me", "an"])                             # equal to "mean", another object
    assert torch.equal(GroupedQueryAttention.from_multi_head(layer, 2, mean).k_proj.weight,
                       GroupedQueryAttention.from_multi_head(layer, 2).k_proj.weight)
    random = "".join(["ran", "dom"])
    assert not torch.equal(GroupedQueryAttention.from_multi_head(layer, 4, random).k_proj.weight, layer.k_proj.weight)
    assert grouped_attention(*qkv(Dh=300)).shape[-1] == 300
    wide = qkv(H=600, Hkv=300, Tq=2, Tk=2, Dh=2)             # numbers that are not one object
    assert_close(grouped_attention(*wide, is_causal=True), oracle(*wide, None, is_causal=True), rtol=0, atol=1e-9)
