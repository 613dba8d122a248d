/* Launchers of the draft family: the semi-autoregressive head. */
#include <algorithm>

#include "kernels/draft/sample.cuh"
#include "kernels/draft/tiled_steps.cuh"
#include "launch/draft/projections.cuh"

namespace dspark {
namespace {

constexpr size_t kWorkspaceAlignment = 256;

/* Up to 64 requests read W2 once; a vanilla head up to 128, split latents not. */
using TiledVanilla = TiledPolicy<1, 1>;
using TiledVanillaWide = TiledPolicy<2, 1>;
using TiledSplit = TiledPolicy<1, 2>;
constexpr int32_t kMinTiledReqs = TiledVanilla::kMaxReqs; /* of a full group */

/* Tokens of a tile: with few requests all warps share them and need more. */
constexpr int32_t tiled_tile_tokens(int32_t reqs_per_cta) {
  return reqs_per_cta <= TiledVanilla::kMTileReqs ? 64 : 32;
}

/* The most that any batch may ask for: a device that has less takes the other path for every batch,
 * so that results do not depend on the batch. */
constexpr size_t kMaxTiledSharedBytes = 112 * 1024;

template <typename Policy>
constexpr size_t tiled_shared_bytes(int32_t rank, int32_t reqs_per_cta) {
  return static_cast<size_t>(Policy::kStages) *
         tiled_stage_bytes<Policy>(rank, tiled_tile_tokens(reqs_per_cta), reqs_per_cta);
}
static_assert(kNoiseZone % tiled_tile_tokens(1) == 0 && kNoiseZone % tiled_tile_tokens(64) == 0);
static_assert(tiled_shared_bytes<TiledVanilla>(TiledVanilla::kMaxRank, 16) <= kMaxTiledSharedBytes);
static_assert(tiled_shared_bytes<TiledVanillaWide>(TiledVanilla::kMaxRank, 128) <=
              kMaxTiledSharedBytes);

/* Offsets in bytes; what a head does not need has no size. */
struct DraftLayout {
  size_t race_keys; /* RaceKey [draft_len, num_reqs] */
  size_t arrivals;  /* uint32 [draft_len, groups of at least kMinTiledReqs requests] */
  size_t races_end; /* of both, which start at zero */
  size_t latent;    /* f32 [num_reqs, markov_rank]: gated, rnn */
  size_t states[2]; /* f32 [num_reqs, markov_rank]: rnn */
  size_t winners;   /* Indexed [rows, num_tiles], rows of one launch */
  size_t bytes;
};

int64_t num_sample_tiles(const dspark_draft_head_params& p) {
  return ceil_div<int64_t>(p.vocab_size, kSampleTileRows);
}

DraftLayout draft_layout(const dspark_draft_head_params& p) {
  DraftLayout layout = {};
  size_t at = 0;
  const auto carve = [&at](size_t bytes) {
    const size_t offset = at;
    at += round_up(bytes, kWorkspaceAlignment);
    return offset;
  };
  const size_t num_reqs = p.num_reqs;
  const size_t num_races = p.head == DSPARK_HEAD_NONE ? 0 : num_reqs * p.draft_len;
  const size_t num_arrivals =
      p.head == DSPARK_HEAD_NONE ? 0 : ceil_div<size_t>(num_reqs, kMinTiledReqs) * p.draft_len;
  layout.race_keys = carve(num_races * sizeof(RaceKey));
  layout.arrivals = carve(num_arrivals * sizeof(uint32_t));
  layout.races_end = at;
  const size_t latent_bytes =
      has_latent_kernel(p.head) ? num_reqs * p.markov_rank * sizeof(float) : 0;
  const size_t state_bytes = p.head == DSPARK_HEAD_RNN ? latent_bytes : 0;
  const size_t num_rows = p.head == DSPARK_HEAD_NONE ? num_reqs * p.draft_len : num_reqs;
  layout.latent = carve(latent_bytes);
  layout.states[0] = carve(state_bytes);
  layout.states[1] = carve(state_bytes);
  layout.winners = carve(p.draft_len == 0 ? 0 : num_rows * num_sample_tiles(p) * sizeof(Indexed));
  layout.bytes = at;
  return layout;
}

dspark_status check_draft_sizes(const dspark_draft_head_params& p) {
  DSPARK_TRY(check_head_sizes(p));
  /* One CTA per tile and row is the largest grid. */
  const int64_t num_rows = static_cast<int64_t>(p.num_reqs) * p.draft_len;
  DSPARK_CHECK_ARG(num_rows <= INT32_MAX / num_sample_tiles(p), DSPARK_ERROR_UNSUPPORTED_SHAPE,
                   "num_reqs * draft_len: expected at most %lld rows of %d tokens, got %lld",
                   static_cast<long long>(INT32_MAX / num_sample_tiles(p)), p.vocab_size,
                   static_cast<long long>(num_rows));
  return DSPARK_OK;
}

/* The launches of one call, on weights of type T. */
template <typename T>
class DraftHead {
 public:
  DraftHead(const dspark_draft_head_params& params, dspark_stream stream)
      : p_(params), stream_(stream), layout_(draft_layout(params)), in_(head_inputs<T>(params)) {
    sample_.logits = p_.logits;
    sample_.anchor_positions = p_.anchor_positions;
    sample_.temperature = p_.temperature;
    sample_.seeds = p_.seeds;
    sample_.rules = p_.rules;
    sample_.winners = at<Indexed>(layout_.winners);
    sample_.mask = grammar_mask(p_);
    sample_.stride_logits_row = p_.stride_logits_row;
    sample_.vocab_size = p_.vocab_size;
    sample_.draft_len = p_.draft_len;
    sample_.num_tiles = static_cast<int32_t>(num_sample_tiles(p_));
    sample_.aligned_rows = aligned_16({p_.logits}) && p_.stride_logits_row % kQuad == 0;
  }

