//! Bad arguments of the attention family's launchers: each has its status, is named in the message, and nothing is
//! launched, so that no GPU is needed. The addresses are none: a launch would not get away with them.
#![cfg(feature = "cuda")]

use std::ffi::CStr;
use std::ptr::{null, null_mut};

use dspark::sys;

/// Aligned for everything, and nobody's memory.
const ADDRESS: usize = 0x1000;
/// Past an address that is aligned: not to 2 bytes.
const ODD: usize = ADDRESS + 1;

type Params = sys::dspark_attention_params;
type Append = sys::dspark_qk_norm_rope_append_params;
type Commit = sys::dspark_commit_tree_params;
type Launcher = unsafe extern "C" fn(*const Params, sys::dspark_stream) -> sys::dspark_status;

fn at<T>(address: usize) -> *const T {
    std::ptr::without_provenance(address)
}

fn at_mut<T>(address: usize) -> *mut T {
    std::ptr::without_provenance_mut(address)
}

/// A verify pass of two requests over a long context, complete but for its workspace.
fn verify() -> Params {
    Params {
        struct_size: size_of::<Params>() as u32,
        dtype: sys::DSPARK_DTYPE_BF16,
        num_rows: 16,
        num_reqs: 2,
        max_rows_per_req: 8,
        max_seq_len: 65_536,
        num_q_heads: 32,
        num_kv_heads: 8,
        head_dim: 128,
        page_size: 16,
        max_pages_per_req: 4096,
        scale: 0.125,
        q: at(ADDRESS),
        k_cache: at(ADDRESS),
        v_cache: at(ADDRESS),
        k_block: null(),
        v_block: null(),
        qo_indptr: at(ADDRESS),
        seq_lens: at(ADDRESS),
        page_table: at(ADDRESS),
        out: at_mut(ADDRESS),
        workspace: null_mut(),
        workspace_bytes: 0,
        stride_q_row: 4096,
        stride_out_row: 4096,
        stride_cache_page: 16 * 1024,
        stride_cache_slot: 1024,
        stride_cache_head: 128,
        stride_block_row: 0,
        tree_mask: null(),
        window: 0,
        softcap: 0.0,
        batch_invariant: 0,
        kv_dtype: 0,
        k_scale: null(),
        v_scale: null(),
    }
}

fn draft() -> Params {
    Params {
        k_block: at(ADDRESS),
        v_block: at(ADDRESS),
        stride_block_row: 1024,
        ..verify()
    }
}

fn append() -> Append {
    Append {
        struct_size: size_of::<Append>() as u32,
        dtype: sys::DSPARK_DTYPE_BF16,
        num_rows: 16,
        num_reqs: 2,
        num_q_heads: 32,
        num_kv_heads: 8,
        head_dim: 128,
        page_size: 16,
        max_pages_per_req: 4,
        eps: 1e-6,
        rope_scale: 1.0,
        qkv: at(ADDRESS),
        q_norm: at(ADDRESS),
        k_norm: at(ADDRESS),
        inv_freq: at(ADDRESS),
        positions: at(ADDRESS),
        qo_indptr: at(ADDRESS),
        seq_lens: at(ADDRESS),
        page_table: at(ADDRESS),
        q_out: at_mut(ADDRESS),
        k_cache: at_mut(ADDRESS),
        v_cache: at_mut(ADDRESS),
        k_out: at_mut(ADDRESS),
        v_out: at_mut(ADDRESS),
        stride_qkv_row: 6144,
        stride_q_out_row: 4096,
        stride_kv_out_row: 1024,
        stride_cache_page: 16 * 1024,
        stride_cache_slot: 1024,
        stride_cache_head: 128,
        kv_dtype: 0,
        reserved: 0,
        k_scale: null(),
        v_scale: null(),
    }
}

fn commit() -> Commit {
    Commit {
        struct_size: size_of::<Commit>() as u32,
        kv_dtype: sys::DSPARK_DTYPE_BF16,
        num_reqs: 2,
        num_layers: 4,
        draft_len: 15,
        num_kv_heads: 8,
        head_dim: 128,
        page_size: 16,
        max_pages_per_req: 4,
        reserved: 0,
        accept_flags: at(ADDRESS),
        seq_lens: at(ADDRESS),
        page_table: at(ADDRESS),
        k_cache: at_mut(ADDRESS),
        v_cache: at_mut(ADDRESS),
        stride_cache_layer: 1 << 20,
        stride_cache_page: 16 * 1024,
        stride_cache_slot: 1024,
        stride_cache_head: 128,
    }
}

