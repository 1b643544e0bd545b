"""Write short programming lessons: prose interleaved with code that runs.

An offline stand-in for the language model that wrote phi-1's synthetic textbooks (arXiv 2306.11644,
section 2.2). As there, diversity comes from topic and audience; names, numbers, wording, layout and
choice of sections vary too. data/synthesize.py draws from here.

Topics are in lessons/*.txt, separated by lines of `=`; add new ones there. A topic has a title and
`difficulty: 1` to 3. `name: a b c` lists choices for `$name`. `name = expression` computes a value
from `ints`, `words`, `number` and so on; for a list `w`, `$w0` is the first item. Sections follow,
each below a line `== kind`:

    why      prose: motivation (one of several is chosen)
    code     code
    doc      docstring for its function `$f` (optional)
    how      prose: explains the code
    calls    expressions, one per line, shown or tested with their results
    wrong    `right ==> wrong`: a piece of the code and a typical error in it (optional)
    mistake  prose: a common mistake; with `wrong`, the one it shows (optional)
    deeper   prose: for advanced readers (optional)
    task     an exercise, with `answer` (code) and `checks` (expressions to test it)

In prose, `<this|that>` is a choice, single line breaks are ignored, and `$one`, `$many`, `$measure`
and `$unit` come from the audience's world.

Every claim in a lesson is computed while writing it: the code is executed, and all results, types
and loop rounds shown are its actual outcome (worked.py).
"""

import random
import re
from pathlib import Path

from data.synthetic import prompts, texts, worked

# Levels, audiences, and wordings by what they introduce
SAY = {kind: texts.lines(text) for kind, text in texts.sections("textbooks.txt").items()}
LEVELS = dict(line.split(": ") for line in SAY["levels"])
NUMBERS = SAY["numbers"][0].split()
MOST_DRAFTS = 8  # per lesson

# The reader, and the world of the examples: singular and plural of a thing, an integer measure of
# it, the unit, and words for single things
COLUMNS = ("who", "one", "many", "measure", "unit", "words")
AUDIENCES = [dict(zip(COLUMNS, line.split(" | "), strict=True)) for line in SAY["audiences"]]


class Topic:
    """One topic of lessons/; the module docstring gives the format."""

    def __init__(self, text: str):
        head, *rest = re.split(r"^== (\w+)\n", text.strip("\n"), flags=re.MULTILINE)
        self.title, *lines = head.strip().split("\n")
        names = dict(line.split(": ") for line in lines if re.match(r"\w+: ", line))
        self.difficulty = int(names.pop("difficulty", 1))
        self.names = {name: choices.split() for name, choices in names.items()}
        self.values = dict(line.split(" = ", 1) for line in lines if re.match(r"\w+ = ", line))
        self.sections = [(kind, body.strip("\n")) for kind, body in zip(rest[::2], rest[1::2])]

    def of(self, kind: str) -> list[str]:
        return [text for k, text in self.sections if k == kind]


