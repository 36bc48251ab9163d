"""COLMAP text models: what is written says the same cameras by COLMAP's own rules, and foreign worlds become ours."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sv3d_fast.camera import Orbit
from sv3d_fast.colmap import find_model, read_colmap, write_colmap
from sv3d_fast.orbit_io import brings_cameras, load_orbit, save_orbit
from sv3d_fast.video import OrbitVideo

SINE = Orbit.sine(12, 30, 7)


def rotation(q) -> np.ndarray:
    """Rotation matrix of a quaternion, w first: COLMAP's formula, written out."""
    w, x, y, z = np.array(q, float) / np.linalg.norm(q)
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip


def quaternion(matrix) -> np.ndarray:
    """The unit quaternion of a rotation: the eigenvector to eigenvalue 1 of Bar-Itzhack's matrix."""
    m = np.asarray(matrix, float)
    k = np.array([
        [m[0, 0] + m[1, 1] + m[2, 2], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]],
        [0, m[0, 0] - m[1, 1] - m[2, 2], m[1, 0] + m[0, 1], m[2, 0] + m[0, 2]],
        [0, 0, m[1, 1] - m[0, 0] - m[2, 2], m[2, 1] + m[1, 2]],
        [0, 0, 0, m[2, 2] - m[0, 0] - m[1, 1]],
    ])  # fmt: skip
    return np.linalg.eigh(k, UPLO="U")[1][:, -1]


def project(folder: Path, orbit: Orbit, *, model="sparse/0", size=(40, 30), camera=None, noise=0.0, world=None) -> Path:
    """A COLMAP project in a world of its own: turned, moved, five times as large; images in an order of their own."""
    turn = rotation([0.3, -0.5, 0.7, 0.2]) if world is None else world
    sparse = folder / model
    sparse.mkdir(parents=True)
    (folder / "images").mkdir(exist_ok=True)
    focal = max(size) / 2 / math.tan(math.radians(orbit.fov / 2))
    camera = camera or f"3 PINHOLE {size[0]} {size[1]} {focal} {focal} {size[0] / 2} {size[1] / 2}"
    (sparse / "cameras.txt").write_text(f"# Camera list\n\n{camera}\n")
    rng, text = np.random.default_rng(0), {}
    for index, pose in enumerate(orbit.camera_to_world().double().numpy()):
        centre = 5 * turn @ (pose[:3, 3] + noise * rng.normal(size=3)) + [10, -20, 3]
        r = (turn @ pose[:3, :3]).T
        numbers = [*(-quaternion(r)), *(-r @ centre)]  # q and -q are one rotation
        points = "1.5 2.5 -1 3 4 7" if index % 2 else ""
        name = f"view {index + 1}.png"  # "view 10" comes after "view 2"
        text[name] = f"{index + 50} {' '.join(map(str, numbers))} 3 {name}\n{points}\n"
        Image.new("RGB", size, (index * 9, 2, 3)).save(folder / "images" / name)
    (sparse / "images.txt").write_text("# Image list\n" + "".join(text[name] for name in sorted(text)))
    return folder


def same_cameras(a: Orbit, b: Orbit, atol=1e-5) -> None:
    torch.testing.assert_close(a.camera_to_world(), b.camera_to_world(), rtol=0, atol=atol)


