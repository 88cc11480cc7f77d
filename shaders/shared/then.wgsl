// What follows a matvec of one token: SwiGLU, or the residual and the next norm. Beside it stand norm.wgsl and gated.wgsl;
// the importer provides  y: array<atomic<u32>>  f32 (splits, y_rows),  params.y_rows, params.splits, params.dim.

override gated: bool;

fn store_y(i: u32, value: f32) { atomicStore(&y[i], bitcast<u32>(value)); }

fn y_sum(token: u32, i: u32) -> f32 {
  var sum = 0.0;
  for (var split = 0u; split < params.splits; split++) { sum += bitcast<f32>(atomicLoad(&y[split * params.y_rows + i])); }
  return sum;
}

// To be called by all lanes of the workgroup.
fn then(lane: u32) {
  if (gated) {
    let n_blocks = (params.dim + 31u) / 32u;
    for (var start = 0u; start < n_blocks * 8u; start += lanes) {
      quantize4(gated4(0u, start + lane, params.dim), lane, 0u, start + lane, n_blocks);
    }
  } else {
    norm(lane, 0u, 0u);
  }
}
