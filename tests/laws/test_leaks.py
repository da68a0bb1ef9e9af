"""A client never sends its data, its labels, its personal parts or what it keeps: every letter of a run is searched.

What is looked for in each letter (frames and order): sixteen neighbouring values of a secret, as they lie in memory in any
float, as text, and, in every array that a frame holds once it is decoded, up to scale and shift (correlation). So a copy is
found in another type, quantized or scaled; what can be inferred from an honest update is not (docs/privacy.md).

Symbols: x [n, 16] inputs; y [n] labels; v, b personal parameters and buffers; p duals; e what a codec has not sent yet.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from conftest import make_task
from drive import drive
from engines.fake_line import line_of, sites_of
from taciturn import Method, codecs, methods, participation, partition, solvers, sync
from taciturn.core.broadcast import Broadcast
from taciturn.core.state import load_state
from taciturn.engines import site as at_site
from taciturn.engines.letters import read

M, ALIKE, SIZES = 16, 0.999, (24, 40, 33, 20)
SGD = solvers.sgd(lr=0.1)
SOME = {"participation": participation.uniform(count=3), "batch_size": 8}


class Wide(nn.Module):
    """Sixteen features, statistics of its own, a head of 51 values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(M, M)
        self.norm = nn.BatchNorm1d(M)
        self.head = nn.Linear(M, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, 16] -> [b, 3]."""
        return self.head(torch.relu(self.norm(self.stem(x))))


class Plain(Wide):
    """The same without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(M)


OWN = partition.layers(personal=("head", "norms"))
METHODS = {
    "duals, head, statistics, looks, top-k": (
        methods.fedapm(OWN, u=SGD, rho=0.2, codec=codecs.top_k(share=0.3), **SOME).replace(sync=sync.fda(max_blocks=3)),
        Wide,
    ),
    "adapters, a factor and the head, linear looks, 8 bits": (
        Method(
            partition=partition.lora(rank=4, share="A", rest="personal", personal="head"),
            solver=solvers.adamw(lr=0.01), sync=sync.fda(monitor="linear", max_blocks=3),
            codec=codecs.error_feedback(codecs.quantize8()),
            broadcast=Broadcast(codecs.quantize8(), of="change"), **SOME,
        ), Plain
    ),
}  # fmt: skip


def run(folder, name, rounds=2):
    """-> letters that crossed, and the secrets of all clients by kind: arrays [k, 16] float64."""
    method, net = METHODS[name]
    task = make_task(lambda: method.partition.prepare(net()), sizes=SIZES, features=M)
    line = line_of(task, method, folder)
    server, engine, *_ = drive(task, method, "flower", rounds=rounds, sites=lambda *_: sites_of(line, method))
    if rounds == 1:
        return [letter for _, letter in line.log], secrets_of(task, line.site, folder)
    cast = method.broadcast.publish(server.x, server.round, server.cast, line.site.work.split.layout, torch.tensor(9))
    engine.evaluate(torch.arange(len(SIZES)), cast, "test")
    letters = [letter for _, letter in line.log]
    return letters, secrets_of(task, line.site, folder)


