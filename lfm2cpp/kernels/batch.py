"""The batch descriptor: what changes from one replay of a plan to the next. Field numbers only, no Numba.

The descriptor is an array of int64. A *run* is the stretch of a batch that belongs to one sequence; its record is
RUN_FIELDS int64.
"""

from __future__ import annotations

N_TOKENS = 0
N_OUT = 1  # rows of which logits are wanted
N_RUNS = 2
TOKENS = 3  # address of int32 a token: its id
POSITIONS = 4  # address of int32 a token: its position in its sequence
RUN_OF = 5  # address of int32 a token: its run
OUT_ROWS = 6  # address of int32 a wanted row: its token's index in the batch
RUNS = 7  # address of the run records
SPLIT_CHUNKS = 8  # attention: chunks of context a token is split into, 0 for one unit a group of tokens
FIELDS = 16

RUN_FIRST = 0  # index of its first token in the batch
RUN_TOKENS = 1
RUN_PAST = 2  # tokens of the sequence before this batch
RUN_PAGES = 3  # address of the sequence's page addresses, int64 each
RUN_CONV = 4  # address of its convolution state: [conv layer][KEPT_COLUMNS][n_embd] float32
RUN_FIELDS = 8
