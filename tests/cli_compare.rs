//! The commands that run the same prompts in several ways: `compare` and `invariance`.

mod cli_support;

use cli_support::{TempFile, drafter, dspark, target};
use serde_json::{Value, json};

#[test]
fn compare_shows_every_mode() {
    let target = target("qwen3_bf16");
    let drafts = [
        ("dspark", "qwen3_rnn"),
        ("mtp", "qwen3_mtp"),
        ("dflash", "qwen3_dflash"),
    ]
    .map(|(mode, name)| format!("{mode}={}", drafter(name)));
    let mut args = vec!["compare", "--target", &target, "--prompt-ids", "1,2,3"];
    args.extend(drafts.iter().flat_map(|draft| ["--draft", draft]));
    args.extend(["--max-new-tokens", "12", "--schedule", "threshold:0.3"]);
    let table = dspark(&args);
    assert_eq!(table.status, Some(0), "{table:?}");
    for mode in ["dspark", "mtp", "dflash"] {
        let same = format!("{mode}: 1 of 1 outputs are token for token those of none");
        assert!(table.stdout.contains(&same), "{}", table.stdout);
    }
    args.push("--json");
    let rows: Value = serde_json::from_str(&dspark(&args).stdout).unwrap();
    let modes: Vec<&Value> = rows
        .as_array()
        .unwrap()
        .iter()
        .map(|r| &r["mode"])
        .collect();
    assert_eq!(modes, ["none", "dspark", "mtp", "dflash"]);
    for row in rows.as_array().unwrap() {
        assert_eq!(
            (&row["num_tokens"], &row["same_as_none"]),
            (&json!(12), &json!(1))
        );
        assert!(row.get("to_first_drafter").is_none(), "one prompt: {row}");
    }
}

/// Forms of the head side by side, each against the first drafter, prompt by prompt.
#[test]
fn compare_pairs_accepted_lengths_by_prompt() {
    let target = target("qwen3_bf16");
    let drafts = [("dspark", "qwen3_vanilla"), ("mtp", "qwen3_mtp")]
        .map(|(mode, name)| format!("{mode}={}", drafter(name)));
    let lines = (0..6).map(|i| format!("{{\"prompt_ids\": [{}, {}]}}\n", i + 1, 7 * i));
    let prompts = TempFile::new(&lines.collect::<String>());
    let mut args = vec!["compare", "--target", &target, "--prompts", prompts.path()];
    args.extend(drafts.iter().flat_map(|draft| ["--draft", draft]));
    args.extend([
        "--head-forms",
        "full,candidates:2",
        "--max-new-tokens",
        "16",
    ]);
    let table = dspark(&args);
    assert_eq!(table.status, Some(0), "{table:?}");
    args.push("--json");
    let rows: Value = serde_json::from_str(&dspark(&args).stdout).unwrap();
    let rows = rows.as_array().unwrap();
    let modes: Vec<&str> = rows.iter().map(|r| r["mode"].as_str().unwrap()).collect();
    assert_eq!(modes, ["none", "dspark", "dspark candidates:2", "mtp"]);
    for (i, row) in rows.iter().enumerate() {
        let difference = row.get("to_first_drafter");
        assert_eq!(difference.is_some(), i > 1, "{row}");
        let Some(difference) = difference else {
            continue;
        };
        let number = |value: &Value| value.as_f64().unwrap();
        let expected = number(&row["accepted_length"]) - number(&rows[1]["accepted_length"]);
        let found = number(&difference["accepted_length"]);
        let error = number(&difference["standard_error"]);
        assert!((found - expected).abs() < 1e-9 && error >= 0.0, "{row}");
        let mode = modes[i];
        let line = format!(
            "{mode}: accepted length {found:+.3} against dspark (standard error {error:.3},"
        );
        assert!(
            table.stdout.contains(&line),
            "no {line} in {}",
            table.stdout
        );
    }
    // Of another drafter there is something to tell.
    assert!(rows[3]["to_first_drafter"]["standard_error"] != json!(0.0));
}

/// Every way to decode gives the text of plain decoding under the coupled rule and at temperature 0; other rules do not,
/// and that is seen.
#[test]
fn invariance_holds_where_it_must() {
    let target = target("qwen3_bf16");
    let drafts = [("dspark", "qwen3_vanilla"), ("mtp", "qwen3_mtp")]
        .map(|(mode, name)| format!("{mode}={}", drafter(name)));
    let lines = (0..12).map(|i| format!("{{\"prompt_ids\": [{}, {}]}}\n", i + 1, 7 * i));
    let prompts = TempFile::new(&lines.collect::<String>());
    let mut args = vec![
        "invariance",
        "--target",
        &target,
        "--prompts",
        prompts.path(),
    ];
    args.extend(drafts.iter().flat_map(|draft| ["--draft", draft]));
    args.extend([
        "--max-new-tokens",
        "16",
        "--max-num-reqs",
        "5",
        "--draft-lens",
        "2",
    ]);
    args.extend(["--schedules", "threshold:0.5,delayed,global"]);
    args.extend([
        "--head-forms",
        "candidates:32,candidates:1,candidates:8:4,full-fp8",
        "--alternates",
        "4",
    ]);
    for more in [
        &["--temperature", "0.7", "--rule", "coupled"][..],
        &[
            "--temperature",
            "1.2",
            "--top-p",
            "0.9",
            "--rule",
            "coupled",
            "--presence-penalty",
            "0.4",
        ],
        &["--temperature", "0"],
    ] {
        let run = dspark(&[&args[..], more].concat());
        assert_eq!(run.status, Some(0), "{run:?}");
        let rows: Vec<&str> = run.stdout.lines().skip(1).collect();
        // none, dspark and mtp at both sizes, another length of each, three schedules, four forms,
        // two of them with second choices.
        assert_eq!(rows.len(), 17, "{}", run.stdout);
        for row in rows {
            let figures = row.split(" at once").nth(1).unwrap().split_whitespace();
            let counts: Vec<&str> = figures.take(5).collect();
            assert_eq!(counts, ["12", "0", "0", "0.0000", "0.0000"], "{row}");
        }
    }
    // `global` refuses the token rule.
    let schedules = args.iter().position(|&arg| arg == "--schedules").unwrap();
    args.drain(schedules..schedules + 2);
    let run = dspark(&[&args[..], &["--temperature", "0.7", "--rule", "token"]].concat());
    assert_eq!(run.status, Some(1), "{run:?}");
    assert!(
        run.stderr.contains("differ by more than rounding"),
        "{run:?}"
    );
}
