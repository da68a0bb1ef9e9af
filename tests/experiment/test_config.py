"""TOML <-> records: what is written is read back; what is wrong is named with its path and the nearest valid thing."""

from __future__ import annotations

import tomllib

import pytest
import torch.nn as nn

import taciturn
from conftest import make_federation
from taciturn import codecs, fleet, solvers, sync
from taciturn.core.errors import ConfigError, UnknownName
from taciturn.experiment import config
from taciturn.experiment.recipes import RECIPES, check_data, recipe

MEMORY = {"codec": {"name": "difference", "codec": "top_k", "alpha": 1.0, "memory": "mean"}}
PAIRED = {  # parts that stand only beside each other
    "running": MEMORY,
    "admm": MEMORY | {"aggregator": {"name": "running", "update": "point"}},
    "scaffold": {"aggregator": "controlled"},
    "controlled": {"solver": "scaffold"},
    "twins": {"solver": "ditto"},
    "private": {"participation": "all"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_toml(name):
    experiment = recipe(name)
    again = config.from_table(tomllib.loads(config.to_toml(experiment)))
    assert again == experiment


def test_every_part_survives_toml():
    """Each part with its defaults, where it has defaults for all, in the place of its kind."""
    base = config.to_table(recipe("quickstart"))
    kinds = ("partition", "participation", "sync", "solver", "codec", "aggregator", "server", "precision")
    seen = 0
    for kind in kinds:
        for name in config.PARTS[kind]:
            extra = {"participation": {"count": 3}, "partition": {"personal": "head"}}.get(kind, {})
            extra = {} if name in ("all", "full", "local", "lora", "poisson", "twins") else extra
            method = base["method"] | {kind: {"name": name, **extra}} | PAIRED.get(name, {})
            experiment = config.from_table(base | {"method": method})
            assert config.from_table(config.to_table(experiment)) == experiment
            seen += 1
    assert seen >= 40


def test_a_rule_with_its_threshold_and_price():
    """Dynamic synchronisation is one word; threshold and price are tables of their own."""
    table = config.to_table(recipe("quickstart"))
    config.set_path(table, "method.sync", "fda")
    assert config.from_table(table).method.sync == sync.fda()
    config.set_path(table, "method.sync.theta", "plain")
    config.set_path(table, "method.sync.price", {"up": 1e5})
    rule = config.from_table(table).method.sync
    assert rule == sync.fda(theta=sync.thresholds.plain(), price=fleet.Price(up=1e5))
    again = config.to_table(config.from_table(table))
    assert again["method"]["sync"]["theta"]["name"] == "ratio" and config.from_table(again).method.sync == rule
    for published in (sync.fda.published(max_blocks=14), sync.fda(theta=sync.thresholds.power(0.5))):
        experiment = recipe("quickstart")
        experiment = experiment.replace(method=experiment.method.replace(sync=published))
        assert config.from_table(tomllib.loads(config.to_toml(experiment))) == experiment
    config.set_path(table, "method.sync.theta", "power")
    with pytest.raises(UnknownName, match=r"no field 'gama'.*gamma"):
        config.set_path(table, "method.sync.theta.gama", 0.5)


def test_codecs_within_codecs():
    """Their fields are codecs whatever the fields are called; a name is enough; paths reach into them."""
    table = config.to_table(recipe("quickstart"))
    inner = {"name": "chain", "codec": {"name": "top_k", "k": 5}, "then": "quantize"}
    table["method"]["codec"] = {"name": "per_tensor", "codec": inner, "other": "cast", "least": 50}
    codec = config.from_table(table).method.codec
    expected = codecs.per_tensor(codecs.chain(codecs.top_k(k=5), codecs.quantize()), codecs.cast(), least=50)
    assert codec == expected
    table = config.to_table(config.from_table(table))
    config.set_path(table, "method.codec.codec.then.bits", 3)
    config.set_path(table, "method.codec.other", "quantize8")
    codec = config.from_table(table).method.codec
    assert codec.codec.then == codecs.quantize(bits=3) and codec.other == codecs.quantize8()
    with pytest.raises(UnknownName, match=r"method\.codec\.codec\.then: there is no codec 'quantise'"):
        config.set_path(table, "method.codec.codec.then", "quantise")
        config.from_table(table)
    with pytest.raises(UnknownName, match=r"no field 'bitz'"):
        config.set_path(table, "method.codec.other.bitz", 3)


def test_solvers_within_solvers():
    """u and v of Ditto are solvers with fields of their own, and come back as they were."""
    table = config.to_table(recipe("quickstart"))
    table["method"] |= {"partition": "twins", "solver": {"name": "ditto", "lam": 0.3, "v": "adamw"}}
    experiment = config.from_table(table)
    assert experiment.method.solver == solvers.ditto(0.3, solvers.sgd(), solvers.adamw())
    table = tomllib.loads(config.to_toml(experiment))
    assert config.from_table(table) == experiment
    config.set_path(table, "method.solver.u.lr", 0.02)
    config.set_path(table, "method.solver.v", {"name": "prox", "mu": 0.5, "solver": "sgd"})
    found = config.from_table(table).method.solver
    assert found == solvers.ditto(0.3, solvers.sgd(0.02), solvers.prox(0.5, solvers.sgd()))
    with pytest.raises(UnknownName, match=r"method\.solver\.v: there is no solver 'sdg'; did you mean 'sgd'"):
        config.from_table(config.set_path(table, "method.solver.v", "sdg"))


@pytest.mark.parametrize(
    ("setting", "error", "says"),
    [
        ("method.codec=cst", UnknownName, r"method\.codec: there is no codec 'cst'; did you mean 'cast'"),
        ("method.solvr.lr=3", UnknownName, r"did you mean 'solver'"),
        ("method.solver.lr='x'", ConfigError, r"method\.solver\.lr: got 'x'.*number"),
        ("method.solver.lr=-1", ConfigError, r"method\.solver.*lr at least 0; got -1"),
        ("method.codec.dtype='int4'", UnknownName, r"no field 'dtype'"),
        ("method.solver.momentum=2.0", ConfigError, r"momentum in \[0, 1\); got 2\.0"),
        ("rounds=1.5", ConfigError, r"rounds: got 1\.5.*integer"),
        ("rounds=0", ConfigError, r"rounds: at least 1; got 0"),
        ("method.lr=0.5", ConfigError, r"several places: solver\.lr, server\.lr"),
        ("engin='x'", UnknownName, r"did you mean 'engine'"),
        ("data.split.alpha=-1.0", ConfigError, r"alpha"),
        ("data=dgits", UnknownName, r"did you mean 'digits'"),
        ("method.participation.count='many'", ConfigError, r"method\.participation\.count: got 'many'"),
        ("method.sync.pace='slow'", ConfigError, r"method\.sync\.pace: got 'slow'.*own.*longest"),
        ("noequals", ConfigError, r"write path=value"),
        ("rounds.x=3", ConfigError, r"rounds is 30, not a table"),
    ],
)
def test_wrong_settings_say_where_and_what_is_allowed(setting, error, says):
    table = config.to_table(recipe("quickstart"))
    with pytest.raises(error, match=says):
        config.from_table(config.set_path(table, *config.parse_setting(setting)))


def test_settings_reach_their_place():
    def changed(*settings):
        table = config.to_table(recipe("quickstart"))
        for text in settings:
            config.set_path(table, *config.parse_setting(text))
        return config.from_table(table)

    assert changed("data.alpha=0.1").task.data.split.alpha == 0.1
    assert changed("method.codec=cast", "method.codec.dtype=bfloat16").method.codec == taciturn.codecs.cast("bfloat16")
    assert changed("method.sync.steps=3").method.sync.steps == 3
    assert changed("method.solver=prox", "method.solver.mu=0.5").method.solver.mu == 0.5
    assert changed("stop_at.metric=0.9").stop_at.metric == 0.9
    assert changed("target=0.9").target == 0.9
    assert changed("method.broadcast.codec=cast").method.broadcast.codec == taciturn.codecs.cast()
    assert changed("method.participation.fraction=0.2", "method.participation=all").method.participation is not None
    assert changed("model.hidden=[3, 4]").task.model.hidden == (3, 4)


def test_missing_tables_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match=r"data: the table \[data\] is missing"):
        config.from_table({})
    broken = tmp_path / "broken.toml"
    broken.write_text("rounds = \n")
    with pytest.raises(ConfigError, match=r"broken\.toml: not TOML.*line 1"):
        config.read_toml(broken)
    with pytest.raises(ConfigError, match="No such file"):
        config.read_toml(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="`name` is missing"):
        config.from_table({"data": {"clients": 3}, "model": "mlp"})
    with pytest.raises(ConfigError, match="a table with a name, or a name"):
        config.from_table({"data": 3, "model": "mlp"})
    with pytest.raises(ConfigError, match="count or fraction"):
        config.from_table({"data": "digits", "model": "mlp", "method": {"participation": "uniform"}})


def test_parts_of_your_own_are_shown_and_not_read():
    table = config.to_table(taciturn.Experiment(taciturn.Task(nn.Linear(6, 3), make_federation())))
    assert table["data"] == {"name": "custom"}
    with pytest.raises(ConfigError, match="given in Python"):
        config.from_table(table)


def test_recipes_ask_for_their_folder():
    with pytest.raises(ConfigError, match="taciturn run turbofan --data FOLDER"):
        check_data(recipe("turbofan"), "turbofan")
    check_data(recipe("turbofan", "somewhere"), "turbofan")
    with pytest.raises(UnknownName, match="did you mean 'quickstart'"):
        recipe("quikstart")
