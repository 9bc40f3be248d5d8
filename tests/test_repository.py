"""The repository as its users meet it: README, licences, versions, workflows, the question index, the wheel."""
import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
import set_owner
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(line.split(" ;")[0].strip().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())


def settings():
    parser = ConfigParser()
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"]


# --- README

def test_readme_example_prints_what_it_says():
    code, want = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.S).groups()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout == want
    assert len([line for line in code.splitlines() if line.strip()]) <= 8


def test_readme_names_the_tested_versions():
    tested = re.search(r"## Tested with\n\n(.*)", README)[1]
    for name in ("torch", "nbdev", "jupyter-book"):
        assert f"{name} {PINS[name]}" in tested
    assert "Python 3.11" in tested and PYPROJECT["project"]["requires-python"] == ">=3.11"


def test_readme_links_and_commands_exist():
    for target in re.findall(r"\]\((nbs/[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for command in re.findall(r"make ([a-z]+)\b", README + (ROOT / "CONTRIBUTING.md").read_text()):
        assert command in targets, f"make {command}"


def test_readme_picture_is_a_figure_of_chapter_01():
    nb = nbformat.read(ROOT / "nbs/01_single_head.ipynb", 4)
    cell = next(c for c in nb.cells if c.id == "directory-map")
    assert cell.outputs[-1].data["image/svg+xml"] == (ROOT / "nbs/_static/landing.svg").read_text()


# --- versions, names, secrets

def test_one_version():
    import attn_nb

    version = settings()["version"]
    assert attn_nb.__version__ == version
    assert f"attn_nb {version}, built with torch {PINS['torch']}." in (ROOT / "_config.yml").read_text()
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version


def test_torch_is_pinned_and_first():
    assert PINS["torch"] == "2.13.0"
    recipe = (ROOT / "Makefile").read_text()
    assert recipe.index("grep ^torch==") < recipe.index('-e ".[dev]"')
    assert "torch>=2.10" in PYPROJECT["project"]["dependencies"]


def test_the_oldest_versions_are_tried():
    """`make floor` runs the quick tests and four chapters with them; CI calls it."""
    floor = dict(line.split("==") for line in (ROOT / "constraints-floor.txt").read_text().splitlines())
    for requirement in PYPROJECT["project"]["dependencies"]:
        name, least = requirement.split(">=")
        assert (floor[name] + ".").startswith(least + "."), f"{requirement}, but {floor[name]} is tried"
    assert "make floor" in (ROOT / ".ci/run").read_text() and f"torch {floor['torch']}" in README


def test_runtime_needs_little():
    names = {re.match(r"[\w-]+", d)[0] for d in PYPROJECT["project"]["dependencies"]}
    assert names == {"torch", "numpy", "matplotlib"}
    assert not any("<" in d for d in PYPROJECT["project"]["dependencies"]), "no upper caps"


def test_extras_are_pinned():
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        for requirement in extra:
            name = re.match(r"[\w-]+", requirement)[0]
            assert name in ("attn_nb",) or name.replace("_", "-") in PINS, f"{name} is not in constraints.txt"


def test_no_path_of_a_machine_and_no_registry():
    listed = [str(p.relative_to(ROOT)) for p in set_owner.files(ROOT)]
    assert len(listed) > 40
    words = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/\w|index-url|find-links|files\.python" "hosted|pypi" r"\.org")
    for name in listed:
        if Path(name).suffix not in (".png", ".svg"):
            found = words.search((ROOT / name).read_text())
            assert not found or name in ("tests/test_repository.py", "tests/test_notebooks.py"), f"{name}: {found[0]}"


def test_legal_files():
    assert "Apache License" in (ROOT / "LICENSE").read_text() and len((ROOT / "LICENSE").read_text()) > 10_000
    assert "CC BY 4.0" in (ROOT / "LICENSE-docs").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()


@pytest.mark.parametrize("name", ["tests", "book", "release"])
def test_workflows_parse(name):
    flow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text())
    assert flow["jobs"] and flow["permissions"]
    for job in flow["jobs"].values():
        for step in job["steps"]:
            assert "uses" in step or "run" in step
    if name == "tests":
        assert flow["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_mutation_report_is_complete():
    """Every module or a word that it was not counted; at least nine in ten killed, every survivor explained."""
    report = (ROOT / "nbs/_generated/mutation.md").read_text()
    when = r"[0-9a-f]{7,}(?: with changes)?, \d{4}-\d\d-\d\d"
    rows = dict(re.findall(rf"^\| (\w+) \| \d+ \| \d+ \| ([\d.]+)% \| {when} \|$", report, re.M))
    later = set(re.findall(r"^\* `(\w+)`: not counted yet", (ROOT / "nbs/quality.md").read_text(), re.M))       # the page says so
    assert not later & set(rows) and set(rows) | later == {
        p.stem for p in (ROOT / "attn_nb").glob("*.py") if not p.stem.startswith("_")}
    assert all(float(share) >= 90 for share in rows.values()) and "Not explained" not in report


# --- the question index

QUESTIONS = (ROOT / "nbs/questions.md").read_text()
ROWS = re.findall(r"^\| (\S+) \| (.+) \| (.+) \|$", QUESTIONS, re.M)
ROWS = [row for row in ROWS if row[0] not in ("id", "---")]


def test_no_question_is_lost():
    want = [f"00{text}-{n}" for text, count in enumerate((27, 48, 27, 25, 28)) for n in range(1, count + 1)]
    want += [f"E{n}" for n in range(1, 58)] + [f"PAIN-{n}" for n in range(1, 11)]
    assert sorted(row[0] for row in ROWS) == sorted(want)


ANSWER = r"\[(\d\d)\]\((\S+\.ipynb)#([^)]+)\) `([a-z0-9-]+)`"


def asserts(source):
    """Does the code check something when it runs: an assert, an assert_* or a `with catches(...)`, not in a function that is
    never called?"""
    def walk(node):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)) or getattr(child, "name", "") in called:
                yield child
                yield from walk(child)

    def name(call):
        return getattr(call.func, "id", getattr(call.func, "attr", "")) if isinstance(call, ast.Call) else ""

    tree = ast.parse(source)
    called = {name(node) for node in ast.walk(tree)}
    return any(isinstance(node, ast.Assert) or name(node).startswith("assert_") or
               isinstance(node, ast.With) and any(name(i.context_expr) == "catches" for i in node.items) for node in walk(tree))


