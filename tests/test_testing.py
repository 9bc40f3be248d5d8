"""The reusable checks: each law is broken on purpose, and the message says which and where."""
import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from peers import lively
from torch import nn

from attn_nb.testing import (
    TOLERANCE,
    _cuts,
    _gap,
    _other_token,
    _rewrite_future,
    assert_as_precise,
    assert_cache_equals_full,
    assert_causal,
    assert_eval_deterministic,
    assert_parity,
    assert_permutation_equivariant,
    assert_rows_sum_to_one,
    catches,
    tolerance,
)

# --- catches

def test_catches_prints_the_first_line(capsys):
    with catches("two"):
        raise AssertionError("one two\nthree")
    assert capsys.readouterr().out == "caught: one two\n"


def test_catches_fails_when_nothing_breaks():
    with pytest.raises(AssertionError, match="nothing was caught, wanted ValueError: words"):
        with catches("words", ValueError):
            pass


def test_catches_is_strict():
    with pytest.raises(ValueError, match="words must not be empty"):
        with catches(""):
            raise AssertionError("x")
    with pytest.raises(AssertionError, match="nothing was caught, wanted AssertionError: inner"):
        with catches("inner"):       # must not take the message of the inner one for its own
            with catches("inner"):
                pass


def test_catches_prints_empty_lines(capsys):
    with catches("x"):
        raise AssertionError("\nx")
    assert capsys.readouterr().out == "caught: \n"


def test_catches_lets_other_errors_through():
    with pytest.raises(AssertionError, match="other"):
        with catches("words"):
            raise AssertionError("other")
    with pytest.raises(TypeError):
        with catches("words"):
            raise TypeError("words")


# --- tolerance

def test_tolerance_is_one_table():
    assert TOLERANCE == {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
    for dtype, bound in TOLERANCE.items():
        assert tolerance(dtype) == bound > torch.finfo(dtype).eps
    with pytest.raises(TypeError, match="dtype must be one of .*, got torch.int64"):
        tolerance(torch.int64)


# --- helpers

def test_gap():
    inf, nan = torch.inf, torch.nan
    new, old = torch.tensor([1.0, 2.0, inf, nan, 3.0, inf, -2.0]), torch.tensor([1.0, -1.0, inf, nan, nan, 1.0, -5.0])
    assert str(_gap(new, old).tolist()) == str([0.0, 3.0, 0.0, 0.0, nan, inf, 3.0])


@pytest.mark.parametrize("size", [0.01, 1.0, 50.0])
def test_the_future_is_rewritten_by_noise_of_the_size_of_the_input(size):
    x = torch.rand(40, 50, 10) * size
    new, other = _rewrite_future(x, 7, 0)
    later, mirrored = x[..., 7:, :], other[..., 7:, :]
    assert torch.equal(other[..., :7, :], x[..., :7, :]) and torch.equal(mirrored.sign(), -later.sign())
    assert (mirrored.abs() >= later.abs()).all() and (mirrored.abs() > 1.5 * later.abs()).any()
    change = (new - x)[:, 7:] / max(1.0, x.max().item())
    assert torch.equal(new[:, :7], x[:, :7])
    assert abs(change.mean()) < 0.05 and abs(change.std() - 1) < 0.05


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_future_ids_are_rewritten_twice(shape):
    ids = torch.randint(9, shape, dtype=torch.int32)
    first, second = _rewrite_future(ids, 2, 11)
    for new in (first, second):
        assert torch.equal(new[..., :2], ids[..., :2]) and new.dtype == torch.int32
        assert new.min() >= 0 and new.max() < 11
    assert torch.equal(first[..., 2:], (ids[..., 2:] + 1) % 11)
    assert not torch.equal(second[..., 2:], first[..., 2:])


# --- rows

@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_in_every_dtype(dtype):
    weights = torch.randn(2, 3, 64, dtype=torch.float64).softmax(-1).to(dtype)
    assert_rows_sum_to_one(weights)
    weights[1, 2, 0] += 3 * tolerance(dtype)
    with pytest.raises(AssertionError, match=r"rows sum to one: row \[1, 2\] sums to 1.*, wanted 1"):
        assert_rows_sum_to_one(weights)


@pytest.mark.parametrize("value, law", [(float("nan"), "weights are finite"), (float("inf"), "weights are finite"),
                                        (-0.25, "weights are not negative")])
def test_rows_name_the_law_and_the_place(value, law):
    weights = torch.full((2, 4), 0.25)
    weights[1, 2] = value
    with pytest.raises(AssertionError, match=rf"{law}: weights\[1, 2\] = "):
        assert_rows_sum_to_one(weights)


def test_rows_with_a_mask():
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert_rows_sum_to_one(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]), mask)
    with pytest.raises(AssertionError, match=r"forbidden keys get weight 0: weights\[0, 2\] = 0.2"):
        assert_rows_sum_to_one(torch.tensor([[0.4, 0.4, 0.2], [0.0, 0.0, 0.0]]), mask)
    with pytest.raises(AssertionError, match=r"forbidden .* weights\[1, 0\] = 1"):
        assert_rows_sum_to_one(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), mask)
    with pytest.raises(AssertionError, match=r"row \[0\] sums to 0, wanted 1"):
        assert_rows_sum_to_one(torch.zeros(2, 3), mask)
    with pytest.raises(TypeError, match="attn_mask must be bool, True = may attend, got torch.float32"):
        assert_rows_sum_to_one(torch.zeros(2, 3), mask.float())
    with pytest.raises(ValueError, match=r"attn_mask must broadcast to \(2, 3\), got \(3, 3\)"):
        assert_rows_sum_to_one(torch.zeros(2, 3), torch.ones(3, 3).bool())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_long_rows_pass_and_a_lost_key_does_not(dtype):
    assert_rows_sum_to_one(torch.randn(4, 4096).to(dtype).softmax(-1))
    even = torch.full((4, 64), 1 / 64, dtype=dtype)
    assert_rows_sum_to_one(even)
    even[:, 0] = 0
    with pytest.raises(AssertionError, match="rows sum to one"):
        assert_rows_sum_to_one(even)


