//! Decayed counts of what was predicted and what came true, by draft position and log-odds.

/// Bins of log-odds, evenly from -[`RANGE`] to [`RANGE`]; what is beyond counts in the outer ones.
const NUM_BINS: usize = 24;
const RANGE: f64 = 6.0;

/// Outcomes of predictions of about the same log-odds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Cell {
    pub(super) count: f64,
    pub(super) hits: f64,
    log_odds: f64,
}

impl Cell {
    /// Mean log-odds of the predictions in it.
    pub(super) fn mean_log_odds(&self) -> f64 {
        self.log_odds / self.count.max(f64::MIN_POSITIVE)
    }
}

/// Outcomes of one position.
pub(super) type Cells = [Cell; NUM_BINS];

/// Log-odds of a probability, held within the bins.
pub(super) fn log_odds(p: f32) -> f64 {
    let p = f64::from(p);
    (p / (1.0 - p)).ln().clamp(-RANGE, RANGE)
}

fn bin(log_odds: f64) -> usize {
    (((log_odds + RANGE) / (2.0 * RANGE) * NUM_BINS as f64) as usize).min(NUM_BINS - 1)
}

/// Counts that forget: each position loses half its weight in `half_life` of its own outcomes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Outcomes {
    positions: Vec<Cells>,
    keep: f64,
}

impl Outcomes {
    pub(super) fn new(draft_len: usize, half_life: f64) -> Self {
        Self {
            positions: vec![[Cell::default(); NUM_BINS]; draft_len],
            keep: 0.5_f64.powf(1.0 / half_life),
        }
    }

    /// Counts the reached drafts of a round: position k of `verify_len` was reached when all before it were accepted. A
    /// prediction that is no number says nothing.
    pub(super) fn add(&mut self, predicted: &[f32], verify_len: usize, num_accepted: usize) {
        let reached = verify_len.min(num_accepted + 1);
        let drafts = self.positions.iter_mut().zip(predicted).take(reached);
        for (k, (cells, &p)) in drafts.enumerate() {
            if !(0.0..=1.0).contains(&p) {
                continue;
            }
            for cell in cells.iter_mut() {
                cell.count *= self.keep;
                cell.hits *= self.keep;
                cell.log_odds *= self.keep;
            }
            let z = log_odds(p);
            let cell = &mut cells[bin(z)];
            cell.count += 1.0;
            cell.hits += f64::from(u8::from(num_accepted > k));
            cell.log_odds += z;
        }
    }

    pub(super) fn draft_len(&self) -> usize {
        self.positions.len()
    }

    pub(super) fn at(&self, k: usize) -> &Cells {
        &self.positions[k]
    }

    /// The cell of a prediction at position `k`.
    pub(super) fn cell(&self, k: usize, log_odds: f64) -> Cell {
        self.positions[k][bin(log_odds)]
    }

    /// All positions together.
    pub(super) fn pooled(&self) -> Cells {
        std::array::from_fn(|index| self.sum(index))
    }

    /// All positions together in the bin of a prediction.
    pub(super) fn pooled_cell(&self, log_odds: f64) -> Cell {
        self.sum(bin(log_odds))
    }

    fn sum(&self, index: usize) -> Cell {
        let cells = self.positions.iter().map(|cells| cells[index]);
        cells.fold(Cell::default(), |sum, cell| Cell {
            count: sum.count + cell.count,
            hits: sum.hits + cell.hits,
            log_odds: sum.log_odds + cell.log_odds,
        })
    }
}
