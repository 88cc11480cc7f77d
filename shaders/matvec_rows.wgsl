// y[t, row] = scale[row] * sum of W[row, column] x[t, column], W decoded on the way: matvec for software adapters.
// A lane decodes whole rows: no workgroup memory, no barrier; the table lies in uniform memory, where a CPU's gather is
// twice as fast as from a storage buffer. Dispatch: ceil(rows / (LANES * ROWS)). Same arithmetic as matvec.

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
//#import squares
//#import norm_factor
//#import product_rows

struct Params {
  rows: u32,
  y_rows: u32,
  n_blocks: u32,
  n_segments: u32,  // 1
  offset: f32,
  norm_dim: u32,
  norm_eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<uniform> table: array<vec4<u32>, 4096>;  // of all classes, and a rest never reached
@group(0) @binding(3) var<storage, read> row_info: array<Row>;
@group(0) @binding(4) var<storage, read> entries: array<u32>;  // the rows' initial states
@group(0) @binding(5) var<storage, read> outliers: array<u32>;
@group(0) @binding(8) var<storage, read_write> y: array<f32>;  // (1, tokens, y_rows)
@group(0) @binding(9) var<storage, read> squares: array<vec4<f32>>;

fn store_y(i: u32, value: f32) { y[i] = value; }

@compute @workgroup_size(LANES)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  rows_product(group.x * LANES * ROWS + lane, norm_factor(share_of_squares(0u, 1u)));
}
