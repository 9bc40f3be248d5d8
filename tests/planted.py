"""Bugs planted by name. Each must be caught twice: by a cell of its chapter, and by the tests.

    python tests/planted.py           # prove the kills that are new or out of date; write the ledger and the book's report
    python tests/planted.py --all     # prove every kill again (make plant)

The bugs are data, one file per chapter in tests/bugs/: a name, the reason, the definition that is changed, and two pieces of
code that are compared by tokens (source.py), so that a new layout leaves them applicable.

The ledger remembers who killed each bug, under a key of everything that the kill depends on. A row with another key is out
of date, and a test says so. A right key proves nothing about a module that calls the changed one, so CI also proves again
the kills of every module that changed, or imports one that did, and a rotating tenth of the rest (`due`).

ATTN_NB_PLANT=<name> makes the test suite import the package with that bug in it.
"""
import argparse
import ast
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "nbs/_ext"), str(ROOT / "tests")]

import source as code  # noqa: E402
from nbdev_book import imported, split  # noqa: E402

BUGS_AT, LEDGER = ROOT / "tests/bugs", ROOT / "tests/bugs/ledger.json"
REPORT = ROOT / "nbs/_generated/planted_bugs.md"
HELPERS = [ROOT / name for name in ("tests/conftest.py", "tests/peers.py", "tests/shape_comments.py", "attn_nb/testing.py")]
MUTANT = None  # (module, source) that conftest imports instead of the file's
TIMEOUT = 300  # seconds for one bug


@cache
def package():
    """Module -> source, in reading order."""
    paths = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
    files = [ROOT / f"attn_nb/{p.stem[3:]}.py" for p in paths]
    return {f.stem: f.read_text() for f in files if f.exists()}


@cache
def code_cells(module):
    """(id, source, exported) of the code cells of a module's notebook that plain Python can run."""
    import nbformat

    nb = nbformat.read(next((ROOT / "nbs").glob(f"[0-9][0-9]_{module}.ipynb")), 4)
    return [(c.id, c.source, bool({"export", "exporti"} & split(c.source)[0].keys()))
            for c in nb.cells if c.cell_type == "code" and "%pip" not in c.source]


@dataclass(frozen=True)
class Bug:
    name: str       # what is wrong, in words
    why: str        # how people come to write it, or what it would do
    where: str      # the function, method or constant that is changed
    old: str        # occurs once in it
    new: str
    file: str       # tests/bugs/<file>.toml

    @property
    def module(self):
        """Where the definition stands; a function may have moved to another module than its file's."""
        names = [self.file] + [m for m in package() if m != self.file]
        found = [m for m in names if m in package() and self.where in code.definitions(package()[m])]
        if not found or (found[0] != self.file and len(found) > 1):
            raise ValueError(f"{self.name}: {self.where} is defined in {found or 'no module'}")
        return found[0]

    @property
    def chapter(self):
        return next((ROOT / "nbs").glob(f"[0-9][0-9]_{self.module}.ipynb")).stem

    @property
    def cell(self):
        """Number of the exported cell that holds the definition."""
        return next(n for n, (_, text, exported) in enumerate(code_cells(self.module))
                    if exported and self.where in code.definitions(text))

    def plant(self, text):
        try:
            return code.change(text, self.where, self.old, self.new)
        except ValueError as e:
            raise ValueError(f"{self.name}: {e}") from None


def load(folder=BUGS_AT):
    return [Bug(b["name"], b["why"], b["in"], b["old"].strip("\n"), b["new"].strip("\n"), path.stem)
            for path in sorted(folder.glob("*.toml")) for b in tomllib.loads(path.read_text())["bug"]]


BUGS = load()
if name := os.environ.get("ATTN_NB_PLANT"):
    bug = next(b for b in BUGS if b.name == name)
    MUTANT = bug.module, bug.plant(package()[bug.module])


# --- the ledger: who killed what, and what that depends on

