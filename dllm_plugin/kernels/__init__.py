"""The operations of a denoising step: norms, rotation, activation, attention over windows, confidence of tokens, unmasking.

Each file holds one operation: its contract, a torch reference, a Triton kernel and the wrapper that picks one of the two.
Imports torch, NumPy and Triton only.
"""
