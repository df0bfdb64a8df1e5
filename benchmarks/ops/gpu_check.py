#!/usr/bin/env python3
"""Are the Triton kernels right on this GPU, and how fast are they? Needs torch, triton and this checkout; no vLLM.

    python benchmarks/ops/gpu_check.py --out gpu.jsonl
    python benchmarks/ops/gpu_check.py --out gpu.jsonl --only times --ranking bounds    # quest_decode instead of sparq

First every op is compared with its reference, on pages whose unowned bytes are NaN; then a decode step of one layer is
timed beside PyTorch's SDPA (and flash-attn and flashinfer where they are installed). A time is the median of replays
of a CUDA graph with a cold L2, methods in turns. Takes a few minutes; exit code 1 if a check fails, 2 without CUDA.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout is not installed

import torch
from gpu_cases import CASES, Case, World, load, run_checks, written

from vllm_sparq.formats import FORMATS
from vllm_sparq.layout import Pages
from vllm_sparq.reads import DenseRead

N_SAMPLES = 20
FLUSH_BYTES = 256 << 20  # several times the L2 of an H200
COPY_BYTES = 4 << 30
MEMORY_SHARE = 0.8  # of the free memory that a cell may take


def check_graph(device: str, case: Case) -> dict[str, Any]:
    """A captured decode step follows tensors that change after the capture."""
    world = written(case, device, "triton")
    out, lens = torch.empty_like(world.query), world.seq_lens.clone().fill_(1)
    run, arguments = load(case.sparse, "triton"), (world.query, world.pages, world.table, lens)
    graph = capture(lambda: run(*arguments, read=case.read, scale=0.1, out=out))
    lens.copy_(world.seq_lens)
    graph.replay()
    want = torch.empty_like(out)
    run(*arguments, read=case.read, scale=0.1, out=want)
    return dict(check="CUDA graph", case=asdict(case), error=float((out != want).sum()), limit=0)


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of ``step``, after a run that compiles what it needs."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def samples_us(runs: Mapping[str, Callable[[], object]], flush: torch.Tensor) -> dict[str, list[float]]:
    """Times of each run, taken in turns, each after the L2 was filled with something else."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(N_SAMPLES):
        events = {}
        for name, run in runs.items():
            flush.zero_()  # also keeps the device busy until the replay is queued
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            events[name] = start, stop
        torch.cuda.synchronize()
        for name, (start, stop) in events.items():
            times[name].append(1e3 * start.elapsed_time(stop))
    return times