def sections(path):
    """Id of each code cell -> the anchor of the section that it stands in, and its source."""
    found, anchor = {}, ""
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            found[cell.id] = anchor, cell.source
        for heading in re.findall(r"^##+ (.+)$", cell.source, re.M) if cell.cell_type == "markdown" else []:
            anchor = re.sub(r"[^\w\- ]", "", re.sub(r"\$[^$]*\$", "", heading).lower()).replace(" ", "-")
    return found


def wrong_answer(where, planned):
    """What is wrong with one entry of the table's last column, or None."""
    answers, plan = re.fullmatch(r"(.*?)(?:; )?(?:planned: (\d\d(?:, \d\d)*))?", where).groups(default="")
    if late := set(re.findall(r"\d\d", plan)) - planned:
        return f"not on the list of planned chapters: {late}"
    for answer in filter(None, answers.split(", ")):
        if not (match := re.fullmatch(ANSWER, answer)):
            return f"cannot be read: {answer}"
        number, file, anchor, cell_id = match.groups()
        if not file.startswith(f"{number}_") or not (ROOT / "nbs" / file).exists():
            return f"no page {file} of chapter {number}"
        if cell_id not in (found := sections(ROOT / "nbs" / file)):
            return f"no cell {cell_id}"
        if found[cell_id][0] != anchor:
            return f"{cell_id} stands in section {found[cell_id][0]}"
        if not asserts(found[cell_id][1]):
            return f"{cell_id} asserts nothing"


PLANNED = dict(re.findall(r"^\* (\d\d) (\w+): ", QUESTIONS, re.M))
NAMES = {"12": "checkpoints", "13": "flash", "14": "paged", "15": "recompute", "16": "parallel", "17": "variants",
         "18": "any_model"}


@pytest.mark.parametrize("name, question, where", ROWS, ids=[row[0] for row in ROWS])
def test_each_question_has_a_cell_that_asserts_or_a_plan(name, question, where):
    assert question.endswith("?") and len(question) > 15
    assert wrong_answer(where, set(PLANNED)) is None


def test_planned_chapters_do_not_exist_yet():
    there = {path.stem for path in (ROOT / "nbs").glob("*.ipynb")}
    assert PLANNED.items() <= NAMES.items()
    for number, name in NAMES.items():
        page = f"{number}_{name}" in there
        assert page != (number in PLANNED), f"{number}_{name} {'exists' if page else 'is missing from the list'}"
        assert page or not any(number == stem[:2] or name == stem[3:] for stem in there), f"{name} has another number"


def called_planned(text):
    """Numbers of chapters that a text calls planned or in preparation."""
    numbers = r"((?:\d\d(?:, | and )?)+)"
    found = re.findall(rf"{numbers}\]?(?:\([^)]*\))?,? (?:is |are |still )*(?:planned|in preparation)|planned: {numbers}", text)
    return set(re.findall(r"\d\d", " ".join(map(" ".join, found))))


