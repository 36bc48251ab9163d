"""Shapes that a reconstruction finds hard, truth beside what is made of them: python -m bench.hard_shapes PICTURE

Thin legs, holes, a white object on white, a flat one and the inside of a cup, from exact frames of a sine orbit. The
white one comes without its mask, as a picture has none. Prints the figures of `bench.reconstruction` for each.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image

from sv3d_fast.camera import Orbit
from sv3d_fast.mini.geometry import fit_to_frame, shade_smoothly
from sv3d_fast.scene.mesh import Mesh
from sv3d_fast.scene.metrics import compare

from .ground_truth import Truth
from .reconstruction import ORBIT, SAMPLES, mesh_psnr, reconstruct, unlit

SIZE, RESOLUTION, SHOWN_SIZE = 256, 192, 176
PAPER = 242  # of the white shape; at 255 what faces the light can't be told from the background at all
VIEWS = Orbit(torch.tensor([15.0, 25.0, 65.0]), torch.tensor([30.0, 160.0, 300.0]))  # of the picture
WHITE = "white on white"


def stool() -> trimesh.Trimesh:
    """A round seat on four legs of a twentieth of its width."""
    seat = trimesh.creation.cylinder(0.6, 0.08, sections=48)
    parts = [seat.apply_translation((0, 0, 0.5))]
    for x, y in ((0.4, 0.4), (0.4, -0.4), (-0.4, 0.4), (-0.4, -0.4)):
        parts.append(trimesh.creation.cylinder(0.03, segment=((x, y, -0.6), (0.75 * x, 0.75 * y, 0.47)), sections=12))
    return trimesh.util.concatenate(parts)


def rings() -> trimesh.Trimesh:
    """Two rings in each other, each a hole that the other fills in part."""
    first = trimesh.creation.torus(0.5, 0.14, 64, 24)
    second = trimesh.creation.torus(0.5, 0.14, 64, 24)
    second.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, (1, 0, 0)))
    return trimesh.util.concatenate([first.apply_translation((-0.25, 0, 0)), second.apply_translation((0.25, 0, 0))])


def cup() -> trimesh.Trimesh:
    """A wall with a bottom, open above, twice as deep as it is wide at the bottom."""
    profile = [(0, -0.6), (0.32, -0.6), (0.45, 0.6), (0.38, 0.6), (0.26, -0.5), (0, -0.5)]
    return trimesh.creation.revolve(profile, sections=64)


SHAPES = {
    "thin legs": stool,
    "holes": rings,
    WHITE: lambda: trimesh.creation.icosphere(3, 0.5),
    "flat": lambda: trimesh.creation.box((0.03, 1.2, 0.9)),
    "a cup's inside": cup,
}


def truth_of(name: str, device: torch.device) -> Truth:
    """The shape fitted to the frame, chequered but for the white one."""
    shape = SHAPES[name]()
    vertices = fit_to_frame(np.asarray(shape.vertices, np.float32))
    vertices, faces, normals = shade_smoothly(vertices, np.asarray(shape.faces, np.int64))
    corners = vertices[faces]
    uvs = 0.5 + np.stack([0.3 * corners[..., 1] + 0.35 * corners[..., 0], 0.45 * corners[..., 2]], -1)
    y, x = np.mgrid[:256, :256]
    chequered = np.where(((x // 16 + y // 16) % 2)[..., None], (196, 92, 60), (70, 130, 150)).astype(np.uint8)
    texture = np.full_like(chequered, PAPER) if name == WHITE else chequered
    arrays = (np.asarray(a) for a in (vertices, faces.astype(np.int32), uvs.astype(np.float32), texture, normals))
    v, f, uv, t, n = (torch.tensor(a, device=device) for a in arrays)
    return Truth(name, Mesh(v, f, uv, t), n.float())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.hard_shapes", description=__doc__)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sheet = Image.new("RGB", (2 * len(VIEWS) * SHOWN_SIZE, len(SHAPES) * SHOWN_SIZE), "white")
    for y, name in enumerate(SHAPES):
        truth = truth_of(name, device)
        video = truth.orbit(ORBIT, SIZE)
        made = reconstruct(replace(video, alpha=None) if name == WHITE else video, RESOLUTION, device)
        figures = compare(made.mesh, truth.mesh, ORBIT, SAMPLES)
        seen = truth.orbit(VIEWS, SHOWN_SIZE)
        print(f"{name:<16} F 1 % {figures['f_score@0.01']:.3f}, mesh {mesh_psnr(made.mesh, seen):.1f} dB", flush=True)
        for x, frame in enumerate([*seen.frames, *unlit(made.mesh, VIEWS, SHOWN_SIZE)]):
            sheet.paste(Image.fromarray(frame.cpu().numpy()), (x * SHOWN_SIZE, y * SHOWN_SIZE))
    sheet.save(args.picture)


if __name__ == "__main__":
    main()
