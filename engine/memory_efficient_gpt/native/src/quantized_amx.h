// The product of quantized_linear.cpp by Intel's matrix tiles (AMX): 16 rows of x by a block of 16 outputs at a time.
//
// Method: a tile's rows of codes are units as they are stored, unpacked to one byte a code; tile instructions give a
// span's dot products as exact integers, and what follows is the same chain of operations as there, so both give the
// same bits. A few blocks' codes of a few spans are unpacked at a time and stay in L1 while all rows pass.
#pragma once

#include "amx.h"

#if defined(MEGPT_AMX)

#include "quantized_linear.h"

namespace megpt {

// Rows for which tiles are ahead: fewer leave them emptier than registers, and of 17 to 20 most of the second is empty.
inline bool suits_tiles(int64_t rows) { return (rows >= 13 && rows <= 16) || rows > 20; }

namespace amx {

constexpr int kRows = 16;               // rows of x of a tile
constexpr int64_t kTileInputs = 64;     // inputs of a tile, at most
constexpr int64_t kPartTiles = 8;       // tiles of rows that pass together; their sums stay in L1
constexpr int64_t kPartSpans = 4;       // spans unpacked together
constexpr int64_t kPartBlocks = 4;      // blocks unpacked together

// Tile registers, which the instructions want as literals: 0 and 5 sums; 1 and 2 the first and second half of a span of x,
// 3 and 4 of codes.
struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    explicit Shapes(int64_t span) {
        const int64_t first = std::min(span, kTileInputs), second = span - first;
        set(0, kRows, kBlock * 4);
        set(5, kRows, kBlock * 4);
        set(1, kRows, first);
        set(3, first / 4, kUnit);
        if (second == 0) return;
        set(2, kRows, second);
        set(4, second / 4, kUnit);
    }

    void set(int tile, int64_t height, int64_t bytes) {
        rows[tile] = static_cast<uint8_t>(height);
        row_bytes[tile] = static_cast<uint16_t>(bytes);
    }