@pytest.mark.parametrize("orbit", [SINE, Orbit.static(-20, 4), Orbit.static(80, 5)])
def test_written_text_projects_points_where_the_orbit_does(tmp_path, orbit):
    model = write_colmap(orbit, 48, tmp_path / "sparse") / "0"
    assert sorted(f.name for f in model.iterdir()) == ["cameras.txt", "images.txt", "points3D.txt"]
    (camera,) = [line for line in (model / "cameras.txt").read_text().splitlines() if not line.startswith("#")]
    number, kind, width, height, fx, fy, cx, cy = camera.split()
    assert (number, kind, width, height) == ("1", "PINHOLE", "48", "48")
    lines = [line for line in (model / "images.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 2 * len(orbit)
    assert not any(lines[1::2])  # no points
    points = np.random.default_rng(1).normal(size=(9, 3)) * 0.3
    for index, line in enumerate(lines[::2]):
        fields = line.split()
        assert (fields[0], fields[8], fields[9]) == (str(index + 1), "1", f"{index:04d}.png")
        q, t = np.array(fields[1:5], float), np.array(fields[5:8], float)
        seen = points @ rotation(q).T + t
        pixels = seen[:, :2] / seen[:, 2:] * [float(fx), float(fy)] + [float(cx), float(cy)]
        ours = points @ orbit.world_to_camera()[index, :3, :3].double().numpy().T
        ours = (ours + orbit.world_to_camera()[index, :3, 3].double().numpy()) @ orbit.intrinsics(48)[index].numpy().T
        np.testing.assert_allclose(pixels, ours[:, :2] / ours[:, 2:], atol=1e-3)


def test_round_trip(tmp_path):
    frames = torch.randint(0, 256, (7, 33, 33, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_orbit(OrbitVideo(frames, SINE), tmp_path)
    (tmp_path / "transforms.json").unlink()
    for path in (tmp_path, tmp_path / "sparse", tmp_path / "sparse" / "0", tmp_path / "sparse" / "0" / "images.txt"):
        assert brings_cameras(path)
        video = load_orbit(path)
        assert torch.equal(video.frames, frames)
        same_cameras(video.orbit, SINE)
        assert video.orbit.fov == pytest.approx(SINE.fov, abs=1e-6)
    assert not brings_cameras(tmp_path / "images")


@pytest.mark.parametrize("orbit", [SINE, Orbit.static(25, 12), Orbit.static(0, 5), Orbit.static(-60, 4)])
def test_a_world_of_its_own_becomes_ours(tmp_path, orbit):
    video = load_orbit(project(tmp_path, orbit))
    same_cameras(video.orbit, orbit)
    assert video.size == 40
    assert video.frames[:, 20, 20, 0].tolist() == [9 * i for i in range(len(orbit))]  # natural order, not the file's


def test_scale_and_front_are_set(tmp_path):
    far = Orbit([10.0, 20, 5, 30], [100.0, 190, 280, 30], radius=7.0, fov=50.0)
    orbit = load_orbit(project(tmp_path, far)).orbit
    assert orbit.radius == pytest.approx(2)
    assert orbit.fov == pytest.approx(50, abs=1e-3)
    assert ((orbit.azimuths + 1) % 360 - 1).tolist() == pytest.approx([70, 160, 250, 0], abs=1e-3)


def test_a_little_noise_is_taken_and_more_is_told(tmp_path):
    same_cameras(load_orbit(project(tmp_path / "a", SINE, noise=0.002)).orbit, SINE, atol=0.02)
    with pytest.raises(ValueError, match=r"distances|past the origin"):
        load_orbit(project(tmp_path / "b", SINE, noise=0.1))


@pytest.mark.parametrize("model", ["", "sparse", "sparse/0"])
def test_where_the_model_may_stand(tmp_path, model):
    project(tmp_path, SINE, model=model or ".new")
    if not model:
        for file in (tmp_path / ".new").iterdir():
            file.rename(tmp_path / file.name)
    assert find_model(tmp_path) == tmp_path / model
    assert len(load_orbit(tmp_path).frames) == len(SINE)


def test_simple_pinhole_of_upright_pictures(tmp_path):
    focal = 20 / math.tan(math.radians(SINE.fov / 2))
    project(tmp_path, SINE, size=(30, 40), camera=f"3 SIMPLE_PINHOLE 30 40 {focal} 15 20")
    files, size, orbit = read_colmap(tmp_path / "sparse/0")
    assert size == (30, 40)
    assert orbit.fov == pytest.approx(SINE.fov, abs=1e-4)
    assert [f.name for f in files] == [f"view {i + 1}.png" for i in range(7)]


def edit(file, old, new, count=1):
    def apply(folder):
        text = (folder / "sparse/0" / file).read_text()
        assert old in text
        (folder / "sparse/0" / file).write_text(text.replace(old, new, count))

    return apply


def shorten(folder):
    lines = (folder / "sparse/0/images.txt").read_text().splitlines(keepends=True)
    (folder / "sparse/0/images.txt").write_text("".join(lines[:7]))


def second_camera(folder):
    with (folder / "sparse/0/cameras.txt").open("a") as file:
        file.write("4 PINHOLE 50 30 70 70 25 15\n")
    edit("images.txt", " 3 view 1.png", " 4 view 1.png")(folder)


def no_point_lines(folder):
    lines = (folder / "sparse/0/images.txt").read_text().splitlines()
    (folder / "sparse/0/images.txt").write_text("\n".join(line for line in lines if ".png" in line))


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda f: (f / "sparse/0/cameras.txt").unlink(), r"cameras\.txt is missing"),
        (lambda f: (f / "sparse/0/images.txt").unlink(), r"images\.txt is missing"),
        (lambda f: (f / "images/view 3.png").unlink(), "'view 3.png' is missing"),
        (lambda f: [p.unlink() for p in (f / "images").iterdir()], "in a folder images beside the model"),
        (lambda f: Image.new("RGB", (39, 30)).save(f / "images/view 3.png"), "one size"),
        (lambda f: [Image.new("RGB", (20, 15)).save(p) for p in (f / "images").iterdir()], r"\(40, 30\) pixels as in"),
        (shorten, "at least 4 images, got 3"),
        (second_camera, r"cameras of one size, got \(40, 30\) and \(50, 30\)"),
        (no_point_lines, "a line of points after it"),
        (edit("cameras.txt", "PINHOLE", "OPENCV"), "expected PINHOLE or SIMPLE_PINHOLE cameras, got 'OPENCV'"),
        (edit("cameras.txt", "PINHOLE", "SIMPLE_PINHOLE"), "a SIMPLE_PINHOLE camera: expected 5 finite numbers"),
        (edit("cameras.txt", "40 30", "40 nan"), "finite numbers"),
        (edit("cameras.txt", "20.0 15.0", "3 15.0"), "cx in the middle"),
        (edit("cameras.txt", "3 PINHOLE", "x PINHOLE"), "camera's number"),
        (edit("images.txt", " 3 view 2.png", " 9 view 2.png"), r"camera 9 is not in cameras\.txt"),
        (edit("images.txt", " 3 view 2.png", " 3 ../../x.png"), "inside their folder"),
        (edit("images.txt", " 3 view 2.png", ""), "a camera and a name"),
        (edit("images.txt", "view 2.png", "view 1.png", 1), "twice"),
    ],
)  # fmt: skip
def test_bad_models(tmp_path, alter, message):
    project(tmp_path, SINE)
    alter(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_orbit(tmp_path)
    assert "\n" not in str(error.value)


def test_bad_numbers_of_an_image(tmp_path):
    project(tmp_path, SINE)
    path = tmp_path / "sparse/0/images.txt"
    good = path.read_text().splitlines()
    for bad, message in (
        ("0 0 0 0", "unit quaternion"),
        ("nan 0 0 0", "finite numbers"),
        ("a 0 0 0", "finite numbers"),
    ):
        fields = good[1].split(maxsplit=5)
        path.write_text("\n".join([f"{fields[0]} {bad} {fields[5]}", *good[2:]]))
        with pytest.raises(ValueError, match=message):
            load_orbit(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="expected text"):
        load_orbit(tmp_path)


def test_binary_models_are_named(tmp_path):
    project(tmp_path, SINE)
    for file in (tmp_path / "sparse/0").iterdir():
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match="model_converter --output_type TXT"):
        load_orbit(tmp_path)


def test_cameras_that_are_no_orbit(tmp_path):
    with pytest.raises(ValueError, match="which way is up"):
        load_orbit(project(tmp_path / "line", Orbit([0.0, 10, 20, 30], [0.0] * 4)))
    parallel = project(tmp_path / "parallel", SINE)
    path = parallel / "sparse/0/images.txt"
    lines = [f"{i} 1 0 0 0 {i} {i * i} 0 3 view {i}.png\n" for i in range(1, 6)]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="parallel"):
        load_orbit(parallel)


