// y[split, t, row] = scale[row] * sum over the split's columns of W[row, column] x[t, column], W decoded on the way.
// Lane = row of a 32-row tile, workgroup row = column segment; the table is in workgroup memory. The consumer of y
// adds the splits up. Dispatch: (row tiles, splits). int8 digits times integers, exact; sums over blocks in f32.

//#import state
//#import funnel
//#import ans
//#import words
//#import stream
//#import matrix
//#import table
//#import sums
//#import digits
//#import input
//#import norm_factor
//#import shares
//#import dot
//#import segments
//#import outliers
//#import product

struct Params {
  rows: u32,
  rows_padded: u32,
  y_rows: u32,
  n_blocks: u32,
  n_segments: u32,
  offset: f32,
  norm_dim: u32,
  norm_eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> row_info: array<Row>;
@group(0) @binding(3) var<storage, read> entries: array<u32>;  // (n_segments, rows_padded)
@group(0) @binding(4) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> outliers: array<u32>;
@group(0) @binding(8) var<storage, read_write> y: array<f32>;  // (splits, tokens, y_rows)

fn store_y(i: u32, value: f32) { y[i] = value; }

fn product_scale(row: Row) -> f32 { return row_scale(row) * input_factor(); }

@compute @workgroup_size(32, segments_per_group)
fn main(@builtin(local_invocation_id) local: vec3<u32>, @builtin(workgroup_id) group: vec3<u32>) {
  // From the last tile on: in the last classes are the rows with most outliers, which a launch had better not end with.
  let tile = params.rows_padded / 32u - 1u - group.x;
  let index = tile * 32u + local.x;
  let row = row_info[index];
  let sums = segment_product(tile, group.y, local.xy, row);
  write_sums(sums, row, index, local.xy, group.y);
}
