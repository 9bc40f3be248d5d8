"""House rules that a notebook of this book keeps, checked on the committed .ipynb files."""
import ast
import importlib
import inspect
import re
import sys
import typing
from pathlib import Path

import nbformat
import pytest
from nbdev_book import LINK, PACKAGE, TERM, imported, papers, split, terms

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
LEAVES = {"plot", "testing"}
MODULES = {p.stem[3:]: p for p in NOTEBOOKS}     # name -> notebook, in reading order


def cells(path, kind="code"):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == kind]


def exported(cell):
    return bool({"export", "exporti", "exports"} & split(cell.source)[0].keys())


def text_of(output):
    return "".join([output.get("text", ""), *(str(v) for k, v in output.get("data", {}).items() if "image" not in k),
                    *output.get("traceback", [])])


def docstring_lines(body):
    """Lines of docstrings: a reference for the user, not steps that a reader follows."""
    try:
        tree = ast.parse(body)
    except SyntaxError:                     # a magic
        return 0
    docs = [node.body[0] for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None]
    return sum(d.end_lineno - d.lineno + 1 for d in docs)


each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


# what comes with attn_nb, or with the program that opens the notebook
WITH_US = {"attn_nb", "torch", "numpy", "matplotlib", "IPython", "matplotlib_inline"}
GUARD = '''#| hide
from importlib.util import find_spec

needs = {                      # name in Python -> name for pip
missing = " ".join(p for n, p in needs.items() if find_spec(n) is None)
if missing:                    # Colab, Kaggle
    %pip install -q {missing}'''.splitlines()


