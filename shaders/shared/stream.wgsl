// A bit stream read word by word, most significant bit first, one word prefetched: for GPUs.
// The importer provides  words: array<u32>.

struct Stream {
  state: u32,
  pos: u32,   // bits of w0 already used, 0..31
  next: u32,  // index of w2
  w0: u32,
  w1: u32,
  w2: u32,
}

fn open_stream(bit: u32, state: u32) -> Stream {
  let first = bit >> 5u;
  return Stream(state, bit & 31u, first + 2u, words[first], words[first + 1u], words[first + 2u]);
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
  (*s).next += select(0u, 1u, crossed);
  (*s).w2 = words[(*s).next];
}

fn refill(s: ptr<function, Stream>) {}  // every advance has done it

// First bit not yet used, counted from the stream's first word.
fn stream_bit(s: ptr<function, Stream>) -> u32 {
  return ((*s).next - 2u) * 32u + (*s).pos;
}
