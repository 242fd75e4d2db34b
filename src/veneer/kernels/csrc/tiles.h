// AMX tiles: all eight are 16 rows of 64 bytes.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace veneer {
namespace {

// Configures the tiles of this thread as long as it lives.
class Tiles {
public:
    Tiles() {
        struct alignas(64) {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } config{};
        config.palette = 1;
        for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

}  // namespace
}  // namespace veneer
