// matvec of one token whose input is h = silu(gate) * up: every workgroup makes the columns that it reads. One launch instead of
// two where these are few (model/gpu_matrix.py). Lanes, segments, splits and dispatch as in matvec.

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
//#import silu
//#import input_made
//#import input_gated
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
  cols: u32,  // hidden_dim
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> row_info: array<Row>;
@group(0) @binding(3) var<storage, read> entries: array<u32>;  // (n_segments, rows_padded)
@group(0) @binding(4) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> outliers: array<u32>;
@group(0) @binding(6) var<storage, read> gate_up: array<vec4<f32>>;  // (gate_splits, 2 cols / 4)
@group(0) @binding(7) var<storage, read_write> y: array<f32>;  // (splits, y_rows)

fn store_y(i: u32, value: f32) { y[i] = value; }

fn product_scale(row: Row) -> f32 { return row_scale(row); }

@compute @workgroup_size(32, segments_per_group)
fn main(@builtin(local_invocation_id) local: vec3<u32>, @builtin(local_invocation_index) lane: u32,
        @builtin(workgroup_id) group: vec3<u32>) {
  let index = group.x * 32u + local.x;
  let row = row_info[index];
  let sums = segment_product(group.x, group.y, local.xy, row);
  write_sums(sums, row, index, local.xy, group.y);
}