PAGES = [ROOT / "README.md", *sorted((ROOT / "nbs").glob("*.md")), *sorted((ROOT / "nbs").glob("*.ipynb"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_no_page_that_exists_is_called_planned(path):
    text = path.read_text() if path.suffix == ".md" else "\n".join(
        c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    assert "in preparation" not in text, "a page is there, or it is planned"
    if path.name != "questions.md":             # its table has a test of its own
        there = {p.name[:2] for p in (ROOT / "nbs").glob("*.ipynb")}
        assert not called_planned(text) & there


def test_planned_pages_are_seen():
    assert called_planned("see chapter 04, in preparation") == called_planned("flash (04, planned)") == {"04"}
    assert called_planned("flash and pages (13 and 14, planned)") == {"13", "14"} and called_planned("chapter 04") == set()


def test_the_page_counts_its_questions():
    kinds = [("[" in where, "planned" in where) for _, _, where in ROWS]
    said = re.search(r"It holds (\d+) questions: (\d+) are answered, (\d+) in part, and (\d+) wait", QUESTIONS)
    assert [int(n) for n in said.groups()] == [
        len(kinds), kinds.count((True, False)), kinds.count((True, True)), kinds.count((False, True))]


def test_the_question_checks_see_faults():
    right = "[02](02_causal.ipynb#who-may-look-at-whom) `causal-check`"
    assert wrong_answer(right, {"12"}) is wrong_answer(f"{right}, {right}; planned: 12", {"12"}) is None
    for where, fault in (
            (right.replace("-check", "-chek"), "no cell"), (right.replace("whom)", "who)"), "stands in section"),
            (right.replace("#who-may-look-at-whom", ""), "cannot be read"), (f"{right}, and so on", "cannot be read"),
            (right.replace("02_causal", "03_dropout"), "no page"), (right.replace("02_causal", "02_casual"), "no page"),
            (right.replace("causal-check", "causal-map"), "asserts nothing"), ("planned: 12", "not on the list"),
            ("planned: soon", "cannot be read"), (f"{right}; planned: 11", "not on the list")):
        assert fault in (wrong_answer(where, {"11"} if where.endswith(": 12") else {"12"}) or ""), where
    for source in ("x = 1  # assert", "print('assert x')", "def check():\n    assert x", "import x\nx.reassert_()"):
        assert not asserts(source), source
    for source in ("assert x", "for i in x:\n    assert_close(i, 1)", "with catches('x'):\n    f()",
                   "def check():\n    assert x\ncheck()"):
        assert asserts(source), source


# --- the package that is installed

def loaded_by(code):
    done = subprocess.run([sys.executable, "-W", "always", "-c", f"{code}\nimport sys; print(*sys.modules)"],
                          capture_output=True, text=True, cwd="/", check=True)
    return set(done.stdout.split()), done.stderr


def test_import_is_light_and_silent():
    plain, said = loaded_by("import torch")
    ours, more = loaded_by("import attn_nb; attn_nb.attention, attn_nb.plot_attention")
    extra = {m.split(".")[0] for m in ours - plain}
    assert not extra & {"matplotlib", "transformers", "nbdev", "fastcore", "IPython", "tqdm", "safetensors", "setuptools",
                        "pkg_resources", "distutils", "numpy"}, extra
    assert more == said, "importing writes nothing that torch does not write itself"


@pytest.mark.slow
def test_wheel_installs_in_a_clean_environment(tmp_path):
    source = tmp_path / "source"
    for path in set_owner.files(ROOT):
        (source / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, source / path.relative_to(ROOT))
    subprocess.run([sys.executable, "-m", "build", "-q", "--wheel", "--no-isolation", "-o", tmp_path, source], check=True)
    wheel = next(tmp_path.glob("attn_nb-*.whl"))
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert sorted(names) == sorted(f"attn_nb/{p.name}" for p in (ROOT / "attn_nb").iterdir() if p.is_file())
    assert "attn_nb/py.typed" in names and any("LICENSE" in n for n in zipfile.ZipFile(wheel).namelist())
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel], check=True)
    # torch and numpy come from this environment; attn_nb from the wheel alone
    shared = [p for p in sys.path if p.endswith("site-packages")]
    code = ("import sys; sys.path += " + repr(shared) + "\nimport torch, attn_nb\n"
            "assert 'venv' in attn_nb.__file__, attn_nb.__file__\n"
            "layer = attn_nb.SelfAttention(4, 3)\nprint(tuple(layer(torch.zeros(2, 5, 4)).shape))\n"
            "assert 'matplotlib' not in sys.modules and 'transformers' not in sys.modules")
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "(2, 5, 3)", done.stderr
