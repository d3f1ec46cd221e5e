"""All mutable state: pages of K and V with snapshots of the convolution state, and the sequences that own them.

A page holds PAGE_TOKENS tokens of every attention layer and, at its end, the state of every convolution layer after its
last token. So a sequence can go back to any page end, share full pages with others, and be copied for the price of its
last page. Pages are counted references; full ones are kept for later prompts and the least recently used are evicted.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfm2cpp.errors import ContextError
from lfm2cpp.kernels.widths import PAGE_TOKENS, padded_head

KV_BYTES = {"f16": 2, "f32": 4}
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
    conv_offset: int  # where the snapshot starts in a page
    conv_bytes: int  # of a sequence's convolution state
    page_bytes: int

    @classmethod
    def of(cls, hparams: Any, kv_type: str) -> PageLayout:
        """The layout for a model's hyper-parameters; kv_type is one of KV_BYTES."""
        size, offset = KV_BYTES[kv_type], 0
        kv: dict[int, KVLayer] = {}
        n_embd_head = hparams.n_embd_head
        for il in hparams.attention_layers:
            n_head_kv = hparams.n_head_kv[il]
            k_bytes = size * n_head_kv * n_embd_head * PAGE_TOKENS
            v_bytes = size * n_head_kv * padded_head(n_embd_head) * PAGE_TOKENS
            v_offset = aligned(offset + k_bytes)
            kv[il] = KVLayer(n_head_kv, n_embd_head, kv_type, offset, v_offset)
            offset = aligned(v_offset + v_bytes)
        layer_bytes = aligned(4 * hparams.d_conv * hparams.n_embd)
        conv = {
            il: ConvLayer(hparams.l_cache, i * layer_bytes, offset + i * layer_bytes)
            for i, il in enumerate(hparams.conv_layers)
        }
        conv_bytes = layer_bytes * len(conv)
        return cls(kv, conv, offset, conv_bytes, max(aligned(offset + conv_bytes), ALIGNMENT))


def aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def zeroed(nbytes: int) -> np.ndarray:
    """Zeroed bytes at an address that is a multiple of ALIGNMENT; the system commits them when they are touched."""
    area = np.zeros(nbytes + ALIGNMENT, np.uint8)
    return area[-area.ctypes.data % ALIGNMENT :][:nbytes]


class PagePool:
    """Pages of one size with reference counts, handed out zeroed or used; memory is committed as pages are touched."""

    def __init__(self, page_bytes: int, max_pages: int) -> None:
        self.page_bytes, self.max_pages = page_bytes, max_pages
        self._slabs: list[np.ndarray] = []
        self._free: list[int] = []
        self._references: list[int] = []
        self.prefixes: OrderedDict[bytes, int] = OrderedDict()  # hash of a prefix -> the page that ends it

    def take(self) -> int:
        """A page with one reference. ContextError when all are in use."""
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
                self.release(page)
                return True
        return False

    def share(self, page: int) -> int:
        self._references[page] += 1
        return page

    def release(self, page: int) -> None:
        self._references[page] -= 1
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

    def find(self, key: bytes) -> int | None:
        """The page that ends this prefix, with a new reference, or None."""
        page = self.prefixes.get(key)
        if page is None:
            return None
        self.prefixes.move_to_end(key)
        return self.share(page)


def prefix_key(parent: bytes, token_ids: list[int]) -> bytes:
    """The hash of a prefix that ends with these PAGE_TOKENS tokens and begins as `parent` says."""
    return hashlib.blake2b(parent + np.asarray(token_ids, np.int32).tobytes(), digest_size=16).digest()


class SequenceState:
    """The memory of one sequence: its tokens, its pages, its convolution state after n_past tokens.

    `tokens` may be longer than n_past: after a roll-back those between are evaluated again with the next batch.
    """

    def __init__(self, pool: PagePool, layout: PageLayout) -> None:
        self.pool, self.layout = pool, layout
        self.tokens: list[int] = []
        self.n_past = 0
        self.pages: list[int] = []
        self.keys: list[bytes] = []  # prefix hashes of the full pages
        self.addresses = np.zeros(16, np.int64)
        self.conv = zeroed(layout.conv_bytes)

    def _set_page(self, i: int, page: int) -> None:
        if i == len(self.pages):
            self.pages.append(page)
        else:
            self.pages[i] = page
        if i >= len(self.addresses):
            self.addresses = np.concatenate([self.addresses, np.zeros(len(self.addresses), np.int64)])
        self.addresses[i] = self.pool.view(page).ctypes.data

    def reserve(self, n_tokens: int) -> None:
        """Own every page that positions n_past .. n_past + n_tokens - 1 are written to."""
        for i in range(self.n_past // PAGE_TOKENS, -(-(self.n_past + n_tokens) // PAGE_TOKENS)):
            if i < len(self.pages) and not self.pool.is_shared(self.pages[i]):
                continue
            fresh = self.pool.take()
            if i < len(self.pages):
                self.pool.view(fresh)[:] = self.pool.view(self.pages[i])
                self.pool.release(self.pages[i])
            self._set_page(i, fresh)

    def advance(self, n_tokens: int) -> None:
        """n_tokens have been evaluated: pages that became full are remembered."""
        self.n_past += n_tokens
        for i in range(len(self.keys), self.n_past // PAGE_TOKENS):
            parent = self.keys[-1] if self.keys else b""
            key = prefix_key(parent, self.tokens[i * PAGE_TOKENS : (i + 1) * PAGE_TOKENS])
            self.keys.append(key)
            self.pool.remember(key, self.pages[i])

    def adopt_prefix(self, token_ids: list[int]) -> int:
        """For an empty sequence: take over remembered pages that begin these tokens; returns how many tokens."""
        parent = b""
        for i in range((len(token_ids) - 1) // PAGE_TOKENS):
            part = list(token_ids[i * PAGE_TOKENS : (i + 1) * PAGE_TOKENS])
            parent = prefix_key(parent, part)
            page = self.pool.find(parent)
            if page is None:
                break
            self._set_page(i, page)
            self.keys.append(parent)
            self.tokens += part
            self.n_past += PAGE_TOKENS
        self._restore_conv()
        return self.n_past

    def truncate(self, n: int) -> None:
        """Keep the first n tokens: go back to the last page end and leave the rest to be evaluated again."""
        del self.tokens[n:]
        if n >= self.n_past:
            return
        whole = n // PAGE_TOKENS
        self.n_past = whole * PAGE_TOKENS
        for page in self.pages[whole:]:
            self.pool.release(page)
        del self.pages[whole:], self.keys[whole:]
        self._restore_conv()

    def _restore_conv(self) -> None:
        """The convolution state at n_past, a page end."""
        if self.n_past == 0:
            self.conv[:] = 0
        else:
            page = self.pool.view(self.pages[self.n_past // PAGE_TOKENS - 1])
            self.conv[:] = page[self.layout.conv_offset :][: self.layout.conv_bytes]

    def fork(self) -> SequenceState:
        """A copy that shares every page; whoever writes to a shared page first copies it."""
        other = SequenceState(self.pool, self.layout)
        other.tokens, other.n_past, other.keys = list(self.tokens), self.n_past, list(self.keys)
        for i, page in enumerate(self.pages):
            other._set_page(i, self.pool.share(page))
        other.conv[:] = self.conv
        return other

    def release(self) -> None:
        for page in self.pages:
            self.pool.release(page)
        self.pages, self.keys, self.tokens, self.n_past = [], [], [], 0
