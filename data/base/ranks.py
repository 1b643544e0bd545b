"""The processes of a run: one, or as many as mpirun started; what they tell each other."""

import os
import sys
from typing import TypeVar

import numpy as np

from common.config import UserError

T = TypeVar("T")


class Ranks:
    """The processes of this run: one, or those that mpirun started. Values must be picklable."""

    def __init__(self):
        started = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1)
        self.comm, self.rank, self.size = None, 0, 1
        if started > 1:
            if "mpi4py.run" not in sys.modules:
                raise UserError(
                    f"started {started} times by mpirun; write `mpirun -n {started} python -m "
                    "mpi4py -m data.SCRIPT ...`, so that an error on one rank ends them all"
                )
            from mpi4py import MPI

            self.comm = MPI.COMM_WORLD
            self.rank, self.size = self.comm.rank, self.comm.size
            if self.size != started:
                raise UserError(
                    f"mpirun started {started} ranks but mpi4py sees {self.size}: it was built "
                    "for another MPI than this mpirun"
                )

    def gather(self, value) -> list:
        """Return `value` of every rank, in the order of ranks, on every rank."""
        return self.comm.allgather(value) if self.comm else [value]

    def gather_items(self, values: dict[int, T]) -> list[T]:
        """Return the values of items 0, 1, ..., each of which one rank brings, on every rank."""
        joined = {i: value for of_rank in self.gather(values) for i, value in of_rank.items()}
        return [joined[i] for i in range(len(joined))]

    def exchange(self, values: list) -> list:
        """Send values[r] to rank r; return what the ranks sent here, in their order."""
        return self.comm.alltoall(values) if self.comm else values

    def first_seen(self, keys: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Mark the keys that are the first of their kind, over all ranks' items in their order.

        `keys[item]` is uint64 [n, 2], of items that no other rank has; the answer bool [n]. A key
        is judged by the rank that its value names, so that memory is shared among the ranks: about
        60 bytes a key.
        """
        items = sorted(keys)
        flat = np.concatenate([np.zeros((0, 2), np.uint64), *(keys[i] for i in items)])
        counts = [len(keys[i]) for i in items]
        position = np.concatenate([np.arange(0), *(np.arange(n) for n in counts)])
        place = np.stack([np.repeat(np.array(items, np.int64), counts), position])  # [2, n]
        judge = flat[:, 0] % np.uint64(self.size)
        mine = [np.flatnonzero(judge == r) for r in range(self.size)]
        asked = self.exchange([(flat[of], place[:, of]) for of in mine])
        theirs, where = np.concatenate([a[0] for a in asked]), np.hstack([a[1] for a in asked])
        order = np.lexsort((where[1], where[0], theirs[:, 1], theirs[:, 0]))
        first = np.ones(len(theirs), bool)
        first[order[1:]] = (theirs[order[1:]] != theirs[order[:-1]]).any(1)
        answers = self.exchange(np.split(first, np.cumsum([len(a[0]) for a in asked])[:-1]))
        flags = np.empty(len(flat), bool)
        for of, answer in zip(mine, answers):
            flags[of] = answer
        return dict(zip(items, np.split(flags, np.cumsum(counts)[:-1])))


def digest_key(sha256: str) -> tuple[int, int]:
    """Return the first 128 bits of a hash in hex, as `first_seen` wants them."""
    return int(sha256[:16], 16), int(sha256[16:32], 16)


def say(text: str) -> None:
    """Print on the first rank alone."""
    if Ranks().rank == 0:
        print(text)
