"""Figures: what is drawn is the tensor, and the drawing is the committed one to the letter.

    python tests/test_plot.py        # rewrite the golden figures in tests/golden
"""
import io
import json
import re
import sys
from base64 import b64decode
from decimal import ROUND_HALF_UP, Decimal
from html import unescape
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

if __name__ == "__main__":
    sys.path[:0] = ["tests"]
    import conftest  # noqa: F401
from attn_nb.plot import (  # noqa: E402
    COLORS,
    GREY,
    _size,
    alignment_theatre,
    cache_steps,
    kv_calculator,
    mask_grid,
    plot_attention,
    rotary_dial,
    slider_bars,
    use_book_style,
)

GOLDEN = Path(__file__).parent / "golden"
MASK = torch.ones(3, 4).tril(1).bool()
MODELS = {"small": {"num_layers": 2, "num_kv_heads": 1, "head_dim": 32, "weight_bytes": 3 * 2**20},
          "<odd>": {"head_dim": 288, "num_layers": 130, "weight_bytes": 12_345_678_901, "num_kv_heads": 3},
          "huge": {"num_layers": 80, "num_kv_heads": 8, "head_dim": 128, "weight_bytes": 2**53 - 1}}
CARDS = {"24 GiB": 24 * 2**30, "a&b": 999_999_999}

DIAL = torch.tensor([[1.0, 0.4], [0.9, 0.3]]), torch.tensor([[0.8, -0.3], [-0.7, 1.6]]), torch.tensor([0.5, 0.07])
STAGE = {"<b>": ("a<b>", "1&\u0663\u0967", torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4) % 7 / 15),
         "long": ("the quick brown fox jumps over a dog.", ["i", "ii", "<", "v", "\u25cc\u093e", "z"],
                  torch.arange(2 * 3 * 6 * 37).view(2, 3, 6, 37) % 11 / 50)}


@pytest.fixture(autouse=True)
def clean():
    with plt.rc_context():
        yield
    plt.close("all")


def svg(ax):
    """The figure as the notebooks store it."""
    out = io.StringIO()
    ax.figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return out.getvalue()


def drawings():
    """One figure for each way to call the functions."""
    use_book_style()
    torch.manual_seed(0)
    scores = torch.randn(3, 4)
    big = torch.randn(9, 12).softmax(-1)
    yield "zero.html", slider_bars(torch.tensor([[0.0, 0.5, 1.0]]), steps="p", bars="abc", alt="bars")._repr_html_()
    yield "slider.html", slider_bars(big[:3, :5], steps=["one", "two", "<3>"], bars="abcde", alt="some <bars>",
                                     marks=[0, 4, 2], start=1)._repr_html_()
    yield "variants.html", slider_bars(torch.stack([big[:2, :3], 2 * big[:2, :3]]), steps="pq", bars="abc",
                                       variants=["x", "y&z"], slider="width", alt="bars")._repr_html_()
    yield "mask.html", mask_grid(windows(2, 3, 2, 5), sliders={"offset": "01", "<window>": ["1", "2", "<none>"]},
                                 start=(1, 2, 1), alt="a <mask>")._repr_html_()
    yield "mask_plain.html", mask_grid(torch.ones(3, 2).tril(-1).bool(), alt="a mask")._repr_html_()
    yield "mask_wide.html", mask_grid(torch.ones(1, 18).bool(), alt="a mask")._repr_html_()
    yield "cache.html", cache_steps(causal_weights(5), [2, 1, 2], max_len=7, alt="a <cache>", start=2)._repr_html_()
    yield "cache_plain.html", cache_steps(torch.ones(1, 1), [1], max_len=1, alt="a cache", start=0)._repr_html_()
    yield "calculator.html", kv_calculator(MODELS, cards=CARDS, alt="a <bar>", start=1)._repr_html_()
    yield "dial.html", rotary_dial(*DIAL, alt="two <arrows>", length=9, start=(3, 8))._repr_html_()
    yield "theatre.html", alignment_theatre(STAGE, alt="some <threads>", start=(1, 2))._repr_html_()
    yield "theatre_short.html", alignment_theatre({"x": ("abc", "cba", torch.eye(3).expand(1, 1, 3, 3))},
                                                    alt="threads")._repr_html_()
    yield "weights.svg", svg(plot_attention(scores.softmax(-1)))
    yield "masked.svg", svg(plot_attention(scores.softmax(-1), attn_mask=MASK, query_tokens="xyz", key_tokens="abcd",
                                           title="title"))
    yield "signed.svg", svg(plot_attention(scores, signed=True, attn_mask=MASK))
    yield "square.svg", svg(plot_attention(torch.eye(4), query_tokens="abcd"))
    yield "large.svg", svg(plot_attention(big))
    yield "large_signed.svg", svg(plot_attention(torch.randn(20, 9), signed=True))
    yield "edge.svg", svg(plot_attention(torch.randn(8, 8).softmax(-1)))
    _, ax = plt.subplots()
    ax.plot([1, 2, 3], label="a line")
    ax.legend()
    yield "lines.svg", svg(ax)


def causal_weights(T):
    """Weights of T tokens, the same at every call."""
    scores = 2 * torch.randn(T, T, generator=torch.Generator().manual_seed(1))
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)


def windows(offsets, sizes, q_len, kv_len):
    """(offsets, sizes, q_len, kv_len): query i reads the last 1, 2, ... keys up to i + offset; no limit in the end."""
    offset, size = torch.arange(offsets)[:, None, None, None], torch.arange(1, sizes + 1)[:, None, None]
    age = offset + torch.arange(q_len)[:, None] - torch.arange(kv_len)
    return (age >= 0) & ((age < size) | (size == sizes))


def test_figures_are_the_committed_ones():
    names = []
    for name, text in drawings():
        names.append(name)
        assert text == (GOLDEN / name).read_text(), f"{name} changed: look at it, then run python tests/test_plot.py"
    assert sorted(names) == sorted(p.name for p in GOLDEN.iterdir())


