"""The built book in a real browser: offline, no console errors, phone and desktop, light and dark."""
import functools
import http.server
import json
import re
import threading
from base64 import b64decode
from decimal import ROUND_HALF_UP, Decimal

import pytest
import torch
from planted import ROOT
from run_chapter import values_after

pytestmark = pytest.mark.browser
PAGES = ["README.html", *sorted(f"nbs/{p.stem}.html" for p in [*(ROOT / "nbs").glob("*.ipynb"),
                                                               *(ROOT / "nbs").glob("*.md")]), "search.html"]
MASK_PAGES = [f"nbs/{p.stem}.html" for p in sorted((ROOT / "nbs").glob("*.ipynb")) if "mask_grid(" in p.read_text()]
CACHE_PAGES = [f"nbs/{p.stem}.html" for p in sorted((ROOT / "nbs").glob("*.ipynb")) if "cache_steps(" in p.read_text()]
KV_PAGES = [f"nbs/{p.stem}.html" for p in sorted((ROOT / "nbs").glob("*.ipynb")) if "kv_calculator(" in p.read_text()]

DIAL_PAGES = [f"nbs/{p.stem}.html" for p in sorted((ROOT / "nbs").glob("*.ipynb")) if "rotary_dial(" in p.read_text()]
STAGE_PAGES = [f"nbs/{p.stem}.html" for p in sorted((ROOT / "nbs").glob("*.ipynb")) if "alignment_theatre(" in p.read_text()]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/favicon.ico":          # the browser asks for it unbidden, now and then
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()

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

        tab.on("request", lambda r: None if r.url.startswith((server, "data:", "blob:")) else tab.problems.append(
            f"asked another host: {r.url}"))        # and the browser finds none: see conftest
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


CONTRAST = """() => {
  const rgb = s => s.match(/[\\d.]+/g).map(Number);
  const lum = c => { const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                     return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { while (e) { const c = rgb(getComputedStyle(e).backgroundColor);
                        if (c.length < 4 || c[3] > .5) return c; e = e.parentElement; } return [255, 255, 255]; };
  const bad = [];
  for (const e of document.querySelectorAll('article p, article li, article td, article th, article pre, article summary, ' +
                                            'article figcaption, article h1, article h2, article h3, .attn-slider text, ' +
                                            '.attn-mask :is(text, b, output), .attn-cache :is(text, output), ' +
                                            '.attn-kv :is(text, b, select, output), .attn-dial :is(text, b, output), ' +
                                            '.attn-stage :is(text, select, output)')) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), svg = e.namespaceURI.includes('svg'), ground = behind(e);
    let seen = 1;
    for (let p = e; p; p = p.parentElement) seen *= getComputedStyle(p).opacity;
    if (!seen) continue;
    const ink = rgb(svg ? style.fill : style.color).slice(0, 3).map((v, i) => seen * v + (1 - seen) * ground[i]);
    const a = lum(ink), b = lum(ground);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push(ratio.toFixed(1) + ' ' + e.tagName + ' ' + e.textContent.trim().slice(0, 30));
  }
  return bad;
}"""


@pytest.mark.parametrize("page", PAGES)
def test_page_loads_clean_and_legible_and_fits_a_phone(visit, page):
    for width in (1280, 390):
        tab = visit(page, width)
        assert tab.problems == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{page} overflows at {width} px"
        assert tab.evaluate("document.querySelectorAll('mjx-merror').length") == 0
        assert tab.evaluate(STICKS_OUT) == [], f"{page} at {width} px"
        if width == 1280 and page != PAGES[-1]:
            assert tab.evaluate("document.documentElement.dataset.theme") == "light"
            assert tab.evaluate(CONTRAST) == [], "legible"


def test_a_request_to_another_host_is_seen(visit):
    tab = visit("nbs/bibliography.html")
    tab.evaluate("fetch('https://example.org/x').catch(() => 0)")
    assert "asked another host: https://example.org/x" in tab.problems


def test_mathematics_is_typeset(visit):
    tab = visit("nbs/01_single_head.html")
    tab.wait_for_selector("article mjx-container")
    assert tab.locator("article mjx-container").count() > 50
    assert "\\operatorname" not in tab.inner_text("article")


def shown(figure):
    return [float(t) for t in figure.locator(".value").all_text_contents()]


