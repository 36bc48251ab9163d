"""Cameras of an orbit as a nerfstudio transforms.json, and back.

nerfstudio (docs, "Data conventions"): camera-to-world matrices with OpenGL axes (x right, y up, z backward) in a
world whose z is up; focal lengths and principal point in pixels.
"""

import json
import math
import os
from pathlib import Path

import numpy as np

from .camera import Orbit

AXES = "world: right-handed, z up, object at the origin; camera: OpenGL (x right, y up, z backward)"
DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
MAX_BYTES = 64 << 20
FAR = 1e9  # of a camera's place, in any unit; products of such numbers are finite
MAX_ANGLE = 0.5  # degrees a camera may look past the origin or tilt
SUPPORTED = "supported are upright pinhole cameras at one distance from the origin that look at it, z up"


def transforms_of(orbit: Orbit, size: int, *, alpha: bool = False) -> dict:
    """The content of a transforms.json for square frames of `size` pixels at images/0000.png, ...

    `orbit` and `axes` are additions that nerfstudio ignores; so is `alpha_path` of each frame, the mask's file.
    """
    matrices = orbit.camera_to_world().double().numpy() @ np.diag([1.0, -1.0, -1.0, 1.0])
    focal = orbit.focal(size)
    frames = []
    for index, matrix in enumerate(matrices):
        frame = {"file_path": f"images/{index:04d}.png"}
        if alpha:
            frame["alpha_path"] = f"alpha/{index:04d}.png"
        frames.append(frame | {"transform_matrix": (matrix + 0.0).tolist()})  # + 0.0: no "-0.0"
    return {
        "camera_model": "OPENCV",
        "w": size, "h": size, "fl_x": focal, "fl_y": focal, "cx": size / 2, "cy": size / 2,
        "k1": 0.0, "k2": 0.0, "p1": 0.0, "p2": 0.0,
        "axes": AXES,
        "orbit": orbit.to_dict(),
        "frames": frames,
    }  # fmt: skip


def read_transforms(path: str | os.PathLike) -> tuple[list[Path], list[Path] | None, Orbit]:
    """Files of the frames, files of their masks (None without) and the cameras of a transforms.json.

    Intrinsics stand at the top or in the frames, in pixels (fl_x, w, ...) or as camera_angle_x. The cameras must fit
    an Orbit: pinhole, principal point in the middle, upright, at one distance (1 %) and looking at the origin (0.5
    degrees) of a world whose z is up. Azimuths are those of the file's world. Frames keep the file's order.
    Raises ValueError (one line) for anything else, for files that are missing and for paths that leave the folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: expected a transforms.json of at most 64 MB")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_int=float)  # huge ones are infinite, and refused
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: expected JSON, got a file that can't be read as such ({error})") from error
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames or not all(isinstance(f, dict) for f in frames):
        raise ValueError(f"{path}: expected an object with a list of frames")
    files = [_inside(path, frame.get("file_path")) for frame in frames]
    masks = [_inside(path, f["alpha_path"]) for f in frames] if all("alpha_path" in f for f in frames) else None
    matrices = np.stack([_matrix(path, index, frame.get("transform_matrix")) for index, frame in enumerate(frames)])
    fov = common_fov(path, [content | frame for frame in frames])
    orbit = fit_orbit(path, matrices, fov)
    return files, masks, _exact(content.get("orbit"), orbit)


def _inside(path: Path, name) -> Path:
    """The file that `name` means; NeRF's synthetic scenes leave out ".png"."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{path}: expected a file_path for every frame, got {name!r}")
    folder = path.parent.resolve()
    for candidate in (name, f"{name}.png"):
        file = (folder / candidate).resolve()
        if not file.is_relative_to(folder):
            raise ValueError(f"{path}: expected frames inside its folder, got {name!r}")
        if os.path.isfile(file):  # False for names that are too long, where Path.is_file raises
            return file
    raise ValueError(f"{path}: the frame {name!r} is missing")


