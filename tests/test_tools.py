"""The tools behind make: drift is caught and not repaired, the owner changes everywhere, failing notebooks are named."""
import shutil
import subprocess
import sys
from pathlib import Path

import build_pages
import check_export
import mutate
import nbformat
import pytest
import set_owner
import warm_cache

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tree(tmp_path):
    """A small copy of the repository."""
    root = tmp_path / "attn_nb"
    root.mkdir()
    for path in set_owner.files(ROOT):
        name = path.relative_to(ROOT)
        if name.parts[0] != "tests" and "_static" not in name.parts:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / name)
    return root


def edit(path, change):
    nb = nbformat.read(path, 4)
    change({c.id: c for c in nb.cells})
    nbformat.write(nb, path)


def test_the_committed_package_is_in_sync():
    assert check_export.drift(ROOT) == []


def test_each_kind_of_drift_is_caught_and_left_alone(tree):
    module, notebook = tree / "attn_nb/single_head.py", tree / "nbs/01_single_head.ipynb"
    assert check_export.drift(tree) == []
    module.write_text(module.read_text().replace("-0.5", "-0.25"))
    (tree / "attn_nb/old.py").write_text("x = 1")
    (tree / "attn_nb/sub").mkdir()
    (tree / "attn_nb/sub/old.py").write_text("x = 1")
    edited = module.read_text()
    assert check_export.drift(tree) == ["attn_nb/old.py: no notebook exports it; delete it",
                                        "attn_nb/single_head.py: not what the notebooks export; run nbdev_export",
                                        "attn_nb/sub/old.py: no notebook exports it; delete it"]
    assert module.read_text() == edited
    (tree / "attn_nb/old.py").unlink()
    shutil.rmtree(tree / "attn_nb/sub")
    shutil.copy(ROOT / "attn_nb/single_head.py", module)

    edit(notebook, lambda cells: cells["attention"].update(source=cells["attention"].source + "\n# more"))
    assert "attn_nb/single_head.py: not what the notebooks export; run nbdev_export" in check_export.drift(tree)
    shutil.copy(ROOT / "nbs/01_single_head.ipynb", notebook)

    edit(notebook, lambda cells: cells["similarity"].update(execution_count=3))
    assert check_export.drift(tree) == ["nbs/01_single_head.ipynb: not clean; run nbdev_clean"]

    edit(notebook, lambda cells: cells["attention"].update(source="#| export\ndef f(:\n"))
    assert "01_single_head.ipynb, cell attention, line 2" in check_export.drift(tree)[0]


def test_one_owner_everywhere():
    files = set_owner.owners(ROOT)
    for needed in ("README.md", "_config.yml", "pyproject.toml", "CITATION.cff", "nbs/01_single_head.ipynb"):
        assert needed in files
    owner = set_owner.SETTING.search((ROOT / "settings.ini").read_text())[2]
    assert {name for names in files.values() for name in names} == {owner}


