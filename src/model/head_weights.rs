//! The weights of a sequential head, as a checkpoint has them.
//!
//! The kernels multiply by sixteens of the rank; a rank that is no multiple of 16 is filled up with zeros, which change no
//! latent, no bias and no confidence: a gate or a state has nothing to multiply there.

use super::checkpoint::Checkpoint;
use super::drafter_config::DSparkConfig;
use crate::error::Result;
use crate::ops::{ConfidenceHead, DraftHead, HeadKind, HostTensor, Ops};

/// What the rank becomes a multiple of.
const RANK_MULTIPLE: usize = 16;

/// A stretch of a side of a tensor.
#[derive(Clone, Copy)]
enum Part {
    /// As long as it says.
    Whole(usize),
    /// As long as the rank, and filled up.
    Rank,
}

/// The rank as stored.
#[derive(Clone, Copy)]
struct Rank(usize);

impl Rank {
    fn padded(self) -> usize {
        self.0.next_multiple_of(RANK_MULTIPLE)
    }

    /// Lengths of a part: as stored, and filled up.
    fn lens(self, part: Part) -> (usize, usize) {
        match part {
            Part::Whole(len) => (len, len),
            Part::Rank => (self.0, self.padded()),
        }
    }

    /// Lengths of a side: as stored, and filled up.
    fn side(self, parts: &[Part]) -> (usize, usize) {
        let lens = parts.iter().map(|&part| self.lens(part));
        lens.fold((0, 0), |sum, len| (sum.0 + len.0, sum.1 + len.1))
    }

    /// The bytes of `tensor` with zeros behind each part; all bits of a zero are 0 in every type.
    fn fill_up(self, tensor: &HostTensor<'_>, rows: &[Part], cols: &[Part]) -> Vec<u8> {
        let size = tensor.dtype.size();
        let (row_len, padded_row_len) = self.side(cols);
        let mut stored = tensor.bytes.chunks_exact(row_len * size);
        let one_row = [Part::Whole(1)];
        let rows = if rows.is_empty() { &one_row } else { rows };
        let mut bytes = Vec::with_capacity(self.side(rows).1 * padded_row_len * size);
        for &part in rows {
            let (num_rows, padded_rows) = self.lens(part);
            for row in stored.by_ref().take(num_rows) {
                let mut rest = row;
                for &part in cols {
                    let (len, padded) = self.lens(part);
                    let (elements, others) = rest.split_at(len * size);
                    bytes.extend_from_slice(elements);
                    bytes.resize(bytes.len() + (padded - len) * size, 0);
                    rest = others;
                }
            }
            let zeros = (padded_rows - num_rows) * padded_row_len * size;
            bytes.resize(bytes.len() + zeros, 0);
        }
        bytes
    }
}

/// Reads tensors of which sides are made of the rank.
struct Reader<'w> {
    weights: &'w Checkpoint,
    rank: Rank,
}

impl Reader<'_> {
    /// Hands `use_tensor` the matrix `name`; one row of a vector, whose `rows` are empty.
    fn read<T>(
        &self,
        name: &str,
        rows: &[Part],
        cols: &[Part],
        use_tensor: impl FnOnce(&HostTensor<'_>) -> Result<T>,
    ) -> Result<T> {
        let (stored, padded): (Vec<usize>, Vec<usize>) = [rows, cols]
            .iter()
            .filter(|parts| !parts.is_empty())
            .map(|parts| self.rank.side(parts))
            .unzip();
        let tensor = self.weights.tensor(name, &stored)?;
        if stored == padded {
            return use_tensor(&tensor);
        }
        let bytes = self.rank.fill_up(&tensor, rows, cols);
        use_tensor(&HostTensor {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: padded,
            bytes: &bytes,
        })
    }

    fn weight<O: Ops>(
        &self,
        ops: &mut O,
        name: &str,
        rows: &[Part],
        cols: &[Part],
    ) -> Result<O::Weight> {
        self.read(name, rows, cols, |tensor| {
            ops.weight(std::slice::from_ref(tensor))
        })
    }
}

