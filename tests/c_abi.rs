//! The C ABI from outside: a C program against the static library, the same program as C++ against the shared one, and
//! the layout of every struct as C and Rust see it.
#![cfg(feature = "cuda")]

use std::env;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use dspark::sys;

/// "struct field offset" lines by C or by Rust, and the C lines that print them.
struct Layouts {
    lines: String,
    c_source: String,
}

macro_rules! layouts {
    ($($name:ident { $($field:ident),* $(,)? })*) => {
        fn layouts() -> Layouts {
            let (mut lines, mut c_source) = (String::new(), String::new());
            $(
                // A field missing from the list does not compile.
                let _complete = |params: sys::$name| {
                    let sys::$name { $($field: _),* } = params;
                };
                writeln!(lines, "{} {}", stringify!($name), size_of::<sys::$name>()).unwrap();
                writeln!(c_source, "STRUCT({});", stringify!($name)).unwrap();
                $(
                    let (name, field) = (stringify!($name), stringify!($field));
                    let offset = std::mem::offset_of!(sys::$name, $field);
                    writeln!(lines, "{name} {field} {offset}").unwrap();
                    writeln!(c_source, "FIELD({name}, {field});").unwrap();
                )*
            )*
            Layouts { lines, c_source }
        }
    };
}

layouts! {
    dspark_rms_norm_params { struct_size, dtype, num_rows, hidden_size, eps, x, delta, weight, out, stride_x_row, stride_delta_row, stride_out_row, tap, stride_tap_row }
    dspark_gather_rows_params { struct_size, dtype, num_rows, num_cols, num_src_rows, src, index, out, stride_src_row, stride_out_row }
    dspark_silu_mul_params { struct_size, dtype, num_rows, ffn_size, gate_up, out, stride_gate_up_row, stride_out_row }
    dspark_qk_norm_rope_append_params { struct_size, dtype, num_rows, num_reqs, num_q_heads, num_kv_heads, head_dim, page_size, max_pages_per_req, eps, rope_scale, qkv, q_norm, k_norm, inv_freq, positions, qo_indptr, seq_lens, page_table, q_out, k_cache, v_cache, k_out, v_out, stride_qkv_row, stride_q_out_row, stride_kv_out_row, stride_cache_page, stride_cache_slot, stride_cache_head, kv_dtype, reserved, k_scale, v_scale }
    dspark_attention_params { struct_size, dtype, num_rows, num_reqs, max_rows_per_req, max_seq_len, num_q_heads, num_kv_heads, head_dim, page_size, max_pages_per_req, scale, q, k_cache, v_cache, k_block, v_block, qo_indptr, seq_lens, page_table, out, workspace, workspace_bytes, stride_q_row, stride_out_row, stride_cache_page, stride_cache_slot, stride_cache_head, stride_block_row, tree_mask, window, softcap, batch_invariant, kv_dtype, k_scale, v_scale }
    dspark_commit_tree_params { struct_size, kv_dtype, num_reqs, num_layers, draft_len, num_kv_heads, head_dim, page_size, max_pages_per_req, reserved, accept_flags, seq_lens, page_table, k_cache, v_cache, stride_cache_layer, stride_cache_page, stride_cache_slot, stride_cache_head }
    dspark_draft_full_params { struct_size, dtype, logits_dtype, w2_dtype, head, num_reqs, draft_len, vocab_size, hidden_size, markov_rank, confidence_with_markov, confidence_bias, logits, hidden, markov_w1, markov_w2, w2_scales, proj_weight, proj_bias, confidence_weight, anchors, anchor_positions, draft_lens, temperature, seeds, rules, mask, draft_tokens, log_normalizers, latents, confidence, confidence_logits, workspace, workspace_bytes, stride_logits_row, w2_bounds, w2_basis, rows_read }
    dspark_draft_bounds_params { struct_size, w2_dtype, vocab_size, markov_rank, markov_w2, w2_scales, basis, bounds }
    dspark_draft_candidates_params { struct_size, dtype, logits_dtype, head, num_reqs, draft_len, vocab_size, hidden_size, markov_rank, num_top, num_bigram, confidence_with_markov, confidence_bias, logits, hidden, markov_w1, markov_w2, proj_weight, proj_bias, confidence_weight, bigram_tokens, anchors, anchor_positions, temperature, seeds, draft_tokens, confidence, candidate_tokens, candidate_logits, workspace, workspace_bytes, stride_logits_row, rules, mask, top_k, top_p, min_p }
    dspark_survival_params { struct_size, num_reqs, draft_len, confidence, temperature, survival }
    dspark_accept_params { struct_size, target_dtype, draft_dtype, num_rows, num_reqs, draft_len, vocab_size, num_candidates, num_top_logprobs, target_logits, draft_logits, draft_log_normalizers, candidate_tokens, candidate_logits, draft_tokens, parents, qo_indptr, anchor_positions, temperature, top_k, top_p, min_p, rules, seeds, repetition_penalty, presence_penalty, frequency_penalty, edit_indptr, edit_tokens, edit_counts, edit_biases, mask, stop_indptr, stop_tokens, num_accepted, next_tokens, status, accept_flags, logprobs, top_tokens, top_logprobs, workspace, workspace_bytes, stride_target_row, stride_draft_row, draft_markov_w2, draft_w2_scales, draft_latents, draft_mask, draft_w2_dtype, draft_markov_rank }
    dspark_commit_params { struct_size, num_reqs, draft_len, draft_tokens, num_accepted, next_tokens, committed, num_committed, seq_lens, anchors }
}

