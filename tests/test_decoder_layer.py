"""RMSNorm, SwiGLU and the decoder layer: against PyTorch, Hugging Face's Llama with copied weights, and counted parameters."""
import copy
import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import HALVES, gap, with_parameters
from torch import nn
from torch.testing import assert_close

from attn_nb import decoder_layer
from attn_nb.causal import causal_mask, padding_mask
from attn_nb.decoder_layer import DecoderLayer, RMSNorm, SwiGLU, rms_norm
from attn_nb.grouped_query import GroupedQueryAttention
from attn_nb.kv_cache import KVCache
from attn_nb.testing import (
    assert_as_precise,
    assert_cache_equals_full,
    assert_causal,
    assert_eval_deterministic,
    assert_parity,
    assert_permutation_equivariant,
    assert_rows_sum_to_one,
)

FLOATS = [torch.float64, torch.float32, *HALVES]
REAL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])     # left padding
PADS = padding_mask(REAL)
SIZES = {"d_model": 15, "num_heads": 6, "num_kv_heads": 2, "head_dim": 4, "d_ff": 22, "norm_eps": 1e-5}


def settings_of(**changes):
    return SimpleNamespace(**{**SIZES, **changes})


def lively(layer):
    """Weights for which scores, gates, norms and biases count: a library's first ones hide mistakes."""
    with torch.no_grad():
        for name, p in layer.named_parameters():
            scale = 2.5 if "q_proj" in name or "k_proj" in name else 1.5
            p.normal_(0, scale * p.shape[1] ** -0.5 if p.dim() == 2 else 0.7)
            if "norm" in name:
                p.add_(0.3)
    return layer


def layer_and_x(T=5, batch_size=3, **changes):
    layer = lively(DecoderLayer(settings_of(**changes)).double())
    return layer, 2 * torch.randn(batch_size, T, layer.input_layernorm.weight.shape[0], dtype=torch.float64)


def rope_tables(positions, head_dim=4, theta=100.0):
    """cos and sin, (1, T, half) for positions (T,), or (B, T, half) for (B, T)."""
    angles = positions[..., None].double() * theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    angles = angles if angles.dim() == 3 else angles[None]
    return angles.cos(), angles.sin()


# --- rms_norm

@given(data=st.data(), lead=st.lists(st.integers(0, 3), max_size=3), D=st.integers(1, 9),
       eps=st.sampled_from([1e-6, 1e-5, 1e-2, 3.0]), size=st.sampled_from([0.0, 1e-4, 1.0, 1e4]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_equals_pytorch(data, lead, D, eps, size):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x, weight = size * torch.randn(*lead, D).double(), torch.randn(D).double()
    out = rms_norm(x, weight, eps)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert_close(out, F.rms_norm(x, (D,), weight, eps), rtol=0, atol=1e-9)
    if out.numel() and out.abs().max() > 1e-6:
        assert_parity(lambda x, w: rms_norm(x, w, eps), lambda x, w: F.rms_norm(x, (D,), w, eps), x, weight)
        module = RMSNorm(D, eps).double()
        module.weight.data.copy_(weight)
        assert torch.equal(module(x), out)


def test_by_hand():
    """(3, 4): the mean of the squares is 12.5."""
    x = torch.tensor([3.0, 4.0]).double()
    assert_close(rms_norm(x, torch.tensor([1.0, -2.0]).double(), 1e-12), torch.tensor([3.0, -8.0]).double() / 12.5 ** 0.5)
    assert_close(rms_norm(x, torch.ones(2).double(), 12.5), x / 5)               # eps under the root
    assert_close(rms_norm(x, torch.ones(2).double(), 10), x / 22.5 ** 0.5)       # an int will do
    assert not rms_norm(torch.zeros(3, 2), torch.ones(2), 1e-6).any()


def test_the_norm_knows_no_size_and_keeps_the_direction():
    x, weight = torch.randn(3, 5, 8).double(), torch.randn(8).double()
    out = rms_norm(x, weight, 1e-12)
    assert_close((out / weight).square().mean(-1), torch.ones(3, 5).double())
    assert_close(rms_norm(1000 * x, weight, 1e-12), out)
    assert_close(rms_norm(-x, weight, 1e-12), -out)
    assert_close(F.cosine_similarity(out / weight, x, -1), torch.ones(3, 5).double())
    x.requires_grad_()                       # so its gradient is at right angles to x
    grad = torch.autograd.grad(rms_norm(x, weight, 1e-12), x, torch.randn_like(x))[0]
    assert (grad * x).sum(-1).abs().max() < 1e-9 and grad.abs().max() > 0.1


def test_layernorm_is_centring_then_rms():
    x, w, b = torch.randn(3, 5, 8).double() + 2, torch.randn(8).double(), torch.randn(8).double()
    assert_parity(lambda x, w, b: rms_norm(x - x.mean(-1, keepdim=True), w, 1e-5) + b,
                  lambda x, w, b: F.layer_norm(x, (8,), w, b, 1e-5), x, w, b)
    assert (rms_norm(x, w, 1e-5) + b - F.layer_norm(x, (8,), w, b, 1e-5)).abs().max() > 0.5


@pytest.mark.parametrize("dtype", FLOATS)
def test_bit_for_bit_as_llama(dtype):
    """The same numbers as Hugging Face's class, in the format of checkpoints too; float64 is exact here and float32 there."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for scale in (1e-3, 1.0, 30.0):
        x, theirs = (scale * torch.randn(64, 257)).to(dtype), LlamaRMSNorm(257, eps=1e-5)
        theirs.weight.data.normal_(1, 0.3)
        theirs.to(dtype)
        ours = RMSNorm(257, 1e-5).to(dtype)
        ours.load_state_dict(theirs.state_dict())
        if dtype == torch.float64:
            assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)
        else:
            assert_close(ours(x), theirs(x), rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
        assert ours(x).dtype == dtype
        if dtype in HALVES:                  # controls: rounded after the weight; Gemma's 1 + w
            wide = F.rms_norm(x.float(), (257,), ours.weight.float(), 1e-5).to(dtype)
            assert 0.1 < (wide != ours(x)).double().mean() < 0.5
            assert not torch.allclose(rms_norm(x, 1 + ours.weight, 1e-5), ours(x), rtol=0.1)


def test_gemma_stores_a_distance_from_1():
    """Its norm is ours with 1 + w in float32; in 16 bits it rounds last, and ours is another function."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    theirs, x = Gemma2RMSNorm(64, eps=1e-6), torch.randn(16, 64)
    theirs.weight.data.normal_(0, 0.3)
    assert_close(rms_norm(x, 1 + theirs.weight, 1e-6), theirs(x))
    assert (rms_norm(x, theirs.weight, 1e-6) - theirs(x)).abs().max() > 0.5
    theirs, low = theirs.bfloat16(), x.bfloat16()
    differ = rms_norm(low, (1 + theirs.weight.float()).bfloat16(), 1e-6) != theirs(low)
    assert 0.05 < differ.double().mean() < 0.6


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1e-2, 1.0, 100.0])
def test_as_precise_as_pytorch(dtype, scale):
    """Without a weight there is one rounding. With one there are two, and the weight multiplies the first: if that takes
    the product to the end of its binade, three times the error of one. PyTorch rounds once; Llama's order needs two."""
    x = scale * torch.randn(64, 300)
    for weight in (1.0, 2.0):                # powers of two add no rounding
        assert_as_precise(lambda x: rms_norm(x, torch.full((300,), weight).to(x), 1e-6),
                          lambda x: F.rms_norm(x, (300,), torch.full((300,), weight).to(x), 1e-6), x, dtype=dtype)
    low, weight = x.to(dtype), torch.randn(300).to(dtype)
    exact = rms_norm(low.double(), weight.double(), 1e-6)
    step = torch.finfo(dtype).eps / 2        # one rounding, relative
    assert ((rms_norm(low, weight, 1e-6) - exact).abs() <= 2.01 * step * exact.abs() + 1e-6).all()


