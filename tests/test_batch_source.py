"""What a batch converts: folders, lists with settings of their own, and what is wrong with a list."""

from pathlib import Path

import pytest

from sv3d_fast.batch_source import read_jobs
from sv3d_fast.settings import Settings


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_a_folder_gives_its_pictures_in_order_with_names_of_their_own(tmp_path):
    folder = touch(tmp_path / "p", "b.PNG", "a.jpg", "a.png", "x.txt", ".hidden")
    (folder / "deeper.png").mkdir()
    assert [job.name for job in read_jobs(folder, Settings())] == ["a.jpg", "a.png", "b"]


def test_a_list_may_name_and_set(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(
        "\ufeffpicture,name,seed,elevation,steps,remove_background,model\n"
        "p/one.png,,3,,,false,\ntwo.png,Zwei,,-5.5,7,,else\n",
        encoding="utf-8",
    )
    first, second = read_jobs(path, Settings(seed=1, elevation=20.0))
    assert (first.picture, first.name) == (tmp_path / "p" / "one.png", "one")
    assert (first.settings.seed, first.settings.elevation, first.settings.remove_background) == (3, 20.0, False)
    assert (second.name, second.settings.seed, second.settings.elevation) == ("Zwei", 1, -5.5)
    assert (second.settings.steps, second.settings.model) == (7, "else")


def test_a_rows_purpose_sets_what_the_row_leaves_open(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(
        "picture,purpose,mesh_formats,target_faces\na.png,print,,\nb.png,,stl  usdz,\nc.png,print,off,700\n"
    )
    first, second, third = (job.settings for job in read_jobs(path, Settings.of(purpose="web", seed=4)))
    assert first == Settings.of(purpose="print", seed=4, texture_format="jpeg", splat_formats=("ply", "spz"),
                                texture_resolution=1024)  # fmt: skip
    assert second == Settings.of(purpose="web", seed=4, mesh_formats=("stl", "usdz"))
    assert (third.mesh_formats, third.target_faces, third.watertight) == (("off",), 700, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a column 'picture', got none"),
        ("name\nx\n", "expected a column 'picture', got 'name'"),
        ("picture,colour\na.png,red\n", "no setting 'colour'; there are model, seed"),
        ("picture\n", "expected at least one picture"),
        ("picture,seed\na.png,many\n", "line 2: invalid literal"),
        ("picture,remove_background\na.png,perhaps\n", "line 2: expected true or false, got 'perhaps'"),
        ("picture,purpose\na.png,film\n", "line 2: purpose: expected web or game or print, got 'film'"),
        ("picture,mesh_formats\na.png,stl fbx\n", "line 2: mesh_formats: expected some of glb, obj"),
        ("picture,steps\na.png,0\n", "line 2: steps: expected 1 to 1000, got 0"),
        ("picture\na.png,b.png\n", "line 2: expected 1 cells"),
        ("picture\na/x.png\nb/X.png\n", "expected a folder of its own for each picture, 'x' is there twice"),
        ("picture,name\na.png,../up\n", "line 2: name: expected a plain file name, got '../up'"),
        ("picture,name\na.png,.hidden\n", "name: expected a plain file name"),
    ],
)
def test_bad_lists_say_where(tmp_path, text, message):
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="source: ") as info:
        read_jobs(path, Settings())
    assert message in str(info.value)


def test_binary_is_no_list(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00picture")
    with pytest.raises(ValueError, match="is no CSV list"):
        read_jobs(tmp_path / "list.csv", Settings())
