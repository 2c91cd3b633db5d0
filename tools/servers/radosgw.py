#!/usr/bin/env python3
"""Run Ceph's radosgw on a Ceph of one monitor and one storage daemon, which keeps its objects in memory.

    tools/servers/radosgw.py --setup            install it from Debian or Ubuntu
    tools/servers/radosgw.py --check            say what is missing, and exit with 1 if anything is
    tools/servers/radosgw.py --root FOLDER      serve, with all data in FOLDER, until standard input closes

Once it serves, it prints one line of JSON: endpoint, access_key, secret_key, region.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from pathlib import Path

import programs

PACKAGES = ["ceph-common", "ceph-mgr", "ceph-mon", "ceph-osd", "radosgw"]
PROGRAMS = ["ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin"]
ACCESS_KEY, SECRET_KEY, REGION = "testkey", "testsecret123456", "us-east-1"

SETTINGS = """\
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{mon}
ms bind msgr2 = false
public addr = 127.0.0.1
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data = {root}/mon
mon data avail warn = 2
mon data avail crit = 1
osd data = {root}/osd
# without authentication its first words to the monitor are refused, or lost, now and then
osd class update on start = false
osd crush update on start = false
osd objectstore = memstore
memstore device bytes = 3221225472
memstore page set = false
osd memory target = 939524096
rgw data = {root}/rgw
run dir = {run}
log file = {root}/$name.log
admin socket = {run}/$name.asok
pid file =
crash dir = {root}/crash
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw crypt require ssl = false
# small pages, so that a test sees several with few objects
rgw max listing results = 20
"""


def missing() -> str | None:
    """Why Ceph cannot be run here."""
    absent = [each for each in PROGRAMS if shutil.which(each) is None]
    if not absent:
        return None
    return f"{', '.join(absent)} not installed; scripts/test_s3 radosgw installs them and runs the tests"


def setup() -> None:
    """Install Ceph."""
    programs.install(PACKAGES)


def serve(root: Path) -> None:
    """Start everything, and end it when it is no longer wanted."""
    for each in ("mon", "osd", "rgw", "run", "crash"):
        (root / each).mkdir(parents=True)
    settings, log = root / "ceph.conf", root / "setup.log"
    mon, port = programs.free_ports(2)
    fsid = str(uuid.uuid4())
    settings.write_text(SETTINGS.format(fsid=fsid, mon=mon, port=port, root=root, run=root / "run"))
    env = {"PATH": os.environ["PATH"], "HOME": str(root), "CEPH_CONF": str(settings)}

    def do(*command: str) -> None:
        programs.run([*command[:1], "-c", str(settings), *command[1:]], env=env, log=log)

    def answers(question: str) -> str:
        """What Ceph says, or nothing."""
        command = ["timeout", "5", "ceph", "-c", str(settings), question, "stat"]
        found = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        return found.stdout if found.returncode == 0 else ""

    def takes(*words: str) -> bool:
        """Whether Ceph has done what it was told."""
        command = ["timeout", "10", "ceph", "-c", str(settings), *words]
        return subprocess.run(command, capture_output=True, env=env, check=False).returncode == 0

    def start(program: str, *rest: str) -> None:
        command = [program, "-c", str(settings), "-f", *rest]  # in the foreground
        running.start(program, command, log=root / f"{program}.out", env=env)

    with programs.Programs() as running:
        monmap = str(root / "monmap")
        place = f"[v1:127.0.0.1:{mon}]"
        do("monmaptool", "--create", "--fsid", fsid, "--addv", "a", place, monmap)
        do("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        start("ceph-mon", "-i", "a")
        running.wait_until(lambda: answers("mon") != "", what="ceph-mon", seconds=60)
        osd = str(uuid.uuid4())
        # a monitor that answers may still not know its commands
        running.wait_until(lambda: takes("osd", "new", osd, "0"), what="ceph-mon", seconds=60)
        do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        do("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=local", "root=default")
        start("ceph-osd", "-i", "0")
        running.wait_until(lambda: "1 up" in answers("osd"), what="ceph-osd", seconds=60)
        user = ["--uid=test", "--display-name=test"]
        keys = [f"--access-key={ACCESS_KEY}", f"--secret-key={SECRET_KEY}"]
        do("radosgw-admin", "user", "create", *user, *keys)
        start("radosgw", "-n", "client.rgw")
        running.wait_until(lambda: programs.answers(port), what="radosgw", seconds=60)
        running.serve(
            {
                "endpoint": f"http://127.0.0.1:{port}",
                "access_key": ACCESS_KEY,
                "secret_key": SECRET_KEY,
                "region": REGION,
            }
        )


if __name__ == "__main__":
    programs.main(__doc__, missing=missing, setup=setup, serve=serve)
