"""The reader between nbdev notebooks and the book."""
import nbdev_book
import nbformat as nbf
import pytest
from nbdev_book import convert, imported, markdown, modules_used, read, split


def notebook(*sources, **kernel):
    cells = [nbf.v4.new_code_cell(s) for s in sources]
    return nbf.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})


def cell(source):
    return convert(notebook(source)).cells[0]


def tags(source):
    return cell(source).metadata.get("tags", [])


def test_directives_are_stripped():
    assert cell("#| export\nx = 1").source == "x = 1"
    assert cell("x = 1\n#| export\n").source == "x = 1\n#| export\n"    # leading lines only
    assert split('#|export\n#| fig-cap: "a: b"\ny')[0] == {"export": "", "fig-cap": "a: b"}


def test_tags():
    assert tags("#| hide\nx") == ["remove-cell"]
    assert tags("#| default_exp core") == ["remove-cell", "skip-execution"]
    assert tags("#| eval: false\nx") == tags("#| cuda\nx") == tags("#| slow\nx") == ["skip-execution"]
    assert tags("#| echo: false\nx") == ["remove-input"]
    assert tags("#| warning: false\nx") == ["remove-stderr"]
    assert tags("x") == tags("#| volatile\nx") == []


def test_folded_cells_have_a_label():
    for source, label in (("#| export\n#| fold Input checks\nx", "Input checks"), ("#@title Solution: one\nx", "Solution: one"),
                          ("#| fold\nx", "Code of the figure")):
        folded = cell(source)
        assert folded.source == "x" and folded.metadata["tags"] == ["hide-input"]
        assert folded.metadata["mystnb"]["code_prompt_show"] == label


def test_figures():
    m = cell("#| label: fig-a\n#| fig-cap: Cap\n#| fig-alt: Alt\nx").metadata["mystnb"]
    assert m["figure"] == {"caption": "Cap", "name": "fig-a"} and m["image"]["alt"] == "Alt"


def test_links_become_citations_and_terms():
    assert markdown("([Vaswani et al., 2017](https://arxiv.org/abs/1706.03762), equation 1)") == \
        "({cite:t}`vaswani2017`, equation 1)"
    assert markdown("a **[query](glossary.md#term-query)** and [keys](glossary.md#term-key)") == \
        "a **{term}`query <query>`** and {term}`keys <key>`"
    assert markdown("the **[causal mask](glossary.md#term-causal-mask)**") == "the **{term}`causal mask <causal mask>`**"
    assert markdown("[site](https://example.org/x)") == "[site](https://example.org/x)"
    assert markdown("a\n[![Open In Colab](https://x/badge.svg)](https://y/z.ipynb)\nb") == "a\n\nb"


def test_imported_modules():
    assert imported("from attn_nb.plot import a\nfrom .testing import b\nimport os") == {"plot", "testing"}
    assert imported("import attn_nb.plot") >= {"plot", "single_head"}
    assert modules_used(notebook("%pip install x\nif 1:\n    %pip y", "from attn_nb.single_head import attention")) == [
        "single_head"]


def test_a_changed_module_reruns_the_notebooks_that_use_it_and_no_others(tmp_path, monkeypatch):
    package = tmp_path / "attn_nb"
    package.mkdir()
    (package / "base.py").write_text("x = 1")
    (package / "user.py").write_text("from .base import x")
    (package / "other.py").write_text("y = 1")
    monkeypatch.setattr(nbdev_book, "PACKAGE", package)
    text = nbf.writes(notebook("from attn_nb.user import x"))

    def digest():
        return read(text).metadata["kernelspec"]["inputs_sha1"]

    before = digest()
    (package / "other.py").write_text("y = 2")
    assert digest() == before
    (package / "base.py").write_text("x = 2")
    assert digest() != before


def test_kept_outputs_count_too():
    def digest(text):
        nb = notebook("#| cuda\nx")
        nb.cells[0].outputs = [nbf.v4.new_output("stream", text=text)]
        return convert(nb).metadata["kernelspec"]["inputs_sha1"]

    assert digest("a") != digest("b")


@pytest.mark.parametrize("line", ["#| fig-cap: x\ny = 1"])
def test_a_caption_needs_a_label(line):
    with pytest.raises(KeyError, match="label"):
        cell(line)