# --- permutation

def test_permutation_equivariance():
    layer, x = nn.Linear(4, 3), torch.randn(2, 5, 4)
    assert_permutation_equivariant(layer, x)
    assert_permutation_equivariant(layer, x[0, :2])
    positions = torch.randn(5, 4)
    with pytest.raises(AssertionError, match=r"after moving token 1 to place 0 its output changed by"):
        assert_permutation_equivariant(lambda x: layer(x + positions), x)
    last = torch.tensor([0, 0, 0, 0, 1.0])[:, None]
    with pytest.raises(AssertionError, match=r"after moving token 4 to place 0 its"):
        assert_permutation_equivariant(lambda x: layer(x) * (1 + 5 * last), x)
    with pytest.raises(AssertionError, match="vacuous"):
        assert_permutation_equivariant(lambda x: x.mean(-2, keepdim=True).expand_as(x), x)
    with pytest.raises(AssertionError, match="permutation equivariance: .* changed by nan"):
        assert_permutation_equivariant(lambda y: y if torch.equal(y, x) else y * torch.nan, x)
    with pytest.raises(ValueError, match=r"at least 2 tokens, got \(2, 1, 4\)"):
        assert_permutation_equivariant(layer, x[:, :1])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_permutation_check_at_every_scale(scale):
    x = torch.randn(2, 5, 4)
    assert_permutation_equivariant(lambda x: scale * (x + x.mean(-2, keepdim=True)), x)
    with pytest.raises(AssertionError, match="permutation equivariance"):
        assert_permutation_equivariant(lambda x: scale * (x + 0.01 * torch.arange(5.0)[:, None]), x)


def test_permutation_check_and_zeros():
    x = torch.randn(2, 5, 4)
    assert_permutation_equivariant(lambda x: torch.cat([x, 0 * x], -1), x)
    with pytest.raises(AssertionError, match="vacuous"):
        assert_permutation_equivariant(torch.zeros_like, x)


def test_permutation_message_names_the_token_and_not_the_channel():
    place = torch.zeros(5, 4)
    place[3, 2] = 1.0               # only token 3, only channel 2
    with pytest.raises(AssertionError, match="after moving token 2 to place 3 its output changed by 1"):
        assert_permutation_equivariant(lambda x: x + place, torch.randn(2, 5, 4).clamp(-1, 1))
    with pytest.raises(ValueError, match=r"got \(4,\)"):
        assert_permutation_equivariant(lambda x: x, torch.randn(4))


def test_permutation_check_is_not_blinded_by_a_large_channel():
    x = torch.randn(4, 3)
    with pytest.raises(AssertionError, match="permutation equivariance"):
        assert_permutation_equivariant(lambda x: torch.cat(
            [x + 1e-3 * torch.arange(4.0)[:, None], torch.full_like(x, 1e4)], -1), x)


def test_permutation_sees_a_swap_that_a_rotation_does_not():
    def ring(x):        # the mean of both neighbours on a ring: blind to rotations and reflections only
        return x + 0.5 * (x.roll(1, -2) + x.roll(-1, -2))

    x = torch.randn(5, 4)
    with pytest.raises(AssertionError, match="permutation equivariance"):
        assert_permutation_equivariant(ring, x)


# --- causality

def mean(x, ahead=0):
    """Output i: the mean of inputs 0..i+ahead."""
    seq_len = x.shape[-2]
    allowed = torch.ones(seq_len, seq_len, dtype=x.dtype).tril(ahead)
    return allowed / allowed.sum(-1, keepdim=True) @ x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4), (2, 3, 5, 4), (2, 4)])
def test_causal_functions_pass(shape, dtype):
    assert_causal(mean, torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_leaks_are_found_at_every_scale(scale):
    """One part in a thousand, whatever the size of the input, of the output, or of another output."""
    x = torch.randn(2, 5, 4)

    def leaky(x):
        return mean(x) * scale + 1e-3 * scale * x.flip(-2)

    def beside(x):          # a large output beside the small ones
        return torch.cat([leaky(x), torch.full_like(x, 1e6)], -1)

    assert_causal(lambda x: mean(x) * scale, x)
    assert_causal(mean, x * scale)
    for fn in (leaky, beside):
        with pytest.raises(AssertionError, match="it sees its future"):
            assert_causal(fn, x)
    with pytest.raises(AssertionError, match="it sees its future"):
        assert_causal(lambda x: x + 1e-2 * x.roll(-1, -2), x * scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_real_layers_pass_and_fail_in_every_dtype(dtype):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True).eval().to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.02 if p.dim() == 1 else 0.3)
    mask = torch.full((6, 6), -torch.inf, dtype=dtype).triu(1)
    x = torch.randn(2, 6, 16).to(dtype)
    assert_causal(lambda x: layer(x, src_mask=mask), x)
    with pytest.raises(AssertionError, match="causality: output 0"):
        assert_causal(layer, x)


def test_weak_language_models_in_half_precision():
    """Small weights leak little; the leak is still a leak."""
    class Model(nn.Module):
        def __init__(self, causal):
            super().__init__()
            self.embed, self.causal = nn.Embedding(50, 32), causal
            self.attend, self.head = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 50)
            for p in self.parameters():
                nn.init.normal_(p, std=0.02)

        def forward(self, ids):
            x = self.embed(ids)
            mask = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool() if self.causal else None   # True = drop
            x = x + self.attend(x, x, x, attn_mask=mask, need_weights=False)[0]
            return self.head(F.layer_norm(x, (32,)))

    ids = torch.randint(50, (2, 16))
    for dtype in (torch.float32, torch.bfloat16):
        assert_causal(Model(True).to(dtype).eval(), ids)
        with pytest.raises(AssertionError, match="it sees its future"):
            assert_causal(Model(False).to(dtype).eval(), ids)


