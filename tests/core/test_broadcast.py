"""Laws of the way down, with fewer clients a round than there are (M < N), where a shared memory would diverge.

Symbols: x [d] the server's model; held what a receiver has; N receivers, M of them a round; since the version a receiver
acknowledged, -1 for none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taciturn import codecs
from taciturn.core import random
from taciturn.core.broadcast import SNAPSHOT, Broadcast
from taciturn.core.errors import MethodError, WireError
from taciturn.core.state import clone, equal
from taciturn.core.vector import Layout
from taciturn.wire import nbytes

D = 24
LAYOUT = Layout(("w",), ((D,),))
quick = settings(max_examples=40, deadline=None)


@dataclass(frozen=True)
class Largest:
    """The k values of largest magnitude: 8 k bytes, so that a log of several frames is worth keeping."""

    lossy: ClassVar[bool] = True
    k: int = 1

    def init(self, layout):
        return {}, {}

    def encode(self, u, tx, key, *, layout, knobs):
        index = u.abs().topk(self.k).indices
        return {"index": index.to(torch.int32), "values": u[index]}, tx

    def decode(self, payload, rx, *, layout):
        return torch.zeros(layout.d).index_put((payload["index"].long(),), payload["values"]), rx


@dataclass(frozen=True)
class Dithered(Largest):
    """float16 after noise from the key: what is decoded cannot be computed again without the payload."""

    def encode(self, u, tx, key, *, layout, knobs):
        return {"values": (u * (1 + 0.01 * random.normal(key, len(u)))).half()}, tx

    def decode(self, payload, rx, *, layout):
        return payload["values"].float(), rx


@dataclass(frozen=True)
class Fat(Largest):
    """float64: a frame is larger than a snapshot."""

    def encode(self, u, tx, key, *, layout, knobs):
        return {"values": u.double()}, tx

    def decode(self, payload, rx, *, layout):
        return payload["values"].float(), rx


BROADCASTS = {
    "model identity": Broadcast(codecs.identity()),
    "model float16": Broadcast(codecs.cast()),
    "model bfloat16": Broadcast(codecs.cast("bfloat16")),
    "model dithered": Broadcast(Dithered()),
    "change float16": Broadcast(codecs.cast(), "change"),
    "change bfloat16": Broadcast(codecs.cast("bfloat16"), "change"),
    "change dithered": Broadcast(Dithered(), "change"),
    "change largest": Broadcast(Largest(1), "change"),
    "change largest 3": Broadcast(Largest(3), "change"),
    "change fat": Broadcast(Fat(), "change"),
}
CHANGES = [name for name in BROADCASTS if name.startswith("change")]


def models(rounds: int, seed: int = 0) -> list[torch.Tensor]:
    """A walk of x."""
    steps = random.normal(random.key(seed), rounds, D)
    return list(steps.cumsum(0).unbind())


def publish(broadcast: Broadcast, xs: list[torch.Tensor]) -> list:
    """The casts of all rounds."""
    casts = [None]
    for r, x in enumerate(xs):
        casts.append(broadcast.publish(x, r, casts[-1], LAYOUT, random.fold(random.key(1), r)))
    return casts[1:]


@pytest.mark.parametrize("name", BROADCASTS)
@quick
@given(st.lists(st.sets(st.integers(0, 4), max_size=2), min_size=1, max_size=12))
def test_whatever_a_receiver_missed_it_ends_with_what_the_server_says_it_holds(name, cohorts):
    broadcast = BROADCASTS[name]
    receivers = [({}, -1)] * 5
    for cast, cohort in zip(publish(broadcast, models(len(cohorts))), cohorts, strict=True):
        for i in cohort:
            held, since = receivers[i]
            for frame in broadcast.frames(cast, since):
                held = broadcast.apply(held, frame, LAYOUT)
            assert equal(held, cast.held)
            receivers[i] = held, cast.version


@pytest.mark.parametrize("name", BROADCASTS)
def test_publishing_a_round_twice_is_one_publication(name):
    broadcast, (x, y) = BROADCASTS[name], models(2)
    first = broadcast.publish(x, 4, None, LAYOUT, random.key(0))
    assert broadcast.publish(y, 4, first, LAYOUT, random.key(1)) is first
    second = broadcast.publish(y, 5, first, LAYOUT, random.key(1))
    assert (first.version, first.source, second.version, second.source) == (0, 4, 1, 5)
    assert not equal(first.held, second.held)


@pytest.mark.parametrize("name", BROADCASTS)
def test_a_publication_changes_nothing_that_was_there(name):
    broadcast, xs = BROADCASTS[name], models(6)
    kept, cast = [x.clone() for x in xs], None
    for r, x in enumerate(xs):
        before = cast and (clone(cast.held), [(version, clone(frame)) for version, frame in cast.log])
        new = broadcast.publish(x, r, cast, LAYOUT, random.key(r))
        if cast:
            assert equal(cast.held, before[0]) and len(cast.log) == len(before[1])
            assert all(v == w and equal(a, b) for (v, a), (w, b) in zip(cast.log, before[1], strict=True))
        cast = new
    assert all(map(torch.equal, xs, kept))


@pytest.mark.parametrize("name", CHANGES)
def test_the_smaller_of_log_and_snapshot_is_sent(name):
    """For every version since: all frames since then if they are at most 4 d bytes, else one snapshot."""
    broadcast = BROADCASTS[name]
    frames: list[dict] = []
    snapshot = 4 * D
    for cast in publish(broadcast, models(30)):
        if cast.log and cast.log[-1][0] == cast.version:
            frames.append(cast.log[-1][1])
        elif cast.version:
            frames.append({"too large": torch.zeros(2 * D)})
        assert len(frames) == cast.version
        for since in range(-1, cast.version):
            sent = broadcast.frames(cast, since)
            replay = frames[since:] if since >= 0 else []
            fits = since >= 0 and sum(map(nbytes, replay)) <= snapshot
            if fits:
                assert len(sent) == len(replay) and all(map(equal, sent, replay))
            else:
                assert len(sent) == 1 and equal(sent[0], {SNAPSHOT: cast.held["x"]})
            assert sum(map(nbytes, sent)) <= snapshot
        assert broadcast.frames(cast, cast.version) == []
        assert sum(nbytes(frame) for _, frame in cast.log) <= snapshot, "the log does not grow"


@pytest.mark.parametrize("name", [name for name in BROADCASTS if name not in CHANGES])
def test_a_model_is_one_frame_for_everybody(name):
    broadcast = BROADCASTS[name]
    for cast in publish(broadcast, models(4)):
        assert len(cast.log) == 1
        assert all(equal(broadcast.frames(cast, since)[0], cast.log[0][1]) for since in range(-1, cast.version))
        assert all(len(broadcast.frames(cast, since)) == 1 for since in range(-1, cast.version))
        assert broadcast.frames(cast, cast.version) == []


@pytest.mark.parametrize(
    ("name", "since", "size"),
    [
        ("model identity", -1, 4 * D), ("model float16", -1, 2 * D), ("model bfloat16", 0, 2 * D),
        ("change float16", -1, 4 * D), ("change float16", 8, 2 * D), ("change float16", 7, 4 * D),
        ("change float16", 6, 4 * D), ("change largest", 8, 8), ("change largest", 0, 72), ("change fat", 8, 4 * D),
    ],
)  # fmt: skip
def test_bytes_of_the_frames(name, since, size):
    """After ten publications (versions 0 to 9), d = 24."""
    sent = BROADCASTS[name].frames(publish(BROADCASTS[name], models(10))[-1], since)
    assert sum(map(nbytes, sent)) == sum(int(nbytes(frame)) for frame in sent) == size


def test_lossless_is_exact():
    for x, cast in zip(models(5), publish(BROADCASTS["model identity"], models(5)), strict=True):
        assert equal(cast.held, {"x": x})


def test_a_change_needs_a_model():
    broadcast = BROADCASTS["change float16"]
    cast = publish(broadcast, models(2))[-1]
    with pytest.raises(WireError, match="a change of the model arrived before any model"):
        broadcast.apply({}, cast.log[-1][1], LAYOUT)


# ------------------------------------------------------------------------------------------- 200 rounds, M < N

ROUNDS, N, M = 200, 12, 3


def federate(broadcast: Broadcast):
    """FedAvg on f_i(x) = |x - c_i|^2 / 2 with M of N clients a round -> (x of each round, |held - x|, |x - held before|).

    Clients train from the copy that their own frames gave them, and each keeps it until it is drawn again.
    """
    centers = 3 * random.normal(random.key(5), N, D) + 10
    x, cast, copies = torch.zeros(D), None, [({}, -1)] * N
    path, errors, changes = [], [], []
    for r in range(ROUNDS):
        changes.append(float((x - cast.held["x"]).norm()) if cast else 0.0)
        cast = broadcast.publish(x, r, cast, LAYOUT, random.fold(random.key(2), r))
        errors.append(float((x - cast.held["x"]).norm()))
        updates = []
        for i in random.choice(random.fold(random.key(3), r), N, M).tolist():
            held, since = copies[i]
            for frame in broadcast.frames(cast, since):
                held = broadcast.apply(held, frame, LAYOUT)
            copies[i] = held, cast.version
            y = held["x"]
            for _ in range(3):
                y = y - 0.2 * (y - centers[i])
            updates.append(y - held["x"])
        x = x + torch.stack(updates).mean(0)
        path.append(x)
    return torch.stack(path), torch.tensor(errors), torch.tensor(changes)


@pytest.fixture(scope="module")
def lossless():
    return federate(BROADCASTS["model identity"])[0]


@pytest.mark.parametrize(("name", "relative"), [("model float16", 2**-11), ("model bfloat16", 2**-8)])
def test_the_error_of_a_model_is_the_codecs_own(name, relative, lossless):
    path, errors, _ = federate(BROADCASTS[name])
    norms = torch.cat([torch.zeros(1), path[:-1].norm(dim=1)])
    assert (errors <= relative * norms).all()
    assert errors[1:].min() > 0, "a lossy codec that loses nothing tests nothing"
    assert ((path - lossless).norm(dim=1) <= 4 * relative * lossless.norm(dim=1)).all()


@pytest.mark.parametrize(("name", "relative"), [("change float16", 2**-11), ("change bfloat16", 2**-8)])
def test_the_error_of_a_change_does_not_add_up(name, relative, lossless):
    """|x - held| <= r |x - held before| plus the rounding of one float32 addition, in round 200 as in round 2."""
    path, errors, changes = federate(BROADCASTS[name])
    norms = torch.cat([torch.zeros(1), path[:-1].norm(dim=1)])
    assert (errors <= relative * changes + 2**-23 * norms).all()
    assert errors[1:].min() > 0
    assert errors[-50:].max() <= errors[1:50].max()
    assert ((path - lossless).norm(dim=1) <= 4 * relative * lossless.norm(dim=1)).all()


def test_a_change_of_few_values_catches_up(lossless):
    """A third of the values a round: what is held lags behind by a bounded amount, and no copy diverges."""
    path, errors, _ = federate(Broadcast(Largest(8), "change"))
    assert errors[100:].max() < 0.25 * path[100:].norm(dim=1).min()
    assert errors[-50:].max() < 1.5 * errors[50:100].max()
    assert float((path[-50:] - lossless[-50:]).norm(dim=1).mean() / lossless[-50:].norm(dim=1).mean()) < 0.25


def test_a_known_start_is_never_sent_and_all_hold_the_same():
    """Newcomers of every round, who hold the first x, end with what the server says; far behind, by a snapshot."""
    way, x0 = Broadcast(Largest(k=1), "change", "known"), random.normal(random.key(7), D)
    cast, x, seen = None, x0, set()
    for source in range(30):
        cast = way.publish(x, source, cast, LAYOUT, random.key(source))
        frames = way.frames(cast, -1)
        held = {"x": x0}
        for frame in frames:
            held = way.apply(held, frame, LAYOUT)
        assert equal(held, cast.held)
        seen.add("snapshot" if frames and SNAPSHOT in frames[0] else len(frames))
        assert sum(int(nbytes(frame)) for frame in frames) <= 4 * D + 1
        x = x + random.normal(random.fold(random.key(8), source), D)
    assert {0, 1, 2, "snapshot"} <= seen and way.frames(way.publish(x0, 0, None, LAYOUT, random.key(0)), -1) == []
    assert [SNAPSHOT in frame for frame in way.frames(cast, cast.version + 5)] == [True], "a server that was put back"
    with pytest.raises(MethodError, match=r'start = "known"'):
        Broadcast(codecs.identity(), "model", "known")
