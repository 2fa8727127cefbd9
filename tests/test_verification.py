"""No rewrite in any architecture of the suite changes what it replaces: a share of them by turns, all with -m slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import planted_report, verification_report
from tests.suite import architectures
from tests.test_planted_bugs import BUGS

CASES = [
    f"{architecture.name}:{kind}"
    for architecture in architectures.ARCHITECTURES
    for kind in architecture.checks
    if kind in verification_report.DEFAULT_KINDS
]
DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.rotate(one_in=24)
@pytest.mark.parametrize("case", CASES)
def test_every_rewrite_is_what_it_replaces(case: str) -> None:
    found = verification_report.check(case, "all")
    assert not found["failures"] and not found["failed"] and not found["unchecked"], found["failures"]
    assert found["checked"] >= found["distinct"] > 0 or case.startswith("lstm:"), "torch.nn.LSTM is left to torch"


def test_the_page_shows_the_kept_figures() -> None:
    page = (DOCS / "explanation" / "verification.md").read_text()
    records, rows = (
        json.loads((DOCS / "measured" / "workbench" / f"{name}.json").read_text())
        for name in ("verification", "planted")
    )
    assert {record["case"].split(":")[0] for record in records} == set(architectures.BY_NAME)
    assert verification_report.table(records) in page
    assert {row["bug"] for row in rows} == {bug.name for bug in BUGS}
    assert planted_report.table(rows) in page
