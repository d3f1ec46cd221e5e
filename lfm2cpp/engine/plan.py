"""Record the ops of a forward pass once; replay them for every batch.

A method records one op and returns the rows it writes, so that a model file reads like the paper. Fusions, buffers and
quantized copies of activations are decided here. A recorded op is a kernel and int64 arguments: addresses in the mapped
file, in the arena, in the batch descriptor.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field

import numpy as np

from lfm2cpp.ggml import GGMLType
from lfm2cpp.kernels import batch as at
from lfm2cpp.kernels import widths
from lfm2cpp.kernels.library import Kernel, Progress, float_bits, library
from lfm2cpp.kernels.team_layout import OP_ARGS, OP_FIELDS, OP_KERNEL, OP_SYNC, OP_WORK

from .memory import ConvLayer, KVLayer, zeroed

SLACK_ROWS = 16  # a tile may read (never use) this many rows beyond the last
assert SLACK_ROWS >= widths.TILE_TOKENS
SPLIT_TOKENS = 16  # batches up to this size split attention over the context
FLOAT_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
KERNELS = "lfm2cpp.kernels."


@dataclass(frozen=True)
class Weight:
    """A tensor in the mapped file: its address, NumPy shape, type and bytes a row."""

    name: str
    address: int
    shape: tuple[int, ...]
    ggml_type: GGMLType
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return self.row_bytes * (self.shape[0] if len(self.shape) > 1 else 1)


@dataclass
class Op:
    """One recorded op. `macs` and `nbytes` are what one token costs, for the profile."""

    kernel: str
    label: str
    args: dict[str, int]
    sync: bool = True
    macs: int = 0
    nbytes: int = 0


@dataclass
class Rows:
    """Rows of n 4-byte columns that an op writes, float32 but for `rounded`, whose columns are two BF16 each.

    Quantized, chained and rounded copies exist once a product has asked for them. Results of one role and width share
    their memory (Plan._rows), as their quantized copies do: no two of them may be needed at once.
    """

    n: int
    address: int
    count: int  # address of the number of rows
    producer: Op | None = None
    act: int = 0
    chained: int = 0
    rounded: Rows | None = None
    squares: np.ndarray | None = None


@dataclass
class CompiledPlan:
    """A plan ready for a team: the op table and everything it points into."""

    ops: list[Op]
    ops_address: int
    out: np.ndarray  # (1,) int64: the address that the last op writes its rows to
    keep_alive: list[object] = field(repr=False)


class Arena:
    """Zeroed memory that is committed when first touched; addresses stay valid as long as the arena lives."""

    def __init__(self) -> None:
        self._areas: list[np.ndarray] = []

    def take(self, nbytes: int) -> int:
        self._areas.append(zeroed(nbytes))
        return self._areas[-1].ctypes.data


class Plan:
    """Records ops for batches of up to n_batch tokens.

    With `trace`, every named intermediate keeps its own rows. With `sum_squares`, the squares of what the layers'
    matrices are multiplied with are added up, token after token: squares, float32 (n,) by the weight's name.
    """

    def __init__(
        self, n_batch: int, n_threads: int, n_ctx: int, *, trace: bool = False, sum_squares: bool = False
    ) -> None:
        self.n_batch, self.n_threads, self.n_ctx = n_batch, n_threads, n_ctx
        self.trace, self.sum_squares = trace, sum_squares
        self.squares: dict[str, np.ndarray] = {}
        self.ops: list[Op] = []
        self.arena = Arena()
        self.named: dict[str, Rows] = {}
        self._shared: dict[tuple[str, int], int] = {}
        self._scratch_bytes = 64 * 1024
        self.batch = np.zeros(at.FIELDS, np.int64)
        self.batch_address = self.batch.ctypes.data
        self.all_rows = self.batch_address + 8 * at.N_TOKENS
        self.out_rows = self.batch_address + 8 * at.N_OUT

    # Buffers

    def _rows(self, role: str, name: str, n: int, count: int | None = None, n_rows: int | None = None) -> Rows:
        """Rows of n for an op's result: shared by all ops of the same role, or its own when tracing.

        A product's role is its name before the "-".
        """
        key = (name if self.trace else role, n)
        if key not in self._shared:
            self._shared[key] = self.arena.take(4 * n * ((n_rows or self.n_batch) + SLACK_ROWS) + 4096)
        rows = Rows(n, self._shared[key], count or self.all_rows)
        self.named[name] = rows
        return rows

    def _side_buffer(self, role: str, nbytes: int) -> int:
        key = (role, nbytes)
        if key not in self._shared:
            self._shared[key] = self.arena.take(nbytes)
        return self._shared[key]

    def scratch(self, nbytes: int) -> None:
        """Make sure that a thread has this much scratch memory."""
        self._scratch_bytes = max(self._scratch_bytes, nbytes)

    def view(self, rows: Rows) -> np.ndarray:
        """The rows' memory as an array (n_batch, n)."""
        return self._float32(rows.address, self.n_batch, rows.n)

    def int32_view(self, address: int) -> np.ndarray:
        """n_batch int32 at an address that this plan gave out."""
        return self._array(address, np.dtype(np.int32), (self.n_batch,))

    def _float32(self, address: int, *shape: int) -> np.ndarray:
        return self._array(address, np.dtype(np.float32), shape)

    def _array(self, address: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        nbytes = dtype.itemsize * math.prod(shape)
        return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype).reshape(shape)

    # Recording

    def _record(self, kernel: str, label: str, args: dict[str, int], **cost: int) -> Op:
        op = Op(KERNELS + kernel, label, args, **cost)  # type: ignore[arg-type]
        self.ops.append(op)
        return op

    def _read(self, x: Rows) -> int:
        """Address of x's rows, for an op that reads them. A producer that writes them on demand only does so now."""
        for name in ("out", "hidden"):
            if x.producer is not None and x.producer.args.get(name) == 0:
                x.producer.args[name] = x.address
        return x.address

    def _quantized(self, x: Rows) -> int:
        """Address of x as int8 rows; its producer writes them along if it can, else an op of their own does."""
        if not x.act:
            result = x.producer.args if x.producer is not None else {}
            is_hidden = "hidden_act" in result  # the op reads quantized rows, too, maybe of the same width
            # By width: padding must stay zero.
            x.act = self._side_buffer(f"{'hidden ' * is_hidden}act {x.n}", self._act_nbytes(x.n))
            if is_hidden:
                result["hidden_act"] = x.act
            elif "act" in result:
                result["act"] = x.act
            else:
                args = {"x": self._read(x), "n": x.n, "act": x.act, "count": x.count}
                self._record("ops:quantize_rows", "quantize", args)
        return x.act

    def _act_nbytes(self, n: int) -> int:
        return widths.activation_nbytes(n) * (self.n_batch + SLACK_ROWS) + 4096

    def _chained(self, x: Rows) -> int:
        """Address of x chained; its producer writes that instead of its rows if it can, else an op of its own does."""
        if not x.chained:
            result = x.producer.args if x.producer is not None else {}
            is_hidden = "hidden_chained" in result
            runs = -(-x.n // widths.PANEL_ROWS)
            nbytes = 4 * runs * widths.PANEL_ROWS * (self.n_batch + SLACK_ROWS) + 4096
            x.chained = self._side_buffer(f"{'hidden ' * is_hidden}chained {x.n}", nbytes)
            if is_hidden:
                result["hidden_chained"] = x.chained
            else:
                args = {"x": self._read(x), "n": x.n, "chained": x.chained, "count": x.count}
                self._record("mul_mat_float:chain_rows", "chain", args)
        return x.chained

    def _rounded(self, x: Rows) -> Rows:
        """x in BF16, two elements a column."""
        if x.rounded is None:
            nbytes = 2 * x.n * (self.n_batch + SLACK_ROWS) + 4096
            x.rounded = Rows(x.n // 2, self._side_buffer(f"rounded {x.n}", nbytes), x.count)
            args = {"x": self._read(x), "n": x.n, "pairs": x.rounded.address, "count": x.count}
            self._record("mul_mat_float:round_rows", "round", args)
        return x.rounded

    def get_rows(self, w: Weight, name: str) -> Rows:
        """The embedding rows of the batch's tokens: (n_tokens, n_embd)."""
        n = w.shape[1]
        out = self._rows("x", name, n)
        args = {"w": w.address, "row_bytes": w.row_bytes, "n": n, "tokens": self.batch_address + 8 * at.TOKENS,
                "out": out.address, "count": out.count}  # fmt: skip
        self._record(f"get_rows:get_rows_{kernel_type(w.ggml_type)}", "get_rows", args, nbytes=w.row_bytes)
        return out

    def rms_norm(self, x: Rows, weight: Weight, eps: float, name: str, *, wanted_only: bool = False) -> Rows:
        """weight * x / rms(x); with wanted_only, of the rows whose logits are asked for.

        Where all that follows are products with block weights, only the quantized rows are written.
        """
        self.scratch(widths.QUANTIZE_NBYTES + 4 * x.n)
        out = self._rows("norm", name, x.n, self.out_rows if wanted_only else None)
        args = {"x": self._read(x), "weight": weight.address, "eps": float_bits(eps), "n": x.n,
                "out": out.address if self.trace else 0, "act": 0, "rows": 0, "count": out.count}  # fmt: skip
        if wanted_only:
            args["rows"] = self._side_buffer("out_rows", 4 * (self.n_batch + SLACK_ROWS))
            self.batch[at.OUT_ROWS] = args["rows"]
        out.producer = self._record("ops:rms_norm", "rms_norm", args)
        return out

    def mul_mat(self, w: Weight, x: Rows, name: str, *, sync: bool = True) -> Rows:
        """x w^T: (n_rows, n) by (n_tokens, n) -> (n_tokens, n_rows). sync=False: the next op does not need it."""
        out = self._rows(name.rsplit("-", 1)[0], name, w.shape[0], x.count)
        self._mul_mat(w, x, out, 0).sync = sync
        return out

    def mul_mat_add(self, w: Weight, x: Rows, residual: Rows, name: str, sum_name: str) -> Rows:
        """residual + x w^T. The sum takes the residual's place, unless both are traced."""
        if self.trace:
            return self.add(residual, self.mul_mat(w, x, name), sum_name)
        out = Rows(residual.n, residual.address, residual.count)
        self._mul_mat(w, x, out, self._read(residual))
        return out

    def _mul_mat(self, w: Weight, x: Rows, out: Rows, add: int) -> Op:
        n_rows, n = w.shape
        if self.sum_squares and x.count == self.all_rows:
            self.squares[w.name] = self._squares(x)
        module, kind, operand = self._operand(w, x)
        args = {"w": w.address, "n_rows": n_rows, "out": out.address, "add": add, "count": x.count} | operand
        label = f"mul_mat {w.ggml_type.name}"
        return self._record(f"mul_mat{module}:mul_mat_{kind}", label, args, macs=n_rows * n, nbytes=w.nbytes)

    def _squares(self, x: Rows) -> np.ndarray:
        """Sums of x's squares, (n,), to which every batch adds its own."""
        if x.squares is None:
            x.squares = self._float32(self.arena.take(4 * x.n), x.n)
            args = {"x": self._read(x), "n": x.n, "sums": x.squares.ctypes.data, "count": x.count}
            self._record("ops:add_squares", "add_squares", args)
        return x.squares

    def _operand(self, w: Weight, x: Rows) -> tuple[str, str, dict[str, int]]:
        """How w is multiplied by x: the end of the module's name and of the kernel's, and what the kernel is given."""
        n = w.shape[1]
        kind = kernel_type(w.ggml_type)
        self.scratch(widths.panel_nbytes(n) + 64 * 1024)
        if w.ggml_type not in FLOAT_TYPES:
            return "", kind, {"n": n, "act": self._quantized(x), "row_bytes": w.row_bytes}
        if widths.BF16_PAIRS and kind == "bf16" and n % 32 == 0 and x.count == self.all_rows:
            # The head, of few rows, is left exact: it costs nothing there.
            kind, x = "bf16_pairs", self._rounded(x)
        return "_float", kind, {"n": x.n, "x": self._read(x), "chained": self._chained(x)}

    def add(self, a: Rows, b: Rows, name: str) -> Rows:
        """a + b."""
        out = self._rows("sum", name, a.n)
        args = {"a": self._read(a), "b": self._read(b), "n": a.n, "out": out.address, "count": a.count}
        self._record("ops:add", "add", args)
        return out

    def swiglu_ffn(self, gate: Weight, up: Weight, x: Rows, il: int) -> Rows:
        """silu(gate x) * (up x), in one op where both matrices have the same type."""
        n_rows, n = gate.shape
        is_float = gate.ggml_type in FLOAT_TYPES
        # The float kernel takes whole panels, and leaves nothing else to the product that follows, which has n rows.
        is_whole = not is_float or n_rows % widths.PANEL_ROWS == n % widths.PANEL_ROWS == 0
        # Gate and up are products of their own where each of their inputs or results is looked at.
        if self.trace or self.sum_squares or gate.ggml_type != up.ggml_type or not is_whole:
            g = self.mul_mat(gate, x, f"ffn_gate-{il}", sync=False)
            return self.swiglu(g, self.mul_mat(up, x, f"ffn_up-{il}"), f"ffn_swiglu-{il}")
        out = self._rows("swiglu", f"ffn_swiglu-{il}", n_rows, x.count)
        module, kind, operand = self._operand(gate, x)
        quantizes = not is_float and widths.PANEL_ROWS == 32  # a panel's rows are a block of the product that follows
        args = {"gate": gate.address, "up": up.address, "n_rows": n_rows, "hidden": 0 if quantizes else out.address,
                "count": x.count}  # fmt: skip
        args |= operand | {"hidden_chained" if is_float else "hidden_act": 0}
        label = f"swiglu {gate.ggml_type.name}"
        cost = {"macs": 2 * n_rows * n, "nbytes": 2 * gate.nbytes}
        op = self._record(f"swiglu{module}:swiglu_{kind}", label, args, **cost)
        if is_float or quantizes:
            out.producer = op
        return out

    def swiglu(self, gate: Rows, up: Rows, name: str) -> Rows:
        """silu(gate) * up."""
        out = self._rows("swiglu", name, gate.n)
        args = {"gate": self._read(gate), "up": self._read(up), "n": gate.n, "out": out.address, "act": 0,
                "count": gate.count}  # fmt: skip
        out.producer = self._record("ops:swiglu", "swiglu", args)
        return out

    def shortconv(self, bcx: Rows, conv: ConvLayer, il: int) -> Rows:
        """C * conv(B * X) with the sequences' states; bcx: (n_tokens, 3 n_embd)."""
        n = bcx.n // 3
        out = self._rows("mixed", f"conv_out_gated-{il}", n)
        args = {"bcx": self._read(bcx), "n": n, "weight": conv.weight_address, "l_cache": conv.l_cache,
                "state_offset": conv.state_offset, "snapshot_offset": conv.snapshot_offset, "bx": 0, "conv": 0,
                "out": out.address, "act": 0, "batch": self.batch_address}  # fmt: skip
        if self.trace:
            args["bx"] = self._rows("bx", f"bx-{il}", n).address
            args["conv"] = self._rows("conv", f"conv-{il}", n).address
        out.producer = self._record("shortconv:shortconv", "shortconv", args)
        return out

    def norm_rope(self, x: Rows, weight: Weight, eps: float, n_head: int, table: int, name: str) -> Rows:
        """rope(weight * x / rms(x)) per head."""
        kind, il = name.split("_rope")
        normed = self._rows(f"{kind}_norm", f"{kind}_norm{il}", x.n)
        out = self._rows(f"{kind}_rope", name, x.n)
        args = {"x": self._read(x), "weight": weight.address, "eps": float_bits(eps), "n_head": n_head,
                "n_embd_head": x.n // n_head, "table": table, "normed": normed.address, "out": out.address,
                "batch": self.batch_address}  # fmt: skip
        # Heads are dealt to threads as store_kv deals them: only the last op before attention needs a barrier.
        self._record("rope:norm_rope", "rope", args).sync = False
        return out

    def attention(self, q: Rows, k: Rows, v: Rows, kv: KVLayer, il: int) -> Rows:
        """Store k and v, then softmax(q k^T / sqrt(n_embd_head)) v over each sequence's context."""
        n_head = q.n // kv.n_embd_head
        n_padded = widths.padded_head(kv.n_embd_head)
        shape = {"n_head_kv": kv.n_head_kv, "n_embd_head": kv.n_embd_head, "n_padded": n_padded,
                 "k_offset": kv.k_offset, "v_offset": kv.v_offset, "batch": self.batch_address}  # fmt: skip
        self._record(f"rope:store_kv_{kv.kv_type}", "store_kv", {"k": self._read(k), "v": self._read(v)} | shape)
        out = self._rows("mixed", f"attn-{il}", q.n)
        n_gqa, n_chunks = n_head // kv.n_head_kv, -(-self.n_ctx // widths.CHUNK_TOKENS)
        parts_nbytes = widths.parts_nbytes(SPLIT_TOKENS, kv.n_head_kv, n_gqa, n_padded, n_chunks)
        parts = self._side_buffer("parts", parts_nbytes)
        self.scratch(widths.attention_nbytes(n_padded, n_gqa))
        args = {"q": self._read(q), "n_head": n_head, "scale": float_bits(kv.n_embd_head**-0.5), "parts": parts,
                "out": out.address, "act": 0}  # fmt: skip
        whole = self._record(f"attention:attention_{kv.kv_type}", "attention", args | shape)
        merge = {"parts": parts, "n_head": n_head, "n_head_kv": kv.n_head_kv, "n_embd_head": kv.n_embd_head,
                 "n_padded": n_padded, "out": out.address, "act": 0, "batch": self.batch_address}  # fmt: skip
        merged = self._record("attention:merge_parts", "attention", merge)
        if kv.n_embd_head % 32 == 0:
            # Heads are whole blocks: whichever of the two finishes a row also quantizes it.
            out.act = self._side_buffer(f"act {out.n}", self._act_nbytes(out.n))
            whole.args["act"] = merged.args["act"] = out.act
        return out

    def finish(self, progress: Progress | None = None) -> CompiledPlan:
        """Load the kernels and lay out the op table."""
        scratch_bytes = -(-self._scratch_bytes // 4096) * 4096
        scratch = self.arena.take(scratch_bytes * self.n_threads)
        kernels = library().load([op.kernel for op in self.ops], progress)
        table = np.zeros((len(self.ops), OP_FIELDS), np.int64)
        counters = np.zeros((len(self.ops) + 1, 8), np.int64)
        keep: list[object] = [table, counters, self.arena, self.batch]
        for i, op in enumerate(self.ops):
            kernel: Kernel = kernels[op.kernel]
            values = op.args | {"scratch": scratch, "scratch_bytes": scratch_bytes}
            row = np.array([values[name] for name in kernel.params], np.int64)
            keep.append(row)
            table[i, OP_KERNEL], table[i, OP_ARGS] = kernel.address, row.ctypes.data
            table[i, OP_WORK], table[i, OP_SYNC] = counters[i].ctypes.data, int(op.sync)
        out_at = kernel.params.index("out")
        return CompiledPlan(self.ops, table.ctypes.data, row[out_at : out_at + 1], keep)


def kernel_type(ggml_type: GGMLType) -> str:
    """A type as kernels spell it: q4_0, q6_K, bf16."""
    name = ggml_type.name
    return name[:-1].lower() + name[-1] if name.endswith("_K") else name.lower()
