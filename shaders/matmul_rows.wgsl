// y[t, row] = scale[row] * sum of W[row, column] x[t, column], W decoded by decode_rows: matmul for software adapters.
// A lane multiplies ROWS rows with TOKENS tokens. All integers go through f32, which holds them and a block's sum
// exactly, as a CPU has no dot product of bytes here; activations lie in uniform memory, where loads are the cheapest.
// Dispatch: (ceil(rows / (LANES * ROWS)), tokens / TOKENS). Same arithmetic as matmul.

//#import matrix
//#import planes

override n_states: u32;  // as ans.wgsl has them
override raw_bits: u32;

const LANES = 8u;
const ROWS = 4u;
const TOKENS = 8u;

struct Params {
  rows: u32,       // to be multiplied
  first_row: u32,  // their first in row_info
  y_rows: u32,
  first_token: u32,  // what the first of x is in y
  n_blocks: u32,
  n_segments: u32,
  byte_rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> bytes: array<vec4<u32>>;  // (n_blocks, planes, 2, byte_rows)
@group(0) @binding(2) var<storage, read> row_info: array<Row>;
@group(0) @binding(3) var<storage, read> far_outliers: array<u32>;
@group(0) @binding(4) var<uniform> x_digits: array<vec4<u32>, 4096>;  // (tokens, 2 n_blocks)
@group(0) @binding(5) var<uniform> x_scale: array<vec4<f32>, 1024>;   // (tokens, n_blocks) of scale, sum: in pairs
@group(0) @binding(6) var<storage, read_write> y: array<f32>;         // (tokens, y_rows)

struct Columns {  // sixteen of them: four columns of four rows a matrix
  a: mat4x4<f32>,
  b: mat4x4<f32>,
  c: mat4x4<f32>,
  d: mat4x4<f32>,
}

fn floats(word: u32) -> vec4<f32> { return vec4<f32>(unpack4xI8(word)); }

fn quad(row0: u32, row1: u32, row2: u32, row3: u32) -> mat4x4<f32> {
  return transpose(mat4x4<f32>(floats(row0), floats(row1), floats(row2), floats(row3)));
}

fn columns(at: u32) -> Columns {
  let r0 = bytes[at];
  let r1 = bytes[at + LANES];
  let r2 = bytes[at + 2u * LANES];
  let r3 = bytes[at + 3u * LANES];
  return Columns(
    quad(r0.x, r1.x, r2.x, r3.x),
    quad(r0.y, r1.y, r2.y, r3.y),
    quad(r0.z, r1.z, r2.z, r3.z),
    quad(r0.w, r1.w, r2.w, r3.w));
}

fn product(w: Columns, x: vec4<u32>) -> vec4<f32> {
  return w.a * floats(x.x) + w.b * floats(x.y) + w.c * floats(x.z) + w.d * floats(x.w);
}

fn scale_of(token: u32, block: u32) -> f32 {
  let i = token * params.n_blocks + block;
  return x_scale[i >> 1u][(i & 1u) << 1u];
}

fn block_product(low: Columns, high: Columns, token: u32, step: u32) -> vec4<f32> {
  let block = step / planes;
  let at = (token * params.n_blocks + block) * 2u;
  let dots = product(low, x_digits[at]) + product(high, x_digits[at + 1u]);
  return dots * (scale_of(token, block) * f32(1u << plane_shift(step % planes)));
}

fn activation(token: u32, column: u32) -> f32 {
  let word = x_digits[token * 2u * params.n_blocks + (column >> 4u)][(column >> 2u) & 3u];
  return f32(extractBits(bitcast<i32>(word), (column & 3u) * 8u, 8u)) * scale_of(token, column >> 5u);
}

@compute @workgroup_size(LANES)
fn main(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
  let first = group.x * LANES * ROWS + lane;
  let token = group.y * TOKENS;
  // Written out: arrays that a loop indexes would not become registers.
  var s0 = vec4<f32>(0.0);
  var s1 = vec4<f32>(0.0);
  var s2 = vec4<f32>(0.0);
  var s3 = vec4<f32>(0.0);
  var s4 = vec4<f32>(0.0);
  var s5 = vec4<f32>(0.0);
  var s6 = vec4<f32>(0.0);
  var s7 = vec4<f32>(0.0);
  for (var step = 0u; step < params.n_blocks * planes; step++) {
    let low = columns(2u * step * params.byte_rows + first);
    let high = columns((2u * step + 1u) * params.byte_rows + first);
    s0 += block_product(low, high, token, step);
    s1 += block_product(low, high, token + 1u, step);
    s2 += block_product(low, high, token + 2u, step);
    s3 += block_product(low, high, token + 3u, step);
    s4 += block_product(low, high, token + 4u, step);
    s5 += block_product(low, high, token + 5u, step);
    s6 += block_product(low, high, token + 6u, step);
    s7 += block_product(low, high, token + 7u, step);
  }
  let sums = array<vec4<f32>, TOKENS>(s0, s1, s2, s3, s4, s5, s6, s7);
  for (var r = 0u; r < ROWS; r++) {
    let index = first + r * LANES;
    if (index < params.rows) {
      let row = row_info[params.first_row + index];
      let place = matrix_row(row);
      var total: array<f32, TOKENS>;
      for (var t = 0u; t < TOKENS; t++) { total[t] = sums[t][r]; }
      let end = far_outliers[place + 1u];
      for (var k = far_outliers[place]; k < end; k++) {
        let outlier = far_outliers[k];
        for (var t = 0u; t < TOKENS; t++) {
          total[t] += outlier_value(outlier, row_raw_bits(row)) * activation(token + t, outlier_column(outlier));
        }
      }
      for (var t = 0u; t < TOKENS; t++) {
        y[(params.first_token + token + t) * params.y_rows + place] = total[t] * row_scale(row);
      }
    }
  }
}
