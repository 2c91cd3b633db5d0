"""shardprep serve"""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from shardprep_runtime import environment
from shardprep_runtime.errors import InputError, quote

from . import parse
from .launching import Split, ended_by_sigterm, open_generator, split_options, tell, tell_start


@click.command("serve")
@split_options
@click.option(
    "--workers",
    "start_workers",  # `workers` is a word of shard sets
    type=click.Choice(["here", "elsewhere"]),
    default="here",
    show_default=True,
    help="Start the workers on this host, or wait for workers that `shardprep worker` starts on others.",
)
@click.option(
    "--master",
    metavar="HOST:PORT",
    help="Address at which workers from elsewhere find this front end.  [default: this host's private address, a free "
    "port]",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve HTTP at.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any port that is free."
)
@click.option("--allow-public", is_flag=True, help="Serve at addresses that the Internet may reach, too.")
@click.option(
    "--model", metavar="NAME", help="Name of the model in requests.  [default: the last word of SOURCE]"
)
@click.option(
    "--api-key",
    metavar="KEY",
    help="Key that requests to /v1 must send. Other users of this host can see it here.  [default: SHARDPREP_API_KEY]",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(0, 2**20),
    default=64,
    show_default=True,
    help="Sequences that may wait for their turn; more are refused with 429.",
)
@click.option(
    "--grace",
    type=parse.Duration(),
    default="30s",
    show_default=True,
    help="Time that requests get to end after a SIGTERM.",
)
def command(
    split: Split,
    start_workers: str,
    master: str | None,
    host: str,
    port: int,
    allow_public: bool,
    model: str | None,
    api_key: str | None,
    max_waiting: int,
    grace: float,
) -> None:
    """Serve the model of the shard set SOURCE with OpenAI's HTTP interface, on workers that hold a stage each.

    It serves /v1/completions, /v1/chat/completions and /v1/models. /health computes a forward in every stage, and /metrics
    is for Prometheus. /control needs the secret of the environment's SHARDPREP_SECRET, as do workers on other hosts:

    \b
        export SHARDPREP_SECRET=...
        shardprep serve s3://bucket/llama --stages 2 --workers elsewhere --master 10.0.0.1:29400
        shardprep worker --manifest s3://bucket/llama --pp-rank 1 --master 10.0.0.1:29400

    After a SIGTERM it finishes the requests that have been begun, and ends.
    """
    if master is not None and start_workers == "here":
        raise click.UsageError("--master is where workers from elsewhere come; add --workers elsewhere")
    from shardprep_runtime.workers.addresses import parse_address
    from shardprep_runtime.workers.http.app import build_app, check_installed
    from shardprep_runtime.workers.kinds import KINDS
    from shardprep_runtime.workers.launchers.elsewhere import Elsewhere
    from shardprep_runtime.workers.sealed import check_secret

    if start_workers == "elsewhere" and split.transport not in KINDS:
        raise click.UsageError(
            f"--transport {split.transport} has no workers from elsewhere; use {' or '.join(KINDS)}"
        )

    check_installed()
    secret = environment.secret()
    if secret is not None:
        check_secret(secret)
    elsewhere: Elsewhere | None = None
    if start_workers == "elsewhere":
        elsewhere = Elsewhere(transport=KINDS[split.transport], allow_public=allow_public)
        if master is not None:
            host_of_workers, port_of_workers = parse_address(master)
            elsewhere = replace(elsewhere, host=host_of_workers, port=port_of_workers)
    name = model or Path(split.shard_set.source.rstrip("/")).name
    with ended_by_sigterm(0), suppress(KeyboardInterrupt), ExitStack() as stack:
        # first, so that a port in use is refused before anything is started
        listener = stack.enter_context(bind(host, port, allow_public=allow_public))
        generator = stack.enter_context(open_generator(split, elsewhere))
        tell_start(generator.pipeline)
        app = build_app(
            generator,
            model=name,
            secret=secret,
            api_key=api_key or environment.api_key(),
            max_waiting=max_waiting,
        )
        serve(app, listener, name, grace)


def bind(host: str, port: int, *, allow_public: bool) -> socket.socket:
    """Bind a socket, which does not listen yet.

    Args:
        host: Address of this machine.
        port: 0: any port that is free.
        allow_public: Let the address be one that the Internet may reach.

    Raises:
        InputError: Where the address is public or in use.
    """
    from shardprep_runtime.workers.addresses import check_host

    family, address = check_host(host, allow_public=allow_public)
    found = socket.socket(family)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((address, port))
    except OSError as error:
        found.close()
        raise InputError(
            f"{quote(host)}:{port}: nothing can be served there: {error.strerror}; use an address of this machine and "
            "--port that is free (0: any)"
        ) from None
    return found


def serve(app: Any, listener: socket.socket, name: str, grace: float) -> None:
    """Serve until a signal comes.

    Args:
        app: The ASGI application.
        listener: A bound socket.
        name: Name of the model, for the line that says where it is served.
        grace: Seconds that requests get to end after the signal.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    listener.listen(2048)  # before the address is printed, so that nobody who reads it is refused
    host, port = listener.getsockname()[:2]
    tell(f"{quote(name)} is served at http://{f'[{host}]' if ':' in host else host}:{port}")
    # uvicorn raises the signals that it caught again when it has ended, so that our caller gets them
    uvicorn.Server(config).run([listener])
