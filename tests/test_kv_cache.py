"""A KV cache: against a list of tokens, one pass, each text alone, PyTorch and Hugging Face; what it refuses, makes, compiles."""
import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import HALVES, Recorder, lively
from torch.testing import assert_close

from attn_nb.causal import causal_mask, padding_mask
from attn_nb.grouped_query import GroupedQueryAttention, kv_cache_bytes, repeat_kv
from attn_nb.kv_cache import KVCache
from attn_nb.testing import assert_parity, assert_rows_sum_to_one

SDPA = F.scaled_dot_product_attention
FLOATS = [*HALVES, torch.float32, torch.float64]
EIGHTS = [torch.float8_e4m3fn, torch.float8_e5m2]
examples = settings(max_examples=150, deadline=None, derandomize=True)


def bits(x):
    """Equal bits and nothing else: NaN is NaN, -0 is not 0."""
    return x.detach().contiguous().view(torch.uint8).clone()


def snapshot(cache):
    """All slots, filled or not, and the length."""
    return cache.length, bits(cache._keys), bits(cache._values)


def same(a, b):
    return a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


def poisoned(*sizes, **options):
    """A cache whose empty slots are NaN: whoever reads one is found out."""
    cache = KVCache(*sizes, **options)
    cache._keys.fill_(math.nan)
    cache._values.fill_(math.nan)
    return cache


def tokens(B, Hkv, T, Dh, Dv=None, dtype=torch.float64):
    """Keys and values of T tokens, not contiguous, as a projection makes them."""
    made = [torch.randn(B, T, Hkv, D).transpose(1, 2).to(dtype) for D in (Dh, Dh if Dv is None else Dv)]
    return made[0], made[1]


# --- the cache alone: a list of tokens is the oracle

class Machine:
    """A cache and what it should hold: for each token its key (B, Hkv, Dh) and its value (B, Hkv, Dv)."""

    def __init__(self, data, B, Hkv, N, Dh, Dv, dtype):
        self.draw, self.sizes, self.dtype = data.draw, (B, Hkv, N, Dh, Dv), dtype
        self.cache, self.held, self.top = poisoned(B, Hkv, N, Dh, Dv, dtype=dtype), [], 0
        self.memory = self.cache._keys.data_ptr(), self.cache._values.data_ptr()

    def refused(self, error, name, call):
        before = snapshot(self.cache)
        with pytest.raises(error, match=rf"\b{name}\b"):
            call()
        assert same(before, snapshot(self.cache)), "changed by a call that was refused"

    def update(self):
        B, Hkv, N, Dh, Dv = self.sizes
        T = self.draw(st.integers(0, N + 1))
        key, value = tokens(B, Hkv, T, Dh, Dv, self.draw(st.sampled_from(FLOATS)))
        before = key.clone(), value.clone()
        if len(self.held) + T > N:
            self.refused(ValueError, "max_len", lambda: self.cache.update(key, value))
        else:
            keys, values = self.cache.update(key, value)
            self.held += [(key[:, :, t].to(self.dtype), value[:, :, t].to(self.dtype)) for t in range(T)]
            assert torch.equal(keys, self.cache.keys) and torch.equal(values, self.cache.values)
            assert keys.data_ptr() == self.cache.keys.data_ptr() and values.data_ptr() == self.cache.values.data_ptr()
        assert torch.equal(key, before[0]) and torch.equal(value, before[1]), "an argument was written to"

    def misfit(self):
        B, Hkv, N, Dh, Dv = self.sizes
        axis, at = self.draw(st.integers(0, 3)), self.draw(st.integers(0, 1))
        pair = [list(x.shape) for x in tokens(B, Hkv, 1, Dh, Dv)]
        pair[at][axis] += 1
        name = "value" if axis == 2 else ("key", "value")[at]
        self.refused(ValueError, name, lambda: self.cache.update(*map(torch.zeros, pair)))

    def crop(self):
        length = self.draw(st.integers(-1, len(self.held) + 2))
        if length < 0:
            self.refused(ValueError, "length", lambda: self.cache.crop(length))
        elif length > len(self.held):
            self.refused(ValueError, "length", lambda: self.cache.crop(length))
        else:
            assert self.cache.crop(length) is None
            del self.held[length:]

    def reset(self):
        assert self.cache.reset() is None
        self.held = []

    def reorder(self):
        B = self.sizes[0]
        rows = self.draw(st.lists(st.integers(-1, B), min_size=B, max_size=B))
        index = torch.tensor(rows, dtype=self.draw(st.sampled_from([torch.int64, torch.int32, torch.int8])))
        outside = [r for r in rows if not 0 <= r < B]
        if outside:
            self.refused(ValueError, "index", lambda: self.cache.reorder(index))
        else:
            assert self.cache.reorder(index) is None
            self.held = [(key[rows], value[rows]) for key, value in self.held]
        assert index.tolist() == rows, "an argument was written to"

    def check(self):
        B, Hkv, N, Dh, Dv = self.sizes
        cache, T = self.cache, len(self.held)
        self.top = max(self.top, T)
        assert type(cache.length) is int and cache.length == T and cache.max_len == N
        assert (cache._keys.data_ptr(), cache._values.data_ptr()) == self.memory, "other memory than reserved"
        for n, (view, slots, D) in enumerate(((cache.keys, cache._keys, Dh), (cache.values, cache._values, Dv))):
            assert view.shape == (B, Hkv, T, D) and slots.shape == (B, Hkv, N, D) and view.dtype == slots.dtype == self.dtype
            assert view.untyped_storage().data_ptr() == slots.untyped_storage().data_ptr(), "a copy"
            if T:
                assert torch.equal(bits(view), bits(torch.stack([pair[n] for pair in self.held], 2)))
            assert slots[:, :, self.top:].isnan().all(), "written behind the last token"


@given(data=st.data(), B=st.integers(1, 3), Hkv=st.integers(1, 3), N=st.integers(1, 6), Dh=st.integers(1, 3),
       Dv=st.integers(1, 3), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_sequence_of_calls_leaves_the_tokens_that_a_list_would_hold(data, B, Hkv, N, Dh, Dv, dtype, seed):
    torch.manual_seed(seed)
    machine = Machine(data, B, Hkv, N, Dh, Dv, dtype)
    machine.check()
    steps = data.draw(st.lists(st.sampled_from(["update"] * 4 + ["crop", "reorder", "reset", "misfit"]), min_size=2, max_size=9))
    for step in steps:
        getattr(machine, step)()
        machine.check()


def test_a_written_example():
    cache = KVCache(1, 1, 4, 1, dtype=torch.float64)
    for new, want in (([1, 2], [1, 2]), ([], [1, 2]), ([3], [1, 2, 3])):
        x = torch.tensor(new, dtype=torch.float64).view(1, 1, -1, 1)
        keys, values = cache.update(x, -x)
        assert keys.flatten().tolist() == want and values.flatten().tolist() == [-w for w in want]
    assert cache._keys.flatten().tolist() == [1, 2, 3, 0]
    cache.crop(1)
    cache.update(*2 * [torch.full((1, 1, 1, 1), 9.0)])
    assert cache.keys.flatten().tolist() == [1, 9] and cache.values.flatten().tolist() == [-1, 9] and cache.length == 2


def test_rows_go_on_with_their_parents():
    """Row b gets the text of row index[b], not the other way round; both tensors, filled slots only."""
    cache = poisoned(3, 1, 4, 1, 2)
    rows = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 2, 1)
    cache.update(rows, rows.expand(3, 1, 2, 2) + 10)
    cache.reorder(torch.tensor([2, 0, 2]))
    assert cache.keys[:, 0, 0, 0].tolist() == [2, 0, 2] and cache.values[:, 0, 1, 1].tolist() == [12, 10, 12]
    assert cache.length == 2 and cache._keys[:, :, 2:].isnan().all() and cache._values[:, :, 2:].isnan().all()
    empty = poisoned(3, 1, 4, 1)
    empty.reorder(torch.tensor([1, 1, 1]))
    assert empty.length == 0 and empty._keys.isnan().all()