def test_ids_are_rewritten_in_two_ways():
    def compares(ids):      # output 0 looks whether the last two ids differ by one: adding one to both hides it
        out = F.one_hot(ids, 11).float()
        out[:, 0] += ((ids[:, -1] - ids[:, -2]) == 1)[:, None]
        return out

    with pytest.raises(AssertionError, match="causality: output 0"):
        assert_causal(compares, torch.arange(6)[None])
    def rare(ids):          # leaks id 10 only, which x does not hold
        return F.one_hot(ids, 11).float() + (ids.roll(-1, -1) == 10)[..., None]

    ids = torch.randint(0, 9, (8, 6))
    assert_causal(rare, ids)
    with pytest.raises(AssertionError, match="it sees its future"):
        assert_causal(rare, ids, num_ids=11)
    assert_causal(lambda ids: F.one_hot(ids.long(), 256).float(), torch.tensor([[1, 255, 3]], dtype=torch.uint8))


def test_one_rounding_step_is_no_leak():
    x = torch.randn(5, 4)

    def fn(y, steps):
        out = mean(y)
        for _ in range(steps if (y[-1] != x[-1]).any() else 0):
            out[0] = torch.nextafter(out[0], torch.tensor(torch.inf))
        return out

    assert_causal(lambda y: fn(y, 1), x)
    with pytest.raises(AssertionError, match="causality: output 0"):
        assert_causal(lambda y: fn(y, 8), x)


def test_long_sequences_and_the_message():
    x = torch.randn(300, 1)
    assert_causal(lambda x: x.cumsum(0), x)
    with pytest.raises(AssertionError, match=r"output 0 moved by .* when inputs 1..3 changed"):
        assert_causal(lambda x: x.flip(0), torch.randn(4, 2))
    with pytest.raises(TypeError):
        assert_causal(mean, torch.randn(4, 2), 11)


def test_constant_infinities_are_no_leak():
    banned = torch.tensor([0.0, -torch.inf, 0.0, torch.nan])
    assert_causal(lambda x: mean(x) + banned, torch.randn(5, 4))


def test_checkers_give_copies():
    x, mask = torch.randn(2, 5, 4, dtype=torch.float64), torch.ones(3, 3).tril().bool()
    before = x.clone()
    assert_causal(lambda x: mean(x.mul_(2)), x)
    assert_permutation_equivariant(lambda x: x.mul_(2), x)
    assert_parity(lambda x: x.mul(2), lambda x: x * 2, x)
    assert_as_precise(lambda x: x.mul_(2), lambda x: x * 2, x, dtype=torch.float64)
    assert torch.equal(x, before)
    with pytest.raises(AssertionError, match="parity"):
        assert_parity(lambda x, m: (x * m.fill_(True)), lambda x, m: x * m, torch.randn(3, 3), mask)
    assert not mask.all()


def test_every_leak_is_found_and_placed():
    x = torch.randn(2, 5, 4)
    with pytest.raises(AssertionError, match=r"causality: output 0 moved by .* when inputs 1..4 changed"):
        assert_causal(lambda x: mean(x, 1), x)
    peek = torch.eye(5)
    peek[2, 4] = 1e-3                                   # output 2 alone, a little
    with pytest.raises(AssertionError, match=r"causality: output 2 moved by .* when inputs 3..4 changed"):
        assert_causal(lambda x: peek @ x, x)
    peek = torch.eye(5)
    peek[3, 4] = 1.0                                    # the last place only
    with pytest.raises(AssertionError, match=r"output 3 moved by .* when inputs 4..4 changed; it sees its future"):
        assert_causal(lambda x: peek @ x, x)


def test_a_nan_in_the_past_is_a_leak():
    x = torch.randn(5, 4)
    with pytest.raises(AssertionError, match="causality: output 0 moved by nan"):
        assert_causal(lambda y: y if torch.equal(y, x) else y * torch.nan, x)


def test_language_models_with_ids():
    class Model(nn.Module):
        def __init__(self, ahead):
            super().__init__()
            self.embed, self.ahead, self.head = nn.Embedding(11, 8), ahead, nn.Linear(8, 11)

        def forward(self, ids):
            return self.head(mean(self.embed(ids), self.ahead))

    ids = torch.randint(11, (2, 6))
    assert_causal(Model(0), ids)
    with pytest.raises(AssertionError, match="causality: output 0"):
        assert_causal(Model(1), ids)
    binary = torch.tensor([[0, 1, 0, 0]])
    assert_causal(Model(0), binary)


def test_useless_evidence_is_refused():
    x = torch.randn(2, 5, 4)
    with pytest.raises(AssertionError, match="vacuous: no output moved"):
        assert_causal(lambda x: torch.ones_like(x), x)
    with pytest.raises(AssertionError, match=r"fn is random: .* call .eval\(\)"):
        assert_causal(lambda x: F.dropout(x, 0.5), x)
    with pytest.raises(AssertionError, match="vacuous: no output moved"):
        assert_causal(lambda x: x * torch.nan, x)
    for short in (x[:, :1], x[:0], x[0, 0], torch.tensor([[3], [4]]), torch.tensor(3)):
        with pytest.raises(ValueError, match="with at least 2 tokens, got"):
            assert_causal(mean, short)
    with pytest.raises(ValueError, match="num_ids must be at least 2, got 1"):
        assert_causal(lambda ids: F.one_hot(ids).float(), torch.zeros(2, 5).long())
    with pytest.raises(TypeError, match=r"must return a floating-point tensor .* got torch.int64 \(2, 5, 4\)"):
        assert_causal(lambda x: x.long(), x)
    with pytest.raises(TypeError, match="fn must return a tensor, or an object with logits, got tuple; wrap it in a lambda"):
        assert_causal(lambda x: (x, x), x)
    for wrong in (lambda x: x.sum(-2), lambda x: x[:, :4], lambda x: x.sum(), lambda x: x.sum((0, -1)),
                  lambda x: torch.cat([x, x], -2)):
        with pytest.raises(ValueError, match=r"fn must return \(..., 5, any\), got"):
            assert_causal(wrong, x)


def test_the_input_is_not_written():
    x, ids = torch.randn(2, 5, 4), torch.tensor([[0, 1, 2]])
    before = x.clone(), ids.clone()
    assert_causal(mean, x)
    assert_causal(lambda ids: mean(F.one_hot(ids, 3).float()), ids)
    assert torch.equal(x, before[0]) and torch.equal(ids, before[1])


