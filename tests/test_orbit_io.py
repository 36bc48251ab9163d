"""Orbits on disk: what comes back is what was written, and foreign or hostile files are told apart."""

import json
import math

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sv3d_fast.camera import Orbit
from sv3d_fast.files import OutputError
from sv3d_fast.orbit_io import gif_bytes, load_orbit, save_orbit, write_gif, write_mp4
from sv3d_fast.video import OrbitVideo


def video(frames=6, size=48, alpha=False, orbit=None) -> OrbitVideo:
    """A disc of saturated colours that drifts over white; every frame differs."""
    y, x = np.mgrid[:size, :size]
    pictures, masks = [], []
    for index in range(frames):
        inside = (x - size / 2 - index) ** 2 + (y - size / 2) ** 2 < (size / 3) ** 2
        color = np.stack([255 * x / size, 255 * y / size, 255 - 30 * index + 0 * x], -1).clip(0, 255)
        pictures.append(np.where(inside[..., None], color, 255).astype(np.uint8))
        masks.append(inside)
    masks = torch.from_numpy(np.stack(masks)).float() if alpha else None
    return OrbitVideo(torch.from_numpy(np.stack(pictures)), orbit or Orbit.sine(12, 20, frames), masks)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))


def write_frames(folder, sizes, mode="RGB", start=0):
    folder.mkdir(exist_ok=True)
    for index, size in enumerate(sizes):
        Image.new(mode, size, (index, 2, 3, 128)[: len(mode)]).save(folder / f"f{index + start}.png")


@pytest.mark.parametrize("alpha", [False, True])
def test_folder_round_trip_is_exact(tmp_path, alpha):
    before = video(alpha=alpha)
    written = save_orbit(before, tmp_path / "out")
    assert all(path.exists() for path in written)
    expected = {"images", "orbit.mp4", "orbit.gif", "transforms.json", "sparse"} | ({"alpha"} if alpha else set())
    assert {p.name for p in (tmp_path / "out").iterdir()} == expected
    assert sorted(p.name for p in (tmp_path / "out" / "images").iterdir())[:2] == ["0000.png", "0001.png"]
    for path in (tmp_path / "out", tmp_path / "out" / "transforms.json"):
        after = load_orbit(path)
        assert torch.equal(after.frames, before.frames)
        assert (after.alpha is None) == (not alpha)
        if alpha:
            assert torch.equal(after.alpha, before.alpha)
        torch.testing.assert_close(after.orbit.elevations, before.orbit.elevations, rtol=0, atol=1e-5)
        torch.testing.assert_close(after.orbit.azimuths, before.orbit.azimuths, rtol=0, atol=1e-5)
        assert (after.orbit.radius, after.orbit.fov) == (before.orbit.radius, before.orbit.fov)


def test_a_shorter_orbit_leaves_no_frames_of_the_longer_one(tmp_path):
    save_orbit(video(8), tmp_path)
    save_orbit(video(5), tmp_path)
    assert len(list((tmp_path / "images").iterdir())) == 5
    assert len(load_orbit(tmp_path).frames) == 5


def test_transforms_is_nerfstudio_s(tmp_path):
    orbit = Orbit([0.0, 30.0, 0.0, 0.0], [90.0, 0.0, 180.0, 0.0], radius=3.0, fov=60.0)
    save_orbit(video(4, orbit=orbit), tmp_path)
    content = json.loads((tmp_path / "transforms.json").read_text())
    assert (content["w"], content["h"], content["cx"], content["cy"]) == (48, 48, 24, 24)
    assert content["fl_x"] == pytest.approx(24 / math.tan(math.radians(30)))
    assert content["orbit"]["radius"] == 3.0
    assert "z up" in content["axes"]
    matrix = np.array(content["frames"][0]["transform_matrix"])
    # A camera at +y looks towards -y: its backward axis is +y, its right -x, its up +z.
    np.testing.assert_allclose(matrix[:, 3], [0, 3, 0, 1], atol=1e-6)
    np.testing.assert_allclose(matrix[:3, :3].T, [[-1, 0, 0], [0, 0, 1], [0, 1, 0]], atol=1e-6)
    assert content["frames"][0]["file_path"] == "images/0000.png"


