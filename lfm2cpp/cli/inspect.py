"""`lfm2cpp inspect`: what is in a GGUF file, and whether it would run."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import click

from lfm2cpp.errors import ModelFormatError
from lfm2cpp.gguf import read_gguf
from lfm2cpp.summary import summarize
from lfm2cpp.terminal import Progress, format_size, printable

WIDTH = 79
TEMPLATE_LINES = 8


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
@click.option("--check-tensors", is_flag=True, help="Read all weights and look for NaN and Inf; exit 1 when found.")
@click.option("--template", "only_template", is_flag=True, help="Print the chat template and nothing else.")
def inspect(file: Path, as_json: bool, check_tensors: bool, only_template: bool) -> None:
    """Show what is in a GGUF file: metadata, tensors, template, sizes, and what would be refused.

    Exits 0 for every file that can be read, whether or not it can be run.
    """
    with read_gguf(file) as gguf:
        if check_tensors:
            total = sum(info.nbytes for info in gguf.tensors.values())
            with Progress("checking tensors", total=total) as bar:
                summary = summarize(gguf, check_tensors=True, progress=bar.update)
        else:
            summary = summarize(gguf)
    if only_template:
        _print_template(summary)
    elif as_json:
        click.echo(json.dumps(summary, ensure_ascii=True, indent=1))
    else:
        click.echo(_encodable("\n".join(describe(summary))))
    if summary["non_finite"]:
        raise ModelFormatError(
            f"{file}: {summary['non_finite'][0]}; the model is damaged, convert or download it again"
        )


def _print_template(summary: dict[str, Any]) -> None:
    if summary["template"] is None:
        raise ModelFormatError(f"{summary['file']['path']}: holds no chat template (tokenizer.chat_template)")
    text = summary["template"]["text"]
    click.echo(_encodable(printable(text, tty=sys.stdout.isatty())), nl=not text.endswith("\n"))


def _encodable(text: str) -> str:
    """Characters that stdout cannot show become escapes instead of an error."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def describe(summary: dict[str, Any]) -> list[str]:
    """The summary as lines of at most 79 columns, apart from paths and reasons."""
    lines = [*_overview(summary), ""]
    lines += ["Metadata", *(_metadata_line(key, entry) for key, entry in summary["metadata"].items()), ""]
    if summary["tensors"]:
        lines += ["Tensors", *_tensor_lines(summary), ""]
        lines += ["Types", *_type_lines(summary), ""]
    if summary["template"] is not None:
        lines += ["Chat template", *_template_lines(summary["template"]), ""]
    lines += _verdict_lines(summary)
    return lines


def _row(label: str, text: str) -> str:
    return f"  {label:<16}{text}"


def _overview(summary: dict[str, Any]) -> list[str]:
    file, model, state = summary["file"], summary["model"], summary["state"]
    shards = f", {file['shards']} shards" if file["shards"] > 1 else ""
    lines = [
        _escaped(file["path"]),
        _row("file", f"{format_size(file['nbytes'])}{shards}, GGUF version {file['version']}, "
                     f"alignment {file['alignment']}, data at {file['data_offset']}"),
    ]  # fmt: skip
    if summary["parameters"]:
        lines.append(_row("parameters", f"{summary['parameters'] / 1e6:.1f} M in {len(summary['tensors'])} tensors"))
        file_type = f"{file['file_type']}, " if file["file_type"] else ""
        lines.append(_row("weights", f"{file_type}{summary['bits_per_weight']:.2f} bits per weight"))
    if model is None:
        return lines
    kv, attention = state["kv_bytes_per_token"], state["attention_layers"]
    lines += [
        _row("architecture", f"{model['architecture']}: {model['n_layer']} layers, {len(attention)} of attention "
                             f"({' '.join(map(str, attention))})"),
        _row("widths", f"embedding {model['n_embd']}, FFN {model['n_ff']}, vocabulary {model['n_vocab']}, "
                       f"convolution {model['l_cache']}"),
        _row("heads", f"{model['n_head']} of {model['n_embd'] // model['n_head']}, "
                      f"KV {max(model['n_head_kv'])}, RoPE base {model['rope_freq_base']:g}"),
        _row("context", f"{model['n_ctx_train']} tokens"),
        _row("KV per token", ", ".join(f"{name} {format_size(n)}" for name, n in kv.items())),
        _row("conv state", f"{format_size(state['conv_state_bytes'])} per sequence"),
    ]  # fmt: skip
    return lines


def _metadata_line(key: str, entry: dict[str, Any]) -> str:
    """`  key  TYPE  value`, the value cut at the width; only long keys are wider."""
    label = f"  {_escaped(key)}"
    if "length" in entry:
        items = entry.get("value", entry.get("first"))
        text = f"{entry['length']} x {entry['type'].removeprefix('ARRAY of ')}: " + " ".join(map(str, items))
    else:
        value = entry["value"]
        text = f"{value:g}" if isinstance(value, float) else str(value)
    text = _escaped(text)
    room = max(16, WIDTH - len(label) - 3)
    if len(text) > room or "first" in entry:
        text = text[: room - 3] + "..."
    return f"{label} = {text}"


def _escaped(text: str) -> str:
    """One line: newlines and control characters as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _tensor_lines(summary: dict[str, Any]) -> list[str]:
    width = min(36, max(len(_escaped(t["name"])) for t in summary["tensors"]))
    return [
        f"  {_escaped(t['name']):<{width}}  {t['type']:<7} {format_size(t['nbytes']):>9}  "
        f"{' x '.join(map(str, t['shape']))}"
        for t in summary["tensors"]
    ]


def _type_lines(summary: dict[str, Any]) -> list[str]:
    total = sum(entry["nbytes"] for entry in summary["types"].values())
    return [
        f"  {name:<7} {entry['tensors']:>5} tensors {entry['elements'] / 1e6:>10.1f} M weights "
        f"{format_size(entry['nbytes']):>10} {100 * entry['nbytes'] / total:>5.1f} %"
        for name, entry in summary["types"].items()
    ]


def _template_lines(template: dict[str, Any]) -> list[str]:
    text_lines = template["text"].splitlines()
    lines = [f"  {len(template['text'])} characters, sha256 {template['sha256'][:16]}"]
    for line in text_lines[:TEMPLATE_LINES]:
        line = _escaped(line)
        lines.append("  | " + (line if len(line) <= WIDTH - 4 else line[: WIDTH - 7] + "..."))
    if len(text_lines) > TEMPLATE_LINES:
        lines.append(f"  | ... {len(text_lines) - TEMPLATE_LINES} more lines (--template shows all)")
    return lines


def _verdict_lines(summary: dict[str, Any]) -> list[str]:
    verdicts = [f"Warning: {warning}" for warning in summary["warnings"]]
    verdicts += [f"Damaged: {found}" for found in summary["non_finite"] or []]
    if summary["non_finite"] == []:
        verdicts.append("Tensors: no NaN, no Inf")
    verdicts.append("Runs: yes" if summary["refused"] is None else f"Runs: no: {summary['refused']}")
    if summary["chat_refused"] is not None:
        verdicts.append(f"Chat: no: {summary['chat_refused']}")
    return [line for text in verdicts for line in textwrap.wrap(_escaped(text), WIDTH, subsequent_indent="  ")]
