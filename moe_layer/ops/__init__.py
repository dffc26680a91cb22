"""One file an op: schema, PyTorch reference, fake, backward, autograd.

Importing loads no native code: `kernels.require_kernels` does, when a layer is built.
"""