def test_slider_follows_keyboard_and_mouse_and_shows_the_tensor(visit):
    frames = values_after("single_head", {
        "export-imports", "setup", "masked-softmax", "check-inputs", "check-probability", "check-mask", "attention", "variance",
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
    values = values_after("single_head", {
        "export-imports", "setup", "masked-softmax", "check-inputs", "check-probability", "check-mask", "attention",
        "check-tokens", "self-attention", "directory", "train", "train-check"})
    tab = visit("nbs/01_single_head.html", 390)
    figure = tab.locator(".attn-slider").nth(1)
    figure.locator("input").focus()
    for step in range(8):
        # trained again here: another number of threads rounds differently
        assert shown(figure) == pytest.approx(values["weights"][0, step].tolist(), abs=0.03)
        marked = figure.locator(".bar").evaluate_all("bars => bars.findIndex(b => b.classList.contains('marked'))")
        assert marked == values["right_key"][0, step]
        tab.keyboard.press("ArrowRight")


def masks_in(figure):
    """The masks that a figure carries, one axis for each slider, then the keys."""
    data = json.loads(figure.locator("script").text_content())
    bits = torch.tensor([int(bit) for bit in data["bits"]]).bool()
    return bits.view(*map(len, data["steps"]), -1), data["steps"]


def assert_shows(figure, at):
    """The figure shows masks[at]: filled and hatched cells, the chosen row, the names of the positions, the sentence."""
    masks, steps = masks_in(figure)
    cells = figure.locator("path").evaluate_all(
        "all => all.map(getComputedStyle).map(s => [s.fill !== 'none', s.stroke !== 'none', +s.fillOpacity])")
    allowed = masks[tuple(at[:-1])].flatten().tolist()
    assert [fill for fill, _, _ in cells] == allowed
    assert [hatch for _, hatch, _ in cells] == [not a for a in allowed]
    strong = [i for i, (fill, _, opacity) in enumerate(cells) if fill and opacity == 1]
    keys, wide = masks[tuple(at)].nonzero().flatten().tolist(), masks.shape[-1]
    assert strong == [at[-1] * wide + key for key in keys]
    chosen = figure.locator("g").evaluate_all("all => all.map(g => getComputedStyle(g.querySelector('rect')).stroke !== 'none')")
    assert chosen == [i == at[-1] for i in range(masks.shape[-2])]
    names = [words[i] for words, i in zip(steps, at)]
    assert figure.locator("b").all_text_contents() == names
    assert [i.get_attribute("aria-valuetext") for i in figure.locator("input").all()] == names
    words = "no key" if not keys else "key" + "s" * (len(keys) > 1) + " " + ", ".join(map(str, keys))
    assert figure.locator("output").inner_text() == f"query {at[-1]} may read {words}"


@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)], ids=["light", "dark-phone"])
@pytest.mark.parametrize("page", MASK_PAGES)
def test_mask_grid_follows_keyboard_and_mouse(visit, page, width, dark):
    tab = visit(page, width, dark)
    figures = tab.locator(".attn-mask").all()
    assert figures
    for figure in figures:
        sliders, rows = figure.locator("input").all(), figure.locator("g").all()
        masks, _ = masks_in(figure)
        at = [int(slider.input_value()) for slider in sliders]
        assert_shows(figure, at)
        for axis, slider in enumerate(sliders):
            slider.focus()
            tab.keyboard.press("Home")
            for at[axis] in range(masks.shape[axis]):
                assert_shows(figure, at)
                tab.keyboard.press("ArrowRight")
            assert_shows(figure, at)                              # no further than the end
            box = slider.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
            slider.click(position={"x": 2, "y": box["height"] / 2})
            at[axis] = 0
            assert_shows(figure, at)
        for axis, slider in enumerate(sliders[:-1]):              # the last mask allows most
            at[axis] = masks.shape[axis] - 1
            slider.press("End")
        for at[-1], row in reversed(list(enumerate(rows))):
            box = row.bounding_box()
            for part, place in ((row, None), (row.locator("text"), None), (row, {"x": box["width"] - 4, "y": 4})):
                rows[at[-1] - 1].click()
                part.click(position=place)
                assert_shows(figure, at)
    assert tab.problems == []


