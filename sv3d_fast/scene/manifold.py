"""Sheets that touch, parted: every edge of a closed surface between two faces, every vertex amid one fan of them.

Collapsing edges keeps a closed, oriented surface closed in that each edge has as many faces running one way along it
as the other, but lets sheets touch, so that an edge has four faces or more, and lets faces fold flat onto each other.
"""

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

APART = 0.02  # how far touching sheets are moved apart, over the mean length of the edges


def parted(points: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) and faces (F, 3) int64 of the surface without folds, its touching sheets a little apart.

    At an edge of several sheets the faces on both sides of the same inner wedge stay together. Vertices that no face
    uses are left out. An edge without as many faces one way as the other stays open.
    """
    triangles = _unfolded(triangles[_distinct(triangles)].astype(np.int64))
    if len(triangles) == 0:
        return points[:0], triangles
    corner = np.arange(triangles.size).reshape(-1, 3)
    starts, ends = triangles.ravel(), np.roll(triangles, -1, 1).ravel()
    at_start, at_end = corner.ravel(), np.roll(corner, -1, 1).ravel()
    forward = starts < ends
    low, high = np.minimum(starts, ends), np.maximum(starts, ends)
    _, edge, count = np.unique(low * (triangles.max(initial=0) + 1) + high, return_inverse=True, return_counts=True)
    # By edge and direction: the k-th of one direction meets the k-th of the other, once those of an edge are in order.
    turn = np.zeros(len(edge))
    crowded = count[edge] > 2
    turn[crowded] = _angles(points, triangles, low, high, edge, crowded)
    one, other = _meetings(edge, forward, turn)
    # Two faces that meet share the edge's vertices: the start of one is the end of the other.
    pairs = np.concatenate([np.stack([at_start[one], at_end[other]]), np.stack([at_end[one], at_start[other]])], 1)
    graph = sparse.coo_array((np.ones(pairs.shape[1], np.int8), pairs), shape=(corner.size,) * 2)
    vertices, label = csgraph.connected_components(graph, directed=False)
    source = np.zeros(vertices, np.int64)
    source[label] = starts
    faces = label.reshape(-1, 3).astype(np.int64)
    return _split(_apart(points, source, faces), faces, one, other)


def _distinct(triangles: np.ndarray) -> np.ndarray:
    a, b, c = triangles.T
    return (a != b) & (b != c) & (c != a)


def _unfolded(triangles: np.ndarray) -> np.ndarray:
    """Without pairs of faces of the same vertices that look opposite ways."""
    ordered = np.sort(triangles, 1)
    a, b, c = triangles.T
    even = ((a < b).astype(int) + (b < c) + (c < a)) == 2  # an even permutation of the sorted vertices
    _, group = np.unique(ordered, axis=0, return_inverse=True)
    group = group.reshape(-1)
    balance = np.bincount(group, np.where(even, 1, -1)).astype(int)
    order = np.lexsort((even, group))
    rank = np.empty(len(group), int)
    first = np.r_[True, np.diff(group[order]) > 0]
    starts = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    rank[order] = np.arange(len(order)) - starts
    size = np.bincount(group)
    # what is left of a group, all of one sign: its last ones where even, which sort last, else its first
    left = balance[group]
    return triangles[np.where(left > 0, rank >= size[group] - left, rank < -left)]


def _angles(points, triangles, low, high, edge, crowded) -> np.ndarray:
    """Of the half-edges `crowded`: how far their faces stand turned about the edge from low to high, in [0, 2 pi)."""
    face, slot = np.divmod(np.flatnonzero(crowded), 3)
    opposite = points[triangles[face, (slot + 2) % 3]].astype(np.float64)
    start = points[low[crowded]].astype(np.float64)
    axis = points[high[crowded]] - start
    axis /= np.maximum(np.linalg.norm(axis, axis=1, keepdims=True), 1e-30)
    away = opposite - start
    away -= (away * axis).sum(1, keepdims=True) * axis
    _, first, group = np.unique(edge[crowded], return_index=True, return_inverse=True)
    zero = away[first][group]  # one face of each edge is where angles are counted from
    x, y = (away * zero).sum(1), (np.cross(zero, away) * axis).sum(1)
    return np.mod(np.arctan2(y, x), 2 * np.pi)


def _meetings(edge: np.ndarray, forward: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of half-edges, one forward and one backward of the same edge, that stay together.

    A face that runs forward has the inside behind it in the sense of the turn: it meets the backward face before it.
    """
    order = np.lexsort((turn, edge))
    one, other = [], []
    begins = np.flatnonzero(np.r_[True, np.diff(edge[order]) > 0])
    ends = np.r_[begins[1:], len(order)]
    plain = (ends - begins == 2) & (forward[order[begins]] != forward[order[np.minimum(begins + 1, len(order) - 1)]])
    pair = np.stack([order[begins[plain]], order[begins[plain] + 1]])
    ahead = forward[pair[0]]
    one.append(np.where(ahead, pair[0], pair[1]))
    other.append(np.where(ahead, pair[1], pair[0]))
    for begin, end in zip(begins[~plain], ends[~plain], strict=True):
        around = order[begin:end]
        if 2 * forward[around].sum() != len(around):
            continue
        waiting: list[int] = []
        matched = []
        for half in np.tile(around, 2):  # twice around: a wedge may lie across the zero
            if half in matched or half in waiting:
                continue
            if not forward[half]:
                waiting.append(half)
            elif waiting:
                partner = waiting.pop()
                matched += [half, partner]
                one.append(np.array([half]))
                other.append(np.array([partner]))
    return np.concatenate(one), np.concatenate(other)


