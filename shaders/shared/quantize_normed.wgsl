// A norm's digits without its factor, four columns a lane, and each block's sum of squares, of which that is made
// (norm_factor.wgsl). Beside it stands quantize.wgsl.

var<workgroup> quad_squares: array<f32, lanes>;

// `normed` are the quad's columns times the norm's weights, `square` the sum of the columns' squares; to the first of a block's eight
// lanes returns the block's. To be called by all lanes, and a barrier before it is called again.
fn quantize_normed(normed: vec4<f32>, square: f32, lane: u32, quad: u32, n_blocks: u32) -> f32 {
  quad_squares[lane] = square;
  quantize4(normed, lane, 0u, quad, n_blocks);
  var sum = square;
  if (lane % 8u == 0u) {
    for (var i = 1u; i < 8u; i++) { sum += quad_squares[lane + i]; }
  }
  return sum;
}
