"""The built book, as files: nothing leaks into a page, nothing is missing from it, no link is dead."""
import json
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import set_owner
from bs4 import BeautifulSoup

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb"))


@pytest.fixture(scope="module")
def pages(html):
    """Path of a page, relative to the book -> its parsed HTML."""
    return {str(p.relative_to(html)): BeautifulSoup(p.read_text(), "html.parser") for p in sorted(html.rglob("*.html"))
            if "_static" not in p.parts}


@pytest.fixture(scope="module")
def written(pages):
    """The pages that somebody wrote: not search, index or source listings."""
    return {n: s for n, s in pages.items() if n == "README.html" or n.startswith("nbs/")}


def article(soup):
    return soup.find("article") or soup


def test_the_book_is_all_there(html, written):
    toc = re.findall(r"file: (\S+)", (ROOT / "_toc.yml").read_text())
    assert set(written) == {"README.html", *(f"{name}.html" for name in toc)}
    assert "url=README.html" in (html / "index.html").read_text()


def test_the_built_pages_are_of_this_tree(html):
    for path in (ROOT / "nbs").glob("*.ipynb"):
        assert json.loads((html / "_sources/nbs" / path.name).read_text()) == json.loads(path.read_text()), \
            f"{path.name} is newer than the book: run make book"


def test_no_directive_and_no_traceback(written):
    for name, soup in written.items():
        for block in article(soup).select("pre"):
            assert not re.search(r"^\s*#\s*\|", block.text, re.M), f"{name}: {block.text[:80]}"
            assert "Traceback (most recent call last)" not in block.text, name
            assert "#@title" not in block.text and "%pip" not in block.text, name
        noise = [b.get_text()[:60] for b in article(soup).select(".stderr")]
        assert not noise, f"{name}: what was written to stderr is on the page; flag the cell warning: false: {noise}"
        text = article(soup).get_text(" ")
        for raw in ("{cite", "{term}", "{ref}", "{eq}", ":::", "glossary.md#", "fig-alt", "colab-badge", "USDT:"):
            assert raw not in text, f"{name}: {raw} reached the page"


def shape_of(text):
    """Text with its numbers and spaces levelled: another machine may round the last digit another way."""
    return re.sub(r"\s+", " ", re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", text)).strip()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_committed_outputs_are_those_of_the_page(written, chapter):
    shown = [shape_of(b.get_text()) for b in article(written[f"nbs/{chapter}.html"]).select("div.cell_output pre")]
    for cell in json.loads((ROOT / f"nbs/{chapter}.ipynb").read_text())["cells"]:
        for output in cell.get("outputs", []):
            if output.get("name") == "stdout":
                assert shape_of("".join(output["text"])) in shown, f"{cell['id']}: stale output; run make outputs"


def test_every_image_has_its_own_alt_text(written):
    seen = {}
    for name, soup in written.items():
        for image in article(soup).find_all("img"):
            alt = image.get("alt", "")
            assert len(alt) > 20 and not re.fullmatch(r"\S+\.(svg|png)", alt), f"{name}: alt text {alt!r}"
            assert seen.setdefault(alt, image["src"]) == image["src"], f"{name}: the alt text of two images: {alt}"
        for drawing in article(soup).select("svg[role=img]"):
            assert len(drawing.get("aria-label", "")) > 20, name


def test_figures_are_numbered_and_captioned(written):
    for chapter in CHAPTERS:
        figures = article(written[f"nbs/{chapter}.html"]).select("figure")
        images = article(written[f"nbs/{chapter}.html"]).select("div.cell_output img")
        assert len(figures) == len(images)
        assert all(f.select_one(".caption-number") and len(f.figcaption.text) > 40 for f in figures)


def test_internal_links_lead_somewhere(html, pages):
    places = {name: {tag.get(key) for key in ("id", "name") for tag in soup.find_all(attrs={key: True})}
              for name, soup in pages.items()}
    for name, soup in pages.items():
        here = html / name
        for tag, attribute in (("a", "href"), ("img", "src"), ("script", "src"), ("link", "href")):
            for element in soup.find_all(tag, attrs={attribute: True}):
                url = urlparse(element[attribute])
                if url.scheme or url.netloc or element[attribute].startswith(("#top", "data:")):
                    continue
                target = (here.parent / unquote(url.path)).resolve() if url.path else here
                assert target.exists(), f"{name}: dead link {element[attribute]}"
                key = str(target.relative_to(html.resolve())) if target.suffix == ".html" else None
                if url.fragment and key in pages and not name.startswith("_modules"):
                    anchor = unquote(url.fragment)
                    assert anchor in places[key], f"{name}: no place {element[attribute]}"


def test_nothing_is_loaded_from_another_host(html, pages):
    for name, soup in pages.items():
        for tag, attribute in (("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src")):
            for element in soup.find_all(tag, attrs={attribute: True}):
                assert not urlparse(element[attribute]).netloc, f"{name}: {element[attribute]}"
        for element in soup.find_all("link", href=True):
            if urlparse(element["href"]).netloc:
                assert element.get("rel") == ["canonical"], f"{name}: {element}"
    for sheet in html.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text()), sheet


