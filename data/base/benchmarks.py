"""Read benchmark problems: HumanEval, MBPP, and files in HumanEval's format."""

import ast
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError
from common.files import read_jsonl
from data.base.ast_match import Function, functions
from data.base.syntax import parse_python

FIELDS = ("task_id", "prompt", "canonical_solution", "entry_point", "test")  # HumanEval's format
# Optional fields: text shown to the model before the prompt, code to run before the candidate,
# harder tests, wrong solutions, and the generator.
MORE_FIELDS = ("context", "setup", "plus_test", "mutants", "family", "task")
MBPP_FIELDS = {"task_id", "text", "code", "test_list", "test_setup_code", "challenge_test_list"}
SANITIZED_FIELDS = {"task_id", "prompt", "code", "test_list", "test_imports", "source_file"}


def read_problems(path: Path) -> list[dict]:
    """Read a file in HumanEval's format. Raises UserError, see check_problems."""
    return check_problems(path, list(read_jsonl(path)))


def check_problems(path: Path, problems: list[dict]) -> list[dict]:
    """Return the problems. Raises UserError if there are none, a field is missing or unknown, or a
    task_id repeats."""
    for number, problem in enumerate(problems, 1):
        if missing := [f for f in FIELDS if not isinstance(problem.get(f), str)]:
            raise UserError(f"{path} problem {number}: no {missing[0]!r} string; want {FIELDS}")
        check_fields(f"{path} problem {number}", problem, {*FIELDS, *MORE_FIELDS})
    if not problems:
        raise UserError(f"{path}: no problems in it")
    task_id, count = Counter(p["task_id"] for p in problems).most_common(1)[0]
    if count > 1:
        raise UserError(f"{path}: {count} problems have the task_id {task_id!r}")
    return problems


def check_fields(where: str, row: dict, known: set[str]) -> None:
    """Raise UserError for a field not in `known`: it may hold a harder benchmark's tests."""
    if unknown := sorted(row.keys() - known):
        raise UserError(
            f"{where}: unknown field {unknown[0]!r}; ignoring it could score another benchmark. "
            "Delete the field if it does not affect the score"
        )


def read_rows(path: Path) -> list[dict]:
    """Read the rows of a .json or .jsonl file unchanged. Raises UserError."""
    if path.suffix != ".json":
        return list(read_jsonl(path))
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read benchmark {path}: {e}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: want a list of JSON objects")
    return rows


@dataclass(frozen=True)
class Mbpp:
    """A row of mbpp.jsonl or sanitized-mbpp.json, with `\\n` line ends."""

    id: int
    text: str  # the task
    code: str  # the reference solution
    tests: list[str]  # assert statements
    imports: str = ""  # also run before the candidate
    setup: str = ""  # statements to run before the tests
    plus: str = ""  # MBPP+'s tests, "" elsewhere

    @classmethod
    def of(cls, row: dict) -> "Mbpp":
        sanitized = "prompt" in row
        text = row["prompt" if sanitized else "text"].replace("\r\n", "\n")
        code = row["code"].replace("\r\n", "\n")
        tests = [test.replace("\r\n", "\n").strip() for test in row["test_list"]]
        imports = "\n".join(row["test_imports"]) if sanitized else ""
        setup = "" if sanitized else row["test_setup_code"].replace("\r\n", "\n")
        return cls(int(row["task_id"]), text, code, tests, imports, setup, row.get("test", ""))

    @property
    def entry_point(self) -> str:
        """Return the function under test: the last one in `code` that the first test calls."""
        called = {n.id for n in ast.walk(parse_python(self.tests[0])) if isinstance(n, ast.Name)}
        defined = [getattr(n, "name", "") for n in parse_python(self.code).body]
        return [name for name in defined if name in called][-1]


def read_mbpp(path: Path) -> tuple[str, list[Mbpp]]:
    """Return the name, "MBPP", "MBPP sanitized" or "MBPP+" (EvalPlus's file in MBPP's format), and
    the rows. Raises UserError."""
    rows = read_rows(path)
    found = convert(path, "MBPP", Mbpp.of, rows)
    sanitized, plus = (any(field in row for row in rows) for field in ("prompt", "test"))
    known = SANITIZED_FIELDS | {"test"} if sanitized else MBPP_FIELDS
    for number, row in enumerate(rows, 1):
        check_fields(f"{path} problem {number}", row, known)
    name = "MBPP+" if plus else "MBPP sanitized" if sanitized else "MBPP"
    return name, found


@dataclass(frozen=True)
class Reference:
    """A benchmark problem that training data must not resemble."""

    task_id: str
    docstring: str
    function: Function  # the solution; its text includes the docstring


def read_references(path: Path) -> list[Reference]:
    """Read a file in HumanEval's format, mbpp.jsonl or sanitized-mbpp.json. Raises UserError."""
    return convert(path, "HumanEval's format or MBPP", reference, read_rows(path))


def convert(path: Path, wanted: str, make: Callable, rows: list[dict]) -> list:
    try:
        return [make(row) for row in rows]
    except (LookupError, TypeError, ValueError, SyntaxError, AttributeError) as e:
        raise UserError(f"{path}: not {wanted}: {e!r}") from None


def reference(row: dict) -> Reference:
    if "entry_point" not in row:
        mbpp = Mbpp.of(row)
        f = [f for f in functions(mbpp.code) if f.name == mbpp.entry_point][-1]
        text = f'"""{mbpp.text}"""\n{f.text}'
        return Reference(f"MBPP/{mbpp.id}", mbpp.text, Function(f.name, f.nodes, [text]))
    source = row["prompt"] + row["canonical_solution"]
    function = [f for f in functions(source) if f.name == row["entry_point"]][-1]
    # Not ast.get_docstring: one HumanEval docstring follows an import.
    body = parse_python(function.text).body[0].body
    texts = [n.value for n in body if isinstance(n, ast.Expr)]
    docstring = next((t.value for t in texts if isinstance(t, ast.Constant)), "")
    return Reference(row["task_id"], str(docstring), function)