/// The launcher's answer and, unless that is good, its message.
fn answer(status: sys::dspark_status) -> (sys::dspark_status, String) {
    if status == sys::DSPARK_OK {
        return (status, String::new());
    }
    // SAFETY: a NUL-terminated string of this thread, good until the next call.
    let message = unsafe { CStr::from_ptr(sys::launch::dspark_last_error_cu()) };
    (status, message.to_string_lossy().into_owned())
}

fn expect_named(got: (sys::dspark_status, String), status: sys::dspark_status, field: &str) {
    let (found, message) = got;
    assert_eq!(found, status, "{field}: {message}");
    let named = [":", ","]
        .iter()
        .any(|end| message.contains(&format!("{field}{end}")));
    assert!(named, "{field} is not named in: {message}");
}

/// What spoils params, the status it has, and the field that the message names.
type Slip<P> = (fn(&mut P), sys::dspark_status, &'static str);

const NULL: sys::dspark_status = sys::DSPARK_ERROR_NULL_POINTER;
const INVALID: sys::dspark_status = sys::DSPARK_ERROR_INVALID_ARGUMENT;
const MISALIGNED: sys::dspark_status = sys::DSPARK_ERROR_MISALIGNED;
const WORKSPACE: sys::dspark_status = sys::DSPARK_ERROR_WORKSPACE_TOO_SMALL;
const DTYPE: sys::dspark_status = sys::DSPARK_ERROR_UNSUPPORTED_DTYPE;
const SHAPE: sys::dspark_status = sys::DSPARK_ERROR_UNSUPPORTED_SHAPE;

/// Sizes that neither form nor the size function takes.
const ATTENTION_SIZES: &[Slip<Params>] = &[
    (|p| p.dtype = 9, DTYPE, "dtype"),
    (|p| p.dtype = sys::DSPARK_DTYPE_E4M3, DTYPE, "dtype"),
    (|p| p.kv_dtype = 7, DTYPE, "kv_dtype"),
    (|p| p.kv_dtype = sys::DSPARK_DTYPE_F16, DTYPE, "kv_dtype"),
    (|p| p.num_rows = -1, INVALID, "num_rows"),
    (|p| p.num_reqs = -1, INVALID, "num_reqs"),
    (|p| p.max_rows_per_req = -1, INVALID, "max_rows_per_req"),
    (|p| p.max_seq_len = -1, INVALID, "max_seq_len"),
    (|p| p.num_q_heads = 0, INVALID, "num_q_heads"),
    (|p| p.num_kv_heads = 0, INVALID, "num_kv_heads"),
    (|p| p.num_q_heads = 33, SHAPE, "num_q_heads"),
    (|p| p.num_q_heads = 17 * 8, SHAPE, "num_q_heads"),
    (|p| p.head_dim = 80, SHAPE, "head_dim"),
    (|p| p.head_dim = 0, SHAPE, "head_dim"),
    (|p| p.head_dim = 512, SHAPE, "head_dim"),
    (|p| p.page_size = 0, INVALID, "page_size"),
    (|p| p.max_pages_per_req = -1, INVALID, "max_pages_per_req"),
    (|p| p.window = -1, INVALID, "window"),
    (|p| p.softcap = -1.0, INVALID, "softcap"),
    (|p| p.softcap = f32::NAN, INVALID, "softcap"),
    (|p| p.softcap = f32::INFINITY, INVALID, "softcap"),
    (|p| p.batch_invariant = 2, INVALID, "batch_invariant"),
    (
        |p| p.struct_size = 8,
        sys::DSPARK_ERROR_STRUCT_SIZE,
        "struct_size",
    ),
];

/// Operands that neither form takes. The last is good but for its workspace, which is looked at last: all that is not
/// spoiled passes.
const ATTENTION_OPERANDS: &[Slip<Params>] = &[
    (|p| p.q = null(), NULL, "q"),
    (|p| p.q = at(ADDRESS + 8), MISALIGNED, "q"),
    (|p| p.k_cache = null(), NULL, "k_cache"),
    (|p| p.k_cache = at(ADDRESS + 2), MISALIGNED, "k_cache"),
    (|p| p.v_cache = null(), NULL, "v_cache"),
    (|p| p.v_cache = at(ADDRESS + 4), MISALIGNED, "v_cache"),
    (|p| p.qo_indptr = null(), NULL, "qo_indptr"),
    (|p| p.qo_indptr = at(ODD), MISALIGNED, "qo_indptr"),
    (|p| p.seq_lens = null(), NULL, "seq_lens"),
    (|p| p.seq_lens = at(ADDRESS + 2), MISALIGNED, "seq_lens"),
    (|p| p.page_table = null(), NULL, "page_table"),
    (|p| p.page_table = at(ODD), MISALIGNED, "page_table"),
    (|p| p.out = null_mut(), NULL, "out"),
    (|p| p.out = at_mut(ADDRESS + 8), MISALIGNED, "out"),
    (|p| p.stride_q_row = 4097, MISALIGNED, "stride_q_row"),
    (|p| p.stride_out_row = 4100, MISALIGNED, "stride_out_row"),
    (
        |p| p.stride_cache_page += 4,
        MISALIGNED,
        "stride_cache_page",
    ),
    (
        |p| p.stride_cache_slot += 1,
        MISALIGNED,
        "stride_cache_slot",
    ),
    (
        |p| p.stride_cache_head += 2,
        MISALIGNED,
        "stride_cache_head",
    ),
    (|p| p.k_scale = at(ADDRESS + 2), MISALIGNED, "k_scale"),
    (|p| p.v_scale = at(ODD), MISALIGNED, "v_scale"),
    (|_| (), WORKSPACE, "workspace_bytes"),
    (|p| p.workspace_bytes = 64, WORKSPACE, "workspace_bytes"),
    (|p| p.workspace_bytes = 1 << 40, NULL, "workspace"),
    (
        |p| {
            p.workspace_bytes = 1 << 40;
            p.workspace = at_mut(ADDRESS + 128);
        },
        MISALIGNED,
        "workspace",
    ),
];

const VERIFY_ALONE: &[Slip<Params>] = &[
    (|p| p.k_block = at(ADDRESS), INVALID, "k_block"),
    (|p| p.v_block = at(ADDRESS), INVALID, "v_block"),
    (|p| p.tree_mask = at(ADDRESS + 2), MISALIGNED, "tree_mask"),
    (
        |p| {
            p.tree_mask = at(ADDRESS);
            p.max_rows_per_req = 65;
        },
        SHAPE,
        "max_rows_per_req",
    ),
    (
        |p| {
            p.tree_mask = at(ADDRESS);
            p.window = 63;
        },
        SHAPE,
        "window",
    ),
    // Of bytes, 16 of them: half of what 16-bit keys may be apart.
    (
        |p| {
            p.kv_dtype = sys::DSPARK_DTYPE_E4M3;
            p.stride_cache_slot = 1032;
        },
        MISALIGNED,
        "stride_cache_slot",
    ),
    (
        |p| {
            p.kv_dtype = sys::DSPARK_DTYPE_E4M3;
            p.tree_mask = at(ADDRESS);
            p.max_rows_per_req = 64;
            p.window = 64;
        },
        WORKSPACE,
        "workspace_bytes",
    ),
];

const DRAFT_ALONE: &[Slip<Params>] = &[
    (|p| p.k_block = null(), NULL, "k_block"),
    (|p| p.k_block = at(ADDRESS + 8), MISALIGNED, "k_block"),
    (|p| p.v_block = null(), NULL, "v_block"),
    (
        |p| p.stride_block_row = 1028,
        MISALIGNED,
        "stride_block_row",
    ),
    (|p| p.tree_mask = at(ADDRESS), INVALID, "tree_mask"),
    (|p| p.kv_dtype = sys::DSPARK_DTYPE_E4M3, DTYPE, "kv_dtype"),
];

#[test]
fn attention_names_what_it_refuses() {
    type Form = (fn() -> Params, Launcher, &'static [Slip<Params>]);
    let forms: [Form; 2] = [
        (
            verify,
            sys::launch::dspark_verify_attention_cu,
            VERIFY_ALONE,
        ),
        (draft, sys::launch::dspark_draft_attention_cu, DRAFT_ALONE),
    ];
    for (good, launcher, alone) in forms {
        let slips = ATTENTION_SIZES.iter().chain(ATTENTION_OPERANDS);
        for &(slip, status, field) in slips.chain(alone) {
            let mut params = good();
            slip(&mut params);
            // SAFETY: the params live through the call; their addresses are not followed on the host, and the device never
            // sees them, because every slip is refused.
            let got = unsafe { launcher(&raw const params, null_mut()) };
            expect_named(answer(got), status, field);
        }
        // SAFETY: NULL params are refused.
        let got = unsafe { launcher(null(), null_mut()) };
        expect_named(answer(got), NULL, "params");
    }
}

#[test]
fn the_workspace_of_attention_is_asked_for_with_good_sizes() {
    let size = |params: &Params, bytes: *mut usize| {
        // SAFETY: reads the sizes of the params, which live through the call, and writes at most one host integer.
        answer(unsafe { sys::launch::dspark_attention_workspace_size_cu(params, bytes) })
    };
    for &(slip, status, field) in ATTENTION_SIZES {
        let mut params = verify();
        slip(&mut params);
        let mut bytes = 77;
        expect_named(size(&params, &raw mut bytes), status, field);
        assert_eq!(bytes, 77, "{field}: written on failure");
    }
    expect_named(size(&verify(), null_mut()), NULL, "bytes");
    let mut bytes = 0;
    assert_eq!(size(&verify(), &raw mut bytes).0, sys::DSPARK_OK);
    assert!(bytes > 0, "the context is long enough to be split");
    let mut short = verify();
    short.workspace = at_mut(ADDRESS);
    short.workspace_bytes = bytes - 1;
    // SAFETY: as above; one byte short is refused.
    let got = unsafe { sys::launch::dspark_verify_attention_cu(&raw const short, null_mut()) };
    expect_named(answer(got), WORKSPACE, "workspace_bytes");
}

#[test]
fn passes_without_work_touch_nothing() {
    let idle: [fn(&mut Params); 3] = [
        |p| p.num_rows = 0,
        |p| p.num_reqs = 0,
        |p| p.max_rows_per_req = 0,
    ];
    for slip in idle {
        let mut params = verify();
        slip(&mut params);
        params.q = null();
        let mut bytes = 1;
        // SAFETY: nothing is read but sizes, nothing written but one host integer, and nothing launched.
        let statuses = unsafe {
            [
                sys::launch::dspark_attention_workspace_size_cu(&raw const params, &raw mut bytes),
                sys::launch::dspark_verify_attention_cu(&raw const params, null_mut()),
                sys::launch::dspark_draft_attention_cu(&raw const params, null_mut()),
            ]
        };
        assert_eq!((statuses, bytes), ([sys::DSPARK_OK; 3], 0));
    }
}

#[test]
fn the_append_names_what_it_refuses() {
    let slips: &[Slip<Append>] = &[
        (
            |p| p.struct_size = 8,
            sys::DSPARK_ERROR_STRUCT_SIZE,
            "struct_size",
        ),
        (|p| p.dtype = 9, DTYPE, "dtype"),
        (|p| p.num_rows = -1, INVALID, "num_rows"),
        (|p| p.num_reqs = -1, INVALID, "num_reqs"),
        (|p| p.num_q_heads = -1, INVALID, "num_q_heads"),
        (|p| p.num_kv_heads = -1, INVALID, "num_kv_heads"),
        (|p| p.head_dim = 96, SHAPE, "head_dim"),
        (|p| p.page_size = 0, INVALID, "page_size"),
        (|p| p.max_pages_per_req = -1, INVALID, "max_pages_per_req"),
        (|p| p.qkv = null(), NULL, "qkv"),
        (|p| p.qkv = at(ADDRESS + 8), MISALIGNED, "qkv"),
        (|p| p.stride_qkv_row += 4, MISALIGNED, "stride_qkv_row"),
        (|p| p.q_norm = at(ADDRESS + 2), MISALIGNED, "q_norm"),
        (|p| p.k_norm = at(ADDRESS + 2), MISALIGNED, "k_norm"),
        (|p| p.inv_freq = null(), NULL, "inv_freq"),
        (|p| p.positions = null(), NULL, "positions"),
        (|p| p.positions = at(ODD), MISALIGNED, "positions"),
        (|p| p.qo_indptr = null(), NULL, "qo_indptr"),
        (|p| p.q_out = null_mut(), NULL, "q_out"),
        (|p| p.stride_q_out_row += 1, MISALIGNED, "stride_q_out_row"),
        (|p| p.k_out = null_mut(), NULL, "k_out"),
        (|p| p.v_out = null_mut(), NULL, "v_out"),
        (
            |p| p.stride_kv_out_row += 1,
            MISALIGNED,
            "stride_kv_out_row",
        ),
        (|p| p.k_cache = null_mut(), NULL, "k_cache"),
        (|p| p.v_cache = null_mut(), NULL, "v_cache"),
        (|p| p.v_cache = at_mut(ADDRESS + 8), MISALIGNED, "v_cache"),
        (|p| p.seq_lens = null(), NULL, "seq_lens"),
        (|p| p.page_table = null(), NULL, "page_table"),
        (
            |p| p.stride_cache_page += 4,
            MISALIGNED,
            "stride_cache_page",
        ),
        (
            |p| p.stride_cache_slot += 4,
            MISALIGNED,
            "stride_cache_slot",
        ),
        (
            |p| p.stride_cache_head += 4,
            MISALIGNED,
            "stride_cache_head",
        ),
        (|p| p.kv_dtype = 7, DTYPE, "kv_dtype"),
        (|p| p.kv_dtype = sys::DSPARK_DTYPE_F16, DTYPE, "kv_dtype"),
        (|p| p.k_scale = at(ADDRESS), INVALID, "k_scale"),
        (|p| p.v_scale = at(ADDRESS), INVALID, "v_scale"),
        (|p| p.kv_dtype = sys::DSPARK_DTYPE_E4M3, NULL, "k_scale"),
        (
            |p| {
                p.kv_dtype = sys::DSPARK_DTYPE_E4M3;
                p.k_scale = at(ADDRESS);
            },
            NULL,
            "v_scale",
        ),
        (
            |p| {
                p.kv_dtype = sys::DSPARK_DTYPE_E4M3;
                p.k_scale = at(ADDRESS + 2);
            },
            MISALIGNED,
            "k_scale",
        ),
        // Of bytes, 16 of them: half of what 16-bit keys may be apart.
        (
            |p| {
                p.kv_dtype = sys::DSPARK_DTYPE_E4M3;
                p.stride_cache_slot = 1032;
            },
            MISALIGNED,
            "stride_cache_slot",
        ),
    ];
    for &(slip, status, field) in slips {
        let mut params = append();
        slip(&mut params);
        // SAFETY: the params live through the call, and every slip is refused before anything is launched.
        let got =
            unsafe { sys::launch::dspark_qk_norm_rope_append_cu(&raw const params, null_mut()) };
        expect_named(answer(got), status, field);
    }
}

#[test]
fn the_commit_names_what_it_refuses() {
    let slips: &[Slip<Commit>] = &[
        (
            |p| p.struct_size = 8,
            sys::DSPARK_ERROR_STRUCT_SIZE,
            "struct_size",
        ),
        (|p| p.kv_dtype = 0, DTYPE, "kv_dtype"),
        (|p| p.kv_dtype = 9, DTYPE, "kv_dtype"),
        (|p| p.num_reqs = -1, INVALID, "num_reqs"),
        (|p| p.num_layers = -1, INVALID, "num_layers"),
        (|p| p.draft_len = -1, INVALID, "draft_len"),
        (|p| p.draft_len = 64, INVALID, "draft_len"),
        (|p| p.num_kv_heads = 0, INVALID, "num_kv_heads"),
        (|p| p.head_dim = 32, SHAPE, "head_dim"),
        (|p| p.page_size = 0, INVALID, "page_size"),
        (|p| p.max_pages_per_req = -1, INVALID, "max_pages_per_req"),
        (|p| p.accept_flags = null(), NULL, "accept_flags"),
        (|p| p.accept_flags = at(ODD), MISALIGNED, "accept_flags"),
        (|p| p.seq_lens = null(), NULL, "seq_lens"),
        (|p| p.page_table = null(), NULL, "page_table"),
        (|p| p.k_cache = null_mut(), NULL, "k_cache"),
        (|p| p.k_cache = at_mut(ADDRESS + 8), MISALIGNED, "k_cache"),
        (|p| p.v_cache = null_mut(), NULL, "v_cache"),
        (
            |p| p.stride_cache_layer += 4,
            MISALIGNED,
            "stride_cache_layer",
        ),
        (
            |p| p.stride_cache_page += 4,
            MISALIGNED,
            "stride_cache_page",
        ),
        (
            |p| p.stride_cache_slot += 4,
            MISALIGNED,
            "stride_cache_slot",
        ),
        (
            |p| {
                p.kv_dtype = sys::DSPARK_DTYPE_E4M3;
                p.stride_cache_head += 8;
            },
            MISALIGNED,
            "stride_cache_head",
        ),
    ];
    let launch = |params: &Commit| {
        // SAFETY: the params live through the call; what is called here is refused or without work, and launches nothing.
        answer(unsafe { sys::launch::dspark_commit_tree_cu(params, null_mut()) })
    };
    for &(slip, status, field) in slips {
        let mut params = commit();
        slip(&mut params);
        expect_named(launch(&params), status, field);
    }
    let idle: [fn(&mut Commit); 3] = [
        |p| p.num_reqs = 0,
        |p| p.num_layers = 0,
        |p| p.draft_len = 0,
    ];
    for slip in idle {
        let mut params = commit();
        slip(&mut params);
        params.k_cache = null_mut();
        assert_eq!(launch(&params).0, sys::DSPARK_OK);
    }
}
