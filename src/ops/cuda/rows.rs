//! A [`RowMap`] on the device.

use std::cell::Cell;
use std::ptr::null;

use super::arguments::{Arguments, Offset};
use super::int;
use crate::device::{Device, Growing};
use crate::error::{Error, Result};
use crate::ops::{KvGeometry, MAX_TREE_ROWS, RowMap};

/// An uploaded [`RowMap`], with the host copy that says what a launch may touch.
pub struct Rows {
    device_words: Growing<u32>,
    qo_indptr: Offset,
    seq_lens: Offset,
    positions: Offset,
    page_table: Offset,
    tree: Option<Offset>,
    map: RowMap,
    /// The cache shape and reach the page table was last found good for: one check serves all layers.
    checked: Cell<Option<(usize, usize, Reach)>>,
}

/// Which cache slots of a request a launch reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// None: slots without a page are skipped, pages must only exist.
    Append,
    /// The committed slots.
    Committed,
    /// The committed slots and those of the pass.
    CommittedAndRows,
}

/// A row map as launchers take it.
pub(super) struct RawRows {
    pub qo_indptr: *const i32,
    pub seq_lens: *const i32,
    pub positions: *const i32,
    pub page_table: *const i32,
    /// `[num_rows, 2]`; null for chains.
    pub tree_mask: *const u32,
    pub num_rows: i32,
    pub num_reqs: i32,
    pub max_rows_per_req: i32,
    pub max_seq_len: i32,
    pub max_pages_per_req: i32,
}

/// A bound for lengths up to `len`, the same for many of them: passes of equal bounds can be one recording.
fn length_bound(len: usize) -> usize {
    let step = if len <= 4096 { 256 } else { 2048 };
    len.next_multiple_of(step)
}

impl Rows {
    pub(super) fn new(device: &Device) -> Result<Self> {
        let mut rows = Self {
            device_words: Growing::new(device, super::INITIAL_WORDS)?,
            qo_indptr: Offset::default(),
            seq_lens: Offset::default(),
            positions: Offset::default(),
            page_table: Offset::default(),
            tree: None,
            map: RowMap::new(0),
            checked: Cell::new(None),
        };
        rows.set(&RowMap::new(0))?;
        Ok(rows)
    }

    pub(super) fn set(&mut self, map: &RowMap) -> Result<()> {
        check_consistent(map)?;
        let words = |values: &[i32]| values.iter().map(|&v| v as u32).collect::<Vec<_>>();
        let mut arguments = Arguments::default();
        self.qo_indptr = arguments.push(words(&map.qo_indptr));
        self.seq_lens = arguments.push(words(&map.seq_lens));
        self.positions = arguments.push(words(&map.positions));
        self.page_table = arguments.push(words(&map.page_table));
        self.tree = map.tree.as_ref().map(|masks| {
            let halves = masks
                .iter()
                .flat_map(|&mask| [mask as u32, (mask >> 32) as u32]);
            arguments.push(halves.collect::<Vec<_>>())
        });
        arguments.upload(&mut self.device_words)?;
        self.map.clone_from(map);
        self.checked.set(None);
        Ok(())
    }

    /// The map that was uploaded.
    pub(super) fn map(&self) -> &RowMap {
        &self.map
    }

    /// Rows of the pass.
    pub fn num_rows(&self) -> usize {
        self.map.num_rows()
    }

    pub(super) fn raw(&self) -> Result<RawRows> {
        let words = self.device_words.get();
        Ok(RawRows {
            qo_indptr: self.qo_indptr.of(words),
            seq_lens: self.seq_lens.of(words),
            positions: self.positions.of(words),
            page_table: self.page_table.of(words),
            tree_mask: self.tree.map_or(null(), |tree| tree.of(words)),
            num_rows: int("rows", self.map.num_rows())?,
            num_reqs: int("requests", self.map.num_reqs())?,
            max_rows_per_req: int("rows of a request", self.map.max_rows_per_req())?,
            max_seq_len: int("seq_lens", length_bound(self.map.max_seq_len()))?,
            max_pages_per_req: int("max_pages_per_req", self.map.max_pages_per_req)?,
        })
    }

