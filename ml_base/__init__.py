"""ML-Base: the model server. Importing it loads no torch: `models.loading` imports the backend that was chosen.

A request passes  app -> models -> tokenizer thread -> batcher -> inference thread -> backend  and its vectors come back
as JSON, or as safetensors if the caller is a gateway. What gateway and model server have in common is in
`embedding_common`; neither imports the other.
"""
