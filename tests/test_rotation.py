"""The rotation of V: undone exactly, of every head size, and worth having where a channel stands out."""

from __future__ import annotations

import pytest
import torch

from vllm_sparq.formats import FORMATS
from vllm_sparq.ops.codec import dequantize, pack, quantize
from vllm_sparq.rotation import rotated, transform_size, turned_back

HEAD_SIZES = {32: 32, 48: 16, 64: 64, 80: 16, 96: 32, 112: 16, 128: 128, 160: 32, 192: 64, 224: 32, 256: 256, 512: 512}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_undone(head_size: int, dtype: torch.dtype) -> None:
    """Exactly, where sums fit into the type: of one channel each, whose sign, place and size all have a say."""
    assert transform_size(head_size) == HEAD_SIZES[head_size]
    value = torch.diag(torch.arange(head_size) % 7 - 3.0).to(dtype)
    assert torch.equal(turned_back(rotated(value)), value)
    many = torch.randn(5, 3, head_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(turned_back(rotated(many)), many, rtol=0, atol=max(4e-6, 8 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_it_is_a_rotation(head_size: int) -> None:
    """Up to one factor, from 1 to sqrt(2) of which types of few bits notice nothing: all products are kept."""
    matrix = rotated(torch.eye(head_size, dtype=torch.float64))
    products = matrix @ matrix.T
    assert 0.5 <= products[0, 0] <= 1
    assert torch.equal(products, products[0, 0] * torch.eye(head_size, dtype=torch.float64))


@pytest.mark.parametrize("n_tokens", [1, 300])
def test_what_stands_out_is_spread(n_tokens: int) -> None:
    """V with a channel ten times as large as the others: 2 bits lose less than half as much of the rotated one."""
    value = torch.randn(n_tokens, 64, generator=torch.Generator().manual_seed(1))
    value[:, 20] *= 10
    fmt = FORMATS["k4v2"]
    assert fmt is not None

    def loss(x: torch.Tensor, back: bool) -> float:
        codes, scales = quantize(x, fmt.value, 64)
        found = dequantize(pack(codes, 2), scales, fmt.value)
        return float(((turned_back(found) if back else found) - value).square().mean())

    assert loss(rotated(value), True) < loss(value, False) / 2
