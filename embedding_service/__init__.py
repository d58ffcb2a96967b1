"""The gateway: text in, vector out, computed at most once. Start at `embedder.py`.

app        HTTP in; wiring and lifetime of everything below
api        a dialect: bytes -> Ask, Answer -> bytes
embedder   key -> L1 -> flights -> fill                            (the path)
fill       L2 -> upstream -> L1 and L2, for all who wait
lru        L1, in this process          redis_cache   L2, shared by all gateways
upstream   pieces of work to HAProxy, which picks one of the replicas (`ml_base`)
catalog    which model answers, and under which fingerprint its vectors are kept
"""