def test_any_strides_can_be_written():
    cache = KVCache(2, 3, 9, 4, dtype=torch.float64)
    x = torch.randn(2, 3, 4, 2).double()
    for key in (x.mT, torch.randn(2, 1, 1, 4).double().expand(2, 3, 2, 4), torch.randn(2, 3, 4, 4).double()[:, :, ::2]):
        cache.update(key, key)
        assert torch.equal(cache.keys[:, :, -2:], key)


def test_views_stay_views_and_earlier_ones_are_not_moved():
    cache = KVCache(2, 2, 5, 3)
    key, value = tokens(2, 2, 4, 3, dtype=torch.float32)
    first = cache.update(key[:, :, :2], value[:, :, :2])[0]
    cache.update(key[:, :, 2:], value[:, :, 2:])
    assert torch.equal(first, key[:, :, :2])                 # good until a write to its slots
    cache.keys[:, :, 0] = 7.0
    assert (cache._keys[:, :, 0] == 7).all() and (first[:, :, 0] == 7).all()
    key.zero_()
    assert cache.keys[:, :, 1:].all()                        # the argument itself is not kept


@pytest.mark.parametrize("options, dtype, sizes", [
    ({}, torch.float32, (2, 3, 4, 5, 5)), ({"v_head_dim": 7}, torch.float32, (2, 3, 4, 5, 7)),
    ({"dtype": torch.bfloat16}, torch.bfloat16, (2, 3, 4, 5, 5)), ({"device": "meta"}, torch.float32, (2, 3, 4, 5, 5)),
    ({"device": torch.device("meta"), "dtype": torch.float16}, torch.float16, (2, 3, 4, 5, 5)),
    ({"v_head_dim": None, "dtype": None, "device": None}, torch.float32, (2, 3, 4, 5, 5))])
def test_construction(options, dtype, sizes):
    cache = KVCache(2, 3, 4, 5, **options)
    named = KVCache(batch_size=2, num_kv_heads=3, max_len=4, head_dim=5, **options)
    B, Hkv, N, Dh, Dv = sizes
    for made in (cache, named):
        assert made.keys.shape == (B, Hkv, 0, Dh) and made.values.shape == (B, Hkv, 0, Dv)
        assert (made.length, made.max_len) == (0, N) and {made.keys.dtype, made.values.dtype} == {dtype}
        device = torch.device(options.get("device") or "cpu")
        assert {made.keys.device, made.values.device} == {device}
        assert made.nbytes == B * Hkv * N * (Dh + Dv) * dtype.itemsize
        assert not (made._keys.requires_grad or made._keys.is_inference())
        assert repr(made) == (f"KVCache(batch_size={B}, num_kv_heads={Hkv}, max_len={N}, head_dim={Dh}, v_head_dim={Dv}, "
                              f"dtype={dtype}, length=0)")
    made = KVCache(2, 3, 4, 5, 7, torch.float64, "cpu")
    assert made.values.shape[3] == 7 and made.keys.dtype == torch.float64
    made.update(*tokens(2, 3, 3, 5, 7))
    assert repr(made).endswith("v_head_dim=7, dtype=torch.float64, length=3)")
    for name in ("length", "max_len", "keys", "values", "nbytes"):
        with pytest.raises(AttributeError):
            setattr(made, name, 1)                           # only the methods change it


def test_defaults_of_torch_are_followed():
    with torch.device("meta"):
        assert KVCache(1, 1, 1, 1).keys.device.type == "meta"
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert KVCache(1, 1, 1, 1).keys.dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_memory_is_what_the_formula_says():
    """KV heads count, query heads do not; every layer, every slot, filled or not."""
    for dtype in (*FLOATS, *EIGHTS):
        caches = [KVCache(3, 2, 10, 4, dtype=dtype) for _ in range(5)]
        assert sum(c.nbytes for c in caches) == kv_cache_bytes(5, 2, 4, 10, 3, dtype)
        assert caches[0].nbytes == caches[0]._keys.untyped_storage().nbytes() + caches[0]._values.untyped_storage().nbytes()
    layer, before = GroupedQueryAttention(24, 6, 2), caches[0].nbytes
    cache = KVCache(3, layer.num_kv_heads, 10, layer.head_dim)
    layer(torch.randn(3, 7, 24), cache=cache)
    assert cache.keys.shape == (3, 2, 7, 4) and before == caches[0].nbytes
    assert cache.keys.nbytes + cache.values.nbytes == kv_cache_bytes(1, 2, 4, 7, 3, torch.float32)


def test_copies_are_independent():
    cache = KVCache(2, 2, 5, 3)
    cache.update(*tokens(2, 2, 2, 3))
    for duplicate in (copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))):
        before, other = snapshot(cache), duplicate(cache)
        assert same(snapshot(other), before) and repr(other) == repr(cache)
        other.update(*tokens(2, 2, 3, 3))
        other.reorder(torch.tensor([1, 0]))
        assert same(snapshot(cache), before) and other.length == 5
        cache.crop(1)
        assert other.length == 5
        cache.update(*tokens(2, 2, 1, 3))                    # two again


# --- the cache alone: refusals

def fresh(**options):
    """Two texts, three KV heads, five slots, two of them filled; keys of width 4, values of width 6."""
    cache = KVCache(2, 3, 5, 4, 6, **options)
    cache.update(*tokens(2, 3, 2, 4, 6))
    return cache


KEY, VALUE = torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 6)


@pytest.mark.parametrize("key, value, error, words", [
    (None, VALUE, TypeError, "key"),
    (KEY, None, TypeError, "value"),
    (KEY.tolist(), VALUE, TypeError, "key"),
    (KEY.numpy(), VALUE, TypeError, "key"),
    (1.0, VALUE, TypeError, "key"),
    (KEY.bool(), VALUE, TypeError, "key"),
    (KEY.long(), VALUE, TypeError, "key"),
    (KEY, VALUE.int(), TypeError, "value"),
    (KEY.to(torch.complex64), VALUE, TypeError, "key"),
    (KEY.to("meta"), VALUE, TypeError, "key"),
    (KEY, VALUE.to("meta"), TypeError, "value"),
    (KEY[0], VALUE, ValueError, "key"),
    (KEY[None], VALUE, ValueError, "key"),
    (KEY[..., None], VALUE, ValueError, "key"),
    (KEY[..., 0, 0], VALUE, ValueError, "key"),
    (KEY, VALUE[..., 0], ValueError, "value"),
    (torch.tensor(1.0), VALUE, ValueError, "key"),
    (KEY[:1], VALUE[:1], ValueError, "key"),
    (KEY, VALUE[:1], ValueError, "value"),
    (KEY[:, :1], VALUE, ValueError, "key"),
    (repeat_kv(KEY, 2), VALUE, ValueError, "key"),
    (KEY, repeat_kv(VALUE, 2), ValueError, "value"),
    (KEY[..., :1], VALUE, ValueError, "key"),
    (KEY, VALUE[..., :1], ValueError, "value"),
    (KEY, KEY, ValueError, "value"),
    (VALUE, KEY, ValueError, "key"),
    (KEY.transpose(1, 2), VALUE, ValueError, "key"),
    (KEY, VALUE.expand(2, 3, 2, 6), ValueError, "value"),
    (KEY.expand(2, 3, 2, 4), VALUE, ValueError, "value"),
    (KEY.expand(2, 3, 4, 4), VALUE.expand(2, 3, 4, 6), ValueError, "max_len"),
    (KEY.expand(2, 3, 4, 4), VALUE.to("meta"), TypeError, "value"),
])
def test_update_refuses_and_changes_nothing(key, value, error, words):
    cache = fresh()
    before = snapshot(cache)
    with pytest.raises(error, match=rf"\b{words}\b"):
        cache.update(key, value)
    assert same(before, snapshot(cache))
    cache.update(KEY.expand(2, 3, 3, 4), VALUE.expand(2, 3, 3, 6))      # it can still be filled to the last slot
    assert cache.length == cache.max_len == 5


