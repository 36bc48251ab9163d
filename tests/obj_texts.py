"""A model as OBJ and MTL text, for tests of what reads, bakes and lists models."""

MTL = "newmtl cloth\nKd 0.64 0.64 0.64\nmap_Kd cloth.png\nnewmtl red paint\nKd 1 0 0\nnewmtl glass\nKd 0 0 0\nd 0.2\n"


def two_materials() -> str:
    """A quad that shows a texture 1.5 x 1 times from u = 2.25 on, and an L-shaped concave polygon of plain red."""
    return """mtllib a.mtl
v 0 0 0
v 3 0 0
v 3 2 0
v 0 2 0
v 0 0 1
v 2 0 1
v 2 1 1
v 1 1 1
v 1 2 1
v 0 2 1
vt 2.25 -1
vt 3.75 -1
vt 3.75 0
vt 2.25 0
usemtl cloth
f 1/1 2/2 3/3 4/4
usemtl red paint
f 5 6 7 8 9 10
"""