def test_mask_grids_on_one_page_move_alone(visit):
    """Twice the same figure, then one of the other kind, each with its script."""
    from attn_nb.plot import mask_grid, slider_bars

    masks = torch.stack([torch.zeros(3, 4), torch.ones(3, 4).tril(1)]).bool()
    one = mask_grid(masks, sliders={"mask": ["none", "causal"]}, start=(1, 0), alt="a mask").html
    bars = slider_bars(torch.rand(2, 3), steps="pq", bars="abc", alt="bars").html
    tab = visit("nbs/bibliography.html", 390)
    tab.set_content(one + bars + one)
    first, second = tab.locator(".attn-mask").all()
    first.locator("g").nth(2).click()
    second.locator("input").first.press("ArrowLeft")
    tab.locator(".attn-slider input").press("ArrowRight")
    assert_shows(first, (1, 2))
    assert_shows(second, (0, 0))
    assert "q: largest" in tab.locator(".attn-slider output").inner_text()
    assert tab.problems == [] and tab.evaluate("document.documentElement.scrollWidth") <= 390


def assert_steps(figure, at):
    """The figure shows call number `at`: its slots, its rows, the sentence; what is seen, not only what is named."""
    data = json.loads(figure.locator("script").text_content())
    past, stop = data["calls"][at]
    said = data["said"][at]
    assert said.startswith(f"call {at + 1}: offset {past}; writes ") and f"key{'s 0 to' * (stop > 1)} {stop - 1};" in said
    assert figure.locator("output").inner_text() == said
    assert figure.locator("input").get_attribute("aria-valuetext") == said
    slots = figure.locator("rect.slot").evaluate_all("all => all.map(e => [e.getAttribute('class'), getComputedStyle(e).fill])")
    kinds = ["slot kept"] * past + ["slot new"] * (stop - past) + ["slot"] * (len(slots) - stop)
    assert [kind for kind, _ in slots] == kinds
    colors = {kind: {color for k, color in slots if k == kind} for kind in kinds}
    assert all(len(c) == 1 for c in colors.values()) and len(set.union(*colors.values())) == len(colors)
    assert colors.get("slot", {"none"}) == {"none"}
    rows = figure.locator("g").evaluate_all("""all => all.map(g => [g.getAttribute('class'), +getComputedStyle(g).opacity,
        [...g.querySelectorAll('rect')].map(e => e.getAttribute('class')), g.querySelectorAll('rect').length,
        getComputedStyle(g.querySelector('rect')).fill])""")
    assert [kind for kind, *_ in rows] == ["gone"] * past + [""] * (stop - past) + ["later"] * (len(rows) - stop)
    assert [opacity > 0 for _, opacity, *_ in rows] == [i < stop for i in range(len(rows))]
    for i, (kind, _, cells, count, color) in enumerate(rows):
        assert count == i + 1 and {*cells} == {"old" if kind else "kept"}
        assert past == 0 or (color in colors["slot kept"]) == (kind == "")


def drive_steps(figure):
    """Through all calls from the keyboard, and back."""
    slider, calls = figure.locator("input"), json.loads(figure.locator("script").text_content())["calls"]
    assert calls[0][0] == 0 and all(a[1] == b[0] for a, b in zip(calls, calls[1:]))
    slider.press("Home")
    for at in range(len(calls)):
        assert_steps(figure, at)
        slider.press("ArrowRight")
    assert_steps(figure, len(calls) - 1)                          # no further than the end
    for at in range(len(calls) - 1, 0, -1):
        slider.press("ArrowLeft")
        assert_steps(figure, at - 1)
    slider.press("End")
    assert_steps(figure, len(calls) - 1)
    slider.click(position={"x": 2, "y": slider.bounding_box()["height"] / 2})
    assert_steps(figure, 0)


@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)], ids=["light", "dark-phone"])
@pytest.mark.parametrize("page", CACHE_PAGES)
def test_cache_steps_follow_the_keyboard(visit, page, width, dark):
    tab = visit(page, width, dark)
    figures = tab.locator(".attn-cache").all()
    assert figures
    for figure in figures:
        assert_steps(figure, int(figure.locator("input").input_value()))
        drive_steps(figure)
        box = figure.locator("input").bounding_box()
        assert box["height"] >= 24 and box["x"] >= 0 and box["x"] + box["width"] <= width
        assert figure.get_by_role("slider", name="call", exact=True).count() == 1
    assert tab.problems == [] and tab.evaluate("document.documentElement.scrollWidth") <= width