@pytest.mark.parametrize("size", [48, 33])
def test_mp4_is_one_that_plays_everywhere(tmp_path, size):
    before = video(21, size)
    path = write_mp4(before, tmp_path / "o.mp4")
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # the index first: it plays while it loads
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (7, 21)
        assert stream.width % 2 == stream.height % 2 == 0
    after = load_orbit(path, elevation=12)
    assert after.orbit.elevations.tolist() == [12] * 21
    rgb, luma = after.frames[:, :size, :size], torch.tensor([0.2126, 0.7152, 0.0722])
    assert psnr(rgb.float() @ luma, before.frames.float() @ luma) > 40
    assert psnr(rgb, before.frames) > 27  # colours have half the resolution, and these edges are as hard as can be
    assert after.alpha is None


def test_mp4_keeps_flat_colors(tmp_path):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 40, 30), (255, 255, 255), (0, 0, 0)]
    frames = torch.tensor(colors, dtype=torch.uint8)[:, None, None].expand(-1, 32, 32, 3).contiguous()
    after = load_orbit(write_mp4(OrbitVideo(frames, Orbit.static(frames=6)), tmp_path / "o.mp4")).frames
    assert (after.int() - frames.int()).abs().max() <= 3


def test_gif(tmp_path):
    before = video()
    path = write_gif(before, tmp_path / "o.gif")
    with Image.open(path) as image:
        assert (image.n_frames, image.info["loop"], image.info["duration"]) == (6, 0, 140)
    assert psnr(load_orbit(path).frames, before.frames) > 30
    (tmp_path / "small.gif").write_bytes(gif_bytes(before, size=20))
    assert load_orbit(tmp_path / "small.gif").size == 20


def test_folder_of_pictures_in_natural_order_on_white(tmp_path):
    write_frames(tmp_path / "f", [(10, 10)] * 12, "RGBA")
    (tmp_path / "f" / "notes.txt").write_text("not a frame")
    orbit = Orbit.static(5, 12)
    after = load_orbit(tmp_path / "f", orbit=orbit)
    assert after.orbit is orbit
    assert after.frames[:, 0, 0, 0].tolist() == [round(255 - (255 - i) * 128 / 255) for i in range(12)]
    torch.testing.assert_close(after.alpha, torch.full((12, 10, 10), 128 / 255))


def test_alpha_that_only_some_frames_have_is_dropped(tmp_path):
    write_frames(tmp_path / "f", [(10, 10)] * 3, "RGBA")
    write_frames(tmp_path / "f", [(10, 10)] * 3, "RGB", start=3)
    assert load_orbit(tmp_path / "f").alpha is None


@pytest.mark.parametrize(("size", "area"), [((30, 20), np.s_[5:25, :]), ((21, 30), np.s_[:, 4:25])])
def test_frames_that_are_not_square_get_white(tmp_path, size, area):
    write_frames(tmp_path / "f", [size] * 4, "RGBA")
    after = load_orbit(tmp_path / "f")
    assert after.frames.shape == (4, 30, 30, 3)
    cover = np.zeros((30, 30), bool)
    cover[area] = True
    np.testing.assert_array_equal(after.alpha[0].numpy() > 0, cover)
    assert (after.frames[0].numpy()[~cover] == 255).all()


def foreign(folder, cameras, size=(40, 20), **changes) -> dict:
    """Somebody else's transforms.json: no orbit block, intrinsics per frame, PNG suffixes left out."""
    matrices = cameras.camera_to_world().numpy() * np.array([1, -1, -1, 1])
    write_frames(folder, [size] * len(cameras))
    focal = cameras.focal(max(size))
    intrinsics = {"w": size[0], "h": size[1], "fl_x": focal, "fl_y": focal, "cx": size[0] / 2, "cy": size[1] / 2}
    frames = [{"file_path": f"./f{i}", "transform_matrix": m.tolist(), **intrinsics} for i, m in enumerate(matrices)]
    content = {"frames": frames, **changes}
    (folder / "transforms.json").write_text(json.dumps(content))
    return content


