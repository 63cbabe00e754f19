from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.errors import RequestError
from skulk.models.reference import ModelReference, is_reference, parse_reference


@pytest.mark.parametrize(
    ("name", "repo", "quantization", "revision"),
    [
        ("org/repo", "org/repo", "", ""),
        ("org/repo:Q8_0", "org/repo", "Q8_0", ""),
        ("org/repo@v1.2", "org/repo", "", "v1.2"),
        ("org/repo@refs/pr/3", "org/repo", "", "refs/pr/3"),
        ("org/repo:UD-Q4_K_XL@main", "org/repo", "UD-Q4_K_XL", "main"),
        ("org/repo@main:Q4_0", "org/repo", "Q4_0", "main"),
        ("Org-1/Re.po_2-GGUF", "Org-1/Re.po_2-GGUF", "", ""),
    ],
)
def test_a_name_taken_apart(name: str, repo: str, quantization: str, revision: str) -> None:
    found = parse_reference(name)
    assert found == ModelReference(repo=repo, quantization=quantization, revision=revision)
    assert parse_reference(found.model_id) == found


@pytest.mark.parametrize(
    "name",
    ["", "repo", "org/", "/repo", "org/repo/more", "../etc", "org/..", "org/a..b", "org/repo@../x", "org/re po",
     "org/repo:", "org/repo:Q4:Q5", "org/repo:Q4@a:Q5", "org/repo@", "org--x/repo", "org/repo.git", "-org/repo",
     "org/repo\n", "org/" + "x" * 400, "http://x/y"],
)  # fmt: skip
def test_what_is_no_name_of_the_hub(name: str) -> None:
    assert not is_reference(name)
    with pytest.raises(RequestError) as caught:
        parse_reference(name)
    assert caught.value.code == "invalid_request"


def test_a_revision_has_a_folder_of_its_own() -> None:
    assert parse_reference("org/repo:Q8_0").folder == "org/repo"
    assert parse_reference("org/repo@refs/pr/3").folder == "org/repo@refs_pr_3"


@given(name=st.text(alphabet="ab/.:@-_Q4", max_size=24))
def test_no_name_leads_out_of_its_folder(name: str) -> None:
    if is_reference(name):
        parts = parse_reference(name).folder.split("/")
        assert len(parts) == 2 and not {"", ".", ".."} & set(parts)