def test_colab_links_name_files_of_the_repository(written):
    tracked = {str(p.relative_to(ROOT)) for p in set_owner.files(ROOT)}
    for name, soup in written.items():
        links = [a["href"] for a in soup.find_all("a", href=True) if "colab.research.google.com" in a["href"]]
        needed = name == "README.html" or name[4:-5] in CHAPTERS
        assert links or not needed, f"{name}: no launch button"
        for link in links:
            assert re.fullmatch(r"https://colab\.research\.google\.com/github/[^/]+/attn_nb/blob/main/(nbs/\S+\.ipynb)",
                                link) and link.split("/main/")[1] in tracked, link


def test_buttons(written):
    for chapter in CHAPTERS:
        links = " ".join(a["href"] for a in written[f"nbs/{chapter}.html"].find_all("a", href=True))
        for needed in ("/attn_nb/issues/new", f"/attn_nb/edit/main/nbs/{chapter}.ipynb", f"_sources/nbs/{chapter}.ipynb"):
            assert needed in links, f"{chapter}: no {needed}"
        assert written[f"nbs/{chapter}.html"].select_one("form.bd-search, .search-button-field, .search-button__button")


def test_open_graph(html, written):
    for name, soup in written.items():
        tags = {m["property"]: m["content"] for m in soup.find_all("meta", property=True)}
        for needed in ("og:title", "og:url", "og:image", "og:site_name", "og:description", "og:image:alt"):
            assert tags.get(needed), f"{name}: no {needed}"
        assert tags["og:image"].endswith("/_static/landing.png") and (html / "_static/landing.png").exists()


def test_equations_exercises_terms_and_citations(written):
    page = article(written["nbs/01_single_head.html"])
    assert len(page.select("span.eqno")) >= 2
    assert len(page.select("div.exercise")) >= 3
    labels = [s.get_text() for s in page.select("details.hide summary")]
    assert sum("Solution:" in label for label in labels) == len(page.select("div.exercise"))
    assert page.select('a[href*="glossary.html#term-"]') and page.select('a[href*="bibliography.html#"]')
    glossary = article(written["nbs/glossary.html"])
    terms = [dt.get_text() for dt in glossary.select("dl.glossary dt")]
    chinese = [t for t in terms if re.search(r"[\u4e00-\u9fff]", t)]
    assert len(chinese) * 2 == len(terms), "one Chinese term beside each English one"


def test_the_interactive_figures_are_small(written):
    for figure in article(written["nbs/01_single_head.html"]).select("div.attn-slider"):
        assert len(str(figure)) < 12_000


def test_api_page_lists_every_public_name(written):
    import importlib

    ids = {tag["id"] for tag in written["nbs/api.html"].find_all(id=True)}
    for module in (p.stem for p in (ROOT / "attn_nb").glob("*.py") if not p.stem.startswith("_")):
        for name in importlib.import_module(f"attn_nb.{module}").__all__:
            if callable(getattr(importlib.import_module(f"attn_nb.{module}"), name)):
                assert f"attn_nb.{module}.{name}" in ids, f"{name} is not on the API page"
    text = article(written["nbs/api.html"]).get_text(" ")
    assert "True = may attend" in text and "Raises" in text and "Source" in text


def test_mathjax_comes_from_the_book(html, written):
    for name, soup in written.items():
        for script in soup.find_all("script", src=re.compile("mathjax")):
            assert not urlparse(script["src"]).netloc
    assert (html / "_static/mathjax/tex-chtml-full.js").exists()
