"""Public data sets with clients of their own, read from the user's copies. Every class is a part for `[data]`.

    turbofan   NASA C-MAPSS FD001      100 engines      remaining useful life from windows of sensors    regression
    activity   UCI HAPT                30 persons       what a person does, from a phone's motion        classification
    heart      UCI Heart Disease       4 hospitals      disease or not, from a patient's record          classification
    air        UCI Beijing Air         12 stations      PM2.5 from other pollutants, weather and time    regression

Symbols: N clients; T time steps of one record; w the window; F features; S samples in all. Series become samples
`input` [S, w, F] float32 of consecutive steps inside one record. Features are standardized with mean and std over all
clients' TRAINING rows (in a deployment: two shared vectors). Held-out samples never overlap training samples in time.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from taciturn.core import random
from taciturn.core.errors import DataError, require, unknown
from taciturn.core.random import Key
from taciturn.tasks.data.clients import Federation, TableClients
from taciturn.tasks.data.columns import Array, Column, Frame, by_owner, read
from taciturn.tasks.data.files import build, impute, standardize
from taciturn.tasks.data.splits import federation

Parts = tuple[dict[str, Array], dict[str, Array], dict[str, Array]]  # train, validation, test rows of each client
TURBOFAN_COLUMNS = ("unit", "cycle", *(f"setting{i}" for i in range(1, 4)), *(f"s{i}" for i in range(1, 22)))
VARYING = tuple(f"s{i}" for i in (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21))
ACTIVITIES = ("walk", "upstairs", "downstairs", "sit", "stand", "lie")
TRANSITIONS = ("stand-sit", "sit-stand", "sit-lie", "lie-sit", "stand-lie", "lie-stand")
POLLUTANTS = ("PM10", "SO2", "NO2", "CO", "O3")
WEATHER = ("TEMP", "PRES", "DEWP", "WSPM", "RAIN")
WINDS = ("N", "NNE", "NE", "ENE", "E", "ESE", "SE", "SSE", "S", "SSW", "SW", "WSW", "W", "WNW", "NW", "NNW")


@dataclass(frozen=True, slots=True)
class turbofan:
    """Engines that run to failure; each of the 100 training engines is a client. Input [window, sensors].

        target [1] = min(last cycle - this cycle, max_rul) / max_rul        so an error times max_rul is in cycles

    at the last step of each window. central: the last window of each engine of the published test set, with its
    published remaining life (engines shorter than the window are left out, and noted). test, validation: fractions of
    each client's windows, one stretch of its life at a random place; training windows do not overlap it, which costs
    window - 1 of them at each border (an engine that is too short for that holds nothing out).
    path: the folder with train_FD001.txt, test_FD001.txt (or .txt.gz) and RUL_FD001.txt. sensors: s1..s21, setting1..3;
    by default the 14 that vary in FD001.
    Errors: `DataError` naming the file.
    Source: Saxena, Goebel, Simon & Eklund, PHM 2008 (NASA). The clipped target: Heimes, PHM 2008.
    """

    path: str
    window: int = 30
    max_rul: int = 125
    test: float = 0.0
    validation: float = 0.0
    sensors: tuple[str, ...] = VARYING

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        require(
            self.window >= 1 and self.max_rul >= 1, f"window and max_rul: at least 1; got {self.window}, {self.max_rul}"
        )
        for name in self.sensors:
            if name not in TURBOFAN_COLUMNS[2:]:
                raise unknown("sensor", name, TURBOFAN_COLUMNS[2:], "data.sensors")
        folder = _folder(self.path)
        train, test = (_numbers(_find(folder, f"{part}_FD001.txt")) for part in ("train", "test"))
        life = _numbers(_find(folder, "RUL_FD001.txt"))[:, 0]
        windows, left, owners, _ = self._windows(train)
        parts = _stretches(owners, self.window - 1, test=self.test, validation=self.validation, seed=seed)
        held, _, engines, skipped = self._windows(test)
        last = np.array([rows[-1] for rows in engines.values()])
        remaining = np.array([life[int(name.split("-")[1]) - 1] for name in engines])
        values = standardize(np.concatenate([windows, held[last]]), parts[0])
        target = np.concatenate([left, remaining]).clip(max=self.max_rul)[:, None] / self.max_rul
        fields = {"input": torch.from_numpy(values), "target": torch.from_numpy(target.astype(np.float32))}
        central = TableClients.of(fields, {"server": np.arange(len(left), len(values))})
        note = (
            f"C-MAPSS FD001: {len(owners)} engines, {len(left)} windows of {self.window} cycles; target in units of "
            f"{self.max_rul} cycles, clipped there; central: last windows of {len(engines)} test engines"
            + (f" ({skipped} engines shorter than the window left out)" if skipped else "")
            + "; inputs standardized with mean and std over all clients' training rows"
        )
        return federation(fields, parts, kind="regression", outputs=1, central=central, note=note)

    def _windows(self, rows: Array) -> tuple[Array, Array, dict[str, Array], int]:
        """[T, 26] -> windows [S, w, F] float32, cycles left at their ends [S], owners, engines that are too short."""
        columns = [TURBOFAN_COLUMNS.index(name) for name in self.sensors]
        pieces: list[Array] = []
        left: list[Array] = []
        owners: dict[str, Array] = {}
        first, skipped = 0, 0
        for unit in np.unique(rows[:, 0]).astype(int).tolist():
            own = rows[rows[:, 0] == unit]
            count = len(own) - self.window + 1
            if count < 1:
                skipped += 1
                continue
            series = own[:, columns].astype(np.float32)
            pieces.append(np.lib.stride_tricks.sliding_window_view(series, self.window, axis=0).swapaxes(1, 2))
            left.append(np.arange(count)[::-1])
            owners[f"engine-{unit:03d}"] = np.arange(first, first + count)
            first += count
        if not pieces:
            raise DataError(f"window = {self.window} is longer than the life of every engine; shorten it")
        return np.concatenate(pieces), np.concatenate(left), owners, skipped


@dataclass(frozen=True, slots=True)
class activity:
    """Raw motion of a phone at the waist (50 Hz); each of the 30 persons is a client. Input [window, 6].

    Features: acceleration x y z (g), angular velocity x y z (rad/s). Windows of `window` steps every `step` steps lie
    inside one stretch of one label of one experiment; stretches that are shorter give none. target: walk, upstairs,
    downstairs, sit, stand, lie = 0..5; with `transitions` also the six changes of posture = 6..11.
    held_out "experiment": the last experiment of each person is the test set; "fraction": whole stretches, at random,
    up to the fraction `test` of the person's windows. validation: the same way, from the remaining ones.
    path: the folder of hapt.npz, or the file: arrays x [T, 6], label, user, experiment [T].
    Source: Reyes-Ortiz, Oneto, Sama, Parra & Anguita, Neurocomputing 2016 (UCI HAPT).
    """

    path: str
    window: int = 128
    step: int = 64
    transitions: bool = False
    held_out: Literal["experiment", "fraction"] = "experiment"
    test: float = 0.2
    validation: float = 0.0

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        require(self.window >= 1 and self.step >= 1, f"window and step: at least 1; got {self.window}, {self.step}")
        require(self.held_out in ("experiment", "fraction"), f"held_out: experiment or fraction; got {self.held_out!r}")
        _check_fractions(self.test, self.validation)
        x, label, user, experiment = _arrays(self.path, "hapt.npz", ("x", "label", "user", "experiment"))
        names = ACTIVITIES + (TRANSITIONS if self.transitions else ())
        starts, stretch = self._starts(label, user, experiment, len(names))
        if not len(starts):
            raise DataError(f"no stretch of one activity is as long as window = {self.window}; shorten it")
        windows = np.lib.stride_tricks.sliding_window_view(x, self.window, axis=0)[starts].swapaxes(1, 2)
        parts: Parts = ({}, {}, {})
        for person in np.unique(user).tolist():
            rows = np.flatnonzero(user[starts] == person)
            if len(rows):
                key = random.fold(random.key(seed), "stretches", person)
                self._divide(f"person-{person:02d}", rows, experiment[starts[rows]], stretch[rows], parts, key)
        values = standardize(np.ascontiguousarray(windows, dtype=np.float32), parts[0])
        target = torch.from_numpy(label[starts].astype(np.int64) - 1)
        how = "the last experiment of each person" if self.held_out == "experiment" else "whole stretches, at random"
        note = (
            f"HAPT: {len(parts[0])} persons, {len(starts)} windows of {self.window} steps at 50 Hz every {self.step}; "
            f"classes {', '.join(names)}; test: {how}; "
            "inputs standardized with mean and std over all clients' training rows"
        )
        fields = {"input": torch.from_numpy(values), "target": target}
        return federation(fields, parts, kind="classification", outputs=len(names), note=note)

    def _starts(self, label: Array, user: Array, experiment: Array, labels: int) -> tuple[Array, Array]:
        """First step of every window [S], and the number of its stretch [S]."""
        change = (np.diff(label) != 0) | (np.diff(user) != 0) | (np.diff(experiment) != 0)
        edges = np.concatenate([[0], np.flatnonzero(change) + 1, [len(label)]])
        starts, stretch = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for number, (begin, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
            if 1 <= label[begin] <= labels:
                starts.append(np.arange(begin, end - self.window + 1, self.step))
                stretch.append(np.full(len(starts[-1]), number))
        return np.concatenate(starts), np.concatenate(stretch)

    def _divide(self, name: str, rows: Array, experiment: Array, stretch: Array, parts: Parts, key: Key) -> None:
        """One person's windows into the three parts."""
        train, validation, test = parts
        kept = np.ones(len(rows), dtype=bool)
        if self.held_out == "experiment" and experiment.min() < experiment.max():
            kept = experiment < experiment.max()
        elif self.held_out == "fraction":
            kept = ~_whole(stretch, self.test * len(rows), random.fold(key, "test"))
        held = np.zeros(len(rows), dtype=bool)
        held[kept] = _whole(stretch[kept], self.validation * len(rows), random.fold(key, "validation"))
        for part, mask in ((train, kept & ~held), (validation, held), (test, ~kept)):
            if mask.any():
                part[name] = rows[mask]


