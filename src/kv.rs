//! Pages of the KV caches: who owns which, and how far each request has written.
//!
//! All caches of a request (the target's and the drafter's, every layer) share one [`PageTable`]: slot `s` of the
//! request lies in page `pages[s / page_size]` at slot `s % page_size` of each cache, and belongs to position `s`.
//! A [`PagePool`] hands pages out and takes them back; a table's *capacity* grows by [`PagePool::reserve`], its
//! *length* moves freely below it. A verify pass appends all its rows first ([`PageTable::append`]) and keeps the
//! accepted ones by moving the length back ([`PageTable::rollback`]): entries past the length are garbage that the
//! next append overwrites.

use crate::error::{Error, Result};

/// The free pages of a cache of fixed size.
#[derive(Debug)]
pub struct PagePool {
    free: Vec<i32>,
    num_pages: usize,
    page_size: usize,
}

/// The pages of one request, in order of position, and the number of entries in use.
///
/// A table does not give its pages back when dropped: hand it to [`PagePool::release`].
#[derive(Debug, Default)]
pub struct PageTable {
    pages: Vec<i32>,
    page_size: usize,
    len: usize,
}

impl PagePool {
    /// A pool of `num_pages` free pages of `page_size` token slots.
    ///
    /// # Errors
    /// Zero pages, a zero page size, or more pages than a 32-bit page id can name.
    pub fn new(num_pages: usize, page_size: usize) -> Result<Self> {
        if page_size == 0 {
            return Err(Error::argument("page_size", "at least 1 token", 0));
        }
        let ids = match i32::try_from(num_pages) {
            Ok(n) if n > 0 => 0..n,
            _ => {
                let expected = format!("1 to {} pages", i32::MAX);
                return Err(Error::argument("num_pages", expected, num_pages));
            }
        };
        Ok(Self {
            // Popped from the back: low pages first.
            free: ids.rev().collect(),
            num_pages,
            page_size,
        })
    }

    /// Pages in all.
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// Pages that no table holds.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Token slots in a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Pages that `len` entries need.
    pub fn pages_for(&self, len: usize) -> usize {
        len.div_ceil(self.page_size)
    }

    /// An empty table for pages of this pool.
    pub fn table(&self) -> PageTable {
        PageTable {
            pages: Vec::new(),
            page_size: self.page_size,
            len: 0,
        }
    }

    /// Adds pages to `table` until it can hold `len` entries; never takes any away.
    ///
    /// # Errors
    /// The pool has too few free pages; nothing was changed.
    pub fn reserve(&mut self, table: &mut PageTable, len: usize) -> Result<()> {
        let missing = self.pages_for(len).saturating_sub(table.pages.len());
        if missing > self.free.len() {
            let expected = format!(
                "at most {} more KV pages (all that are free)",
                self.free.len()
            );
            return Err(Error::argument("num_pages", expected, missing));
        }
        let first = self.free.len() - missing;
        table.pages.extend(self.free.drain(first..).rev());
        Ok(())
    }

    /// Takes all pages of `table` back and empties it.
    pub fn release(&mut self, table: &mut PageTable) {
        table.len = 0;
        self.free.extend(table.pages.drain(..).rev());
        debug_assert!(self.free.len() <= self.num_pages);
    }
}

impl PageTable {
    /// Entries in use.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no entry is in use.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Entries that fit into the reserved pages.
    pub fn capacity(&self) -> usize {
        self.pages.len() * self.page_size
    }

    /// Page ids in order of position.
    pub fn pages(&self) -> &[i32] {
        &self.pages
    }

    /// Counts `num_rows` more entries as used.
    ///
    /// # Errors
    /// They do not fit into the reserved pages; nothing was changed.
    pub fn append(&mut self, num_rows: usize) -> Result<()> {
        let len = self.len + num_rows;
        if len > self.capacity() {
            let expected = format!("at most {} entries (the reserved pages)", self.capacity());
            return Err(Error::argument("seq_len", expected, len));
        }
        self.len = len;
        Ok(())
    }

    /// Forgets every entry from `len` on; the pages stay reserved. A longer `len` changes nothing.
    pub fn rollback(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_empty_pools() {
        assert!(PagePool::new(0, 16).is_err());
        assert!(PagePool::new(16, 0).is_err());
        assert!(PagePool::new(usize::MAX, 1).is_err());
    }

    #[test]
    fn a_failed_reserve_changes_nothing() {
        let mut pool = PagePool::new(3, 4).unwrap();
        let mut table = pool.table();
        pool.reserve(&mut table, 5).unwrap();
        let held = table.pages().to_vec();
        assert!(pool.reserve(&mut table, 13).is_err());
        assert_eq!((table.pages(), pool.num_free()), (&held[..], 1));
        pool.reserve(&mut table, 12).unwrap();
        assert_eq!((table.capacity(), pool.num_free()), (12, 0));
    }

    #[test]
    fn lengths_move_within_the_reserved_pages() {
        let mut pool = PagePool::new(2, 4).unwrap();
        let mut table = pool.table();
        assert!(table.append(1).is_err(), "no page is reserved yet");
        pool.reserve(&mut table, 8).unwrap();
        table.append(7).unwrap();
        assert!(table.append(2).is_err());
        assert_eq!(table.len(), 7);
        table.rollback(3);
        table.rollback(5);
        assert_eq!((table.len(), table.capacity()), (3, 8));
    }

    /// Random reserve, append, rollback and release on many tables: every page has exactly one owner at all times.
    #[test]
    fn no_page_is_leaked_or_shared() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |bound: usize| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) as usize % bound
        };
        for (num_pages, page_size) in [(1, 1), (7, 1), (13, 3), (64, 16)] {
            let mut pool = PagePool::new(num_pages, page_size).unwrap();
            let mut tables: Vec<_> = (0..5).map(|_| pool.table()).collect();
            for _ in 0..2000 {
                let table = &mut tables[random(5)];
                let before = (table.len(), table.capacity());
                match random(4) {
                    0 => {
                        let len = random(num_pages * page_size + 2);
                        let fits = pool.pages_for(len) <= pool.num_free() + table.pages().len();
                        assert_eq!(pool.reserve(table, len).is_ok(), fits);
                        assert!(table.capacity() >= before.1);
                    }
                    1 => {
                        let rows = random(2 * page_size + 1);
                        assert_eq!(table.append(rows).is_ok(), before.0 + rows <= before.1);
                    }
                    2 => table.rollback(random(before.0 + 1)),
                    _ => pool.release(table),
                }
                let mut owners = vec![0; num_pages];
                for &page in tables.iter().flat_map(PageTable::pages).chain(&pool.free) {
                    owners[page as usize] += 1;
                }
                assert!(
                    owners.iter().all(|&n| n == 1),
                    "owners of each page: {owners:?}"
                );
                assert!(tables.iter().all(|t| t.len() <= t.capacity()));
            }
        }
    }
}
