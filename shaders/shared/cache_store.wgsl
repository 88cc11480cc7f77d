// Writing to the cache; cache.wgsl stands beside.

fn pack_f16(x: Pair) -> vec4<u32> {
  return vec4<u32>(
    pack2x16float(vec2<f32>(x.lo.x, x.hi.x)),
    pack2x16float(vec2<f32>(x.lo.y, x.hi.y)),
    pack2x16float(vec2<f32>(x.lo.z, x.hi.z)),
    pack2x16float(vec2<f32>(x.lo.w, x.hi.w)),
  );
}

// What a lane's pairs say of the scales of their row: the largest key, and of either half the largest value.
fn largest_of(k: Pair, v: Pair) -> vec3<f32> {
  return vec3<f32>(largest(max(abs(k.lo), abs(k.hi))), largest(abs(v.lo)), largest(abs(v.hi)));
}

fn largest(x: vec4<f32>) -> f32 { return max(max(x.x, x.y), max(x.z, x.w)); }

// The nearest integers, of which `top` stands for `most`.
fn integers(x: vec4<f32>, most: f32, top: f32) -> u32 {
  return pack4xI8(vec4<i32>(round(x * select(0.0, top / most, most > 0.0))));
}

// `most`: the largest of the row's keys; only integers ask for it, here and below.
fn store_key(row: u32, quad: u32, x: Pair, most: f32) {
  let at = vector_at(row, quad, key_bits);
  if (key_bits == 32u) {
    k_cache[at] = bitcast<vec4<u32>>(x.lo);
    k_cache[at + half_quads] = bitcast<vec4<u32>>(x.hi);
  } else if (key_bits == 16u) {
    k_cache[at] = pack_f16(x);
  } else {
    k_cache[at][2u * (quad & 1u)] = integers(x.lo, most, 127.0);
    k_cache[at][2u * (quad & 1u) + 1u] = integers(x.hi, most, 127.0);
    if (quad == 0u) { k_cache[first_scale(8u) + (row >> 2u)][row & 3u] = bitcast<u32>(most / 127.0); }
  }
}

// `most`: of the values of either half.
fn store_value(row: u32, quad: u32, x: Pair, most: vec2<f32>) {
  let at = vector_at(row, quad, value_bits);
  if (value_bits == 32u) {
    v_cache[at] = bitcast<vec4<u32>>(x.lo);
    v_cache[at + half_quads] = bitcast<vec4<u32>>(x.hi);
  } else if (value_bits == 16u) {
    v_cache[at] = pack_f16(x);
  } else if (value_bits == 8u) {
    let both = max(most.x, most.y);
    v_cache[at][2u * (quad & 1u)] = integers(x.lo, both, 127.0);
    v_cache[at][2u * (quad & 1u) + 1u] = integers(x.hi, both, 127.0);
    if (quad == 0u) { v_cache[first_scale(8u) + (row >> 2u)][row & 3u] = bitcast<u32>(both / 127.0); }
  } else {
    let lo = integers(x.lo, most.x, 7.0) & 0x0F0F0F0Fu;
    let hi = integers(x.hi, most.y, 7.0) & 0x0F0F0F0Fu;
    v_cache[at][quad & 3u] = lo | (hi << 4u);
    if (quad == 0u) {
      let scales = bitcast<vec2<u32>>(most / (16.0 * 7.0));
      v_cache[first_scale(4u) + (row >> 1u)][2u * (row & 1u)] = scales.x;
      v_cache[first_scale(4u) + (row >> 1u)][2u * (row & 1u) + 1u] = scales.y;
    }
  }
}
