"""Measurements: each module prints a table; those that hold a bar of an issue record it in results/."""
