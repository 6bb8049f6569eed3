"""Operators of our own in ONNX files.

``edgepack::BinaryConv`` computes a convolution of ±1 weights with the signs of what it reads, exactly:

=============  =========================================================================================================
x              float (N, C, H, W), (N, C, W) or (N, C); rows are 1 where they are not there
threshold      float (C,): what reaches it counts as +1, all else as −1
weight         uint32 (groups, ⌈O / groups / 16⌉, rows · columns, ⌈C / groups / 32⌉, 16): output 16·b + l of a group is
               lane l of block b; bit i of word w is +1 of input channel 32·w + i; 0 where there is no channel or output
y              float (N, O, H′, W′) or as x: whole numbers
attributes     ``inputs`` (C), ``outputs`` (O), ``groups``, ``rows``, ``columns``, ``stride_row``, ``stride_column``,
               ``dilation_row``, ``dilation_column``, ``top``, ``left``, ``bottom``, ``right`` (padding), ``zeros`` (1:
               the padding is 0, else −1)
=============  =========================================================================================================
"""

from __future__ import annotations

DOMAIN = "edgepack"
BINARY_CONV = "BinaryConv"
