"""Marching cubes: the level set of a scalar field on a grid as a welded triangle mesh without cracks.

Lorensen and Cline (1987). The 256-case table is generated here rather than copied. On a face whose two diagonal
corners are inside, the two are always cut off separately; the rule looks at the face alone, so the two cells that
share it agree and the surface is closed. Inside corners thus connect along grid edges only (6-connectivity), outside
corners across face diagonals too (18-connectivity).
"""

import functools

import numpy as np
import torch

from sv3d_fast.kernels import native
from sv3d_fast.kernels.op import Implementation, Op

NUDGE = 1e-3  # how close to a grid point, in cells, a vertex may lie: values equal to the level give no sliver
NO_EDGE = 255
WORD = 32  # voxels along z that csrc/marching_cubes.cu handles as one
AXIS_CORNERS = ((0, 2, 4, 6), (0, 1, 4, 5), (0, 1, 2, 3))  # per axis, the lower corners of the cell's four edges
# Corner c lies at (c & 1, c >> 1 & 1, c >> 2 & 1). Edge 4 * axis + k starts at AXIS_CORNERS[axis][k].
EDGES = tuple((corner, corner | 1 << axis) for axis in range(3) for corner in AXIS_CORNERS[axis])


def _cell_faces() -> list[tuple[int, ...]]:
    """The six faces of a cell as corners in counter-clockwise order seen from outside the cell."""
    faces = []
    for axis in range(3):
        u, v = 1 << (axis + 1) % 3, 1 << (axis + 2) % 3
        cycle = (0, u, u | v, v)
        faces += [tuple(reversed(cycle)), tuple(c | 1 << axis for c in cycle)]
    return faces


def _loops(case: int) -> list[list[int]]:
    """The closed polygons, as cell edges, that separate the inside corners (set bits) of a case from the others."""
    edge_of = {frozenset(ends): e for e, ends in enumerate(EDGES)}
    following = {}
    for face in _cell_faces():
        steps = [(face[i], face[(i + 1) % 4]) for i in range(4)]
        crossings = [
            (edge_of[frozenset(s)], bool(case >> s[1] & 1)) for s in steps if (case >> s[0] ^ case >> s[1]) & 1
        ]
        for i, (edge, entering) in enumerate(crossings):
            if entering:  # the next crossing leaves the same run of inside corners
                following[edge] = crossings[(i + 1) % len(crossings)][0]
    loops = []
    while following:
        loop = [min(following)]
        while (edge := following.pop(loop[-1])) != loop[0]:
            loop.append(edge)
        loops.append(loop)
    return loops


def _triangulations(polygon: list[int]) -> list[list[tuple[int, int, int]]]:
    """Every way to cut a polygon into triangles."""
    if len(polygon) < 3:
        return [[]]
    first, last = polygon[0], polygon[-1]
    return [
        [(first, polygon[k], last), *left, *right]
        for k in range(1, len(polygon) - 1)
        for left in _triangulations(polygon[: k + 1])
        for right in _triangulations(polygon[k:])
    ]


def _crossings_within_faces(triangles, loop) -> int:
    """How many diagonals lie in a face of the cell: the neighbour may draw the same one, and four triangles meet."""
    sides = {frozenset((loop[i - 1], loop[i])) for i in range(len(loop))}
    drawn = {frozenset((t[i - 1], t[i])) for t in triangles for i in range(3)} - sides
    faces = [set(face) for face in _cell_faces()]
    return sum(any(set(EDGES[a]) | set(EDGES[b]) <= face for face in faces) for a, b in map(tuple, drawn))


def _smallest_area(triangles) -> float:
    corners = np.array([[c & 1, c >> 1 & 1, c >> 2 & 1] for c in range(8)], dtype=np.float64)
    middles = np.array([(corners[a] + corners[b]) / 2 for a, b in EDGES])
    a, b, c = (middles[[t[i] for t in triangles]] for i in range(3))
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).min())


@functools.cache
def case_table() -> torch.Tensor:
    """(256, 3 T) uint8: per case the cell edges of its triangles' corners, NO_EDGE after the last.

    Bit c of a case is set where corner c is inside. Triangles wind counter-clockwise seen from outside.
    """
    rows = []
    for case in range(256):
        row: list[int] = []
        for loop in _loops(case):
            best = min(_triangulations(loop), key=lambda t: (_crossings_within_faces(t, loop), -_smallest_area(t)))
            assert _crossings_within_faces(best, loop) == 0
            row += [edge for triangle in best for edge in triangle]
        rows.append(row)
    width = max(map(len, rows))
    return torch.tensor([row + [NO_EDGE] * (width - len(row)) for row in rows], dtype=torch.uint8)


def _check(field: torch.Tensor, level: float) -> None:
    if field.ndim != 3 or field.dtype != torch.float32 or 0 in field.shape:
        raise ValueError(
            f"field: expected float32 (X, Y, Z) without empty axes, got {field.dtype} {tuple(field.shape)}"
        )
    if not np.isfinite(level):
        raise ValueError(f"level: expected a finite number, got {level}")