# --- parity

def test_parity():
    x, y, n = torch.randn(3, 4), torch.randn(4, 2), torch.tensor([2])
    assert_parity(lambda x, y, n: x @ y * n, lambda x, y, n: torch.einsum("ij,jk->ik", x, y) * n, x, y, n)
    with pytest.raises(AssertionError, match=r"parity: shape torch.Size\(\[2, 3\]\), wanted torch.Size\(\[3, 2\]\)"):
        assert_parity(lambda x, y: (x @ y).mT, lambda x, y: x @ y, x, y)
    with pytest.raises(AssertionError, match=r"parity: output at \[0, 0\] is .*, wanted .*; 6 of 6 differ"):
        assert_parity(lambda x, y: x @ y + 2e-9, lambda x, y: x @ y, x, y)
    assert_parity(lambda x, y: x @ y + 5e-10, lambda x, y: x @ y, x, y)
    with pytest.raises(AssertionError, match=r"gradient of input 1 at \[0, 0\]"):
        assert_parity(lambda x, y: x @ y.detach(), lambda x, y: x @ y, x, y)
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_parity(lambda x: x.detach() + 0 * x, lambda x: x, x)
    for n in range(4):
        with pytest.raises(AssertionError, match=f"gradient of input {n} at"):
            assert_parity(lambda *xs: sum(x.detach() if i == n else x for i, x in enumerate(xs)),
                          lambda *xs: sum(xs), x, x, x, x)
    with pytest.raises(AssertionError, match="gradient of input 0"):       # 1e-6 relative is too much
        assert_parity(lambda x: x.detach() * -1e-6 + (1 + 1e-6) * x, lambda x: x, x)


def test_parity_computes_in_float64_and_treats_nan_as_a_value():
    seen = []
    assert_parity(lambda x: seen.append(x.dtype) or x * 1, lambda x: x + 0, torch.ones(2))
    assert seen == [torch.float64]
    with pytest.raises(AssertionError, match="parity: output"):
        assert_parity(lambda x: x / 0 * 0, lambda x: x, torch.ones(2))
    assert_parity(lambda x: x / 0 * 0, lambda x: x * torch.nan, torch.ones(2))
    for nothing in (lambda x: x * 1e-9, lambda x: 0 * x):
        with pytest.raises(AssertionError, match="vacuous: theirs is below 1e-6"):
            assert_parity(lambda x: x, nothing, torch.ones(2))
    with pytest.raises(TypeError, match="fn must return a tensor, or an object with logits, got tuple"):
        assert_parity(lambda x: (x, x), lambda x: x, torch.ones(2))
    with pytest.raises(TypeError, match="that is not empty"):
        assert_parity(lambda x: x[:0], lambda x: x, torch.ones(2))
    with pytest.raises(AssertionError, match="parity: dtype torch.float32, wanted torch.float64"):
        assert_parity(lambda x: x.float(), lambda x: x, torch.ones(2))
    assert_parity(lambda i: i * 2.0, lambda i: i + 1.0 * i, torch.arange(1, 4))     # nothing to differentiate
    assert_parity(lambda x: x.detach() * 0 + 1, lambda x: torch.ones_like(x), torch.ones(2))
    unused = torch.ones(3)
    assert_parity(lambda x, y: x * 2, lambda x, y: x + x, torch.ones(2), unused)


# --- precision

def test_precision_rule():
    x = torch.randn(64, 64)

    def exact(x):
        return (x.double() @ x.double().mT).to(x.dtype)

    def noisy(factor):
        """Off by `factor` times the worst rounding error of `exact`."""
        def fn(x):
            want = x.double() @ x.double().mT
            worst = (want.to(torch.bfloat16).double() - want).abs().max()
            return (want + factor * worst).to(x.dtype)
        return fn

    assert_as_precise(exact, exact, x, dtype=torch.bfloat16)
    assert_as_precise(exact, lambda x: x @ x.mT, x, dtype=torch.float32)
    with pytest.raises(AssertionError, match="is more than twice theirs"):
        assert_as_precise(noisy(4), exact, x, dtype=torch.bfloat16)
    assert_as_precise(noisy(0.5), exact, x, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"precision: result is \(64, 64\) torch.float32, wanted \(64, 64\) torch.bfloat16"):
        assert_as_precise(lambda x: exact(x).float(), exact, x, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="more than twice"):
        assert_as_precise(lambda x: exact(x) * torch.nan, exact, x, dtype=torch.bfloat16)
    ids = torch.arange(64)
    assert_as_precise(lambda x, i: exact(x)[i], lambda x, i: exact(x)[i], x, ids, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"result is \(1, 1\) .* wanted \(64, 64\)"):
        assert_as_precise(lambda x: x[:1, :1], exact, x, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="vacuous"):
        assert_as_precise(lambda x: x * 0, lambda x: x * x, torch.full((4,), 300.0), dtype=torch.float16)
    with pytest.raises(AssertionError, match="vacuous"):
        assert_as_precise(lambda x: x * 0, lambda x: x * 1e-6, torch.rand(4), dtype=torch.float32)
    with pytest.raises(AssertionError, match="vacuous"):
        assert_as_precise(lambda x: x, lambda x: x if x.dtype == torch.float64 else x * torch.nan, torch.ones(4),
                          dtype=torch.float32)
    # a factor of two, no more
    def rough(x):
        return x if x.dtype == torch.float64 else x + 1e-2

    assert_as_precise(lambda x: x + 1.9e-2, rough, torch.ones(4), dtype=torch.float32)
    with pytest.raises(AssertionError, match="is more than twice theirs"):
        assert_as_precise(lambda x: x + 2.5e-2, rough, torch.ones(4), dtype=torch.float32)
    # an allowance of 1e-5, no more
    same = torch.ones(4)
    assert_as_precise(lambda x: x + 5e-6, lambda x: x, same, dtype=torch.float32)
    with pytest.raises(AssertionError, match="more than twice"):
        assert_as_precise(lambda x: x + 3e-5, lambda x: x, same, dtype=torch.float32)


# --- dropout

