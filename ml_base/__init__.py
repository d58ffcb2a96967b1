"""ML-Base: the model server. Importing this package, or any module but `models` and `backends`, loads no torch.

`wire`, `native`, `asgi` and `errors` are the contract with the gateway, which imports these four and nothing else.
A request goes  app -> batcher -> models -> backend  and comes back as JSON (a caller) or safetensors (the gateway).
"""