def test_large_and_small_numbers_in_half_precision():
    ones = torch.ones(300).half()
    for size, eps in ((300.0, 1e-6), (60000.0, 1e-6), (1e-4, 1e-12)):
        x = torch.full((300,), size).half()
        assert_close(rms_norm(x, ones, eps), ones, rtol=0, atol=2e-3)
    assert torch.full((300,), 300.0).half().square().isinf().all()
    grads = torch.full((300,), 3e4).half().requires_grad_()
    assert torch.autograd.grad(rms_norm(grads, ones, 1e-6).sum(), grads)[0].isfinite().all()


@pytest.mark.parametrize("weight", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_result_has_the_dtype_of_x(dtype, weight):
    x, w = torch.randn(4, 8).to(dtype), torch.randn(8).to(weight)
    out = rms_norm(x, w, 1e-6)
    assert out.dtype == dtype
    assert_close(out.double(), F.rms_norm(x.double(), (8,), w.double(), 1e-6), rtol=0.02, atol=1e-2)


@pytest.mark.parametrize("arguments, error, words", [
    ((None, torch.ones(4), 1e-6), TypeError, "x"),
    ((torch.ones(4).long(), torch.ones(4), 1e-6), TypeError, "x"),
    ((torch.ones(4), torch.ones(4).long(), 1e-6), TypeError, "weight"),
    ((torch.ones(4), [1.0], 1e-6), TypeError, "weight"),
    ((torch.ones(4), None, 1e-6), TypeError, "weight"),
    ((torch.ones(4).to(torch.float8_e4m3fn), torch.ones(4), 1e-6), TypeError, "x"),
    ((torch.ones(3, 4), torch.ones(3), 1e-6), ValueError, "weight"),
    ((torch.ones(3, 4), torch.ones(1), 1e-6), ValueError, "weight"),
    ((torch.ones(3, 4), torch.ones(3, 4), 1e-6), ValueError, "weight"),
    ((torch.ones(()), torch.ones(()), 1e-6), ValueError, "x"),
    ((torch.ones(4), torch.ones(4, device="meta"), 1e-6), TypeError, "x"),
    ((torch.ones(4), torch.ones(4), 0.0), ValueError, "eps"),
    ((torch.ones(4), torch.ones(4), -1e-6), ValueError, "eps"),
    ((torch.ones(4), torch.ones(4), float("inf")), ValueError, "eps"),
    ((torch.ones(4), torch.ones(4), float("nan")), ValueError, "eps"),
    ((torch.ones(4), torch.ones(4), None), TypeError, "eps"),
    ((torch.ones(4), torch.ones(4), "1e-6"), TypeError, "eps"),
    ((torch.ones(4), torch.ones(4), True), TypeError, "eps"),
])
def test_wrong_norms_are_refused(arguments, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        rms_norm(*arguments)


def test_the_norm_as_a_module():
    norm = RMSNorm(8, 1e-3)
    assert torch.equal(norm.weight, torch.ones(8)) and norm.eps == 1e-3 and RMSNorm(8).eps == 1e-6
    assert {name: tuple(t.shape) for name, t in norm.state_dict().items()} == {"weight": (8,)}
    assert str(norm) == "RMSNorm(8, eps=0.001)" and isinstance(norm.weight, nn.Parameter)
    for sizes, error, words in (((0,), ValueError, "d_model"), ((8.0,), TypeError, "d_model"),
                                ((8, 0.0), ValueError, "eps"), ((8, None), TypeError, "eps")):
        with pytest.raises(error, match=rf"\b{words}\b"):
            RMSNorm(*sizes)
    assert RMSNorm(1)(torch.ones(2, 1)).shape == (2, 1)
    with pytest.raises(ValueError, match=r"\bx\b"):
        norm(torch.ones(3, 7))


# --- SwiGLU

@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(5,), (3, 5), (2, 3, 5), (0, 5), (3, 0)])
def test_network_equals_hugging_face(bias, lead):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    theirs = lively(LlamaMLP(LlamaConfig(hidden_size=15, num_attention_heads=5, intermediate_size=22, mlp_bias=bias)).double())
    ours = SwiGLU(15, 22, bias=bias).double()
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    ours.load_state_dict(theirs.state_dict())
    x = 2 * torch.randn(*lead, 15).double()
    assert_close(ours(x), theirs(x), rtol=0, atol=1e-9)
    if x.numel():
        inputs = x, *theirs.parameters()
        assert_parity(with_parameters(ours, ours), with_parameters(theirs, theirs), *inputs)
        swapped = copy.deepcopy(ours)        # controls
        swapped.gate_proj, swapped.up_proj = ours.up_proj, ours.gate_proj
        for wrong in (swapped(x), ours.down_proj(F.silu(ours.gate_proj(x) * ours.up_proj(x))),
                      ours.down_proj(F.relu(ours.gate_proj(x)) * ours.up_proj(x)),
                      ours.down_proj(F.gelu(ours.gate_proj(x)) * ours.up_proj(x))):
            assert (wrong - theirs(x)).abs().max() > 1e-2


