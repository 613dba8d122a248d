//! A grammar's mask over the draft head does what base logits of -inf do, bit for bit.
#![cfg(feature = "cuda")]

mod common;

use common::Rng;
use common::raw::{device, download, draft_full, empty_full, rounded, upload};
use dspark::device::Device;
use dspark::sys;

struct Case {
    head: sys::dspark_head_kind,
    num_reqs: usize,
    vocab_size: usize,
    rank: usize,
}

const DRAFT_LEN: usize = 3;

impl Case {
    fn num_rows(&self) -> usize {
        self.num_reqs * DRAFT_LEN
    }

    fn base(&self) -> Vec<f32> {
        Rng::new(1).normals(self.num_rows() * self.vocab_size, 2.0)
    }

    /// Words at random; the second row forbids everything, the third all but the last token.
    fn mask(&self) -> Vec<i32> {
        let words = self.vocab_size.div_ceil(32);
        let mut rng = Rng::new(2);
        let mut mask: Vec<i32> = (0..self.num_rows() * words)
            .map(|_| rng.next() as i32)
            .collect();
        mask[words..3 * words].fill(0);
        let last = self.vocab_size - 1;
        mask[2 * words + last / 32] = 1 << (last % 32);
        mask
    }

    /// Draft tokens, and the normalisers of their laws, bit for bit.
    fn run(&self, device: &Device, base: &[f32], mask: Option<&[i32]>) -> (Vec<i32>, Vec<u32>) {
        let &Self {
            num_reqs,
            vocab_size,
            rank,
            ..
        } = self;
        let mut rng = Rng::new(3);
        let logits = upload(device, base);
        let mask = mask.map(|mask| upload(device, mask));
        let w1 = upload(device, &rounded(&rng.normals(vocab_size * rank, 1.0)));
        let w2 = upload(device, &rounded(&rng.normals(vocab_size * rank, 0.1)));
        let anchors = upload(device, &vec![1; num_reqs]);
        let positions = upload(device, &vec![50; num_reqs]);
        let temperature: Vec<f32> = (0..num_reqs).map(|r| [0.7, 0.0][r % 2]).collect();
        let temperature = upload(device, &temperature);
        let seeds = upload(device, &(0..num_reqs as u64).collect::<Vec<_>>());
        let mut tokens = upload(device, &vec![-7; self.num_rows()]);
        let mut log_normalizers = upload(device, &vec![f32::NAN; self.num_rows()]);
        let mut latents = upload(device, &rounded(&vec![0.0; self.num_rows() * rank.max(1)]));
        let params = sys::dspark_draft_full_params {
            logits_dtype: sys::DSPARK_DTYPE_F32,
            head: self.head,
            num_reqs: num_reqs as i32,
            draft_len: DRAFT_LEN as i32,
            vocab_size: vocab_size as i32,
            markov_rank: rank as i32,
            logits: logits.ptr(0).cast(),
            markov_w1: w1.ptr(0).cast(),
            markov_w2: w2.ptr(0).cast(),
            anchors: anchors.ptr(0),
            anchor_positions: positions.ptr(0),
            temperature: temperature.ptr(0),
            seeds: seeds.ptr(0),
            mask: mask.as_ref().map_or(std::ptr::null(), |mask| mask.ptr(0)),
            draft_tokens: tokens.mut_ptr(0),
            log_normalizers: log_normalizers.mut_ptr(0),
            latents: latents.mut_ptr(0).cast(),
            stride_logits_row: vocab_size as i64,
            ..empty_full()
        };
        draft_full(device, params);
        let bits = download(&log_normalizers).into_iter().map(f32::to_bits);
        (download(&tokens), bits.collect())
    }
}

#[test]
fn a_mask_is_base_logits_of_minus_infinity() {
    let Some(device) = device() else { return };
    let case = |head, num_reqs, vocab_size, rank| Case {
        head,
        num_reqs,
        vocab_size,
        rank,
    };
    for case in [
        case(sys::DSPARK_HEAD_NONE, 3, 1031, 0),
        case(sys::DSPARK_HEAD_VANILLA, 3, 1031, 64),
        case(sys::DSPARK_HEAD_VANILLA, 3, 1028, 64),
        case(sys::DSPARK_HEAD_VANILLA, 33, 260, 256),
        case(sys::DSPARK_HEAD_VANILLA, 70, 132, 64),
    ] {
        let label = format!("vocab {} reqs {}", case.vocab_size, case.num_reqs);
        let (base, mask) = (case.base(), case.mask());
        let words = case.vocab_size.div_ceil(32);
        let mut forbidden = base.clone();
        for (i, value) in forbidden.iter_mut().enumerate() {
            let (row, token) = (i / case.vocab_size, i % case.vocab_size);
            if mask[row * words + token / 32] >> (token % 32) & 1 == 0 {
                *value = f32::NEG_INFINITY;
            }
        }
        let got = case.run(&device, &base, Some(&mask));
        let want = case.run(&device, &forbidden, None);
        assert!(got == want, "{label}");
        assert_eq!(got.0[1], 0, "{label}: everything forbidden");
        assert_eq!(got.0[2] as usize, case.vocab_size - 1, "{label}");
        let free = case.run(&device, &base, None);
        assert!(got.0 != free.0, "{label}: the mask changed nothing");
    }
}
