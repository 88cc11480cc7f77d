// y[row] = scale[row] * sum of W[row, column] x[column], W uncompressed: what the coded matvec is measured against.
// bits 16: W f16, x f32. bits 8 and 4: W and x int8 and int4 (0..15, 8 is zero), integer dot products, x scaled by blocks
// of 32 columns as everywhere. A lane takes 16 bytes of each of its rows at a time, its neighbour the next 16.
// Workgroup = row_lanes lanes by groups of ROWS rows. Dispatch: ceil(rows / (row_groups * ROWS)); rows are a multiple.

override bits: u32;        // 16, 8 or 4
override row_lanes: u32;   // that share a row; a power of two
override row_groups: u32;  // of a workgroup
override partials: u32;    // row_lanes * row_groups

const ROWS = 4u;  // that a lane takes at once, each 16 bytes of x loaded once for them

struct Params { rows: u32, cols: u32 }

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;  // f32 for 16 bits; int8, 4-bit weights take columns 16 apart
@group(0) @binding(3) var<storage, read> x_scale: array<vec2<f32>>;  // of 32 columns: scale, scale * sum
@group(0) @binding(4) var<storage, read> scale: array<f32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

var<workgroup> partial: array<vec4<f32>, partials>;

fn dot_bytes(a: vec4<u32>, b: vec4<u32>) -> i32 {
  return dot4I8Packed(a.x, b.x) + dot4I8Packed(a.y, b.y) + dot4I8Packed(a.z, b.z) + dot4I8Packed(a.w, b.w);
}

fn dot_halves(a: u32, b: vec2<u32>) -> f32 {
  let h = unpack2x16float(a);
  return h.x * bitcast<f32>(b.x) + h.y * bitcast<f32>(b.y);
}

@compute @workgroup_size(row_lanes, row_groups)
fn main(@builtin(local_invocation_id) local: vec3<u32>, @builtin(local_invocation_index) lane: u32,
        @builtin(workgroup_id) group: vec3<u32>) {
  let row = (group.x * row_groups + local.y) * ROWS;
  let chunks = params.cols * bits / 128u;
  var sums = vec4<f32>(0.0);
  for (var c = local.x; c < chunks; c += row_lanes) {
    let first = row * chunks + c;
    let rows = array(w[first], w[first + chunks], w[first + 2u * chunks], w[first + 3u * chunks]);
    if (bits == 16u) {
      let x0 = x[2u * c];
      let x1 = x[2u * c + 1u];
      for (var r = 0u; r < ROWS; r++) {
        sums[r] += dot_halves(rows[r].x, x0.xy) + dot_halves(rows[r].y, x0.zw)
                 + dot_halves(rows[r].z, x1.xy) + dot_halves(rows[r].w, x1.zw);
      }
    } else if (bits == 8u) {
      let x0 = x[c];
      let s = x_scale[c / 2u].x;
      for (var r = 0u; r < ROWS; r++) { sums[r] += f32(dot_bytes(rows[r], x0)) * s; }
    } else {
      let x0 = x[2u * c];
      let x1 = x[2u * c + 1u];
      let s = x_scale[c];
      for (var r = 0u; r < ROWS; r++) {
        let low = rows[r] & vec4<u32>(0x0F0F0F0Fu);
        let high = (rows[r] >> vec4<u32>(4u)) & vec4<u32>(0x0F0F0F0Fu);
        sums[r] += f32(dot_bytes(low, x0) + dot_bytes(high, x1)) * s.x - 8.0 * s.y;
      }
    }
  }
  partial[lane] = sums;
  workgroupBarrier();
  for (var stride = row_lanes / 2u; stride > 0u; stride >>= 1u) {
    if (local.x < stride) { partial[lane] += partial[lane + stride]; }
    workgroupBarrier();
  }
  if (local.x < ROWS) { y[row + local.x] = partial[local.y * row_lanes][local.x] * scale[row + local.x]; }
}
