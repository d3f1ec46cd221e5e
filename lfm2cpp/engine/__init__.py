"""From a mapped GGUF and token ids to logits. Knows no text.

    model.py      the forward pass, recorded as a plan; no I/O, no state
    plan.py       records ops: kernel, arguments, buffers
    team.py       threads that replay a plan
    memory.py     all mutable state: pages of K and V, convolution states, sequences
    engine.py     batches of tokens in, logits out
    threads.py    how many threads this process should use
"""
