// y[split, t, row] = scale[row] * sum over the split's columns of W[row, column] x[t, column], W decoded on the way.
// Lane = row of a 32-row tile, workgroup row = column segment; the table is in workgroup memory. The consumer of y
// adds the splits up. Dispatch: (row tiles, splits). int8 digits times integers, exact; sums over blocks in f32.

//#import state
//#import funnel
//#import ans
//#import stream
//#import matrix
//#import sums
//#import dot
//#import segments

struct Params {
  rows: u32,
  rows_padded: u32,
  y_rows: u32,
  n_blocks: u32,
  n_segments: u32,
  offset: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> words: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> row_info: array<Row>;
@group(0) @binding(3) var<storage, read> entries: array<u32>;  // (n_segments, rows_padded)
@group(0) @binding(4) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> outliers: array<u32>;
@group(0) @binding(6) var<storage, read> x_digits: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read> x_scale: array<vec2<f32>>;
@group(0) @binding(8) var<storage, read_write> y: array<f32>;  // (splits, tokens, y_rows)

@compute @workgroup_size(32, segments_per_group)
fn main(@builtin(local_invocation_id) local: vec3<u32>, @builtin(local_invocation_index) lane: u32,
        @builtin(workgroup_id) group: vec3<u32>) {
  let index = group.x * 32u + local.x;
  let row = row_info[index];
  let segment = group.y * segments_per_group + local.y;
  let entry = entries[segment * params.rows_padded + index];
  // The stream is on its way before the table, which all must wait for.
  var s = open_stream(row.bit, entry / n_states, entry & (n_states - 1u), 0u);
  load_table(lane, first_entry(row_info[group.x * 32u]));
  var sums = Sums();
  let end = first_block(segment + 1u);
  for (var block = first_block(segment); block < end; block++) {
    let a = decode16(&s);
    let b = decode16(&s);
    for (var t = 0u; t < tokens; t++) { sums[t] += block_dot(a, b, t, block); }
  }
  // The row's segments share its outliers, wherever these are.
  let end_k = end_outlier(row);
  for (var k = row.first_outlier + segment; k < end_k; k += params.n_segments) {
    let outlier = outliers[k];
    for (var t = 0u; t < tokens; t++) {
      sums[t] += outlier_value(outlier) * activation(t, outlier_column(outlier));
    }
  }
  write_sums(sums, row_scale(row), matrix_row(row), index, local.xy, group.y);
}
