//! Rows that the drafter has yet to look at.
//!
//! While no request of a step is drafted for, nobody reads the drafter's cache: the features of such steps are only put
//! aside, and the drafter takes them in together when it drafts again or when there is no room for more. A look reads all
//! of the weights behind it for however few rows, so that plain decoding beside a drafter costs hardly more than without.
//! What is put aside is as large as the target's features of its largest pass, and is made when first needed; without
//! memory for it the drafter looks at every step.

use super::Sequence;
use crate::error::Result;
use crate::model::{Drafter, Features};
use crate::ops::{Matrix, Ops, RowMap};

/// One row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    slot: usize,
    position: usize,
    /// The committed token that follows.
    next_token: u32,
    /// Its place in the matrices.
    place: u32,
}

/// The features of the rows.
struct Store<O: Ops> {
    taps: Option<O::Mat>,
    hidden: O::Mat,
}

impl<O: Ops> Store<O> {
    fn like(ops: &mut O, features: &Features<'_, O>) -> Result<Self> {
        let mut like = |mat: &O::Mat| ops.mat(mat.max_rows(), mat.cols());
        Ok(Self {
            taps: features.taps.map(&mut like).transpose()?,
            hidden: like(features.hidden)?,
        })
    }

    fn max_rows(&self) -> usize {
        let taps = self.taps.as_ref().map_or(usize::MAX, Matrix::max_rows);
        self.hidden.max_rows().min(taps)
    }

    /// Copies the rows of a pass behind the `num_rows` that are there.
    fn push(&mut self, ops: &mut O, features: &Features<'_, O>, num_rows: usize) -> Result<()> {
        let hidden = (features.hidden, &mut self.hidden);
        for (from, to) in features
            .taps
            .zip(self.taps.as_mut())
            .into_iter()
            .chain([hidden])
        {
            to.set_rows(num_rows + from.rows())?;
            ops.copy_into(from, to, num_rows, 0)?;
        }
        Ok(())
    }
}

/// See the module.
pub(super) struct Backlog<O: Ops> {
    store: Option<Store<O>>,
    no_memory: bool,
    /// Positions of a slot follow one another.
    rows: Vec<Row>,
    /// Places taken, those of forgotten rows among them.
    num_places: usize,
    /// First place and number of the rows that were staged last and not yet put aside.
    staged: Option<(usize, usize)>,
}

impl<O: Ops> Default for Backlog<O> {
    fn default() -> Self {
        Self {
            store: None,
            no_memory: false,
            rows: Vec::new(),
            num_places: 0,
            staged: None,
        }
    }
}

impl<O: Ops> Backlog<O> {
    /// Drops what is there of a slot, whose pages may be another's soon.
    pub(super) fn forget(&mut self, slot: usize) {
        self.rows.retain(|row| row.slot != slot);
        self.reclaim();
    }

    /// Rows put aside.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    fn reclaim(&mut self) {
        if self.rows.is_empty() {
            self.num_places = 0;
        }
    }

    /// Whether so many more rows have room, as far as is known.
    pub(super) fn has_room(&self, num_rows: usize) -> bool {
        let most = self.store.as_ref().map_or(usize::MAX, Store::max_rows);
        self.num_places + num_rows <= most
    }

    /// Copies the rows of a pass behind those that are there, where there is room. They count once they are put aside: a
    /// pass may be staged while it runs, so that the device does not wait for the host to ask for the copy.
    pub(super) fn stage(&mut self, ops: &mut O, features: &Features<'_, O>) -> Result<()> {
        self.staged = None;
        if self.store.is_none() && !self.no_memory {
            self.store = Store::like(ops, features).ok();
            self.no_memory = self.store.is_none();
        }
        let num_rows = features.hidden.rows();
        if self.has_room(num_rows)
            && let Some(store) = &mut self.store
        {
            store.push(ops, features, self.num_places)?;
            self.staged = Some((self.num_places, num_rows));
        }
        Ok(())
    }

    /// Puts aside the rows of the last pass, of one row for each request, staging them where they are not; whether there was
    /// room.
    pub(super) fn push(
        &mut self,
        ops: &mut O,
        features: &Features<'_, O>,
        (map, slots, next_tokens): (&RowMap, &[usize], &[u32]),
    ) -> Result<bool> {
        if self.staged.is_none() {
            self.stage(ops, features)?;
        }
        let Some((first, num_rows)) = self.staged.take() else {
            return Ok(false);
        };
        if num_rows != map.num_rows() {
            return Ok(false);
        }
        // A sequence that was taken back comes by the same positions again.
        let mut ends = vec![usize::MAX; slots.iter().max().map_or(0, |slot| slot + 1)];
        for (&slot, &len) in slots.iter().zip(&map.seq_lens) {
            ends[slot] = len as usize;
        }
        self.rows
            .retain(|row| ends.get(row.slot).is_none_or(|&end| row.position < end));
        for (r, (&slot, &next_token)) in slots.iter().zip(next_tokens).enumerate() {
            self.rows.push(Row {
                slot,
                position: map.seq_lens[r] as usize,
                next_token,
                place: (first + r) as u32,
            });
        }
        self.num_places = first + num_rows;
        Ok(true)
    }

    /// Shows the drafter what was put aside of these sequences; how many rows that was.
    pub(super) fn show(
        &mut self,
        ops: &mut O,
        drafter: &mut dyn Drafter<O>,
        seqs: &[&mut Sequence],
    ) -> Result<usize> {
        let Some(store) = self.store.as_ref().filter(|_| !self.rows.is_empty()) else {
            return Ok(0);
        };
        let max_pages = seqs.iter().map(|seq| seq.pages.pages().len()).max();
        let mut map = RowMap::new(max_pages.unwrap_or(0));
        let (mut slots, mut kept) = (Vec::new(), Vec::new());
        let (mut places, mut next_tokens) = (Vec::new(), Vec::new());
        self.rows
            .sort_unstable_by_key(|row| (row.slot, row.position));
        for seq in seqs {
            let before = |slot, position| {
                self.rows
                    .partition_point(|row| (row.slot, row.position) < (slot, position))
            };
            let rows = &self.rows[before(seq.slot, 0)..before(seq.slot, seq.seq_len())];
            if let Some(first) = rows.first() {
                let pages = seq.pages.pages();
                map.push(rows.len(), first.position, first.position, pages)?;
                slots.push(seq.slot);
                kept.push(rows.len());
                places.extend(rows.iter().map(|row| row.place));
                next_tokens.extend(rows.iter().map(|row| row.next_token));
            }
        }
        let features = Features {
            taps: store.taps.as_ref(),
            hidden: &store.hidden,
            places: Some(&places),
        };
        drafter.observe(ops, &features, &map, &slots, &kept, &next_tokens)?;
        slots.sort_unstable();
        self.rows
            .retain(|row| slots.binary_search(&row.slot).is_err());
        self.reclaim();
        Ok(places.len())
    }
}
