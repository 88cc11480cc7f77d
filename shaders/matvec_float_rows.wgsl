// y[t, row] = sum of W[row, column] x[t, column]: matvec_float for software adapters, as matvec_rows is matvec for them.
// Dispatch: ceil(rows / (LANES * ROWS)).

//#import state
//#import funnel
//#import ans
//#import words
//#import stream
//#import matrix
//#import table_rows
//#import floats
//#import sums
//#import dot_float

const LANES = 8u;  // one AVX2 vector
const ROWS = 4u;   // of a lane: the activations are loaded once for all of them

struct Params {
  rows: u32,
  y_rows: u32,
  n_blocks: u32,
  n_segments: u32,  // 1
  row_chunks: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<uniform> table: array<vec4<u32>, 4096>;  // of all classes, and a rest never reached
@group(0) @binding(3) var<storage, read> row_info: array<Row>;
@group(0) @binding(4) var<storage, read> entries: array<u32>;  // the rows' initial states
@group(0) @binding(5) var<storage, read> outliers: array<u32>;
@group(0) @binding(6) var<storage, read> mantissas: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(8) var<storage, read_write> y: array<f32>;  // (1, tokens, y_rows)

@compute @workgroup_size(LANES)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let first = group.x * LANES * ROWS + lane;
  var streams: array<Stream, ROWS>;
  var chunks: array<u32, ROWS>;
  var sums: array<Sums, ROWS>;
  for (var r = 0u; r < ROWS; r++) {
    let index = first + r * LANES;
    let row = row_info[index];
    streams[r] = open_stream(row.bit, 0u, entries[index], first_entry(row));
    chunks[r] = first_chunk(index);
  }
  for (var column_group = 0u; column_group < 2u * params.n_blocks; column_group++) {
    var w: array<Floats, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
      var s = streams[r];
      w[r] = decode_floats(&s, chunks[r], column_group);
      streams[r] = s;
    }
    for (var t = 0u; t < tokens; t++) {
      for (var r = 0u; r < ROWS; r++) { sums[r][t] += group_dot(w[r], t, column_group); }
    }
  }
  for (var r = 0u; r < ROWS; r++) {
    let index = first + r * LANES;
    let row = row_info[index];
    var total = sums[r];
    let end = end_outlier(row);
    for (var k = row.first_outlier; k < end; k++) {
      let column = outlier_column(outliers[k]);
      let weights = outlier_floats(chunks[r], outliers[k]);
      for (var t = 0u; t < tokens; t++) { total[t] += outlier_dot(weights, t, column); }
    }
    if (index < params.rows) {
      for (var t = 0u; t < tokens; t++) { y[t * params.y_rows + matrix_row(row)] = total[t]; }
    }
  }
}
