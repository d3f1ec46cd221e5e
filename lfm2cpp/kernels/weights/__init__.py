"""One module a weight type. For a block type a module says

    BLOCK, BLOCK_BYTES         elements and bytes of a block in the file
    row_group(row, g)          address of group g (W blocks of 32 columns) of the row at `row`
    dot_group(acc, w, act, n_groups, g, far)
                               acc + the products of the group at w with group g of an activation row, lane = block;
                               between its products it asks for what lies `far` bytes ahead (make_prefetches)
    prepare_rows(w, row_bytes, n_blocks, room)
                               W rows as the next two take them: w, or the address of a copy at `room`
    block_columns(rows, row_bytes, b)
                               block b (32 columns) of W rows, as eight vectors of integers (columns.py)
    N_SCALES, block_scales(rows, row_bytes, b)
                               its N_SCALES scales and minima: vectors of float32, one a row
    finish_block(tile)         finish(f, q, scales, a, tables, n_groups): f + scaled integer sums of a tile
                               (dot_tile.py); the same float operations as dot_group's
    dequantize_block(w, out)   BLOCK float32

and a scalar type (floats.py) only load(address) -> W float32 and the size of an element. mul_mat.py, mul_mat_float.py,
swiglu.py, swiglu_float.py and get_rows.py do the rest.
"""
