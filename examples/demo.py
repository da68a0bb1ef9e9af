"""The main job: a pretrained sentence encoder, fine-tuned by ten owners of data in three ways, in one table and one report.

Are the openings of two BBC articles about one topic? The head alone, low-rank adapters (LoRA), full fine-tuning with
FedAdam. Each runs until the target, or for its rounds. `taciturn run lora-lean` says less again: by drift, 4 bits a value.

Run: make demo, or python examples/demo.py [--target A] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

import taciturn
from taciturn import StopAt
from taciturn.report import human_bytes, summary
from taciturn.report.read import read_run

LABELS = {
    "pairs-head": "the head alone",
    "pairs-lora": "LoRA",
    "pairs-full": "full, FedAdam",
}
TARGET = 0.68


def main() -> None:
    """Run, print, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=float, default=TARGET)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    folders = []
    for name, label in LABELS.items():
        folder = options.out / name
        shutil.rmtree(folder, ignore_errors=True)
        recipe = taciturn.recipe(name)
        experiment = recipe.replace(name=label, target=options.target, stop_at=StopAt(metric=options.target))

        def show(line: dict, label: str = label, every: int = max(1, recipe.rounds // 7)) -> None:
            metrics = line["metrics"]
            if metrics and (line["round"] % every == 0 or metrics["accuracy"] >= options.target):
                spent = human_bytes(line["bytes_up"] + line["bytes_down"])
                print(f"{label:22} round {line['round']:3}  accuracy {metrics['accuracy']:.3f}  sent {spent}", flush=True)

        taciturn.run(experiment, out=folder, callbacks=(show,))
        folders.append(folder)

    table = Table("method", "accuracy", f"rounds to {options.target:g}", "up", "down")
    for row in summary([read_run(folder) for folder in folders]):
        rounds = row["rounds_to_target"]
        table.add_row(
            row["name"], f"{row['final']:.3f}", "not reached" if rounds is None else f"{rounds:.0f}",
            human_bytes(row["bytes_up"]), human_bytes(row["bytes_down"]),
        )  # fmt: skip
    Console(width=120).print(table)
    print(f"report: {taciturn.write_report(folders, options.out / 'report.html')}")


if __name__ == "__main__":
    main()
