"""The built book in a real browser: offline, no console errors, phone and desktop, light and dark."""
import functools
import http.server
import threading

import pytest
from run_chapter import ROOT, values_after

pytestmark = pytest.mark.browser
PAGES = ["README.html", *sorted(f"nbs/{p.stem}.html" for p in [*(ROOT / "nbs").glob("*.ipynb"),
                                                               *(ROOT / "nbs").glob("*.md")]), "search.html"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server(html):
    """The book over http on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=html)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def visit(browser, server):
    """visit(page, width, dark) -> a loaded page; its .problems lists console errors and requests to other hosts."""
    contexts = []

    def go(page, width=1280, dark=False):
        context = browser.new_context(viewport={"width": width, "height": 900},
                                      color_scheme="dark" if dark else "light")
        contexts.append(context)
        tab = context.new_page()
        tab.problems = []
        tab.on("console", lambda m: tab.problems.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda e: tab.problems.append(str(e)))

        def guard(route):
            if route.request.url.startswith((server, "data:", "blob:")):
                route.continue_()
            else:
                tab.problems.append(f"asked another host: {route.request.url}")
                route.abort()

        tab.route("**/*", guard)
        mode = "dark" if dark else "light"
        tab.add_init_script(f"localStorage.setItem('mode', '{mode}'); localStorage.setItem('theme', '{mode}')")
        tab.goto(f"{server}/{page}")
        tab.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)")
        return tab

    yield go
    for context in contexts:
        context.close()


# elements wider than the window that no ancestor lets the reader scroll
STICKS_OUT = """() => [...document.querySelectorAll('article :is(img, svg, pre, table, mjx-container, p, input)')].filter(e => {
  if (!e.getClientRects().length || e.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let a = e; a; a = a.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(a).overflowX)) return false;
  return true;
}).map(e => e.tagName + ' ' + e.textContent.trim().slice(0, 40))"""


def test_the_width_check_sees_what_sticks_out(visit):
    tab = visit("nbs/bibliography.html", 390)
    for tag in ("<pre>{}</pre>", "<img alt='x'>", "<svg><rect/></svg>", "<table><tr><td>x</td></tr></table>"):
        tab.evaluate("""tag => { const box = document.createElement('div'); box.innerHTML = tag;
            box.style.overflow = 'hidden'; document.querySelector('article').append(box);
            Object.assign(box.firstChild.style, {width: '900px', display: 'block', overflow: 'visible',
                                                 maxWidth: 'none'}) }""", tag)
    assert len(tab.evaluate(STICKS_OUT)) == 4


@pytest.mark.parametrize("page", PAGES)
def test_page_loads_clean_and_fits_a_phone(visit, page):
    for width in (1280, 390):
        tab = visit(page, width)
        assert tab.problems == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{page} overflows at {width} px"
        assert tab.evaluate("document.querySelectorAll('mjx-merror').length") == 0
        assert tab.evaluate(STICKS_OUT) == [], f"{page} at {width} px"


def test_mathematics_is_typeset(visit):
    tab = visit("nbs/01_single_head.html")
    tab.wait_for_selector("article mjx-container")
    assert tab.locator("article mjx-container").count() > 50
    assert "\\operatorname" not in tab.inner_text("article")


def shown(figure):
    return [float(t) for t in figure.locator(".value").all_text_contents()]


def test_slider_follows_keyboard_and_mouse_and_shows_the_tensor(visit):
    frames = values_after(ROOT / "nbs/01_single_head.ipynb", {
        "export-imports", "setup", "masked-softmax", "check-inputs", "check-mask", "attention", "variance",
        "saturation"})["frames"]
    tab = visit("nbs/01_single_head.html")
    figure = tab.locator(".attn-slider").first
    slider, menu = figure.locator("input"), figure.locator("select")

    def check(variant, step):
        assert shown(figure) == pytest.approx(frames[variant, step].tolist(), abs=0.0051)
        heights = [float(b.get_attribute("height")) for b in figure.locator(".bar").all()]
        want = (150 * frames[variant, step] / frames.max()).clamp(min=1).tolist()
        assert heights == pytest.approx(want, abs=0.02)

    check(0, 0)
    slider.focus()
    for step in range(1, 5):
        tab.keyboard.press("ArrowRight")
        check(0, step)
    assert "d_k = 1024" in figure.locator("output").inner_text()
    menu.select_option("1")
    check(1, 4)
    slider.click(position={"x": 2, "y": slider.bounding_box()["height"] / 2})
    check(1, 0)
    assert tab.problems == []


def test_second_slider_marks_the_right_key(visit):
    values = values_after(ROOT / "nbs/01_single_head.ipynb", {
        "export-imports", "setup", "masked-softmax", "check-inputs", "check-mask", "attention", "self-attention",
        "directory", "train", "train-check"})
    tab = visit("nbs/01_single_head.html", 390)
    figure = tab.locator(".attn-slider").nth(1)
    figure.locator("input").focus()
    for step in range(8):
        # trained again here: another number of threads rounds differently
        assert shown(figure) == pytest.approx(values["weights"][0, step].tolist(), abs=0.03)
        marked = figure.locator(".bar").evaluate_all("bars => bars.findIndex(b => b.classList.contains('marked'))")
        assert marked == values["right_key"][0, step]
        tab.keyboard.press("ArrowRight")


CONTRAST = """() => {
  const rgb = s => s.match(/[\\d.]+/g).map(Number);
  const lum = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                     return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { while (e) { const c = rgb(getComputedStyle(e).backgroundColor);
                        if (c.length < 4 || c[3] > .5) return c; e = e.parentElement; } return [255, 255, 255]; };
  const bad = [];
  for (const e of document.querySelectorAll('article p, article li, article td, article th, article pre, article summary, ' +
                                            'article figcaption, article h1, article h2, article h3, .attn-slider text')) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), svg = e.namespaceURI.includes('svg');
    const a = lum(rgb(svg ? style.fill : style.color)), b = lum(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push(ratio.toFixed(1) + ' ' + e.tagName + ' ' + e.textContent.trim().slice(0, 30));
  }
  return bad;
}"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", PAGES[:-1])
def test_text_is_legible(visit, page, dark):
    tab = visit(page, dark=dark)
    assert tab.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert tab.evaluate(CONTRAST) == []


def test_dark_figures_have_no_light_card(visit):
    tab = visit("nbs/01_single_head.html", dark=True)
    cards = tab.evaluate("""[...document.querySelectorAll('article div.cell_output img, article .attn-slider')].filter(e => {
        const c = getComputedStyle(e), n = c.backgroundColor.match(/[\\d.]+/g).map(Number);
        return c.filter !== 'none' || ((n.length < 4 || n[3] > 0) && n[0] + n[1] + n[2] > 300);
    }).length""")
    assert cards == 0


def test_search_finds_a_word(visit):
    tab = visit("search.html?q=softmax")
    tab.wait_for_selector("ul.search li a", timeout=15000)
    assert tab.locator("ul.search li").count() >= 2
    assert tab.problems == []


def test_a_solution_opens(visit):
    tab = visit("nbs/01_single_head.html")
    solution = tab.locator("details.hide", has_text="Solution: which width").first
    assert not solution.locator("pre").is_visible()
    solution.locator("summary").click()
    assert "check_spread(16" in solution.inner_text()
