"""Tensors in files, read as matrices."""

import os

import pytest
import torch
from safetensors.torch import save_file

from exporter.weights import Inputs, Plain, Stored, matrix
from loader.errors import TruncatedShard
from loader.files import read_header

TENSORS = {
    "matrix": torch.arange(60, dtype=torch.float32).view(12, 5).bfloat16(),
    "vector": torch.arange(7, dtype=torch.float16),
    "experts": torch.arange(24, dtype=torch.float32).view(2, 3, 4),
    "packed": torch.arange(40, dtype=torch.int32).view(4, 10),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def stored(tmp_path) -> dict[str, Stored]:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return {info.name: Stored(info, tmp_path) for info in read_header(tmp_path / "model.safetensors")}


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [((12, 5), 12, 5), ((7,), 7, 1), ((2, 3, 4), 6, 4), ((), 1, 1), ((0, 4), 0, 4)],
)
def test_a_tensor_is_a_matrix_whose_columns_are_its_last_dimension(shape, rows, columns):
    assert matrix(shape) == (rows, columns)


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_read_whole_in_its_own_dtype_and_shape(stored, name):
    with Inputs() as inputs:
        found = inputs.tensor(stored[name])
    assert found.dtype == TENSORS[name].dtype
    assert torch.equal(found, TENSORS[name])


@pytest.mark.parametrize("name", ["matrix", "vector", "experts"])
def test_rows_are_read_in_blocks(stored, name):
    whole = TENSORS[name].view(matrix(tuple(TENSORS[name].shape)))
    with Inputs() as inputs:
        read = Plain(name, stored[name]).open(inputs)
        blocks = [read(start, min(start + 5, len(whole))).clone() for start in range(0, len(whole), 5)]
    assert torch.equal(torch.cat(blocks), whole)


def test_blocks_of_one_dtype_share_their_memory(stored):
    with Inputs() as inputs:
        assert (
            inputs.rows(stored["matrix"], 0, 3).data_ptr() == inputs.rows(stored["matrix"], 3, 6).data_ptr()
        )


def test_columns_are_read_row_by_row(stored):
    with Inputs() as inputs:
        assert torch.equal(inputs.columns(stored["packed"], 3, 8), TENSORS["packed"][:, 3:8])


def test_a_file_that_was_cut_after_planning_is_an_error_with_numbers(stored, tmp_path):
    os.truncate(tmp_path / "model.safetensors", 400)
    with Inputs() as inputs, pytest.raises(TruncatedShard, match="and the file has 400"):
        inputs.tensor(stored["packed"])


def test_files_are_closed_at_the_end(stored):
    inputs = Inputs()
    inputs.tensor(stored["scalar"])
    inputs.close()
    assert not inputs._files
