"""What engines keep in memory: pages of K and V with snapshots of the convolution state, and rows of logits.

A page holds PAGE_TOKENS tokens of every attention layer and, at its end, the state of every convolution layer after its
last token. So a sequence can go back to any page end, share full pages with others, and be copied for the price of its
last page and of its convolutions' columns. Pages are counted references; full ones are kept for later prompts and the
least recently used are evicted.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfm2cpp.errors import ContextError
from lfm2cpp.kernels.widths import KEPT_COLUMNS, KV_COLUMN_BYTES, PAGE_TOKENS, padded_head

KV_TYPES = tuple(KV_COLUMN_BYTES)
PAGE_FORMAT = 1  # of saved pages: to be raised when a kernel changes what lies where in a page
SLAB_PAGES = 16
ALIGNMENT = 64


@dataclass(frozen=True)
class KVLayer:
    """Where one attention layer's K and V lie in a page."""

    n_head_kv: int
    n_embd_head: int
    kv_type: str
    k_offset: int
    v_offset: int


@dataclass(frozen=True)
class ConvLayer:
    """One convolution layer: its columns in a sequence's state and in a page, and its transposed weight."""

    l_cache: int
    state_offset: int
    snapshot_offset: int
    weight_address: int = 0


@dataclass(frozen=True)
class PageLayout:
    """Bytes of a page, by layer. Offsets are multiples of ALIGNMENT."""

    kv: dict[int, KVLayer]
    conv: dict[int, ConvLayer]
    conv_shape: tuple[int, int, int]  # of a sequence's convolution state, float32: layers, KEPT_COLUMNS, n_embd
    d_conv: int  # columns of a layer's snapshot
    conv_offset: int  # where the snapshots start in a page
    page_bytes: int

    @classmethod
    def of(cls, hparams: Any, kv_type: str) -> PageLayout:
        """The layout for a model's hyper-parameters; kv_type is one of KV_TYPES."""
        column_bytes, offset = KV_COLUMN_BYTES[kv_type], 0
        kv: dict[int, KVLayer] = {}
        n_embd_head = hparams.n_embd_head
        for il in hparams.attention_layers:
            n_head_kv = hparams.n_head_kv[il]
            k_bytes = column_bytes * n_head_kv * n_embd_head
            v_bytes = column_bytes * n_head_kv * padded_head(n_embd_head)
            v_offset = aligned(offset + k_bytes)
            kv[il] = KVLayer(n_head_kv, n_embd_head, kv_type, offset, v_offset)
            offset = aligned(v_offset + v_bytes)
        d_conv, column_bytes = hparams.d_conv, 4 * hparams.n_embd
        assert d_conv < KEPT_COLUMNS
        state_bytes, snapshot_bytes = column_bytes * KEPT_COLUMNS, aligned(column_bytes * d_conv)
        conv = {
            il: ConvLayer(hparams.l_cache, i * state_bytes, offset + i * snapshot_bytes)
            for i, il in enumerate(hparams.conv_layers)
        }
        conv_shape, page_bytes = (len(conv), KEPT_COLUMNS, hparams.n_embd), offset + snapshot_bytes * len(conv)
        return cls(kv, conv, conv_shape, d_conv, offset, max(page_bytes, ALIGNMENT))

    def snapshots(self, page: np.ndarray) -> list[np.ndarray]:
        """The last columns that a page has of each convolution layer, oldest first: float32 (d_conv, n_embd)."""
        n_embd = self.conv_shape[2]
        at = [conv.snapshot_offset for conv in self.conv.values()]
        return [page[i : i + 4 * self.d_conv * n_embd].view(np.float32).reshape(self.d_conv, n_embd) for i in at]


def aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def zeroed(nbytes: int) -> np.ndarray:
    """Zeroed bytes at an address that is a multiple of ALIGNMENT; the system commits them when they are touched."""
    area = np.zeros(nbytes + ALIGNMENT, np.uint8)
    return area[-area.ctypes.data % ALIGNMENT :][:nbytes]


