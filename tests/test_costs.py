"""Times in turn, ratios, peak memory and linear layers on oneDNN: what they give, what they refuse, that nothing stays behind."""
import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attn_nb.costs as costs
from attn_nb import (
    DecoderConfig,
    DecoderLM,
    GroupedQueryAttention,
    generate,
    interleaved_times,
    machine_limits,
    median_ratios,
    onednn_linears,
    peak_memory,
)


class Clock:
    """A clock that work moves on; each unit may take longer than the last."""

    def __init__(self, slower_by=0.0):
        self.now, self.pace, self.slower_by, self.calls = 0.0, 1.0, slower_by, []

    def __call__(self):
        return self.now

    def work(self, name, units):
        def run():
            self.calls.append(name)
            self.now += units * self.pace
            self.pace += self.slower_by
        return run


# --- times in turn

def test_each_function_runs_once_a_round_in_changing_order():
    clock = Clock()
    functions = {name: clock.work(name, units) for name, units in (("a", 1), ("b", 2), ("c", 4))}
    times = interleaved_times(functions, 30, clock=clock)
    assert times == {"a": [1.0] * 30, "b": [2.0] * 30, "c": [4.0] * 30}
    rounds = [tuple(clock.calls[i:i + 3]) for i in range(0, len(clock.calls), 3)]
    assert len(rounds) == 31 and all(sorted(r) == ["a", "b", "c"] for r in rounds)       # one round more: not counted
    assert len(set(rounds)) == 6, "every order comes"


def test_twenty_rounds_unless_said_otherwise():
    assert len(interleaved_times({"a": lambda: None})["a"]) == 20
    with pytest.raises(TypeError):
        interleaved_times({"a": lambda: None}, 3, "cpu")


def test_the_first_round_is_not_counted():
    clock, first = Clock(), []

    def cold():
        clock.now += 1.0 if first else 1000.0
        first.append(1)
    assert interleaved_times({"cold": cold}, 3, clock=clock) == {"cold": [1.0, 1.0, 1.0]}


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.floats(0.1, 10), st.floats(0, 0.05), st.integers(15, 40))
def test_drift_cancels(units, slower_by, rounds):
    clock = Clock(slower_by)
    times = interleaved_times({"a": clock.work("a", units), "b": clock.work("b", 1)}, rounds, clock=clock)
    assert median_ratios(times, to="b")["a"] == pytest.approx(units, rel=0.06)


def test_same_seed_same_order():
    calls = []
    for _ in range(2):
        clock = Clock()
        interleaved_times({"a": clock.work("a", 1), "b": clock.work("b", 1)}, 9, clock=clock)
        calls.append(clock.calls)
    assert calls[0] == calls[1]


def test_the_global_generators_are_left_alone():
    import random
    random.seed(0)
    torch.manual_seed(0)
    states = random.getstate(), torch.get_rng_state()
    interleaved_times({"a": lambda: None}, 2)
    with onednn_linears(nn.Linear(4, 4)):
        pass
    assert random.getstate() == states[0] and not torch.equal(torch.get_rng_state(), states[1])      # nn.Linear draws
    torch.set_rng_state(states[1])
    layer = nn.Linear(4, 4)
    state = torch.get_rng_state()
    with onednn_linears(layer):
        machine_limits()
        assert torch.equal(torch.get_rng_state(), state)


def test_functions_may_change_the_dict():
    functions = {"b": lambda: None}
    functions["a"] = lambda: functions.clear()
    assert {name: len(seconds) for name, seconds in interleaved_times(functions, 3).items()} == {"a": 3, "b": 3}


def test_an_error_passes_through():
    def broken():
        raise KeyError("mine")
    with pytest.raises(KeyError, match="mine"):
        interleaved_times({"a": lambda: None, "b": broken})