def _split(points: np.ndarray, faces: np.ndarray, one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sheets that meet in an edge and are joined elsewhere keep both of its ends: all but one get a vertex amid it."""
    starts, ends = faces.ravel(), np.roll(faces, -1, 1).ravel()
    key = np.minimum(starts, ends) * (len(points) + 1) + np.maximum(starts, ends)
    _, first = np.unique(key[one], return_index=True)
    again = np.setdiff1d(np.arange(len(one)), first)
    if len(again) == 0:
        return points, faces
    inserted = {}
    for vertex, pair in enumerate(again, len(points)):
        inserted[one[pair]] = inserted[other[pair]] = vertex
    middles = (points[starts[one[again]]] + points[ends[one[again]]]) / 2
    touched = sorted({half // 3 for half in inserted})
    more = []
    for face in touched:
        ring = [v for k in range(3) for v in (faces[face, k], inserted.get(3 * face + k)) if v is not None]
        turn = next(i for i, v in enumerate(ring) if v >= len(points))
        ring = ring[turn:] + ring[:turn]
        more += [(ring[0], ring[k], ring[k + 1]) for k in range(1, len(ring) - 1)]
    kept = np.delete(faces, touched, 0)
    return np.concatenate([points, middles.astype(points.dtype)]), np.concatenate([kept, np.array(more)])


def _apart(points: np.ndarray, source: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """The points that `source` names; those that are there more than once, moved towards the middle of their fans."""
    placed = points[source].astype(np.float64)
    shared = np.bincount(source, minlength=len(points))[source] > 1
    if not shared.any():
        return points[source]
    corners = placed[faces]
    step = APART * np.linalg.norm(corners - np.roll(corners, 1, 1), axis=2).mean()
    middle = np.zeros_like(placed)
    np.add.at(middle, faces.ravel(), np.repeat(corners.mean(1), 3, axis=0))
    middle /= np.bincount(faces.ravel(), minlength=len(source))[:, None]
    toward = middle - placed
    length = np.linalg.norm(toward, axis=1, keepdims=True)
    moved = placed + toward * np.minimum(step / np.maximum(length, 1e-30), 0.5)
    return np.where(shared[:, None], moved, placed).astype(points.dtype)
