"""Make the fastest S3-like data plane that one machine has: nginx and a sink in a network namespace of their own.

In a namespace of its own, because what a host does to loopback differs: BBR paces it to a third of what reno gives.
Needs root, iproute2, nginx and openssl.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SERVERS = Path(__file__).resolve().parent / "s3_servers.py"
BUCKET = "bench"
FIRST_BYTE = 0.03  # seconds; what S3 in one's own region takes

Scheme = Literal["http", "https"]
PLAIN: dict[Scheme, int] = {"http": 9000, "https": 9443}
SLOW: dict[Scheme, int] = {"http": 9001, "https": 9444}
"""With FIRST_BYTE before each answer."""
COUNTED = 9002
"""Each answer's bytes are written to a log."""
SINK: dict[Scheme, int] = {"http": 9010, "https": 9453}
KEEPING: dict[Scheme, int] = {"http": 9011, "https": 9454}
STALLING = 9020
WAIT = 9030

INSTALL = {
    "ip": "apt-get install iproute2",
    "tc": "apt-get install iproute2",
    "nginx": "apt-get install nginx-light",
    "openssl": "apt-get install openssl",
    "curl": "apt-get install curl",
}

SYSCTLS = {
    "tcp_congestion_control": "reno",
    "tcp_wmem": "4096 262144 8388608",
    "tcp_rmem": "4096 262144 33554432",
}

NGINX = """
daemon off;
{user}
worker_processes {workers};
pid {work}/nginx.pid;
error_log {work}/error.log warn;
worker_rlimit_nofile 8192;
events {{ worker_connections 2048; }}
http {{
  access_log off;
  log_format counted '$bytes_sent';
  sendfile on; tcp_nopush on; tcp_nodelay on; sendfile_max_chunk 0;
  keepalive_requests 1000000; keepalive_timeout 300s;
  open_file_cache max=1000 inactive=60s;
  default_type application/octet-stream; types {{}}
  max_ranges 1;
  client_body_temp_path {work}/n1; proxy_temp_path {work}/n2; fastcgi_temp_path {work}/n3;
  uwsgi_temp_path {work}/n4; scgi_temp_path {work}/n5;
  ssl_certificate {work}/certificate.pem; ssl_certificate_key {work}/key.pem;
  ssl_protocols TLSv1.2 TLSv1.3; ssl_session_cache shared:S:10m; ssl_buffer_size 16k;
  root {root};
  upstream wait {{ server 127.0.0.1:{wait}; keepalive 256; }}
  server {{ listen 127.0.0.1:{plain} backlog=1024; listen 127.0.0.1:{tls} ssl backlog=1024; }}
  server {{ listen 127.0.0.1:{counted} backlog=1024; access_log {work}/counted.log counted; }}
  server {{
    listen 127.0.0.1:{slow} backlog=1024; listen 127.0.0.1:{slow_tls} ssl backlog=1024;
    location / {{ auth_request /wait; }}
    location = /wait {{
      internal; proxy_pass http://wait; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_pass_request_body off; proxy_set_header Content-Length "";
    }}
  }}
}}
"""


class PlaneError(Exception):
    """This machine cannot give the data plane."""


