"""The main job: five methods on MNIST-5k, 50 clients with unlike labels, compared in one table and one report.

Run: make demo, or python examples/demo.py [--rounds N] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

import taciturn
from taciturn.report import human_bytes, summary
from taciturn.report.read import read_run

LABELS = {
    "mnist": "FedAvg",
    "mnist-fedadam": "FedAdam",
    "mnist-float16": "FedAvg, float16 both ways",
    "mnist-quantize4": "FedAvg, 4 bits up, 8 down",
    "mnist-fda": "the same, synchronised by drift",
}


def main() -> None:
    """Run, print, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    folders = []
    for name in LABELS:
        folder = options.out / name
        shutil.rmtree(folder, ignore_errors=True)
        experiment = taciturn.recipe(name).replace(rounds=options.rounds, name=LABELS[name])

        def show(line: dict, label: str = LABELS[name]) -> None:
            if line["round"] % 10 == 0 or line["round"] == options.rounds:
                spent = human_bytes(line["bytes_up"] + line["bytes_down"])
                accuracy = line["metrics"]["accuracy"]
                print(f"{label:31} round {line['round']:3}  accuracy {accuracy:.3f}  sent {spent}", flush=True)

        taciturn.run(experiment, out=folder, callbacks=(show,))
        folders.append(folder)

    table = Table("method", "accuracy", "worst decile", "up", "down", "rounds to target", "traffic to target saved")
    for row in summary([read_run(folder) for folder in folders]):
        rounds, saved = row["rounds_to_target"], row["traffic_saved"]
        table.add_row(
            row["name"], f"{row['final']:.3f}", f"{row['worst_decile']:.3f}", 
            human_bytes(row["bytes_up"]), human_bytes(row["bytes_down"]),
            "not reached" if rounds is None else f"{rounds:.0f}", "-" if saved is None else f"{saved:.0%}",
        )  # fmt: skip
    Console(width=120).print(table)
    print(f"report: {taciturn.write_report(folders, options.out / 'report.html')}")


if __name__ == "__main__":
    main()
