"""`sv3d-fast convert`: a TripoSR pickle becomes safetensors with equal tensors, and nothing in it is run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sv3d_fast import cli
from sv3d_fast.triposr import TripoSR
from sv3d_fast.triposr.config import TripoSRConfig, ViTConfig, config_yaml

TINY = TripoSRConfig(
    image_size=32,
    vit=ViTConfig(width=12, layers=1, heads=3, mlp_width=8, image_size=48),
    plane_size=2,
    channels=8,
    heads=2,
    head_width=4,
    layers=1,
    groups=4,
    plane_channels=3,
    neurons=5,
    hidden_layers=2,
)


@pytest.fixture
def official(tmp_path):
    """model.ckpt and config.yaml in a folder, and the model that they hold."""
    torch.manual_seed(0)
    model = TripoSR(TINY)
    folder = tmp_path / "official"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "model.ckpt")
    (folder / "config.yaml").write_text(config_yaml(TINY))
    return folder, model


def convert(*arguments) -> int:
    return cli.main(["convert", *map(str, arguments)])


def refusal(capsys, *arguments) -> str:
    """The one line that `arguments` are refused with."""
    assert convert(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sv3d-fast: error: ")
    assert err.count("\n") == 1
    return err


def test_equal_tensors_that_from_pretrained_reads(official, tmp_path, capsys):
    folder, model = official
    assert convert(folder / "model.ckpt", "-o", tmp_path / "a" / "safe") == 0
    safe = tmp_path / "a" / "safe"
    assert capsys.readouterr().out.split() == [str(safe / "config.yaml"), str(safe / "model.safetensors")]
    assert {p.name for p in safe.iterdir()} == {"config.yaml", "model.safetensors"}
    tensors = load_file(safe / "model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    loaded = TripoSR.from_pretrained(safe)
    assert loaded.config == TINY
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name])
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_in_place_and_then_preferred(official):
    folder, model = official
    assert convert(folder / "model.ckpt", "-o", folder, "--quiet") == 0
    (folder / "model.ckpt").write_bytes(b"damaged")
    loaded = TripoSR.from_pretrained(folder)
    assert torch.equal(loaded.tokenizer.embeddings, model.tokenizer.embeddings)
    with pytest.raises(ValueError, match=r"model\.ckpt: not a readable checkpoint|refused"):
        TripoSR.from_pretrained(folder, "config.yaml", "model.ckpt")


def test_a_configuration_elsewhere(official, tmp_path, capsys):
    folder, _ = official
    (folder / "config.yaml").rename(tmp_path / "settings.yaml")
    assert "config.yaml: no such file" in refusal(capsys, folder / "model.ckpt", "-o", tmp_path / "safe")
    assert not (tmp_path / "safe").exists()
    flags = ["-o", tmp_path / "safe", "--config", tmp_path / "settings.yaml", "--quiet"]
    assert convert(folder / "model.ckpt", *flags) == 0
    assert TripoSR.from_pretrained(tmp_path / "safe").config == TINY


def test_what_stands_there_stays(official, tmp_path, capsys):
    folder, _ = official
    safe = tmp_path / "safe"
    safe.mkdir()
    for name in ("model.safetensors", "config.yaml"):
        (safe / name).write_text("mine")
        assert f"{safe / name} is there already" in refusal(capsys, folder / "model.ckpt", "-o", safe)
        assert {p.name: p.read_text() for p in safe.iterdir()} == {name: "mine"}
        (safe / name).unlink()
    (safe / "model.safetensors").write_text("mine")
    assert convert(folder / "model.ckpt", "-o", safe, "--overwrite", "--quiet") == 0
    assert TripoSR.from_pretrained(safe).config == TINY


class Bomb:
    """Unpickles by calling a function."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_code_in_a_pickle_is_refused_and_does_not_run(official, tmp_path, capsys):
    folder, model = official
    torch.save({**model.state_dict(), "bomb": Bomb(tmp_path / "exploded")}, folder / "model.ckpt")
    assert "refused" in refusal(capsys, folder / "model.ckpt", "-o", tmp_path / "safe")
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "safe").exists()


def test_checkpoints_of_something_else(official, tmp_path, capsys):
    folder, model = official
    state = model.state_dict()
    del state["tokenizer.embeddings"]
    torch.save(state, folder / "model.ckpt")
    assert "missing tokenizer.embeddings" in refusal(capsys, folder / "model.ckpt", "-o", tmp_path / "safe")
    assert "no such file" in refusal(capsys, folder / "none.ckpt", "-o", tmp_path / "safe")
    assert not (tmp_path / "safe").exists()
