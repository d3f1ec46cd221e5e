"""Native kernels, written in Python over a SIMD vocabulary and compiled by Numba once per machine.

    library.py    load kernels by name: from the cache of object files, else through compiler.py
    compiler.py   the only place that imports Numba to compile, and the only compile flags
    level.py      which instruction set: chosen once, overridable with LFM2CPP_SIMD
    simd/         the vocabulary: vectors as values, the same words at every level
    scalar.py     loads, stores and atomics on addresses
    weights/      one file a weight type: row -> float32, block dot products, blocks side by side for a tile
    ops           mul_mat.py, attention.py, shortconv.py, ...: one op each, reading as its algorithm; ops.py the small
                  ones. The products of several tokens are in few_tokens.py and panel.py, over the tiles of dot_tile.py,
                  whose products are those of dot.py or dot_matrix.py

Kernels check nothing: whoever records a plan has validated every address and size.
"""
