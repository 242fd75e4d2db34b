"""The operations in Triton, one idea a file. Importing a file here imports Triton, which a command never does at its
start: `backends/triton.py` imports each at its first use.

Arithmetic is in fp32; what a formula rounds in between is rounded here, too. Kernels that promise the definition's bits
are compiled with ``enable_fp_fusion=False``, because a multiplication and an addition made into one round once.
No annotations from the future here: Triton reads ``tl.constexpr`` as an object.
"""