    // GCC's intrinsic says that it reads 8 of the 64 bytes, and what writes the others may be left out.
    void load() const {
        __asm__ volatile("" : : "m"(*this));
        _tile_loadconfig(this);
    }
};

// x in 8 bits: [tiles of rows][spans][16][span]; per tile, span and row the step and what makes up for codes that are
// not centred: of symmetric ones -128 times the sum of q, which is added to the dot products (8 bits); of others minus
// step times the sum, for their offsets.
struct Rounded {
    int8_t* q;
    float* step;
    int32_t* middle;
    float* shift;
};

template <class E>
void round_rows(const QuantizedProblem& p, const Rounded& x, int64_t tile) {
    for (int64_t r = 0; r < kRows; ++r) {
        const int64_t row = tile * kRows + r;
        for (int64_t i = 0; i < p.s.spans; ++i) {
            const int64_t at = (tile * p.s.spans + i) * kRows + r;
            int8_t* out = x.q + at * p.s.span;
            if (row >= p.s.M) {
                std::memset(out, 0, static_cast<size_t>(p.s.span));
                x.step[at] = x.shift[at] = 0.0f;
                x.middle[at] = 0;
                continue;
            }
            const E* from = static_cast<const E*>(p.x) + row * p.s.x_stride + i * p.s.span;
            x.step[at] = round_span(from, p.span_inputs(i), p.s.span, p.unit, out);
            if (p.offsets == nullptr && p.s.bits == 4) continue;
            const int32_t sum = sum_of(out, p.s.span);
            x.middle[at] = -128 * sum;
            x.shift[at] = -x.step[at] * static_cast<float>(sum);
        }
    }
}

// A block's span of 4-bit codes, one byte each; of symmetric ones signed, so that zero is 0.
template <bool SYMMETRIC>
void unpack(const uint8_t* codes, int64_t span, uint8_t* out) {
    for (int64_t u = 0; u < span / 8; ++u, codes += kUnit, out += 2 * kUnit) {
        __builtin_prefetch(codes + 4096, 0, 3);
        const Vi v = load_codes(codes), middle = _mm512_set1_epi8(SYMMETRIC ? 8 : 0);
        _mm512_store_si512(out, _mm512_sub_epi8(low_nibbles(v), middle));
        _mm512_store_si512(out + kUnit, _mm512_sub_epi8(high_nibbles(v), middle));
    }
}

// A span's dot products of 16 rows and a block, into tile 0 or (ODD) 5, both of 16 x 16 sums.
template <bool SIGNED, bool ODD>
inline void multiply_span(const int8_t* q, const uint8_t* codes, int64_t span) {
    _tile_loadd(1, q, span);
    _tile_loadd(3, codes, kUnit);
    if constexpr (ODD) {
        _tile_zero(5);
        if constexpr (SIGNED) _tile_dpbssd(5, 1, 3); else _tile_dpbsud(5, 1, 3);
    } else {
        _tile_zero(0);
        if constexpr (SIGNED) _tile_dpbssd(0, 1, 3); else _tile_dpbsud(0, 1, 3);
    }
    if (span <= kTileInputs) return;
    _tile_loadd(2, q + kTileInputs, span);
    _tile_loadd(4, codes + kTileInputs / 4 * kUnit, kUnit);
    if constexpr (ODD) {
        if constexpr (SIGNED) _tile_dpbssd(5, 2, 4); else _tile_dpbsud(5, 2, 4);
    } else {
        if constexpr (SIGNED) _tile_dpbssd(0, 2, 4); else _tile_dpbsud(0, 2, 4);
    }
}

// Spans first .. first + count - 1 of a tile of rows and a block, added to totals [16][16].
template <int BITS, bool SYMMETRIC>
void add_spans(const QuantizedProblem& p, const Rounded& x, int64_t tile, int64_t block, int64_t first, int64_t count,
               const uint8_t* codes, float* totals) {
    constexpr bool kSigned = BITS == 4 && SYMMETRIC;
    alignas(64) int32_t dots[kRows * kBlock];
    const int64_t span = p.s.span, per_group = p.s.per_group;
    const int64_t row = (tile * p.s.spans + first) * kRows;
    const int8_t* q = x.q + row * span;
    const float* step = x.step + row;
    const int32_t* middle = x.middle + row;
    const float* shift = x.shift + row;
    int64_t left = per_group - first % per_group;  // spans of the group that are to come
    int64_t at = (block * p.groups() + first / per_group) * kBlock;
    Vf total[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) total[r] = first == 0 ? zero() : load(totals + r * kBlock);
    const auto add = [&]() __attribute__((always_inline)) {
        const Vf scale = load_half(p.scales + at);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            Vi dot = _mm512_load_si512(dots + r * kBlock);
            if constexpr (BITS == 8 && SYMMETRIC) dot = _mm512_add_epi32(dot, splat(middle[r]));
            total[r] = fma(mul(scale, set1(step[r])), to_float(dot), total[r]);
        }
        if constexpr (!SYMMETRIC) {
            const Vf offset = load_half(p.offsets + at);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) total[r] = fma(offset, set1(shift[r]), total[r]);
        }
        step += kRows;
        middle += kRows;
        shift += kRows;
        if (--left == 0) left = per_group, at += kBlock;
    };
    // A span's tile is stored when the next one's products have begun: it takes long until a sum can be read.
    multiply_span<kSigned, false>(q, codes, span);
    for (int64_t i = 1; i < count; i += 2) {
        multiply_span<kSigned, true>(q + i * kRows * span, codes + i * span * kBlock, span);
        _tile_stored(0, dots, kBlock * 4);
        add();
        if (i + 1 < count) multiply_span<kSigned, false>(q + (i + 1) * kRows * span, codes + (i + 1) * span * kBlock, span);
        _tile_stored(5, dots, kBlock * 4);
        add();
    }
    if (count % 2 == 1) {
        _tile_stored(0, dots, kBlock * 4);
        add();
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) store(totals + r * kBlock, total[r]);
}

