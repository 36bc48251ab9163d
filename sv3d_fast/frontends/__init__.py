"""Front ends of other programs: each is thin, and drains the generators of pipeline.py."""
