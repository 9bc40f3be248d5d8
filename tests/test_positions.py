"""Positions: against transformers' tables, turns and Llama layer, complex numbers, and plain loops."""
import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import HALVES
from torch import nn
from torch.testing import assert_close

from attn_nb.causal import causal_mask, padding_mask
from attn_nb.grouped_query import GroupedQueryAttention
from attn_nb.positions import apply_rotary, convert_rotary_layout, rope_cos_sin, sinusoidal_positions
from attn_nb.testing import assert_as_precise, assert_causal, assert_parity

OLD = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, OLD: 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, OLD: 4096}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, OLD: 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
RULES = {
    "none": None, "default": {"rope_type": "default"}, "default, theta": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": LINEAR, "linear by 1": {**LINEAR, "factor": 1}, "linear by 2.5": {**LINEAR, "factor": 2.5},
    "llama3": LLAMA3, "llama3 by 32": {**LLAMA3, "factor": 32.0, "rope_theta": 500000.0},
    "llama3, other ends": {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 16.0, OLD: 1024},
    "yarn": YARN, "yarn by 40": {**YARN, "factor": 40, "rope_theta": 1e6}, "yarn by 1": {**YARN, "factor": 1.0},
    "yarn, betas": {**YARN, "beta_fast": 16, "beta_slow": 2}, "yarn, long ramp": {**YARN, "beta_fast": 500.0, "beta_slow": 0.1},
    "yarn, a ramp beyond the last pair": {**YARN, "beta_slow": 1e-30},
    "yarn, mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.3}, "yarn, half an mscale": {**YARN, "mscale": 0.707},
    "yarn, mscale 0": {**YARN, "mscale": 0.707, "mscale_all_dim": 0},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.7, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, truncate": {**YARN, "truncate": False}, "yarn, short": {**YARN, OLD: 40}, "yarn, tiny": {**YARN, OLD: 2},
    "yarn, None": {**YARN, "beta_fast": None, "attention_factor": None, "truncate": True},
}


def fresh(value):
    """The same word as another object, as a file has it."""
    return value.encode().decode() if isinstance(value, str) else value


def config(head_dim, scaling, theta=10000.0, max_len=4096):
    from transformers import LlamaConfig

    scaling = {k: v for k, v in (scaling or {}).items() if v is not None}
    if "type" in scaling:
        scaling["rope_type"] = scaling.pop("type")
    parameters = {"rope_type": "default", "rope_theta": theta, **scaling}
    if parameters["rope_type"] == "dynamic":
        max_len = parameters.pop(OLD)
    made = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=max_len,
                       rope_parameters=parameters)
    made.head_dim = head_dim
    return made