class Drop(nn.Module):
    """`rate(module)` is the probability of dropping; a parameter, so that the result needs no gradient by itself."""

    def __init__(self, rate):
        super().__init__()
        self.rate, self.calls, self.inner = rate, 0, nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.calls += 1
        return self.scale * F.dropout(x, self.rate(self))


def test_dropout_in_training_only_passes():
    x = torch.randn(4, 8)
    for good in (nn.Dropout(0.5), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.05)),
                 Drop(lambda m: 0.5 if m.training else 0.0)):
        assert_eval_deterministic(good, x)
    two = Drop(lambda m: 0.5 if m.training else 0.0)
    two.forward = lambda x, y: F.dropout(x + y, 0.5, two.training)
    assert_eval_deterministic(two, x, torch.ones(8))


@pytest.mark.parametrize("rate, words", [
    (lambda m: 0.5, "eval is deterministic: two passes differ by .*, first time in eval"),
    (lambda m: 0.5 * (m.training or m.calls > 3), "eval is deterministic: two passes differ by .*, second time in eval"),
    (lambda m: 0.0, "training drops: 256 passes were equal, first time in train"),
    (lambda m: 0.0 if m.training else 0.5, "eval is deterministic"),
    (lambda m: 0.5 if m.training and m.calls <= 6 else 0.0, "training drops: 256 passes were equal, second time in train"),
])
def test_each_fault_of_dropout_is_named(rate, words):
    with pytest.raises(AssertionError, match=words):
        assert_eval_deterministic(Drop(rate), torch.randn(4, 8))


def test_state_that_survives_is_found_and_buffers_are_kept():
    class Stale(nn.Module):
        """Its evaluation uses the draw of the last training pass."""

        def __init__(self):
            super().__init__()
            self.drop, self.last = nn.Dropout(0.5), 1.0

        def forward(self, x):
            if self.training:
                self.last = torch.rand_like(x)
                return self.drop(x)
            return x * self.last

    x = 5 * torch.randn(8, 4)
    with pytest.raises(AssertionError, match="eval is deterministic: .*, second time in eval"):
        assert_eval_deterministic(Stale(), x)
    norm = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = norm.eval()(x)
    assert_eval_deterministic(norm, x)
    assert torch.equal(norm(x), before) and norm[0].num_batches_tracked == 0
    assert_eval_deterministic(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Dropout(0.5)), x)


def test_a_leak_of_one_sign_is_found():
    found = 0
    for seed in range(20):
        def leak(x):
            out = x.cumsum(-2).clone()
            out[..., 0, :] += (x[..., 1, :1] > 0).to(x)
            return out

        torch.manual_seed(seed)
        with contextlib.suppress(AssertionError):
            assert_causal(leak, torch.randn(1, 3, 4))
            found -= 1
        found += 1
    assert found == 20, f"{found} of 20"


def test_a_seed_must_repeat_a_pass():
    class Own(nn.Module):
        """Draws from a generator that no seed reaches."""

        def forward(self, x):
            keep = torch.rand(x.shape, generator=generator) > 0.5
            return x * keep if self.training else x

    generator = torch.Generator().manual_seed(0)
    with pytest.raises(AssertionError, match="a seed repeats: the same seed gave two outputs in training"):
        assert_eval_deterministic(Own(), torch.randn(4, 8))


def test_rare_dropout_is_found_from_any_random_state():
    """One number, dropped once in twenty: 256 passes find it; the verdict does not depend on the caller's state."""
    for seed in range(20):
        torch.manual_seed(seed)
        assert_eval_deterministic(nn.Dropout(0.05), torch.ones(1, 1))


@pytest.mark.parametrize("modes", [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("fault", [False, True])
def test_modes_and_random_state_are_restored(modes, fault):
    module = Drop(lambda m: 0.5 if m.training or fault else 0.0)
    module.training, module.inner.training = modes
    before, x = torch.random.get_rng_state(), torch.randn(4, 8)
    state, x_before = torch.random.get_rng_state(), x.clone()
    assert not torch.equal(before, state)
    if fault:
        with pytest.raises(AssertionError):
            assert_eval_deterministic(module, x)
    else:
        assert_eval_deterministic(module, x)
    assert (module.training, module.inner.training) == modes and torch.equal(x, x_before)
    assert torch.equal(torch.random.get_rng_state(), state) and module.scale.grad is None


def test_equal_infinities_are_quiet_and_no_module_is_refused():
    x = torch.tensor([[torch.inf, torch.nan, 1.0, 2.0]])
    assert_eval_deterministic(nn.Dropout(0.5), x)
    for bad in (lambda x: x, None, torch.ones(2)):
        with pytest.raises(TypeError, match="module must be an nn.Module, got"):
            assert_eval_deterministic(bad, x)
    with pytest.raises(TypeError, match="fn must return a tensor"):
        assert_eval_deterministic(nn.LSTM(4, 4), x)


# --- assert_cache_equals_full

def sums(x, state):
    """The simplest model with a memory: running sums."""
    past = 0 if state is None else state
    out = past + x.cumsum(-2)
    return out, out[..., -1:, :]


def means(x, state):
    """Running averages, which need the place too."""
    total, past = state or (0, 0)
    out = total + x.cumsum(-2)
    places = torch.arange(past + 1, past + x.shape[-2] + 1).to(x)[:, None]
    return out / places, (out[..., -1:, :], past + x.shape[-2])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(3, 2), (4, 2), (7, 2), (2, 9, 3), (2, 3, 5, 4)])
def test_cached_functions_pass(shape, dtype):
    x = torch.randn(shape).to(dtype)
    before = x.clone()
    for step in (sums, means) if dtype in (torch.float64, torch.float32) else (sums,):
        assert_cache_equals_full(step, torch.randint(-3, 4, shape).to(dtype) if step is sums else x)
    assert torch.equal(x, before)


def test_every_way_to_cut():
    for T in range(3, 12):
        cuts = _cuts(T)
        assert all(sum(sizes) == T and min(sizes) >= 1 for sizes in cuts.values())
        assert cuts["token by token"] == [1] * T and [T] not in cuts.values()
        sizes = [tuple(s) for s in cuts.values()]
        assert len({*sizes}) >= 3 and (T < 4 or any(max(s[1:]) > 1 for s in sizes)), "chunks after the first call"


