// matvec for one token, after which its last workgroup does what comes next: with `gated` SwiGLU, else the residual and the
// next norm. One launch instead of two. Lanes, segments, splits and dispatch as in matvec.

//#import state
//#import funnel
//#import ans
//#import stream
//#import matrix
//#import table
//#import sums
//#import digits
//#import dot
//#import segments
//#import product
//#import last
//#import quantize
//#import norm
//#import gated
//#import then

struct Params {
  rows: u32,
  rows_padded: u32,
  y_rows: u32,
  n_blocks: u32,
  n_segments: u32,
  offset: f32,
  n_groups: u32,  // of the dispatch
  dim: u32,       // of x, or hidden_dim
  eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> words: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> row_info: array<Row>;
@group(0) @binding(3) var<storage, read> entries: array<u32>;  // (n_segments, rows_padded)
@group(0) @binding(4) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> outliers: array<u32>;
@group(0) @binding(6) var<storage, read> in_digits: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read> in_scale: array<vec2<f32>>;
@group(0) @binding(8) var<storage, read_write> y: array<atomic<u32>>;  // f32 (splits, y_rows)
@group(0) @binding(9) var<storage, read_write> arrived: array<atomic<u32>>;
@group(0) @binding(10) var<storage, read_write> x: array<f32>;  // (dim,)
@group(0) @binding(11) var<storage, read> weight: array<f32>;
@group(0) @binding(12) var<storage, read_write> x_digits: array<u32>;
@group(0) @binding(13) var<storage, read_write> x_scale: array<vec2<f32>>;

@compute @workgroup_size(32, segments_per_group)
fn main(@builtin(local_invocation_id) local: vec3<u32>, @builtin(local_invocation_index) lane: u32,
        @builtin(workgroup_id) group: vec3<u32>) {
  let index = group.x * 32u + local.x;
  let row = row_info[index];
  let sums = segment_product(group.x, group.y, local.xy, row);
  write_sums(sums, row_scale(row), matrix_row(row), index, local.xy, group.y);
  if (last_to_arrive(lane, 0u, params.n_groups)) { then(lane); }
}