def outside(source):
    """Modules outside the standard library that a cell imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(
            node, ast.ImportFrom) and not node.level else []
        yield from (n for n in names if n.split(".")[0] not in sys.stdlib_module_names)


def test_names():
    assert NOTEBOOKS and all(re.fullmatch(r"\d\d_[a-z_]+", p.stem) for p in NOTEBOOKS)
    assert {p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_")} == {
        name for name, p in MODULES.items() if any(map(exported, cells(p)))}


@each
def test_opening(path):
    first = nbformat.read(path, 4).cells[0]
    title, answer, badge = first.source.split("\n\n")[:3]
    assert re.fullmatch(r"# .+", title)
    assert re.fullmatch(r"> .+\.", answer), "one sentence answers the chapter's question"
    assert badge.endswith(f"/blob/main/nbs/{path.name})"), "the Colab badge opens this notebook"
    code = cells(path)
    assert code[0].source == f"#| default_exp {path.stem[3:]}"
    lines = re.sub(r"(git\+https://)github.com/[^/]+/", r"\1", code[1].source).splitlines()
    needs = ast.literal_eval(re.search(r"needs = .*?(\{.*?\})", re.sub("# .*", "", "\n".join(lines)), re.S)[1])
    assert needs["attn_nb"] == "'attn_nb @ git+https://attn_nb@main'"
    assert lines[:4] == GUARD[:4] and lines[3 + len(needs) + 1:] == GUARD[4:], "the same guarded install cell everywhere"
    used = {m.split(".")[0] for c in code if "%pip" not in c.source for m in outside(c.source)}
    assert needs.keys() == {"attn_nb"} | used - WITH_US, "the guard looks for everything that the page imports"
    assert sum("%pip" in c.source or "!pip" in c.source for c in code) == 1
    assert not any("torch==" in c.source or "import nbdev" in c.source for c in code)
    assert not any(re.search(r"tqdm\.(auto|notebook)", c.source) for c in code), "plain tqdm: no widget in Colab"


@each
def test_cells(path):
    nb = nbformat.read(path, 4)
    assert "widgets" not in nb.metadata
    for cell in nb.cells:
        where = f"{path.name}, cell {cell.id}"
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", cell.id), f"{where}: ids are words"
        if cell.cell_type == "code":
            assert cell.execution_count is None
            directives, body = split(cell.source)
            long = [line for line in body.splitlines() if len(line) > 79]
            assert not long, f"{where}: over 79 columns: {long[0]}"
            size = len(body.splitlines()) - docstring_lines(body)
            most = 90 if exported(cell) and "class " in body else 60
            assert size <= most, f"{where}: a cell of {size} lines"
            assert not re.search(r"^\s*#\s*\w+\(.*\)$", body, re.M), f"{where}: commented-out code"
            assert not re.search(r"from \S+ import \*", body), f"{where}: star import"
            skip = {"slow", "cuda", "notest"} & directives.keys() or directives.get("eval") == "false"
            assert not skip or re.search(r"#.*(because|needs)", body), f"{where}: skipped without a reason"
        else:
            for paragraph in cell.source.split("\n\n"):
                prose = [s for s in paragraph.splitlines() if not s.startswith(("|", "$", "*", "1", "2", "3", "4", "<"))]
                assert len(prose) <= 7, f"{where}: a paragraph of {len(prose)} lines"
                for line in prose:
                    rest = re.sub(r"\([^)]*\)|et al\.|\$[^$]*\$|`[^`]*`|\*[^*]*\*", "", line)
                    assert not re.search(r"[a-z]{3}[.?!] [A-Z]", rest), f"{where}: one sentence per line: {line}"
    most = 650_000 if any("alignment_theatre(" in cell.source for cell in cells(path)) else 400_000    # 40 maps to play with
    assert len(path.read_bytes()) < most


@each
def test_names_of_the_house(path):
    never = r'\b(bsz|num_tokens|n_embd|start_pos|p_attn|d_k_)\b|(?<!")\bhidden_size\b'   # "hidden_size" is others' key
    for cell in cells(path):
        if exported(cell):
            assert not re.search(never, cell.source), f"{cell.id}: see the glossary for our name"
            assert "1e9" not in cell.source.replace("1e-9", ""), f"{cell.id}: minus infinity is -torch.inf"


@each
def test_outputs(path):
    for cell in cells(path):
        directives, body = split(cell.source)
        for output in cell.outputs:
            assert output.output_type != "error", f"{cell.id}: error in output"
            assert output.get("name") != "stderr", f"{cell.id}: stderr in output"
            found = re.search(r"/(tmp|root|home|work|usr)/|0x[0-9a-f]{6,}|Traceback", text_of(output))
            assert not found, f"{cell.id}: {found[0]} in output"
        if "volatile" in directives:
            assert not cell.outputs, f"{cell.id}: times are not committed"
        images = [o for o in cell.outputs if any(k.startswith("image/") for k in o.get("data", {}))]
        if images or re.search(r"plot_attention\(|plt\.subplots\(", body) and not exported(cell) \
                and "catches(" not in body and "def " not in body:
            assert images, f"{cell.id}: the figure is not committed; run make outputs"
            assert {"label", "fig-cap", "fig-alt"} <= directives.keys(), f"{cell.id}: label, caption and alt text"
            assert re.fullmatch(r"fig-[a-z-]+", directives["label"])
            assert len(directives["fig-alt"]) > 40
        moving = re.search(r"slider_bars\(|mask_grid\(|kv_calculator\(|cache_steps\(|rotary_dial\(|alignment_theatre\(", body)
        if moving and not exported(cell) and "catches(" not in body:
            assert any("text/html" in o.get("data", {}) for o in cell.outputs), f"{cell.id}: no committed figure"


def test_alt_texts_are_unique():
    found = [split(c.source)[0] for p in NOTEBOOKS for c in cells(p)]
    for key in ("fig-alt", "label", "fig-cap"):
        values = [d[key] for d in found if key in d]
        assert values and len(values) == len(set(values))


@each
def test_links(path):
    text = "\n".join(c.source for c in cells(path, "markdown"))
    for _, term in TERM.findall(text):
        assert term in terms(), f"no glossary entry for {term}"
    for _, url in LINK.findall(text):
        assert "arxiv.org" not in url or url in papers(), f"{url} is not in references.bib"


def calls(source):
    """Names of the functions that a piece of code calls."""
    return {getattr(n.func, "id", getattr(n.func, "attr", "")) for n in ast.walk(ast.parse(source))
            if isinstance(n, ast.Call)}


def checks(source, name):
    """Does the code assert something about `name`: in an assert, an assert_* or a `with catches(...)`?"""
    def names(node):
        return {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node)}

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) and name in names(ast.parse(source)):
            return True
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("assert_") and name in names(node):
            return True
        if isinstance(node, ast.With) and any("catches" in names(i) for i in node.items) and name in names(node):
            return True
    return False


def test_exercises_have_checkers_and_solutions():
    for path in NOTEBOOKS:
        labels = re.findall(r":::\{exercise\}.*\n:label: (ex-[a-z-]+)", "\n".join(
            c.source for c in cells(path, "markdown")))
        ids = {c.id: c for c in cells(path)}
        for label in labels:
            stub, solution = ids[f"{label}-stub"], ids[f"{label}-solution"]
            assert "catches(" in stub.source, f"{label}: the checker is not shown to fail"
            checker = re.search(r"def (check_\w+)", stub.source)[1]
            assert checker in calls(solution.source) and solution.source.startswith("#@title Solution")
            assert solution.metadata.get("cellView") == "form"
        if path.stem < "90":
            assert 3 <= len(labels) <= 5, f"{path.name}: {len(labels)} exercises"


# --- the package that comes out

def test_imports_go_one_way():
    """A module uses the chapters before it; plot and testing are used by no module at all."""
    order = list(MODULES)
    for name, path in MODULES.items():
        module = PACKAGE / f"{name}.py"              # a chapter without exports has none
        uses = imported(module.read_text()) if module.exists() else set()
        assert not uses & LEAVES, f"{name} imports {uses & LEAVES}"
        late = {u for u in uses if order.index(u) >= order.index(name)}
        assert not late, f"{name} imports {late}, which comes later"
        for cell in cells(path):
            if "%pip" not in cell.source:
                late = {u for u in imported(cell.source) - LEAVES - {name} if order.index(u) >= order.index(name)}
                assert not late, f"{path.name}, cell {cell.id} imports {late}"


def test_the_import_check_sees_back_edges():
    assert imported("from attn_nb.plot import x") == imported("from .plot import x") == {"plot"}
    assert imported("import attn_nb") >= {"plot", "single_head"}
    assert imported("from attn_nb import attention, plot") == imported("from . import single_head, plot") == {
        "single_head", "plot"}
    assert imported("from torch import nn\nimport numpy\nfrom .unknown import x") == set()


def public_names():
    return [(module, name) for module, path in MODULES.items() if any(map(exported, cells(path)))
            for name in importlib.import_module(f"attn_nb.{module}").__all__]


@pytest.mark.parametrize("module, name", public_names(), ids=lambda x: x)
def test_public_names_are_documented_typed_shown_and_checked(module, name):
    thing = getattr(importlib.import_module(f"attn_nb.{module}"), name)
    uses = [c.source for c in cells(MODULES[module]) if not exported(c) and re.search(rf"\b{name}\b", c.source)]
    assert uses, f"{name} is not demonstrated"
    assert any(checks(u, name) for u in uses), f"{name} is not asserted in its notebook"
    if not callable(thing):
        return
    sections = ["Args:", "Source:"] if name == "use_book_style" else ["Args:", "Source:", "See:"]
    if name == "use_book_style":
        sections = ["Returns:", "Source:"]
    elif not name.startswith("assert_") and name != "SliderBars":
        sections += ["Returns:", "Raises:"]
    functions = [thing] if inspect.isfunction(thing) else [
        f for n, f in vars(thing).items() if inspect.isfunction(f) and (n == "__init__" or not n.startswith("_"))]
    for section in sections:
        assert section in (thing.__doc__ or ""), f"{name}: no {section}"
    for f in functions:
        hints = typing.get_type_hints(f, {**vars(importlib.import_module("builtins")), **f.__globals__,
                                          "Axes": object})
        wanted = set(inspect.signature(f).parameters) - {"self"} | {"return"}
        assert wanted <= hints.keys(), f"{name}: untyped {wanted - hints.keys()}"
        documented = (thing.__doc__ or "") + (f.__doc__ or "")
        for parameter in wanted - {"return"}:
            assert re.search(rf"\b{parameter}\b", documented), f"{name}: {parameter} is not documented"
        if any("Tensor" in str(h) for h in hints.values()):
            assert re.search(r"\([^)]*\b(T|Tq|Tk|N|D|Vocab)\b[^)]*\)|tensors", documented), f"{name}: no shapes"


def test_package_exports_every_public_name():
    import attn_nb

    every = {name for _, name in public_names()} - {"TOLERANCE", "GREY", "COLORS", "SliderBars"}
    assert set(attn_nb.__all__) == every
    assert all(getattr(attn_nb, name) is not None for name in attn_nb.__all__)


def test_no_directive_reaches_the_package():
    for path in PACKAGE.glob("*.py"):
        assert "#|" not in path.read_text()
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Assert) and path.stem != "testing"), f"{path.name}: assert is for checks"
