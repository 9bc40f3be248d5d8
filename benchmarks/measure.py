"""Check first, then time: what is done with a scenario."""
import json
import math
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import Tensor

from attn_nb import interleaved_times, machine_limits, median_ratios, peak_memory
from benchmarks import scenarios
from benchmarks.scenarios import Case


def outputs(result: Tensor | tuple) -> list[Tensor]:
    """The tensors of a result: an output, or an output and a gradient."""
    return [result] if isinstance(result, Tensor) else list(result)


class Wrong(Exception):
    """A side does not compute what it should; nothing is timed."""


def off_by(got: Tensor | tuple, want: tuple[Tensor, ...]) -> float:
    """Largest difference as a part of the largest number; infinite if it is no such output, NaN if there is a NaN."""
    got = outputs(got)
    if [t.shape for t in got] != [t.shape for t in want]:
        return math.inf
    return torch.stack([(a.detach().double() - b).abs().max() / b.abs().max() for a, b in zip(got, want)]).max().item()


def check(case: Case, bound: float | None = None) -> dict[str, float]:
    """The error of each side; raise unless each computes what it should. bound: in place of the rule."""
    sides = {name: fn for name, (_, fn) in case.sides.items() if name not in case.unchecked}
    found = {name: fn() for name, fn in sides.items() if case.regret or case.same}
    for name, tokens in found.items():
        if case.same and bound is None and not torch.equal(tokens, next(iter(found.values()))):
            raise Wrong(f"{case.title}: {name} writes something else")
    errors = {name: case.regret(found[name]) if case.regret else off_by(fn(), case.want[name]) for name, fn in sides.items()
              if case.regret or case.want}
    peers = [error for name, error in errors.items() if case.sides[name][0] == "peer"]
    eps = torch.finfo(case.dtype).eps
    for name, error in errors.items():       # a peer has a bound of its own, so that it excuses nobody
        peer = case.sides[name][0] == "peer" or not peers or case.regret
        most = bound or (min(64 * eps, 4e-2) if peer else 2 * max(peers) + 1e-6)
        if not error <= most:                # a NaN too
            raise Wrong(f"{case.title}: {name} is off by {error:.1e} of the largest number, at most {most:.1e}")
    return errors


def at_precision(fn, precision: str):
    """fn, with PyTorch told how precise float32 products must be."""
    def run():
        torch.set_float32_matmul_precision(precision)
        try:
            return fn()
        finally:
            torch.set_float32_matmul_precision("highest")
    return run


def floor_ms(case: Case, limits: tuple[float, float]) -> float:
    return 1e3 * max(case.flops / limits[0], case.bytes / limits[1])


def compare(case: Case, device: str, both: bool, limits: tuple[float, float], rounds: int | None) -> dict:
    """Times of all sides in one run, as shipped and, if `both`, with float32 products at "medium"."""
    mode = torch.enable_grad if case.trains else torch.inference_mode
    with mode():
        errors, coarse_errors = check(case), {}
        runs = {(name, "highest"): fn for name, (_, fn) in case.sides.items()}
        if both:
            coarse = {name: (kind, at_precision(fn, "medium")) for name, (kind, fn) in case.sides.items()}
            coarse_errors = check(replace(case, sides=coarse), bound=0.05)       # it may round to bfloat16
            runs |= {(name, "medium"): fn for name, (_, fn) in coarse.items()}
        times = interleaved_times(runs, rounds or case.rounds, device=device)
    middle = {key: statistics.median(seconds) for key, seconds in times.items()}
    peers = [key for key in times if key[1] == "highest" and case.sides[key[0]][0] == "peer"]
    best = min(peers or [("ours", "highest")], key=middle.get)
    ratios = median_ratios(times, to=best)
    to_ours = median_ratios(times, to=("ours", "highest"))
    rows = [{"side": name, "kind": kind, "ms": 1e3 * middle[name, "highest"], "ratio": ratios[name, "highest"],
             "ours_to": 1 / to_ours[name, "highest"], "medium": ratios.get((name, "medium")), "error": errors.get(name),
             "medium_error": coarse_errors.get(name)}
            for name, (kind, _) in case.sides.items()]
    return {"title": case.title, "best_peer": best[0], "floor_ms": floor_ms(case, limits), "rows": rows}


def ladder(device: str, quick: bool, limits: tuple[float, float]) -> list[dict]:
    found = []
    for T in (16, 32) if quick else (64, 128, 256, 512, 1024, 2048, 4096):
        case = scenarios.ladder(T, device, quick)
        with torch.inference_mode():
            check(case)
            functions = {name: fn for name, (_, fn) in case.sides.items()}
            last = {name: functions[name] for name in functions if name.startswith("next token")}
            whole = {name: functions[name] for name in functions if name not in last}
            rounds = 2 if quick else 7 if T < 2048 else 3
            times = {**interleaved_times(whole, rounds, device=device), **interleaved_times(last, 7 * rounds, device=device)}
            peaks = {name: peak_memory(fn, device) + case.cache_bytes * (name in last) for name, fn in functions.items()}
        token = 1e3 * max(case.token[0] / limits[0], case.token[1] / limits[1])
        found.append({"T": T, "floor_ms": floor_ms(case, limits), "token_floor_ms": token, "ms": {
            name: 1e3 * statistics.median(seconds) for name, seconds in times.items()},
            "mib": {name: peak / 2 ** 20 for name, peak in peaks.items()}})
    return found


def memory(device: str, quick: bool, limits: tuple[float, float]) -> list[dict]:
    found = []
    for T in (16, 32) if quick else (512, 1024, 2048, 4096):
        case = scenarios.memory(T, device, quick)
        with torch.inference_mode():
            check(case)
            found.append({"T": T, "mib": {name: peak_memory(fn, device) / 2 ** 20 for name, (_, fn) in case.sides.items()}})
    return found


