//! Bad input on the command line: one line on standard error that names the field, exit status 2, nothing on standard
//! output, never a panic.

mod cli_support;

use cli_support::{Copy, TempFile, assert_refused, drafter, dspark, target};
use serde_json::json;

/// `dspark generate` on the golden target with a good prompt, and `more`.
fn refused(more: &[&str], parts: &[&str]) {
    let target = target("qwen3_bf16");
    let args = ["generate", "--target", &target, "--prompt-ids", "1,2,3"];
    assert_refused(&[&args, more].concat(), parts);
}

/// `dspark generate` on a target of another directory.
fn target_refused(dir: &str, parts: &[&str]) {
    let args = ["generate", "--target", dir, "--prompt-ids", "1,2,3"];
    assert_refused(&args, parts);
}

/// `dspark generate` with `--prompt-ids` or the like as given.
fn prompt_refused(prompt: &[&str], parts: &[&str]) {
    let target = target("qwen3_bf16");
    assert_refused(
        &[&["generate", "--target", &target], prompt].concat(),
        parts,
    );
}

#[test]
fn numbers_out_of_their_domain() {
    for (option, value, parts) in [
        ("--temperature", "-1", ["temperature", "-1"]),
        ("--temperature", "nan", ["temperature", "NaN"]),
        ("--temperature", "inf", ["temperature", "inf"]),
        ("--temperature", "warm", ["--temperature", "warm"]),
        ("--top-p", "0", ["top_p", "0"]),
        ("--top-p", "-0.5", ["top_p", "-0.5"]),
        ("--top-p", "1.01", ["top_p", "1.01"]),
        ("--min-p", "1", ["min_p", "1"]),
        ("--min-p", "nan", ["min_p", "NaN"]),
        ("--logprobs", "21", ["logprobs", "at most 20"]),
        ("--logprobs", "-1", ["--logprobs", "-1"]),
        ("--head-form", "some", ["--head-form", "candidates:K"]),
        ("--alternates", "-1", ["--alternates", "-1"]),
        ("--top-k", "-1", ["--top-k", "-1"]),
        ("--seed", "-1", ["--seed", "-1"]),
        ("--seed", "99999999999999999999", ["--seed", "too large"]),
        ("--max-new-tokens", "0", ["max_new_tokens", "0"]),
        ("--max-new-tokens", "-3", ["--max-new-tokens", "-3"]),
        ("--num-pages", "0", ["num_pages", "0"]),
        ("--page-size", "0", ["page_size", "0"]),
        ("--max-num-reqs", "0", ["max_num_reqs", "0"]),
        ("--prefill-chunk", "0", ["prefill_chunk", "0"]),
        ("--threads", "0", ["--threads", "1 to 1024"]),
        ("--threads", "99999999", ["--threads", "1 to 1024"]),
        ("--stop", "", ["stop", "at least one character"]),
        ("--stop", "word", ["stop", "tokenizer"]),
    ] {
        refused(&[option, value], &parts);
    }
}

#[test]
fn a_pool_that_cannot_hold_the_request() {
    refused(&["--num-pages", "2"], &["num_pages", "at most 32 tokens"]);
}

/// Sizes beyond use are cut to what the requests can use, not allocated.
#[test]
fn huge_sizes_are_harmless() {
    let target = target("llama_f32");
    let huge = "9999999999999999";
    let plain = ["generate", "--target", &target, "--prompt-ids", "1,2"];
    let expected = dspark(&[&plain[..], &["--max-new-tokens", "4"]].concat());
    for option in [
        "--num-pages",
        "--page-size",
        "--max-num-reqs",
        "--prefill-chunk",
    ] {
        let run = dspark(&[&plain[..], &["--max-new-tokens", "4", option, huge]].concat());
        assert_eq!(
            (run.status, &run.stdout),
            (Some(0), &expected.stdout),
            "{option}"
        );
    }
    let endless = dspark(&[&plain[..], &["--max-new-tokens", huge, "--num-pages", "2"]].concat());
    assert_eq!(endless.status, Some(2), "{endless:?}");
    assert!(endless.stderr.contains("num_pages"), "{endless:?}");
}

