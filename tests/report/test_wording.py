"""Numbers as people read them."""

import math

import pytest

from saekit.wording import clean, count, duration, held_out_amounts, is_number, label, number, percent, with_intervals


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not defined"),
        (0.0, "0"),
        (0, "0"),
        (32.0, "32"),
        (0.91341, "0.9134"),
        (0.0024, "0.0024"),
        (1.2345e-7, "1.23e-07"),
        (12345.6, "12,346"),
        (1e12 + 0.5, "1e+12"),
        (4096, "4,096"),
        (math.nan, "not a number"),
        (-math.inf, "-infinite"),
        (True, "yes"),
        ("text", "text"),
    ],
)
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(999, "999"), (9999, "9,999"), (12_345, "12.3k"), (999_960, "1.00M"), (1.25e6, "1.25M"), (3e9, "3.00B")],
)
def test_count(value, text):
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_what_is_not_complete_never_reads_as_complete():
    assert percent(0.9999) == "99 %"
    assert percent(1.0) == "100 %"


def test_clean_removes_what_could_steer_a_terminal():
    dirty = "a\x1b[2Jb\x07c\x9bd\u202ee\nf\tg\u00a0h"
    cleaned = clean(dirty)
    assert cleaned.isprintable()
    assert cleaned.endswith("e f g h")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("ce_recovered", "CE recovered"),
        ("l0", "L0"),
        ("fvu", "FVU"),
        ("grad_norm", "gradient norm"),
        ("probe_auroc/python_code", "probe AUROC / python code"),
        ("hoyer_share", "hoyer share"),
    ],
)
def test_labels_come_from_the_key_itself(key, text):
    assert label(key) == text


def test_an_interval_stands_beside_its_value():
    values = {
        "rate": 0.14, "rate_low": 0.0695, "rate_high": 0.2619, "rate_n": 50, "rate_before": 1.0, "auroc": 0.9,
        "auroc_low": 0.8, "auroc_high": 0.95, "none": None, "none_low": None, "none_high": None, "none_n": 0, "top_n": 3,
    }  # fmt: skip
    assert list(with_intervals(values)) == [
        ("rate", 0.14, " (0.0695 to 0.2619, n 50)"),
        ("rate_before", 1.0, ""),
        ("auroc", 0.9, " (0.8000 to 0.9500)"),
        ("none", None, ""),
        ("top_n", 3, ""),
    ]


def test_amounts_of_a_summary_that_was_altered() -> None:
    altered = {"a": {"tokens": "many", "documents": 3}, "b": {"tokens": 10**400}, "c": 3, "d": {"tokens": 20, "documents": 2}}
    assert held_out_amounts(altered)[-1] == (["d"], "20 tokens of 2 documents")
    assert held_out_amounts([1]) == []
    assert not is_number(10**400)
