"""The processes of a run: one, or as many as mpirun started."""

import sys

from common.config import UserError
from common.files import mpi_size


class Ranks:
    """The processes of this run: one, or those that mpirun started. Values must be picklable."""

    def __init__(self):
        started = mpi_size()
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
                    f"mpirun started {started} ranks but mpi4py, built for another MPI, sees "
                    f"{self.size}; build it for this one"
                )

    def gather(self, value) -> list:
        """Return `value` of every rank, in the order of ranks, on every rank."""
        return self.comm.allgather(value) if self.comm else [value]


def say(text: str) -> None:
    """Print on the first rank alone."""
    if Ranks().rank == 0:
        print(text)
