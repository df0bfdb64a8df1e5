"""2 MB pages under a KV cache."""

from __future__ import annotations

import ctypes
import mmap

import torch

_HUGE = 2 << 20
_MADV_COLLAPSE = 25  # since Linux 6.1; not in Python's mmap module yet


def advise_huge_pages(memory: torch.Tensor) -> bool:
    """Put 2 MB pages under a KV cache; False where Linux declines. Contents stay as they are.

    Pages of different heads and blocks lie far apart, so small pages cost a walk each: 2 MB pages took 20% off a SparQ
    read at 64k tokens and 7% off a dense one. Memory that has been written already is collapsed at once, which takes
    about 2.6 seconds per GB.
    """
    storage = memory.untyped_storage()
    first = -(-storage.data_ptr() // _HUGE) * _HUGE
    n_bytes = (storage.data_ptr() + storage.nbytes() - first) // _HUGE * _HUGE
    if n_bytes <= 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    region = ctypes.c_void_p(first), ctypes.c_size_t(n_bytes)
    return bool(madvise(*region, mmap.MADV_HUGEPAGE) == 0 and madvise(*region, _MADV_COLLAPSE) == 0)