@pytest.mark.parametrize("functions, rounds, device, error, words", [
    ({}, 3, "cpu", ValueError, "functions"),
    (None, 3, "cpu", TypeError, "functions"),
    ({"a": 1}, 3, "cpu", TypeError, "functions"),
    ({"a": print}, 0, "cpu", ValueError, "rounds"),
    ({"a": print}, 2.0, "cpu", TypeError, "rounds"),
    ({"a": print}, True, "cpu", TypeError, "rounds"),
    ({"a": print}, 3, "meta", ValueError, "device"),
    ({"a": print}, 3, "nowhere", ValueError, "device"),
    ({"a": print}, 3, None, TypeError, "device")])
def test_bad_input_to_times(functions, rounds, device, error, words):
    with pytest.raises(error, match=rf"\b{words}\b"):
        interleaved_times(functions, rounds, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_no_gpu_is_said():
    for call in (lambda: interleaved_times({"a": print}, device="cuda"), lambda: peak_memory(print, "cuda"),
                 lambda: machine_limits(device="cuda")):
        with pytest.raises(ValueError, match=r"\bdevice\b"):
            call()


class Gpu:
    """As much of torch.cuda as is asked: a call queues work, events are reached when somebody waits."""

    def __init__(self, monkeypatch, clock):
        self.log, self.clock = [], clock
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "device", lambda d: contextlib.nullcontext(self.log.append(str(d))))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *a: self.log.append("wait"))
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: self.log.append("now") or 100)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: self.log.append("reset"))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: self.log.append("most") or 350)

    def event(self, enable_timing=False):
        gpu = self

        class Event:
            def record(self):
                gpu.log.append("event")
                self.at = gpu.clock()

            def elapsed_time(self, other):
                assert enable_timing and gpu.log[-1] == "wait", "read before the work was done"
                return 1000 * (other.at - self.at)
        return Event()


def test_on_a_gpu_events_are_read_after_waiting(monkeypatch):
    clock = Clock()
    gpu = Gpu(monkeypatch, clock)
    assert interleaved_times({"a": clock.work("a", 0.25)}, 3, device="cuda:1", clock=lambda: 1 / 0) == {
        "a": [0.25] * 3}
    assert clock.calls == ["a"] * 6          # three to warm up
    assert gpu.log == ["cuda:1", "wait", "event", "event", "wait"] * 6
    with pytest.raises(ValueError, match=r"\bdevice\b"):
        interleaved_times({"a": print}, device="cuda:2")


def test_on_a_gpu_the_peak_is_what_came_on_top(monkeypatch):
    gpu = Gpu(monkeypatch, Clock())
    assert peak_memory(lambda: gpu.log.append("call"), "cuda") == 250
    assert gpu.log == ["now", "reset", "call", "most"]


# --- ratios

def test_ratios_are_paired_medians():
    times = {"a": [1.0, 10.0, 3.0], "b": [2.0, 5.0, 3.0]}
    assert median_ratios(times, to="b") == {"a": 1.0, "b": 1.0}          # .5, 2, 1; medians of times would give the same 1
    assert median_ratios({"a": [1.0, 10.0, 100.0], "b": [2.0, 30.0, 50.0]}, to="b")["a"] == 0.5


@pytest.mark.parametrize("times, to, words", [
    ({"a": [1.0]}, "b", r"to\b.*'b"), ({}, "a", r"to\b.*'a"),
    ({"a": [1.0], "b": [1.0, 2.0]}, "a", "times"),
    ({"a": [], "b": []}, "a", "times"),
    ({"a": [1.0, 0.0], "b": [1.0, 1.0]}, "a", "times"),
    ({("a", 1): [1.0]}, "b", r"to\b.*'b")])
def test_bad_input_to_ratios(times, to, words):
    with pytest.raises(ValueError, match=rf"\b{words}\b"):
        median_ratios(times, to=to)


# --- limits and memory

