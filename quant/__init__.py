"""GGUF -> smaller GGUF, byte for byte what llama-quantize writes.

    recipe.py     which type each tensor of a file type gets
    quantize.py   the plan of a file, and the threads that carry it out
    encode.py     float32 rows -> bytes of any type, and back
    legacy.py     the encoders of 32-element blocks
    k_quants.py   the encoders of 256-element super-blocks
    vectors.py    what they are written in
    cli.py        the command
"""
