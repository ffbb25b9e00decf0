"""Tied embeddings: one matrix for what goes in and what comes out, until an adapter changes one side only.

config.json says `tie_word_embeddings`, and the file then has the embedding alone. An adapter on one of the
two makes them two: both are written and the config says so. (peft 0.21 merges such an adapter into the one
matrix, and so changes the other side too: https://github.com/huggingface/peft/issues/2777.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from exporter.adapters import config as adapter_config
from exporter.adapters.adapter import Adapter
from exporter.adapters.lookup import bare
from exporter.adapters.names import Part, role
from exporter.conversion import layouts
from exporter.errors import BadAdapter
from exporter.outputs.config import text_configs
from exporter.outputs.vocabulary import tokenizer_rows
from exporter.outputs.wording import short_name
from exporter.recipe import Recipe
from exporter.weights import Inputs, Plain, ReadRows, Stored, Weight

_EMBEDDING = re.compile(
    r"(.+\.)?(embed_tokens|wte|embed_in|word_embeddings?|tokens_embed|backbone\.embeddings)\.weight"
)
_HEAD = re.compile(r"(.+\.)?(lm_head|embed_out)\.weight")
_OTHER_SENSES = re.compile(r"(vision|visual|audio|image|talker|encoder)")


@dataclass(frozen=True, slots=True)
class Pair:
    """The names of the input embedding and of the head, and whether the base has one matrix for both."""

    embedding: str
    head: str
    is_tied: bool


@dataclass(frozen=True)
class Tied:
    """The recipes with one matrix for both sides only where they are the same."""

    recipes: list[Recipe]
    changes: Mapping[str, Any] = field(default_factory=dict)  # of config.json
    must_be_equal: tuple[
        tuple[Weight, Weight], ...
    ] = ()  # what was taken for one matrix: compare the numbers
    notes: tuple[str, ...] = ()


def find_pair(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Pair | None:
    """Embedding and head among tensors of these names; None without an embedding, or with several."""
    found = [name for name in shapes if _EMBEDDING.fullmatch(name) and not _OTHER_SENSES.search(name)]
    if len(found) != 1:
        return None
    heads = [name for name in shapes if _HEAD.fullmatch(name) and not _OTHER_SENSES.search(name)]
    head = heads[0] if len(heads) == 1 else layouts.rename("lm_head.weight", config)
    return Pair(found[0], head, head not in shapes or says_tied(config) is True)


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """`tie_word_embeddings` of a config.json; None where it is left to the architecture."""
    for holder in (config, *text_configs(config)):
        if isinstance(value := holder.get("tie_word_embeddings"), bool):
            return value
    return None


def resolve(recipes: Sequence[Recipe], config: Mapping[str, Any], adapters: Sequence[Adapter]) -> Tied:
    """One matrix or two, and how many rows: what targets.match made, with the config that belongs to it.

    Raises BadAdapter where input and output have different numbers of rows, or fewer than an adapter's
    tokenizer has tokens; and where a tensor of an adapter would have no part in the output.
    """
    shapes = {recipe.name: recipe.shape for recipe in recipes}
    pair = find_pair(shapes, config)
    if pair is None:
        _check_all_used(recipes, (), adapters)
        return Tied(list(recipes))
    saved = _saved(adapters, pair)
    _check_rows(pair, shapes, saved)
    _check_tokenizers(pair.embedding, shapes[pair.embedding][0], adapters)
    tied = _one_or_two(recipes, pair, config, adapters) if pair.head in shapes else Tied(list(recipes))
    _check_all_used(recipes, tied.must_be_equal, adapters)
    return replace(tied, changes={**_vocabulary(shapes[pair.embedding][0], config, saved), **tied.changes})


def _one_or_two(
    recipes: Sequence[Recipe], pair: Pair, config: Mapping[str, Any], adapters: Sequence[Adapter]
) -> Tied:
    saved = _saved(adapters, pair)
    embedding, head = _recipe(recipes, pair.embedding), _recipe(recipes, pair.head)
    is_one_in_base = embedding.base.stored == head.base.stored
    is_tied = is_one_in_base or says_tied(config) is True
    are_copies = is_tied and not any(copy.is_independent for copy in saved)
    copies = [*_copies(saved, are_copies), *_same_tokens(adapters, pair, head)]
    copies += _mirrored(adapters, pair) if is_tied else ()
    if are_copies and not is_one_in_base:
        copies.append((embedding.base, head.base))
    if are_copies and embedding.updates == head.updates:
        return Tied([recipe for recipe in recipes if recipe is not head], must_be_equal=tuple(copies))
    is_changed = any(recipe.updates for recipe in (embedding, head)) or bool(saved)
    if not is_changed or says_tied(config) is False:
        return Tied(list(recipes), must_be_equal=tuple(copies))
    notes = (_note(embedding, head, saved),) if is_tied else ()
    return Tied(list(recipes), {"tie_word_embeddings": False}, tuple(copies), notes)


def _recipe(recipes: Sequence[Recipe], name: str) -> Recipe:
    return next(recipe for recipe in recipes if recipe.name == name)


def _note(embedding: Recipe, head: Recipe, saved: Sequence[_Saved]) -> str:
    changed = dict.fromkeys(
        [copy.adapter for copy in saved if copy.is_independent]
        + [update.adapter for recipe in (embedding, head) for update in recipe.updates]
    )
    who = ", ".join(map(short_name, changed))
    return (
        f"the base has one matrix for {embedding.name} and {head.name}, and {who} changes "
        "them apart: both are written, and tie_word_embeddings is false."
    )


# Whole matrices that adapters bring


@dataclass(frozen=True, slots=True)
class _Saved:
    """A whole embedding or head in an adapter: trained, or the base's of a vocabulary that was resized."""

    adapter: str
    stored: Stored
    is_head: bool
    is_trained: bool
    is_independent: bool  # trained without the other side following