def library_tables(positions, head_dim, scaling, theta=10000.0):
    """transformers' cos and sin, one column for each pair."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rows = positions if positions.dim() == 2 else positions[None]
    cos, sin = LlamaRotaryEmbedding(config(head_dim, scaling, theta))(torch.zeros(1), rows)
    half = head_dim // 2
    assert torch.equal(cos[..., :half], cos[..., half:])
    return cos[..., :half], sin[..., :half]


def library_frequencies(head_dim, scaling, theta=10000.0, seq_len=None):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    made = config(head_dim, scaling, theta)
    return ROPE_INIT_FUNCTIONS[made.rope_parameters["rope_type"]](made, seq_len=seq_len)


# --- sinusoids

@given(length=st.integers(0, 40), D=st.integers(1, 21))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_sinusoids_are_the_papers(length, D):
    got = sinusoidal_positions(length, D)
    want = [[(math.sin, math.cos)[c % 2](p / 10000 ** ((c - c % 2) / D)) for c in range(D)] for p in range(length)]
    assert got.shape == (length, D) and got.dtype == torch.float32 and got.is_contiguous()
    assert_close(got, torch.tensor(want, dtype=torch.float64).float().reshape(length, D), rtol=0, atol=1e-7)


def test_sinusoids_are_those_of_transformers():
    """GPT-J puts all sines first; and its float32 angles are less exact than ours."""
    from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

    theirs, ours = create_sinusoidal_positions(300, 16), sinusoidal_positions(300, 16)
    sorted_ours = torch.cat([ours[:, ::2], ours[:, 1::2]], 1)
    assert_close(sorted_ours, theirs, rtol=0, atol=5e-5)
    assert (ours - theirs).abs().max() > 1


def test_sinusoids_shift_by_a_matrix_and_know_distances():
    pe = sinusoidal_positions(2000, 64).double()
    products = pe @ pe.T
    for d in (0, 1, 50, 1500):
        assert products.diagonal(d).std() < 1e-5 and (products.diagonal(d) - products.diagonal(-d)).abs().max() < 1e-5
    assert_close(products.diagonal(), torch.full((2000,), 32.0).double(), rtol=0, atol=1e-5)
    far = sinusoidal_positions(1_000_001, 8)[-1]
    want = [f(10 ** 6 / 10000 ** (i / 4)) for i in range(4) for f in (math.sin, math.cos)]
    assert_close(far, torch.tensor(want), rtol=0, atol=1e-7)


@pytest.mark.parametrize("args, error, words", [
    ((-1, 4), ValueError, "length"), ((4, 0), ValueError, "d_model"),
    ((4.0, 4), TypeError, "length"), ((4, True), TypeError, "d_model")])
def test_sinusoids_refuse(args, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        sinusoidal_positions(*args)


@pytest.mark.slow
def test_sinusoids_on_other_devices_and_compiled():
    assert sinusoidal_positions(4, 6, device="meta").device.type == "meta"
    compiled = torch.compile(sinusoidal_positions, fullgraph=True)
    assert_close(compiled(9, 6), sinusoidal_positions(9, 6))


# --- tables

@pytest.mark.parametrize("head_dim", [4, 32, 64, 128])
@pytest.mark.parametrize("name", RULES)
def test_tables_are_those_of_transformers(name, head_dim):
    scaling = RULES[name]
    positions = torch.tensor([[0, 1, 2, 3, 60, 61], [5, 4095, 4096, 8191, 16384, 131071]])
    before = copy.deepcopy(scaling)
    for p in (positions, positions[1], positions.int()):
        got, want = rope_cos_sin(p, head_dim, scaling=scaling), library_tables(p, head_dim, scaling)
        for a, b in zip(got, want):
            assert a.dtype == torch.float32 and a.shape == (2 if p.dim() == 2 else 1, 6, head_dim // 2)
            assert_close(a, b, rtol=0, atol=1e-7)
    assert scaling == before                                      # the caller's dict stays
    if scaling:
        old = {("type" if k == "rope_type" else k): fresh(v) for k, v in scaling.items()}
        for a, b in zip(rope_cos_sin(positions, head_dim, scaling=old), rope_cos_sin(positions, head_dim, scaling=scaling)):
            assert torch.equal(a, b)
    if name not in ("none", "default", "linear by 1", "yarn by 1"):          # control: without the rule it is another table
        plain, theirs = rope_cos_sin(positions, head_dim), library_tables(positions, head_dim, scaling)
        far = max((a - b).abs().max() for a, b in zip(plain, theirs))
        assert far > 1e-5 or head_dim == 4


@pytest.mark.parametrize("theta", [3.0, 100.0, 10000.0, 500000.0, 1e6])
@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3, YARN, {**YARN, OLD: 900}])
@pytest.mark.parametrize("dim", [4, 64])
def test_theta(theta, scaling, dim):
    """With a small theta yarn's ramp ends at the last pair, or begins after its end."""
    p = torch.arange(0, 9000, 37)
    want = library_tables(p, dim, scaling, theta)
    given = rope_cos_sin(p, dim, theta, scaling)
    named = rope_cos_sin(p, dim, scaling={"rope_theta": theta, **(scaling or {})})
    both = rope_cos_sin(p, dim, theta, {"rope_theta": theta, **(scaling or {})})
    for a, b, c, d in zip(given, named, both, want):
        assert_close(a, d, rtol=0, atol=1e-7)
        assert torch.equal(a, b) and torch.equal(a, c)
    other = 20000.0 if theta != 20000.0 else 30000.0
    assert (rope_cos_sin(p, dim, other, scaling)[0] - want[0]).abs().max() > 1e-2


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("head_dim", [4, 32, 128])
@pytest.mark.parametrize("top", [3, 63, 64, 65, 200, 5000])
def test_dynamic_is_that_of_transformers(top, head_dim, factor):
    """The table depends on the largest position, and nothing happens up to the old length."""
    scaling = {**DYNAMIC, "rope_type": fresh("dynamic"), "factor": factor}
    positions = torch.tensor([[0, 1, top], [2, 2, 2]])
    inv_freq, one = library_frequencies(head_dim, scaling, seq_len=top + 1)
    angles = positions[..., None].float() * inv_freq
    got = rope_cos_sin(positions, head_dim, scaling=scaling)
    assert one == 1.0
    assert_close(got[0], angles.cos(), rtol=0, atol=1e-7)
    assert_close(got[1], angles.sin(), rtol=0, atol=1e-7)
    module = library_tables(positions, head_dim, scaling)              # its theta is a float32 tensor
    for a, b in zip(got, module):
        assert_close(a, b, rtol=0, atol=1e-6 * max(top, 1))
    plain = rope_cos_sin(positions, head_dim)
    assert torch.equal(got[0], plain[0]) == (top < 64)            # even by factor 1 it grows: theta * T / L
    if top >= 200:
        assert (got[0] - plain[0]).abs().max() > 1e-3


def test_dynamic_of_no_positions():
    assert rope_cos_sin(torch.zeros(0).long(), 8, scaling=DYNAMIC)[0].shape == (1, 0, 4)
    assert rope_cos_sin(torch.zeros(2, 0).long(), 8)[0].shape == (2, 0, 4)