def test_another_first_token():
    for x, axis in ((torch.zeros(2, 4, 3), -2), (torch.full((4, 3), -0.5), -2), (torch.randn(2, 3, 4, 5), -2),
                    (torch.zeros(2, 4).long(), -1), (torch.tensor([5, 5, 1]), -1), (torch.randint(9, (3, 5)), -1)):
        other, before = _other_token(x, axis), x.clone()
        first = other.select(axis, 0) != x.select(axis, 0)
        assert first.all() or x.is_floating_point() and (x.select(axis, 0) == -0.5).all()
        assert torch.equal(other.narrow(axis, 1, x.shape[axis] - 1), x.narrow(axis, 1, x.shape[axis] - 1))
        assert torch.equal(x, before) and (x.is_floating_point() or 0 <= other.min() <= other.max() <= max(x.max(), 1))


def test_cuts_and_first_tokens_by_hand():
    assert _cuts(3) == {"token by token": [1, 1, 1], "a prompt, then tokens": [2, 1], "two chunks": [2, 1],
                        "a token, then a chunk": [1, 2]}
    assert _cuts(4)["chunk, token, chunk"] == [2, 1, 1] and _cuts(9)["chunk, token, chunk"] == [2, 1, 6]
    assert _other_token(torch.tensor([[1.0, -3.0], [5.0, 6.0]]), -2).tolist() == [[-2, 2], [5, 6]]
    for ids, want in (([2, 5, 1], 3), ([5, 0, 1], 0), ([0, 0, 0], 1), ([1, 0, 0], 0), ([4, 5, 5], 5), ([0, 2, 0], 1)):
        assert _other_token(torch.tensor(ids), -1).tolist() == [want, *ids[1:]]


@pytest.mark.parametrize("size", [0.1, 1.0, 1000.0])
def test_the_bound_grows_with_the_outputs(size):
    """Half the tolerance passes, one and a half does not: relative for large outputs, absolute for small ones."""
    x = torch.zeros(5, 2, dtype=torch.float64)
    x[0] = size
    for share in (0.5, -0.5, 1.5, -1.5):
        def step(x, state):
            out, new = sums(x, state)
            return (out if state is None else out + share * tolerance(torch.float64) * max(1.0, size)), new
        if abs(share) < 1:
            assert_cache_equals_full(step, x)
        else:
            with pytest.raises(AssertionError, match="output 1 differs by"):
                assert_cache_equals_full(step, x)


def test_a_loud_channel_hides_no_fault():
    x = torch.randn(2, 6, 3).double()
    loud = torch.tensor([1e8, 1.0, 1.0]).double()

    def slightly_wrong(new, state):
        out, state = sums(new, state)
        return loud * out + 1e-3 * (new.shape[1] == 1) * torch.tensor([0.0, 1.0, 0.0]), state
    assert_cache_equals_full(lambda new, state: (loud * sums(new, state)[0], sums(new, state)[1]), x)
    with pytest.raises(AssertionError, match="output 0 differs by 0.001"):
        assert_cache_equals_full(slightly_wrong, x)


def test_a_step_may_return_the_same_memory_each_time():
    memory = torch.zeros(2, 6, 3).double()

    def step(new, state):
        out, state = sums(new, state)
        return memory[:, :new.shape[1]].copy_(out), state
    assert_cache_equals_full(step, torch.randn(2, 6, 3).double())


def test_the_last_output_must_depend_on_the_first_token():
    """It is not enough that the one before it does."""
    def deaf_at_the_end(x, state):
        total, past = state or (0, 0)
        out = total + x.cumsum(-2)
        places = torch.arange(past, past + x.shape[-2])[:, None]
        return out.masked_fill(places == 5, 1.0), (out[..., -1:, :], past + x.shape[-2])
    assert_cache_equals_full(deaf_at_the_end, torch.randn(7, 2).double())
    with pytest.raises(AssertionError, match="vacuous"):
        assert_cache_equals_full(deaf_at_the_end, torch.randn(6, 2).double())


def forgets(x, state):
    return sums(x, None)


def off_by_one(x, state):
    """Averages whose place is one too large after the first call."""
    total, past = state or (0, 0)
    out, (_, length) = means(x, (total, past + (state is not None)))
    return out, (total + x.cumsum(-2)[..., -1:, :], length - (state is not None))


def keeps_the_first_of_a_chunk(x, state):
    out, _ = sums(x, state)
    return out, (0 if state is None else state) + x[..., :1, :]


def sees_its_chunk(x, state):
    """No mask: a chunk is read as a whole; single tokens are right."""
    out, state = sums(x, state)
    return out[..., -1:, :].expand(out.shape), state


@pytest.mark.parametrize("step, words", [
    (forgets, "cache, token by token: output 1 differs by"),
    (off_by_one, "cache, token by token: output 1 differs by"),
    (keeps_the_first_of_a_chunk, r"cache, a prompt, then tokens: output 3 differs by"),
    (sees_its_chunk, "cache, token by token: output 0 differs by"),
])
def test_each_fault_of_a_memory_is_placed(step, words):
    for shape in ((6, 2), (2, 6, 3)):
        with pytest.raises(AssertionError, match=words):
            assert_cache_equals_full(step, 1 + torch.rand(shape, dtype=torch.float64))


def test_faults_that_only_some_cuts_show():
    """Each cut finds what the others do not: a chunk after a token, a token after a chunk, a chunk after both."""
    def fault(wrong):
        def step(x, state):
            sizes, past = state or ((), 0)
            sizes = (*sizes, x.shape[-2])
            out = past + x.cumsum(-2)
            return (out + 1 if wrong(sizes) else out), (sizes, out[..., -1:, :])
        return step

    for wrong, words in ((lambda s: s == (1, 5), "a token, then a chunk: output 1"),
                         (lambda s: s[0] == 3 and len(s) > 1 and s[-1] == 1, "a prompt, then tokens: output 3"),
                         (lambda s: s == (3, 3), "two chunks: output 3"),
                         (lambda s: s[:2] == (2, 1) and len(s) == 3, "chunk, token, chunk: output 3"),
                         (lambda s: len(s) == 6, "token by token: output 5")):
        with pytest.raises(AssertionError, match=words):
            assert_cache_equals_full(fault(wrong), torch.randn(6, 2).double())


