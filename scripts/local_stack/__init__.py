"""The local stack: every part of the service as a process of this machine, supervised. `scripts/up` runs it."""