@pytest.mark.parametrize("call, error, words", [
    (lambda c: c.crop(3), ValueError, "length"),
    (lambda c: c.crop(-1), ValueError, "length"),
    (lambda c: c.crop(True), TypeError, "length"),
    (lambda c: c.crop(1.0), TypeError, "length"),
    (lambda c: c.crop(None), TypeError, "length"),
    (lambda c: c.crop("1"), TypeError, "length"),
    (lambda c: c.crop(torch.tensor(1)), TypeError, "length"),
    (lambda c: c.reorder([0, 1]), TypeError, "index"),
    (lambda c: c.reorder(None), TypeError, "index"),
    (lambda c: c.reorder(0), TypeError, "index"),
    (lambda c: c.reorder(torch.tensor([0.0, 1.0])), TypeError, "index"),
    (lambda c: c.reorder(torch.tensor([False, True])), TypeError, "index"),
    (lambda c: c.reorder(torch.tensor(0)), ValueError, "index"),
    (lambda c: c.reorder(torch.tensor([0])), ValueError, "index"),
    (lambda c: c.reorder(torch.tensor([0, 1, 1])), ValueError, "index"),
    (lambda c: c.reorder(torch.tensor([[0, 1]])), ValueError, "index"),
    (lambda c: c.reorder(torch.tensor([0, 1], device="meta")), TypeError, "index"),
    (lambda c: c.reorder(torch.tensor([0, 2])), ValueError, "index"),
    (lambda c: c.reorder(torch.tensor([-1, 0])), ValueError, "index"),
])
def test_other_calls_are_refused_and_change_nothing(call, error, words):
    cache = fresh()
    before = snapshot(cache)
    with pytest.raises(error, match=rf"\b{words}\b"):
        call(cache)
    assert same(before, snapshot(cache))


SIZES = {"batch_size": 2, "num_kv_heads": 3, "max_len": 5, "head_dim": 4, "v_head_dim": 6}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size, error", [
    (0, ValueError), (-3, ValueError), (True, TypeError), (2.0, TypeError), ("2", TypeError), (math.nan, TypeError)])
def test_sizes_that_are_refused(name, size, error):
    with pytest.raises(error, match=rf"\b{name}\b"):
        KVCache(**{**SIZES, name: size})
    if name != "v_head_dim":
        with pytest.raises(TypeError, match=rf"\b{name}\b"):
            KVCache(**{**SIZES, name: None})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64, "float32", float, 32])
def test_dtypes_that_are_refused(dtype):
    with pytest.raises(TypeError, match=r"\bdtype\b"):
        KVCache(**SIZES, dtype=dtype)


# --- the layer with a cache: equal to one pass, however it is cut

def make_layer(Hkv=2, R=3, Dh=4, D=10, dtype=torch.float64, **options):
    """Odd width, biases, scores of a standard deviation of about 2."""
    layer = GroupedQueryAttention(D, Hkv * R, Hkv, head_dim=Dh, **{"qkv_bias": True, "out_bias": True, **options})
    return lively(layer.double()).to(dtype)


def cache_for(layer, B, N, **options):
    return poisoned(B, layer.num_kv_heads, N, layer.head_dim, **{"dtype": layer.k_proj.weight.dtype, **options})


def angles(positions, half):
    """cos and sin of positions (B or 1, T), half different speeds; the length of a vector changes too."""
    turn = positions[..., None].double() * 1.7 * 0.6 ** torch.arange(half)
    return 1.1 * turn.cos(), 1.1 * turn.sin()


def plain(layer, x, rope=None, may=None):
    """One pass written out, with complex numbers and copied heads: outputs (B, T, D) and weights (B, H, T, T)."""
    def heads(project, n):
        return F.linear(x, project.weight, project.bias).unflatten(-1, (n, -1)).transpose(1, 2)

    def turn(x):
        half = rope[0].shape[-1]
        points = torch.complex(x[..., :half], x[..., half:2 * half]) * torch.complex(*rope)[:, None]
        return torch.cat([points.real, points.imag, x[..., 2 * half:]], -1)
    q, k, v = (heads(p, n) for p, n in ((layer.q_proj, layer.num_heads), (layer.k_proj, layer.num_kv_heads),
                                        (layer.v_proj, layer.num_kv_heads)))
    if rope is not None and rope[0].shape[-1]:
        q, k = turn(q), turn(k)
    group = torch.arange(layer.num_heads) // (layer.num_heads // layer.num_kv_heads)
    scores = q @ k[:, group].mT / q.shape[-1] ** 0.5
    T = x.shape[1]
    seen = torch.ones(T, T).tril().bool() if may is None else torch.ones(T, T).tril().bool() & may
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return layer.o_proj((weights @ v[:, group]).transpose(1, 2).flatten(2)), weights


def read(layer, x, sizes, cache, rope=None, mask=None, weights_too=False):
    """The outputs, and the weights if asked for, of x in pieces; mask is (B or 1, 1, T or 1, T), of all tokens."""
    outs, weights, start = [], [], 0
    for size in sizes:
        stop = start + size
        part = None
        if mask is not None:
            part = (mask if mask.shape[2] == 1 else mask[:, :, start:stop])[..., :stop]
        got = layer(x[:, start:stop], cache=cache, attn_mask=part, return_weights=weights_too,
                    rope=None if rope is None else tuple(t[:, start:stop] for t in rope))
        if weights_too:
            got, w = got
            assert w.shape == (len(x), layer.num_heads, size, stop)
            weights.append(F.pad(w, (0, x.shape[1] - stop)))
        outs.append(got)
        start = stop
        assert cache.length == stop
    return torch.cat(outs, 1), torch.cat(weights, 2) if weights_too else None


@given(data=st.data(), B=st.integers(1, 3), Hkv=st.integers(1, 3), R=st.integers(1, 3), T=st.integers(1, 8),
       room=st.integers(0, 2), half=st.sampled_from([None, 0, 1, 2]), holes=st.sampled_from(["none", "left", "any"]),
       weights_too=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_reading_in_pieces_equals_one_pass(data, B, Hkv, R, T, room, half, holes, weights_too, seed):
    torch.manual_seed(seed)
    ends = sorted(data.draw(st.lists(st.integers(0, T), max_size=6)))        # equal ends: a call with no token
    sizes = [b - a for a, b in zip([0, *ends], [*ends, T])]
    layer = make_layer(Hkv, R, 4)
    x = torch.randn(B, T, 10).double()
    real = torch.ones(B, T).bool()
    if holes == "left":
        real = torch.arange(T) >= torch.tensor(data.draw(st.lists(st.integers(0, T - 1), min_size=B, max_size=B)))[:, None]
    elif holes == "any":
        real = torch.rand(B, T) > 0.4
    places = (real.long().cumsum(1) - 1).clamp(min=0) if holes != "none" else torch.arange(T)[None]
    rope = None if half is None else angles(places, half)
    mask = None if holes == "none" else padding_mask(real)
    with torch.no_grad():
        got, weights = read(layer, x, sizes, cache_for(layer, B, T + room), rope, mask, weights_too)
        full = layer(x, rope=rope, attn_mask=mask)
        want, want_weights = plain(layer, x, rope, mask)
        assert_close(got, want, rtol=0, atol=1e-9)
        assert_close(full, want, rtol=0, atol=1e-9)
        if weights_too:
            assert_close(weights, want_weights, rtol=0, atol=1e-9)
            assert_rows_sum_to_one(weights, causal_mask(T) if mask is None else causal_mask(T) & mask)
        for row in range(B):                                 # each text alone, without its holes
            mine = real[row]
            if mine.any():
                turned = None if half is None else tuple(t[min(row, len(t) - 1)][None, mine] for t in rope)
                assert_close(got[row, mine], plain(layer, x[row:row + 1, mine], turned)[0][0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("kind", ["per query", "per head", "float", "one row of False"])
def test_any_mask_is_cut_to_the_new_rows(kind, weights_too):
    """Masks with an axis of queries: rows of the new tokens, columns of all that is there."""
    layer, x = make_layer(), torch.randn(2, 7, 10).double()
    may = torch.rand(2, 1, 7, 7) > 0.3
    mask = {"per query": may, "float": torch.randn(1, 1, 7, 7).double(), "per head": torch.rand(2, 6, 7, 7) > 0.3,
            "one row of False": may & (torch.arange(7) != 4)[:, None]}[kind]
    want = layer(x, attn_mask=mask)
    for sizes in ([4, 1, 2], [1] * 7, [7], [5, 2], [6, 1]):
        got, _ = read(layer, x, sizes, cache_for(layer, 2, 7), mask=mask, weights_too=weights_too)
        assert_close(got, want, rtol=0, atol=1e-9)
    if kind == "one row of False":
        assert torch.equal(got[:, 4], layer.o_proj.bias.expand(2, 10))


@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("dtype, huge", [(torch.float64, 1e150), (torch.float32, 1e18), (torch.bfloat16, 1e18)])
def test_what_pads_hold_does_not_matter(dtype, huge, weights_too):
    """Nor what was in slots before: large finite numbers behind the mask, at every step."""
    layer, x = make_layer(dtype=dtype), torch.randn(2, 8, 10).to(dtype)
    real = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 0, 1, 1]]).bool()
    outs = []
    with torch.no_grad():
        for fill in (0.0, huge):
            cache = poisoned(2, 2, 9, 4, dtype=dtype)
            layer(torch.full_like(x, fill), cache=cache)     # an older text
            cache.reset()
            text = x.masked_fill(~real[..., None], fill)
            outs.append(read(layer, text, [4, 1, 1, 2], cache, mask=padding_mask(real), weights_too=weights_too)[0][real])
    assert torch.equal(*outs) and outs[0].isfinite().all()


