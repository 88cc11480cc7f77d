// x[t] = embed_tokens[tokens[t]], weights without loss: embed for them, lanes and dispatch as there. f32, bit for bit.

//#import state
//#import ans
//#import stream
//#import matrix
//#import floats

struct Params {
  row_begin: u32,
  rows: u32,
  rows_padded: u32,
  cols: u32,
  n_segments: u32,
  segment_blocks: u32,
  row_chunks: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> state: State;
@group(0) @binding(2) var<storage, read> words: array<u32>;
@group(0) @binding(3) var<storage, read> row_info: array<Row>;  // of all rows, in the matrix's order; place is where they lie here
@group(0) @binding(4) var<storage, read> entries: array<u32>;  // (n_segments, rows_padded)
@group(0) @binding(5) var<storage, read> table: array<u32>;
@group(0) @binding(6) var<storage, read> outliers: array<u32>;
@group(0) @binding(7) var<storage, read> mantissas: array<vec4<u32>>;
@group(0) @binding(8) var<storage, read_write> x: array<f32>;  // (tokens, cols)

fn table_entry(s: ptr<function, Stream>) -> u32 { return table[(*s).table + (*s).state]; }

@compute @workgroup_size(32)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let segment = id.x;
  let row = row_info[state.tokens[id.y]];
  let index = matrix_row(row) - params.row_begin;  // wraps far past rows below row_begin
  if (segment >= params.n_segments || index >= params.rows) { return; }
  let entry = entries[segment * params.rows_padded + index];
  let begin = segment * params.segment_blocks * 32u;
  let end = min(begin + params.segment_blocks * 32u, params.cols);
  let chunk = first_chunk(index);
  var s = open_stream(row.bit + entry / n_states, entry & (n_states - 1u), first_entry(row));
  for (var column = begin; column < end; column += 16u) {
    let w = decode_floats(&s, chunk, column >> 4u);
    var four = array<vec4<f32>, 4>(w.a, w.b, w.c, w.d);
    for (var k = 0u; k < min(16u, end - column); k++) {
      x[id.y * params.cols + column + k] = four[k >> 2u][k & 3u];
    }
  }
  let end_k = end_outlier(row);
  for (var k = row.first_outlier; k < end_k; k++) {
    let outlier = outliers[k];
    let column = outlier_column(outlier);
    if (column >= begin && column < end) { x[id.y * params.cols + column] = outlier_floats(chunk, outlier).y; }
  }
}