    /// All that launches take from this map by value.
    pub(super) fn identity(&self) -> Result<Vec<u64>> {
        let raw = self.raw()?;
        let sizes = [
            raw.num_rows,
            raw.num_reqs,
            raw.max_rows_per_req,
            raw.max_seq_len,
            raw.max_pages_per_req,
        ];
        let addresses = [
            raw.qo_indptr,
            raw.seq_lens,
            raw.positions,
            raw.page_table,
            raw.tree_mask.cast(),
        ];
        let sizes = sizes.iter().map(|&size| size as u64);
        Ok(sizes
            .chain(addresses.iter().map(|&address| address as u64))
            .collect())
    }

    /// Refuses page ids outside the pool and, for slots that will be read, missing pages: the kernels trust both.
    pub(super) fn check_pages(&self, geometry: &KvGeometry, reach: Reach) -> Result<()> {
        let KvGeometry {
            num_pages,
            page_size,
            ..
        } = *geometry;
        let key = Some((num_pages, page_size, reach));
        if self.checked.get() == key {
            return Ok(());
        }
        let map = &self.map;
        if let Some(page) = map
            .page_table
            .iter()
            .find(|&&page| page >= 0 && page as usize >= num_pages)
        {
            let expected = format!("pages below {num_pages}");
            return Err(Error::argument("page_table", expected, page));
        }
        for r in 0..map.num_reqs() {
            let rows = map.rows_of(r).len();
            let slots = match reach {
                Reach::Append => continue,
                _ if rows == 0 => continue,
                Reach::Committed => map.seq_lens[r] as usize,
                Reach::CommittedAndRows => map.seq_lens[r] as usize + rows,
            };
            let first = r * map.max_pages_per_req;
            let pages = &map.page_table[first..first + map.max_pages_per_req];
            let present = pages.iter().take_while(|&&page| page >= 0).count();
            if present * page_size < slots {
                let field = format!("page_table of request {r}");
                let expected = format!("pages of {page_size} for {slots} slots");
                return Err(Error::argument(field, expected, format!("{present} pages")));
            }
        }
        self.checked.set(key);
        Ok(())
    }
}

/// Refuses a map whose arrays do not belong together.
fn check_consistent(map: &RowMap) -> Result<()> {
    let rows = map.positions.len();
    let ordered = map.qo_indptr.first() == Some(&0)
        && map.qo_indptr.is_sorted()
        && map
            .qo_indptr
            .last()
            .is_some_and(|&last| last as usize == rows);
    if !ordered || map.qo_indptr.len() != map.seq_lens.len() + 1 {
        let expected = format!("{} sums from 0 to {rows}", map.seq_lens.len() + 1);
        return Err(Error::argument(
            "qo_indptr",
            expected,
            format!("{:?}", map.qo_indptr),
        ));
    }
    if let Some(masks) = &map.tree {
        super::expect("tree", rows, masks.len())?;
        if map.max_rows_per_req() > MAX_TREE_ROWS {
            let expected = format!("at most {MAX_TREE_ROWS} rows of a request");
            return Err(Error::argument("tree", expected, map.max_rows_per_req()));
        }
    }
    if let Some(len) = map.seq_lens.iter().find(|&&len| len < 0) {
        return Err(Error::argument("seq_lens", "lengths >= 0", len));
    }
    if let Some(position) = map.positions.iter().find(|&&position| position < 0) {
        return Err(Error::argument("positions", "positions >= 0", position));
    }
    super::expect(
        "page_table",
        map.seq_lens.len() * map.max_pages_per_req,
        map.page_table.len(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_whose_arrays_disagree_are_refused() {
        let good = RowMap {
            qo_indptr: vec![0, 2, 2],
            seq_lens: vec![3, 0],
            positions: vec![3, 4],
            page_table: vec![0, -1],
            max_pages_per_req: 1,
            tree: Some(vec![0, 1]),
        };
        assert!(check_consistent(&good).is_ok());
        let spoil: [fn(&mut RowMap); 7] = [
            |map| map.qo_indptr = vec![0, 2],
            |map| map.qo_indptr = vec![0, 3, 2],
            |map| map.qo_indptr.clear(),
            |map| map.seq_lens[0] = -1,
            |map| map.positions[1] = -1,
            |map| map.page_table.truncate(1),
            |map| map.tree = Some(vec![0]),
        ];
        for (i, spoil) in spoil.iter().enumerate() {
            let mut map = good.clone();
            spoil(&mut map);
            assert!(check_consistent(&map).is_err(), "case {i}");
        }
    }
}
