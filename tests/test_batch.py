"""A batch: pictures fail alone, finished ones stay finished, and a record cut short anywhere is gone on from."""

import json
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from small_run import SMALL, blob

from sv3d_fast import batch, batch_picture, orbit_stage, planned
from sv3d_fast.batch import PAGE, RESULTS, batching, read_results
from sv3d_fast.batch_picture import DONE, FAILED, Made, Maker, reconstruct
from sv3d_fast.batch_source import Job
from sv3d_fast.cli import main
from sv3d_fast.events import Progress, StageResumed, Warned, finish
from sv3d_fast.orbit_io import load_orbit
from sv3d_fast.settings import Settings

pytestmark = pytest.mark.usefixtures("quick_batch")

SETTINGS = Settings(**SMALL)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    blob(folder / "b.png")
    blob(folder / "a.png", (40, 160, 60, 255))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not a picture either")
    return folder


def lines(output):
    return [json.loads(line) for line in (output / RESULTS).read_text().splitlines()]


def no_model(settings):
    raise AssertionError("the model was opened")


def test_a_picture_fails_alone_and_a_second_call_does_nothing(photos, tmp_path, monkeypatch):
    output, events = tmp_path / "out", []
    running = batching(photos, output, SETTINGS)
    while True:
        try:
            events.append(next(running))
        except StopIteration as stop:
            summary = stop.value
            break
    assert [(row["name"], row["state"]) for row in summary.rows] == [("a", DONE), ("b", DONE), ("broken", FAILED)]
    assert summary.failed == 1
    assert {row["name"] for row in lines(output)} == {"a", "b", "broken"}
    for name in ("a", "b"):
        assert (output / name / "mesh.glb").stat().st_size > 1000
        assert summary.rows[0]["figures"]["Watertight"] is True
    counted = [(e.done, e.total) for e in events if isinstance(e, Progress)]
    assert counted == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert any(isinstance(e, Warned) and "broken.png" in e.message for e in events)
    page = (output / PAGE).read_text()
    assert "2 of 3 pictures" in page
    assert 'href="a/report.html"' in page

    before = (output / RESULTS).read_bytes()
    monkeypatch.setattr(batch_picture, "open_model", no_model)
    again = finish(batching(photos, output, SETTINGS))
    assert again.rows == summary.rows
    assert (output / RESULTS).read_bytes() == before


def test_failed_pictures_are_tried_again_when_asked_or_changed(photos, tmp_path):
    output = tmp_path / "out"
    (photos / "a.png").unlink()
    (photos / "b.png").unlink()
    assert finish(batching(photos, output, SETTINGS)).failed == 1
    assert finish(batching(photos, output, SETTINGS)).failed == 1
    assert len(lines(output)) == 1
    assert finish(batching(photos, output, SETTINGS, retry_failed=True)).failed == 1
    assert len(lines(output)) == 2
    blob(photos / "broken.png")
    summary = finish(batching(photos, output, SETTINGS))
    assert [row["state"] for row in summary.rows] == [DONE]
    assert len(lines(output)) == 3


@pytest.mark.parametrize("kept", [0.0, 0.4, 0.98])
def test_goes_on_from_a_record_that_was_cut_anywhere(photos, tmp_path, kept, monkeypatch):
    (photos / "broken.png").unlink()
    output = tmp_path / "out"
    whole = finish(batching(photos, output, SETTINGS))
    record = (output / RESULTS).read_bytes()
    (output / RESULTS).write_bytes(record[: int(kept * len(record))])
    resumed, making = [], orbit_stage.making

    def watched(*args, **kwargs):
        running = making(*args, **kwargs)
        while True:
            try:
                event = next(running)
            except StopIteration as stop:
                return stop.value
            resumed.append(isinstance(event, StageResumed))
            yield event

    monkeypatch.setattr(batch_picture, "making", watched)
    again = finish(batching(photos, output, SETTINGS))
    assert [row["figures"] for row in again.rows] == [row["figures"] for row in whole.rows]
    assert any(resumed)  # what stood in the folders was taken up, not made again
    assert set(read_results(output / RESULTS)) == {"a", "b"}


def test_the_second_half_writes_the_orbit_and_accounts_for_both(photos, tmp_path):
    maker, job = Maker(), Job(photos / "a.png", "a", SETTINGS)
    made = maker.make(job, tmp_path)
    assert isinstance(made, Made)
    assert list((tmp_path / "a").iterdir()) == []
    assert reconstruct(pickle.loads(pickle.dumps(made))).row["state"] == DONE  # as from another process
    entry = json.loads((tmp_path / "a" / "manifest.json").read_text())["stages"]["orbit"]
    assert entry["seconds"] > made.orbit.entry["seconds"]
    assert entry["peak_memory_bytes"] >= made.orbit.entry["peak_memory_bytes"] > 0
    assert torch.equal(load_orbit(tmp_path / "a").frames, made.orbit.value.frames)
    again = maker.make(job, tmp_path)
    assert isinstance(again, Made)
    assert again.orbit.entry is None  # nothing to write
    assert torch.equal(again.orbit.value.frames, made.orbit.value.frames)


def test_links_of_the_page_are_quoted():
    rows = [{"name": "a#1 <b>", "state": DONE, "seconds": 2.0}, {"name": "c?", "state": FAILED, "reason": "x < y"}]
    page = batch._page(rows)
    assert 'href="a%231%20%3Cb%3E/report.html"' in page
    assert "<b>a#1 &lt;b&gt;</b>" in page
    assert "failed: x &lt; y" in page
    assert "1 of 2 pictures" in page


