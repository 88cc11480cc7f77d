// entries[segment, row] = (bit within the row) * n_states + state, where a lane may enter the row's stream.
// Run once at load. One lane walks one row; entries of segment 0 are the file's initial states.
// Dispatch: ceil(rows / 32).

//#import funnel
//#import ans
//#import words
//#import stream
//#import matrix

struct Params {
  rows: u32,
  rows_padded: u32,
  n_segments: u32,
  n_blocks: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> row_info: array<Row>;
@group(0) @binding(3) var<storage, read> table: array<u32>;
@group(0) @binding(4) var<storage, read_write> entries: array<u32>;  // (n_segments, rows_padded)

fn table_entry(s: ptr<function, Stream>) -> u32 { return table[(*s).table + (*s).state]; }

fn skip(s: ptr<function, Stream>, blocks: u32, raw: u32) {
  for (var half = 0u; half < 2u * blocks; half++) { _ = decode16(s, raw); }
}

@compute @workgroup_size(32)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x >= params.rows) { return; }
  let row = row_info[id.x];
  var s = open_stream(row.bit, 0u, entries[id.x], first_entry(row));
  for (var segment = 1u; segment < params.n_segments; segment++) {
    let blocks = first_block(segment) - first_block(segment - 1u);
    if (is_narrow(row)) {
      skip(&s, blocks, narrow_raw_bits);
    } else {
      skip(&s, blocks, raw_bits);
    }
    entries[segment * params.rows_padded + id.x] = bits_read(&s, row.bit) * n_states + s.state;
  }
}
