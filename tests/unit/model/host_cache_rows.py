"""What test_host_cache puts into a cache."""

from typing import Any

import torch

from revivemoe.ids import ExpertId, LayerId
from revivemoe.model.host_cache import HostCache

LAYERS = [LayerId(1), LayerId(2), LayerId(5)]
EXPERTS = 6
SHAPES: dict[str, Any] = {
    "down": ((5, 3), torch.bfloat16),
    "up": ((3, 7), torch.float32),
    "bias": ((6,), torch.bfloat16),
}


def rows_of(layer: int, expert: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * layer + expert)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, (shape, dtype) in SHAPES.items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def other_process(fd: int) -> bool:
    """Whether what the test has put there is there; puts something itself."""
    cache = HostCache(fd, SHAPES)
    got = cache.fetch(LAYERS[0], ExpertId(4))
    cache.put(LAYERS[2], ExpertId(5), rows_of(5, 5))
    return got is not None and same(got, rows_of(1, 4))