fn repository() -> PathBuf {
    let dir = env::var_os("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into());
    PathBuf::from(dir)
}

/// The library as cargo built it for this test.
fn library(file: &str) -> PathBuf {
    let program = env::current_exe().expect("this test's own path");
    program
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(file))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{file} is not beside {}", program.display()))
}

fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn tool(variable: &str, default: &str) -> Command {
    Command::new(env::var_os(variable).unwrap_or(default.into()))
}

/// Compiles `smoke.c` by `compiler` and links it with `library`.
fn build(dir: &Path, mut compiler: Command, standard: &str, library: &Path) -> PathBuf {
    std::fs::write(dir.join("layout.inc"), layouts().c_source).unwrap();
    let repository = repository();
    let object = dir.join("smoke.o");
    run(compiler
        .args([
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pedantic",
            "-g",
            "-c",
            standard,
        ])
        .arg("-I")
        .arg(repository.join("cuda/include"))
        .arg("-I")
        .arg(dir)
        .arg("-x")
        .arg(if standard.contains("++") { "c++" } else { "c" })
        .arg(repository.join("tests/c_abi/smoke.c"))
        .arg("-o")
        .arg(&object));
    let program = dir.join("smoke");
    let rpath = library.parent().expect("a directory");
    run(tool("CXX", "c++")
        .arg(&object)
        .arg(library)
        .arg(format!("-Wl,-rpath,{}", rpath.display()))
        .args(["-ldl", "-lpthread", "-lrt", "-lm", "-o"])
        .arg(&program));
    program
}

fn check(program: &Path) {
    assert_eq!(run(&mut Command::new(program)), "ok\n");
    assert_eq!(run(Command::new(program).arg("--layout")), layouts().lines);
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("skipped: valgrind is not installed");
        return;
    }
    let options = ["--quiet", "--error-exitcode=9", "--leak-check=full"];
    let checked = run(Command::new("valgrind").args(options).arg(program));
    assert_eq!(checked, "ok\n");
}

#[test]
fn c11_against_the_static_library() {
    let dir = tempfile::tempdir().unwrap();
    let library = library("libdspark.a");
    check(&build(dir.path(), tool("CC", "cc"), "-std=c11", &library));
}

#[test]
fn cpp17_against_the_shared_library() {
    let dir = tempfile::tempdir().unwrap();
    let library = library("libdspark.so");
    check(&build(
        dir.path(),
        tool("CXX", "c++"),
        "-std=c++17",
        &library,
    ));
}
