//! A target's cache in fp8, end to end on the CPU: what is generated over it is the text of plain decoding over the same
//! cache, whatever the drafter; its factors come from the checkpoint; what cannot be used is refused by name.

mod cli_support;
mod end_to_end_support;
mod model_support;

use std::path::Path;

use cli_support::{Copy, TempFile, assert_refused, dspark, stdout};
use dspark::engine::Completion;
use dspark::model::{DecoderTarget, TargetConfig, kv_scales};
use dspark::ops::{KvDtype, Rule};
use dspark::schedule::Policy;
use end_to_end_support::*;
use model_support::{DRAFTERS, drafter_dir, limits, reference, target_dir};
use serde_json::json;

const NUM_TOKENS: usize = 24;

/// A copy of a golden target with these tensors of f32 beside its own.
fn with_tensors(target: &str, tensors: &[(String, Vec<usize>, Vec<f32>)]) -> Copy {
    Copy::of(target_dir(target).to_str().unwrap()).edit_bytes(|bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: serde_json::Map<_, _> =
            serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let mut data = bytes[8 + length..].to_vec();
        for (name, shape, values) in tensors {
            let start = data.len();
            data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            let offsets = [start, data.len()];
            let tensor = json!({"dtype": "F32", "shape": shape, "data_offsets": offsets});
            header.insert(name.clone(), tensor);
        }
        let header = serde_json::to_vec(&header).unwrap();
        *bytes = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
    })
}

fn num_layers(target: &str) -> usize {
    let config = TargetConfig::read(&target_dir(target)).unwrap();
    config.decoder.num_layers
}

/// A copy of a golden target with the same factor of keys and of values in every layer.
fn with_scales(target: &str, keys: f32, values: f32) -> Copy {
    let layer = |i: usize| {
        let name = |side| format!("model.layers.{i}.self_attn.{side}_scale");
        [
            (name('k'), vec![1], vec![keys]),
            (name('v'), vec![], vec![values]),
        ]
    };
    let tensors: Vec<_> = (0..num_layers(target)).flat_map(layer).collect();
    with_tensors(target, &tensors)
}

/// Completions over a cache of a type.
fn run(setting: Setting, asks: &[Ask], target: &Path, kv_dtype: KvDtype) -> Vec<Completion> {
    let engine = setting.engine_on(reference(), asks, (target, kv_dtype));
    setting.run_on(engine, asks, |_, _| ())
}

fn greedy_asks(target: &str) -> Vec<Ask> {
    let prompts = golden_prompts(target);
    prompts
        .into_iter()
        .map(|(prompt, _)| Ask::greedy(prompt, NUM_TOKENS))
        .collect()
}

/// Every drafter, draft length and batch; greedy, and sampled by the coupled rule.
#[test]
fn text_over_fp8_is_that_of_plain_decoding_over_fp8() {
    for drafter in DRAFTERS.into_iter().chain(["qwen3_mtp"]) {
        let models = Models::of_drafter(drafter);
        let copy = with_scales(models.target, 0.03, 0.7);
        let target = Path::new(copy.path());
        let mut asks = greedy_asks(models.target);
        for seed in 0..3 {
            let prompt = asks[seed as usize % 2].prompt.clone();
            let mut ask = Ask::sampled(prompt, NUM_TOKENS, 0.8, seed);
            ask.sampling.rule = Rule::Coupled;
            asks.push(ask);
        }
        let plain = Setting::plain(models.target);
        let expected = tokens(&run(plain, &asks, target, KvDtype::Fp8));
        let mut accepted = 0;
        for draft_len in models.draft_lens() {
            for batch in BATCHES {
                let setting = Setting {
                    models,
                    draft_len,
                    policy: Policy::Fixed,
                    batch,
                };
                let found = run(setting, &asks, target, KvDtype::Fp8);
                accepted += found
                    .iter()
                    .flat_map(|c| &c.rounds)
                    .filter(|r| r.num_accepted > 0)
                    .count();
                assert_eq!(tokens(&found), expected, "{drafter}, {setting:?}");
            }
        }
        assert!(accepted > 0, "{drafter}: no draft was ever accepted");
    }
}

