//! Targets against Hugging Face transformers on tiny random checkpoints.

mod model_support;

use std::path::Path;

use dspark::model::{DecoderTarget, Target, TargetConfig};
use dspark::ops::Ops;
use model_support::*;
use serde_json::{Value, json};

const TOLERANCE: f32 = 1e-4;

fn prompts(golden: &Golden) -> Vec<Vec<u32>> {
    golden
        .list("prompts")
        .iter()
        .map(|p| ids(&p["ids"]))
        .collect()
}

fn tap_ids(golden: &Golden) -> Vec<i32> {
    let ids = golden.list("tap_ids").iter();
    ids.map(|id| id.as_i64().unwrap() as i32).collect()
}

#[test]
fn rope_frequencies_agree_with_transformers() {
    for name in TARGETS {
        let dir = target_dir(name);
        let config = TargetConfig::read(&dir).unwrap();
        let golden = Golden::read(&dir);
        let (found, expected) = (&config.decoder.rope.inv_freq, golden.tensor("inv_freq"));
        assert_eq!(found.len(), expected.len(), "{name}");
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() <= 2e-6 * e, "{name}: {f} against {e}");
        }
    }
}

#[test]
fn linear_rope_divides_every_frequency() {
    let (plain, dir) = (target_dir("llama_bf16"), tempfile::tempdir().unwrap());
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(plain.join("config.json")).unwrap()).unwrap();
    config["rope_scaling"] = json!({"type": "linear", "factor": 4.0});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let frequencies = |dir: &Path| TargetConfig::read(dir).unwrap().decoder.rope.inv_freq;
    let expected: Vec<f32> = frequencies(&plain).iter().map(|f| f / 4.0).collect();
    assert_eq!(frequencies(dir.path()), expected);
}

#[test]
fn ragged_prefill_agrees_with_transformers() {
    for name in TARGETS {
        let dir = target_dir(name);
        let golden = Golden::read(&dir);
        let (mut ops, prompts, taps) = (reference(), prompts(&golden), tap_ids(&golden));
        let mut target = DecoderTarget::load(&mut ops, &dir, &limits(), &taps).unwrap();
        let map = prefill(&mut ops, &mut target, &prompts);
        let d = target.config().decoder.hidden_size;
        let (logits, features) = (logits(&mut ops, &target), target.features());
        let hidden = ops.read_mat(features.hidden).unwrap();
        let tapped = ops.read_mat(features.taps.unwrap()).unwrap();
        for (i, prompt) in golden.list("prompts").iter().enumerate() {
            let rows = map.rows_of(i);
            let first = rows.start + prompt["logits_first_position"].as_u64().unwrap() as usize;
            let (what, n) = (format!("{name} prompt{i}"), rows.len());
            let of_prompt = logits[first..rows.end].concat();
            let expected = golden.tensor(&format!("prompt{i}.logits"));
            assert_close(&format!("{what} logits"), &of_prompt, expected, TOLERANCE);
            let expected = golden.tensor(&format!("prompt{i}.final_hidden"));
            let of_prompt = &hidden[rows.start * d..rows.end * d];
            assert_close(&format!("{what} hidden"), of_prompt, expected, TOLERANCE);
            let expected = golden.tensor(&format!("prompt{i}.taps"));
            for (t, tap) in expected.chunks(n * d).enumerate() {
                let row = |row: usize| &tapped[(row * taps.len() + t) * d..][..d];
                let of_tap = rows.clone().map(row).collect::<Vec<_>>().concat();
                assert_close(&format!("{what} tap {}", taps[t]), &of_tap, tap, TOLERANCE);
            }
        }
    }
}

/// Prompts in chunks, then one token of each request a pass; only the logits of each request's last row are asked for.
#[test]
fn chunked_prefill_and_greedy_decoding_agree_with_transformers() {
    const CHUNK: usize = 5;
    for name in TARGETS {
        let dir = target_dir(name);
        let golden = Golden::read(&dir);
        let (mut ops, prompts) = (reference(), prompts(&golden));
        let mut target = DecoderTarget::load(&mut ops, &dir, &limits(), &[]).unwrap();
        let mut sequences = prompts.clone();
        let mut done = vec![0; prompts.len()];
        let last = prompts.iter().map(Vec::len).max().unwrap() + 24;
        while done.iter().any(|&n| n < last) {
            let (mut requests, mut pass, mut ends) = (Vec::new(), Vec::new(), Vec::new());
            for (r, sequence) in sequences.iter().enumerate() {
                let rows = (sequence.len() - done[r]).min(CHUNK);
                requests.push((r, rows, done[r]));
                pass.extend_from_slice(&sequence[done[r]..done[r] + rows]);
                ends.push(pass.len() as u32 - 1);
                done[r] += rows;
            }
            let map = row_map(&requests);
            target.forward(&mut ops, &pass, &map, Some(&ends)).unwrap();
            let next = logits(&mut ops, &target);
            for (r, sequence) in sequences.iter_mut().enumerate() {
                if done[r] == sequence.len() {
                    sequence.push(argmax(&next[r]));
                }
            }
        }
        for (r, prompt) in golden.list("prompts").iter().enumerate() {
            let generated = &sequences[r][prompts[r].len()..][..24];
            assert_eq!(generated, ids(&prompt["greedy"]), "{name} prompt{r}");
        }
    }
}

#[test]
fn taps_that_do_not_exist_are_refused() {
    let mut ops = reference();
    let dir = target_dir("qwen3_bf16");
    for ids in [&[3][..], &[-2], &[0, 0]] {
        let error = DecoderTarget::load(&mut ops, &dir, &limits(), ids)
            .err()
            .unwrap();
        let line = error.to_string();
        assert!(
            line.starts_with(
                "tap_ids: expected different layer ids from -1 (the embedding) to 2, found"
            ),
            "{line}"
        );
    }
}
