//! Checkpoints that do not fit are refused in one line with the file, the field, what was expected and what was found.

mod model_support;

use std::path::Path;

use dspark::model::{
    DSparkDrafter, DecoderTarget, DrafterConfig, GenerationConfig, MtpDrafter, Pair, TargetConfig,
};
use dspark::reference::Reference;
use model_support::*;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A copy of a golden checkpoint, to be broken.
fn copy_of(dir: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    copy
}

fn edit_json(file: &Path, edit: impl FnOnce(&mut Map<String, Value>)) {
    let mut map = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    edit(&mut map);
    std::fs::write(file, serde_json::to_vec(&map).unwrap()).unwrap();
}

/// Changes the header and the data of a safetensors file as they stand, valid or not.
fn edit_weights(file: &Path, edit: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>)) {
    let bytes = std::fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut data = bytes[8 + length..].to_vec();
    edit(&mut header, &mut data);
    let header = serde_json::to_vec(&header).unwrap();
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(file, [&length[..], &header, &data].concat()).unwrap();
}

fn offset_of(header: &Map<String, Value>, name: &str) -> usize {
    header[name]["data_offsets"][0].as_u64().unwrap() as usize
}

/// The one line must hold every part.
fn assert_line(case: &str, result: Result<(), dspark::Error>, parts: &[&str]) {
    let line = result.expect_err(case).to_string();
    assert_eq!(line.lines().count(), 1, "{case}: {line}");
    for part in parts {
        assert!(line.contains(part), "{case}: no {part:?} in: {line}");
    }
}

fn load_target(dir: &Path) -> Result<(), dspark::Error> {
    DecoderTarget::load(&mut reference(), dir, &limits(), &[]).map(|_| ())
}

fn load_pair(target: &Path, draft: &Path) -> Result<(), dspark::Error> {
    Pair::<Reference>::load(&mut reference(), target, Some(draft), &limits()).map(|_| ())
}

#[test]
fn the_unbroken_checkpoints_load() {
    load_target(copy_of(&target_dir("llama_f32")).path()).unwrap();
    for name in DRAFTERS.iter().chain(&["qwen3_mtp"]) {
        let target = if name.starts_with("llama") {
            "llama_bf16"
        } else {
            "qwen3_bf16"
        };
        load_pair(&target_dir(target), copy_of(&drafter_dir(name)).path()).unwrap();
    }
}

#[test]
fn broken_weight_files_are_refused() {
    const NORM: &str = "model.norm.weight";
    let check = |case: &str, break_it: &dyn Fn(&Path), parts: &[&str]| {
        let dir = copy_of(&target_dir("llama_f32"));
        break_it(&dir.path().join(WEIGHTS));
        assert_line(case, load_target(dir.path()), parts);
    };
    let whole = "model.safetensors: header: expected a complete safetensors file, found ";
    let truncate = |to: usize| {
        move |file: &Path| {
            let bytes = std::fs::read(file).unwrap();
            std::fs::write(file, &bytes[..to.min(bytes.len() - 1)]).unwrap();
        }
    };
    check(
        "one byte short",
        &truncate(usize::MAX),
        &[whole, "not fully covered"],
    );
    check(
        "cut in the header",
        &truncate(100),
        &[whole, "invalid header length (100 bytes)"],
    );
    check(
        "cut in the length",
        &truncate(5),
        &[whole, "header too small (5 bytes)"],
    );
    check(
        "empty",
        &truncate(0),
        &[whole, "header too small (0 bytes)"],
    );
    let absurd = |file: &Path| {
        let mut bytes = std::fs::read(file).unwrap();
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(file, bytes).unwrap();
    };
    check(
        "absurd header length",
        &absurd,
        &[whole, "header too large"],
    );
    let overlap = |file: &Path| {
        edit_weights(file, |header, _| {
            let shared = header["model.layers.0.input_layernorm.weight"]["data_offsets"].clone();
            header[NORM]["data_offsets"] = shared;
        });
    };
    check(
        "overlapping tensors",
        &overlap,
        &[whole, "invalid offset for tensor"],
    );
    let not_json = |file: &Path| std::fs::write(file, b"\x02\0\0\0\0\0\0\0{]").unwrap();
    check(
        "header is no JSON",
        &not_json,
        &[whole, "invalid JSON in header"],
    );
    let rename = |file: &Path| {
        edit_weights(file, |header, _| {
            let norm = header.remove(NORM).unwrap();
            header.insert("model.other.weight".into(), norm);
        });
    };
    let parts =
        ["model.safetensors: model.norm.weight: expected a tensor of shape [32], found none"];
    check("missing tensor", &rename, &parts);
    let reshape = |file: &Path| {
        edit_weights(file, |header, _| header[NORM]["shape"] = json!([4, 8]));
    };
    check(
        "wrong shape",
        &reshape,
        &["model.norm.weight: expected shape [32], found [4, 8]"],
    );
    let retype = |file: &Path| edit_weights(file, |header, _| header[NORM]["dtype"] = json!("I32"));
    check(
        "wrong dtype",
        &retype,
        &["model.norm.weight: expected dtype BF16, F16 or F32, found I32"],
    );
    for value in [f32::NAN, f32::NEG_INFINITY] {
        let poison = |file: &Path| {
            edit_weights(file, |header, data| {
                let at = offset_of(header, NORM) + 4 * 5;
                data[at..at + 4].copy_from_slice(&value.to_le_bytes());
            });
        };
        let parts =
            ["model.norm.weight: expected finite numbers, found NaN or infinity at element 5"];
        check("not finite", &poison, &parts);
    }
    let remove = |file: &Path| std::fs::remove_file(file).unwrap();
    check(
        "no weights",
        &remove,
        &["weights: expected model.safetensors or", "found neither"],
    );
}

