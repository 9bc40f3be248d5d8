"""Plant generated bugs in the package and count those that the fast tests kill. Writes the score that the book shows.

    python tools/mutate.py [module ...]        (or: make mutate; half an hour or more on 2 cores)
    python tools/mutate.py --every 3 module    (a third of them; the report says so)

The bugs are cosmic-ray's: every operator, comparison, constant, condition and loop, one change at a time. Changes that
only touch annotations are left out. Each runs the module's own test file in a forked process, slow tests left out.
The report names the commit and the day of each count.
A survivor needs a reason in tests/mutation_survivors.toml: without one, or below 90 %, the exit code is 1.
Named modules get new lines in the report; those of the others stay as they are.
Bugs that died once are remembered in _build/mutants_killed.txt, function by function, and not run again; `make clean`
forgets them, which is right after a test was removed.
"""
import argparse
import ast
import datetime
import hashlib
import os
import re
import signal
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

KILLED = Path("_build/mutants_killed.txt")
REPORT, REASONS = Path("nbs/_generated/mutation.md"), Path("tests/mutation_survivors.toml")
GOAL, TIMEOUT = 0.90, 60  # share of mutants killed; seconds per mutant


class WithoutAnnotations(ast.NodeTransformer):
    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.returns = None
        return node

    def visit_arg(self, node):
        node.annotation = None
        return node


def meaning(source):
    """What a module does, as text: equal for sources that differ in annotations or layout only."""
    return ast.dump(WithoutAnnotations().visit(ast.parse(source)))


def mutants(source):
    """(line number, line before, line after, new source), one for each change that means something."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    seen = {meaning(source)}
    for name in sorted(operator_names()):
        if "Variable" in name:  # needs settings; replaces variables at random
            continue
        occurrence = 0
        while new := mutate_code(source, get_operator(name)(), occurrence):
            occurrence += 1
            try:
                what = meaning(new)
            except SyntaxError:  # a bare * in a signature is no operator
                continue
            if what not in seen:
                seen.add(what)
                pairs = enumerate(zip(source.splitlines(), new.splitlines()), 1)
                number, (old_line, new_line) = next((n, p) for n, p in pairs if p[0] != p[1])
                yield number, old_line.strip(), new_line.strip(), new


def digest(module, mutant):
    """Names a mutant by the changed function alone, so that a change elsewhere in the module does not forget it."""
    number, _, _, source = mutant
    lines = source.splitlines()
    part = next((lines[n.lineno - 1:n.end_lineno] for n in ast.parse(source).body
                 if n.lineno <= number <= n.end_lineno), [lines[number - 1]])
    return hashlib.sha256("\n".join([module, *part]).encode()).hexdigest()


def killed(module, source):
    """Run the module's fast tests on this source in a forked child: "fails", "hangs", or "" if it survives."""
    from planted import run_tests

    code, _ = run_tests(module, source, [f"tests/test_{module}.py"], TIMEOUT)
    if code == -signal.SIGALRM:
        return "hangs"
    if code not in (0, 1, 2, 3, 99):          # 4, 5: nothing was run
        raise RuntimeError(f"{module}: pytest ended with {code}")
    return "fails" if code else ""


def kept(text, modules):
    """What the report says of all other modules: {module: lines} of the table, of what was left out, of survivors."""
    found = {}, {}, {}
    for line in text.splitlines():
        for kind, start in zip(found, (r"\| (\w+) \| \d+ \|", r"\* Of `(\w+)`", r"\* `(\w+)`: ")):
            if (m := re.match(start, line)) and m[1] not in modules:
                kind.setdefault(m[1], []).append(line)
    return found


def report(rows, partly, notes):
    """The page that the book shows."""
    rows, partly, notes = ([line for name in sorted(kind) for line in kind[name]] for kind in (rows, partly, notes))
    table = ["| module | generated bugs | killed | share | counted at |", "|---|---|---|---|---|", *rows, ""]
    left_out = ["Not all were tried:", "", *partly, ""] if partly else []
    survivors = ["The survivors, each with the reason why no test can or need see it:", "", *notes]
    return "\n".join([*table, *left_out, *survivors]) + "\n"


def commit():
    """The commit that is counted, and the day."""
    def git(*words):
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "attn_nb", "tests") else ""
    return f"{git('rev-parse', '--short', 'HEAD')}{changed}, {datetime.date.today()}"


def main(modules, every=1):
    sys.path[:0] = ["tests"]
    # what the children need, loaded once; single threads survive a fork
    import hypothesis  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import torch

    torch.set_num_threads(1)
    KILLED.parent.mkdir(exist_ok=True)
    reasons = tomllib.loads(REASONS.read_text()) if REASONS.exists() else {}
    rows, partly, notes = kept(REPORT.read_text() if REPORT.exists() else "", modules)
    bad, when = False, commit()
    for module in modules:
        source = Path(f"attn_nb/{module}.py").read_text()
        if killed(module, source):
            sys.exit(f"{module}: its tests fail without any change")
        everything, dead, alive = list(mutants(source)), 0, []
        work = everything[::every]
        if every > 1:
            partly[module] = [f"* Of `{module}` one in {every}, of {len(everything)}."]
        known = set(KILLED.read_text().split()) if KILLED.exists() else set()
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, open(KILLED, "a") as memory:
            gone_by = pool.map(lambda m: "fails" if digest(module, m) in known else killed(module, m[3]), work)
            for n, (mutant, gone) in enumerate(zip(work, gone_by), 1):
                dead += bool(gone)
                if gone == "fails":               # what hangs is tried again
                    print(digest(module, mutant), file=memory, flush=True)
                elif not gone:
                    alive.append(mutant)
                print(f"\r{module}: {n}/{len(work)} tried, {n - dead} alive", end="", flush=True)
        print()
        rows[module], notes[module] = [
            f"| {module} | {len(work)} | {dead} | {dead / len(work):.1%} | {when} |"], []
        bad |= dead / len(work) < GOAL
        for number, old, new, _ in alive:
            reason = next((r["why"] for r in reasons.get(module, []) if r["line"] == old
                           and new in ([r["becomes"]] if isinstance(r["becomes"], str) else r["becomes"])), None)
            bad |= reason is None
            print(f"  {module}.py:{number}  {old}  ->  {new}   {reason or 'NO REASON GIVEN'}")
            notes[module].append(f"* `{module}`: `{old}` became `{new}`. {reason or 'Not explained.'}")
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(report(rows, partly, notes))
    print("\n".join(line for name in modules for line in rows[name]))
    return bad


if __name__ == "__main__":
    everything = sorted(p.stem for p in Path("attn_nb").glob("*.py") if not p.stem.startswith("_"))
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("modules", nargs="*", default=everything, metavar="module")
    options.add_argument("--every", type=int, default=1, choices=range(1, 100), metavar="N")
    options = options.parse_args()
    sys.exit(main(options.modules, options.every))