def test_networks_serve_one_picture_while_the_next_is_read(photos, tmp_path, monkeypatch):
    (photos / "broken.png").unlink()
    for name in "cd":
        blob(photos / f"{name}.png", (90, 60, 200, 255))
    change, read, inside, most, ahead = threading.Condition(), [], [], [], []
    load_subject, generating = orbit_stage.load_subject, planned.generating

    def reading(*args, **kwargs):
        subject = load_subject(*args, **kwargs)
        with change:
            read.append(subject)
            change.notify_all()
        return subject

    def watched(*args, **kwargs):
        inside.append(1)
        most.append(len(inside))
        with change:  # the networks go on as soon as the next picture, if there is one, is read
            ahead.append(change.wait_for(lambda: len(read) >= min(len(most) + 1, 4), timeout=480))
        made = yield from generating(*args, **kwargs)
        inside.pop()
        return made

    monkeypatch.setattr(orbit_stage, "load_subject", reading)
    monkeypatch.setattr(planned, "generating", watched)
    assert finish(batching(photos, tmp_path / "out", SETTINGS)).failed == 0
    assert most == [1] * 4
    assert ahead == [True] * 4
    waits = [json.loads((tmp_path / "out" / n / "manifest.json").read_text())["stages"]["orbit"] for n in "abcd"]
    assert sorted(w["waited_seconds"] for w in waits)[1] > 0
    assert all(w["waited_seconds"] <= w["seconds"] for w in waits)


def test_a_network_is_opened_once_for_each_precision(photos, tmp_path, monkeypatch):
    opened, open_model = [], batch_picture.open_model
    monkeypatch.setattr(batch_picture, "open_model", lambda s: (opened.append(s.dtype), open_model(s))[1])
    maker, dtypes = Maker(), ("float32", "bfloat16", "float32", "bfloat16")
    made = [
        maker.make(Job(photos / "a.png", f"{number}", replace(SETTINGS, dtype=dtype)), tmp_path)
        for number, dtype in enumerate(dtypes)
    ]
    assert opened == ["float32", "bfloat16"]
    frames = [one.orbit.value.frames for one in made]
    assert torch.equal(frames[0], frames[2])
    assert torch.equal(frames[1], frames[3])
    assert 0 < (frames[0].float() - frames[1].float()).abs().mean() < 8


@pytest.mark.parametrize("workers", [0, 17])
def test_bad_numbers_of_workers(photos, tmp_path, workers):
    with pytest.raises(ValueError, match=f"workers: expected 1 to 16, got {workers}"):
        finish(batching(photos, tmp_path / "out", SETTINGS, workers=workers))


def test_an_accelerator_that_failed_ends_the_batch_and_blames_no_picture(photos, tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise torch.AcceleratorError("an illegal memory access was encountered")
        yield

    monkeypatch.setattr(planned, "generating", failing)
    (photos / "broken.png").unlink()
    with pytest.raises(torch.AcceleratorError):
        finish(batching(photos, tmp_path / "out", SETTINGS))
    assert not (tmp_path / "out" / RESULTS).exists()


def test_stopping_midway_leaves_what_is_finished(photos, tmp_path):
    output = tmp_path / "out"
    running = batching(photos, output, SETTINGS)
    for event in running:
        if isinstance(event, Progress) and event.done:
            break
    running.close()
    (row,) = lines(output)
    assert row["name"] in ("a", "broken")
    assert not (output / PAGE).exists()
    assert len(finish(batching(photos, output, SETTINGS)).rows) == 3


def test_an_error_of_ours_fails_one_picture_with_its_kind(photos, tmp_path, monkeypatch):
    reconstructing = batch_picture.reconstructing_orbit

    def sometimes(video, settings, record):
        if record.folder.name == "a":
            raise ZeroDivisionError("by zero")
        return reconstructing(video, settings, record)

    monkeypatch.setattr(batch_picture, "reconstructing_orbit", sometimes)
    (photos / "broken.png").unlink()
    summary = finish(batching(photos, tmp_path / "out", SETTINGS))
    assert [row["state"] for row in summary.rows] == [FAILED, DONE]
    assert summary.rows[0]["reason"] == "ZeroDivisionError: by zero"


def test_other_settings_make_it_again(photos, tmp_path):
    for name in ("a.png", "broken.png"):
        (photos / name).unlink()
    output = tmp_path / "out"
    finish(batching(photos, output, SETTINGS))
    finish(batching(photos, output, Settings(**{**SMALL, "target_faces": 200})))
    assert len(lines(output)) == 2


def test_a_record_of_something_else_is_refused(tmp_path):
    (tmp_path / RESULTS).write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match="line 1: expected a line that a batch wrote"):
        read_results(tmp_path / RESULTS)


def test_command_line(photos, tmp_path, capsys):
    (photos / "b.png").unlink()
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    assert main(["batch", str(photos), "-o", str(tmp_path / "out"), *arguments]) == 1
    said = capsys.readouterr()
    assert "1 of 2 pictures" in said.out
    assert "broken.png" in said.err
    assert main(["batch", str(tmp_path / "nowhere"), "-o", str(tmp_path / "out")]) == 2
    assert "expected a folder of pictures or a CSV list" in capsys.readouterr().err