def test_map_draws_the_tensor():
    weights = torch.rand(3, 4, dtype=torch.bfloat16, requires_grad=True)
    ax = plot_attention(weights, attn_mask=MASK)
    drawn = ax.images[0].get_array()
    assert np.array_equal(drawn.mask, ~MASK.numpy())
    assert np.array_equal(drawn.data[MASK], weights.detach().float()[MASK].numpy())
    assert ax.images[0].get_clim() == (0, 1)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert ax.yaxis_inverted()                                    # origin at the top left
    hatched = {(round(p.get_y() + 0.5), round(p.get_x() + 0.5)) for p in ax.patches}
    assert hatched == set(map(tuple, (~MASK).nonzero().tolist()))
    printed = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in ax.texts}
    assert printed == {(i, j): f"{weights[i, j].item():.2f}" for i, j in MASK.nonzero().tolist()}


def test_signed_map_is_symmetric_about_zero():
    scores = torch.tensor([[-4.0, 1.0], [2.0, 100.0]])
    low, high = plot_attention(scores, signed=True, attn_mask=torch.tensor([[1, 1], [1, 0]]).bool()).images[0].get_clim()
    assert (low, high) == (-4, 4)


def test_signed_map_of_masked_scores():
    scores = torch.tensor([[-torch.inf, 1.0], [torch.nan, 0.5]])
    assert plot_attention(scores, signed=True).images[0].get_clim() == (-1, 1)
    low, high = plot_attention(scores, signed=True, attn_mask=torch.zeros(2, 2).bool()).images[0].get_clim()
    assert low < 0 < high


@pytest.mark.parametrize("mask", [torch.ones(3, 2).bool(), torch.ones(2, 3), torch.ones(1, 1, 2, 3).bool()])
def test_map_refuses_masks_that_do_not_fit(mask):
    with pytest.raises(ValueError, match=r"\battn_mask\b"):
        plot_attention(torch.rand(2, 3), attn_mask=mask)


def test_labels_are_text_and_not_formulas():
    ax = plot_attention(torch.rand(2, 2), query_tokens=["$x^$", "$5"])
    assert "$x^$" in svg(ax)