def test_outputs_do_not_share_memory_with_the_cache():
    layer, x = make_layer(), torch.randn(1, 3, 10).double()
    cache = cache_for(layer, 1, 3)
    with torch.no_grad():
        outs = [layer(x[:, t:t + 1], cache=cache, return_weights=True) for t in range(3)]
        before = snapshot(cache)
        for out, weights in outs:
            out.fill_(7.0)
            weights.fill_(7.0)
    assert same(before, snapshot(cache))


def test_without_causality_a_call_sees_all_that_is_there():
    layer, x = make_layer(is_causal=False), torch.randn(2, 7, 10).double()
    cache = cache_for(layer, 2, 7)
    with torch.no_grad():
        for start, stop in ((0, 4), (4, 6), (6, 7)):
            got = layer(x[:, start:stop], cache=cache)
            assert_close(got, layer(x[:, :stop])[:, start:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (1, 2, 5)])
def test_leading_axes_are_rows_of_the_cache(shape):
    layer, x = make_layer(), torch.randn(*shape, 10).double()
    with torch.no_grad():
        cache = cache_for(layer, math.prod(shape[:-1]), 5)
        got = torch.cat([layer(x[..., :3, :], cache=cache), layer(x[..., 3:, :], cache=cache)], -2)
        assert_close(got, layer(x), rtol=0, atol=1e-9)


def test_what_is_kept():
    """Keys turned by their rope and shared by no head yet, values as projected."""
    layer, x = make_layer(), torch.randn(2, 5, 10).double()
    rope = angles(torch.arange(5)[None], 2)
    cache = cache_for(layer, 2, 6)
    with torch.no_grad():
        read(layer, x, [3, 1, 1], cache, rope)
        k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (layer.k_proj, layer.v_proj))
    points = torch.complex(k[..., :2], k[..., 2:]) * torch.complex(*rope)[:, None]
    assert_close(cache.keys, torch.cat([points.real, points.imag], -1), rtol=0, atol=1e-12)
    assert torch.equal(cache.values, v) and (cache.keys - k)[:, :, 1:].abs().max() > 0.1


@pytest.mark.parametrize("fault", ["offset 0", "offset of the new length", "KV heads in repeat order", "positions from 0",
                                   "pads unmasked", "rope turned back", "pairs mixed up with halves"])
def test_usual_mistakes_miss_by_far(fault):
    """Negative control of the comparisons above."""
    layer, x = make_layer(), torch.randn(2, 7, 10).double()
    real = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]]).bool()
    rope, mask, cache = angles(torch.arange(7)[None], 2), padding_mask(real), cache_for(layer, 2, 7)
    wrong = {}
    with torch.no_grad():
        want = plain(layer, x, rope, mask)[0]
        if fault in ("offset 0", "offset of the new length"):
            class Shifted(KVCache):
                length = property(lambda self: 0 if fault == "offset 0" else self._length + 3)
            lying = Shifted(2, 2, 7, 4, dtype=torch.float64)
            layer(x[:, :4], rope=tuple(t[:, :4] for t in rope), cache=cache)
            lying.update(cache.keys, cache.values)
            lying._length = 4
            layer.is_causal, new = True, x[:, 4:]
            wrong = layer(new, rope=tuple(t[:, 4:] for t in rope), cache=lying)
            want = plain(layer, x, rope)[0][:, 4:]
        elif fault == "KV heads in repeat order":
            other = copy.deepcopy(layer)
            for p in (other.k_proj, other.v_proj):
                p.weight.copy_(p.weight.unflatten(0, (2, 4)).flip(0).flatten(0, 1))
                p.bias.copy_(p.bias.unflatten(0, (2, 4)).flip(0).flatten(0, 1))
            wrong = read(other, x, [4, 1, 2], cache, rope, mask)[0]
        elif fault == "positions from 0":
            rope = tuple(torch.cat([t[:, :4], t[:, :1], t[:, :2]], 1) for t in rope)
            wrong = read(layer, x, [4, 1, 2], cache, rope, mask)[0]
        elif fault == "pads unmasked":
            wrong = read(layer, x, [4, 1, 2], cache, rope)[0][1]
            want = want[1]
        elif fault == "rope turned back":
            wrong = read(layer, x, [4, 1, 2], cache, (rope[0] / 1.21, -rope[1] * 0), mask)[0]
        else:
            mixed = copy.deepcopy(layer)
            for p in (mixed.q_proj, mixed.k_proj):
                order = torch.arange(p.weight.shape[0]).unflatten(0, (-1, 4))[:, [0, 2, 1, 3]].flatten()
                p.weight.copy_(p.weight[order])
                p.bias.copy_(p.bias[order])
            wrong = read(mixed, x, [4, 1, 2], cache, rope, mask)[0]
    assert (wrong - want).abs().max() > 1e-3


def test_a_draft_that_is_taken_back_leaves_no_trace():
    layer, x = make_layer(), torch.randn(2, 9, 10).double()
    cache = cache_for(layer, 2, 9)
    with torch.no_grad():
        want = layer(x)
        layer(x[:, :4], cache=cache)
        for keep in (3, 2, 1, 0):
            layer(torch.randn(2, 4, 10).double(), cache=cache)
            cache.crop(4)
            assert_close(layer(x[:, 4:8 - keep], cache=cache), want[:, 4:8 - keep], rtol=0, atol=1e-9)
            cache.crop(4)
        cache.reset()
        assert_close(read(layer, x, [5, 1, 3], cache)[0], want, rtol=0, atol=1e-9)


def test_beams_go_on_with_their_parents():
    layer, x, more = make_layer(), torch.randn(3, 5, 10).double(), torch.randn(3, 4, 10).double()
    cache, texts = cache_for(layer, 3, 9), x
    with torch.no_grad():
        layer(x, cache=cache)
        for t, parents in enumerate(([2, 0, 2], [1, 1, 1], [0, 1, 2], [2, 1, 0])):
            cache.reorder(torch.tensor(parents))
            texts = torch.cat([texts[parents], more[:, t:t + 1]], 1)
            assert_close(layer(more[:, t:t + 1], cache=cache), layer(texts)[:, -1:], rtol=0, atol=1e-9)


def test_any_object_with_length_and_update_is_a_cache():
    class Growing:
        length, kept = 0, None

        def update(self, key, value):
            new = key, value
            self.kept = new if self.kept is None else tuple(torch.cat(pair, 2) for pair in zip(self.kept, new))
            self.length = self.kept[0].shape[2]
            return self.kept

    layer, x = make_layer(), torch.randn(2, 7, 10).double()
    assert_close(read(layer, x, [3, 1, 3], Growing())[0], layer(x), rtol=0, atol=1e-9)


# --- the layer with a cache: refusals, and the cache is as it was