#[test]
fn non_finite_bf16_weights_are_refused() {
    const NAME: &str = "model.layers.1.mlp.down_proj.weight";
    let dir = copy_of(&target_dir("qwen3_bf16"));
    edit_weights(&dir.path().join(WEIGHTS), |header, data| {
        let at = offset_of(header, NAME) + 2 * 77;
        data[at..at + 2].copy_from_slice(&half::bf16::INFINITY.to_le_bytes());
    });
    let found = format!("{NAME}: expected finite numbers, found NaN or infinity at element 77");
    assert_line("bf16 infinity", load_target(dir.path()), &[&found]);
}

#[test]
fn broken_shards_are_refused() {
    const NORM: &str = "model.norm.weight";
    const SECOND: &str = "model-00002-of-00002.safetensors";
    let check = |case: &str, break_it: &dyn Fn(&Path), parts: &[&str]| {
        let dir = copy_of(&target_dir("qwen3_f32"));
        break_it(dir.path());
        assert_line(case, load_target(dir.path()), parts);
    };
    let point_norm_to = |file: &'static str| {
        move |dir: &Path| {
            edit_json(&dir.join(INDEX), |index| {
                index["weight_map"][NORM] = json!(file);
            });
        }
    };
    let remove = |dir: &Path| std::fs::remove_file(dir.join(SECOND)).unwrap();
    check(
        "missing shard",
        &remove,
        &[INDEX, "weight_map.", "expected a file in", SECOND],
    );
    let parts = [
        INDEX,
        "weight_map.model.norm.weight: expected a file in",
        "found no.safetensors",
    ];
    check(
        "index names no file",
        &point_norm_to("no.safetensors"),
        &parts,
    );
    let parts = [
        "weight_map.model.norm.weight",
        "found ../model-00002-of-00002.safetensors",
    ];
    check(
        "index leaves the directory",
        &point_norm_to("../model-00002-of-00002.safetensors"),
        &parts,
    );
    let parts = ["expected a tensor of model-00001-of-00002.safetensors, found a file without it"];
    check(
        "wrong shard",
        &point_norm_to("model-00001-of-00002.safetensors"),
        &parts,
    );
    let unlist = |dir: &Path| {
        edit_json(&dir.join(INDEX), |index| {
            index["weight_map"].as_object_mut().unwrap().remove(NORM);
        });
    };
    let parts = [
        INDEX,
        "model.norm.weight: expected a tensor of shape [32], found none",
    ];
    check("unlisted tensor", &unlist, &parts);
    let garble = |dir: &Path| std::fs::write(dir.join(INDEX), "[1]").unwrap();
    check(
        "index is no object",
        &garble,
        &[INDEX, "weight_map: expected an object"],
    );
}