def test_style_without_a_notebook(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib_inline.backend_inline", None)
    use_book_style()
    assert plt.rcParams["svg.hashsalt"] == "attn_nb"


def test_map_draws_into_the_axes_it_is_given():
    _, (left, right) = plt.subplots(1, 2)
    assert plot_attention(torch.eye(2), ax=right) is right and not left.images


def test_numbers_are_printed_up_to_eight():
    assert len(plot_attention(torch.rand(8, 8)).texts) == 64
    assert not plot_attention(torch.rand(9, 8)).texts and not plot_attention(torch.rand(8, 9)).texts


def contrast(a, b):
    """WCAG 2 contrast ratio of two RGB colours."""
    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_everything_is_legible():
    rgb = matplotlib.colors.to_rgb
    for background in ("#ffffff", "#121212"):
        assert contrast(rgb(GREY), rgb(background)) > 4
        assert all(contrast(rgb(c), rgb(background)) > 3 for c in COLORS)
    ax = plot_attention(torch.linspace(0, 1, 64).view(8, 8))
    for text in ax.texts:
        j, i = text.get_position()
        cell = ax.images[0].cmap(ax.images[0].norm(ax.images[0].get_array()[i, j]))
        assert contrast(rgb(text.get_color()), cell) > 4


@pytest.mark.parametrize("kwargs, words", [
    ({"weights": torch.rand(0, 4)}, "weights"),
    ({"weights": torch.rand(4)}, "weights"),
    ({"weights": torch.rand(1, 3, 4)}, "weights"),
    ({"weights": torch.rand(3, 4), "query_tokens": "abcd"}, "query_tokens"),
    ({"weights": torch.rand(3, 4), "key_tokens": "abc"}, "key_tokens"),
])
def test_map_refuses_wrong_input(kwargs, words):
    with pytest.raises(ValueError, match=rf"\b{words}\b"):
        plot_attention(**kwargs)


@pytest.mark.parametrize("frames, variants", [(torch.rand(3, 5), None), (torch.rand(2, 3, 5), ["a", "b"])])
def test_slider_carries_the_tensor(frames, variants):
    figure = slider_bars(frames, steps="pqr", bars="abcde", variants=variants, alt="five bars")
    html = figure._repr_html_()
    data = json.loads(re.search(r'application/json">(.*?)</script>', html)[1])
    assert torch.allclose(torch.tensor(data["frames"]).view(frames.shape), frames, rtol=0, atol=5.1e-5)
    assert data["top"] == pytest.approx(frames.max().item()) and data["bars"] == list("abcde")
    assert "http" not in html and len(html.encode()) < 10_000
    assert repr(figure) == "[interactive figure] five bars"


def test_slider_shows_its_first_step_without_scripts():
    frames = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    html = slider_bars(frames, steps=["first", "second"], bars="ab", alt="two bars", start=1)._repr_html_()
    picture = re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert re.findall(r'class="value"[^>]*>([\d.]+)<', picture) == ["0.50", "0.50"]
    assert ">second</output>" in picture and 'value="1"' in picture
    heights = [float(h) for h in re.findall(r'class="bar".*?height="([\d.]+)"', picture)]
    assert heights == [100.0, 100.0]


def test_slider_cannot_be_broken_by_names():
    html = slider_bars(torch.rand(1, 1), steps=["</script><b>"], bars=['"><i>'], alt='" onload="x')._repr_html_()
    assert "</script><b>" not in html and "<i>" not in html and 'onload="x' not in html


def test_large_maps_are_labelled():
    tokens = [f"t{i}" for i in range(300)]
    ax = plot_attention(torch.rand(300, 300), query_tokens=tokens)
    assert [t.get_text() for t in ax.get_xticklabels()] == tokens


@pytest.mark.parametrize("changes, words", [
    ({"frames": torch.full((3, 4), torch.nan)}, "frames"),
    ({"frames": torch.full((3, 4), torch.inf)}, "frames"),
    ({"frames": torch.tensor([[0.5, 0.5, 0.5, -1.0]] * 3)}, "frames"),
    ({"frames": torch.zeros(3, 0), "bars": ""}, "frames"),
    ({"frames": torch.rand(2, 4)}, "frames"),
    ({"frames": torch.rand(4, 4)}, "frames"),
    ({"marks": [1]}, "marks"),
    ({"marks": [1, 1, 1, 1]}, "marks"),
    ({"marks": [0, 0, 4]}, "marks"),
    ({"marks": [0, 0, 7]}, "marks"),
    ({"marks": [0, 0, -2]}, "marks"),
    ({"start": -1}, "start"),
    ({"start": 3}, "start"),
    ({"start": 9}, "start"),
    ({"frames": torch.rand(4, 4), "steps": "pqrs", "start": 4}, "start"),
])
def test_slider_refuses_what_it_cannot_draw(changes, words):
    good = {"frames": torch.rand(3, 4), "steps": "abc", "bars": "wxyz", "alt": "x"}
    slider_bars(**good, marks=[3, 0, -1], start=2)
    with pytest.raises(ValueError, match=rf"\b{words}\b"):
        slider_bars(**{**good, **changes})


def test_slider_takes_any_names_and_marks():
    html = slider_bars(torch.rand(2, 2), steps=range(2), bars=[1, 2], alt="x", marks=torch.tensor([1, -1]))._repr_html_()
    assert re.findall(r'class="(bar[^"]*)"', html) == ["bar", "bar marked"]
    assert json.loads(re.search(r'json">(.*?)</script>', html)[1])["marks"] == [1, -1]
    slider_bars(torch.rand(1, 2, 2), steps=range(2), bars=[1, 2], alt="x", variants=[7], start=1)


def test_slider_of_zeros():
    assert 'class="value"' in slider_bars(torch.zeros(2, 3), steps="ab", bars="abc", alt="x")._repr_html_()


def test_slider_refuses_wrong_shapes():
    with pytest.raises(TypeError):
        slider_bars(torch.rand(2, 3), "ab", "abc", alt="x")
    with pytest.raises(ValueError, match=r"\bframes\b"):
        slider_bars(torch.rand(3), steps="a", bars="abc", alt="x")
    with pytest.raises(ValueError, match=r"\bframes\b"):
        slider_bars(torch.rand(3, 2), steps="ab", bars="abc", alt="x")
    with pytest.raises(ValueError, match=r"\bframes\b"):
        slider_bars(torch.rand(2, 3), steps="ab", bars="abc", variants="xy", alt="x")


def unpacked(html):
    """The masks in a figure, and the names of each slider's positions."""
    data = json.loads(re.search(r'application/json">(.*?)</script>', html)[1])
    sizes = [len(words) for words in data["steps"]]
    return torch.tensor([int(bit) for bit in data["bits"]]).bool().view(*sizes, -1), data["steps"]


def test_mask_grid_carries_the_masks_in_ten_kilobytes():
    masks, sizes = windows(7, 9, 4, 10), [*range(1, 9), "none"]
    figure = mask_grid(masks, sliders={"offset": range(7), "window": sizes}, start=(3, 8, 1), alt="who reads whom")
    html = figure._repr_html_()
    read, steps = unpacked(html)
    assert torch.equal(read, masks)
    assert steps == [[str(i) for i in range(7)], [str(w) for w in sizes], ["0", "1", "2", "3"]]
    assert len(html.encode()) < 10_000 and "http" not in html and "url(" not in html and " id=" not in html
    assert repr(figure) == "[interactive figure] who reads whom" and 'aria-label="who reads whom"' in html
    assert re.findall(r'<label>(\w+) <input type="range" min="0"\s+max="(\d)" step="1" value="(\d)"></label> <b>(\w+)</b>',
                      html) == [("offset", "6", "3", "3"), ("window", "8", "8", "none"), ("query", "3", "1", "1")]


@pytest.mark.parametrize("masks, sliders, start", [
    (windows(2, 3, 4, 5), {"a": "01", "b": "012"}, (1, 2, 3)), (windows(2, 3, 4, 5), {"a": "01", "b": "012"}, None),
    (windows(1, 3, 2, 7)[0], {"b": "012"}, [2, 1]), (MASK, None, (2,)), (MASK, {}, None),
    (torch.zeros(1, 1).bool(), None, None), (torch.ones(24, 24).tril().bool(), None, (23,)),
    (torch.ones(2, 1, 1).bool(), {"a": ["x", "y"]}, torch.tensor([1, 0])),
])
def test_mask_grid_draws_its_start_without_scripts(masks, sliders, start):
    html = mask_grid(masks, sliders=sliders, start=start, alt="x")._repr_html_()
    picture = re.sub(r"<script.*?</script>", "", html, flags=re.S)
    at = tuple(int(i) for i in start) if start is not None else (0,) * (masks.dim() - 1)
    mask = masks[at[:-1]]
    rows = re.findall(r"<g.*?</g>", picture, flags=re.S)
    assert [[cell == ' class="may"' for cell in re.findall("<path([^>]*?) d=", row)] for row in rows] == mask.tolist()
    assert [i for i, row in enumerate(rows) if row.startswith('<g class="chosen">')] == [at[-1]]
    keys = mask[at[-1]].nonzero().flatten().tolist()
    words = "no key" if not keys else f"key {keys[0]}" if len(keys) == 1 else f"keys {', '.join(map(str, keys))}"
    assert f'<output aria-live="polite">query {at[-1]} may read {words}</output>' in picture
    assert ">key</text>" in picture and ">query</text>" in picture


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 24), (24, 1), (24, 24), (4, 10), (9, 3), (17, 16)])
def test_mask_grid_puts_keys_on_top_and_queries_down_the_side(q_len, kv_len):
    html = mask_grid(torch.zeros(q_len, kv_len).bool(), alt="x")._repr_html_()
    height = int(re.search(r'viewBox="0 0 400 (\d+)"', html)[1])
    corners = [(int(x), int(y)) for x, y in re.findall(r'd="M(\d+) (\d+)h', html)]
    side = int(re.search(r'd="M\d+ \d+h(\d+)', html)[1])
    assert len(set(corners)) == q_len * kv_len and side >= 8
    assert max(q_len, kv_len) != 10 or side == 30                  # as large as fits
    grid = [corners[i * kv_len:(i + 1) * kv_len] for i in range(q_len)]
    assert all(len({y for _, y in row}) == 1 for row in grid) and all(len({x for x, _ in col}) == 1 for col in zip(*grid))
    assert all(b[0] - a[0] == side + 4 for a, b in zip(grid[0], grid[0][1:]))
    assert all(b[0][1] - a[0][1] == side + 4 for a, b in zip(grid, grid[1:]))
    assert corners[-1][0] + side + 2 < 400 and corners[-1][1] + side + 2 < height
    labels = {(int(x), int(y)): int(word) for x, y, word in re.findall(r'<text x="(\d+)" y="(\d+)">(\d+)</text>', html)}
    for (x, y), word in labels.items():
        corner = grid[word][0] if x < grid[0][0][0] else grid[0][word]
        assert abs(y - corner[1] - side / 2) < 6 if x < grid[0][0][0] else x == corner[0] + side / 2 and y < corner[1]
    assert len(labels) == q_len + (kv_len if side >= 16 else -(-kv_len // 2))


def test_a_slider_may_have_many_positions():
    html = mask_grid(torch.ones(30, 2, 3).bool(), sliders={"a": range(30)}, alt="x")._repr_html_()
    assert 'max="29"' in html


def test_mask_grid_cannot_be_broken_by_names():
    html = mask_grid(torch.ones(1, 1, 1).bool(), sliders={"</label><u>": ["</script><i>"]}, alt='" onload="x')._repr_html_()
    assert "<u>" not in html and "<i>" not in html and 'onload="x' not in html
    assert unpacked(html)[1] == [["</script><i>"], ["0"]]


@pytest.mark.parametrize("changes, error, words", [
    ({"masks": torch.ones(2, 3, 4)}, TypeError, "masks"),
    ({"masks": [[True]]}, TypeError, "masks"),
    ({"sliders": ["a"]}, TypeError, "sliders"),
    ({"sliders": []}, TypeError, "sliders"),
    ({"masks": torch.ones(4).bool()}, ValueError, "masks"),
    ({"masks": torch.ones(4).bool(), "sliders": {}}, ValueError, "masks"),
    ({"masks": torch.ones(3, 4).bool()}, ValueError, "masks"),
    ({"masks": torch.ones(2, 2, 3, 4).bool()}, ValueError, "masks"),
    ({"sliders": {"a": "1"}}, ValueError, "masks"),
    ({"sliders": {"a": "123"}}, ValueError, "masks"),
    ({"sliders": None}, ValueError, "masks"),
    ({"sliders": {"a": "12", "b": "12"}}, ValueError, "masks"),
    ({"masks": torch.ones(2, 0, 4).bool()}, ValueError, "masks"),
    ({"masks": torch.ones(2, 3, 0).bool()}, ValueError, "masks"),
    ({"masks": torch.ones(0, 3, 4).bool(), "sliders": {"a": []}}, ValueError, "masks"),
    ({"masks": torch.ones(2, 25, 4).bool()}, ValueError, "masks"),
    ({"masks": torch.ones(2, 3, 25).bool()}, ValueError, "masks"),
    ({"start": [1]}, ValueError, "start"),
    ({"start": [1, 1, 1]}, ValueError, "start"),
    ({"start": (2, 0)}, ValueError, "start"),
    ({"start": (0, 3)}, ValueError, "start"),
    ({"start": (-1, 0)}, ValueError, "start"),
    ({"start": (0, 1.5)}, ValueError, "start"),
])
def test_mask_grid_refuses_what_it_cannot_draw(changes, error, words):
    good = {"masks": torch.ones(2, 3, 4).bool(), "sliders": {"a": "12"}, "alt": "x"}
    mask_grid(**good, start=(1, 2))
    with pytest.raises(error, match=rf"\b{words}\b"):
        mask_grid(**{**good, **changes})


CALLS = [(9, [4, 1, 1, 1, 2], 12), (9, [9], 9), (1, [1], 1), (1, [1], 24), (16, [1] * 16, 24), (16, [8, 8], 16), (5, (1, 4), 6)]


def in_words(number, past, stop):
    slots = f"slot {past}" if stop == past + 1 else f"slots {past} to {stop - 1}"
    keys = "key 0" if stop == 1 else f"keys 0 to {stop - 1}"
    gone = "nothing kept before" if not past else "row 0 gone" if past == 1 else f"rows 0 to {past - 1} gone"
    return f"call {number + 1}: offset {past}; writes {slots}, reads {keys}; {gone}"


@pytest.mark.parametrize("T, calls, max_len", CALLS)
def test_cache_steps_draws_each_call_without_scripts(T, calls, max_len):
    """Slots: kept, new or empty. Rows: gone, of now or to come, with as many cells as keys, as dark as their weights."""
    weights = causal_weights(T)
    for start in range(len(calls)):
        html = cache_steps(weights, calls, max_len=max_len, alt="x", start=start)._repr_html_()
        picture = re.sub(r"<script.*?</script>", "", html, flags=re.S)
        past, stop = sum(calls[:start]), sum(calls[:start + 1])
        slots = re.findall('<rect class="slot( kept| new|)"', picture)
        assert slots == [" kept"] * past + [" new"] * (stop - past) + [""] * (max_len - stop)
        rows = re.findall('<g class="(.*?)">(.*?)</g>', picture, flags=re.S)
        assert [kind for kind, _ in rows] == ["gone"] * past + [""] * (stop - past) + ["later"] * (T - stop)
        for i, (kind, row) in enumerate(rows):
            cells = re.findall('<rect class="(kept|old)".*?fill-opacity="(.*?)"/>', row, flags=re.S)
            assert {c for c, _ in cells} == {"old" if kind else "kept"} and f">{i}</text>" in row
            assert [float(shade) for _, shade in cells] == pytest.approx((.08 + .92 * weights[i, :i + 1]).tolist(), abs=.0051)
        assert f'<output aria-live="polite">{in_words(start, past, stop)}</output>' in picture
        assert f'max="{len(calls) - 1}" step="1" value="{start}"' in picture


@pytest.mark.parametrize("T, calls, max_len", CALLS)
def test_cache_steps_puts_keys_under_their_slots(T, calls, max_len):
    html = cache_steps(causal_weights(T), calls, max_len=max_len, alt="x", start=0)._repr_html_()
    height = int(re.search(r'viewBox="0 0 400 (\d+)"', html)[1])
    boxes = [tuple(map(int, box)) for box in re.findall(r'x="(\d+)"\s+y="(\d+)"\s+width="(\d+)"\s+height="(\d+)"', html)]
    slots, cells = boxes[:max_len], boxes[max_len:]
    assert len(cells) == T * (T + 1) // 2 and len({*boxes}) == len(boxes)
    side = slots[0][2]
    assert {box[2:] for box in boxes} == {(side, side)} and side >= 12
    assert len({y for _, y, *_ in slots}) == 1 and all(b[0] - a[0] == side + 3 for a, b in zip(slots, slots[1:]))
    rows = [cells[i * (i + 1) // 2:(i + 1) * (i + 2) // 2] for i in range(T)]
    for i, row in enumerate(rows):
        assert [x for x, *_ in row] == [x for x, *_ in slots[:i + 1]]
        assert {y for _, y, *_ in row} == {rows[0][0][1] + (side + 3) * i}
    assert rows[0][0][1] > slots[0][1] + side
    assert slots[-1][0] + side <= 400 and cells[-1][1] + side <= height
    assert [int(n) for n in re.findall(r'y="29">(\d+)</text>', html)] == list(range(max_len))


def test_cache_steps_is_small_and_carries_the_calls():
    figure = cache_steps(causal_weights(9), [4, 1, 1, 1, 2], max_len=12, alt="slots and rows")
    html = figure._repr_html_()
    data = json.loads(re.search(r'application/json">(.*?)</script>', html)[1])
    spans = [(0, 4), (4, 5), (5, 6), (6, 7), (7, 9)]
    assert data == {"calls": [[*span] for span in spans], "said": [in_words(i, *span) for i, span in enumerate(spans)]}
    assert data["said"][0] == "call 1: offset 0; writes slots 0 to 3, reads keys 0 to 3; nothing kept before"
    assert data["said"][1] == "call 2: offset 4; writes slot 4, reads keys 0 to 4; rows 0 to 3 gone"
    largest = cache_steps(causal_weights(16), [1] * 16, max_len=24, alt="x")._repr_html_()
    assert len(html.encode()) < 12_000 and len(largest.encode()) < 24_000
    assert "http" not in html and "url(" not in html and " id=" not in html
    assert repr(figure) == "[interactive figure] slots and rows" and 'aria-label="slots and rows"' in html
    assert re.findall(r'<label>(\w+) <input type="range" min="0"\s+max="(\d+)" step="1" value="(\d+)"></label>', html) == [
        ("call", "4", "1")]


def test_cache_steps_cannot_be_broken_by_words():
    html = cache_steps(causal_weights(3), [2, 1], max_len=3, alt='" onload="x</script><i>')._repr_html_()
    assert "<i>" not in html and 'onload="x' not in html


def test_cache_steps_takes_weights_of_any_kind():
    for weights in (causal_weights(3).double(), causal_weights(3).bfloat16(), causal_weights(3).requires_grad_(),
                    torch.eye(3), torch.zeros(3, 3), torch.eye(3).long()):
        before = weights.detach().clone()
        cache_steps(weights, [2, 1], max_len=3, alt="x")
        assert torch.equal(weights, before)


@pytest.mark.parametrize("changes, error, words", [
    ({"weights": [[1.0]]}, TypeError, "weights"),
    ({"calls": 3}, TypeError, "calls"),
    ({"calls": None}, TypeError, "calls"),
    ({"calls": [2.0, 1]}, TypeError, "calls"),
    ({"calls": [2, True]}, TypeError, "calls"),
    ({"calls": "21"}, TypeError, "calls"),
    ({"max_len": 3.0}, TypeError, "max_len"),
    ({"max_len": None}, TypeError, "max_len"),
    ({"start": "1"}, TypeError, "start"),
    ({"start": True}, TypeError, "start"),
    ({"weights": torch.eye(3)[:2]}, ValueError, "weights"),
    ({"weights": torch.eye(3)[0]}, ValueError, "weights"),
    ({"weights": torch.eye(3)[None]}, ValueError, "weights"),
    ({"weights": torch.zeros(0, 0)}, ValueError, "weights"),
    ({"weights": torch.eye(17), "calls": [17], "max_len": 17}, ValueError, "weights"),
    ({"weights": torch.full((3, 3), 0.3)}, ValueError, "weights"),
    ({"weights": torch.eye(3) * 1.1}, ValueError, "weights"),
    ({"weights": torch.eye(3) * -1}, ValueError, "weights"),
    ({"weights": torch.eye(3) * torch.nan}, ValueError, "weights"),
    ({"calls": [2, 2]}, ValueError, "calls"),
    ({"calls": [2]}, ValueError, "calls"),
    ({"calls": []}, ValueError, "calls"),
    ({"calls": [3, 0]}, ValueError, "calls"),
    ({"calls": [4, -1]}, ValueError, "calls"),
    ({"max_len": 2}, ValueError, "max_len"),
    ({"max_len": 25}, ValueError, "max_len"),
    ({"start": 2}, ValueError, "start"),
    ({"start": -1}, ValueError, "start"),
])
def test_cache_steps_refuses_what_it_cannot_draw(changes, error, words):
    good = {"weights": causal_weights(3), "calls": [2, 1], "max_len": 3, "alt": "x"}
    cache_steps(**good)
    with pytest.raises(error, match=rf"\b{words}\b"):
        cache_steps(**{**good, **changes})


def gib(count, unit=2**30):
    """The number of units as people write it: two decimals at most, halves up, commas."""
    value = (Decimal(count) / unit).quantize(Decimal("0.01"), ROUND_HALF_UP)
    return "under 0.01" if count and not value else f"{value:,}".rstrip("0").rstrip(".")


def boxes(path):
    """The (left, width) of each box of an SVG path."""
    return [(float(x), float(width)) for x, width in re.findall(r"M([\d.]+) 24h([\d.]+)v36H\1z", path)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("card", [1, 4 * 2**20, 10**9, 11_500_000_000, 24 * 2**30, 40 * 2**30, 2**53 - 1])
def test_calculator_is_right_without_scripts(name, card):
    html = kv_calculator(MODELS, cards={"c": card, "other": 5}, alt="x", start=[*MODELS].index(name))._repr_html_()
    picture = unescape(re.sub(r"<script.*?</script>", "", html, flags=re.S))
    model, weights = MODELS[name], MODELS[name]["weight_bytes"]
    token = 2 * model["num_layers"] * model["num_kv_heads"] * model["head_dim"] * 2
    cache = 8 * 8192 * token
    fit = max(0, (card - weights) // (8192 * token))
    lines = re.search(r'<output aria-live="polite">(.*?)</output>', picture, re.S)[1].split("\n")
    assert lines == [
        f"{gib(token, 1024)} KiB per token ({token:,} bytes)", f"{gib(8192 * token)} GiB per user of 8,192 tokens",
        f"{gib(cache)} GiB for 8 users", f"the weights of {name} alone do not fit on the card" if weights > card else
        f"with the weights of {name}: {fit:,} user{'s' * (fit != 1)} fit{'s' * (fit == 1)} on the card"]
    spare = card - weights - cache
    assert re.findall("<text[^>]*>(.*?)</text>", picture) == [
        f"card: {gib(card)} GiB", f"weights: {gib(weights)} GiB", f"cache of 8 users: {gib(cache)} GiB",
        f"free: {gib(spare)} GiB" if spare >= 0 else f"does not fit: {gib(-spare)} GiB too much"]
    paths = dict(re.findall('<path class="(.*?)" d="(.*?)"/>', picture))
    first, step = 320 * weights / card, 320 * cache / 8 / card
    assert [*paths] == ["weights", "cache", "over"]
    assert boxes(paths["weights"]) == [(0, pytest.approx(min(first, 320), abs=.06))] or first < .06
    users = [(first + i * step, step - 1) for i in range(8)] if step >= 4 else [(first, 8 * step)]
    fitting = [(x, min(width, 320 - x)) for x, width in users if x < 320]
    assert boxes(paths["cache"]) == [pytest.approx(box, abs=.11) for box in fitting]
    assert ("M386" in paths["over"]) == (first + 8 * step > 384)
    assert bool(paths["over"]) == (spare < 0) == ('<rect class="over"' in picture)
    if spare < 0:
        assert boxes(paths["over"])[0][0] == 320 or step >= 4 and first < 320
        assert all(x >= 320 and x + width <= 384.11 for x, width in boxes(paths["over"]))


def test_calculator_counts_one_user_in_the_singular():
    one = MODELS["small"]["weight_bytes"] + 2 * 2 * 32 * 2 * 8192
    cards = {"one": one, "none": one - 1}
    assert ": 1 user fits on the card<" in kv_calculator(MODELS, cards=cards, alt="x").html
    assert ": 0 users fit on the card<" in kv_calculator(MODELS, cards={"none": one - 1}, alt="x").html


@pytest.mark.parametrize("count, words", [(0, "0"), (1, "under 0.01"), (2**30, "1"), (2**30 + 2**27, "1.13"),
                                          (5 * 2**27, "0.63"), (10 * 2**30, "10"), (1234567 * 2**29, "617,283.5"),
                                          (2**30 // 200, "under 0.01"), (2**30 // 200 + 1, "0.01")])
def test_sizes_are_rounded_half_up(count, words):
    assert _size(count) == gib(count) == words


def test_calculator_is_small_and_carries_the_models():
    figure = kv_calculator(MODELS, cards=CARDS, alt="a bar", start=1)
    html = figure._repr_html_()
    data = json.loads(re.search(r'application/json">(.*?)</script>', html)[1])
    keys = ["weight_bytes", "num_layers", "num_kv_heads", "head_dim"]
    assert data["models"] == [[name, *(model[key] for key in keys)] for name, model in MODELS.items()]
    assert data["cards"] == [*CARDS.values()]
    assert data["steps"] == [130, [1, 2, 3, 4, 8, 16, 32, 64, 128], [32, 64, 96, 128, 160, 192, 224, 256, 288],
                             [2**i for i in range(10, 21)], 256]
    assert len(html.encode()) < 12_000 and "http" not in html and "url(" not in html and " id=" not in html
    assert repr(figure) == "[interactive figure] a bar" and 'aria-label="a bar"' in html
    assert re.findall(r'<label>([\w ]+) <input type="range" min="0"\s+max="(\d+)" step="1" value="(\d+)"></label> <b>(.*?)</b>',
                      html) == [("layers", "129", "129", "130"), ("KV heads", "8", "2", "3"), ("head width", "8", "8", "288"),
                                ("tokens per user", "10", "3", "8,192"), ("users", "255", "7", "8")]
    menus = re.findall("<label>([^<]*) <select>(.*?)</select></label>", html)
    assert [(label, re.findall("<option([^>]*)>(.*?)</option>", options)) for label, options in menus] == [
        ("model", [(' value="0"', "small"), (' value="1" selected', "&lt;odd&gt;"), (' value="2"', "huge"),
                   (' value="" disabled', "own numbers")]),
        ("bytes per number", [(' value="2" selected', "2 (bf16, fp16)"), (' value="1"', "1 (fp8, int8)"),
                              (' value="4"', "4 (fp32)")]),
        ("card", [(' value="0" selected', "24 GiB"), (' value="1"', "a&amp;b")])]


def test_calculator_cannot_be_broken_by_names():
    html = kv_calculator({"</script><i>": MODELS["small"]}, cards={"</select><u>": 1}, alt='" onload="x')._repr_html_()
    assert "<u>" not in html and "<i>" not in html and 'onload="x' not in html
    assert json.loads(re.search(r'json">(.*?)</script>', html)[1])["models"][0][0] == "</script><i>"


def changed(**numbers):
    return {"models": {"m": {**MODELS["small"], **numbers}}}


@pytest.mark.parametrize("changes, error, words", [
    ({"models": [1]}, TypeError, "models"),
    ({"models": {}}, ValueError, "models"),
    ({"models": {"m": 7}}, TypeError, "models"),
    ({"models": {"m": {}}}, ValueError, "models"),
    (changed(num_heads=3), ValueError, r"models\b.*\bnum_heads"),
    (changed(num_layers=0), ValueError, r"models\b.*\bnum_layers"),
    (changed(num_kv_heads=-1), ValueError, r"models\b.*\bnum_kv_heads"),
    (changed(head_dim=1025), ValueError, r"models\b.*\bhead_dim"),
    (changed(weight_bytes=0), ValueError, r"models\b.*\bweight_bytes"),
    (changed(weight_bytes=2**53), ValueError, r"models\b.*\bweight_bytes"),
    (changed(head_dim=64.0), TypeError, r"models\b.*\bhead_dim"),
    (changed(num_layers=True), TypeError, r"models\b.*\bnum_layers"),
    (changed(weight_bytes="9"), TypeError, r"models\b.*\bweight_bytes"),
    ({"cards": 80}, TypeError, "cards"),
    ({"cards": {}}, ValueError, "cards"),
    ({"cards": {"a": 1, "b": 0}}, ValueError, r"cards\b.*\bb"),
    ({"cards": {"a": 2**53}}, ValueError, r"cards\b.*\ba"),
    ({"cards": {"a": 8e9}}, TypeError, r"cards\b.*\ba"),
    ({"start": -1}, ValueError, "start"),
    ({"start": 3}, ValueError, "start"),
    ({"start": "small"}, TypeError, "start"),
])
def test_calculator_refuses_what_it_cannot_draw(changes, error, words):
    good = {"models": MODELS, "cards": CARDS, "alt": "x"}
    kv_calculator(**good, start=2)
    kv_calculator(**{**good, **changed(num_layers=1024, num_kv_heads=1, head_dim=1, weight_bytes=1)})
    with pytest.raises(error, match=rf"\b{words}\b"):
        kv_calculator(**{**good, **changes})


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, text in drawings():
        (GOLDEN / name).write_text(text)
        print(GOLDEN / name)


def dial_score(query, key, speeds, m, n):
    """Both dot products, by complex numbers."""
    q, k = (torch.view_as_complex(t.double()) * torch.polar(torch.ones(2).double(), p * speeds.double())
            for t, p in ((query, m), (key, n)))
    return (q * k.conj()).real.tolist()


@pytest.mark.parametrize("m, n", [(0, 0), (9, 4), (4, 9), (24, 0), (0, 24), (24, 24)])
def test_dial_is_right_without_scripts(m, n):
    html = rotary_dial(*DIAL, alt="x", start=(m, n)).html
    left, right = dial_score(*DIAL, m, n)
    assert f"m - n = {m - n}: score {left + right:.3f} (left {left:.3f}, right {right:.3f})" in html
    arrows = re.findall(r'<path class="([qk])" d="M(\d+) 86l(\S+) (\S+)"/>', html)
    assert [a[:2] for a in arrows] == [("q", "100"), ("k", "100"), ("q", "300"), ("k", "300")]
    tips = torch.tensor([[float(x), -float(y)] for *_, x, y in arrows]).view(2, 2, 2)
    size = 64 / max(t.norm(dim=1).max() for t in DIAL[:2])
    for i, (part, speed) in enumerate(zip((left, right), DIAL[2])):
        assert (tips[i, 0] @ tips[i, 1] / size ** 2).item() == pytest.approx(part, abs=.01)
        for tip, start, p in zip(tips[i], (DIAL[0][i], DIAL[1][i]), (m, n)):
            turn = torch.tensor([[(p * speed).cos(), -(p * speed).sin()], [(p * speed).sin(), (p * speed).cos()]])
            assert tip.tolist() == pytest.approx((size * turn @ start).tolist(), abs=.06)
    curve = re.search('class="curve" d="M(.*?)"', html)[1].split()
    points = [(float(x), float(y)) for x, y in zip(curve[::2], curve[1::2])]
    scores = [sum(dial_score(*DIAL, d, 0)) for d in range(-24, 25)]
    high = 42 / max(map(abs, scores))
    assert points == [(pytest.approx(200 + 176 / 24 * d, abs=.06), pytest.approx(232 - high * s, abs=.06))
                      for d, s in zip(range(-24, 25), scores)]
    dot = re.search(r'class="dot" cx="(\S+)" cy="(\S+)"', html).groups()
    assert tuple(map(float, dot)) == points[m - n + 24]
    assert re.findall(r'<label>([\w ]+) <input type="range" min="0"\s+max="(\d+)" step="1" value="(\d+)"></label> <b>(\d+)</b>',
                      html) == [("query at m", "24", str(m), str(m)), ("key at n", "24", str(n), str(n))]


def test_dial_is_small_and_carries_the_tensors():
    figure = rotary_dial(*(t.double().requires_grad_() for t in DIAL), alt="</svg>\" onload=\"x", length=200, start=(199, 0))
    html = figure._repr_html_()
    data = json.loads(re.search(r'application/json">(.*?)</script>', html)[1])
    assert [data[name] for name in ("query", "key", "speeds")] == [pytest.approx(t.tolist(), abs=1e-4) if t.dim() == 1 else [
        pytest.approx(row, abs=1e-4) for row in t.tolist()] for t in DIAL]
    assert len(rotary_dial(*DIAL, alt="x").html.encode()) < 8_000 and len(html.encode()) < 14_000
    assert "http" not in html and "url(" not in html and " id=" not in html and 'onload="x' not in html
    assert repr(figure).startswith("[interactive figure] </svg>")


@pytest.mark.parametrize("changes, error, words", [
    ({"query": torch.ones(2, 3)}, ValueError, "query"),
    ({"key": torch.tensor([[1.0, float("nan")], [0, 1]])}, ValueError, "key"),
    ({"speeds": torch.ones(3)}, ValueError, "speeds"),
    ({"key": torch.zeros(2, 2)}, ValueError, "key"),
    ({"query": torch.full((2, 2), 1e-5)}, ValueError, "query"),
    ({"query": [[1, 0], [0, 1]]}, TypeError, "query"),
    ({"length": 1}, ValueError, "length"), ({"length": 2.0}, TypeError, "length"),
    ({"start": (25, 0)}, ValueError, "start"), ({"start": (0, -1)}, ValueError, "start"),
    ({"start": (0,)}, ValueError, "start"),
    ({"start": (0, 1.0)}, TypeError, "start"),
])
def test_dial_refuses_what_it_cannot_draw(changes, error, words):
    good = dict(zip(("query", "key", "speeds"), DIAL), alt="x")
    rotary_dial(**good, start=(24, 24))
    with pytest.raises(error, match=rf"\b{words}\b"):
        rotary_dial(**{**good, **changes})


@pytest.mark.parametrize("start", [(0, 0), (0, 3), (1, 0), (1, 5)])
def test_theatre_is_right_without_scripts(start):
    html = alignment_theatre(STAGE, alt="x", start=start).html
    source, output, weights = list(STAGE.values())[start[0]]
    row = (weights * 255).round()[-1, :, start[1]].sum(0)
    percents = [int(100 * s / (255 * len(weights[0])) + .5) for s in row.tolist()]
    svg_, rest = html.split("</svg>")
    texts = re.findall(r'<text( class="later")? x="(\d+)" y="(\d+)">(.*?)</text>', svg_)
    assert [unescape(t[3]) for t in texts] == [*source, *output]
    hidden = [bool(t[0]) for t in texts]
    assert hidden == [False] * (len(source) + start[1] + 1) + [True] * (len(output) - start[1] - 1)
    assert [t[2] for t in texts] == ["17" if i < 20 else "232" for i in range(len(source))] + ["123"] * len(output)
    xs = [int(t[1]) for t in texts]
    assert len(set(zip(xs, (t[2] for t in texts)))) == len(texts) and all(10 <= x <= 390 for x in xs)
    shades = [float(s) for s in re.findall(r'height="12" fill-opacity="(.*?)"', svg_)]
    assert shades == [p / 100 for p in percents]
    threads = re.findall(r'stroke-opacity="(.*?)" d="M(\d+) (100|136)C.* (\d+) (36|204)"/>', svg_.replace("<path", "\n<path"))
    assert [(float(o), int(x0), int(x), end) for o, x0, _, x, end in threads] == [
        (p / 100, xs[len(source) + start[1]], xs[i], "36" if i < 20 else "204") for i, p in enumerate(percents) if p >= 3]
    best = sorted(range(len(source)), key=lambda i: (-percents[i], i))[:3]
    said = unescape(re.search(r'<output aria-live="polite">(.*?)</output>', rest)[1])
    assert said == f"output {start[1]}, {output[start[1]]}: looks at " + ", ".join(
        f"{source[i]} ({i}) {percents[i]} %" for i in best)


def test_theatre_carries_the_tensors_and_is_small():
    figure = alignment_theatre({k: (s, t, w.double().requires_grad_()) for k, (s, t, w) in STAGE.items()},
                               alt='</svg>" onload="x', start=(1, 5))
    html = figure._repr_html_()
    data = json.loads(re.search(r'application/json">(.*?)</script>', html)[1])
    assert data["tokens"] == [[[*s], [*t]] for s, t, _ in STAGE.values()] and data["heads"] == 3
    for text, (*_, weights) in zip(data["weights"], STAGE.values()):
        stored = torch.tensor(list(b64decode(text))).view(weights.shape) / 255
        assert (stored - weights).abs().max() <= .5 / 255 + 1e-7
    assert "http" not in html and "url(" not in html and " id=" not in html
    assert 'onload="x' not in html and "<b>" not in html and repr(figure).startswith("[interactive figure] </svg>")
    assert len(html.encode()) < 14_000
    many = {f"string {i}": ("a" * 28, "2026-11-29.", torch.rand(2, 4, 11, 28)) for i in range(40)}
    assert len(alignment_theatre(many, alt="x").html.encode()) < 180_000
    full = {f"string {i}": ("a" * 40, "b" * 20, torch.rand(3, 1, 20, 40)) for i in range(62)}
    assert len(alignment_theatre(full, alt="x").html.encode()) < 260_000


@pytest.mark.parametrize("changes, error, words", [
    ({"samples": []}, TypeError, "samples"),
    ({"samples": {}}, ValueError, "samples"),
    ({"samples": {"x": ("ab", "c", [[1, 0]])}}, TypeError, "samples"),
    ({"samples": {"x": ("", "c", torch.ones(1, 1, 1, 0))}}, ValueError, "source tokens"),
    ({"samples": {"x": ("a" * 41, "c", torch.ones(1, 1, 1, 41))}}, ValueError, "source tokens"),
    ({"samples": {"x": ("a", "c" * 21, torch.ones(1, 1, 21, 1))}}, ValueError, "output tokens"),
    ({"samples": {"x": ("ab", "c", torch.ones(1, 1, 2))}}, ValueError, "weights"),
    ({"samples": {"x": ("ab", "c", torch.ones(1, 1, 2, 1))}}, ValueError, "weights"),
    ({"samples": {"x": ("a", "c", torch.full((1, 1, 1, 1), 1.1))}}, ValueError, "weights"),
    ({"samples": {"x": ("a", "c", torch.full((1, 1, 1, 1), torch.nan))}}, ValueError, "weights"),
    ({"samples": {"x": ("a", "c", torch.ones(1, 1, 1, 1)), "y": ("a", "c", torch.ones(1, 2, 1, 1))}}, ValueError, "weights"),
    ({"samples": {"x": ("a", "c", torch.ones(1, 17, 1, 1))}}, ValueError, "weights"),
    ({"samples": {i: ("a" * 40, "c" * 20, torch.zeros(16, 1, 20, 40)) for i in range(12)}}, ValueError, "samples"),
    ({"start": (2, 0)}, ValueError, "start"), ({"start": (0, 4)}, ValueError, "start"),
    ({"start": (0,)}, ValueError, "start"),
    ({"start": (0, 1.0)}, TypeError, "start"),
])
def test_theatre_refuses_what_it_cannot_draw(changes, error, words):
    good = {"samples": STAGE, "alt": "x"}
    alignment_theatre(**good, start=(1, 5))
    with pytest.raises(error, match=rf"\b{words}\b"):
        alignment_theatre(**{**good, **changes})
