"""Write short lessons in programming, prose interleaved with code that runs.

An offline stand-in for the language model that wrote phi-1's synthetic textbooks (arXiv 2306.11644,
section 2.2), and like there diversity comes from the topic and the audience. Names, numbers,
wording, layout and the sections that are told vary besides. data/synthesize.py draws from here.

The topics are in lessons/*.txt, between lines of `=`. A topic has a title and `difficulty: 1` to 3.
Then `name: a b c` lists names that `$name` stands for, and `name = expression` gives a value, over
`ints`, `words`, `number` and so on. Sections follow, each below a line `== kind`:

    why      what it is good for: prose (one of several is taken)
    code     code
    doc      a docstring for its function `$f` (optional)
    how      what the code does: prose
    calls    expressions, one a line: shown or tested with their results
    wrong    `right ==> wrong`: a piece of the code, and how it is easily got wrong (optional)
    mistake  what goes wrong easily, with `wrong` just that: prose (optional)
    deeper   for those who know more: prose (optional)
    task     an exercise, with `answer`, its code, and `checks`, expressions to test it with

In prose `<this|that>` is a choice, a line break means nothing, and `$one`, `$many`, `$measure` and
`$unit` speak of the audience's world. To add a topic, add it there.

Everything that a lesson claims is computed while it is written: its code is executed, and each
result that it shows or tests, each type, each round of a loop is what came out (worked.py).
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.synthetic import prompts, worked

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
    """One topic of lessons/."""

    title: str
    difficulty: int  # 1 to 3
    names: dict[str, tuple[str, ...]]
    values: dict[str, str]
    sections: tuple[tuple[str, str], ...]  # (kind, text), in order

    def of(self, kind: str) -> list[str]:
        return [text for k, text in self.sections if k == kind]


def read_topics(text: str) -> list[Topic]:
    """Return the topics in a text written as the head of this file says."""
    return [_topic(part) for part in re.split(r"^=====+\n", text, flags=re.MULTILINE)]


def _topic(text: str) -> Topic:
    head, *rest = re.split(r"^== (\w+)\n", text.strip("\n"), flags=re.MULTILINE)
    title, *lines = head.strip().split("\n")
    names = dict(line.split(": ") for line in lines if re.match(r"\w+: ", line))
    values = dict(line.split(" = ", 1) for line in lines if re.match(r"\w+ = ", line))
    sections = tuple((kind, body.strip("\n")) for kind, body in zip(rest[::2], rest[1::2]))
    difficulty = int(names.pop("difficulty", 1))
    chosen = {k: tuple(v.split()) for k, v in names.items()}
    return Topic(title, difficulty, chosen, values, sections)


MOST_DRAFTS = 8  # of a lesson
LESSONS = Path(__file__).with_name("lessons")
TOPICS = [
    topic
    for path in sorted(LESSONS.glob("*.txt"))
    for topic in read_topics(path.read_text(encoding="utf-8"))
]


# ---- Write a lesson


def write(topic: Topic, audience: Audience, level: str, rng: random.Random) -> str:
    """Return a lesson on `topic` as Markdown, its code in ```python fences.

    Raises whatever its code raises: a mistake in lessons/, which the tests look for.
    """
    writer = _Writer(topic, audience, level, rng)
    for _ in range(MOST_DRAFTS):
        text = writer.lesson()
        if prompts.lesson_program(text)[1] != "no prose":  # it was left out, or is in comments
            break
    return text


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
        rng = self.rng
        parts = [self.opening()]
        reminder = self.reminder() if rng.random() < 0.55 else []
        if early := rng.random() < 0.5:
            parts += reminder
        parts.append(self.prose(rng.choice(self.topic.of("why"))))
        code, calls = self.sections("code", "calls")
        self.run(code)
        wrong = self.wrong(code, calls) if rng.random() < 0.5 else []
        parts += wrong
        parts += self.explained(code, calls)
        ending = [self.tested(calls, rng.choice(TEST_WORDS))]
        if rng.random() < 0.4:
            ending.append(self.rounds(code, calls))
        if self.topic.of("mistake") and not wrong and rng.random() < 0.6:
            ending.append(rng.choice(MISTAKE_WORDS) + self.prose(self.topic.of("mistake")[0]))
        if self.topic.of("deeper") and rng.random() < (0.25 if self.level == "beginner" else 0.75):
            ending.append(self.prose(self.topic.of("deeper")[0]))
        rng.shuffle(ending)
        parts += ending
        if self.topic.of("task") and rng.random() < 0.7:
            parts += self.task()
        if not early:
            parts += reminder
        return "\n\n".join(part for part in parts if part) + "\n"

    def sections(self, code: str, calls: str) -> tuple[str, list[str]]:
        """Return the code in one section, and the calls in another."""
        lines = self.fill(self.topic.of(calls)[0]).split("\n")
        return self.fill(self.topic.of(code)[0]), [worked.plain(line) for line in lines]

    def explained(self, code: str, calls: list[str]) -> list[str]:
        """Return the code, told what it does, with some of the calls."""
        rng, how = self.rng, self.prose(self.topic.of("how")[0])
        says = " ".join(self.choose("\n".join(self.topic.of("doc"))).split())
        told = code
        if says and rng.random() < 0.5:
            told = self.documented(code, self.filled["f"], says, calls)
        some = rng.sample(range(len(calls)), min(len(calls), rng.choice([1, 2, 2, 3])))
        calls = [calls[i] for i in sorted(some)]
        way = rng.choices(["after", "before", "comment", "list"], [45, 20, 20, 15])[0]
        if way == "comment":
            parts = [rng.choice(CODE_WORDS), block(f"{worked.comment(how)}\n{told}")]
        elif way == "list":
            steps = re.split(r"(?<=[.?!])\s+(?=[A-Z`])", how)
            parts = [block(told), "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))]
        elif way == "before":
            parts = [how, rng.choice(CODE_WORDS), block(told)]
        else:
            parts = [block(told), how]
        return parts if told != code and rng.random() < 0.6 else [*parts, self.shown(calls)]

    def documented(self, code: str, name: str, says: str, calls: list[str]) -> str:
        typed = self.rng.choices(["", "new", "old"], [45, 30, 25])[0]
        calls = self.rng.sample(calls, len(calls))
        told = self.rng.choice([0, 1, 2, 2, 3])
        return worked.documented(code, name, says, calls, self.namespace, typed, told)

    def wrong(self, code: str, calls: list[str]) -> list[str]:
        """Return the code as it is easily got wrong, what comes of it, and why."""
        if not self.topic.of("wrong"):
            return []
        right, wrong = self.fill(self.topic.of("wrong")[0]).split(" ==> ")
        assert right in code, f"{self.topic.title}: no {right!r} in its code"
        broken = code.replace(right, wrong)
        found = worked.differences(code, broken, calls, self.namespace)
        if not found:
            return []
        call, got, want = self.rng.choice(found)
        verb = "raises" if re.match(r"\w+(Error|Exception|Iteration)\b", got) else "gives"
        words = self.choose(self.rng.choice(WRONG_WORDS)).format(call=call, verb=verb, got=got)
        words = words.replace("@want", f"`{want}`")
        why = self.prose(self.topic.of("mistake")[0])
        after = self.rng.choice(MENDED_WORDS)
        return [words.split("@code")[0].strip(), block(broken), words.split("@code")[1].strip(),
                why, after]  # fmt: skip

    def rounds(self, code: str, calls: list[str]) -> str:
        """Return what the variables are in each round of one of the calls, if it can be told."""
        for call in self.rng.sample(calls, len(calls)):
            if seen := worked.rounds(code, call, self.namespace):
                lines = [
                    f"{i}. " + ", ".join(f"`{k} = {v}`" for k, v in row.items())
                    for i, row in enumerate(seen, 1)
                ]
                words = self.rng.choice(ROUND_WORDS).format(call=call)
                return f"{words}\n\n" + "\n".join(lines) + f"\n\nIt returns `{self.result(call)}`."
        return ""

    def reminder(self) -> list[str]:
        """Return a function of another lesson that is no harder, as one meets it again later."""
        known = [t for t in TOPICS if t.difficulty <= self.topic.difficulty and t.of("doc")]
        known = [t for t in known if t.title != self.topic.title]
        if not known:
            return []
        other = _Writer(self.rng.choice(known), self.audience, self.level, self.rng)
        code, calls = other.sections("code", "calls")
        other.run(code)
        says = " ".join(other.choose(other.topic.of("doc")[0]).split())
        words = self.rng.choice(REMINDER_WORDS).format(title=other.topic.title)
        told = other.documented(code, other.filled["f"], says, calls)
        some = self.rng.sample(calls, min(2, len(calls)))
        return [words, block(told), other.tested(some, self.rng.choice(TEST_WORDS))]

    def opening(self) -> str:
        rng, title, who = self.rng, self.topic.title, f"$who who {LEVELS[self.level]}"
        lines = {
            f"# {title}\n\nThis lesson is for {who}.": 2,
            f"# {title}\n\n<Imagine|Suppose> that you are {who}.": 2,
            f"# {title}": 3,
            f"**{title}** (<written|meant> for {who})": 1,
            f"## {rng.randint(1, 12)}.{rng.randint(1, 9)} {title}": 2,
            f"Lesson {rng.randint(2, 140)}: {title}\n\nThe examples are about $many, as {who} "
            "<might|may> have them.": 1,
        }
        return self.choose(rng.choices([*lines], [*lines.values()])[0])

    def task(self) -> list[str]:
        """Return an exercise, its solution, and tests of it."""
        rng, asked = self.rng, self.prose(self.topic.of("task")[0])
        answer, checks = self.sections("answer", "checks")
        self.run(answer)
        name = re.search(r"`(\w+)`", asked)
        says = worked.imperative(asked)
        told = answer
        if says and name and worked.function_in(answer, name[1]) and rng.random() < 0.6:
            told = self.documented(answer, name[1], says, checks)
        if told != answer and rng.random() < 0.4:
            parts = [rng.choice(TASK_WORDS).strip() + "\n\n" + block(told)]
        else:
            parts = [rng.choice(TASK_WORDS) + asked, rng.choice(ANSWER_WORDS), block(told)]
        return [*parts, self.tested(checks, rng.choice(TEST_WORDS))]

    def shown(self, calls: list[str]) -> str:
        """Calls and their results, in one of several forms."""
        results = [(call, self.result(call)) for call in calls]
        way = self.rng.choice(["prose", "session", "comments", "quiz"])
        if way == "prose":
            told = [f"`{call}` {self.rng.choice(GIVES)} `{result}`" for call, result in results]
            return self.rng.choice(EXAMPLE_WORDS) + ", and ".join(told) + "."
        if way == "session":
            lines = "".join(f">>> {call}\n{result}\n" for call, result in results)
            return self.rng.choice(SESSION_WORDS) + f"\n\n```\n{lines}```"
        if way == "comments":
            lines = "\n".join(f"print({call})  # {self.printed(call)}" for call, _ in results)
            return self.rng.choice(SESSION_WORDS) + "\n\n" + block(lines)
        return "\n\n".join(
            f"**Question.** {self.rng.choice(QUESTION_WORDS).format(call=call)}\n\n"
            f"**Answer.** `{result}`."
            for call, result in results
        )

    def printed(self, call: str) -> str:
        return str(eval(call, self.namespace)).replace("\n", "\\n")

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
        return words + "\n\n" + block("\n".join(lines))

    def result(self, call: str) -> str:
        return repr(eval(call, self.namespace))

    def run(self, code: str) -> None:
        exec(self.fill(code), self.namespace)

    def prose(self, text: str) -> str:
        """Return `text` with its choices made, one line to each of its paragraphs."""
        paragraphs = self.choose(text).split("\n\n")
        return "\n\n".join(" ".join(p.split()) for p in paragraphs)

    def choose(self, text: str) -> str:
        while m := re.search(r"<([^<>`]*\|[^<>`]*)>", text):
            text = text[: m.start()] + self.rng.choice(m[1].split("|")) + text[m.end() :]
        return self.fill(text)

    def fill(self, text: str) -> str:
        return re.sub(r"\$(\w+)", lambda m: self.filled[m[1]], text)


def block(code: str) -> str:
    return f"```python\n{code}\n```"


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
CODE_WORDS = ["In Python:", "As code:", "Written out:", "The program:", "Here it is:"]
QUESTION_WORDS = [
    "What does `{call}` give?",
    "What is the value of `{call}`?",
    "What comes out of `{call}`? Think before you read on.",
    "Without running it: what is `{call}`?",
]
ROUND_WORDS = [
    "What happens in `{call}`? At the beginning of each round of the loop:",
    "Let us follow `{call}` round by round:",
    "To see the loop at work, here are its variables in `{call}`, at the start of every round:",
    "Step by step, `{call}` goes like this:",
]
WRONG_WORDS = [
    "Here is a <first attempt|draft|version> that is wrong:@code`{call}` {verb} `{got}`, where "
    "@want would be right.",
    "Can you find the mistake in this code?@codeIts test <fails|does not pass>: `{call}` {verb} "
    "`{got}` instead of @want.",
    "Somebody wrote:@codeTried out, `{call}` {verb} `{got}`. <We expected|Right would be> @want.",
]
MENDED_WORDS = ["Mended:", "The right way:", "Corrected, it reads:", "So let us write it anew:"]
REMINDER_WORDS = [
    "A short look back at another lesson, *{title}*:",
    "Do you remember *{title}*?",
    "To keep in practice, here is something from *{title}*:",
    "**Revision: {title}**",
]
