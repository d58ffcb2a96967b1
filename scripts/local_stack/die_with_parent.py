#!/usr/bin/env python3
"""Runs COMMAND so that it gets SIGTERM when the process that started it dies, even by `kill -9`.

    die_with_parent.py PARENT_PID COMMAND [ARGUMENT ...]

A program in between, because Popen's preexec_fn may deadlock in a process with threads; what prctl sets survives
execve, so the pid is COMMAND's own. SIGTERM and not SIGKILL, so that a server ends the workers it has itself started.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":  # elsewhere only Ctrl-C and SIGTERM end the children
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent_pid:
            sys.exit(f"{command[0]}: the parent died before it started")
    os.execvp(command[0], command)  # noqa: S606 - running another program is the purpose


if __name__ == "__main__":
    main()
