"""Triton kernels, a file or two per operation, installed as `vi_simsiam.kernels`.

They take addresses, sizes and strides and import nothing of the package that calls them. Importing
one needs Triton; a GPU is needed only to launch it. With TRITON_INTERPRET=1 set before the first
import the same code runs on CPU tensors.
"""
