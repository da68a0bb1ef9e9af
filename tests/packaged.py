"""What a user installs: wheel and source archive are built, looked into, and run in an empty environment.

Run: python tests/packaged.py (make wheel). Needs a package index or a mirror of one; takes minutes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = ROOT / "constraints.txt"
TORCH = re.search(r"^torch==\S+", PINS.read_text(), re.MULTILINE)[0]
SUFFIXES = {".c", ".h", ".jinja", ".py", ".toml", ".txt", ".typed"}


def call(*command: object, **options: object) -> str:
    """Run it; its output. Ends the script where it fails."""
    words, told = [str(word) for word in command], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(words, **told, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def environment(place: Path) -> Path:
    """An empty one; its python."""
    venv.create(place, with_pip=True)
    return place / "bin" / "python"


def pip(python: Path, *words: object) -> None:
    call(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--constraint", PINS, *words)


def build(tools: Path) -> tuple[Path, Path]:
    """-> (wheel, source archive) in dist/, whose long description renders."""
    for old in (ROOT / "dist").glob("taciturn-*"):
        old.unlink()
    call(tools, "-m", "build", "--outdir", ROOT / "dist", ROOT)
    wheel, archive = next((ROOT / "dist").glob("*.whl")), next((ROOT / "dist").glob("*.tar.gz"))
    call(tools, "-m", "twine", "check", "--strict", wheel, archive)
    return wheel, archive


def check_contents(wheel: Path, archive: Path) -> None:
    """Every file of the package is in both; C only in the source archive."""
    tracked = call("git", "ls-files", "src/taciturn", cwd=ROOT).split()
    files = {path.removeprefix("src/") for path in tracked if Path(path).suffix in SUFFIXES}
    with zipfile.ZipFile(wheel) as opened:
        inside = set(opened.namelist())
    absent = {path for path in files if not path.endswith((".c", ".h"))} - inside
    assert not absent, f"{wheel.name} lacks {sorted(absent)}"
    with tarfile.open(archive) as opened:
        inside = {name.partition("/")[2].removeprefix("src/") for name in opened.getnames()}
    assert not files - inside, f"{archive.name} lacks {sorted(files - inside)}"


def check_run(python: Path, place: Path, compiled: bool) -> None:
    """The quickstart runs from an empty folder, with and without the compiled kernels; what is missing is said."""
    place.mkdir()
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    told = call(python, "-c", "from taciturn.core import kernel; print(kernel.library() is not None)", cwd=place, env=plain)
    assert told.split() == [str(compiled)], f"compiled kernels: {told.strip()}, expected {compiled}"
    command = python.with_name("taciturn")
    told = call(command, "run", "quickstart", "--rounds", "2", cwd=place, env=plain)
    print(told)
    assert "accuracy" in told and (place / "runs/quickstart-0/result.json").exists()
    call(command, "report", "runs/quickstart-0", cwd=place, env=plain)
    for words, remedy in {
        ("report", "runs/quickstart-0", "--tensorboard", "events"): "pip install 'taciturn[tensorboard]'",
        ("run", "bbc-lora", "--rounds", "1"): "pip install",
    }.items():
        done = subprocess.run([command, *words], cwd=place, env=plain, text=True, capture_output=True)
        assert done.returncode == 2 and remedy in done.stderr, f"{words}: {done.returncode} {done.stderr}"
        print(done.stderr)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tools = environment(place / "tools")
        pip(tools, "build", "twine", "setuptools", "wheel")
        wheel, archive = build(tools)
        check_contents(wheel, archive)
        python = environment(place / "empty")
        pip(python, TORCH)
        pip(python, wheel)
        compiled = shutil.which("gcc") is not None
        check_run(python, place / "compiled", compiled)
        # from the source archive, where there is no compiler
        bare = place / "bare"
        call(tools, "-m", "pip", "wheel", "--no-deps", "-w", bare, archive, env=os.environ | {"CC": "/bin/false"})
        pip(python, "--no-deps", "--force-reinstall", next(bare.glob("*.whl")))
        check_run(python, place / "plain", False)
    print(f"{wheel.name} ({wheel.stat().st_size / 1e3:.0f} kB), {archive.name}: compiled {compiled}, and without, they run")


if __name__ == "__main__":
    main()
