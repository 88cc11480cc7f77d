"""Chat templates: programs that come with a model, run in a sandbox, for so long and no longer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

_SECONDS = 5.0
_MAX_CHARACTERS = 1 << 24  # of a prompt, and of any text or list that a template makes by *


def render_template(source: str, variables: dict[str, Any]) -> str:
    """The text that a template makes of its variables, as transformers would have it.

    Whatever the template raises; TimeoutError after _SECONDS, ValueError for too long a text.
    """
    pieces: list[str] = []
    length = 0
    with _deadline(_SECONDS):
        for piece in _environment().from_string(source).generate(variables):
            length += len(piece)
            if length > _MAX_CHARACTERS:
                raise ValueError(f"it makes a text of more than {_MAX_CHARACTERS} characters")
            pieces.append(piece)
    return "".join(pieces)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, in which neither texts nor numbers explode."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "**":
            raise ValueError("it raises to a power, which no chat needs")
        for one, other in ((left, right), (right, left)):
            if hasattr(one, "__len__") and len(one) * other > _MAX_CHARACTERS:
                raise ValueError(f"it repeats something {other} times")
        return super().call_binop(context, operator, left, right)


def _environment() -> jinja2.Environment:
    """What chat templates are written for (transformers, `chat_template_utils.py`)."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """TimeoutError inside of the block once it has taken longer; looked at before every line.

    By the interpreter's trace, since a template's loops are Python's: nothing else stops one in a
    thread that is not the main one.
    """
    end = time.monotonic() + seconds
    Trace = Callable[[FrameType, str, Any], Any]

    def check(frame: FrameType, event: str, argument: Any) -> Trace:
        if time.monotonic() > end:
            raise TimeoutError(f"it was not done after {seconds:g} s")
        return check

    before = sys.gettrace()
    sys.settrace(check)
    try:
        yield
    finally:
        sys.settrace(before)
