// x[t] = embed_tokens[tokens[t]]: one row of the coded matrix, decoded.
// One workgroup a token: a lane decodes every lanes-th segment of the row. Dispatch: (1, tokens).
// f32 out; a token outside rows [row_begin, row_begin + rows) belongs to another part of the matrix and is left alone.

//#import state
//#import funnel
//#import ans
//#import words
//#import stream
//#import matrix
//#import table

override lanes: u32;

struct Params {
  row_begin: u32,
  rows: u32,
  rows_padded: u32,
  cols: u32,
  n_segments: u32,
  n_blocks: u32,
  offset: i32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> state: State;
@group(0) @binding(3) var<storage, read> row_info: array<Row>;  // of all rows, in the matrix's order; place is where they lie here
@group(0) @binding(4) var<storage, read> entries: array<u32>;  // (n_segments, rows_padded)
@group(0) @binding(5) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> outliers: array<u32>;
@group(0) @binding(7) var<storage, read_write> x: array<f32>;  // (tokens, cols)

fn write_columns(s: ptr<function, Stream>, raw: u32, begin: u32, end: u32, first: u32, scale: f32) {
  for (var column = begin; column < end; column += 16u) {
    let w = decode16(s, raw);
    for (var k = 0u; k < 16u; k++) {  // known beforehand, so that no byte is looked for
      let value = i32(weight_at(w, k)) + (params.offset >> (raw_bits - raw));
      if (column + k < end) { x[first + column + k] = f32(value) * scale; }
    }
  }
}

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let row = row_info[state.tokens[group.y]];
  let index = matrix_row(row) - params.row_begin;  // wraps far past rows below row_begin
  if (index >= params.rows) { return; }
  let first = group.y * params.cols;
  let scale = row_scale(row);
  load_table(lane, lanes, first_entry(row));
  for (var segment = lane; segment < params.n_segments; segment += lanes) {
    let entry = entries[segment * params.rows_padded + index];
    var s = open_stream(row.bit, entry / n_states, entry & (n_states - 1u), 0u);
    let begin = 32u * first_block(segment);
    let end = min(32u * first_block(segment + 1u), params.cols);
    if (is_narrow(row)) {
      write_columns(&s, narrow_raw_bits, begin, end, first, scale);
    } else {
      write_columns(&s, raw_bits, begin, end, first, scale);
    }
  }
  storageBarrier();
  workgroupBarrier();
  let end_k = end_outlier(row);
  for (var k = row.first_outlier + lane; k < end_k; k += lanes) {
    let outlier = outliers[k];
    x[first + outlier_column(outlier)] += outlier_value(outlier, row_raw_bits(row)) * scale;
  }
}
