"""Pictures and the page of results: every series and number of the JSON is there, twice the same, and another number is seen."""

import copy
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalstep.bench.charts import chart
from metalstep.bench.report import BEGIN, DRAWN, END, SECTIONS, write_report
from metalstep.bench.statistics import ratio, summary
from metalstep.cli.bench import main as bench_command
from metalstep.plot import bars, file
from metalstep.plot.bars import Bar, Bars

TOP = Path(__file__).resolve().parents[2]
PAGE, FOLDER = TOP / "docs" / "benchmarks.md", TOP / "docs" / "benchmarks"
MACHINE = {
    "system": "Linux x86_64", "os": "Linux 6", "cpu": "a <processor> & more", "cpus": 2, "cores": 2, "memory_gib": 23.5, "load": 0.1,
    "date": "2026-01-02 03:04 UTC",
}  # fmt: skip
HEAD = {"machine": MACHINE, "versions": {"metalstep": "0", "mlx": "1"}, "warnings": [], "model": "tiny", "not_timed": "loading"}
RATES, SLOW = summary([100.0, 120.0, 110.0]), summary([50.0, 60.0, 55.0])
CASE = {"setting": "", "batch": 8, "prompt_tokens": 18, "ttft_ms": summary([5.0, 6.0], "min")}
DECODE = {
    **HEAD, "benchmark": "decode", "command": "metalstep bench decode", "engines": [{"engine": "metalstep", "version": "metalstep 0"}],
    "cases": [{**CASE, "engine": "metalstep", "decode_tok_s": RATES}, {**CASE, "engine": "llama.cpp", "decode_tok_s": SLOW}],
    "ratios": [
        {"against": "llama.cpp", "batch": 8, "prompt_tokens": 18, "decode": {"setting": "", **ratio(RATES["samples"], SLOW["samples"])}}
    ],
}  # fmt: skip
KERNEL = {
    "name": "linear-o-1rows", "run_us": summary([10.0, 12.0, 11.0], "min"), "gb_s": 5.0, "gmac_s": 7.0, "arithmetic": "int16",
    "bytes": 55_000, "limit_us": 5.5, "limit": "memory", "fraction": 0.5,
}  # fmt: skip
LIMIT = {"threads": 1, "memory_gb_s": 20.0, "cache_gb_s": 100.0, "fp32_gflop_s": 90.0, "int16_gmac_s": 80.0, "int8_gmac_s": 160.0}
KERNELS = {
    **HEAD, "benchmark": "kernels", "command": "metalstep bench kernels", "shape": "tiny", "weights": "4 bits", "device": "host",
    "limits": [LIMIT],
    "rows": [
        {**KERNEL, "mlx": {"ops": "add", "run_us": summary([22.0, 22.0], "min"), "ratio": {"of_medians": 2.0, "median_of_pairs": 2.0}}},
        {**KERNEL, "name": "linear-o-8rows", "mlx": {"ops": None, "run_us": None, "ratio": None}},
    ],
}  # fmt: skip
VALUES = st.floats(0.001, 1e6)


# ---- pictures ---------------------------------------------------------------------------------------------------------------
@given(values=st.lists(st.tuples(VALUES, VALUES, VALUES).map(sorted), min_size=1, max_size=6), series=st.integers(1, 3))
def test_every_bar_is_as_long_as_its_value_whatever_the_words(values, series):
    groups = [f"case <{i}> & \"more\"" for i in range(len(values))]
    found = [Bar(middle, low, high) for low, middle, high in values]
    chart_of = Bars("a < b", "c & d", "µs", groups, [(f"s<{j}>", found) for j in range(series)])
    text = bars.svg(chart_of)
    assert text == bars.svg(chart_of)
    root = ElementTree.fromstring(text)
    drawn = [rect for rect in root.iter("{http://www.w3.org/2000/svg}rect") if len(rect)]
    assert len(drawn) == len(values) * series
    longest = max(bar.value for bar in found)
    width = max(float(rect.get("width")) for rect in drawn)
    for rect, bar in zip(drawn, [bar for bar in found for _ in range(series)], strict=True):
        assert float(rect.get("width")) == pytest.approx(max(width * bar.value / longest, 0.5), abs=0.2)
    words = "".join(root.itertext())
    assert all(name in words for name in [*groups, "a < b", "c & d", "µs", *(f"s<{j}>" for j in range(series))])


