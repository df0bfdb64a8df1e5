"""Is everything in place on this machine? Versions, entry points, device, implementations."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from vllm_sparq import __version__, compat
from vllm_sparq.doctor.findings import Section


def versions() -> Section:
    """looking at versions"""
    section = Section("versions")
    section.good(f"vllm-sparq {__version__}, Python {platform.python_version()}")
    problem = compat.unsupported_vllm()
    supported = ",".join(sorted(map(str, compat.SUPPORTED_VLLM), reverse=True))
    if problem is None:
        section.good(f"vllm {compat.vllm_version()}, in the supported range {supported}")
    else:
        section.bad(problem)
    for name, why in (("torch", "vLLM needs it"), ("triton", "only CUDA devices need it")):
        found = installed(name)
        if found is not None:
            section.good(f"{name} {found}")
        else:
            section.note(f"{name} is not installed: {why}")
    return section


def installed(name: str) -> str | None:
    """The version of a distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def environment() -> Section:
    """looking at entry points and environment variables"""
    section = Section("plugin")
    for group in ("vllm.general_plugins", "vllm.platform_plugins"):
        names = {entry.name: entry.value for entry in metadata.entry_points(group=group)}
        ours = names.pop("sparq", None)
        if ours is None:
            section.bad(f"entry point sparq of {group} is missing, so vLLM cannot find us: install again")
        else:
            section.good(f"entry point sparq of {group}: {ours}")
        if names and group == "vllm.platform_plugins":
            section.note(f"other platform plugins: {', '.join(names)}; vLLM allows one of them to be active")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        section.good("VLLM_PLUGINS is not set: vLLM loads every plugin")
    elif "sparq" in allowed.split(","):
        section.good(f"VLLM_PLUGINS={allowed} names sparq")
    else:
        section.bad(f"VLLM_PLUGINS={allowed!r} switches vllm-sparq off: unset it, or add sparq to it")
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        section.bad("VLLM_TARGET_DEVICE=cpu makes vLLM skip platform plugins, and SparQ is refused: unset it")
    for name in ("VLLM_SPARQ_IMPL", "VLLM_SPARQ_ISA", "VLLM_SPARQ_LIBRARIES"):
        if os.environ.get(name):
            section.note(f"{name}={os.environ[name]} overrides which implementation runs: unset it when done debugging")
    return section


def platform_in_use() -> Section:
    """importing vLLM"""
    from vllm.platforms import current_platform

    section = Section("device")
    name = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
    if getattr(current_platform, "serves_sparq", False):
        section.good(f"vLLM uses our platform: {name}")
    else:
        section.bad(
            f"vLLM uses {name}, not ours: vllm-sparq runs on CPU and CUDA; see the section above for the reason"
        )
    device = current_platform.device_type
    section.numbers = {"platform": name, "device": device}
    if device == "cpu":
        describe_cpu(section)
    else:
        section.good(f"{device}: {current_platform.get_device_name()}")
    return section


def describe_cpu(section: Section) -> None:
    """Name, cores and instruction sets."""
    from vllm_sparq.ops import instruction_sets

    model = instruction_sets.cpu_name()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    section.good(f"cpu: {model}, {usable} cores for us")
    found = [instruction_sets.INSTRUCTION_SETS[isa].label for isa in instruction_sets.runnable()]
    if found:
        section.good(f"instruction sets with compiled kernels: {', '.join(found)}")
    else:
        section.bad(instruction_sets.nothing_runs())
    section.numbers |= {"cpu": model, "cores": usable, "instruction_sets": found}


def implementations() -> Section:
    """choosing implementations"""
    from vllm.platforms import current_platform

    from vllm_sparq.ops import dispatch

    section = Section("operations")
    for op in dispatch.IMPLEMENTATIONS:
        try:
            choice = dispatch.choose(op, current_platform.device_type)
            choice.load()
            if choice.implementation == "cpu":
                check_kernel(op)
        except (ValueError, NotImplementedError, ImportError, AttributeError, OSError) as error:
            section.bad(f"{op}: {error}")
            continue
        text = f"{op}: {choice.implementation} ({choice.reason})"
        section.numbers[op] = {"implementation": choice.implementation, "reason": choice.reason}
        forced = bool(os.environ.get(dispatch.OVERRIDE))
        if choice.implementation != "reference":
            section.good(text)
        elif forced:
            section.note(text)
        else:
            section.bad(text)
    return section


def check_kernel(op: str) -> None:
    """The compiled library can be older than the code that calls it.

    Raises:
        AttributeError: it does not have the kernel of this op.
        OSError: it cannot be loaded.
    """
    from vllm_sparq.ops import native

    if not hasattr(native.library(), f"sparq_{op}"):
        raise AttributeError(
            f"{native.find().library} is older than this version and lacks it: install vllm-sparq again"
        )
