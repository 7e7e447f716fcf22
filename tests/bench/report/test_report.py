"""The report: complete, self-contained, honest about what did not run; its charts place what they are given."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from nogemm.bench.report.labels import Box, overlap, text_width
from nogemm.bench.report.svg import Bar, Point, bars, lines, number, scatter
from nogemm.errors import ConfigError
from nogemm.files import write_atomically, write_json
from nogemm.hardware.memory import peak_memory_bytes
from sample_results import LINE, demo_result, layer_result, report, train_step_result


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path):
    page = report(tmp_path, demo_result(), layer_result(), train_step_result())
    assert "a &lt;demo&gt;" in page
    assert page.count(LINE) == 1
    for section in ("Quality against cost", "speed against batch", "latency", "Bytes and memory", "Training step"):
        assert section in page
    for section in ("What was replaced", "4,096, uniform codes"):
        assert section in page
    assert "4.0x" in page  # ours against torch fp32 at the largest size
    assert re.search(r"FFNs removed.*?recorded", page, re.DOTALL)
    assert not re.search(r"(?:src|href|url|@import)\s*[=(]", page)
    assert "<script" not in page


def test_a_contender_that_did_not_run_is_named_with_its_reason(tmp_path):
    page = report(tmp_path, layer_result())
    assert "not run" in page
    assert "pip install other" in page
    assert page.count("<svg") == 1 + 2  # the chart, and one key for each contender that has times


def test_charts_are_well_formed_xml(tmp_path):
    page = report(tmp_path, demo_result(), layer_result())
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) >= 5
    for chart in charts:
        ElementTree.fromstring(chart)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("settings"), "settings"),
        (lambda r: r["rows"][0].pop("contender"), "contender"),
        (lambda r: r.update(kind="poem"), "poem"),
        (lambda r: r["rows"].append(7), "layer"),
    ],
)
def test_an_incomplete_result_is_refused_by_name(tmp_path, change, said):
    result = layer_result()
    change(result)
    with pytest.raises(ConfigError, match=rf"0\.json.*{said}"):
        report(tmp_path, result)
    assert not (tmp_path / "report.html").exists()


def circles(chart: str) -> list[tuple[float, float]]:
    found = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)
    return [(float(x), float(y)) for x, y in found]


def test_scatter_puts_larger_values_right_and_up():
    points = [Point(1.0, 0.5, "low"), Point(2.0, 0.9, "high", low=0.8, high=0.95)]
    (x_high, y_high), (x_low, y_low) = circles(scatter(points, x_label="x", y_label="y"))
    assert x_high > x_low
    assert y_high < y_low  # the page counts downwards


def test_labels_of_equal_points_do_not_cover_each_other():
    chart = scatter([Point(1.0, 0.5, f"row {i}") for i in range(5)], x_label="x", y_label="y")
    assert_readable(chart)
    assert chart.count('class="label"') == 5


def text_boxes(chart: str) -> list[tuple[str, Box]]:
    """Return the box of every text of a chart that is not turned, by the widths that the charts are laid out with."""
    found = []
    for text in ElementTree.fromstring(chart).iter("text"):
        if "transform" in text.attrib:
            continue
        word = text.text or ""
        x, y = float(text.attrib["x"]), float(text.attrib["y"])
        width = text_width(word, bold=text.get("class") == "own")
        left = x - {"end": width, "middle": width / 2}.get(text.get("text-anchor", ""), 0.0)
        found.append((word, (left, y - 10, left + width, y + 3)))
    return found


def assert_readable(chart: str) -> None:
    """No text may leave the picture or stand on another."""
    _, _, width, height = map(float, ElementTree.fromstring(chart).attrib["viewBox"].split())
    boxes = text_boxes(chart)
    for word, (left, top, right, bottom) in boxes:
        assert left >= 0, word
        assert right <= width, word
        assert top >= 0, word
        assert bottom <= height, word
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        assert not overlap(a, b), f"{one} on {other}"


CROWD = [
    *(Point(0.33, 0.93 + 0.001 * i, f"LookupFFN, learned projection, seed {i}", 0, 0.92, 0.94) for i in range(4)),
    *(Point(0.3 * (i % 3), 0.9 + 0.01 * (i % 4), f"a rival of some name, variant number {i}", 1) for i in range(14)),
    *(Point(2.4, 1.0, name, 1, hollow=True) for name in ("dense teacher", "half of the neurons", "W" * 90)),
]


def test_a_crowded_scatter_stays_readable():
    chart = scatter(CROWD, x_label="FFN MFLOP per token and layer", y_label="agreement")
    assert_readable(chart)
    said = "".join(word for word, _ in text_boxes(chart))
    for point in CROWD:
        assert point.label.replace(" ", "") in said.replace(" ", "")


def test_the_check_of_readability_can_fail():
    inside = '<svg viewBox="0 0 480 40"><text x="10" y="20">one</text><text x="{}" y="20">two</text></svg>'
    assert_readable(inside.format(200))
    for place in (20, 470):
        with pytest.raises(AssertionError):
            assert_readable(inside.format(place))


@pytest.mark.parametrize("size", [1.0, 1e9])
def test_long_names_of_bars_are_whole_and_inside(size):
    names = ["nogemm-int8+openvino-int8", "3-layers+onnxruntime-int8, untrained", "x" * 70, "a"]
    rows = [Bar(name, size * (i + 1), number(size) + " ms", i % 2) for i, name in enumerate(names)]
    chart = bars(rows)
    assert_readable(chart)
    said = "".join(word for word, _ in text_boxes(chart)).replace(" ", "")
    assert all(name.replace(" ", "") in said for name in names)


def test_lines_stay_readable_at_both_ends():
    points = [(n, 3.0 + 1e-4 * n) for n in (1, 2, 4, 8, 64, 512, 4096, 32768, 131072)]
    assert_readable(lines([("a", 1, points), ("b", 0, points)], x_label="tokens in the batch", y_label="us per token"))


def test_the_page_says_beside_the_charts_why_something_did_not_run(tmp_path):
    result = demo_result()
    shape = {"batch": 32, "length": 128}
    refused = "does not match the reference: least cosine of an embedding 0.81234, needed 0.9"
    result["latency"] += [
        {"contender": "torch-int8", "verified": False, "error": refused} | shape,
        {"contender": "openvino-f32", "skipped": "out of time"} | shape,
        {"contender": "torch-bf16"} | shape,
    ]
    page = report(tmp_path, result).partition("<details>")[0]
    assert f"<b>torch-int8</b>: {refused}" in page
    assert "<b>openvino-f32</b>: out of time" in page
    assert "<b>torch-bf16</b>: its file gives no reason" in page


def test_logarithmic_axes_space_decades_evenly():
    chart = lines([("a", 1, [(1, 10.0), (10, 100.0), (100, 1000.0)])], x_label="x", y_label="y")
    (x1, y1), (x2, y2), (x3, y3) = circles(chart)
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)


def test_bars_are_in_proportion():
    widths = [
        float(w) for w in re.findall(r'<rect[^>]*width="([\d.]+)"', bars([Bar("a", 10.0, "10"), Bar("b", 5.0, "5")]))
    ]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234567.0, "1,234,567"),
        (3.14159, "3.14"),
        (0.0123, "0.0123"),
        (1.5e-7, "1.50e-07"),
        (999.6, "1,000"),
    ],
)
def test_numbers_are_written_for_readers(value, text):
    assert number(value) == text


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_json_refuses_what_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"value": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_peak_memory_is_this_process_own():
    # A child that inherited its parent's peak would report more than the block that only the parent held.
    block = bytearray(300 * 2**20)
    code = "from nogemm.hardware.memory import peak_memory_bytes as p; print(p()); b = bytearray(2**28); print(p())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert peak_memory_bytes() > len(block)
    assert after - before > 0.9 * 2**28