def test_make_owner(tree):
    before = set_owner.owners(ROOT).keys()
    done = subprocess.run(["make", "-s", "owner=some-one"], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0 and "owner some-one set" in done.stdout, done.stderr
    found = set_owner.owners(tree)
    assert {name for names in found.values() for name in names} == {"some-one"}
    assert {f for f in before if not f.startswith(("tests/", "nbs/_static/"))} <= found.keys()
    assert "user = some-one" in (tree / "settings.ini").read_text()
    assert check_export.drift(tree) == []       # the generated index names the owner too
    for bad in ("-x", "a b", "a--b", "x/y"):
        assert subprocess.run([sys.executable, ROOT / "tools/set_owner.py", bad], cwd=tree,
                              capture_output=True).returncode == 1


def test_the_owner_is_found_in_every_spelling():
    for text in ("https://github.com/%s/attn_nb", "git+https://github.com/%s/attn_nb@main", "https://%s.github.io/attn_nb/",
                 "https://colab.research.google.com/github/%s/attn_nb/blob/main/x.ipynb"):
        text = text % "me"
        assert [m["owner"] for m in set_owner.PLACES.finditer(text)] == ["me"], text
    assert not list(set_owner.PLACES.finditer("https://github.com/pytorch/pytorch"))


def test_the_table_of_contents_lists_every_notebook():
    assert {p.stem for p in warm_cache.notebooks()} == {p.stem for p in (ROOT / "nbs").glob("*.ipynb")}


def test_files_without_git_are_the_files_with_git(tree):
    """A source archive has no git metadata."""
    names = {p.relative_to(tree) for p in set_owner.files(tree)}
    (tree / ".venv/lib").mkdir(parents=True)
    (tree / ".venv/lib/x.py").touch()
    (tree / "_build").mkdir()
    (tree / "_build/index.html").touch()
    assert {p.relative_to(tree) for p in set_owner.files(tree)} == names and Path("README.md") in names
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    assert {p.relative_to(tree) for p in set_owner.files(tree)} == names


def test_a_failing_notebook_is_named(tmp_path, monkeypatch):
    path = tmp_path / "nbs"
    path.mkdir()
    (tmp_path / "attn_nb").mkdir()
    monkeypatch.chdir(tmp_path)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")], metadata={
        "kernelspec": {"name": "python3", "display_name": "python3"}})
    nbformat.write(nb, path / "01_bad.ipynb")
    nb.cells[0].source = "1 + 1"
    nbformat.write(nb, path / "02_good.ipynb")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: x\nchapters: [{file: nbs/01_bad}, {file: nbs/02_good}]\n")

    def run():
        return subprocess.run([sys.executable, ROOT / "tools/warm_cache.py"], capture_output=True, text=True,
                              env={**__import__("os").environ, "PYTHONPATH": str(ROOT / "nbs/_ext")})

    first = run()
    assert first.returncode == 1 and "nbs/01_bad.ipynb  FAILED" in first.stdout and "ZeroDivisionError" in first.stderr
    nb.cells[0].source = "2 + 2"
    nbformat.write(nb, path / "01_bad.ipynb")
    second = run()
    assert second.returncode == 0 and "nbs/02_good.ipynb  unchanged" in second.stdout
    for broken in ("def f(:", "#| fig-cap: no label\n1"):
        nb.cells[0].source = broken
        nbformat.write(nb, path / "01_bad.ipynb")
        assert "nbs/01_bad.ipynb  FAILED" in run().stdout


def test_pages_are_built_once(tree, monkeypatch):
    """Nothing is built if nothing changed; a build with a fault is not remembered."""
    monkeypatch.chdir(tree)
    runs, code = [], 0

    def run(command):
        runs.append(command)
        (tree / "_build/html").mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(build_pages.subprocess, "run", run)
    assert [build_pages.main() for _ in range(2)] == [0, 0] and len(runs) == 1
    for name in ("README.md", "nbs/01_single_head.ipynb", "attn_nb/causal.py", "nbs/_generated/mutation.md", "_toc.yml",
                 "nbs/_ext/nbdev_book.py"):
        (tree / name).write_text((tree / name).read_text() + "\n")
        before, code = len(runs), 1
        assert build_pages.main() == build_pages.main() == 1 and len(runs) == before + 2, name
        code = 0
        assert build_pages.main() == build_pages.main() == 0 and len(runs) == before + 3, name


def test_stages_are_noted(tmp_path):
    """Also of a command that fails, and its exit code comes through."""
    def stage(*words):
        return subprocess.run([ROOT / "tools/stage.sh", *words], cwd=tmp_path, capture_output=True, text=True)

    assert stage("a stage", "sh", "-c", "exit 3").returncode == 3
    assert stage("another", "echo", "two words").stdout == "two words\n"
    lines = [line.rsplit(maxsplit=1) for line in stage().stdout.splitlines()[2:]]
    assert [name.strip() for name, _ in lines] == ["a stage", "another", "all"] and all(n.isdigit() for _, n in lines)


def test_a_mutation_run_of_one_module_keeps_the_others():
    committed = mutate.REPORT.read_text()
    everything = mutate.kept(committed, [])
    assert mutate.report(*everything) == committed
    others = mutate.kept(committed, ["causal"])
    for kind, all_of_it in zip(others, everything):
        assert {*all_of_it} - {*kind} <= {"causal"} and "causal" not in kind
    for kind, all_of_it in zip(others, everything):
        kind |= {"causal": all_of_it["causal"]} if "causal" in all_of_it else {}
    assert mutate.report(*others) == committed
