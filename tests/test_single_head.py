"""`attention` and `SelfAttention` against PyTorch, in float64 and below, on the paths where silent errors live."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import HALVES, multihead_of
from torch.testing import assert_close

from attn_nb.single_head import SelfAttention, attention
from attn_nb.testing import assert_as_precise, assert_parity, assert_permutation_equivariant, assert_rows_sum_to_one

SDPA = F.scaled_dot_product_attention
DTYPES = [torch.float64, torch.float32, *HALVES]


def qkv(*batch, q_len=4, kv_len=6, width=8, v_width=3, dtype=torch.float64):
    """Unlike sizes; queries scaled so that scores have a standard deviation of about 3."""
    query = 3 * torch.randn(*batch, q_len, width, dtype=dtype)
    return query, torch.randn(*batch, kv_len, width, dtype=dtype), torch.randn(*batch, kv_len, v_width, dtype=dtype)


def context(*args, **kwargs):
    return attention(*args, **kwargs)[0]


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (2, 1, 3)])
def test_equals_pytorch_for_any_leading_axes(batch):
    assert_parity(context, SDPA, *qkv(*batch))


def test_the_parity_check_has_teeth():
    """A wrong scale misses the tolerance by far more than 100 times."""
    inputs = qkv(2)
    gap = (context(*inputs, scale=1.0) - SDPA(*inputs)).abs().max()
    assert gap > 100 * 1e-9


@pytest.mark.parametrize("shape", [(), (6,), (4, 6), (1, 6), (4, 1), (3, 4, 6), (2, 1, 1, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_every_rank(shape, kind):
    mask = torch.rand(shape) > 0.4 if kind == "bool" else torch.randn(shape, dtype=torch.float64)
    if kind == "bool":
        mask = mask | torch.tensor([True] + [False] * 5) if shape[-1:] == (6,) else torch.ones_like(mask)
    full = mask.expand(2, 3, 4, 6)      # PyTorch does not take a mask without axes
    assert_parity(lambda *x: context(*x, mask), lambda *x: SDPA(*x, full), *qkv(2, 3))


def test_minus_infinity_in_a_float_mask_forbids():
    inputs, allowed = qkv(2), torch.ones(4, 6).tril(1).bool()
    bias = torch.zeros(4, 6, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
    assert_close(context(*inputs, bias), context(*inputs, allowed), rtol=0, atol=0)
    assert_rows_sum_to_one(attention(*inputs, bias)[1], allowed)


def test_learned_bias_gets_its_gradient():
    inputs = qkv(2)
    assert_parity(lambda b: context(*inputs, b), lambda b: SDPA(*inputs, b.expand(2, 4, 6)), torch.randn(4, 6))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_sees_nothing_reads_zero_with_zero_gradient(kind):
    allowed = torch.ones(4, 6, dtype=torch.bool)
    allowed[1] = False
    mask = allowed if kind == "bool" else torch.zeros(4, 6).masked_fill(~allowed, -torch.inf)
    inputs = [x.requires_grad_() for x in qkv(2)]
    out, weights = attention(*inputs, mask)
    assert_rows_sum_to_one(weights, allowed)
    assert not out[:, 1].any() and not weights[:, 1].any()
    out.pow(2).sum().backward()
    assert not inputs[0].grad[:, 1].any()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in inputs)


def test_no_keys_at_all():
    query, key, value = qkv(2, kv_len=0)
    out, weights = attention(query, key, value)
    assert out.shape == (2, 4, 3) and not out.any()
    assert weights.shape == (2, 4, 0)
    assert attention(query[:, :0], key, value)[0].shape == (2, 0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_behind_the_mask_never_matters(dtype):
    query, key, value = qkv(2, dtype=dtype)
    allowed = torch.ones(4, 6, dtype=torch.bool)
    allowed[:, 2:4] = False
    bias = torch.zeros(4, 6, dtype=dtype).masked_fill(~allowed, -torch.inf)
    huge = torch.finfo(dtype).max
    key2, value2 = key.clone(), value.clone()
    key2[:, 2], key2[:, 3] = huge, -huge
    value2[:, 2], value2[:, 3] = -huge, huge
    for mask in (allowed, bias):
        leaves = [x.clone().requires_grad_() for x in (query, key2, value2)]
        out = context(*leaves, mask)
        assert_close(out, context(query, key, value, mask), rtol=0, atol=0)
        out.sum().backward()
        assert leaves[0].grad.isfinite().all()
        assert not leaves[1].grad[:, 2:4].any() and not leaves[2].grad[:, 2:4].any()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_at_most_twice_the_error_of_pytorch(dtype, masked):
    query, key, value = qkv(2, 3, q_len=33, kv_len=65, width=32, v_width=32)
    mask = (torch.rand(33, 65) > 0.3) if masked else None
    assert_as_precise(lambda *x: context(*x, mask), lambda *x: SDPA(*x, mask), query, key, value, dtype=dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_gradients_at_most_three_times_the_error_of_pytorch(dtype):
    low = [x.to(dtype) for x in qkv(2, 3, q_len=17, kv_len=33, width=16, v_width=16)]

    def gradients(fn, inputs):
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        fn(*inputs).sum().backward()
        return [x.grad.double() for x in inputs]

    exact = gradients(SDPA, [x.double() for x in low])
    for ours, theirs, want in zip(gradients(context, low), gradients(SDPA, low), exact):
        assert (ours - want).abs().max() <= 3 * (theirs - want).abs().max() + 2e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_has_the_dtype_of_the_query(dtype):
    inputs = qkv(2, dtype=dtype)
    for mask in (None, torch.ones(4, 6, dtype=torch.bool), torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.float64)):
        out, weights = attention(*inputs, mask)
        assert out.dtype == weights.dtype == dtype


def test_large_half_precision_scores_do_not_overflow():
    query = torch.full((1, 1, 64), 200.0, dtype=torch.float16)    # q.k = 2.56e6, beyond float16
    key = torch.cat([query, -query], 1)
    out, weights = attention(query, key, torch.tensor([[[1.0], [2.0]]], dtype=torch.float16))
    assert weights.tolist() == [[[1.0, 0.0]]] and out.item() == 1.0


def test_scale():
    inputs = qkv(2)
    assert_parity(lambda *x: context(*x, scale=0.3), lambda *x: SDPA(*x, scale=0.3), *inputs)
    assert_close(attention(*inputs, scale=0.0)[1], torch.full((2, 4, 6), 1 / 6, dtype=torch.float64))


def test_leading_axes_broadcast():
    query, key, value = qkv(5, 2)[0], *qkv(1, 2)[1:]
    out, weights = attention(query, key, value)
    assert_close(out, SDPA(query, key.expand(5, -1, -1, -1), value.expand(5, -1, -1, -1)))
    assert weights.shape == (5, 2, 4, 6)
    assert_close(attention(query, key, value, torch.ones(5, 1, 4, 6, dtype=torch.bool))[0], out)


def test_weights_have_every_leading_axis_and_dropout_is_drawn_for_each():
    query, key, value = torch.randn(3, 4), torch.randn(5, 4), torch.randn(2, 7, 5, 6)
    for mask in (None, torch.ones(3, 5).bool(), torch.ones(2, 7, 3, 5).bool()):
        assert attention(query, key, value, mask)[1].shape == (2, 7, 3, 5)
    used = context(query, key, torch.eye(5).expand(2, 5, 5), dropout_p=0.5)
    assert not torch.equal(used[0], used[1])


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_does_not_narrow_the_scores(dtype):
    """200 * 200 * 64 is beyond float16; under autocast the operands were float32 and would be cast back."""
    query = torch.full((1, 1, 64), 200.0)
    key, value = torch.cat([query, -query], 1), torch.tensor([[[1.0], [2.0]]])
    for cast in (torch.float32, dtype):
        with torch.autocast("cpu", dtype):
            out, weights = attention(*(x.to(cast) for x in (query, key, value)))
        assert weights.tolist() == [[[1.0, 0.0]]] and out.item() == 1.0 and out.dtype == cast
    inputs = qkv(2, 3, q_len=33, kv_len=65, width=32, v_width=32)
    with torch.autocast("cpu", dtype):
        assert_as_precise(context, SDPA, *inputs, dtype=dtype)


def test_non_contiguous_inputs():
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(2, 3))
    strided = torch.randn(2, 3, 6, 16, dtype=torch.float64)[..., ::2]
    assert not key.is_contiguous() and not strided.is_contiguous()
    assert_parity(context, SDPA, query, key, value)
    assert_close(context(query, strided, value), SDPA(query, strided.contiguous(), value))


def test_gradcheck():
    inputs = [x.requires_grad_() for x in qkv(2, q_len=3, kv_len=4, width=2, v_width=2)]
    mask = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: attention(*x, mask)[0], inputs)


def test_arguments_are_not_written():
    inputs, mask = qkv(2), torch.rand(4, 6) > 0.4
    before = [x.clone() for x in (*inputs, mask)]
    attention(*inputs, mask, dropout_p=0.5)
    attention(*inputs, mask.double(), dropout_p=0.5)
    for old, new in zip(before, (*inputs, mask)):
        assert torch.equal(old, new)


def test_dropout_acts_on_the_context_and_not_on_the_returned_weights():
    query, key, value = qkv(64, q_len=16, kv_len=32)
    plain, weights = attention(query, key, value)
    dropped, same = attention(query, key, value, dropout_p=0.25)
    assert torch.equal(weights, same) and not torch.allclose(plain, dropped)
    torch.manual_seed(1)
    one = context(query, key, value, dropout_p=0.25)
    torch.manual_seed(1)
    assert torch.equal(one, context(query, key, value, dropout_p=0.25))
    assert not context(query, key, value, dropout_p=1.0).any()


def test_dropout_scales_the_survivors():
    value = torch.eye(32, dtype=torch.float64).expand(64, 32, 32)     # the context is the kept weights
    query, key, _ = qkv(64, q_len=16, kv_len=32)
    kept, weights = attention(query, key, value, dropout_p=0.25)
    alive = kept != 0
    assert abs(alive.double().mean() - 0.75) < 0.01
    assert_close(kept[alive], (weights / 0.75)[alive])


@given(data=st.data(), sizes=st.tuples(*[st.integers(1, 6)] * 4), batch=st.lists(st.integers(1, 3), max_size=3))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_any_sizes_any_mask(data, sizes, batch):
    q_len, kv_len, width, v_width = sizes
    query, key, value = qkv(*batch, q_len=q_len, kv_len=kv_len, width=width, v_width=v_width)
    bits = data.draw(st.lists(st.booleans(), min_size=q_len * kv_len, max_size=q_len * kv_len))
    mask = torch.tensor(bits).view(q_len, kv_len)
    out, weights = attention(query, key, value, mask)
    assert_rows_sum_to_one(weights, mask)
    want = SDPA(query, key, value, mask).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    assert_close(out, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("bad, error, words", [
    (None, TypeError, "must be a float16, bfloat16, float32 or float64 tensor, got NoneType"),
    ([[1.0]], TypeError, "must be a float16, bfloat16, float32 or float64 tensor, got list"),
    (torch.zeros(4, 8, dtype=torch.long), TypeError, "must be a float16, bfloat16, float32 or float64 tensor, got torch.int64"),
    (torch.zeros(4, 8).to(torch.float8_e4m3fn), TypeError, "must be .* got torch.float8_e4m3fn"),
    (torch.zeros(4, 8, dtype=torch.complex64), TypeError, "must be .* got torch.complex64"),
    (torch.zeros(8), ValueError, r"must be \(..., T, D\), got shape \(8,\)"),
])
def test_each_tensor_is_checked_by_name(name, bad, error, words):
    named = dict(zip(("query", "key", "value"), qkv()), **{name: bad})
    with pytest.raises(error, match=f"{name} {words}"):
        attention(**named)


def broken(**changes):
    query, key, value = qkv(2)
    return {**{"query": query, "key": key, "value": value}, **{
        name: change({"query": query, "key": key, "value": value}) if callable(change) else change
        for name, change in changes.items()}}


@pytest.mark.parametrize("changes, error, words", [
    ({"key": lambda x: x["key"][..., :7]}, ValueError, "query and key must have the same last size"),
    ({"query": lambda x: x["query"][..., :7]}, ValueError, "query and key must have the same last size"),
    ({"key": lambda x: x["key"][:, :5]}, ValueError, "value must have one row per key"),
    ({"query": torch.zeros(2, 4, 0).double(), "key": torch.zeros(2, 6, 0).double()}, ValueError, "at least 1"),
    ({"value": lambda x: x["value"][:, :5]}, ValueError, "value must have one row per key"),
    ({"query": torch.zeros(3, 4, 8).double()}, ValueError, "leading sizes"),
    ({"key": lambda x: x["key"].float()}, TypeError, "share one dtype, got torch.float64, torch.float32"),
    ({"value": lambda x: x["value"].to("meta")}, TypeError, "share one device, got cpu, cpu, meta"),
    ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p must be in"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p must be in"),
    ({"dropout_p": None}, TypeError, "dropout_p must be a number, got None"),
    ({"dropout_p": True}, TypeError, "dropout_p must be a number, got True"),
    ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number, got '0.1'"),
    ({"scale": "1"}, TypeError, "scale must be a number, got '1'"),
    ({"scale": torch.ones(6)}, TypeError, "scale must be a number, got tensor"),
    ({"attn_mask": torch.ones(4, 6).bool().to("meta")}, TypeError, "attn_mask must be on cpu like query, got meta"),
    ({"attn_mask": torch.ones(4, 6).to(torch.float8_e5m2)}, TypeError, "attn_mask must be bool"),
    ({"attn_mask": torch.ones(4, 6).int()}, TypeError, r"attn_mask must be bool .* got torch.int32"),
    ({"attn_mask": [[True] * 6] * 4}, TypeError, "attn_mask must be bool .* got list"),
    ({"attn_mask": torch.ones(4, 5).bool()}, ValueError, r"attn_mask must broadcast .* \(2, 4, 6\), got \(4, 5\)"),
    ({"attn_mask": torch.ones(3, 4, 6).bool()}, ValueError, "attn_mask must broadcast"),
    ({"attn_mask": torch.ones(2, 1, 4, 6).bool()}, ValueError, "attn_mask must broadcast"),
])
def test_wrong_input_is_refused(changes, error, words):
    with pytest.raises(error, match=words):
        attention(**broken(**changes))


# --- the layer

INPUTS = torch.tensor([[0.43, 0.15, 0.89], [0.55, 0.87, 0.66], [0.57, 0.85, 0.64],
                       [0.22, 0.58, 0.33], [0.77, 0.25, 0.10], [0.05, 0.80, 0.55]])


def test_reproduces_the_numbers_printed_in_a_book():
    """Raschka, Build a Large Language Model (From Scratch), 2024, section 3.4.2: seed 789, d_in 3, d_out 2."""
    torch.manual_seed(789)
    printed = torch.tensor([[-0.0739, 0.0713], [-0.0748, 0.0703], [-0.0749, 0.0702],
                            [-0.0760, 0.0685], [-0.0763, 0.0679], [-0.0754, 0.0693]])
    assert_close(SelfAttention(3, 2)(INPUTS), printed, rtol=0, atol=5.1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_both_roads_are_one_function(bias):
    layer = SelfAttention(6, 4, qkv_bias=bias).double()
    x = 3 * torch.randn(2, 5, 6)
    assert_parity(lambda x: layer(x, return_weights=True)[0], layer, x)
    params = dict(layer.named_parameters())
    assert list(params) == [f"{p}_proj.{w}" for p in "qkv" for w in (["weight", "bias"] if bias else ["weight"])]


def test_equals_multihead_attention_with_one_head():
    mine = SelfAttention(8, 8, qkv_bias=True).double()
    with torch.no_grad():
        for p in mine.parameters():
            p.copy_(torch.randn_like(p))
    theirs = multihead_of(mine)
    x = torch.randn(2, 5, 8)
    assert_parity(mine, lambda x: theirs(x, x, x)[0], x)
    assert_parity(lambda x: mine(x, return_weights=True)[1], lambda x: theirs(x, x, x)[1], x)


def test_layer_is_permutation_equivariant():
    assert_permutation_equivariant(SelfAttention(6, 4).double(), 3 * torch.randn(2, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (2, 3, 5, 6), (0, 5, 6), (2, 1, 6)])
@pytest.mark.parametrize("return_weights", [False, True])
def test_layer_takes_any_leading_axes(shape, return_weights):
    layer, x = SelfAttention(6, 4), torch.randn(shape)
    out = layer(x, return_weights=return_weights)
    out, weights = out if return_weights else (out, None)
    assert out.shape == (*shape[:-1], 4)
    assert weights is None or weights.shape == (*shape[:-1], shape[-2])


def test_fused_road_never_makes_the_map():
    layer, x = SelfAttention(6, 4), torch.randn(2, 3, 5, 6)
    for batch in (x, x[0], x[0, 0]):
        for wanted, options in ((False, {}), (True, {"return_weights": True})):
            with torch.no_grad(), torch.profiler.profile() as profile:
                layer(batch, **options)
            names = {event.key for event in profile.key_averages()}
            assert ("aten::_softmax" in names) == wanted
            assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in names) != wanted


@pytest.mark.parametrize("x", [None, [[1.0] * 6], torch.zeros(2, 5, 6, dtype=torch.long)])
def test_layer_refuses_what_is_no_float_tensor(x):
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got"):
        SelfAttention(6, 4)(x)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4), (4, -1), (2.5, 4), (4, "4")])
def test_layer_refuses_empty_sizes(sizes):
    with pytest.raises(ValueError, match=f"d_in={sizes[0]!r}, d_out={sizes[1]!r}"):
        SelfAttention(*sizes)
    SelfAttention(1, 1)


@pytest.mark.parametrize("shape", [(6,), (2, 5, 7), (2, 5, 4)])
def test_layer_refuses_wrong_input(shape):
    with pytest.raises(ValueError, match=r"x must be \(..., T, d_in=6\), got shape"):
        SelfAttention(6, 4)(torch.randn(shape))


def test_large_sizes_are_compared_by_value():
    query, key, value = qkv(q_len=2, kv_len=300, width=300)
    assert_close(context(query, key, value), SDPA(query, key, value))
    assert SelfAttention(300, 2)(torch.randn(3, 300)).shape == (3, 2)


def test_layer_refuses_another_dtype_except_under_autocast():
    layer = SelfAttention(6, 4)
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(TypeError, match=f"x must be torch.float32 like the weights, got {dtype}"):
            layer(torch.zeros(5, 6, dtype=dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.zeros(5, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert layer(torch.zeros(5, 6)).dtype == torch.bfloat16


def test_runs_without_numbers():
    query, key, value = (x.to("meta") for x in qkv(2))
    assert [x.shape for x in attention(query, key, value)] == [(2, 4, 3), (2, 4, 6)]


def test_return_weights_is_keyword_only():
    with pytest.raises(TypeError):
        SelfAttention(6, 4)(torch.randn(5, 6), True)


def test_layer_under_autocast():
    layer, x = SelfAttention(6, 4), torch.randn(2, 5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, (readable, weights) = layer(x), layer(x, return_weights=True)
    assert fused.dtype == readable.dtype == torch.bfloat16
    assert_close(fused.float(), readable.float(), rtol=0, atol=2e-2)
    assert_rows_sum_to_one(weights)


def test_vmap():
    inputs, mask = qkv(3, 2), torch.ones(4, 6).tril(1).bool()
    assert_close(torch.vmap(lambda *x: context(*x, mask))(*inputs), context(*inputs, mask))
    layer, x = SelfAttention(6, 4), torch.randn(3, 2, 5, 6)
    assert_close(torch.vmap(layer)(x), layer(x))
    # per-sample gradients
    params = dict(layer.named_parameters())
    grads = torch.vmap(torch.func.grad(lambda p, x: torch.func.functional_call(layer, p, (x,)).sum()),
                       in_dims=(None, 0))(params, x)
    assert grads["q_proj.weight"].shape == (3, 4, 6)
    masks = torch.rand(3, 4, 6) > 0.4
    assert_close(torch.vmap(context)(*inputs, masks), torch.stack([context(*i) for i in zip(*inputs, masks)]))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_attention_compiles_into_one_graph_at_every_length(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for kv_len in (6, 8, 9):
        inputs = qkv(2, kv_len=kv_len)
        for mask in (None, torch.rand(4, kv_len) > 0.4, torch.randn(1, kv_len).double()):
            assert_close(compiled(*inputs, mask), attention(*inputs, mask))


def test_all_dtype_pairs_are_refused_unless_equal():
    query, key, value = qkv(2)
    for a, b in itertools.permutations(DTYPES, 2):
        with pytest.raises(TypeError, match="share one dtype"):
            attention(query.to(a), key.to(b), value.to(b))


@pytest.mark.parametrize("scale, error, words", [
    (float("inf"), ValueError, "scale must be finite, got inf"), (float("-inf"), ValueError, "scale must be finite, got -inf"),
    (float("nan"), ValueError, "scale must be finite, got nan"), (True, TypeError, "scale must be a number, got True"),
    ("1", TypeError, "scale must be a number, got '1'")])
def test_scales_that_are_no_numbers(scale, error, words):
    x = torch.randn(2, 3, 4)
    with pytest.raises(error, match=words):
        attention(x, x, x, scale=scale)
    for finite in (-2.5, -1, 0, 0.0, 3e38):
        assert attention(x, x, x, scale=finite)[0].shape == x.shape


def test_the_layer_names_devices_and_dtypes():
    layer, x = SelfAttention(4, 4), torch.randn(2, 3, 4)
    with pytest.raises(TypeError, match="x must be on cpu like the weights, got meta"):
        layer(x.to("meta"))
    with pytest.raises(TypeError, match="x must be torch.float32 like the weights, got torch.float64"):
        layer.to("meta")(x.double().to("meta"))
    assert layer(x.to("meta")).shape == (2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="x must be on meta"):
        layer(x)


def test_masks_are_compared_by_value():
    x = torch.randn(1, 300, 4)
    assert torch.equal(attention(x, x, x, torch.ones(int("300"), int("300")).bool())[0], attention(x, x, x)[0])
    for shape in ((0,), (3, 0), (0, 3)):
        with pytest.raises(ValueError, match="attn_mask must broadcast"):
            attention(x[:, :3], x[:, :3], x[:, :3], torch.ones(shape).bool())
