// What follows a matvec of one token: SwiGLU, or the residual and the next norm. Beside it stand norm.wgsl and gated.wgsl;
// the importer provides  y: array<atomic<u32>>  f32 (splits, y_rows),  params.y_rows, params.dim.

override gated: bool;
override splits: u32;  // of y: known beforehand, so that all its loads are under way together

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
