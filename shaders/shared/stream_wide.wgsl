// A bit stream read sixteen bytes at a time: for software adapters, where a load costs the same for 4 bytes and 16,
// and where `select` on registers is all but free. Same contract as stream.wgsl; words is array<vec4<u32>>, in which
// the chunks of `interleave` neighbouring rows alternate: their lanes then walk through memory together, in a straight
// line that a CPU's prefetcher sees.

override interleave: u32;

struct Stream {
  state: u32,
  table: u32,     // first entry of its decode table
  pos: u32,       // bits of w0 already used, 0..31
  word: u32,      // word of `a` that w0 is, 0..3 when aligned
  next: u32,      // index of b
  a: vec4<u32>,
  b: vec4<u32>,
  w0: u32,
  w1: u32,
  w2: u32,
  w3: u32,
  w4: u32,
}

fn open_stream(bit: u32, state: u32, table: u32) -> Stream {
  let first = bit >> 7u;
  var s = Stream(state, table, bit & 31u, (bit >> 5u) & 3u, first + interleave, words[first], words[first + interleave], 0u, 0u, 0u, 0u, 0u);
  align(&s);
  return s;
}

// w0..w4 = five words of (a, b) from `word` on: enough for 31 + 128 bits.
fn align(s: ptr<function, Stream>) {
  let a = (*s).a;
  let b = (*s).b;
  let two = ((*s).word & 2u) != 0u;
  let one = ((*s).word & 1u) != 0u;
  let v0 = select(a.x, a.z, two);
  let v1 = select(a.y, a.w, two);
  let v2 = select(a.z, b.x, two);
  let v3 = select(a.w, b.y, two);
  let v4 = select(b.x, b.z, two);
  let v5 = select(b.y, b.w, two);
  (*s).w0 = select(v0, v1, one);
  (*s).w1 = select(v1, v2, one);
  (*s).w2 = select(v2, v3, one);
  (*s).w3 = select(v3, v4, one);
  (*s).w4 = select(v4, v5, one);
}

fn refill(s: ptr<function, Stream>) {  // after at most 128 bits
  let crossed = (*s).word >= 4u;
  (*s).word &= 3u;
  (*s).a = select((*s).a, (*s).b, crossed);
  (*s).next += select(0u, interleave, crossed);
  (*s).b = words[(*s).next];
  align(s);
}

fn window(s: ptr<function, Stream>) -> u32 {
  return ((*s).w0 << (*s).pos) | (((*s).w1 >> 1u) >> ((~(*s).pos) & 31u));
}

fn advance(s: ptr<function, Stream>, bits: u32) {  // bits <= 32
  let pos = (*s).pos + bits;
  let crossed = pos >= 32u;
  (*s).pos = pos & 31u;
  (*s).word += select(0u, 1u, crossed);
  (*s).w0 = select((*s).w0, (*s).w1, crossed);
  (*s).w1 = select((*s).w1, (*s).w2, crossed);
  (*s).w2 = select((*s).w2, (*s).w3, crossed);
  (*s).w3 = select((*s).w3, (*s).w4, crossed);
}
