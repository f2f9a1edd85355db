"""One at a time: a base has one adapter on, one scheduler's state and one gradient at any moment.

A small server calls the same base from several threads. Each of them waits here for the one before it, and
gets what it would get alone. Other bases are not waited for, unless they share the denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])

_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


def lock_of(denoiser: nn.Module) -> RLock:
    """Returns the lock of all bases with this denoiser. A thread that holds it may take it again."""
    return _locks.setdefault(denoiser, RLock())


def alone(function: Function) -> Function:
    """Makes a function, whose first argument is a base, hold the base's lock from beginning to end."""

    @wraps(function)
    def held(*arguments: Any, **named: Any) -> Any:
        with (arguments[0] if arguments else named["base"]).lock:
            return function(*arguments, **named)

    return held  # pyright: ignore[reportReturnType] - the same signature
