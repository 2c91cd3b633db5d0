#!/usr/bin/env python3
"""Run OpenStack Swift with its S3 API: one proxy and one server each of accounts, containers and objects.

    tools/servers/swift.py --setup              install it, into a virtual environment of its own
    tools/servers/swift.py --check              say what is missing, and exit with 1 if anything is
    tools/servers/swift.py --root FOLDER        serve, with all data in FOLDER, until standard input closes

Once it serves, it prints one line of JSON: endpoint, access_key, secret_key, region.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import venv
from pathlib import Path

import programs

VERSION = "2.38.3"
PACKAGES = ["gcc", "liberasurecode-dev", "python3-dev"]
HOME = Path(__file__).resolve().parents[2] / ".venv-swift"
BIN = HOME / "bin"
KINDS = ("account", "container", "object")
ACCESS_KEY, SECRET_KEY, REGION = "test:tester", "testing", "us-east-1"

BACKEND = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
swift_dir = {root}
devices = {root}/devices
mount_check = false
workers = 0
fallocate_reserve = 0
log_name = {kind}

[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
"""

PROXY = f"""\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {{port}}
user = {{user}}
swift_dir = {{root}}
workers = 0

[pipeline:main]
pipeline = catch_errors proxy-logging cache s3api tempauth copy slo dlo symlink versioned_writes proxy-server

[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:proxy-logging]
use = egg:swift#proxy_logging
access_log_level = CRITICAL
[filter:cache]
# tempauth insists on a memcached, and does without once it cannot be reached
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:s3api]
use = egg:swift#s3api
location = {REGION}
s3_acl = false
# small pages, so that a test sees several with few objects
max_bucket_listing = 20
max_parts_listing = 3
[filter:tempauth]
use = egg:swift#tempauth
user_{ACCESS_KEY.replace(":", "_")} = {SECRET_KEY} .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
[filter:symlink]
use = egg:swift#symlink
[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_versioned_writes = true
allow_object_versioning = true
"""

POLICIES = """\
[swift-hash]
swift_hash_path_prefix = shardprep
swift_hash_path_suffix = shardprep
[storage-policy:0]
name = gold
policy_type = replication
default = yes
"""


def missing() -> str | None:
    """Why Swift cannot be run here."""
    if (BIN / "swift-proxy-server").exists():
        return None
    return f"OpenStack Swift is not installed in {HOME.name}; scripts/test_s3 swift installs it and runs the tests"


def setup() -> None:
    """Install Swift."""
    found = subprocess.run(
        ["dpkg-query", "--show", *PACKAGES], capture_output=True, text=True, check=False
    )  # fails where one of them is not there
    if found.returncode:
        programs.install(PACKAGES)
    venv.create(HOME, clear=True, with_pip=True)
    command = [str(BIN / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, f"swift=={VERSION}"], check=True, stdout=sys.stderr)


def serve(root: Path) -> None:
    """Start everything, and end it when it is no longer wanted."""
    (root / "devices" / "disk").mkdir(parents=True, exist_ok=True)
    (root / "swift.conf").write_text(POLICIES)
    user = pwd.getpwuid(os.geteuid()).pw_name
    *ports, port = programs.free_ports(4)
    env = {"PATH": os.environ["PATH"], "HOME": str(root), "SWIFT_CONF_FILE": str(root / "swift.conf")}
    with programs.Programs() as running:
        for kind, each in zip(KINDS, ports, strict=True):
            ring = [str(BIN / "swift-ring-builder"), str(root / f"{kind}.builder")]
            for rest in (
                ["create", "4", "1", "1"],
                ["add", f"r1z1-127.0.0.1:{each}/disk", "1"],
                ["rebalance"],
            ):
                programs.run([*ring, *rest], env=env, log=root / "rings.log")
            text = BACKEND.format(kind=kind, port=each, user=user, root=root)
            start(running, root, kind, text, env)
        start(running, root, "proxy", PROXY.format(port=port, user=user, root=root), env)
        running.wait_until(lambda: all(map(programs.answers, [*ports, port])), what="swift", seconds=60)
        running.serve(
            {
                "endpoint": f"http://127.0.0.1:{port}",
                "access_key": ACCESS_KEY,
                "secret_key": SECRET_KEY,
                "region": REGION,
            }
        )


def start(running: programs.Programs, root: Path, kind: str, text: str, env: dict[str, str]) -> None:
    """Start one of Swift's servers with this configuration."""
    settings = root / f"{kind}-server.conf"
    settings.write_text(text)
    command = [str(BIN / f"swift-{kind}-server"), str(settings)]
    running.start(f"swift-{kind}-server", command, log=root / f"{kind}.log", env=env)


if __name__ == "__main__":
    programs.main(__doc__, missing=missing, setup=setup, serve=serve)
