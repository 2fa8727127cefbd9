"""Every operator of PyTorch's database through the backend, against eager.

Two rotating shares run every day: a large one by the graphs' meaning (capture and passes are tested), a small one in
generated code. `python -m tests.suite.opinfo_report` runs them all, each guarded against crashes and hangs.
"""

import pytest

from tests.suite import opinfo

CASES = opinfo.cases()

# In generated code these differ from eager, as they do in Inductor.
KNOWN = {
    "unsafe_split": "the only chunk is the input itself, where eager makes another view of it",
    "std_mean.unbiased": "the mean of an empty tensor is 0, where eager's is nan",
    "var_mean.unbiased": "the mean of an empty tensor is 0, where eager's is nan",
}
# Dynamo's own fake tensors refuse these, with every backend.
NOT_TRACED = {"max_pool2d_with_indices_backward-dynamic-float32"}


@pytest.mark.rotate(one_in=24)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_meaning(case: opinfo.Case) -> None:
    if str(case) in NOT_TRACED:
        pytest.xfail("Dynamo cannot trace it with symbolic sizes")
    opinfo.check(case, target="reference", most=3)


@pytest.mark.rotate(one_in=200)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_generated_code(case: opinfo.Case) -> None:
    if case.op in KNOWN or str(case) in NOT_TRACED:
        pytest.xfail(KNOWN.get(case.op, "Dynamo cannot trace it with symbolic sizes"))
    opinfo.check(case, target="cpu", most=2)


def test_database_is_not_empty() -> None:
    names = {case.op for case in CASES}
    assert len(names) > 500
    assert {case.kind for case in CASES} == set(opinfo.KINDS)