@dataclass(frozen=True, slots=True)
class heart:
    """Patients of four hospitals (Cleveland, Hungary, Switzerland, VA Long Beach), each a client; target: num > 0.

    13 columns, texts one-hot, as `folder` does. A cholesterol or blood pressure of 0 is a missing value in this data.
    Whole columns are missing at some hospitals: the mean of the client's training rows stands in, or that of all.
    path: the folder of heart_disease_uci.csv, or the file.
    Source: Janosi, Steinbrunn, Pfisterer & Detrano, UCI Heart Disease, 1988.
    """

    path: str
    test: float = 0.2
    validation: float = 0.0
    standardize: bool = True

    def load(self, seed: int) -> Federation:
        """-> the federation of this seed."""
        frame = read(_file(self.path, "heart_disease_uci.csv"))
        columns = {name: column for name, column in frame.columns.items() if name not in ("id", "num")}
        for name in ("chol", "trestbps"):
            values = frame.column(name).values
            columns[name] = Column("number", np.where(values == 0, np.nan, values))
        num = frame.column("num").values
        columns["disease"] = Column("number", np.where(np.isnan(num), np.nan, num > 0))
        inputs = tuple(name for name in columns if name not in ("dataset", "disease"))
        asked = _Asked("disease", inputs, self.test, self.validation, self.standardize)
        frames, key = by_owner(Frame(columns, frame.file), "dataset"), random.fold(random.key(seed), "hold_out")
        return build(frames, asked, {name: random.fold(key, i) for i, name in enumerate(frames)})


