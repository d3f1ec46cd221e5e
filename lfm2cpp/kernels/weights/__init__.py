"""One module a weight type. For a block type a module says

    BLOCK, BLOCK_BYTES         elements and bytes of a block in the file
    PANEL_BLOCK                bytes of one unpacked block of 32 columns of PANEL_ROWS rows
    row_group(row, g)          address of group g (W blocks of 32 columns) of the row at `row`
    dot_group(acc, w, act, n_groups, g, far)
                               acc + the products of the group at w with group g of an activation row, lane = block;
                               between its products it asks for what lies `far` bytes ahead (make_prefetches)
    RAW_SCALES                 bytes of the scales of one such block as they are in the file
    copy_scales(w, row_bytes, b, raw)
                               the scales of block b (32 columns) of PANEL_ROWS rows, side by side
    unpack_block(w, row_bytes, b, raw, panel)
                               block b of PANEL_ROWS rows, interleaved for the tile, and its scales as float32
    finish_block(tile)         finish(f, panel, a, tables, n_groups): f + scaled integer sums of a tile; the same float
                               operations as dot_group's
    dequantize_block(w, out)   BLOCK float32

and a scalar type (floats.py) only load(address) -> W float32 and the size of an element. mul_mat.py, mul_mat_float.py,
swiglu.py, swiglu_float.py and get_rows.py do the rest.
"""
