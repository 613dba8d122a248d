//! The program's schedule files: calibrations and costs that are made, used and refused by name; simulations.

mod cli_support;

use std::fs;
use std::path::Path;

use cli_support::{assert_refused, drafter, dspark, stdout, target};

fn trace(name: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/traces/{name}"));
    file.to_str().unwrap().to_owned()
}

/// `args` split at blanks, then `more`.
fn with<'a>(args: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    args.split(' ').chain(more.iter().copied()).collect()
}

#[test]
fn a_calibration_is_made_of_traces_and_used() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (target, drafter, out) = (target("qwen3_bf16"), drafter("qwen3_vanilla"), at("c.json"));
    let pair = ["--target", &target, "--draft", &drafter];
    let traces = [trace("code.json"), trace("chat.json")];
    let fit = ["--traces", &traces[0], "--held-out", &traces[1], "-o", &out];
    let table = stdout(&[&["calibrate"], &pair[..], &fit[..]].concat());
    assert_eq!(table.lines().count(), 8, "{table}");
    assert!(fs::read(at("c.png")).unwrap().starts_with(b"\x89PNG"));
    assert!(fs::read_to_string(at("c.svg")).unwrap().contains("ECE"));

    let ids = with("generate --prompt-ids 1,2,3 --max-new-tokens 12", &[]);
    let plain = stdout(&[&ids, &pair[..2]].concat());
    let named = ["--schedule", "threshold:0.4", "--calibration", &out];
    assert_eq!(stdout(&[&ids, &pair[..], &named[..]].concat()), plain);

    // Of another pair, and no file at all.
    let text = fs::read_to_string(&out).unwrap();
    fs::write(
        &out,
        text.replacen("\"drafter\": \"", "\"drafter\": \"other ", 1),
    )
    .unwrap();
    assert_refused(
        &[&ids, &pair[..], &named[..]].concat(),
        &["c.json", "pair.drafter"],
    );
    fs::write(&out, "{}").unwrap();
    assert_refused(&[&ids, &pair[..], &named[..]].concat(), &["c.json"]);
}

#[test]
fn a_cost_is_measured_once_and_other_machines_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("cost.json").to_str().unwrap().to_owned();
    let (target, drafter) = (target("qwen3_bf16"), drafter("qwen3_vanilla"));
    let pair = ["--target", &target, "--draft", &drafter];
    let sizes = ["--max-num-reqs", "2", "--device", "cpu", "--threads", "1"];
    let profile = ["--context", "64", "-o", &file];
    let table = stdout(&[&["profile"], &pair[..], &sizes[..], &profile[..]].concat());
    assert!(
        table.contains("verify") && table.contains("draft"),
        "{table}"
    );
    let made = fs::read_to_string(&file).unwrap();

    let ids = with("generate --prompt-ids 1,2,3 --max-new-tokens 12", &sizes);
    let plain = stdout(&[&ids[..], &pair[..2]].concat());
    for schedule in ["algorithm1", "delayed", "global"] {
        let named = ["--schedule", schedule, "--cost", &file];
        assert_eq!(
            stdout(&[&ids[..], &pair[..], &named[..]].concat()),
            plain,
            "{schedule}"
        );
    }
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        made,
        "a good file is not measured again"
    );

    let delayed = ["--schedule", "delayed", "--cost", &file];
    let all = [&ids[..], &pair[..], &delayed[..]].concat();
    for (from, to, name) in [
        ("reference (1 thread", "reference (9 thread", "device"),
        ("\"draft_len\": ", "\"draft_len\": 1", "draft_len"),
        ("\"build\": \"", "\"build\": \"x", "build"),
    ] {
        assert!(made.contains(from), "{from} in {made}");
        fs::write(&file, made.replacen(from, to, 1)).unwrap();
        assert_refused(&all, &["cost.json", name]);
    }
    // Measured and written where there is none.
    fs::remove_file(&file).unwrap();
    assert_eq!(stdout(&all), plain);
    assert!(Path::new(&file).exists());
}

/// The shapes of `tools/bench/shapes`, smaller.
fn small_shape(name: &str, dir: &Path, changes: &[(&str, serde_json::Value)]) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tools/bench/shapes")
        .join(name)
        .join("config.json");
    let text = fs::read_to_string(file).unwrap();
    let mut config: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&text).unwrap();
    let small = [
        ("vocab_size", 500),
        ("hidden_size", 64),
        ("intermediate_size", 96),
        ("num_attention_heads", 2),
        ("num_key_value_heads", 1),
        ("head_dim", 32),
    ];
    config.extend(small.map(|(key, value)| (key.to_owned(), value.into())));
    let changes = changes.iter().cloned();
    config.extend(changes.map(|(key, value)| (key.to_owned(), value)));
    let dir = dir.join(name);
    fs::create_dir(&dir).unwrap();
    fs::write(
        dir.join("config.json"),
        serde_json::to_string(&config).unwrap(),
    )
    .unwrap();
    dir.to_str().unwrap().to_owned()
}

