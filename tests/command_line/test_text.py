import pytest

from tapedist.results.report_charts import caption, sampled, thinned
from tapedist.text import printable


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("height", "height"),
        ("a\nb\x1b[31m", "a\\nb\\x1b[31m"),
        ("caf\u00e9 \u5e45", "caf\u00e9 \u5e45"),
        ("\u202eevil", "\\u202eevil"),
        ("\udc80", "\\udc80"),
        ("it's $5", "it's $5"),
        ("", ""),
    ],
)
def test_control_characters_are_spelled_out(word, shown):
    assert printable(word) == shown


def test_long_words_are_cut():
    assert printable("w" * 100, 10) == "w" * 9 + "…"
    assert printable("w" * 10, 10) == "w" * 10


@pytest.mark.parametrize(("count", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (10**9, 5)])
def test_indices_are_ascending_and_inside(count, most):
    for chosen in (sampled(count, most), thinned(count, most)):
        assert len(chosen) == min(count, most)
        assert (chosen[1:] > chosen[:-1]).all()
        assert not len(chosen) or (chosen[0] >= 0 and chosen[-1] < count)


def test_thinning_keeps_both_ends_and_sampling_repeats():
    assert thinned(1001, 3).tolist() == [0, 500, 1000]
    assert sampled(10**6, 100).tolist() == sampled(10**6, 100).tolist()


def test_captions():
    assert caption(2000, 2000) == "2,000 rows"
    assert caption(5000, 8_000_000) == "showing 5,000 of 8,000,000 rows"