#[test]
fn target_configs_that_do_not_fit_are_refused() {
    let cases: &[(&str, Value, &str)] = &[
        (
            "architectures",
            json!(["Gemma2ForCausalLM"]),
            "expected Qwen3ForCausalLM or LlamaForCausalLM, found [\"Gemma2ForCausalLM\"]",
        ),
        (
            "architectures",
            json!([]),
            "expected a list of one name, found []",
        ),
        (
            "hidden_size",
            json!(0),
            "expected a whole number from 1 to 2147483647, found 0",
        ),
        ("hidden_size", json!("32"), "found \"32\""),
        ("vocab_size", Value::Null, "found nothing"),
        ("num_hidden_layers", json!(-1), "found -1"),
        (
            "num_hidden_layers",
            json!(1e12),
            "expected a whole number from 1",
        ),
        (
            "num_key_value_heads",
            json!(3),
            "expected a divisor of num_attention_heads 2, found 3",
        ),
        (
            "head_dim",
            json!(63),
            "expected an even number above 0, found 63",
        ),
        ("rms_norm_eps", json!(0.0), "expected a number > 0, found 0"),
        ("attention_bias", json!(true), "expected false, found true"),
        ("mlp_bias", json!(true), "expected false, found true"),
        ("hidden_act", json!("gelu"), "expected silu, found \"gelu\""),
        (
            "sliding_window",
            json!(4096),
            "expected none in use, found 4096",
        ),
        (
            "layer_types",
            json!(["sliding_attention"]),
            "expected full_attention in every layer",
        ),
        (
            "quantization_config",
            json!({"bits": 4}),
            "expected none (bf16, f16 or f32 weights)",
        ),
        ("rope_parameters", json!(7), "expected an object, found 7"),
        ("partial_rotary_factor", json!(0.5), "expected 1, found 0.5"),
    ];
    for (key, value, found) in cases {
        let dir = copy_of(&target_dir("llama_f32"));
        let file = dir.path().join("config.json");
        edit_json(&file, |config| {
            _ = config.insert((*key).to_owned(), value.clone());
        });
        let result = TargetConfig::read(dir.path()).map(|_| ());
        assert_line(
            key,
            result,
            &[&format!("config.json: {key}: expected "), found],
        );
    }
}

#[test]
fn other_rope_types_are_refused_by_name() {
    let parameters = |key: &str, rope: Value, expected: &str| {
        let dir = copy_of(&target_dir("llama_bf16"));
        edit_json(&dir.path().join("config.json"), |config| {
            _ = config.insert(key.into(), rope);
        });
        assert_line(key, load_target(dir.path()), &[expected]);
    };
    let expected = "expected default, linear or llama3, found \"yarn\"";
    parameters(
        "rope_parameters",
        json!({"rope_type": "yarn"}),
        &format!("rope_parameters.rope_type: {expected}"),
    );
    parameters(
        "rope_scaling",
        json!({"type": "yarn"}),
        &format!("rope_scaling.type: {expected}"),
    );
    let missing = "rope_scaling.low_freq_factor: expected a number > 0, found nothing";
    parameters(
        "rope_scaling",
        json!({"rope_type": "llama3", "factor": 8.0}),
        missing,
    );
}

#[test]
fn a_directory_without_config_names_the_file() {
    let dir = tempfile::tempdir().unwrap();
    assert_line(
        "no config",
        load_target(dir.path()),
        &["config.json: No such file"],
    );
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert_line(
        "no JSON",
        load_target(dir.path()),
        &["config.json: JSON: expected an object, found"],
    );
}

