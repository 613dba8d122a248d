//! The program on good input: what it prints, the trace, the statistics, several prompts at once, help, closed pipes.

mod cli_support;

use std::process::Stdio;

use cli_support::{Copy, TempFile, command, drafter, dspark, stdout, target};
use serde_json::{Value, json};

/// Prompt ids and the first 24 greedy tokens of a golden target, comma-separated.
fn golden(name: &str, prompt: usize) -> [String; 2] {
    let text = std::fs::read_to_string(format!("{}/golden.json", target(name))).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let prompt = &golden["prompts"][prompt];
    [&prompt["ids"], &prompt["greedy"]].map(|ids| join(&numbers(ids)))
}

fn numbers(value: &Value) -> Vec<u64> {
    let items = value.as_array().unwrap().iter();
    items.map(|item| item.as_u64().unwrap()).collect()
}

fn join(ids: &[u64]) -> String {
    let ids: Vec<String> = ids.iter().map(u64::to_string).collect();
    ids.join(",")
}

#[test]
fn ids_go_in_and_out_without_a_tokenizer() {
    for name in ["qwen3_bf16", "qwen3_f32", "llama3_rope_bf16"] {
        let [ids, greedy] = golden(name, 1);
        let target = target(name);
        let args = ["generate", "--target", &target, "--prompt-ids", &ids];
        let printed = stdout(&[&args[..], &["--max-new-tokens", "24"]].concat());
        assert_eq!(printed, format!("{greedy}\n"), "{name}");
    }
}

#[test]
fn every_drafter_prints_what_the_target_would() {
    let [ids, greedy] = golden("qwen3_bf16", 2);
    let target = target("qwen3_bf16");
    let args = ["generate", "--target", &target, "--prompt-ids", &ids];
    let args = [&args[..], &["--max-new-tokens", "24"]].concat();
    for (name, mode) in [
        ("qwen3_vanilla", "dspark"),
        ("qwen3_gated", "dspark"),
        ("qwen3_rnn", "dspark"),
        ("qwen3_dflash", "dflash"),
        ("qwen3_mtp", "mtp"),
    ] {
        let draft = drafter(name);
        for more in [
            &["--draft", &draft][..],
            &["--draft", &draft, "--mode", mode],
            &["--draft", &draft, "--draft-len", "2", "--page-size", "5"],
            &["--draft", &draft, "--mode", "none"],
        ] {
            let printed = stdout(&[&args[..], more].concat());
            assert_eq!(printed, format!("{greedy}\n"), "{more:?}");
        }
    }
}

#[test]
fn text_goes_in_and_out_with_a_tokenizer() {
    let target = Copy::of(&target("qwen3_bf16")).with_words(331);
    let [ids, greedy] = golden("qwen3_bf16", 1);
    let words = |ids: &str| format!("w{}", ids.replace(',', " w"));
    let draft = drafter("qwen3_rnn");
    let prompt = words(&ids);
    let args = ["generate", "--target", target.path(), "--draft", &draft];
    let args = [&args[..], &["--prompt", &prompt, "--max-new-tokens", "24"]].concat();
    assert_eq!(stdout(&args), format!("{}\n", words(&greedy)));
    assert_eq!(
        stdout(&[&args[..], &["--raw"]].concat()),
        stdout(&args),
        "there is no chat template"
    );
    let third = greedy.split(',').nth(2).unwrap();
    let cut = stdout(&[&args[..], &["--stop", &format!(" w{third}")]].concat());
    let before: Vec<&str> = greedy.split(',').take(2).collect();
    assert_eq!(cut, format!("{}\n", words(&before.join(","))));
}

/// The trace of three prompts, sampled and greedy, with every schedule.
#[test]
fn the_trace_has_every_round() {
    let file = TempFile::new("");
    let prompts = TempFile::new(
        "{\"prompt_ids\": [5]}\n\n{\"prompt_ids\": [1, 2, 3]}\n{\"prompt_ids\": [9, 9]}\n",
    );
    let target = target("qwen3_bf16");
    let draft = drafter("qwen3_vanilla");
    for schedule in ["fixed", "threshold:0.5", "adaptive"] {
        for temperature in ["0", "0.8"] {
            let run = dspark(&[
                "generate",
                "--target",
                &target,
                "--draft",
                &draft,
                "--prompts",
                prompts.path(),
                "--schedule",
                schedule,
                "--temperature",
                temperature,
                "--max-new-tokens",
                "20",
                "--draft-len",
                "5",
                "--trace",
                file.path(),
                "--max-num-reqs",
                "2",
            ]);
            assert_eq!(run.status, Some(0), "{run:?}");
            let trace: Value =
                serde_json::from_str(&std::fs::read_to_string(file.path()).unwrap()).unwrap();
            assert_eq!(keys(&trace), ["requests", "stats", "steps"]);
            let requests = trace["requests"].as_array().unwrap();
            let prompts: Vec<&Value> = requests.iter().map(|r| &r["prompt_ids"]).collect();
            assert_eq!(prompts, [&json!([5]), &json!([1, 2, 3]), &json!([9, 9])]);
            let mut committed = 0;
            for (i, request) in requests.iter().enumerate() {
                let answer = run.stdout.lines().nth(2 * i + 1).unwrap();
                assert_eq!(answer, join(&numbers(&request["tokens"])));
                committed += check_request(request, schedule, 5, 20);
            }
            let stats = &trace["stats"];
            assert_eq!(stats["num_requests"], 3);
            assert_eq!(stats["num_tokens"], 60);
            assert_eq!(stats["rounds"]["num_committed"], committed);
            check_steps(&trace, schedule == "adaptive");
        }
    }
}

