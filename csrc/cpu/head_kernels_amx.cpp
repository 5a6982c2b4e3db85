// Tiles of AMX: 16 rows of 32 bfloat16 times 16 pairs of k in 16 lanes. A strip is two tiles high, a panel two wide: four
// products for four loads. All but the products and the strips is as in AVX-512.
#include "head_kernels_impl.h"

namespace pk {
namespace PK_ISA {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileDepth = 32;  // bfloat16 of a row of a tile
constexpr int kAmxStrip = 2 * kTileRows;
constexpr int64_t kTileElements = kTileRows * kTileDepth;

struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

void begin() {
  TileConfig config;
  std::memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = kTileRows;
  }
  _tile_loadconfig(&config);
}

void end() { _tile_release(); }

// out[k / 32][half of the strip][row][k % 32], as tiles are loaded.
void strip_of_rows(const HeadMatrix& m, int64_t first, int64_t k, int64_t depth, void* out) {
  bfloat16* to = static_cast<bfloat16*>(out);
  const bfloat16* data = static_cast<const bfloat16*>(m.data);
  for (int64_t e = k; e < k + depth; e += kTileDepth) {
    const int64_t there = m.columns - e < kTileDepth ? m.columns - e : kTileDepth;
    for (int64_t r = first; r < first + kAmxStrip; ++r, to += kTileDepth) {
      if (r >= m.rows || there <= 0) {
        std::memset(to, 0, kTileDepth * sizeof *to);
      } else if (there == kTileDepth) {
        std::memcpy(to, data + r * m.stride + e, kTileDepth * sizeof *to);
      } else {
        std::memcpy(to, data + r * m.stride + e, static_cast<size_t>(there) * sizeof *to);
        std::memset(to + there, 0, static_cast<size_t>(kTileDepth - there) * sizeof *to);
      }
    }
  }
}

// Words of pairs along k in lanes of rows, then turned four by four.
void strip_of_columns(const HeadMatrix& m, int64_t first, int64_t k, int64_t depth, void* out) {
  uint32_t* to = static_cast<uint32_t*>(out);
  constexpr int kWords = kTileDepth / 2;
  alignas(64) uint32_t words[kWords * kAmxStrip];
  for (int64_t e = k; e < k + depth; e += kTileDepth, to += kAmxStrip * kWords) {
    pack_columns<Pairs, kAmxStrip>(m, first, e, kTileDepth, words);
    for (int r = 0; r < kAmxStrip; r += 4) {
      for (int w = 0; w < kWords; w += 4) {
        U4 x[4];
        for (int i = 0; i < 4; ++i) x[i] = load_as<U4>(words + (w + i) * kAmxStrip + r);
        transpose(x);
        for (int i = 0; i < 4; ++i) store_as(to + (r + i) * kWords + w, x[i]);
      }
    }
  }
}

// Four accumulators over n steps of 32 in k; the two tiles of rows are kTileElements apart.
PK_INLINE void accumulate_tiles(const bfloat16* rows, int64_t row_step, const uint32_t* panel, int64_t n, float* tile,
                                int64_t row_stride, bool add) {
  const int64_t bytes = row_stride * 4;
  float* lower = tile + kTileRows * row_stride;
  if (add) {
    _tile_loadd(0, tile, bytes);
    _tile_loadd(1, tile + kLanes, bytes);
    _tile_loadd(2, lower, bytes);
    _tile_loadd(3, lower + kLanes, bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < n; ++i, rows += row_step, panel += kTileDepth / 2 * kPanel) {
    _tile_loadd(4, rows, 64);
    _tile_loadd(5, rows + kTileElements, 64);
    _tile_loadd(6, panel, 4 * kPanel);
    _tile_loadd(7, panel + kLanes, 4 * kPanel);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, tile, bytes);
  _tile_stored(1, tile + kLanes, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower + kLanes, bytes);
}

void product_by_tiles(const void* strip, const void* panel, int64_t depth, float* tile, int64_t row_stride, bool add) {
  accumulate_tiles(static_cast<const bfloat16*>(strip), 2 * kTileElements, static_cast<const uint32_t*>(panel),
                   depth / kTileDepth, tile, row_stride, add);
}

// A row of a gradient tile, kPanel tokens, is a row of a tile of AMX.
void product_of_gradients(const void* tiles, int64_t tile_stride, int64_t n_tiles, const void* panel, float* out,
                          int64_t row_stride, bool add) {
  static_assert(kPanel == kTileDepth, "a row of gradients is a row of a tile");
  accumulate_tiles(static_cast<const bfloat16*>(tiles), tile_stride, static_cast<const uint32_t*>(panel), n_tiles, out,
                   row_stride, add);
}

}  // namespace
}  // namespace PK_ISA

extern const HeadKernels head_kernels_amx;
const HeadKernels head_kernels_amx = {"amx",
                                      PK_ISA::kPanel,
                                      PK_ISA::kAmxStrip,
                                      PK_ISA::kTileDepth,
                                      2,
                                      PK_ISA::begin,
                                      PK_ISA::end,
                                      PK_ISA::rows_of<PK_ISA::kPanel>,
                                      PK_ISA::columns_of<PK_ISA::kPanel>,
                                      PK_ISA::strip_of_rows,
                                      PK_ISA::strip_of_columns,
                                      PK_ISA::product_by_tiles,
                                      PK_ISA::product_of_gradients,
                                      PK_ISA::finish,
                                      PK_ISA::softmax,
                                      PK_ISA::merge,
                                      PK_ISA::gradient,
                                      PK_ISA::convert};

}  // namespace pk