def test_cache_steps_on_one_page_move_alone(visit):
    """Twice the same figure, then one of another kind; before the scripts run it shows the same."""
    from attn_nb.plot import cache_steps, slider_bars

    weights = torch.rand(16, 16).tril() / 16
    one = cache_steps(weights, [5, 1, 10], max_len=24, alt="a cache").html
    bars = slider_bars(torch.rand(2, 3), steps="pq", bars="abc", alt="bars").html
    tab = visit("nbs/bibliography.html", 390)
    parts = "all => all.map(e => e.outerHTML)"
    tab.set_content(re.sub(r"<script>.*</script>", "", one, flags=re.S))
    assert tab.locator("[data-on]").count() == 0
    still = tab.locator(".attn-cache :is(text, rect, g, output)").evaluate_all(parts)
    names = "() => Object.getOwnPropertyNames(window).length"
    before = tab.evaluate(names)
    tab.set_content(one + bars + one)
    first, second = tab.locator(".attn-cache").all()
    assert first.locator(":is(text, rect, g, output)").evaluate_all(parts) == still
    drive_steps(second)
    assert_steps(first, 1)
    first.locator("input").press("ArrowRight")
    tab.locator(".attn-slider input").press("ArrowRight")
    assert_steps(first, 2)
    assert_steps(second, 0)
    assert "q: largest" in tab.locator(".attn-slider output").inner_text()
    assert tab.evaluate(names) == before
    assert tab.problems == [] and tab.evaluate("document.documentElement.scrollWidth") <= 390


def gib(count, unit=2**30):
    """The number of units as people write it: two decimals at most, halves up, commas."""
    value = (Decimal(count) / unit).quantize(Decimal("0.01"), ROUND_HALF_UP)
    return "under 0.01" if count and not value else f"{value:,}".rstrip("0").rstrip(".")


