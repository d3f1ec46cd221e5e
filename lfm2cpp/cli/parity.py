"""`lfm2cpp parity`: compare with Hugging Face, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lfm2cpp.errors import CheckFailed


class TokenIds(click.ParamType):
    """`1,2,3`"""

    name = "IDS"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            return [int(item) for item in value.split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of token ids like 1,2,3", param, ctx)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("hf_dir", type=click.Path(path_type=Path))
@click.option("-m", "--model", type=click.Path(path_type=Path), metavar="GGUF",
              help="The file to check; without it the checkpoint is converted to F32.")
@click.option("-p", "--prompt", help="Text to evaluate, tokenized by the checkpoint's tokenizer.")
@click.option("--ids", type=TokenIds(), help="Token ids to evaluate instead of a text.")
@click.option("--decode", "n_decode", type=click.IntRange(0), default=8, show_default=True,
              help="Tokens to generate after the prompt, one by one.")
@click.option("--kv-type", type=click.Choice(["f32", "f16"]), default="f32", show_default=True,
              help="How our KV cache is stored during the check.")
@click.option("-t", "--threads", type=click.IntRange(1), help="Threads of our side.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
@click.option("-v", "--verbose", is_flag=True, help="A line for every intermediate, not for the worst of a layer.")
def parity(
    hf_dir: Path, model: Path | None, prompt: str | None, ids: list[int] | None, n_decode: int, kv_type: str,
    threads: int | None, as_json: bool, verbose: bool,
) -> None:  # fmt: skip
    """Run transformers in float32 and lfm2cpp on the same tokens, prefill and then token by token, and compare every
    intermediate of every layer, the logits and the greedy continuation.

    HF_DIR is a checkpoint directory. Exit 0: they agree. Exit 3: they do not, and the first layer that diverges is
    named. Needs torch and transformers: pip install "lfm2cpp[parity]".
    """
    from lfm2cpp.parity.report import table
    from lfm2cpp.parity.run import Request, check_parity

    if prompt is not None and ids is not None:
        raise click.UsageError("give --prompt or --ids, not both")
    request = Request(hf_dir, model, prompt, ids, n_decode, kv_type, threads)
    report = check_parity(request, progress=lambda text: click.echo(text, err=True))
    click.echo(json.dumps(report.to_json(), indent=1) if as_json else table(report, verbose=verbose))
    if not report.ok:
        raise CheckFailed(report.failure() or "")
    if not as_json:
        click.echo(f"parity: ok ({report.mode})")
