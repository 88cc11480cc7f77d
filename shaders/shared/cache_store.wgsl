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

// The vectors that a lane would load of a key, were it in the cache. `most`: the largest of the row's keys; only integers
// ask for it, here and below.
fn packed_key(x: Pair, most: f32) -> Vectors {
  if (key_bits == 32u) { return Vectors(bitcast<vec4<u32>>(x.lo), bitcast<vec4<u32>>(x.hi)); }
  if (key_bits == 16u) { return Vectors(pack_f16(x), vec4<u32>(0u)); }
  return Vectors(vec2<u32>(integers(x.lo, most, 127.0), integers(x.hi, most, 127.0)).xyxy, vec4<u32>(0u));
}

// `most`: of the values of either half.
fn packed_value(x: Pair, most: vec2<f32>) -> Vectors {
  if (value_bits == 32u) { return Vectors(bitcast<vec4<u32>>(x.lo), bitcast<vec4<u32>>(x.hi)); }
  if (value_bits == 16u) { return Vectors(pack_f16(x), vec4<u32>(0u)); }
  if (value_bits == 8u) {
    let both = max(most.x, most.y);
    return Vectors(vec2<u32>(integers(x.lo, both, 127.0), integers(x.hi, both, 127.0)).xyxy, vec4<u32>(0u));
  }
  let lo = integers(x.lo, most.x, 7.0) & 0x0F0F0F0Fu;
  let hi = integers(x.hi, most.y, 7.0) & 0x0F0F0F0Fu;
  return Vectors(vec4<u32>(lo | (hi << 4u)), vec4<u32>(0u));
}

fn packed_key_scale(most: f32) -> f32 { return most / 127.0; }

fn packed_value_scale(most: vec2<f32>) -> vec2<f32> {
  if (value_bits == 8u) { return vec2<f32>(max(most.x, most.y) / 127.0); }
  return most / (16.0 * 7.0);
}

fn store_key(row: u32, quad: u32, x: Pair, most: f32) {
  let at = vector_at(row, quad, key_bits);
  let v = packed_key(x, most);
  if (key_bits >= 16u) {
    k_cache[at] = v.a;
    if (key_bits == 32u) { k_cache[at + half_quads] = v.b; }
  } else {
    k_cache[at][2u * (quad & 1u)] = v.a.x;
    k_cache[at][2u * (quad & 1u) + 1u] = v.a.y;
    if (quad == 0u) { k_cache[first_scale(8u) + (row >> 2u)][row & 3u] = bitcast<u32>(packed_key_scale(most)); }
  }
}

fn store_value(row: u32, quad: u32, x: Pair, most: vec2<f32>) {
  let at = vector_at(row, quad, value_bits);
  let v = packed_value(x, most);
  let scales = bitcast<vec2<u32>>(packed_value_scale(most));
  if (value_bits >= 16u) {
    v_cache[at] = v.a;
    if (value_bits == 32u) { v_cache[at + half_quads] = v.b; }
  } else if (value_bits == 8u) {
    v_cache[at][2u * (quad & 1u)] = v.a.x;
    v_cache[at][2u * (quad & 1u) + 1u] = v.a.y;
    if (quad == 0u) { v_cache[first_scale(8u) + (row >> 2u)][row & 3u] = scales.x; }
  } else {
    v_cache[at][quad & 3u] = v.a.x;
    if (quad == 0u) {
      v_cache[first_scale(4u) + (row >> 1u)][2u * (row & 1u)] = scales.x;
      v_cache[first_scale(4u) + (row >> 1u)][2u * (row & 1u) + 1u] = scales.y;
    }
  }
}