/// The head that `config` says `weights` have.
pub(super) fn load_head<O: Ops>(
    ops: &mut O,
    weights: &Checkpoint,
    config: &DSparkConfig,
) -> Result<DraftHead<O>> {
    const RANK: Part = Part::Rank;
    let whole = Part::Whole;
    let (hidden, vocab) = (config.decoder.hidden_size, config.decoder.vocab_size);
    let reader = Reader {
        weights,
        rank: Rank(config.markov_rank),
    };
    let mut head = DraftHead::none();
    if let Some(with_markov) = config.confidence {
        let cols = [whole(hidden), RANK];
        let cols = if with_markov { &cols[..] } else { &cols[..1] };
        head.confidence = Some(ConfidenceHead {
            weight: reader.weight(ops, "confidence_head.proj.weight", &[whole(1)], cols)?,
            bias: weights.tensor("confidence_head.proj.bias", &[1])?.to_f32()[0],
            with_markov,
        });
    }
    if config.head == HeadKind::None {
        return Ok(head);
    }
    (head.kind, head.rank) = (config.head, reader.rank.padded());
    let mut table = |name: &str| reader.weight(ops, name, &[whole(vocab)], &[RANK]);
    head.markov_w1 = Some(table("markov_head.markov_w1.weight")?);
    head.markov_w2 = Some(table("markov_head.markov_w2.weight")?);
    let (name, rows, cols) = match config.head {
        HeadKind::None | HeadKind::Vanilla => return Ok(head),
        HeadKind::Gated => ("gate_proj", &[RANK][..], &[whole(hidden), RANK][..]),
        HeadKind::Rnn => (
            "joint_proj",
            &[RANK; 3][..],
            &[RANK, RANK, whole(hidden)][..],
        ),
    };
    let weight = format!("markov_head.{name}.weight");
    head.proj_weight = Some(reader.weight(ops, &weight, rows, cols)?);
    let bias = format!("markov_head.{name}.bias");
    head.proj_bias = Some(reader.read(&bias, &[], rows, |tensor| ops.norm(tensor))?);
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Dtype;

    fn filled_up(rows: &[Part], cols: &[Part]) -> Vec<f32> {
        let rank = Rank(3);
        let stored = [rank.side(rows).0.max(1), rank.side(cols).0];
        let values = (1..=stored[0] * stored[1]).map(|i| i as f32);
        let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        let tensor = HostTensor {
            name: "t".into(),
            dtype: Dtype::F32,
            shape: stored.to_vec(),
            bytes: &bytes,
        };
        let bytes = rank.fill_up(&tensor, rows, cols);
        let filled = HostTensor {
            shape: vec![rank.side(rows).1.max(1), rank.side(cols).1],
            bytes: &bytes,
            ..tensor
        };
        assert_eq!(filled.len() * 4, bytes.len());
        filled.to_f32()
    }

    /// Where the numbers of `values` are, and that the rest are zeros.
    fn places(values: &[f32]) -> Vec<usize> {
        let mut places: Vec<usize> = (0..values.len()).filter(|&i| values[i] != 0.0).collect();
        places.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
        places
    }

    #[test]
    fn every_part_is_filled_up_on_its_own() {
        let (rank, two) = (Part::Rank, Part::Whole(2));
        let bias = filled_up(&[], &[rank, rank]);
        assert_eq!(places(&bias), [0, 1, 2, 16, 17, 18]);
        let table = filled_up(&[two], &[rank]);
        assert_eq!(places(&table), [0, 1, 2, 16, 17, 18]);
        let gate = filled_up(&[rank], &[two, rank]);
        let row = [0, 1, 2, 3, 4];
        let rows = (0..3).flat_map(|i| row.map(|j| 18 * i + j));
        assert_eq!(places(&gate), rows.collect::<Vec<_>>());
        assert_eq!(gate.len(), 16 * 18);
        let joint = filled_up(&[rank, rank], &[rank, two]);
        let rows = [0, 1, 2, 16, 17, 18].map(|i| row.map(|j| 18 * i + j + 13 * (j / 3)));
        assert_eq!(places(&joint), rows.concat());
    }
}
