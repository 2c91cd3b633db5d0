"""Send the small requests of S3 through botocore's client, retried: it finds the endpoint and the credentials and signs.

Small are head, list, delete and the steps of a multipart upload. What moves the bytes of ranges and parts, a `Mover`,
stands on the same client.
"""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import quote as percent
from urllib.parse import urlsplit

from ..errors import DeniedError, InputError, MissingError, StoreError, quote
from .connection import Reply
from .retry import Patience, Transient
from .s3_answers import ANSWERED, Expired, not_s3, refusal
from .store import Access, Body, Sink, Stat, where

UNREACHED: Final = 20.0
"""Seconds for which a store that has not answered yet is tried."""

IDLE_CONNECTIONS: Final = 128
"""Connections that are kept for the next request."""

T = TypeVar("T")


class Mover(Protocol):
    """What moves the data of one store."""

    def get(self, key: str, start: int, sink: Sink, *, version: str | None) -> str:
        """One try of `Store.get`.

        Args:
            key: As there, like the others.
            start: First byte.
            sink: Where the bytes go.
            version: Version that the object must have; None: any.

        Raises:
            Transient: For what may pass.
            Broken: Where the connection failed, with the version that the bytes are of which came.
        """

    def put(self, key: str, query: Mapping[str, str], body: Body, headers: Mapping[str, str]) -> Reply:
        """One try of a PUT.

        Args:
            key: Key of the object, without the store's prefix.
            query: Number of the part and id of its upload; empty for a whole object.
            body: What is sent.
            headers: Checksums.

        Raises:
            Transient: For what may pass.
        """

    def close(self) -> None:
        """Close connections."""


