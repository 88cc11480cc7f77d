// A bit stream read sixteen bytes at a time, most significant bit first. The chunks of a tile's rows alternate, so that
// those who decode them walk through memory together: on a GPU the chunks that 32 lanes load lie side by side, and a CPU's
// prefetcher sees a straight line. A GPU fetches a chunk long before it is needed, as memory is far away.
// Beside it stand funnel.wgsl and words.wgsl.

const INTERLEAVE = 32u;  // rows of a tile

struct Stream {
  state: u32,
  table: u32,  // first entry of its decode table
  pos: u32,    // bits of `a` that came before w0, 0..127
  used: u32,   // bits that were in w0..w3 and no longer are
  next: u32,   // index of b
  a: vec4<u32>,
  b: vec4<u32>,
  c: vec4<u32>,  // on its way; not on a CPU
  w0: u32,     // the next bits when refilled, as many as ans.wgsl's most_bits asks for; ever fewer until it is again
  w1: u32,
  w2: u32,
  w3: u32,
}

// Bit `offset` of the row that begins with bit `bit` of its first chunk's place; both as if nothing alternated.
fn open_stream(bit: u32, offset: u32, state: u32, table: u32) -> Stream {
  let pos = (bit & 127u) + offset;
  let chunk = (bit >> 7u) + (pos >> 7u) * INTERLEAVE;
  let next = chunk + INTERLEAVE;
  var s = Stream(state, table, pos & 127u, 0u, next, chunk_at(chunk), chunk_at(next), chunk_at(next + INTERLEAVE),
                 0u, 0u, 0u, 0u);
  align(&s);
  return s;
}

fn align(s: ptr<function, Stream>) {
  let a = (*s).a;
  let b = (*s).b;
  let two = ((*s).pos & 64u) != 0u;
  let one = ((*s).pos & 32u) != 0u;
  let v0 = select(a.x, a.z, two);
  let v1 = select(a.y, a.w, two);
  let v2 = select(a.z, b.x, two);
  let v3 = select(a.w, b.y, two);
  let v4 = select(b.x, b.z, two);
  let v5 = select(b.y, b.w, two);
  let u1 = select(v1, v2, one);
  let u2 = select(v2, v3, one);
  let u3 = select(v3, v4, one);
  let bits = (*s).pos & 31u;
  (*s).w0 = funnel(select(v0, v1, one), u1, bits);
  (*s).w1 = funnel(u1, u2, bits);
  if (most_bits() > 64u) { (*s).w2 = funnel(u2, u3, bits); }
  if (most_bits() > 96u) { (*s).w3 = funnel(u3, select(v4, v5, one), bits); }
}

// By 1..31 bits, so that of 32 there are left what the low five bits of `left` say. What is shifted in at the end is of no
// use: whoever refills in time never sees it, nor does the compiler compute it.
fn advance(s: ptr<function, Stream>, left: u32) {
  let rest = left & 31u;
  (*s).w0 = funnel_right((*s).w0, (*s).w1, rest);
  (*s).w1 = funnel_right((*s).w1, (*s).w2, rest);
  (*s).w2 = funnel_right((*s).w2, (*s).w3, rest);
  (*s).w3 = (*s).w3 << (32u - rest);
  (*s).used += 32u - rest;
}

fn refill(s: ptr<function, Stream>) {
  let pos = (*s).pos + (*s).used;
  let crossed = pos >= 128u;
  (*s).pos = pos & 127u;
  (*s).used = 0u;
  cross_chunk(s, crossed);
  align(s);
}

// Words that a window has no bits in still have old ones, and compilers shift these too, not knowing that nobody will see
// them. For a stream that has just been refilled.
fn clear_rest(s: ptr<function, Stream>) {
  if (most_bits() <= 64u) { (*s).w2 = 0u; }
  if (most_bits() <= 96u) { (*s).w3 = 0u; }
}

// Bits between the row's first one, which is bit `bit`, and a stream that has just been refilled.
fn bits_read(s: ptr<function, Stream>, bit: u32) -> u32 {
  let chunks = ((*s).next - (bit >> 7u)) / INTERLEAVE - 1u;
  return 128u * chunks + (*s).pos - (bit & 127u);
}