def test_a_text_that_is_not_forgotten_is_found():
    """State None must start a new text; a state of its own survives."""
    kept = {}

    def stale(x, state):
        if not kept:                                         # made once, never emptied
            kept["sum"] = torch.zeros(1, x.shape[-1], dtype=x.dtype)
        out = kept["sum"] + x.cumsum(-2)
        kept["sum"] = out[..., -1:, :]
        return out, kept
    with pytest.raises(AssertionError, match="differs by"):
        assert_cache_equals_full(stale, torch.randn(6, 2).double())

    last = []

    def one_text_late(x, state):
        """The first output of a text hears of the text before it, but only of another one."""
        out, new = sums(x, state)
        if state is None:
            out = out + sum(float(not torch.equal(x[..., 0, :], first)) for first in last)
            last[:] = [x[..., 0, :].clone()]
        return out, new
    with pytest.raises(AssertionError, match="a new sequence: output 0 differs by"):
        assert_cache_equals_full(one_text_late, torch.randn(6, 2).double())


def test_useless_evidence_about_a_cache_is_refused():
    for step in (lambda x, state: (x * 2, None), lambda x, state: (torch.zeros_like(x), None)):
        with pytest.raises(AssertionError, match="vacuous: the last output does not depend on the first token"):
            assert_cache_equals_full(step, torch.randn(2, 5, 3).double())

    def window(x, state):                                    # sees two tokens
        past = torch.zeros_like(x[..., :1, :]) if state is None else state
        both = torch.cat([past, x], -2)
        return both[..., 1:, :] + both[..., :-1, :], x[..., -1:, :]
    with pytest.raises(AssertionError, match="vacuous"):
        assert_cache_equals_full(window, torch.randn(2, 5, 3).double())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_from_a_cache_is_a_fault(value):
    def poisoned(x, state):
        out, new = sums(x, state)
        return (out if state is None else out.masked_fill(torch.ones_like(out).bool(), value)), new
    with pytest.raises(AssertionError, match="cache, token by token: output 1 differs by"):
        assert_cache_equals_full(poisoned, torch.randn(5, 2).double())

    def everywhere(x, state):
        out, new = sums(x, state)
        return out.masked_fill(torch.ones_like(out).bool(), value), new
    with pytest.raises(AssertionError, match="vacuous"):
        assert_cache_equals_full(everywhere, torch.randn(5, 2).double())


def test_equal_infinities_pass_and_hide_nothing():
    """A constant -inf, as for a word that is never written, is no fault and does not widen the bound."""
    def step(x, state):
        out, new = sums(x, state)
        return torch.cat([out, torch.full_like(out[..., :1], -torch.inf)], -1), new

    def slightly_wrong(x, state):
        out, new = step(x, state)
        return (out if state is None else out + 1e-6), new
    x = torch.randn(5, 2).double()
    assert_cache_equals_full(step, x)
    with pytest.raises(AssertionError, match="output 1 differs by 1e-06"):
        assert_cache_equals_full(slightly_wrong, x)


@pytest.mark.parametrize("step, x, error, words", [
    (sums, torch.randn(2, 3), ValueError, r"x must be float \(..., T, D\) or integer .* 3 tokens, got \(2, 3\)"),
    (sums, torch.randn(4), ValueError, r"x must be .* got \(4,\)"),
    (sums, torch.randn(0, 4, 3), ValueError, r"x must be .* got \(0, 4, 3\)"),
    (sums, torch.randn(4, 0), ValueError, r"x must be .* got \(4, 0\)"),
    (sums, torch.tensor([1, 2]), ValueError, r"x must be .* got \(2,\)"),
    (sums, torch.tensor(1), ValueError, r"x must be .* got \(\)"),
    (sums, torch.tensor(1.0), ValueError, r"x must be .* got \(\)"),
    (lambda x, s: x, torch.randn(4, 3), TypeError, r"step must return a pair \(out, state\), got Tensor"),
    (lambda x, s: [x, s], torch.randn(4, 3), TypeError, r"step must return a pair \(out, state\), got list"),
    (lambda x, s: (x, s, s), torch.randn(4, 3), TypeError, r"step must return a pair \(out, state\), got tuple"),
    (lambda x, s: None, torch.randn(4, 3), TypeError, r"step must return a pair \(out, state\), got NoneType"),
    (lambda x, s: (None, x), torch.randn(4, 3), TypeError, "must return a tensor, or an object with logits, got NoneType"),
    (lambda x, s: (x.long(), s), torch.randn(4, 3), TypeError, "floating-point tensor .* got torch.int64"),
    (lambda x, s: (x[:, :0], s), torch.randn(4, 3), TypeError, "not empty, got"),
    (lambda x, s: (x[-1:], s), torch.randn(4, 3), ValueError, r"out must be \(..., 4, any\), got \(1, 3\)"),
    (lambda x, s: (x[:, 0], s), torch.randn(4, 3), ValueError, r"out must be \(..., 4, any\), got \(4,\)"),
    (lambda x, s: (x.mT, s), torch.randn(4, 3), ValueError, r"out must be \(..., 4, any\), got \(3, 4\)"),
    (lambda x, s: (x.float(), s), torch.randint(9, (2, 5)), ValueError, r"out must be \(..., 5, any\), got \(2, 5\)"),
])
def test_wrong_steps_are_refused(step, x, error, words):
    with pytest.raises(error, match=words):
        assert_cache_equals_full(step, x)


def test_a_step_may_write_to_what_it_gets():
    def greedy(x, state):
        out, new = sums(x, state)
        x.zero_()
        return out, new
    x = torch.randn(5, 2).double()
    before = x.clone()
    assert_cache_equals_full(greedy, x)
    assert torch.equal(x, before)


