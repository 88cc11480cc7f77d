// input_made.wgsl's norm of x + y, its factor apart (norm_factor.wgsl). Lanes are no fewer than quads of all columns, in whole
// blocks, as every workgroup adds up all squares. Beside it stands product.wgsl; the importer provides  x: array<vec4<f32>>,
// added: array<vec4<f32>>  (added_splits, norm_dim / 4),  weight: array<vec4<f32>>,  x_out: array<vec4<f32>>,  which takes x + y,
// and  params.norm_dim, a multiple of 4.

override added_splits: u32;  // of y; 0: nothing is added

var<workgroup> lane_squares: array<f32, lanes>;
var<private> leaves_x: bool;  // whether this is the workgroup that fills x_out

// The split's quads first, the others by the lanes after these.
fn made4(lane: u32, quad: u32) -> vec4<f32> {
  let quads = params.norm_dim / 4u;
  let at = quad % (8u * params.n_blocks);
  var v = vec4<f32>(0.0);
  if (lane < 8u * params.n_blocks && at < quads) {
    for (var i = 0u; i < added_splits; i++) { v += added[i * quads + at]; }
    v += x[at];
    if (leaves_x) { x_out[at] = v; }
    lane_squares[lane] = dot(v, v);
    v *= weight[at];
  } else {
    lane_squares[lane] = 0.0;
  }
  return v;
}

// To be called after segment_product; a barrier later product_scale may be.
fn share_squares(lane: u32) {
  if (lane < 32u) {
    var sum = 0.0;
    for (var i = lane; i < lanes; i += 32u) { sum += lane_squares[i]; }
    leave_share(lane, sum);
  }
}

// The row's scale and the norm's factor.
fn product_scale(row: Row) -> f32 { return row_scale(row) * shared_factor(); }
