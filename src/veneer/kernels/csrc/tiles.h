// AMX tiles: eight registers of sixteen rows of 64 bytes. A tile's row is sixteen fp32 sums, or 32 bf16 factors. Within
// each file's own unnamed namespace.
//
// Of a product C += A B, A's tile is sixteen rows of 32 columns as they lie; B's is sixteen pairs of rows of sixteen
// columns, a column's pair side by side.
//
// GCC's tile intrinsics say nothing of the memory they read and write, so plain loads and stores may move across
// them: `settle` stands wherever one side reads what the other wrote.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace veneer {
namespace {

constexpr int TILE_ROWS = 16;
constexpr int TILE_BYTES = 64;  // of a row
constexpr int TILE_PAIRED = 32;  // bf16 numbers of a row

inline void settle() { asm volatile("" ::: "memory"); }

// While it lives, this thread has eight whole tiles. Others of the process (oneDNN) lay theirs out for each of their calls.
class Tiles {
public:
    Tiles() {
        Layout layout;
        for (int tile = 0; tile < 8; ++tile) {
            layout.bytes[tile] = TILE_BYTES;
            layout.rows[tile] = TILE_ROWS;
        }
        settle();
        __asm__ volatile("ldtilecfg %0" ::"m"(layout));
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

private:
    struct alignas(64) Layout {
        uint8_t palette = 1, first_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };
};

}  // namespace
}  // namespace veneer
