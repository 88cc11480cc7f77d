// x[t] = embed_tokens[tokens[t]], weights without loss: embed for them, lanes and dispatch as there. f32, bit for bit.

//#import state
//#import funnel
//#import ans
//#import words
//#import stream
//#import matrix
//#import floats

struct Params {
  row_begin: u32,
  rows: u32,
  rows_padded: u32,
  cols: u32,
  n_segments: u32,
  n_blocks: u32,
  row_chunks: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> state: State;
@group(0) @binding(3) var<storage, read> row_info: array<Row>;  // of all rows, in the matrix's order; place is where they lie here
@group(0) @binding(4) var<storage, read> entries: array<u32>;  // (n_segments, rows_padded)
@group(0) @binding(5) var<storage, read> table: array<u32>;
@group(0) @binding(6) var<storage, read> outliers: array<u32>;
@group(0) @binding(7) var<storage, read> mantissas: array<vec4<u32>>;
@group(0) @binding(8) var<storage, read_write> x: array<f32>;  // (tokens, cols)

fn table_entry(s: ptr<function, Stream>) -> u32 { return table[(*s).table + (*s).state]; }

@compute @workgroup_size(32)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let row = row_info[state.tokens[group.y]];
  let index = matrix_row(row) - params.row_begin;  // wraps far past rows below row_begin
  if (index >= params.rows) { return; }
  let first = group.y * params.cols;
  let chunk = first_chunk(index);
  for (var segment = lane; segment < params.n_segments; segment += 32u) {
    let entry = entries[segment * params.rows_padded + index];
    var s = open_stream(row.bit, entry / n_states, entry & (n_states - 1u), first_entry(row));
    let begin = 32u * first_block(segment);
    let end = min(32u * first_block(segment + 1u), params.cols);
    for (var column = begin; column < end; column += 16u) {
      let w = decode_floats(&s, chunk, column >> 4u);
      var four = array<vec4<f32>, 4>(w.a, w.b, w.c, w.d);
      for (var k = 0u; k < min(16u, end - column); k++) { x[first + column + k] = four[k >> 2u][k & 3u]; }
    }
  }
  storageBarrier();
  workgroupBarrier();
  let end_k = end_outlier(row);
  for (var k = row.first_outlier + lane; k < end_k; k += 32u) {
    x[first + outlier_column(outliers[k])] = outlier_floats(chunk, outliers[k]).y;
  }
}
