"""Let Jupyter Book 1 (myst-nb) read nbdev notebooks.

Plugged in by _config.yml (`nb_custom_formats`, `local_extensions`). The .ipynb on disk is never changed: nbdev, Colab
and GitHub see plain Markdown and ordinary links; only the copy that Sphinx parses and executes is rewritten.

In code cells, leading `#| key: value` lines become cell tags and figure metadata; `#| fold Some label` folds a cell,
and so does `#@title Some label`, which Colab shows as a form. In Markdown, a link to a paper of references.bib becomes
a citation, a link to a glossary term a {term}, and the Colab badge (an image on another host) goes: the page has its
own launch button.
"""
import ast
import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import nbformat

PACKAGE, BIBLIOGRAPHY, PINS = Path("attn_nb"), Path("nbs/references.bib"), Path("constraints.txt")
GLOSSARY = Path("nbs/glossary.md")
LINE = re.compile(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
TITLE = re.compile(r"#\s*@title\s+(.*)\n?")
BADGE = re.compile(r"\[!\[Open In Colab\]\([^)]*\)\]\(([^)]*)\)")
TERM = re.compile(r"\[([^\]]+)\]\((?:nbs/)?glossary\.md#term-([\w-]+)\)")
LINK = re.compile(r"\[([^\]]+)\]\((https?://[^)\s]+)\)")
HIDDEN = {"default_exp", "hide"}  # the cell runs, the page does not show it
SKIP_FLAGS = set(os.environ.get("BOOK_SKIP_FLAGS", "slow cuda notest").split())  # not run, committed outputs shown
TAGS = {("echo", "false"): "remove-input", ("output", "false"): "remove-output",
        ("include", "false"): "remove-cell", ("eval", "false"): "skip-execution", ("error", "true"): "raises-exception",
        ("warning", "false"): "remove-stderr"}


def split(source):
    """The leading `#| key: value` lines of a cell as a dict, and the rest of its source; a title may stand before them."""
    lines, directives = source.splitlines(True), {}
    title = [lines.pop(0)] if lines and TITLE.match(lines[0]) else []
    while lines and (m := LINE.match(lines[0])):
        directives[m[1]] = m[2].strip("\"'")
        lines.pop(0)
    return directives, "".join(title + lines)


@cache
def papers():
    """URL of a paper -> its key in references.bib."""
    found = {}
    for entry in re.split(r"^@", BIBLIOGRAPHY.read_text(), flags=re.M)[1:]:
        key = re.match(r"\w+\{([^,]+),", entry)[1]
        if url := re.search(r"\burl\s*=\s*\{([^}]+)\}", entry):
            found[url[1]] = key
    return found


@cache
def terms():
    """Anchor of a glossary term, causal-mask -> the term, causal mask."""
    lines = re.findall(r"^([a-zA-Z][a-zA-Z -]*)$", GLOSSARY.read_text(), re.M)
    return {line.lower().replace(" ", "-"): line for line in lines}


def markdown(text):
    """Ordinary links -> citations and glossary terms; no badge."""
    text = BADGE.sub("", text)
    text = TERM.sub(lambda m: f"{{term}}`{m[1]} <{terms().get(m[2], m[2])}>`", text)
    return LINK.sub(lambda m: f"{{cite:t}}`{papers()[m[2]]}`" if m[2] in papers() else m[0], text)


def convert(nb, digest=""):
    """Rewrite the notebook for myst-nb, in place."""
    kept = hashlib.sha1(digest.encode())
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = markdown(cell.source)
        if cell.cell_type != "code":
            continue
        directives, cell.source = split(cell.source)
        tags = set(cell.metadata.get("tags", []))
        tags |= {tag for (key, value), tag in TAGS.items() if directives.get(key, "-").lower() == value}
        if HIDDEN & directives.keys() or not cell.source.strip():
            tags.add("remove-cell")
        if SKIP_FLAGS & directives.keys() or not cell.source.strip():
            tags.add("skip-execution")
        if "skip-execution" in tags:
            kept.update(repr(cell.get("outputs")).encode())
        mystnb = cell.metadata.setdefault("mystnb", {})
        label = directives.get("fold")
        if title := TITLE.match(cell.source):
            label, cell.source = title[1], cell.source[title.end():]
        if label is not None:
            tags.add("hide-input")
            mystnb["code_prompt_show"] = mystnb["code_prompt_hide"] = label or "Code of the figure"
        if "fig-cap" in directives:
            mystnb["figure"] = {"caption": directives["fig-cap"], "name": directives["label"]}
        if "fig-alt" in directives:
            mystnb["image"] = {"alt": directives["fig-alt"], "classes": "dark-light"}
        if tags:
            cell.metadata["tags"] = sorted(tags)
    if kernel := nb.metadata.get("kernelspec"):  # the one metadata key that jupyter-cache hashes
        kernel["inputs_sha1"] = kept.hexdigest()
    return nb


def modules():
    """The package's modules, without __init__ and other private ones."""
    return {p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_")}


def exporters():
    """Name that `from attn_nb import ...` offers -> the module that it comes from."""
    init = PACKAGE / "__init__.py"
    nodes = ast.parse(init.read_text()).body if init.exists() else []
    return {alias.name: node.module for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}


def imported(source):
    """The package's modules that this Python source imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            path = ([PACKAGE.name] if node.level else []) + (node.module or "").split(".")
            if path[0] == PACKAGE.name and (rest := [p for p in path[1:] if p]):
                found.add(rest[0])
            elif path[0] == PACKAGE.name:  # from attn_nb import name, from . import module
                found |= {exporters().get(alias.name, alias.name) for alias in node.names}
        if isinstance(node, ast.Import) and any(a.name.split(".")[0] == PACKAGE.name for a in node.names):
            found |= modules()
    return found & modules()


def modules_used(nb):
    """The package's modules that a notebook needs, directly or through one another."""
    done, todo = set(), set()
    for cell in nb.cells:
        if cell.cell_type == "code":
            with contextlib.suppress(SyntaxError):  # a magic, or an error that running the cell will show
                todo |= imported(re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.M))
    while todo:
        done.add(name := todo.pop())
        todo |= imported((PACKAGE / f"{name}.py").read_text()) - done
    return sorted(done)


def read(text):
    """The reader that myst-nb calls: a changed module re-runs the notebooks that use it, new pins re-run all."""
    nb = nbformat.reads(text, as_version=4)
    inputs = [PACKAGE / f"{name}.py" for name in modules_used(nb)] + [PINS]
    if "_generated" in text:                     # a page that draws what was measured
        inputs += sorted(Path("nbs/_generated").glob("*.json"))
    return convert(nb, sys.version[:4] + "".join(p.read_text() for p in inputs if p.exists()))


def read_page(app, docname, source):
    """The same links in the Markdown pages; the README's badge becomes a text link."""
    if app.env.doc2path(docname).endswith(".md"):
        source[0] = markdown(BADGE.sub(r"[Open in Colab](\1)", source[0]))


def copy_mathjax(app, error):
    """Serve MathJax from the book itself; the files come with the sphinx-mathjax-offline wheel (MathJax 3.2.2)."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if error or app.builder.format != "html":
        return
    source, target = Path(spec.origin).parent / "static/mathjax", Path(app.outdir) / "_static/mathjax"
    for f in [source / "tex-chtml-full.js", *source.glob("output/chtml/fonts/**/*.woff")]:
        (target / f.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, target / f.relative_to(source))


def setup(app):
    app.connect("source-read", read_page)
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
