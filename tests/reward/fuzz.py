"""Seeded completions as a policy or an attacker might write them: grammar, near misses, junk, programs, megabytes."""

import random
from collections.abc import Callable, Iterator

GOLDS = ["73", "\\frac{3}{4}", "50\\%", "5 \\text{ cm}", "C", "\\text{even}", "0.125", "-1234567"]
SYMBOLIC_GOLDS = ["2\\sqrt{2}", "x^2+1", "(1, 2)", "\\{1, 2\\}", "[0, \\infty)", "x > 3", "y = 2x + 3", "2 + 3i"]
# What a symbolic verification may not survive; each costs a time limit and a worker.
BOMBS = ["10^{10^{10}}", "9^{9^{9^9}}", "(x+1)^{100000}", "100000000!", "2^{-10^9}"]
PROGRAMS = [
    "__import__('os').system('touch touched')",
    "open('touched', 'w')",
    "().__class__.__base__.__subclasses__()",
    "\\write18{touch touched}",
    "\\input{/etc/passwd}",
    "`touch touched`",
    "${IFS}touch${IFS}touched",
]
ODD = ["\x00", "\u200b", "\u202e", "\ud800", "\uff17", "\u2066", "\x1b[2J", "\ufeff", "\U0001f600", "\u0301"]
TOKENS = [
    *"0123456789+-*/^_=<>(){}[]|!.,;:% xyzabnieCRr",
    *[
        "\\frac",
        "\\sqrt",
        "\\pi",
        "\\cdot",
        "\\times",
        "\\le",
        "\\infty",
        "\\text{",
        "\\{",
        "\\}",
        "\\left(",
        "\\right)",
    ],
    *["\\sin", "\\log", "\\int", "\\sum", "\\binom", "\\pm", "\\cup", "\\in", "\\begin{pmatrix}", "\\end{pmatrix}"],
    *["\\\\", "&", "\\%", "\\$", "^\\circ", "\\boxed{", "\\ ", "\\approx", "\\overline{", "\\mathbb{R}", "\\emptyset"],
]


def number(rng: random.Random, gold: str) -> str:
    value = rng.choice([rng.randrange(10), rng.randrange(1000), rng.randrange(10**12)])
    forms = [
        f"{value}",
        f"{value:,}",
        f"-{value}",
        f"{value:03d}",
        f"{value / 8}",
        f"\\frac{{{value}}}{{7}}",
        f"{value}\\%",
    ]
    return rng.choice(
        [*forms, f"{value}!", f"2^{{{value % 40}}}", f"x = {value}", f"{value}\\text{{ cm}}", f"\\$ {value}"]
    )


def expression(rng: random.Random, gold: str, depth: int = 3) -> str:
    """Well-formed, with small powers, so that symbolic algebra stays quick."""
    if depth == 0:
        return rng.choice(["x", "y", "2", "3", "7", "\\pi", "i", "\\sqrt{2}"])
    part = [expression(rng, gold, depth - rng.randrange(1, depth + 1)) for _ in range(2)]
    return rng.choice(
        [
            f"{part[0]}+{part[1]}",
            f"{part[0]}-{part[1]}",
            f"({part[0]})({part[1]})",
            f"\\frac{{{part[0]}}}{{{part[1]}}}",
            f"\\sqrt{{{part[0]}}}",
            f"({part[0]})^2",
            f"({part[0]}, {part[1]})",
            f"\\{{{part[0]}, {part[1]}\\}}",
            f"{part[0]} < {part[1]}",
            f"y = {part[0]}",
        ]
    )


def near(rng: random.Random, gold: str) -> str:
    """The gold answer in another dress, or with one character changed."""
    at = rng.randrange(len(gold))
    changed = gold[:at] + rng.choice(["", rng.choice(TOKENS)]) + gold[at + rng.randrange(2) :]
    return rng.choice([gold, f"${gold}$", f" {gold}.", f"x = {gold}", f"\\text{{{gold}}}", changed, changed])


def tokens(rng: random.Random, gold: str) -> str:
    return "".join(rng.choices(TOKENS, k=rng.randrange(1, 24)))


def odd(rng: random.Random, gold: str) -> str:
    text = list(rng.choice([gold, number(rng, gold), tokens(rng, gold)]))
    for _ in range(rng.randrange(1, 4)):
        text.insert(rng.randrange(len(text) + 1), rng.choice(ODD))
    return "".join(text)


def deep(rng: random.Random, gold: str) -> str:
    opening, closing = rng.choice(
        [("(", ")"), ("{", "}"), ("\\sqrt{", "}"), ("\\frac{1}{", "}"), ("x^{", "}"), ("[", "]")]
    )
    depth = rng.choice([20, 100, 1000])
    return opening * depth + "x" + closing * rng.choice([depth, depth - 1])


def long(rng: random.Random, gold: str) -> str:
    return rng.choice(["9", "x", "\\frac", "5 ", "\\{", " "]) * rng.choice([600, 5_000, 100_000])


def program(rng: random.Random, gold: str) -> str:
    return rng.choice(["{}", "\\text{{{}}}", "\\mathrm{{{}}}", "x_{{{}}}", "1+{}"]).format(rng.choice(PROGRAMS))


def megabytes(rng: random.Random, gold: str) -> str:
    return tokens(rng, gold) * 40_000


def bomb(rng: random.Random, gold: str) -> str:
    return rng.choice(BOMBS)


Kind = Callable[[random.Random, str], str]
# How often each kind comes, of a thousand; with a symbolic gold answer and with a plain one.
SYMBOLIC: dict[Kind, int] = {number: 5, expression: 15, near: 10, tokens: 15, odd: 10, program: 5}
PLAIN: dict[Kind, int] = {
    number: 250,
    expression: 150,
    near: 200,
    tokens: 150,
    odd: 100,
    deep: 30,
    long: 30,
    program: 20,
    bomb: 10,
}


def completions(seed: int, count: int) -> Iterator[tuple[str, str]]:
    """(completion, gold) pairs; of each 10,000 two are megabytes long, and one is a bomb with symbolic gold."""
    rng = random.Random(seed)
    kinds = [*((kind, SYMBOLIC_GOLDS) for kind in SYMBOLIC), *((kind, GOLDS) for kind in PLAIN)]
    weights = [*SYMBOLIC.values(), *PLAIN.values()]
    for index in range(count):
        kind, golds = rng.choices(kinds, weights)[0]
        if index % 10_000 == 5_000:
            kind, golds = bomb, SYMBOLIC_GOLDS
        elif index % 5_000 == 2_500:
            kind = megabytes
        box = rng.choice(
            ["\\boxed{{{}}}"] * 6 + ["so \\boxed{{1}} no, \\boxed{{{}}}.", "\\boxed{{{}", "{}", "\\boxed {}"]
        )
        gold = rng.choice(golds)
        yield box.format(kind(rng, gold)), gold