def test_a_token_is_worked_on_alone():
    mlp, x = lively(SwiGLU(15, 22).double()), torch.randn(3, 5, 15).double()
    assert_permutation_equivariant(mlp, x)
    for t in range(5):
        assert_close(mlp(x)[:, t:t + 1], mlp(x[:, t:t + 1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", HALVES)
def test_network_as_precise_as_pytorch(dtype):
    x, gate, up, down = torch.randn(8, 5, 64), torch.randn(96, 64) / 8, torch.randn(96, 64) / 8, torch.randn(64, 96) / 10

    def ours(x, gate, up, down):
        state = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}
        return torch.func.functional_call(SwiGLU(64, 96).to(x.dtype), state, x)

    assert_as_precise(ours, lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d),
                      x, gate, up, down, dtype=dtype)


@pytest.mark.parametrize("call, error, words", [
    (lambda: SwiGLU(0, 4), ValueError, "d_model"),
    (lambda: SwiGLU(4, 0), ValueError, "d_ff"),
    (lambda: SwiGLU(4, 4.0), TypeError, "d_ff"),
    (lambda: SwiGLU(None, 4), TypeError, "d_model"),
    (lambda: SwiGLU(4, 6)(torch.ones(2, 5)), ValueError, "x"),
    (lambda: SwiGLU(4, 6)(torch.ones(4)), ValueError, "x"),
    (lambda: SwiGLU(4, 6)(torch.ones(2, 4).double()), TypeError, "x"),
    (lambda: SwiGLU(4, 6)(None), TypeError, "x"),
    (lambda: SwiGLU(4, 6)(torch.ones(2, 4).long()), TypeError, "x"),
])
def test_wrong_networks_are_refused(call, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        call()


def test_the_smallest_sizes():
    assert SwiGLU(1, 1)(torch.ones(2, 1)).shape == (2, 1)
    layer = DecoderLayer(settings_of(d_model=1, num_heads=1, num_kv_heads=1, head_dim=1, d_ff=1))
    assert layer(torch.ones(1, 1, 1)).shape == (1, 1, 1)


# --- the layer against Hugging Face

def hugging_face(bias=False, mlp_bias=False, Hkv=2, Dh=4, exact_norms=False, eps=1e-5):
    """Their layer with lively weights, in float64, and the settings of ours."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        hidden_size=18, intermediate_size=22, num_attention_heads=6, num_key_value_heads=Hkv, head_dim=Dh,
        num_hidden_layers=1, rms_norm_eps=eps, attention_bias=bias, mlp_bias=mlp_bias, attn_implementation="sdpa")
    theirs = LlamaDecoderLayer(config, 0)
    if exact_norms:                          # theirs compute in float32
        theirs.input_layernorm, theirs.post_attention_layernorm = (nn.RMSNorm(18, eps=eps) for _ in range(2))
    return lively(theirs.double()), settings_of(d_model=18, num_kv_heads=Hkv, head_dim=Dh, norm_eps=eps, qkv_bias=bias,
                                                out_bias=bias, mlp_bias=mlp_bias)


def llama(theirs, x, may=None, rope=None, cache=None):
    """Their layer with boolean masks and our tables, which name each angle once."""
    Dh = theirs.self_attn.head_dim
    cos, sin = (torch.ones(1, x.shape[1], Dh).to(x), torch.zeros(1, x.shape[1], Dh).to(x)) if rope is None else (
        torch.cat([t, t], -1).to(x) for t in rope)
    bias = None if may is None else torch.zeros(may.shape, dtype=x.dtype).masked_fill(~may, -torch.inf)
    out = theirs(x, attention_mask=bias, position_embeddings=(cos, sin), past_key_values=cache)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("exact, bound", [(True, 1e-9), (False, 1e-5)])
@pytest.mark.parametrize("bias, mlp_bias, Hkv, Dh", [(False, False, 2, 4), (True, False, 6, 2), (False, True, 1, 10),
                                                     (True, True, 3, 4)])
def test_equals_hugging_face(exact, bound, bias, mlp_bias, Hkv, Dh):
    """Outputs, and the gradients of x and of all parameters; with rotary positions and left padding."""
    theirs, config = hugging_face(bias, mlp_bias, Hkv, Dh, exact)
    ours = DecoderLayer(config).double()
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = 2 * torch.randn(3, 5, 18).double()
    q, k = ours.self_attn.q_proj(ours.input_layernorm(x)), ours.self_attn.k_proj(ours.input_layernorm(x))
    q, k = (t.unflatten(-1, (-1, Dh)).transpose(1, 2) for t in (q, k))
    assert (q @ k.repeat_interleave(6 // Hkv, 1).mT * Dh ** -0.5).std() >= 1
    inputs, may = (x, *theirs.parameters()), causal_mask(5) & PADS
    may = may | torch.eye(5).bool()          # their pads see themselves: softmax over nothing is NaN
    for rope in (None, rope_tables(torch.arange(5), Dh), rope_tables(torch.randint(9, (3, 5)), Dh)):
        for mask, their_mask in ((None, causal_mask(5)[None, None].expand(3, 1, 5, 5)), (may, may)):
            reference = with_parameters(theirs, lambda x: llama(theirs, x, their_mask, rope))
            for weights_too in (False, True):
                def run(f, x):
                    out = f(x, rope=rope, attn_mask=mask, return_weights=weights_too)
                    return out[0] if weights_too else out
                assert gap(with_parameters(ours, partial(run, ours)), reference, *inputs) < bound
    if exact:
        assert_parity(with_parameters(ours, ours), with_parameters(theirs, partial(llama, theirs)), *inputs)


@pytest.mark.parametrize("exact, bound", [(True, 1e-9), (False, 1e-5)])
def test_what_is_nearly_a_llama_layer_misses_by_far(exact, bound):
    """Negative control: a hundred times the tolerance, for each of the usual mistakes."""
    theirs, config = hugging_face(exact_norms=exact)
    layer = DecoderLayer(config).double()
    layer.load_state_dict(theirs.state_dict())
    x, rope = 2 * torch.randn(3, 5, 18).double(), rope_tables(torch.arange(5))
    want = llama(theirs, x, rope=rope)
    attend, mlp, first, second = layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm
    h = x + attend(first(x), rope=rope)
    assert (h + mlp(second(h)) - want).abs().max() < bound
    after = first(x + attend(x, rope=rope))
    swapped, eps = copy.deepcopy(layer), copy.deepcopy(layer)
    swapped.mlp.gate_proj, swapped.mlp.up_proj = mlp.up_proj, mlp.gate_proj
    eps.input_layernorm.eps = 1e-2
    exchanged = copy.deepcopy(layer)
    exchanged.input_layernorm, exchanged.post_attention_layernorm = second, first
    wrong = {"norm after": second(after + mlp(after)), "gate and up swapped": swapped(x, rope=rope),
             "no second skip": mlp(second(h)), "no first skip": attend(first(x), rope=rope) + mlp(second(attend(
                 first(x), rope=rope))), "no second norm": h + mlp(h), "norms exchanged": exchanged(x, rope=rope),
             "another eps": eps(x, rope=rope), "no positions": layer(x), "side by side": x + attend(
                 first(x), rope=rope) + mlp(second(x)), "second skip from x": x + mlp(second(h))}
    for name, out in wrong.items():
        assert (out - want).abs().max() > 100 * bound, name


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_as_precise_as_hugging_face(dtype):
    """In the format of checkpoints our layer is as far from the exact one as theirs, and nearly the same numbers."""
    theirs, config = hugging_face()
    ours = DecoderLayer(config).double()
    ours.load_state_dict(theirs.state_dict())
    x = 2 * torch.randn(3, 5, 18).to(dtype)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    exact = copy.deepcopy(ours).double()(x.double())
    errors = [(f.double() - exact).abs().max() for f in (ours(x), llama(theirs, x))]
    assert errors[0] <= 2 * errors[1] + 1e-5 and ours(x).dtype == dtype


@pytest.mark.parametrize("sizes", [[3, 1, 1], [1] * 5, [2, 3], [5]])
def test_caches_are_those_of_hugging_face(sizes):
    """The same pieces, the same outputs, and the same keys and values at the end."""
    from transformers import DynamicCache

    theirs, config = hugging_face(exact_norms=True)
    ours = DecoderLayer(config).double()
    ours.load_state_dict(theirs.state_dict())
    x, cos_sin = 2 * torch.randn(3, 5, 18).double(), rope_tables(torch.arange(5))
    cache, their_cache, past = KVCache(3, 2, 5, 4, dtype=torch.float64), DynamicCache(), 0
    with torch.no_grad():
        full = ours(x, rope=cos_sin, attn_mask=PADS | torch.eye(5).bool())
        for new in x.split(sizes, 1):
            places = slice(past, past + new.shape[1])
            rope, past = tuple(t[:, places] for t in cos_sin), places.stop
            may = (PADS | torch.eye(5).bool())[:, :, places, :past] & causal_mask(new.shape[1], past)
            got = ours(new, rope=rope, cache=cache, attn_mask=may)
            assert_close(got, llama(theirs, new, may, rope, their_cache), rtol=0, atol=1e-9)
            assert_close(got, full[:, places], rtol=0, atol=1e-9)
    kept = their_cache.layers[0]
    assert cache.length == 5
    assert_close(cache.keys, kept.keys, rtol=0, atol=1e-9)
    assert_close(cache.values, kept.values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name, sizes, want", [
    ("Llama 2 7B", (32000, 4096, 32, 32, 32, 128, 11008), 6_738_415_616),
    ("Llama 3 8B", (128256, 4096, 32, 32, 8, 128, 14336), 8_030_261_248)])
def test_published_totals(name, sizes, want):
    """By our layer on the meta device, by Hugging Face's model, and by the formula of the chapter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    V, D, L, H, Hkv, Dh, d_ff = sizes
    with torch.device("meta"):
        layer = DecoderLayer(SimpleNamespace(d_model=D, num_heads=H, num_kv_heads=Hkv, d_ff=d_ff, norm_eps=1e-5))
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=Hkv,
            intermediate_size=d_ff))
    count = sum(p.numel() for p in layer.parameters())
    assert count == 2 * D * H * Dh + 2 * D * Hkv * Dh + 3 * D * d_ff + 2 * D
    assert L * count + 2 * V * D + D == sum(p.numel() for p in model.parameters()) == want


