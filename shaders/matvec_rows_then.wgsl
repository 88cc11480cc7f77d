// matvec_rows for one token, and what comes next as its rows are there: with `gated` SwiGLU, else the residual and the next
// norm. One launch instead of two.

//#import state
//#import funnel
//#import ans
//#import words
//#import stream
//#import matrix
//#import table_rows
//#import streams
//#import sums
//#import digits
//#import input
//#import dot
//#import product_rows
//#import squares
//#import norm_factor
//#import quantized
//#import quantize
//#import quantize_normed
//#import silu
//#import gated
//#import then

struct Params {
  rows: u32,
  y_rows: u32,
  n_blocks: u32,
  n_segments: u32,  // 1
  offset: f32,
  norm_dim: u32,
  norm_eps: f32,
  dim: u32,  // of x, or hidden_dim
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<uniform> table: array<vec4<u32>, 4096>;  // of all classes, and a rest never reached
@group(0) @binding(3) var<storage, read> row_info: array<Row>;
@group(0) @binding(4) var<storage, read> entries: array<u32>;  // the rows' initial states
@group(0) @binding(5) var<storage, read> outliers: array<u32>;
@group(0) @binding(8) var<storage, read_write> y: array<atomic<u32>>;  // f32 (1, y_rows)
@group(0) @binding(9) var<storage, read_write> arrived: array<atomic<u32>>;  // one a block
@group(0) @binding(10) var<storage, read_write> x: array<f32>;  // (dim,)
@group(0) @binding(11) var<storage, read> weight: array<f32>;
@group(0) @binding(12) var<storage, read_write> x_digits: array<u32>;
@group(0) @binding(13) var<storage, read_write> x_scale: array<vec2<f32>>;
@group(0) @binding(14) var<storage, read_write> squares: array<vec4<f32>>;  // gated: of what comes in; else of x

@compute @workgroup_size(LANES)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let first = group.x * LANES * ROWS + lane;
  none_ready(lane);
  rows_product(first, norm_factor(share_of_squares(0u, 1u)));
  storageBarrier();
  workgroupBarrier();
  for (var r = 0u; r < ROWS; r++) {
    let index = first + r * LANES;
    if (index < params.rows) { arrive(matrix_row(row_info[index])); }
  }
  then(lane);
}
