"""What each diff saves: the app, with the diff applied to a copy of it, in Flower's simulation engine.

python measure.py [ledger compression fda both]      # needs pip install 'taciturn[flower]' 'flwr[simulation]==1.41.*'
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CLIENTS, TARGET = 10, 0.9
RUN = """
from flwr.simulation import run_simulation
from quickstart.client_app import app as client
from quickstart.server_app import app as server

resources = {"init_args": {"num_cpus": 2}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
run_simulation(server, client, num_supernodes=%d, backend_config=resources)
"""


def applied(diff: str, folder: Path) -> Path:
    """A copy of the app with a diff."""
    copy = folder / diff
    shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns("*.diff", "__pycache__"))
    subprocess.run(
        ["git", "apply", str(HERE / f"{diff}.diff")], cwd=copy, check=True, env=os.environ | {"GIT_DIR": os.devnull}
    )
    return copy


def measured(app: Path) -> dict[str, float]:
    """Run it -> accuracy, rounds and bytes of arrays until the target."""
    paths = os.pathsep.join([str(app), *sys.path[1:], os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    subprocess.run(
        [sys.executable, "-c", RUN % CLIENTS], cwd=app, env=environment, check=True, capture_output=True, timeout=500
    )
    reached = {int(n): value for n, value in json.loads((app / "accuracy.json").read_text()).items()}
    ledger = json.loads((app / "ledger.json").read_text())
    first = next((n for n in sorted(reached) if reached[n] >= TARGET), 0)
    rounds = ledger["rounds"][: first or None]
    kinds = [(way, entry) for line in rounds for way, entry in line["by_kind"].items()]
    found = {way: sum(entry["payload"] for name, entry in kinds if name.startswith(way)) for way in ("up", "down")}
    envelope = sum(entry["frame"] for _, entry in kinds)
    return {"last": reached[max(reached)], "rounds": first, **found, "envelope": envelope}


def main() -> None:
    """A table."""
    print(f"| diff | accuracy after 20 rounds | rounds to {TARGET} | kB up | kB down | kB of Flower's records |")
    print("|---|---|---|---|---|---|")
    for diff in sys.argv[1:] or ["ledger", "compression", "fda", "both"]:
        with tempfile.TemporaryDirectory() as folder:
            f = measured(applied(diff, Path(folder)))
        sizes = " | ".join(f"{f[name] / 1e3:,.0f}" for name in ("up", "down"))
        print(f"| {diff} | {f['last']:.3f} | {f['rounds'] or 'not'} | {sizes} | {f['envelope'] / 1e3:.1f} |", flush=True)


if __name__ == "__main__":
    main()
