"""Writes short lessons in programming, prose interleaved with code that runs.

An offline stand-in for the language model that wrote phi-1's synthetic textbooks (arXiv 2306.11644,
section 2.2), and like there diversity comes from the topic and the audience. Names, numbers,
wording, layout and the sections that are told vary besides. data/synthesize.py draws from here.

The topics are in lessons.txt, between lines of `=`. A topic has a title; then `name: a b c` lists
names that `$name` stands for, and `name = expression` gives a value, over `ints`, `words`, `number`
and so on. Sections follow, each below a line `== kind`:

    why      what it is good for: prose (one of several is taken)
    code     code
    how      what the code does: prose
    calls    expressions, one a line: shown or tested with their results
    mistake  what goes wrong easily: prose (optional)
    deeper   for those who know more: prose (optional)
    task     an exercise, with `answer`, its code, and `checks`, expressions to test it with

In prose `<this|that>` is a choice, a line break means nothing, and `$one`, `$many`, `$measure` and
`$unit` speak of the audience's world. To add a topic, add it there.

Everything that a lesson claims is computed while it is written: its code is executed, and each
result that it shows or tests is what came out.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LEVELS = {
    "beginner": "has just begun to program",
    "practised": "has written a few small programs",
    "newcomer": "knows another language and is new to Python",
}


@dataclass(frozen=True)
class Audience:
    """Who reads, and the world that their examples come from."""

    who: str
    one: str
    many: str
    measure: str  # of one of them, a whole number
    unit: str
    words: tuple[str, ...]  # what single ones are called


AUDIENCES = [
    Audience(*columns[:5], tuple(columns[5].split()))
    for line in """
