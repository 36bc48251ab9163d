"""Foreground masks of an orbit on white, from the frames alone."""

from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage

from sv3d_fast.camera import Orbit
from sv3d_fast.video import MIN_FRAMES, OrbitVideo

from .hull import consistency

FAINT = 4 / 255  # a pixel this far from the background can belong to the object
CERTAIN = 16 / 255  # a component needs a pixel this far: compression noise and ringing on white stay below
CORE, NEAR, FAR = 48 / 255, 3, 10  # ringing is looked for this far, in pixels, from what is surely the object
RINGING = 0.9  # part of those pixels that are taken for background
BLEEDING = 0.12  # of the farthest colour within NEAR pixels: what compression and its coarse colours spill over edges
BAND = 2  # pixels inside the outline whose alpha is soft
SMALLEST = 0.005  # components below this part of the largest are specks
OPENING = 0.0005  # holes below this part of the frame are filled whatever they are
SHARP = 0.1  # how fast colour must leave the background over BAND pixels at the rim of a see-through hole
CARVED = 0.5  # holes are not see-through if carving them loses this part of their area in other views

VOXELS = 128  # of the hull that tells: rims of holes, which are thin, vanish on coarser ones

_FULL = np.ones((3, 3), bool)


def foreground(video: OrbitVideo) -> torch.Tensor:
    """(T, H, W) float32 alpha in [0, 1] of the object in each frame, on the frames' device.

    The video's own alpha if it has one. Else from the distance to the background's colour: hysteresis thresholds,
    components that matter, a soft outline. Enclosed holes are filled, so that white parts keep their inside; only
    holes with a sharp rim that all views agree one can look through stay open (handles, rings).
    Raises ValueError when every mask is empty.
    """
    if video.alpha is not None:
        alpha = video.alpha.to(torch.float32)
    else:
        alpha = _from_white(video)
    if not (alpha >= 0.5).any():
        raise ValueError("frames: expected an object on a white background, got frames that are all background")
    return alpha


def showing(video: OrbitVideo) -> tuple[OrbitVideo, list[str]]:
    """The frames in which there is an object, with their masks, and a sentence about those that are left out, if any.

    Raises ValueError if fewer than MIN_FRAMES are left, and as `foreground`.
    """
    alpha = foreground(video)
    seen = (alpha >= 0.5).flatten(1).any(1).cpu()
    if seen.all():
        return replace(video, alpha=alpha), []
    kept = seen.nonzero().flatten().tolist()
    if len(kept) < MIN_FRAMES:
        raise ValueError(f"frames: expected an object in at least {MIN_FRAMES} of {len(seen)}, got it in {len(kept)}")
    empty = (~seen).nonzero().flatten().tolist()
    return (
        OrbitVideo(video.frames[kept], video.orbit.select(kept), alpha[kept]),
        [f"frames {empty}: the mask is empty; they are left out"],
    )


def doubts(alpha: torch.Tensor) -> list[str]:
    """What a user should know about masks (T, H, W), one sentence each; empty if they look sound."""
    mask = alpha >= 0.5
    area = mask.flatten(1).sum(1).double()
    typical = area[area > 0].median()
    border = torch.cat([mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]], 1).any(1)
    found = (
        ("the mask is under a quarter of the typical area: the object may be as white as the background",
         (area > 0) & (area < typical / 4)),
        ("the object is cut off by the frame", border),
    )  # fmt: skip
    return [f"frames {views.nonzero().flatten().tolist()}: {what}" for what, views in found if views.any()]


def _from_white(video: OrbitVideo) -> torch.Tensor:
    frames = video.frames.cpu().numpy()
    distances = np.stack([_distance_to_background(frame) for frame in frames])
    ringing = _ringing(distances)
    masks = np.stack([_hysteresis(distance, _faint(distance, ringing)) for distance in distances])
    filled = np.stack([ndimage.binary_fill_holes(mask) for mask in masks])
    opened = filled & ~np.stack([_see_through(d, holes) for d, holes in zip(distances, filled & ~masks, strict=True)])
    if (opened != filled).any() and _agree(opened, filled, video.orbit):
        filled = opened
    alpha = np.stack([_soften(d, m) for d, m in zip(distances, filled, strict=True)])
    return torch.from_numpy(alpha).to(video.frames.device)