@pytest.mark.parametrize("result", [DECODE, KERNELS], ids=["decode", "kernels"])
def test_a_chart_has_every_series_with_its_model_machine_and_date(result):
    drawn = chart(result)
    root = ElementTree.fromstring(bars.svg(drawn))
    words = "".join(root.itertext())
    assert "a <processor> & more" in words and "2026-01-02 03:04 UTC" in words and "tiny" in words
    names = ["metalstep", "llama.cpp"] if result is DECODE else ["metalstep", "MLX's op"]
    assert [name for name, _ in drawn.series] == names
    assert all(len(found) == len(drawn.groups) for _, found in drawn.series)


def test_kernels_are_shown_as_what_they_reach_of_the_limit():
    ours, mlx = (found for _, found in chart(KERNELS).series)
    assert ours[0].value == pytest.approx(50.0) and ours[0].low == pytest.approx(100 * 5.5 / 12) and ours[0].high == pytest.approx(55.0)
    assert mlx[0].value == pytest.approx(25.0) and mlx[1] is None


def test_a_result_without_a_picture_is_refused():
    with pytest.raises(ValueError, match="a result of 'quality', expected one of decode, prefill"):
        chart({"benchmark": "quality"})


def test_a_png_without_matplotlib_and_a_folder_that_is_not_there_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(file, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"a PNG needs matplotlib, which is not installed; name a \.svg file"):
        bars.write_bars(str(tmp_path / "x.png"), chart(DECODE))
    with pytest.raises(ValueError, match="there is no folder"):
        bars.write_bars(str(tmp_path / "no" / "x.svg"), chart(DECODE))


# ---- the page ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def made(tmp_path):
    page, folder = tmp_path / "page.md", tmp_path / "page"
    folder.mkdir()
    page.write_text(f"# Title\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nbehind\n")
    for result in (DECODE, KERNELS):
        (folder / f"{result['benchmark']}.json").write_text(json.dumps(result))
    write_report(page, folder)
    return page, folder


def test_a_page_has_each_number_keeps_its_other_text_and_is_written_once(made):
    page, folder = made
    text = page.read_text()
    assert text.startswith("# Title\n\nbefore\n\n<!--") and text.endswith("-->\n\nbehind\n") and "\nold\n" not in text
    assert "| 8 | 18 | llama.cpp | 55.0 (50.0 to 60.0, 3) | 5.5 (5.0 to 6.0, 2) | 2.00, 2.00 |" in text
    assert "| linear-o-1rows | 11.0 (10.0 to 12.0, 3) | 5.0 | 7.0 GMAC/s | 50% of memory | 22.0 (22.0 to 22.0, 2) | 2.00, 2.00 |" in text
    assert re.findall(r"!\[.*\]\((.*)\)", text) == ["page/decode.svg", "page/kernels.svg"]
    assert write_report(page, folder, check=True) == []
    assert bench_command(["report", str(page), "--check"]) == 0


def test_a_changed_number_is_seen_on_the_page_and_in_the_picture(made, capsys):
    page, folder = made
    changed = copy.deepcopy(DECODE)
    changed["cases"][0]["decode_tok_s"] = summary([100.0, 120.0, 111.0])
    (folder / "decode.json").write_text(json.dumps(changed))
    assert write_report(page, folder, check=True) == [page, folder / "decode.svg"]
    assert bench_command(["report", str(page), "--check"]) == 1
    assert f"differs: {page}" in capsys.readouterr().err
    assert bench_command(["report", str(page)]) == 0
    page.write_text(page.read_text().replace("111.0 (100.0", "121.0 (100.0"))
    assert write_report(page, folder, check=True) == [page]


