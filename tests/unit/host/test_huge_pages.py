"""Huge pages are asked for, and given where the system has them for those who ask."""

from pathlib import Path

import pytest
import torch

from revivemoe.host.huge_pages import ask_for_huge_pages

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MIB = 1 << 20


def huge_kib(address: int) -> int:
    """Of the mapping with this address, in huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin <= address < end
        elif inside and name == "AnonHugePages:":
            return int(rest.split()[0])
    return 0


@pytest.mark.skipif(
    not MODE.is_file() or "[never]" in MODE.read_text(), reason="the system has no huge pages"
)
def test_memory_that_is_filled_lies_in_huge_pages() -> None:
    rows = torch.empty(32 * MIB, dtype=torch.uint8)
    assert ask_for_huge_pages(rows.data_ptr(), rows.nbytes)
    rows.fill_(1)
    if "[madvise]" in MODE.read_text():
        assert huge_kib(rows.data_ptr() + 8 * MIB) > 0


def test_less_than_a_page_is_no_error() -> None:
    assert not ask_for_huge_pages(4096 + 1, 100)
    assert not ask_for_huge_pages(0, 0)
