"""Which shapes the op tests try: every implementation's, and few of them for the Triton interpreter."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.ops.cases import Case

_BASE = Case()
SHAPES: tuple[Case, ...] = (
    # Each head size, block size, type, grouping and ranking at least twice, each pair of interest once.
    replace(_BASE, dtype=torch.bfloat16),
    replace(_BASE, heads=1, kv_heads=1, head_size=16, ranking="model"),
    replace(_BASE, heads=3, kv_heads=1, head_size=80, dtype=torch.float16, ranking="int8"),
    replace(_BASE, heads=8, kv_heads=1, head_size=96, block_size=32, dtype=torch.bfloat16, lens=(1, 31, 32, 33, 65)),
    replace(_BASE, heads=6, kv_heads=2, head_size=128, block_size=64, dtype=torch.bfloat16, lens=(63, 64, 65, 129)),
    replace(_BASE, heads=8, kv_heads=2, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(127, 128, 129, 300)),
    replace(_BASE, heads=4, kv_heads=4, head_size=128, block_size=128, ranking="int8", lens=(5, 257, 128)),
    replace(_BASE, heads=4, kv_heads=1, head_size=256, block_size=32, dtype=torch.float16, lens=(1, 32, 100)),
    replace(_BASE, heads=2, kv_heads=2, head_size=256, dtype=torch.bfloat16, ranking="model", lens=(16, 17, 47, 48)),
    replace(_BASE, heads=8, kv_heads=1, head_size=80, block_size=64, ranking="model", lens=(64, 1, 130)),
    replace(_BASE, heads=16, kv_heads=2, head_size=64, block_size=256, dtype=torch.float16, lens=(255, 256, 257, 520)),
    replace(
        _BASE, heads=12, kv_heads=4, head_size=96, block_size=128, dtype=torch.float16, ranking="model", lens=(129,)
    ),
    replace(
        _BASE, heads=3, kv_heads=3, head_size=64, block_size=48, dtype=torch.bfloat16, ranking="int8", lens=(47, 97)
    ),
    replace(_BASE, heads=23, kv_heads=1, block_size=32, dtype=torch.bfloat16, lens=(33, 70)),
    replace(_BASE, heads=5, kv_heads=1, head_size=112, block_size=32, dtype=torch.bfloat16, lens=(40, 64, 70)),
    replace(_BASE, heads=4, kv_heads=1, head_size=32, dtype=torch.bfloat16, lens=(16, 49)),
    replace(_BASE, heads=3, kv_heads=1, head_size=48, dtype=torch.float16, ranking="int8", lens=(31, 64)),
    replace(_BASE, heads=4, head_size=160, block_size=32, dtype=torch.bfloat16, lens=(33, 64)),
    replace(_BASE, heads=2, kv_heads=1, head_size=192, dtype=torch.bfloat16, lens=(17, 47)),
    replace(_BASE, heads=2, kv_heads=2, head_size=224, dtype=torch.float16, ranking="model", lens=(16, 33)),
    replace(_BASE, heads=4, kv_heads=1, head_size=512, block_size=32, dtype=torch.bfloat16, lens=(1, 32, 70)),
    replace(_BASE, heads=8, kv_heads=1, head_size=512, lens=(40,)),
    # Sinks and soft caps, with sums over slices and without.
    replace(_BASE, heads=5, kv_heads=1, block_size=32, lens=(1, 33, 0, 70, 900), sinks=True),
    replace(
        _BASE, heads=8, kv_heads=2, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(129, 20), sinks=True
    ),
    replace(_BASE, heads=3, kv_heads=1, block_size=32, lens=(1, 33, 0, 700), soft_cap=2.0),
    replace(_BASE, heads=2, kv_heads=2, block_size=32, dtype=torch.bfloat16, lens=(70,), soft_cap=50.0),
)
"""Shapes that every op takes, kernels of the CPU."""

_QUANTIZED = replace(_BASE, block_size=32, ranking=None, value_sum=False)
FORMATS: tuple[Case, ...] = (
    # Each format twice or more, in every type, with the default groups and others, dense and with what SparQ needs.
    replace(_QUANTIZED, format="int8", lens=(1, 31, 32, 33, 65, 0, 96)),
    replace(_QUANTIZED, format="int8", heads=8, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(128, 300)),
    replace(_BASE, format="int8", heads=3, kv_heads=1, head_size=80, dtype=torch.float16, lens=(16, 47, 49)),
    replace(_QUANTIZED, format="int4", lens=(1, 31, 32, 33, 65, 0, 96)),
    replace(_QUANTIZED, format="int4", heads=8, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(129, 400)),
    replace(_BASE, format="int4", heads=8, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(128, 129, 390)),
    replace(_BASE, format="int4", heads=4, kv_heads=4, head_size=96, dtype=torch.float16, lens=(16, 17, 50)),
    replace(_BASE, format="int4", heads=3, kv_heads=1, head_size=80, ranking="int8", lens=(40, 33)),
    replace(_QUANTIZED, format="int4", group_size=16, heads=5, kv_heads=1, dtype=torch.bfloat16, lens=(33, 70)),
    replace(_BASE, format="int4", heads=4, kv_heads=1, head_size=256, dtype=torch.bfloat16, lens=(1, 32, 100)),
    replace(_QUANTIZED, format="kivi4", lens=(1, 31, 32, 33, 65, 0, 96)),
    replace(_QUANTIZED, format="kivi4", heads=8, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(129, 400)),
    replace(_QUANTIZED, format="kivi4", heads=3, kv_heads=1, head_size=80, dtype=torch.float16, lens=(64, 47, 65)),
    replace(
        _QUANTIZED, format="kivi4", heads=4, head_size=96, group_size=16, block_size=48, value_sum=True, lens=(97,)
    ),
    replace(_QUANTIZED, format="kivi2", lens=(1, 31, 32, 33, 65, 0, 96)),
    replace(
        _QUANTIZED, format="kivi2", kv_heads=4, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(129, 400)
    ),
    replace(_QUANTIZED, format="kivi2", heads=8, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(257,)),
    replace(_QUANTIZED, format="kivi2", heads=6, head_size=256, block_size=64, dtype=torch.float16, lens=(64, 65, 140)),
    replace(_QUANTIZED, format="kivi2", group_size=64, block_size=64, value_sum=True, dtype=torch.float16, lens=(150,)),
    # Head sizes of which powers of two make no part, and the largest.
    replace(_QUANTIZED, format="int8", head_size=224, dtype=torch.bfloat16, lens=(32, 70)),
    replace(_QUANTIZED, format="int4", heads=4, head_size=48, dtype=torch.bfloat16, lens=(33, 64)),
    replace(_QUANTIZED, format="kivi4", heads=4, head_size=48, block_size=128, dtype=torch.bfloat16, lens=(129, 300)),
    replace(_QUANTIZED, format="kivi4", heads=4, head_size=192, dtype=torch.bfloat16, lens=(70,)),
    replace(_QUANTIZED, format="kivi2", heads=2, kv_heads=1, head_size=160, dtype=torch.float16, lens=(40,)),
    replace(_QUANTIZED, format="kivi2", heads=4, head_size=512, dtype=torch.bfloat16, lens=(33, 64, 80)),
    replace(_QUANTIZED, format="int4", heads=4, kv_heads=1, head_size=512, dtype=torch.bfloat16, lens=(31, 96)),
    # One group in both nibbles of a byte, and groups that begin inside a nibble's run.
    replace(_QUANTIZED, format="int4", heads=8, block_size=128, dtype=torch.bfloat16, lens=(128, 300)),
    replace(_QUANTIZED, format="int4", heads=4, head_size=96, group_size=32, dtype=torch.bfloat16, lens=(33, 70)),
    replace(_QUANTIZED, format="int4", kv_heads=4, head_size=80, group_size=16, dtype=torch.bfloat16, lens=(97,)),
    # K and V in different bits.
    replace(_QUANTIZED, format="k8v4", lens=(1, 31, 32, 33, 65, 0, 96)),
    replace(_BASE, format="k8v4", heads=8, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(128, 129, 390)),
    replace(_BASE, format="k8v4", heads=3, kv_heads=1, head_size=80, dtype=torch.float16, lens=(16, 47, 49)),
    replace(_QUANTIZED, format="k8v4", heads=4, head_size=96, group_size=32, dtype=torch.bfloat16, lens=(33, 70)),
    replace(_QUANTIZED, format="k4v2", lens=(1, 31, 32, 33, 65, 0, 96)),
    replace(_QUANTIZED, format="k4v2", heads=8, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(129, 400)),
    replace(_QUANTIZED, format="k4v2", heads=3, kv_heads=1, head_size=80, dtype=torch.float16, lens=(64, 47, 65)),
    replace(_QUANTIZED, format="k4v2", heads=5, kv_heads=1, dtype=torch.bfloat16, block_size=64, lens=(65, 150, 203)),
    replace(_QUANTIZED, format="kivi2", heads=6, dtype=torch.bfloat16, block_size=48, group_size=16, lens=(49, 150)),
    replace(_QUANTIZED, format="int4", heads=8, head_size=32, dtype=torch.bfloat16, lens=(33, 130)),
    replace(_QUANTIZED, format="k4v2", heads=4, head_size=96, group_size=16, block_size=48, value_sum=True, lens=(97,)),
    replace(
        _QUANTIZED,
        format="kivi4",
        heads=8,
        head_size=128,
        block_size=128,
        dtype=torch.bfloat16,
        lens=(300,),
        sinks=True,
    ),
    replace(_BASE, format="int4", heads=5, kv_heads=1, block_size=32, lens=(1, 0, 70, 700), sinks=True),
    replace(_QUANTIZED, format="kivi2", heads=3, kv_heads=1, dtype=torch.bfloat16, lens=(70, 97), soft_cap=3.0),
)
"""Quantized pages, which every op takes as well."""

TINY: tuple[Case, ...] = (
    replace(_BASE, lens=(1, 15, 16, 17, 33)),
    replace(_BASE, heads=3, kv_heads=1, head_size=80, dtype=torch.bfloat16, ranking="int8", lens=(18, 32)),
    replace(
        _BASE, heads=2, kv_heads=2, head_size=96, block_size=32, dtype=torch.float16, ranking="model", lens=(31, 65)
    ),
    replace(_BASE, heads=8, kv_heads=1, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(130,)),
    replace(_BASE, heads=1, kv_heads=1, head_size=256, block_size=32, lens=(32, 40)),
    replace(_BASE, heads=2, kv_heads=1, head_size=48, dtype=torch.bfloat16, lens=(33,)),
    replace(_BASE, heads=1, kv_heads=1, head_size=512, dtype=torch.bfloat16, lens=(20,)),
    replace(_BASE, heads=5, kv_heads=1, lens=(1, 0, 40), sinks=True),
    replace(_BASE, heads=3, kv_heads=1, lens=(18, 33), soft_cap=2.0),
)
"""The same for the Triton interpreter, which needs about a second a shape."""

TINY_FORMATS: tuple[Case, ...] = (
    replace(_BASE, format="int8", heads=2, kv_heads=1, dtype=torch.bfloat16, lens=(16, 0, 33)),
    replace(_BASE, format="int4", group_size=16, heads=3, kv_heads=1, head_size=80, ranking="int8", lens=(33, 17)),
    replace(_BASE, format="int4", heads=2, kv_heads=1, dtype=torch.bfloat16, lens=(40,)),
    replace(_BASE, format="kivi4", heads=2, block_size=32, dtype=torch.float16, ranking=None, lens=(64, 65)),
    replace(_BASE, format="kivi2", heads=2, kv_heads=1, block_size=32, dtype=torch.bfloat16, ranking=None, lens=(70,)),
    replace(_BASE, format="kivi2", heads=1, kv_heads=1, head_size=80, block_size=48, ranking=None, lens=(97,)),
    replace(_BASE, format="k8v4", heads=2, kv_heads=1, head_size=80, dtype=torch.bfloat16, lens=(33, 17)),
    replace(_BASE, format="k4v2", heads=2, kv_heads=1, block_size=32, dtype=torch.float16, ranking=None, lens=(70,)),
    replace(_BASE, format="int8", heads=3, kv_heads=1, dtype=torch.bfloat16, lens=(47,), sinks=True, soft_cap=4.0),
)
"""Quantized pages for the Triton interpreter."""

_SPANS = replace(_BASE, ranking="bounds", value_sum=False, lens=(1, 48, 49, 64, 0, 65, 130))
SPANS: tuple[Case, ...] = (
    # Contexts from the first that leaves a span out (49 tokens) on, every head size, type and grouping.
    _SPANS,
    replace(_SPANS, dtype=torch.bfloat16, lens=(80, 81)),
    replace(_SPANS, heads=1, kv_heads=1, head_size=16, lens=(50, 97)),
    replace(_SPANS, heads=3, kv_heads=1, head_size=80, block_size=48, dtype=torch.float16, lens=(96, 97, 143)),
    replace(_SPANS, heads=8, kv_heads=1, head_size=96, block_size=32, dtype=torch.bfloat16, lens=(64, 63, 95)),
    replace(_SPANS, heads=6, kv_heads=2, head_size=128, block_size=64, dtype=torch.bfloat16, lens=(127, 128, 129)),
    replace(_SPANS, heads=8, kv_heads=2, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(900, 3, 0, 513)),
    replace(_SPANS, heads=4, kv_heads=4, head_size=128, block_size=128, lens=(60, 257, 128)),
    replace(_SPANS, heads=4, kv_heads=1, head_size=256, block_size=32, dtype=torch.float16, lens=(1, 100)),
    replace(_SPANS, heads=5, kv_heads=1, head_size=112, block_size=32, dtype=torch.bfloat16, lens=(140, 70)),
    replace(_SPANS, heads=2, kv_heads=1, head_size=48, lens=(97,)),
    replace(_SPANS, heads=8, kv_heads=1, head_size=512, block_size=32, dtype=torch.bfloat16, lens=(100, 70)),
    replace(_SPANS, heads=23, kv_heads=1, block_size=256, dtype=torch.float16, lens=(255, 512, 700)),
    replace(_SPANS, heads=2, kv_heads=1, block_size=256, lens=(1500,)),
    replace(_SPANS, heads=5, kv_heads=1, lens=(40, 0, 130, 1100), sinks=True, soft_cap=3.0),
)
"""Pages with bounds of spans."""

_CODED_SPANS = replace(_SPANS, block_size=32)
SPAN_FORMATS: tuple[Case, ...] = (
    replace(_CODED_SPANS, format="int8", lens=(1, 64, 65, 96, 0, 97)),
    replace(_CODED_SPANS, format="int8", heads=3, kv_heads=1, head_size=80, dtype=torch.float16, lens=(96, 130)),
    replace(_CODED_SPANS, format="int4", heads=8, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(128, 390)),
    replace(_CODED_SPANS, format="int4", heads=4, head_size=96, group_size=32, lens=(80, 129)),
    replace(_CODED_SPANS, format="kivi4", dtype=torch.bfloat16, lens=(64, 95, 96, 130)),
    replace(_CODED_SPANS, format="kivi4", heads=3, kv_heads=1, head_size=96, group_size=16, block_size=48, lens=(145,)),
    replace(_CODED_SPANS, format="kivi2", heads=8, head_size=128, block_size=128, dtype=torch.bfloat16, lens=(0, 513)),
    replace(_CODED_SPANS, format="kivi2", heads=6, head_size=256, block_size=64, dtype=torch.float16, lens=(64, 140)),
    replace(_CODED_SPANS, format="k8v4", heads=3, kv_heads=1, head_size=80, dtype=torch.float16, lens=(96, 130)),
    replace(_CODED_SPANS, format="k4v2", dtype=torch.bfloat16, lens=(64, 95, 96, 130)),
)
"""The same over quantized blocks."""

TINY_SPANS: tuple[Case, ...] = (
    replace(_SPANS, heads=2, kv_heads=1, lens=(49, 0, 80)),
    replace(_SPANS, heads=3, kv_heads=1, head_size=80, block_size=48, dtype=torch.bfloat16, lens=(97,)),
    replace(_SPANS, heads=2, kv_heads=2, head_size=128, block_size=32, dtype=torch.float16, lens=(64, 20)),
    replace(_SPANS, heads=3, kv_heads=1, lens=(65,), sinks=True),
)
TINY_SPAN_FORMATS: tuple[Case, ...] = (
    replace(_SPANS, format="int4", heads=2, kv_heads=1, dtype=torch.bfloat16, lens=(70,)),
    replace(_CODED_SPANS, format="kivi4", heads=2, kv_heads=1, dtype=torch.float16, lens=(64, 90)),
)
"""For the Triton interpreter."""