# --- the layer: the chain, options, shapes

@pytest.mark.parametrize("weights_too", [False, True])
@pytest.mark.parametrize("mask", [None, PADS, torch.randn(6, 5, 5).double()], ids=["none", "pads", "favours"])
def test_without_network_it_is_attention_and_a_skip(mask, weights_too):
    layer, x = layer_and_x(qkv_bias=True, out_bias=True)
    layer.mlp.down_proj.weight.data.zero_()
    layer.input_layernorm.weight.data.fill_(1)
    layer.input_layernorm.eps = 1e-300
    attend = GroupedQueryAttention(15, 6, 2, head_dim=4, qkv_bias=True, out_bias=True).double()
    attend.load_state_dict(layer.self_attn.state_dict())
    rope, options = rope_tables(torch.arange(5)), {"attn_mask": mask, "return_weights": weights_too}

    def first(out):
        return out[0] if weights_too else out

    def unit(x):
        return x / x.square().mean(-1, keepdim=True).sqrt()

    assert_parity(lambda x: first(layer(unit(x), rope=rope, **options)),
                  lambda x: unit(x) + first(attend(unit(x), rope=rope, **options)), x)
    if weights_too:
        assert_close(layer(unit(x), **options)[1], attend(unit(x), **options)[1])
    nn.init.zeros_(layer.self_attn.o_proj.weight)
    nn.init.zeros_(layer.self_attn.o_proj.bias)
    assert torch.equal(first(layer(x, **options)), x)