def secrets_of(task, site, folder):
    found = {"x": [], "y": []}
    for i, size in enumerate(SIZES):
        rows = task.train.fetch(torch.tensor([i]), torch.arange(size).unsqueeze(0))
        found["x"] += [rows["input"][0]]
        found["y"] += [rows["target"][0].double()[:M].unsqueeze(0)]
    start = site.work.newcomer()
    for path in sorted(folder.rglob("generation-*.safetensors")):
        own = at_site.fitted(start, load_state(path)[0]["own"], path.name)
        kept = {"v": own["v"], "b": own["b"], "p": own["solver"].get("p"), "e": own["tx"].get("error")}
        for kind, value in kept.items():
            if value is not None and len(value) >= M:
                found.setdefault(kind, []).append(value[: len(value) // M * M].view(-1, M))
    chunks = {kind: torch.cat([one.double() for one in parts]) for kind, parts in found.items()}
    return {kind: rows[rows.std(1) > 1e-9] for kind, rows in chunks.items()}


# ------------------------------------------------------------------------------------------------------------ the search


def _unit(rows):
    rows = rows - rows.mean(1, keepdim=True)
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)


def leaks(letters, secrets):
    """Kinds of secrets that some letter gives away."""
    everything, schemas, found = [], {}, set()
    for letter in letters:
        text = json.dumps(letter.order)
        everything += [*letter.frames, text.encode()]
        arrays = [array for frame in read(letter.frames, schemas, 1 << 24) for array in frame.payload.values()]
        arrays += [torch.tensor(numbers) for numbers in _numbers(letter.order)]
        for array in arrays:
            flat = array.reshape(-1).double()
            if len(flat) >= M and bool(torch.isfinite(flat).all()):
                windows = _unit(flat.unfold(0, M, 1))
                found |= {kind for kind, rows in secrets.items() if float((windows @ _unit(rows).T).abs().max()) > ALIKE}
    seen = b"\0\0".join(everything)
    for kind, rows in secrets.items():
        if any(one in seen for row in rows for one in _spellings(row, whole=kind == "y")):
            found.add(kind)
    return found


def _numbers(order):
    """Lists of numbers in an order."""
    if isinstance(order, list) and order and all(isinstance(one, (int, float)) for one in order):
        yield [float(one) for one in order]
    elif isinstance(order, (dict, list)):
        for one in order.values() if isinstance(order, dict) else order:
            yield from _numbers(one)


def _spellings(row, whole):
    """Four values (labels: all sixteen) as bytes of each type, and one value (labels: four) as text."""
    part = row if whole else row[:4]
    types = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    types += (torch.uint8, torch.int16, torch.int32, torch.int64) if whole else ()
    for dtype in types:
        data = part.to(dtype).view(torch.uint8).numpy().tobytes()
        if len(set(data)) > 2 or whole:
            yield data
    if whole:
        yield b", ".join(b"%d" % int(one) for one in row)
    else:
        yield from (f"{abs(float(one)):.5f}"[:7].encode() for one in row[:4] if abs(float(one)) > 1e-2)


@pytest.mark.parametrize("name", METHODS)
def test_no_letter_holds_a_secret(tmp_path, name):
    letters, secrets = run(tmp_path, name)
    wanted = {"x", "y", "v"} | ({"p", "b"} if "duals" in name else {"e"})
    assert wanted <= secrets.keys() and all(len(rows) > 3 for rows in secrets.values())
    assert {letter.order.get("command") for letter in letters} >= {"hello", "observe", "collect", "measure"}
    assert leaks(letters, secrets) == set()
    for letter in letters:
        if "command" not in letter.order:
            assert letter.order.keys() <= {"run", "session", "number", "edition", "error", "seconds"}


def _drawn(desk, kind):
    """A secret of the client at a desk, as it lies there when it answers."""
    rows = desk.site.work.task.train.fetch(torch.tensor([desk.i]), torch.arange(M).unsqueeze(0))
    if kind in "xy":
        return rows["input"][0, 3] if kind == "x" else rows["target"][0]
    own = load_state(desk._path(desk.round + 1))[0]["own"]
    kept = {"p": own.get("solver", {}).get("p"), "e": own.get("tx", {}).get("error")} | own
    return kept[kind][:M]


INJECTED = {
    "an input": ("x", lambda s: {"note": s}),
    "an input, doubled and shifted, in float16": ("x", lambda s: {"note": (2 * s + 1).half()}),
    "an input among other values": ("x", lambda s: {"note": torch.cat([torch.randn(50), s.double(), torch.randn(9)])}),
    "an input in 8 bits": ("x", lambda s: {"note": (40 * s + 128).clamp(0, 255).to(torch.uint8)}),
    "labels": ("y", lambda s: {"note": s.to(torch.uint8)}),
    "labels in two bits each": ("y", lambda s: {"note": s.to(torch.uint8), "note.radix": torch.tensor(2).byte()}),
    "personal parameters": ("v", lambda s: {"note": s}),
    "personal parameters with the sign turned": ("v", lambda s: {"note": -3 * s}),
    "statistics": ("b", lambda s: {"note": s}),
    "duals": ("p", lambda s: {"note": s.double()}),
}  # fmt: skip


@pytest.mark.parametrize("how", INJECTED)
def test_a_leak_in_a_frame_is_found(tmp_path, monkeypatch, how):
    kind, spelled = INJECTED[how]
    letters, secrets = injected(tmp_path, monkeypatch, lambda desk: spelled(_drawn(desk, kind)), {})
    assert kind in leaks(letters, secrets)


def test_what_a_codec_kept_is_found(tmp_path, monkeypatch):
    name = next(name for name in METHODS if "adapters" in name)
    letters, secrets = injected(tmp_path, monkeypatch, lambda desk: {"note": _drawn(desk, "e")}, {}, name)
    assert leaks(letters, secrets) == {"e"}


@pytest.mark.parametrize("kind", ["x", "v"])
def test_a_leak_in_an_order_is_found(tmp_path, monkeypatch, kind):
    letters, secrets = injected(tmp_path, monkeypatch, lambda desk: {}, {"note": lambda desk: _drawn(desk, kind).tolist()})
    assert kind in leaks(letters, secrets)


def injected(folder, monkeypatch, payload, facts, name=next(iter(METHODS))):
    """A run whose clients say more than they should with each upload: what they say is added to its letters."""
    plain, told = at_site._Desk._reply, []

    def talks(desk, kind, said, *rest, **more):
        reply = plain(desk, kind, said, *rest, **more)
        if kind == "update":
            extra = payload(desk)
            frames = plain(desk, kind, said | extra, *rest, **more).frames if extra else ()
            told.append(reply.reply(frames, **{key: value(desk) for key, value in facts.items()}))
        return reply  # the server would refuse another schema

    monkeypatch.setattr(at_site._Desk, "_reply", talks)
    letters, secrets = run(folder, name, rounds=1)
    assert told
    return letters + told, secrets


def test_an_error_says_nothing_of_the_data(tmp_path, monkeypatch, capsys):
    """The text of an exception of the user's model may hold data: it stays at the site."""
    method, net = next(iter(METHODS.values()))
    task = make_task(lambda: method.partition.prepare(net()), sizes=SIZES, features=M)
    line = line_of(task, method, tmp_path)
    sites = sites_of(line, method)

    def broken(self, params, batch, key):
        raise ValueError(f"a strange sample: {batch['input'][0].tolist()}")

    monkeypatch.setattr(type(task), "loss", broken)
    with pytest.raises(Exception, match="no client"):
        drive(task, method, "flower", rounds=1, sites=lambda *_: sites)
    letters = [letter for _, letter in line.log]
    assert any("ValueError" in letter.order.get("error", "") for letter in letters)
    assert leaks(letters, secrets_of(task, line.site, tmp_path)) == set()
    assert "a strange sample" in capsys.readouterr().err
