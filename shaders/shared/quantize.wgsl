// Activations to int8 digits, four columns a lane, as quantized.wgsl has them, which stands beside, with digits.wgsl.
// The importer provides  x_digits: array<u32>  (tokens, digits, 4-column groups)  and  x_scale: array<vec2<f32>>.
// For weights without loss x_digits takes the f32 themselves, (tokens, columns), and x_scale nothing.

// The columns of a quad. Past the end the last one stands again, whose load does no harm.
fn columns_of(quad: u32, dim: u32) -> vec4<u32> {
  return min(vec4<u32>(4u * quad) + vec4<u32>(0u, 1u, 2u, 3u), vec4<u32>(dim - 1u));
}

// To be called by all lanes of the workgroup; `group` = column / 4; groups past the end carry v = 0 and write nothing.
fn quantize4(v: vec4<f32>, lane: u32, token: u32, group: u32, n_blocks: u32) {
  if (digits == FLOAT) {
    if (group < n_blocks * 8u) {
      let first = 4u * (token * n_blocks * 8u + group);
      for (var k = 0u; k < 4u; k++) { x_digits[first + k] = bitcast<u32>(v[k]); }
    }
    return;
  }
  workgroupBarrier();  // the last call's readers are done
  share_size(v, lane);
  workgroupBarrier();
  let q = quantized(v, lane);
  let used = group < n_blocks * 8u;
  for (var digit = 0u; digit < digits; digit++) {
    if (used) { x_digits[((token * digits + digit) * n_blocks * 8u) + group] = q.words[digit]; }
  }
  workgroupBarrier();
  if (used && (lane & 7u) == 0u) {
    x_scale[token * n_blocks + (group >> 3u)] = vec2<f32>(q.scale, q.scale * block_total(lane));
  }
}
