"""Triton's interpreter without the work that changes no result: what takes most of the time of an interpreted test.

The interpreter is written for kernels on tensors of a device. For tensors that lie in memory already it still

* writes every storage back over itself after every launch (of a cache of 256 MiB that takes longer than the kernel);
* rebinds some two hundred names of ``triton.language`` whenever a kernel, or a function of one, is called;
* computes every sum, difference and product of integers again in int64, to find overflows, and then drops what it
  found, since it asserts only with ``debug``;
* makes the shape of every tensor anew, and the type of every block;
* calls every function of ``triton.language`` through two others, which only hand on who interprets it;
* asks, before two tensors are combined, by which rules two types become one, also where they are one.

`speed_up` replaces these. Results stay the same to the bit (tests/test_interpreter.py).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import torch

TRITON = {
    # What is replaced, or relied on by what replaces it, with the arguments that it takes.
    "GridExecutor._init_args_hst": ("self", "args_dev", "kwargs"),
    "GridExecutor._restore_args_dev": ("self", "args_dev", "args_hst", "kwargs", "kwargs_hst"),
    "_patch_attr": ("obj", "name", "member", "builder", "scope"),
    "_patch_lang": ("fn",),
    "_LangPatchScope": (),
    "_LangPatchScope.restore": ("self",),
    "_get_np_dtype": ("tt_dtype",),
    "interpreter_builder.options.sanitize_overflow": None,
    "interpreter_builder.options.debug": None,
    "interpreter_semantic": None,
    "tl.core.block_type.__init__": ("self", "element_ty", "shape"),
    "tl.core.builtin": ("fn",),
    "tl.core.tensor.__init__": ("self", "handle", "type"),
    "TritonSemantic.binary_op_type_checking_impl": (
        *("self", "lhs", "rhs", "allow_lhs_ptr", "allow_rhs_ptr", "arithmetic_check", "div_or_mod"),
    ),
    "TritonSemantic.broadcast_impl_value": ("self", "lhs", "rhs"),
    "TritonSemantic.cast": ("self", "input", "dst_ty", "fp_downcast_rounding"),
}
"""By name in ``triton.runtime.interpreter``; None for what is not called by us."""


class MovedError(RuntimeError):
    """Triton's interpreter is not the one that `speed_up` was written for."""


def check(interpreter: Any) -> None:
    """Raise `MovedError` unless everything in `TRITON` is where it was.

    Raises:
        MovedError: names what is missing or takes other arguments.
    """
    import triton

    for path, arguments in TRITON.items():
        remedy = f"triton {triton.__version__}: read its runtime/interpreter.py and adapt tests/interpreter.py"
        found = interpreter
        for name in path.split("."):
            if not hasattr(found, name):
                raise MovedError(f"there is no {path} in triton.runtime.interpreter of {remedy}")
            found = getattr(found, name)
        takes = arguments if arguments is None else tuple(inspect.signature(found).parameters)
        if takes != arguments:
            raise MovedError(f"{path} takes {takes} instead of {arguments} in {remedy}")
    if interpreter.interpreter_builder.options.debug:
        raise MovedError("the interpreter asserts that no integer overflows: keep that")


def speed_up() -> None:
    """Replace them in this process, where kernels are interpreted and nothing has been launched yet.

    Raises:
        MovedError: see `check`.
    """
    from triton.runtime import interpreter

    check(interpreter)
    interpreter.GridExecutor._init_args_hst = _in_place(interpreter.GridExecutor._init_args_hst)
    interpreter.GridExecutor._restore_args_dev = _nothing_to_restore(interpreter.GridExecutor._restore_args_dev)
    interpreter._patch_lang = _once(interpreter)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    _remember_shapes(interpreter.tl.core)
    _remember_blocks(interpreter.tl.core)
    interpreter._patch_attr = _straight(interpreter)
    _types_alike(interpreter.TritonSemantic, interpreter.tl.core.tensor)


def _in_place(copy_in: Any) -> Any:
    """Kernels get the tensors themselves where all of them are in memory."""

    def init_args_hst(self: Any, args_dev: Any, kwargs: Any) -> Any:
        if all(_is_in_memory(arg) for arg in (*args_dev, *kwargs.values())):
            return args_dev, kwargs
        return copy_in(self, args_dev, kwargs)

    return init_args_hst


