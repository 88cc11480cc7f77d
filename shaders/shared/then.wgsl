// What follows a matvec of one token, block by block of 32 columns: SwiGLU, or the residual x += y and the next norm. A block
// is done by the workgroup that stores the last of the rows it waits for, so that nobody waits for a launch or for one
// workgroup. A norm's digits lack the factor that only the whole vector tells: the matvec that reads them finds it by
// `squares` (norm_factor.wgsl). Where this may be done, and why by atomics: last.wgsl.
// Beside it stand quantize.wgsl, quantize_normed.wgsl and gated.wgsl; the importer provides  y: array<atomic<u32>>  f32 (splits, y_rows),
// arrived: array<atomic<u32>>  zeros, one a block, and they are left as zeros,  x, weight: array<f32>,
// squares: array<vec4<f32>>,  params.y_rows, params.dim.

override gated: bool;
override splits: u32;  // of y: known beforehand, so that all its loads are under way together

const NO_QUAD = 0x0FFFFFFFu;

var<workgroup> n_ready: atomic<u32>;
var<workgroup> n_blocks_ready: u32;
var<workgroup> ready: array<u32, 32>;  // blocks: a workgroup has 32 rows

fn store_y(i: u32, value: f32) { atomicStore(&y[i], bitcast<u32>(value)); }

fn y_at(i: u32) -> f32 { return bitcast<f32>(atomicLoad(&y[i])); }

fn y_sum4(token: u32, columns: vec4<u32>) -> vec4<f32> {
  var sum = vec4<f32>(0.0);
  for (var split = 0u; split < splits; split++) {
    let i = vec4<u32>(split * params.y_rows) + columns;
    sum += vec4<f32>(y_at(i.x), y_at(i.y), y_at(i.z), y_at(i.w));
  }
  return sum;
}

fn none_ready(lane: u32) {  // a barrier later `arrive` may be called
  if (lane == 0u) { atomicStore(&n_ready, 0u); }
}

// For each row that is stored, by the lane that did, after a storageBarrier.
fn arrive(row: u32) {
  let block = select(row, row % params.dim, gated) / 32u;
  let rows = min(32u, params.dim - 32u * block) * select(1u, 2u, gated);
  if (atomicAdd(&arrived[block], 1u) == rows * splits - 1u) {
    atomicStore(&arrived[block], 0u);
    ready[atomicAdd(&n_ready, 1u)] = block;
  }
}

// To be called by all lanes when their rows have arrived.
fn then(lane: u32) {
  workgroupBarrier();
  if (lane == 0u) { n_blocks_ready = atomicLoad(&n_ready); }
  let n = workgroupUniformLoad(&n_blocks_ready);
  storageBarrier();
  for (var first = 0u; first < n; first += lanes / 8u) {
    let slot = first + lane / 8u;
    var quad = NO_QUAD;
    if (slot < n) { quad = 8u * ready[slot] + lane % 8u; }
    if (gated) { finish_gated(lane, quad); } else { finish_norm(lane, quad); }
  }
}

fn finish_gated(lane: u32, quad: u32) {
  quantize4(gated4(0u, quad, params.dim), lane, 0u, quad, (params.dim + 31u) / 32u);
}

fn finish_norm(lane: u32, quad: u32) {
  let at = columns_of(quad, params.dim);
  let v = vec4<f32>(x[at.x], x[at.y], x[at.z], x[at.w]) + y_sum4(0u, at);
  var normed = vec4<f32>(0.0);
  var sum = 0.0;
  for (var k = 0u; k < 4u; k++) {
    if (4u * quad + k < params.dim) {
      x[at[k]] = v[k];
      normed[k] = v[k] * weight[at[k]];
      sum += v[k] * v[k];
    }
  }
  workgroupBarrier();  // the last round's readers are done
  sum = quantize_normed(normed, sum, lane, quad, (params.dim + 31u) / 32u);
  if (quad != NO_QUAD && lane % 8u == 0u) { squares[quad / 32u][quad / 8u % 4u] = sum; }
}
