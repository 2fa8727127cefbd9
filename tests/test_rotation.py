"""What rotates runs by turns, in every folder of the tests; what does not rotate always runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def collected(word: str, *paths: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *paths]
    found = subprocess.run(
        command,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "GRAPHOPT_SUITE_ROTATION": word, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line for line in found.stdout.splitlines() if "::" in line]


def test_shares_change_and_instruction_sets_come_as_a_whole() -> None:
    reports, kernels = "tests/test_verification.py", "tests/backends/test_cpp_linear.py"
    days = [collected(word, reports, kernels) for word in ("monday", "tuesday")]
    shares = [{name for name in day if name.startswith(reports)} for day in days]
    always = f"{reports}::test_the_page_shows_the_kept_figures"
    assert all(always in share and 1 < len(share) < 20 for share in shares) and shares[0] != shares[1]
    for day in days:
        counts = {
            isa: sum("test_every_size_of_a_row" in name and bool(re.search(rf"\b{isa}\b", name)) for name in day)
            for isa in ("avx2", "avx512", "avx512vnni", "avx512bf16", "amx", "plain")
        }
        assert len(set(counts.values()) - {0}) == 1, counts
