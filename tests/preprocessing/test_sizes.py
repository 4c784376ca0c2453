import re

import pytest

from preprocessing.errors import InputError
from preprocessing.sizes import parse_size, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("250_000", 250_000),
        ("100MB", 10**8),
        ("100 mb", 10**8),
        ("1GiB", 2**30),
        ("1.5 kB", 1500),
        ("0.5KiB", 512),
        ("2T", 2 * 10**12),
        ("3Ti", 3 * 2**40),
        ("7B", 7),
    ],
)
def test_sizes_are_understood(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MB", "-5MB", "10 PB", "1e6", "5 i", "0", "1.5B", "nan", "_1"]
)
def test_other_sizes_are_refused(text):
    with pytest.raises(InputError, match=re.escape(repr(text))):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (7.62e10, "76.2 GB"),
     (5.72e14, "572.0 TB"), (9.1e15, "9,100.0 TB")],
)  # fmt: skip
def test_sizes_are_shown_as_people_read_them(size: float, shown: str) -> None:
    assert show_size(size) == shown
