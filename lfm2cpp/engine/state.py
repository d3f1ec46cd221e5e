"""The state of one sequence: its tokens, its pages, its convolution state."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from lfm2cpp.kernels.widths import KEPT_COLUMNS, PAGE_TOKENS

from .memory import PageLayout, PagePool, n_pages, zeroed


def prefix_key(parent: bytes, token_ids: list[int]) -> bytes:
    """The hash of a prefix that ends with these PAGE_TOKENS tokens and begins as `parent` says."""
    return hashlib.blake2b(parent + np.asarray(token_ids, np.int32).tobytes(), digest_size=16).digest()


class SequenceState:
    """The memory of one sequence: its tokens, its pages, the columns of its convolutions before n_past.

    `tokens` may be longer than n_past, by fewer than PAGE_TOKENS: those in between are evaluated again with the next
    batch. While a batch runs, `settled` is False; if it stays so, the batch was torn off, and `settle` goes back to the
    last page end, where everything is known. A full page is never written again: it may be shared.
    """

    def __init__(self, pool: PagePool, layout: PageLayout) -> None:
        self.pool, self.layout = pool, layout
        self.tokens: list[int] = []
        self.n_past = 0
        self.pages: list[int] = []
        self.root = b""  # what prefix hashes begin with; of a loaded sequence, the digest of its file
        self.keys: list[bytes] = []  # prefix hashes of the full pages
        self._set_addresses(np.zeros(16, np.int64))
        self.conv = zeroed(4 * math.prod(layout.conv_shape)).view(np.float32).reshape(layout.conv_shape)
        self.conv_address = self.conv.ctypes.data  # kept: asking for it takes 12 us with cold caches
        self.first_column = -layout.d_conv  # the position of the oldest column that `conv` holds; before 0 they are 0
        self.settled = True

    @property
    def pending(self) -> list[int]:
        """Tokens that it stands for, but that have to be evaluated again."""
        return self.tokens[self.n_past :]

    def _set_addresses(self, addresses: np.ndarray) -> None:
        """Where its pages are, and where that is written."""
        self.addresses, self.addresses_at = addresses, addresses.ctypes.data

    def _set_page(self, i: int, page: int) -> None:
        if i >= len(self.addresses):
            self._set_addresses(np.concatenate([self.addresses, np.zeros(len(self.addresses), np.int64)]))
        self.addresses[i] = self.pool.view(page).ctypes.data
        if i == len(self.pages):
            self.pages.append(page)
        else:
            self.pages[i] = page

    def _drop_pages(self, n: int) -> None:
        """Keep the first n pages."""
        dropped = self.pages[n:]
        del self.pages[n:]
        self.pool.release(dropped)

    def reserve(self, n_tokens: int) -> None:
        """Own every page that positions n_past .. n_past + n_tokens - 1 are written to."""
        for i in range(self.n_past // PAGE_TOKENS, n_pages(self.n_past + n_tokens)):
            if i == len(self.pages):
                self._set_page(i, self.pool.take())
            elif self.pool.is_shared(shared := self.pages[i]):
                own = self.pool.take()
                self.pool.view(own)[:] = self.pool.view(shared)
                self._set_page(i, own)
                self.pool.release([shared])

    def advance(self, ids: list[int]) -> None:
        """`ids` have been evaluated from n_past on: pages that became full are remembered."""
        end = self.n_past + len(ids)
        if end > len(self.tokens):
            self.tokens += ids[len(self.tokens) - end :]
        self.n_past = end
        self.first_column = max(self.first_column, end - KEPT_COLUMNS)
        if end // PAGE_TOKENS > len(self.keys):
            self._remember_full_pages()
        self.settled = True

    def _remember_full_pages(self) -> None:
        for i in range(len(self.keys), self.n_past // PAGE_TOKENS):
            self.keys.append(self._key(i, self.tokens))
            self.pool.remember(self.keys[i], self.pages[i])

    def _key(self, i: int, token_ids: list[int]) -> bytes:
        """The prefix hash of page i, if the pages before it have theirs."""
        parent = self.keys[i - 1] if i else self.root
        return prefix_key(parent, token_ids[i * PAGE_TOKENS : (i + 1) * PAGE_TOKENS])

    def settle(self) -> None:
        """After a batch that did not end: forget what it may have half done, and give back what it had reserved."""
        if not self.settled:
            self._go_back(self.n_past // PAGE_TOKENS)
            self._remember_full_pages()
            del self.tokens[self.n_past + PAGE_TOKENS - 1 :]  # of a truncation that was torn off
        self._drop_pages(n_pages(self.n_past))

    def truncate(self, n: int) -> None:
        """Keep the first n tokens: by a few tokens at once, else from the last page end, and what follows that is left
        to be evaluated again."""
        if self.first_column <= n - self.layout.d_conv and n < self.n_past:
            self.settled = False
            # A page that ends with tokens which are taken back at once is of no use to anybody.
            for i in range(n // PAGE_TOKENS, len(self.keys)):
                self.pool.forget(self.keys[i], self.pages[i])
            self._forget(n)
            self.settled = True
        elif n < self.n_past:
            self._go_back(n // PAGE_TOKENS)
        del self.tokens[n:]

    def _go_back(self, whole: int) -> None:
        """To the end of the first `whole` pages."""
        self.settled = False
        self._forget(whole * PAGE_TOKENS)
        self._restore_conv()
        self.settled = True

    def _forget(self, n: int) -> None:
        """All pages that the first n tokens do not need."""
        self.n_past = n
        del self.keys[n // PAGE_TOKENS :]
        self._drop_pages(n_pages(n))
        if n == 0:
            self.root = b""

    def _restore_conv(self) -> None:
        """The convolution state at n_past, a page end."""
        self.first_column = self.n_past - self.layout.d_conv
        kept = np.arange(self.first_column, self.n_past) % KEPT_COLUMNS
        if self.n_past == 0:
            self.conv[:, kept] = 0
            return
        page = self.pool.view(self.pages[self.n_past // PAGE_TOKENS - 1])
        for columns, snapshot in zip(self.conv, self.layout.snapshots(page), strict=True):
            columns[kept] = snapshot

    def reuse_prefix(self, token_ids: list[int]) -> int:
        """Keep the tokens in common with token_ids, short of its last; returns how many.

        Where other sequences have left pages that follow token_ids further than these tokens, take them over.
        """
        common = 0
        for ours, theirs in zip(self.tokens, token_ids[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        self.truncate(common)
        for i in range(common // PAGE_TOKENS, (len(token_ids) - 1) // PAGE_TOKENS):
            key = self._key(i, token_ids)
            page = self.pool.find(key)
            if page is None:
                break
            self._adopt(i, key, page, token_ids)
        self.pool.touch(self.keys)
        return len(self.tokens)

    def _adopt(self, i: int, key: bytes, page: int, token_ids: list[int]) -> None:
        """Go on with somebody's full page as page i."""
        self.settled = False
        self._drop_pages(i)
        self._set_page(i, page)
        self.keys.append(key)
        self.tokens[:] = token_ids[: (i + 1) * PAGE_TOKENS]
        self.n_past = len(self.tokens)
        self._restore_conv()
        self.settled = True

    def fork(self) -> SequenceState:
        """A copy that shares every page; whoever writes to a shared page first copies it."""
        other = SequenceState(self.pool, self.layout)
        for i, page in enumerate(self.pages):
            other._set_page(i, self.pool.share(page))
        other.root, other.keys, other.tokens = self.root, list(self.keys), list(self.tokens)
        other.n_past = self.n_past
        other.conv[:], other.first_column = self.conv, self.first_column
        return other

    def release(self) -> None:
        """Give everything back. What is remembered of it counts as used until now."""
        self.pool.touch(self.keys)
        self.tokens, self.n_past, self.keys, self.settled = [], 0, [], True
        self._drop_pages(0)