class S3Client:
    """Requests on a bucket, under a prefix. Keys are given without the prefix."""

    def __init__(self, bucket: str, prefix: str, access: Access) -> None:
        self.bucket, self.access = bucket, access
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._lock = threading.Lock()
        self._renewal = threading.Lock()
        self._connecting = threading.RLock()
        self._connected: tuple[Any, Any] | None = None
        self._credentials: Any = None
        self._reached = False

    def _connect(self) -> tuple[Any, Any]:
        """botocore's session and client, made when first needed: a worker whose cache has everything needs neither."""
        with self._connecting:
            if self._connected is None:
                self._connected = _connect(self.access)
            return self._connected

    @property
    def session(self) -> Any:
        """botocore's session of the user."""
        return self._connect()[0]

    @property
    def boto(self) -> Any:
        """botocore's client of S3."""
        return self._connect()[1]

    def close(self) -> None:
        """Close botocore's connections."""
        with self._connecting:
            if self._connected is not None:
                self._connected[1].close()

    def credentials(self) -> Any:
        """The user's credentials as they are now; None where requests are anonymous.

        Raises:
            DeniedError: Where there are none.
        """
        if self.access.anonymous:
            return None
        with self._lock:
            if self._credentials is None:
                self._credentials = _resolve(self.session.get_credentials)
                if self._credentials is None:
                    raise DeniedError(
                        f"{quote(self.uri)}: no credentials were found; set AWS_ACCESS_KEY_ID and "
                        "AWS_SECRET_ACCESS_KEY, choose a profile, or ask without any (--no-sign-request)"
                    )
        return _resolve(self._credentials.get_frozen_credentials)

    def renew(self, used: Any) -> bool:
        """Have other credentials than those `used`, which have expired; whether there are any.

        They are resolved anew unless another thread, to which the same has happened, has done so.
        """
        if used is None:
            return False
        with self._renewal:
            found = self.credentials()
            if (found.access_key, found.token) == (used.access_key, used.token):
                connected = _connect(self.access)
                with self._lock:
                    self._connected, self._credentials = connected, None
                found = self.credentials()
        return (found.access_key, found.token) != (used.access_key, used.token)

    def path_of(self, key: str) -> str:
        """The key as it stands in a URL."""
        return percent(self.prefix + key, safe="/-_.~")

    @property
    def _deadline(self) -> float:
        """A store that never answered is more likely misspelt than overloaded."""
        return self.access.deadline if self._reached else min(self.access.deadline, UNREACHED)

    def persist(self, key: str, work: Callable[[Patience], T]) -> T:
        """Do some work until it succeeds, fails for good, or the deadline passes without progress.

        Args:
            key: The object, for messages.
            work: One try. Raises Transient for what may pass, Expired for credentials that have.
        """
        patience = Patience(self._deadline)
        used, renewed = None, False
        while True:
            try:
                used = self.credentials()
                found = work(patience)
                self._reached = True
                return found
            except Transient as error:
                patience.deadline = self._deadline
                patience.pause(error, where=where(self, key))
            except Expired as error:
                # another process may have renewed what we read at the start: look once
                try:
                    found_others = not renewed and self.renew(used)
                except Transient as failed:
                    patience.pause(failed, where=where(self, key))
                    continue
                if not found_others:
                    raise DeniedError(
                        f"{where(self, key)}: the credentials have expired; renew them and run again",
                        status=error.status,
                        code=error.code,
                    ) from error
                renewed = True

    def call(self, key: str, name: str, **params: Any) -> Any:
        """Ask for one of botocore's operations on this bucket, retried.

        Args:
            key: The object, for messages.
            name: The operation, as botocore's method is called.
            params: What it is given beside the bucket, as botocore names it.

        Returns:
            What botocore made of the answer.
        """
        return self.persist(key, lambda _: self.call_once(key, name, **params))

    def call_once(self, key: str, name: str, **params: Any) -> Any:
        """Ask once, as `call` does until it is answered.

        Args:
            key: As `call`'s, like the others.
            name: The operation.
            params: What it is given.

        Raises:
            Transient: For what may pass.
            Expired: For credentials that have expired.
            StoreError: For what will not pass.
        """
        from botocore import exceptions
        from botocore.parsers import ResponseParserError

        self.credentials()  # says in our words where there are none
        try:
            found = _guard(lambda: getattr(self.boto, name)(Bucket=self.bucket, **params))
        except exceptions.ClientError as error:
            meta = error.response.get("ResponseMetadata", {})
            about = error.response.get("Error", {})
            raise self.refusal(
                key,
                int(meta.get("HTTPStatusCode", 0)),
                str(about.get("Code", "")),
                str(about.get("Message", "")),
                meta.get("HTTPHeaders", {}),
            ) from None
        except exceptions.SSLError as error:
            if not _is_untrusted(error):  # it may have broken off
                raise Transient(f"{quote(self.host)}: no secure connection") from None
            raise StoreError(
                f"{quote(self.host)}: its certificate is not trusted; AWS_CA_BUNDLE names the file of those that are"
            ) from None
        except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
            raise Transient(f"{quote(self.host)}: {type(error).__name__}") from None
        except ResponseParserError:
            raise not_s3(self.host) from None
        if not ANSWERED.get(name, {"ResponseMetadata"}) & found.keys():
            raise not_s3(self.host)
        return found

    @property
    def host(self) -> str:
        """Where requests go, without credentials."""
        return str(urlsplit(self.boto.meta.endpoint_url).netloc).rpartition("@")[2]

    def refusal(
        self, key: str, status: int, code: str, message: str, headers: Mapping[str, str]
    ) -> Exception:
        """What an answer that does not say success means, as `s3_answers.refusal` has it.

        Args:
            key: Key of the object, without the store's prefix.
            status: As there, like the others.
            code: The store's name of the error.
            message: What the store says of it.
            headers: Headers of the answer.
        """
        if "x-amz-request-id" in headers:
            self._reached = True
        region = self.boto.meta.region_name
        return refusal(where(self, key), status, code, message, headers, host=self.host, region=region)

    def example(self) -> str:
        """The URL of the object `k`, made by botocore without asking for credentials."""
        from botocore.handlers import disable_signing

        chosen = "choose-signer.s3.GetObject"
        with self._connecting:  # nobody else's request goes out unsigned meanwhile
            self.boto.meta.events.register(chosen, disable_signing)
            try:
                return str(
                    self.boto.generate_presigned_url("get_object", {"Bucket": self.bucket, "Key": "k"})
                )
            finally:
                self.boto.meta.events.unregister(chosen, disable_signing)

    def head(self, key: str) -> Stat | None:
        """As `Store.head`."""

        def once(_: Patience) -> Any:
            try:
                return self.call_once(key, "head_object", Key=self.prefix + key)
            except MissingError:
                raise
            except StoreError:
                # the answer to a HEAD has no body that says why: have it said
                self.call_once(key, "get_object", Key=self.prefix + key, Range="bytes=0-0")["Body"].close()
                raise

        try:
            found = self.persist(key, once)
        except MissingError:
            return None
        return Stat(key, found["ContentLength"], found["ETag"], found["LastModified"].timestamp())