def test_foreign_cameras_are_recovered(tmp_path):
    orbit = Orbit([-80.0, 0.0, 33.0, 89.0, 12.5], [10.0, 359.0, 181.0, 270.0, 45.0], radius=4.2, fov=50.0)
    foreign(tmp_path, orbit)
    after = load_orbit(tmp_path)
    assert after.size == 40
    torch.testing.assert_close(after.orbit.elevations, orbit.elevations, rtol=0, atol=1e-3)
    torch.testing.assert_close(after.orbit.azimuths, orbit.azimuths, rtol=0, atol=1e-3)
    assert after.orbit.radius == pytest.approx(4.2, abs=1e-5)
    assert after.orbit.fov == pytest.approx(50, abs=1e-4)
    torch.testing.assert_close(after.orbit.world_to_camera(), orbit.world_to_camera(), rtol=0, atol=1e-5)


def test_blender_s_camera_angle_is_understood(tmp_path):
    content = foreign(tmp_path, Orbit.static(20, 5), camera_angle_x=0.7)
    for frame in content["frames"]:
        for name in ("fl_x", "fl_y", "w", "h", "cx", "cy"):
            del frame[name]
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    assert load_orbit(tmp_path).orbit.fov == pytest.approx(math.degrees(0.7))


def test_an_orbit_block_that_disagrees_with_the_matrices_is_not_believed(tmp_path):
    foreign(tmp_path, Orbit.static(20, 5), orbit=Orbit.static(70, 5).to_dict())
    assert load_orbit(tmp_path).orbit.elevations.tolist() == pytest.approx([20] * 5, abs=1e-3)


def change(frame=0, **fields):
    return lambda content: content["frames"][frame].update(fields)


def move(matrix):
    """Multiplies a frame's matrix from the left."""

    def apply(content):
        frame = content["frames"][1]
        frame["transform_matrix"] = (np.array(matrix) @ np.array(frame["transform_matrix"])).tolist()

    return apply