def digest(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@cache
def family(*modules):
    """Sources of these modules and of those that they import, directly or not."""
    done, todo = set(), {*modules}
    while todo:
        done.add(name := todo.pop())
        todo |= imported(package()[name]) - done
    return tuple(package()[name] for name in sorted(done))


@cache
def state(module):
    """Digest of a module and of those that it imports; layout, comments and docstrings do not count."""
    return digest((ROOT / "constraints.txt").read_text(), *(ast.dump(code.undocumented(text)) for text in family(module)))


def meaning(bug):
    """The bug, and everything in the package that the changed function calls."""
    top, (_, cell, _) = bug.where.split(".")[0], code_cells(bug.module)[bug.cell]
    changed = "\n".join(map(ast.dump, code.parts(bug.plant(cell))[top]))
    return digest(bug.where, changed, code.closure(frozenset({top}), family(bug.module)))


@cache
def test_state(test):
    """A test, the helpers and fixtures that it uses, and what the file does on import."""
    file, _, name = test.partition("::")
    if not (ROOT / file).is_file() or re.match(r"\w*", name)[0] not in code.parts((ROOT / file).read_text()):
        return ""
    texts = tuple(p.read_text() for p in (ROOT / file, *HELPERS))
    always = re.findall(r"autouse=True\)\ndef (\w+)", "".join(texts))
    rest = "\n".join(map(ast.dump, code.parts(texts[0])[""]))
    return digest(rest, code.closure(frozenset({re.match(r"\w*", name)[0], *always}), texts))


@cache
def cell_parts(text):
    """Of one cell: a digest of what it does, the words in it, the modules that it imports."""
    tree = ast.parse(text)
    return digest(ast.dump(tree)), code.words(tree), imported(text)


@cache
def cell_state(module, cell):
    """The cells from the first to the one that notices, and what they use of the package."""
    cells = code_cells(module)
    here = [n for n, (name, *_) in enumerate(cells) if name == cell]
    used = [cell_parts(text) for _, text, _ in cells[:here[0] + 1]] if here else []
    words, modules = (frozenset().union(*(part[k] for part in used)) for k in (1, 2))
    return digest(*(part[0] for part in used), code.closure(words, family(*sorted({module} | modules))))


def keys(bug, cell, test):
    """What the two kills of a row rest on."""
    return digest(meaning(bug), cell, cell_state(bug.module, cell)), digest(meaning(bug), test, test_state(test))


def ledger(path=LEDGER):
    """{"proved": module -> its state when all its kills were last proved, "kills": bug -> [cell, key, test, key]}"""
    return json.loads(path.read_text()) if path.exists() else {"proved": {}, "kills": {}}


def write(book, path=LEDGER):
    kills = {b.name: book["kills"][b.name] for b in BUGS if b.name in book["kills"]}
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in kills.items())
    proved = json.dumps(book["proved"], indent=1, sort_keys=True)
    path.write_text(f'{{"proved": {proved},\n "kills": {{\n{rows}\n}}}}\n')


def stale(book, bugs=None):
    """Two lists: bugs whose kill by a cell, and by a test, is missing from the ledger or rests on something else by now."""
    by_cell, by_test = [], []
    for bug in BUGS if bugs is None else bugs:
        cell, cell_key, test, test_key = book["kills"].get(bug.name, ["", "", "", ""])
        want_cell, want_test = keys(bug, cell, test)
        later = [name for name, *_ in code_cells(bug.module)[bug.cell + 1:]]
        by_cell += [bug] if cell not in later or cell_key != want_cell else []
        by_test += [bug] if not test_state(test) or test_key != want_test else []
    return by_cell, by_test


def turn():
    """Whose turn it is, 0 to 9: drawn anew by every commit."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return int(done.stdout.strip() or "0", 16) % 10


def due(book, turn):
    """What CI proves again: all of a module that changed, or imports one that did; of the others the cells of every tenth
    chapter and every tenth test."""
    changed = {m for m in package() if book["proved"].get(m) != state(m)}
    modules = list(package())
    by_cell = [b for b in BUGS if b.module in changed or modules.index(b.module) % 10 == turn]
    return by_cell, [b for n, b in enumerate(BUGS) if b.module in changed or n % 10 == turn]


# --- proofs

def in_fork(call, seconds=TIMEOUT):
    """(exit code, what was printed) of call() in a forked process, which stops after so many seconds."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            signal.alarm(seconds)
            os.dup2(said.fileno(), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with contextlib.suppress(BaseException):
                value = call()
                sys.stdout.flush()
                os._exit(value)
            os._exit(99)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return status, said.read().decode(errors="replace")


def run_tests(module, text, tests, seconds=TIMEOUT):
    """(exit code, output) of the first failure among quick tests, with `text` as the module. The package must not be loaded."""
    def call():
        global MUTANT
        import pytest

        MUTANT = module, text
        os.environ["CI"] = ""
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:anyio", "-p", "no:xdist",
                   "--assert=plain", "--no-header", "--tb=no", "-o", "addopts="]
        return int(pytest.main([*tests, *options]))

    return in_fork(call, seconds)


def killer(bug, first=""):
    """The test that fails with the bug planted, or "". `first` is tried before whole files."""
    text = bug.plant(package()[bug.module])
    for tests in first, f"tests/test_{bug.module}.py", "tests/test_modules.py":
        if tests:
            status, said = run_tests(bug.module, text, [tests])
            if status == 1 and (found := re.search(r"^FAILED (\S+?::.+?)(?: - .*)?$", said, flags=re.M)):
                return found[1]
    return ""


