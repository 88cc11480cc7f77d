// matvec of one token whose input is the norm of x + y, y being what the product before has left: every workgroup makes the columns
// that it reads. Two launches less a block, or less to wait for at the end of two, where these are few (model/gpu_matrix.py).
// Lanes, segments, splits and dispatch as in matvec.

//#import state
//#import funnel
//#import ans
//#import words
//#import stream
//#import matrix
//#import table
//#import sums
//#import digits
//#import quantized
//#import input_made
//#import input_normed
//#import dot
//#import norm_factor
//#import shares
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
@group(0) @binding(6) var<storage, read> x: array<vec4<f32>>;  // (norm_dim / 4,)
@group(0) @binding(7) var<storage, read> added: array<vec4<f32>>;  // (added_splits, norm_dim / 4)
@group(0) @binding(8) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(9) var<storage, read_write> x_out: array<vec4<f32>>;  // x + y
@group(0) @binding(10) var<storage, read_write> y: array<f32>;  // (splits, y_rows)

fn store_y(i: u32, value: f32) { y[i] = value; }

@compute @workgroup_size(32, segments_per_group)
fn main(@builtin(local_invocation_id) local: vec3<u32>, @builtin(local_invocation_index) lane: u32,
        @builtin(workgroup_id) group: vec3<u32>) {
  let index = group.x * 32u + local.x;
  leaves_x = group.x == 0u && group.y == 0u;
  let row = row_info[index];
  let sums = segment_product(group.x, group.y, local.xy, row);
  share_squares(lane);
  write_sums(sums, row, index, local.xy, group.y);
}
