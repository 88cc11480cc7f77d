// y[t, row] = scale[row] * sum of W[row, column] x[t, column], W decoded on the way: matvec for software adapters.
// A lane decodes whole rows: no workgroup memory, no barrier; the table lies in uniform memory, where a CPU's gather is
// twice as fast as from a storage buffer. Dispatch: ceil(rows / (LANES * rows_per_lane)). Same arithmetic as matvec.

//#import state
//#import ans
//#import stream_wide
//#import matrix
//#import sums
//#import dot

const LANES = 8u;  // one AVX2 vector; the rows that interleave

struct Params {
  rows: u32,
  y_rows: u32,
  n_blocks: u32,
  offset: i32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<uniform> table: array<vec4<u32>, 4096>;  // of all classes, and a rest never reached
@group(0) @binding(2) var<storage, read> words: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> row_info: array<Row>;
@group(0) @binding(4) var<storage, read> entries: array<u32>;  // the rows' initial states
@group(0) @binding(5) var<storage, read> outliers: array<u32>;
@group(0) @binding(6) var<storage, read> x_digits: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read> x_scale: array<vec2<f32>>;
@group(0) @binding(8) var<storage, read_write> y: array<f32>;  // (1, tokens, y_rows)

fn table_entry(s: ptr<function, Stream>) -> u32 {
  let i = (*s).table + (*s).state;
  return table[i >> 2u][i & 3u];
}

@compute @workgroup_size(LANES)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let first = group.x * LANES * rows_per_lane + lane;
  var streams: array<Stream, MAX_ROWS>;
  var sums: array<Sums, MAX_ROWS>;
  for (var r = 0u; r < rows_per_lane; r++) {
    let index = first + r * LANES;
    let row = row_info[index];
    streams[r] = open_stream(row.bit, entries[index], first_entry(row));
  }
  for (var block = 0u; block < params.n_blocks; block++) { accumulate_block(&streams, block, &sums); }
  for (var r = 0u; r < rows_per_lane; r++) {
    let index = first + r * LANES;
    let row = row_info[index];
    let total = add_outliers(row, sums[r]);
    if (index < params.rows) {
      for (var t = 0u; t < tokens; t++) {
        y[t * params.y_rows + matrix_row(row)] = total[t] * row_scale(row);
      }
    }
  }
}