def growth(device: str, quick: bool, limits: tuple[float, float]) -> list[dict]:
    found = []
    for new in (4, 8) if quick else (32, 64, 128, 256):
        case = scenarios.growth(new, device, quick)
        check(case)
        times = interleaved_times({name: fn for name, (_, fn) in case.sides.items()}, 1 if quick else 3, device=device)
        found.append({"T": new, "ms": {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}})
    return found


def compiled(device: str, quick: bool, limits: tuple[float, float]) -> list[dict]:
    """torch.compile against the same module as it is; programs: how many were made over all lengths."""
    from torch._dynamo.utils import counters

    found = []
    for name, module, call, lengths in scenarios.compile_steps(device, quick):
        torch.compiler.reset()
        counters.clear()
        fast = torch.compile(module, fullgraph=True, dynamic=True, mode="reduce-overhead" if device == "cuda" else None)
        for n in lengths:
            got = [t.clone() for t in outputs(call(fast, n))]
            error = off_by(tuple(got), tuple(t.double() for t in outputs(call(module, n))))
            if not error <= 1e-4:
                raise Wrong(f"{name}, {n}: compiled, it is off by {error:.1e}")
        programs = counters["stats"]["unique_graphs"]
        times = interleaved_times({"compiled": lambda: call(fast, lengths[-1]), "as it is": lambda: call(module, lengths[-1])},
                                  2 if quick else 20, device=device)
        found.append({"side": name, "ratio": median_ratios(times, to="as it is")["compiled"], "programs": programs})
    return found


SWEEPS = {"ladder": ladder, "memory": memory, "growth": growth, "compile": compiled}
NAMES = (*scenarios.SCENARIOS, *SWEEPS)


def run(names: list[str], device: str, quick: bool, rounds: int | None) -> dict:
    """Everything that was asked for, as what json.dump takes."""
    dtypes = [torch.float32, torch.bfloat16] if device == "cpu" else [torch.float32, torch.bfloat16, torch.float16]
    limits = {dtype: machine_limits(dtype, device) for dtype in dtypes}
    found = {"device": torch.cuda.get_device_name() if device == "cuda" else processor(),
             "threads": torch.get_num_threads(), "torch": torch.__version__.split("+")[0],
             "transformers": transformers.__version__, "quick": quick,
             "limits": {str(d)[6:]: {"gflops": f / 1e9, "gbytes": b / 1e9} for d, (f, b) in limits.items()},
             "scenarios": {}, "sweeps": {}, "skipped": []}
    if why := scenarios.missing("x_transformers"):
        found["skipped"].append(f"x-transformers: {why}")
    jobs = [(name, dtype) for name in names for dtype in (dtypes if name in scenarios.SCENARIOS else dtypes[:1])]
    for number, (name, dtype) in enumerate(jobs, 1):
        kind = str(dtype)[6:]
        print(f"[{number}/{len(jobs)}] {name} {kind}", file=sys.stderr, flush=True)
        if name in SWEEPS:
            found["sweeps"][name] = SWEEPS[name](device, quick, limits[dtype])
            continue
        case = scenarios.SCENARIOS[name](dtype, device, quick)
        found["scenarios"][f"{name} {kind}"] = compare(case, device, dtype == torch.float32, limits[dtype], rounds)
    return found


def processor() -> str:
    """What the processor calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    import platform
    return platform.processor() or platform.machine()


def lines(found: dict) -> list[str]:
    """The table as text."""
    limits = ", ".join(f"{kind} {x['gflops']:.0f} GFLOP/s" for kind, x in found["limits"].items())
    out = [f"{found['device']}, {found['threads']} threads, torch {found['torch']}, transformers {found['transformers']}",
           f"limits: {limits}, reads {found['limits']['float32']['gbytes']:.0f} GB/s",
           "ratio: time / that of the best library as shipped; medium: the same with float32 products at \"medium\""]
    for name, result in found["scenarios"].items():
        out += ["", f"{name}: {result['title']}; floor {result['floor_ms']:.3g} ms",
                f"  {'':42}{'ms':>9}{'ratio':>8}{'medium':>8}{'ours / it':>11}{'error':>10}"]
        for row in result["rows"]:
            medium = f"{row['medium']:8.2f}" if row["medium"] else " " * 8
            error = f"{row['error']:10.1e}" if row["error"] is not None else ""
            out.append(f"  {row['side']:42}{row['ms']:9.3f}{row['ratio']:8.2f}{medium}{row['ours_to']:11.2f}{error}")
    for name, rows in found["sweeps"].items():
        out += ["", name]
        for row in rows:
            if name == "compile":
                out.append(f"  {row['side']:42} compiled / as it is {row['ratio']:.2f}, programs {row['programs']}")
                continue
            for what, unit in (("ms", "ms"), ("mib", "MiB")):
                if what in row:
                    out.append(f"  T {row['T']:5}  " + "  ".join(f"{n} {x:.3g} {unit}" for n, x in row[what].items()))
    return out + [""] + [f"skipped: {line}" for line in found["skipped"]]


def write(found: dict, path: Path) -> None:
    """All or nothing: the file is as it was until the new one is whole."""
    def rounded(x):
        if isinstance(x, float):
            return float(f"{x:.4g}")
        return {k: rounded(v) for k, v in x.items()} if isinstance(x, dict) else [rounded(v) for v in x] if isinstance(
            x, list) else x
    text = json.dumps(rounded(found), indent=1, allow_nan=False) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as new:
        try:
            new.write(text)
            new.close()
            os.chmod(new.name, 0o644)
            os.replace(new.name, path)
        except BaseException:
            os.unlink(new.name)
            raise