@dataclass(frozen=True, slots=True)
class _Asked:
    """What `build` wants to know."""

    target: str
    inputs: tuple[str, ...]
    test: float
    validation: float
    standardize: bool
    kind: str = "classification"
    target_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class air:
    """Hourly air of Beijing, March 2013 to February 2017; each of the 12 stations is a client. Input [F].

    target [1] = PM2.5 (micrograms per cubic meter) `horizon` hours later / target_scale. Inputs: PM10, SO2, NO2, CO,
    O3; TEMP, PRES, DEWP, WSPM, log(1 + RAIN); sin and cos of wind, hour and month; with horizon > 0 also PM2.5 now.
    Rows without a target are dropped; missing inputs become the mean of the station's training rows. The split is by
    TIME, the same hour for all stations: the last fraction `test` is the test set, the `validation` before it; an hour
    whose target lies behind such a border is dropped. every_nth: take each n-th hour only.
    path: the folder with one <station>.csv or .csv.gz for each client.
    Source: Zhang, Guo, Dong, He, Xu & Chen, Proc. Royal Society A 2017 (UCI Beijing Multi-Site Air Quality).
    """

    path: str
    horizon: int = 0
    every_nth: int = 1
    test: float = 0.2
    validation: float = 0.0
    target_scale: float = 100.0

    def load(self, seed: int) -> Federation:
        """-> the federation; nothing is drawn, so it is the same for every seed."""
        require(self.horizon >= 0 and self.every_nth >= 1, "horizon: at least 0 hours; every_nth: at least 1")
        require(self.target_scale > 0, f"target_scale: above 0; got {self.target_scale}")
        _check_fractions(self.test, self.validation)
        folder = _folder(self.path)
        files = sorted(file for file in folder.iterdir() if file.name.endswith((".csv", ".csv.gz")))
        if not files:
            raise DataError(f"{folder} holds no .csv or .csv.gz; give the folder with one file a station")
        inputs: list[Array] = []
        targets: list[Array] = []
        owners: dict[str, Array] = {}
        parts: Parts = ({}, {}, {})
        first = 0
        for file in files:
            name = file.name.split(".")[0]
            values, target, part = self._station(read(file))
            owners[name] = np.arange(first, first + len(target))
            for number, rows in enumerate(parts):
                if (part == number).any():
                    rows[name] = owners[name][part == number]
            inputs.append(values)
            targets.append(target)
            first += len(target)
        values, filled = impute(np.concatenate(inputs), owners, parts[0], self.features())
        fields = {
            "input": torch.from_numpy(standardize(values, parts[0])),
            "target": torch.from_numpy((np.concatenate(targets) / self.target_scale).astype(np.float32)[:, None]),
        }
        note = (
            f"Beijing air: {len(owners)} stations, {first} hours; target PM2.5 in {self.horizon} hours, in units of "
            f"{self.target_scale:g} micrograms per cubic meter; split by time, test: the last {self.test:.0%}; "
            f"{filled} missing values imputed with the mean of the client's training rows, or of all; "
            "inputs standardized with mean and std over all clients' training rows"
        )
        return federation(fields, parts, kind="regression", outputs=1, note=note)

    def features(self) -> list[str]:
        """The names of the F inputs, in order."""
        angles = [f"{name}.{part}" for name in ("wind", "hour", "month") for part in ("sin", "cos")]
        return [*POLLUTANTS, *WEATHER, *angles, *(["PM2.5"] if self.horizon else [])]

    def _station(self, frame: Frame) -> tuple[Array, Array, Array]:
        """One file -> inputs [n, F] float32 with NaN, target [n], part [n]: 0 train, 1 validation, 2 test."""
        hour = frame.column("No").values.astype(np.int64) - 1
        if (np.diff(hour) != 1).any():
            raise DataError(f"{frame.file}: column 'No' does not count the hours one by one")
        compass = {name: 2 * np.pi * i / len(WINDS) for i, name in enumerate(WINDS)}
        wind = np.array([compass.get(text, np.nan) for text in frame.column("wd").values])
        day, year = (2 * np.pi * frame.column(name).values / period for name, period in (("hour", 24), ("month", 12)))
        numbers = [frame.column(name).values for name in (*POLLUTANTS, *WEATHER)]
        numbers[-1] = np.log1p(numbers[-1])  # rain: mostly 0, rarely much
        angles = [function(angle) for angle in (wind, day, year) for function in (np.sin, np.cos)]
        pollution = frame.column("PM2.5").values
        stack = np.stack([*numbers, *angles, *([pollution] if self.horizon else [])], axis=1, dtype=np.float32)
        n = len(hour) - self.horizon
        if n < 1:
            raise DataError(f"{frame.file} has {len(hour)} hours; too few for horizon = {self.horizon}")
        borders = [round((1 - self.test - self.validation) * len(hour)), round((1 - self.test) * len(hour))]
        now, then = (np.searchsorted(borders, at, side="right") for at in (np.arange(n), np.arange(n) + self.horizon))
        target = pollution[self.horizon :]
        kept = ~np.isnan(target) & (now == then) & (np.arange(n) % self.every_nth == 0)
        return stack[:n][kept], target[kept], now[kept]