TOPICS = [
    Topic(part)
    for path in sorted(Path(__file__).with_name("lessons").glob("*.txt"))
    for part in re.split(r"^=====+\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
]


def write(topic: Topic, audience: dict[str, str], level: str, rng: random.Random) -> str:
    """Return a lesson on `topic` as Markdown, with code in ```python fences.

    Raises whatever its code raises: an error in lessons/, which the tests look for.
    """
    writer = Writer(topic, audience, level, rng)
    for _ in range(MOST_DRAFTS):
        text = writer.lesson()
        if not prompts.lesson_program(text)[1]:  # redraw if its prose is omitted or in comments
            break
    return text


class Writer:
    """A topic with chosen names and values, and the namespace its code runs in."""

    def __init__(self, topic: Topic, audience: dict[str, str], level: str, rng: random.Random):
        self.topic, self.audience, self.level, self.rng = topic, audience, level, rng
        self.namespace, self.words = {}, audience["words"].split()
        self.filled = audience | {"ones": audience["many"], "title": topic.title.lower()}
        taken = set()
        for key, names in topic.names.items():
            self.filled[key] = rng.choice([n for n in map(self.fill, names) if n not in taken])
            taken.add(self.filled[key])
        makers = {
            "ints": lambda n, low, high: [rng.randint(low, high) for _ in range(n)],
            "distinct": lambda n, low, high: rng.sample(range(low, high + 1), n),
            "words": lambda n: rng.sample(self.words, n),
            "number": rng.randint,
            "pick": lambda *options: rng.choice(options),
            "sorted": sorted,
            "dict": dict,
            "zip": zip,
        }
        for key, expression in topic.values.items():
            expression = self.fill(expression)
            value = eval(expression, {"__builtins__": {}, **makers})
            self.filled[key] = repr(value)
            if isinstance(value, list):
                self.filled |= {f"{key}{i}": str(part) for i, part in enumerate(value)}
        code = self.fill(topic.of("code")[0])
        told = re.findall(r"^class (\w+)", code, re.M) or re.findall(r"^def (\w+)", code, re.M)
        self.name = self.filled.get("f", told[-1])  # the function or class taught

    def fill(self, text: str) -> str:
        return re.sub(r"\$(\w+)", lambda m: self.filled[m[1]], text)

    def choose(self, text: str) -> str:
        return self.fill(texts.choose(text, self.rng))

    def prose(self, text: str) -> str:
        """Make the choices in `text` and join each paragraph to one line."""
        return "\n\n".join(" ".join(p.split()) for p in self.choose(text).split("\n\n"))

    def section(self, kind: str) -> str:
        return self.prose(self.topic.of(kind)[0]) if self.topic.of(kind) else ""

    def say(self, kind: str, **words: str) -> str:
        """Return a random wording to introduce this kind of part."""
        return self.choose(self.rng.choice(SAY[kind])).format(f=self.name, **words)

    # ---- Code and its results

    def sections(self, code: str, calls: str) -> tuple[str, list[str]]:
        """Run the code section; return it and the lines of the calls section."""
        lines = self.fill(self.topic.of(calls)[0]).split("\n")
        code = self.fill(self.topic.of(code)[0])
        exec(code, self.namespace)
        return code, [worked.plain(line) for line in lines]

    def result(self, call: str) -> str:
        return repr(eval(call, self.namespace))

    def documented(self, code: str, name: str, says: str, calls: list[str]) -> str:
        typed = self.rng.choices(["", "new", "old"], [45, 30, 25])[0]
        calls = self.rng.sample(calls, len(calls))
        told = self.rng.choice([0, 1, 2, 2, 3])
        return worked.documented(code, name, says, calls, self.namespace, typed, told)

    # ---- The parts of a lesson

    def lesson(self) -> str:
        rng = self.rng
        parts = [self.prose(rng.choice(self.topic.of("why")))]
        code, calls = self.sections("code", "calls")
        wrong = self.wrong(code, calls) if rng.random() < 0.5 else []
        parts += wrong
        parts += self.explained(code, calls, bool(wrong))
        ending = [self.tested(calls)]
        if rng.random() < 0.4:
            ending.append(self.rounds(code, calls))
        if self.topic.of("mistake") and not wrong and rng.random() < 0.6:
            label = self.say("mistake") if rng.random() < 0.4 else ""
            ending.append(f"{label} {self.section('mistake')}".strip())
        if self.topic.of("deeper") and rng.random() < (0.25 if self.level == "beginner" else 0.75):
            ending.append(self.section("deeper"))
        rng.shuffle(ending)
        parts += ending
        if self.topic.of("task") and rng.random() < 0.7:
            parts += self.task()
        body = "\n\n".join(part for part in parts if part)
        return f"{self.opening(body)}\n\n{body}\n"

    def opening(self, body: str) -> str:
        """Return the heading; name the audience only if the lesson mentions its world."""
        part, lesson = self.rng.randint(1, 12), self.rng.randint(1, 9)
        heading = self.rng.choice(["# {}", "# {}", "**{}**", f"## {part}.{lesson} {{}}"])
        heading = heading.format(self.topic.title)
        world = "|".join([self.audience["one"], self.audience["many"], *self.words])
        prose = re.sub(r"^```.*?^```$", "", body, flags=re.MULTILINE | re.DOTALL)
        told, shown = (len(re.findall(rf"\b(?:{world})\b", text)) for text in (prose, body))
        if not told or shown < 3 or self.rng.random() < 0.4:
            return heading
        return f"{heading}\n\n{self.say('reader', level=LEVELS[self.level])}"

    def explained(self, code: str, calls: list[str], mended: bool) -> list[str]:
        """Return the code, its explanation, and some of the calls."""
        rng, how, told = self.rng, self.section("how"), code
        says, lead = self.section("doc"), self.say("mended") if mended else ""
        if says and rng.random() < 0.5:
            told = self.documented(code, self.filled["f"], says, calls)
        elif says and not mended:
            lead = self.say("code", says=says[0].lower() + says[1:])
        some = rng.sample(range(len(calls)), min(len(calls), rng.choice([1, 2, 2, 3])))
        calls = [calls[i] for i in sorted(some)]
        way = rng.choices(["after", "before", "comment", "list"], [45, 20, 20, 15])[0]
        if way == "comment":
            parts = [lead, block(f"{worked.comment(how)}\n{told}")]
        elif way == "list":
            steps = re.split(r"(?<=[.?!])\s+(?=[A-Z`])", how)
            parts = [lead, block(told), numbered(steps)]
        elif way == "before":
            parts = [how, lead, block(told)]
        else:
            parts = [lead, block(told), how]
        return parts if told != code and rng.random() < 0.6 else [*parts, self.shown(calls)]

    def shown(self, calls: list[str]) -> str:
        """Return calls and their results, in one of several forms."""
        results = [(call, self.result(call)) for call in calls]
        way = self.rng.choice(["prose", "session", "comments", "quiz"])
        if way == "prose":
            told = [f"`{call}` {self.say('gives')} `{result}`" for call, result in results]
            return listed(told) + "."
        if way == "quiz":
            asked, answers = ([f"`{x}`" for x in column] for column in zip(*results))
            return self.say("quiz", calls=listed(asked), results=listed(answers))
        printed = [str(eval(call, self.namespace)) for call in calls]
        if way == "comments" and all(re.fullmatch(r"\S(.*\S)?", text) for text in printed):
            return block("\n".join(f"print({c})  # {t}" for c, t in zip(calls, printed)))
        lines = "\n".join(worked.prompted(*pair) for pair in results)
        lead = f"{self.say('session')}\n\n" if f"{self.name}(" in calls[0] else ""
        return f"{lead}```\n{lines}\n```"

    def wrong(self, code: str, calls: list[str]) -> list[str]:
        """Return the code with a typical error, its effect, and the reason."""
        if not self.topic.of("wrong"):
            return []
        right, wrong = self.fill(self.topic.of("wrong")[0]).split(" ==> ")
        assert right in code, f"{self.topic.title}: no {right!r} in its code"
        broken = code.replace(right, wrong)
        found = worked.differences(broken, calls, self.namespace)
        if not found:
            return []
        call, got, want = self.rng.choice(found)
        verb = "raises" if re.match(r"\w+(Error|Exception|Iteration)\b", got) else "gives"
        words = self.say("wrong", call=call, verb=verb, got=got, want=want)
        before, after = words.split("@code")
        return [before, block(broken), f"{after} {self.section('mistake')}"]

    def rounds(self, code: str, calls: list[str]) -> str:
        """Return a table of the variables in each round of one of the calls, "" if none fits."""
        for call in self.rng.sample(calls, len(calls)):
            if seen := worked.rounds(code, call, self.namespace):
                words = {"call": call, "n": NUMBERS[len(seen)], "result": self.result(call)}
                return f"{self.say('round', **words)}\n\n```\n{worked.table(seen)}\n```"
        return ""

    def task(self) -> list[str]:
        """Return an exercise, its solution and tests."""
        asked = self.section("task")
        answer, checks = self.sections("answer", "checks")
        name, told = re.search(r"`(\w+)`", asked)[1], answer
        says = worked.imperative(asked)
        if says and worked.function_in(answer, name) and self.rng.random() < 0.6:
            told = self.documented(answer, name, says, checks)
        if told != answer and self.rng.random() < 0.4:
            said = self.say("task", name=name)
        else:
            means = worked.means(answer, name)
            said = f"{asked}\n\n{self.say('answer', name=name, means=means)}"
        if self.rng.random() < 0.5:
            return [said, block(f"{told}\n\n\n{self.asserts(checks)}")]
        return [said, block(told), self.tested(checks, name)]

    def tested(self, calls: list[str], name: str = "") -> str:
        """Return asserts of the results of `calls`, usually with an introduction."""
        name = name or self.name
        if self.rng.random() < 0.4:
            return block(self.asserts(calls))
        edge = next(filter(None, (worked.edge(call, name) for call in calls)), "")
        words = {"name": name, "n": NUMBERS[len(calls)], "edge": edge}
        said = self.say("test_edge" if edge else "test", **words)
        return f"{said}\n\n{block(self.asserts(calls))}"

    def asserts(self, calls: list[str]) -> str:
        return "\n".join(prompts.asserted(call, self.result(call)) for call in calls)


def block(code: str) -> str:
    return f"```python\n{code}\n```"


def numbered(lines: list[str]) -> str:
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))


def listed(parts: list[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last
