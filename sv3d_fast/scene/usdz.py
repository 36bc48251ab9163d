"""Meshes as USDZ, which phones and tablets of Apple's show in AR: a USD text layer and its texture in a zip.

The package is uncompressed with every file at a multiple of 64 bytes, its layer first (OpenUSD, "Usdz File Format
Specification"); the material is a UsdPreviewSurface.
"""

from string import Template

import numpy as np

from sv3d_fast import __version__

from .corners import split, to_y_up
from .glb import picture_bytes, srgb_to_linear
from .mesh import Mesh
from .packages import package

ALIGNMENT = 64


def usdz_bytes(mesh: Mesh, *, texture_format: str = "png") -> bytes:
    """A USDZ of the mesh: y-up, front +z, a unit to the metre, metallic 0, roughness 1.

    The surface stays welded; texture coordinates belong to face corners. Without a texture, vertex colours become
    displayColor, which USD defines as linear.
    """
    parts = split(Mesh(mesh.vertices, mesh.faces))
    points = to_y_up(parts.positions)
    lines = [
        f"int[] faceVertexCounts = [{', '.join(['3'] * len(parts.faces))}]",
        f"int[] faceVertexIndices = [{', '.join(map(str, parts.faces.reshape(-1).tolist()))}]",
        f"float3[] extent = {_tuples(np.stack([points.min(0), points.max(0)]))}",
        f"point3f[] points = {_tuples(points)}",
        f'normal3f[] normals = {_tuples(to_y_up(parts.normals))} (interpolation = "vertex")',
    ]
    files: dict[str, bytes] = {"object.usda": b""}
    color, shader = "", ""
    if mesh.texture is not None and mesh.uvs is not None:
        uvs, corners = np.unique(mesh.uvs.cpu().numpy().reshape(-1, 2), axis=0, return_inverse=True)
        lines += [
            f'texCoord2f[] primvars:st = {_tuples(uvs)} (interpolation = "faceVarying")',
            f"int[] primvars:st:indices = [{', '.join(map(str, corners.reshape(-1).tolist()))}]",
        ]
        name = f"textures/albedo.{texture_format}"
        files[name] = picture_bytes(mesh.texture, texture_format)
        color, shader = ".connect = </object/material/color.outputs:rgb>", TEXTURED.substitute(picture=name)
    elif mesh.colors is not None:
        linear = srgb_to_linear(mesh.colors.cpu().numpy() / 255.0)
        lines.append(f'color3f[] primvars:displayColor = {_tuples(linear)} (interpolation = "vertex")')
        color, shader = ".connect = </object/material/color.outputs:result>", COLORED
    surface = "\n        ".join(lines)
    files["object.usda"] = LAYER.substitute(version=__version__, surface=surface, color=color, shader=shader).encode()
    return package(files, compress=False, alignment=ALIGNMENT)


def _tuples(values: np.ndarray) -> str:
    row = f"({', '.join(['%.9g'] * values.shape[1])})"
    return f"[{', '.join(row % tuple(value) for value in values.tolist())}]"


LAYER = Template("""#usda 1.0
(
    doc = "sv3d-fast $version"
    defaultPrim = "object"
    metersPerUnit = 1
    upAxis = "Y"
)

def Xform "object" (
    kind = "component"
)
{
    def Mesh "surface" (
        prepend apiSchemas = ["MaterialBindingAPI"]
    )
    {
        uniform token subdivisionScheme = "none"
        uniform bool doubleSided = 1
        rel material:binding = </object/material>
        $surface
    }

    def Material "material"
    {
        token outputs:surface.connect = </object/material/preview.outputs:surface>

        def Shader "preview"
        {
            uniform token info:id = "UsdPreviewSurface"
            color3f inputs:diffuseColor$color
            float inputs:metallic = 0
            float inputs:roughness = 1
            token outputs:surface
        }
$shader    }
}
""")
TEXTURED = Template("""
        def Shader "color"
        {
            uniform token info:id = "UsdUVTexture"
            asset inputs:file = @$picture@
            float2 inputs:st.connect = </object/material/coordinates.outputs:result>
            token inputs:sourceColorSpace = "sRGB"
            token inputs:wrapS = "clamp"
            token inputs:wrapT = "clamp"
            float3 outputs:rgb
        }

        def Shader "coordinates"
        {
            uniform token info:id = "UsdPrimvarReader_float2"
            string inputs:varname = "st"
            float2 outputs:result
        }
""")
COLORED = """
        def Shader "color"
        {
            uniform token info:id = "UsdPrimvarReader_float3"
            string inputs:varname = "displayColor"
            float3 outputs:result
        }
"""
