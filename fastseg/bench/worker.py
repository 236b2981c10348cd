"""The process of one peer: prepares a work, then computes it each time a line comes in.

``python -m fastseg.bench.worker WORK PEER DTYPE THREADS OUTPUT`` writes the result to OUTPUT
(.npy) and prints one JSON line: {"ready": true}, or {"absent": reason} or {"failed": reason} and
ends. Each line of input gives it a turn: it waits until the threads of others sleep, calls once to
warm the caches that they had, then three times or for 20 ms, and prints {"seconds": [time of each
call]}. At the end of the input comes {"rss": peak resident bytes}. What libraries print goes to
standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from .peers import exact, peers_of
from .works import find

WARM_UP = 2
REST = 0.06  # seconds; the threads of ONNX Runtime look for work for tens of milliseconds
TURN_CALLS, TURN_SECONDS = 3, 0.02


def peak_resident_bytes() -> int:
    """Of this process; 0 where the system does not say. (getrusage counts the parent's too.)"""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next(int(s.split()[1]) for s in status.splitlines() if s.startswith("VmHWM")) * 1024


def main() -> None:
    name, peer, dtype_name, threads, output = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")  # before anything may print
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    torch.set_num_threads(int(threads))
    work = find(name)
    prepare = exact if peer == "exact" else peers_of(work.group)[peer]
    try:
        with torch.inference_mode():
            call = prepare(work.module(), work.inputs(), getattr(torch, dtype_name), int(threads))
            result = call()
            np.save(output, result.to(torch.float64).numpy())
            for _ in range(0 if peer == "exact" else WARM_UP):
                call()
    except ImportError as error:
        return answer(absent=str(error))
    except Exception as error:  # a peer may fail in any way; the others go on
        return answer(failed=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    answer(ready=True)
    with torch.inference_mode():
        for _ in sys.stdin:
            time.sleep(REST)
            call()
            times: list[float] = []
            while len(times) < TURN_CALLS or sum(times) < TURN_SECONDS:
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            answer(seconds=times)
    answer(rss=peak_resident_bytes())


if __name__ == "__main__":
    main()
