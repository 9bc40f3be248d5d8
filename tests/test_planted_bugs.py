"""Every bug of the named list dies twice, the ledger of who killed it cannot be forged, and a new layout leaves it alone."""
import ast
import json
import os
import re
import subprocess
import sys
import time

import planted
import pytest
import source as code
from planted import BUGS, REPORT


def relaid(text):
    """The same module in another layout: a break after each comma of a call, no comments, other quotes; its functions in
    another order."""
    lines = []
    for start, end in code.logical_lines(text):
        indent = len(text[start:end]) - len(text[start:end].lstrip(" "))
        words = []
        for m in code.TOKEN.finditer(text[start:end].strip()):
            if m.lastgroup == "string" and re.fullmatch(r"'[^'\"\\]*'|\"[^'\"\\]*\"", m[0]):
                words.append(m[0].translate(str.maketrans("'\"", "\"'")))
            elif m.lastgroup in ("break", "space"):
                words.append(" ")
            elif m.lastgroup != "comment":
                words.append(m[0])
        line, depth = "", 0
        for word in words:
            depth += (word in "([{" and len(word) == 1) - (word in ")]}" and len(word) == 1)
            line += word + ("\n   " if word == "," and depth else "")
        lines.append(" " * indent + line.rstrip())
    text = "\n".join(lines) + "\n"
    places = sorted(v for k, v in code.definitions(text).items() if "." not in k and text[v[0]:].startswith("def "))
    blocks = [text[a:b] for a, b in places]
    for a, b in reversed(places):
        text = text[:a] + text[b:]
    return text + "\n\n".join(reversed(blocks))


# --- what a bug is

def test_the_list_is_sound():
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 459
    for bug in BUGS:
        assert 25 <= len(bug.why) <= 130 and bug.why.endswith("."), f"{bug.name}: no reason"
        module = planted.package()[bug.module]
        changed = bug.plant(module)
        assert ast.parse(changed) and [t.text for t in code.tokens(changed)] != [t.text for t in code.tokens(module)], bug.name
        name, text, exported = planted.code_cells(bug.module)[bug.cell]
        assert exported and ast.parse(bug.plant(text)), name


def test_no_bug_is_a_name_that_nobody_knows(tmp_path):
    """It would die of a NameError, whatever the tests look at."""
    for n, bug in enumerate(BUGS):
        (tmp_path / f"bug_{n}.py").write_text(bug.plant(planted.package()[bug.module]))
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise",
                           tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("module", sorted({bug.module for bug in BUGS}))
def test_another_layout_leaves_every_bug_applicable(module):
    """Other spaces, breaks, quotes, no comments, functions moved: the same bug in the same place."""
    before = planted.package()[module]
    after = relaid(before)
    assert after != before
    same = sorted(ast.dump(n) for n in ast.parse(after).body)
    assert same == sorted(ast.dump(n) for n in ast.parse(before).body)
    for bug in BUGS:
        if bug.module == module:
            top = bug.where.split(".")[0]
            got, want = ([ast.dump(n) for n in code.parts(bug.plant(text))[top]] for text in (after, before))
            assert got == want, bug.name


TEXT = '''
LIMIT = (1, 2)

def f(x, y):
    """Says f(x, y)."""
    if x:
        return g(x, y,   # (B, T)
                 "a")    # (B, T)
    return g(x, y, 'a')

class C:
    def f(self, x):
        return x.f(1, 2)
'''


def test_code_is_found_by_its_tokens():
    assert len(code.find("g(x, y, 'a')", TEXT)) == len(code.find('g(x,\n y, "a",)', TEXT)) == 2
    assert len(code.find("f(x, y)", TEXT)) == 1, "not in strings"
    assert code.find("g(x, z)", TEXT) == code.find("B, T", TEXT) == []
    assert [*code.definitions(TEXT)] == ["LIMIT", "f", "C", "C.f"]
    for text in ("1e-9", "1.5e-3", "0x1f", "x.y", "a**-0.5", "a//=b", "f'{x!r}'", "0.5", ".5", "a[...]", "x->y", "1_000"):
        assert "".join(t.text for t in code.tokens(text)) == text


