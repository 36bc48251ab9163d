"""`python -m bench`: every bench whose bars this machine can measure."""

from . import slice

if __name__ == "__main__":
    slice.main()
