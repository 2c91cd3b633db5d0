"""The server for tests: a process of its own, which is told its faults and asked for its counts."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and localhost, and its key, made by the openssl command."""
    certificate, key = folder / "server.crt", folder / "server.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return certificate, key


class S3Server:
    """The server as a process of its own, which ends with this one at the latest."""

    def __init__(
        self,
        root: Path,
        *,
        tls: bool = False,
        access_key: str = "test-access-key",
        secret_key: str = "test-secret-key",
        session_token: str | None = None,
        region: str = "us-east-1",
        workers: int = 1,
        checksums: bool = True,
        anonymous_read: bool = False,
        min_part_size: int = 5 * 2**20,
        clock_offset: float = 0.0,
        port: int = 0,
    ) -> None:
        self.root, self.tls, self.region = Path(root).absolute(), tls, region
        self.access_key, self.secret_key, self.session_token = access_key, secret_key, session_token
        self.endpoint, self.control = "", ""
        self.certificate: Path | None = None
        self._options = [f"--workers={workers}", f"--min-part-size={min_part_size}", f"--port={port}"]
        self._options += [f"--clock-offset={clock_offset}"]
        self._options += [] if checksums else ["--no-checksums"]
        self._options += ["--anonymous-read"] if anonymous_read else []
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", __package__, "--root", str(self.root), "--until-stdin-closes"]
        command += [f"--access-key={self.access_key}", f"--secret-key={self.secret_key}"]
        command += [f"--region={self.region}"]
        command += [f"--session-token={self.session_token}"] if self.session_token else []
        command += self._options
        with contextlib.ExitStack() as stack:
            if self.tls:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="s3server-"))
                self.certificate, key = make_certificate(Path(folder))
                command += [f"--tls-cert={self.certificate}", f"--tls-key={key}"]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
            )
            stack.callback(self._end)
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError("the S3 server did not start; what it said is on stderr")
            self.endpoint, self.control = json.loads(line)["endpoint"], json.loads(line)["control"]
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def environment(self) -> dict[str, str]:
        """What a client's environment must have to use this server and nothing else."""
        found = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        found |= {"AWS_SESSION_TOKEN": self.session_token} if self.session_token else {}
        return found | ({"AWS_CA_BUNDLE": str(self.certificate)} if self.certificate else {})

    def _ask(self, method: str, path: str, value: object = None) -> Any:
        connection = http.client.HTTPConnection(self.control.removeprefix("http://"), timeout=10)
        try:
            connection.request(method, path, None if value is None else json.dumps(value))
            response = connection.getresponse()
            found = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(found["error"])
        return found

    def fault(
        self,
        mode: str,
        *,
        times: int = 1,
        skip: int = 0,
        method: str | None = None,
        match: str = "",
        min_bytes: int = 0,
        **how: Any,
    ) -> None:
        """Give the next `times` matching requests this fault (0: all), leaving out the first `skip` of them.

        `how`: code, name, location, region (status), after (reset, truncate, stall, drop_upload: bytes of the body),
        at (flip), by (shift, wrong_range), rate (drip: bytes a second), delay (delay, slow_first_byte: seconds),
        short (html). A flip keeps the ETag, and `replace` is done before the old bytes are sent.
        """
        chosen = {"times": times, "skip": skip, "match": match, "min_bytes": min_bytes, **how}
        self._ask("POST", "/fault", {"mode": mode, **chosen, **({"method": method} if method else {})})

    def clear(self) -> None:
        """Forget all faults."""
        self._ask("POST", "/clear")

    def rotate(self, access_key: str, secret_key: str, session_token: str | None = None) -> None:
        """Accept these credentials from now on; those before get ExpiredToken."""
        given = {"access_key": access_key, "secret_key": secret_key, "session_token": session_token}
        self._ask("POST", "/credentials", given)
        self.access_key, self.secret_key, self.session_token = access_key, secret_key, session_token

    def stats(self) -> dict[str, Any]:
        """requests, sent and received (bytes of bodies), faults; the same for each of `operations`; modes; log."""
        found: dict[str, Any] = self._ask("GET", "/stats")
        return found

    def reset_stats(self) -> None:
        self._ask("POST", "/reset")

    def make_bucket(self, name: str) -> None:
        (self.root / name).mkdir(parents=True, exist_ok=True)

    def objects(self, bucket: str) -> dict[str, Path]:
        """Key -> the file that holds its bytes."""
        return {unquote(path.name): path for path in sorted((self.root / bucket).iterdir())}