def grouped_layer():
    from attn_nb.grouped_query import GroupedQueryAttention

    return lively(GroupedQueryAttention(10, 6, 2, head_dim=4, qkv_bias=True, out_bias=True).double())


@pytest.mark.parametrize("T", [3, 4, 9])
@pytest.mark.parametrize("shape", [(), (2,), (2, 2)])
def test_our_cached_layer_passes(shape, T):
    from attn_nb.kv_cache import KVCache

    layer = grouped_layer()

    def step(x, cache):
        if cache is None:
            cache = KVCache(math.prod(shape), 2, T, 4, dtype=x.dtype)
        return layer(x, cache=cache), cache
    assert_cache_equals_full(step, torch.randn(*shape, T, 10).double())


FAULTS = {"none": None, "offset 0": "token by token: output 1", "no mask": "token by token: output 0",
          "cache dropped": "token by token: output 1", "empty slots without mask": "differs",
          "stale cache": "differs", "keys only": "token by token: output 1", "position off by one": "token by token: output 1",
          "position of the call": "token by token: output 1", "upper left corner": "output"}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_cached_layer(fault):
    """A layer with rotary positions, and one mistake in how its cache is used."""
    from attn_nb.grouped_query import _rotate, grouped_attention
    from attn_nb.kv_cache import KVCache
    from attn_nb.multi_head import merge_heads, split_heads

    layer, old = grouped_layer(), []

    def step(x, cache):
        if cache is None or fault == "cache dropped":
            cache = KVCache(2, 2, 90, 4, dtype=x.dtype)
            if fault == "stale cache":
                cache = (old or [cache])[0]
                old[:] = [cache]
        past, T = cache.length, x.shape[1]
        place = past + torch.arange(T)
        place = {"position off by one": place + (past > 0), "position of the call": torch.arange(T)}.get(fault, place)
        turn = place[:, None] * torch.tensor([1.0, 0.3]).double()
        q, k, v = (split_heads(p(x), n) for p, n in ((layer.q_proj, 6), (layer.k_proj, 2), (layer.v_proj, 2)))
        q, k = (_rotate(t, turn.cos()[None], turn.sin()[None]) for t in (q, k))
        keys, values = cache.update(k, v)
        if fault == "keys only":
            values = torch.cat([0 * values[:, :, :past], v], 2)
        causal = fault != "no mask"
        if fault == "empty slots without mask" and T == 1:
            keys, values, causal = cache._keys, cache._values, False
        offset = 0 if fault == "offset 0" or fault == "upper left corner" and T > 1 else past
        return layer.o_proj(merge_heads(grouped_attention(q, keys, values, is_causal=causal, offset=offset))), cache

    x = torch.randn(2, 7, 10).double()
    with torch.no_grad():
        if FAULTS[fault] is None:
            assert_cache_equals_full(step, x)
            return
        with pytest.raises(AssertionError, match=FAULTS[fault]) as caught:
            assert_cache_equals_full(step, x)
        assert "vacuous" not in str(caught.value)
        if fault == "upper left corner":
            assert "two chunks" in str(caught.value)         # single tokens are right


def llama_step(fault=None):
    """A random LlamaForCausalLM as a step, on ids or embeddings, with one mistake."""
    import transformers

    config = transformers.LlamaConfig(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, head_dim=4, vocab_size=30,
                                      intermediate_size=20, num_hidden_layers=2, max_position_embeddings=64)
    model = transformers.LlamaForCausalLM(config).double().eval()
    for block in model.model.layers:
        lively(block.self_attn)

    def step(x, state):
        cache = transformers.DynamicCache() if state is None or fault == "dropped" else state
        past = cache.get_seq_length()
        places = torch.arange(past, past + x.shape[1]) + (fault == "late" and past > 0)
        name = "inputs_embeds" if x.is_floating_point() else "input_ids"
        with torch.no_grad():
            out = model(**{name: x}, past_key_values=cache, use_cache=True, position_ids=places[None])
        if fault == "values lost":
            cache.layers[0].values.zero_()
        return out.logits, cache
    return step


@pytest.mark.parametrize("fault", [None, "dropped", "late", "values lost"])
@pytest.mark.parametrize("x", [torch.arange(14).view(2, 7), torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
                               .double()], ids=["ids", "embeddings"])
def test_a_model_of_transformers(x, fault):
    if fault is None:
        assert_cache_equals_full(llama_step(), x)
        return
    with pytest.raises(AssertionError, match="cache, token by token: output 1 differs by"):
        assert_cache_equals_full(llama_step(fault), x)


@pytest.mark.parametrize("shared", [False, True])
def test_one_cache_for_all_layers_is_found(shared):
    from attn_nb.kv_cache import KVCache

    layers = [grouped_layer() for _ in range(2)]

    def step(x, caches):
        if caches is None:
            caches = [KVCache(2, 2, 20, 4, dtype=x.dtype) for _ in layers]
            caches = [caches[0]] * 2 if shared else caches
        with torch.no_grad():
            for layer, cache in zip(layers, caches):
                x = x + layer(x, cache=cache)
        return x, caches
    if shared:
        with pytest.raises(AssertionError, match="cache, token by token: output 0 differs by"):      # one pass is wrong too
            assert_cache_equals_full(step, torch.randn(2, 6, 10).double())
    else:
        assert_cache_equals_full(step, torch.randn(2, 6, 10).double())


def test_objects_with_logits_are_models_too():
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa")).double().eval()
    for p in model.parameters():
        p.data.mul_(8)
    ids = torch.randint(20, (2, 6))

    def step(ids, state):
        out = model(ids, past_key_values=state, use_cache=True)
        return out, out.past_key_values

    assert_causal(model, ids, num_ids=20)
    assert_cache_equals_full(step, ids)
    everything = torch.ones(2, 1, 6, 6, dtype=torch.bool)        # the planted leak: a mask of four axes replaces the causal one
    with pytest.raises(AssertionError, match="it sees its future"):
        assert_causal(lambda ids: model(ids, attention_mask=everything), ids, num_ids=20)
    with pytest.raises(AssertionError, match="from one pass"):
        assert_cache_equals_full(lambda ids, state: (model(ids), None), ids)