def _saved(adapters: Iterable[Adapter], pair: Pair) -> list[_Saved]:
    found = []
    for adapter in adapters:
        for stored in adapter.tensors:
            its = role(stored.name)
            if its.part is not Part.SAVED or not its.path.endswith(".weight"):
                continue
            is_head = is_named(its.path, pair.head)
            if is_head or is_named(its.path, pair.embedding):
                trained = adapter_config.is_trained_whole(adapter.config, its.path.removesuffix(".weight"))
                apart = trained and not adapter.config.get("ensure_weight_tying")
                found.append(_Saved(adapter.source, stored, is_head, trained, apart))
    return found


def is_named(path: str, name: str) -> bool:
    """Whether an adapter's path of a tensor means the base's tensor of that name."""
    return path == name or bare(path) == bare(name)


def _copies(saved: Sequence[_Saved], sides_are_one: bool) -> list[tuple[Weight, Weight]]:
    """One matrix as it was saved more than once: the first is taken, and the others must hold the same."""
    frozen = [copy for copy in saved if not copy.is_independent]
    groups = (
        [frozen] if sides_are_one else [[c for c in frozen if c.is_head is side] for side in (False, True)]
    )
    return [(_plain(group[0]), _plain(copy)) for group in groups for copy in group[1:]]


def _plain(copy: _Saved) -> Weight:
    return Plain(copy.stored.name, copy.stored)


@dataclass(frozen=True, slots=True)
class _Transposed:
    """A matrix with its columns for rows."""

    name: str
    tensor: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[::-1]

    @property
    def dtype(self) -> str:
        return self.tensor.info.dtype

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self.tensor,)

    def open(self, inputs: Inputs) -> ReadRows:
        return lambda start, stop: inputs.columns(self.tensor, start, stop).T


def _mirrored(adapters: Iterable[Adapter], pair: Pair) -> Iterator[tuple[Weight, Weight]]:
    """A and B of a head that peft made of those of the embedding, transposed (ensure_weight_tying)."""
    for adapter in adapters:
        if not adapter.config.get("ensure_weight_tying"):
            continue
        embedding, head = (_parts(adapter, name) for name in (pair.embedding, pair.head))
        for of_embedding, of_head in ((Part.EMBEDDING_A, Part.B), (Part.EMBEDDING_B, Part.A)):
            if of_embedding in embedding and of_head in head:
                one, other = head[of_head], embedding[of_embedding]
                yield Plain(one.name, one), _Transposed(other.name, other)


def _same_tokens(adapters: Iterable[Adapter], pair: Pair, head: Recipe) -> Iterator[tuple[Weight, Weight]]:
    """The same rows of tokens for both sides: where the head follows, its own rows must hold the same."""
    used = {stored for update in head.updates for stored in update.stored}
    for adapter in adapters:
        one, other = (_parts(adapter, name).get(Part.TOKENS) for name in (pair.embedding, pair.head))
        if one is not None and other is not None and other not in used:
            yield Plain(one.name, one), Plain(other.name, other)


def _parts(adapter: Adapter, name: str) -> dict[Part, Stored]:
    """What an adapter learned beside the matrix of that name."""
    found = ((role(stored.name), stored) for stored in adapter.tensors)
    return {its.part: stored for its, stored in found if is_named(f"{its.path}.weight", name)}


def _check_all_used(
    recipes: Sequence[Recipe], compared: Iterable[tuple[Weight, Weight]], adapters: Iterable[Adapter]
) -> None:
    """Nothing that was trained is left out in silence: it is in a recipe, or compared with what is."""
    used = {stored for pair in compared for weight in pair for stored in weight.stored}
    for recipe in recipes:
        used.update(recipe.base.stored, *(update.stored for update in recipe.updates))
    for adapter in adapters:
        if unused := [stored.name for stored in adapter.tensors if stored not in used]:
            raise BadAdapter(
                adapter.source,
                f"{len(unused)} of its {len(adapter.tensors)} tensors ({', '.join(unused[:3])}"
                f"{', …' if len(unused) > 3 else ''}) would have no effect on the output: another tensor "
                "stands in their place. Merge it with the library it was trained with, and give the result "
                "as --base.",
            )


# Rows


def _check_rows(pair: Pair, shapes: Mapping[str, tuple[int, ...]], saved: Sequence[_Saved]) -> None:
    rows, of_head = (shapes.get(name, (0,))[0] for name in (pair.embedding, pair.head))
    if saved and of_head and rows != of_head:
        raise BadAdapter(
            saved[0].adapter,
            f"{pair.embedding} has {rows:,} rows and {pair.head} has {of_head:,}: the vocabulary was resized "
            "and only one of the two was saved. Save the adapter again with "
            "save_pretrained(…, save_embedding_layers=True).",
        )


def _check_tokenizers(embedding: str, rows: int, adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        needed = tokenizer_rows(adapter.folder) if adapter.tokenizer_files else None
        if needed is not None and needed > rows:
            raise BadAdapter(
                adapter.source,
                f"its tokenizer has {needed:,} tokens and {embedding} has {rows:,} rows: {needed - rows:,} "
                "tokens have no embedding. Save the adapter again with save_pretrained(…, "
                "save_embedding_layers=True); or, if it was trained with the base's own tokenizer, remove "
                "the tokenizer's files beside it.",
            )


def _vocabulary(rows: int, config: Mapping[str, Any], saved: Sequence[_Saved]) -> dict[str, Any]:
    known = [holder["vocab_size"] for holder in (config, *text_configs(config)) if "vocab_size" in holder]
    return {"vocab_size": rows} if saved and any(size != rows for size in known) else {}
