"""The on-disk cache is private, refuses what others could have written, and saves the work of a second process."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.errors import CacheError
from graphopt.runtime import cache

PROGRAM = """
import os, torch
os.umask(0)
import graphopt
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4)).eval()
compiled = torch.compile(model, backend="graphopt", options={"target": "inductor"})
with torch.no_grad():
    assert torch.allclose(compiled(torch.ones(3, 8)), model(torch.ones(3, 8)), atol=1e-6)
from torch._dynamo.utils import counters
print(counters["aot_autograd"]["autograd_cache_hit"], graphopt.counters["graphs"])
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(directory))
    return directory


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_directories_are_private_whatever_the_umask(root: Path) -> None:
    before = os.umask(0)
    try:
        made = cache.cache_dir("a", "b")
    finally:
        os.umask(before)
    assert made == root / "a" / "b"
    assert mode(root) == mode(root / "a") == mode(made) == 0o700


def test_own_readable_directory_is_closed(root: Path) -> None:
    root.mkdir(mode=0o755)
    root.chmod(0o755)
    cache.cache_dir()
    assert mode(root) == 0o700


def test_directory_that_others_can_write_is_refused(root: Path) -> None:
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(CacheError, match="can be written by other users.*GRAPHOPT_CACHE_DIR"):
        cache.cache_dir()


def test_link_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="is not a directory"):
        cache.cache_dir()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_squatted_directory_is_refused(root: Path) -> None:
    root.mkdir(mode=0o700)
    os.chown(root, 12345, 12345)
    with pytest.raises(CacheError, match="belongs to user id 12345"):
        cache.cache_dir()


def test_second_process_reuses_the_work_and_no_file_is_open_to_others(root: Path) -> None:
    def run() -> str:
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=True)
        return done.stdout.split("\n")[-2]

    assert run() == "0 1"
    assert run() == "1 1"
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            assert mode(path) & 0o022 == 0, path


def test_digest_covers_passes_and_kernels() -> None:
    assert len(cache.source_digest()) == 64
    assert cache.source_digest() == cache.source_digest()
