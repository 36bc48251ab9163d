"""The embedded model: a small SV3D that ships with the package, its data and its training."""