def assert_calculates(figure, data, model, at, number, card):
    """The figure shows what the formula gives for these layers, KV heads, head width, tokens and users."""
    layers, heads, width, tokens, users = at
    name, weights, *preset = data["models"][model]
    memory, token = data["cards"][card], 2 * layers * heads * width * number
    cache, spare = token * tokens * users, data["cards"][card] - weights - token * tokens * users
    fit = max(0, (memory - weights) // (token * tokens))
    people = "1 user" if users == 1 else f"{users} users"
    assert figure.locator("output").text_content().split("\n") == [
        f"{gib(token, 1024)} KiB per token ({token:,} bytes)", f"{gib(token * tokens)} GiB per user of {tokens:,} tokens",
        f"{gib(cache)} GiB for {people}", f"the weights of {name} alone do not fit on the card" if weights > memory else
        f"with the weights of {name}: {fit:,} user{'s' * (fit != 1)} fit{'s' * (fit == 1)} on the card"]
    assert figure.locator("text").all_text_contents() == [
        f"card: {gib(memory)} GiB", f"weights: {gib(weights)} GiB", f"cache of {people}: {gib(cache)} GiB",
        f"free: {gib(spare)} GiB" if spare >= 0 else f"does not fit: {gib(-spare)} GiB too much"]
    words = [f"{n:,}" for n in at]
    assert figure.locator("b").all_text_contents() == words
    assert [i.get_attribute("aria-valuetext") for i in figure.locator("input").all()] == words
    menus = figure.locator("select").evaluate_all("all => all.map(s => s.selectedOptions[0].textContent)")
    assert menus[0] == (name if preset == [layers, heads, width] else "own numbers")
    assert menus[1] == {2: "2 (bf16, fp16)", 1: "1 (fp8, int8)", 4: "4 (fp32)"}[number]

    first, step = 320 * weights / memory, 320 * token * tokens / memory
    paths = [[(float(x), float(x) + float(w)) for x, w in re.findall(r"M([\d.]+) 24h([\d.]+)v36H\1z", path)]
             for path in figure.locator("path").evaluate_all("all => all.map(p => p.getAttribute('d'))")]
    boxes = [(first + i * step, first + (i + 1) * step - 1) for i in range(users)] if step >= 4 else [
        (first, first + users * step)]
    for path, parts, low, high in zip(paths, ([(0, first)], boxes, [(0, first), *boxes]), (0, 0, 320), (320, 320, 384)):
        want = [(max(a, low), min(b, high)) for a, b in parts if max(a, low) < min(b, high)]
        assert path == [pytest.approx(box, abs=.11) for box in want]
    colors = figure.locator("path, rect").evaluate_all("all => all.map(e => getComputedStyle(e).fill)")
    assert len(set(colors[:3])) == 3 and colors[3] == "none"      # weights, cache, overflow; the card's outline
    assert colors[4:6] == colors[:2] and colors[6] == (colors[2] if spare < 0 else "none")
    assert figure.locator("path").nth(2).get_attribute("d").endswith("l14 18-14 18z") == (first + users * step > 384)


def drive_calculator(tab, figure):
    """Every preset, and moves of every control, from the keyboard."""
    data = json.loads(figure.locator("script").text_content())
    steps = [list(range(1, s + 1)) if isinstance(s, int) else s for s in data["steps"]]
    sliders, (picker, numbers, cards) = figure.locator("input").all(), figure.locator("select").all()
    model = int(picker.input_value())
    state = {"number": 2, "card": 0}
    at = [*data["models"][model][2:], 8192, 8]
    check = functools.partial(assert_calculates, figure, data)
    check(model, at, **state)
    picker.focus()
    tab.keyboard.press("Home")
    for model in range(len(data["models"])):
        at[:3] = data["models"][model][2:]
        check(model, at, **state)
        cards.focus()
        tab.keyboard.press("Home")
        for state["card"] in range(len(data["cards"])):
            check(model, at, **state)
            tab.keyboard.press("ArrowDown")
        picker.focus()
        tab.keyboard.press("ArrowDown")                           # from the last one nowhere: "own numbers" is no choice
    check(model, at, **state)
    for state["number"] in (2, 1, 4):
        numbers.focus()
        tab.keyboard.press("Home")
        for _ in range((2, 1, 4).index(state["number"])):
            tab.keyboard.press("ArrowDown")
        check(model, at, **state)
    for axis, slider in enumerate(sliders):
        slider.focus()
        tab.keyboard.press("Home")
        for i in range(4):
            at[axis] = steps[axis][i]
            check(model, at, **state)
            tab.keyboard.press("ArrowRight")
        tab.keyboard.press("End")
        for i in range(-1, -4, -1):
            at[axis] = steps[axis][i]
            check(model, at, **state)
            tab.keyboard.press("ArrowLeft")
        at[axis] = steps[axis][-4]
        check(model, at, **state)
    assert cards.input_value() == str(state["card"]) and picker.input_value() == ""
    for axis, slider in enumerate(sliders[:3]):                   # back by hand: the model has its name again
        at[axis] = data["models"][model][2 + axis]
        slider.focus()
        tab.keyboard.press("Home")
        for _ in range(steps[axis].index(at[axis])):
            tab.keyboard.press("ArrowRight")
        check(model, at, **state)
    for control in (*sliders, picker, numbers, cards):
        box = control.bounding_box()
        assert box["height"] >= 24 and box["x"] >= 0 and box["x"] + box["width"] <= tab.viewport_size["width"]
    for role, names in (("slider", ["layers", "KV heads", "head width", "tokens per user", "users"]),
                        ("combobox", ["model", "bytes per number", "card"])):
        assert figure.get_by_role(role).count() == len(names)
        for i, name in enumerate(names):
            label = figure.get_by_role(role).nth(i).and_(figure.get_by_role(role, name=name, exact=True))
            assert label.count() == 1, f"{role} {i} is not called {name}"


@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)], ids=["light", "dark-phone"])
@pytest.mark.parametrize("page", KV_PAGES)
def test_calculator_follows_the_keyboard(visit, page, width, dark):
    tab = visit(page, width, dark)
    figures = tab.locator(".attn-kv").all()
    assert figures
    for figure in figures:
        drive_calculator(tab, figure)
    assert tab.problems == [] and tab.evaluate("document.documentElement.scrollWidth") <= width


MODELS = {"<odd>": {"num_layers": 130, "num_kv_heads": 3, "head_dim": 288, "weight_bytes": 12_345_678_901},
          "large": {"num_layers": 1024, "num_kv_heads": 1024, "head_dim": 1024, "weight_bytes": 2**53 - 1},
          "small": {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "weight_bytes": 1}}
CARDS = {"tiny": 1, "usual": 24 * 2**30, "endless": 2**53 - 1}


