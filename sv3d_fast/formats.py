"""The formats that a result is written in, the files of each, and which stage of a run writes what."""

from collections.abc import Iterable

GLB, PLY = "glb", "ply"  # always there: the report shows the one, and a later run takes both up
MESH_FORMATS = {
    GLB: ("mesh.glb",),
    "obj": ("mesh.obj", "mesh.mtl", "mesh.png"),
    "usdz": ("mesh.usdz",),
    "stl": ("mesh.stl",),
    "3mf": ("mesh.3mf",),
    "ply": ("mesh.ply",),
    "off": ("mesh.off",),
}
SPLAT_FORMATS = {PLY: ("splats.ply",), "splat": ("splats.splat",), "spz": ("splats.spz",)}
TEXTURE_FORMATS = ("png", "jpeg")


def further_files(mesh_formats: Iterable[str], splat_formats: Iterable[str]) -> tuple[str, ...]:
    """What these formats put beside mesh.glb and splats.ply."""
    meshes = (MESH_FORMATS[kind] for kind in mesh_formats if kind != GLB)
    splats = (SPLAT_FORMATS[kind] for kind in splat_formats if kind != PLY)
    return tuple(file for files in (*meshes, *splats) for file in files)


def plan_of(mesh_formats: Iterable[str], splat_formats: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """What each stage of a run writes; under "other", what only other formats would write, which goes."""
    chosen = further_files(mesh_formats, splat_formats)
    return {
        "orbit": ("transforms.json", "sparse", "orbit.mp4", "orbit.gif", "images"),
        "splats": SPLAT_FORMATS[PLY],
        "mesh": MESH_FORMATS[GLB],
        "formats": chosen,
        "report": ("preview.png", "report.html"),
        "other": tuple(file for file in further_files(MESH_FORMATS, SPLAT_FORMATS) if file not in chosen),
    }
