// The whole packed LookupFFN for one instruction set: how a batch is cut, and who does which piece.
//
//   up to kRowsBatch tokens    pieces of 1 to 4 tokens, features in lanes; hash and gather of a piece run back to back
//   up to kFusedBatch          pieces of one tile, tokens in lanes; the same, rows fetched ahead from memory
//   more                       chunks: first all tiles are hashed, then (token block, column slice) pieces are gathered with
//                              groups of tables small enough for the L2 cache
// The cut depends on the shape alone, pieces are independent: any number of threads gives the same bits.
#pragma once
#include "lookup_gather.h"
#include "lookup_hash_rows.h"
#include "lookup_hash_tile.h"
#include "packed/lookup/pack.h"

namespace nogemm::NOGEMM_NS {

inline constexpr int64_t kRowsBatch = 16;
// In two phases 512 tokens take 1.05 (int8 rows) to 1.3 times (fp32) as long: too few of them share a row.
inline constexpr int64_t kFusedBatch = 1023;
inline constexpr int64_t kChunkTokens = 8192;
// A worker's second-level cache (2 MB where this was tuned) holds the sums of a block, one group's rows and the next's.
// fp32 tables are often larger than the last level: fewer blocks read them from memory fewer times.
NOGEMM_INLINE int64_t block_tokens(const LookupHeader& h) { return h.mode == NOGEMM_LOOKUP_FP32 ? 4128 : 1536; }
inline constexpr int64_t kGroupBytes = 512 << 10;
inline constexpr int kMaxNV = kRegisters == 32 ? 3 : 2;

struct Cut {
  int64_t piece;   // tokens per hash piece
  int64_t pieces;  // of a chunk
};

NOGEMM_INLINE int64_t tile_vectors(int64_t tokens) {
  const int64_t most = tokens >= 1024 ? kMaxNV : tokens >= 64 ? 2 : 1;  // small batches: enough tiles to share out
  return most < kMaxNV ? most : kMaxNV;
}

NOGEMM_INLINE Cut cut_of(int64_t tokens) {
  int64_t piece;
  if (tokens <= kRowsBatch) {
    piece = tokens < 2 * kRowTokens ? (tokens + 1) / 2 : kRowTokens;
  } else {
    piece = tile_vectors(tokens) * kLanes;
  }
  if (piece < 1) piece = 1;
  return {piece, (tokens + piece - 1) / piece};
}

// Bytes of the lookups of one piece, and of a worker's scratch.
NOGEMM_INLINE int64_t piece_bytes(const LookupHeader& h, int64_t piece) {
  const int64_t bytes = piece > kRowTokens ? lookups_bytes(h, piece) : piece * lookups_bytes(h, 1);
  return round_up(bytes, 64);
}
NOGEMM_INLINE int64_t worker_bytes(const LookupHeader& h, int64_t piece) {
  const int64_t block = block_tokens(h), sums = (piece > block ? piece : block) * h.slice() * 4;
  return place_hash_scratch(h, piece, nullptr, nullptr) + piece_bytes(h, piece) + sums + 4096;
}

static int64_t lookup_workspace(const LookupHeader* h, int64_t tokens, int64_t threads) {
  const int64_t chunk = tokens < kChunkTokens ? tokens : kChunkTokens;
  const Cut cut = cut_of(chunk);
  const int64_t stored = chunk > kFusedBatch ? cut.pieces * piece_bytes(*h, cut.piece) : 0;
  return stored + threads * worker_bytes(*h, cut.piece) + 4096;
}

struct Call {
  Layer layer;
  Tokens x;
  Output y;
  int64_t start, tokens;  // of the chunk
  Cut cut;
  char* lookups;  // of the chunk (two phases)
  char* workers;
  int64_t worker_bytes;
  int64_t worker_count;
  bool gather;    // false: stop after the lookups, for profiles
  int32_t* rows;  // where the lookups' rows go, [tokens of the call][lookups], or null
};

struct WorkerScratch {
  HashScratch hash;
  char* lookups;
  float* sums;
};

NOGEMM_INLINE WorkerScratch scratch_of(const Call& c, int64_t worker) {
  const LookupHeader& h = *c.layer.h;
  char* at = c.workers + worker * c.worker_bytes;
  WorkerScratch w;
  at += place_hash_scratch(h, c.cut.piece, at, &w.hash);
  w.lookups = at;
  w.sums = reinterpret_cast<float*>(at + piece_bytes(h, c.cut.piece));
  return w;
}

NOGEMM_INLINE const char* slice_rows(const Layer& l, int64_t slice) {
  const LookupHeader& h = *l.h;
  return l.at + h.tables_at + slice * h.tables * h.rows() * h.row_bytes(h.slice());
}

// Memory that a pass fetches for the next one, besides its own rows.
struct Soon {
  const char* at;
  int64_t bytes;
};

// One slice of one piece of tokens, all lookups from..to.
NOGEMM_INLINE void gather_piece(const Layer& l, int64_t slice, int64_t from, int64_t to, const Lookups& lookups,
                                int64_t tokens, float* sums, Output y, bool ahead, Soon soon) {
  const LookupHeader& h = *l.h;
  const int64_t width = h.slice_width(slice);
  const int64_t left = h.d_out - slice * h.slice();
  GatherPass g;
  g.rows = slice_rows(l, slice);
  g.row_bytes = h.row_bytes(width);
  g.chunks = width / kChunk;
  g.columns = left < width ? left : width;
  g.bias = Layer::floats(l, h.out_bias) + slice * h.slice();
  g.from = from;
  g.to = to;
  g.first = from == 0;
  g.last = to == lookups.count;
  g.sums = sums;
  g.sums_stride = h.slice();
  g.next_rows = slice + 1 < h.slices && h.last_slice == h.slice() ? slice_rows(l, slice + 1) : nullptr;
  g.soon = soon.at;
  g.soon_bytes = soon.bytes;
  y.y += slice * h.slice() * (y.dtype == NOGEMM_X_FP32 ? 4 : 2);
  switch (h.mode) {
    case NOGEMM_LOOKUP_FP32:
      return (ahead ? gather_tokens<float, true> : gather_tokens<float, false>)(g, lookups, tokens, y);
    case NOGEMM_LOOKUP_BF16:
      return (ahead ? gather_tokens<bf16, true> : gather_tokens<bf16, false>)(g, lookups, tokens, y);
    case NOGEMM_LOOKUP_INT8:
      return (ahead ? gather_tokens<uint8_t, true> : gather_tokens<uint8_t, false>)(g, lookups, tokens, y);
    default:
      return (ahead ? gather_tokens<Nibbles, true> : gather_tokens<Nibbles, false>)(g, lookups, tokens, y);
  }
}

NOGEMM_INLINE Output output_at(const Call& c, int64_t token) {
  Output y = c.y;
  y.y += token * y.stride * (y.dtype == NOGEMM_X_FP32 ? 4 : 2);
  return y;
}

NOGEMM_INLINE void gather_all(const Call& c, const Lookups& lookups, int64_t start, int64_t tokens, float* sums) {
  const LookupHeader& h = *c.layer.h;
  for (int64_t slice = 0; slice < h.slices; ++slice)
    gather_piece(c.layer, slice, 0, lookups.count, lookups, tokens, sums, output_at(c, start), true, {nullptr, 0});
}

// The rows of a few tokens, all slices: as many in flight as the memory system takes, before the first is needed.
NOGEMM_INLINE void fetch_rows(const Layer& l, const Lookups& lookups, int64_t slice) {
  const LookupHeader& h = *l.h;
  const int64_t bytes = h.row_bytes(h.slice_width(slice));
  const char* rows = slice_rows(l, slice);
  for (int64_t e = 0; e < lookups.count; ++e) fetch_ahead<true>(rows, bytes, bytes, lookups.index + e);
}

// What the tokens start .. start + tokens read: table t's rows are numbered from t R on.
NOGEMM_INLINE void tell_rows(const Call& c, const Lookups& lookups, int64_t start, int64_t tokens) {
  const int64_t count = c.layer.h->lookups();
  for (int64_t n = 0; n < tokens && c.rows != nullptr; ++n)
    for (int64_t e = 0; e < count; ++e) c.rows[(start + n) * count + e] = lookups.index[e * lookups.width + n];
}

template <class S>
static void run_rows_piece(const Call& c, int64_t start, int64_t tokens, const WorkerScratch& w) {
  const LookupHeader& h = *c.layer.h;
  Lookups lookups[kRowTokens];
  for (int64_t n = 0; n < tokens; ++n) lookups[n] = place_lookups(h, 1, w.lookups + n * lookups_bytes(h, 1));
  int64_t done = 0;
  for (; done + 4 <= tokens; done += 4) rows_hash<S, 4>(c.layer, c.x, start + done, w.hash, lookups + done);
  for (; done + 2 <= tokens; done += 2) rows_hash<S, 2>(c.layer, c.x, start + done, w.hash, lookups + done);
  for (; done < tokens; ++done) rows_hash<S, 1>(c.layer, c.x, start + done, w.hash, lookups + done);
  for (int64_t n = 0; n < tokens; ++n) tell_rows(c, lookups[n], start + n, 1);
  for (int64_t n = 0; n < tokens && c.gather; ++n) {
    fetch_rows(c.layer, lookups[n], 0);
    gather_all(c, lookups[n], start + n, 1, w.sums);
  }
}

template <class S>
NOGEMM_INLINE void hash_tile(const Call& c, int64_t start, int64_t tokens, const HashScratch& s, const Lookups& out) {
  const int64_t vectors = out.width / kLanes;
  if (vectors == 1) tile_hash<S, 1>(c.layer, c.x, start, tokens, s, out);
  if (vectors == 2) tile_hash<S, 2>(c.layer, c.x, start, tokens, s, out);
  if constexpr (kMaxNV > 2)
    if (vectors == 3) tile_hash<S, 3>(c.layer, c.x, start, tokens, s, out);
}

// The last tile of a batch is as narrow as its tokens allow.
NOGEMM_INLINE Lookups tile_lookups(const Call& c, int64_t tokens, char* at) {
  return place_lookups(*c.layer.h, round_up(tokens, kLanes), at);
}

NOGEMM_INLINE int64_t piece_tokens(const Call& c, int64_t piece) {
  const int64_t left = c.tokens - piece * c.cut.piece;
  return left < c.cut.piece ? left : c.cut.piece;
}

// Worker w's share of `pieces`, contiguous.
struct Share {
  int64_t from, to;
};
NOGEMM_INLINE Share share_of(const Call& c, int64_t worker, int64_t pieces) {
  return {pieces * worker / c.worker_count, pieces * (worker + 1) / c.worker_count};
}

template <class S>
static void run_fused(int64_t worker, void* arg) {
  const Call& c = *static_cast<const Call*>(arg);
  const WorkerScratch w = scratch_of(c, worker);
  const Share share = share_of(c, worker, c.cut.pieces);
  for (int64_t piece = share.from; piece < share.to; ++piece) {
    const int64_t start = c.start + piece * c.cut.piece, tokens = piece_tokens(c, piece);
    if (c.tokens <= kRowsBatch) {
      run_rows_piece<S>(c, start, tokens, w);
      continue;
    }
    const Lookups lookups = tile_lookups(c, tokens, w.lookups);
    hash_tile<S>(c, start, tokens, w.hash, lookups);
    tell_rows(c, lookups, start, tokens);
    if (c.gather) gather_all(c, lookups, start, tokens, w.sums);
  }
}

template <class S>
static void run_hash(int64_t worker, void* arg) {
  const Call& c = *static_cast<const Call*>(arg);
  const WorkerScratch w = scratch_of(c, worker);
  const Share share = share_of(c, worker, c.cut.pieces);
  for (int64_t piece = share.from; piece < share.to; ++piece) {
    const int64_t tokens = piece_tokens(c, piece);
    const Lookups lookups = tile_lookups(c, tokens, c.lookups + piece * piece_bytes(*c.layer.h, c.cut.piece));
    hash_tile<S>(c, c.start + piece * c.cut.piece, tokens, w.hash, lookups);
    tell_rows(c, lookups, c.start + piece * c.cut.piece, tokens);
  }
}

// How a chunk's gather is cut: blocks of hash pieces, groups of lookups.
struct GatherPlan {
  int64_t blocks, per_block;  // blocks of `per_block` pieces
  int64_t count, group;       // lookups per token, per group
  bool bulk;                  // a block touches most rows: fetch whole groups instead of single rows
};

NOGEMM_INLINE GatherPlan gather_plan(const Call& c) {
  const LookupHeader& h = *c.layer.h;
  GatherPlan p;
  const int64_t most = block_tokens(h) / c.cut.piece;
  p.blocks = (c.cut.pieces + most - 1) / most;
  if (h.slices % 2 == 1) p.blocks = round_up(p.blocks, 2);  // an even number of pieces: two threads get as many each
  p.per_block = (c.cut.pieces + p.blocks - 1) / p.blocks;
  p.count = padded_lookups(h);
  const int64_t table_bytes = h.rows() * h.row_bytes(h.slice());
  const int64_t fit = kGroupBytes / table_bytes > 1 ? kGroupBytes / table_bytes : 1;
  p.group = round_up(fit * h.neighbours, 4);
  p.bulk = p.per_block * c.cut.piece * h.neighbours >= h.rows();
  return p;
}

// The tables of the lookups from .. from + group of a slice.
NOGEMM_INLINE Soon group_rows(const Layer& l, const GatherPlan& p, int64_t slice, int64_t from) {
  const LookupHeader& h = *l.h;
  const int64_t to = from + p.group < h.lookups() ? from + p.group : h.lookups();
  const int64_t first = from / h.neighbours, end = (to + h.neighbours - 1) / h.neighbours;
  const int64_t table = h.rows() * h.row_bytes(h.slice_width(slice));
  return {slice_rows(l, slice) + first * table, (end - first) * table};
}

// One worker's (block, slice) pieces. Shares are cut block by block: workers then write different rows of y, and never
// meet in the page fault of a fresh one. They are walked slice by slice: workers then read the same slice's tables.
struct GatherWalk {
  Share share;
  int64_t blocks, slices, at;  // at: slice * blocks + block

