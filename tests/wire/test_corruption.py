"""Messages that are almost right, with checksums that fit: a `WireError` or a valid frame, and no large allocation."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
from bench.fuzz_wire import LARGEST, Fuzzer, read

from taciturn.core.kernel import without_library


@pytest.fixture(scope="module")
def fuzzer():
    return Fuzzer(seed=7)


def test_what_was_not_changed_is_read(fuzzer):
    for message in fuzzer.messages:
        assert read("message", message, fuzzer.schemas) == "valid"
    for message in fuzzer.introductions:
        assert read("schema", message, fuzzer.schemas) in ("valid", "refused"), (
            "the schema is; an empty message need not be"
        )


@pytest.mark.parametrize("slow", [False, True])
def test_changed_messages_are_valid_or_refused(fuzzer, slow):
    found = {"valid": 0, "refused": 0}
    for what, data in itertools.islice(fuzzer.inputs(), 6000):
        if slow:
            with without_library():
                outcome = read(what, data, fuzzer.schemas)
        else:
            outcome = read(what, data, fuzzer.schemas)
        assert outcome in found, outcome
        found[outcome] += 1
    assert found["valid"] > 300 and found["refused"] > 3000, "both sides of the border are looked at"


def test_no_changed_message_allocates_much(fuzzer):
    tracemalloc.start()
    try:
        for what, data in itertools.islice(fuzzer.inputs(), 1500):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            read(what, data, fuzzer.schemas)
            assert tracemalloc.get_traced_memory()[1] - before < 3 * LARGEST, data.hex()
    finally:
        tracemalloc.stop()