def test_limits_count_products_and_bytes(monkeypatch):
    seen = []
    monkeypatch.setattr(costs, "_fastest", lambda fn, *inputs: seen.append(inputs) or 0.5 * len(seen))
    flops, bytes_ = machine_limits()
    x, weight = seen[0]
    rows, width = x.shape
    assert weight.shape == (width, width) and flops == 2 * rows * width * width / 0.5    # the faster library counts
    assert bytes_ == seen[-1][0].nbytes / (0.5 * len(seen)) and bytes_ * 0.5 * len(seen) >= 2 ** 28


def test_limits_of_a_gpu_take_more_work(monkeypatch):
    """No GPU here: the road is taken with tensors that have no numbers."""
    monkeypatch.setattr(costs, "_check_device", lambda device: torch.device("meta"))
    monkeypatch.setattr(costs, "_fastest", lambda fn, *inputs: 2.0)
    assert machine_limits(device="cuda") == (8192 ** 3, 4 * 2 ** 28 / 2)


def test_limits_of_a_cpu_without_the_second_library(monkeypatch):
    tried = []
    monkeypatch.setattr(costs, "_onednn_is_right", lambda weight, bias: False)
    monkeypatch.setattr(costs, "_fastest", lambda fn, *inputs: tried.append(fn) or 1.0)
    assert machine_limits() == (2 * 2048 * 768 ** 2, 4 * 2 ** 26) and tried == [F.linear, torch.sum]
    tried.clear()
    machine_limits(torch.bfloat16)
    assert tried == [F.linear, torch.sum]


def test_limits_are_of_this_machine():
    flops, bytes_ = machine_limits()
    assert 1e8 < flops < 1e15 and 1e8 < bytes_ < 1e14 and math.isfinite(flops + bytes_)
    for bad in (torch.int64, "float32", None):
        with pytest.raises(TypeError, match=r"\bdtype\b"):
            machine_limits(bad)


def test_peak_is_what_is_held_at_one_time():
    def staircase():
        a = torch.ones(1000)                 # 4000
        b = torch.ones(2000)                 # 12000
        del a
        c = torch.ones(500)                  # 10000
        return b, c
    assert peak_memory(staircase) == 12000
    kept = []
    assert peak_memory(lambda: kept.append(torch.ones(10))) == 40
    assert peak_memory(lambda: kept.clear()) == 0                        # giving back is no use of memory
    assert peak_memory(lambda: torch.ones(3).view(3)) == 12


def test_peak_counts_the_backward_pass():
    w = torch.ones(1000, requires_grad=True)
    forward, both = peak_memory(lambda: (w * 2).sum()), peak_memory(lambda: (w * 2).sum().backward())
    assert both >= 4000 and forward >= 4000 and w.grad is not None


def test_peak_of_fused_and_explicit_scores():
    layer, x = GroupedQueryAttention(32, 4, 2).eval(), torch.randn(1, 512, 32)
    with torch.inference_mode():
        layer(x)
        explicit, fused = peak_memory(lambda: layer(x, return_weights=True)), peak_memory(lambda: layer(x))
    assert explicit > 4 * 4 * 512 * 512 > fused


def test_there_is_one_profiler():
    with pytest.raises(RuntimeError, match=r"\bthe profiler\b"):
        peak_memory(lambda: peak_memory(lambda: None))
    with torch.profiler.profile() as profile:
        with pytest.raises(RuntimeError, match=r"\bthe profiler\b"):
            peak_memory(lambda: None)
        torch.ones(3)
    assert profile.events()


def test_a_failing_call_leaves_no_profiler_behind():
    def broken():
        raise KeyError("mine")
    with pytest.raises(KeyError, match="mine"):
        peak_memory(broken)
    assert peak_memory(lambda: torch.ones(10)) == 40
    with pytest.raises(TypeError, match=r"\bfn\b"):
        peak_memory(None)


# --- linear layers on oneDNN

def works():
    """Asked of PyTorch, not of the code under test."""
    try:
        return bool((torch.ops.mkldnn._linear_pointwise(torch.ones(1, 8), torch.eye(8), None, "none", [], "") == 1).all())
    except (AttributeError, RuntimeError):
        return False


