"""The exact SV3D networks and every checkpoint layout they are stored in."""
