"""Charts keep what matters, and numbers read well."""

import re

import numpy as np
import pytest

from jaxcl import seeds
from jaxcl.report import chart, words


def test_chart_keeps_spikes_breaks_at_gaps_and_draws_nothing_of_nothing():
    x = np.arange(5000.0)
    y = np.zeros(5000)
    y[1234], y[3210], y[10] = 9.0, -9.0, np.nan
    drawn = chart.figure([chart.Line("a", x, y)], title="t", x="x", y="y")
    tops = [float(v) for v in re.findall(r"[ML][\d.]+ ([\d.]+)", drawn.split('class="line')[1])]
    assert min(tops) < chart.TOP + 20  # both spikes are still there
    assert max(tops) > chart.SIZES[0][2] - chart.BOTTOM - 20
    assert len(tops) < 2 * chart.POINTS
    short = chart.figure([chart.Line("a", x[:3], np.array([1.0, np.nan, 2.0]))], title="t", x="x", y="y")
    assert short.split('class="line')[1].split("</svg>")[0].count("M") == 2
    assert chart.figure([chart.Line("a", x[:2], np.full(2, np.nan))], title="t", x="x", y="y") == ""
    assert "nan" not in chart.figure([chart.Line("a", x[:1], y[:1])], title="t", x="x", y="y")


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0, 0.003, [0, 0.001, 0.002, 0.003]), (1.1, 1.9, [1.2, 1.4, 1.6, 1.8]), (2, 2, [2])],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert chart.ticks(low, high) == pytest.approx(expected)


def test_numbers_in_words():
    assert words.nats(-0.5, sign=True) == "−0.500"
    assert words.nats(-0.0001, sign=True) == "0.000"
    assert words.nats(float("nan")) == "–"
    assert [words.count(n) for n in (850, 12300, 4.1e6, 512e6, 2e9)] == ["850", "12.3 k", "4.10 M", "512 M", "2.00 B"]
    assert words.interval(seeds.interval([1.0])) == "1.000"
    assert words.join(["a", "b", "c"]) == "a, b and c"
