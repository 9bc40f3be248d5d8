"""`make bench`: it runs, compares right numbers, refuses bad input in one line, and the committed table is whole."""
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import measure, scenarios
from benchmarks.scenarios import Case

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "nbs/_generated/bench_cpu.json"


def bench(*args, code=None):
    command = [sys.executable, "-m", "benchmarks"] if code is None else [sys.executable, "-c", code]
    return subprocess.run([*command, *args], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_every_scenario_runs_and_is_written(tmp_path):
    names = [name for name in measure.NAMES if name != "compile"]      # a minute, for nothing more than "it runs"
    done = bench("--quick", "--out", str(tmp_path / "table.json"), *names)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "table.json").read_text())
    assert set(found["scenarios"]) == {f"{n} {d}" for n in scenarios.SCENARIOS for d in ("float32", "bfloat16")}
    assert set(found["sweeps"]) == set(measure.SWEEPS) - {"compile"} and found["quick"]
    assert_whole(found)
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
    assert "[1/" in done.stderr and "gqa float32" in done.stdout and "ratio" in done.stdout


def assert_whole(found):
    """Every row has its times; every side but the parts was compared with the right answer."""
    assert found["limits"]["float32"]["gflops"] > 0 and found["threads"] >= 1
    for name, result in found["scenarios"].items():
        kinds = {row["side"]: row["kind"] for row in result["rows"]}
        assert kinds[result["best_peer"]] == "peer" and {"ours", "peer", "parts"} <= set(kinds.values())
        assert result["floor_ms"] > 0
        for row in result["rows"]:
            assert row["ms"] > 0 and row["ratio"] > 0 and (row["medium"] is None) == (not name.endswith("float32"))
            assert row["side"] == "parts" or row["error"] < 0.05
        best = next(row for row in result["rows"] if row["side"] == result["best_peer"])
        assert best["ratio"] == 1