def test_given_cameras_contradict(tmp_path):
    with pytest.raises(ValueError, match="brings its own cameras"):
        load_orbit(project(tmp_path, SINE), elevation=10)


def test_colmap_itself_reads_the_model(tmp_path):
    """And so does what builds on it: gsplat's trainer takes pycolmap's poses and calibration matrices."""
    pycolmap = pytest.importorskip("pycolmap", reason="of the extra test-formats")
    model = pycolmap.Reconstruction(write_colmap(SINE, 48, tmp_path / "sparse") / "0")
    images = sorted(model.images.values(), key=lambda image: image.name)
    assert [image.name for image in images] == [f"{k:04d}.png" for k in range(7)]
    poses = np.stack([image.cam_from_world().matrix() for image in images])
    np.testing.assert_allclose(poses, SINE.world_to_camera()[:, :3].double(), atol=1e-6)
    for image in images:
        camera = model.cameras[image.camera_id]
        assert (camera.model, camera.width, camera.height) == (pycolmap.CameraModelId.PINHOLE, 48, 48)
        np.testing.assert_allclose(camera.calibration_matrix(), SINE.intrinsics(48)[0].double(), rtol=1e-6)


def test_an_orbits_folder_is_laid_out_as_trainers_expect(tmp_path):
    """gsplat pairs the sorted files of images/ with the model's names; nerfstudio joins images/ and a name."""
    frames = torch.randint(0, 256, (7, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_orbit(OrbitVideo(frames, SINE, torch.ones(7, 48, 48)), tmp_path)
    lines = [line for line in (tmp_path / "sparse/0/images.txt").read_text().splitlines() if not line.startswith("#")]
    names = [line.split()[9] for line in lines[::2]]
    files = sorted(p.relative_to(tmp_path / "images").as_posix() for p in (tmp_path / "images").rglob("*"))
    assert sorted(names) == files == names
    for name, frame in zip(names, frames, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "images" / name)), frame)