@given(data=st.data(), B=st.integers(1, 3), T=st.integers(1, 6), Hkv=st.integers(1, 3), R=st.integers(1, 3),
       half=st.integers(1, 2), D=st.integers(1, 7), d_ff=st.integers(1, 7), mask=st.sampled_from([None, "pads", "float", "head"]),
       rope=st.booleans(), bias=st.booleans())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_equals_its_formula(data, B, T, Hkv, R, half, D, d_ff, mask, rope, bias):
    """PyTorch's pieces in the order of the equation; both roads; in two pieces with a cache."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    H, Dh = Hkv * R, 2 * half
    layer, x = layer_and_x(T, B, d_model=D, num_heads=H, num_kv_heads=Hkv, head_dim=Dh, d_ff=d_ff, qkv_bias=bias,
                           out_bias=bias, mlp_bias=bias)
    tables = rope_tables(torch.arange(T), Dh) if rope else None
    made = {None: None, "pads": padding_mask(torch.randint(0, T + 1, (B,)), T), "float": torch.randn(B, 1, T, T).double(),
            "head": torch.rand(H, T, T) > 0.4}[mask]
    u = F.rms_norm(x, (D,), layer.input_layernorm.weight, 1e-5)
    h = x + layer.self_attn(u, rope=tables, attn_mask=made)
    u = F.rms_norm(h, (D,), layer.post_attention_layernorm.weight, 1e-5)
    m = layer.mlp
    want = h + F.linear(F.silu(F.linear(u, m.gate_proj.weight, m.gate_proj.bias)) * F.linear(
        u, m.up_proj.weight, m.up_proj.bias), m.down_proj.weight, m.down_proj.bias)
    out, weights = layer(x, rope=tables, attn_mask=made, return_weights=True)
    assert_close(out, want, rtol=0, atol=1e-9)
    assert_close(layer(x, rope=tables, attn_mask=made), want, rtol=0, atol=1e-9)
    assert weights.shape == (B, H, T, T)
    cut, cache = data.draw(st.integers(0, T)), KVCache(B, Hkv, T, Dh, dtype=torch.float64)
    with torch.no_grad():
        parts = [layer(x[:, a:b], cache=cache, rope=tables and tuple(t[:, a:b] for t in tables),
                       attn_mask=None if made is None else made.expand(*made.shape[:-2], T, T)[..., a:b, :b])
                 for a, b in ((0, cut), (cut, T))]
    assert_close(torch.cat(parts, 1), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5), (2, 1), (2, 0)])
def test_any_leading_axes(shape):
    layer, _ = layer_and_x()
    x = torch.randn(*shape, 15).double()
    out, weights = layer(x, return_weights=True)
    assert out.shape == layer(x).shape == x.shape and weights.shape == (*shape[:-1], 6, shape[-1], shape[-1])
    if len(shape) == 3:
        assert_close(layer(x)[1, 2], layer(x[1, 2]))
        pads = padding_mask(torch.tensor([5, 4, 3, 2, 1, 5]))
        assert_close(layer(x, attn_mask=pads).flatten(0, 1), layer(x.flatten(0, 1), attn_mask=pads))


@pytest.mark.parametrize("mask", [None, PADS])
def test_no_token_sees_its_future(mask):
    layer, x = layer_and_x()
    assert_causal(lambda x: layer(x, attn_mask=mask), x)
    assert_causal(lambda x: layer(x, attn_mask=mask, return_weights=True)[0], x)
    _, weights = layer(x, attn_mask=mask, return_weights=True)
    assert_rows_sum_to_one(weights, causal_mask(5) if mask is None else causal_mask(5) & mask)
    layer.self_attn.is_causal = False
    with pytest.raises(AssertionError, match=r"\bfuture\b"):
        assert_causal(lambda x: layer(x, attn_mask=mask), x)


def test_the_weights_are_those_of_the_attention_on_the_normalised_stream():
    layer, x = layer_and_x()
    out, weights = layer(x, attn_mask=PADS, return_weights=True)
    want = layer.self_attn(layer.input_layernorm(x), attn_mask=PADS, return_weights=True)[1]
    assert torch.equal(weights, want) and torch.is_tensor(layer(x)) and type(layer(x, return_weights=True)) is tuple
    assert_close(out, layer(x, attn_mask=PADS), rtol=0, atol=1e-9)


def test_pads_leave_no_trace():
    """Left padding: a text is the same alone, and what is in the pads does not matter."""
    layer, x = layer_and_x()
    rope = rope_tables(torch.arange(5))
    out = layer(x, rope=rope, attn_mask=PADS)
    alone = layer(x[:1, 2:], rope=tuple(t[:, 2:] for t in rope))
    assert_close(out[:1, 2:], alone, rtol=0, atol=1e-9)
    garbage = x.clone()
    garbage[0, :2] = 1e6
    assert_close(layer(garbage, rope=rope, attn_mask=PADS)[:, 2:], out[:, 2:], rtol=0, atol=1e-9)
    x.requires_grad_()
    grads = torch.autograd.grad(layer(x, attn_mask=PADS).square().sum(), [x, *layer.parameters()])
    assert all(g.isfinite().all() for g in grads)


def test_a_token_that_sees_nothing_goes_through_the_network_only():
    layer, x = layer_and_x()
    out = layer(x, attn_mask=PADS)
    want = x + layer.mlp(layer.post_attention_layernorm(x))
    assert_close(out[0, :2], want[0, :2], rtol=0, atol=1e-12)
    assert (out[0, 2:] - want[0, 2:]).abs().max() > 0.1


# --- the layer with a cache

@pytest.mark.parametrize("Hkv", [1, 2, 6])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("weights_too", [False, True])
def test_cached_equals_full(Hkv, padded, turned, weights_too):
    layer, x = layer_and_x(9, 2, num_kv_heads=Hkv, qkv_bias=True)
    real = torch.ones(2, 9).bool()
    real[0, :4] = not padded
    tables = rope_tables(torch.arange(9))

    def step(new, cache):
        cache = KVCache(2, Hkv, 9, 4, dtype=torch.float64) if cache is None else cache
        places = slice(cache.length, cache.length + new.shape[1])
        with torch.no_grad():
            out = layer(new, cache=cache, rope=tuple(t[:, places] for t in tables) if turned else None,
                        attn_mask=padding_mask(real[:, :places.stop]) if padded else None, return_weights=weights_too)
        return out[0] if weights_too else out, cache

    assert_cache_equals_full(step, x)


def test_the_cache_is_the_callers():
    """Written in place, once for each call, and returned by nobody; another layer's cache is another text."""
    layer, x = layer_and_x()
    cache = KVCache(3, 2, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        out = layer(x[:, :3], cache=cache)
        assert torch.is_tensor(out) and cache.length == 3
        u = layer.input_layernorm(x[:, :3])
        assert_close(cache.values, layer.self_attn.v_proj(u).unflatten(-1, (2, 4)).transpose(1, 2))
        out, weights = layer(x[:, 3:], cache=cache, return_weights=True)
        assert cache.length == 5 and weights.shape == (3, 6, 2, 5)
        assert_close(out, layer(x)[:, 3:], rtol=0, atol=1e-9)
        with pytest.raises(ValueError, match=r"\bmax_len\b"):
            layer(x[:, :1], cache=cache)
        with pytest.raises(ValueError, match=r"\battn_mask\b"):
            cache.crop(4)
            layer(x[:, :1], cache=cache, attn_mask=torch.ones(2, 1, 1, 4).bool())
    assert cache.length == 4 and not list(layer.buffers())


def test_gradients_flow_through_a_cache():
    layer, x = layer_and_x()

    def in_pieces(f, x):
        cache = KVCache(3, 2, 5, 4, dtype=torch.float64)
        return torch.cat([f(part, cache=cache) for part in x.split([2, 3], 1)], 1)
    assert_parity(with_parameters(layer, partial(in_pieces, layer)), with_parameters(layer, layer), x, *layer.parameters())


# --- the layer: construction, refusals, life

@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("out_bias", [False, True])
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_names_and_shapes(qkv_bias, out_bias, mlp_bias):
    layer = DecoderLayer(settings_of(qkv_bias=qkv_bias, out_bias=out_bias, mlp_bias=mlp_bias))
    rows = {"self_attn.q_proj": (24, 15), "self_attn.k_proj": (8, 15), "self_attn.v_proj": (8, 15),
            "self_attn.o_proj": (15, 24), "mlp.gate_proj": (22, 15), "mlp.up_proj": (22, 15), "mlp.down_proj": (15, 22)}
    want = {f"{name}.weight": shape for name, shape in rows.items()}
    has = {"qkv": qkv_bias, "o": out_bias, "mlp": mlp_bias}
    for name, shape in rows.items():
        kind = "mlp" if name.startswith("mlp") else "o" if name.endswith("o_proj") else "qkv"
        want |= {f"{name}.bias": shape[:1]} if has[kind] else {}
    want |= {"input_layernorm.weight": (15,), "post_attention_layernorm.weight": (15,)}
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == want
    assert layer.input_layernorm.eps == layer.post_attention_layernorm.eps == 1e-5


def test_defaults_of_a_config():
    class Small:
        d_model, num_heads, num_kv_heads, d_ff, norm_eps = 12, 4, 2, 20, 1e-4
    layer = DecoderLayer(Small)
    assert not [name for name in layer.state_dict() if "bias" in name]
    assert layer.self_attn.head_dim == 3 and layer.self_attn.dropout.p == 0 and layer.self_attn.is_causal
    assert layer.self_attn.num_heads == 4 and layer.self_attn.num_kv_heads == 2
    assert DecoderLayer(settings_of(head_dim=None, d_model=18)).self_attn.head_dim == 3
    with pytest.raises(TypeError):
        layer(torch.ones(1, 2, 12), None)    # options are keywords


@pytest.mark.parametrize("missing", decoder_layer._NEEDED)
def test_a_missing_setting_is_named(missing):
    config = settings_of()
    delattr(config, missing)
    with pytest.raises(TypeError, match=rf"\bconfig\b.*\b{missing}$"):
        DecoderLayer(config)


def test_a_foreign_config_is_refused():
    from transformers import LlamaConfig

    with pytest.raises(TypeError, match=r"\bconfig\b"):
        DecoderLayer(LlamaConfig())
    with pytest.raises(TypeError, match=r"\bconfig\b"):
        DecoderLayer(dict(SIZES))


@pytest.mark.parametrize("changes, error, words", [
    ({"d_model": 0}, ValueError, "d_model"),
    ({"d_ff": 0}, ValueError, "d_ff"),
    ({"d_ff": 2.5}, TypeError, "d_ff"),
    ({"num_kv_heads": 4}, ValueError, "num_kv_heads"),
    ({"head_dim": None}, ValueError, "num_heads"),
    ({"norm_eps": 0.0}, ValueError, "eps"),
    ({"norm_eps": None}, TypeError, "eps"),
    ({"dropout": 1.5}, ValueError, "dropout"),
])
def test_wrong_settings_are_refused(changes, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        DecoderLayer(settings_of(**changes))


@pytest.mark.parametrize("x, options, error, words", [
    (None, {}, TypeError, "x"),
    (torch.zeros(2, 5, 15).long(), {}, TypeError, "x"),
    (torch.zeros(2, 5, 15), {}, TypeError, "x"),
    (torch.zeros(2, 5, 15).double().to("meta"), {}, TypeError, "x"),
    (torch.zeros(15).double(), {}, ValueError, "x"),
    (torch.zeros(2, 5, 14).double(), {}, ValueError, "x"),
    (torch.zeros(3, 5, 15).double(), {"attn_mask": PADS[:2]}, ValueError, "attn_mask"),
    (torch.zeros(3, 5, 15).double(), {"rope": torch.zeros(1, 5, 2)}, TypeError, "rope"),
    (torch.zeros(3, 5, 15).double(), {"rope": (torch.zeros(1, 4, 2),) * 2}, ValueError, "rope"),
    (torch.zeros(3, 5, 15).double(), {"cache": []}, TypeError, "cache"),
])
def test_wrong_input_is_refused(x, options, error, words):
    layer, _ = layer_and_x()
    with pytest.raises(error, match=rf"\b{words}\b"):
        layer(x, **options)


def test_arguments_are_left_alone():
    layer, x = layer_and_x()
    weight, rope, mask = torch.randn(15).double(), rope_tables(torch.arange(5)), torch.randn(6, 5, 5).double()
    inputs = x, weight, *rope, mask
    before = [t.clone() for t in inputs]
    rms_norm(x, weight, 1e-5)
    layer.mlp(x)
    for weights_too in (False, True):
        layer(x, rope=rope, attn_mask=mask, return_weights=weights_too)
    assert all(map(torch.equal, inputs, before))


def test_dropout_is_that_of_the_weights_and_in_training_only():
    layer, x = layer_and_x(dropout=0.5)
    assert layer.self_attn.dropout.p == 0.5 and layer.self_attn.out_dropout.p == 0
    assert_eval_deterministic(layer, x)
    plain, _ = layer_and_x()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain(x))
    layer.train().self_attn.dropout.p = 1.0                  # no weight is left: the network only
    assert_close(layer(x), x + layer.mlp(layer.post_attention_layernorm(x)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_runs_in_every_dtype_and_under_autocast(dtype):
    exact, x = layer_and_x()
    want, size = exact(x, attn_mask=PADS), exact(x, attn_mask=PADS).abs().max()
    layer = copy.deepcopy(exact).to(dtype)
    for weights_too in (False, True):
        out = layer(x.to(dtype), attn_mask=PADS, return_weights=weights_too)
        out = out[0] if weights_too else out
        assert out.dtype == dtype and (out.double() - want).abs().max() < 20 * torch.finfo(dtype).eps * size
    if dtype != torch.float32:
        with torch.autocast("cpu", dtype=dtype):
            out = exact.float()(x.float(), attn_mask=PADS)
            assert RMSNorm(15)(x.float()).dtype == torch.float32
            assert RMSNorm(15)(x.to(dtype)).dtype == dtype
        assert out.dtype == torch.float32                    # the stream stays wide
        assert (out.double() - want).abs().max() < 20 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", HALVES)
def test_layer_as_precise_as_pytorchs_pieces(dtype):
    """Error at most twice that of the same layer with PyTorch's own norm."""
    exact, _ = layer_and_x(d_model=32, head_dim=8, d_ff=48)
    x = torch.randn(16, 5, 32).to(dtype)
    ours = copy.deepcopy(exact).to(dtype)
    theirs = copy.deepcopy(ours)
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = nn.RMSNorm(32, eps=1e-5).to(dtype)
        norm.load_state_dict(getattr(ours, name).state_dict())
        setattr(theirs, name, norm)
    truth = copy.deepcopy(ours).double()(x.double())
    errors = [(f(x).double() - truth).abs().max() for f in (ours, theirs)]
    assert errors[0] <= 2 * errors[1] + 1e-5


def test_life_of_a_layer():
    layer, x = layer_and_x(dropout=0.1)
    layer.eval()
    other, _ = layer_and_x(dropout=0.1)
    other.load_state_dict(layer.state_dict())
    for same in (other.eval(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(same(x), layer(x))
    assert_close(torch.vmap(layer)(x), layer(x))
    zero = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    assert torch.equal(torch.func.functional_call(layer, zero, (x,)), x)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in layer.named_parameters()}
    both = torch.vmap(lambda ps: torch.func.functional_call(layer, ps, (x,)))(stacked)
    assert_close(both[0], layer(x)) and (both[0] - both[1]).abs().max() > 0.1
    before = set(vars(layer))
    layer(x, return_weights=True)
    assert set(vars(layer)) == before        # nothing is kept


@pytest.mark.slow
def test_one_program_for_prompts_and_one_for_tokens():
    torch.compiler.reset()
    layer, x = layer_and_x(9, 2)
    programs = []

    def count(graph, inputs):
        programs.append(graph)
        return graph.forward
    compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=True)
    with torch.no_grad():
        want = layer(x)
        for prompt in (5, 7, 3):             # not 4: sizes that are equal at first become one, and head_dim is fixed
            cache = KVCache(2, 2, 9, 4, dtype=torch.float64)
            parts = [compiled(part, cache=cache) for part in x.split([prompt] + [1] * (9 - prompt), 1)]
            assert_close(torch.cat(parts, 1), want)
    assert len(programs) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("Hkv", [1, 2, 6])
def test_exports_with_free_length(Hkv):
    layer, x = layer_and_x(num_kv_heads=Hkv)
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=64)},))
    longer = torch.randn(3, 9, 15).double()
    assert_close(program.module()(longer), layer(longer))
