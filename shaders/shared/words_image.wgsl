// words.wgsl by an image: of storage buffers Mesa 22 loads a lane at a time, in a loop, of images all lanes in straight code.

const CHUNKS = 1024u;  // of a row of the image

@group(0) @binding(1) var words: texture_storage_2d<rgba32uint, read>;

fn chunk_at(i: u32) -> vec4<u32> { return textureLoad(words, vec2<u32>(i % CHUNKS, i / CHUNKS)); }

// A branch costs more than the load.
fn cross_chunk(s: ptr<function, Stream>, crossed: bool) {
  (*s).a = select((*s).a, (*s).b, crossed);
  (*s).next += select(0u, INTERLEAVE, crossed);
  (*s).b = chunk_at((*s).next);
}
