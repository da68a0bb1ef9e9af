"""Sites that each have only their own files, and a server that has none, run as if all files lay in one place."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import taciturn
from engines.fake_flwr import Grid, modules, node
from taciturn import Method, data, participation, precision, solvers
from taciturn.cli import app as command
from taciturn.cli.common import experiment_of
from taciturn.core.errors import ConfigError, DataError, RunError
from taciturn.engines import flower
from taciturn.engines.letters import EDITION, Letter
from taciturn.experiment import deployed
from taciturn.experiment.config import to_toml
from taciturn.experiment.experiment import Experiment
from taciturn.tasks.data.files import part_of
from taciturn.tasks.data.outline import content, merged_text
from taciturn.tasks.models import mlp
from taciturn.tasks.spec import TaskSpec

pytest.importorskip("pyarrow", reason="files need pyarrow")
SITES = {"a": ("north", "west-1"), "b": ("east", "west")}  # numbers: east 0, north 1, west 2, west-1 3
INPUTS = ("age", "dose", "ill", "color")


@pytest.fixture(autouse=True)
def flwr(monkeypatch):
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def rows(name: str, n: int) -> str:
    """A client: no dose at all in the east, no age in some rows, flags here and numbers there, colours and classes of its
    own."""
    ill = ("true", "false") if name == "north" else ("1", "0.5")
    colors = {"north": ("red", "blue"), "west-1": ("red", "green"), "east": ("blue", ""), "west": ("white",)}[name]
    classes = {"north": ("no", "yes"), "west-1": ("no",), "east": ("yes", "perhaps"), "west": ("yes",)}[name]
    lines = ["age,dose,ill,color,unused,target"]
    for i in range(n):
        age = "" if i % 7 == 3 else f"{1e3 + 0.1 * i * len(name):.3f}"
        dose = "" if name == "east" else str(i * i % 11)
        lines.append(f"{age},{dose},{ill[i % 2]},{colors[i % len(colors)]},x{i},{classes[i // 2 % len(classes)]}")
    return "\n".join(lines) + "\n"


def source(path, **fields) -> data.folder:
    return data.folder(str(path), inputs=INPUTS, **({"test": 0.25, "validation": 0.1} | fields))


def experiment(of, **fields) -> Experiment:
    method = Method(solver=solvers.sgd(lr=0.1), participation=participation.uniform(count=3), batch_size=8)
    return Experiment(TaskSpec(of, mlp(hidden=(8,))), method, **({"rounds": 2, "engine": "loopback"} | fields))


@pytest.fixture
def place(tmp_path):
    """Folders a and b of the sites, all of both, and the outline that they agreed on."""
    for folder in ("a", "b", "all"):
        (tmp_path / folder).mkdir()
    for number, (site, names) in enumerate(SITES.items()):
        for name in names:
            text = rows(name, 20 + 5 * number + len(name))
            (tmp_path / site / f"{name}.csv").write_text(text)
            (tmp_path / "all" / f"{name}.csv").write_text(text)
        (tmp_path / f"{site}.json").write_text(part_of(source(tmp_path / site), 0))
    (tmp_path / "outline.json").write_text(merged_text([tmp_path / "a.json", tmp_path / "b.json"]))
    return tmp_path


def agreed(place, path="nowhere", **fields) -> data.folder:
    return source(path, outline=str(place / "outline.json"), **fields)


def test_a_run_over_sites_with_their_own_files_is_the_simulated_run(place):
    """Bit for bit: model, bytes, losses, and what every client measured on its own held-out data."""
    app = deployed.bundle(experiment(agreed(place)), place / "app", out=str(place / "run"))
    (place / "outline.json").unlink()  # the bundle has its own
    nodes = {
        7 + k: node(app, place / f"state-{k}", k, 2, **{"data-path": str(place / site)}) for k, site in enumerate(SITES)
    }
    line = flower.FlowerLine(Grid(nodes))
    deployed.serve(deployed._experiment(app), line, {"out": str(place / "run")})
    flown, wired = taciturn.load(place / "run"), taciturn.run(experiment(source(place / "all")))
    assert line.homes == (1, 0, 1, 0) and not line.broken
    assert all(torch.equal(flown.tensors[name], t) for name, t in wired.tensors.items())
    for one, other in zip(flown.history, json.loads(json.dumps(wired.history)), strict=True):
        alike = ("traffic", "loss", "metrics", "spread", "cohort", "left_out")
        assert {name: one[name] for name in alike} == {name: other[name] for name in alike}
    kept = experiment_of(str(place / "run" / "config.toml"), None, "")
    assert content(place / "run" / "outline.json") == content(app / "outline.json")
    assert deployed.fingerprint(kept) == deployed.fingerprint(deployed._experiment(app, "elsewhere"))
    deployed.serve(deployed._experiment(app).replace(rounds=3), flower.FlowerLine(Grid(nodes)), {"out": str(place / "run")})
    assert len(taciturn.load(place / "run").history) == 3, "it went on"


def fetched(part, name: str) -> dict:
    i = part.names.index(name)
    return part.fetch(torch.tensor([i]), torch.arange(int(part.sizes[i])).unsqueeze(0))


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_an_outline_gives_every_client_the_same_samples(place, kind):
    """At a site, at the server, and where all is; owners that are numbers keep their order."""
    if kind == "table":
        for site, owners in {"a": (2, 11), "b": (10, 3), "all": (2, 11, 10, 3)}.items():
            lines = [f"{o},{o + i % 5},{i % 2}" for o in owners for i in range(12)]
            (place / f"{site}.csv").write_text("\n".join(["owner,x,target", *lines]) + "\n")
            (place / f"{site}.json").write_text(part_of(data.table(str(place / f"{site}.csv")), 5))
        (place / "outline.json").write_text(merged_text([place / "a.json", place / "b.json"]))
        make = lambda name, **more: data.table(str(place / f"{name}.csv"), **more)  # noqa: E731
    else:
        make = lambda name, **more: source(place / name, **more)  # noqa: E731
    seed = 5 if kind == "table" else 0
    whole = make("all").load(seed)
    one = {name: make(name, outline=str(place / "outline.json")).load(seed) for name in ("a", "b", "all", "nowhere")}
    assert whole.train.names == (("2", "3", "10", "11") if kind == "table" else ("east", "north", "west", "west-1"))
    for part in ("train", "test", "validation"):
        split = getattr(whole, part)
        for found in one.values():
            mine = getattr(found, part)
            assert (mine is None) == (split is None)
            assert split is None or (mine.names == split.names and torch.equal(mine.sizes, split.sizes))
        for found in one.values() if split is not None else ():
            for name in set(split.names) - set(found.absent):
                batch = fetched(getattr(found, part), name)
                assert all(torch.equal(batch[key], value) for key, value in fetched(split, name).items()), (part, name)
    assert len(one["a"].absent) == 2 and len(one["nowhere"].absent) == 4 and not one["all"].absent
    assert one["nowhere"].outputs == whole.outputs and one["nowhere"].note.split(";")[0] == whole.note.split(";")[0]
    both = one["a"].train.fetch(torch.arange(4), torch.zeros(4, 2, dtype=torch.int64))  # some here, some not
    exact = whole.train.fetch(torch.arange(4), torch.zeros(4, 2, dtype=torch.int64))
    here = [i for i, name in enumerate(whole.train.names) if name not in one["a"].absent]
    assert torch.equal(both["input"][here], exact["input"][here]) and both["target"].dtype == exact["target"].dtype
    with pytest.raises(DataError, match="are not here"):
        fetched(one["nowhere"].test, whole.test.names[0])


def test_an_outline_is_what_it_says_and_no_more(place):
    """Statistics against the plain formulas over all training rows; no value of a row in what is given away."""
    told, whole = json.loads((place / "outline.json").read_text()), source(place / "all", standardize=False).load(0)
    x = whole.train.fields["input"][whole.train.rows].double()
    numbers = [label in ("age", "dose", "ill") for label in ("age", "dose", "ill", "b", "g", "r", "w")]
    center, scale = torch.tensor(told["center"]).double(), torch.tensor(told["scale"]).double()
    assert torch.allclose(center, x.mean(0), rtol=1e-6)
    assert torch.allclose(scale[numbers], x.std(0, correction=0)[numbers], rtol=1e-4)
    assert told["inputs"]["color"]["texts"] == ["blue", "green", "red", "white"] and told["left_out"] == []
    assert told["target"]["classes"] == ["no", "perhaps", "yes"] and told["fields"]["input"]["shape"] == [7]
    for name in ("a.json", "b.json", "outline.json"):
        text = (place / name).read_text()
        assert "unused" not in text and "x11" not in text and str(place) not in text and '"path"' not in text


def spoilt(place, change):
    part = json.loads((place / "b.json").read_text())
    change(part)
    (place / "b.json").write_text(json.dumps(part))


def renamed(part):
    part["clients"]["north"] = part["clients"].pop("east")


def retyped(part):
    part["clients"]["east"]["columns"]["age"] = {"kind": "text", "shape": [], "seen": 3, "texts": {"old": 3}}


UNLIKE = {
    "same client": (renamed, r"b.json and .*a.json both have a client 'north'; rename one"),
    "settings": (
        lambda p: p["settings"].update(test=0.5),
        r"b.json .*other settings than .*a.json: test = 0.5 instead of 0.25",
    ),
    "seed": (lambda p: p["settings"].update(seed=1), "seed = 1 instead of 0"),
    "columns": (lambda p: p["clients"]["west"]["columns"].pop("dose"), r"b.json: there is no column 'dose'"),
    "kinds": (retyped, r"column 'age' is text in .*b.json \(such as 'old'\) but numbers in .*a.json"),
    "shapes": (lambda p: p["clients"]["east"]["columns"]["age"].update(shape=[2]), "'age' has different shapes"),
    "other file": (lambda p: p.update(part=False), "b.json is not a part of an outline"),
    "broken": (lambda p: p["clients"]["east"].pop("samples"), "not parts of an outline: KeyError"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_parts_that_do_not_fit_are_refused(place, case):
    change, message = UNLIKE[case]
    spoilt(place, change)
    with pytest.raises(DataError, match=message):
        merged_text([place / "a.json", place / "b.json"])


def test_what_does_not_fit_the_outline_is_refused(place):
    east, old = place / "b" / "east.csv", (place / "b" / "east.csv").read_text()
    for text, message in (
        (old.rsplit("\n", 6)[0] + "\n", r"east.csv: client 'east' has \d+ training samples instead of \d+"),
        (old.replace("dose", "doses"), r"east.csv: there is no column 'dose'"),
        (old.replace("blue", "black"), r"east.csv: column 'color' has 'black', which .*outline.json does not know"),
        (old.replace("perhaps", "surely"), "the target has the class 'surely'"),
        (old.replace(",1,", ",sick,"), "column 'ill' is text"),
    ):
        east.write_text(text)
        with pytest.raises(DataError, match=message):
            agreed(place, place / "b").load(0)
    east.write_text(old)
    (place / "b" / "south.csv").write_text(old)
    with pytest.raises(DataError, match="knows no client 'south'; it has east, north"):
        agreed(place, place / "b").load(0)
    with pytest.raises(DataError, match=r"other settings: now test = 0.5 instead of 0.25, seed = 3 instead of 0"):
        agreed(place, place / "b", test=0.5).load(3)
    with pytest.raises(DataError, match=r"a.json is not a merged outline"):
        source(place / "a", outline=str(place / "a.json")).load(0)
    with pytest.raises(DataError, match=r"data of 2 clients are not here .*taciturn deploy"):
        taciturn.run(experiment(agreed(place, place / "a")))
    coarse = experiment(agreed(place, place / "a"), engine="flower")
    coarse = coarse.replace(method=coarse.method.replace(precision=precision.coarse(modes=("ptq4", "qat4"))))
    with pytest.raises(ConfigError, match=r"kappa = 0.0 does without"):
        deployed.site_of(coarse, place / "state")


def test_a_site_refuses_clients_that_it_has_not(place):
    app = deployed.bundle(experiment(agreed(place)), place / "app")
    told = {"partition-id": 0, "num-partitions": 2, "state-dir": str(place / "s"), "data-path": str(place / "a")}
    order = {
        "command": "hello",
        "edition": EDITION,
        "fingerprint": deployed.fingerprint(deployed._experiment(app)),
    }
    asked = {i: deployed.at_node({"app": str(app), "node": told}, Letter(i, order | {"met": []})).order for i in range(4)}
    assert [("error" in asked[i]) for i in range(4)] == [True, False, True, False]
    assert "client 0 is not at this node (0 of 2)" in asked[0]["error"]
    wrong = told | {"data-path": str(place / "b")}
    error = deployed.at_node({"app": str(app), "node": wrong}, Letter(1, order | {"met": []})).order["error"]
    assert error == "client 1 ('north') has no data at this site; is data-path right?"
    (place / "run").mkdir()
    other = json.loads((place / "outline.json").read_text())
    other["fill"][0] += 1.0
    (place / "run" / "outline.json").write_text(json.dumps(other))
    with pytest.raises(RunError, match="began with another outline"):
        deployed.serve(deployed._experiment(app), flower.FlowerLine(Grid({})), {"out": str(place / "run")})


def test_on_the_command_line(place):
    toml = place / "mine.toml"
    toml.write_text(to_toml(deployed.with_outline(experiment(agreed(place)), "outline.json")))
    for site in SITES:
        arguments = ["deploy", "outline", str(toml), "--data", str(place / site), "-o", str(place / f"{site}-2.json")]
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == 0 and "read it before you give it away" in done.output
        assert (place / f"{site}-2.json").read_text() == (place / f"{site}.json").read_text()
    parts = [str(place / f"{site}-2.json") for site in SITES]
    done = CliRunner().invoke(command, ["deploy", "outline", "--merge", *parts, "-o", str(place / "again.json")])
    assert done.exit_code == 0 and (place / "again.json").read_text() == (place / "outline.json").read_text()
    assert deployed.outline_of(experiment_of(str(toml), None, "")) == place / "outline.json", "beside the TOML"
    for wrong, error in (
        (["a.toml", "b.toml"], ConfigError),
        (["quickstart"], DataError),
        (["--merge", "no.json"], DataError),
    ):
        assert isinstance(CliRunner().invoke(command, ["deploy", "outline", *wrong]).exception, error)
