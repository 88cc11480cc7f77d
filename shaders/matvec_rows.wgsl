// y[t, row] = scale[row] * sum of W[row, column] x[t, column], W decoded on the way: matvec for software adapters.
// A lane decodes whole rows: no workgroup memory, no barrier; the table lies in uniform memory, where a CPU's gather is
// twice as fast as from a storage buffer. Dispatch: ceil(rows / (LANES * ROWS)). Same arithmetic as matvec.

//#import state
//#import funnel
//#import ans
//#import stream
//#import matrix
//#import sums
//#import dot

const LANES = 8u;  // one AVX2 vector; the rows that interleave
const ROWS = 4u;   // of a lane: the activations are loaded once for all of them

struct Params {
  rows: u32,
  y_rows: u32,
  n_blocks: u32,
  n_segments: u32,  // 1
  offset: f32,
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
  let first = group.x * LANES * ROWS + lane;
  var streams: array<Stream, ROWS>;
  var sums: array<Sums, ROWS>;
  for (var r = 0u; r < ROWS; r++) {
    let index = first + r * LANES;
    let row = row_info[index];
    streams[r] = open_stream(row.bit, 0u, entries[index], first_entry(row));
  }
  for (var block = 0u; block < params.n_blocks; block++) {
    var a: array<Weights, ROWS>;
    var b: array<Weights, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
      var s = streams[r];
      a[r] = decode16(&s);
      b[r] = decode16(&s);
      streams[r] = s;
    }
    for (var t = 0u; t < tokens; t++) {
      var dot = array<f32, ROWS>();  // spelled out: without it naga does not zero it again in the next round
      for (var digit = digits; digit > 0u; digit--) {
        let at = digits_at(t, digit - 1u, block);
        let x0 = x_digits[at];
        let x1 = x_digits[at + 1u];
        for (var r = 0u; r < ROWS; r++) { dot[r] = dot[r] * DIGIT + f32(dot16(a[r], x0) + dot16(b[r], x1)); }
      }
      for (var r = 0u; r < ROWS; r++) { sums[r][t] += scaled(dot[r], t, block); }
    }
  }
  for (var r = 0u; r < ROWS; r++) {
    let index = first + r * LANES;
    let row = row_info[index];
    var total = sums[r];
    let end = end_outlier(row);
    for (var k = row.first_outlier; k < end; k++) {
      let outlier = outliers[k];
      for (var t = 0u; t < tokens; t++) {
        total[t] += outlier_value(outlier) * activation(t, outlier_column(outlier));
      }
    }
    if (index < params.rows) {
      for (var t = 0u; t < tokens; t++) {
        y[t * params.y_rows + matrix_row(row)] = total[t] * row_scale(row);
      }
    }
  }
}