# ------------------------------------------------------------------------------------------- reading and dividing


def _check_fractions(test: float, validation: float) -> None:
    require(test >= 0 and validation >= 0 and test + validation < 1, f"{test=}, {validation=}: fractions below 1")


def _folder(path: str) -> Path:
    place = Path(path).expanduser()
    if not place.is_dir():
        raise DataError(f"{place} is {'a file' if place.exists() else 'not there'}; give the folder with the data")
    return place


def _find(folder: Path, name: str) -> Path:
    """A file of a folder, packed (.gz) or not."""
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    there = sorted(file.name for file in folder.iterdir())[:12]
    raise DataError(f"there is no {name} (or {name}.gz) in {folder}; files there: {', '.join(there) or 'none'}")


def _file(path: str, name: str) -> Path:
    """The path itself when it is a file, else the file of that name in the folder."""
    place = Path(path).expanduser()
    return place if place.is_file() else _find(_folder(path), name)


def _numbers(file: Path) -> Array:
    """A text file of numbers between blanks -> [rows, columns] float64."""
    try:
        text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        width = len(text.split(b"\n", 1)[0].split())
        return np.array(text.split(), dtype=np.float64).reshape(-1, width)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{file} is no table of numbers: {error}") from error


def _arrays(path: str, name: str, wanted: tuple[str, ...]) -> list[Array]:
    file = _file(path, name)
    with np.load(file, allow_pickle=False) as arrays:
        for key in wanted:
            if key not in arrays.files:
                raise DataError(str(unknown("array", key, arrays.files, str(file))))
        return [arrays[key] for key in wanted]