def cos_sin(*shape, **options):
    return torch.ones(shape, **options), torch.zeros(shape, **options)


@pytest.mark.parametrize("options, error, words", [
    ({"attn_mask": torch.ones(2, 1, 1, 3).bool()}, ValueError, "attn_mask"),
    ({"attn_mask": torch.ones(3, 3).bool()}, ValueError, "attn_mask"),
    ({"attn_mask": torch.ones(5, 5).bool()}, ValueError, "attn_mask"),
    ({"attn_mask": torch.ones(2, 5).bool()}, ValueError, "attn_mask"),
    ({"attn_mask": torch.ones(2, 1, 1, 6).bool()}, ValueError, "attn_mask"),
    ({"attn_mask": torch.ones(2, 2, 1, 5).bool()}, ValueError, "attn_mask"),
    ({"attn_mask": torch.ones(1, 2, 6, 3, 5).bool()}, ValueError, "attn_mask"),
    ({"attn_mask": torch.ones(3, 5).long()}, TypeError, "attn_mask"),
    ({"attn_mask": [[True] * 5] * 3}, TypeError, "attn_mask"),
    ({"attn_mask": torch.ones(3, 5, device="meta").bool()}, TypeError, "attn_mask"),
    ({"rope": cos_sin(1, 5, 2)}, ValueError, "rope"),
    ({"rope": cos_sin(3, 3, 2)}, ValueError, "rope"),
    ({"rope": cos_sin(1, 3, 3)}, ValueError, "rope"),
    ({"rope": cos_sin(3, 2)}, ValueError, "rope"),
    ({"rope": cos_sin(2, 1, 3, 2)}, ValueError, "rope"),
    ({"rope": (torch.ones(1, 3, 2), torch.ones(1, 3, 1))}, ValueError, "rope"),
    ({"rope": (torch.ones(1, 3, 2), torch.ones(2, 3, 2))}, ValueError, "rope"),
    ({"rope": cos_sin(1, 3, 2)[:1]}, TypeError, "rope"),
    ({"rope": 3 * cos_sin(1, 3, 2)[:1]}, TypeError, "rope"),
    ({"rope": [*cos_sin(1, 3, 2)]}, TypeError, "rope"),
    ({"rope": torch.ones(2, 1, 3, 2)}, TypeError, "rope"),
    ({"rope": cos_sin(1, 3, 2, dtype=torch.long)}, TypeError, "rope"),
    ({"rope": (None, None)}, TypeError, "rope"),
    ({"rope": 7}, TypeError, "rope"),
    ({"rope": cos_sin(1, 3, 2, device="meta")}, TypeError, "rope"),
    ({"rope": (torch.ones(1, 3, 2), torch.ones(1, 3, 2, device="meta"))}, TypeError, "rope"),
])
@pytest.mark.parametrize("weights_too", [False, True])
def test_a_refused_call_writes_nothing(options, error, words, weights_too):
    layer, cache = make_layer(), poisoned(2, 2, 9, 4, dtype=torch.float64)
    x = torch.randn(2, 3, 10).double()
    with torch.no_grad():
        layer(x[:, :2], cache=cache)
    before = snapshot(cache)
    with pytest.raises(error, match=rf"\b{words}\b"):
        layer(x, cache=cache, return_weights=weights_too, **options)
    assert same(before, snapshot(cache))


@pytest.mark.parametrize("options, words", [
    ({}, "max_len"), ({"attn_mask": torch.ones(5).bool()}, "max_len"), ({"rope": cos_sin(1, 3, 2)}, "max_len")])
def test_a_full_cache_is_left_as_it_was(options, words):
    layer, cache = make_layer(), poisoned(2, 2, 4, 4, dtype=torch.float64)
    x = torch.randn(2, 3, 10).double()
    with torch.no_grad():
        layer(x[:, :2], cache=cache)
        before = snapshot(cache)
        with pytest.raises(ValueError, match=rf"\b{words}\b"):
            layer(x, cache=cache, **options)
        assert same(before, snapshot(cache))
        layer(x[:, :2], cache=cache)                         # the two that fit
        assert cache.length == 4
        with pytest.raises(ValueError, match=r"\bmax_len\b"):
            layer(x[:, :1], cache=cache)


@pytest.mark.parametrize("cache, error, words", [
    (7, TypeError, "cache"),
    (True, TypeError, "cache"),
    ([], TypeError, "cache"),
    ((KEY, VALUE), TypeError, "cache"),
    ({}, TypeError, "cache"),
    (KVCache(3, 2, 9, 4), ValueError, "key"),
    (KVCache(2, 6, 9, 4), ValueError, "key"),
    (KVCache(2, 2, 9, 8), ValueError, "key"),
    (KVCache(2, 2, 9, 4, 5), ValueError, "value"),
    (KVCache(2, 2, 9, 4, device="meta"), TypeError, "key"),
])
def test_what_is_no_cache_for_this_layer(cache, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        make_layer()(torch.randn(2, 3, 10).double(), cache=cache)
    assert getattr(cache, "length", 0) == 0


def test_a_cache_of_transformers_is_not_taken_for_ours():
    from transformers import DynamicCache

    with pytest.raises(TypeError, match=r"\bcache\b"):
        make_layer()(torch.randn(2, 3, 10).double(), cache=DynamicCache())


def test_no_argument_is_written_to():
    layer, x = make_layer(), torch.randn(2, 5, 10).double()
    rope, mask = angles(torch.arange(5)[None], 2), padding_mask(torch.tensor([5, 3]), 7)
    given = [x, *rope, mask, *layer.parameters()]
    before = [t.detach().clone() for t in given]
    cache = cache_for(layer, 2, 9)
    with torch.no_grad():
        layer(x[:, :2], cache=cache)
        kept = cache.keys.clone(), cache.values.clone()
        for weights_too in (False, True):
            for options in ({}, {"rope": rope}, {"attn_mask": mask}, {"attn_mask": torch.zeros(5, 7)}):
                layer(x, cache=cache, return_weights=weights_too, **options)
                assert cache.length == 7
                cache.crop(2)
                assert torch.equal(cache.keys, kept[0]) and torch.equal(cache.values, kept[1])   # nor an old token
    assert all(map(torch.equal, given, before))


# --- number formats

@pytest.mark.parametrize("layer_dtype", FLOATS)
@pytest.mark.parametrize("cache_dtype", [*FLOATS, *EIGHTS])
def test_dtype_of_the_cache_and_of_the_layer(layer_dtype, cache_dtype):
    """Stored as the cache says, computed and returned as the layer says; a wider cache changes nothing."""
    layer, x = make_layer(dtype=layer_dtype), torch.randn(2, 6, 10).to(layer_dtype)
    cache = KVCache(2, 2, 6, 4, dtype=cache_dtype)
    with torch.no_grad():
        out, weights = read(layer, x, [3, 1, 2], cache, weights_too=True)
        assert cache.keys.dtype == cache.values.dtype == cache_dtype and out.dtype == weights.dtype == layer_dtype
        k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (layer.k_proj, layer.v_proj))
        if torch.finfo(cache_dtype).bits == torch.finfo(layer_dtype).bits >= 32:
            assert_close(cache.keys, k)
        same_dtype = KVCache(2, 2, 6, 4, dtype=layer_dtype)
        want, _ = read(layer, x, [3, 1, 2], same_dtype, weights_too=True)
        rounded = [kept.to(cache_dtype).double() for kept in (same_dtype.keys, same_dtype.values)]
        assert torch.equal(cache.keys.double(), rounded[0]) and torch.equal(cache.values.double(), rounded[1])
        if cache_dtype not in EIGHTS and torch.promote_types(layer_dtype, cache_dtype) == cache_dtype:
            assert torch.equal(out, want)
        cache.reorder(torch.tensor([1, 0]))
        assert torch.equal(cache.keys.double(), rounded[0].flip(0)) and torch.equal(cache.values.double(), rounded[1].flip(0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("layer_dtype, cache_dtype", [*zip(HALVES, HALVES), (torch.float32, torch.bfloat16),
                                                      (torch.bfloat16, torch.float32)])
def test_as_precise_as_pytorch_on_the_same_keys(layer_dtype, cache_dtype, weights_too, size, masked):
    """Rounding of our steps <= 2 x that of plain PyTorch steps + 1e-5; both are compared with float64 on the rounded keys."""
    T, B = 60, 3
    layer = make_layer(2, 3, 16, 32, layer_dtype)
    exact = make_layer(2, 3, 16, 32)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(B, T, 32).to(layer_dtype)
    real = torch.arange(T) >= torch.tensor([0, 7, 50])[:, None]
    real = real if masked else torch.ones_like(real)
    cache = KVCache(B, 2, T, 16, dtype=cache_dtype)
    sizes = [50] + [size] * (10 // size) + [10 % size] * (10 % size > 0)
    with torch.no_grad():
        ours = read(layer, x, sizes, cache, mask=padding_mask(real) if masked else None, weights_too=weights_too)[0]

        def steps(layer, dtype):
            outs, start = [], 0
            for n in sizes:
                piece, stop = x[:, start:start + n].to(dtype), start + n
                q = layer.q_proj(piece).unflatten(-1, (6, 16)).transpose(1, 2)
                keys, values = (kept[:, :, :stop].to(dtype) for kept in (cache.keys, cache.values))
                may = (causal_mask(n, stop) & padding_mask(real[:, :stop])).expand(B, 6, n, stop)
                out = SDPA(q, keys, values, may if masked or n > 1 else None, enable_gqa=True)
                outs.append(layer.o_proj(out.transpose(1, 2).flatten(2)))
                start = stop
            return torch.cat(outs, 1)[real].double()

        truth = steps(exact, torch.float64)
        error, theirs = ((out - truth).abs().max().item() for out in (ours[real].double(), steps(layer, layer_dtype)))
    assert 0 < error <= 2 * theirs + 1e-5
    assert theirs < 1                                        # the peer computes the same thing


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_autocast(cache_dtype):
    """Half precision inside: the cache keeps its dtype, and outputs are those of the pass without a cache, up to rounding."""
    layer, x = make_layer(dtype=torch.float32), torch.randn(2, 6, 10)
    cache = cache_for(layer, 2, 6, dtype=cache_dtype)
    rope = tuple(t.float() for t in angles(torch.arange(6)[None], 2))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = read(layer, x, [3, 1, 2], cache, rope)[0], layer(x, rope=rope)
    assert got.dtype == want.dtype == torch.bfloat16 and cache.keys.dtype == cache_dtype
    exact = layer(x, rope=rope)
    error, theirs = ((out - exact).abs().max().item() for out in (got, want))
    assert 0 < error <= 2 * theirs


# --- gradients, and none

def pieces_with_gradients(layer, names, sizes, mask, rope, dtype):
    def run(x, *parameters):
        cache, outs, start = KVCache(2, 2, 8, 4, dtype=dtype), [], 0
        for size in sizes:
            stop = start + size
            outs.append(torch.func.functional_call(layer, dict(zip(names, parameters)), x[:, start:stop], {
                "cache": cache, "attn_mask": None if mask is None else mask[..., :stop],
                "rope": None if rope is None else tuple(t[:, start:stop] for t in rope)}))
            start = stop
        return torch.cat(outs, 1)
    return run


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("sizes", [(3, 1, 1, 2), (1, 6), (7,)])
def test_gradients_are_those_of_one_pass(sizes, turned, masked):
    """Of the inputs and of every parameter, through all chunks."""
    layer = make_layer()
    names, parameters = zip(*layer.named_parameters())
    mask = padding_mask(torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 0, 1]])) if masked else None
    rope = angles(torch.arange(7)[None], 2) if turned else None
    whole = pieces_with_gradients(layer, names, (7,), mask, rope, torch.float64)

    def uncached(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), x, {"attn_mask": mask, "rope": rope})
    x = torch.randn(2, 7, 10).double()
    assert_parity(pieces_with_gradients(layer, names, sizes, mask, rope, torch.float64), uncached, x, *parameters)
    assert_parity(whole, uncached, x, *parameters)


