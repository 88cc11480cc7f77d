// A bit stream read word by word, most significant bit first, one word prefetched: for GPUs.
// The importer provides  words: array<u32>.

override interleave: u32;  // rows whose 16-byte chunks alternate: 1, or what stream_wide.wgsl says

struct Stream {
  state: u32,
  table: u32,  // first entry of its decode table
  pos: u32,   // bits of w0 already used, 0..31
  next: u32,  // index of w2
  w0: u32,
  w1: u32,
  w2: u32,
}

fn open_stream(bit: u32, state: u32, table: u32) -> Stream {
  let first = bit >> 5u;
  let second = word_after(first);
  let third = word_after(second);
  return Stream(state, table, bit & 31u, third, words[first], words[second], words[third]);
}

fn word_after(i: u32) -> u32 {
  return i + 1u + select(0u, 4u * (interleave - 1u), (i & 3u) == 3u);
}

fn window(s: ptr<function, Stream>) -> u32 {
  return ((*s).w0 << (*s).pos) | (((*s).w1 >> 1u) >> ((~(*s).pos) & 31u));
}

fn advance(s: ptr<function, Stream>, bits: u32) {  // bits <= 32; select, not if: a branch costs more than the load
  let pos = (*s).pos + bits;
  let crossed = pos >= 32u;
  (*s).pos = pos & 31u;
  (*s).w0 = select((*s).w0, (*s).w1, crossed);
  (*s).w1 = select((*s).w1, (*s).w2, crossed);
  (*s).next = select((*s).next, word_after((*s).next), crossed);
  (*s).w2 = words[(*s).next];
}

fn refill(s: ptr<function, Stream>) {}  // every advance has done it

// First bit not yet used, where nothing is interleaved.
fn stream_bit(s: ptr<function, Stream>) -> u32 {
  return ((*s).next - 2u) * 32u + (*s).pos;
}
