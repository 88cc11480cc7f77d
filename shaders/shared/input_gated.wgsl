// input_made.wgsl's h = silu(gate) * up, as swiglu.wgsl makes it. Beside it stands silu.wgsl; the importer provides
// gate_up: array<vec4<f32>>  (gate_splits, 2 cols / 4)  and  params.cols, a multiple of 4.

override gate_splits: u32;  // known beforehand, so that all loads are under way together

fn made4(lane: u32, quad: u32) -> vec4<f32> {
  let quads = params.cols / 4u;
  var gate = vec4<f32>(0.0);
  var up = vec4<f32>(0.0);
  if (lane < 8u * split_blocks) {
    for (var i = 0u; i < gate_splits; i++) {
      let at = 2u * i * quads + min(quad, quads - 1u);
      gate += gate_up[at];
      up += gate_up[at + quads];
    }
  }
  return select(vec4<f32>(0.0), silu(gate) * up, quad < quads);
}
