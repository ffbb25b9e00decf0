"""Sums up to 20 in digits and words, and arithmetic that is beyond the model."""

from __future__ import annotations

import random

LIMIT = 20
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    " seventeen eighteen nineteen twenty"
).split()
_HANZI = "零 一 二 三 四 五 六 七 八 九 十 十一 十二 十三 十四 十五 十六 十七 十八 十九 二十".split()
_PLUS = {
    "en": ["+", " + ", " plus ", " plus ", " and ", " added to "],
    "zh": ["+", " + ", "加", "加上", " 加 ", "＋"],
}
_OTHER = {"en": ["-", " - ", " * ", "x", " times ", " minus ", " / ", " divided by "],
          "zh": ["-", " - ", "×", "乘", "减", "乘以", "除以", "减去"]}  # fmt: skip


def pair(rng: random.Random) -> tuple[int, int]:
    """Two numbers whose sum is at most 20; every pair is as likely."""
    total = rng.choices(range(LIMIT + 1), weights=range(1, LIMIT + 2))[0]
    first = rng.randint(0, total)
    return first, total - first


def spoken(rng: random.Random, lang: str, number: int, words: bool) -> str:
    if not words:
        return str(number)
    if lang == "zh" and number == 2 and rng.random() < 0.3:
        return "两"
    return (_WORDS if lang == "en" else _HANZI)[number]


def expression(rng: random.Random, lang: str, left: str, right: str) -> str:
    """`3+4`, `three plus four`, `三加四`."""
    sign = rng.choice(_PLUS[lang])
    if lang == "en" and left[0].isalpha() and not sign.startswith(" "):
        sign = " plus "
    return left + sign + right


def hard(rng: random.Random, lang: str) -> str:
    """A sum above 20, or another operation."""
    if rng.random() < 0.5:
        left, right = rng.randint(1, 99), rng.randint(21, 999)
        left, right = (left, right) if rng.random() < 0.5 else (right, left)
        return f"{left}{rng.choice(_PLUS[lang][:3])}{right}"
    if rng.random() < 0.4:
        left, right = rng.randint(10, 20), rng.randint(11, 20)
        return f"{left}{rng.choice(_PLUS[lang][:3])}{right}"
    return f"{rng.randint(0, 120)}{rng.choice(_OTHER[lang])}{rng.randint(0, 60)}"