/// The steps of a trace against its counts: their rows and drafts are those of the rounds, their times those of the phases.
fn check_steps(trace: &Value, has_cost: bool) {
    let steps = trace["steps"].as_array().unwrap();
    let sum = |field: &str| -> u64 { steps.iter().map(|s| s[field].as_u64().unwrap()).sum() };
    let rounds = &trace["stats"]["rounds"];
    assert_eq!(rounds["num_rounds"], sum("num_reqs"));
    assert_eq!(rounds["num_verify_tokens"], sum("num_tokens"));
    let proposed = rounds["proposed"].as_array().unwrap().first();
    let proposed = proposed.map_or(0, |n| n.as_u64().unwrap());
    assert_eq!(proposed, sum("num_drafted"));
    // Every committed row is looked at, at once or later, but for those of plain rounds at the end.
    let committed = rounds["num_committed"].as_u64().unwrap();
    let looked_at = sum("num_looked_at");
    assert!(looked_at <= committed && (has_cost || looked_at == committed));
    let mut seconds = 0.0;
    for step in steps {
        assert_eq!(step["expected_seconds"].is_number(), has_cost, "{step}");
        let of = |phase: &str| step[&format!("{phase}_seconds")].as_f64().unwrap();
        let phases: f64 = ["propose", "schedule", "verify", "commit"]
            .map(of)
            .iter()
            .sum();
        assert!(phases <= step["seconds"].as_f64().unwrap(), "{step}");
        seconds += phases;
    }
    let all = trace["stats"]["decode_seconds"].as_f64().unwrap();
    assert!((seconds - all).abs() < 1e-6, "{seconds} of {all}");
}

fn keys(value: &Value) -> Vec<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

/// Checks one request of a trace and counts what its rounds committed.
fn check_request(
    request: &Value,
    schedule: &str,
    draft_len: usize,
    max_new_tokens: usize,
) -> usize {
    assert_eq!(keys(request), ["prompt_ids", "tokens", "rounds", "stats"]);
    let tokens = numbers(&request["tokens"]);
    assert_eq!(tokens.len(), max_new_tokens);
    let mut all = tokens[..1].to_vec();
    for round in request["rounds"].as_array().unwrap() {
        assert!(all.len() < max_new_tokens, "a round after the end");
        assert_eq!(
            keys(round),
            [
                "draft_tokens",
                "confidence",
                "predicted",
                "verify_len",
                "num_accepted",
                "committed"
            ]
        );
        let drafts = numbers(&round["draft_tokens"]);
        let confidence: Vec<f64> = round["confidence"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c.as_f64().unwrap())
            .collect();
        // A schedule that reads costs may draft nothing where that does not pay.
        let drafted = if drafts.is_empty() && schedule == "adaptive" {
            0
        } else {
            draft_len
        };
        assert_eq!((drafts.len(), confidence.len()), (drafted, drafted));
        let predicted = round["predicted"].as_array().unwrap();
        assert_eq!(predicted.len(), drafted);
        assert!(confidence.iter().all(|c| (0.0..=1.0).contains(c)));
        let verify_len = round["verify_len"].as_u64().unwrap() as usize;
        let num_accepted = round["num_accepted"].as_u64().unwrap() as usize;
        match schedule {
            "fixed" => assert_eq!(verify_len, draft_len),
            "threshold:0.5" => assert_eq!(
                verify_len,
                predicted
                    .iter()
                    .take_while(|c| c.as_f64().unwrap() >= 0.5)
                    .count()
            ),
            _ => assert!(verify_len <= draft_len),
        }
        assert!(num_accepted <= verify_len);
        let committed = numbers(&round["committed"]);
        assert_eq!(committed.len(), num_accepted + 1);
        assert_eq!(committed[..num_accepted], drafts[..num_accepted]);
        all.extend(committed);
    }
    assert_eq!(all[..max_new_tokens], tokens);
    let stats = &request["stats"];
    assert_eq!(stats["num_generated"], max_new_tokens);
    assert_eq!(stats["rounds"]["num_committed"], all.len() - 1);
    all.len() - 1
}