def _is_in_memory(arg: Any) -> bool:
    """Whether an argument is a plain CPU tensor or no tensor at all; descriptors and wrappers are left to Triton."""
    if isinstance(arg, tuple):
        return all(map(_is_in_memory, arg))
    if isinstance(arg, torch.Tensor):
        return arg.device.type == "cpu"
    return not hasattr(arg, "base") and not hasattr(arg, "data_ptr")


def _nothing_to_restore(copy_out: Any) -> Any:
    def restore_args_dev(self: Any, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
        if args_hst is not args_dev:
            copy_out(self, args_dev, args_hst, kwargs, kwargs_hst)

    return restore_args_dev


def _once(interpreter: Any) -> Any:
    """Names of ``triton.language`` are bound for the interpreter once, for good."""
    patch, tl = interpreter._patch_lang, interpreter.tl
    seen: dict[int, Any] = {}
    bound: set[frozenset[str]] = set()
    nothing = interpreter._LangPatchScope()

    def patch_lang(fn: Any) -> Any:
        if id(fn) not in seen:
            langs = [v for v in fn.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core)]
            which = frozenset(lang.__name__ for lang in langs)
            if which not in bound:
                patch(fn)
                bound.add(which)
            seen[id(fn)] = fn  # kept, so that its id stays its own
        return nothing

    return patch_lang


def _by_name(get_np_dtype: Any) -> Any:
    """Types of Triton that are named alike are alike."""
    found: dict[str, Any] = {}

    def by_name(tt_dtype: Any) -> Any:
        name = tt_dtype.name
        if name not in found:
            found[name] = get_np_dtype(tt_dtype)
        return found[name]

    return by_name


def _remember_shapes(core: Any) -> None:
    init = core.tensor.__init__
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    @functools.wraps(init)
    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape.values if type.is_block() else []
        key = (*shape,)
        if key not in shapes:
            init(self, handle, type)
            shapes[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    core.tensor.__init__ = tensor_init


def _remember_blocks(core: Any) -> None:
    """The type of a block has what follows from its shape alone from the first of that shape."""
    block = core.block_type
    init = block.__init__
    known: dict[tuple[int, ...], Any] = {}

    @functools.wraps(init)
    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = (*shape,)
        if not all(type(size) is int for size in sizes):
            init(self, element_ty, shape)
            return
        if sizes not in known:
            init(self, element_ty, shape)
            known[sizes] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = known[sizes]
        self.name = f"<{text}, {element_ty}>"

    block.__init__ = block_init


def _straight(interpreter: Any) -> Any:
    """Functions of the language are called with the interpreter as ``_semantic``, by nobody in between."""
    patch = interpreter._patch_attr
    checked = interpreter.tl.core.builtin(lambda: None).__code__

    def patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        if getattr(member, "__code__", None) is not checked:
            patch(obj, name, member, builder, scope)
            return
        wrapped, semantic = member.__wrapped__, interpreter.interpreter_semantic

        def straight(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return wrapped(*args, **kwargs)

        scope.set_attr(obj, name, straight)

    return patch_attr


def _types_alike(semantic: Any, tensor: Any) -> None:
    """Tensors of one type are not converted to it, and those of one shape not broadcast."""
    promote, broadcast, cast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value, semantic.cast

    @functools.wraps(promote)
    def binary_op_type_checking_impl(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        are_alike = type(lhs) is tensor and type(rhs) is tensor and lhs.dtype is rhs.dtype
        if are_alike and not div_or_mod and not lhs.dtype.is_ptr():
            return self.broadcast_impl_value(lhs, rhs)
        return promote(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    @functools.wraps(broadcast)
    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        here, there = lhs.type, rhs.type
        are_blocks = here.is_block(), there.is_block()
        if are_blocks == (False, False) or (are_blocks == (True, True) and here.shape.values == there.shape.values):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    @functools.wraps(cast)
    def to_another(self: Any, input: Any, dst_ty: Any, fp_downcast_rounding: str | None = None) -> Any:
        if input.dtype is dst_ty.scalar:
            return input
        return cast(self, input, dst_ty, fp_downcast_rounding)

    semantic.binary_op_type_checking_impl = binary_op_type_checking_impl
    semantic.broadcast_impl_value = broadcast_impl_value
    semantic.cast = to_another
