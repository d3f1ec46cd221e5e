"""The environment a model file's chat template runs in: Hugging Face's, with limits on time and memory.

A template is a program written by whoever made the file. The sandbox (Jinja2's, as in transformers) keeps it away
from Python; this module adds what a sandbox lacks, an end: loops and calls draw on a budget, whatever can make much
of little (a repetition, a wide pad, a list that holds itself a thousand times over) is weighed before it is done,
and a render that takes too long is stopped from outside. Single C calls are short by then, so stopping works.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from typing import Any, TypeVar

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEXT = 8 << 20  # characters of any one string, the output included
MAX_ALL_TEXT = 128 << 20  # characters of all strings built in one render
MAX_ITEMS = 1_000_000  # of any one list
MAX_ALL_ITEMS = 4_000_000  # of all lists built in one render
MAX_STEPS = 1_000_000  # loop iterations and calls of one render
MAX_BITS = 4096  # of any one integer
MAX_WIDTH = 1000  # of padding, indentation, precision, batches

# Filters that look at the shape of a value, not at its text: quick whatever the value holds.
SHAPE_FILTERS = frozenset(
    "abs attr count d default first float int items last length list map reject rejectattr reverse select "
    "selectattr".split()
)
WIDTH_FILTERS = frozenset("batch center indent round slice truncate wordwrap".split())
REMOVED_FILTERS = ("filesizeformat", "forceescape", "pprint", "random", "urlize", "xmlattr")  # not for prompts

CONTAINERS = (list, tuple, dict, KeysView, ValuesView, ItemsView)

T = TypeVar("T")


class Refusal(TemplateError):
    """The template called raise_exception: the conversation is not of the form it wants."""


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's tokens for training; here it is its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A CallBlock, as in transformers, so that assignments inside stay inside here too.
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class TemplateDict:
    """`dict` without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateNamespace(Namespace):
    """`namespace` that takes no private names."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # what it holds may hold itself


class WeighEverything(NodeTransformer):
    """Sends what passes through no hook of the sandbox through a filter: loops, `~`, comparisons, tuples."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node = self.generic_visit(node)
        node.iter = _filtered(node.iter, "_counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node = self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        parts.set_environment(node.environment)
        return _filtered(parts, "_joined")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        node = self.generic_visit(node)
        node.expr = _filtered(node.expr, "_weighed")
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, "_weighed")
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        node = self.generic_visit(node)  # a tuple can be a key, and hashing one walks through all of it
        return _filtered(node, "_weighed") if node.ctx == "load" else node


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with a budget. One render at a time; `refill` starts the next."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols], finalize=self._weighed
        )
        self.refill()
        self.concat = self._concat  # joins the output of the template, of macros and of blocks
        del self.globals["lipsum"]
        for name in REMOVED_FILTERS:
            del self.filters[name]
        for name, function in self.filters.items():
            self.filters[name] = self._limited(name, function)
        for name, function in self.tests.items():
            self.tests[name] = self._limited("test", function)
        self.filters.update(_counted=self._counted, _joined=self._joined, _weighed=self._weighed)

    def refill(self) -> None:
        """A full budget for the next render."""
        self._steps = self._text = self._items = 0

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """A filter of ours under the same limits."""
        self.filters[name] = self._limited(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return WeighEverything().visit(tree)

    # -- the budget --------------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} loop iterations and calls")

    def _spend_text(self, n: int) -> None:
        self._text += n
        if n > MAX_TEXT or self._text > MAX_ALL_TEXT:
            raise SecurityError(f"text of more than {MAX_TEXT} characters")

    def _spend_items(self, n: int) -> None:
        self._items += n
        if n > MAX_ITEMS or self._items > MAX_ALL_ITEMS:
            raise SecurityError(f"a list of more than {MAX_ITEMS} items")

    def _charged(self, value: T) -> T:
        """A value an operation has made, paid for by its size."""
        if isinstance(value, (str, bytes)):
            self._spend_text(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self._spend_items(len(value))
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise SecurityError("an integer of too many digits")
        return value

    def _weighed(self, value: T) -> T:
        """A value about to be written out, compared or hashed; refused when that would take too long.

        Walks into it as str() would: what it holds twice counts twice.
        """
        if not isinstance(value, CONTAINERS):
            return value
        waiting: list[Any] = [value]
        n_nodes = n_chars = 0
        while waiting:
            node = waiting.pop()
            n_nodes += 1
            if isinstance(node, str):
                n_chars += len(node)
            elif isinstance(node, dict):
                waiting += node.keys()
                waiting += node.values()
            elif isinstance(node, CONTAINERS):
                waiting += node
            if n_nodes + len(waiting) > MAX_ITEMS or n_chars > MAX_TEXT:
                raise SecurityError(f"a value of more than {MAX_ITEMS} items or {MAX_TEXT} characters in all")
        return value

    def _counted(self, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            self._step()
            yield item

    def _concat(self, parts: Iterable[str]) -> str:
        parts = list(parts)
        self._spend_text(sum(map(len, parts)))
        return "".join(parts)

    def _joined(self, parts: list[Any]) -> str:
        return self._concat(str(self._weighed(part)) for part in parts)

    # -- hooks of the sandbox ----------------------------------------------------------------------------------

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """+ * ** % after a look at the size of the result."""
        if operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(times, int):
                    self._charge_length(sequence, len(sequence) * max(times, 0))
        elif operator == "+" and isinstance(left, (str, bytes, list, tuple)) and isinstance(right, type(left)):
            self._charge_length(left, len(left) + len(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(right, 0) > MAX_BITS:
                raise SecurityError("a power of too many digits")
        elif operator == "%" and isinstance(left, (str, bytes)):
            _check_percent_format(str(left))
            self._weighed(right)
        result = super().call_binop(context, operator, left, right)
        return self._charged(result) if operator == "%" or isinstance(result, int) else result

    def _charge_length(self, sequence: Any, n: int) -> None:
        (self._spend_text if isinstance(sequence, (str, bytes)) else self._spend_items)(n)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`; an argument that is missing is quoted in the error."""
        return super().getitem(obj, self._weighed(argument))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template; methods of strings and numbers that can make much of little come checked."""
        self._step()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, (str, bytes, int)):
            args = self._checked_method(owner, name, args, kwargs)
        elif isinstance(owner, (list, tuple, dict)):
            self._weighed(args)
            self._weighed(owner if name in ("index", "count") else ())
        return self._charged(super().call(context, obj, *args, **kwargs))

    def _checked_method(self, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if name in ("translate", "maketrans"):
            raise SecurityError(f"{name} is not for templates")
        if name in ("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"):
            _check_widths(args, kwargs)
        elif name == "join" and args:
            parts = list(self._counted(args[0]))
            self._spend_text(sum(len(owner) + len(part) for part in parts if isinstance(part, (str, bytes))))
            args = (parts, *args[1:])
        elif name == "replace":
            self._check_replace(owner, *args)
        elif name in ("split", "rsplit", "splitlines"):
            self._spend_items(len(owner) // 2)
        return args

    def _check_replace(self, text: Any, *args: Any) -> None:
        if len(args) >= 2 and all(isinstance(a, type(text)) for a in args[:2]):
            old, new = args[:2]
            self._spend_text(len(text) + (text.count(old) if old else len(text) + 1) * len(new))

    def _check_padding(self, text: Any, *args: Any, **kwargs: Any) -> None:
        """indent and wordwrap also take a string, which comes in at most once a character."""
        longest = max((len(a) for a in (*args, *kwargs.values()) if isinstance(a, str)), default=0)
        if isinstance(text, str) and longest > 1:
            self._spend_text(len(text) * longest)

    def wrap_str_format(self, value: Any) -> Any:
        """`"...".format(...)`: the sandbox's own formatter with bounded fields."""
        if super().wrap_str_format(value) is None:
            return None
        is_map = value.__name__ == "format_map"

        def format_bounded(*args: Any, **kwargs: Any) -> str:
            fields = dict(args[0]) if is_map else kwargs
            return BoundedFormatter(self).vformat(str(value.__self__), () if is_map else args, fields)

        return format_bounded

    # -- filters -----------------------------------------------------------------------------------------------

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` behind the checks that its name calls for."""
        marker = getattr(function, "jinja_pass_arg", None)  # it wants the environment or a context first
        n_skipped = 0 if marker is None else 1

        def limited(*args: Any, **kwargs: Any) -> Any:
            own = args[n_skipped:]
            if name == "join" and own:
                own = (list(self._counted(own[0])), *own[1:])
                separator = own[1] if len(own) > 1 else kwargs.get("d", "")
                self._spend_text(len(str(separator)) * len(own[0]))
            if name not in SHAPE_FILTERS:
                self._weighed((*own, *kwargs.values()))
            if name in WIDTH_FILTERS:
                _check_widths(own[1:], kwargs)
                self._check_padding(*own, **kwargs)
            elif name == "replace":
                self._check_replace(*map(str, (*own[:3], *kwargs.values())))
            elif name == "format" and own:
                _check_percent_format(str(own[0]))
            elif name == "sum" and not isinstance(kwargs.get("start", (*own, None, 0)[2]), (int, float)):
                raise SecurityError("a sum of something else than numbers")
            return self._charged(function(*args[:n_skipped], *own, **kwargs))

        if marker is not None:
            limited.jinja_pass_arg = marker  # type: ignore[attr-defined]
        return limited


class BoundedFormatter(SandboxedFormatter):
    """str.format whose fields cannot fill the memory."""

    def format_field(self, value: Any, format_spec: str) -> str:
        environment: Any = self._env
        _check_width_digits(format_spec)
        return environment._charged(super().format_field(environment._weighed(value), format_spec))


def _filtered(node: Any, name: str) -> Any:
    if isinstance(node, nodes.Const):
        return node
    wrapped = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
    wrapped.environment = node.environment
    return wrapped


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the private name {name!r} in a namespace")


def _check_widths(args: Iterable[Any], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise SecurityError(f"a width of more than {MAX_WIDTH}")


def _check_width_digits(spec: str) -> None:
    """The digits of a format specification; `*` would take a width from an argument."""
    if "*" in spec or any(len(digits.lstrip("0")) > 3 for digits in re.findall(r"\d+", spec)):
        raise SecurityError(f"a format with a width of {MAX_WIDTH} or more")


def _check_percent_format(text: str) -> None:
    for spec in re.findall(r"%(?:\([^)]*\))?([^a-zA-Z%]*)", text):
        _check_width_digits(spec)
