// The streams of a coded matrix, by chunks of sixteen bytes. On software adapters words_image.wgsl takes the place of this
// file.

@group(0) @binding(1) var<storage, read> words: array<vec4<u32>>;

fn chunk_at(i: u32) -> vec4<u32> { return words[i]; }

// Lanes that need no chunk load none: fewer cache lines a load.
fn cross_chunk(s: ptr<function, Stream>, crossed: bool) {
  if (crossed) {
    (*s).a = (*s).b;
    (*s).b = (*s).c;
    (*s).next += INTERLEAVE;
    (*s).c = chunk_at((*s).next + INTERLEAVE);
  }
}