#[test]
fn drafters_that_do_not_fit_are_refused() {
    let cases: &[(&str, Value, &str)] = &[
        (
            "speculators_model_type",
            json!("dspark"),
            "expected a drafter in DeepSpec format, not speculators format, found \"dspark\"",
        ),
        (
            "speculators_config",
            json!({"a": 1}),
            "not speculators format, found {\"a\":1}",
        ),
        (
            "architectures",
            json!(["Qwen3Eagle3Model"]),
            "expected Qwen3DSparkModel, Qwen3MTPModel or",
        ),
        (
            "architectures",
            json!(["Qwen3ForCausalLM"]),
            "a target with mtp.* weights, found [\"Qwen3ForCausalLM\"]",
        ),
        (
            "markov_head_type",
            json!("lstm"),
            "expected vanilla, gated or rnn, found \"lstm\"",
        ),
        (
            "markov_head_type",
            Value::Null,
            "expected vanilla, gated or rnn, found nothing",
        ),
        (
            "markov_rank",
            json!(-4),
            "expected a whole number >= 0, found -4",
        ),
        (
            "block_size",
            json!(0),
            "expected a whole number from 1 to 2147483647, found 0",
        ),
        (
            "mask_token_id",
            json!(331),
            "expected a token below vocab_size 331, found 331",
        ),
        (
            "target_layer_ids",
            json!([0, 1, 3]),
            "expected increasing layer ids from -1 (the embedding) to 2, found [0,1,3]",
        ),
        ("target_layer_ids", json!([]), "found []"),
        ("target_layer_ids", json!([1, 0]), "found [1,0]"),
        ("target_layer_ids", json!([-2]), "found [-2]"),
        (
            "num_target_layers",
            json!(36),
            "expected the target's 4, found 36",
        ),
        (
            "hidden_size",
            json!(128),
            "expected the target's 96, found 128",
        ),
        (
            "vocab_size",
            json!(400),
            "expected the target's 331, found 400",
        ),
        (
            "enable_confidence_head",
            Value::Null,
            "expected true or false, found nothing",
        ),
    ];
    for (key, value, found) in cases {
        let dir = copy_of(&drafter_dir("qwen3_vanilla"));
        let file = dir.path().join("config.json");
        edit_json(&file, |config| {
            _ = config.insert((*key).to_owned(), value.clone());
        });
        let result = load_pair(&target_dir("qwen3_bf16"), dir.path());
        assert_line(
            key,
            result,
            &[&format!("config.json: {key}: expected "), found],
        );
    }
}

#[test]
fn a_drafter_of_another_target_is_refused() {
    let result = load_pair(&target_dir("llama_bf16"), &drafter_dir("qwen3_vanilla"));
    assert_line(
        "sizes",
        result,
        &["hidden_size: expected the target's 192, found 96"],
    );

    // Same sizes, other weights: what a drafter stores of its target tells.
    for (name, of_target) in [
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ] {
        let dir = copy_of(&drafter_dir("qwen3_vanilla"));
        edit_weights(&dir.path().join(WEIGHTS), |header, data| {
            let at = offset_of(header, name) + 2 * 96 * 330;
            data[at] ^= 1;
        });
        let expected =
            format!("{name}: expected the target's {of_target}, found other numbers in row 330");
        let result = load_pair(&target_dir("qwen3_bf16"), dir.path());
        assert_line(name, result, &["model.safetensors", &expected]);
    }

    // A reduced draft vocabulary shows in the head's shape.
    let dir = copy_of(&drafter_dir("qwen3_vanilla"));
    edit_weights(&dir.path().join(WEIGHTS), |header, _| {
        header["lm_head.weight"]["shape"] = json!([96, 331]);
    });
    let result = load_pair(&target_dir("qwen3_bf16"), dir.path());
    assert_line(
        "shape",
        result,
        &["lm_head.weight: expected shape [331, 96], found [96, 331]"],
    );
}

#[test]
fn missing_drafter_tensors_are_named() {
    let tensors = [
        ("qwen3_vanilla", "fc.weight"),
        ("qwen3_vanilla", "markov_head.markov_w2.weight"),
        ("qwen3_vanilla", "confidence_head.proj.bias"),
        ("qwen3_vanilla", "layers.1.self_attn.q_norm.weight"),
        ("qwen3_gated", "markov_head.gate_proj.bias"),
        ("qwen3_rnn", "markov_head.joint_proj.weight"),
        ("qwen3_mtp", "mtp.pre_fc_norm_hidden.weight"),
        ("qwen3_mtp", "mtp.layers.0.self_attn.k_norm.weight"),
    ];
    for (drafter, tensor) in tensors {
        let dir = copy_of(&drafter_dir(drafter));
        edit_weights(&dir.path().join(WEIGHTS), |header, _| {
            let moved = header.remove(tensor).unwrap();
            header.insert("elsewhere".into(), moved);
        });
        let result = load_pair(&target_dir("qwen3_bf16"), dir.path());
        assert_line(
            tensor,
            result,
            &[
                "model.safetensors",
                &format!("{tensor}: expected a tensor"),
                "found none",
            ],
        );
    }
}

