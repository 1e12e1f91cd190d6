"""A process that rewards answers: JSON lines in, JSON lines out; `pool` starts it and ends it.

It lives in a process of its own, started afresh, so that nothing an answer makes the verifier do can hang, crash or
exhaust the training. JSON, since what comes back from it is not trusted either.

  in   {"place", "options", "memory", "seconds"}, then {"gold", "answer"} per answer
  out  {"ready"} or {"failed"}, then {"reward"} or {"event"} per answer
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcl.rl import verify

LARGEST = 3.4e38  # of a float32; NaN and what is beyond are no rewards
_GRACE = 2  # seconds beyond the time that the pool gives an answer


def main() -> None:
    """Serves until the input ends."""
    # The verifier may print and read: what it writes must not be taken for an answer.
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    setup = json.loads(requests.readline())
    try:
        function = verify.function(setup["place"])
        if setup["place"] == f"{verify.__name__}:math":
            function("1", "\\boxed{1}")  # loads the package, or says that it is missing
    except verify.UserError as error:
        _say(replies, {"failed": str(error)})
        return
    _limit(setup["memory"])
    _say(replies, {"ready": True})
    for line in requests:
        # If the training process dies, nobody ends a verifier that hangs: the kernel does.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(setup["seconds"]) + _GRACE)
        reply = rewarded(function, json.loads(line), setup["options"])
        signal.alarm(0)
        _say(replies, reply)


def rewarded(function: verify.Reward, request: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the reward of one answer, or the event that it was: "memory", "error" or "value".

    Args:
      function: of the verifier.
      request: "gold" and "answer".
      options: of the function.
    """
    try:
        reward = function(request["gold"], request["answer"], **options)
        reward = float(reward)
    except MemoryError:
        return {"event": "memory"}
    except (Exception, SystemExit) as error:
        return {"event": "error", "message": " ".join(f"{type(error).__name__}: {error}"[:200].split())}
    return {"reward": reward} if abs(reward) <= LARGEST else {"event": "value", "message": f"reward {reward}"}


def _say(replies: Any, reply: Mapping[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _limit(memory: int) -> None:
    """Limits the address space to `memory` bytes more than is used now; systems that cannot go without."""
    with contextlib.suppress(OSError, ValueError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
