"""Kernels: one op, one file. Imported as sv3d_fast.kernels."""