def test_a_change_keeps_indentation_and_drops_shape_comments_it_may_have_broken():
    new = code.change(TEXT, "f", "return g(x, y, 'a',\n)\nreturn", "z = 1\nif z:\n    return 2\nreturn")
    assert "        z = 1\n        if z:\n            return 2\n        return g(x, y, 'a')" in new and "(B, T)" not in new
    assert code.change('def f():\n    y = g("# (a", x, 1)  # (B,)\n', "f", "1", "2") == 'def f():\n    y = g("# (a", x, 2)  \n'
    assert "x.f(2, 1)" in code.change(TEXT, "C.f", "1, 2", "2, 1") and "(2, 1)" in code.change(TEXT, "LIMIT", "1, 2", "2, 1")


@pytest.mark.parametrize("where, old, words", [
    ("f", "no such code", "occurs 0 times in f"), ("f", "g(x, y, 'a')", "occurs 2 times in f"), ("h", "x", "no definition of h"),
    ("C", "g(x", "occurs 0 times in C")])
def test_a_bug_that_does_not_apply_is_named(where, old, words):
    with pytest.raises(ValueError, match=f"typo: .*{words}"):
        planted.Bug("typo", "", where, old, "", "single_head").plant(TEXT)


def test_a_function_may_move_to_another_module():
    assert planted.Bug("moved", "", "KVCache.crop", "", "", "single_head").module == "kv_cache"
    with pytest.raises(ValueError, match="typo: nowhere is defined in no module"):
        planted.Bug("typo", "", "nowhere", "", "", "single_head").module  # noqa: B018


# --- what a kill rests on

def test_a_key_changes_with_what_it_rests_on_and_with_nothing_else():
    files = "def f(x):\n    return g(x).h\n\ndef g(x):\n    return x\n", "class C:\n    def h(self):\n        return 1\n\nA = 2\n"
    start = code.closure(frozenset("f"), files)

    def after(old, new):
        changed = tuple(text.replace(old, new) for text in files)
        assert changed != files
        return code.closure(frozenset("f"), changed)

    assert after("    return x", "    # why\n    return (x)") == start == after("A = 2", "A = 3")
    assert after("    return x", "    '''Why.'''\n    return x") == start
    assert len({start, after("    return x", "    return -x"), after("return 1", "return 2"), after(".h", ".k")}) == 4
    loop = "for x in y:\n    f(x)\n{}assert x"
    assert planted.cell_parts(loop.format(""))[0] != planted.cell_parts(loop.format("    "))[0] != planted.cell_parts("x")[0]


def test_no_kill_is_out_of_date():
    cells, tests = planted.stale(planted.ledger())
    names = sorted({b.name for b in cells + tests})
    assert not names, f"python tests/planted.py proves these kills again: {names[:9]} ..."


def test_the_report_in_the_book_is_that_of_the_ledger():
    assert REPORT.read_text() == planted.report(planted.ledger()), "rewrite it with: python tests/planted.py"
    assert set(planted.ledger()["kills"]) == {b.name for b in BUGS}


@pytest.mark.parametrize("cell, test", [("no such cell", "tests/test_causal.py::test_no_such_test"),
                                        ("title", "tests/nowhere.py::test_x"), ("export-imports", "")])
def test_a_forged_row_of_something_that_is_not_there(cell, test):
    """The keys may be right: a kill needs a later cell of the chapter, and a test that exists."""
    book, bug = planted.ledger(), BUGS[0]
    cell_key, test_key = planted.keys(bug, cell, test)
    book["kills"][bug.name] = [cell, cell_key, test, test_key]
    assert planted.stale(book, [bug]) == ([bug], [bug])


@pytest.mark.parametrize("place, forged", [(0, "setup"), (1, "0" * 16), (2, "tests/test_single_head.py::test_vmap"), (3, "")])
def test_a_forged_row_is_out_of_date(place, forged):
    book, bug = planted.ledger(), BUGS[0]
    assert planted.stale(book, [bug]) == ([], [])
    book["kills"][bug.name][place] = forged
    assert planted.stale(book, [bug]) != ([], [])
    del book["kills"][bug.name]
    assert planted.stale(book, [bug]) == ([bug], [bug])


