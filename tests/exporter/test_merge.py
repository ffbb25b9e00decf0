"""Blocks of rows: the same result for any size of block, one rounding, and the proof of what changed."""

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from exporter import merge as merging
from exporter.errors import BadAdapter, BadQuantization
from exporter.merge import merge
from exporter.recipe import Recipe
from exporter.weights import Inputs, Plain, Stored, row_blocks
from loader.files import read_header

ROWS, COLUMNS = 37, 11


@dataclass(frozen=True)
class Add:
    """Adds a matrix; where it `looks`, it doubles what it saw before it."""

    values: torch.Tensor
    looks: bool = False
    adapter: str = "lora"
    first_row: int = 0
    stored: tuple = ()

    def open(self, inputs, before):
        seen = torch.cat([before(row, row + 1) for row in range(ROWS)]) if self.looks else None

        def change(first, rows):
            part = slice(first + self.first_row, first + self.first_row + len(rows))
            return rows.add_(self.values[part] if seen is None else seen[part])

        return change


@pytest.fixture
def base(tmp_path):
    """A function: values -> a Weight in a file."""

    def write(values):
        save_file({"w": values}, tmp_path / "model.safetensors")
        (info,) = read_header(tmp_path / "model.safetensors")
        return Plain("w", Stored(info, tmp_path))

    return write


def made(recipe):
    """(the tensor, the proof) as an export makes them."""
    parts = []

    def room(rows, columns):
        parts.append(torch.empty(rows, columns, dtype=torch.bfloat16))
        return parts[-1]

    with Inputs() as inputs:
        proof = merge(recipe, inputs, room)
    return torch.cat(parts), proof


def random(seed=0, rows=ROWS, scale=1.0):
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("elements", [1, 50, 10**6])
def test_the_sum_is_in_fp32_and_rounded_once_whatever_the_block(base, monkeypatch, elements):
    monkeypatch.setattr(merging, "BLOCK_ELEMENTS", elements)
    weight, first, second = random().bfloat16(), random(1, scale=0.01), random(2, scale=0.01)
    recipe = Recipe("w", (ROWS, COLUMNS), base(weight), updates=(Add(first), Add(second)))
    assert torch.equal(made(recipe)[0], (weight.float() + first + second).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_tensor_that_no_adapter_touches_is_rounded_once_and_needs_no_proof(base, dtype):
    weight = random().to(dtype)
    values, proof = made(Recipe("w", (ROWS, COLUMNS), base(weight)))
    assert torch.equal(values, weight.bfloat16())
    assert proof is None


def test_rows_of_a_fused_matrix_become_a_tensor_of_their_own(base):
    weight, update = random().bfloat16(), random(1)
    recipe = Recipe("k", (10, COLUMNS), base(weight), first_row=20, updates=(Add(update, first_row=20),))
    assert torch.equal(made(recipe)[0], (weight.float() + update)[20:30].bfloat16())


def test_an_update_may_look_at_the_whole_tensor_as_it_is_before_it(base, monkeypatch):
    monkeypatch.setattr(merging, "BLOCK_ELEMENTS", 50)
    weight, update = random().bfloat16(), random(1)
    recipe = Recipe("w", (ROWS, COLUMNS), base(weight), updates=(Add(update), Add(update, looks=True)))
    assert torch.equal(made(recipe)[0], ((weight.float() + update) * 2).bfloat16())


def test_the_proof_counts_changed_elements_and_measures_norms(base):
    weight, update = random().bfloat16(), torch.zeros(ROWS, COLUMNS)
    update[3] = 0.5
    _, proof = made(Recipe("w", (ROWS, COLUMNS), base(weight), updates=(Add(update),)))
    assert (proof.name, proof.elements, proof.changed) == ("w", ROWS * COLUMNS, COLUMNS)
    assert proof.update_norm == pytest.approx(float(update.norm()))
    assert proof.base_norm == pytest.approx(float(weight.float().norm()))
    assert proof.drift_norm is None


def test_an_update_that_rounds_away_changes_nothing_and_the_proof_says_so(base):
    weight = torch.ones(ROWS, COLUMNS).bfloat16()
    _, proof = made(
        Recipe("w", (ROWS, COLUMNS), base(weight), updates=(Add(torch.full_like(weight, 1e-4).float()),))
    )
    assert proof.changed == 0
    assert proof.update_norm > 0


def test_a_base_in_fp32_counts_as_changed_only_where_its_rounding_would_be_another(base):
    _, proof = made(Recipe("w", (ROWS, COLUMNS), base(random()), updates=(Add(torch.zeros(ROWS, COLUMNS)),)))
    assert proof.changed == 0


def test_drift_is_the_distance_from_what_the_adapter_was_trained_on(base, tmp_path):
    weight, quantized = random().bfloat16(), random(5)
    (tmp_path / "q").mkdir()
    save_file({"w": quantized}, tmp_path / "q" / "model.safetensors")
    (info,) = read_header(tmp_path / "q" / "model.safetensors")
    trained_on = Plain("w", Stored(info, tmp_path / "q"))
    _, proof = made(
        Recipe("w", (ROWS, COLUMNS), base(weight), updates=(Add(random(1)),), trained_on=trained_on)
    )
    assert proof.drift_norm == pytest.approx(float((weight.float() - quantized).norm()))


def test_an_adapter_that_holds_nan_is_refused_by_name(base):
    update = torch.zeros(ROWS, COLUMNS)
    update[36, 10] = float("nan")
    with pytest.raises(BadAdapter, match="lora: w: merged values are not finite"):
        made(Recipe("w", (ROWS, COLUMNS), base(random().bfloat16()), updates=(Add(update),)))


def test_a_base_that_holds_infinity_is_not_blamed_on_the_adapter(base):
    weight = random().bfloat16()
    weight[0, 0] = float("inf")
    with pytest.raises(BadQuantization, match="the base holds values that are not finite"):
        made(Recipe("w", (ROWS, COLUMNS), base(weight), updates=(Add(random(1)),)))


@pytest.mark.parametrize("elements", [1, 11, 12, 100, 10**6])
def test_blocks_cover_every_row_once(elements):
    found = list(row_blocks(0, ROWS, COLUMNS, elements))
    assert [row for start, stop in found for row in range(start, stop)] == list(range(ROWS))
