"""Read what a user says of a shard set, wherever it is said: one table of words for JSON, YAML and command lines.

These use the same words: vLLM's `--model-loader-extra-config`, the arguments of a Ray Serve application, the options of
commands, and the job of a worker's process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Final, NamedTuple, TypeVar

from ..errors import InputError, quote
from ..stores.store import Access
from .shard import VERIFY
from .shard_set import ShardSet

T = TypeVar("T")


class Word(NamedTuple):
    """What a user's word says of a shard set."""

    field: str
    """Name of a field of ShardSet, or of Access where `of_access` is set."""
    kind: str
    """Type of its values: str, int or bool, perhaps with `| None`."""
    of_access: bool = False
    """Whether the field is one of ShardSet's `access`."""


WORDS: Final[Mapping[str, Word]] = {
    "source": Word("source", "str | None"),
    "uri": Word("source", "str | None"),
    "revision": Word("revision", "str"),
    "manifest_digest": Word("digest", "str | None"),
    "verify": Word("verify", "str"),
    "cache": Word("cache", "str | None"),
    "workers": Word("connections", "int | None"),
    "max_workers": Word("connections", "int | None"),
    "processes": Word("processes", "int"),
    "endpoint_url": Word("endpoint_url", "str | None", of_access=True),
    "profile": Word("profile", "str | None", of_access=True),
    "region": Word("region", "str | None", of_access=True),
    "no_sign_request": Word("anonymous", "bool", of_access=True),
    "anonymous": Word("anonymous", "bool", of_access=True),
}
"""Word -> what it says. Where several words say the same, they are aws's, vLLM's and ours for it."""


def read_set(given: Mapping[str, object], *, what: str = "", from_text: bool = False) -> ShardSet:
    """Read a shard set from words.

    Args:
        given: Word -> value. Words that are not in WORDS are the caller's, and ignored.
        what: What the user said it in, for messages.
        from_text: Values may be text, as on a command line ("4", "true", "none").

    Raises:
        InputError: For a value of another type, or a `verify` that does not exist.
    """
    found: dict[str, Any] = {}
    access: dict[str, Any] = {}
    for name, value in given.items():
        word = WORDS.get(name)
        if word is not None:
            place = access if word.of_access else found
            place[word.field] = read_value(name, word.kind, value, what=what, from_text=from_text)
    if found.get("verify", VERIFY[0]) not in VERIFY:
        raise InputError(
            f"{_prefix(what)}verify is {quote(found['verify'])}; use {', '.join(VERIFY[:-1])} or {VERIFY[-1]}"
        )
    return ShardSet(found.pop("source", None) or "", access=Access(**access), **found)


def read_options(kind: type[T], given: Mapping[str, object], *, what: str = "", from_text: bool = False) -> T:
    """Read a dataclass that has a field `shard_set`, and further fields whose names are words too.

    Args:
        kind: The dataclass.
        given: Word -> value.
        what: What the user said it in, for messages.
        from_text: Values may be text, as on a command line.

    Raises:
        InputError: For a word that is not known, or a value of another type.
    """
    own = {field.name: str(field.type) for field in fields(kind) if field.name != "shard_set"}  # type: ignore[arg-type]
    unknown = sorted(set(given) - set(own) - set(WORDS))
    if unknown:
        known = ", ".join((*WORDS, *own))
        raise InputError(f"{_prefix(what)}{quote(unknown[0])} is not known; shardprep takes {known}")
    values = {
        name: read_value(name, own[name], value, what=what, from_text=from_text)
        for name, value in given.items()
        if name in own
    }
    make: Any = kind
    found: T = make(shard_set=read_set(given, what=what, from_text=from_text), **values)
    return found


def read_value(name: str, kind: str, value: object, *, what: str = "", from_text: bool = False) -> Any:
    """Prove that a value has its type.

    Args:
        name: The word that the user gave it to, for messages.
        kind: The type: str, int, float or bool, perhaps with `| None`.
        value: The value.
        what: What the user said it in, for messages.
        from_text: The value may be text, which is then turned into the type.

    Returns:
        The value, of type `kind`.

    Raises:
        InputError: For a value of another type.
    """
    optional, kind = kind.endswith(" | None"), kind.removesuffix(" | None")
    if from_text and isinstance(value, str):
        value = _from_text(kind, value, optional=optional)
    kinds: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
    }
    if value is None and optional:
        return None
    if isinstance(value, kinds[kind]) and (kind == "bool" or not isinstance(value, bool)):
        return value
    raise InputError(
        f"{_prefix(what)}{name} is {quote(value)}, expected {kind}{' or null' if optional else ''}"
    )


def _from_text(kind: str, text: str, *, optional: bool) -> object:
    """The value that a text says; the text itself where it does not say a value of this kind."""
    if optional and text in ("", "none", "null"):
        return None
    if kind == "bool":
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return int(text) if kind == "int" else float(text) if kind == "float" else text
    except ValueError:
        return text


def words_of(shard_set: ShardSet) -> dict[str, Any]:
    """Write a shard set in words that `read_set` reads, with values that JSON has.

    `io` and the time limits of `access` have no word, and are left out.
    """
    said = asdict(shard_set)
    return {name: (said["access"] if word.of_access else said)[word.field] for name, word in WORDS.items()}


def _prefix(what: str) -> str:
    return f"{what}: " if what else ""
