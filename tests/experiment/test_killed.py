"""A run that is killed at any point, and killed again while it resumes, leaves what an undisturbed run leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import taciturn

HERE = Path(__file__).parent


def deaths(engine: str, stride: int) -> int:
    """Run killed.py; -> the number of points there are. In memory where possible: a kill loses no page of the system."""
    paths = Path(taciturn.__file__).parents[1], HERE.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        command = [sys.executable, str(HERE / "killed.py"), folder, engine, str(stride)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return int(run.stdout.split()[-1])


def test_killed_at_some_points():
    assert deaths("loopback", 41) > 200


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "loopback"])
def test_killed_at_every_point(engine):
    assert deaths(engine, 1) > 200