  int64_t slice() const { return at / blocks; }
  int64_t block() const { return at % blocks; }
  bool done() const { return at >= blocks * slices; }
  void to_own() {  // the first piece from here on that is this worker's
    for (; !done(); ++at) {
      const int64_t i = block() * slices + slice();
      if (share.from <= i && i < share.to) return;
    }
  }
  GatherWalk next() const {
    GatherWalk walk = *this;
    ++walk.at;
    walk.to_own();
    return walk;
  }
};

static void run_gather(int64_t worker, void* arg) {
  const Call& c = *static_cast<const Call*>(arg);
  const LookupHeader& h = *c.layer.h;
  const WorkerScratch w = scratch_of(c, worker);
  const GatherPlan p = gather_plan(c);
  GatherWalk walk{share_of(c, worker, p.blocks * h.slices), p.blocks, h.slices, 0};
  for (walk.to_own(); !walk.done(); walk = walk.next()) {
    const int64_t slice = walk.slice(), first = walk.block() * p.per_block;
    const int64_t end = first + p.per_block < c.cut.pieces ? first + p.per_block : c.cut.pieces;
    const GatherWalk next = walk.next();
    for (int64_t from = 0; from < p.count; from += p.group) {
      const bool last_group = from + p.group >= p.count;
      Soon soon = {nullptr, 0};
      if (p.bulk && !last_group) soon = group_rows(c.layer, p, slice, from + p.group);
      if (p.bulk && last_group && !next.done()) soon = group_rows(c.layer, p, next.slice(), 0);
      for (int64_t piece = first; piece < end; ++piece) {
        const int64_t tokens = piece_tokens(c, piece), at = piece * c.cut.piece, pieces = end - first;
        const int64_t begin = soon.bytes * (piece - first) / pieces, stop = soon.bytes * (piece - first + 1) / pieces;
        const Lookups lookups = tile_lookups(c, tokens, c.lookups + piece * piece_bytes(h, c.cut.piece));
        gather_piece(c.layer, slice, from, last_group ? p.count : from + p.group, lookups, tokens,
                     w.sums + (at - first * c.cut.piece) * h.slice(), output_at(c, c.start + at), !p.bulk,
                     {soon.at + begin, stop - begin});
      }
    }
  }
}

NOGEMM_INLINE void on_workers(const NogemmHost& host, Call& c, int64_t pieces, void (*body)(int64_t, void*)) {
  c.worker_count = host.threads < pieces ? host.threads : pieces;
  if (c.worker_count <= 1) {
    c.worker_count = 1;
    body(0, &c);
  } else {
    host.run(host.self, c.worker_count, body, &c);
  }
}

static void lookup_run(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, void* y, int64_t tokens,
                       void* workspace, const NogemmHost* host, bool gather, int32_t* rows) {
  const auto* h = static_cast<const LookupHeader*>(packed);
  Call c;
  c.layer = {h, static_cast<const char*>(packed)};
  c.x = {static_cast<const char*>(x), x_dtype, x_stride};
  c.y = {static_cast<char*>(y), x_dtype, h->d_out};
  c.lookups = static_cast<char*>(workspace);
  c.gather = gather;
  c.rows = rows;
  for (c.start = 0; c.start < tokens; c.start += kChunkTokens) {
    c.tokens = tokens - c.start < kChunkTokens ? tokens - c.start : kChunkTokens;
    c.cut = cut_of(c.tokens);
    const bool fused = c.tokens <= kFusedBatch;
    c.worker_bytes = worker_bytes(*h, c.cut.piece);
    c.workers = c.lookups + (fused ? 0 : round_up(c.cut.pieces * piece_bytes(*h, c.cut.piece), 64));
    if (fused) {
      on_workers(*host, c, c.cut.pieces, h->fixed_point ? run_fused<FixedStep> : run_fused<FloatStep>);
      continue;
    }
    on_workers(*host, c, c.cut.pieces, h->fixed_point ? run_hash<FixedStep> : run_hash<FloatStep>);
    if (gather) on_workers(*host, c, gather_plan(c).blocks * h->slices, run_gather);
  }
}

static void lookup_forward(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, void* y,
                           int64_t tokens, void* workspace, const NogemmHost* host) {
  lookup_run(packed, x, x_dtype, x_stride, y, tokens, workspace, host, true, nullptr);
}

// Lookups alone, told in `rows` unless it is null. Profiles time it: the gather is what the whole call takes longer.
static void lookup_hash(const void* packed, const void* x, int64_t x_dtype, int64_t x_stride, int32_t* rows,
                        int64_t tokens, void* workspace, const NogemmHost* host) {
  lookup_run(packed, x, x_dtype, x_stride, nullptr, tokens, workspace, host, false, rows);
}

static constexpr nogemm::LookupKernels lookup_kernels() { return {lookup_workspace, lookup_forward, lookup_hash}; }

}  // namespace nogemm::NOGEMM_NS