// Rows of tiles first_tile .. last_tile - 1 by blocks first_block .. last_block - 1.
template <class E, int BITS, bool SYMMETRIC>
void multiply_part(const QuantizedProblem& p, const Rounded& x, int64_t first_tile, int64_t last_tile,
                   int64_t first_block, int64_t last_block) {
    static thread_local Scratch scratch;
    const int64_t blocks = last_block - first_block, span_bytes = p.s.span * kBlock * BITS / 8;
    const int64_t unpacked = kPartSpans * p.s.span * kBlock;
    float* totals = static_cast<float*>(
        scratch.reserve(static_cast<size_t>(blocks * (unpacked + kPartTiles * kRows * kBlock * 4))));
    uint8_t* bytes = reinterpret_cast<uint8_t*>(totals + kPartTiles * blocks * kRows * kBlock);
    for (int64_t first = 0; first < p.s.spans; first += kPartSpans) {
        const int64_t count = std::min(kPartSpans, p.s.spans - first);
        const auto codes_of = [&](int64_t b) { return p.codes + (first_block + b) * p.block_bytes() + first * span_bytes; };
        if constexpr (BITS == 4)
            for (int64_t b = 0; b < blocks; ++b) unpack<SYMMETRIC>(codes_of(b), count * p.s.span, bytes + b * unpacked);
        for (int64_t tile = first_tile; tile < last_tile; ++tile)
            for (int64_t b = 0; b < blocks; ++b)
                add_spans<BITS, SYMMETRIC>(p, x, tile, first_block + b, first, count,
                                           BITS == 4 ? bytes + b * unpacked : codes_of(b),
                                           totals + ((tile - first_tile) * blocks + b) * kRows * kBlock);
    }
    for (int64_t tile = first_tile; tile < last_tile; ++tile)
        for (int64_t r = 0; r < std::min<int64_t>(kRows, p.s.M - tile * kRows); ++r)
            for (int64_t b = 0; b < blocks; ++b)
                store_outputs<E>(p, load(totals + (((tile - first_tile) * blocks + b) * kRows + r) * kBlock),
                                 tile * kRows + r, (first_block + b) * kBlock);
}

template <class E, int BITS, bool SYMMETRIC>
void multiply_all(const QuantizedProblem& p, const Rounded& x, int64_t tiles) {
    // One thread's pace: 800 products a nanosecond, 20 bytes of codes.
    const int team = useful_threads(p.s.threads, std::max(p.products() / 800e3, p.bytes() / 20e3));
    parallel_for(tiles, tiles >= 4 ? team : 1, [&](int64_t tile) { round_rows<E>(p, x, tile); });
    const Shapes shapes(p.s.span);
    const int64_t blocks = p.blocks();
    const int64_t step = tiles == 1 ? 1 : std::min(kPartBlocks, ceil_div(blocks, 4 * team));
    parallel_for(ceil_div(blocks, step), team, [&](int64_t item) {
        shapes.load();
        for (int64_t first = 0; first < tiles; first += kPartTiles)
            multiply_part<E, BITS, SYMMETRIC>(p, x, first, std::min(tiles, first + kPartTiles), item * step,
                                              std::min(blocks, (item + 1) * step));
        _tile_release();
    });
}

template <class E>
void multiply(const QuantizedProblem& p) {
    static thread_local Scratch scratch;
    const int64_t tiles = ceil_div(p.s.M, kRows);
    const size_t rows = static_cast<size_t>(tiles * kRows * p.s.spans);
    char* memory = static_cast<char*>(scratch.reserve(rows * (static_cast<size_t>(p.s.span) + 12)));
    Rounded x;
    x.q = reinterpret_cast<int8_t*>(memory);
    x.step = reinterpret_cast<float*>(memory + rows * static_cast<size_t>(p.s.span));
    x.shift = x.step + rows;
    x.middle = reinterpret_cast<int32_t*>(x.shift + rows);
    const bool symmetric = p.offsets == nullptr;
    if (p.s.bits == 4)
        symmetric ? multiply_all<E, 4, true>(p, x, tiles) : multiply_all<E, 4, false>(p, x, tiles);
    else
        symmetric ? multiply_all<E, 8, true>(p, x, tiles) : multiply_all<E, 8, false>(p, x, tiles);
}

}  // namespace amx
}  // namespace megpt

#endif
