"""Records of stages: fingerprints, what is taken up, what is removed, and broken manifests."""

import json
import math
import mmap
from pathlib import Path

import pytest
import torch

from sv3d_fast.events import Progress, StageFinished, StageResumed, Warned, finish
from sv3d_fast.files import OutputError, write_text
from sv3d_fast.stages import PeakMemory, Record, plain

PLAN = {"one": ("one.txt", "folder"), "two": ("two.txt",)}
CPU = torch.device("cpu")


def open_record(folder, **options):
    return Record.open(folder, CPU, PLAN, {"input": "x"}, **options)


def stage(record, name, depends, text="made", warning=None):
    """Runs a stage whose result is a text; returns it and the events."""

    def work():
        yield Progress(name, 1, 1)
        if warning:
            yield Warned(name, warning)
        return text

    def save(value):
        if name == "one":
            (record.folder / "folder").mkdir(exist_ok=True)
        return [write_text(record.folder / f"{name}.txt", value)]

    def read():
        text = (record.folder / f"{name}.txt").read_text()
        if text == "damaged":
            raise ValueError("not what was written")
        return text

    events, running = [], record.stage(name, depends, work, save, read)
    while True:
        try:
            events.append(next(running))
        except StopIteration as stop:
            return stop.value, events


def on_disk(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_equal_depends_are_taken_up_with_their_warnings(tmp_path):
    value, events = stage(open_record(tmp_path), "one", {"a": 1, "b": 2}, warning="careful")
    assert value == "made"
    assert [type(e) for e in events[-1:]] == [StageFinished]
    record = open_record(tmp_path)
    value, events = stage(record, "one", {"b": 2, "a": 1}, "never")
    assert value == "made"
    assert [type(e) for e in events] == [Warned, StageResumed]
    assert record.manifest["warnings"] == [{"stage": "one", "message": "careful"}]
    assert stage(open_record(tmp_path), "one", {"a": 1, "b": 3}, "new")[0] == "new"


@pytest.mark.parametrize("name", PLAN["one"])
def test_a_missing_file_is_not_taken_up(tmp_path, name):
    stage(open_record(tmp_path), "one", {})
    path = tmp_path / name
    path.rmdir() if path.is_dir() else path.unlink()
    assert stage(open_record(tmp_path), "one", {}, "new")[0] == "new"


def test_a_damaged_result_is_made_again_and_told(tmp_path):
    stage(open_record(tmp_path), "one", {})
    (tmp_path / "one.txt").write_text("damaged")
    record = open_record(tmp_path)
    value, events = stage(record, "one", {}, "new")
    assert value == "new"
    assert "not what was written" in next(e for e in events if isinstance(e, Warned)).message
    assert len(record.manifest["warnings"]) == 1


def test_later_results_go_when_an_earlier_stage_is_made_again(tmp_path):
    record = open_record(tmp_path)
    stage(record, "one", 1)
    stage(record, "two", 1)
    (tmp_path / "mine.txt").write_text("not ours")
    stage(open_record(tmp_path), "one", 2)
    assert {p.name for p in tmp_path.iterdir()} == {"one.txt", "folder", "manifest.json", "mine.txt"}
    assert list(on_disk(tmp_path)["stages"]) == ["one"]


def test_a_later_stage_leaves_earlier_ones(tmp_path):
    record = open_record(tmp_path)
    stage(record, "one", 1)
    stage(record, "two", 1)
    record = open_record(tmp_path)
    stage(record, "one", 1)
    stage(record, "two", 2)
    assert list(on_disk(tmp_path)["stages"]) == ["one", "two"]
    assert on_disk(tmp_path)["stages"]["one"]["resumed"] is True


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("here")
    out = tmp_path / "out"
    stage(open_record(out), "one", 1)
    (out / "folder").rmdir()
    (out / "folder").symlink_to(precious)
    stage(open_record(out), "one", 2)
    assert (precious / "file").read_text() == "here"


def test_a_failed_stage_leaves_the_earlier_run(tmp_path):
    stage(open_record(tmp_path), "one", 1)
    before = (tmp_path / "manifest.json").read_bytes()

    def fails():
        yield Progress("one", 1, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish(open_record(tmp_path).stage("one", 2, fails, lambda value: []))
    assert (tmp_path / "manifest.json").read_bytes() == before
    assert (tmp_path / "one.txt").read_text() == "made"


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}", '{"stages": []}', '{"stages": {"one": 3}}', '{"stages": {"one": {}}}',
        '{"stages": {"one": {"fingerprint": "f", "warnings": [1]}}}', "\udcff", "[" * 100_000,
    ],
)  # fmt: skip
def test_a_broken_manifest_is_refused_until_overwritten(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"manifest\.json: not a manifest of an earlier run.*--overwrite") as caught:
        open_record(tmp_path)
    assert "\n" not in str(caught.value)
    record = open_record(tmp_path, overwrite=True)
    assert stage(record, "one", {})[0] == "made"
    assert on_disk(tmp_path)["input"] == "x"


def test_files_of_these_names_without_a_manifest_are_refused(tmp_path):
    (tmp_path / "two.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds two\.txt but no manifest"):
        open_record(tmp_path)
    stage(open_record(tmp_path, overwrite=True), "one", {})
    assert not (tmp_path / "two.txt").exists()


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="file"):
            open_record(path)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OutputError, match="permission denied"):
        open_record(tmp_path)


def test_the_manifest_is_json_whatever_it_holds(tmp_path):
    record = open_record(tmp_path)
    record.manifest["figures"] = {"nan": math.nan, "inf": [math.inf, -1.5], "path": Path("a"), "text": "\udcff", 3: ()}
    record.write()
    assert on_disk(tmp_path)["figures"] == {"nan": None, "inf": [None, -1.5], "path": "a", "text": "?", "3": []}
    assert plain({"yes": True, "none": None}) == {"yes": True, "none": None}


def test_notes_stand_in_the_entry_of_their_stage(tmp_path):
    record = open_record(tmp_path)

    def work():
        record.note(variant="p")
        yield Progress("one", 1, 1)

    finish(record.stage("one", {}, work, lambda value: []))
    stage(record, "two", {})
    assert record.manifest["stages"]["one"]["variant"] == "p"
    assert "variant" not in record.manifest["stages"]["two"]


def test_peak_memory_sees_what_was_freed():
    memory = PeakMemory(CPU)
    before = memory.read()
    with mmap.mmap(-1, 64 << 20) as block:  # of the system's: an allocator might have as much that it freed before
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    assert memory.read() - before > 48 << 20