#[test]
fn a_drafter_of_another_kind_is_refused() {
    let (mut ops, dir) = (reference(), target_dir("qwen3_bf16"));
    let target = DecoderTarget::load(&mut ops, &dir, &limits(), &[]).unwrap();
    let result = DSparkDrafter::load(&mut ops, &target, &drafter_dir("qwen3_mtp"), &limits());
    assert_line(
        "mtp",
        result.map(|_| ()),
        &["architectures: expected Qwen3DSparkModel, found an MTP module"],
    );
    let result = MtpDrafter::load(&mut ops, &target, &drafter_dir("qwen3_rnn"), &limits());
    assert_line(
        "dspark",
        result.map(|_| ()),
        &["architectures: expected an MTP module, found Qwen3DSparkModel"],
    );
}

/// An MTP module may sit in its target's own files.
#[test]
fn a_target_with_mtp_weights_is_its_own_drafter() {
    let dir = copy_of(&target_dir("qwen3_bf16"));
    edit_weights(&dir.path().join(WEIGHTS), |header, data| {
        let of_layer: Vec<_> = header
            .iter()
            .filter(|(name, _)| name.starts_with("model.layers.0."))
            .collect();
        let mut added: Vec<(String, Value, Vec<u8>)> = of_layer
            .into_iter()
            .map(|(name, info)| {
                let at = |i: usize| info["data_offsets"][i].as_u64().unwrap() as usize;
                (
                    name.replace("model.", "mtp."),
                    info["shape"].clone(),
                    data[at(0)..at(1)].to_vec(),
                )
            })
            .collect();
        for norm in [
            "mtp.norm",
            "mtp.pre_fc_norm_hidden",
            "mtp.pre_fc_norm_embedding",
        ] {
            added.push((
                format!("{norm}.weight"),
                json!([96]),
                [0x80, 0x3f].repeat(96),
            ));
        }
        added.push((
            "mtp.fc.weight".into(),
            json!([96, 192]),
            [0x80, 0x3c].repeat(96 * 192),
        ));
        for (name, shape, bytes) in added {
            let offsets = json!([data.len(), data.len() + bytes.len()]);
            data.extend(bytes);
            header.insert(
                name,
                json!({"dtype": "BF16", "shape": shape, "data_offsets": offsets}),
            );
        }
    });
    assert!(matches!(
        DrafterConfig::read(dir.path()).unwrap(),
        DrafterConfig::Mtp(_)
    ));
    load_pair(dir.path(), dir.path()).unwrap();
}

#[test]
fn generation_configs_are_read_or_refused() {
    let read = |value: Value| {
        let dir = copy_of(&target_dir("llama_f32"));
        edit_json(&dir.path().join("config.json"), |config| {
            config["eos_token_id"] = json!(9);
        });
        std::fs::write(dir.path().join("generation_config.json"), value.to_string()).unwrap();
        GenerationConfig::read(dir.path())
    };
    let config =
        read(json!({"eos_token_id": [1, 2], "temperature": 0.6, "top_k": 20, "top_p": 0.95}))
            .unwrap();
    assert_eq!(config.eos_token_ids, [1, 2]);
    assert_eq!(
        (config.temperature, config.top_k, config.top_p),
        (Some(0.6), Some(20), Some(0.95))
    );
    assert_eq!(read(json!({"eos_token_id": 3})).unwrap().eos_token_ids, [3]);
    let config = read(json!({"do_sample": false, "temperature": 0.6})).unwrap();
    assert_eq!(
        (config.eos_token_ids, config.temperature),
        (vec![9], Some(0.0))
    );
    let result = read(json!({"eos_token_id": "end"})).map(|_| ());
    assert_line(
        "eos",
        result,
        &[
            "generation_config.json: eos_token_id: expected a token id or a list",
            "\"end\"",
        ],
    );
    let result = read(json!({"top_p": 1.5})).map(|_| ());
    assert_line(
        "top_p",
        result,
        &["top_p: expected a number in (0, 1], found 1.5"],
    );
}
