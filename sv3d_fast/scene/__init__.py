"""Views to splats, splats to a textured mesh, and both to files."""