  dspark_status run() const {
    bool tiled = false;
    DSPARK_TRY(fits_tiled(&tiled));
    if (p_.head == DSPARK_HEAD_NONE) {
      DSPARK_TRY(sample_all_steps());
    } else if (tiled) {
      DSPARK_TRY(run_tiled());
    } else {
      for (int32_t step = 0; step < p_.draft_len; ++step) {
        if (has_latent_kernel(p_.head)) DSPARK_TRY(compute_latent(step));
        DSPARK_TRY(sample_step(step));
      }
    }
    return compute_confidence<T>(p_, stream_);
  }

 private:
  template <typename U>
  U* at(size_t offset) const {
    return reinterpret_cast<U*>(static_cast<char*>(p_.workspace) + offset);
  }

  /* Whether the tensor core form takes this head on this device: never a matter of the batch. */
  dspark_status fits_tiled(bool* fits) const {
    *fits = p_.head != DSPARK_HEAD_NONE && p_.markov_rank % TiledVanilla::kRankMultiple == 0 &&
            p_.markov_rank <= TiledVanilla::kMaxRank && sample_.aligned_rows &&
            aligned_16({p_.markov_w1, p_.markov_w2});
    if (!*fits) return DSPARK_OK;
    int shared_bytes = 0;
    DSPARK_TRY(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared_bytes));
    *fits = static_cast<size_t>(shared_bytes) >= kMaxTiledSharedBytes;
    return DSPARK_OK;
  }

  dspark_status run_tiled() const {
    DSPARK_TRY(check_cuda("cudaMemsetAsync",
                          cudaMemsetAsync(at<char>(layout_.race_keys), 0,
                                          layout_.races_end - layout_.race_keys, stream_)));
    if (has_latent_kernel(p_.head)) return run_tiled_with<TiledSplit>();
    return p_.num_reqs > TiledVanilla::kMaxReqs ? run_tiled_with<TiledVanillaWide>()
                                                : run_tiled_with<TiledVanilla>();
  }

  template <typename Policy>
  dspark_status run_tiled_with() const {
    constexpr const char* kName = "tiled_steps_kernel";
    const auto kernel = tiled_steps_kernel<T, Policy>;
    TiledArgs<T> args = tiled_args<Policy>();
    LaunchShape shape;
    shape.cta = dim3(Policy::kNumThreads);
    shape.shared_bytes = tiled_shared_bytes<Policy>(p_.markov_rank, args.reqs_per_cta);
    int max_ctas = 0;
    DSPARK_TRY(resident_ctas(kName, kernel, Policy::kNumThreads, shape.shared_bytes, &max_ctas));
    args.num_slots = std::min(std::max(max_ctas / args.num_groups, 1), args.num_tiles);
    shape.grid = dim3(args.num_slots * args.num_groups);

    int cooperative = 0;
    DSPARK_TRY(device_attribute(cudaDevAttrCooperativeLaunch, &cooperative));
    const bool one_launch = !has_latent_kernel(p_.head) && cooperative != 0 &&
                            args.num_slots * args.num_groups <= max_ctas;
    args.num_steps = one_launch ? p_.draft_len : 1;
    shape.cooperative = args.num_steps > 1;
    for (args.first_step = 0; args.first_step < p_.draft_len; args.first_step += args.num_steps) {
      if (has_latent_kernel(p_.head)) DSPARK_TRY(compute_latent(args.first_step));
      DSPARK_TRY(launch(kName, kernel, shape, stream_, args));
    }
    return DSPARK_OK;
  }