def _matrix(path: Path, index: int, rows) -> np.ndarray:
    try:
        matrix = np.array(rows, np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: frame {index}: expected a 4x4 transform_matrix of numbers") from error
    if matrix.shape != (4, 4):
        raise ValueError(f"{path}: frame {index}: expected a 4x4 transform_matrix, got shape {matrix.shape}")
    if not (np.abs(matrix) < FAR).all():  # False for NaN too
        raise ValueError(f"{path}: frame {index}: expected finite numbers in transform_matrix, below {FAR:g}")
    rotation = matrix[:3, :3]
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
        raise ValueError(f"{path}: frame {index}: expected a rotation in transform_matrix, got scale, skew or a mirror")
    return matrix


def common_fov(path: Path, frames: list[dict]) -> float:
    """Degrees across the longer side, from the intrinsics of each frame. Raises ValueError as `read_transforms`."""
    fovs = [_fov(path, index, frame) for index, frame in enumerate(frames)]
    if max(fovs) - min(fovs) > 0.1:
        raise ValueError(f"{path}: expected one field of view, got {min(fovs):.2f} to {max(fovs):.2f} degrees")
    return float(np.mean(fovs))


def _fov(path: Path, index: int, frame: dict) -> float:
    """Degrees across the longer side."""

    def number(name: str) -> float | None:
        value = frame.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{path}: frame {index}: expected a finite number for {name}, got {value!r}")
        return float(value)

    if frame.get("camera_model", "OPENCV") not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE"):
        raise ValueError(f"{path}: expected a pinhole camera, got camera_model {frame['camera_model']!r}")
    bent = [name for name in DISTORTION if abs(number(name) or 0.0) > 1e-4]
    if bent:
        raise ValueError(f"{path}: frame {index}: expected undistorted frames, got {', '.join(bent)} other than 0")
    width, height, focal, angle = number("w"), number("h"), number("fl_x"), number("camera_angle_x")
    if focal is None and angle is not None and 0 < angle < math.pi:
        return _degrees(math.tan(angle / 2) * max(1.0, (height or 1.0) / (width or 1.0)))
    if focal is None or width is None or height is None or min(focal, width, height) <= 0:
        raise ValueError(f"{path}: frame {index}: expected positive w, h and fl_x, or camera_angle_x")
    if abs((number("fl_y") or focal) / focal - 1) > 0.01:
        raise ValueError(f"{path}: frame {index}: expected square pixels, got fl_x {focal} and fl_y {frame['fl_y']}")
    for name, length in (("cx", width), ("cy", height)):
        centre = number(name)
        if centre is not None and abs(centre - length / 2) > 0.01 * length:
            raise ValueError(f"{path}: frame {index}: expected {name} in the middle, {length / 2}, got {centre}")
    return _degrees(max(width, height) / 2 / focal)


def _degrees(half: float) -> float:
    return 2 * math.degrees(math.atan(half))


def fit_orbit(path: Path, matrices: np.ndarray, fov: float) -> Orbit:
    """The Orbit of (T, 4, 4) camera-to-world matrices, OpenGL axes, in a world as of camera.py at any scale.

    path: named in errors. Raises ValueError for cameras that are not upright, not at one distance (1 %) or don't look
    at the origin (0.5 degrees).
    """
    positions, rights, backwards = matrices[:, :3, 3], matrices[:, :3, 0], matrices[:, :3, 2]
    distances = np.linalg.norm(positions, axis=1)
    radius = float(distances.mean())
    if radius < 1e-6 or np.ptp(distances) > 0.01 * radius:
        span = f"{distances.min():.4g} to {distances.max():.4g}"
        raise ValueError(f"{path}: the cameras stand at distances of {span}; {SUPPORTED}")
    outward = positions / distances[:, None]
    aim = np.degrees(np.arccos(np.clip((outward * backwards).sum(1), -1, 1)))
    if aim.max() > MAX_ANGLE:
        frame = int(aim.argmax())
        raise ValueError(f"{path}: frame {frame} looks {aim[frame]:.1f} degrees past the origin; {SUPPORTED}")
    tilt = np.degrees(np.arcsin(np.clip(np.abs(rights[:, 2]), 0, 1)))
    upside_down = matrices[:, 2, 1] < 0
    if tilt.max() > MAX_ANGLE or upside_down.any():
        frame = int(upside_down.argmax() if upside_down.any() else tilt.argmax())
        raise ValueError(f"{path}: frame {frame} is tilted; {SUPPORTED}")
    # `right` is (-sin a, cos a, 0): unlike the position, it tells the azimuth of a camera near a pole too.
    azimuths = np.degrees(np.arctan2(-rights[:, 0], rights[:, 1])) % 360
    elevations = np.degrees(np.arctan2(outward[:, 2], np.hypot(outward[:, 0], outward[:, 1])))
    try:
        return Orbit(elevations.tolist(), azimuths.tolist(), radius, fov)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _exact(block, fitted: Orbit) -> Orbit:
    """The numbers of the file's own "orbit" block where they mean the same cameras: free of the fit's rounding."""
    try:
        written = Orbit(**block)
    except (TypeError, ValueError):
        return fitted
    same = (
        len(written) == len(fitted)
        and (written.camera_to_world() - fitted.camera_to_world()).abs().max() < 1e-4 * fitted.radius
        and abs(written.fov - fitted.fov) < 1e-3
    )
    return written if same else fitted
