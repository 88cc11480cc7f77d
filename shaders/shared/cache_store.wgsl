// Writing to the cache; cache.wgsl stands beside.

fn pack_f16(x: Pair) -> vec4<u32> {
  return vec4<u32>(
    pack2x16float(vec2<f32>(x.lo.x, x.hi.x)),
    pack2x16float(vec2<f32>(x.lo.y, x.hi.y)),
    pack2x16float(vec2<f32>(x.lo.z, x.hi.z)),
    pack2x16float(vec2<f32>(x.lo.w, x.hi.w)),
  );
}

struct Packed {
  words: vec2<u32>,  // in 4 bits the first one
  scale: f32,
}

fn pack(x: Pair, largest: f32, bits: u32) -> Packed {
  let top = select(127.0, 7.0, bits == 4u);
  let inverse = select(0.0, top / largest, largest > 0.0);
  let lo = pack4xI8(vec4<i32>(round(x.lo * inverse)));
  let hi = pack4xI8(vec4<i32>(round(x.hi * inverse)));
  if (bits == 8u) { return Packed(vec2<u32>(lo, hi), largest / top); }
  return Packed(vec2<u32>((lo & 0x0F0F0F0Fu) | ((hi & 0x0F0F0F0Fu) << 4u), 0u), largest / (16.0 * top));
}

// `largest`: of the row's elements; only what is kept in 8 or 4 bits asks for it.
fn store_key(row: u32, quad: u32, x: Pair, largest: f32) {
  let at = vector_at(row, quad, key_bits);
  if (key_bits == 32u) {
    k_cache[at] = bitcast<vec4<u32>>(x.lo);
    k_cache[at + params.half_padded / 4u] = bitcast<vec4<u32>>(x.hi);
  } else if (key_bits == 16u) {
    k_cache[at] = pack_f16(x);
  } else {
    let p = pack(x, largest, key_bits);
    if (key_bits == 8u) {
      k_cache[at][2u * (quad & 1u)] = p.words.x;
      k_cache[at][2u * (quad & 1u) + 1u] = p.words.y;
    } else {
      k_cache[at][quad & 3u] = p.words.x;
    }
    if (quad == 0u) { k_cache[first_scale(key_bits) + (row >> 2u)][row & 3u] = bitcast<u32>(p.scale); }
  }
}

fn store_value(row: u32, quad: u32, x: Pair, largest: f32) {
  let at = vector_at(row, quad, value_bits);
  if (value_bits == 32u) {
    v_cache[at] = bitcast<vec4<u32>>(x.lo);
    v_cache[at + params.half_padded / 4u] = bitcast<vec4<u32>>(x.hi);
  } else if (value_bits == 16u) {
    v_cache[at] = pack_f16(x);
  } else {
    let p = pack(x, largest, value_bits);
    if (value_bits == 8u) {
      v_cache[at][2u * (quad & 1u)] = p.words.x;
      v_cache[at][2u * (quad & 1u) + 1u] = p.words.y;
    } else {
      v_cache[at][quad & 3u] = p.words.x;
    }
    if (quad == 0u) { v_cache[first_scale(value_bits) + (row >> 2u)][row & 3u] = bitcast<u32>(p.scale); }
  }
}
