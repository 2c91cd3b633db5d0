"""What `pip install shardprep` gives is whole: both packages, their data, their types and the command."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_wheel_has_all_that_the_packages_need_and_its_command_runs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", tmp_path, ROOT]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in (
        ("shardprep", ROOT / "shardprep"),
        ("shardprep_runtime", ROOT / "runtime" / "shardprep_runtime"),
    ):
        files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        assert {f"{package}/{path.relative_to(folder).as_posix()}" for path in files} <= names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {
        "shardprep",
        "shardprep_runtime",
    }
    target = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True)
    script = "import shardprep.cli, sys; assert sys.argv[1] in shardprep.cli.__file__; shardprep.cli.main(['--version'])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, target],
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=tmp_path,
    )
    assert done.stdout.decode().split()[-1].count(".") == 2
