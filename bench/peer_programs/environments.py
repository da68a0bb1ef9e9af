"""A virtual environment for each peer under build/peers, made on first use with pinned versions.

torch comes first and is kept by a constraint file: a peer that draws in torch by itself may draw in another build of it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "peers"
PACKAGES = {
    "flwr": ("flwr[simulation]==1.41.0", "ray==2.55.1"),
    "pfl": ("pfl==0.6.0",),
    "fedjax": ("fedjax==0.0.17", "jax==0.10.2"),
    "fedlab": ("fedlab==1.3.0",),
    "codecs": ("fedlab==1.3.0", "hivemind==1.1.12", "nvflare==2.9.0", "bitsandbytes==0.50.2", "numpy==2.2.6"),
}
WITHOUT_TORCH = ("fedjax",)
INSTALL_SECONDS = 600


def torch_pin() -> str:
    """The repository's own pin of torch."""
    found = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit("constraints.txt has no line torch==..")
    return found.group()


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise RuntimeError(f"pip install {' '.join(arguments)}: {' '.join(lines[:2])[:300]}")


def interpreter(peer: str) -> Path:
    """The peer's Python, its environment made if it is missing. Errors: `RuntimeError` with pip's reason."""
    home, ready = FOLDER / peer, FOLDER / peer / "ready.txt"
    python = home / "bin" / "python"
    torch = torch_pin()
    wanted = "\n".join((torch, *PACKAGES[peer])) + "\n"
    if ready.exists() and ready.read_text() == wanted:
        return python
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True, capture_output=True, text=True)
        constraints = home / "constraints.txt"
        constraints.write_text(torch + "\n")
        if peer not in WITHOUT_TORCH:
            _pip(python, torch)
        _pip(python, "--constraint", str(constraints), *PACKAGES[peer])
    except (subprocess.SubprocessError, OSError) as error:
        raise RuntimeError(f"the environment could not be made: {error}") from error
    ready.write_text(wanted)
    return python