def rivals(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Other people's dense decode on K and V [B, S, G, D], contiguous: friendlier to them than pages."""
    found: dict[str, Callable[[], object]] = {}
    q, k, v = query[:, :, None], key.transpose(1, 2), value.transpose(1, 2)  # [B, H, 1, D], [B, G, S, D]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    found["sdpa"] = lambda: sdpa(q, k, v, enable_gqa=True)
    try:
        from flash_attn import flash_attn_with_kvcache

        lens = torch.full((len(query),), key.shape[1], dtype=torch.int32, device=query.device)
        found["flash-attn"] = lambda: flash_attn_with_kvcache(query[:, None], key, value, cache_seqlens=lens)
    except ImportError:
        pass
    try:
        import flashinfer

        page, (b, s, g, d) = 16, key.shape
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=query.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
        ids = torch.arange(b * s // page, dtype=torch.int32, device=query.device)
        indptr, last = torch.arange(b + 1).int() * (s // page), torch.full((b,), page).int()
        indptr, last = indptr.to(query.device), last.to(query.device)
        wrapper.plan(indptr, ids, last, query.shape[1], g, d, page, q_data_type=query.dtype, kv_data_type=key.dtype)
        paged = tuple(t.reshape(-1, page, g, d) for t in (key, value))
        found["flashinfer"] = lambda: wrapper.run(query, paged)
    except ImportError:
        pass
    return found


def filled(case: Case, n_requests: int, context: int) -> World:
    """``n_requests`` of ``context`` tokens each, made and written on the GPU."""
    device, g, d, blocks = "cuda", case.kv_heads, case.head_size, case.n_blocks(context)
    pages, dtype = Pages.empty(n_requests * blocks, g, case.layout, device), case.layout.dtype
    table = torch.randperm(n_requests * blocks, device=device).int().view(n_requests, blocks)
    key = torch.empty(n_requests * context, g, d, dtype=dtype, device=device).normal_()
    value, query = torch.empty_like(key).normal_(), torch.randn(n_requests, case.heads, d, device=device).to(dtype)
    lens = torch.full((n_requests,), context, dtype=torch.int32, device=device)
    starts = torch.tensor([0, context], dtype=torch.int32, device=device)
    for b in range(n_requests):
        rows = slice(b * context, (b + 1) * context)
        load("write", "triton")(key[rows], value[rows], pages, table[b : b + 1], starts, lens)
    return World(case, pages, table, lens, key, value, query)


def measure_cell(case: Case, n_requests: int, context: int, flush: torch.Tensor) -> Iterator[dict[str, Any]]:
    """A record per method for ``n_requests`` of ``context`` tokens each."""
    world, where = filled(case, n_requests, context), dict(requests=n_requests, context=context)
    query, pages, table, lens = world.query, world.pages, world.table, world.seq_lens
    g, layout, read, scale = case.kv_heads, case.layout, case.read, case.head_size**-0.5
    starts, out = torch.arange(n_requests + 1, dtype=torch.int32, device=lens.device), torch.empty_like(query)
    write, dense, sparse = (load(op, "triton") for op in ("write", "dense_decode", case.sparse))
    new, fewer = (world.key[:n_requests], world.value[:n_requests]), lens - 1
    contiguous = (t.view(n_requests, context, g, case.head_size) for t in (world.key, world.value))
    steps: dict[str, Callable[[], object]] = {
        "write": lambda: write(*new, pages, table, starts, fewer),
        "write+close": lambda: write(*new, pages, table, starts, lens),
        "dense": lambda: dense(query, pages, table, lens, scale=scale, out=out),
        case.sparse.removesuffix("_decode"): lambda: sparse(query, pages, table, lens, read=read, scale=scale, out=out),
        **rivals(query, *contiguous),
    }
    runs = {}
    for name, step in steps.items():
        try:
            runs[name] = capture(step).replay
        except Exception as error:
            if name.startswith(("write", "dense", "sparq", "quest")):
                raise
            yield dict(method=name, **where, error=f"{type(error).__name__}: {error}")

    # The newest block counts as one in the format.
    brought = layout.record_bytes
    moved = {"write": 2 * brought, "write+close": case.block_size * brought}
    moved |= {each.op.removesuffix("_decode"): each.bytes_moved(layout, context) for each in (DenseRead(), read)}
    for name, times in samples_us(runs, flush).items():
        deciles, median = statistics.quantiles(times, n=10), statistics.median(times)
        n_bytes = int(n_requests * g * moved.get(name, context * brought))
        spread = dict(p10_us=round(deciles[0], 2), p90_us=round(deciles[-1], 2))
        rate = round(n_bytes / median / 1e3, 1)
        yield dict(method=name, **where, median_us=round(median, 2), **spread, bytes_moved=n_bytes, gb_per_s=rate)


def stages(case: Case, n_requests: int, context: int) -> dict[str, float]:
    """Microseconds of each kernel of a sparse decode step, warm, from the profiler; empty where it sees no kernels."""
    world = filled(case, n_requests, context)
    run, out = load(case.sparse, "triton"), torch.empty_like(world.query)
    arguments = world.query, world.pages, world.table, world.seq_lens
    run(*arguments, read=case.read, scale=0.1, out=out)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(N_SAMPLES):
            run(*arguments, read=case.read, scale=0.1, out=out)
        torch.cuda.synchronize()
    kernels = (event for event in profile.key_averages() if event.key.endswith("_kernel"))
    return {event.key: round(event.self_device_time_total / event.count, 2) for event in kernels}


def copy_gb_per_s(flush: torch.Tensor) -> float:
    """Bytes read and written by a large copy, per second."""
    source, target = torch.empty(2, COPY_BYTES, dtype=torch.uint8, device="cuda")
    times = samples_us({"copy": lambda: target.copy_(source)}, flush)["copy"]
    return 2 * COPY_BYTES / statistics.median(times) / 1e3


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All cells that fit memory and time, smallest first."""
    heads, kv_heads, head_size = (int(n) for n in arguments.shape.split("/"))
    case = Case(heads=heads, kv_heads=kv_heads, head_size=head_size, ranking=arguments.ranking)
    case = replace(case, format=arguments.format)
    case = replace(case, alpha_floor=0.0 if heads == kv_heads else 0.5)  # the mean value is part of what is timed
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    copy = copy_gb_per_s(flush)
    yield dict(method="copy", gb_per_s=round(copy, 1))
    deadline = time.monotonic() + 60 * arguments.minutes
    cells = [(b, s) for s in (4096, 16384, 32768, 131072) for b in (1, 4, 16, 64)]
    for n_requests, context in sorted(cells, key=math.prod):
        torch.cuda.empty_cache()
        needed = n_requests * context * kv_heads * (case.layout.bytes_per_token + 2 * head_size * 2)
        late = time.monotonic() > deadline
        if late or needed > MEMORY_SHARE * torch.cuda.mem_get_info()[0]:
            print(f"B={n_requests} S={context}: skipped, {'time is up' if late else f'needs {needed >> 30} GiB'}")
            continue
        records = list(measure_cell(case, n_requests, context, flush))
        print_cell(records, copy)
        yield from (dict(shape=arguments.shape, ranking=case.ranking, format=case.format, **r) for r in records)
    for n_requests in (1, 16):
        kernels = stages(case, n_requests, 32768)
        print(f"kernels of {case.sparse}, B={n_requests} S=32768, us: {kernels}")
        yield dict(method=f"{case.sparse} stages", requests=n_requests, context=32768, kernels_us=kernels)


def print_cell(records: list[dict[str, Any]], copy: float) -> None:
    dense = next(r["median_us"] for r in records if r["method"] == "dense")
    for r in records:
        where = f"B={r['requests']:<3} S={r['context']:<7} {r['method']:<11}"
        if "error" in r:
            print(f"{where} {r['error'][:80]}")
            continue
        share = 100 * r["gb_per_s"] / copy
        times = f"{r['median_us']:10.1f} us  [{r['p10_us']:.1f}, {r['p90_us']:.1f}]"
        print(
            f"{where}{times}  {r['gb_per_s']:8.1f} GB/s ({share:3.0f}% of copy)  {dense / r['median_us']:6.2f} x dense"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    parser.add_argument("--only", choices=["checks", "times"], help="half of the work")
    parser.add_argument("--shape", default="32/8/128", help="query heads / KV heads / head size of the timed layer")
    parser.add_argument("--ranking", default="int4", choices=["int4", "int8", "model", "bounds"])
    parser.add_argument("--format", default="model", choices=list(FORMATS), help="of the timed pages")
    parser.add_argument("--minutes", type=float, default=5.0, help="start no further timing after this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device here (torch.cuda.is_available() is False)", file=sys.stderr)
        return 2
    import triton

    machine = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)
    print(machine)
    failed, records = 0, []
    if arguments.only != "times":
        for record in (*run_checks("cuda"), *(check_graph("cuda", case) for case in (CASES[0], CASES[-1]))):
            ok = record["error"] <= record["limit"]
            failed += not ok
            print(
                f"{'ok  ' if ok else 'FAIL'} {record['check']:<16} error {record['error']:.2g} limit {record['limit']}"
            )
            records.append(record)
    if arguments.only != "checks":
        records += measure(arguments)
    if arguments.out:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**machine, **record}) + "\n" for record in records)
    print(f"{failed} checks failed" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
