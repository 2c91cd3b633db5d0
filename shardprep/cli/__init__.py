"""The command line: each command parses, calls one library function and renders its dataclass."""

from __future__ import annotations

import errno
from importlib import import_module
from typing import Any

import click

from shardprep_runtime import ShardprepError, __version__
from shardprep_runtime.errors import ProblemError, quote

COMMANDS = {
    "inspect": "Show what a checkpoint or a shard set holds.",
    "plan": "Say whether a model fits given devices, and how it is best divided.",
    "convert": "Turn a checkpoint into safetensors, without running its pickle.",
    "quantize": "Bring a checkpoint to 4 bits by GPTQ or AWQ, and measure what that costs.",
    "split": "Cut a checkpoint into a shard set for tensor x pipeline parallel workers.",
    "check-arch": "Prove by running it that an architecture's layout rules are right.",
    "push": "Put a shard set into a store; only what is missing there is sent.",
    "revisions": "List the revisions in a store.",
    "prune": "Remove from a store what no revision needs.",
    "pull": "Bring a shard set, or one rank's share of it, from a store.",
    "run": "Run a model that is split over workers of this host, and print what it says.",
    "serve": "Serve a model that is split over workers, with OpenAI's HTTP interface.",
    "worker": "Hold one stage of a model for a front end on another host.",
    "vllm": "Serve a shard set with vLLM: each rank loads its own share alone.",
    "verify": "Check a shard set, every byte of it.",
    "export": "Restore the checkpoint from a shard set, bit for bit.",
}
"""Name -> one line of help, so that --help imports no command."""


class Refused(click.ClickException):
    """Refused input, which click reports without a traceback."""

    exit_code = 2


class Problem(click.ClickException):
    """A reported problem."""

    exit_code = 1


class LazyGroup(click.Group):
    """A group that imports a command when it is run, and turns our errors into click's in one place."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"shardprep.cli.{cmd_name.replace('-', '_')}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command as click does, with its hint about similar names: click looks for those in `commands` alone.

        Args:
            ctx: click's context of the group.
            args: The words of the command line, the command's name first.
        """
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(args[0], COMMANDS)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:  # click leaves some of the user's words unquoted
            if error.message.replace("\n\t", "").isprintable():
                raise
            raise click.UsageError(quote(error.message), ctx=error.ctx) from None
        except ProblemError as error:
            raise Problem(str(error)) from None
        except ShardprepError as error:
            raise Refused(str(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader of our output has gone: click ends in silence
            name = f"{quote(error.filename)}: " if error.filename is not None else ""
            raise Problem(f"{name}{error.strerror}") from None


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
def main() -> None:
    """Get model weights from wherever they lie to the workers that run them."""