def _connect(access: Access) -> tuple[Any, Any]:
    """A botocore session and its client of S3, from what the user gave and has set up."""
    try:
        import botocore.session
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError:
        raise InputError("s3:// needs botocore: pip install 'shardprep[s3]'") from None
    config = Config(
        retries={"total_max_attempts": 1},  # `persist` retries, under one deadline for all
        connect_timeout=access.connect_timeout,
        read_timeout=access.idle_timeout,
        max_pool_connections=IDLE_CONNECTIONS,
        # many stores know no checksum headers or answer a range with those of the whole object
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        signature_version=UNSIGNED if access.anonymous else None,
    )
    session = _guard(lambda: botocore.session.Session(profile=access.profile))
    client = _guard(
        lambda: session.create_client(
            "s3", region_name=access.region or None, endpoint_url=access.endpoint_url, config=config
        )
    )
    if client.meta.region_name in (None, "aws-global") and not access.anonymous:
        client = _guard(
            lambda: session.create_client(
                "s3", region_name="us-east-1", endpoint_url=access.endpoint_url, config=config
            )
        )
    client.meta.events.register("before-call.s3", _stay)
    return session, client


def _stay(params: dict[str, Any], **_: Any) -> None:
    """Have botocore report a wrong region instead of asking around for the right one, which our data would not follow.

    (Where everything is answered by 307, it asks until Python's stack is full.)
    """
    params["context"].setdefault("s3_redirect", {})["redirected"] = True


def _guard(call: Callable[[], Any]) -> Any:
    """Call into botocore, with what it finds wrong in the user's settings in our words."""
    from botocore import exceptions

    try:
        return call()
    except (exceptions.ClientError, exceptions.HTTPClientError, exceptions.ConnectionError):
        raise
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise DeniedError(f"credentials: {quote(error)}") from None
    except (
        exceptions.SSOError,
        exceptions.CredentialRetrievalError,
        exceptions.MetadataRetrievalError,
    ) as error:
        raise DeniedError(f"credentials could not be had: {quote(error)}; log in again?") from None
    except exceptions.BotoCoreError as error:
        raise InputError(f"S3 settings: {_bare(error)}") from None
    except ValueError as error:  # an endpoint that is not a URL
        raise InputError(f"S3 settings: {_bare(error)}") from None


def _is_untrusted(error: BaseException | None) -> bool:
    """Whether a certificate that is not trusted is why a connection failed.

    Args:
        error: What botocore raised; what it was raised from is looked at too.

    Returns:
        Whether one of them is the standard library's error for it.
    """
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _resolve(call: Callable[[], Any]) -> Any:
    """Have botocore find credentials, for which it may ask others. Raises DeniedError, or Transient for what may pass."""
    from botocore import exceptions

    try:
        return _guard(call)
    except exceptions.ClientError as error:
        raise DeniedError(f"credentials could not be had: {quote(error)}") from None
    except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
        raise Transient(f"credentials could not be had: {type(error).__name__}") from None


def _bare(error: BaseException) -> str:
    """What an error says, without the user and password that an endpoint may have."""
    return quote(re.sub(r"\S*@", "", str(error)))