def _stretches(owners: dict[str, Array], gap: int, *, test: float, validation: float, seed: int) -> Parts:
    """One stretch [validation | gap | test] of each client's rows, in time order, at a random place; gaps are dropped.

    Two windows share a step when their numbers differ by `gap` or less, so `gap` rows lie between any two parts.
    """
    _check_fractions(test, validation)
    parts: Parts = ({}, {}, {})
    for number, (name, rows) in enumerate(owners.items()):
        n, n_test, n_val = len(rows), int(test * len(rows)), int(validation * len(rows))
        length = n_val + (gap if n_val and n_test else 0) + n_test
        if length == 0 or n - length - 2 * gap < 1:
            parts[0][name] = rows
            continue
        start = int(random.uniform(random.fold(random.key(seed), "stretch", number), 1) * (n - length + 1))
        end = start + length
        held = (np.concatenate([rows[: max(0, start - gap)], rows[end + gap :]]), rows[start : start + n_val])
        for part, index in zip(parts, (*held, rows[end - n_test : end]), strict=True):
            if len(index):
                part[name] = index
    return parts


def _whole(stretch: Array, most: float, key: Key) -> Array:
    """Which windows are held out [n] bool: whole stretches in random order, as long as they fit into `most` windows."""
    held = np.zeros(len(stretch), dtype=bool)
    numbers, counts = np.unique(stretch, return_counts=True)
    room = most
    for i in random.permutation(key, len(numbers)).tolist():
        if counts[i] <= room:
            room -= counts[i]
            held |= stretch == numbers[i]
    return held


__all__ = ["activity", "air", "heart", "turbofan"]
