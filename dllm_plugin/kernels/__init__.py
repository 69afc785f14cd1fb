"""The operations of a denoising step: norms, rotation, activation, attention over windows, confidence of tokens, unmasking.

Each file holds one operation: its contract, the records it takes, the wrapper that checks them, the plain rule, a path for
a CPU where the rule is too slow for one (`*_cpu`), and the launch of its Triton kernels, which `*_triton.py` holds where
they are long. Imports torch, NumPy and Triton only.
"""