def test_calculators_on_one_page_move_alone(visit):
    """Twice the same figure, then one of another kind, each with its script; the numbers are extreme."""
    from attn_nb.plot import kv_calculator, slider_bars

    one = kv_calculator(MODELS, cards=CARDS, alt="a bar").html
    bars = slider_bars(torch.rand(2, 3), steps="pq", bars="abc", alt="bars").html
    tab = visit("nbs/bibliography.html", 390)
    tab.set_content(one)
    names = "() => Object.getOwnPropertyNames(window).length"
    before = tab.evaluate(names)
    tab.set_content(one + bars + one)
    first, second = tab.locator(".attn-kv").all()
    data = json.loads(first.locator("script").text_content())
    drive_calculator(tab, second)
    assert_calculates(first, data, 0, [130, 3, 288, 8192, 8], 2, 0)
    tab.locator(".attn-slider input").press("ArrowRight")
    assert "q: largest" in tab.locator(".attn-slider output").inner_text()
    first.locator("input").nth(4).press("Home")
    assert_calculates(first, data, 0, [130, 3, 288, 8192, 1], 2, 0)
    assert tab.problems == [] and tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.evaluate(names) == before and tab.evaluate("typeof say + typeof bar + typeof steps") == "undefined" * 3


def test_calculator_shows_the_same_before_its_script_has_run(visit):
    from attn_nb.plot import kv_calculator

    tab = visit("nbs/bibliography.html", 390)
    parts = "all => all.map(e => e.outerHTML)"
    for start in range(len(MODELS)):
        for memory in CARDS.values():
            moving = kv_calculator(MODELS, cards={"card": memory}, alt="a bar", start=start).html
            tab.set_content(re.sub(r"<script>.*</script>", "", moving, flags=re.S))
            assert tab.locator("[data-on]").count() == 0
            still = tab.locator(".attn-kv :is(text, path, rect, b, output, option)").evaluate_all(parts)
            tab.set_content(moving)
            assert tab.locator("[data-on]").count() == 1
            assert tab.locator(".attn-kv :is(text, path, rect, b, output, option)").evaluate_all(parts) == still


def assert_dial_shows(figure, data, m, n):
    """Arrows, dot, line and numbers of a query at m and a key at n, from the tensors by complex numbers."""
    speeds = torch.tensor(data["speeds"]).double()
    turned = [torch.view_as_complex(torch.tensor(data[name]).double()) * torch.polar(torch.ones(2).double(), p * speeds)
              for name, p in (("query", m), ("key", n))]
    left, right = (turned[0] * turned[1].conj()).real.tolist()
    said = re.fullmatch(r"m - n = (-?\d+): score (\S+) \(left (\S+), right (\S+)\)", figure.locator("output").inner_text())
    assert int(said[1]) == m - n
    assert [float(x) for x in said.groups()[1:]] == pytest.approx([left + right, left, right], abs=6e-4)
    paths = figure.locator(".q, .k").evaluate_all("all => all.map(e => e.getAttribute('d'))")
    for i, path in enumerate(paths):
        x, y = map(float, re.fullmatch(rf"M{100 + 200 * (i // 2)} 86l(\S+) (\S+)", path).groups())
        tip = data["size"] * turned[i % 2][i // 2]
        assert (x, -y) == pytest.approx((tip.real.item(), tip.imag.item()), abs=.06)
    dot = figure.locator(".dot").evaluate("e => [+e.getAttribute('cx'), +e.getAttribute('cy')]")
    assert dot == pytest.approx([200 + data["step"] * (m - n), 232 - data["high"] * (left + right)], abs=.06)
    curve = figure.locator(".curve").get_attribute("d")[1:].split()       # made from the distance alone: the dot is on it
    where = 2 * (m - n + len(curve) // 4)
    assert dot == pytest.approx([float(c) for c in curve[where:where + 2]], abs=.11)
    assert figure.locator("b").all_inner_texts() == [str(m), str(n)]
    assert [s.get_attribute("aria-valuetext") for s in figure.locator("input").all()] == [f"position {m}", f"position {n}"]


def drive_dial(tab, figure):
    data = json.loads(figure.locator("script").text_content())
    sliders = figure.locator("input").all()
    top = int(sliders[0].get_attribute("max"))
    at = [int(s.input_value()) for s in sliders]
    assert_dial_shows(figure, data, *at)
    for axis, slider in enumerate(sliders):
        slider.focus()
        tab.keyboard.press("End")
        at[axis] = top
        assert_dial_shows(figure, data, *at)
        tab.keyboard.press("Home")
        for at[axis] in range(5):
            assert_dial_shows(figure, data, *at)
            tab.keyboard.press("ArrowRight")
        at[axis] = 5
        box = slider.bounding_box()
        assert box["height"] >= 24 and box["x"] >= 0 and box["x"] + box["width"] <= tab.viewport_size["width"]
    score = figure.locator("output").inner_text()
    for _ in range(3):                                            # both move on: the score stays
        for axis, slider in enumerate(sliders):
            slider.press("ArrowRight")
            at[axis] += 1
        assert_dial_shows(figure, data, *at)
        assert figure.locator("output").inner_text() == score
    for name in ("query at m", "key at n"):
        assert figure.get_by_role("slider", name=name, exact=True).count() == 1


@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)], ids=["light", "dark-phone"])
@pytest.mark.parametrize("page", DIAL_PAGES)
def test_dial_follows_the_keyboard(visit, page, width, dark):
    tab = visit(page, width, dark)
    figures = tab.locator(".attn-dial").all()
    assert figures
    for figure in figures:
        drive_dial(tab, figure)
    assert tab.problems == [] and tab.evaluate("document.documentElement.scrollWidth") <= width


