"""Run-time checks of types and shapes at a fraction of the cost of jaxtyping's import hook alone.

The hook decorates every function of the package with `jaxtyping.jaxtyped`, nested functions anew at each call of the
function around them. That compiles two checks a function, milliseconds each, whether a test calls it or not; and each
call binds its arguments and opens a scope of axis sizes, about 100 microseconds, whether it has arrays with named axes
or not. Together that was half of the CPU time of tests that are not bound by compilation. Here checks are compiled at
the first call, only functions whose annotations name axes have scopes, and in each process the first calls of a
function, and the first closures of a nested one, are checked: what tests call a thousand times, they call alike.
"""

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

import beartype
import jaxtyping

_jaxtyped = jaxtyping.jaxtyped
_beartype = beartype.beartype(conf=beartype.BeartypeConf(violation_type=TypeError))  # as jaxtyping's own errors are
_checks: dict[object, Callable[..., Any]] = {}
_closures: collections.Counter[object] = collections.Counter()
_CALLS, _CLOSURES = 100, 8  # of one function, that are checked


def install(package: str) -> None:
    """Checks the calls of all functions of a package that is not imported yet."""
    jaxtyping.jaxtyped = _checked  # the name under which the hook calls it
    jaxtyping.install_import_hook(package, "type_checks.check").__enter__()


def _checked(fn: Any = None, *, typechecker: Any) -> Any:
    """Decorates like `jaxtyping.jaxtyped`."""
    if fn is None:
        return functools.partial(_checked, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = _checked(fn.__init__, typechecker=typechecker)
        return fn
    if not inspect.isfunction(fn):
        return _jaxtyped(fn, typechecker=typechecker)
    annotations = fn.__annotations__.values()
    if not annotations:
        return fn
    if "<locals>" in fn.__qualname__:
        _closures[fn.__code__] += 1
        if _closures[fn.__code__] > _CLOSURES:
            return fn
    has_scope = any(map(_has_axes, annotations))
    return _on_first_calls(fn, functools.partial(_jaxtyped, typechecker=typechecker) if has_scope else _beartype)


def _has_axes(annotation: object) -> bool:
    """Returns whether a type has axes with names; of one that is still a string it is not known."""
    if isinstance(annotation, str):
        return True
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(_has_axes, get_args(annotation)))


def check(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates like `beartype.beartype` the functions without a body that jaxtyping makes of signatures.

    Their signature alone says what they check, so that equal ones share a check.
    """
    signature = inspect.signature(fn)
    parameters = [(p.name, p.kind, p.default is p.empty, p.annotation) for p in signature.parameters.values()]
    key = fn.__module__, fn.__qualname__, *parameters, signature.return_annotation
    try:
        return _checks[key]
    except KeyError:
        return _checks.setdefault(key, _beartype(fn))
    except TypeError:  # an annotation that has no hash
        return _beartype(fn)


def _on_first_calls(fn: Callable[..., Any], check: Callable[..., Any]) -> Callable[..., Any]:
    checked: Callable[..., Any] | None = None
    left = _CALLS

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked, left
        if not left:
            return fn(*args, **kwargs)
        left -= 1
        if checked is None:
            checked = check(fn)
        return checked(*args, **kwargs)

    return call
