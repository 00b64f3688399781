// The next decode step's inputs from this step's samples. One threadgroup takes all rows. The kernel, which binds a
// table per group of layers and calls these, is written by kernels/gpu/step_advance.py.
// Reference: kernels/step_advance.py.
#include <metal_stdlib>
using namespace metal;
#include "ms_dialect.h"
#include "params.h"

// All of sampled row i but its slot mappings. row: the token's; moves: whether its position moves on.
inline void ms_advance_row(uint i, device const MSStep& step, device int* tokens, device int* positions,
                           device const uint* sampled_rows, device MSSampling* sampling,
                           device const MSSampled* sampled, device const int* limits, thread uint& row,
                           thread bool& moves) {
  row = sampled_rows[i];
  moves = false;
  if (row >= step.num_tokens) return;
  if (sampled[i].status != MS_SAMPLE_OK) return;
  tokens[row] = sampled[i].token;
  sampling[i].counter++;
  if (sampling[i].flags & MS_SAMPLE_COMMIT) sampling[i].counted++;
  moves = long(positions[row]) + 1 < long(limits[i]);
  if (moves) positions[row]++;
}

// The cache place of the row's position in one group of layers; -1: it has none.
inline void ms_advance_slot(uint row, bool moves, device const MSStep& step, device const int* positions,
                            device const int* seq_ids, device const int* tables, device int* slots, uint block_size) {
  if (row >= step.num_tokens) return;
  int slot = -1;
  const uint sequence = uint(seq_ids[row]), position = uint(positions[row]), block = position / block_size;
  if (moves && sequence < step.num_seqs && block < step.max_blocks) {
    const int id = tables[ulong(sequence) * step.max_blocks + block];
    if (id >= 0) slot = int(uint(id) * block_size + position % block_size);
  }
  slots[row] = slot;
}
