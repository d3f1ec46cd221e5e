"""GGUF -> smaller GGUF, byte for byte what llama-quantize writes.

    recipe.py           which type each tensor of a file type gets
    quantize.py         the plan of a file, and the threads that carry it out
    imatrix.py          whether importances fit a model, and what the file says of them
    encode.py           float32 rows -> bytes of any type, and back
    legacy.py           the encoders of 32-element blocks
    legacy_weighted.py  the same by importance
    iq4_nl.py           that of 32-element blocks whose levels are not evenly spaced
    k_quants.py         the encoders of 256-element super-blocks
    search.py           how they look for the scales with the least error
    vectors.py          what all of these are written in
    cli.py              the command
"""