#[test]
fn unknown_values() {
    refused(&["--mode", "eagle"], &["--mode", "eagle", "dspark"]);
    refused(
        &["--schedule", "greedy"],
        &["--schedule", "greedy", "threshold:X"],
    );
    for threshold in ["0", "1.5", "-1", "nan", "", "x"] {
        refused(
            &["--schedule", &format!("threshold:{threshold}")],
            &["--schedule", "(0, 1]"],
        );
    }
    refused(&["--device", "tpu"], &["--device", "tpu", "cuda:N"]);
    refused(&["--device", "cuda:x"], &["--device", "cuda:x"]);
    refused(&["--colour"], &["--colour"]);
    refused(&["word"], &["word"]);
    assert_refused(&["destroy"], &["destroy"]);
    assert_refused(&["generate"], &["--target", "--prompt"]);
}

#[test]
fn devices_that_are_not_there() {
    refused(&["--device", "cuda:99"], &["--device", "cuda"]);
    if !dspark::device_is_available() {
        refused(&["--device", "cuda"], &["--device", "cuda"]);
    }
}

#[test]
fn prompts_that_are_none() {
    let too_long = vec!["7"; 2048].join(",");
    let text = "text";
    for (prompt, parts) in [
        (["--prompt-ids", ""], ["prompt", "at least one token"]),
        (["--prompt-ids", "1,x"], ["--prompt-ids", "'x'"]),
        (["--prompt-ids", "1,-2"], ["--prompt-ids", "'-2'"]),
        (["--prompt-ids", "5,331"], ["prompt", "331"]),
        (
            ["--prompt-ids", "4294967296"],
            ["--prompt-ids", "4294967296"],
        ),
        (["--prompt-ids", &too_long], ["prompt", "fewer than 2048"]),
        (["--prompt", text], ["prompt", "tokenizer.json"]),
    ] {
        prompt_refused(&prompt, &parts);
    }
    prompt_refused(&[], &["--prompt"]);
    prompt_refused(
        &["--prompt-ids", "1", "--prompt", text],
        &["--prompt", "cannot be used with"],
    );
    let words = Copy::of(&target("qwen3_bf16")).with_words(331);
    assert_refused(
        &["generate", "--target", words.path(), "--prompt", ""],
        &["prompt", "at least one token"],
    );
}

#[test]
fn prompts_files_that_are_none() {
    for (contents, parts) in [
        ("", ["prompts", "at least one line"]),
        ("\n  \n", ["prompts", "at least one line"]),
        (
            "{\"prompt_ids\": [1]}\n{\"prompt\":",
            ["line 2", "prompt_ids"],
        ),
        ("{\"question\": \"why?\"}\n", ["line 1", "question"]),
        ("{\"turns\": []}\n", ["line 1", "no turns"]),
        ("{\"prompt_ids\": [-1]}\n", ["line 1", "[-1]"]),
        ("{\"prompt_ids\": []}\n", ["prompt", "at least one token"]),
        (
            "{\"prompt_ids\": [1]}\n{\"prompt_ids\": [331]}",
            ["prompt", "331"],
        ),
    ] {
        let file = TempFile::new(contents);
        prompt_refused(&["--prompts", file.path()], &parts);
    }
    prompt_refused(&["--prompts", "/no/such/file"], &["/no/such/file: No such"]);
}

#[test]
fn targets_that_are_broken() {
    let copy = || Copy::of(&target("llama_f32"));
    let short = copy().edit_bytes(|bytes| bytes.truncate(bytes.len() - 1));
    target_refused(short.path(), &["model.safetensors", "header"]);
    let absurd = copy().edit_bytes(|bytes| bytes[..8].fill(0xff));
    target_refused(absurd.path(), &["model.safetensors", "header"]);
    let overlapping = copy().edit_weights(|header, _| {
        let shared = header["model.layers.0.input_layernorm.weight"]["data_offsets"].clone();
        header["model.norm.weight"]["data_offsets"] = shared;
    });
    target_refused(overlapping.path(), &["model.safetensors", "header"]);
    let nan = copy().edit_weights(|header, data| {
        let offsets = &header["model.norm.weight"]["data_offsets"];
        let [start, end] = [0, 1].map(|i| offsets[i].as_u64().unwrap() as usize);
        for value in data[start..end].chunks_exact_mut(4) {
            value.copy_from_slice(&f32::NAN.to_le_bytes());
        }
    });
    target_refused(nan.path(), &["NaN"]);
    let huge = copy().edit_config(|config| {
        config["hidden_size"] = json!(1_u64 << 30);
    });
    target_refused(huge.path(), &["model.safetensors", "expected"]);

    target_refused("/no/such/dir", &["/no/such/dir/config.json: No such"]);
    assert_refused(
        &["generate", "--target", "/no/such/dir", "--prompt", "text"],
        &["/no/such/dir/config.json: No such"],
    );
    let file = TempFile::new("{}");
    target_refused(file.path(), &["config.json"]);
    let empty = tempfile::tempdir().unwrap();
    target_refused(empty.path().to_str().unwrap(), &["config.json"]);
    target_refused(&drafter("qwen3_vanilla"), &["architectures"]);
}

