// Four elements of a head and the four that they rotate with (RoFormer eq. 34; pairs (i, i + head_dim / 2), as Hugging Face
// stores them). The importer provides  y: array<f32>,  rope: array<vec2<f32>>  (max_pos, head_dim / 2): cos, sin,
// params.head_dim.

struct Pair { lo: vec4<f32>, hi: vec4<f32> }  // elements i.. and i + head_dim / 2..

fn indices(quad: u32) -> vec4<u32> { return 4u * quad + vec4<u32>(0u, 1u, 2u, 3u); }

// Four elements of y, zeros in place of those beyond the half of a head that begins at `begin`.
fn quad_at(begin: u32, quad: u32) -> vec4<f32> {
  let half = params.head_dim / 2u;
  let i = begin + min(indices(quad), vec4<u32>(half - 1u));
  let values = vec4<f32>(y[i.x], y[i.y], y[i.z], y[i.w]);
  return select(vec4<f32>(0.0), values, indices(quad) < vec4<u32>(half));
}

fn rotated(x: Pair, pos: u32, quad: u32) -> Pair {
  let half = params.head_dim / 2u;
  let i = pos * half + min(indices(quad), vec4<u32>(half - 1u));
  let turns = array(rope[i.x], rope[i.y], rope[i.z], rope[i.w]);
  let c = vec4<f32>(turns[0].x, turns[1].x, turns[2].x, turns[3].x);
  let s = vec4<f32>(turns[0].y, turns[1].y, turns[2].y, turns[3].y);
  return Pair(x.lo * c - x.hi * s, x.hi * c + x.lo * s);
}
