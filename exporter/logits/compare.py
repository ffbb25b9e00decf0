"""`--check-logits`: does the merged model answer as base and adapter do side by side?

A few prompts go through the model's own forward in transformers three times at once: with the merged weights,
with the base's and the adapter beside them (applied to activations, as in training), and with the base's
alone. Weights are read in blocks of rows (streamed.py), the head by blocks of the vocabulary, so that memory
is needed for activations only; it runs after merging, as transformers is imported here.

What passes: every weight on the way must be the bf16 number nearest to base + adapter (WeightCheck), and
logits must be finite. How far logits are apart then is what rounding to bf16 does to this model, which is
reported and not judged: no limit on it would tell a wrong merge of a weak adapter from a right one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.logits import skeleton
from exporter.logits.divergence import Distance
from exporter.logits.forward import Forward, Report
from exporter.logits.variants import Compared, NotComparable
from exporter.recipe import Recipe
from loader import architectures, checkpoint
from loader.checkpoint import TOKENIZER_FILES
from loader.errors import LoaderError

if TYPE_CHECKING:
    import torch

PROMPTS = (
    "Hello! Who are you, and what can you do for me today?",
    "你好，请用三句话介绍一下你自己，再讲一个关于月亮的小故事。",
    'def fibonacci(n):\n    """Return the first n numbers."""\n    numbers = [0, 1]\n',
    "The three largest cities of Europe by population are, in this order,",
)
# Of each prompt, at most. No multiple of three, by which `Compared.is_batch` tells a batch of three variants.
TOKENS = 31


@dataclass(frozen=True)
class LogitsReport:
    """What the comparison found. Differences are relative Euclidean norms, means over tokens."""

    layers: tuple[tuple[str, float], ...]  # (decoder layer, difference of its output: merged, base + adapter)
    merged: Distance  # of the merged model's logits from base + adapter
    adapter: Distance  # of the base's logits from base + adapter: what the adapter does
    tokens: int
    are_random: bool  # the tokens: there is no tokenizer that transformers can read
    weights: int  # that were compared one by one
    problems: tuple[str, ...]  # tensors that are not base + adapter

    @property
    def passed(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "tokens": self.tokens,
            "tokens_are_random": self.are_random,
            "weights": self.weights,
            "merged": asdict(self.merged),
            "adapter": asdict(self.adapter),
            "layers": dict(self.layers),
            "problems": list(self.problems),
        }

    def sentences(self) -> list[str]:
        """For a person, a line each."""
        kind = "random tokens" if self.are_random else "tokens"
        worst = max(self.layers, key=lambda layer: layer[1], default=("", 0.0))
        found = [
            f"Logits of {self.tokens} {kind}: merged and base + adapter differ by "
            f"{self.merged.relative:.2%} (KL {self.merged.kl:.1e}, the likeliest token is the same for "
            f"{self.merged.top1:.0%}); the adapter itself changes them by {self.adapter.relative:.2%} "
            f"(KL {self.adapter.kl:.1e}).",
            f"Layer by layer the largest difference is {worst[1]:.2%}, behind {worst[0]}.",
        ]
        if self.problems:
            return [*found, *(f"{problem}." for problem in self.problems)]
        return [*found, f"{self.weights:,} weights on the way are base + adapter, rounded to bf16 once."]


def check_comparable(source: str, config: Mapping[str, Any]) -> None:
    """Before merging: raise NotComparable when transformers has no causal model for the output's config.json.

    Neither transformers nor torch is imported, so what passes may still be refused by `compare`, once the
    shards are written: a forward that needs whole matrices (mamba, llama4) is known when it runs.
    """
    model_type, causal = config.get("model_type"), architectures.causal_classes()
    if causal and model_type not in causal:
        raise NotComparable(source, f"transformers has no causal language model {model_type!r}")


def compare(
    recipes: Sequence[Recipe],
    folder: Path,
    prompts: Sequence[str] = PROMPTS,
    report: Report = lambda *_: None,
) -> LogitsReport:
    """Compare a finished model with the recipes that it was made by.

    `folder` holds config.json, the shards and, unless it has none, the tokenizer: without one the tokens are
    random. `report` is called behind every decoder layer with its name and its difference, as they stand in
    LogitsReport.layers; a LoaderError that it raises, Stopped among them, ends the comparison.

    Raises NotComparable where transformers has no such model or its forward needs whole matrices, and
    TensorMismatch where the shards are not what the architecture has.
    """
    import torch

    spec = checkpoint.read_any(folder)
    with torch.inference_mode(), Compared(recipes, folder, spec.tensors) as compared:
        model = skeleton.build(spec, compared)
        batch = tokenized(folder, prompts, model.get_input_embeddings().weight.shape[0])
        compared.batch = (batch.ids.shape[0], batch.ids.shape[1])
        forward = Forward(model, spec.source, batch.ids, batch.is_real)
        with _transformers_errors(spec.source):
            merged, adapter = forward.head(forward.body(report))
        problems = [*compared.check.problems, *_not_finite(merged)]
    return LogitsReport(
        layers=tuple(forward.layers),
        merged=merged,
        adapter=adapter,
        tokens=int(batch.is_real.sum()),
        are_random=batch.are_random,
        weights=compared.check.weights,
        problems=tuple(problems),
    )


@contextmanager
def _transformers_errors(where: str) -> Iterator[None]:
    """What a forward with such parameters may run into is no bug of the merge."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as err:
        raise NotComparable(where, f"its forward in transformers fails ({err})") from err


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts as tokens, padded behind to one length."""

    ids: torch.Tensor  # [prompts, tokens]
    is_real: torch.Tensor  # the same shape: no padding
    are_random: bool


def tokenized(folder: Path, prompts: Sequence[str], vocab: int) -> Batch:
    """The prompts as the folder's tokenizer reads them, or as many random ones where it has none."""
    import torch

    encoded = _encoded(folder, prompts)
    rows = _random(len(prompts), vocab) if encoded is None else encoded
    # A tokenizer may know more tokens than the embedding has.
    rows = [[token for token in row if token < vocab][:TOKENS] or [0] for row in rows]
    length = max(len(row) for row in rows)
    length += length % 3 == 0
    ids = torch.tensor([row + [row[-1]] * (length - len(row)) for row in rows])
    is_real = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
    return Batch(ids, is_real, encoded is None)


def _encoded(folder: Path, prompts: Sequence[str]) -> list[list[int]] | None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return [list(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    except LoaderError:
        raise
    except Exception as err:  # tokenizers raises just that, for a file of a kind that nobody here can read
        _let_through(err)
        return None


def _let_through(err: BaseException) -> None:
    """Raise the LoaderError that an error was made of: a signal's Stopped may hit transformers' own `try`."""
    cause = err.__cause__ or err.__context__
    while cause is not None:
        if isinstance(cause, LoaderError):
            raise cause
        cause = cause.__cause__ or cause.__context__


def _random(prompts: int, vocab: int) -> list[list[int]]:
    """The same tokens every time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    found: list[list[int]] = torch.randint(vocab, (prompts, TOKENS), generator=generator).tolist()
    return found


def _not_finite(merged: Distance) -> list[str]:
    if isfinite(merged.largest) and isfinite(merged.kl):
        return []
    return ["logits are not finite"]
