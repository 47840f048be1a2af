"""Each kernel is optimised once: what it calls is typed and lowered, and becomes machine code with it only.

Numba compiles every function to machine code by itself before it does so with the functions that call it,
each of which contains all it calls; the body of a parallel loop counts as a function, too. So the innermost
loops go through LLVM five times, and only the last of the results is run: more than half of a first start.
Here a function that is compiled for another one is a *part* of that: linked to it as it was lowered, without
wrappers for Python.

That gives a kernel one machine code, too. Numba's parts are in the process under one weak name with their
copies inside kernels, of which the linker takes the first it has seen: another one in a process that compiles
than in one that loads the kernel from the cache. Where floating point may be reassociated, the two have
different bits.

Owns the changes to numba's compiler. `install` makes them for the process.
"""

from __future__ import annotations

import weakref
from typing import Any

from llvmlite.binding import Linkage
from numba.core import compiler, dispatcher, sigutils
from numba.core.codegen import CPUCodeLibrary, JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock

from common import garbage
from common.engine.devices.cpu import kernel_cache

_numba: Any = dispatcher
Dispatcher, FunctionCompiler = _numba.Dispatcher, _numba._FunctionCompiler

_optimize = CPUCodeLibrary._optimize_final_module
_pointer_to = JITCodeLibrary.get_pointer_to_function
_customized = FunctionCompiler._customize_flags
_compile_alone = Dispatcher.compile
_compile_ir = compiler.compile_ir

_under_way = 0  # functions that are compiled, one within the other; under numba's lock
_lowered: weakref.WeakSet[Any] = weakref.WeakSet()  # libraries without machine code


class _PartEntry:
    """Stands for the entry point of a part, by which numba finds its code."""


def install() -> None:
    Dispatcher.compile = _compile
    FunctionCompiler._customize_flags = _flags
    compiler.compile_ir = _compile_loop_body
    CPUCodeLibrary._optimize_final_module = _optimize_own
    JITCodeLibrary.finalize = _link
    JITCodeLibrary.get_pointer_to_function = _emit


def _compile(function: Any, signature: Any) -> Any:
    global _under_way
    with global_compiler_lock:
        _under_way += 1
        try:
            if _under_way > 1:
                return _compile_part(function, signature)
            with garbage.paused():
                return _compile_whole(function, signature)
        finally:
            _under_way -= 1


def _compile_whole(function: Any, signature: Any) -> Any:
    arguments, _ = sigutils.normalize_signature(signature)
    if _is_part(function.overloads.get(arguments)):
        del function.overloads[arguments]  # others contain it, and now it is called by itself
    with kernel_cache.compiling(function, signature):
        return _compile_alone(function, signature)


def _compile_part(function: Any, signature: Any) -> Any:
    """The same part whether or not it was called by itself before: the same bits of kernels, too."""
    arguments, return_type = sigutils.normalize_signature(signature)
    known = function.overloads.get(arguments)
    if _is_part(known):
        return known.entry_point
    with function._compiling_counter:
        result = function._compiler.compile(arguments, return_type)._replace(entry_point=_PartEntry())
    function.targetctx.insert_user_function(result.entry_point, result.fndesc, [result.library])
    function.overloads[arguments] = result
    return result.entry_point


def _is_part(result: Any) -> bool:
    return result is not None and isinstance(result.entry_point, _PartEntry)


def _flags(self: Any, flags: Any) -> Any:
    flags = _customized(self, flags)
    flags.no_cfunc_wrapper = True  # nobody calls kernels from C
    if _under_way > 1:
        flags.no_cpython_wrapper = flags.no_compile = True
    return flags


def _compile_loop_body(
    typing: Any, target: Any, body: Any, arguments: Any, returned: Any, flags: Any, *rest: Any, **named: Any
) -> Any:
    flags.no_cfunc_wrapper = flags.no_cpython_wrapper = flags.no_compile = True
    return _compile_ir(typing, target, body, arguments, returned, flags, *rest, **named)


def _link(library: Any) -> None:
    """In place of numba's `finalize`: only what this library needs is put into it."""
    library._raise_if_finalized()
    for used in dict.fromkeys(library._linking_libraries):
        library._reload_init.update(used._reload_init)
        library._final_module.link_in(used._get_module_for_linking(), preserve=True)
    library._finalized = True
    _lowered.add(library)


def _emit(library: Any, name: str) -> Any:
    """In place of numba's `get_pointer_to_function`: what is asked for becomes machine code only now."""
    library._ensure_finalized()
    if library in _lowered:
        _lowered.discard(library)
        library._optimize_final_module()
        library._final_module.verify()
        library._finalize_final_module()
    return _pointer_to(library, name)


def _optimize_own(library: Any) -> None:
    """A kernel calls its own copies of what it contains."""
    for function in library._final_module.functions:
        if function.linkage is Linkage.linkonce_odr and not function.is_declaration:
            function.linkage = Linkage.internal
    _optimize(library)