def killers(bugs, book):
    """Bug -> the test that kills it, two at a time. In a process that has not loaded the package."""
    assert not any(m.startswith("attn_nb.") for m in sys.modules)
    # what the children need, loaded once; single threads survive a fork
    import hypothesis  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from shape_comments import compiled

    for module, text in package().items():
        compiled(text, str(ROOT / f"attn_nb/{module}.py"))
    torch.set_num_threads(1)
    rows = book["kills"]
    with ThreadPoolExecutor(2) as pool:
        names = pool.map(lambda b: killer(b, rows.get(b.name, ["", "", "", ""])[2]), bugs)
        found = {bug.name: name for bug, name in zip(bugs, names)}
    tests = sorted({*found.values()} - {""})
    module, text = next(iter(package().items()))
    status, said = run_tests(module, text, tests) if tests else (0, "")
    if status:
        raise RuntimeError(f"these tests fail without a bug, so they prove nothing:\n{said[-2000:]}")
    return found


def found_by(kind, bugs):
    """What `killers` or `killing_cells` finds, in a fresh process each."""
    if not bugs:
        return {}
    done = subprocess.run([sys.executable, __file__, kind], cwd=ROOT, text=True, capture_output=True,
                          input=json.dumps([b.name for b in bugs]),
                          env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def prove(by_cell, by_test, book):
    """A ledger with these kills proved again. A bug that nobody notices gets an empty place."""
    cells, tests = found_by("--cells", by_cell), found_by("--tests", by_test)
    kills = {}
    for bug in BUGS:
        cell, _, test, _ = row = book["kills"].get(bug.name, ["", "", "", ""])
        if bug.name in cells or bug.name in tests:
            cell, test = cells.get(bug.name, cell), tests.get(bug.name, test)
            cell_key, test_key = keys(bug, cell, test)
            row = [cell, cell_key if bug.name in cells else row[1], test, test_key if bug.name in tests else row[3]]
        kills[bug.name] = row
    proved = dict(book["proved"])
    for module in package():
        mine = {b.name for b in BUGS if b.module == module}
        if mine <= cells.keys() and mine <= tests.keys():
            proved[module] = state(module)
    return {"proved": proved, "kills": kills}


def disproved(old, new):
    """Sentences about rows of a ledger that a proof did not confirm."""
    for name, (cell, _, test, _) in new["kills"].items():
        was = old["kills"].get(name, ["", "", "", ""])
        for kind, now, before in ("cell", cell, was[0]), ("test", test, was[2]):
            if not now:
                yield f"{name}: no {kind} notices it"
            elif now != before:
                yield f"{name}: the ledger names the {kind} {before or 'nobody'}, it is {now}"


def report(book):
    """The table that the book shows."""
    lines = ["| planted bug | chapter | caught by the cell | caught by the test |", "|---|---|---|---|"]
    for bug in sorted(BUGS, key=lambda b: b.chapter):
        cell, _, test, _ = book["kills"].get(bug.name, ["nobody", "", "nobody", ""])
        test = re.sub(r"\[.*", "", test.split("::")[-1]).removeprefix("test_").replace("_", " ")
        lines.append(f"| {bug.name} | {bug.chapter[:2]} | `{cell}` | {test} |")
    return "\n".join(lines) + "\n"


def main(everything=False):
    book, start = ledger(), time.perf_counter()
    work = (BUGS, BUGS) if everything else stale(book)
    print(f"to prove: {len(work[0])} kills by cells, {len(work[1])} by tests, of {len(BUGS)} each", flush=True)
    new = prove(*work, book)
    write(new)
    REPORT.write_text(report(new))
    alive = [name for name, (cell, _, test, _) in new["kills"].items() if not (cell and test)]
    print(f"noticed by nobody: {alive}" if alive else "each is noticed twice", f"({time.perf_counter() - start:.0f} s)")
    return bool(alive)


if __name__ == "__main__":
    import planted  # under its own name, as conftest finds it

    if sys.argv[1:] in (["--cells"], ["--tests"]):
        wanted = {*json.load(sys.stdin)}
        bugs = [b for b in planted.BUGS if b.name in wanted]
        if sys.argv[1] == "--tests":
            print(json.dumps(planted.killers(bugs, planted.ledger())))
        else:
            from run_chapter import killing_cells

            print(json.dumps(killing_cells(bugs)))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--all", action="store_true", help="prove every kill again")
        sys.exit(planted.main(parser.parse_args().all))