#[test]
fn several_prompts_come_out_in_order_whatever_the_batch() {
    let lines: Vec<String> = (0..5)
        .map(|i| format!("{{\"prompt_ids\": {:?}}}", vec![i + 1; 6 - i]))
        .collect();
    let prompts = TempFile::new(&lines.join("\n"));
    let (target, draft) = (target("qwen3_bf16"), drafter("qwen3_gated"));
    let run = |more: &[&str]| {
        let args = ["generate", "--target", &target, "--draft", &draft];
        let rest = [
            "--prompts",
            prompts.path(),
            "--max-new-tokens",
            "12",
            "--seed",
            "3",
        ];
        stdout(&[&args[..], &rest, more].concat())
    };
    for temperature in ["0", "1"] {
        let alone = run(&["--max-num-reqs", "1", "--temperature", temperature]);
        let heads: Vec<&str> = alone.lines().step_by(2).collect();
        assert_eq!(heads, ["== 1", "== 2", "== 3", "== 4", "== 5"]);
        for more in [
            &["--max-num-reqs", "2"][..],
            &["--max-num-reqs", "5", "--page-size", "3"],
            &["--prefill-chunk", "2"],
            &["--num-pages", "4", "--page-size", "8"],
        ] {
            let more = [more, &["--temperature", temperature]].concat();
            assert_eq!(run(&more), alone, "{more:?}");
        }
    }
}

#[test]
fn seeds_decide() {
    let target = target("qwen3_bf16");
    let run = |seed: &str| {
        let args = ["generate", "--target", &target, "--prompt-ids", "1,2"];
        let sampling = [
            "--temperature",
            "1",
            "--max-new-tokens",
            "16",
            "--seed",
            seed,
        ];
        stdout(&[&args[..], &sampling].concat())
    };
    assert_eq!(run("7"), run("7"));
    assert_ne!(run("7"), run("8"));
}

#[test]
fn logprobs_come_after_the_answer() {
    let (target, draft) = (target("qwen3_bf16"), drafter("qwen3_vanilla"));
    let [ids, greedy] = golden("qwen3_bf16", 1);
    let trace = TempFile::new("");
    for more in [&[][..], &["--draft", &draft]] {
        let args = ["generate", "--target", &target, "--prompt-ids", &ids];
        let rest = ["--max-new-tokens", "6", "--trace", trace.path()];
        let run = |n: &str| stdout(&[&args[..], &rest, more, &["--logprobs", n]].concat());
        let printed = run("2");
        let lines: Vec<&str> = printed.lines().collect();
        let tokens: Vec<&str> = greedy.split(',').take(6).collect();
        assert_eq!((lines[0], lines.len()), (&*tokens.join(","), 7));
        for (line, token) in lines[1..].iter().zip(&tokens) {
            // Greedy: the token is the likeliest one.
            let [logprob, rest] = line.trim_start().split("  ").collect::<Vec<_>>()[..2]
                .try_into()
                .unwrap();
            assert!(
                logprob.parse::<f32>().unwrap() <= 0.0 && rest == *token,
                "{line}"
            );
            assert!(line.contains(&format!("| {token} {logprob}, ")), "{line}");
        }
        let trace: Value =
            serde_json::from_str(&std::fs::read_to_string(trace.path()).unwrap()).unwrap();
        let request = &trace["requests"][0];
        assert_eq!(request["logprobs"].as_array().unwrap().len(), 6);
        assert_eq!(
            run("0").lines().nth(1).unwrap().split("  ").count(),
            lines[1].split("  ").count() - 1
        );
    }
}

#[test]
fn statistics_go_to_standard_error() {
    let (target, draft) = (target("qwen3_bf16"), drafter("qwen3_vanilla"));
    let args = [
        "generate",
        "--target",
        &target,
        "--draft",
        &draft,
        "--prompt-ids",
        "1,2",
    ];
    let run = dspark(&[&args[..], &["--stats", "--max-new-tokens", "9"]].concat());
    assert_eq!(run.status, Some(0));
    assert_eq!(run.stdout.lines().count(), 1);
    for part in [
        "mode dspark",
        "9 tokens of 1 requests",
        "tokens/s",
        "accepted length",
        "drafts proposed by position",
        "drafts verified by position",
        "drafts accepted by position",
        "acceptance by position",
        "confidence",
        "predicted",
    ] {
        assert!(run.stderr.contains(part), "no {part} in {}", run.stderr);
    }
    assert!(!run.stderr.contains("request "), "{}", run.stderr);
}

