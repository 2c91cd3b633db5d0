#!/usr/bin/env python3
"""Run Azurite, Microsoft's emulator of Azure Blob Storage, with one container.

    tools/servers/azurite.py --setup            install it with npm, into a folder of its own
    tools/servers/azurite.py --check            say what is missing, and exit with 1 if anything is
    tools/servers/azurite.py --root FOLDER      serve, with all data in FOLDER, until standard input closes

Once it serves, it prints one line of JSON: endpoint, access_key (the account), secret_key, region (none), bucket.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import subprocess
import sys
import urllib.request
from email.utils import formatdate
from pathlib import Path

import programs

VERSION = "3.35.0"
HOME = Path(__file__).resolve().parents[2] / ".azurite"
PROGRAM = HOME / "node_modules" / ".bin" / "azurite-blob"
CONTAINER = "shards"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The same in every Azurite: no secret."""


def missing() -> str | None:
    """Why Azurite cannot be run here."""
    if PROGRAM.exists() and shutil.which("node"):
        return None
    return f"Azurite is not installed in {HOME.name}; scripts/test_s3 azurite installs it and runs the tests"


def setup() -> None:
    """Install Azurite."""
    if shutil.which("npm") is None:
        sys.exit("npm is not installed; install Node.js 20 or later")
    HOME.mkdir(exist_ok=True)
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(HOME), f"azurite@{VERSION}"]
    subprocess.run(command, check=True, stdout=sys.stderr)


def serve(root: Path) -> None:
    """Start it, and end it when it is no longer wanted."""
    root.mkdir(parents=True, exist_ok=True)
    (port,) = programs.free_ports(1)
    command = [str(PROGRAM), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(root)]
    # obstore asks for newer versions of the protocol than Azurite says it knows
    command += ["--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    env = {"PATH": os.environ["PATH"], "HOME": str(root)}
    with programs.Programs() as running:
        running.start("azurite", command, log=root / "azurite.log", env=env)
        running.wait_until(lambda: programs.answers(port), what="azurite", seconds=60)
        make_container(port)
        running.serve(
            {
                "endpoint": f"http://127.0.0.1:{port}/{ACCOUNT}",
                "access_key": ACCOUNT,
                "secret_key": KEY,
                "region": "",
                "bucket": CONTAINER,
            }
        )


def make_container(port: int) -> None:
    """Make the container, by a request signed as "Authorize with Shared Key" of Azure's documentation says."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    lines = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
    text = f"PUT{chr(10) * 12}{lines}/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)).decode()
    headers |= {"Authorization": f"SharedKey {ACCOUNT}:{signature}", "Content-Length": "0"}
    url = f"http://127.0.0.1:{port}/{ACCOUNT}/{CONTAINER}?restype=container"
    with urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)) as answer:
        answer.read()


if __name__ == "__main__":
    programs.main(__doc__, missing=missing, setup=setup, serve=serve)