@pytest.mark.parametrize("trained", [{"q_proj"}, {"q_proj", "k_proj"}, {"q_proj", "v_proj"}, {"o_proj"}])
def test_some_matrices_are_frozen(trained):
    """Keys or values without gradients are written in place, while a graph of the queries still needs them as they were."""
    layer, x = make_layer(), torch.randn(2, 7, 10).double()
    for name, p in layer.named_parameters():
        p.requires_grad_(name.split(".")[0] in trained)
    wanted = [p for p in layer.parameters() if p.requires_grad]
    cache = KVCache(2, 2, 9, 4, dtype=torch.float64)
    out = torch.cat([layer(piece, cache=cache) for piece in x.split([3, 1, 1, 2], 1)], 1)
    assert_close(out, layer(x), rtol=0, atol=1e-9)
    for ours, want in zip(torch.autograd.grad(out.square().sum(), wanted), torch.autograd.grad(layer(x).square().sum(), wanted)):
        assert_close(ours, want, rtol=1e-7, atol=1e-9)


def test_an_old_token_gets_gradients_from_every_later_call():
    cache, new = KVCache(1, 1, 4, 1, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0, 4.0]).double().requires_grad_()
    total = 0
    for t in range(4):
        keys, values = cache.update(new[t].view(1, 1, 1, 1), new[t].detach().view(1, 1, 1, 1))
        total = total + keys.sum()
        assert keys.requires_grad and not values.requires_grad       # values want none: they are written in place
    total.backward()
    assert new.grad.tolist() == [4, 3, 2, 1]


def test_written_in_place_unless_gradients_are_wanted():
    layer, x = make_layer(), torch.randn(2, 4, 10).double()
    for guard in (torch.no_grad, torch.inference_mode):
        cache = cache_for(layer, 2, 4)
        memory = cache._keys.data_ptr(), cache._values.data_ptr()
        with guard():
            read(layer, x, [2, 1, 1], cache)
        assert (cache._keys.data_ptr(), cache._values.data_ptr()) == memory and not cache.keys.requires_grad
    cache = cache_for(layer, 2, 4)
    with torch.no_grad():
        layer(x[:, :2], cache=cache)
    before = bits(cache._keys), cache._keys
    layer(x[:, 2:3], cache=cache)
    assert cache.keys.requires_grad and cache._keys is not before[1] and torch.equal(bits(before[1]), before[0])
    cache = KVCache(2, 2, 4, 4)
    memory = cache._keys.data_ptr()
    cache.update(*tokens(2, 2, 1, 4))                        # gradients are on, but nobody wants one
    assert cache._keys.data_ptr() == memory


def test_an_error_with_gradients_leaves_the_cache_as_it_was():
    layer, x, cache = make_layer(), torch.randn(2, 3, 10).double(), KVCache(2, 2, 4, 4, dtype=torch.float64)
    layer(x[:, :2], cache=cache)
    before, memory = snapshot(cache), cache._keys
    for options in ({}, {"attn_mask": torch.ones(3, 3).bool()}):
        with pytest.raises(ValueError):
            layer(x, cache=cache, **options)
        assert same(before, snapshot(cache)) and cache._keys is memory


def test_a_forgotten_text_leaves_no_graph():
    layer, x, cache = make_layer(), torch.randn(2, 3, 10).double(), KVCache(2, 2, 4, 4, dtype=torch.float64)
    layer(x, cache=cache)
    cache.reset()
    assert not cache._keys.requires_grad and not cache._values.requires_grad
    out = layer(x, cache=cache)
    cache.reset()
    layer(x, cache=cache)
    out.sum().backward()                                     # the new text did not write over what the old one needs
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("learned", [0, 1])
def test_reset_drops_the_graph_of_either(learned):
    cache, new = KVCache(1, 1, 2, 3), [torch.ones(1, 1, 1, 3) for _ in "kv"]
    new[learned].requires_grad_()
    assert [x.requires_grad for x in cache.update(*new)] == [learned == 0, learned == 1]
    cache.reset()
    assert not cache._keys.requires_grad and not cache._values.requires_grad


