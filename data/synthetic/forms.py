"""Word and lay out exercises: wording, names, docstring, type hints and examples.

`tell` has a single form, the original one. `vary` draws a form per exercise, as real prompts
differ: a model trained on one form fails at other quotes or another indent. Renamed arguments break
models trained on either (LOG.md). All that a form states is computed from the task: types and
examples come from the oracle.
"""

import builtins
import functools
import keyword
import random
import re
import textwrap
from dataclasses import dataclass, replace

from data.synthetic import texts
from data.synthetic.families import Task
from data.synthetic.kinds import KINDS
from data.synthetic.worked import from_typing, type_of

POOL = 90  # inputs per signature; tests of held-out problems are chosen from them
EXAMPLE_SHARE = 0.15  # probability that a plain docstring shows a call, if one fits in ...
EXAMPLE_CHARS = 50  # ... this many characters
# Shares of the varied forms, leaning towards HumanEval's (in brackets)
MBPP_FRAC = 1 / 6
HINTS_FRAC = 1 / 3  # (0.18)
EXAMPLES_FRAC = 1 / 2  # (0.94; but a small model reads them instead of the task: LOG.md)
MORE_FRAC = 0.25  # an extra sentence
SECTIONS_FRAC = 0.07  # sections for arguments and result
TYPO_FRAC = 0.03  # one misspelt word
CALL_CHARS = 76  # longest example
ASSERTS = ["assert {call} == {result}"] * 3 + ["assert {call}=={result}"]

TEXTS = texts.sections("forms.txt")
GENERIC, VERBS, NAMED, BEFORE = (TEXTS[k].split() for k in ("generic", "verbs", "named", "before"))
ARGUMENTS, BEHIND = texts.lists(TEXTS["arguments"]), texts.lists(TEXTS["behind"])
NOUNS = texts.lists(TEXTS["nouns"], "; ")
MENDS, SYNONYMS = (
    [line.split(" => ") for line in TEXTS[k].split("\n")] for k in ("mends", "synonyms")
)
FRAMES, MBPP_FRAMES, FREE_FRAMES, HEADERS, MANNERS = (
    texts.lines(TEXTS[k]) for k in ("frames", "mbpp_frames", "free_frames", "headers", "manners")
)
MENTION = re.compile(  # a place where "the given list" can replace the name
    "".join(f"(?<!{word} )" for word in NAMED)
    + r"\$a(?=[.,;:]|$| (?:is|in|to|and|or|by|with|of|from|before|after|where|that|has|starts|ends"
    r")\b)"
)