#[test]
fn a_cost_needs_shapes_and_no_weights() {
    let dir = tempfile::tempdir().unwrap();
    let target = small_shape("qwen3-8b", dir.path(), &[("num_hidden_layers", 4.into())]);
    let drafter = small_shape(
        "qwen3-8b-dspark",
        dir.path(),
        &[
            ("num_hidden_layers", 1.into()),
            ("num_target_layers", 4.into()),
            ("target_layer_ids", vec![0, 2].into()),
            ("mask_token_id", 7.into()),
            ("markov_rank", 16.into()),
        ],
    );
    let out = dir.path().join("cost.json");
    let pair = ["--target", &target, "--draft", &drafter];
    let sizes = ["--max-num-reqs", "2", "--device", "cpu", "--threads", "1"];
    let profile = ["--context", "64", "-o", out.to_str().unwrap()];
    let table = stdout(&[&["profile"], &pair[..], &sizes[..], &profile[..]].concat());
    assert!(table.contains("7 drafts a round"), "{table}");
    let cost: serde_json::Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
    assert_eq!(cost["draft"].as_array().unwrap().len(), 2, "{cost}");
    // It runs, too, and what it says is no better than that.
    let ids = with("generate --prompt-ids 1,2 --max-new-tokens 8", &sizes);
    assert_eq!(
        stdout(&[&ids[..], &pair[..]].concat()),
        stdout(&[&ids[..], &pair[..2]].concat())
    );
}

#[test]
fn a_schedule_that_peeks_is_refused_for_sampled_requests() {
    let (target, drafter) = (target("qwen3_bf16"), drafter("qwen3_vanilla"));
    let args = [
        "--target",
        &target,
        "--draft",
        &drafter,
        "--schedule",
        "global",
    ];
    let args = [&args[..], &["--prompt-ids", "1", "--temperature", "1"]].concat();
    assert_refused(
        &[&["generate"], &args[..]].concat(),
        &["schedule", "`global`", "peeks"],
    );
}

#[test]
fn simulations_are_printed_and_bad_ones_refused() {
    let (chat, cost) = (trace("chat.json"), trace("h100-qwen3-8b-cost.json"));
    let args = ["--traces", &chat, "--cost", &cost, "--steps", "50"];
    let run = |more: &[&str]| stdout(&[&["simulate"], &args[..], more].concat());
    let table = run(&["--loads", "1,4"]);
    // A heading; none, seven lengths, two schedules and the oracle at either load.
    assert_eq!(table.lines().count(), 1 + 2 * 11, "{table}");
    assert_eq!(table, run(&["--loads", "1,4"]), "the same seed");
    let json: serde_json::Value = serde_json::from_str(&run(&[
        "--loads",
        "2",
        "--arrivals",
        "waves:50:1",
        "--json",
    ]))
    .unwrap();
    assert_eq!(json.as_array().unwrap().len(), 11);
    let bursts = ["--loads", "4", "--arrivals", "bursts:5:50:1"];
    assert_eq!(run(&bursts).lines().count(), 12);
    // The sweep of the paper's Figure 5: a higher threshold verifies fewer drafts and has more of them accepted.
    let thresholds = "threshold:0.2,threshold:0.4,threshold:0.6,threshold:0.8";
    let sweep = ["--loads", "64", "--adapt", "false", "--rules", thresholds];
    let sweep = run(&[&sweep[..], &["--json"]].concat());
    let sweep: Vec<serde_json::Value> = serde_json::from_str(&sweep).unwrap();
    let of = |field: &str| -> Vec<f64> {
        let rows = sweep.iter();
        let rows = rows.filter(|row| row["rule"].as_str().unwrap().starts_with("threshold"));
        rows.map(|row| row[field].as_f64().unwrap()).collect()
    };
    let (verified, accepted) = (of("verified_per_round"), of("accepted_share"));
    assert!(
        verified.len() == 4 && verified.is_sorted_by(|a, b| a > b),
        "{verified:?}"
    );
    assert!(
        accepted.len() == 4 && accepted.is_sorted_by(|a, b| a < b),
        "{accepted:?}"
    );
    for (more, part) in [
        (["--arrivals", "tide"], "poisson:RATE"),
        (["--arrivals", "tides:0:4"], "tides:SECONDS:LOW"),
        (["--arrivals", "bursts:1:2"], "bursts:CALM:BUSY:SECONDS"),
        (["--loads", "0"], "--loads"),
        (["--draft-len", "9"], "rounds"),
        (["--steps", "0"], "num_steps"),
        (["--rules", "best"], "delayed"),
    ] {
        assert_refused(&[&["simulate"], &args[..4], &more[..]].concat(), &[part]);
    }
    let missing = dspark(&["simulate", "--traces", "/no/trace", "--cost", &cost]);
    assert!(missing.stderr.contains("/no/trace"), "{missing:?}");
}