def test_dials_on_one_page_move_alone(visit):
    """And each shows the same before its script has run."""
    from attn_nb.plot import rotary_dial, slider_bars

    torch.manual_seed(0)
    one = rotary_dial(torch.randn(2, 2), torch.randn(2, 2), torch.tensor([1.3, -0.2]), alt="arrows", start=(3, 8)).html
    bars = slider_bars(torch.rand(2, 3), steps="pq", bars="abc", alt="bars").html
    tab = visit("nbs/bibliography.html", 390)
    parts = "all => all.map(e => [e.tagName, e.className.baseVal ?? '', e.textContent, e.getAttribute('d')])"
    shown = ".attn-dial :is(text, path, b, output)"
    tab.set_content(re.sub(r"<script>.*</script>", "", one, flags=re.S))
    still = tab.locator(shown).evaluate_all(parts)
    tab.set_content(one)
    assert tab.locator("[data-on]").count() == 1 and tab.locator(shown).evaluate_all(parts) == still
    names = "() => Object.getOwnPropertyNames(window).length"
    before = tab.evaluate(names)
    tab.set_content(one + bars + one)
    first, second = tab.locator(".attn-dial").all()
    drive_dial(tab, second)
    assert_dial_shows(first, json.loads(first.locator("script").text_content()), 3, 8)
    assert tab.problems == [] and tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.evaluate(names) == before


def assert_stage_shows(figure, data, sample, at, layer, head):
    """The figure shows the stored weights of that output; head H is the mean."""
    source, output = data["tokens"][sample]
    heads = data["heads"]
    w = torch.tensor(list(b64decode(data["weights"][sample]))).view(-1, heads, len(output), len(source))[layer, :, at]
    w = w.double().mean(0) if head == heads else w[head].double()
    percents = [int(100 * x / 255 + .5 + 1e-9) for x in w.tolist()]
    svg = figure.locator("svg")
    assert svg.locator("text").evaluate_all("all => all.map(e => e.textContent)") == [*source, *output]
    assert [float(x) for x in svg.locator("rect[height='12']").evaluate_all(
        "all => all.map(e => e.getAttribute('fill-opacity'))")] == [p / 100 for p in percents]
    threads = svg.locator("path").evaluate_all("all => all.map(e => [+e.getAttribute('stroke-opacity'), e.getAttribute('d')])")
    xs = [int(x) for x in svg.locator("text").evaluate_all("all => all.map(e => e.getAttribute('x'))")]
    assert [t[0] for t in threads] == [p / 100 for p in percents if p >= 3]
    for (_, d), i in zip(threads, [i for i, p in enumerate(percents) if p >= 3]):
        assert d.startswith(f"M{xs[len(source) + at]} ") and d.endswith(f" {xs[i]} {36 if i < 20 else 204}")
    assert svg.locator(".now").count() == 1 and svg.locator(".later").count() == len(output) - at - 1
    best = sorted(range(len(source)), key=lambda i: (-percents[i], i))[:3]
    said = f"output {at}, {output[at]}: looks at " + ", ".join(f"{source[i]} ({i}) {percents[i]} %" for i in best)
    assert figure.locator("output").text_content() == said
    slider = figure.locator("input")
    assert slider.get_attribute("aria-valuetext") == f"{at}, {output[at]}" and slider.get_attribute("max") == str(len(output) - 1)