def test_reorder_and_crop_with_gradients():
    cache, new = KVCache(2, 1, 4, 1), torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).requires_grad_()
    cache.update(new, new)
    cache.reorder(torch.tensor([1, 1]))
    assert cache.keys.flatten().tolist() == [2, 2]
    cache.keys.sum().backward(retain_graph=True)
    assert new.grad.flatten().tolist() == [0, 2]
    cache.crop(0)
    cache.update(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1))
    new.grad = None
    cache.keys.sum().backward()
    assert not new.grad.any()                                # what was forgotten gets no gradient


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_write_without_gradients_leaves_an_older_graph_right(guard):
    """A trained prefix, a look at what it writes, and only then backward."""
    layer, x = make_layer(), torch.randn(2, 5, 10).double()
    cache = KVCache(2, 2, 9, 4, dtype=torch.float64)
    loss = layer(x[:, :3], cache=cache).square().sum()
    with guard():
        got = layer(x[:, 3:], cache=cache)
        cache.reorder(torch.tensor([0, 0]))
        cache.crop(2)
        layer(x[:, 3:], cache=cache)
    assert_close(got, layer(x)[:, 3:], rtol=0, atol=1e-9)
    grads = torch.autograd.grad(loss, [*layer.parameters()])
    want = torch.autograd.grad(layer(x[:, :3]).square().sum(), [*layer.parameters()])
    for a, b in zip(grads, want):
        assert_close(a, b, rtol=1e-7, atol=1e-9)
    layer(x[:, :1], cache=cache).sum().backward()            # and the cache is of use afterwards
    cache.reset()
    loss = layer(x[:, :3], cache=cache).square().sum()
    with guard():
        cache.reset()
        layer(x, cache=cache)
    for a, b in zip(torch.autograd.grad(loss, [*layer.parameters()]), want):
        assert_close(a, b, rtol=1e-7, atol=1e-9)
    cache.reset()
    with torch.no_grad():
        assert_close(layer(x, cache=cache), layer(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_slots_written_without_gradients_give_none(guard):
    cache, new = KVCache(2, 1, 4, 1), torch.ones(2, 1, 2, 1).requires_grad_()
    cache.update(new, new)
    cache.crop(1)
    with guard():
        cache.update(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1))
    more = torch.ones(2, 1, 1, 1).requires_grad_()
    cache.update(more, more)[0].sum().backward()
    assert more.grad.flatten().tolist() == [1, 1]
    assert new.grad is None or not new.grad[:, :, 1].any()   # it was forgotten and its slot written over


@pytest.mark.parametrize("made, used", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode),
                                        (torch.inference_mode, torch.enable_grad), (torch.enable_grad, torch.inference_mode)])
def test_modes_of_torch_may_change_between_calls(made, used):
    layer, x = make_layer(), torch.randn(2, 6, 10).double()
    want = layer(x).detach()
    with made():
        cache = cache_for(layer, 2, 6)
        first = layer(x[:, :3], cache=cache)
        cache.reorder(torch.tensor([0, 1]))
    with used():
        outs = [layer(x[:, 3:4], cache=cache), layer(x[:, 4:], cache=cache)]
        cache.reorder(torch.tensor([0, 1]))
    assert not cache._keys.is_inference() or made is torch.enable_grad
    assert_close(torch.cat([first, *outs], 1).detach(), want, rtol=0, atol=1e-9)
    cache.reset()
    with made():
        assert_close(layer(x, cache=cache).detach(), want, rtol=0, atol=1e-9)


# --- what a step makes

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "rope", "mask", "weights"])
def test_one_more_token_copies_no_keys(dtype, kind):
    """No operation of a step fills as much memory as the keys of one KV head take."""
    layer = make_layer(2, 2, 16, 8, dtype)
    cache = KVCache(1, 2, 513, 16, dtype=dtype)
    options = {"rope": {"rope": cos_sin(1, 1, 8)}, "weights": {"return_weights": True},
               "mask": {"attn_mask": torch.arange(511)[None] != 7}}.get(kind, {})
    with torch.inference_mode():
        layer(torch.randn(1, 510, 8).to(dtype), cache=cache)
        with Recorder() as recorder:
            layer(torch.randn(1, 1, 8).to(dtype), cache=cache, **options)
    wide = dtype != torch.float32 and kind in ("mask", "weights")    # the readable road computes in float32
    assert wide or max(recorder.made) < 510 * 16, recorder.made
    assert max(recorder.made) <= 2 * 511 * 16
    with torch.inference_mode(), Recorder() as recorder:     # control: the recorder sees a cache that grows
        torch.cat([cache.keys, cache.keys[:, :, :1]], 2)
    assert max(recorder.made) > 2 * 510 * 16


def test_update_itself_makes_nothing():
    cache = KVCache(2, 2, 64, 8)
    key, value = tokens(2, 2, 4, 8, dtype=torch.float32)
    with Recorder() as recorder:
        for _ in range(16):
            cache.update(key, value)
        cache.crop(3)
        cache.reset()
    assert not recorder.made and cache.max_len == 64


# --- torch.compile

class Counting:
    """A backend that runs the graph as it is and counts how often it was asked for one."""

    def __init__(self):
        torch.compiler.reset()
        self.programs = 0

    def __call__(self, graph, inputs):
        self.programs += 1
        return graph.forward


def parts(kind, start, stop):
    options = {"attn_mask": torch.rand(2, 1, 1, stop) > 0.2} if "mask" in kind else {}
    return options | ({"rope": cos_sin(1, stop - start, 2)} if "rope" in kind else {})


def write_texts(step, layer, kind, prompts, guard):
    """Texts with prompts of these lengths up to 30 tokens; each call is compared with the layer that is not compiled."""
    x = torch.randn(2, 30, 10)
    with guard():
        for prompt in prompts:
            caches = [KVCache(2, 2, 37, 4) for _ in "ab"]    # room is left: see the next test
            for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, 30))]:
                options = parts(kind, start, stop)
                got, want = (fn(x[:, start:stop], cache=cache, **options) for fn, cache in zip((step, layer), caches))
                assert_close(got, want)
            assert [c.length for c in caches] == [30, 30] and torch.equal(caches[0].keys, caches[1].keys)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["plain", pytest.param("mask", marks=pytest.mark.slow),
                                  pytest.param("rope", marks=pytest.mark.slow),
                                  pytest.param("mask and rope", marks=pytest.mark.slow)])
@pytest.mark.floor
def test_one_program_for_prompts_and_one_for_tokens(kind, guard):
    """Whatever the lengths of prompts and texts."""
    layer, counting = make_layer(dtype=torch.float32), Counting()
    step = torch.compile(layer, backend=counting, fullgraph=True, dynamic=True)
    write_texts(step, layer, kind, (12, 23, 7), guard)
    assert counting.programs == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "mask", "rope", "mask and rope"])
@pytest.mark.floor
def test_default_settings_write_with_one_program(kind):
    """PyTorch then makes a program for the first prompt's length, and one for all when it meets a second."""
    layer, counting = make_layer(dtype=torch.float32), Counting()
    step = torch.compile(layer, backend=counting, fullgraph=True)
    write_texts(step, layer, kind, (12,), torch.no_grad)
    assert counting.programs == 2
    write_texts(step, layer, kind, (23, 7), torch.no_grad)
    assert counting.programs == 3