def _check_finite(finite: bool) -> None:
    if not finite:
        raise ValueError("field: expected finite values, got NaN or infinity")


def reference(field: torch.Tensor, level: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The surface field = level as vertices (V, 3) float32 in grid coordinates and faces (F, 3) int32.

    field: (X, Y, Z) float32, finite; points below the level are inside (signed distance: negative inside; negate a
    density). Vertex coordinates are indices into the field: voxel (i, j, k) lies at (i, j, k). Every grid edge that
    is crossed has one vertex, in the order of 3 * voxel + axis; faces wind counter-clockwise seen from outside. The
    mesh is a closed manifold if the field's border is outside, and open along the border where it is not.
    Raises ValueError for another shape or dtype and for values that are not finite.
    """
    _check(field, level)
    _check_finite(bool(torch.isfinite(field).all()))
    device, shape = field.device, field.shape
    inside = field < level
    crossed = torch.zeros((*shape, 3), dtype=torch.bool, device=device)
    for axis in range(3):
        n = shape[axis] - 1
        crossed.narrow(axis, 0, n)[..., axis] = inside.narrow(axis, 0, n) ^ inside.narrow(axis, 1, n)
    index = (crossed.flatten().cumsum(0) - 1).view(*shape, 3)

    x, y, z, along = crossed.nonzero(as_tuple=True)
    base = torch.stack([x, y, z], 1)
    step = torch.eye(3, dtype=torch.long, device=device)[along]
    a, b = field[tuple(base.T)], field[tuple((base + step).T)]
    t = ((level - a) / (b - a)).clamp(NUDGE, 1 - NUDGE)
    vertices = base.float() + step.float() * t[:, None]

    if min(shape) < 2:
        return vertices, torch.zeros((0, 3), dtype=torch.int32, device=device)
    cells = [n - 1 for n in shape]
    case = torch.zeros(cells, dtype=torch.long, device=device)
    for c in range(8):
        dx, dy, dz = c & 1, c >> 1 & 1, c >> 2 & 1
        case |= inside[dx : dx + cells[0], dy : dy + cells[1], dz : dz + cells[2]].long() << c
    active = ((case > 0) & (case < 255)).nonzero()
    edges = case_table().to(device)[case[tuple(active.T)]].long()
    cell, slot = (edges != NO_EDGE).nonzero(as_tuple=True)
    edge = edges[cell, slot]
    start = torch.tensor([a for a, _ in EDGES], device=device)[edge]
    corner = active[cell] + torch.stack([start & 1, start >> 1 & 1, start >> 2 & 1], 1)
    return vertices, index[corner[:, 0], corner[:, 1], corner[:, 2], edge // 4].view(-1, 3).int()


def _csrc(field: torch.Tensor, level: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    _check(field, level)
    _check_finite(bool(torch.isfinite(field).all()))
    library, field, table = native.load("cpu"), field.detach().contiguous(), case_table()
    counts = torch.empty(2, dtype=torch.int64)
    library.marching_cubes_count(field, float(level), table, counts)
    vertices = torch.empty((int(counts[0]), 3), dtype=torch.float32)
    faces = torch.empty((int(counts[1]), 3), dtype=torch.int32)
    library.marching_cubes_fill(field, float(level), table, NUDGE, vertices, faces)
    return vertices, faces


def _cuda(field: torch.Tensor, level: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Waits for the GPU once, to learn how many vertices and faces there are and whether the field is finite."""
    _check(field, level)
    library, field, table, device = native.load("cuda"), field.detach().contiguous(), case_table(), field.device
    words = (*field.shape[:2], -(-field.shape[2] // WORD))
    inside = torch.empty(words, dtype=torch.int32, device=device)
    counts = torch.empty(2 * inside.numel() + 1, dtype=torch.int32, device=device)
    library.marching_cubes_count(field, float(level), table, inside, counts)
    ends = counts.cumsum(0)  # in 64 bits
    del counts
    ends_of_all = torch.stack([ends[inside.numel() - 1], ends[-2], ends[-1]])
    vertex_count, both, with_flag = ends_of_all.tolist()
    _check_finite(with_flag == both)
    vertices = torch.empty((vertex_count, 3), dtype=torch.float32, device=device)
    faces = torch.empty((both - vertex_count, 3), dtype=torch.int32, device=device)
    library.marching_cubes_fill(field, float(level), table, NUDGE, inside, ends, vertices, faces)
    return vertices, faces


def _examples(device: str):
    generator = torch.Generator().manual_seed(0)
    for shape in ((7, 10, 5), (33, 17, 70), (1, 4, 6), (1, 1, 1)):
        yield torch.randn(shape, generator=generator).to(device), 0.1


marching_cubes = Op(
    name="marching_cubes",
    reference=reference,
    implementations=[
        Implementation("cuda", _cuda, lambda field, level=0.0: native.why_not("cuda", field)),
        Implementation("csrc", _csrc, lambda field, level=0.0: native.why_not("cpu", field)),
    ],
    examples=_examples,
    tolerance=1e-5,
    source="Lorensen and Cline, Marching Cubes, SIGGRAPH 1987",
)
