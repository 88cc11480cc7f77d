// x[t] = embed_tokens[tokens[t]]: one row of the coded matrix, decoded.
// One lane decodes one segment of the row; workgroup y is the token. Dispatch: (ceil(n_segments / 32), tokens).
// f32 out; a token outside rows [row_begin, row_begin + rows) belongs to another part of the matrix and is left alone.

//#import state
//#import ans
//#import stream
//#import matrix

struct Params {
  row_begin: u32,
  rows: u32,
  rows_padded: u32,
  cols: u32,
  n_segments: u32,
  segment_blocks: u32,
  offset: i32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> state: State;
@group(0) @binding(2) var<storage, read> words: array<u32>;
@group(0) @binding(3) var<storage, read> row_info: array<Row>;  // of all rows, in the matrix's order; place is where they lie here
@group(0) @binding(4) var<storage, read> entries: array<u32>;  // (n_segments, rows_padded)
@group(0) @binding(5) var<storage, read> table: array<u32>;
@group(0) @binding(6) var<storage, read> outliers: array<u32>;
@group(0) @binding(7) var<storage, read_write> x: array<f32>;  // (tokens, cols)

fn table_entry(s: ptr<function, Stream>) -> u32 { return table[(*s).table + (*s).state]; }

@compute @workgroup_size(32)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  let segment = id.x;
  let row = row_info[state.tokens[id.y]];
  let index = matrix_row(row) - params.row_begin;  // wraps far past rows below row_begin
  if (segment >= params.n_segments || index >= params.rows) { return; }
  let entry = entries[segment * params.rows_padded + index];
  var s = open_stream(row.bit + entry / n_states, entry & (n_states - 1u), first_entry(row));
  let begin = segment * params.segment_blocks * 32u;
  let end = min(begin + params.segment_blocks * 32u, params.cols);
  let scale = row_scale(row);
  for (var column = begin; column < end; column += 16u) {
    let w = decode16(&s);
    for (var k = 0u; k < min(16u, end - column); k++) {
      let value = i32(weight_at(w, k)) + params.offset;
      x[id.y * params.cols + column + k] = f32(value) * scale;
    }
  }
  let end_k = end_outlier(row);
  for (var k = row.first_outlier; k < end_k; k++) {
    let outlier = outliers[k];
    let column = outlier_column(outlier);
    if (column >= begin && column < end) {
      x[id.y * params.cols + column] += outlier_value(outlier) * scale;
    }
  }
}
