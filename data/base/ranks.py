"""Ranks of a data script: one process, or those started by mpirun."""

import sys

from common.config import UserError
from common.files import mpi_size


class Ranks:
    """One process, or the MPI ranks started by mpirun. Values must be picklable."""

    def __init__(self):
        started = mpi_size()
        self.comm, self.rank, self.size = None, 0, 1
        if started > 1:
            if "mpi4py.run" not in sys.modules:
                raise UserError(
                    f"mpirun started {started} ranks; run `mpirun -n {started} python -m "
                    "mpi4py -m data.SCRIPT ...`, so that an error on one rank ends them all"
                )
            from mpi4py import MPI

            self.comm = MPI.COMM_WORLD
            self.rank, self.size = self.comm.rank, self.comm.size
            if self.size != started:
                raise UserError(
                    f"mpirun started {started} ranks but mpi4py sees {self.size}: it was built for "
                    "another MPI; rebuild it for this one"
                )

    def gather(self, value) -> list:
        """Return every rank's `value`, in rank order, on every rank."""
        return self.comm.allgather(value) if self.comm else [value]


def say(text: str) -> None:
    """Print on rank 0 only."""
    if Ranks().rank == 0:
        print(text)
