"""shardprep run"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from shardprep_runtime.errors import InputError, quote

from . import parse, render
from .launching import ENDED, Split, ended_by_sigterm, open_generator, split_options, tell_start

if TYPE_CHECKING:
    from shardprep_runtime.workers.text.generate import Completion, Generator

    _TokensType = click.ParamType[tuple[int, ...]]
else:  # only the newest clicks let the class be subscripted when it runs
    _TokensType = click.ParamType


class Tokens(_TokensType):
    """Ids of tokens: 1,2,3."""

    name = "ids"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = value.split(",")
        if not all(word.strip().isdecimal() and len(word) < 12 for word in words):
            self.fail(f"{value!r} is not a list of token ids; write 1,2,3", param, ctx)
        return tuple(map(int, words))


@click.command("run")
@split_options
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="Text to go on with; may be given several times.",
)
@click.option(
    "--prompt-file",
    "prompt_files",
    multiple=True,
    type=click.File(encoding="utf-8"),
    help="A file with one prompt, all of it; - for stdin.",
)
@click.option(
    "--tokens",
    "token_lists",
    multiple=True,
    type=Tokens(),
    help="A prompt as ids of tokens, 1,2,3; ids come out too.",
)
@click.option(
    "--chat", is_flag=True, help="Prompts are a user's messages, put into the model's chat template."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 10**6),
    default=64,
    show_default=True,
    help="Tokens for each prompt.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    default=0.0,
    show_default=True,
    help="0: always the likeliest token.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Share of likelihood to draw from.",
)
@click.option(
    "--top-k", type=click.IntRange(0), default=0, show_default=True, help="Tokens to draw from; 0: all."
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), help="Seed of the sampling.  [default: another each time]"
)
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="Text that ends an answer; may be given several times."
)
@click.option("--ignore-eos", is_flag=True, help="Go on after the model has ended a text.")
@click.option("--breakdown", is_flag=True, help="Print on stderr where the time of a token went.")
@parse.json_option
def command(
    split: Split,
    prompts: tuple[str, ...],
    prompt_files: tuple[Any, ...],
    token_lists: tuple[tuple[int, ...], ...],
    chat: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    stop: tuple[str, ...],
    ignore_eos: bool,
    breakdown: bool,
    as_json: bool,
) -> None:
    """Run the model of the shard set SOURCE (a folder, or s3://bucket/prefix) on workers of this host, and print text.

    Each worker is a process that fetches, verifies and holds its own stage alone. When one is lost, a spare takes its
    place, else a new process, else this one. The text comes out the same.

    \b
        shardprep run s3://bucket/llama --stages 2 --spares 1 --prompt "Once upon a time"

    The text goes to stdout as it comes; stderr tells what happens meanwhile.
    """
    given: list[str | tuple[int, ...]] = [*prompts, *(file.read() for file in prompt_files), *token_lists]
    if not given:
        raise click.UsageError("Missing option '--prompt' (or --prompt-file, or --tokens).")
    if token_lists and chat:
        raise click.UsageError(
            "--chat puts texts into the model's template; give --prompt instead of --tokens"
        )
    from shardprep_runtime.workers.text.sampling import Sampling

    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    with ended_by_sigterm(ENDED), open_generator(split) as generator:
        pipeline = generator.pipeline
        tell_start(pipeline)
        began = time.perf_counter()
        encoded = encode(generator, given, chat=chat)
        said = None if as_json else Printer([isinstance(each, tuple) for each in given], given)
        completions = complete(generator, encoded, sampling, said)
        seconds = time.perf_counter() - began
        report = {
            "source": split.shard_set.source,
            "manifest_digest": pipeline.manifest_digest,
            "transport": pipeline.transport.name,
            "seconds": seconds,
            "completions": [
                {"prompt": prompt, **_plain(found, breakdown=breakdown)}
                for prompt, found in zip(given, completions, strict=True)
            ],
            "workers": pipeline.workers(),
            "events": pipeline.events,
            "counters": pipeline.counters,
        }
    trips, tokens = sum(each.trips for each in completions), sum(len(each.tokens) for each in completions)
    click.echo(f"{tokens} tokens in {trips} trips through the stages, {seconds:.2f} s", err=True)
    if breakdown:
        from shardprep_runtime.workers.text.breakdown import table

        click.echo(table([trip for each in completions for trip in each.breakdowns]), err=True, nl=False)
    if as_json:
        render.print_json(report)


def _plain(completion: Completion, *, breakdown: bool) -> dict[str, Any]:
    found: dict[str, Any] = render.plain(completion)
    if not breakdown:
        del found["breakdowns"]
    return found


def encode(generator: Generator, prompts: Sequence[str | tuple[int, ...]], *, chat: bool) -> list[list[int]]:
    """Turn prompts into ids of tokens.

    Args:
        prompts: Texts, or ids of tokens.
        chat: Put each text into the model's chat template, as a user's message.

    Raises:
        InputError: Where the model has no tokenizer, or no chat template.
    """
    if generator.tokenizer is None and any(isinstance(each, str) for each in prompts):
        raise InputError("this shard set has no tokenizer; give --tokens 1,2,3 instead of text")
    if chat:
        from shardprep_runtime.workers.http.app import chat_tokens

        return [chat_tokens(generator.tokenizer, [{"role": "user", "content": each}]) for each in prompts]
    return [generator.encode(each) for each in prompts]


class Printer:
    """Prints texts on stdout, one after the other. Where there are several, a line before each names it."""

    def __init__(self, are_ids: Sequence[bool], prompts: Sequence[str | tuple[int, ...]]) -> None:
        self._are_ids, self._prompts = are_ids, prompts
        self._has_begun = False

    def begin(self, index: int) -> None:
        self._has_begun = False
        if len(self._prompts) > 1:
            prompt = self._prompts[index]
            shown = quote(prompt if isinstance(prompt, str) else ",".join(map(str, prompt)), limit=60)
            click.echo(f"{'' if index == 0 else chr(10)}==> {shown} <==")

    def say(self, index: int, token: int, text: str) -> None:
        if self._are_ids[index]:
            text = f"{',' if self._has_begun else ''}{token}"
        self._has_begun = True
        click.echo(text, nl=False)

    def end(self) -> None:
        click.echo()


def complete(
    generator: Generator, prompts: Sequence[Sequence[int]], sampling: Any, said: Printer | None
) -> list[Completion]:
    """Complete all prompts at once. The first text is printed as it comes, the others after it, in order.

    Args:
        prompts: Ids of tokens of each prompt.
        sampling: How tokens are chosen.
        said: Prints the texts; None: nothing is printed.
    """
    from shardprep_runtime.workers.text.generate import completion_of

    completions = []
    with generator.together(prompts, sampling) as streams:
        for index, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
            if said is not None:
                said.begin(index)
            tokens = []
            for token in stream:
                tokens.append(token)
                if said is not None:
                    said.say(index, token.id, token.text)
            if said is not None:
                said.end()
            completions.append(completion_of(tokens, len(prompt)))
    return completions
