"""The reusable checks: each law is broken on purpose, and the message says which and where."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attn_nb.testing import (
    TOLERANCE,
    assert_as_precise,
    assert_causal,
    assert_parity,
    assert_permutation_equivariant,
    assert_rows_sum_to_one,
    catches,
    tolerance,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- catches

def test_catches_prints_the_first_line(capsys):
    with catches("two"):
        raise AssertionError("one two\nthree")
    assert capsys.readouterr().out == "caught: one two\n"


def test_catches_fails_when_nothing_breaks():
    with pytest.raises(AssertionError, match="nothing was caught, wanted ValueError: words"):
        with catches("words", ValueError):
            pass


def test_catches_lets_other_errors_through():
    with pytest.raises(AssertionError, match="other"):
        with catches("words"):
            raise AssertionError("other")
    with pytest.raises(TypeError):
        with catches("words"):
            raise TypeError("words")


# --- tolerance

def test_tolerance_is_one_table():
    assert TOLERANCE == {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
    for dtype, bound in TOLERANCE.items():
        assert tolerance(dtype) == bound > 2 * torch.finfo(dtype).eps
    with pytest.raises(TypeError, match="dtype must be one of .*, got torch.int64"):
        tolerance(torch.int64)


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
    with pytest.raises(ValueError, match="x needs at least 2 tokens, got 1"):
        assert_permutation_equivariant(layer, x[:, :1])


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
    with pytest.raises(AssertionError, match=r"fn is random .* call .eval\(\)"):
        assert_causal(lambda x: F.dropout(x, 0.5), x)
    with pytest.raises(AssertionError, match="fn is random"):
        assert_causal(lambda x: x * torch.nan, x)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        assert_causal(mean, x[:, :1])
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        assert_causal(lambda ids: F.one_hot(ids).float(), torch.tensor([[3], [4]]))
    with pytest.raises(ValueError, match="two different ids, got one"):
        assert_causal(lambda ids: F.one_hot(ids).float(), torch.ones(2, 5).long())
    with pytest.raises(TypeError, match="fn must return a tensor, got tuple; wrap it in a lambda"):
        assert_causal(lambda x: (x, x), x)
    for wrong in (lambda x: x.sum(-2), lambda x: x[:, :4], lambda x: x.sum()):
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
    with pytest.raises(AssertionError, match=r"parity: shape \(2, 3\), wanted \(3, 2\)"):
        assert_parity(lambda x, y: (x @ y).mT, lambda x, y: x @ y, x, y)
    with pytest.raises(AssertionError, match=r"parity: output at \[0, 0\] is .*, wanted .*; 6 of 6 differ"):
        assert_parity(lambda x, y: x @ y + 2e-9, lambda x, y: x @ y, x, y)
    assert_parity(lambda x, y: x @ y + 5e-10, lambda x, y: x @ y, x, y)
    with pytest.raises(AssertionError, match=r"gradient of input 1 at \[0, 0\]"):
        assert_parity(lambda x, y: x @ y.detach(), lambda x, y: x @ y, x, y)
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_parity(lambda x: x.detach() + 0 * x, lambda x: x, x)
    with pytest.raises(AssertionError, match="gradient of input 0"):       # 1e-6 relative is too much
        assert_parity(lambda x: x.detach() * -1e-6 + (1 + 1e-6) * x, lambda x: x, x)


def test_parity_computes_in_float64_and_treats_nan_as_a_value():
    seen = []
    assert_parity(lambda x: seen.append(x.dtype) or x * 1, lambda x: x + 0, torch.ones(2))
    assert seen == [torch.float64]
    with pytest.raises(AssertionError, match="parity: output"):
        assert_parity(lambda x: x / 0 * 0, lambda x: x, torch.ones(2))
    assert_parity(lambda x: x / 0 * 0, lambda x: x * torch.nan, torch.ones(2))
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
    with pytest.raises(AssertionError, match="precision: result is torch.float32, wanted torch.bfloat16"):
        assert_as_precise(lambda x: exact(x).float(), exact, x, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="more than twice"):
        assert_as_precise(lambda x: exact(x) * torch.nan, exact, x, dtype=torch.bfloat16)
    ids = torch.arange(64)
    assert_as_precise(lambda x, i: exact(x)[i], lambda x, i: exact(x)[i], x, ids, dtype=torch.bfloat16)
    # an allowance of 1e-5, no more
    same = torch.ones(4)
    assert_as_precise(lambda x: x + 5e-6, lambda x: x, same, dtype=torch.float32)
    with pytest.raises(AssertionError, match="more than twice"):
        assert_as_precise(lambda x: x + 3e-5, lambda x: x, same, dtype=torch.float32)
