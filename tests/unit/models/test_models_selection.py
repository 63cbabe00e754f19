from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.errors import RequestError
from skulk.models.selection import Selection, is_wanted_kind, select
from skulk.wire.model import ModelFile


def listed(*names: str) -> list[ModelFile]:
    return [ModelFile(name=name, size_bytes=100) for name in names]


def chosen(*names: str, quantization: str = "", repo: str = "org/repo") -> Selection:
    return select(repo, listed(*names), quantization)


def names_of(selection: Selection) -> list[str]:
    return [file.name for file in selection.weights]


def test_one_quantization_is_chosen_by_the_order_of_preference() -> None:
    found = chosen("m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q2_K.gguf", "m-F16.gguf", "README.md", "convert.py")
    assert names_of(found) == ["m-Q4_K_M.gguf"]
    assert (found.format, found.quantization, found.projector) == ("gguf", "Q4_K_M", None)


def test_the_one_that_was_asked_for() -> None:
    assert names_of(chosen("m-Q8_0.gguf", "m-Q4_K_M.gguf", quantization="q8_0")) == ["m-Q8_0.gguf"]


def test_a_token_in_the_model_s_own_name_is_no_quantization() -> None:
    found = chosen("Q4_K_M-lab-model.Q5_0.gguf", quantization="Q5_0")
    assert names_of(found) == ["Q4_K_M-lab-model.Q5_0.gguf"]
    with pytest.raises(RequestError, match="has no Q4_K_M; it has Q5_0"):
        chosen("Q4_K_M-lab-model.Q5_0.gguf", quantization="Q4_K_M")


def test_a_model_in_parts_is_taken_whole_in_its_order() -> None:
    parts = [f"BF16/m-BF16-0000{part}-of-00003.gguf" for part in (3, 1, 2)]
    assert names_of(chosen(*parts, "m-Q9.gguf", quantization="BF16")) == sorted(parts)


def test_a_folder_may_name_the_quantization() -> None:
    parts = ("Q8_0/m-00001-of-00002.gguf", "Q8_0/m-00002-of-00002.gguf")
    found = chosen(*parts, "Q4_0/m-00001-of-00001.gguf", quantization="Q8_0")
    assert (names_of(found), found.quantization) == (list(parts), "Q8_0")


def test_a_group_with_a_part_missing_is_never_chosen() -> None:
    parts = ("m-Q4_K_M-00001-of-00003.gguf", "m-Q4_K_M-00003-of-00003.gguf")
    assert names_of(chosen(*parts, "m-Q2_K.gguf")) == ["m-Q2_K.gguf"]
    with pytest.raises(RequestError, match=r"only 2 of 3 parts of Q4_K_M \(the first missing one: 2") as caught:
        chosen(*parts, "m-Q2_K.gguf", quantization="Q4_K_M")
    assert caught.value.code == "quantization_not_found"
    with pytest.raises(RequestError, match="only 2 of 3 parts"):
        chosen(*parts)


def test_native_mxfp4_is_the_model_s_own_form_only_where_it_was_trained_so() -> None:
    names = ("gpt-oss-20b-mxfp4.gguf", "gpt-oss-20b-Q4_K_M.gguf")
    assert chosen(*names, repo="ggml-org/gpt-oss-20b-GGUF").quantization == "MXFP4"
    assert chosen("m-MXFP4_MOE.gguf", "m-Q4_K_M.gguf", repo="org/m").quantization == "Q4_K_M"
    assert chosen("m-MXFP4_MOE.gguf", repo="org/m").quantization == "MXFP4"


def test_a_dynamic_quantization_is_another_one_than_its_plain_namesake() -> None:
    names = ("m-UD-Q4_K_XL.gguf", "m-Q4_K_XL.gguf")
    assert names_of(chosen(*names, quantization="UD-Q4_K_XL")) == ["m-UD-Q4_K_XL.gguf"]
    assert names_of(chosen(*names, quantization="Q4_K_XL")) == ["m-Q4_K_XL.gguf"]


def test_exactly_one_projector_is_taken_and_none_is_a_model() -> None:
    found = chosen("m-Q4_K_M.gguf", "mmproj-m-f32.gguf", "mmproj-m-f16.gguf", "mmproj-m-Q8_0.gguf")
    assert names_of(found) == ["m-Q4_K_M.gguf"]
    assert found.projector is not None and found.projector.name == "mmproj-m-f16.gguf"
    with pytest.raises(RequestError, match="no model among them"):
        chosen("mmproj-m-f16.gguf")


def test_an_importance_matrix_is_no_model() -> None:
    assert names_of(chosen("imatrix.gguf", "m-imatrix.gguf", "m-Q4_0.gguf")) == ["m-Q4_0.gguf"]


def test_safetensors_with_what_goes_with_them_and_no_code() -> None:
    found = chosen(
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json",
        "model.safetensors.index.json", "chat_template.jinja", "modeling_x.py", "pytorch_model.bin", "sub/config.json",
    )  # fmt: skip
    assert found.format == "mlx"
    assert len(found.weights) == 2
    assert [file.name for file in found.companions] == [
        "chat_template.jinja", "config.json", "model.safetensors.index.json", "tokenizer.json"
    ]  # fmt: skip


def test_safetensors_have_no_quantization_to_choose() -> None:
    with pytest.raises(RequestError) as caught:
        chosen("config.json", "model.safetensors", quantization="Q4_0")
    assert caught.value.code == "quantization_not_found"


@pytest.mark.parametrize("names", [(), ("README.md",), ("model.safetensors",), ("pytorch_model.bin", "config.json")])
def test_a_repository_without_a_model(names: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as caught:
        chosen(*names)
    assert caught.value.code == "model_file_invalid"


@pytest.mark.parametrize(
    "name",
    ["setup.py", "model.bin", "model.pt", "run.sh", "../m.gguf", "/m.gguf", "a/../m.gguf", ".git/m.gguf", "a\\m.gguf",
     "", "m.gguf\n", "a//m.gguf", "x" * 2000 + ".gguf", "README.md", "model.pkl", "tokenizer.py"],
)  # fmt: skip
def test_what_is_never_fetched(name: str) -> None:
    assert not is_wanted_kind(name)


def chosen_or_refused(names: list[str], quantization: str) -> tuple[Selection | None, str]:
    """What is chosen, or the code of the refusal."""
    try:
        return chosen(*names, quantization=quantization), ""
    except RequestError as error:
        return None, error.code


PIECES = st.sampled_from(["m", "mmproj", "Q4_K_M", "Q8_0", "UD", "MXFP4", "00001-of-00002", "00002-of-00002", "F16"])


@given(
    names=st.lists(st.lists(PIECES, min_size=1, max_size=4).map(lambda parts: "-".join(parts) + ".gguf"), unique=True),
    quantization=st.sampled_from(["", "Q4_K_M", "Q8_0"]),
)
def test_whatever_is_listed_one_whole_quantization_comes_out_or_a_refusal(names: list[str], quantization: str) -> None:
    found, refusal = chosen_or_refused(names, quantization)
    if found is None:
        assert refusal in ("quantization_not_found", "model_file_invalid")
        return
    assert found.weights and set(names_of(found)) <= set(names)
    assert len(set(names_of(found))) == len(found.weights)
    assert found.quantization == quantization or not quantization
    assert all("mmproj" not in name for name in names_of(found))
    assert found == chosen(*reversed(names), quantization=quantization)
