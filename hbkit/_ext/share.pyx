"""Share: several threads for one call into the core. The essay is in share.h.

The other extensions cimport `share`, so that there is one set of threads in a process. Results do not depend on how
many there are: units write to different places, and what is added up is added up within one unit.
"""

import os

from hbkit.errors import InvalidArgument

cdef extern from "share.h" nogil:
    void hb_share(Unit, void *, int64_t, int64_t)
    void hb_forked()
    int pthread_atfork(void (*)(), void (*)(), void (*)())  # which it includes
    int HB_SEATS

cdef int64_t MOST = 16     # threads, where nobody says how many
cdef int64_t LEAST = 512 << 10  # bytes a unit, some 50 us: a helper is there after up to 25, and what it reads is far
cdef int64_t FEW = 4       # units for which it is worth while to wake a thread
cdef int64_t EACH = 4      # units a thread: none waits long for another
cdef int64_t _n_threads = 1, _least = LEAST


cdef int64_t pieces(int64_t nbytes) noexcept nogil:
    """Units to cut a pass over so many bytes into: 1 where other threads would not make it faster."""
    cdef int64_t n = min(nbytes // _least, EACH * _n_threads)
    if _n_threads == 1 or n < FEW:
        return 1
    return n if n < _n_threads else n // _n_threads * _n_threads  # as many for each


cdef int64_t seats(int64_t n_units) noexcept nogil:
    """Threads that so many units are for."""
    return min(n_units, _n_threads)


cdef void share(Unit run, void *what, int64_t n_units, int64_t n_seats) noexcept nogil:
    """Run units 0..n_units-1 in n_seats threads at the most, the caller's among them.

    A thread's seat is 0..n_seats-1, the caller's 0: what it needs alone goes by that. Units run between `hb_fp_enter`
    and `hb_fp_leave`.
    """
    hb_share(run, what, n_units, n_seats)


def n_threads():
    """Threads that a call into the core may use, its own among them: int."""
    return _n_threads


def use(int64_t n, int64_t nbytes=LEAST):
    """Let later calls of this process use n threads, units being of `nbytes` bytes or more; for tests and benchmarks.

    Nothing may be at work meanwhile.
    """
    global _n_threads, _least
    _n_threads, _least = n, nbytes


def _wanted():
    """What HBKIT_THREADS or else OMP_NUM_THREADS says, else the CPUs that this process may run on."""
    given = os.environ.get("HBKIT_THREADS")
    if given:
        if not given.isdecimal() or not 1 <= int(given) <= HB_SEATS:
            raise InvalidArgument(f"HBKIT_THREADS is {given!r}", remedy=f"give a number of threads, 1 to {HB_SEATS}")
        return int(given)
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # torchrun and others speak by it
    if given.isdecimal() and int(given) > 0:
        return min(int(given), HB_SEATS)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cpus, MOST)


use(_wanted())
pthread_atfork(NULL, NULL, hb_forked)