#[test]
fn drafters_that_do_not_fit() {
    let vanilla = drafter("qwen3_vanilla");
    refused(
        &["--draft", &drafter("llama_vanilla")],
        &["hidden_size", "96", "192"],
    );
    let vocabulary = Copy::of(&vanilla).edit_config(|config| config["vocab_size"] = json!(400));
    refused(
        &["--draft", vocabulary.path()],
        &["vocab_size", "331", "400"],
    );
    let deeper = Copy::of(&vanilla).edit_config(|config| config["num_target_layers"] = json!(9));
    refused(
        &["--draft", deeper.path()],
        &["num_target_layers", "4", "9"],
    );
    let blocks = Copy::of(&vanilla).edit_config(|c| c["block_size"] = json!(1_u64 << 30));
    refused(&["--draft", blocks.path()], &["block_size"]);
    refused(&["--draft", "/no/such/dir"], &["/no/such/dir/config.json"]);
    refused(&["--draft", &target("qwen3_bf16")], &["architectures"]);

    for mode in ["mtp", "dflash"] {
        refused(
            &["--draft", &vanilla, "--mode", mode],
            &["--mode", mode, "dspark"],
        );
    }
    refused(&["--mode", "dspark"], &["--draft", "dspark"]);
    refused(&["--mode", "mtp"], &["mtp"]);
    for length in ["0", "8", "99999999999999"] {
        refused(
            &["--draft", &vanilla, "--draft-len", length],
            &["--draft-len", "1 to 7", length],
        );
    }
    refused(
        &["--draft", &drafter("qwen3_mtp"), "--draft-len", "16"],
        &["--draft-len", "1 to 15"],
    );
    for schedule in ["threshold:0.5", "adaptive"] {
        refused(&["--schedule", schedule], &["--schedule", "--draft"]);
    }
    refused(&["--draft-len", "3"], &["--draft-len", "--draft"]);
}

#[test]
fn traces_that_cannot_be_written() {
    refused(
        &["--trace", "/no/such/dir/t.json"],
        &["/no/such/dir/t.json: No such"],
    );
    refused(&["--trace", "/"], &["/: Is a directory"]);
}

#[test]
fn the_other_commands_refuse_too() {
    let target = target("qwen3_bf16");
    let compare = ["compare", "--target", &target, "--prompt-ids", "1"];
    assert_refused(&compare, &["--draft"]);
    for draft in ["dir", "none=dir", "dspark=", "eagle=dir"] {
        assert_refused(
            &[&compare[..], &["--draft", draft]].concat(),
            &["--draft", draft, "MODE=DIR"],
        );
    }
    let dflash = format!("dflash={}", drafter("qwen3_vanilla"));
    assert_refused(
        &[&compare[..], &["--draft", &dflash]].concat(),
        &["--mode", "dflash"],
    );
    let good = format!("dspark={}", drafter("qwen3_vanilla"));
    assert_refused(
        &[&compare[..], &["--draft", &good, "--limit", "0"]].concat(),
        &["--limit"],
    );
    assert_refused(&["doctor", "--draft", "dir"], &["--target"]);
    // What doctor finds out before it meets the fault is worth showing.
    let doctor = dspark(&["doctor", "--target", "/no/such/dir"]);
    assert_eq!(doctor.status, Some(2));
    assert_eq!(doctor.stderr.lines().count(), 1);
    assert!(doctor.stderr.starts_with("error: /no/such/dir/config.json"));
}