def test_what_is_due():
    """A changed module brings back its kills and those of the modules that import it; the others take turns."""
    book = planted.ledger()
    book["proved"] = {m: planted.state(m) for m in planted.package()}
    turns = [planted.due(book, n) for n in range(10)]
    for kind in (0, 1):
        names = [b.name for turn in turns for b in turn[kind]]
        assert sorted(names) == sorted(b.name for b in BUGS), "each bug has one turn in ten"
    book["proved"]["positions"] = "changed"
    for found, before in zip(planted.due(book, 0), turns[0]):
        assert {b.name for b in found} == {b.name for b in before} | {b.name for b in BUGS if b.module == "positions"}
    assert planted.family("causal") == tuple(planted.package()[m] for m in ("causal", "single_head"))
    assert planted.family("kv_cache")[0] == planted.package()["causal"]


# --- proofs

@pytest.mark.parametrize("call, code", [(lambda: 0, 0), (lambda: 1, 1), (lambda: os.abort(), -6), (lambda: 1 / 0, 99),
                                        (lambda: time.sleep(9), -14)], ids=["passes", "fails", "aborts", "raises", "hangs"])
def test_how_a_fork_ends(call, code):
    assert planted.in_fork(call, 1)[0] == code


@pytest.mark.parametrize("status, said", [(0, ""), (2, "FAILED tests/x.py::test_y - boom"), (99, ""), (-14, ""), (-6, ""),
                                          (1, "ERROR tests/x.py - collection")])
def test_a_crash_or_a_broken_file_is_no_kill(status, said, monkeypatch):
    bug = next(b for b in BUGS if b.module == "single_head")
    monkeypatch.setattr(planted, "run_tests", lambda *args: (status, said))
    assert planted.killer(bug, "tests/x.py::test_y") == ""
    monkeypatch.setattr(planted, "run_tests", lambda *args: (1, "FAILED tests/x.py::test_y[a b] - boom"))
    assert planted.killer(bug) == "tests/x.py::test_y[a b]"


HARMLESS = planted.Bug("harmless", "", "attention", "return context.to(query.dtype)",
                       "context = context + 0\nreturn context.to(query.dtype)", "single_head")


@pytest.mark.planted
def test_a_forged_kill_is_disproved(tmp_path):
    """With the right key, too: a killer that does not kill, and a change that nobody can notice."""
    killed = next(b for b in BUGS if b.name == "scale argument ignored")
    book = planted.ledger()
    book["kills"][killed.name][:3:2] = "equation-check", "tests/test_single_head.py::test_the_layer_names_devices_and_dtypes"
    new = planted.prove([killed], [killed], book)
    new["kills"] = {killed.name: new["kills"][killed.name]}
    assert len([*planted.disproved(book, new)]) == 2
    found = []
    for call in "planted.killers([bug], planted.ledger())", "run_chapter.killed_in(bug.module, [bug])":
        lines = ["import json, sys", "sys.path.insert(0, 'tests')", "import planted, run_chapter", f"bug = planted.{HARMLESS!r}",
                 f"print(json.dumps({call}))"]
        done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found == [{"harmless": ""}] * 2
    row = {"harmless": ["", "", "", ""]}
    assert [*planted.disproved({"kills": row}, {"kills": row})] == [
        "harmless: no cell notices it", "harmless: no test notices it"]


@pytest.mark.planted
def test_kills_are_proved_again():
    """Those of every module that changed, or imports one that did, since all of its kills were proved; a tenth of the rest."""
    book = planted.ledger()
    by_cell, by_test = planted.due(book, planted.turn())
    print(f"proved again: {len(by_cell)} kills by cells, {len(by_test)} by tests")
    wrong = [*planted.disproved(book, planted.prove(by_cell, by_test, book))]
    assert not wrong, "\n".join([*wrong, "rewrite the ledger with: python tests/planted.py --all"])
