// y[split, t, row] = sum over the split's columns of W[row, column] x[t, column]: matvec for weights without loss.
// Lanes, segments and splits as in matvec; f32 throughout. Dispatch: (row tiles, splits).

//#import state
//#import funnel
//#import ans
//#import words
//#import stream
//#import matrix
//#import table
//#import floats
//#import sums
//#import dot_float
//#import segments

struct Params {
  rows: u32,
  rows_padded: u32,
  y_rows: u32,
  n_blocks: u32,
  n_segments: u32,
  row_chunks: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> row_info: array<Row>;
@group(0) @binding(3) var<storage, read> entries: array<u32>;  // (n_segments, rows_padded)
@group(0) @binding(4) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> outliers: array<u32>;
@group(0) @binding(6) var<storage, read> mantissas: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(8) var<storage, read_write> y: array<f32>;  // (splits, tokens, y_rows)

fn store_y(i: u32, value: f32) { y[i] = value; }

fn product_scale(row: Row) -> f32 { return 1.0; }

@compute @workgroup_size(32, segments_per_group)
fn main(@builtin(local_invocation_id) local: vec3<u32>, @builtin(local_invocation_index) lane: u32,
        @builtin(workgroup_id) group: vec3<u32>) {
  let index = group.x * 32u + local.x;
  let row = row_info[index];
  let segment = group.y * segments_per_group + local.y;
  let chunk = first_chunk(index);
  let entry = entries[segment * params.rows_padded + index];
  var s = open_stream(row.bit, entry / n_states, entry & (n_states - 1u), 0u);
  load_table(lane, 32u * segments_per_group, first_entry(row_info[group.x * 32u]));
  var sums = Sums();
  let end = 2u * first_block(segment + 1u);
  for (var column_group = 2u * first_block(segment); column_group < end; column_group++) {
    let w = decode_floats(&s, chunk, column_group);
    for (var t = 0u; t < tokens; t++) { sums[t] += group_dot(w, t, column_group); }
  }
  // The row's segments share its outliers, wherever these are.
  let end_k = end_outlier(row);
  for (var k = row.first_outlier + segment; k < end_k; k += params.n_segments) {
    let column = outlier_column(outliers[k]);
    let w = outlier_floats(chunk, outliers[k]);
    for (var t = 0u; t < tokens; t++) { sums[t] += outlier_dot(w, t, column); }
  }
  write_sums(sums, row, index, local.xy, group.y);
}