/// Of several requests each has a line, up to a number, and they add up.
#[test]
fn statistics_have_a_line_for_each_request() {
    let (target, draft) = (target("qwen3_bf16"), drafter("qwen3_vanilla"));
    let lines = (0..34).map(|i| format!("{{\"prompt_ids\": [{i}]}}\n"));
    let prompts = TempFile::new(&lines.collect::<String>());
    let args = [
        "generate",
        "--target",
        &target,
        "--draft",
        &draft,
        "--prompts",
    ];
    let rest = ["--stats", "--max-new-tokens", "9", "--draft-len", "3"];
    let run = dspark(&[&args[..], &[prompts.path()], &rest].concat());
    assert_eq!(run.status, Some(0), "{run:?}");
    let rows = run
        .stderr
        .lines()
        .skip_while(|line| !line.starts_with("request "));
    let rows: Vec<Vec<&str>> = rows
        .skip(1)
        .map(|row| row.split_whitespace().collect())
        .collect();
    assert_eq!(rows.len(), 33, "{}", run.stderr);
    assert_eq!(rows[32][..3], ["and", "2", "more,"]);
    for (i, row) in rows[..32].iter().enumerate() {
        let number = |column: usize| row[column].parse::<f64>().unwrap();
        assert_eq!((number(0), number(1)), (i as f64 + 1.0, 9.0));
        let [rounds, proposed, verified, accepted] = [2, 3, 4, 5].map(number);
        assert_eq!((proposed, verified), (3.0 * rounds, proposed));
        let committed = number(7) * rounds;
        assert!(
            (committed - rounds - accepted).abs() < 0.05 * rounds,
            "{row:?}"
        );
    }
}

#[test]
fn doctor_looks_at_a_pair() {
    let report = stdout(&["doctor"]);
    for part in ["dspark 0", "built", "can run"] {
        assert!(report.contains(part), "no {part} in {report}");
    }
    let target = target("qwen3_bf16");
    let loads = stdout(&["doctor", "--target", &target, "--device", "cpu"]);
    assert!(loads.contains("target   loads"), "{loads}");
    let mtp = drafter("qwen3_mtp");
    let args = ["doctor", "--device", "cpu", "--target", &target, "--draft"];
    let loads = stdout(&[&args[..], &[&mtp]].concat());
    assert!(loads.contains("MTP: loads"), "{loads}");
    let vanilla = drafter("qwen3_vanilla");
    let check = stdout(&[&args[..], &[&vanilla]].concat());
    for part in ["head Vanilla", "self-check", "as the checkpoint says"] {
        assert!(check.contains(part), "no {part} in {check}");
    }
}

#[test]
fn a_gpu_generates_too() {
    if !dspark::device_is_available() {
        let required = std::env::var("DSPARK_REQUIRE_GPU").is_ok_and(|value| value == "1");
        assert!(
            !required,
            "DSPARK_REQUIRE_GPU=1, but there is no CUDA device"
        );
        println!("skipped: no CUDA device");
        return;
    }
    let (target, draft) = (target("qwen3_bf16"), drafter("qwen3_vanilla"));
    let args = ["generate", "--target", &target, "--draft", &draft];
    let rest = [
        "--prompt-ids",
        "1,2,3",
        "--max-new-tokens",
        "24",
        "--device",
    ];
    let printed = stdout(&[&args[..], &rest, &["cuda:0"]].concat());
    assert_eq!(printed.split(',').count(), 24, "{printed}");
    assert_eq!(stdout(&[&args[..], &rest, &["auto"]].concat()), printed);
}

#[test]
fn help_has_examples() {
    for name in ["generate", "compare", "invariance", "doctor"] {
        let help = stdout(&[name, "--help"]);
        let example = format!("  dspark {name}");
        assert!(
            help.contains("Examples:") && help.contains(&example),
            "{help}"
        );
    }
    assert!(stdout(&["--help"]).contains("generate"));
    assert_eq!(
        stdout(&["--version"]),
        format!("dspark {}\n", env!("CARGO_PKG_VERSION"))
    );
}

/// `dspark ... | head -1` and the like: no panic, no message.
#[test]
fn a_reader_that_goes_away_is_no_error() {
    let target = target("qwen3_bf16");
    let draft = format!("dspark={}", drafter("qwen3_gated"));
    let prompts = TempFile::new(&"{\"prompt_ids\": [3]}\n".repeat(8));
    let model = [
        "--target",
        &target,
        "--prompts",
        prompts.path(),
        "--max-new-tokens",
        "20",
    ];
    for args in [
        [&["generate", "--max-num-reqs", "1", "--stats"][..], &model].concat(),
        [&["compare", "--draft", &draft][..], &model].concat(),
        [&["compare", "--json", "--draft", &draft][..], &model].concat(),
        vec!["doctor"],
        vec!["generate", "--help"],
    ] {
        let mut child = command(&args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
        assert!(
            !stderr.contains("panicked") && !stderr.contains("error"),
            "{stderr}"
        );
    }
}
