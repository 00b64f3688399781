"""The host device's threads among other processes."""
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from programs import own_buffers

from metalstep.kernels import params

BURSTS = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
while True:
    end = time.perf_counter() + 0.002
    while time.perf_counter() < end: pass
    time.sleep(0.002)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are pinned on Linux only")
def test_a_caller_beside_busy_processes_keeps_its_affinity_and_results(by_threads):
    """Threads that are preempted are moved to other processors, the caller among them, and come back."""
    before = os.sched_getaffinity(0)
    busy = [subprocess.Popen([sys.executable, "-c", BURSTS, str(cpu)]) for cpu in sorted(before)[:2]]
    try:
        for h in by_threads.values():
            with own_buffers(h):
                words = 4096
                stage, region = np.arange(words, dtype=np.int32), h.put(np.zeros(words, np.int32))
                sampled = h.put(np.zeros(1, params.record("MSSampled")).view(np.uint8))
                [first] = h.step_load_launches(h.put(stage), sampled, region, words=words, tokens_first=0, max_tokens=0)
                back = h.put(np.zeros(words, np.int32))
                [then] = h.step_load_launches(region, sampled, back, words=words, tokens_first=0, max_tokens=0)
                plan = h.device.create_plan([replace(launch, barrier=True) for launch in (first, then)] * 100, 1, 1)
                for number in range(20):
                    h.device.numpy(back, np.int32, (words,))[:] = number
                    plan.wait(plan.run(20))
                    assert os.sched_getaffinity(0) == before
                    assert (h.get(back, np.int32) == stage).all()
                plan.close()
    finally:
        for process in busy:
            process.kill()
            process.wait()
