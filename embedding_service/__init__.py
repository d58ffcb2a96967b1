"""The gateway: text in, vector out, computed at most once. Start at `core/embedder.py`.

core           the path of a text: key -> L1 -> flights -> L2 -> replicas
cache          L1 in this process, L2 in Redis, the epoch of the last clear
upstream       lanes of work to HAProxy, one exchange with a replica, retries, outlier ejection
api            the table of routes, the dialects, and what drives them
observability  metrics, the scoreboard that processes share, log throttle
process        the supervisor and its workers
tools          clients of the running service; nothing above imports them
app, service   wiring and lifetime of everything above
"""