HERE = works()
onednn = pytest.mark.skipif(not HERE, reason="this PyTorch has no oneDNN for this processor")


def lm():
    torch.manual_seed(0)
    model = DecoderLM(DecoderConfig(61, 32, 2, 4, 2, 48)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1.4 * p.shape[1] ** -0.5 if p.dim() == 2 else 0.5)
    return model


@onednn
def test_the_same_numbers_within_1e_5(monkeypatch):
    calls, right = [], costs._onednn_linear
    monkeypatch.setattr(costs, "_onednn_linear", lambda x, w, b: calls.append(x.shape) or right(x, w, b))
    model, ids = lm(), torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(model).double()(ids)
    with torch.inference_mode():
        plain = model(ids)
        with onednn_linears(model) as names:
            calls.clear()
            fast = model(ids)
    assert len(calls) == len(names) == 2 * 7 + 1 and "lm_head" in names and "model.layers.0.self_attn.q_proj" in names
    assert calls == [*calls[:14], (2, 9, 32)], "one call for each layer"
    errors = [((out - exact).abs().max() / exact.abs().max()).item() for out in (fast, plain)]
    assert errors[0] <= 1e-5 and errors[0] <= 2 * errors[1] + 1e-7
    with onednn_linears(model):
        calls.clear()
        written = generate(model, ids, max_new_tokens=12)
    assert len(calls) == 12 * 15
    assert torch.equal(written, generate(model, ids, max_new_tokens=12))


@onednn
@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=0, max_size=3), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.booleans())
def test_any_shape(lead, d_in, d_out, bias, strided):
    layer = nn.Linear(d_in, d_out, bias=bias)
    x = torch.randn(*lead, 2 * d_in)[..., ::2] if strided else torch.randn(*lead, d_in)
    with torch.inference_mode(), onednn_linears(layer):
        got = layer(x)
    want = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    assert got.shape == want.shape and got.dtype == torch.float32
    assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


@onednn
def test_afterwards_everything_is_as_before():
    model = lm()
    before, plain = [vars(m).keys() - {"_"} for m in model.modules()], [type(m) for m in model.modules()]
    with pytest.raises(KeyError):
        with onednn_linears(model):
            assert "forward" in vars(model.lm_head)
            raise KeyError
    assert [vars(m).keys() - {"_"} for m in model.modules()] == before and [type(m) for m in model.modules()] == plain
    with onednn_linears(model) as outer, onednn_linears(model) as inner:
        assert outer and inner == []         # already switched
    assert "forward" not in vars(model.lm_head)
    own = nn.Linear(3, 3)
    own.forward = lambda x: x + 1            # somebody's patch stays
    with onednn_linears(own) as names:
        assert names == [] and torch.equal(own(torch.zeros(1, 3)), torch.ones(1, 3))
    assert "forward" in vars(own)


@onednn
def test_hooks_still_run():
    layer, seen = nn.Linear(3, 3), []
    layer.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    with torch.inference_mode(), onednn_linears(layer):
        layer(torch.zeros(2, 3))
    assert seen == [(2, 3)]


@onednn
def test_with_gradients_it_is_the_plain_layer():
    layer, x = nn.Linear(5, 4), torch.randn(3, 5, requires_grad=True)
    layer(x).sum().backward()
    want, x.grad = (x.grad.clone(), layer.weight.grad.clone()), None
    layer.zero_grad()
    with onednn_linears(layer):
        out = layer(x)
        out.sum().backward()
    assert torch.equal(out, layer(x)) and torch.equal(x.grad, want[0]) and torch.equal(layer.weight.grad, want[1])


@onednn
def test_forward_derivatives_are_not_lost():
    layer, x = nn.Linear(5, 4), torch.randn(3, 5)
    want = torch.func.jvp(layer, (x,), (x,))[1]
    with torch.no_grad(), onednn_linears(layer):
        assert torch.equal(torch.func.jvp(layer, (x,), (x,))[1], want)
        assert torch.equal(torch.func.jacfwd(layer)(x[0]), layer.weight)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            assert torch.equal(torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent, want)


