"""A28: templates that attack. Nothing is executed, nothing hangs, memory stays bounded, one line says why."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lfm2cpp.errors import LFM2Error, ModelFormatError
from lfm2cpp.text import template as template_module
from lfm2cpp.text.template import ChatTemplate

SECONDS = 8.0  # the slowest attack ends at the deadline, which the tests shorten to 2 s
HEADROOM = 1 << 30  # bytes of address space that an attack may use

SIXTY = "{% for i in range(60) %}"
NESTED = (
    "{% set a = namespace(s=[1], t=[1]) %}" + SIXTY + "{% set a.s = [a.s, a.s] %}{% set a.t = [a.t, a.t] %}{% endfor %}"
)
BIG = "{% set s = 'a' * 8000000 %}"
BUILTINS = "['__builtins__']['eval'](\"__import__('os').system('touch PWNED')\")"

# Reaching Python: the payloads of CVE-2024-34359 and CVE-2026-5760 and their kin.
ESCAPES = {
    "subclasses": "{% for c in [].__class__.__base__.__subclasses__() %}{% if c.__name__ == 'catch_warnings' %}"
    "{{ c.__init__.__globals__" + BUILTINS + " }}{% endif %}{% endfor %}",
    "mro": "{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__" + BUILTINS + " }}",
    "lipsum": "{{ lipsum.__globals__.os.popen('touch PWNED').read() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch PWNED').read() }}",
    "joiner": "{{ joiner.__init__.__globals__.os.popen('touch PWNED').read() }}",
    "namespace": "{{ namespace.__init__.__globals__.os.popen('touch PWNED').read() }}",
    "dict": "{{ dict.__call__.__globals__.os.popen('touch PWNED').read() }}",
    "self": "{{ self.__init__.__globals__" + BUILTINS + " }}",
    "self block": "{{ self._TemplateReference__context.environment.filters }}",
    "undefined": "{{ nothing.__init__.__globals__" + BUILTINS + " }}",
    "raise_exception": "{{ raise_exception.__globals__" + BUILTINS + " }}",
    "strftime": "{{ strftime_now.__globals__" + BUILTINS + " }}",
    "attr": "{{ ((''|attr('__class__'))|attr('__mro__'))[1] }}",
    "attr escaped": "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f')|attr('\\x5f\\x5fmro\\x5f\\x5f') }}",
    "subscript": "{{ ''['__class__']['__mro__'] }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(self) }}",
    "format map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}).x.y }}",
    "format by filter": "{{ ['{0.__class__.__mro__}']|map('format', 1)|list|first }}",
    "format held": "{% set f = '{0.__class__.__mro__}'.format %}{{ f(1) }}",
    "map attribute": "{{ [1]|map(attribute='__class__')|map(attribute='__mro__')|list|first|first }}",
    "groupby": "{{ (messages|groupby('__class__'))[0][0].__mro__ }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__" + BUILTINS + " }}",
    "caller": "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{{ x.y.z }}{% endcall %}",
    "loop": "{% for i in [1] %}{{ loop.__init__.__globals__" + BUILTINS + " }}{% endfor %}",
    "generation": "{% generation %}{{ ''.__class__.__mro__[1].__subclasses__() }}{% endgeneration %}",
    "generator": "{{ ([1]|map('string')).gi_frame.f_globals.x.y }}",
    "private name": "{% set a = namespace(__class__=1) %}{{ a }}",
    "private attribute": "{% set a = namespace() %}{% set a.__class__ = 1 %}{{ a }}",
    "import": "{% import 'os' as os %}{{ os.system('touch PWNED') }}",
    "from import": "{% from 'os' import system %}{{ system('touch PWNED') }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "mutate": "{{ messages.append(1) }}",
    "mutate dict": "{{ messages[0].update({'role': 'system'}) }}",
    "mutate set": "{% set messages.x = 1 %}",
}
HARMLESS_TEXT = ("attr", "attr escaped", "map attribute", "format by filter")  # may render, but to nothing of Python

# Taking time or memory.
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "fibonacci": "{% macro f(n) %}{% if n > 0 %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [[1,2]] recursive %}{{ loop([[1,2]]) }}{{ loop([[1,2]]) }}{% endfor %}",
    "range": "{{ range(10**9)|list }}",
    "repeat": "{{ 'a' * 10**10 }}",
    "repeat reversed": "{{ 10**10 * 'a' }}",
    "repeat constant": "{{ 'a' * 10000000000 }}",
    "repeat list": "{{ [0] * 10**9 }}",
    "power": "{{ 10 ** 10 ** 9 % 10 ** 8 ** 8 }}",
    "power constant": "{{ 2 ** 99999999 }}",
    "square": "{% set a = namespace(n=7) %}{% for i in range(99) %}{% set a.n = a.n * a.n %}{% endfor %}{{ a.n }}",
    "double": "{% set a = namespace(s='aaaa') %}" + SIXTY + "{% set a.s = a.s + a.s %}{% endfor %}{{ a.s }}",
    "double ~": "{% set a = namespace(s='aaaa') %}" + SIXTY + "{% set a.s = a.s ~ a.s %}{% endfor %}{{ a.s }}",
    "double list": "{% set a = namespace(s=[1]) %}" + SIXTY + "{% set a.s = a.s + a.s %}{% endfor %}{{ a.s }}",
    "nested shown": NESTED + "{{ a.s }}",
    "nested string": NESTED + "{{ a.s|string|length }}",
    "nested ~": NESTED + "{{ a.s ~ '' }}",
    "nested json": NESTED + "{{ a.s|tojson }}",
    "nested equal": NESTED + "{{ a.s == a.t }}",
    "nested test": NESTED + "{{ a.s is eq(a.t) }}",
    "nested in": NESTED + "{{ a.s in [a.t] }}",
    "nested index": NESTED + "{{ [a.s].index(a.t) }}",
    "nested count": NESTED + "{{ [a.s].count(a.t) }}",
    "nested sort": NESTED + "{{ [a.s, a.t]|sort }}",
    "nested max": NESTED + "{{ [a.s, a.t]|max }}",
    "nested unique": NESTED + "{{ [a.s, a.t]|unique|list }}",
    "nested select": NESTED + "{{ [a.s]|select('eq', a.t)|list }}",
    "nested map": NESTED + "{{ [a.s]|map('string')|join }}",
    "nested join": NESTED + "{{ [a.s]|join }}",
    "nested percent": NESTED + "{{ '%s' % a.s }}",
    "nested percent tuple": NESTED + "{{ '%s' % (a.s,) }}",
    "nested format": NESTED + "{{ '{}'.format(a.s) }}",
    "nested trim": NESTED + "{{ a.s|trim }}",
    "nested values": NESTED + "{{ {'a': a.s}.values() }}",
    "nested items": NESTED + "{{ {'a': a.s}.items() == {'a': a.t}.items() }}",
    "nested missing": NESTED + "{{ {}[a.s].x.y }}",
    "nested raised": NESTED + "{{ raise_exception(a.s) }}",
    "nested key": "{% set a = namespace(s=(1,)) %}" + SIXTY + "{% set a.s = (a.s, a.s) %}{% endfor %}{{ {a.s: 1} }}",
    "wide list shown": BIG + "{{ [s] * 100000 }}",
    "wide list json": BIG + "{{ ([s] * 100000)|tojson }}",
    "wide join": BIG + "{{ ''.join([s] * 100000) }}",
    "wide join filter": BIG + "{{ ([s] * 100000)|join }}",
    "join generator": "{{ ('c' * 1000000).join(range(99999)|map('string')) }}",
    "join separator": "{{ ('b' * 1000000)|join('c' * 1000000) }}",
    "replace": "{% set s = 'a' * 1000000 %}{{ s|replace('a', 'b' * 1000) }}",
    "replace method": "{% set s = 'a' * 1000000 %}{{ s.replace('a', 'b' * 1000) }}",
    "replace nothing": "{% set s = 'a' * 1000000 %}{{ s.replace('', 'b' * 1000) }}",
    "split": "{% for i in range(99999) %}{% set x = ('a ' * 2000000).split() %}{% endfor %}",
    "lists kept": "{% set a = namespace(l=[]) %}{% for i in range(99999) %}{% set a.l = a.l + [range(99999)|list] %}"
    "{% endfor %}",
    "center": "{{ 'a'|center(10**9) }}",
    "center method": "{{ 'a'.center(10**9) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\\t'.expandtabs(1000000000) }}",
    "width": "{{ '{:>1000000000}'.format(1) }}",
    "width argument": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent precision": "{{ '%.1000000000f' % 1.5 }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "indent": "{{ 'a\\nb'|indent(10**9) }}",
    "indent text": "{{ ('a\\n' * 1000000)|indent('b' * 1000) }}",
    "wordwrap": "{{ ('a' * 8000000)|wordwrap(1, wrapstring='b' * 10000) }}",
    "batch": "{{ [1]|batch(10**9, 0)|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "round": "{{ 1.5|round(10**9, 'ceil') }}",
    "to_bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "sum": "{{ ([[1]] * 99999)|sum(start=[]) }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 1000}) }}",
    "capture": BIG + "{% set x %}{% for i in range(99999) %}{{ s }}{% endfor %}{% endset %}{{ x }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "date": "{{ strftime_now('%100000000d') }}",
    "json indent": "{{ [[1]]|tojson(indent=10**9) }}",
    "parentheses": "{{ " + "(" * 100000 + "1" + ")" * 100000 + " }}",
    "brackets": "{{ " + "[" * 100000 + "1" + "]" * 100000 + " }}",
    "long sum": "{{ " + "+".join(["1"] * 50000) + " }}",
    "not": "{{ " + "not " * 100000 + "1 }}",
    "dots": "{{ a" + ".a" * 50000 + " }}",
    "filters": "{{ 1" + "|string" * 50000 + " }}",
    "ifs": "{% if 1 %}" * 1000 + "{% endif %}" * 1000,
    "fors": "{% for i in [1, 2] %}" * 100 + "x" + "{% endfor %}" * 100,
    "braces": "{{" * 500000,
    "comments": "{#" * 500000,
    "raw": "{% raw %}" * 100000,
    "digits": "{{ " + "1" * 1000000 + " }}",
    "too long": "a" * (1 << 21),
}

BROKEN = {
    "end missing": ("{% if x %}", "line 1"),
    "expression missing": ("a\n{{ }}", "line 2"),
    "unknown tag": ("{% foo %}", "unknown tag 'foo'"),
    "unknown filter": ("{{ 1|foo }}", "No filter named 'foo'"),
    "open": ("{{ ", "line 1"),
    "generation open": ("{% generation %}x", "line 1"),
    "type": ("{{ 1 + 'a' }}", "TypeError"),
    "undefined": ("{{ a.b.c }}", "UndefinedError"),
    "zero": ("{{ 1 // 0 }}", "ZeroDivisionError"),
}


@pytest.fixture(autouse=True)
def bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A short deadline, a folder where an executed payload would leave a file, and a limit on memory."""
    monkeypatch.setattr(template_module, "DEADLINE", 2.0)
    monkeypatch.chdir(tmp_path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert not (tmp_path / "PWNED").exists()


def render(source: str) -> str:
    template = ChatTemplate(source, label="m.gguf", special_pieces=["<|im_end|>"], token_names={"bos_token": "B"})
    return template.render([{"role": "user", "content": "x"}]).text


def refused(source: str) -> str:
    started = time.monotonic()
    with pytest.raises(LFM2Error) as caught:
        render(source)
    assert time.monotonic() - started < SECONDS
    message = str(caught.value)
    assert message.startswith("m.gguf: the chat template") and "\n" not in message and len(message) < 500
    assert isinstance(caught.value, ModelFormatError) or "refuses these messages" in message
    return message


@pytest.mark.parametrize("name", ESCAPES)
def test_escapes_do_nothing(name: str) -> None:
    try:
        text = render(ESCAPES[name])
    except ModelFormatError as error:
        assert "\n" not in str(error)
    else:
        assert "<class" not in text and "function" not in text and "root:" not in text and len(text) < 100


@pytest.mark.parametrize("name", [name for name in ESCAPES if name not in (*HARMLESS_TEXT, "caller", "generator")])
def test_most_escapes_are_refused(name: str) -> None:
    refused(ESCAPES[name])


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_in_an_error(name: str) -> None:
    if name in ("power", "long sum"):  # bounded rather than refused on some versions
        try:
            assert len(render(BOMBS[name])) < 10_000
        except ModelFormatError:
            pass
        return
    refused(BOMBS[name])


@pytest.mark.parametrize("name", BROKEN)
def test_broken_templates_say_where(name: str) -> None:
    source, hint = BROKEN[name]
    assert hint in refused(source)


def test_a_loop_without_steps_is_stopped_by_the_clock() -> None:
    """Work between two looks at the budget: the deadline is what ends it."""
    source = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(30) }}"
    assert "did not render within 2 s" in refused(source) or "iterations" in refused(source)


def test_the_budget_is_new_for_each_render() -> None:
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}ok", label="m", special_pieces=[])
    for _ in range(15):
        assert template.render([{"role": "user", "content": "x"}]).text == "ok"


def test_ordinary_long_conversations_are_within_the_budget() -> None:
    source = "{% set a = namespace(t='') %}{% for m in messages %}{% set a.t = m.content ~ '|' %}{{ a.t }}{% endfor %}"
    template = ChatTemplate(source, label="m", special_pieces=["<|im_end|>"])
    messages = [{"role": "user", "content": "é" * 2000}] * 2000
    assert len(template.render(messages).text) == 2000 * 2001
