"""Cameras of an orbit as a COLMAP text model (cameras.txt, images.txt, points3D.txt), and back.

COLMAP (documentation, "Output format"): world-to-camera rotations as quaternions, w first, and translations; camera
axes x right, y down, z forward; the centre of the upper left pixel lies at (0.5, 0.5). Its world is arbitrary, so the
reader finds ours in it: the point that all cameras look at, their common upright, and their mean distance.
"""

import os
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from .camera import RADIUS, Orbit
from .files import atomic_folder, make_folder, natural_order
from .orbit_cameras import common_fov, fit_orbit
from .video import MIN_FRAMES

MODEL = ("cameras.txt", "images.txt")
MODEL_FOLDERS = ("", "sparse/0", "sparse", "0")  # where a model stands in a project
PICTURE_FOLDERS = ("images", "frames", "")  # tried in the model's folder and the two above it
PARAMETERS = {"PINHOLE": 4, "SIMPLE_PINHOLE": 3}
MAX_BYTES = 1 << 30  # the text holds the points of every picture
LEAST_SPREAD = 1e-3  # of directions: below it the cameras' rays are parallel, or stand in one plane with the upright


def write_colmap(orbit: Orbit, size: int, folder: str | os.PathLike) -> Path:
    """Writes the model of square frames of `size` pixels, named 0000.png, ..., into `folder`/0; returns `folder`.

    One PINHOLE camera, an image per frame and no points, in the world of camera.py. Raises OutputError.
    """
    focal = orbit.focal(size)
    with atomic_folder(folder) as partial:
        model = make_folder(partial / "0")
        camera = f"# CAMERA_ID MODEL WIDTH HEIGHT FX FY CX CY\n1 PINHOLE {size} {size} {focal!r} {focal!r}"
        (model / "cameras.txt").write_text(f"{camera} {size / 2} {size / 2}\n", encoding="utf-8")
        lines = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line of its points: none"]
        for index, matrix in enumerate(orbit.world_to_camera().double().numpy()):
            quaternion = Rotation.from_matrix(matrix[:3, :3]).as_quat(scalar_first=True)
            numbers = " ".join(repr(float(v)) for v in [*quaternion, *matrix[:3, 3]])
            lines += [f"{index + 1} {numbers} 1 {index:04d}.png", ""]
        (model / "images.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (model / "points3D.txt").write_text("# POINT3D_ID X Y Z R G B ERROR TRACK[]\n", encoding="utf-8")
    return Path(folder)


def find_model(path: str | os.PathLike) -> Path | None:
    """The folder of the COLMAP model that `path` means: one of its two files, its folder or its project; or None.

    Raises ValueError for half a model and for a binary one.
    """
    path = Path(path)
    if path.name in MODEL:
        path = path.parent
    for folder in (path / name for name in MODEL_FOLDERS):
        missing = [name for name in MODEL if not (folder / name).is_file()]
        if not missing:
            return folder
        if len(missing) < len(MODEL):
            raise ValueError(
                f"{folder}: expected cameras.txt and images.txt of a COLMAP model, {missing[0]} is missing"
            )
        if (folder / "cameras.bin").is_file():
            raise ValueError(f"{folder}: expected a COLMAP model as text, got a binary one; "
                             "colmap model_converter --output_type TXT turns it into text")  # fmt: skip
    return None


def read_colmap(folder: Path) -> tuple[list[Path], tuple[int, int], Orbit]:
    """Files of the frames in the natural order of their names, their size (width, height), and the cameras.

    folder: as `find_model` returns it; the pictures stand in images/, frames/ or beside it, in it or up to two folders
    above. The world is moved so that the point that all cameras look at is the origin, the cameras' common upright is
    z, their mean distance is 2 and the last frame has azimuth 0; they must then fit an Orbit (see `fit_orbit`).
    Raises ValueError (one line) for files that are damaged or missing, camera models other than PINHOLE and
    SIMPLE_PINHOLE, cameras of different sizes, fewer than 4 images and cameras that no Orbit describes.
    """
    cameras = _read_cameras(folder / "cameras.txt")
    path = folder / "images.txt"
    images = sorted(_read_images(path, cameras), key=lambda image: natural_order(image[0]))
    if len(images) < MIN_FRAMES:
        raise ValueError(f"{path}: expected at least {MIN_FRAMES} images, got {len(images)}")
    names = [name for name, _, _ in images]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: expected every image once, got one of them twice")
    used = [cameras[camera] for _, camera, _ in images]
    sizes = sorted({(camera["w"], camera["h"]) for camera in used})
    if len(sizes) > 1:
        raise ValueError(f"{folder / 'cameras.txt'}: expected cameras of one size, got {sizes[0]} and {sizes[1]}")
    files = _find_pictures(path, names)
    poses = _normalised(path, np.stack([pose for _, _, pose in images]))
    orbit = fit_orbit(path, poses @ np.diag([1.0, -1.0, -1.0, 1.0]), common_fov(folder / "cameras.txt", used))
    return files, sizes[0], orbit


def _read_cameras(path: Path) -> dict[int, dict]:
    """Intrinsics of each camera, by the names of a transforms.json."""
    cameras = {}
    for line in _lines(path):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        model = fields[1] if len(fields) > 1 else ""
        if model not in PARAMETERS:
            raise ValueError(f"{path}: expected PINHOLE or SIMPLE_PINHOLE cameras, got {model[:40]!r}; "
                             "colmap image_undistorter makes such")  # fmt: skip
        numbers = _numbers(path, fields[2:], PARAMETERS[model] + 2, f"a {model} camera")
        width, height, focals, (cx, cy) = int(numbers[0]), int(numbers[1]), numbers[2:-2], numbers[-2:]
        cameras[_identifier(path, fields[0])] = {
            "w": width, "h": height, "fl_x": focals[0], "fl_y": focals[-1], "cx": cx, "cy": cy,
        }  # fmt: skip
    return cameras


def _read_images(path: Path, cameras: dict[int, dict]) -> list[tuple[str, int, np.ndarray]]:
    """Name, camera and (4, 4) camera-to-world pose of each image."""
    images: list[tuple[str, int, np.ndarray]] = []
    lines = iter(_lines(path))
    for line in lines:
        fields = line.split(maxsplit=9)
        if not fields or fields[0].startswith("#"):
            continue
        if len(fields) < 10:
            raise ValueError(f"{path}: expected an id, 7 numbers, a camera and a name, got {line.strip()[:80]!r}")
        numbers = _numbers(path, fields[1:8], 7, f"image {fields[9].strip()!r}")
        if not 0.5 < np.linalg.norm(numbers[:4]) < 2:
            raise ValueError(f"{path}: image {fields[9].strip()!r}: expected a unit quaternion, got {numbers[:4]}")
        camera = _identifier(path, fields[8])
        if camera not in cameras:
            raise ValueError(f"{path}: image {fields[9].strip()!r}: camera {camera} is not in cameras.txt")
        rotation = Rotation.from_quat(numbers[:4], scalar_first=True).as_matrix().T
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation, -rotation @ numbers[4:]
        images.append((fields[9].strip(), camera, pose))
        points = next(lines, "").split()
        if len(points) % 3:
            raise ValueError(f"{path}: image {images[-1][0]!r}: expected a line of points after it (it may be empty)")
    return images


def _normalised(path: Path, poses: np.ndarray) -> np.ndarray:
    """(T, 4, 4) camera-to-world poses in a world as of camera.py."""
    rights, downs, forwards, positions = np.moveaxis(poses[:, :3], 2, 0)
    # The point nearest to all optical axes: sum of (I - d d^T) (x - p) = 0.
    across = np.eye(3) - forwards[:, :, None] * forwards[:, None, :]
    if np.linalg.eigvalsh(across.mean(0))[0] < LEAST_SPREAD**2:
        raise ValueError(f"{path}: expected cameras that look at one point, got parallel ones")
    centre = np.linalg.solve(across.sum(0), np.einsum("tij,tj->i", across, positions))
    # Upright cameras' x axes are level, whatever their elevations: up is what they are all perpendicular to.
    _, spread, axes = np.linalg.svd(rights)
    if spread[1] < LEAST_SPREAD * spread[0]:
        raise ValueError(f"{path}: expected cameras at different azimuths, got none that tell which way is up")
    up = axes[2] * (1.0 if downs.sum(0) @ axes[2] < 0 else -1.0)
    outward = positions[-1] - centre
    front = outward - (outward @ up) * up
    front /= max(np.linalg.norm(front), 1e-12)
    to_ours = np.stack([front, np.cross(up, front), up])
    distance = np.linalg.norm(positions - centre, axis=1).mean()
    ours = np.tile(np.eye(4), (len(poses), 1, 1))
    ours[:, :3, :3] = to_ours @ poses[:, :3, :3]
    ours[:, :3, 3] = (positions - centre) @ to_ours.T * (RADIUS / max(distance, 1e-12))
    return ours


def _find_pictures(path: Path, names: list[str]) -> list[Path]:
    roots = [path.parent, *path.parent.resolve().parents[:2]]
    folders = [(root / name).resolve() for root in roots for name in PICTURE_FOLDERS]
    folder = max(folders, key=lambda f: sum((f / name).is_file() for name in names))  # the first of the best
    files = [(folder / name).resolve() for name in names]
    for name, file in zip(names, files, strict=True):
        if not file.is_relative_to(folder):
            raise ValueError(f"{path}: expected images inside their folder, got {name!r}")
        if not file.is_file():
            raise ValueError(f"{path}: the image {name!r} is missing; expected it in a folder images beside the model")
    return files


def _lines(path: Path) -> list[str]:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: expected a file of at most 1 GB")
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected text, got a file that can't be read as such ({error})") from error


def _numbers(path: Path, fields: list[str], count: int, what: str) -> list[float]:
    try:
        numbers = [float(field) for field in fields]
    except ValueError:
        numbers = []
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError(f"{path}: {what}: expected {count} finite numbers, got {' '.join(fields)[:80]!r}")
    return numbers


def _identifier(path: Path, field: str) -> int:
    if not field.isdecimal() or len(field) > 18:
        raise ValueError(f"{path}: expected a camera's number, got {field[:40]!r}")
    return int(field)