def test_a_gpu_is_named_and_its_variants_busy_time_and_left_out_cases_are_on_the_page(made):
    page, folder = made
    twice = {"of_medians": 0.5, "median_of_pairs": 0.51}
    result = copy.deepcopy(DECODE) | {
        "gpu": "NVIDIA H100", "also": [{"setting": "invariant", "batch": 8, "prompt_tokens": 18, "decode": twice, "ttft": twice}],
        "left_out": [{"batch": 64, "prompt_tokens": 8192, "reason": "it does not fit the KV cache"}],
    }  # fmt: skip
    result["cases"][0] |= {"device_step_us": summary([70.0, 71.0, 72.0], "min"), "busy": 0.981}
    (folder / "gpu-decode.json").write_text(json.dumps(result))
    write_report(page, folder)
    text = page.read_text()
    assert "### Decode on NVIDIA H100 (gpu-decode)" in text and "· NVIDIA H100 · a <processor>" in text and "tiny: metalstep 0." in text
    assert "| 8 | 18 | invariant | 0.50, 0.51 | 0.50, 0.51 |" in text
    assert "| 8 | 18 | 71.0 (70.0 to 72.0, 3) | 98.1% |" in text
    assert "Left out: 64 × 8,192 tokens (it does not fit the KV cache)." in text
    assert text.index("(gpu-decode)") > text.index("### Kernels")  # behind the processor's
    assert "NVIDIA H100 · 2026-01-02" in (folder / "gpu-decode.svg").read_text()


def test_a_folder_with_something_else_and_a_page_without_marks_are_refused(made):
    page, folder = made
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no place for results"):
        write_report(page, folder)
    (folder / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: expected a result of metalstep bench decode"):
        write_report(page, folder)


# ---- the page in the repository ------------------------------------------------------------------------------------------------
def test_the_page_in_the_repository_says_what_its_json_says(tmp_path):
    assert write_report(PAGE, FOLDER, check=True) == []
    shutil.copytree(FOLDER, tmp_path / "benchmarks")
    shutil.copy(PAGE, tmp_path)
    name = next(iter(sorted(FOLDER.glob("*.json")))).name
    result = json.loads((FOLDER / name).read_text())
    result["machine"]["date"] = "1999-12-31 23:59 UTC"
    (tmp_path / "benchmarks" / name).write_text(json.dumps(result))
    assert tmp_path / "benchmarks.md" in write_report(tmp_path / "benchmarks.md", tmp_path / "benchmarks", check=True)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_in_the_repository_has_the_fields_that_the_page_lists(path):
    """`Fields` in docs/benchmarks.md: those of all, then those of each benchmark; `gpu` and some others came later."""
    result = json.loads(path.read_text())
    text = PAGE.read_text()
    listed = dict(re.findall(r"^\| (`\w+`|all) \| (.*) \|$", text, re.MULTILINE))
    kind = f"{result['benchmark']}{'_gpu' if 'chip' in result else ''}"
    common, own = (re.findall(r"`(\w+)`", listed[key]) for key in ("all", f"`{kind}`"))
    later = set(re.findall(r"`(\w+)`", text.partition("Results that are older lack ")[2].partition(". ")[0]))
    assert {"gpu", "left_out"} < later
    assert list(result)[: len(common) - 2] == common[:-2]  # machine and versions first
    assert {*common, *own} - later <= set(result) <= {*common, *own} | later
    assert result["benchmark"] in SECTIONS and (path.with_suffix(".svg").exists() is (result["benchmark"] in DRAWN))
    home = str(Path.home())
    assert home not in path.read_text() or home == "/"
