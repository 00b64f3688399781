"""The plot: an SVG that shows each scheme where its numbers are, and refusals before anything is measured."""
import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalstep.eval import plot
from metalstep.plot import file

POSITIVE = st.floats(1e-9, 100)


def result(*rows):
    return {
        "model": "tiny & <new>",
        "tokens": 4096,
        "context": 2048,
        "reference": {"kv_bytes_per_token": 23040},
        "rows": [
            {"scheme": name, "kv_bytes_per_token": nbytes, "kld_mean": kld, "kld_stderr": kld / 10} for name, nbytes, kld in rows
        ],
    }


def drawn(text):
    """Places of the circles by their scheme, and all texts."""
    root = ElementTree.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    circles = {
        circle[0].text.partition(":")[0]: (float(circle.get("cx")), float(circle.get("cy"))) for circle in root.iter(f"{name}circle")
    }
    return circles, [element.text for element in root.iter(f"{name}text")]


def svg(*rows):
    return plot.svg("title", plot.points_of(result(*rows)), 23040.0)


@given(klds=st.lists(POSITIVE, min_size=2, max_size=8, unique=True))
def test_more_divergence_is_higher_and_more_bytes_are_further_right(klds):
    rows = [(f"s{i}", 1000 * (i + 1), kld) for i, kld in enumerate(klds)]
    circles, texts = drawn(svg(*rows))
    for (a, a_bytes, a_kld), (b, b_bytes, b_kld) in pairwise(rows):
        assert (circles[a][0] < circles[b][0]) == (a_bytes < b_bytes)
        if abs(math.log10(a_kld / b_kld)) > 0.05:
            assert (circles[a][1] > circles[b][1]) == (a_kld < b_kld)
    assert all(name in texts for name, *_ in rows)
    assert all(plot.LEFT <= x <= plot.WIDTH - plot.RIGHT and plot.TOP <= y <= plot.HEIGHT - plot.BOTTOM for x, y in circles.values())


def test_labels_of_neighbours_do_not_cover_each_other():
    text = svg(("turbo4v2", 5700, 0.1), ("turbo3", 5700, 0.101), ("turbo4v2:boundary=0", 5720, 0.102))
    places = [(float(x), float(y)) for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)">', text)]
    assert len(places) == 3
    widths = [plot.CHARACTER * len(name) for name in re.findall(r'<text x="[\d.]+" y="[\d.]+">([^<]+)', text)]
    spans = [(x, x + width, y) for (x, y), width in zip(places, widths, strict=True)]
    for i, (left, right, y) in enumerate(spans):
        assert all(abs(y - other_y) >= 12.9 or left > other_right or right < other_left for other_left, other_right, other_y in spans[:i])


def test_a_scheme_that_is_exact_is_not_drawn_on_a_logarithm():
    circles, texts = drawn(svg(("none", 23040, 0.0), ("turbo4", 6000, 0.1)))
    assert set(circles) == {"turbo4"}
    assert "none" not in texts and "float16" in texts
    assert drawn(svg(("none", 23040, 0.0)))[0] == {}


def test_names_are_escaped(tmp_path):
    plot.write_plot(str(tmp_path / "a.svg"), result(("turbo4", 6000, 0.1)))
    assert drawn((tmp_path / "a.svg").read_text())[1][0].startswith("tiny & <new>: 4,096 tokens")


@pytest.mark.parametrize("name", ["plot", "plot.pdf", "svg"])
def test_another_kind_of_file_is_refused(name):
    with pytest.raises(ValueError, match=r"expected a name that ends in \.svg or \.png"):
        plot.check_plot(name)


def test_a_png_without_matplotlib_says_what_to_do(monkeypatch):
    monkeypatch.setattr(file, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"needs matplotlib, which is not installed; name a \.svg file, or `pip install matplotlib`"):
        plot.check_plot("a.png")


@given(high=st.floats(1e-3, 1e9))
def test_ticks_reach_what_they_are_for(high):
    ticks = plot.nice_ticks(0, high)
    assert ticks[0] == 0 and 3 <= len(ticks) <= 7
    assert ticks[-1] >= high * (1 - 1e-6) and ticks[-2] < high


@given(values=st.lists(POSITIVE, min_size=1, max_size=9))
def test_decades_enclose_the_values(values):
    low, high = plot.decades(values)
    assert low < high
    assert 10.0**low <= min(values) * (1 + 1e-9) and max(values) <= 10.0**high * (1 + 1e-9)
