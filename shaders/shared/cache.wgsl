// Keys and values as the cache holds them, a row for each head and position: quads of pairs (pairs.wgsl stands beside), in
// vectors of four u32. In 32 bits an element is an f32, all elements i of the row before all i + head_dim / 2; in 16 bits a
// pair is a u32. In 8 and 4 bits elements are integers, a vector has two quads or four, and behind all rows there are their
// scales: in 8 bits an f32, the row's largest element is 127 of it; in 4 bits, which only values may have, one for each half
// of the head, whose largest is 7 times 16 of it (see unpack).
// The importer provides  k_cache, v_cache: array<vec4<u32>>,  params.n_kv_heads, params.max_pos.

override half_quads: u32;  // of a head's pairs, head_dim / 2 of them: a quarter, rounded up; the padding stays zero
override key_bits: u32;    // 32, 16, 8
override value_bits: u32;  // or 4

fn row_vectors(bits: u32) -> u32 { return (half_quads * bits + 15u) / 16u; }

fn vector_at(row: u32, quad: u32, bits: u32) -> u32 {
  if (bits == 32u) { return row * row_vectors(bits) + quad; }  // and as many further on
  return row * row_vectors(bits) + quad * bits / 16u;
}

// Where the scales begin, in vectors.
fn first_scale(bits: u32) -> u32 { return params.n_kv_heads * params.max_pos * row_vectors(bits); }

fn unpack(v: vec4<u32>, quad: u32, bits: u32) -> Pair {  // its scale apart
  if (bits == 8u) {
    let two = select(v.xy, v.zw, (quad & 1u) == 1u);
    return Pair(vec4<f32>(unpack4xI8(two.x)), vec4<f32>(unpack4xI8(two.y)));
  }
  if (bits == 4u) {  // the halves of bytes, as the high halves
    let word = v[quad & 3u];
    return Pair(vec4<f32>(unpack4xI8((word << 4u) & 0xF0F0F0F0u)), vec4<f32>(unpack4xI8(word & 0xF0F0F0F0u)));
  }
  let a = unpack2x16float(v.x);
  let b = unpack2x16float(v.y);
  let c = unpack2x16float(v.z);
  let d = unpack2x16float(v.w);
  return Pair(vec4<f32>(a.x, b.x, c.x, d.x), vec4<f32>(a.y, b.y, c.y, d.y));
}

struct Vectors { a: vec4<u32>, b: vec4<u32> }  // that a quad is in; the second one of 32 bits

fn pair_in(v: Vectors, quad: u32, bits: u32) -> Pair {
  if (bits == 32u) { return Pair(bitcast<vec4<f32>>(v.a), bitcast<vec4<f32>>(v.b)); }
  return unpack(v.a, quad, bits);
}

fn key_vectors(row: u32, quad: u32) -> Vectors {
  let at = vector_at(row, quad, key_bits);
  var v = Vectors(k_cache[at], vec4<u32>(0u));
  if (key_bits == 32u) { v.b = k_cache[at + half_quads]; }
  return v;
}

fn value_vectors(row: u32, quad: u32) -> Vectors {
  let at = vector_at(row, quad, value_bits);
  var v = Vectors(v_cache[at], vec4<u32>(0u));
  if (value_bits == 32u) { v.b = v_cache[at + half_quads]; }
  return v;
}

fn key(row: u32, quad: u32) -> Pair { return pair_in(key_vectors(row, quad), quad, key_bits); }

fn value(row: u32, quad: u32) -> Pair { return pair_in(value_vectors(row, quad), quad, value_bits); }

fn key_scale(row: u32) -> f32 {
  if (key_bits >= 16u) { return 1.0; }
  return bitcast<f32>(k_cache[first_scale(key_bits) + (row >> 2u)][row & 3u]);
}

fn value_scale(row: u32) -> vec2<f32> {  // of elements i, of i + head_dim / 2
  if (value_bits >= 16u) { return vec2<f32>(1.0); }
  if (value_bits == 8u) { return vec2<f32>(bitcast<f32>(v_cache[first_scale(8u) + (row >> 2u)][row & 3u])); }
  let two = v_cache[first_scale(4u) + (row >> 1u)];
  return bitcast<vec2<f32>>(select(two.xy, two.zw, (row & 1u) == 1u));
}
