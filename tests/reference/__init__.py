"""The slow, plain torch decoders that the engine must equal token for token.

`model` runs a LLaDA or Dream checkpoint, `llada` and `dream` decode one prompt at a time, `decoding` holds what they
share, and `checkpoints` writes random-weight checkpoints in the formats of the published ones. Nothing here imports the
plugin, vLLM or a transformers model, so that an error in those cannot hide in both sides of a comparison.
"""