def roll(content):
    """Turns a camera by 90 degrees about the axis it looks along."""
    frame = content["frames"][1]
    turn = [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    frame["transform_matrix"] = (np.array(frame["transform_matrix"]) @ turn).tolist()


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (change(file_path="../outside.png"), "inside its folder"),
        (change(file_path="/etc/passwd"), "inside its folder"),
        (change(file_path="link"), "inside its folder"),
        (change(file_path="none.png"), "'none.png' is missing"),
        (change(file_path=None), "file_path for every frame"),
        (change(file_path="a\0b"), "file_path for every frame"),
        (change(transform_matrix=[[float("nan")] * 4] * 4), "finite numbers"),
        (change(transform_matrix=[[1, 2], [3]]), "4x4 transform_matrix of numbers"),
        (change(transform_matrix="x"), "4x4 transform_matrix"),
        (change(transform_matrix=[[10**400] * 4] * 4), "finite numbers"),
        (change(w=10**400), "finite number for w"),
        (change(file_path="x" * 300), "is missing"),
        (change(transform_matrix=np.diag([2, 2, 2, 1]).tolist()), "expected a rotation"),
        (change(transform_matrix=np.diag([1, 1, -1, 1]).tolist()), "expected a rotation"),
        (change(fl_x=-1), "positive w, h and fl_x"),
        (change(fl_x=float("inf")), "finite number for fl_x"),
        (change(fl_x="9"), "finite number for fl_x"),
        (change(fl_x=99.0, fl_y=99.0), "one field of view"),
        (change(fl_y=1.0), "square pixels"),
        (change(cx=3), "cx in the middle"),
        (change(k1=0.1), "undistorted"),
        (change(camera_model="FISHEYE"), "pinhole"),
        (move([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "distances"),
        (move([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]), "tilted"),
        (roll, "frame 1 is tilted"),
        (lambda c: c["frames"].pop(), "at least 4 frames"),
        (lambda c: c.clear(), "list of frames"),
        (lambda c: c["frames"].__setitem__(0, 3), "list of frames"),
    ],
)  # fmt: skip
def test_bad_transforms(tmp_path, alter, message):
    folder = tmp_path / "scene"
    folder.mkdir()
    content = foreign(folder, Orbit.static(10, 4))
    Image.new("RGB", (40, 20)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    alter(content)
    (folder / "transforms.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        load_orbit(folder)
    assert "\n" not in str(error.value)


def test_a_camera_that_looks_elsewhere(tmp_path):
    content = foreign(tmp_path, Orbit.static(10, 4))
    angle = math.radians(20)  # turned about its own upright axis, where it stands
    c, s = math.cos(angle), math.sin(angle)
    turned = np.array([[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]])
    frame = content["frames"][3]
    frame["transform_matrix"] = (np.array(frame["transform_matrix"]) @ turned).tolist()
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"frame 3 looks 20\.0 degrees past the origin; supported are"):
        load_orbit(tmp_path)


def test_bad_orbits(tmp_path):
    files = {"text.mp4": b"hello", "text.gif": b"hello", "list.m3u8": b"#EXTM3U\nhttp://127.0.0.1/x.ts\n",
             "notes.txt": b"words\n" * 99, "bad.json": b"{", "deep.json": b"[" * 100_000}  # fmt: skip
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name) as error:
            load_orbit(tmp_path / name)
        assert "\n" not in str(error.value)
    whole = write_mp4(video(), tmp_path / "whole.mp4").read_bytes()
    for share in (0.3, 0.8, 0.97):
        (tmp_path / "cut.mp4").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=r"cut\.mp4"):
            load_orbit(tmp_path / "cut.mp4")
    with_gif = write_gif(video(), tmp_path / "whole.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(with_gif[: int(len(with_gif) * 0.8)])
    with pytest.raises(ValueError, match=r"cut\.gif"):
        load_orbit(tmp_path / "cut.gif")
    for name, sizes, message in (
        ("few", [(8, 8)] * 3, "at least 4 frames, got 3"),
        ("none", [], "at least 4 frames, got 0"),
        ("mixed", [(8, 8)] * 3 + [(8, 9)], r"one size, got \(8, 8\) and \(8, 9\)"),
    ):
        write_frames(tmp_path / name, sizes)
        with pytest.raises(ValueError, match=message):
            load_orbit(tmp_path / name)
    (tmp_path / "mixed" / "f1.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"f1\.png"):
        load_orbit(tmp_path / "mixed")
    with pytest.raises(ValueError, match="no such file"):
        load_orbit(tmp_path / "missing")


def test_contradictory_arguments(tmp_path):
    save_orbit(video(), tmp_path)
    with pytest.raises(ValueError, match="got both"):
        load_orbit(tmp_path / "orbit.mp4", elevation=3, orbit=Orbit.static())
    with pytest.raises(ValueError, match="brings its own cameras"):
        load_orbit(tmp_path, elevation=3)
    with pytest.raises(ValueError, match="each of the 21 cameras, got 6"):
        load_orbit(tmp_path / "orbit.mp4", orbit=Orbit.static())


def test_too_many_pixels(tmp_path, monkeypatch):
    save_orbit(video(), tmp_path)
    monkeypatch.setattr("sv3d_fast.orbit_io.MAX_VIDEO_PIXELS", 48 * 48 * 5)
    for name in ("orbit.mp4", "orbit.gif", "images", "transforms.json"):
        with pytest.raises(ValueError, match="megapixels"):
            load_orbit(tmp_path / name)


def test_thin_strips_do_not_become_huge_squares(tmp_path):
    write_frames(tmp_path / "f", [(20_000, 1)] * 4)
    with pytest.raises(ValueError, match="megapixels"):
        load_orbit(tmp_path / "f")


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't write"):
        save_orbit(video(), tmp_path / "file" / "out")
    with pytest.raises(OutputError, match="can't write"):
        write_mp4(video(), tmp_path / "none" / "o.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
