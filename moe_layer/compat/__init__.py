"""Adapters for other programs, one module each: `transformers`, `megatron`, `transformer_engine`, `mojo_opset`,
`perplexity`.

Import the one you need, for example `from moe_layer.compat import transformers`. Nothing here imports the other program
before a function that needs it is called.
"""
