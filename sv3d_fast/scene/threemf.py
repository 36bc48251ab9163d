"""Meshes as 3MF, what slicers take: XML in a zip, in millimetres (3MF Core Specification 1.3).

trimesh writes 3MF too, with identifiers drawn anew each time and by way of a package that it doesn't bring along.
"""

from .mesh import Mesh
from .packages import package

MODEL = "3D/3dmodel.model"
HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n'
CORE = "http://schemas.microsoft.com/3dmanufacturing/core/2015/02"
OPC = "http://schemas.openxmlformats.org/package/2006"
TYPES = (
    f'{HEAD}<Types xmlns="{OPC}/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="model" ContentType="application/vnd.ms-package.3dmanufacturing-3dmodel+xml"/></Types>'
)
RELATIONSHIPS = (
    f'{HEAD}<Relationships xmlns="{OPC}/relationships"><Relationship Id="model" Target="/{MODEL}" '
    'Type="http://schemas.microsoft.com/3dmanufacturing/2013/01/3dmodel"/></Relationships>'
)


def threemf_bytes(mesh: Mesh) -> bytes:
    """The shape alone, z-up, its units taken as millimetres."""
    vertices = (f'<vertex x="{x:.9g}" y="{y:.9g}" z="{z:.9g}"/>' for x, y, z in mesh.vertices.tolist())
    triangles = (f'<triangle v1="{a}" v2="{b}" v3="{c}"/>' for a, b, c in mesh.faces.tolist())
    model = (
        f'{HEAD}<model unit="millimeter" xml:lang="en-US" xmlns="{CORE}"><resources><object id="1" type="model"><mesh>'
        f"<vertices>{''.join(vertices)}</vertices><triangles>{''.join(triangles)}</triangles>"
        '</mesh></object></resources><build><item objectid="1"/></build></model>'
    )
    files = {"[Content_Types].xml": TYPES, "_rels/.rels": RELATIONSHIPS, MODEL: model}
    return package({name: text.encode() for name, text in files.items()}, compress=True)
