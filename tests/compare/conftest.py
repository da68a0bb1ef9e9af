"""Jobs of a comparison run in this process: no test waits for another Python to start."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from taciturn.compare import jobs


class Here:
    """In place of a pool of processes."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, fn, job):
        future = Future()
        try:
            future.set_result(fn(job))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """For every test of this folder."""
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", Here)