@onednn
def test_a_patch_made_inside_stays():
    layer = nn.Linear(3, 3)
    with onednn_linears(layer):
        layer.forward = mine = lambda x: x
    assert vars(layer)["forward"] is mine


@onednn
@torch.no_grad()
def test_parameters_that_are_exchanged_inside():
    layer, x = nn.Linear(5, 4), torch.randn(3, 5)
    with onednn_linears(layer):
        for other in ({"bias": torch.randn(4)}, {"weight": torch.randn(4, 5)}, {"bias": torch.tensor(5.0)}):
            want = F.linear(x, other.get("weight", layer.weight), other.get("bias", layer.bias))
            torch.testing.assert_close(torch.func.functional_call(layer, other, (x,)), want)
        assert torch.func.functional_call(layer, {"weight": torch.empty(4, 5, device="meta"),
                                                  "bias": torch.empty(4, device="meta")}, (x.to("meta"),)).is_meta
        nested = torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)
        torch.testing.assert_close(layer(nested).unbind()[1], F.linear(x[:2], layer.weight, layer.bias))
        torch.testing.assert_close(layer(x.to_sparse_csr()), F.linear(x, layer.weight, layer.bias))


@onednn
def test_defaults_of_the_session_do_not_matter():
    layer = nn.Linear(4, 4)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16), onednn_linears(layer) as names:
            assert names == [""]
    finally:
        torch.set_default_dtype(torch.float32)
    layer.weight = None
    with onednn_linears(layer) as names:
        assert names == []


@onednn
def test_other_inputs_take_the_plain_road():
    layer = nn.Linear(5, 4)
    with torch.no_grad(), onednn_linears(layer) as names:
        assert names == [""]
        assert layer(torch.zeros(0, 5)).shape == (0, 4)
        assert layer(torch.randn(5)).shape == (4,)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(torch.randn(2, 5)).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            layer(torch.randn(2, 6))         # as F.linear says it
        with pytest.raises(RuntimeError):
            layer(torch.randn(2, 5).double())
        layer.double()
        assert layer(torch.randn(2, 5).double()).dtype == torch.float64
        assert torch.vmap(layer)(torch.randn(3, 2, 5).double()).shape == (3, 2, 4)


@onednn
def test_under_vmap_and_compile_it_is_the_plain_layer():
    layer, x = nn.Linear(5, 4), torch.randn(3, 2, 5)
    with torch.no_grad(), onednn_linears(layer):
        want = F.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(torch.vmap(layer)(x), want)
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), want)


def test_layers_that_do_not_fit_are_left_alone():
    class Other(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)
    wild = nn.Linear(3, 3)
    with torch.no_grad():
        wild.weight[0, 0] = math.nan
    model = nn.ModuleDict({"narrow": nn.Linear(3, 3).bfloat16(), "wide": nn.Linear(3, 3).double(), "other": Other(3, 3),
                           "meta": nn.Linear(3, 3, device="meta"), "wild": wild, "empty": nn.Linear(0, 3)})
    with onednn_linears(model) as names:
        assert names == []
    with pytest.raises(TypeError, match=r"\bmodel\b"):
        with onednn_linears(lambda x: x):
            pass


@pytest.mark.parametrize("broken", ["missing", "wrong", "raises"])
def test_without_a_right_onednn_nothing_changes(monkeypatch, broken):
    def operation(x, weight, bias):
        if broken == "missing":
            raise AttributeError("no such operation")
        if broken == "raises":
            raise RuntimeError("not for this processor")
        return F.linear(x, weight, bias) * (1 + 3e-5)
    monkeypatch.setattr(costs, "_onednn_linear", operation)
    layer = nn.Linear(8, 8)
    with onednn_linears(layer) as names:
        assert names == [] and "forward" not in vars(layer)
