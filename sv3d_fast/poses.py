"""Camera poses as users write them to an Orbit in SV3D's order, whose last frame is the input view."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .camera import Orbit

ELEVATION = 10.0  # degrees; the official script's default
AT_INPUT = 1e-2  # degrees from azimuth 0 within which a pose counts as the input view
SAME_VIEW = 0.5  # degrees; poses rounded to whole degrees still make a static orbit


def read_orbit(
    *,
    frames: int | None,
    default_frames: int,
    poses: Sequence[Mapping[str, float]] | None = None,
    polars_rad: Any = None,
    azimuths_rad: Any = None,
    orbit: Orbit | None = None,
    elevation: float | None = None,
) -> tuple[Orbit, int]:
    """The orbit in SV3D's order, and by how many places its frames are to be rolled to stand in the caller's order.

    At most one way of saying it: poses ({"elevation", "azimuth"} in degrees), polars_rad with azimuths_rad (T numbers
    each, polar angles from the up axis), orbit (taken as it is: its last frame is the input view), or elevation (one
    turn at that height, in degrees). With none, one turn at 10 degrees.
    Poses and radians have the input view at azimuth 0, either first (rolled by 1) or last (rolled by 0).
    frames: how many the caller asked for, or None. Raises ValueError, naming the argument, for everything else.
    """
    radians = polars_rad is not None or azimuths_rad is not None
    given = {
        "poses": poses is not None, "polars_rad and azimuths_rad": radians, "orbit": orbit is not None,
        "elevation": elevation is not None,
    }  # fmt: skip
    named = [name for name, there in given.items() if there]
    if len(named) > 1:
        raise ValueError(f"{', '.join(named)}: each of them sets the cameras; expected one of them")
    if frames is not None and frames < 1:
        raise ValueError(f"num_frames: expected at least 1, got {frames}")
    shift = 0
    if poses is not None:
        orbit, shift = _order("poses", *_degrees(poses))
    elif radians:
        orbit, shift = _order("azimuths_rad", *_from_radians(polars_rad, azimuths_rad))
    elif orbit is None:
        return Orbit.static(ELEVATION if elevation is None else elevation, frames or default_frames), 0
    elif not isinstance(orbit, Orbit):
        raise ValueError(f"orbit: expected a sv3d_fast.Orbit, got {type(orbit).__name__}")
    if frames not in (None, len(orbit)):
        raise ValueError(f"num_frames: expected {len(orbit)}, one for each camera of {named[0]}, got {frames}")
    return orbit, shift


def require_static(orbit: Orbit) -> None:
    """Raises ValueError for cameras that SV3D_u, which sees none, would not follow: all but one even, level turn."""
    even = Orbit.static(0.0, len(orbit))
    level = float(orbit.elevations.max() - orbit.elevations.min())
    apart = (orbit.azimuths - orbit.azimuths[-1] - even.azimuths + 180) % 360 - 180
    if level > SAME_VIEW or apart.abs().max() > SAME_VIEW:
        raise ValueError(
            "poses: SV3D_u takes no cameras and always makes one even turn at the input's elevation; "
            "leave the cameras out, or load SV3D_p"
        )


def _degrees(poses: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    if not isinstance(poses, Sequence) or isinstance(poses, str) or not poses:
        raise ValueError(f'poses: expected a list of {{"elevation": e, "azimuth": a}} in degrees, got {poses!r}')
    values: dict[str, list[float]] = {"elevation": [], "azimuth": []}
    for index, pose in enumerate(poses):
        if not isinstance(pose, Mapping) or set(pose) != set(values):
            raise ValueError(f"poses[{index}]: expected the keys elevation and azimuth, got {pose!r}")
        for key, column in values.items():
            try:
                column.append(float(pose[key]))
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"poses[{index}]: {key}: expected degrees, got {pose[key]!r}") from None
    return values["elevation"], values["azimuth"]


def _from_radians(polars_rad: Any, azimuths_rad: Any) -> tuple[torch.Tensor, torch.Tensor]:
    columns = []
    for name, value in (("polars_rad", polars_rad), ("azimuths_rad", azimuths_rad)):
        if value is None:
            raise ValueError(f"{name}: expected with the other of polars_rad and azimuths_rad, got None")
        try:
            column = torch.as_tensor(value, dtype=torch.float64).cpu()
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ValueError(f"{name}: expected numbers, one for each frame, got {value!r}") from None
        if column.ndim != 1:
            raise ValueError(f"{name}: expected (T,), one number for each frame, got {tuple(column.shape)}")
        columns.append(torch.rad2deg(column))
    return 90.0 - columns[0], columns[1]


def _order(name: str, elevations: Any, azimuths: Any) -> tuple[Orbit, int]:
    turn = Orbit(elevations, azimuths)  # refuses lengths that differ and angles that can't be
    azimuths = torch.as_tensor(azimuths, dtype=torch.float64)
    offsets = (azimuths + 180) % 360 - 180
    first, last = (bool(offsets[end].abs() <= AT_INPUT) for end in (0, -1))
    if first and last and len(turn) > 1:
        raise ValueError(
            f"{name}: the first and the last are both at azimuth 0, so which is the input view? "
            f"expected one of them there (leave one out), or orbit=Orbit(...), whose last frame is the input view"
        )
    if not (first or last):
        raise ValueError(
            f"{name}: expected the input view, azimuth 0, first or last, got {float(azimuths[0]):g} and "
            f"{float(azimuths[-1]):g} degrees; reorder, or give orbit=Orbit(...), whose last frame is the input view"
        )
    shift = int(first and len(turn) > 1)
    azimuths = azimuths.roll(-shift)
    return Orbit(turn.elevations.roll(-shift), ((azimuths - azimuths[-1]) % 360.0).float()), shift