  template <typename Policy>
  TiledArgs<T> tiled_args() const {
    TiledArgs<T> args = {};
    args.in = in_;
    args.markov_w2 = static_cast<const T*>(p_.markov_w2);
    args.latent = at<float>(layout_.latent);
    args.logits = p_.logits;
    args.anchor_positions = p_.anchor_positions;
    args.temperature = p_.temperature;
    args.seeds = p_.seeds;
    args.rules = p_.rules;
    args.draft_tokens = p_.draft_tokens;
    args.race_keys = at<RaceKey>(layout_.race_keys);
    args.arrivals = at<uint32_t>(layout_.arrivals);
    args.mask = grammar_mask(p_);
    args.stride_logits_row = p_.stride_logits_row;
    args.reqs_per_cta = std::min(p_.num_reqs, Policy::kMaxReqs);
    args.num_groups = ceil_div(p_.num_reqs, args.reqs_per_cta);
    args.tile_tokens = tiled_tile_tokens(args.reqs_per_cta);
    args.num_tiles = ceil_div(p_.vocab_size, args.tile_tokens);
    return args;
  }

  dspark_status sample_all_steps() const {
    using Policy = SamplePolicy<1>;
    constexpr int64_t kWarpsPerCta = Policy::kNumThreads / kWarpSize;
    const int64_t num_rows = static_cast<int64_t>(p_.num_reqs) * p_.draft_len;
    const int64_t num_row_tiles = num_rows * sample_.num_tiles;
    const auto num_ctas = static_cast<uint32_t>(ceil_div(num_row_tiles, kWarpsPerCta));
    DSPARK_TRY(launch("sample_kernel", sample_kernel<Policy>, dim3(num_ctas),
                      dim3(Policy::kNumThreads), 0, stream_, sample_, num_row_tiles));
    return finish(static_cast<uint32_t>(num_rows), p_.draft_tokens, 1);
  }

  dspark_status compute_latent(int32_t step) const {
    const LatentBuffers buffers = {at<float>(layout_.latent),
                                   {at<float>(layout_.states[0]), at<float>(layout_.states[1])}};
    return dspark::compute_latent<T>(p_, buffers, step, stream_);
  }

  dspark_status sample_step(int32_t step) const {
    const bool vec = p_.markov_rank % 8 == 0 && aligned_16({p_.markov_w2});
    DSPARK_TRY(p_.num_reqs == 1 ? add_bias<SamplePolicy<1>>(step, vec)
                                : add_bias<SamplePolicy<8>>(step, vec));
    return finish(p_.num_reqs, p_.draft_tokens + step, p_.draft_len);
  }

  template <typename Policy>
  dspark_status add_bias(int32_t step, bool vec) const {
    BiasArgs<T> args;
    args.in = in_;
    args.sample = sample_;
    args.markov_w2 = static_cast<const T*>(p_.markov_w2);
    args.latent = has_latent_kernel(p_.head) ? at<float>(layout_.latent) : nullptr;
    args.step = step;
    const auto kernel =
        vec ? bias_sample_kernel<T, true, Policy> : bias_sample_kernel<T, false, Policy>;
    const uint32_t num_groups = ceil_div(p_.num_reqs, Policy::kNumReqs);
    const size_t shared_bytes = sizeof(float) * Policy::kNumReqs * p_.markov_rank;
    return launch("bias_sample_kernel", kernel, dim3(num_groups * sample_.num_tiles),
                  dim3(Policy::kNumThreads), shared_bytes, stream_, args);
  }

  dspark_status finish(uint32_t num_rows, int32_t* tokens, int64_t stride_token) const {
    return launch("finish_kernel", finish_kernel, dim3(num_rows), dim3(FinishPolicy::kNumThreads),
                  0, stream_, sample_.winners, sample_.num_tiles, tokens, stride_token);
  }

  const dspark_draft_head_params& p_;
  dspark_stream stream_;
  DraftLayout layout_;
  HeadInputs<T> in_;
  SampleInputs sample_;
};

}  // namespace
}  // namespace dspark

using namespace dspark;

extern "C" dspark_status DSPARK_FN(dspark_draft_head_workspace_size)(
    const dspark_draft_head_params* params, size_t* bytes) {
  DSPARK_CHECK_PARAMS(params, mask);
  DSPARK_TRY(check_draft_sizes(*params));
  DSPARK_CHECK_ARG(bytes != nullptr, DSPARK_ERROR_NULL_POINTER,
                   "bytes: expected a host pointer, got NULL");
  *bytes = draft_layout(*params).bytes;
  return DSPARK_OK;
}

extern "C" dspark_status DSPARK_FN(dspark_draft_head)(const dspark_draft_head_params* params,
                                                      dspark_stream stream) {
  DSPARK_CHECK_PARAMS(params, mask);
  const dspark_draft_head_params& p = *params;
  DSPARK_TRY(check_half_dtype(p.dtype));
  DSPARK_TRY(check_draft_sizes(p));
  if (p.num_reqs == 0 || p.draft_len == 0) return DSPARK_OK;
  DSPARK_TRY(check_pointer("logits", p.logits, sizeof(float)));
  DSPARK_TRY(check_head_pointers(p));
  DSPARK_TRY(check_workspace(p.workspace, p.workspace_bytes, draft_layout(p).bytes));
  return dispatch_half_dtype(
      p.dtype, [&](auto tag) { return DraftHead<typename decltype(tag)::type>(p, stream).run(); });
}