a gardener | plant | plants | height | cm | rose fern mint basil tulip ivy lily sage thyme
a librarian | book | books | length | pages | atlas novel diary comic poem almanac guide essay
a cook | dish | dishes | time | minutes | soup stew salad curry pasta rice pie risotto
a bird watcher | bird | birds | weight | grams | robin wren owl heron finch swift tern crow
a runner | run | runs | distance | km | hill track forest river park beach city lake
a shopkeeper | item | items | price | cents | apple bread milk soap pen candle rope cup
a teacher of mathematics | pupil | pupils | mark | points | ada ben cleo dan eva finn gita hugo
a nurse | patient | patients | pulse | beats | ana bo carl dora emil fay gus hana
a musician | song | songs | duration | seconds | waltz blues tango march polka hymn reel jig
a sailor | harbour | harbours | depth | metres | north south east west inner outer old new
a carpenter | board | boards | length | mm | oak pine ash elm birch cedar maple teak
a bus driver | stop | stops | delay | seconds | market school museum station bridge square mill park
a beekeeper | hive | hives | honey | grams | amber clover linden meadow orchard heath willow acacia
a chess player | game | games | rating | points | open closed sharp quiet long short drawn lost
a photographer | picture | pictures | size | kB | dawn dusk street portrait forest harbour snow
a baker | loaf | loaves | weight | grams | rye wheat spelt oat corn barley seed plain
a weather observer | day | days | rainfall | mm | monday tuesday wednesday thursday friday saturday
a physics student | trial | trials | time | ms | alpha beta gamma delta epsilon zeta eta theta
a football coach | player | players | goals | goals | kim lee max noa oli pia rob sam
a tailor | coat | coats | length | cm | red blue green black white grey brown navy
a farmer | field | fields | harvest | kg | barn brook hill mill lower upper far near
a museum guide | painting | paintings | age | years | storm bridge cat harvest king queen mask river
a cyclist | trip | trips | climb | metres | pass valley coast ridge canal dam tower loop
a postman | parcel | parcels | weight | grams | box tube bag crate roll case pack tin
""".strip().splitlines()
    for columns in [[c.strip() for c in line.split("|")]]
]


@dataclass(frozen=True)
class Topic:
    """One topic of lessons.txt."""

    title: str
    names: dict[str, tuple[str, ...]]
    values: dict[str, str]
    sections: tuple[tuple[str, str], ...]  # (kind, text), in order

    def of(self, kind: str) -> list[str]:
        return [text for k, text in self.sections if k == kind]


def read_topics(text: str) -> list[Topic]:
    """The topics in a text that is written as the head of this file says."""
    return [_topic(part) for part in re.split(r"^=====+\n", text, flags=re.MULTILINE)]


def _topic(text: str) -> Topic:
    head, *rest = re.split(r"^== (\w+)\n", text.strip("\n"), flags=re.MULTILINE)
    title, *lines = head.strip().split("\n")
    names = dict(line.split(": ") for line in lines if re.match(r"\w+: ", line))
    values = dict(line.split(" = ", 1) for line in lines if re.match(r"\w+ = ", line))
    sections = tuple((kind, body.strip("\n")) for kind, body in zip(rest[::2], rest[1::2]))
    return Topic(title, {k: tuple(v.split()) for k, v in names.items()}, values, sections)


TOPICS = read_topics(Path(__file__).with_name("lessons.txt").read_text(encoding="utf-8"))


# ---- Write a lesson


def write(topic: Topic, audience: Audience, level: str, rng: random.Random) -> str:
    """A lesson on `topic` as Markdown, its code in ```python fences.

    Raises whatever its code raises: a mistake in lessons.txt, which the tests look for.
    """
    return _Writer(topic, audience, level, rng).lesson()


class _Writer:
    def __init__(self, topic: Topic, audience: Audience, level: str, rng: random.Random):
        self.topic, self.audience, self.level, self.rng = topic, audience, level, rng
        self.namespace: dict = {}
        self.filled = {
            name: getattr(audience, name) for name in ("who", "one", "many", "measure", "unit")
        }
        self.filled |= {"ones": audience.many, "title": topic.title.lower()}
        taken: set[str] = set()
        for key, names in topic.names.items():
            name = rng.choice([n for n in (self.fill(n) for n in names) if n not in taken])
            taken.add(name)
            self.filled[key] = name
        makers: dict[str, Callable] = {
            "ints": lambda n, low, high: [rng.randint(low, high) for _ in range(n)],
            "distinct": lambda n, low, high: rng.sample(range(low, high + 1), n),
            "words": lambda n: rng.sample(audience.words, n),
            "number": rng.randint,
            "pick": lambda *options: rng.choice(options),
            "sorted": sorted,
            "dict": dict,
            "zip": zip,
        }
        for key, expression in topic.values.items():
            expression = self.fill(expression)
            self.filled[key] = repr(eval(expression, {"__builtins__": {}, **makers}))

    def lesson(self) -> str:
        rng, topic = self.rng, self.topic
        parts = [self.opening(), self.prose(rng.choice(topic.of("why")))]
        explained = [self.code(topic.of("code")[0]), self.prose(topic.of("how")[0])]
        if rng.random() < 0.3:
            explained.reverse()
            explained[1:1] = [rng.choice(["In Python:", "As code:", "Written out:"])]
        parts += explained
        calls = self.fill(topic.of("calls")[0]).split("\n")
        self.run(topic.of("code")[0])
        shown = rng.sample(calls, min(len(calls), rng.choice([1, 2, 2, 3])))
        parts.append(self.shown([c for c in calls if c in shown]))
        ending = [self.tested(calls, rng.choice(TEST_WORDS))]
        if topic.of("mistake") and rng.random() < 0.75:
            ending.append(rng.choice(MISTAKE_WORDS) + self.prose(topic.of("mistake")[0]))
        if topic.of("deeper") and (self.level != "beginner" or rng.random() < 0.3):
            ending.append(self.prose(topic.of("deeper")[0]))
        rng.shuffle(ending)
        parts += ending
        if topic.of("task") and rng.random() < 0.8:
            parts += self.task()
        return "\n\n".join(parts) + "\n"

    def opening(self) -> str:
        rng, title, who = self.rng, self.topic.title, f"$who who {LEVELS[self.level]}"
        lines = {
            f"# {title}\n\nThis lesson is for {who}.": 2,
            f"# {title}\n\n<Imagine|Suppose> that you are {who}.": 2,
            f"# {title}": 2,
            f"**{title}** (<written|meant> for {who})": 1,
            f"Lesson {rng.randint(2, 40)}: {title}\n\nThe examples are about $many, as {who} "
            "<might|may> have them.": 1,
        }
        return self.choose(rng.choices([*lines], [*lines.values()])[0])

    def task(self) -> list[str]:
        """An exercise, its solution, and tests of it."""
        topic, rng = self.topic, self.rng
        parts = [rng.choice(TASK_WORDS) + self.prose(topic.of("task")[0])]
        parts.append(rng.choice(ANSWER_WORDS))
        parts.append(self.code(topic.of("answer")[0]))
        self.run(topic.of("answer")[0])
        checks = self.fill(topic.of("checks")[0]).split("\n")
        parts.append(self.tested(checks, rng.choice(TEST_WORDS)))
        return parts

    def shown(self, calls: list[str]) -> str:
        """Calls and their results, as prose or as in an interactive session."""
        results = [(call, self.result(call)) for call in calls]
        if self.rng.random() < 0.5:
            told = [f"`{call}` {self.rng.choice(GIVES)} `{result}`" for call, result in results]
            return self.rng.choice(EXAMPLE_WORDS) + ", and ".join(told) + "."
        lines = "".join(f">>> {call}\n{result}\n" for call, result in results)
        return self.rng.choice(SESSION_WORDS) + f"\n\n```\n{lines}```"

    def tested(self, calls: list[str], words: str) -> str:
        """Asserts of the results of `calls`."""
        lines = []
        for call in calls:
            result = self.result(call)
            if result in ("True", "False"):
                lines.append(f"assert {call}" if result == "True" else f"assert not {call}")
            elif result == "None":
                lines.append(f"assert {call} is None")
            else:
                lines.append(f"assert {call} == {result}")
        return words + "\n\n" + self.block("\n".join(lines))

    def result(self, call: str) -> str:
        return repr(eval(call, self.namespace))

    def run(self, code: str) -> None:
        exec(self.fill(code), self.namespace)

    def code(self, text: str) -> str:
        return self.block(self.fill(text))

    def block(self, code: str) -> str:
        return f"```python\n{code}\n```"

    def prose(self, text: str) -> str:
        """`text` with its choices made, one line to each of its paragraphs."""
        paragraphs = self.choose(text).split("\n\n")
        return "\n\n".join(" ".join(p.split()) for p in paragraphs)

    def choose(self, text: str) -> str:
        while m := re.search(r"<([^<>`]*\|[^<>`]*)>", text):
            text = text[: m.start()] + self.rng.choice(m[1].split("|")) + text[m.end() :]
        return self.fill(text)

    def fill(self, text: str) -> str:
        return re.sub(r"\$(\w+)", lambda m: self.filled[m[1]], text)


GIVES = ["gives", "is", "returns", "comes out as"]
EXAMPLE_WORDS = ["For example, ", "So ", "Try it: ", "To see it at work: "]
SESSION_WORDS = ["In an interactive session:", "Tried out:", "A few calls show it:"]
TEST_WORDS = [
    "A test says the same in a way that the machine can check:",
    "Each of these lines fails loudly if we are wrong:",
    "Let us check it:",
    "Write the tests down, so that a later change cannot break it unseen:",
    "These assertions hold:",
]
MISTAKE_WORDS = ["A common mistake: ", "Take care. ", "What goes wrong easily: ", "Beware: "]
TASK_WORDS = ["**Exercise.** ", "Now you. ", "To practise: ", "**Your turn.** "]
ANSWER_WORDS = ["One solution:", "A possible answer:", "This does it:", "Solution:"]
