"""Say things that only who has the secret can say, over a store that anybody may write to: torch's TCPStore.

Each message is JSON with an HMAC-SHA256 by the secret that both sides share, over its place, the other side's nonce and
the text; nothing is unpickled. What is served and connected to here is the store, which asks nobody who he is.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from ..errors import InputError, WorkerError, quote

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, TCPStore

MAX_MESSAGE: Final = 64 * 2**10
"""Bytes of one message; what is longer is not parsed."""

PATIENCE: Final = 60.0
"""Seconds in which who has begun to say something must have said it."""

STORE_TIMEOUT: Final = 15.0
"""Seconds for which a worker waits for a store that has gone, before it believes it."""

LEAST_SECRET: Final = 16
"""Characters of a secret: whoever reaches the store can try to guess it."""

PAUSE: Final = 0.02
"""Seconds between two looks at the store (each takes 10 microseconds)."""


# ------------------------------------------------------------------------------------------------------- the messages
def seal(secret: str, place: str, nonce: str, said: Mapping[str, object]) -> str:
    """Make a message that only who has the secret can make.

    Args:
        secret: What workers and front end share.
        place: Where it is put: it is of no value anywhere else.
        nonce: The receiver's, who takes it once.
        said: What JSON can say.
    """
    text = json.dumps(said, separators=(",", ":"))
    return json.dumps({"text": text, "hmac": _hmac(secret, place, nonce, text)})


def unseal(secret: str, place: str, nonce: str, raw: bytes) -> dict[str, Any]:
    """Read what was sealed for this place and nonce.

    Args:
        secret: What workers and front end share.
        place: Where it was found.
        nonce: This receiver's.
        raw: What was found there, from whoever wrote it.

    Raises:
        InputError: For anything else, and where the secret is another one.
    """
    if len(raw) > MAX_MESSAGE:
        raise InputError(f"a message of {len(raw):,} bytes; expected at most {MAX_MESSAGE:,}")
    try:
        sealed = json.loads(raw)
        text, found = sealed["text"], sealed["hmac"]
        if not isinstance(text, str) or not isinstance(found, str):
            raise TypeError
        expected = _hmac(secret, place, nonce, text)  # no text of ours has what cannot be encoded
        is_ours = hmac.compare_digest(found.encode(), expected.encode())
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError("a message that no shardprep made; look whether versions are the same") from None
    if not is_ours:
        raise InputError("the secret is another one; set SHARDPREP_SECRET to the same text on all hosts")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise InputError("a message that no shardprep made; look whether versions are the same")
    return said


def _hmac(secret: str, place: str, nonce: str, text: str) -> str:
    said = "\0".join(("shardprep 1", place, nonce, text))
    return hmac.new(secret.encode(), said.encode(), hashlib.sha256).hexdigest()


def text_of(said: Mapping[str, Any], name: str) -> str:
    value = said.get(name)
    if not isinstance(value, str):
        raise InputError(f"a message whose {name} is not a text; look whether versions are the same")
    return value


def number_of(said: Mapping[str, Any], name: str) -> int:
    value = said.get(name)
    if type(value) is not int or not 0 <= value < 2**63:
        raise InputError(f"a message whose {name} is not a number; look whether versions are the same")
    return value


def pair_of(value: object, name: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(each) is int for each in value):
        raise InputError(f"a message whose {name} are not layers; look whether versions are the same")
    return value[0], value[1]


# ---------------------------------------------------------------------------------------------------------- the secret
def check_secret(secret: str) -> str:
    """`secret` if it is long enough. Raises InputError."""
    if len(secret) < LEAST_SECRET:
        raise InputError(
            f"the secret has {len(secret)} characters, expected at least {LEAST_SECRET}; set SHARDPREP_SECRET to the "
            "same random text on all hosts, for example what `openssl rand -hex 32` prints"
        )
    return secret


def new_secret() -> str:
    """A secret for a front end and the workers that it starts itself."""
    return secrets.token_hex(32)


# ----------------------------------------------------------------------------------------------------------- the store
def serve_store(address: str, listener: socket.socket) -> TCPStore:
    """Serve a store.

    Args:
        address: Where the socket listens.
        listener: A socket that listens already; the store takes it.
    """
    import torch.distributed

    distributed: Any = torch.distributed  # its types say little of this part
    port = listener.getsockname()[1]
    found: TCPStore = distributed.TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=PATIENCE),
        master_listen_fd=listener.detach(),
    )
    return found


def connect(host: str, port: int, deadline: float) -> TCPStore:
    """Connect to a store, once it is served. torch's own waiting fills the log with stacks, and knows no end in time.

    Args:
        host: Name or address of the front end.
        port: Its port.
        deadline: When to give up, as time.monotonic() has it.

    Raises:
        WorkerError: Where nobody answers in time.
    """
    import torch.distributed

    distributed: Any = torch.distributed
    pause = 0.05
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(0.1, min(left, 10.0))).close()
            found: TCPStore = distributed.TCPStore(
                host,
                port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=max(1.0, min(left, STORE_TIMEOUT))),
            )
            found.set_timeout(timedelta(seconds=STORE_TIMEOUT))
            return found
        except (OSError, RuntimeError) as error:
            if left <= pause:
                why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
                raise WorkerError(
                    f"no front end answers at {quote(host)}:{port} ({why}); start `shardprep serve` there, or look "
                    "whether --master is its address and nothing in between blocks the port"
                ) from None
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)


def wait_for(store: Store, key: str, timeout: float) -> bytes | None:
    """Wait for something to be at a key.

    Args:
        timeout: Seconds.

    Returns:
        What is there; None where nothing came in time.
    """
    deadline = time.monotonic() + timeout
    while not store.check([key]):
        if time.monotonic() > deadline:
            return None
        time.sleep(PAUSE)
    found: bytes = store.get(key)
    return found


def first_line(error: BaseException) -> str:
    """What an error of torch says, without the place in torch before it, and the advice and the stack behind it."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return quote(re.sub(r"^\[[^]]*\] *", "", line).partition(". ")[0])
