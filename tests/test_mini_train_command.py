"""The command that trains the embedded model: from nothing, on from what is there, and what it refuses."""

import json
import math

import pytest
import torch
from tiny_mini import TINY, changed, make_denoiser, make_model, take_small_steps

from sv3d_fast.mini import train
from sv3d_fast.mini.pack import Entry, procedural_object, write_pack
from sv3d_fast.model.weights import load_model, save_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    take_small_steps(monkeypatch)


def make_pack(path):
    entries = []
    for number, split in enumerate(("train", "held_out", "held_out")):
        o = procedural_object(1, number)
        text = {k: getattr(o, k) for k in ("name", "key", "source", "category", "creator", "licence")}
        entries.append(
            Entry(
                **text, split=split, vertices=o.vertices, faces=o.faces, normals=o.normals, uvs=o.uvs, texture=o.texture
            )
        )
    write_pack(path, entries)
    return path


@pytest.fixture
def tiny_training(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "MINI", TINY)
    monkeypatch.setattr(train, "NORMALISED_ON", 2)
    arguments = [
        "--data", str(make_pack(tmp_path / "objects.pack")), "--output", str(tmp_path / "out"), "--procedural", "2",
        "--batch", "2", "--batch-vae", "2", "--capacity", "4", "--seed", "0",
    ]  # fmt: skip
    return arguments, tmp_path / "out"


def test_training_from_nothing_goes_on_and_scores(tiny_training, monkeypatch, capsys):
    arguments, out = tiny_training
    train.main([*arguments, "--minutes-vae", "1e-6", "--minutes-unet", "1e-6", "--shard-size", "200KB"])
    assert {p.name for p in out.iterdir()} == {
        "vae", "raw", "weights", "vae.csv", "unet.csv", "scores_1_2.5.csv", "sheet_1_2.5.jpg",
    }  # fmt: skip
    assert len(list((out / "raw").glob("*.safetensors"))) > 1
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["steps"] == 1
    assert math.isfinite(figures["psnr"])
    first = load_model(out / "weights")
    assert first.config == TINY
    vae_files = {p.name: p.read_bytes() for p in (out / "vae").iterdir()}

    fetched = []
    fetch = train._fetch
    monkeypatch.setattr(train, "_fetch", lambda module, folder: (fetched.append(folder.name), fetch(module, folder)))
    train.main([*arguments, "--minutes-unet", "1e-6", "--evaluate"])
    assert fetched == ["vae", "raw"]
    assert {p.name: p.read_bytes() for p in (out / "vae").iterdir()} == vae_files
    assert [p.name for p in (out / "raw").glob("*.safetensors")] == ["model.safetensors"]
    second = load_model(out / "weights")
    assert changed(second.unet, first.unet.state_dict())
    assert not changed(second.vae, first.vae.state_dict())
    assert "psnr" not in capsys.readouterr().out.splitlines()[-1]

    before = {p: p.stat().st_mtime_ns for p in (out / "weights").rglob("*")}
    train.main([*arguments, "--minutes-unet", "0", "--evaluate", "2:1.0"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["guidance"] == 1.0
    assert before == {p: p.stat().st_mtime_ns for p in (out / "weights").rglob("*")}
    assert (out / "scores_2_1.csv").exists()


def test_training_starts_from_a_finished_model(tiny_training, monkeypatch, tmp_path):
    arguments, out = tiny_training
    model = make_model(1)
    save_model(model, tmp_path / "finished")
    given = []
    monkeypatch.setattr(train, "denoiser", lambda args, workers, vae, stage: given.append(vae))
    train.main([*arguments, "--weights", str(tmp_path / "finished"), "--evaluate"])
    assert not changed(given[0], {k: v.half().float() for k, v in model.vae.state_dict().items()})
    network = make_denoiser()
    train._fetch(network, out / "raw")
    assert not changed(network.unet, {k: v.bfloat16().float() for k, v in model.unet.state_dict().items()})
    assert not changed(network.tower, {k: v.bfloat16().float() for k, v in model.image_encoder.state_dict().items()})


def test_half_a_checkpoint_is_refused(tiny_training):
    _, out = tiny_training
    out.mkdir()
    network = make_denoiser()
    train._store(network, out / "raw", torch.bfloat16, "200KB")
    train._fetch(make_denoiser(), out / "raw")
    sorted((out / "raw").glob("*.safetensors"))[0].unlink()
    with pytest.raises(ValueError, match=r"raw: .* missing"):
        train._fetch(make_denoiser(), out / "raw")


@pytest.mark.parametrize(
    ("there", "more", "message"),
    [
        ([], ["--data", "nowhere.pack"], "--data: no such file: nowhere.pack"),
        ([], ["--minutes-vae", "0"], "--minutes-vae: expected more than 0, since there is no"),
        (["raw"], ["--minutes-vae", "1"], "--minutes-vae: expected 0, since"),
        (["vae"], ["--minutes-unet", "0"], "--minutes-unet: expected more than 0, since there is no"),
        ([], ["--minutes-unet", "-1"], "--minutes-unet: expected minutes, 0 or more, got -1"),
        ([], ["--minutes-unet", "nan"], "--minutes-unet: expected minutes"),
        ([], ["--weights", "nowhere"], "--weights: no such folder: nowhere"),
        (["raw"], ["--weights", "."], "--weights: expected a folder without vae/ and raw/"),
        ([], ["--batch", "0"], "--batch: expected at least 1, got 0"),
        ([], ["--capacity", "3"], "--capacity: expected a multiple of 2, got 3"),
        ([], ["--evaluate", "20"], "expected STEPS:GUIDANCE, such as 4:1.0, got '20'"),
        ([], ["--evaluate", "0:1"], "expected at least one step"),
    ],
)
def test_command_lines_that_cannot_run(tiny_training, capsys, there, more, message):
    arguments, out = tiny_training
    for name in there:
        (out / name).mkdir(parents=True)
    with pytest.raises(SystemExit) as info:
        train.main([*arguments, *more])
    assert info.value.code == 2
    assert message in capsys.readouterr().err
