"""TripoSR (Tochilkin et al. 2024): one picture to a coloured mesh in a single pass, for previews and bulk."""

from .picture import prepare
from .system import TripoSR

__all__ = ["TripoSR", "prepare"]
