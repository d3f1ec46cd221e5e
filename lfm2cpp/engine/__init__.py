"""From a mapped GGUF and token ids to logits. Knows no text.

    load.py       the file's tensors as the weights of model.py; the RoPE table
    model.py      the forward pass, recorded as a plan; no I/O, no state
    plan.py       records ops: kernel, arguments, buffers
    team.py       threads that replay a plan
    memory.py     pages of K and V with snapshots of the convolution state, rows of logits
    state.py      what one sequence holds: tokens, pages, the state of its convolutions
    sequence.py   a sequence as its user sees it
    state_file.py a sequence in a file
    engine.py     batches of tokens in, logits out
    batching.py   what a batch has to do: entries, steps, slices of ops
    limits.py     how much context and memory an engine may use
"""
