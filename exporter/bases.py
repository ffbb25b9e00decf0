"""What a merge goes onto: the weights of the base, or of the 16-bit original of a quantized one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from exporter.conversion import layouts
from exporter.errors import BadQuantization
from exporter.quantization.detect import base_weights, method
from exporter.quantization.phantoms import phantoms
from exporter.recipe import Recipe
from exporter.weights import Plain, Weight
from loader.checkpoint import ModelSpec


@dataclass(frozen=True)
class Onto:
    """The weights to merge onto, under the names that transformers 5 has."""

    weights: tuple[Weight, ...]
    method: str | None  # how the base is quantized
    must_be_zero: tuple[Weight, ...] = ()  # biases that a quantizer added
    trained_on: tuple[Weight, ...] = ()  # with an original: the base's own weights
    notes: tuple[str, ...] = ()


def onto(base: ModelSpec, original: ModelSpec | None) -> Onto:
    """The base's weights, or the original's with the base's beside them.

    Raises BadQuantization where they cannot be read as numbers, or the two are not the same model.
    """
    found = base_weights(base)
    zero = phantoms(found, base.config)
    weights, dropped = layouts.renamed([weight for weight in found if weight not in zero], base.config)
    notes = (f"left out, since it is computed: {', '.join(dropped[:3])}",) if dropped else ()
    how = method(base)
    if original is None:
        return Onto(tuple(weights), how, tuple(zero), notes=notes)
    if how is None:
        reason = (
            f"is 16-bit already; --original-base ({original.source}) is for quantized ones. Leave it out."
        )
        raise BadQuantization(base.source, reason)
    _refuse_quantized(original)
    originals, _ = layouts.renamed(base_weights(original), original.config)
    _refuse_another_model(base, original, weights, originals)
    return Onto(tuple(originals), how, trained_on=tuple(weights), notes=notes)


def with_drift(recipes: Sequence[Recipe], onto: Onto) -> list[Recipe]:
    """The recipes, each merged one with what its adapter was trained on where that was quantized."""
    quantized = {weight.name: weight for weight in onto.trained_on if not isinstance(weight, Plain)}
    return [
        replace(recipe, trained_on=quantized.get(recipe.name)) if recipe.updates else recipe
        for recipe in recipes
    ]


def _refuse_quantized(original: ModelSpec) -> None:
    if (how := method(original)) is not None:
        raise BadQuantization(
            original.source, f"--original-base is quantized too ({how}). Give the 16-bit model."
        )


def _refuse_another_model(
    base: ModelSpec, original: ModelSpec, weights: Sequence[Weight], originals: Sequence[Weight]
) -> None:
    shapes = {weight.name: weight.shape for weight in originals}
    odd = [
        f"{w.name} is {list(w.shape)} in {base.source} and {_shape(shapes, w.name)} in {original.source}"
        for w in weights
        if shapes.get(w.name) != w.shape
    ]
    if odd:
        raise BadQuantization(
            original.source,
            f"is not the original of {base.source}: {len(odd)} tensors differ in shape: {'; '.join(odd[:3])}."
            " Some int4 repacks are padded (intermediate_size of Qwen2-72B): export without --original-base.",
        )


def _shape(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "missing"