def _distance_to_background(frame: np.ndarray) -> np.ndarray:
    """(H, W) float32, the largest channel's distance to the background's colour, in [0, 1]."""
    border = np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]]).astype(np.float32)
    light = border[border.min(1) >= 230]  # video codecs move white by some levels
    white = np.median(light, 0) if len(light) else np.full(3, 255, np.float32)
    return np.clip(white - frame, 0, 255).max(-1).astype(np.float32) / 255


def _ringing(distances: np.ndarray) -> float:
    """The distance to the background that compression leaves around the object; 0 where there was none."""
    around = []
    for distance in distances:
        away = ndimage.distance_transform_edt(distance <= CORE)
        around.append(distance[(away > NEAR) & (away <= FAR)])
    pixels = np.concatenate(around)
    return float(np.quantile(pixels, RINGING)) if len(pixels) else 0.0


def _faint(distance: np.ndarray, ringing: float) -> np.ndarray:
    """(H, W) the distance from which pixels can belong to the object: above what compression leaves around it."""
    far = np.full_like(distance, np.clip(2 * ringing, FAINT, CERTAIN))
    return far if ringing == 0 else np.maximum(far, BLEEDING * ndimage.maximum_filter(distance, 2 * NEAR + 1))


def _hysteresis(distance: np.ndarray, faint: np.ndarray) -> np.ndarray:
    """(H, W) bool: faint components that hold a certain pixel and are no specks."""
    labels, count = ndimage.label(distance > faint, _FULL)
    certain = np.bincount(labels[distance > CERTAIN], minlength=count + 1) > 0
    area = np.bincount(labels.ravel(), minlength=count + 1) * certain
    area[0] = 0
    keep = area >= max(SMALLEST * area.max(), 4)
    return keep[labels] if area.max() else np.zeros(distance.shape, bool)


def _see_through(distance: np.ndarray, holes: np.ndarray) -> np.ndarray:
    """(H, W) bool: the holes with a sharp rim; the rim of a blown highlight on a white object is soft."""
    labels, _ = ndimage.label(holes, _FULL)
    result = np.zeros(holes.shape, bool)
    for index, box in enumerate(ndimage.find_objects(labels), 1):
        y, x = (slice(max(s.start - BAND, 0), s.stop + BAND) for s in box)
        hole = labels[y, x] == index
        if hole.sum() < OPENING * holes.size:
            continue
        rim = ndimage.binary_dilation(hole, _FULL, BAND) & ~hole & ~ndimage.binary_dilation(hole, _FULL, BAND - 1)
        result[y, x] |= hole & bool(np.median(distance[y, x][rim]) > SHARP)
    return result


def _agree(opened: np.ndarray, filled: np.ndarray, orbit: Orbit) -> bool:
    """Whether one can look through the holes of `opened`: if not, the views opposite see what they carve away."""
    missing = []
    for masks in (opened, filled):
        alpha = torch.from_numpy(masks).float()
        missing.append((1 - consistency(alpha, orbit, VOXELS)) * masks.sum())
    return bool(missing[0] - missing[1] < CARVED * (filled & ~opened).sum())


def _soften(distance: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(H, W) float32 alpha: in a band inside the outline, a pixel's part of the nearest inside's distance to white."""
    inside = ndimage.binary_erosion(mask, _FULL, BAND, border_value=1)
    nearby = ndimage.maximum_filter(np.where(mask, distance, 0), 2 * BAND + 1)  # where no inside is near
    if inside.any():
        away, (y, x) = ndimage.distance_transform_edt(~inside, return_indices=True)
        nearby = np.where(away <= 2 * BAND, distance[y, x], nearby)
    soft = np.clip(distance / np.maximum(nearby, CERTAIN), 0, 1)
    return np.where(inside, 1, np.where(mask, soft, 0)).astype(np.float32)
