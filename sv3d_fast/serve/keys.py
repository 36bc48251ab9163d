"""API keys: shown once, kept as SHA-256 hashes, compared in constant time."""

import hashlib
import hmac
import re
import secrets
from pathlib import Path


def new_key() -> tuple[str, str]:
    """A key of 256 random bits, and its hash: the line for the file of keys."""
    key = f"sv3d_{secrets.token_urlsafe(32)}"
    return key, hash_key(key)


def hash_key(key: str) -> str:
    """SHA-256 in hex. Keys are random and long, so no slow hash is needed against guessing."""
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def read_hashes(path: Path) -> list[str]:
    """The hashes of a file: one per line, with whatever comment after a space; lines from # on are comments.

    Raises ValueError for a file that can't be read or holds something else, such as a key itself.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"api_key_file: can't read {path}: {error}") from error
    hashes = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].split()
        if not text:
            continue
        if not re.fullmatch(r"[0-9a-f]{64}", text[0]):
            raise ValueError(f"api_key_file: {path}, line {number}: expected a SHA-256 hash, as --new-key prints it")
        hashes.append(text[0])
    if not hashes:
        raise ValueError(f"api_key_file: {path}: expected at least one hash, as --new-key prints it")
    return hashes


def find_owner(key: str | None, hashes: list[str]) -> str | None:
    """The hash of a key if it is one of `hashes`, else None; the time taken tells nothing of how near it came."""
    given, owner = hash_key(key or ""), None
    for known in hashes:
        if hmac.compare_digest(given, known):
            owner = known
    return owner