@dataclass(frozen=True)
class Exercise:
    """A task with wording, names and layout; `$a` and `$b` are placeholders for the arguments."""

    task: Task
    name: str
    doc: str
    arguments: tuple[str, ...]
    prose: str  # the docstring before the examples, in one line: `doc`, maybe framed
    lines: tuple[str, ...] = ()  # docstring lines after the prose
    mbpp: bool = False  # docstring above the function, the prompt format of eval.mbpp
    lead: str = ""  # start of the file: blank lines, imports
    hints: tuple[str, ...] = ()  # types of arguments, then result
    comma: str = ", "
    indent: str = "    "
    quote: str = '"""'
    begin: str = ""  # between the quotes and the prose
    end: str = ""  # line break before the closing quotes
    width: int = 88  # 100 with indent and quotes
    hyphens: bool = True  # lines may break after a hyphen
    gap: str = ""  # a blank line below the docstring
    wrong: str = ""  # damaged body that replaces the task's

    def prompt(self) -> str:
        prose = fill(self.prose, self.arguments)
        if self.mbpp:
            return "\n".join(['"""', prose, *self.lines, '"""\n'])
        told = textwrap.wrap(
            prose, self.width, break_long_words=False, break_on_hyphens=self.hyphens
        )
        text = "\n".join([*told, *self.lines])
        end = self.end or "\n" * (text[-1] == self.quote[0])
        doc = (self.begin + text + end).replace("\n", "\n" + self.indent)
        doc = re.sub(r"\n[ \t]+(?=\n)", "\n", doc)
        return f"{self.lead}{self._signature()}{self.indent}{self.quote}{doc}{self.quote}\n"

    def solution(self) -> str:
        body = (self.wrong or self.task.body).replace("$f", self.name)  # recursion
        body = textwrap.indent(fill(body, self.arguments), "    ") + "\n"
        body = re.sub("^ +", lambda m: self.indent * (len(m[0]) // 4), body, flags=re.M)
        return (self._signature() if self.mbpp else self.gap) + body

    def _signature(self) -> str:
        *hints, result = self.hints or ("",) * (len(self.arguments) + 1)
        arguments = [f"{a}: {h}" if h else a for a, h in zip(self.arguments, hints)]
        result = f" -> {result}" if result else ""
        return f"def {self.name}({self.comma.join(arguments)}){result}:\n"


def fill(text: str, arguments: tuple[str, ...]) -> str:
    for placeholder, name in zip(("$a", "$b", "$c"), arguments):
        text = text.replace(placeholder, name)
    return text


@functools.cache
def pool(args: str) -> list[tuple]:
    """Return POOL inputs for these argument kinds: all edge values, then random ones."""
    rng, kinds = random.Random(args), [KINDS[kind] for kind in args.split()]
    edges = max(len(kind.edges) for kind in kinds)
    inputs = [tuple(kind.edges[i % len(kind.edges)] for kind in kinds) for i in range(edges)]
    while len(inputs) < POOL:
        for _ in range(9):  # attempts to draw a new one
            new = tuple(kind.sample(rng) for kind in kinds)
            if new not in inputs:
                break
        inputs.append(new)
    return inputs


@functools.cache
def results(task: Task) -> list:
    """Return the oracle's results for the pool."""
    return [task.oracle(*inputs) for inputs in pool(task.args)]


# ---- The plain form


def tell(task: Task, rng: random.Random) -> Exercise:
    """Make an exercise for `task`; `rng` draws wording, names, and whether to show a call."""
    name = re.sub("_+", "_", texts.choose(task.name, rng)).strip("_")
    doc = sentence(task, rng)
    arguments = tuple(rng.choice(KINDS[kind].names.split()) for kind in task.args.split())
    lines = ()
    if rng.random() < EXAMPLE_SHARE:
        inputs = rng.choice(pool(task.args))
        call, result = f">>> {name}({', '.join(map(repr, inputs))})", task.oracle(*inputs)
        dull = not all(inputs) or result in (None, "", [], {})
        if not dull and len(f"{call}\n{result!r}") <= EXAMPLE_CHARS:
            lines = ("", call, repr(result))
    return Exercise(task, name, doc, arguments, doc, lines, end="\n" * bool(lines))


def sentence(task: Task, rng: random.Random) -> str:
    """Return one of the task's wordings; MENDS simplifies those composed from tables."""
    doc = texts.choose(task.doc, rng)
    doc = doc[0].upper() + doc[1:]
    for old, new in MENDS:
        doc = re.sub(old, new, doc)
    return doc


# ---- Varied forms


def vary(task: Task, rng: random.Random, mbpp_frac: float = MBPP_FRAC) -> Exercise:
    """Make an exercise for `task` in a random form, MBPP's with probability `mbpp_frac`."""
    arguments = argument_names(task, rng)
    name = function_name(task, arguments, rng)
    types = types_of(task)
    asserts = ()
    if rng.random() < mbpp_frac:
        asserts = examples(task, name, arguments, 1, [rng.choice(ASSERTS)], rng)
    core, prose = wording(task, types, bool(asserts), rng)
    prose = fill(prose, arguments)
    for argument in arguments:  # "a list of numbers `numbers`"
        prose = re.sub(rf"\b({argument}) {argument}\b", r"\1 `\1`", prose)
    indent = rng.choices(["    ", "  ", "\t"], [84, 11, 5])[0]
    comma = "," if rng.random() < 0.06 else ", "
    told = Exercise(
        task, name, core, arguments, prose, asserts, bool(asserts), indent=indent, comma=comma
    )
    if asserts:
        return told
    lines, lead, hints = [], rng.choices(["", "\n", "\n\n"], [55, 35, 10])[0], ()
    if rng.random() < SECTIONS_FRAC:
        lines += ["", *sections(arguments, types, rng)]
    if rng.random() < EXAMPLES_FRAC:
        shown = shown_examples(task, name, arguments, rng)
        lines += [""] * (bool(shown) and rng.random() < 0.4) + shown
    if rng.random() < HINTS_FRAC:
        imports, hints = type_hints(types, rng)
        lead = imports or lead
    quote = rng.choices(['"""', "'''"], [88, 12])[0]
    text = "\n".join([prose, *lines])
    assert '"""' not in text, f"{task}: its docstring would end early"
    return replace(
        told,
        lines=tuple(lines),
        lead=lead,
        hints=hints,
        quote='"""' if quote in text else quote,
        begin=rng.choices(["", " ", "\n"], [50, 15, 35])[0],
        end="\n" if rng.random() < (0.9 if lines else 0.5) else "",
        width=rng.choice([60, 72, 76, 80, 88]),
        hyphens=False,
        gap="\n" if rng.random() < 0.08 else "",
    )


# ---- Names


@functools.cache
def taken(task: Task) -> frozenset[str]:
    """Return names that neither arguments nor the function may use."""
    return frozenset(re.findall(r"(?<![\w$])\w+", task.body)).union(dir(builtins), keyword.kwlist)


def argument_names(task: Task, rng: random.Random) -> tuple[str, ...]:
    """Choose distinct argument names that clash with no builtin and no name in the body."""
    kinds, types = task.args.split(), argument_types(task.args)
    while True:
        names = []
        for kind, type_ in zip(kinds, types):
            group = type_ if type_ in ARGUMENTS else type_.split("[")[0]
            r = rng.random()
            if r < 0.25 or group not in ARGUMENTS:
                names.append(rng.choice(KINDS[kind].names.split()))
            elif r < 0.85 or group not in BEHIND:
                names.append(rng.choice(ARGUMENTS[group]))
            else:
                names.append(f"{rng.choice(BEFORE)}_{rng.choice(BEHIND[group])}")
        if len(names) > 1 and len({*types}) == 1 and rng.random() < 0.4:
            stem = rng.choice([n for n in names if not n[-1].isdigit()] or ["value"])
            names = [f"{stem}{i}" for i in range(1, len(names) + 1)]
        elif len(names) > 1 and rng.random() < 0.15:
            names = [*rng.choice(["abc", "xyz"])][: len(names)]
        if len({*names}) == len(names) and not taken(task) & {*names}:
            return tuple(names)


def function_name(task: Task, arguments: tuple[str, ...], rng: random.Random) -> str:
    """Choose the task's name, full or shortened, in snake or camel case, or a generic name."""
    while True:
        name = re.sub("_+", "_", texts.choose(task.name, rng)).strip("_")
        words, r = name.split("_"), rng.random()
        if r < 0.22:
            name = rng.choice(GENERIC)
        elif r < 0.32:
            name = "_".join(words[:2])
        elif r < 0.42:
            name = words[0] + "".join(map(str.title, words[1:]))
        elif r < 0.46:
            name = "_".join([words[0], *map(str.title, words[1:])])
        if name not in taken(task).union(arguments):
            return name


# ---- Types


@functools.cache
def argument_types(args: str) -> tuple[str, ...]:
    return tuple(type_of(values) for values in zip(*pool(args)))


@functools.cache
def types_of(task: Task) -> tuple[str, ...]:
    """Return the argument types, then the result type."""
    return (*argument_types(task.args), type_of(results(task)))


def type_hints(types: tuple[str, ...], rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """Return the import lines and the hints, in a random style."""
    if rng.random() < 0.15:  # arguments only, or containers without element types
        bare = tuple(re.sub(r"\[.*\]", "", t) for t in types)
        types = (*types[:-1], "") if rng.random() < 0.5 else bare
    return ("", types) if rng.random() < 0.4 else from_typing(types)


def noun(type_: str, rng: random.Random) -> str:
    """Return a noun for values of the type."""
    return rng.choice(NOUNS.get(type_) or NOUNS.get(type_.split("[")[0]) or ["value"])


def a_noun(type_: str, rng: random.Random) -> str:
    word = noun(type_, rng)
    return ("an " if word[0] in "aeiou" else "a ") + word


# ---- Wording


def wording(task: Task, types, mbpp: bool, rng: random.Random) -> tuple[str, str]:
    """Return the task reworded, with `$a` for an argument; and the same framed and extended."""
    core = sentence(task, rng)
    for old, new in SYNONYMS:
        if rng.random() < 0.35 and re.search(old, core):
            core = re.sub(old, rng.choice(new.split("|")), core)
    core = other_elements(core, task, rng)
    first = core.split()[0].lower()
    frames = MBPP_FRAMES if mbpp else FRAMES
    frame = rng.choice(frames if first in VERBS else FREE_FRAMES)
    says = re.match(r"(\$a|The \w+ \$a) (is|are|has|holds|and \$b are|maps) ", core)
    if says or first == "given" or ("{does}" in frame.lower() and ". " in core):
        frame = "{Do}"
    named = "{given}" in frame
    core = mention(core, task, types, mbpp, named, rng)
    tick = "`" * (rng.random() < 0.3)
    does = re.sub(r"(^|\b(?:and then|and|then) )([\w-]+)", third_person, core)
    lower = lambda s: s if s.startswith("$") else s[0].lower() + s[1:]  # noqa: E731
    given = given_arguments(types[:-1], tick, rng)
    prose = frame.format(do=lower(core), Do=core, does=lower(does), Does=does, given=given)
    if rng.random() < (0.1 if mbpp else 0.15):
        prose = prose[:-1] if mbpp else prose.rstrip(".")
    if not mbpp and prose.endswith(".") and rng.random() < MORE_FRAC:
        prose += " " + more(task, types, rng)
    prose = lower(prose) if rng.random() < 0.05 else prose
    return core, typo(prose, rng) if rng.random() < TYPO_FRAC else prose


def given_arguments(types: tuple[str, ...], tick: str, rng: random.Random) -> str:
    """Name the arguments: "a list of integers $a and a string $b", "two strings $a and $b"."""
    names = [f"{tick}${letter}{tick}" for letter in "abc"[: len(types)]]
    if len(types) > 1 and len({*types}) == 1 and rng.random() < 0.7:
        word, of, rest = noun(types[0], rng).partition(" of ")
        many = word[:-1] + "ies" if word.endswith("y") else word.replace("matrix", "grid") + "s"
        told = [f"{['two', 'three'][len(types) - 2]} {many}{of}{rest} {names[0]}", *names[1:]]
    else:
        named = len(types) > 1 or rng.random() < 0.9
        told = [a_noun(t, rng) + f" {name}" * named for t, name in zip(types, names)]
    return " and ".join(", ".join(told).rsplit(", ", 1))


def third_person(match: re.Match) -> str:
    """Return `match` with its verb in the third person."""
    before, verb = match.groups()
    if verb.lower() not in VERBS:
        return match[0]
    ending = "es" if re.search("(s|x|z|ch|sh)$", verb) else "s"
    return before + (verb[:-1] + "ies" if re.search("[^aeiou]y$", verb) else verb + ending)


def other_elements(core: str, task: Task, rng: random.Random) -> str:
    """Replace the noun for list elements, sometimes."""
    if rng.random() < 0.35 and re.search(r"\bin \$a", core):
        if "words" in task.args.split():
            core = re.sub(r"\bword(?=s?\b)", rng.choice(["string", "element", "item"]), core)
        elif {"ints", "grid"} & {*task.args.split()}:
            new = rng.choice(["integer", "element", "value", "element"])
            core = re.sub(r"\bnumber(?=s?\b)(?! of)", new, core)
    return core


def mention(core: str, task, types, mbpp: bool, named: bool, rng: random.Random) -> str:
    """Vary how `core` refers to its argument."""
    begins = core.startswith("$a")  # "$a is a list of words" needs the name
    if len(types) == 2 and not begins and MENTION.sub("", core).count("$a") == 0:
        short, r = noun(types[0], rng).split(" of ")[0], rng.random()
        if named and r < 0.3:
            return re.sub(MENTION, f"the {short}", core)
        if r < (0.6 if mbpp else 0.2):
            first = rng.choice([f"the given {short}", f"a given {short}", f"the {short}"])
            return re.sub(MENTION, f"the {short}", re.sub(MENTION, first, core, count=1))
        if r < 0.45:
            return re.sub(MENTION, f"the {short} $a", core, count=1)
    return re.sub(r"\$[abc]", r"`\g<0>`", core) if rng.random() < 0.2 else core


def more(task: Task, types: tuple[str, ...], rng: random.Random) -> str:
    """Return an extra sentence that is true for every input of the task."""
    said = []
    if types[-1] in NOUNS:
        said.append(f"The result is {a_noun(types[-1], rng)}.")
        said.append(f"Return {a_noun(types[-1], rng)}.")
    for kind, type_, letter in zip(task.args.split(), types, "abc"):
        said.append(f"${letter} is {a_noun(type_, rng)}.")
        if KINDS[kind].low == 1:
            said.append(f"You may assume that ${letter} is positive.")
    inputs = zip(pool(task.args), results(task))
    if empty := [result for given, result in inputs if given in [("",), ([],), ({},)]]:
        short = noun(types[0], rng).split(" of ")[0]
        said.append(f"If the {short} is empty, return {empty[0]!r}.")
        said.append(f"The {short} may be empty.")
        said.append(f"For an empty {short} the answer is {empty[0]!r}.")
    said += ["Assume that the input is valid.", "The input must not be changed."]
    return rng.choice(said)


def typo(text: str, rng: random.Random) -> str:
    """Swap two letters of a word; leave quoted words and names alone."""
    places = [*re.finditer(r"(?<![\w'`\"$])[a-z]{5,}(?![\w'`\"(])", text)]
    if not places:
        return text
    i = rng.choice(places).start() + rng.randint(1, 2)
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


# ---- Examples and sections


def examples(task: Task, name: str, arguments, wanted: int, manners, rng) -> tuple[str, ...]:
    """Return up to `wanted` examples in one random manner, one or two lines each."""
    manner, kinds, found = rng.choice(manners), [KINDS[kind] for kind in task.args.split()], []
    for _ in range(12):
        known = rng.random() < 0.25  # else a fresh input
        inputs = rng.choice(pool(task.args)) if known else [kind.sample(rng) for kind in kinds]
        answer, values = task.oracle(*inputs), [*map(repr, inputs)]
        call, result = f"{name}({', '.join(values)})", repr(answer)
        dull = answer in (None, "", [], {}, 0, False) and rng.random() < 0.6
        blank = answer is None and manner.startswith(">>> {call}\\n")  # a session prints nothing
        if len(call) + len(result) > CALL_CHARS or "\\" in call + result or dull or blank:
            continue
        named = ", ".join(f"{n} = {v}" for n, v in zip(arguments, values))
        found += manner.format(call=call, result=result, named=named).split("\\n")
        wanted -= 1
        if not wanted:
            break
    return tuple(found)


def shown_examples(task: Task, name: str, arguments, rng: random.Random) -> list[str]:
    """Return the examples that end a docstring, maybe below a header."""
    lines = examples(task, name, arguments, rng.choice([1, 1, 2, 2, 3]), MANNERS, rng)
    if not lines or rng.random() < 0.5:
        return [*lines]
    inner = rng.choice(["", "", "", "  ", "    "])
    return [rng.choice(HEADERS), *(inner + line for line in lines)]


def sections(arguments: tuple[str, ...], types: tuple[str, ...], rng: random.Random) -> list[str]:
    """Document arguments and result in Google, Sphinx or NumPy style."""
    named = [*zip(arguments, types)]
    told = [a_noun(t, rng) for t in types]
    result = types[-1] or "the result"
    style = rng.choice(["google", "google", "sphinx", "numpy"])
    if style == "sphinx":
        lines = [f":param {n}: {t}" for n, t in zip(arguments, told)]
        return [*lines, f":return: {told[-1] if types[-1] else result}"]
    if style == "numpy":
        lines = [f"{n} : {t}" for n, t in named]
        return ["Parameters", "----------", *lines, "", "Returns", "-------", result]
    typed = [f"    {n} ({t}): {w}" for (n, t), w in zip(named, told)]
    plain = [f"    {n}: {w}" for n, w in zip(arguments, told)]
    return ["Args:", *rng.choice([typed, plain]), "", "Returns:", f"    {result}"]