@pytest.mark.slow
def test_a_full_cache_compiles_too():
    """Filled to the last slot the view is contiguous: with a mask that may cost one more program, and no more."""
    layer, counting, x = make_layer(dtype=torch.float32), Counting(), torch.randn(2, 20, 10)
    step = torch.compile(layer, backend=counting, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for _ in range(2):
            cache = KVCache(2, 2, 20, 4)
            outs = [step(x[:, :11], cache=cache, attn_mask=torch.ones(11).bool())]
            outs += [step(x[:, t:t + 1], cache=cache, attn_mask=torch.ones(t + 1).bool()) for t in range(11, 20)]
            assert_close(torch.cat(outs, 1), layer(x))
    assert counting.programs <= 3


@pytest.mark.slow
def test_compiled_errors_and_bookkeeping():
    layer = make_layer(dtype=torch.float32)

    def text(x, index):
        cache = KVCache(2, 2, 8, 4)
        out = layer(x[:, :3], cache=cache)
        cache.reorder(index)
        cache.crop(2)
        return out, layer(x[:, 3:5], cache=cache), cache.length

    x, index = torch.randn(2, 5, 10), torch.tensor([1, 0])
    with torch.no_grad():
        got, want = torch.compile(text, backend=Counting(), fullgraph=True)(x, index), text(x, index)
    assert got[2] == want[2] == 4
    assert_close(got[:2], want[:2])
    cache = KVCache(2, 2, 4, 4)
    with pytest.raises(Exception, match=r"\bmax_len=4\b"), torch.no_grad():
        torch.compile(layer, backend="eager")(x, cache=cache)
    assert cache.length == 0


# --- against Hugging Face

BOUND = 1e-5      # its rope tables are float32


def llama(Hkv, layers=1, **options):
    import transformers

    config = transformers.LlamaConfig(hidden_size=24, num_attention_heads=6, num_key_value_heads=Hkv, head_dim=4, vocab_size=30,
                                      intermediate_size=20, num_hidden_layers=layers, attn_implementation="sdpa",
                                      max_position_embeddings=64, attention_bias=True, **options)
    config._attn_implementation = "sdpa"
    return config


def pair(Hkv):
    """LlamaAttention with lively weights, ours with the same, and the rope tables of both: (B, T) -> theirs, ours."""
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = llama(Hkv)
    theirs = lively(LlamaAttention(config, 0).double()).eval()
    ours = GroupedQueryAttention(24, 6, Hkv, head_dim=4, qkv_bias=True, out_bias=True).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 9, 24).double()
    q, k = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (ours.q_proj, ours.k_proj))
    assert (q @ repeat_kv(k, 6 // Hkv).mT / 2).std() >= 1
    table = LlamaRotaryEmbedding(config)

    def tables(places):
        both = table(x, places)
        return both, tuple(t[..., :2] for t in both)
    return theirs, ours, tables, config


def bias_of(may):
    """Their mask for sdpa: True where a token may attend, with all axes; a pad's own row sees itself, to have a softmax."""
    return may | (~may.any(-1, keepdim=True) & torch.ones_like(may))


@pytest.mark.parametrize("Hkv", [1, 2, 6])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_equals_hugging_face_step_by_step(kind, padded, Hkv):
    """A prompt, a chunk, single tokens: outputs, kept keys and values; usual mistakes miss by 100 times the bound."""
    import transformers

    theirs, ours, tables, config = pair(Hkv)
    x = torch.randn(2, 9, 24).double()
    real = torch.tensor([[1] * 9, [0] * 3 + [1] * 6]) if padded else torch.ones(2, 9).long()
    places = (real.cumsum(1) - 1).clamp(min=0)
    state = (transformers.DynamicCache() if kind == "dynamic" else
             transformers.StaticCache(config=config, max_cache_len=12))
    cache, start = cache_for(ours, 2, 12), 0
    with torch.no_grad():
        for size in (4, 1, 1, 2, 1):
            stop = start + size
            rope, half = tables(places[:, start:stop])
            may = causal_mask(size, stop) & padding_mask(real[:, :stop])
            full = F.pad(bias_of(may), (0, 12 - stop)) if kind == "static" else bias_of(may)
            want = theirs(x[:, start:stop], rope, full, past_key_values=state)[0]
            mask = padding_mask(real[:, :stop]) if padded else None
            got = ours(x[:, start:stop], rope=half, cache=cache, attn_mask=mask)
            asked = real[:, start:stop].bool()
            assert_close(got[asked], want[asked], rtol=0, atol=BOUND)
            kept = state.layers[0]
            assert_close(cache.keys, kept.keys[:, :, :stop], rtol=0, atol=BOUND)
            assert_close(cache.values, kept.values[:, :, :stop], rtol=0, atol=BOUND)
            assert int(state.get_seq_length()) == cache.length
            if start:                                        # controls, each on a copy
                wrong = []
                zero = tables(torch.zeros_like(places[:, start:stop]) + torch.arange(size))[1]
                again = copy.deepcopy(cache)
                again.crop(start)
                wrong.append(ours(x[:, start:stop], rope=zero, cache=again, attn_mask=mask))       # positions from 0
                if size > 1 and not padded:
                    k, v = cache.keys, cache.values
                    q = ours.q_proj(x[:, start:stop]).unflatten(-1, (6, 4)).transpose(1, 2)
                    q = torch.cat([q[..., :2] * half[0][:, None] - q[..., 2:] * half[1][:, None],
                                   q[..., 2:] * half[0][:, None] + q[..., :2] * half[1][:, None]], -1)
                    upper = SDPA(q, repeat_kv(k, 6 // Hkv), repeat_kv(v, 6 // Hkv), is_causal=True)   # offset 0
                    wrong.append(ours.o_proj(upper.transpose(1, 2).flatten(2)))
                if Hkv == 2:
                    again = copy.deepcopy(cache)
                    again._keys.copy_(again._keys.flip(1))
                    again._values.copy_(again._values.flip(1))
                    again.crop(start)
                    wrong.append(ours(x[:, start:stop], rope=half, cache=again, attn_mask=mask))   # the order of KV heads
                if padded:
                    again = copy.deepcopy(cache)
                    again.crop(start)
                    wrong.append(ours(x[:, start:stop], rope=half, cache=again)[1:].expand(2, -1, -1))   # pads are read
                for out in wrong:
                    assert (out - want)[asked].abs().max() > 100 * BOUND
            start = stop


def test_crop_and_reorder_are_those_of_hugging_face():
    import transformers

    state, cache = transformers.DynamicCache(), poisoned(4, 2, 12, 3, 5)
    for size, n in ((5, 2), (1, 0), (4, 4), (2, 1)):
        key, value = tokens(4, 2, size, 3, 5, torch.float32)
        for got, want in zip(cache.update(key, value), state.update(key, value, 0)):
            assert torch.equal(got, want)
        state.crop(-n)
        cache.crop(cache.length - n)
        rows = torch.randint(4, (4,))
        cache.reorder(rows)
        if n % 2:
            state.batch_select_indices(rows)
        else:
            state.reorder_cache(rows)
        assert cache.length == state.get_seq_length()
        assert torch.equal(cache.keys, state.layers[0].keys) and torch.equal(cache.values, state.layers[0].values)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_whole_llama_with_our_attention(kind):
    """Every attention of a random LlamaModel is replaced by ours with a cache for each layer; left-padded, it writes the same."""
    import transformers

    config = llama(2, layers=3)
    model = transformers.LlamaModel(config).double().eval()
    for layer in model.layers:
        lively(layer.self_attn)
    layers = []
    for block in model.layers:
        ours = GroupedQueryAttention(24, 6, 2, head_dim=4, qkv_bias=True, out_bias=True).double()
        ours.load_state_dict(block.self_attn.state_dict())
        layers.append(ours)
    ids = torch.randint(30, (3, 10))
    real = torch.arange(10) >= torch.tensor([0, 2, 4])[:, None]
    places = (real.long().cumsum(1) - 1).clamp(min=0)
    state = transformers.DynamicCache(config=config) if kind == "dynamic" else transformers.StaticCache(
        config=config, max_cache_len=10)
    caches, start = [cache_for(layer, 3, 10) for layer in layers], 0
    with torch.no_grad():
        for size in (5, 1, 1, 3):
            stop = start + size
            want = model(ids[:, start:stop], attention_mask=real[:, :stop].long(), position_ids=places[:, start:stop],
                         past_key_values=state, use_cache=True).last_hidden_state
            x = model.embed_tokens(ids[:, start:stop])
            rope = tuple(t[..., :2] for t in model.rotary_emb(x, places[:, start:stop]))
            for block, layer, cache in zip(model.layers, layers, caches):
                x = x + layer(block.input_layernorm(x), rope=rope, cache=cache, attn_mask=padding_mask(real[:, :stop].long()))
                x = x + block.mlp(block.post_attention_layernorm(x))
            asked = real[:, start:stop]
            assert_close(model.norm(x)[asked], want[asked], rtol=0, atol=BOUND)
            start = stop
    assert [c.length for c in caches] == [10] * 3
