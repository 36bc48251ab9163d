"""The store of jobs: who may change what, between processes that may die at any moment."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from sv3d_fast.serve.jobs import CANCELLED, DONE, FAILED, QUEUED, RUNNING, JobStore, QueueFullError, result_files


@pytest.fixture
def store(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite")
    yield store
    store.close()


def submit(store, *names, limit=10):
    for name in names:
        store.submit(name, None, "orbit", {"seed": 1}, limit)


def test_every_job_is_claimed_once_and_in_order(store, tmp_path):
    names = [f"job{n}" for n in range(30)]
    submit(store, *names, limit=30)
    others = [JobStore(tmp_path / "jobs.sqlite") for _ in range(4)]
    assert store.claim("w").id == "job0"
    with ThreadPoolExecutor(4) as pool:
        claimed = [j.id for j in pool.map(lambda n: others[n % 4].claim("w"), range(29))]
    assert sorted(claimed) == sorted(names[1:])
    assert store.claim("w") is None


def test_the_bound_holds_against_many_at_once(store, tmp_path):
    others = [JobStore(tmp_path / "jobs.sqlite") for _ in range(4)]

    def attempt(n):
        try:
            submit(others[n % 4], f"job{n}", limit=5)
        except QueueFullError:
            return 0
        return 1

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(attempt, range(20))) == 5


def test_what_an_abandoned_attempt_says_changes_nothing(store):
    submit(store, "a")
    old = store.claim("w1")
    store.recover("w1", 3)
    new = store.claim("w2")
    assert not store.is_held(old)
    assert store.is_held(new)
    store.report(old, "progress", {"done": 9})
    store.finish(old, [("stale", 1)])
    store.fail(old, "stale")
    store.release(old)
    now = store.get("a")
    assert (now.state, now.attempts, now.progress, store.files("a"), store.events("a", 0)) == (RUNNING, 2, None, {}, [])
    store.finish(new, [("mesh.glb", 7)])
    assert (store.get("a").state, store.files("a")) == (DONE, {"mesh.glb": 7})


def test_a_cancellation_that_was_accepted_wins(store):
    submit(store, "a", "b", "c", "d")
    for end in (lambda j: store.finish(j, [("x", 1)]), lambda j: store.fail(j, "no"), store.release,
                lambda j: store.recover("w", 9)):  # fmt: skip
        job = store.claim("w")
        assert store.cancel(job.id).state == RUNNING
        assert not store.is_held(job)
        end(job)
        now = store.get(job.id)
        assert (now.state, now.reason, store.files(job.id)) == (CANCELLED, None, {})
        assert now.ended is not None


def test_recovery_counts_attempts_and_release_does_not(store):
    submit(store, "a")
    for attempt in (1, 2):
        store.release(store.claim("w"))
        job = store.claim("w")
        assert job.attempts == attempt
        assert store.recover("other", 2) == []
        (now,) = store.recover(None if attempt == 1 else "w", 2)
    assert (now.state, now.reason) == (FAILED, "the worker process died in each of 2 attempts")
    assert store.claim("w") is None
    assert store.cancel("a").state == FAILED


def test_it_outlives_its_process_and_forgets_when_told(store, tmp_path):
    submit(store, "a", "b")
    job = store.claim("w")
    store.report(job, "progress", {"done": 1})
    store.report(job, "warning", {"message": "x"})
    store.finish(job, [("f", 1)])
    again = JobStore(tmp_path / "jobs.sqlite")
    assert [kind for _, kind, _ in again.events("a", 0)] == ["progress", "warning"]
    assert again.events("a", 1)[0][:2] == (2, "warning")
    assert again.get("a").progress == {"done": 1}
    assert again.counts() == {QUEUED: 1, RUNNING: 0, DONE: 1, FAILED: 0, CANCELLED: 0}
    assert again.mean_seconds() >= 0
    assert again.purge(again.get("a").ended) == []
    assert again.purge(again.get("a").ended + 1) == ["a"]
    assert (again.get("a"), again.files("a"), again.events("a", 0), again.ids()) == (None, {}, [], {"b"})


def test_files_are_regular_and_seen(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name in ("sub/a.png", "b", ".c", "sub/.git/d"):
        (tmp_path / name).write_text("12345")
    os.symlink("/etc/passwd", tmp_path / "e")
    assert result_files(tmp_path) == [("b", 5), ("sub/a.png", 5)]