class LogitsPool:
    """float32 arrays (n_rows, n_vocab) for results. One that its user has dropped is handed out again, or part of it.

    New memory would cost a page fault every 4 KiB, with every token.
    """

    MOST_ROWS, MOST_ARRAYS = 16, 4  # that are kept

    def __init__(self, n_vocab: int) -> None:
        self._n_vocab = n_vocab
        self._kept = [np.empty((0, n_vocab), np.float32)], [0]  # arrays, addresses; changed in one go (Ctrl-C)
        (self._unused,) = map(sys.getrefcount, self._kept[0])  # differs from one Python to the next

    def take(self, n_rows: int) -> tuple[np.ndarray, int]:
        """An array that nobody else has, and its address. Its contents are undefined."""
        arrays, addresses = self._kept
        found, spare = -1, self.MOST_ROWS
        for i, references in enumerate(map(sys.getrefcount, arrays)):  # a view holds the array it is a view of
            if references == self._unused and 0 <= len(arrays[i]) - n_rows < spare:
                found, spare = i, len(arrays[i]) - n_rows
        if found >= 0:
            return arrays[found][:n_rows], addresses[found]
        array = np.empty((n_rows, self._n_vocab), np.float32)
        address = array.ctypes.data
        if n_rows <= self.MOST_ROWS:
            most = self.MOST_ARRAYS - 1
            self._kept = [array, *arrays[:most]], [address, *addresses[:most]]
        return array, address


class PagePool:
    """Pages of one size with reference counts, handed out zeroed or used; memory is committed as pages are touched.

    Whoever drops a page first forgets it and then releases it: an exception in between (Ctrl-C can strike anywhere)
    may lose a page, but never hands one out twice.
    """

    def __init__(self, page_bytes: int, max_pages: int) -> None:
        self.page_bytes, self.max_pages = page_bytes, max_pages
        self._slabs: list[np.ndarray] = []
        self._free: list[int] = []
        self._references: list[int] = []
        self.prefixes: OrderedDict[bytes, int] = OrderedDict()  # hash of a prefix -> the page that ends it
        self.abandoned: deque[Callable[[], None]] = deque()  # what releases the pages of sequences dropped unclosed

    @property
    def n_used(self) -> int:
        """Pages that somebody holds, remembered prefixes included."""
        return len(self._references) - len(self._free)

    def take(self) -> int:
        """A page with one reference. ContextError when all are in use."""
        self.collect()
        if not self._free and not self._evict():
            if len(self._references) >= self.max_pages:
                raise ContextError(
                    f"all {self.max_pages} pages of context memory are in use ({self.max_pages * PAGE_TOKENS} tokens); "
                    "close a sequence or raise the context size"
                )
            self._grow()
        page = self._free.pop()
        self._references[page] = 1
        return page

    def collect(self) -> None:
        """Take back the pages of abandoned sequences."""
        while self.abandoned:
            self.abandoned.popleft()()

    def _grow(self) -> None:
        n = min(SLAB_PAGES, self.max_pages - len(self._references))
        self._slabs.append(zeroed(n * self.page_bytes))
        first = len(self._references)
        self._references += [0] * n
        self._free += reversed(range(first, first + n))

    def _evict(self) -> bool:
        """Forget the least recently used prefix whose page nobody else holds, once the pool cannot grow."""
        if len(self._references) < self.max_pages:
            return False
        for key, page in self.prefixes.items():
            if self._references[page] == 1:
                del self.prefixes[key]
                self.release([page])
                return True
        return False

    def share(self, page: int) -> int:
        """The page, with one more reference."""
        self._references[page] += 1
        return page

    def release(self, pages: Iterable[int]) -> None:
        """Give up one reference to each of these pages."""
        for page in pages:
            self._references[page] -= 1
            assert self._references[page] >= 0, "a page was released twice"
            if self._references[page] == 0:
                self._free.append(page)

    def is_shared(self, page: int) -> bool:
        return self._references[page] > 1

    def view(self, page: int) -> np.ndarray:
        """The page's bytes."""
        slab, i = divmod(page, SLAB_PAGES)
        return self._slabs[slab][i * self.page_bytes : (i + 1) * self.page_bytes]

    def remember(self, key: bytes, page: int) -> None:
        """Keep a full page for later sequences with the same prefix."""
        if key not in self.prefixes:
            self.prefixes[key] = self.share(page)

    def forget(self, key: bytes, page: int) -> None:
        """Do not keep a page any more that only one sequence holds, and that goes back into it."""
        if self.prefixes.get(key) == page and self._references[page] == 2:
            del self.prefixes[key]
            self.release([page])

    def find(self, key: bytes) -> int | None:
        """The page that ends this prefix, with a new reference, or None."""
        page = self.prefixes.get(key)
        return None if page is None else self.share(page)

    def touch(self, keys: list[bytes]) -> None:
        """These prefixes, each the parent of the next, were used just now: the longest is to be evicted first."""
        for key in reversed(keys):
            if key in self.prefixes:
                self.prefixes.move_to_end(key)


def n_pages(n_tokens: int) -> int:
    """Pages that n_tokens need."""
    return -(-n_tokens // PAGE_TOKENS)