@dataclass(slots=True)
class Plane:
    """A namespace with its servers. `root` is what nginx serves, `work` has everything else."""

    name: str
    root: Path
    work: Path
    cores: int
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    # ------------------------------------------------------------------------------------------------ for the clients
    def inside(self, scheme: Scheme, port: int) -> tuple[str, ...]:
        """What goes before a command that is to run in the namespace, with nothing of the caller's AWS settings."""
        unset = [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]
        settings = {
            "AWS_ENDPOINT_URL": endpoint(scheme, port),
            "S3_ENDPOINT_URL": endpoint(scheme, port),  # what s5cmd reads
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "benchsecret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_CA_BUNDLE": str(self.authority),
            "SSL_CERT_FILE": str(self.authority),
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        words = [f"{key}={value}" for key, value in settings.items()]
        return ("ip", "netns", "exec", self.name, "env", *(f"--unset={name}" for name in unset), *words)

    def processes(self) -> set[int]:
        """Ids of what runs in the namespace, the servers too."""
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return set(map(int, done.stdout.split()))

    @property
    def authority(self) -> Path:
        """What a client must trust."""
        return self.work / "ca.pem"

    def sink_state(self, *, keep: bool) -> Path:
        return self.work / ("kept" if keep else "sunk")

    # ------------------------------------------------------------------------------------------------------- the link
    def shape(self, rate: float) -> None:
        """Let no more than `rate` bytes a second through, both directions together."""
        # a burst of 2 ms: timers of a virtual machine are late by about one
        burst = max(2**18, int(rate * 0.002))
        self._tc("replace", "tbf", "rate", f"{int(rate * 8)}bit", "burst", str(burst), "limit", str(2**28))

    def unshape(self) -> None:
        self._tc("del")

    def _tc(self, verb: str, *words: str) -> None:
        call("ip", "netns", "exec", self.name, "tc", "qdisc", verb, "dev", "lo", "root", *words)

    # ------------------------------------------------------------------------------------------------ stalls, counts
    def stall_after(self, nbytes: int) -> None:
        """Stop in the middle of a body, once, after so many bytes that the relay passes on."""
        trigger = self.work / "stall"
        temporary = trigger.with_suffix(".new")
        temporary.write_text(str(nbytes))
        temporary.rename(trigger)

    def stall_is_over(self) -> bool:
        """Whether it happened; it will not any more."""
        waiting = (self.work / "stall").exists()
        (self.work / "stall").unlink(missing_ok=True)
        return not waiting

    def count(self) -> tuple[int, int]:
        """(answers, bytes of them) that the counted port has sent since the last call."""
        log = self.work / "counted.log"
        time.sleep(0.2)  # nginx writes its line after the last byte
        sent = [int(line) for line in log.read_text().split()]
        os.truncate(log, 0)
        return len(sent), sum(sent)

    # ------------------------------------------------------------------------------------------------------ the parts
    def start(self) -> None:
        make_certificate(self.work)
        user = "user root;" if os.geteuid() == 0 else ""
        (self.work / "nginx.conf").write_text(
            NGINX.format(
                user=user,
                workers=self.cores,
                work=self.work,
                root=self.root,
                plain=PLAIN["http"],
                tls=PLAIN["https"],
                slow=SLOW["http"],
                slow_tls=SLOW["https"],
                counted=COUNTED,
                wait=WAIT,
            )
        )
        secured = ("--certificate", self.work / "certificate.pem", "--key", self.work / "key.pem")
        self._server("wait", WAIT, FIRST_BYTE)
        self._server("relay", STALLING, PLAIN["http"], self.work / "stall")
        for ports, keep in ((SINK, False), (KEEPING, True)):
            flags = ("--keep",) if keep else ()
            state = self.sink_state(keep=keep)
            self._server("sink", ports["http"], state, "--processes", self.cores, *flags)
            self._server("sink", ports["https"], state, "--processes", self.cores, *flags, *secured)
        self._start(shutil.which("nginx") or "nginx", "-c", self.work / "nginx.conf", "-p", self.work)
        both = (*PLAIN.values(), *SLOW.values(), *SINK.values(), *KEEPING.values())
        try:
            call(
                "ip",
                "netns",
                "exec",
                self.name,
                sys.executable,
                "-S",
                SERVERS,
                "until",
                *both,
                COUNTED,
                STALLING,
                WAIT,
            )
        except PlaneError as error:
            log = self.work / "servers.log"
            raise PlaneError(f"{error}\n{log.read_text() if log.exists() else ''}".rstrip()) from None

    def _server(self, *words: object) -> None:
        self._start(sys.executable, "-S", SERVERS, *words)

    def _start(self, *words: object) -> None:
        with (self.work / "servers.log").open("ab") as log:
            self._started.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", self.name, *map(str, words)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # a group that is ended as one
                )
            )

    def stop(self) -> None:
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self._started:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def endpoint(scheme: Scheme, port: int) -> str:
    return f"{scheme}://127.0.0.1:{port}"


def call(*words: object) -> None:
    """Run a command; PlaneError with what it said where it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise PlaneError(f"{' '.join(map(str, words))}: {(done.stderr or done.stdout).strip()}")


def missing(tools: Sequence[str]) -> Mapping[str, str]:
    """Tools that are not here, each with the command that installs it."""
    return {tool: INSTALL[tool] for tool in tools if not shutil.which(tool)}


def make_certificate(work: Path) -> None:
    """A certificate for 127.0.0.1, and the authority that signs it: rustls takes no certificate that signs itself."""
    new = ("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-batch")
    days = ("-days", "30")
    call(*new, "-x509", *days, "-subj", "/CN=bench", "-keyout", work / "ca-key.pem", "-out", work / "ca.pem")
    request, extensions = work / "request.pem", work / "extensions"
    call(*new, "-subj", "/CN=127.0.0.1", "-keyout", work / "key.pem", "-out", request)
    extensions.write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    signed_by = ("-CA", work / "ca.pem", "-CAkey", work / "ca-key.pem", "-CAcreateserial")
    certificate = ("-extfile", extensions, "-out", work / "certificate.pem")
    call("openssl", "x509", "-req", "-in", request, *days, *signed_by, *certificate)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def open_plane(root: Path, work: Path) -> Iterator[Plane]:
    """A plane that serves `root`. Raises PlaneError. Takes everything down at the end, and on SIGTERM."""
    lacking = missing(("ip", "tc", "nginx", "openssl"))
    if lacking:
        raise PlaneError("; ".join(f"{tool} is not installed: {how}" for tool, how in lacking.items()))
    if os.geteuid() != 0:
        raise PlaneError("making a network namespace (ip netns) needs root")
    name = f"shardprep-bench-{os.getpid()}"
    call("ip", "netns", "add", name)
    plane = Plane(name, root, work, len(os.sched_getaffinity(0)))
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        call("ip", "netns", "exec", name, "ip", "link", "set", "lo", "up")
        for key, value in SYSCTLS.items():
            call("ip", "netns", "exec", name, "sh", "-c", f"echo '{value}' > /proc/sys/net/ipv4/{key}")
        plane.start()
        yield plane
    finally:
        plane.stop()
        signal.signal(signal.SIGTERM, before)
        subprocess.run(["ip", "netns", "del", name], check=False)
