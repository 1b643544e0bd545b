"""What an output came from: hashes of files, of code, and arguments as JSON has them."""

import hashlib
import inspect
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYER = [f"data/base/{n}.py" for n in ("documents", "lineage", "ranks", "readers", "stage")]


def describe(path: Path) -> dict:
    """The path, size and hash of a file, for lineage."""
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"path": str(path), "bytes": path.stat().st_size, "blake2b": digest}


def code_hash(script) -> str:
    """A hash of the source of `script`, of the project's modules it uses, and of this layer."""
    modules = [script, *map(inspect.getmodule, vars(script).values())]
    files = {Path(m.__file__).resolve() for m in modules if getattr(m, "__file__", None)}
    ours = {f for f in files if f.is_relative_to(ROOT) and f.suffix == ".py"}
    ours = {f for f in ours if "site-packages" not in f.parts}  # of a .venv inside the project
    sources = sorted(ours | {ROOT / name for name in ["common/config.py", *LAYER]})
    return hashlib.blake2b(b"".join(f.read_bytes() for f in sources), digest_size=16).hexdigest()


def files_in(path: Path) -> list[Path]:
    """`path` if it is a file, else the files under it, sorted."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def size_and_time(path: Path) -> tuple[int, int]:
    """The size and time of change of a file, zeros for a link that leads nowhere."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0
    return stat.st_size, stat.st_mtime_ns


def plain(value):
    """`value` as JSON has it."""
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
