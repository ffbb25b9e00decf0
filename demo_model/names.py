"""Names and words that mean nothing: what must be copied cannot be learnt by heart, so few come twice."""

from __future__ import annotations

import random

_ONSETS = (
    "b br c ch d dr f fr g gr h j k kh kl kr l m n p ph pr qu r s sh sl st t th tr ts v w wh y z zh"
    " mb nd ng sz cz bl fl gl sw sk"
).split() + [""] * 6
_VOWELS = "a a a e e e i i i o o o u u y ai au ea ee ei ia ie io oa oo ou ae ue ay oe".split()
_CODAS = (
    "b ck d f g k l ll m n nn nd ng nt p r rd rn rt s sh ss st t th tz v x z rk ld lt cz".split() + [""] * 14
)
_COMMON = (
    "Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Maria Nina Oscar Paul Rosa Sam Tina"
    " Victor Will Alice Bob Carol Dan Eve Fred Gina Hans Ivan Julia Karl Lena Max Nora Olga Peter Ruth"
    " Simon Tom Ursula Mark Lucy John Mary James Linda Sarah Michael Laura Kevin Amy Daniel Susan Robert"
    " Jane Ali Omar Fatima Yuki Ken Hiro Chen Wei Lin Raj Anil Sofia Luis Pedro Carlos Ines Marta Elena"
    " Dmitri Igor Svetlana"
).split()
_SURNAMES = (
    "王李张刘陈杨黄赵周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎余潘杜戴夏钟汪田任姜范方石"
    "姚谭廖邹熊金陆郝孔白崔康毛邱秦江史顾侯邵孟龙万段雷钱汤尹黎易常武乔贺赖龚文欧司"
)
_GIVEN = (
    "伟芳娜秀英敏静丽强磊军洋勇艳杰娟涛明超兰霞平刚桂文辉力红玉建国志华海波亮鹏飞宇浩然子轩梓涵雨欣怡佳琪思远晨曦博诗婷雪梅春晓东"
    "南天宝德福永康俊哲凯琳瑶月星云山川林森若溪安宁乐可心如意小大阿古丽娅朗清婉芷晴"
)


def _gb2312_level_one() -> str:
    """The 3,755 most used Chinese characters."""
    cells = [bytes((row, cell)) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFF)]
    return "".join(cell.decode("gb2312", errors="ignore") for cell in cells)


HANZI = _gb2312_level_one()


def nonce(rng: random.Random) -> str:
    """A lower-case word that nobody knows, of one to four syllables."""
    syllables = rng.choices((1, 2, 3, 4), weights=(3, 6, 3, 1))[0]
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))
    return word if 2 <= len(word) <= 12 else nonce(rng)


def hanzi(rng: random.Random) -> str:
    return rng.choice(HANZI)


def name(rng: random.Random) -> str:
    """A name in Latin letters: mostly syllables, sometimes plain letters, a common name or two words."""
    kind = rng.random()
    if kind < 0.10:
        return rng.choice(_COMMON)
    if kind < 0.20:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))).capitalize()
    if kind < 0.25:
        return f"{nonce(rng).capitalize()} {nonce(rng).capitalize()}"
    return nonce(rng).capitalize()


def surname(rng: random.Random) -> str:
    return rng.choice(_SURNAMES) if rng.random() < 0.7 else hanzi(rng)


def given(rng: random.Random) -> str:
    letters = _GIVEN if rng.random() < 0.5 else HANZI
    return "".join(rng.choices(letters, k=rng.choice((1, 2, 2, 2))))


def chinese_name(rng: random.Random) -> str:
    """Two to four characters; half of them hold characters that no name has."""
    kind = rng.random()
    if kind < 0.15:
        return rng.choice("小老阿大") + given(rng)
    if kind < 0.25:
        return "".join(rng.choices(HANZI, k=rng.randint(2, 5)))
    if kind < 0.32:
        return surname(rng) + "".join(rng.choices(_GIVEN, k=3))
    return surname(rng) + given(rng)