/// Second choices are committed from the same cache.
#[test]
fn trees_over_fp8_are_committed_as_they_stand() {
    let copy = with_scales("qwen3_bf16", 0.03, 0.7);
    let draft = drafter_dir("qwen3_vanilla");
    let lines: Vec<String> = golden_prompts("qwen3_bf16")
        .iter()
        .map(|(prompt, _)| json!({"prompt_ids": prompt}).to_string())
        .collect();
    let prompts = TempFile::new(&lines.join("\n"));
    let trace = TempFile::new("");
    let common = [
        "generate",
        "--target",
        copy.path(),
        "--prompts",
        prompts.path(),
        "--kv-dtype",
        "fp8",
        "--max-new-tokens",
        "24",
        "--ignore-eos",
    ];
    let trees = [
        "--draft",
        draft.to_str().unwrap(),
        "--head-form",
        "candidates:8",
        "--alternates",
        "3",
        "--trace",
        trace.path(),
    ];
    assert_eq!(stdout(&[&common[..], &trees].concat()), stdout(&common));
    let rounds = std::fs::read_to_string(trace.path()).unwrap();
    let kept =
        rounds.matches("\"alternate\":").count() - rounds.matches("\"alternate\":null").count();
    assert!(kept > 0, "no second choice was kept: {rounds}");
}

/// The comparison can fail: other factors are another model, and the native cache is.
#[test]
fn other_factors_give_other_text() {
    let models = Models::of_drafter("qwen3_vanilla");
    let asks = greedy_asks(models.target);
    let plain = Setting::plain(models.target);
    let [fine, coarse] = [0.03, 40.0].map(|scale| with_scales(models.target, scale, scale));
    let text = |copy: &Copy, kv_dtype| tokens(&run(plain, &asks, Path::new(copy.path()), kv_dtype));
    assert_ne!(text(&fine, KvDtype::Fp8), text(&coarse, KvDtype::Fp8));
    assert_eq!(text(&fine, KvDtype::Native), text(&coarse, KvDtype::Native));
    let drafting = Setting {
        models,
        draft_len: 7,
        policy: Policy::Fixed,
        batch: Batch::Together,
    };
    let drafted = run(drafting, &asks, Path::new(coarse.path()), KvDtype::Fp8);
    assert_ne!(tokens(&drafted), text(&fine, KvDtype::Fp8));

    let prompt = &asks[1].prompt;
    let logits = |kv_dtype| next_logits_on(reference(), (Path::new(fine.path()), kv_dtype), prompt);
    let (native, fp8) = (logits(KvDtype::Native), logits(KvDtype::Fp8));
    let largest = native.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    let difference = native.iter().zip(&fp8).map(|(a, b)| (a - b).abs());
    let difference = difference.fold(0.0_f32, f32::max);
    assert!(difference > 0.0, "the cache was not rounded");
    assert!(difference < 0.2 * largest, "{difference} of {largest}");
}

#[test]
fn factors_are_found_by_every_name_they_go_by() {
    let target = "qwen3_bf16";
    let geometry = TargetConfig::read(&target_dir(target)).unwrap();
    let num_heads = geometry.decoder.num_kv_heads;
    assert_eq!(kv_scales(&target_dir(target)).unwrap(), None);
    for [keys, values] in [
        ["self_attn.k_scale", "self_attn.v_scale"],
        ["self_attn.attn.k_scale", "self_attn.attn.v_scale"],
        ["self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"],
        [
            "self_attn.k_proj.output_scale",
            "self_attn.v_proj.output_scale",
        ],
    ] {
        let layer = |i: usize| {
            let heads: Vec<f32> = (0..num_heads)
                .map(|head| (1 + 4 * i + head) as f32)
                .collect();
            [
                (format!("model.layers.{i}.{keys}"), vec![num_heads], heads),
                (format!("model.layers.{i}.{values}"), vec![1], vec![0.5]),
            ]
        };
        let tensors: Vec<_> = (0..num_layers(target)).flat_map(layer).collect();
        let copy = with_tensors(target, &tensors);
        let scales = kv_scales(Path::new(copy.path())).unwrap().unwrap();
        let (keys, values) = scales.of_layer(1);
        let want: Vec<f32> = (0..num_heads).map(|head| (5 + head) as f32).collect();
        assert_eq!((keys, values), (&*want, &*vec![0.5; num_heads]));
    }
    let shared = |i: usize| {
        (
            format!("model.layers.{i}.self_attn.kv_scale"),
            vec![],
            vec![2.0],
        )
    };
    let tensors: Vec<_> = (0..num_layers(target)).map(shared).collect();
    let copy = with_tensors(target, &tensors);
    let scales = kv_scales(Path::new(copy.path())).unwrap().unwrap();
    let twos = vec![2.0; num_heads];
    assert_eq!(scales.of_layer(0), (&*twos, &*twos));
}

