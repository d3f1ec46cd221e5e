"""Speed: tests in llama-bench's terms, what the machine could do at most, and model files without a checkpoint.

    ranges.py         1,2  64-512*2  128-512+128
    measure.py        pp, tg and pp+tg tests on an engine -> samples
    batched.py        sequences that decode together, as llama-batched-bench counts them
    profile.py        time, bytes and products a kind of op, beside the machine's limits
    report.py         results as llama-bench's table, CSV, JSON and JSON lines
    limits.py         read bandwidth and multiply rates, measured
    machine.py        CPU, memory, libraries, kernel cache: what `lfm2cpp doctor` shows
    shapes.py         the shapes of the LFM2 models
    random_blocks.py  bytes of random weights in every type
    random_model.py   a GGUF file of them in such a shape, which llama.cpp loads as well
"""
