"""Memory in huge pages: thousands of page faults fewer where much of it is filled at once."""

import ctypes

MADV_HUGEPAGE = 14
PAGE = 4096


def ask_for_huge_pages(address: int, num_bytes: int) -> bool:
    """For memory that nobody has touched yet. False where the system has none to give: then it is
    as it was.
    """
    begin = -(-address // PAGE) * PAGE
    end = (address + num_bytes) // PAGE * PAGE
    libc = ctypes.CDLL(None)
    if end <= begin or not hasattr(libc, "madvise"):
        return False
    size = ctypes.c_size_t(end - begin)
    return bool(libc.madvise(ctypes.c_void_p(begin), size, MADV_HUGEPAGE) == 0)