def test_the_committed_table_is_whole():
    found = json.loads(TABLE.read_text())
    assert not found["quick"] and set(found["sweeps"]) == set(measure.SWEEPS)
    assert set(found["scenarios"]) == {f"{n} {d}" for n in scenarios.SCENARIOS for d in ("float32", "bfloat16")}
    assert_whole(found)
    pins = dict(line.split(" ;")[0].strip().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    assert found["torch"] == pins["torch"] and found["transformers"] == pins["transformers"]
    assert [row["T"] for row in found["sweeps"]["ladder"]] == [64, 128, 256, 512, 1024, 2048, 4096]
    assert all(row["programs"] == 1 for row in found["sweeps"]["compile"]), "a recompilation"
    assert TABLE.stat().st_size < 100_000


@pytest.mark.parametrize("args, words", [
    (["nothing"], "no scenario 'nothing'; there are mha, mha-train, gqa"),
    (["--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
    (["--rounds", "0"], "rounds must be at least 1, got 0"), (["--rounds", "x"], "argument --rounds: invalid int value"),
    (["--colour"], "unrecognized arguments: --colour"),
    (["--out", "nowhere/table.json"], "out must be a file in a folder that can be written"),
    (["--out", "nbs"], "out must be a file"), (["--out", "x" * 300], "out must be a file"),
    (["--out", os.devnull], "out must be a file")])
def test_bad_input_is_one_line_and_exit_2(args, words):
    before = TABLE.read_bytes()
    done = bench(*args)
    assert done.returncode == 2 and done.stdout == "" and re.fullmatch(r"benchmarks: .*\n", done.stderr) and words in done.stderr
    assert TABLE.read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_no_gpu_is_one_line_and_exit_2():
    done = bench("--device", "cuda")
    assert done.returncode == 2 and done.stderr == "benchmarks: no GPU that PyTorch can use; leave --device out\n"


def test_a_missing_peer_is_one_line_and_exit_2():
    code = ("import sys; sys.modules['transformers'] = None; sys.argv = ['benchmarks']\n"
            "import runpy; runpy.run_module('benchmarks', run_name='__main__')")
    before = TABLE.read_bytes()
    done = bench(code=code)
    assert done.returncode == 2
    assert re.fullmatch("benchmarks: transformers is missing or broken, and the table needs it: .*\n", done.stderr)
    assert TABLE.read_bytes() == before


def test_a_run_that_breaks_off_writes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text("old")
    (tmp_path / "table.new").write_text("somebody's")
    with pytest.raises(ValueError):
        measure.write({"a": float("nan")}, path)
    monkeypatch.setattr(measure.os, "replace", lambda *a: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        measure.write({"a": 1.23456}, path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"table.json": "old", "table.new": "somebody's"}
    monkeypatch.undo()
    measure.write({"a": 1.23456}, path)
    assert json.loads(path.read_text()) == {"a": 1.235} and len(list(tmp_path.iterdir())) == 2


# --- numbers before times

def spoiled(out, how):
    """What a side might give in place of the right output."""
    if not isinstance(out, tuple) and not out.is_floating_point():
        tokens = out.clone()
        tokens[0, -1] = (tokens[0, -1] + 1) % 50
        return {"wrong": tokens, "nan": tokens[:, :-1], "short": tokens[:, :-2], "batch": tokens[None]}[how]
    first, *rest = out = measure.outputs(out)
    if how == "nan":
        return (*out[:-1], out[-1] * torch.nan)
    if how == "short":
        return tuple(rest) if rest else first[:, :-1]
    if how == "batch":
        return (first[None], *rest)
    return tuple(t + t.abs().max() / 100 for t in out)


@pytest.mark.parametrize("how", ["wrong", "nan", "short", "batch"])
@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_a_wrong_side_is_not_timed(name, how):
    """Each side in turn gives something else; the check names it."""
    case = scenarios.SCENARIOS[name](torch.float32, "cpu", True)
    with torch.set_grad_enabled(case.trains):
        measure.check(case)
        for side, (kind, fn) in case.sides.items():
            if side not in case.unchecked:
                wrong = replace(case, sides={**case.sides, side: (kind, lambda fn=fn: spoiled(fn(), how))})
                with pytest.raises(measure.Wrong, match="is off by|writes something else"):
                    measure.check(wrong)


@torch.no_grad()
def test_half_precision_is_judged_too():
    """A token that does not see the last key; a text that is not the model's; the bound is twice the libraries' error."""
    case = scenarios.SCENARIOS["decode-256"](torch.bfloat16, "cpu", True)
    measure.check(case)
    wrong = replace(case, sides={**case.sides, "ours": ("ours", lambda: case.sides["ours"][1]() * 1.05)})
    with pytest.raises(measure.Wrong, match="ours is off by"):
        measure.check(wrong)
    case = scenarios.SCENARIOS["generate"](torch.bfloat16, "cpu", True)
    measure.check(case)
    for text in (lambda: torch.zeros_like(case.sides["ours"][1]()), lambda: case.sides["ours"][1]()[:, :-1]):
        with pytest.raises(measure.Wrong, match="ours is off by"):
            measure.check(replace(case, sides={**case.sides, "ours": ("ours", text)}))


def test_training_compares_the_gradients_of_weights():
    case = scenarios.SCENARIOS["mha-train"](torch.float32, "cpu", True)

    def lazy():
        out, grad, size = case.sides["ours"][1]()
        return out, grad, size / 2
    with pytest.raises(measure.Wrong, match="ours is off by 5"):
        measure.check(replace(case, sides={**case.sides, "ours": ("ours", lazy)}))


def test_a_peer_that_is_wrong_does_not_excuse_us():
    """The bound grows with the worst peer, so a peer has a bound of its own."""
    with torch.no_grad():
        case = scenarios.SCENARIOS["gqa"](torch.float32, "cpu", True)
        sides = {n: (k, lambda fn=fn: fn() * 1.01) for n, (k, fn) in case.sides.items()}
        with pytest.raises(measure.Wrong, match="is off by"):
            measure.check(replace(case, sides=sides))


def test_precision_is_put_back():
    def broken():
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    with pytest.raises(KeyError):
        measure.at_precision(broken, "medium")()
    assert torch.get_float32_matmul_precision() == "highest"


def test_ladder_and_sweeps_check_their_sides_too():
    with torch.inference_mode():
        case = scenarios.ladder(16, "cpu", True)
        assert len(case.sides) == 6 and measure.check(case)
        for side, (kind, fn) in case.sides.items():
            with pytest.raises(measure.Wrong, match="is off by"):
                measure.check(replace(case, sides={**case.sides, side: (kind, lambda fn=fn: 1.01 * fn())}))


def test_floor_is_the_larger_price():
    case = Case("", {}, flops=2e9, bytes=1e9)
    assert measure.floor_ms(case, (1e9, 1e9)) == 2000 and measure.floor_ms(case, (1e12, 1e9)) == 1000


def test_cost_of_a_layer_by_counting():
    from torch.utils.flop_counter import FlopCounterMode

    from attn_nb import GroupedQueryAttention
    layer = GroupedQueryAttention(64, 4, 2)
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(3, 8, 64), return_weights=True)
    flops, bytes_ = scenarios.layer_cost(3, 8, 0, 64, 4, 2, 4)
    hidden = 3 * 4 * 64 * (8 * 8 - 8 * 9 // 2)           # pairs of the future, which the counter counts
    assert counter.get_total_flops() - hidden == flops
    weights = sum(p.numel() for p in layer.parameters())
    assert bytes_ == 4 * (weights + 3 * (2 * 8 * 64 + 2 * 8 * 32))
