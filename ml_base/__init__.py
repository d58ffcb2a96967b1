"""ML-Base: the model server. Importing it loads no torch: `models.load` imports the backend that was chosen.

`wire`, `native`, `asgi` and `errors` are the contract with the gateway, which imports these four and nothing else.
A request goes  app -> models -> tokenizer thread -> batcher -> inference thread -> backend  and comes back as JSON
(a caller) or safetensors (the gateway).
"""
