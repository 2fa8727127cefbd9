"""The on-disk cache: a directory of mode 0700 owned by the user, refused when anybody else could have written it."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import tempfile
from pathlib import Path

from graphopt.errors import CacheError


def cache_dir(*parts: str) -> Path:
    """A private directory below the cache's root, made when missing.

    The root is $GRAPHOPT_CACHE_DIR, else $XDG_CACHE_HOME/graphopt, else ~/.cache/graphopt; without a home a directory
    named by the user's id below the temporary directory. Raises CacheError when a directory on the way is not a
    directory, is a link, belongs to somebody else, or is open to others.
    """
    directory = _root()
    _make_private(directory)
    for part in parts:
        directory = directory / part
        _make_private(directory)
    return directory


def _root() -> Path:
    if chosen := os.environ.get("GRAPHOPT_CACHE_DIR"):
        return Path(chosen).absolute()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).absolute() / "graphopt"
    home = Path.home()
    if home.is_dir() and os.access(home, os.W_OK):
        return home / ".cache" / "graphopt"
    return Path(tempfile.gettempdir()) / f"graphopt-{os.getuid()}"


def _make_private(directory: Path) -> None:
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass
    status = directory.lstat()
    advice = "remove it or set GRAPHOPT_CACHE_DIR to a directory of your own"
    if not stat.S_ISDIR(status.st_mode):
        raise CacheError(f"cache path {directory} is not a directory (a file or a link): {advice}")
    if status.st_uid != os.getuid():
        raise CacheError(f"cache directory {directory} belongs to user id {status.st_uid}, not to you: {advice}")
    if stat.S_IMODE(status.st_mode) & 0o077:
        # Ours but open: what is in it may have been written by others, so it is not enough to close it now.
        if stat.S_IMODE(status.st_mode) & 0o022:
            raise CacheError(f"cache directory {directory} can be written by other users: {advice}")
        directory.chmod(0o700)


@functools.cache
def source_digest() -> str:
    """A hash of graphopt's own sources: part of every cache key, so that an edited pass is never hidden by a cache."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    seen: set[Path] = set()
    for folder in (root, root / "passes", root / "backends"):
        for path in sorted(folder.resolve().rglob("*")):
            if path.suffix in (".py", ".cpp", ".h") and path not in seen:
                seen.add(path)
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
