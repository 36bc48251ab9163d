"""Thins out the triangles of a model without losing its materials."""

import numpy as np

from .obj import ObjModel

CRUDE = 12  # connected parts of no more triangles than this (boxes, leaves, labels) are never collapsed
LEAF = 0.2  # crude parts smaller than this share of the model may be thinned out, where there are too many


def decimate(model: ObjModel, faces: int) -> ObjModel:
    """The model with about `faces` triangles at most; smaller models come back unchanged.

    Parts of many triangles go through quadric edge collapse that keeps uvs, materials and borders. Crude parts stay
    as they are; foliage, thousands of small parts, is thinned out.
    """
    if len(model.faces) <= faces:
        return model
    model = _weld(model)
    part = _components(model.faces)[model.faces[:, 0]]
    crude = (np.bincount(part) <= CRUDE)[part]
    rng = np.random.default_rng(0)
    rest = _select(model, ~crude)
    thinned = _thin_out(_select(model, crude), max(faces // 2, faces - len(rest.faces)), rng)
    left = max(faces - len(thinned.faces), faces // 4)
    collapsed = _collapse(rest, left)
    return ObjModel(
        np.concatenate([thinned.vertices, collapsed.vertices]),
        np.concatenate([thinned.faces, collapsed.faces + len(thinned.vertices)]),
        np.concatenate([thinned.uvs, collapsed.uvs]),
        np.concatenate([thinned.materials, collapsed.materials]),
        model.palette,
    )


def _weld(model: ObjModel) -> ObjModel:
    """Joins vertices at the same place and leaves out triangles without three different ones."""
    step = 1e-5 * np.ptp(model.vertices[model.faces.ravel()], axis=0).max()
    _, first, inverse = np.unique(
        np.round(model.vertices / step).astype(np.int64), axis=0, return_index=True, return_inverse=True
    )
    faces = inverse.reshape(-1)[model.faces]
    whole = (faces != np.roll(faces, 1, 1)).all(1)
    return ObjModel(model.vertices[first], faces[whole], model.uvs[whole], model.materials[whole], model.palette)


def _select(model: ObjModel, chosen: np.ndarray) -> ObjModel:
    """The faces `chosen` (F,) bool, with all vertices."""
    return ObjModel(model.vertices, model.faces[chosen], model.uvs[chosen], model.materials[chosen], model.palette)


def _thin_out(model: ObjModel, faces: int, rng: np.random.Generator) -> ObjModel:
    """Brings a model of many small parts down to about `faces`: a random share of the small ones stays, enlarged
    about their centres so that their area stays the same (Cook et al. 2007, "Stochastic Simplification of Aggregate
    Detail")."""
    if len(model.faces) <= faces:
        return model
    corners = model.vertices[model.faces]
    _, part = np.unique(_components(model.faces)[model.faces[:, 0]], return_inverse=True)
    part = part.reshape(-1)
    low, high = np.full((part.max() + 1, 3), np.inf), np.full((part.max() + 1, 3), -np.inf)
    np.minimum.at(low, part, corners.min(1))
    np.maximum.at(high, part, corners.max(1))
    small = ((high - low).max(1) < LEAF * np.ptp(model.vertices, axis=0).max())[part]
    share = float(np.clip((faces - (~small).sum()) / max(small.sum(), 1), 0.05, 1))
    kept = (~small) | (rng.random(part.max() + 1) < share)[part]
    centre = ((low + high) / 2)[part][:, None]
    grown = np.where(small[:, None, None], centre + (corners - centre) / np.sqrt(share), corners)[kept]
    index = np.arange(3 * len(grown)).reshape(-1, 3)
    return _weld(ObjModel(grown.reshape(-1, 3), index, model.uvs[kept], model.materials[kept], model.palette))


def _collapse(model: ObjModel, faces: int) -> ObjModel:
    """Edge collapse to about `faces`. Vertices that stay keep their place and their uvs; the two sides of a seam of
    uvs or materials, and open borders, are kept together. More remain where seams leave no choice."""
    if len(model.faces) <= faces:
        return model
    try:
        from meshoptimizer import simplify
    except ImportError as error:
        raise ImportError("making the training data needs meshoptimizer: pip install meshoptimizer") from error

    textured = np.array([m.texture is not None for m in model.palette])[model.materials]
    uvs = np.where(textured[:, None, None], model.uvs, 0)  # without a texture there are no seams to keep
    corner = np.concatenate(
        [
            model.faces.reshape(-1, 1),
            np.repeat(model.materials, 3)[:, None],
            np.round(uvs.reshape(-1, 2) * 4096).astype(np.int64),
        ],
        1,
    )
    _, first, wedge = np.unique(corner, axis=0, return_index=True, return_inverse=True)
    low, span = model.vertices.min(0), np.ptp(model.vertices, axis=0).max()
    positions = np.ascontiguousarray((model.vertices[corner[first, 0]] - low) / span, np.float32)
    indices = np.ascontiguousarray(wedge.reshape(-1), np.uint32)
    simplified = np.zeros_like(indices)
    count = simplify(simplified, indices, positions, target_index_count=3 * faces, target_error=1.0)
    kept = first[simplified[:count].reshape(-1, 3)]  # an original corner for each corner
    return ObjModel(model.vertices, corner[kept, 0], uvs.reshape(-1, 2)[kept], corner[kept[:, 0], 1], model.palette)


def _components(faces: np.ndarray) -> np.ndarray:
    """(V,) number of the connected part a vertex belongs to."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    a, b, n = faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel(), int(faces.max()) + 1
    return connected_components(coo_matrix((np.ones(len(a)), (a, b)), shape=(n, n)), directed=False)[1]