def drive_stage(figure):
    """Keys move the output; menus change string, layer and head."""
    data = json.loads(figure.locator("script").text_content())
    slider, (strings, layers, heads) = figure.locator("input"), figure.locator("select").all()
    sample, layer, head = (int(m.input_value()) for m in (strings, layers, heads))
    assert_stage_shows(figure, data, sample, int(slider.input_value()), layer, head)
    slider.press("End")
    assert_stage_shows(figure, data, sample, len(data["tokens"][sample][1]) - 1, layer, head)
    slider.press("Home")
    for at in range(min(3, len(data["tokens"][sample][1]))):
        assert_stage_shows(figure, data, sample, at, layer, head)
        slider.press("ArrowRight")
    for layer in range(layers.locator("option").count()):
        layers.select_option(str(layer))
        for head in range(data["heads"] + 1):
            heads.select_option(str(head))
            assert_stage_shows(figure, data, sample, int(slider.input_value()), layer, head)
    slider.press("End")
    for sample, (_, output) in enumerate(data["tokens"]):
        strings.select_option(str(sample))
        assert_stage_shows(figure, data, sample, int(slider.input_value()), layer, head)
    strings.focus()
    strings.press("Home")
    assert_stage_shows(figure, data, 0, int(slider.input_value()), layer, head)


@pytest.mark.parametrize("width, dark", [(1280, False), (360, True)], ids=["light", "dark-phone"])
@pytest.mark.parametrize("page", STAGE_PAGES)
def test_theatre_follows_the_keyboard(visit, page, width, dark):
    tab = visit(page, width, dark)
    figures = tab.locator(".attn-stage").all()
    assert figures
    for figure in figures:
        drive_stage(figure)
        for control in figure.locator("input, select").all():
            box = control.bounding_box()
            assert box["height"] >= 24 and box["x"] >= 0 and box["x"] + box["width"] <= width
        sizes = figure.locator("svg text").evaluate_all("all => all.map(e => e.getBoundingClientRect().height)")
        assert min(sizes) > 10
        for role, name in (("slider", "output"), ("combobox", "string"), ("combobox", "layer"), ("combobox", "head")):
            assert figure.get_by_role(role, name=name, exact=True).count() == 1
    assert tab.problems == [] and tab.evaluate("document.documentElement.scrollWidth") <= width


def test_theatres_on_one_page_move_alone(visit):
    """And each shows the same before its script has run; a token is text, whatever is in it."""
    from attn_nb.plot import alignment_theatre, slider_bars

    torch.manual_seed(0)
    one = alignment_theatre(
        {"<i>": (["<b>", "&lt;", "\u0663", "\u25cc\u093e", *"a much longer source than before"], ["<", "&", "i"],
                 torch.randn(3, 8, 3, 36).mul(4).softmax(-1)),
         "short": ("ab", "cdefg", torch.full((3, 8, 5, 2), 1 / 16))}, alt="threads", start=(0, 1)).html
    bars = slider_bars(torch.rand(2, 3), steps="pq", bars="abc", alt="bars").html
    tab = visit("nbs/bibliography.html", 390)
    parts = "all => all.map(e => e.outerHTML)"
    shown = ".attn-stage :is(svg *, output)"
    tab.set_content(re.sub(r"<script>.*</script>", "", one, flags=re.S))
    still = tab.locator(shown).evaluate_all(parts)
    tab.set_content(one)
    assert tab.locator("[data-on]").count() == 1 and tab.locator(shown).evaluate_all(parts) == still
    names = "() => Object.getOwnPropertyNames(window).length"
    before = tab.evaluate(names)
    tab.set_content(one + bars + one)
    first, second = tab.locator(".attn-stage").all()
    drive_stage(second)
    assert_stage_shows(first, json.loads(first.locator("script").first.text_content()), 0, 1, 2, 8)
    assert tab.problems == [] and tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.evaluate(names) == before


LIGHT_CARDS = """() => [...document.querySelectorAll(
    'article :is(div.cell_output img, .attn-slider, .attn-mask, .attn-kv, .attn-cache, .attn-dial, .attn-stage)')].filter(e => {
  const c = getComputedStyle(e), n = c.backgroundColor.match(/[\\d.]+/g).map(Number);
  return c.filter !== 'none' || ((n.length < 4 || n[3] > 0) && n[0] + n[1] + n[2] > 300);
}).length"""


@pytest.mark.parametrize("page", PAGES[:-1])
def test_a_dark_page_is_legible_and_has_no_light_card(visit, page):
    tab = visit(page, dark=True)
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    assert tab.evaluate(CONTRAST) == [] and tab.evaluate(LIGHT_CARDS) == 0


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
