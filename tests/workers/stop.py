"""Counts steps until some process gets a signal."""

import time

import jax
import processes

from jaxcl import distributed

processes.join()
reason, step = None, 0
with distributed.stop_on_signal() as stopped:
    for step in range(10**6):
        if step == 5:
            print("running", flush=True)
        time.sleep(0.01 * (1 + jax.process_index()))  # the processes drift apart
        reason = stopped(step)
        if reason:
            break
processes.report({"step": step, "reason": reason})