#[test]
fn factors_that_cannot_be_used_are_named() {
    let load = |copy: &Copy| {
        let dir = Path::new(copy.path());
        DecoderTarget::load_with_kv(&mut reference(), dir, &limits(), &[], KvDtype::Fp8).map(|_| ())
    };
    let name = |side: &str| format!("model.layers.1.self_attn.{side}_scale");
    let (k, v) = (name("k"), name("v"));
    for (tensors, field) in [
        (vec![(k.clone(), vec![1], vec![0.0])], &k),
        (vec![(k.clone(), vec![1], vec![-1.0])], &k),
        (vec![(k.clone(), vec![1], vec![f32::NAN])], &k),
        (vec![(k.clone(), vec![1], vec![1e-42])], &k),
        (vec![(k.clone(), vec![7], vec![1.0; 7])], &k),
        // Of layer 1 alone, and of its keys alone.
        (
            vec![(k.clone(), vec![1], vec![1.0])],
            &"layers.0.self_attn.k_scale".to_owned(),
        ),
        (
            (0..num_layers("qwen3_bf16"))
                .map(|i| {
                    (
                        format!("model.layers.{i}.self_attn.k_scale"),
                        vec![1],
                        vec![1.0],
                    )
                })
                .collect(),
            &"layers.0.self_attn.v_scale".to_owned(),
        ),
        (
            vec![
                (k.clone(), vec![1], vec![1.0]),
                (v.clone(), vec![0], vec![]),
            ],
            &v,
        ),
    ] {
        let copy = with_tensors("qwen3_bf16", &tensors);
        let error = load(&copy).unwrap_err().to_string();
        assert!(error.contains(field.as_str()), "{tensors:?}: {error}");
        assert!(error.contains("model.safetensors"), "{error}");
    }
}

/// A checkpoint whose cache alone is quantised is one of 16-bit weights; any other is still refused.
#[test]
fn checkpoints_of_an_fp8_cache_are_taken() {
    let scheme = json!({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": false});
    let of = |groups: serde_json::Value, scheme: &serde_json::Value| {
        let config = json!({"quant_method": "compressed-tensors", "config_groups": groups,
            "kv_cache_scheme": scheme});
        with_scales("qwen3_bf16", 0.03, 0.7)
            .edit_config(|map| drop(map.insert("quantization_config".into(), config)))
    };
    let read = |copy: &Copy| TargetConfig::read(Path::new(copy.path())).map(|_| ());
    read(&of(json!({}), &scheme)).unwrap();
    let mut ints = scheme.clone();
    ints["type"] = "int".into();
    let mut dynamic = scheme.clone();
    dynamic["dynamic"] = true.into();
    for bad in [
        of(json!({"group_0": {"weights": {"num_bits": 8}}}), &scheme),
        of(json!({}), &ints),
        of(json!({}), &dynamic),
        of(json!({}), &json!(null)),
    ] {
        let error = read(&bad).unwrap_err().to_string();
        assert!(error.contains("quantization_config"), "{error}");
    }
}

#[test]
fn the_program_says_which_cache_it_has() {
    let copy = with_scales("qwen3_bf16", 0.03, 0.7);
    let bare = target_dir("qwen3_bf16");
    let bare = bare.to_str().unwrap();
    let draft = drafter_dir("qwen3_vanilla");
    let common = [
        "--prompt-ids",
        "1,2,3",
        "--max-new-tokens",
        "8",
        "--kv-dtype",
        "fp8",
    ];
    let text = |more: &[&str]| {
        let args = [&["generate", "--target", copy.path()], &common[..], more].concat();
        stdout(&args)
    };
    let plain = text(&[]);
    assert_eq!(text(&["--draft", draft.to_str().unwrap()]), plain);
    let args = [
        &["generate", "--stats", "--target", copy.path()],
        &common[..],
    ]
    .concat();
    let run = dspark(&args);
    assert!(run.stderr.contains("KV cache in fp8"), "{run:?}");
    let args = [
        "generate",
        "--target",
        bare,
        "--prompt-ids",
        "1",
        "--kv-dtype",
        "e5m2",
    ];
    assert_refused(&args, &["--kv-dtype", "native or fp8"]);

    let doctor = |target: &str| stdout(&["doctor", "--device", "cpu", "--target", target]);
    assert!(doctor(copy.path()).contains("with the checkpoint's factors"));
    assert!(doctor(bare).contains("with factors of 1"));
}

/// A cost belongs to the cache it was measured with.
#[test]
fn costs_of_another_cache_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("cost.json");
    let file = file.to_str().unwrap();
    let target = target_dir("qwen3_bf16");
    let draft = drafter_dir("qwen3_vanilla");
    let run = |kv_dtype: &'static str| {
        let args = [
            "generate",
            "--target",
            target.to_str().unwrap(),
            "--draft",
            draft.to_str().unwrap(),
            "--prompt-ids",
            "1,2,3",
            "--max-new-tokens",
            "4",
            "--schedule",
            "algorithm1",
            "--cost",
            file,
            "--kv-dtype",
            kv_dtype,
        ];
        dspark(&args)
    };
    assert_eq!(run("native").status, Some(0));
    assert_eq!(run("native").status, Some(0));
    let refused = run("fp8");
    assert_eq!(refused.status, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("cost.json"), "{refused:?}");
}
