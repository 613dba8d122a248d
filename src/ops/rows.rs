//! The ragged map of a pass: rows to requests, requests to pages.

use crate::error::{Error, Result};

/// How the flattened rows of one pass belong to requests and to their paged caches.
///
/// Row `i` of request `r` is flat row `qo_indptr[r] + i`; its key goes to cache slot `seq_lens[r] + i`, which is slot
/// `s % page_size` of page `page_table[r * max_pages_per_req + s / page_size]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowMap {
    /// `[num_reqs + 1]` exclusive prefix sums of rows, leading 0.
    pub qo_indptr: Vec<i32>,
    /// `[num_reqs]` entries in the cache before the pass.
    pub seq_lens: Vec<i32>,
    /// `[num_rows]` absolute RoPE positions.
    pub positions: Vec<i32>,
    /// `[num_reqs, max_pages_per_req]`, -1 where there is no page.
    pub page_table: Vec<i32>,
    /// Columns of `page_table`.
    pub max_pages_per_req: usize,
    /// `[num_rows]` when the rows of the requests are trees, of at most [`MAX_TREE_ROWS`] rows each: bit j of a row's
    /// mask says that row j of its request is one of its ancestors (a row always sees itself). The positions are then
    /// the caller's to set: `seq_len` + number of ancestors. `None`: every request is a chain.
    pub tree: Option<Vec<u64>>,
}

/// Most rows of a request in a tree.
pub const MAX_TREE_ROWS: usize = 64;

impl RowMap {
    /// An empty map for requests with at most `max_pages_per_req` pages.
    pub fn new(max_pages_per_req: usize) -> Self {
        Self {
            qo_indptr: vec![0],
            max_pages_per_req,
            ..Self::default()
        }
    }

    /// Adds a request of `num_rows` rows at positions `position .. position + num_rows`, whose cache holds `seq_len`
    /// entries in `pages`.
    ///
    /// # Errors
    /// More pages than `max_pages_per_req`.
    pub fn push(
        &mut self,
        num_rows: usize,
        seq_len: usize,
        position: usize,
        pages: &[i32],
    ) -> Result<()> {
        if pages.len() > self.max_pages_per_req {
            let expected = format!("at most {} pages", self.max_pages_per_req);
            return Err(Error::argument("page_table", expected, pages.len()));
        }
        self.qo_indptr
            .push(self.num_rows() as i32 + num_rows as i32);
        self.seq_lens.push(seq_len as i32);
        self.positions
            .extend((0..num_rows).map(|i| (position + i) as i32));
        self.page_table.extend_from_slice(pages);
        self.page_table
            .resize(self.seq_lens.len() * self.max_pages_per_req, -1);
        Ok(())
    }

    /// Requests.
    pub fn num_reqs(&self) -> usize {
        self.seq_lens.len()
    }

    /// Rows of all requests.
    pub fn num_rows(&self) -> usize {
        self.positions.len()
    }

    /// Flat rows of request `r`.
    pub fn rows_of(&self, r: usize) -> std::ops::Range<usize> {
        self.qo_indptr[r] as usize..self.qo_indptr[r + 1] as usize
    }

    /// Most rows of any request.
    pub fn max_rows_per_req(&self) -> usize {
        (0..self.num_reqs())
            .map(|r| self.rows_of(r).len())
            .max()
            .unwrap_or(0)
    }

    /// Most cache entries of any request, the pass's own rows included.
    pub fn max_seq_len(&self) -> usize {
        (0..self.num_reqs())
            .map(|r| self.seq_lens[r] as usize + self.rows_of(r).len())
            .max()
            .unwrap_or(0)
    }
}

impl RowMap {
    /// Checks which rows stay of this pass: of every request that has rows the first and none that it does not have.
    ///
    /// # Errors
    /// Names the request whose bits are none of its rows.
    pub(crate) fn check_kept(&self, kept: &[u64]) -> Result<()> {
        if kept.len() != self.num_reqs() {
            return Err(Error::argument(
                "kept",
                format!("{} entries", self.num_reqs()),
                kept.len(),
            ));
        }
        for (r, &bits) in kept.iter().enumerate() {
            let rows = self.rows_of(r).len();
            let within = rows >= MAX_TREE_ROWS || bits >> rows == 0;
            if rows > MAX_TREE_ROWS || !within || bits & 1 != u64::from(rows > 0) {
                let expected =
                    format!("bits of at most {MAX_TREE_ROWS} rows, the first of them set");
                let found = format!("{bits:#x} for the {rows} rows of request {r}");
                return Err(Error::argument("kept", expected, found));
            }
        }
        Ok(())
    }

    /// The flat row that each flat row holds once the rows of `kept` stand together: row `n` of a request the n-th that
    /// stays, those behind them what they were.
    pub fn gathered(&self, kept: &[u64]) -> Vec<u32> {
        let mut index: Vec<u32> = (0..self.num_rows() as u32).collect();
        for (r, &bits) in kept.iter().enumerate() {
            let rows = self.rows_of(r);
            let stay = (0..rows.len().min(MAX_TREE_ROWS)).filter(|row| bits >> row & 1 != 0);
            for (to, from) in stay.enumerate() {
                index[rows.start + to] = (rows.start + from) as u32;
            }
        }
        index
    }

    /// The page and the slot in it of cache entry `slot` of request `r`.
    pub(crate) fn place_of(
        &self,
        r: usize,
        slot: usize,
        page_size: usize,
    ) -> Result<(usize, usize)> {
        let pages = &self.page_table[r * self.max_pages_per_req..][..self.max_pages_per_req];
        match pages.get(slot / page_size) {
            Some(&page) if page >= 0 => Ok((page as usize, slot % page_size)),
            _ => {
                let expected = format!("a page for slot {slot} of request {r}");
                Err(Error::argument("page_table", expected, "none"))
            }
        }
    }

    /// The map of the first `kept[r]` rows of every request, and the flat rows (of `self`) they come from. Requests
    /// that keep none stay, without rows.
    pub fn keep(&self, kept: &[usize]) -> (Self, Vec<u32>) {
        let mut map = Self {
            qo_indptr: vec![0],
            seq_lens: self.seq_lens.clone(),
            positions: Vec::new(),
            page_table: self.page_table.clone(),
            max_pages_per_req: self.max_pages_per_req,
            tree: self.tree.as_ref().map(|_| Vec::new()),
        };
        let mut index = Vec::new();
        for (r, &keep) in kept.iter().enumerate() {
            let rows = self.rows_of(r);
            let rows = rows.start..rows.start + keep.min(rows.len());
            map.positions
                .extend_from_slice(&self.positions[rows.clone()]);
            if let (Some(kept), Some(masks)) = (&mut map.tree, &self.tree) {
                kept.extend_from_slice(&masks[rows.clone()]);
            }
            index.extend(rows.map(|row| row as u32));
            map.qo_indptr.push(map.positions.len() as i32);
        }
        (map, index)
    }
}
