"""Chat templates in the manner of LFM2 and LFM2.5, conversations for them, and what transformers makes of both.

    python tests/chat_cases.py     # needs transformers: writes tests/data/golden_chats.json anew
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "data" / "golden_chats.json"
BOS = "<|startoftext|>"

MINIMAL = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# System text, tools between markers, results of tools between markers: the first generation's manner.
TOOLS = """{{- bos_token -}}
{%- set head = namespace(text="") -%}
{%- if messages[0].role == "system" -%}
    {%- set head.text = messages[0].content -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
    {%- set head.text = head.text ~ ("\\n" if head.text else "") ~ "Tools: <|tool_list_start|>[" -%}
    {%- for tool in tools -%}
        {%- set head.text = head.text ~ (tool if tool is string else tool | tojson) ~ ("" if loop.last else ", ") -%}
    {%- endfor -%}
    {%- set head.text = head.text ~ "]<|tool_list_end|>" -%}
{%- endif -%}
{%- if head.text %}{{ "<|im_start|>system\\n" ~ head.text ~ "<|im_end|>\\n" }}{% endif -%}
{%- for message in messages -%}
    {%- set body = message.content if message.content is string else message.content | tojson -%}
    {%- if message.role == "tool" %}
        {%- set body = "<|tool_response_start|>" ~ body ~ "<|tool_response_end|>" -%}
    {%- endif -%}
    {{- "<|im_start|>" ~ message.role ~ "\\n" ~ body ~ "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif -%}
"""

# Thinking cut from earlier turns, generation blocks, content in parts, calls of tools: the second generation's manner.
THINKING = """{{- bos_token -}}
{%- set keep = keep_thinking | default(false) -%}
{%- macro value(v) -%}
    {%- if v is string -%}{{- "'" ~ v ~ "'" -}}{%- elif v is mapping -%}{{- v | tojson -}}
    {%- else -%}{{- v | string -}}{%- endif -%}
{%- endmacro -%}
{%- macro parts(content) -%}
    {%- if content is string -%}{{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == "text" -%}{{- part.text -}}{%- else -%}{{- "<image>" -}}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
    {%- if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {{- "<|im_start|>" ~ message.role ~ "\\n" -}}
    {%- if message.role == "assistant" -%}
        {%- generation -%}
        {%- if message.thinking is defined and (keep or loop.index0 > ns.last) -%}
            {{- "<think>" ~ message.thinking ~ "</think>" -}}
        {%- endif -%}
        {%- if message.content is defined -%}
            {%- set text = parts(message.content) -%}
            {%- if not keep and loop.index0 < ns.last and "</think>" in text -%}
                {%- set text = text.split("</think>")[-1] | trim -%}
            {%- endif -%}
            {{- text -}}
        {%- endif -%}
        {%- if message.tool_calls is defined -%}
            {%- set calls = namespace(all=[]) -%}
            {%- for call in message.tool_calls -%}
                {%- set args = namespace(all=[]) -%}
                {%- for name, v in call.function.arguments.items() -%}
                    {%- set args.all = args.all + [name ~ "=" ~ value(v)] -%}
                {%- endfor -%}
                {%- set calls.all = calls.all + [call.function.name ~ "(" ~ (args.all | join(", ")) ~ ")"] -%}
            {%- endfor -%}
            {{- "<|tool_call_start|>[" ~ (calls.all | join(", ")) ~ "]<|tool_call_end|>" -}}
        {%- endif -%}
        {{- "<|im_end|>\\n" -}}
        {%- endgeneration -%}
    {%- else %}
        {%- if message.get("content") %}{{ parts(message["content"]) }}{% endif -%}
        {{- "<|im_end|>\\n" -}}
    {%- endif %}
{%- endfor -%}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif -%}
"""

# One of everything that templates use: blank handling, loops, filters, methods, slices, arithmetic, formatting.
FEATURES = """{% set names = ["b", "a", "c"] %}
   {% for n in names if n != "c" %}
{{ loop.index }}/{{ loop.length }} {{ n | upper }}{{ "" if loop.last else "," }}
   {% endfor %}
{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}
{{ names | sort | join("-") }} {{ names | first }} {{ names[-1] }} {{ names[:2] | length }} {{ names | reverse | list }}
{{ messages | selectattr("role", "equalto", "user") | map(attribute="content") | list }}
{{ {"k": [1, 2.5, none, true], "é<>&'": "\\"\\n"} | tojson }} {{ {"b": 1, "a": 2} | tojson(indent=2, sort_keys=true) }}
{{ "é" | tojson(ensure_ascii=true) }} {{ [1, 2] | tojson(separators=(",", ":")) }}
{{ "%s and %03d" | format("x", 7) }} {{ "%s-%s" % ("x", "y") }}
{{ "{} {:>4}".format("p", "q") }} {{ 7 // 2 }} {{ 2 ** 10 }}
{{ "abc".replace("b", "B") }} {{ " x ".strip() }}|{{ "a,b".split(",") }} {{ "x".join(["1", "2"]) }} {{ "ab" * 3 }}
{{ dict(a=1) }} {{ {"z": 1}.get("q", "none") }} {% for k, v in {"x": 1, "y": 2}.items() %}{{ k }}={{ v }};{% endfor %}
{{ undefined_name }}|{{ undefined_name is defined }}|{{ undefined_name | default("d") }}|{{ none }}|{{ true }}
{{ "</think>" in messages[-1].content }} {{ messages[-1].content.startswith("<think>") }} {{ messages | length }}
{%- set block %}  kept {{ 1 + 1 }}  {% endset %}{{ block | trim }}
{% filter upper %}filtered{% endfilter %} {{ "a\\nb" | indent(2) }} {{ "long text here" | truncate(9) }}
{{ 3.14159 | round(2) }}
{{ messages[-1].content }}{{ bos_token }}{{ eos_token }}
"""

REFUSING = "{% if messages[0].role != 'user' %}{{ raise_exception('must begin with the user') }}{% endif %}ok"

TEMPLATES = {"minimal": MINIMAL, "tools": TOOLS, "thinking": THINKING, "features": FEATURES}

USER = {"role": "user", "content": "What is 2+2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "find.it", "parameters": {"type": "object", "é": "<&>'\""}}}
ARGUMENTS = {"q": "x y", "n": 3, "o": {"a": None}, "t": True}
CALL = {"type": "function", "function": {"name": "find.it", "arguments": ARGUMENTS}}
LONG = [
    SYSTEM,
    {"role": "user", "content": "  padded\n"},
    {"role": "assistant", "content": "<think>hm</think>\n\n four  "},
    {"role": "user", "content": "<think>mine</think> tab\there, é日本🙂, nul\x00, \\n, {{ x }}, {% if %}"},
    {"role": "assistant", "content": "five"},
    {"role": "user", "content": ""},
]
CALLS = [
    USER,
    {"role": "assistant", "thinking": "look it up", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": '{"result": 4}'},
    {"role": "assistant", "reasoning_content": "known now", "content": "4"},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}]

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one": {"messages": [USER]},
    "no prompt": {"messages": [USER], "add_generation_prompt": False},
    "system": {"messages": [SYSTEM, USER]},
    "long": {"messages": LONG},
    "tools": {"messages": [SYSTEM, USER], "tools": [TOOL, TOOL]},
    "calls": {"messages": CALLS},
    "keep": {"messages": [*LONG, *CALLS], "keep_thinking": True},
    "parts": {"messages": PARTS},
}
# A template that adds strings cannot take a message whose content is a list; that is so in transformers too.
UNFIT = {("minimal", "parts"), ("features", "parts")}


def cases() -> list[tuple[str, str]]:
    """(template, conversation) names."""
    return [(t, c) for t in TEMPLATES for c in CONVERSATIONS if (t, c) not in UNFIT]


def render_with_transformers(template: str, conversation: str) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    options = dict(CONVERSATIONS[conversation])
    options.setdefault("add_generation_prompt", True)
    rendered, _ = render_jinja_template(
        [options.pop("messages")], chat_template=TEMPLATES[template], bos_token=BOS, eos_token="<|im_end|>", **options
    )
    return rendered[0]


if __name__ == "__main__":
    renders = {f"{t}/{c}": render_with_transformers(t, c) for t, c in cases()}
    GOLDEN.write_text(json.dumps(renders, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")
    print(f"{len(renders)} renders in {GOLDEN}")