@pytest.mark.parametrize("part", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3, YARN, DYNAMIC])
def test_partial_rotary_factor(part, scaling):
    """head_dim is the whole head if the dict names the part, else the part."""
    p = torch.tensor([0, 1, 7, 50, 300])
    scaling = {**scaling, "partial_rotary_factor": part}
    inv_freq, factor = library_frequencies(64, scaling, seq_len=301)
    angles = p[:, None].float() * inv_freq
    got = rope_cos_sin(p, 64, scaling=scaling)
    assert got[0].shape == (1, 5, int(32 * part))
    assert_close(got[0][0], angles.cos() * factor, rtol=0, atol=1e-7)
    assert_close(got[1][0], angles.sin() * factor, rtol=0, atol=1e-7)
    del scaling["partial_rotary_factor"]
    for a, b in zip(got, rope_cos_sin(p, int(64 * part), scaling=scaling)):
        assert torch.equal(a, b)


@given(p=st.lists(st.integers(0, 10 ** 5), min_size=1, max_size=4), half=st.integers(1, 9),
       theta=st.sampled_from([3.0, 1e4, 1e6]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_plain_tables_against_doubles(p, half, theta):
    """The angle's own rounding and no more: position / 2**22 radians."""
    cos, sin = rope_cos_sin(torch.tensor(p), 2 * half, theta)
    for row, position in enumerate(p):
        for i in range(half):
            angle = position * theta ** (-i / half)
            assert abs(cos[0, row, i] - math.cos(angle)) < 1e-6 + angle * 2 ** -21
            assert abs(sin[0, row, i] - math.sin(angle)) < 1e-6 + angle * 2 ** -21


def test_large_positions_cost_what_the_docstring_says():
    positions = torch.arange(99_900, 100_000)
    exact = positions[:, None].double() * 10000.0 ** (-torch.arange(0, 128, 2).double() / 128)
    cos, sin = rope_cos_sin(positions, 128)
    error = torch.atan2(sin[0].double(), cos[0].double()) - exact
    error = (error + math.pi) % (2 * math.pi) - math.pi
    assert 1e-4 < error.abs().max() < 0.02


def test_tables_ignore_the_models_dtype():
    before = torch.get_default_dtype()
    want = rope_cos_sin(torch.arange(5000), 64, scaling=YARN)
    try:
        torch.set_default_dtype(torch.float64)
        wide = rope_cos_sin(torch.arange(5000), 64, scaling=YARN)
        torch.set_default_dtype(torch.bfloat16)
        low = rope_cos_sin(torch.arange(5000), 64, scaling=YARN)
    finally:
        torch.set_default_dtype(before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = rope_cos_sin(torch.arange(5000), 64, scaling=YARN)
    for tables in (wide, low, cast):
        for a, b in zip(tables, want):
            assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_positions_of_any_integer_dtype(dtype):
    for a, b in zip(rope_cos_sin(torch.arange(100).to(dtype), 16), rope_cos_sin(torch.arange(100), 16)):
        assert torch.equal(a, b)


P = torch.arange(4)


@pytest.mark.parametrize("args, error, words", [
    ((P.float(), 8), TypeError, "positions"),
    ((P.bool(), 8), TypeError, "positions"),
    (([0, 1], 8), TypeError, "positions"), (((None,), 8), TypeError, "positions"),
    ((P[0], 8), ValueError, "positions"),
    ((P.view(1, 2, 2), 8), ValueError, "positions"),
    ((P, 7), ValueError, "head_dim"),
    ((P, 0), ValueError, "head_dim"), ((P, 8.0), TypeError, "head_dim"),
    ((P, 8, 1.0), ValueError, "theta"),
    ((P, 8, math.inf), ValueError, "theta"), ((P, 8, math.nan), ValueError, "theta"),
    ((P, 8, "x"), TypeError, "theta"), ((P, 8, True), TypeError, "theta"),
    ((P, 8, 2e4, {"rope_theta": 5e5}), ValueError, "rope_theta"),
    ((P, 8, 1e4, {"rope_theta": 0.5}), ValueError, "rope_theta"),
    ((P, 8, 1e4, "linear"), TypeError, "scaling"),
    ((P, 8, 1e4, {"type": "longrope"}), ValueError, "scaling"),
    ((P, 8, 1e4, {"type": "linear", "rope_type": "yarn", "factor": 2.0}), ValueError, r"scaling\b.*'yarn'.*'linear"),
    ((P, 8, 1e4, {"type": ["linear"]}), ValueError, "scaling"),
    ((P, 8, 1e4, {"type": 3, "rope_type": "yarn"}), ValueError, r"scaling\b.*'yarn'.*\b3"),
    ((P, 8, 1e4, {"factor": 2.0}), ValueError, "factor"),
    ((P, 8, 1e4, {"type": "linear"}), ValueError, "factor"),
    ((P, 8, 1e4, {"type": "linear", "factor": None}), ValueError, "factor"),
    ((P, 8, 1e4, {**LINEAR, "beta_fast": 3}), ValueError, "beta_fast"),
    ((P, 8, 1e4, {**LINEAR, "factor": 0.9}), ValueError, "factor"),
    ((P, 8, 1e4, {**LINEAR, "factor": math.inf}), ValueError, "factor"),
    ((P, 8, 1e4, {**LINEAR, "factor": math.nan}), ValueError, "factor"),
    ((P, 8, 1e4, {**LINEAR, "factor": "2"}), TypeError, "factor"),
    ((P, 8, 1e4, {**LLAMA3, "low_freq_factor": 4.0}), ValueError, "low_freq_factor"),
    ((P, 8, 1e4, {**LLAMA3, "low_freq_factor": 0.0}), ValueError, "low_freq_factor"),
    ((P, 8, 1e4, {"type": "llama3", "factor": 2.0}), ValueError, "low_freq_factor"),
    ((P, 8, 1e4, {"type": "yarn", "factor": 2.0}), ValueError, OLD),
    ((P, 8, 1e4, {"type": "dynamic", "factor": 2.0}), ValueError, OLD),
    ((P, 2, 1e4, {**DYNAMIC, "rope_type": fresh("dynamic")}), ValueError, "head_dim"),
    ((P, 8, 1e4, {**YARN, "beta_slow": 33}), ValueError, "beta_slow"),
    ((P, 8, 1e4, {**YARN, "beta_fast": 0.5}), ValueError, "beta_fast"),
    ((P, 8, 1e4, {**LINEAR, "factor": 2 ** 63 + 1}), ValueError, "factor"),
    ((P, 8, 1e4, {**YARN, "truncate": 1}), TypeError, "truncate"),
    ((P, 8, 1e4, {**YARN, "mscale": -1.0}), ValueError, "mscale"),
    ((P, 8, 1e4, {**YARN, "attention_factor": 0}), ValueError, "attention_factor"),
    ((P, 8, 1e4, {**YARN, OLD: -3}), ValueError, OLD),
    ((P, 8, 1e4, {"partial_rotary_factor": 0.0}), ValueError, "partial_rotary_factor"),
    ((P, 8, 1e4, {"partial_rotary_factor": 2.0}), ValueError, "partial_rotary_factor"),
    ((P, 8, 1e4, {"partial_rotary_factor": 0.4}), ValueError, "partial_rotary_factor"),
    ((P, 8, 1e4, {"full_attention": {"rope_type": "default"}}), ValueError, "full_attention"),
    ((P.to("meta"), 8, 1e4, DYNAMIC), ValueError, "positions"),
])
def test_tables_refuse(args, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        rope_cos_sin(*args)


class Tables(nn.Module):
    def __init__(self, scaling):
        super().__init__()
        self.scaling = scaling

    def forward(self, positions):
        return rope_cos_sin(positions, 32, scaling=self.scaling)


@pytest.mark.slow
@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3, YARN], ids=["default", "linear", "llama3", "yarn"])
def test_tables_compile_and_export(scaling):
    positions = torch.arange(40).view(2, 20)
    want = rope_cos_sin(positions, 32, scaling=scaling)
    exported = torch.export.export(Tables(scaling), (positions,), dynamic_shapes=(
        {1: torch.export.Dim("T", min=2, max=4096)},)).module()
    for made in (torch.compile(Tables(scaling), fullgraph=True)(positions), exported(positions)):
        for a, b in zip(made, want):
            assert_close(a, b, rtol=0, atol=1e-5)
    assert exported(positions[:, :7])[0].shape == (2, 7, 16)
    meta = rope_cos_sin(positions.to("meta"), 32, scaling=scaling)
    assert all(t.is_meta and t.shape == (2, 20, 16) for t in meta)
    dynamic = {**DYNAMIC, OLD: 8}
    with pytest.raises(Exception, match=r"\bpositions\b.*\bdynamic\b"):
        torch.compile(Tables(dynamic), fullgraph=True)(positions)


# --- the turn

def by_complex(x, positions, theta=10000.0, interleaved=False, rotary_dim=None):
    """x (B, H, T, Dh) in float64, each point times exp(i p w)."""
    width = x.shape[-1] if rotary_dim is None else rotary_dim
    head, rest = x.double()[..., :width], x.double()[..., width:]
    w = theta ** (-torch.arange(0, width, 2).double() / width)
    turn = torch.polar(torch.ones(()).double(), positions.double()[:, None, :, None] * w)
    if interleaved:
        z = torch.complex(head[..., ::2], head[..., 1::2]) * turn
        return torch.cat([torch.stack([z.real, z.imag], -1).flatten(-2), rest], -1)
    z = torch.complex(head[..., :width // 2], head[..., width // 2:]) * turn
    return torch.cat([z.real, z.imag, rest], -1)


@given(B=st.integers(1, 3), H=st.integers(1, 3), T=st.integers(1, 4), half=st.integers(1, 4), rest=st.integers(0, 3),
       interleaved=st.booleans(), own=st.booleans(), start=st.integers(0, 500), theta=st.sampled_from([10000.0, 50.0]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_turning_is_complex_multiplication(B, H, T, half, rest, interleaved, own, start, theta):
    x = torch.randn(B, H, T, 2 * half + rest, dtype=torch.float64)
    positions = start + torch.randint(0, 30, (B if own else 1, T))
    cos, sin = rope_cos_sin(positions if own else positions[0], 2 * half, theta)
    got = apply_rotary(x, cos, sin, interleaved=interleaved, rotary_dim=2 * half)
    want = by_complex(x, positions, theta, interleaved, 2 * half)
    assert got.shape == x.shape and got.dtype == x.dtype
    assert_close(got, want, rtol=0, atol=2e-4)                    # float32 angles up to 530
    assert torch.equal(got[..., 2 * half:], x[..., 2 * half:])
    assert_close(got.norm(dim=-1), x.norm(dim=-1), rtol=0, atol=1e-5)


@given(shift=st.integers(0, 3000), m=st.integers(0, 50), n=st.integers(0, 50), interleaved=st.booleans(),
       name=st.sampled_from(["default", "linear", "llama3", "yarn"]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_score_knows_the_distance_only(shift, m, n, interleaved, name):
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)

    def score(m, n):
        (qc, kc), (qs, ks) = (t[0, :, None, None].unbind(0) for t in rope_cos_sin(
            torch.tensor([m, n]), 32, scaling=RULES[name]))
        turned = (apply_rotary(x, c[None], s[None], interleaved=interleaved)
                  for x, c, s in ((q, qc[0], qs[0]), (k, kc[0], ks[0])))
        return torch.mul(*turned).sum()
    assert abs(score(m, n) - score(m + shift, n + shift)) < 0.03
    if m == n:
        factor = {"yarn": (0.1 * math.log(4) + 1) ** 2}.get(name, 1.0)
        assert_close(score(m, n), (q * k).sum() * factor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("B, T", [(1, 5), (2, 5), (2, 300)])
def test_half_split_is_llamas(B, T):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 3, T, 8).double(), torch.randn(2, 1, T, 8).double()
    positions = torch.randint(0, 99, (B, T))
    cos, sin = rope_cos_sin(positions, 8)
    twice = [torch.cat([t, t], -1).double() for t in (cos, sin)]
    for got, want in zip((apply_rotary(x, cos, sin) for x in (q, k)), apply_rotary_pos_emb(q, k, *twice)):
        assert_close(got, want, rtol=0, atol=1e-12)
    assert (apply_rotary(q, cos, sin, interleaved=True) - apply_rotary_pos_emb(q, k, *twice)[0]).abs().max() > 0.1
    assert_parity(lambda x: apply_rotary(x, cos, sin), lambda x: apply_rotary_pos_emb(x, x, *twice)[0], q)


def test_interleaved_is_gptjs():
    """Which has the axes (B, T, H, Dh), and turns the first rotary_dim numbers."""
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    x = torch.randn(2, 5, 3, 12).double()
    cos, sin = rope_cos_sin(torch.randint(0, 99, (2, 5)), 8)

    def theirs(x):
        return torch.cat([apply_rotary_pos_emb(x[..., :8], sin.double(), cos.double()), x[..., 8:]], -1).transpose(1, 2)

    def ours(x, **options):
        return apply_rotary(x.transpose(1, 2), cos, sin, **{"interleaved": True, **options})

    assert_parity(ours, theirs, x)
    assert_parity(lambda x: ours(x, rotary_dim=8), theirs, x)
    assert (ours(x, interleaved=False) - theirs(x)).abs().max() > 0.1


def test_which_models_turn_a_part_of_the_head():
    """What the chapter says of GPT-J, GPT-NeoX and Phi; NeoX is half-split."""
    from transformers import GPTJConfig, GPTNeoXConfig, PhiConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

    j = GPTJConfig()
    assert 0 < j.rotary_dim < j.n_embd // j.n_head
    assert GPTNeoXConfig().rope_parameters["partial_rotary_factor"] < 1 > PhiConfig().rope_parameters["partial_rotary_factor"]
    x, (cos, sin) = torch.randn(2, 3, 5, 12), rope_cos_sin(torch.arange(5), 12, scaling={"partial_rotary_factor": 1 / 3})
    twice = [torch.cat([t, t], -1) for t in (cos, sin)]
    assert_close(apply_rotary(x, cos, sin, rotary_dim=4)[..., :4], apply_rotary_pos_emb(x[..., :4], x[..., :4], *twice)[0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_as_precise_as_transformers(dtype, interleaved):
    """At most twice the error of the same turn done in the low precision."""
    cos, sin = rope_cos_sin(torch.arange(50), 32)

    def theirs(x):
        c, s = cos.to(x.dtype), sin.to(x.dtype)
        if interleaved:
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
        a, b = x[..., :16], x[..., 16:]
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    x = torch.randn(2, 3, 50, 32)
    assert_as_precise(lambda x: apply_rotary(x, cos, sin, interleaved=interleaved), theirs, x, dtype=dtype)
    low = x.to(dtype)
    exact = by_complex(low, torch.arange(50)[None], interleaved=interleaved)
    error = (apply_rotary(low, cos, sin, interleaved=interleaved).double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-4).all()          # one rounding


@pytest.mark.parametrize("interleaved", [False, True])
def test_any_leading_axes_and_strides(interleaved):
    x = torch.randn(2, 3, 2, 5, 8).transpose(-1, -2).contiguous().transpose(-1, -2)
    cos, sin = rope_cos_sin(torch.randint(0, 50, (3, 5)), 8)
    got = apply_rotary(x, cos, sin, interleaved=interleaved)
    for a in range(2):
        assert_close(got[a], apply_rotary(x[a], cos, sin, interleaved=interleaved))
        for b in range(3):
            one = apply_rotary(x[a, b], cos[b:b + 1], sin[b:b + 1], interleaved=interleaved)
            assert one.shape == x[a, b].shape
            assert_close(one, got[a, b])
    assert apply_rotary(x[:, :, :, :0], cos[:, :0], sin[:, :0], interleaved=interleaved).shape == (2, 3, 2, 0, 8)
    assert apply_rotary(x[:, :0], *(t[:1] for t in (cos, sin)), interleaved=interleaved).shape == (2, 0, 2, 5, 8)


@pytest.mark.parametrize("interleaved", [False, True])
def test_arguments_are_left_alone_and_nothing_is_shared(interleaved):
    x = torch.randn(2, 3, 5, 8)
    cos, sin = rope_cos_sin(torch.zeros(5).long(), 4)            # turns by 0
    before = [t.clone() for t in (x, cos, sin)]
    out = apply_rotary(x, cos, sin, interleaved=interleaved)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()
    out.zero_()
    assert all(map(torch.equal, (x, cos, sin), before))


COS, SIN = rope_cos_sin(torch.arange(5), 8)
X = torch.randn(2, 3, 5, 8)


@pytest.mark.parametrize("args, options, error, words", [
    (([1.0], COS, SIN), {}, TypeError, "x"),
    ((X.long(), COS, SIN), {}, TypeError, "x"),
    ((X, None, SIN), {}, TypeError, "cos"),
    ((X, COS, SIN.long()), {}, TypeError, "sin"),
    ((X, COS.to("meta"), SIN), {}, TypeError, "cos"),
    ((X[0, 0], COS, SIN), {}, ValueError, "x"),
    ((X, COS[:, :4], SIN[:, :4]), {}, ValueError, "cos"),
    ((X, COS, SIN[:, :4]), {}, ValueError, "sin"),
    ((X, COS[..., :3], SIN), {}, ValueError, "cos"),
    ((X, COS[0], SIN[0]), {}, ValueError, "cos"),
    ((X, COS.expand(3, 5, 4), SIN.expand(3, 5, 4)), {}, ValueError, "cos"),
    ((X[0], COS.expand(3, 5, 4), SIN.expand(3, 5, 4)), {}, ValueError, "cos"),
    ((X[..., :7], COS, SIN), {}, ValueError, "cos"),
    ((X, COS[..., :0], SIN[..., :0]), {}, ValueError, "cos"),
    ((X, COS, SIN), {"rotary_dim": 4}, ValueError, "rotary_dim"),
    ((X, COS, SIN), {"rotary_dim": 8.0}, TypeError, "rotary_dim"),
    ((X, COS, SIN), {"interleaved": 1}, TypeError, "interleaved"),
])
def test_turning_refuses(args, options, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        apply_rotary(*args, **options)


class Turn(nn.Module):
    def __init__(self, interleaved):
        super().__init__()
        self.interleaved = interleaved

    def forward(self, x, positions):
        return apply_rotary(x, *rope_cos_sin(positions, 6), interleaved=self.interleaved)


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_compiles_exports_and_maps(interleaved):
    x, positions = torch.randn(2, 3, 5, 8), torch.randint(0, 99, (2, 5))
    module = Turn(interleaved)
    want = module(x, positions)
    exported = torch.export.export(module, (x, positions)).module()
    assert_close(torch.compile(module, fullgraph=True)(x, positions), want)
    assert_close(exported(x, positions), want)
    assert module(x.to("meta"), positions.to("meta")).is_meta
    cos, sin = rope_cos_sin(positions[0], 6)
    mapped = torch.vmap(lambda x: apply_rotary(x, cos, sin, interleaved=interleaved))(x)
    assert_close(mapped, apply_rotary(x, cos, sin, interleaved=interleaved))
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin, interleaved=interleaved),
                                    torch.randn(2, 2, 5, 8).double().requires_grad_())


# --- the two layouts of a checkpoint

@pytest.mark.parametrize("H, Dh, D", [(1, 2, 3), (3, 8, 24), (2, 6, 5)])
def test_layouts_are_those_of_the_conversion(H, Dh, D):
    """Against the reshape by which Meta's Llama weights were converted for transformers."""
    weight = torch.randn(H * Dh, D)
    theirs = weight.view(H, Dh // 2, 2, D).transpose(1, 2).reshape(H * Dh, D)
    ours = convert_rotary_layout(weight, H, to="half_split")
    assert torch.equal(ours, theirs) and ours.data_ptr() != weight.data_ptr()
    assert torch.equal(convert_rotary_layout(ours, H, to="interleaved"), weight)
    assert torch.equal(convert_rotary_layout(weight[:, 0], H, to="half_split"), theirs[:, 0])
    assert Dh == 2 or not torch.equal(convert_rotary_layout(weight, H, to="interleaved"), theirs)
    if H > 1:
        assert not torch.equal(convert_rotary_layout(weight, 1, to="half_split"), theirs)


@pytest.mark.parametrize("rotary_dim", [None, 0, 2, 4, 8])
def test_converted_weights_give_the_same_scores(rotary_dim):
    x, weights = torch.randn(2, 5, 6).double(), torch.randn(2, 24, 6).double()
    width = 8 if rotary_dim is None else rotary_dim

    def scores(weights, interleaved):
        heads = [(x @ w.T).unflatten(-1, (3, 8)).transpose(1, 2) for w in weights]
        if width:
            cos, sin = rope_cos_sin(torch.arange(5), width)
            heads = [apply_rotary(h, cos, sin, interleaved=interleaved) for h in heads]
        return heads[0] @ heads[1].mT

    for to, interleaved in (("half_split", True), ("interleaved", False)):
        moved = [convert_rotary_layout(w, 3, to=to, rotary_dim=rotary_dim) for w in weights]
        assert_close(scores(moved, not interleaved), scores(weights, interleaved), rtol=0, atol=1e-9)
        if width > 2:
            assert (scores(weights, not interleaved) - scores(weights, interleaved)).abs().max() > 0.1


@pytest.mark.parametrize("args, options, error, words", [
    (([1], 1), {"to": "half_split"}, TypeError, "weight"),
    ((torch.zeros(8, 2), 3), {"to": "half_split"}, ValueError, "num_heads"),
    ((torch.zeros(()), 1), {"to": "half_split"}, ValueError, "num_heads"),
    ((torch.zeros(0, 3), 1), {"to": "half_split"}, ValueError, "num_heads"),
    ((torch.zeros(8, 2), 0), {"to": "half_split"}, ValueError, "num_heads"),
    ((torch.zeros(8, 2), 2), {"to": "meta"}, ValueError, r"to\b.*'meta"),
    ((torch.zeros(6, 2), 2), {"to": "half_split"}, ValueError, "rotary_dim"),
    ((torch.zeros(8, 2), 2), {"to": "half_split", "rotary_dim": 6}, ValueError, "rotary_dim"),
    ((torch.zeros(8, 2), 2), {"to": "half_split", "rotary_dim": 2.0}, TypeError, "rotary_dim"),
])
def test_conversion_refuses(args, options, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        convert_rotary_layout(*args, **options)


# --- the layer

def lively_pair(d_model, H, Hkv, Dh, scaling, bias=False):
    """transformers' layer and ours with its weights; scores have a standard deviation above 1."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    made = config(Dh, scaling)
    made.hidden_size, made.num_attention_heads, made.num_key_value_heads = d_model, H, Hkv
    made.attention_bias, made._attn_implementation = bias, "sdpa"
    theirs = LlamaAttention(made, 0).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 1.4 * p.shape[-1] ** -0.5 if p.dim() == 2 else 0.5)
    ours = GroupedQueryAttention(d_model, H, Hkv, head_dim=Dh, qkv_bias=bias, out_bias=bias).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, made


def additive(may):
    return torch.zeros(may.shape, dtype=torch.float64).masked_fill(~may, -torch.inf)


LAYER_RULES = ["none", "linear", "llama3, other ends", "yarn, short", "dynamic"]


@pytest.mark.parametrize("name", LAYER_RULES)
@pytest.mark.parametrize("H, Hkv, Dh, bias", [(6, 6, 4, False), (6, 2, 8, True), (6, 3, 10, False), (4, 1, 6, True)])
def test_layer_equals_hugging_face(name, H, Hkv, Dh, bias):
    """Left-padded texts with their own positions; outputs and all gradients. The usual slips miss by 100 times."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {**RULES, "dynamic": {**DYNAMIC, OLD: 4}}[name]
    theirs, ours, made = lively_pair(24, H, Hkv, Dh, scaling, bias)
    x = torch.randn(3, 9, 24, dtype=torch.float64)
    real = torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] + [1] * 8])
    own = (real.cumsum(-1) - 1).clamp(min=0)
    own[1] += 30                                                   # the others start at 0
    may = padding_mask(real) & causal_mask(9)
    seen = real.bool()[..., None]
    reference = LlamaRotaryEmbedding(made)(x, own)

    def library(x):
        return theirs(x, reference, additive(may | torch.eye(9).bool()))[0] * seen

    def run(x, positions=own, interleaved=False, layer=ours):
        cos, sin = rope_cos_sin(positions, Dh, scaling=scaling)
        if interleaved:
            sorted_rows = {k: convert_rotary_layout(v, H if k[0] == "q" else Hkv, to="half_split") if k[0] in "qk" else v
                           for k, v in layer.state_dict().items()}
            layer = copy.deepcopy(layer)
            layer.load_state_dict(sorted_rows)
        return layer(x, rope=(cos, sin), attn_mask=padding_mask(real)) * seen

    bound = 1e-5
    want = library(x)
    assert (run(x) - want).abs().max() < bound
    x1, x2 = (x.clone().requires_grad_() for _ in range(2))
    weight = torch.randn(want.shape).double()
    grads = [torch.autograd.grad((fn(x_) * weight).sum(), (x_, *module.parameters()))
             for fn, x_, module in ((run, x1, ours), (library, x2, theirs))]
    for a, b in zip(*grads):
        assert (a - b).abs().max() < bound * max(1.0, b.abs().max())
    assert_close(ours(x, rope=rope_cos_sin(own, Dh, scaling=scaling), attn_mask=padding_mask(real),
                      return_weights=True)[0] * seen, run(x), rtol=0, atol=1e-9)

    no_rope = ours(x, attn_mask=padding_mask(real)) * seen
    late = own + (torch.arange(9) >= 6)                            # a decode step that is one too far
    reset = torch.where(torch.arange(9) >= 6, torch.zeros_like(own), own)
    wrong = {"the other layout": run(x, interleaved=True), "one too far": run(x, late), "offset 0": run(x, reset),
             "no rope": no_rope, "backwards": run(x, -own)}
    if scaling:
        wrong["no rule"] = ours(x, rope=rope_cos_sin(own, Dh), attn_mask=padding_mask(real)) * seen
    for slip, out in wrong.items():
        assert (out - want).abs().max() > 100 * bound, slip


def test_a_shifted_text_is_the_same():
    """Only distances count, so a start at 1000 is as good as 0 but for the rounding of angles."""
    _, ours, _ = lively_pair(24, 6, 2, 8, None)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    outs = [ours(x, rope=rope_cos_sin(torch.arange(s, s + 9), 8)) for s in (0, 1, 1000)]
    assert (outs[0] - outs[1]).abs().max() < 1e-6 and (outs[0] - outs[2]).abs().max() < 1e-3
    stretched = ours(x, rope=rope_cos_sin(2 * torch.arange(9), 8))
    assert (outs[0] - stretched).abs().max() > 0.01


class Kept:
    length, pair = 0, ()

    def update(self, k, v):
        self.pair = tuple(torch.cat(pair, 2) for pair in zip(self.pair, (k, v))) or (k, v)
        self.length = self.pair[0].shape[2]
        return self.pair


@pytest.mark.parametrize("rotary_dim", [4, 8])
@pytest.mark.parametrize("cuts", [[9], [1] * 9, [4, 3, 1, 1], [1, 8]])
def test_chunks_with_their_positions_equal_one_pass(cuts, rotary_dim):
    _, ours, _ = lively_pair(24, 6, 2, 8, None)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    real = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    own = (real.cumsum(-1) - 1).clamp(min=0)

    def chunked(x, slip=0):
        cache, parts, start = Kept(), [], 0
        for size in cuts:
            stop = start + size
            rope = rope_cos_sin(own[:, start:stop] + slip * (start > 0), rotary_dim)
            parts.append(ours(x[:, start:stop], rope=rope, cache=cache, attn_mask=padding_mask(real[:, :stop])))
            start = stop
        return torch.cat(parts, 1)

    assert_parity(chunked, lambda x: ours(x, rope=rope_cos_sin(own, rotary_dim), attn_mask=padding_mask(real)), x)
    assert len(cuts) == 1 or (chunked(x, slip=1) - chunked(x)).abs().max() > 1e-3


@pytest.mark.slow
def test_layer_stays_causal_and_compiles():
    _, ours, _ = lively_pair(24, 6, 2, 8, None)
    rope = rope_cos_sin(torch.arange(6), 8)
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    assert_causal(lambda x: ours(x, rope=rope), x)
    compiled = torch.compile(lambda x, positions: ours(x, rope=rope_cos_sin(positions, 8)), fullgraph=True)
    assert_close(compiled(x, torch.arange(6)), ours(x, rope=rope), rtol=0, atol=1e-5)


class Layer(nn.Module):
    def __init__(self, interleaved):
        super().__init__()
        self.attend, self.interleaved = GroupedQueryAttention(24, 6, 2, head_dim=8), interleaved

    def forward(self, x, positions):
        rope = rope_cos_sin(positions, 8, scaling=YARN)
        heads = x.unflatten(-1, (3, 8)).transpose(1, 2)
        return self.attend(x, rope=rope), apply_rotary(heads, *rope, interleaved=self.interleaved)


@pytest.mark.slow
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_layer_exports_and_compiles_for_any_length(own, interleaved):
    module, x, positions = Layer(interleaved).eval(), torch.randn(3, 7, 24), torch.arange(7)
    B, T = torch.export.Dim("B", min=2, max=64), torch.export.Dim("T", min=2, max=512)
    axes = {0: B, 1: T} if own else {0: T}
    positions = positions.expand(3, 7).contiguous() if own else positions
    exported = torch.export.export(module, (x, positions), dynamic_shapes=({0: B, 1: T}, axes)).module()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    longer = torch.randn(5, 19, 24), torch.randint(0, 99, (5, 19) if own else (19,))
    for made in (exported, compiled):
        for a, b in zip(made(*longer), module(*longer)):
            assert_close(a, b, rtol=1e-4, atol=1e-5)
